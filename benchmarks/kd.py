"""What three teachers cost a distillation step: live, from the view cache, and not at all (the student alone);
32x32x3, 100 classes.

    python benchmarks/kd.py [--repeats 24] [--live 6] [--batch 64] [--threads 1] [--device cpu] [--out \\
        benchmarks/results/kd.json]

All three train the same student on the same batches in one process, in turns of one step (live ones more seldom), and
CPU time is counted (on a GPU: the clock), so a busy machine hurts all alike.
Live teachers are as fast as the library makes them: BatchNorm folded, channels last. The cache is filled before; the
images are random, since the cost of a step does not depend on what is on them.
The methods' step is that of `dynamic`, as a run takes it (confidence-aware weights, a gate, its metrics). `lookup`
times reading three teachers' logits by itself, `loss_ms` each method's loss, forth and back, by itself.
"""
import itertools, os, statistics, sys, tempfile, time
from pathlib import Path
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asked import asked
from drifting_kd.core import environment, seed_everything, write_json
from drifting_kd.data import Dataset, Split, normalize
from drifting_kd.kd import distill_terms
from drifting_kd.cache import HostBatches, cache_bytes
from drifting_kd.teachers import Teachers
from drifting_kd.models import create_model
from drifting_kd.checkpoints import frozen

PAIRS = {"resnet20 <- 3x resnet56": ("resnet20", "resnet56"), "resnet8x4 <- 3x resnet32x4": ("resnet8x4", "resnet32x4")}
MEAN, STD = (.5071, .4866, .4409), (.2673, .2564, .2762)

def random_data(n: int) -> Dataset:
    "Random images; each split has indices of its own, since the cache knows an image by its index."
    g, begun = torch.Generator().manual_seed(0), itertools.count(step=max(n, 100))
    def split(k):
        return Split(
            torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=g),
            torch.randint(0, 100, (k,), generator=g),
            torch.arange(k) + next(begun),
            4,
            True,
        )
    return Dataset(
        "random",
        split(n),
        split(100),
        split(100),
        [str(c) for c in range(100)],
        MEAN,
        STD,
        4,
        True,
        "random",
        "random",
        "none",
    )

class Student:
    "A student and its optimiser; `teach` gives [K, B, C] of a batch, or is None."
    def __init__(self, name: str, teach, device: str):
        torch.manual_seed(0)
        self.teach = teach
        self.model = create_model(name, 100, 3, 32).to(device=device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), .05, momentum=.9, weight_decay=5e-4)

    def step(self, b) -> None:
        self.optimizer.zero_grad()
        logits = self.model(normalize(b.x, MEAN, STD))
        loss = distill_terms("dynamic", logits, self.teach(b), b.y)[0] if self.teach else F.cross_entropy(logits, b.y)
        loss.backward()
        self.optimizer.step()

def clock(do, device: str) -> float:
    if device != "cpu": torch.cuda.synchronize()
    now = time.process_time if device == "cpu" else time.perf_counter
    start = now()
    do()
    if device != "cpu": torch.cuda.synchronize()
    return 1e3 * (now() - start)

def compare(names: tuple, data: Dataset, batch: int, repeats: int, live: int, device: str) -> dict:
    student, teacher = names
    torch.manual_seed(1)
    teachers = Teachers([frozen(create_model(teacher, 100, 3, 32), device, MEAN, STD) for _ in range(3)], data, device)
    teachers.cache()
    batches = list(HostBatches(data.train, batch, seed=0, device=device))
    for b in batches: teachers(b)  # fills the cache
    filled = [c.computed for c in teachers.caches]
    ways = {
        "alone": Student(student, None, device),
        "cached": Student(student, teachers, device),
        "live": Student(student, lambda b: teachers.logits(b.x), device),
    }
    times = {way: [] for way in ways}
    for turn, b in zip(range(repeats + 1), itertools.cycle(batches)):
        order = list(ways) if turn % 2 else list(ways)[::-1]
        for way in order:
            if way != "live" or turn % max(1, repeats // live) == 0:
                times[way].append(clock(lambda: ways[way].step(b), device))
    assert [c.computed for c in teachers.caches] == filled, "the cache was not full"
    lookup = [clock(lambda: teachers(b), device) for b in batches * 20]
    z, t = torch.randn(batch, 100, device=device, requires_grad=True), torch.randn(3, batch, 100, device=device)
    y = torch.arange(batch, device=device) % 100
    loss = {
        m: statistics.median(
            clock(lambda: distill_terms(m, z, t, y, progress=1.0)[0].backward(), device) for _ in range(50)
        )
        for m in ("hinton", "ca_weighted", "dynamic", "confidence", "dkd+ls+ca", "mlkd")
    }
    times = {way: v[1:] for way, v in times.items()}  # the first turn warms up
    ms = {way: statistics.median(v) for way, v in times.items()}
    ratios = [c / a for a, c in zip(times["alone"], times["cached"])]
    return dict(
        batch_size=batch,
        turns={way: len(v) for way, v in times.items()},
        ms_per_step=ms,
        live_over_cached=ms["live"] / ms["cached"],
        cached_over_alone=statistics.median(ratios),
        cached_over_alone_quartiles=statistics.quantiles(ratios, n=4),
        cached_over_alone_of_fastest_steps=min(times["cached"]) / min(times["alone"]),
        lookup_ms=statistics.median(lookup),
        lookup_us_per_image_and_teacher=1e3 * statistics.median(lookup) / batch / 3,
        loss_ms=loss,
        whole_cache_gb_of_50000_images=3 * cache_bytes(50_000, 162, 100) / 1e9,
    )

def main() -> None:
    args = asked(__doc__, "kd.json", repeats=24, live=6, batch=64, threads=1, device="cpu")
    torch.set_num_threads(args.threads)
    seed_everything(0, "on")
    data, rows = random_data(4 * args.batch), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DKD_ROOT"] = folder
        for pair, names in PAIRS.items():
            rows[pair] = r = compare(names, data, args.batch, args.repeats, args.live, args.device)
            ms = r["ms_per_step"]
            print(
                f"{pair}: alone {ms['alone']:.0f}, cached {ms['cached']:.0f}, live {ms['live']:.0f} ms a step; "
                f"live / cached {r['live_over_cached']:.2f}, cached / alone {r['cached_over_alone']:.3f} "
                f"(quartiles {r['cached_over_alone_quartiles'][0]:.3f}, "
                f"{r['cached_over_alone_quartiles'][2]:.3f}; fastest "
                f"{r['cached_over_alone_of_fastest_steps']:.3f}); lookup {r['lookup_ms']:.2f} ms, "
                f"{r['lookup_us_per_image_and_teacher']:.1f} us an image and teacher; losses "
                + ", ".join(f"{k} {v:.2f}" for k, v in r["loss_ms"].items())
                + " ms",
                flush=True,
            )
    write_json(
        args.out,
        dict(
            what="one distillation step with three teachers: live, cached, and the student alone; "
            "CPU time (on a GPU: the clock)",
            repeats=args.repeats,
            pairs=rows,
            environment=environment(device=args.device),
        ),
    )

if __name__ == "__main__": main()
