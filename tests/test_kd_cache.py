"A teacher cache filled by several processes, killed inside a write, and out of room: never a wrong number. Real processes (forks), real SIGKILL."
import dataclasses, itertools, multiprocessing, os, random, resource, signal, time, warnings
import pytest

@pytest.fixture(scope="module")
def world():
    "An untrained teacher of digits; the right answers, to the bit."
    import numpy as np, torch
    from drifting_kd.data import load_dataset, view_pixels
    from drifting_kd.teachers import load_teacher
    from drifting_kd.models import create_model
    from drifting_kd.checkpoints import frozen
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no other threads
    data = dataclasses.replace(load_dataset("digits", limit=120), crop_padding=1)
    torch.manual_seed(0)
    teacher = load_teacher(frozen(create_model("resnet8", 10, 1), mean=(.5,), std=(.5,)), data)
    row, view = torch.arange(120).repeat_interleave(9), torch.arange(9).repeat(120)
    yield data, teacher, (data.train.indices[row], view, teacher.steady(view_pixels(data.train.images[row], view, 1)).numpy())
    torch.set_num_threads(before)

def opened(world, lab):
    from drifting_kd.teachers import ViewCache
    return ViewCache(world[1], world[0])

def batches(world, seed: int, epochs: int = 10**6):
    from drifting_kd.data import Batches
    for e in range(epochs): yield from Batches(world[0].train, 30, seed, e, crop_padding=1)

def compared(world, lab) -> tuple[int, bool, int]:
    "Rows that are there, whether each is right to the bit, and how many are damaged."
    cache, (index, view, right) = opened(world, lab), world[2]
    found, there = cache.get(index, view)
    return int(there.sum()), bool((found[there] == right[there]).all()), cache.damaged

def start(work, *args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process

def ended(process) -> int:
    process.join(60)
    assert process.exitcode is not None, "still running"
    return process.exitcode

def fill_forever(world, lab, seed: int) -> None:
    cache = opened(world, lab)
    for b in batches(world, seed): cache(b.x, b.index, b.view)

def die_in_write(world, lab, name: str, when: str, n: int) -> None:
    "Fill one epoch, but die at the n-th write of a file: before it, in the middle of its bytes, or after it."
    import drifting_kd.kd as kd
    real, calls = kd._write_rows, 0
    def dying(path, rows, values):
        nonlocal calls
        calls += path.name == name
        if path.name != name or calls < n: return real(path, rows, values)
        if when == "after": real(path, rows, values)
        if when == "inside":
            real(path, rows[:7], values[:7])
            with open(path, "r+b", buffering=0) as f:
                f.seek(int(rows[7]) * values[0].nbytes)
                f.write(values[7].tobytes()[:values[0].nbytes // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    kd._write_rows, cache = dying, opened(world, lab)
    for b in batches(world, 0, 1): cache(b.x, b.index, b.view)

@pytest.mark.parametrize("name,when,rows", [("logits.f16", "before", 60), ("logits.f16", "inside", 60), ("logits.f16", "after", 60), ("check.u32", "inside", 67), ("check.u32", "after", 90)])
def test_killed_inside_a_write(lab, world, name, when, rows):
    assert ended(start(die_in_write, world, lab, name, when, 3)) == -signal.SIGKILL
    half = when == "inside" and name == "check.u32"  # half a checksum is none
    assert compared(world, lab) == (rows, True, int(half))
    opened(world, lab).fill()
    assert compared(world, lab) == (1080, True, 0)

def test_killed_while_others_write(lab, world):
    "Three orders, one cache; one of the writers is killed at random moments and started again; every row that is there is right, all the time."
    writers, rng, seen = [start(fill_forever, world, lab, s) for s in range(2)], random.Random(0), []
    try:
        for _ in range(6):
            victim = start(fill_forever, world, lab, 2)
            for _ in range(10):
                seen.append(compared(world, lab))
                time.sleep(rng.uniform(0, .02))
            victim.kill()
            assert ended(victim) == -signal.SIGKILL
        assert all(w.is_alive() for w in writers)
    finally:
        for w in writers: w.kill(), w.join()
    assert all(right for _, right, _ in seen) and [n for n, _, _ in seen] == sorted(n for n, _, _ in seen) and seen[-1][0] > 300  # nothing that was there was lost
    opened(world, lab).fill()
    assert compared(world, lab) == (1080, True, 0)

def test_filled_together(lab, world):
    "Processes that were forked after the cache was opened share no position in its files; each does its part of the work."
    cache = opened(world, lab)
    parts = [start(cache.fill, None, None, rank, 3) for rank in range(3)]
    assert [ended(p) for p in parts] == [0, 0, 0]
    assert compared(world, lab) == (1080, True, 0)

def open_with_limit(world, lab, limit: int) -> None:
    import torch
    from drifting_kd.data import load_dataset
    from drifting_kd.teachers import ViewCache
    other = dataclasses.replace(load_dataset("digits", limit=limit, split_seed=limit), crop_padding=1)
    for _ in range(20): cache = ViewCache(world[1], other)
    cache.fill(other.train.take(torch.arange(20)))

def test_opened_at_the_same_time_with_other_limits(lab, world):
    "Whoever comes first, the files get as long as the largest needs, and nobody makes them shorter."
    parts = [start(open_with_limit, world, lab, limit) for limit in (40, 400, 100)]
    assert [ended(p) for p in parts] == [0, 0, 0]
    folder, = (lab / "runs/.cache/teachers").iterdir()
    assert (folder / "logits.f16").stat().st_size * 4 == (folder / "check.u32").stat().st_size * 20
    there, right, damaged = compared(world, lab)
    assert right and not damaged

def no_room(world, lab) -> None:
    "The kernel itself refuses to write."
    from drifting_kd.core import LabError
    cache, teacher = opened(world, lab), world[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for b in itertools.islice(batches(world, 0), 8): assert cache(b.x, b.index, b.view).equal(teacher.steady(b.x).float())
    assert len(told) == 1 and "File too large" in str(told[0].message) and "computed live from now on" in str(told[0].message)
    with pytest.raises(LabError, match="cannot be filled; free the disk"): cache.fill()

def test_no_room_is_one_warning_and_training_goes_on(lab, world):
    assert ended(start(no_room, world, lab)) == 0
    assert compared(world, lab)[1]
