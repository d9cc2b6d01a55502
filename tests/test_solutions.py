"solutions.ipynb as its users run it: networks of finished runs compared, and what cannot be compared refused in one line."
import json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from conftest import ROOT, train

def dkd(*words): return subprocess.run([sys.executable, "-m", "drifting_kd.cli", "run", str(ROOT / "nbs" / "solutions.ipynb"), *map(str, words)], capture_output=True, text=True, timeout=300)
QUICK = "-p images 60 -p iterations 4 -p points 3 -p pairs 1".split()

@pytest.fixture
def runs(lab):
    made = [dict(optimizer=o, seed=s, run_name=f"toy-{o}-s{s}", epochs=2) for o in ("sgd", "adamw") for s in (0, 1)] + [dict(run_name="deep-s0", model="resnet14", epochs=1)]
    with ThreadPoolExecutor(2) as pool: assert not [p.stderr for p in pool.map(lambda m: train(**m), made) if p.returncode]
    return lab

def test_networks_of_runs_are_compared_or_refused(runs):
    with ThreadPoolExecutor(2) as pool:
        whole, one, mixed, missing = pool.map(lambda words: dkd(*QUICK, *words), [("-p", "pattern", "toy-*", "-p", "name", "toy"), ("-p", "pattern", "toy-*-s0", "-p", "name", "one"),
                                                                           ("-p", "pattern", "toy-sgd-s0,deep-s0", "-p", "by", "model"), ("-p", "pattern", "toi-*")])
    assert whole.returncode == 0, whole.stderr
    found = json.loads((runs / "figures" / "toy.json").read_text())
    assert {r["measure"] for r in found["tables"]["separation"]} >= {"disagreement", "1 - CKA of head"} and len(found["runs"]) == 4
    assert all((runs / "figures" / name).stat().st_size > 1000 for name in found["figures"])
    rows = {(r["one"], r["other"]): r for r in found["tables"]["disagreement"]}
    assert rows["adamw", "sgd"]["n"] == 4 and rows["sgd", "sgd"]["n"] == 1 and 0 < rows["adamw", "sgd"]["mean"] < 1
    assert one.returncode == 0 and "nothing to compare with" in one.stdout, one.stderr
    assert all(r["p"] is None for r in json.loads((runs / "figures" / "one.json").read_text())["tables"]["separation"])
    assert mixed.returncode == 1 and "resnet8" in mixed.stderr and "resnet14" in mixed.stderr and mixed.stderr.count("\n") == 1, mixed.stderr
    assert missing.returncode == 1 and "toi-*" in missing.stderr and missing.stderr.count("\n") == 1, missing.stderr
