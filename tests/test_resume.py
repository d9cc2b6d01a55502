"Killed at any moment and resumed: the same bits as the uninterrupted run. Real processes, real SIGKILL."
import json, os, random, shutil, signal, subprocess, sys, time
import pytest
from conftest import ROOT, TINY, losses, same_weights, train

HARD = dict(optimizer="adamw", ema_decay=0.9, grad_clip=1.0, epochs=6, log_every=4, save_every=1)

# Writes half of a checkpoint and dies, at the n-th save.
DIE_IN_SAVE = """
import io, os, signal, torch
saves = 0
def half(content, f, real=torch.save):
    global saves
    saves += 1
    buffer = io.BytesIO(); real(content, buffer)
    if saves == {n}:
        f.write(buffer.getvalue()[:buffer.tell() // 2]); f.flush(); os.kill(os.getpid(), signal.SIGKILL)
    f.write(buffer.getvalue())
torch.save = half
"""
DIE_BEFORE_RENAME = """
import os, signal
def die(a, b, real=os.replace):
    if str(b).endswith({name!r}): os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = die
"""

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The uninterrupted run and its seconds."
    root, start = tmp_path_factory.mktemp("whole"), time.perf_counter()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("DKD_ROOT", str(root))
        assert train(run_name="whole", **HARD).returncode == 0
    return root / "runs" / "whole", time.perf_counter() - start

def check(whole, resumed):
    "Weights, every logged number, the summary and the selected checkpoint: all as if nothing had happened."
    import torch
    assert same_weights(whole, resumed) and losses(whole) == losses(resumed)
    a, b = (
        {
            k: v
            for k, v in json.loads((r / "metrics.json").read_text()).items()
            if k.startswith(("test/", "val/", "best_"))
        }
        for r in (whole, resumed)
    )
    assert a == b
    assert torch.load(resumed / "checkpoints/best.pt", weights_only=True)["step"] == b["best_step"]

def finish(lab, name):
    out = train(run_name=name, resume=True, **HARD)
    assert out.returncode == 0, out.stderr
    return lab / "runs" / name

@pytest.mark.parametrize(
    "patch",
    [
        DIE_IN_SAVE.format(n=1),
        DIE_IN_SAVE.format(n=3),
        DIE_BEFORE_RENAME.format(name="best.pt"),
        DIE_BEFORE_RENAME.format(name="metrics.json"),
    ],
    ids=["first save", "third save", "before best.pt", "before metrics.json"],
)
def test_killed_inside_a_write(lab, whole, patch):
    killed = train(patch, run_name="killed", **HARD)
    assert killed.returncode == -signal.SIGKILL and not (lab / "runs/killed/metrics.json").exists()
    resumed = finish(lab, "killed")
    check(whole[0], resumed)
    assert not list((resumed / "checkpoints").glob(".*.part")) # what the kill left behind is gone

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment(lab, whole, seed):
    reference, span = whole
    rng, finished = random.Random(seed), lab / "runs/killed/metrics.json"
    for _ in range(3): # several kills of one run
        process = train(wait=False, run_name="killed", resume=True, **HARD)
        try: process.wait(timeout=rng.uniform(0.3, 1.0) * span)
        except subprocess.TimeoutExpired: process.kill()
        process.wait()
        if finished.exists(): break
    resumed = finished.parent if finished.exists() else finish(lab, "killed")
    check(reference, resumed)

def test_the_same_command_twice_gives_the_same_bits(lab):
    for name, optimizer, fork in (("a", "adamw", True), ("b", "adamw", False), ("c", "sgd", True)):
        assert train(run_name=name, optimizer=optimizer, fork=fork).returncode == 0
    a, b, c = (lab / "runs" / n for n in "abc")
    assert same_weights(a, b) and losses(a) == losses(b) and not same_weights(a, c)

def test_a_running_run_is_left_alone(lab):
    slow = "import time, drifting_kd.classify as t; t.Classify.after_step = lambda self, step: time.sleep(1)"
    process = train(slow, wait=False, run_name="busy")
    try:
        while not (lab / "runs/busy/metrics.jsonl").exists(): time.sleep(0.1)
        second = train(run_name="busy", resume=True)
        assert second.returncode == 1 and f"is being written by process {process.pid} on" in second.stderr
    finally:
        process.kill()
        process.wait()


DIE_AFTER = """
import os, drifting_kd.classify as t
def die(self, step): step == {step} and os._exit(9)
t.Classify.after_step = die
"""
SLOW = "import time, drifting_kd.classify as t; t.Classify.after_step = lambda self, step: time.sleep(.2)"

