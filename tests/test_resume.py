"Killed at any moment and resumed: the same bits as the uninterrupted run. Real processes, real SIGKILL."
import json, random, signal, subprocess, time
import pytest
from conftest import losses, same_weights, train

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
