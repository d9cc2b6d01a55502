"""A teacher cache filled by several processes, killed inside a write, and out of room: never a wrong number.

Real processes (forks), real SIGKILL.
"""
import dataclasses, itertools, multiprocessing, os, random, resource, signal, time, warnings
import pytest

@pytest.fixture(scope="module")
def world():
    "An untrained network that looks at digits; the right answers, to the bit."
    import torch
    from drifting_kd.data import load_dataset, view_pixels
    from drifting_kd.models import create_model
    from drifting_kd.cache import steady
    from drifting_kd.checkpoints import frozen
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no other threads
    data = dataclasses.replace(load_dataset("digits", limit=120), crop_padding=1)
    torch.manual_seed(0)
    net = frozen(create_model("resnet8", 10, 1), mean=(.5,), std=(.5,))
    row, view = torch.arange(120).repeat_interleave(9), torch.arange(9).repeat(120)
    right = steady(net, view_pixels(data.train.images[row], view, 1)).numpy()
    yield data, net, (data.train.indices[row], view, right)
    torch.set_num_threads(before)

def opened(world):
    from drifting_kd.cache import ViewCache
    return ViewCache(world[1], world[0])

def batches(world, seed: int, epochs: int = 10**6):
    from drifting_kd.data import Batches
    for e in range(epochs): yield from Batches(world[0].train, 30, seed, e, crop_padding=1)

def compared(world) -> tuple[int, bool, int]:
    "Rows that are there, whether each is right to the bit, and how many are damaged."
    cache, (index, view, right) = opened(world), world[2]
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

def fill_forever(world, seed: int) -> None:
    cache = opened(world)
    for b in batches(world, seed): cache(b.x, b.index, b.view)

def die_in_write(world, name: str, when: str, n: int) -> None:
    "Fill one epoch, but die at the n-th write of a file: before it, in the middle of its bytes, or after it."
    import drifting_kd.cache as module
    real, calls = module._write_rows, 0
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
    module._write_rows, cache = dying, opened(world)
    for b in batches(world, 0, 1): cache(b.x, b.index, b.view)

DEATHS = [("logits.f16", "before", 60), ("logits.f16", "inside", 60), ("logits.f16", "after", 60),
          ("check.u32", "inside", 67), ("check.u32", "after", 90)]

@pytest.mark.parametrize("name, when, rows", DEATHS)
def test_killed_inside_a_write(lab, world, name, when, rows):
    assert ended(start(die_in_write, world, name, when, 3)) == -signal.SIGKILL
    half = when == "inside" and name == "check.u32"  # half a checksum is none
    assert compared(world) == (rows, True, int(half))
    opened(world).fill()
    assert compared(world) == (1080, True, 0)

def test_killed_while_others_write(lab, world):
    """Three orders, one cache; one writer is killed at random moments and started again.

    Every row that is there is right, all the time."""
    writers, rng, seen = [start(fill_forever, world, s) for s in range(2)], random.Random(0), []
    try:
        for _ in range(6):
            victim = start(fill_forever, world, 2)
            for _ in range(10):
                seen.append(compared(world))
                time.sleep(rng.uniform(0, .02))
            victim.kill()
            assert ended(victim) == -signal.SIGKILL
        assert all(w.is_alive() for w in writers)
    finally:
        for w in writers:
            w.kill()
            w.join()
    counts = [n for n, _, _ in seen]
    assert all(right for _, right, _ in seen)
    assert counts == sorted(counts) and counts[-1] > 300  # nothing that was there was lost
    opened(world).fill()
    assert compared(world) == (1080, True, 0)

def test_filled_together(lab, world):
    "Processes that were forked after the cache was opened share no position in its files; each does its part."
    cache = opened(world)
    parts = [start(cache.fill, None, None, rank, 3) for rank in range(3)]
    assert [ended(p) for p in parts] == [0, 0, 0]
    assert compared(world) == (1080, True, 0)

def open_with_limit(world, limit: int) -> None:
    import torch
    from drifting_kd.data import load_dataset
    from drifting_kd.cache import ViewCache
    other = dataclasses.replace(load_dataset("digits", limit=limit, split_seed=limit), crop_padding=1)
    for _ in range(20): cache = ViewCache(world[1], other)
    cache.fill(other.train.take(torch.arange(20)))

def test_opened_at_the_same_time_with_other_limits(lab, world):
    "Whoever comes first, the files get as long as the largest needs, and nobody makes them shorter."
    parts = [start(open_with_limit, world, limit) for limit in (40, 400, 100)]
    assert [ended(p) for p in parts] == [0, 0, 0]
    folder, = (lab / "runs/.cache/teachers").iterdir()
    assert (folder / "logits.f16").stat().st_size * 4 == (folder / "check.u32").stat().st_size * 20
    _, right, damaged = compared(world)
    assert right and not damaged

def no_room(world) -> None:
    "The kernel itself refuses to write."
    from drifting_kd.cache import steady
    from drifting_kd.core import LabError
    cache, net = opened(world), world[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for b in itertools.islice(batches(world, 0), 8):
            assert cache(b.x, b.index, b.view).equal(steady(net, b.x).float())
    message = str(told[0].message)
    assert len(told) == 1 and "File too large" in message and "computed live from now on" in message
    with pytest.raises(LabError, match="cannot be filled; free the disk"): cache.fill()

def test_no_room_is_one_warning_and_training_goes_on(lab, world):
    assert ended(start(no_room, world)) == 0
    assert compared(world)[1]
