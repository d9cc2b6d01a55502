"report.ipynb as its users run it, on run folders written here: what it says, what it keeps, and what it refuses."
import json, os
from dataclasses import dataclass
import numpy as np
import pytest
from scipy import stats
from conftest import ROOT, python
from drifting_kd import run as run_folder
from drifting_kd.core import Config, LabError, environ, param
from drifting_kd.run import Run

@dataclass
class ToyConfig(Config):
    dataset: str = param("digits", "data")
    limit: int = param(0, "training images")
    optimizer: str = param("sgd", "how to step")
    lr: float = param(0.0, "learning rate")

GAIN = {
    "sgd": [0.93, 0.94, 0.95, 0.94],
    "adamw": [0.95, 0.97, 0.96, 0.93],
    "lion": [0.90, 0.99, 0.91],
}  # test accuracy, a seed each; lion's seed 1 alone reaches much

def write_run(
    name: str, value: float, finish: bool = True, images: int = 30, environment: dict | None = None, **settings
) -> None:
    "A run folder as training leaves it."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_folder,
            "environment",
            lambda *given: dict(processor="P", threads=1, packages=dict(torch="2")) | (environment or {}),
        )  # the real one asks programs
        run = Run(ToyConfig(run_name=name, tracker="none", **settings), "toy")
    for i in (1, 2, 3, 4):
        run.log({"train/loss": 1 / i - value / 10}, 10 * i, i)
        run.log(
            {
                "val/accuracy": value * (1 - 0.4 / i**2),
                "progress/train_seconds": 2.0 * i,
                "progress/train_cpu_seconds": 1.5 * i,
            },
            10 * i,
            i,
        )
    np.savez(
        run.path / "splits.npz",
        train=np.arange(40),
        val=np.arange(9),
        test=np.arange(images),
        hash=np.array("h"),
        sha256=np.array("s" * 64),
    )
    if finish: run.finish({"test/accuracy": value, "test/last_accuracy": value - .01, "train_seconds": 8.})
    else: run.close()

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    (root / "nbs").mkdir()
    with environ(DKD_ROOT=root):
        for optimizer, values in GAIN.items():
            for seed, value in enumerate(values):
                write_run(
                    f"good-{optimizer}-s{seed}",
                    value,
                    optimizer=optimizer,
                    seed=seed,
                    lr=0.01 if optimizer == "lion" else 0.0,
                )
        (
            write_run("half-b", 0.9, finish=False, optimizer="sgd"),
            write_run("copy-x", 0.9),
            write_run("copy-y", 0.9),
            write_run("other-data", 0.9, dataset="shapes", optimizer="adamw"),
            write_run("other-lr", 0.9, lr=0.5, seed=1),
        )
        (
            write_run("large-test", 0.9, images=60, optimizer="adamw"),
            write_run("elsewhere", 0.9, optimizer="adamw", seed=9, environment=dict(threads=8)),
        )
    return root

def call(root, *words, cwd=None):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(
        DKD_ROOT=str(root), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", MPLBACKEND="agg"
    )
    return python("-m", *words, cwd=cwd or root, env=env)

