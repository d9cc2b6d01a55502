"""`dkd` and plain papermill on a small experiment notebook, in real processes."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import python

SETUP = """from dataclasses import dataclass
import drifting_kd.run
from drifting_kd.core import Config, param, watch_parameters
from drifting_kd.run import Run
drifting_kd.run.environment = lambda *given: {}  # without torch a kernel starts in half the time

@dataclass
class ToyConfig(Config):
    lr: float = param(0.0, "rate", low=0)
    epochs: int = param(2, "passes", low=1)
    fast: bool = param(False, "skip the slow part")
    dataset: str = param("digits", "data")
    betas: tuple = param((), "momenta")
    fault: str = param("", "what goes wrong", choices=("", "raise", "kill", "hang", "silent"))
guard = watch_parameters(globals())"""
PARAMETERS = """run_name: str = ""  # name of the run
seed: int = 42
resume: bool = False
tracker: str = "none"
project: str = "toy"
lr: float = 0.0  # 0 is the default
epochs: int = 2
fast: bool = False
dataset: str = "digits"
betas: tuple = ()
fault: str = "" """
TRAINING = """import os, signal, time
cfg = guard.read(ToyConfig)
run = Run(cfg, "toy")
for step in range(cfg.epochs): run.log({"train/loss": 1 / (step + 1)}, step + 1, step + 1)
print("training", run.name, flush=True)
if cfg.fault == "raise": 1 / 0
if cfg.fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
if cfg.fault == "hang": time.sleep(60)
if cfg.fault != "silent": run.finish({"test/accuracy": .97})"""


def cell(i, source, tags=()):
    return dict(
        cell_type="code", id=f"c{i}", execution_count=None, outputs=[], source=source, metadata=dict(tags=list(tags))
    )


def write_notebook(path, tagged=True, kernel="python3"):
    cells = [cell(0, SETUP), cell(1, PARAMETERS, ["parameters"] if tagged else []), cell(2, TRAINING)]
    path.write_text(
        json.dumps(
            dict(
                nbformat=4,
                nbformat_minor=5,
                cells=cells,
                metadata=dict(kernelspec=dict(name=kernel, display_name=kernel, language="python")),
            )
        )
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / "nbs").mkdir()
    write_notebook(tmp_path / "nbs" / "train.ipynb")
    return tmp_path


def call(root, *words, cwd=None, **env):
    env = os.environ | {"DKD_ROOT": str(root), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, "-m", "drifting_kd.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd or root,
        timeout=150,
    )


def config(root, name): return json.loads((root / "runs" / name / "config.json").read_text())


def test_help_is_quick(root):
    start = time.perf_counter()
    done = call(root, "--help")
    assert (
        done.returncode == 0 and "sweep" in done.stdout and time.perf_counter() - start < 2
    )  # 0.2 s alone; torch would add seconds
    probe = subprocess.run(
        [
            sys.executable,
            "-c",
            "import drifting_kd.cli, sys; print([m for m in ('torch', 'numpy', 'pandas', 'papermill', 'wandb', "
            "'yaml') if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
    )
    assert probe.stdout.strip() == "[]", probe


@pytest.mark.parametrize("words, code, said", [((), 2, "usage: dkd"), (("--version",), 0, "dkd 0.")])
def test_plain_dkd_and_its_version_need_no_torch(root, words, code, said):
    "Help and, as git does, a code that is not 0; also where no project is."
    probe = """import atexit, sys