@pytest.mark.parametrize("gone", ["", "checkpoints"])
def test_a_folder_that_is_removed_in_mid_run_is_one_line(lab, gone):
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/train_once.py", json.dumps(TINY | dict(run_name="lost", eval_every=3)), SLOW],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (lab / "runs/lost/metrics.jsonl").exists(): time.sleep(0.05)
    shutil.rmtree(lab / "runs/lost" / gone)
    told = process.communicate(timeout=100)[1].splitlines()
    assert process.returncode == 1 and len(told) == 1, told
    assert f"{(lab / 'runs/lost' / gone)} was removed while the run was being written" in told[0]

def test_a_deleted_lock_lets_nobody_in(lab):
    process = train(SLOW, wait=False, run_name="busy")
    try:
        while not (lab / "runs/busy/metrics.jsonl").exists(): time.sleep(0.05)
        (lab / "runs/busy/.lock").unlink()
        second = train(run_name="busy", resume=True)
        assert second.returncode == 1 and "is being written by another process" in second.stderr, second.stderr
        rows = subprocess.run([sys.executable, "-m", "drifting_kd.cli", "runs"], capture_output=True, text=True)
        assert "running" in rows.stdout
    finally:
        process.kill()
        process.wait()

@pytest.mark.parametrize("part", ["[]", dict(continued="x"), dict(packages=None), dict(resolved=[]), dict(git=3)])
def test_a_strange_environment_is_one_line(lab, part):
    train(DIE_AFTER.format(step=13), run_name="strange")
    path = lab / "runs/strange/environment.json"
    path.write_text(part if isinstance(part, str) else json.dumps(json.loads(path.read_text()) | part))
    done = train(run_name="strange", resume=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "environment.json" in done.stderr and "restore it" in done.stderr

def test_resume_takes_the_newest_of_two_unfinished_runs(lab):
    for _ in range(2): train(DIE_AFTER.format(step=13))
    older, newer = sorted((lab / "runs").glob("*-s42-*"), key=lambda p: len(p.name))
    for path, then in ((newer, 2_000_000_000), (older, 1_900_000_000)): os.utime(path, (then, then))
    assert train(resume=True).returncode == 0
    assert ((newer / "metrics.json").exists(), (older / "metrics.json").exists()) == (True, False)

def test_resumed_inside_an_epoch_of_groups(lab):
    settings = dict(accumulation=2, steps=9, save_every=2, eval_every=9, epochs=1)  # three groups an epoch
    assert train(run_name="whole", **settings).returncode == 0
    train(DIE_AFTER.format(step=4), run_name="killed", **settings)
    assert train(run_name="killed", resume=True, **settings).returncode == 0
    whole, killed = lab / "runs/whole", lab / "runs/killed"
    assert same_weights(whole, killed) and losses(whole) == losses(killed)

def same_bits(a, b) -> bool:
    "Equal in every tensor, list and number."
    import torch
    if torch.is_tensor(a): return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b): return False
    if isinstance(a, dict): return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b

def test_a_restored_queue_of_real_images_is_the_one_that_was_saved(lab, monkeypatch):
    "Rings, their places and what lies in them, looked at in the tasks themselves and not by what is trained."
    import copy
    from drifting_kd.classify import prepare
    from drifting_kd.drifting import Drift, DriftConfig, drifter
    from drifting_kd.run import Run
    from drifting_kd.train import Loop, fit
    from test_drift import SMALL
    given = {k: v for k, v in SMALL.items() if k != "family"}
    given |= dict(tracker="none", device="cpu", threads=1, queue=20, steps=6, eval_every=6, save_every=2)
    def drift(**more):
        cfg = DriftConfig(**given | more)
        data = prepare(cfg)
        return Drift(drifter(cfg, data), data, cfg), cfg
    saved, publish = [], Loop.publish
    def remember(loop):
        saved.append(copy.deepcopy(vars(loop.task.reals)))
        publish(loop)
        if loop.step == 4: raise KeyboardInterrupt
    monkeypatch.setattr(Loop, "publish", remember)
    task, cfg = drift()
    with pytest.raises(KeyboardInterrupt): fit(task, cfg, Run(cfg, "drift"))
    monkeypatch.setattr(Loop, "publish", publish)
    again, cfg = drift(resume=True)
    run = Run(cfg, "drift")
    Loop(again, cfg, run).restore()
    run.close()
    assert len(saved) == 2 and not same_bits(*saved) and same_bits(vars(again.reals), saved[-1])
