"""The drifting field beside a plain loop: CPU time at three temperatures, and memory beyond the inputs.

    python benchmarks/drift.py [--threads 1 2] [--repeats 1] [--out benchmarks/results/drift.json]

The loop is what one writes first: for every class and every temperature one `cdist`, two softmaxes and the products,
under no_grad. It gives the same field.
All ways take turns on the same features, whose mean distance is 1, and CPU time is counted, so a busy machine hurts
them alike; wall time is kept beside it.
Memory (Linux): a fresh process makes the inputs, calls once at a tiny size (libraries take their own buffers), notes
its resident memory, resets the kernel's high-water mark and runs once; extra is the new mark (VmHWM) less what was
noted. So it counts the result, every temporary and what the allocator does not give back.
(getrusage would not do: a process inherits its parent's mark.)
`benchmarks/gpu.py --only drift` makes the table on a GPU, with `compiled_V` beside it.
"""
import argparse, math, re, statistics, subprocess, sys, time
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drifting_kd.core import environment, generator, write_json
from drifting_kd.drift import compiled_V, compute_V

TEMPS = (.02, .05, .2)
SIZES = {
    "256^2 x 512": (1, 256, 512, 24),
    "1024^2 x 512": (1, 1024, 512, 8),
    "2048^2 x 3072": (1, 2048, 3072, 3),
    "ten classes x (32, 32, 512)": (10, 32, 512, 100),
}  # groups, N, D, turns
MEMORY = {
    "2048^2 x 3072, loop": (2048, 3072, -1),
    "2048^2 x 3072": (2048, 3072, 0),
    "2048^2 x 3072, chunk 256": (2048, 3072, 256),
    "16384^2 x 512, chunk 256": (16384, 512, 256),
}

@torch.no_grad()
def plain_loop(x: torch.Tensor, y_pos: torch.Tensor) -> torch.Tensor:
    total, n = torch.zeros_like(x), x.shape[1]
    for tau in TEMPS:
        V = torch.empty_like(x)
        for c in range(len(x)):
            d = torch.cdist(x[c], torch.cat((x[c], y_pos[c])))
            d[:, :n].fill_diagonal_(math.inf)
            A = (torch.softmax(-d / tau, 1) * torch.softmax(-d / tau, 0)).sqrt()
            negative, positive = A[:, :n], A[:, n:]
            V[c] = negative.sum(1, keepdim=True) * (positive @ y_pos[c]) - positive.sum(1, keepdim=True) * (
                negative @ x[c]
            )
        total += V / V.square().mean().sqrt()
    return total

