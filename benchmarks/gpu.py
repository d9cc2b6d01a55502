"""Everything that wants a GPU, in under ten minutes; later families add a function to MEASUREMENTS.

    python benchmarks/gpu.py [--epochs 200] [--only training determinism] [--out benchmarks/results/gpu.json]

With `cifar10_jpeg.npz` or CIFAR-10 in DKD_DATA (or data/) the accuracies are real; without, images are random and
only the times mean something.
`--device cpu --epochs 1 --images 2000` tries the script itself.
"""
import argparse, dataclasses, os, statistics, sys, tempfile, time
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from drifting_kd.core import LabError, environment, seed_everything, write_json
from drifting_kd.run import Run, read_metrics
from drifting_kd.data import load_dataset
from drifting_kd.models import create_model
from drifting_kd.checkpoints import load_checkpoint
from drifting_kd.train import fit
from drifting_kd.classify import Classify, TrainConfig
from loop import Bare, Fit, random_data

MODES = {
    "fp32": {},
    "fp32 compiled": dict(compile=True),
    "bf16": dict(precision="bf16"),
    "bf16 compiled": dict(precision="bf16", compile=True),
}

def dataset(images: int):
    for name in ("cifar10_jpeg", "cifar10"):
        try: return load_dataset(name, limit=0 if images >= 45_000 else images)
        except LabError: continue
    return random_data(images)

def clock(device: str) -> float:
    if device.startswith("cuda"): torch.cuda.synchronize()
    return time.perf_counter()

def train_once(data, device: str, epochs: int, batch_size: int = 512, **mode) -> tuple[dict, Run]:
    cfg = TrainConfig(
        dataset=data.name,
        device=device,
        epochs=epochs,
        batch_size=batch_size,
        schedule="cosine",
        lr=0.4,
        warmup=200,
        tracker="none",
        eval_every=epochs,
        save_every=epochs,
        log_every=100,
        **mode,
    )
    seed_everything(cfg.seed, "on")
    run = Run(cfg, "gpu")
    return fit(Classify(create_model("resnet8", len(data.classes), 3, 32), data, cfg), cfg, run), run

def training(data, device: str, epochs: int) -> dict:
    "ResNet-8, deterministic, batch 512: images per second of each mode, then all epochs with the fastest."
    rows = {}
    for name, mode in MODES.items():
        try:
            train_once(data, device, 1, **mode)  # compiles, fills caches
            start = clock(device)
            summary, _ = train_once(data, device, max(2, epochs // 40), **mode)
            seconds = clock(device) - start
            rows[name] = dict(
                images_per_second=summary["steps"] * 512 / seconds, seconds_per_epoch=seconds / summary["epochs"]
            )
        # one mode that fails must not cost the others
        except Exception as e: rows[name] = dict(error=f"{type(e).__name__}: {e}"[:300])
        print(name, rows[name], flush=True)
    best = min((n for n in rows if "error" not in rows[n]), key=lambda n: rows[n]["seconds_per_epoch"])
    start = clock(device)
    summary, _ = train_once(data, device, epochs, **MODES[best])
    full = dict(
        mode=best,
        epochs=epochs,
        seconds=clock(device) - start,
        test_accuracy=summary["test/accuracy"],
        test_last_accuracy=summary["test/last_accuracy"],
        data=data.name,
    )
    print("full", full, flush=True)
    return dict(batch_size=512, modes=rows, full=full)

def generator_once(data, device: str, **settings) -> Run:
    "A short drifting training, guided."
    from drifting_kd.drifting import Drift, DriftConfig, drifter
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, flip=False, crop_padding=0, _cache={}))
    cfg = DriftConfig(
        dataset=data.name,
        device=device,
        warmup=1,
        eval_every=30,
        log_every=1,
        tracker="none",
        judge="none",
        positives=32,
        **settings,
    )
    run = Run(cfg, "gpu")
    fit(Drift(drifter(cfg, data), data, cfg), cfg, run)
    return run

def determinism(data, device: str, epochs: int) -> dict:
    "Two trainings, of one epoch or a few steps: the same bits?"
    def weights(run: Run) -> dict: return load_checkpoint(run.path / "final_model.pt")["model"]
    ways = {name: lambda mode=mode: train_once(data, device, 1, **mode)[1] for name, mode in MODES.items()}
    ways |= {
        f"{name} {precision}": lambda name=name, precision=precision: generator_once(
            data, device, model=name, precision=precision, steps=5, batch_size=160
        )
        for name in (("dit_small", "unet") if epochs > 1 else ("dit_tiny",))
        for precision in ("fp32", "bf16")
    }  # both have attention
    out = {}
    for name, way in ways.items():
        try:
            a, b = weights(way()), weights(way())
            out[name] = all(torch.equal(a[k], b[k]) for k in a)
        except Exception as e: out[name] = f"{type(e).__name__}: {e}"[:300]
        print("identical weights,", name, out[name], flush=True)
    return out