import drifting_kd.cli
atexit.register(lambda: print([m for m in ('torch', 'numpy', 'papermill', 'yaml') if m in sys.modules]))
sys.exit(drifting_kd.cli.main(sys.argv[1:]))"""
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (code, "") and done.stdout.startswith(said), done
    assert done.stdout.splitlines()[-1] == "[]" and ("sweep" in done.stdout) == (not words)


@pytest.mark.parametrize("words", [("run", "train"), ("runs",), ("runs", "--paths"), ("run", "train", "--help")])
def test_outside_the_project_the_way_is_shown(root, words):
    env = {name: value for name, value in os.environ.items() if name != "DKD_ROOT"}
    (root / "outside").mkdir()
    (root / "nbs").rename(root / "outside" / "other")  # nowhere above is a folder nbs/
    done = subprocess.run([sys.executable, "-m", "drifting_kd.cli", *words], capture_output=True, text=True, env=env,
                          cwd=root / "outside")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (root / "outside" / "runs").exists()
    for part in ("no project is here", str(root / "outside"), "cd into your clone", "set DKD_ROOT"):
        assert part in done.stderr, done.stderr


def test_a_clock_that_jumps_back_and_parameters_with_equals_signs(root):
    "An hour before the run began, say its files; it is found all the same."
    notebook = root / "nbs" / "train.ipynb"
    late = "\nimport pathlib\nfor p in pathlib.Path(run.path).iterdir(): os.utime(p, (time.time() - 3600,) * 2)"
    nb = json.loads(notebook.read_text())
    nb["cells"][-1]["source"] += late
    notebook.write_text(json.dumps(nb))
    done = call(root, "run", "train", "-p", "epochs=3", "-p", "run_name", "a=b", "-p", "lr=1e-2", "-p", "betas=.5,.9")
    assert done.returncode == 0 and "a=b/metrics.json" in done.stdout, done.stderr
    saved = config(root, "a=b")
    assert (saved["epochs"], saved["lr"], saved["betas"]) == (3, .01, [.5, .9])
    ages = call(root, "runs").stdout
    assert "1 h ago" in ages and "-" not in ages.splitlines()[1].replace("a=b", "")
    for file in (root / "runs" / "a=b").iterdir(): os.utime(file, (time.time() + 7200,) * 2)
    assert "  0 s ago" in call(root, "runs").stdout


def test_run_casts_presets_and_reports(root):
    (root / "preset.yaml").write_text("# a preset\nlr: 1e-3\nepochs: 9\ndataset: on\nbetas: [0.9, 0.95]\n")
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    done = call(
        root,
        "run",
        "train",
        "-f",
        root / "preset.yaml",
        "-p",
        "run_name",
        "first",
        "-p",
        "fast",
        "false",
        "-p",
        "epochs",
        "3",
        cwd=elsewhere,
    )
    assert done.returncode == 0, done.stderr
    saved = config(root, "first")
    assert (saved["lr"], saved["epochs"], saved["fast"], saved["dataset"], saved["betas"]) == (
        0.001,
        3,
        False,
        "on",
        [0.9, 0.95],
    )
    assert "training first" in done.stdout                                            # progress is shown
    lines = dict(
        line.split(None, 1)
        for line in done.stdout.splitlines()
        if line.split(None, 1)[0] in ("notebook", "run", "metrics", "figures")
    )
    assert (
        Path(elsewhere, lines["notebook"]).resolve().parent == (root / "runs" / "notebooks").resolve()
        and Path(elsewhere, lines["notebook"]).exists()
    )
    assert (
        Path(elsewhere, lines["metrics"]).resolve() == (root / "runs" / "first" / "metrics.json").resolve()
        and Path(elsewhere, lines["figures"]).is_dir()
    )
    assert not list(elsewhere.iterdir())  # nothing lands where the caller stands
    again = call(root, "runs", "--last", "1", "--paths")
    assert "train-" in again.stdout and "first/metrics.json" in again.stdout


@pytest.mark.parametrize("words, expected", [
    (("-p", "lrr", "1"), "did you mean 'lr'"),
    (("-p", "epochs", "2.5"), "epochs='2.5' (str): expected a whole number"),
    (("-p", "fast", "perhaps"), "True or False"),
    (("-p", "seed", "9" * 5000), "expected a whole number"),
    (("-p", "epochs", "0b_"), "epochs='0b_' (str): expected a whole number"),
    (("-p", "betas=[[.9]]"), "expected numbers"),
    (("-p", "lrr" * 500, "1"), "unknown parameter 'lrrlrr"),
    (("-p", "lr"), None),
    (("-p", "lr", "-f"), None),
    (("-f", "missing.yaml"), "cannot read missing.yaml")])
def test_bad_input_is_refused_before_anything_starts(root, words, expected):
    done = call(root, "run", "train", *words)
    assert done.returncode == (2 if expected is None else 1) and not (root / "runs").exists()
    if expected: assert expected in done.stderr and done.stderr.count("\n") == 1 and len(done.stderr) < 400, done.stderr


def test_lost_tag_and_unknown_notebook(root):
    done = call(root, "run", "trian")
    assert done.returncode == 1 and "did you mean 'train'" in done.stderr
    write_notebook(root / "nbs" / "train.ipynb", tagged=False)
    done = call(root, "run", "train", "-p", "lr", "1")
    assert done.returncode == 1 and "tagged 'parameters', found 0" in done.stderr and not (root / "runs").exists()
    write_notebook(root / "nbs" / "train.ipynb", kernel="somebody's")
    done = call(root, "run", "train")
    assert (
        done.returncode == 1
        and 'train.ipynb asks for the kernel "somebody\'s", which is not installed here' in done.stderr
        and done.stderr.count("\n") == 1
        and not list((root / "runs").rglob("*.ipynb"))
    ), done.stderr


def test_an_error_inside_is_one_line_and_keeps_the_notebook(root):
    done = call(root, "run", "nbs/train.ipynb", "-p", "lr", "-1", "--output", "deep/out.ipynb")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "dkd: lr=-1.0 (float): expected at least 0"
    ), done.stderr
    assert "Traceback" not in done.stderr and (root / "deep" / "out.ipynb").exists()
    done = call(root, "run", "train", "-p", "fault", "raise", "-p", "run_name", "bad")
    assert (
        done.returncode == 1
        and "ZeroDivisionError: division by zero; the traceback is in" in done.stderr
        and not (root / "runs/bad/metrics.json").exists()
    )


def test_a_killed_kernel_and_a_run_that_does_not_finish_fail(root):
    done = call(root, "run", "train", "-p", "fault", "kill", "-p", "run_name", "killed")
    assert (
        done.returncode == 1
        and "the kernel died" in done.stderr
        and "-p resume True" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    done = call(root, "run", "train", "-p", "fault", "silent", "-p", "run_name", "quiet")
    assert done.returncode == 1 and "run quiet did not finish" in done.stderr, done.stderr
    assert "killed" in call(root, "runs", "--state", "stopped").stdout


CLASH = """import json, os, runpy, socket, sys
port, first = sys.argv.pop(), "starts"
with open(first, "a") as f: print(os.getpid(), file=f)
if len(open(first).readlines()) == 1:
    taken = socket.create_server(("127.0.0.1", json.load(open(sys.argv[2]))[port]))
