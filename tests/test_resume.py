"Killed at any moment and resumed: the same bits as the uninterrupted run. Real processes, real SIGKILL."
import random, signal, time
import pytest
from conftest import losses, same_weights, train

HARD = dict(optimizer="adamw", ema_decay=0.9, grad_clip=1.0, epochs=6, log_every=4, save_every=1)

# Writes half of a checkpoint and dies, at the n-th save.
DIE_IN_SAVE = """
import io, os, signal, torch
import drifting_kd.train as t
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

def uninterrupted(lab):
    assert train(run_name="whole", **HARD).returncode == 0
    return lab / "runs" / "whole"

def finish(lab, name):
    out = train(run_name=name, resume=True, **HARD)
    assert out.returncode == 0, out.stderr
    return lab / "runs" / name

@pytest.mark.parametrize("patch", [DIE_IN_SAVE.format(n=1), DIE_IN_SAVE.format(n=3), DIE_BEFORE_RENAME.format(name="best.pt"),
                                   DIE_BEFORE_RENAME.format(name="metrics.json")], ids=["first save", "third save", "before best.pt", "before metrics.json"])
def test_killed_inside_a_write(lab, patch):
    whole = uninterrupted(lab)
    killed = train(patch, run_name="killed", **HARD)
    assert killed.returncode == -signal.SIGKILL and not (lab / "runs/killed/metrics.json").exists()
    resumed = finish(lab, "killed")
    assert same_weights(whole, resumed) and losses(whole) == losses(resumed)
    assert not list((resumed / "checkpoints").glob(".*.part")) # what the kill left behind is gone

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment(lab, seed):
    start = time.perf_counter()
    whole = uninterrupted(lab)
    span = time.perf_counter() - start
    rng, kills = random.Random(seed), 0
    for _ in range(3): # several kills of one run
        process = train(wait=False, run_name="killed", resume=True, **HARD)
        time.sleep(rng.uniform(0.3, 1.0) * span)
        if process.poll() is None: kills += 1
        process.kill()
        process.wait()
        if (lab / "runs/killed/metrics.json").exists(): break
    resumed = lab / "runs/killed" if (lab / "runs/killed/metrics.json").exists() else finish(lab, "killed")
    assert same_weights(whole, resumed) and losses(whole) == losses(resumed)

def test_the_same_command_twice_gives_the_same_bits(lab):
    for name, optimizer in (("a", "adamw"), ("b", "adamw"), ("c", "sgd")): assert train(run_name=name, optimizer=optimizer).returncode == 0
    a, b, c = (lab / "runs" / n for n in "abc")
    assert same_weights(a, b) and losses(a) == losses(b) and not same_weights(a, c)

def test_a_running_run_is_left_alone(lab):
    slow = "import time, drifting_kd.train as t; t.Classify.after_step = lambda self, step: time.sleep(1)"
    process = train(slow, wait=False, run_name="busy")
    try:
        while not (lab / "runs/busy/metrics.jsonl").exists(): time.sleep(0.1)
        second = train(run_name="busy", resume=True)
        assert second.returncode == 1 and "being written by another process" in second.stderr
    finally:
        process.kill()
        process.wait()