def overhead(data, device: str, epochs: int) -> dict:
    "Steps of fit with everything on beside a bare loop, batch 128, in turns."
    from drifting_kd.data import Batches
    import itertools
    loops, seconds = {"bare": Bare(data, device), "fit": Fit(data, device)}, {"bare": [], "fit": []}
    for turn in range(6):
        for name, loop in loops.items():
            batches = itertools.islice(iter(Batches(data.train, 128, 0, turn, device=device)), 100)
            start = clock(device)
            loop(batches)
            seconds[name].append(clock(device) - start)
    ratio = statistics.median(f / b for b, f in list(zip(seconds["bare"], seconds["fit"]))[1:])
    print(f"fit over bare loop: {ratio:.3f}", flush=True)
    return dict(ratio=ratio, seconds_per_100_steps={k: statistics.median(v[1:]) for k, v in seconds.items()})

def optimizers(data, device: str, epochs: int) -> dict:
    "Seconds an epoch with each optimiser of the comparison, layer norms logged, bf16, batch 128."
    rows = {}
    for name in ("sgd", "sgd", "adamw", "muon", "lion"):  # the first one pays for starting up, and is written over
        cfg = TrainConfig(
            dataset=data.name,
            device=device,
            epochs=max(1, min(3, epochs)),
            batch_size=128,
            optimizer=name,
            precision="bf16",
            layer_norms=True,
            tracker="none",
        )
        seed_everything(cfg.seed, "on")
        summary = fit(Classify(create_model("resnet8", len(data.classes), 3, 32), data, cfg), cfg, Run(cfg, "gpu"))
        rows[name] = dict(
            seconds_per_epoch=summary["train_seconds"] / summary["epochs"], test_accuracy=summary["test/accuracy"]
        )
        print(name, rows[name], flush=True)
    return rows

def drifting(data, device: str, epochs: int) -> dict:
    "The drifting field beside a plain loop, eager and compiled; `--epochs 1` leaves out the large sizes."
    import drift
    return dict(sizes=drift.on_gpu(device, *[{k: v for k, v in drift.SIZES.items() if v[1] < 1000}] * (epochs == 1)))

def evaluation(data, device: str, epochs: int) -> dict:
    """50,000 images of a generator to a distance: streamed, and through PNG files and clean-fid's data set. The
    network is Inception's architecture with random weights; `--epochs 1` takes 200 images."""
    from cleanfid.utils import ResizeDataset
    from PIL import Image
    from drifting_kd.core import import_torchvision
    from drifting_kd.images import resize_for, to_uint8
    from drifting_kd.extractors import Extractor
    from drifting_kd.fid import Moments, Stats
    from drifting_kd.generators import create_generator
    from drifting_kd.generate import sample_batches
    n = 200 if epochs == 1 else 50_000
    net = import_torchvision().models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval().to(device)
    net.fc = torch.nn.Identity()
    judge = Extractor(
        "random-inception",
        2048,
        "",
        lambda x: net((resize_for(x, "clean") - 128) / 128),
        "clean",
        device=torch.device(device),
    )
    model, labels = create_generator("mlp_wide", 10, 3, 32).to(device), torch.arange(n) % 10
    pixels = lambda: (to_uint8(x.float(), "signed") for x in sample_batches(model, labels, batch_size=256))
    reference = Stats.of(torch.cat([judge(x) for x in list(pixels())[:10]]), judge)
    _ = reference.half  # computed once a reference
    def streamed() -> float:
        m = Moments(2048, device)
        for x in pixels(): m.add(judge(x))
        return reference.distance(Stats.from_moments(m, judge))
    def through_files() -> float:
        m = Moments(2048, device)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            for i, image in enumerate(image for x in pixels() for image in x.cpu().numpy()):
                Image.fromarray(image).save(Path(folder) / f"{i:06d}.png")
            files = sorted(map(str, Path(folder).iterdir()))
            for x in torch.utils.data.DataLoader(
                ResizeDataset(files, mode="clean"), 256, num_workers=min(12, (os.cpu_count() or 1) - 1)
            ):
                m.add(net((x.to(device) - 128) / 128))
        return reference.distance(Stats.from_moments(m, judge))
    found = {}
    for name, way in (("streamed", streamed), ("png_files", through_files)):
        start = clock(device)
        way()
        found[name] = dict(seconds=clock(device) - start)
        print(name, found[name], flush=True)
    return dict(images=n, **found, ratio=found["png_files"]["seconds"] / found["streamed"]["seconds"])

