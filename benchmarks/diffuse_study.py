"""Table of a diffusion study: distance, prompt accuracy and held-out phrasings of its runs, and what fewer calls cost.

    dkd sweep nbs/configs/sweeps/diffuse_digits.yaml --workers 2
    python benchmarks/diffuse_study.py --runs 'diffuse_digits-*' [--samples 2000] [--calls 12 50] [--each 20] \\
        [--out benchmarks/results/diffuse_digits.json]

The final weights of each finished run are asked for `samples` images, with the run's own settings and as many network
calls as `calls` says, and for `each` images of every phrasing that was never said. Runs are grouped by name without
`-s<seed>`.
"""
import math, re, sys
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asked import asked
from drifting_kd.core import LabError, environment, read_json, runs_folder, write_json
from drifting_kd.checkpoints import find
from drifting_kd.classify import prepare
from drifting_kd.diffusion import Diffuse, DiffuseConfig
from drifting_kd.evaluate import evaluate
from drifting_kd.metrics import t_interval
from drifting_kd.scores import EvaluateConfig

MEASURES = ("to_test", "prompt_accuracy", "variance_ratio", "nearest_ratio")
BESIDE = ("extractor", "judge_sha256", "num_samples", "floor", "floor_n", "train_to_test", "variance_of_test")

def measured(run: Path, samples: int, calls: int) -> dict:
    "A row of the run's table, with so many steps of its sampler."
    settings = dict(checkpoint=str(run / "final_model.pt"), alpha=0.0, num_samples=samples, sample_steps=calls)
    return evaluate(EvaluateConfig(**settings, metrics="", tracker="none", device="cpu")).rows[0]

def understood(run: Path, each: int) -> dict:
    "Share of images that show what a phrasing asks for which was never said."
    known = DiffuseConfig.__dataclass_fields__
    cfg = DiffuseConfig(**{k: v for k, v in read_json(run / "config.json").items() if k in known})
    data, model = prepare(cfg), find(run).model
    task = Diffuse(model, data, cfg)
    task.setup(torch.device("cpu"))
    found = {kind: task.understood(model, kind, each) for kind in model.book.held_out}
    return {kind: None if math.isnan(share) else share for kind, share in found.items()}

def of_run(run: Path, samples: int, calls: list[int], each: int) -> dict:
    "All that is asked of one run."
    rows = {str(n): measured(run, samples, n) for n in calls}
    told, record = read_json(run / "metrics.json"), read_json(run / "environment.json")
    distances = {n: float(row["to_test"]) for n, row in rows.items()}
    print(run.name, distances, flush=True)
    found = {k: float(rows[str(calls[0])][k]) for k in MEASURES}
    return found | dict(
        run=run.name, to_test_by_calls=distances, held_out=understood(run, each), git=record["git"],
        train_cpu_seconds=told["train_cpu_seconds"], beside={k: rows[str(calls[0])][k] for k in BESIDE})

def summed_up(rows: list[dict]) -> dict:
    "Mean and 95 % interval over seeds."
    def interval(values):
        values = [v for v in values if v is not None]
        return [float(v) for v in t_interval(values)] if len(values) > 1 else values
    found = {k: interval([r[k] for r in rows]) for k in (*MEASURES, "train_cpu_seconds")}
    found |= {f"held_out_{k}": interval([r["held_out"][k] for r in rows]) for k in rows[0]["held_out"]}
    names = list(rows[0]["to_test_by_calls"])
    ratio = interval([r["to_test_by_calls"][names[0]] / r["to_test_by_calls"][names[-1]] for r in rows])
    return found | {"seeds": len(rows), f"to_test_at_{names[0]}_over_{names[-1]}_calls": ratio}

def main() -> None:
    args = asked(__doc__, "diffuse_digits.json", runs="diffuse_digits-*", samples=2000, calls=[12, 50], each=20)
    runs = sorted(p for p in runs_folder().glob(args.runs) if (p / "metrics.json").exists())
    if not runs: raise LabError(f"no finished run called {args.runs} in {runs_folder()}")
    groups = {}
    for run in runs:
        row = of_run(run, args.samples, args.calls, args.each)
        groups.setdefault(re.sub(r"-s\d+$", "", run.name), []).append(row)
    table = {name: summed_up(rows) for name, rows in groups.items()}
    write_json(args.out, dict(samples=args.samples, calls=args.calls, groups=table, runs=groups,
                              environment=environment()))
    for name, row in table.items(): print(name, row)

if __name__ == "__main__": main()
