"""SGD and AdamW on CIFAR-10, ResNet-8, sixteen epochs, three seeds: the runs, then a table, a JSON and a figure.

    for s in 0 1 2; do
      dkd run train -f nbs/configs/resnet8_cifar10_short.yaml -p dataset cifar10_jpeg -p optimizer sgd   -p seed $s -p run_name cifar10_jpeg-sgd-s$s
      dkd run train -f nbs/configs/resnet8_cifar10_short.yaml -p dataset cifar10_jpeg -p optimizer adamw -p lr 0.003 -p seed $s -p run_name cifar10_jpeg-adamw-s$s
    done
    python benchmarks/cifar10.py cifar10_jpeg

A finished run is read from its metrics.json; an unfinished one is an error, so the table never mixes lengths.
"""
import argparse, collections, statistics, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from drifting_kd.core import LabError, read_json, read_metrics, runs_folder, write_json
from drifting_kd.plots import plot_curves, save_figure, t_interval, use_style

NAMES = {"cifar10_jpeg": "CIFAR-10 (JPEG)", "cifar10": "CIFAR-10"}

def row(path: Path) -> dict:
    "What one run says."
    summary, config, environment = (read_json(path / f"{n}.json") for n in ("metrics", "config", "environment"))
    return dict(optimizer=config["optimizer"], lr=config["lr"], seed=config["seed"], epochs=summary["epochs"], best_validation=summary["test/accuracy"], best_epoch=summary["best_epoch"],
                last=summary["test/last_accuracy"], cpu_seconds_per_epoch=summary["train_cpu_seconds"] / summary["epochs"], seconds_per_epoch=summary["train_seconds"] / summary["epochs"],
                threads=environment["threads"], processor=environment["processor"], torch=environment["packages"]["torch"], commit=environment["git"]["commit"])

def interval(values: list[float]) -> dict:
    mean, half = t_interval(values)
    return dict(mean=float(mean), low=float(mean - half), high=float(mean + half))

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=list(NAMES))
    args = parser.parse_args()
    paths = sorted(runs_folder().glob(f"{args.dataset}-*-s[0-9]*"))
    if not paths: raise LabError(f"no runs called {args.dataset}-OPTIMIZER-sSEED in {runs_folder()}; make them with the commands at the head of this file")
    groups = collections.defaultdict(list)
    for path in paths: groups[row(path)["optimizer"]].append(path)
    table = {}
    for optimizer, members in groups.items():
        rows = [row(p) for p in members]
        table[optimizer] = dict(seeds=len(rows), epochs=rows[0]["epochs"], runs=rows, cpu_seconds_per_epoch=statistics.median(r["cpu_seconds_per_epoch"] for r in rows),
                                **{k: interval([r[k] for r in rows]) for k in ("best_validation", "last")})
        b, l = table[optimizer]["best_validation"], table[optimizer]["last"]
        print(f"{optimizer:6s} n={len(rows)}  best-validation {b['mean']:.4f} [{b['low']:.4f}, {b['high']:.4f}]  last {l['mean']:.4f} [{l['low']:.4f}, {l['high']:.4f}]  "
              f"{table[optimizer]['cpu_seconds_per_epoch']:.0f} CPU-s an epoch  {[round(r['best_validation'], 4) for r in rows]} {[round(r['last'], 4) for r in rows]}")
    write_json(ROOT / "benchmarks" / "results" / f"{args.dataset}.json", dict(what=f"test accuracy on {NAMES[args.dataset]}, ResNet-8, mean and 95 % t-interval over seeds", **table))
    use_style()
    figure = plot_curves({o: [read_metrics(p) for p in members] for o, members in groups.items()}, keys=("train/loss", "val/accuracy"),
                         title=f"ResNet-8 on {NAMES[args.dataset]}, test accuracy: " + ", ".join(f"{o} {t['best_validation']['mean']:.1%} (n={t['seeds']})" for o, t in table.items()))
    save_figure(figure, ROOT / "figures" / f"optimizers_{args.dataset}.png")

if __name__ == "__main__":
    try: main()
    except LabError as e: sys.exit(str(e))
