"""One table and one figure of the distillation matrices, from their reports: accuracy of the best-validation and the
last epoch, cost.

    dkd sweep nbs/configs/sweeps/distill_cifar10_jpeg.yaml --workers 2     (and distill_shapes100)
    dkd run report -p pattern 'distill_cifar10_jpeg-*' -p by method,feature,confidences -p reference 'none, raw' \\
        -p name distill_cifar10_jpeg -p keys test/accuracy,test/last_accuracy,test/auroc,test/ece,train_cpu_seconds
    python benchmarks/distill_study.py figures/distill_cifar10_jpeg.json figures/distill_shapes100.json [--figure \\
        figures/distill.png]

Where the runs still are, `--beside benchmarks/results/distill_beside.json` writes what the reports do not hold: the
teachers, the gates, and paired differences between methods (of these data; what the file says of others stays).
"""
import argparse, functools, re, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drifting_kd.core import LabError, read_json, runs_folder, write_json
from drifting_kd.teachers import CONFIDENCES
from drifting_kd.metrics import t_interval
from drifting_kd.plots import COLOURS, Figure, Picture, save_figure, styled

PAIRS = [
    ("hinton+ca", "hinton"),
    ("ca_weighted", "ca_weighted+uniform"),
    ("dkd+ca", "dkd"),
    ("hinton+confidence", "hinton"),
    ("hinton_drift", "hinton"),  # differ in one thing
    *((f"hinton+confidence_{kind}", "hinton+confidence") for kind in ("calibrated", "crossfit")),
    *((f"hinton+confidence_{kind}", "hinton") for kind in ("calibrated", "crossfit")),
    ("dkd+ls+ca", "dkd+ca"),
    ("dkd+ls+ca", "dkd"),  # in more
    *((method, "hinton") for method in ("ca_weighted+uniform", "dynamic", "confidence", "nkd", "dist", "dkd")),
]
KEYS = ("test/accuracy", "test/last_accuracy", "test/auroc", "test/ece", "train_cpu_seconds")
GATED = ("hinton+confidence", "hinton+confidence_calibrated", "hinton+confidence_crossfit", "dynamic", "confidence")

def name_of(group: str) -> str:
    """`hinton, drift_batch, raw` as `hinton + drift term`, `hinton, calibrated` as it is; what a report of fewer
    columns does not say is the default."""
    method, *said = group.split(", ")
    said = [word for word in said if word not in ("feature ''", "raw")]
    return method + "".join(
        f", {word}" if word in CONFIDENCES else f" + {word.removesuffix('_batch')} term" for word in said
    )

def read(path: Path) -> tuple[str, dict]:
    "The data set, and for each method its metrics: mean, low, high, n."
    found, rows = read_json(path), {}
    if not {"tables", "parameters"} <= found.keys():
        raise LabError(f"{path} is no report; give the JSON that `dkd run report` writes")
    for row in found["tables"]["summary"]: rows.setdefault(name_of(row["group"]), {})[row["metric"]] = row
    if missing := [key for key in KEYS if not rows or any(key not in row for row in rows.values())]:
        raise LabError(
            f"{path}: no {', '.join(missing)}; make the report with the keys that the head of this script names"
        )
    return re.sub(r"-\*.*|^distill_", "", found["parameters"]["pattern"]), rows

def percent(row: dict) -> str: return f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

def numbers(row: dict) -> list[str]:
    return [
        percent(row["test/accuracy"]),
        percent(row["test/last_accuracy"]),
        *(
            f"{row[k]['mean']:.{digits}f}"
            for k, digits in (("test/auroc", 3), ("test/ece", 3), ("train_cpu_seconds", 0))
        ),
    ]

