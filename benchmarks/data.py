"""Images per CPU-second: Batches + normalize beside a torchvision DataLoader that does the same from PIL; and the
loader's share of a ResNet-8 step.

    python benchmarks/data.py [--repeats 5] [--threads 2] [--images 45000] [--out benchmarks/results/data.json]

Random images of CIFAR's size; crop with padding 4, mirror, normalise. Both loaders run on one thread in this process,
in turns, and CPU time is counted, so a busy machine hurts both alike. The step is a forward, backward and SGD step on
`threads` threads, channels last, batch 128.
"""
import statistics, sys, time
from pathlib import Path
import numpy as np, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asked import asked
from drifting_kd.core import environment, import_torchvision, write_json
from drifting_kd.data import Batches, Split, normalize

MEAN, STD = (.4914, .4822, .4465), (.2023, .1994, .2010)

class Pil(torch.utils.data.Dataset):
    "Images through torchvision's PIL transforms, one at a time."
    def __init__(self, images: np.ndarray, labels: np.ndarray):
        import_torchvision()
        from torchvision import transforms as T
        self.images, self.labels = images, labels
        self.transform = T.Compose(
            [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
        )
    def __len__(self): return len(self.labels)
    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])

def rate(batches) -> float:
    "Images per CPU-second of one pass."
    begun, n = time.process_time(), 0
    for _, y in batches: n += len(y)
    return n / (time.process_time() - begun)

def ours(split: Split, batch_size: int, epoch: int):
    for b in Batches(split, batch_size, seed=0, epoch=epoch): yield normalize(b.x, MEAN, STD), b.y

def loaders(split: Split, batch_size: int, repeats: int) -> dict:
    "Medians side by side, in turns; the reference sees a part of the images, for time."
    pil = Pil(split.images[:10_000].numpy(), split.labels[:10_000].numpy())
    split.on("cpu", split.crop_padding)
    found = {"torchvision_pil": [], "batches": []}
    for epoch in range(repeats):
        found["torchvision_pil"].append(
            rate(torch.utils.data.DataLoader(pil, batch_size, shuffle=True, drop_last=True, num_workers=0))
        )
        found["batches"].append(rate(ours(split, batch_size, epoch)))
    ratios = [b / a for a, b in zip(*found.values())]
    return {
        "batch_size": batch_size,
        **{k: statistics.median(v) for k, v in found.items()},
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }

def share(split: Split, threads: int, repeats: int, batch_size: int = 128, steps: int = 40) -> dict:
    "Wall time of the loader and of the training step that uses its batches, in one loop."
    from drifting_kd.models import create_model
    torch.set_num_threads(threads)
    model = create_model("resnet8", 10, 3, 32).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9, weight_decay=1e-4)
    rows = []
    for epoch in range(repeats + 1):
        source, loading, begun = iter(ours(split, batch_size, epoch)), 0., time.perf_counter()
        for _ in range(steps):
            t = time.perf_counter()
            x, y = next(source)
            loading += time.perf_counter() - t
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        rows.append((loading / (time.perf_counter() - begun), steps * batch_size / (time.perf_counter() - begun)))
    rows = rows[1:]  # the first warms up
    return {
        "batch_size": batch_size,
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loader_share_percent": 100 * statistics.median(r[0] for r in rows),
        "images_per_second": statistics.median(r[1] for r in rows),
    }

def main() -> None:
    args = asked(__doc__, "data.json", repeats=5, threads=2, images=45_000)  # threads of the training step
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    n = args.images
    split = Split(
        torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (n,), generator=generator),
        torch.arange(n),
        4,
        True,
    )
    result = {
        "what": "images per CPU-second, crop 4 + mirror + normalise, 32x32x3, one thread",
        "repeats": args.repeats,
        "loaders": [loaders(split, b, args.repeats) for b in (128, 512)],
        "step": share(split, args.threads, args.repeats, steps=min(40, n // 128)),
        "environment": environment(),
    }
    for row in result["loaders"]:
        print(
            f"batch {row['batch_size']}: DataLoader + PIL {row['torchvision_pil']:,.0f}, Batches "
            f"{row['batches']:,.0f} images per CPU-second: {row['ratio']:.1f}x"
        )
    print(
        f"loader: {result['step']['loader_share_percent']:.2f} % of a ResNet-8 step "
        f"({result['step']['images_per_second']:,.0f} images/s, {args.threads} threads)"
    )
    write_json(args.out, result)

if __name__ == "__main__": main()
