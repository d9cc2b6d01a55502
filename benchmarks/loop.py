"""What `fit` costs over a bare PyTorch loop with the same pixels, ResNet-8, 32x32x3, batch 128.

    python benchmarks/loop.py [--repeats 120] [--steps 5] [--threads 1 2] [--out benchmarks/results/loop.json]

Both train on the same batches in one process, in turns of `steps` steps, and CPU time is counted, so a busy machine
hurts both alike.
`parts` times by themselves the things that `fit` does in a step and a bare loop does not; `layer norms` is what
`layer_norms=True` adds.
`fit` has everything on: EMA, gradient clipping, metrics on the device, the not-finite guard, a log line every 50
steps (the default), deterministic kernels (for both, since the switch is the process's).
"""
import itertools, os, statistics, sys, tempfile, time
from pathlib import Path
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from asked import asked
from drifting_kd.core import environment, seed_everything, write_json
from drifting_kd.run import Run
from drifting_kd.data import Batches, Dataset, Split, normalize
from drifting_kd.models import create_model
from drifting_kd.train import Loop
from drifting_kd.classify import Classify, TrainConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

def random_data(n: int = 45_000) -> Dataset:
    "Random images of CIFAR's size: the cost of a step does not depend on what is on them."
    g = torch.Generator().manual_seed(0)
    def split(k):
        return Split(
            torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=g),
            torch.randint(0, 10, (k,), generator=g),
            torch.arange(k),
            4,
            True,
        )
    return Dataset(
        "random",
        split(n),
        split(100),
        split(100),
        [str(c) for c in range(10)],
        MEAN,
        STD,
        4,
        True,
        "",
        "random",
        "none",
    )

class Bare:
    "The loop anybody would write, on the same batches."
    def __init__(self, data: Dataset, device: str = "cpu"):
        torch.manual_seed(0)
        self.model = create_model("resnet8", 10, 3, 32).to(device=device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def __call__(self, batches) -> None:
        for b in batches:
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(normalize(b.x, MEAN, STD)), b.y).backward()
            self.optimizer.step()

class Fit:
    "The library's loop with everything on, fed the same way."
    def __init__(self, data: Dataset, device: str = "cpu", **settings):
        cfg = TrainConfig(
            **dict(
                tracker="none",
                device=device,
                batch_size=128,
                epochs=1000,
                eval_every=1000,
                save_every=1000,
                grad_clip=1.0,
                ema_decay=0.999,
            )
            | settings
        )
        seed_everything(0, "on")
        self.loop = Loop(Classify(create_model("resnet8", 10, 3, 32), data, cfg), cfg, Run(cfg, "benchmark"))
        self.loop.tracker = self.loop.bar = None
        self.loop.model.train()

    def __call__(self, batches) -> None: self.loop.train_epoch(batches)

def compare(data: Dataset, steps: int, repeats: int) -> dict:
    loops, seconds, wall = {"bare": Bare(data), "fit": Fit(data)}, {"bare": [], "fit": []}, {"bare": [], "fit": []}
    for turn in range(repeats + 1):
        source = Batches(data.train, 128, seed=0, epoch=turn)
        for name, loop in loops.items():
            batches = itertools.islice(iter(source), steps)
            start = time.process_time(), time.perf_counter()
            loop(batches)
            seconds[name].append((time.process_time() - start[0]) / steps)
            wall[name].append((time.perf_counter() - start[1]) / steps)
    seconds = {k: v[1:] for k, v in seconds.items()}  # the first turn warms up
    ratios = [f / b for b, f in zip(seconds["bare"], seconds["fit"])]
    return {
        "batch_size": 128,
        "steps_a_turn": steps,
        "cpu_ms_per_step": {k: 1e3 * statistics.median(v) for k, v in seconds.items()},
        "images_per_cpu_second": {k: 128 / statistics.median(v) for k, v in seconds.items()},
        "seconds_per_epoch": {k: 45_000 / 128 * statistics.median(v[1:]) for k, v in wall.items()},
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "overhead_quartiles_percent": [100 * (q - 1) for q in statistics.quantiles(ratios, n=4)],
        "overhead_of_all_turns_percent": 100 * (sum(seconds["fit"]) / sum(seconds["bare"]) - 1),
        "overhead_of_fastest_turns_percent": 100 * (min(seconds["fit"]) / min(seconds["bare"]) - 1),
    }

def parts(data: Dataset, n: int = 200) -> dict:
    "CPU milliseconds of what `fit` adds to a step, one at a time, and their share of the bare step."
    loop, bare = Fit(data, layer_norms=True).loop, Bare(data)
    batch = next(iter(Batches(data.train, 128, seed=0)))
    def clock(do, n=n):
        times = []
        for _ in range(n):
            start = time.process_time()
            do()
            times.append(1e3 * (time.process_time() - start))
        return statistics.median(times)
    step = clock(lambda: bare([batch]), min(n, 20))
    loop.train_step([batch])
    for p in loop.parameters: p.grad = torch.randn_like(p)
    grads = [p.grad for p in loop.parameters]
    norms = torch.stack(torch._foreach_norm(grads))
    norm = torch.linalg.vector_norm(norms)
    def layer_norms(): loop.squares = loop.squares + norms.square()
    found = {
        "gradient norm": clock(lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))),
        "clipping": clock(lambda: torch.nn.utils.clip_grads_with_norm_(loop.parameters, 1.0, norm)),
        "EMA": clock(lambda: loop.ema.update(loop.model, 0)),
        "layer norms, a step": clock(layer_norms),
        "layer norms, a line of 50 steps, per step": clock(loop.norms_by_layer) / 50,
    }
    return {
        "bare_step_cpu_ms": step,
        "cpu_ms": found,
        "percent_of_a_step": {k: 100 * v / step for k, v in found.items()},
    }

def main() -> None:
    args = asked(__doc__, "loop.json", repeats=120, steps=5, threads=[1, 2])
    data, rows = random_data(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DKD_ROOT"] = folder
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows[f"threads_{threads}"] = r = compare(data, args.steps, args.repeats)
            r["parts"] = parts(data)
            print(
                f"{threads} threads: bare {r['cpu_ms_per_step']['bare']:.1f}, fit "
                f"{r['cpu_ms_per_step']['fit']:.1f} CPU-ms a step: {r['overhead_percent']:+.1f} % (quartiles "
                f"{r['overhead_quartiles_percent'][0]:+.1f}, {r['overhead_quartiles_percent'][2]:+.1f}; "
                f"fastest turns {r['overhead_of_fastest_turns_percent']:+.1f}); "
                f"{r['seconds_per_epoch']['bare']:.1f} and {r['seconds_per_epoch']['fit']:.1f} s for 45,000 images"
            )
            print("  " + ", ".join(f"{k} {v:.2f} %" for k, v in r["parts"]["percent_of_a_step"].items()))
    write_json(
        args.out,
        dict(
            what="training steps of fit with everything on, over a bare loop with the same pixels",
            repeats=args.repeats,
            **rows,
            environment=environment(),
        ),
    )

if __name__ == "__main__": main()