runpy.run_module("ipykernel_launcher", run_name="__main__")"""


# ipykernel dies of the first, and hangs in its own end with the second: papermill waits a minute
@pytest.mark.parametrize("port", ["shell_port", pytest.param("iopub_port", marks=pytest.mark.slow)])
def test_a_kernel_whose_port_was_taken_is_started_again(root, port):
    spec = root / "jupyter" / "kernels" / "clash"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            dict(
                argv=[sys.executable, "-c", CLASH, "-f", "{connection_file}", port],
                display_name="clash",
                language="python",
            )
        )
    )
    write_notebook(root / "nbs" / "train.ipynb", kernel="clash")
    done = call(root, "run", "train", "-p", "run_name", "again", JUPYTER_PATH=str(root / "jupyter"))
    assert done.returncode == 0 and (root / "runs/again/metrics.json").exists(), done.stderr
    pids = (root / "starts").read_text().split()
    assert len(pids) == 2 and not Path(f"/proc/{pids[0]}").exists()  # the silent one was stopped


def test_a_kernel_that_never_starts_is_one_line(root):
    spec = root / "jupyter" / "kernels" / "broken"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            dict(
                argv=[sys.executable, "-c", "raise SystemExit(3)", "{connection_file}"],
                display_name="broken",
                language="python",
            )
        )
    )
    write_notebook(root / "nbs" / "train.ipynb", kernel="broken")
    done = call(root, "run", "train", JUPYTER_PATH=str(root / "jupyter"))
    assert (
        done.returncode == 1
        and "kernel does not start" in done.stderr
        and "Traceback" not in done.stderr
        and not list((root / "runs").rglob("*.ipynb"))
    ), done.stderr


def test_interrupt(root):
    env = os.environ | {"DKD_ROOT": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-m", "drifting_kd.cli", "run", "train", "-p", "fault", "hang", "-p", "run_name", "slow"],
        env=env,
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a background job is started with Ctrl-C switched off
    for _ in range(1200):  # a kernel may have to be started twice
        if (root / "runs" / "slow" / "metrics.jsonl").exists(): break
        time.sleep(.1)
    time.sleep(.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, (process.returncode, err)
    assert "slow" in call(root, "runs", "--state", "stopped").stdout  # the kernel is gone too


def test_plain_papermill_is_strict_too(root):
    run = lambda *words: python(
        "-m",
        "papermill",
        "nbs/train.ipynb",
        root / "out.ipynb",
        *words,
        cwd=root,
        env=os.environ | dict(DKD_ROOT=str(root)),
    )
    done = run("-p", "fast", "false")  # for papermill this is the text "false", which is true
    assert (
        done.returncode != 0
        and "fast='false' (str): expected True or False" in done.stderr
        and not (root / "runs").exists()
    )
    done = run("-p", "epocs", "3")
    assert done.returncode != 0 and "unknown parameter 'epocs'; did you mean 'epochs'" in done.stderr
    write_notebook(root / "nbs" / "train.ipynb", tagged=False)
    done = run("-p", "lr", "0.5")
    assert done.returncode != 0 and "lost its tag" in done.stderr


def test_two_at_once_report_their_own_runs(root):
    env = os.environ | {"DKD_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "drifting_kd.cli", "run", "train", "-p", "seed", str(s)],
            env=env,
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for s in (1, 2)
    ]
    for seed, process in zip((1, 2), both):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and f"-s{seed}-" in out.split("metrics")[-1], (out, err)