def clouds(groups: int, n: int, dims: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    "Generated and real features whose mean distance is about 1."
    x, p = (torch.randn(groups, n, dims, generator=generator(seed)) for seed in (1, 2))
    p = .8 * p + .1
    scale = torch.cdist(x[0, :256], p[0, :256]).mean()
    return (x / scale).to(device), (p / scale).to(device)

def in_turns(ways: dict, repeats: int, wait=lambda: None) -> dict:
    "CPU and wall seconds of each way, a list of pairs each; the first turn warms up."
    found = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            wait()
            begun = time.process_time(), time.perf_counter()
            work()
            wait()
            if turn: found[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    return found

def row(found: dict, clock: int, reference: str = "loop") -> dict:
    "Medians in ms of one clock (0 CPU, 1 wall), and how many times as long the reference takes, turn by turn."
    of = {name: [v[clock] for v in values] for name, values in found.items()}
    out = {name: {"ms": 1e3 * statistics.median(v), "fastest_ms": 1e3 * min(v)} for name, v in of.items()}
    for name in of:
        ratios = sorted(a / b for a, b in zip(of[reference], of[name]))
        out[name] |= {
            "speedup": statistics.median(ratios),
            "speedup_min": ratios[0],
            "speedup_max": ratios[-1],
            "speedup_of_fastest": min(of[reference]) / min(of[name]),
        }
    return out

def speed(threads: int, repeats: int) -> dict:
    torch.set_num_threads(threads)
    table = {}
    for name, (groups, n, dims, turns) in SIZES.items():
        x, p = clouds(groups, n, dims)
        ways = {
            "loop": lambda: plain_loop(x, p),
            "compute_V": lambda: compute_V(x, p, temps=TEMPS),
            "compute_V, chunk": lambda: compute_V(x, p, temps=TEMPS, chunk=max(64, n // 8)),
        }
        expected = plain_loop(x, p)
        difference = max(((ways[w]() - expected).norm() / expected.norm()).item() for w in ways)
        assert difference < 1e-4, (name, difference)
        found = in_turns(ways, turns * repeats)
        table[name] = {
            "turns": turns * repeats,
            "relative_difference": difference,
            "cpu": row(found, 0),
            "wall": row(found, 1),
        }
        ours = table[name]["cpu"]["compute_V"]
        print(
            f"{threads} threads, {name:28} loop {table[name]['cpu']['loop']['ms']:8.2f}, compute_V "
            f"{ours['ms']:8.2f} CPU-ms: {ours['speedup']:.2f}x ({ours['speedup_min']:.2f} to "
            f"{ours['speedup_max']:.2f}; "
            f"fastest turns {ours['speedup_of_fastest']:.2f}); chunk "
            f"{table[name]['cpu']['compute_V, chunk']['speedup']:.2f}x; wall "
            f"{table[name]['wall']['compute_V']['ms']:.2f} ms, "
            f"{table[name]['wall']['compute_V']['speedup']:.2f}x; differs by {difference:.0e}",
            flush=True,
        )
    return table

def resident(which: str) -> int:
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def extra_memory(n: int, dims: int, chunk: int) -> int:
    "Bytes beyond the inputs; for a process of its own. chunk -1 is the loop."
    way = plain_loop if chunk < 0 else lambda x, p: compute_V(x, p, temps=TEMPS, chunk=chunk)
    x, p = clouds(1, n, dims)
    way(x[:, :32, :8].contiguous(), p[:, :32, :8].contiguous())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    way(x, p)
    return resident("VmHWM") - before

def memory() -> dict:
    table = {}
    for name, case in MEMORY.items():
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", *map(str, case)], capture_output=True, text=True, check=True
        )
        table[name] = {
            "extra_megabytes": int(done.stdout.split()[-1]) / 1e6,
            "wall_seconds": time.perf_counter() - begun,
        }
        print(f"{name:28}{table[name]['extra_megabytes']:8.0f} MB beyond the inputs", flush=True)
    return table

def on_gpu(device: str, sizes: dict = SIZES | {"4096^2 x 512": (1, 4096, 512, 20)}) -> dict:
    "The table on a GPU: wall time between synchronisations, `compiled_V` beside `compute_V`; not measured yet."
    cuda, table = device.startswith("cuda"), {}
    for name, (groups, n, dims, turns) in sizes.items():
        x, p = clouds(groups, n, dims, device)
        ways = {
            "loop": lambda: plain_loop(x, p),
            "compute_V": lambda: compute_V(x, p, temps=TEMPS),
            "compiled_V": lambda: compiled_V(x, p, temps=TEMPS),
        }
        expected, peaks, difference = plain_loop(x, p), {}, {}
        for w in ways:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            difference[w] = ((ways[w]() - expected).norm() / expected.norm()).item()
            if cuda: peaks[w] = (torch.cuda.max_memory_allocated() - before) / 1e6
        found = row(in_turns(ways, turns, torch.cuda.synchronize if cuda else lambda: None), 1)
        table[name] = {
            "wall": found,
            "compiled_over_eager": found["compute_V"]["ms"] / found["compiled_V"]["ms"],
            "relative_difference": difference,
            "extra_megabytes": peaks,
        }
        print(name, {w: f"{r['ms']:.2f} ms, {r['speedup']:.2f}x" for w, r in found.items()}, difference, flush=True)
    return table

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1, help="times the turns of every size")
    parser.add_argument("--memory-of", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drift.json")
    args = parser.parse_args()
    if args.memory_of:
        torch.set_num_threads(1)
        return print(extra_memory(*args.memory_of))
    result = {
        "what": "the drifting field, three temperatures, beside a plain loop: CPU and wall time, "
        "memory beyond the inputs",
        "temps": TEMPS,
        **{f"threads_{t}": speed(t, args.repeats) for t in args.threads},
        "memory": memory(),
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)

if __name__ == "__main__": main()
