"""Everything of an FID but the network, beside clean-fid, in CPU time: pixels to what Inception sees, statistics, and
the trace term beside scipy's sqrtm.

    python benchmarks/fid.py [--images 1000] [--size 32] [--dims 2048] [--repeats 5] [--threads 1] [--agreement] \\
        [--out benchmarks/results/fid.json]

Noise images. clean-fid reads them as PNG files through its own data set and loader, in this process; ours come once
as such files and once from a sampler. The network is left out on both sides: its place is taken by features that are
already there. All ways take turns and CPU time is counted, so a busy machine hurts them alike. The trace term is for
two covariances of rectified features; half of the reference is computed once, as for a run's checkpoints.
"""
import hashlib, statistics, sys, tempfile, time, warnings
from pathlib import Path
import numpy as np, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asked import asked
from drifting_kd.core import environment, generator, import_torchvision, write_json
from drifting_kd.images import images_of, resize_for
from drifting_kd.extractors import INCEPTION_FILES, Extractor, inception, random_extractor
from drifting_kd.fid import Moments, covariance_half, fid, frechet_distance, kernel_distance

def cpu(work) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun

def in_turns(ways: dict, repeats: int) -> dict:
    "Seconds of each way, one list each; the first turn warms up."
    found = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            seconds = cpu(work)
            if turn: found[name].append(seconds)
    return found

def against(found: dict, reference: str) -> dict:
    "Medians, and each way's share of the reference's time, turn by turn."
    shares = {name: [a / b for a, b in zip(values, found[reference])] for name, values in found.items()}
    return {
        name: {
            "seconds": statistics.median(found[name]),
            "share": statistics.median(s),
            "share_min": min(s),
            "share_max": max(s),
        }
        for name, s in shares.items()
    }

def everything_but_the_network(n: int, size: int, dims: int, repeats: int, batch_size: int = 64) -> dict:
    import_torchvision()
    with warnings.catch_warnings():
        from cleanfid.utils import ResizeDataset
        from PIL import Image
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator(0))
    floats, pool = pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.randn(batch_size, dims, generator=generator(1))
    def absent(x):
        resize_for(x, "clean")
        return pool[:len(x)]
    judge = Extractor("absent", dims, "", absent, "clean")
    def ours(source, add: bool):
        moments = Moments(dims)
        for images in images_of(source, n, batch_size):
            features = judge(images)
            if add: moments.add(features)
    def sampler():
        at = 0
        def draw(k, _):
            nonlocal at
            at += k
            return floats[at - k:at]
        return draw
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(pixels): Image.fromarray(image.numpy()).save(Path(folder) / f"{i:06d}.png")
        files = sorted(str(p) for p in Path(folder).iterdir())
        def theirs():
            for _ in torch.utils.data.DataLoader(ResizeDataset(files, mode="clean"), batch_size, num_workers=0): pass
        found = in_turns(
            {
                "clean_fid_dataset": theirs,
                "ours_sampler": lambda: ours(sampler(), False),
                "ours_sampler_and_statistics": lambda: ours(sampler(), True),
                "ours_png_files": lambda: ours(folder, False),
            },
            repeats,
        )
    rows = against(found, "clean_fid_dataset")
    for row in rows.values(): row["ms_per_image"] = 1000 * row["seconds"] / n
    return {"images": n, "size": size, "dims": dims, "batch_size": batch_size, "ways": rows}

def trace_term(dims: int, repeats: int) -> dict:
    from scipy import linalg
    mix = torch.randn(dims, dims, generator=generator(2)) * torch.logspace(0, -2, dims)
    def statistics_of(seed):
        m = Moments(dims)
        for i in range(4): m.add(torch.relu(torch.randn(dims, dims, generator=generator(seed, i)) @ mix))
        return m.mean, m.cov
    (mu1, S1), (mu2, S2) = statistics_of(3), statistics_of(4)
    half, value = covariance_half(S1), {}
    def ours(): value["ours"] = frechet_distance(mu1, S1, mu2, S2, half)
    def theirs():
        root = linalg.sqrtm(S1.numpy() @ S2.numpy())
        value["sqrtm"] = ((mu1 - mu2).square().sum() + S1.trace() + S2.trace()).item() - 2 * np.trace(root).real
    rows = against(
        in_turns({"sqrtm": theirs, "ours": ours, "half_of_the_reference_once": lambda: covariance_half(S1)}, repeats),
        "sqrtm",
    )
    return {"dims": dims, "ways": rows, "relative_difference": abs(value["ours"] / value["sqrtm"] - 1)}

