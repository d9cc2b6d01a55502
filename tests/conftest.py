"Shared by the tests that need real processes."
import json, multiprocessing, multiprocessing.connection, os, re, signal, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

for name, value in dict(OMP_WAIT_POLICY="passive", MPLBACKEND="agg").items():
    os.environ.setdefault(name, value)  # read where libraries are loaded
ROOT = Path(__file__).resolve().parents[1]
TINY = dict(tracker="none", device="cpu", threads=1, limit=300, epochs=3, batch_size=50, log_every=2, eval_every=1)

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; make slow and .ci/run run them")

LONGEST = (
    "evaluate notebooks sweep drift cli device distill report judges data processes solutions".split()
)  # begun first, so that no worker waits for another at the end

def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: next((i for i, name in enumerate(LONGEST) if item.path.stem == f"test_{name}"), len(LONGEST))
    )

@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty root for runs."
    monkeypatch.setenv("DKD_ROOT", str(tmp_path))
    monkeypatch.setenv("IN_TEST", "1")
    return tmp_path

def train(patch: str = "", launcher: list[str] = (), wait: bool = True, fork: bool = True, **settings):
    """Train in a process of its own; `patch` is code that runs there before training. Forks share Python's hash seed:
    without `fork` it is another."""
    words = [json.dumps(TINY | settings), patch]
    if fork and wait and not launcher: return forked(words)
    command = [sys.executable, *launcher, str(ROOT / "tests" / "train_once.py"), *words]
    if not wait: return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, text=True, timeout=120)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "drifting_kd.drift", "drifting_kd.kd"])  # optimisers import the first
BOOKS = threading.Lock()  # multiprocessing's own, which two threads must not keep at once

def forked(words: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    """As subprocess.run of train_once.py, from a process that has imported torch and made no thread yet: seconds less
    for each."""
    import train_once
    pipes, late = [FORKS.Pipe(duplex=False) for _ in ("stdout", "stderr")], threading.Event()
    process = FORKS.Process(target=train_once.in_fork, args=(words, dict(os.environ), *(end for _, end in pipes)))
    with BOOKS: process.start()
    def read(pair) -> str:
        pair[1].close()  # the child has its own
        with pair[0], open(pair[0].fileno(), encoding="utf-8", closefd=False) as f: return f.read()
    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
    timer = threading.Timer(timeout, stop)
    timer.daemon = True
    timer.start()
    try:
        with ThreadPoolExecutor(2) as pool: out, err = pool.map(read, pipes)
        multiprocessing.connection.wait([process.sentinel])
    finally: timer.cancel()
    with BOOKS: process.join()
    if late.is_set(): raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, process.exitcode, out, err)

def python(*words, stdout=subprocess.PIPE, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """Python with these words; again where its kernel did not come up: two that start at once can be given the same
    port, by Jupyter itself."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
            **options,
        )
        if not re.search("Kernel (died before replying|didn't respond)", done.stderr): break
    return done

def losses(run: Path) -> list:
    "The numbers of a run that must not depend on when or where it ran."
    names = (
        "train/loss",
        "train/accuracy",
        "train/macro_f1",
        "train/auroc",
        "train/ece",
        "train/grad_norm",
        "train/lr",
        "train/drift_norm",
        "train/feature_",
        "val/",
        "eval/",
        "epoch/",
    )
    return [
        (line["step"], {k: v for k, v in line.items() if k.startswith(names)})
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]

def weights(run: Path) -> dict:
    import torch
    return torch.load(run / "final_model.pt", weights_only=True)["model"]

def same_weights(a: Path, b: Path) -> bool:
    return all(x.equal(y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))