@styled
def dots(studies: dict) -> Figure:
    "A panel a data set: mean and 95 % interval of the last epoch's test accuracy, best method first."
    for data, rows in studies.items():
        if "none" in rows: continue
        raise LabError(
            f"{data}: the report has no method none (labels only), which the figure compares with; "
            "put its runs into the report, or leave the figure out with --figure ''"
        )
    fig = Picture(figsize=(10, max(3.6, .36 * max(map(len, studies.values())))), layout="constrained")
    for ax, (data, rows) in zip(fig.subplots(1, len(studies), squeeze=False)[0], studies.items()):
        ranked = sorted(rows, key=lambda m: rows[m]["test/last_accuracy"]["mean"])
        for i, method in enumerate(ranked):
            row = rows[method]["test/last_accuracy"]
            ax.errorbar(
                100 * row["mean"],
                i,
                xerr=[[100 * (row["mean"] - row["low"])], [100 * (row["high"] - row["mean"])]],
                fmt="D",
                color=COLOURS[1 if method == "none" else 0],
                markersize=5,
                linewidth=2,
            )
        ax.set_yticks(range(len(ranked)), ranked)
        gain = 100 * (rows[ranked[-1]]["test/last_accuracy"]["mean"] - rows["none"]["test/last_accuracy"]["mean"])
        ax.set(
            xlabel="test accuracy in per cent, last epoch; mean and 95 % interval",
            title=f"{data}: {ranked[-1]} is {gain:.1f} points above labels only (n={row['n']})",
        )
    return fig

def beside(data: str) -> dict:
    "Teachers, saturated gates and paired differences (last epoch, points, 95 % t-interval) of one matrix."
    @functools.cache
    def summaries(method: str) -> dict:
        return {
            read_json(p.parent / "config.json")["seed"]: read_json(p)
            for p in sorted(runs_folder().glob(f"distill_{data}-{method}-s[0-9]*/metrics.json"))
        }
    def seeds(method: str, key: str) -> dict: return {seed: found[key] for seed, found in summaries(method).items()}
    def paired(a: str, b: str) -> dict:
        x, y = (seeds(m, "test/last_accuracy") for m in (a, b))
        if x.keys() != y.keys() or len(x) < 2:
            raise LabError(f"{a} has seeds {sorted(x)} and {b} has {sorted(y)}: expected the same ones, two or more")
        points = [100 * (x[seed] - y[seed]) for seed in sorted(x)]
        mean, half = map(float, t_interval(points))
        return dict(seeds=points, mean=mean, low=mean - half, high=mean + half)
    asked = sorted({t for m in {*sum(PAIRS, ())} for found in summaries(m).values() for t in found.get("teachers", [])})
    teachers = [read_json(runs_folder() / name / "metrics.json")["test/last_accuracy"] for name in asked]
    there = {m for m in {*GATED, *sum(PAIRS, ())} if seeds(m, "test/last_accuracy")}
    return dict(
        teachers=teachers,
        gate_saturated={
            m: [v for _, v in sorted(seeds(m, "train/gate_saturated").items())] for m in GATED if m in there
        },
        paired={f"{a} minus {b}": paired(a, b) for a, b in PAIRS if {a, b} <= there},
    )

def main(reports: list[Path], figure: str, beside_file: str) -> None:
    studies = dict(map(read, reports))
    print(
        "| method |"
        + "".join(f" {d}, best validation | {d}, last epoch | AUROC | ECE | CPU-s a run |" for d in studies)
        + "\n|---|"
        + "---|" * 5 * len(studies)
    )
    for method in dict.fromkeys(m for rows in studies.values() for m in rows):
        cells = [
            c
            for rows in studies.values()
            for c in (numbers(rows[method]) if method in rows else ["not run"] + [""] * 4)
        ]
        print(f"| {method} | " + " | ".join(cells) + " |")
    if figure: save_figure(dots(studies), figure)
    if beside_file:
        write_json(
            beside_file,
            (read_json(beside_file) if Path(beside_file).exists() else {}) | {data: beside(data) for data in studies},
        )

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--figure", default="figures/distill.png")
    parser.add_argument("--beside", dest="beside_file", default="")
    try: main(**vars(parser.parse_args()))
    except LabError as e: sys.exit(str(e))