@pytest.fixture(scope="module")
def made(root):
    "Through papermill, from a folder elsewhere; output, JSON."
    (root / "elsewhere").mkdir()
    done = call(
        root,
        "papermill",
        ROOT / "nbs/report.ipynb",
        "out.ipynb",
        "-p",
        "pattern",
        "good-*",
        "-p",
        "name",
        "toy",
        "-p",
        "reference",
        "sgd",
        cwd=root / "elsewhere",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((root / "elsewhere/out.ipynb").read_text())["cells"]
    text = "\n".join(
        "".join(o.get("text", o.get("data", {}).get("text/markdown", o.get("data", {}).get("text/plain", ""))))
        for c in cells
        for o in c.get("outputs", [])
    )
    return text, json.loads(
        (root / "figures/toy.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON")
    )

def test_everything_lands_in_figures(root, made):
    names = sorted(
        f"toy{end}" for end in (".json", "_test_accuracy.png", "_test_last_accuracy.png", "_curves.png", "_target.png")
    )
    assert sorted(p.name for p in (root / "figures").iterdir() if p.name.startswith("toy")) == names and all(
        (root / "figures" / n).read_bytes().startswith(b"\x89PNG") for n in names if n.endswith("png")
    )
    assert [p.name for p in (root / "elsewhere").iterdir()] == ["out.ipynb"] and str(root) not in json.dumps(made[1])
    assert all(str(root / "figures" / n) in made[0] for n in names)

def test_the_numbers_are_scipys(made):
    _, kept = made
    rows = {(r["group"], r["metric"]): r for r in kept["tables"]["summary"]}
    assert len(rows) == 6
    for group, values in GAIN.items():
        row = rows[group, "test/accuracy"]
        assert row["n"] == len(values) and (row["low"], row["high"]) == pytest.approx(
            stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        )
    paired = {r["group"]: r for r in kept["tables"]["paired test/accuracy"]}
    assert set(paired) == {"adamw", "lion"} and paired["adamw"]["p_t"] == pytest.approx(
        stats.ttest_rel(GAIN["adamw"], GAIN["sgd"]).pvalue
    )
    assert paired["lion"]["pairs"] == 3 and paired["lion"]["unpaired"] == "sgd 3" and paired["lion"]["p_flip"] >= .25

def test_target_counts_who_never_arrives(made):
    text, kept = made
    best = {group: [v * (1 - .4 / 16) for v in values] for group, values in GAIN.items()}
    goal = min(
        sorted(v, reverse=True)[(len(v) - 1) // 2] if len(v) % 2 else sorted(v)[len(v) // 2] for v in best.values()
    )
    assert kept["target"] == pytest.approx(goal)
    rows = {r["group"]: r for r in kept["tables"]["target"]}
    for group, values in best.items():
        assert rows[group]["reached"] == sum(v >= goal - 1e-12 for v in values) and rows[group]["never"] == ", ".join(
            str(i) for i, v in enumerate(values) if v < goal - 1e-12
        )
    assert (
        rows["lion"]["reached"] == 2
        and rows["lion"]["never"] == "0"
        and "Some seeds never reach the target" in text
        and "lion (1 of 3)" in text
    )

def test_runs_used_and_what_they_do_not_say(made):
    text, kept = made
    assert [r["name"] for r in kept["runs"]] == [
        f"good-{o}-s{s}" for o in ("adamw", "lion", "sgd") for s in range(len(GAIN[o]))
    ] and all(len(r["hash"]) == 16 and r["data_sha256"] == "s" * 64 for r in kept["runs"])
    assert (
        kept["differences"]["lr"] == {"adamw": 0, "lion": 0.01, "sgd": 0}
        and kept["environments"]["processor"] == {"P": 11}
        and set(kept["git"]) == {"commit", "dirty"}
    )
    for words in (
        "also differ in lr",
        "overlap",
        "sgd 3",
        "3 pairs the sign-flip p is at least 0.25",
        "same hardware and versions",
    ):
        assert words in text, words

# ---- the same cells without a kernel: what is refused, and one seed

def play(root, **parameters):
    "The notebook's code cells in one namespace."
    import matplotlib
    cells = [c for c in json.loads((ROOT / "nbs/report.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    names = {"__name__": "report"}
    with environ(DKD_ROOT=root), matplotlib.rc_context():
        for c in cells:
            exec("".join(c["source"]), names)
            if "parameters" in c["metadata"].get("tags", []): names.update(parameters)
    return names

@pytest.mark.parametrize("parameters, message", [
    (dict(pattern="good-sgd*, half-*"), "1 of 5 runs are not finished: half-b (stopped); finish them"),
    (dict(pattern="goo-sgd-s1"), "did you mean 'good-sgd-s"),
    (dict(pattern="copy-*"), "copy-x and copy-y are one configuration and seed"),
    (dict(pattern="good-sgd*,other-data"), "data set"),
    (dict(pattern="good-sgd*,large-test"), "number of test images"),
    (dict(pattern="good-sgd-s0,other-lr"),
     "mixes lr 0.0 (good-sgd-s0) and 0.5 (other-lr): add it to by (by='optimizer,lr')"),
    (dict(pattern="good-*", keys="test/acuracy"), "did you mean 'test/accuracy'"),
    (dict(pattern="good-*", curve_keys="val/acuracy"), "did you mean 'val/accuracy'"),
    (dict(pattern="good-*", target_key="val/acc", direction="max"), "unknown metric 'val/acc'"),
    (dict(pattern="good-*", reference="adam"), "did you mean 'adamw'"),
    (dict(pattern="good-*", by="optimiser"), "did you mean 'optimizer'"),
    (dict(pattern="good-*", name="a/b"), "expected letters"),
    (dict(patern="good-*"), "did you mean 'pattern'")])
def test_refused_in_one_line(root, parameters, message):
    with pytest.raises(LabError) as error: play(root, **dict(name="refused") | parameters)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((root / "figures").glob("refused*")) if (root / "figures").exists() else True

def test_unfinished_can_be_skipped_and_is_named(root, capsys):
    names = play(root, pattern="good-sgd-*,half-*", unfinished="skip", name="skipped")
    assert names["found"].skipped == ("half-b",) and any(
        "half-b" in line for line in json.loads((root / "figures/skipped.json").read_text())["conditions"]
    )

def test_one_seed_has_no_interval(root, capsys):
    names = play(root, pattern="good-*-s0", name="single", target_key="", curve_keys="")
    kept = json.loads((root / "figures/single.json").read_text())
    assert names["result_table"](names["summary"]).loc["sgd", "test/accuracy"] == "0.93 (n=1)" and all(
        r["low"] is None for r in kept["tables"]["summary"]
    )
    assert all(
        r["pairs"] == 1 and r["p_t"] is None and r["p_flip"] is None for r in kept["tables"]["paired test/accuracy"]
    ) and any(line.startswith("n=1 for adamw, lion, sgd") for line in kept["limits"])
    assert not (root / "figures/single_target.png").exists() and kept["target"] is None

def test_one_group_and_other_hardware(root, capsys):
    names = play(root, pattern="good-adamw-*,elsewhere", name="one", target=.94)
    kept = json.loads((root / "figures/one.json").read_text())
    assert (
        list(names["groups"]) == ["adamw"]
        and kept["tables"]["paired test/accuracy"] == []
        and "There is one group, so nothing is compared." in kept["limits"]
    )
    assert (
        any(line.startswith("threads differs between runs (8: 1, 1: 4)") for line in kept["conditions"])
        and kept["target"] == 0.94
    )

def test_dkd_run_report(root):
    done = call(
        root, "drifting_kd.cli", "run", ROOT / "nbs/report.ipynb", "-p", "pattern", "good-sgd-s0", "-p", "name", "dkd"
    )
    assert done.returncode == 0 and "notebook  " in done.stdout and (root / "figures/dkd.json").exists(), done.stderr[
        -2000:
    ]
    done = call(root, "drifting_kd.cli", "run", ROOT / "nbs/report.ipynb", "-p", "pattern", "half-*")
    assert (
        done.returncode == 1
        and "half-b (stopped)" in done.stderr.splitlines()[-1]
        and str(ROOT / "drifting_kd") not in done.stderr
    ), done.stderr  # no traceback of ours
