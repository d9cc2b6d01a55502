"""Table and figure of the runs of a drifting study, from each run's evaluation at the end: distance, agreement, variety, nearest neighbours, cost.

    dkd sweep nbs/configs/sweeps/drift_digits.yaml --workers 2
    python benchmarks/drift_study.py 'drift_digits-*' [--out benchmarks/results/drift_digits.json] [--figure figures/drift_digits.png]

Runs are grouped by name without `-s<seed>`. A row of another judge, sample number or set of real images is refused.
"""
import argparse, json, re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drifting_kd.core import LabError, read_json, runs_folder, write_json
from drifting_kd.evaluate import distance_of, read_rows
from drifting_kd.plots import interval_dots, overlapping, save_figure, t_interval

MEASURES = ("to_test", "to_train", "prompt_accuracy", "variance_ratio", "variance_to_test", "nearest_ratio")  # variance within classes over that of training images, and over that of test images
SAME = ("dataset", "num_samples", "extractor", "judge_sha256", "dataset_split", "reference_sha256")

def final_row(run: Path) -> dict:
    "The evaluation of the final weights at the configured strength, with the run's cost."
    cfg = read_json(run / "config.json")
    rows = [r for r in read_rows(run / "eval" / "fid_metrics.csv") if r["checkpoint"] == "final_model.pt" and float(r["alpha"]) == (cfg["alpha"] if cfg["alpha_max"] > 1 else 1.)]
    if len(rows) != 1: raise LabError(f"{run.name}: {len(rows)} evaluations of final_model.pt at alpha {cfg['alpha']:g}; expected one")
    told = read_json(run / "metrics.json")
    return rows[0] | {"seconds": told["train_cpu_seconds"], "variance_to_test": told["test/last_variance_ratio"], "hardware": read_json(run / "environment.json")}

def main(pattern: str, out: str, figure: str) -> None:
    runs = sorted(p for p in runs_folder().glob(pattern) if (p / "metrics.json").exists())
    if not runs: raise LabError(f"no finished run called {pattern} in {runs_folder()}")
    groups = {}
    for run in runs: groups.setdefault(re.sub(r"-s\d+$", "", run.name).split("-", 1)[-1], []).append(final_row(run))
    every = [r for rows in groups.values() for r in rows]
    for key in SAME:
        if len({r[key] for r in every}) > 1: raise LabError(f"runs of different {key} do not stand in one table")
    first, table = every[0], {}
    for name, rows in groups.items():
        table[name] = dict(n=len(rows), cpu_seconds=sum(r["seconds"] for r in rows) / len(rows), cpu_seconds_by_seed=[r["seconds"] for r in rows], git=sorted({f"{r['hardware']['git']['commit']}{' with changes' if r['hardware']['git']['dirty'] else ''}" for r in rows}))
        for key in MEASURES:
            values = [float(r[key]) for r in rows]
            mean, half = t_interval(values)
            table[name][key] = dict(mean=float(mean), half=float(half), seeds=values)
        print(f"{name:12} n={len(rows)}  " + "  ".join(f"{k} {table[name][k]['mean']:.3g} ± {table[name][k]['half']:.2g}" for k in MEASURES) + f"  {table[name]['cpu_seconds']:.0f} CPU-s")
    facts = {k: first[k] for k in SAME} | {k: float(first[k]) for k in ("floor", "floor_std", "floor_n", "train_to_test", "baseline_class_gaussians", "baseline_class_means")}
    write_json(out, dict(what="one-step generators: mean and half of the 95 % t-interval over seeds of the evaluation at the end", pattern=pattern, facts=facts, groups=table, environment=first["hardware"]))
    if not figure: return
    spans = {name: (t["to_test"]["mean"] - t["to_test"]["half"], t["to_test"]["mean"] + t["to_test"]["half"]) for name, t in table.items()}
    low = min(table, key=lambda name: table[name]["to_test"]["mean"])
    alike = sum(overlapping(spans[low], span) for name, span in spans.items() if name != low)
    title = f"{low} has the lowest mean distance to test images ({table[low]['to_test']['mean']:.3f}); its interval overlaps those of {alike} of {len(table) - 1} others"
    save_figure(interval_dots({name: t["to_test"]["seeds"] for name, t in table.items()}, f"{distance_of(first)[0]} to test images", title), figure)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pattern"), parser.add_argument("--out", default="benchmarks/results/drift_digits.json"), parser.add_argument("--figure", default="")
    try: main(**vars(parser.parse_args()))
    except LabError as e: sys.exit(str(e))