def drifting_step(data, device: str, epochs: int) -> dict:
    """Milliseconds of a whole drifting step: MNIST-sized pixels with the wide MLP, and 32-px colour with the UNet,
    guided."""
    rows = {}
    for name, settings in (
        (("mlp_wide", {}), ("unet", dict(precision="bf16", batch_size=640))) if epochs > 1 else (("mlp_wide", {}),)
    ):
        run = generator_once(data, device, model=name, steps=30 if epochs > 1 else 4, **settings)
        times = [line["train/step_time"] for line in read_metrics(run.path) if "train/step_time" in line]
        rows[name] = dict(ms=1000 * statistics.median(times[len(times) // 2 :]))
        print(name, rows[name], flush=True)
    return rows

def diffusion_step(data, device: str, epochs: int) -> dict:
    """Milliseconds of a whole diffusion step and of an image of 12 network calls: ours at 28 px, diffusers' network at
    32 px."""
    from drifting_kd.diffusion import Diffuse, DiffuseConfig, denoiser
    rows = {}
    for name, settings in dict(text_unet={}, cross_unet=dict(precision="bf16")).items():
        if data.image_size > 31 and name == "text_unet": continue
        cfg = DiffuseConfig(dataset=data.name, device=device, model=name, steps=30 if epochs > 1 else 3, warmup=1,
                            eval_every=30, log_every=1, batch_size=256 if epochs > 1 else 16, tracker="none",
                            judge="none", **settings)
        task, run = Diffuse(denoiser(cfg, data), data, cfg), Run(cfg, "gpu")
        fit(task, cfg, run)
        times = [line["train/step_time"] for line in read_metrics(run.path) if "train/step_time" in line]
        n, start = (2048 if epochs > 1 else 8), clock(device)
        task.sample(task.model, torch.arange(n) % data.num_classes, n)
        rows[name] = dict(step_ms=1000 * statistics.median(times[len(times) // 2 :]),
                          image_ms=1000 * (clock(device) - start) / n)
        print(name, rows[name], flush=True)
    return rows

def distillation(data, device: str, epochs: int) -> dict:
    "A step with three teachers: the student alone, with cached logits, with live teachers."
    from kd import PAIRS, compare, random_data as views
    turns, pairs = (24, 24) if epochs > 1 else (2, 1), PAIRS if epochs > 1 else dict(list(PAIRS.items())[:1])
    rows = {pair: compare(names, views(256), 64, *turns, device) for pair, names in pairs.items()}
    for pair, r in rows.items():
        print(pair, {k: r[k] for k in ("ms_per_step", "live_over_cached", "cached_over_alone")}, flush=True)
    return rows

MEASUREMENTS = dict(
    training=training,
    determinism=determinism,
    overhead=overhead,
    optimizers=optimizers,
    drift=drifting,
    drift_step=drifting_step,
    diffusion_step=diffusion_step,
    distillation=distillation,
    evaluation=evaluation,
)

def every(answers) -> bool | None:
    "all, but of nothing nothing is known."
    return all(answers) if (answers := list(answers)) else None

AIMS = {  # what the results are asked for, each with where it stands
    "200 epochs of ResNet-8 in under 60 seconds": lambda r: (
        r["training"]["full"]["seconds"] < 60 if r["training"]["full"]["epochs"] == 200 else None
    ),
    "two trainings give the same weights": lambda r: every(
        v is True for k, v in r["determinism"].items() if k != "wall_seconds"
    ),
    "fit costs at most 5 % over a bare loop": lambda r: r["overhead"]["ratio"] <= 1.05,
    "the compiled field beats eager twofold at N=4096": lambda r: (
        r["drift"]["sizes"]["4096^2 x 512"]["compiled_over_eager"] >= 2
    ),
    "streamed evaluation is five times as fast as through PNG files": lambda r: r["evaluation"]["ratio"] >= 5,
    "a distilling step with cached teachers costs at most 1.05 of the student alone": lambda r: every(
        v["cached_over_alone"] <= 1.05 for v in r["distillation"].values() if isinstance(v, dict)
    ),
}

def reached(results: dict) -> dict:
    "yes, no, or not measured, for each aim."
    results = {name: found for name, found in results.items() if "error" not in found}
    def told(aim) -> str:
        try: found = aim(results)
        except (KeyError, TypeError): return "not measured"
        return "not measured" if found is None else "yes" if found else "no"
    return {name: told(aim) for name, aim in AIMS.items()}

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--images", type=int, default=45_000)
    parser.add_argument("--only", nargs="*", default=list(MEASUREMENTS), choices=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --epochs 1 --images 2000 tries the script itself")
    data, results = dataset(args.images), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DKD_ROOT"] = folder
        for name in args.only:
            start = time.perf_counter()
            try: found = MEASUREMENTS[name](data, args.device, args.epochs)
            # the others are still worth their minutes
            except Exception as e: found = dict(error=f"{type(e).__name__}: {e}"[:500])
            results[name] = found | {"wall_seconds": time.perf_counter() - start}
            if "error" in found: print(name, found["error"], flush=True)
            write_json(
                args.out,
                dict(
                    device=args.device,
                    images=len(data.train),
                    **results,
                    aims=reached(results),
                    environment=environment(device=args.device),
                ),
            )
    for aim, answer in reached(results).items(): print(f"{answer:12} {aim}")
    if failed := [name for name, found in results.items() if "error" in found]: sys.exit(f"failed: {', '.join(failed)}")

if __name__ == "__main__": main()
