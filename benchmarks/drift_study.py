"""Table and figure of a drifting study: distance, agreement, variety, nearest neighbours and cost of its runs, from
each run's evaluation at the end.

    dkd sweep nbs/configs/sweeps/drift_digits.yaml --workers 2
    python benchmarks/drift_study.py 'drift_digits-*' --out benchmarks/results/drift_digits.json --figure \\
        figures/drift_digits.png

Each source is a pattern of run names or a JSON that this script wrote. Runs are grouped by name without `-s<seed>`.
Rows of another judge, sample number or set of real images are refused.
"""
import argparse, re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drifting_kd.core import LabError, read_json, runs_folder, write_json
from drifting_kd.scores import read_rows
from drifting_kd.metrics import overlapping, t_interval
from drifting_kd.plots import interval_dots, save_figure

MEASURES = (
    "to_test",
    "to_train",
    "prompt_accuracy",
    "variance_ratio",
    "variance_to_test",
    "nearest_ratio",
)  # variance within classes over that of training images, and over that of test images
SAME = ("dataset", "num_samples", "extractor", "judge_sha256", "dataset_split", "reference_sha256")
BESIDE = ("floor", "floor_std", "floor_n", "train_to_test", "baseline_class_gaussians", "baseline_class_means")

def final_row(run: Path) -> dict:
    "The evaluation of the final weights at the configured strength, with the run's cost."
    cfg, told = read_json(run / "config.json"), read_json(run / "metrics.json")
    if missing := [k for k in ("alpha", "alpha_max", "num_samples") if k not in cfg] + [
        k for k in ("train_cpu_seconds", "test/last_variance_ratio") if k not in told
    ]:
        raise LabError(f"{run.name} has no {', '.join(missing)}; expected runs of drift.ipynb with a judge")
    rows = [
        r
        for r in read_rows(run / "eval" / "fid_metrics.csv")
        if r["checkpoint"] == "final_model.pt"
        and int(r["num_samples"]) == cfg["num_samples"]
        and float(r["alpha"]) == (cfg["alpha"] if cfg["alpha_max"] > 1 else 1.0)
    ]
    if len(rows) != 1:
        raise LabError(
            f"{run.name}: {len(rows)} evaluations of final_model.pt at alpha {cfg['alpha']:g} with "
            f"{cfg['num_samples']:,} samples; expected one"
        )
    return rows[0] | {
        "seconds": told["train_cpu_seconds"],
        "variance_to_test": told["test/last_variance_ratio"],
        "hardware": read_json(run / "environment.json"),
    }

def same(facts: list[dict]) -> dict:
    for key in SAME:
        if len({f[key] for f in facts}) > 1: raise LabError(f"runs of different {key} do not stand in one table")
    return facts[0]

def of_runs(pattern: str) -> dict:
    "What there is to say of the finished runs of these names."
    runs = sorted(p for p in runs_folder().glob(pattern) if (p / "metrics.json").exists())
    if not runs: raise LabError(f"no finished run called {pattern} in {runs_folder()}")
    groups, table = {}, {}
    for run in runs: groups.setdefault(re.sub(r"-s\d+$", "", run.name).split("-", 1)[-1], []).append(final_row(run))
    first = same([r for rows in groups.values() for r in rows])
    for name, rows in groups.items():
        git = sorted(
            {
                f"{r['hardware']['git']['commit']}{' with changes' if r['hardware']['git']['dirty'] else ''}"
                for r in rows
            }
        )
        table[name] = dict(
            n=len(rows),
            cpu_seconds=sum(r["seconds"] for r in rows) / len(rows),
            cpu_seconds_by_seed=[r["seconds"] for r in rows],
            git=git,
        )
        for key in MEASURES:
            values = [float(r[key]) for r in rows]
            mean, half = t_interval(values)
            table[name][key] = dict(mean=float(mean), half=float(half), seeds=values)
    facts = {k: first[k] for k in SAME} | {k: float(first[k]) for k in BESIDE}
    return dict(
        what="one-step generators: mean and half of the 95 % t-interval over seeds of the evaluation at the end",
        pattern=pattern,
        facts=facts,
        groups=table,
        environment=first["hardware"],
    )

def of_study(file: str) -> dict:
    found = read_json(file)
    if not {"facts", "groups"} <= set(found):
        raise LabError(f"{file} was not written by drift_study; give a pattern of runs or such a JSON")
    return found

def draw(table: dict, facts: dict):
    values = {name: t["to_test"] for name, t in table.items()}
    spans = {name: (v["mean"] - v["half"], v["mean"] + v["half"]) for name, v in values.items()}
    low = min(values, key=lambda name: values[name]["mean"])
    alike = sum(overlapping(spans[low], span) for name, span in spans.items() if name != low)
    title = (
        f"{low} has the lowest mean distance to test images ({values[low]['mean']:.3f});\n"
        f"its interval overlaps those of {alike} of {len(table) - 1} others"
    )
    return interval_dots(
        {name: v["seeds"] for name, v in values.items()}, f"{facts['extractor']}-FD to test images", title
    )

def main(sources: list[str], out: str, figure: str) -> None:
    found, table = [of_study(s) if s.endswith(".json") else of_runs(s) for s in sources], {}
    facts = same([f["facts"] for f in found])
    for f in found:
        if twice := set(table) & set(f["groups"]):
            raise LabError(
                f"two sources have {', '.join(sorted(twice))}; narrow a pattern, so that each group comes from one"
            )
        table |= f["groups"]
    for name, t in table.items():
        print(
            f"{name:12} n={t['n']}  "
            + "  ".join(f"{k} {t[k]['mean']:.3g} ± {t[k]['half']:.2g}" for k in MEASURES)
            + f"  {t['cpu_seconds']:.0f} CPU-s"
        )
    if out:
        write_json(
            out,
            found[0]
            | dict(pattern=" ".join(sources), groups=table)
            | (dict(environment=[f["environment"] for f in found]) if len(found) > 1 else {}),
        )
    if figure: save_figure(draw(table, facts), figure)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", default="")
    parser.add_argument("--figure", default="")
    try: main(**vars(parser.parse_args()))
    except LabError as e: sys.exit(str(e))