class StandIn(torch.nn.Module):
    "Random weights with the parts of NVIDIA's TorchScript Inception, which resizes like TensorFlow 1 inside."
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 13, 13), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten()
        )
    def forward(self, img, return_features: bool = False):
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / img.shape[3] - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / img.shape[2] - theta[1, 1] / 299
        grid = torch.nn.functional.affine_grid(
            theta[None].repeat(img.shape[0], 1, 1), [img.shape[0], 3, 299, 299], align_corners=False
        )
        resized = torch.nn.functional.grid_sample(
            img, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return self.layers((resized - 128) / 128)

def stand_in_features(folder: Path, images: torch.Tensor) -> float:
    """Largest relative difference of features of the stand-in, read by our loader and by clean-fid's, in
    legacy_tensorflow."""
    from cleanfid.inception_torchscript import InceptionV3W
    torch.manual_seed(0)
    file = folder / "inception-2015-12-05.pt"
    torch.jit.script(StandIn().eval()).save(str(file))
    INCEPTION_FILES[file.name] = "", hashlib.sha256(file.read_bytes()).hexdigest()
    with torch.no_grad():
        theirs = InceptionV3W(str(folder), download=False, resize_inside=True)(images.permute(0, 3, 1, 2).float())
    ours = inception("legacy_tensorflow", folder, "cpu", download=False)(images)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()

def agreement(dims: int, folder: Path) -> dict:
    """Largest difference of resized pixels on a scale of 0 to 255, and of distances on the same features and images,
    relative, from clean-fid's own functions."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid as theirs
        from cleanfid.resize import build_resizer
        from PIL import Image
    rows = {}
    for mode in ("clean", "legacy_pytorch"):  # legacy_tensorflow resizes inside its network
        resizer = build_resizer(mode)
        for size in (32, 64, 512):
            pixels = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=generator(4, size))
            ours = resize_for(pixels.permute(0, 3, 1, 2), mode).permute(0, 2, 3, 1).numpy()
            rows[f"pixels, {mode}, {size} px"] = max(
                float(np.abs(o - resizer(x.numpy())).max()) for o, x in zip(ours, pixels)
            )
    def stats(seed: int):
        mix = torch.randn(dims, dims, generator=generator(6)) * torch.logspace(0, -2, dims)
        x = torch.relu(torch.randn(2 * dims, dims, generator=generator(seed)) @ mix).numpy().astype(np.float64)
        return x.mean(0), np.cov(x, rowvar=False)
    a, b = stats(7), stats(8)
    ours, reference = frechet_distance(*a, *b), theirs.frechet_distance(*a, *b)
    rows["distance, same statistics"] = abs(ours / reference - 1)
    pixels = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=generator(9))
    for i, image in enumerate(pixels): Image.fromarray(image.numpy()).save(folder / f"{i:06d}.png")
    judge = random_extractor(32, "clean")
    real = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=generator(10))
    streamed, files = (fid(real, source, judge, floor=False).value for source in (pixels, folder))
    rows["distance, streamed and from PNG files"] = abs(streamed / files - 1)
    features = [judge(x).double().numpy() for x in (real, pixels)]
    rows["distance, same features (its fid_from_feats)"] = abs(
        fid(real, pixels, judge, floor=False).value / theirs.fid_from_feats(*features) - 1
    )
    x, y = torch.from_numpy(features[0]), torch.from_numpy(features[1])
    rows["kernel distance, same features"] = abs(
        kernel_distance(x, y, 2).value / theirs.kernel_distance(*features, num_subsets=2, max_subset_size=len(x)) - 1
    )
    with tempfile.TemporaryDirectory() as weights:
        rows["features of a TorchScript stand-in, legacy_tensorflow"] = stand_in_features(Path(weights), pixels[:20])
    return rows

def main() -> None:
    args = asked(__doc__, "", images=1000, size=32, dims=2048, repeats=5, threads=1, agreement=False)
    torch.set_num_threads(args.threads)
    if args.out.is_dir(): args.out = args.out / ("fid_agreement.json" if args.agreement else "fid.json")
    if args.agreement:
        with tempfile.TemporaryDirectory() as folder: rows = agreement(args.dims, Path(folder))
        for name, value in rows.items(): print(f"{name:58}{value:.1e}")
        return write_json(
            args.out,
            {
                "what": "largest difference from clean-fid: pixels on a scale of 0 to 255, distances relative",
                "dims": args.dims,
                "rows": rows,
                "environment": environment(),
            },
        )
    result = {
        "what": "CPU time of everything but the network, and of the trace term",
        "repeats": args.repeats,
        "threads": args.threads,
        "pixels": everything_but_the_network(args.images, args.size, args.dims, args.repeats),
        "trace": trace_term(args.dims, args.repeats),
        "environment": environment(),
    }
    for name, row in result["pixels"]["ways"].items():
        print(
            f"{name:28}{row['ms_per_image']:8.3f} CPU-ms an image, {row['share']:.2f} of clean-fid's data set "
            f"({row['share_min']:.2f} to {row['share_max']:.2f})"
        )
    for name, row in result["trace"]["ways"].items():
        print(
            f"{name:28}{row['seconds']:8.2f} CPU-s, {row['share']:.2f} of sqrtm ({row['share_min']:.2f} to "
            f"{row['share_max']:.2f})"
        )
    print(f"distance differs by {result['trace']['relative_difference']:.0e} from sqrtm's")
    write_json(args.out, result)

if __name__ == "__main__": main()
