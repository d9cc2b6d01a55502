"Data across processes, and over a real (local) connection."
import functools, gzip, hashlib, http.server, os, socket, subprocess, sys, threading, time
import numpy as np
import pytest

PIXELS = """
import hashlib, sys, torch
from drifting_kd.data import load_dataset, Batches
world, ranks = int(sys.argv[1]), [int(r) for r in sys.argv[2].split(",")]
for name in ("digits", "shapes"):
    ds = load_dataset(name)
    found = {}
    for rank in ranks:
        for b in Batches(ds.train, 96, seed=5, epoch=2, rank=rank, world=world):
            for x, y, i in zip(b.x, b.y, b.index):
                found[int(i)] = hashlib.sha256(bytes([int(y)]) + x.contiguous().numpy().tobytes()).hexdigest()
    print(ds.sha256, *(f"{i}:{h}" for i, h in sorted(found.items())))
"""

def python(code: str, *args, **env) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {k: str(v) for k, v in env.items()},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def test_processes_and_ranks_see_the_same_pixels():
    alone = python(PIXELS, 1, "0", OMP_NUM_THREADS=1, PYTHONHASHSEED=1).splitlines()
    assert python(PIXELS, 1, "0", OMP_NUM_THREADS=2, PYTHONHASHSEED=2).splitlines() == alone
    parts = [python(PIXELS, 2, rank).splitlines() for rank in (0, 1)]
    for one, a, b in zip(alone, *parts):
        (_, *rows), (_, *left), (_, *right) = one.split(), a.split(), b.split()
        assert not set(left) & set(right) and sorted(left + right) == sorted(rows) and len(left) == len(right)

def test_import_is_light():
    heavy = python(
        "import sys, drifting_kd.data; print([m for m in ('torchvision', 'sklearn', 'PIL', 'datasets', "
        "'matplotlib') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"

LOAD = """
import sys
from drifting_kd import data, sources
sources.TIMEOUT = 1
try: data.load_dataset(sys.argv[1], sys.argv[2])
except data.LabError as e: print(e)
"""

@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_no_network_says_which_files(tmp_path, name):
    proxy = "http://127.0.0.1:9"  # nobody listens there
    said = python(LOAD, name, tmp_path, http_proxy=proxy, https_proxy=proxy, no_proxy="")
    assert "cannot download" in said and "put " in said and str(tmp_path) in said and len(said.splitlines()) == 1

def test_a_silent_server_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        proxy, begun = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        said = python(LOAD, "cifar10", tmp_path, http_proxy=proxy, https_proxy=proxy, no_proxy="")
        assert "put cifar-10-python.tar.gz into" in said and time.monotonic() - begun < 60

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()

def idx(a: np.ndarray) -> bytes:
    return bytes([0, 0, 8, a.ndim]) + b"".join(n.to_bytes(4, "big") for n in a.shape) + a.tobytes()

def test_mnist_is_downloaded_checked_and_unpacked(tmp_path, server, monkeypatch):
    from drifting_kd import data, sources
    folder, address = server
    sources.import_torchvision()
    from torchvision.datasets import MNIST
    resources, x = [], np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, content in (("images-idx3", idx(x)), ("labels-idx1", idx((np.arange(40) % 10).astype(np.uint8)))):
            name = f"{part}-{kind}-ubyte"
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            resources.append((f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()))
            monkeypatch.setitem(sources.MD5, name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(MNIST, "mirrors", [address + "gone/", address])  # the first mirror has nothing
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path / "root"
    ds = data.load_dataset("mnist", str(root), val_fraction=.5)
    np.testing.assert_array_equal(ds.test.images[..., 0].numpy(), x)

    wrong = gzip.compress(b"something else")  # what arrives is not what was promised
    (folder / "train-images-idx3-ubyte.gz").write_bytes(wrong)
    with pytest.raises(data.LabError, match="cannot download train-images-idx3-ubyte.gz"):
        data.load_dataset("mnist", str(tmp_path / "other"))
    assert not list((tmp_path / "other").rglob("*-ubyte"))

def test_cut_off_files_of_any_length_are_named(tmp_path):
    from drifting_kd import data
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 3
    np.savez_compressed(tmp_path / "cut.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    whole = (tmp_path / "cut.npz").read_bytes()
    assert len(data.load_dataset("cut", str(tmp_path)).test) == 30
    for length in rng.integers(0, len(whole), 40):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(data.LabError, match="cut.npz is damaged"): data.load_dataset("cut", str(tmp_path))
