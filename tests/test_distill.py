"Distilling as its users run it: the notebook, a kill, and what cannot work refused in one line."
import json, signal, subprocess, sys, time
import pytest
from conftest import ROOT, losses, same_weights, train, weights
from test_processes import differences, two_processes

SMALL = dict(family="distill", limit=200, val_fraction=.3, batch_size=40, model="judge", teacher_models="judge judge",
             teacher_epochs=6, crop_padding=1)

def dkd(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "drifting_kd.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)

FIGURES = {"confidences.png", "calibration.png", "curves.png", "gates.png", "gate_curves.png"}
TOLD = ("temperature", "labels only, best validation", "agrees with its teachers", "dkd evaluate small")
SUMMARY = {"val/teacher_agreement", "test/teacher_agreement", "test/last_accuracy", "test/auroc", "test/ece",
           "train/loss_total", "kd_method", "temperature", "model_name", "checkpoint_path"}

def test_the_notebook_reads_as_a_report(lab):
    given = dict(run_name="small", limit=300, val_fraction=.3, epochs=3, eval_every=1, log_every=2, batch_size=40,
                 model="judge", teacher_models="judge judge", teacher_epochs=6, cache="lazy", tracker="none",
                 device="cpu", threads=1)
    out = dkd("run", ROOT / "nbs/distill.ipynb", *(w for k, v in given.items() for w in ("-p", k, v)))
    assert out.returncode == 0, out.stderr
    run = lab / "runs/small"
    assert {p.name for p in (run / "figures").iterdir()} >= FIGURES
    kinds = sorted(p.name.split("-")[0] for p in (lab / "runs").iterdir() if (p / "metrics.json").exists())
    assert kinds == ["baseline", "small", "teacher", "teacher"]
    for words in TOLD: assert words in out.stdout, words
    summary = json.loads((run / "metrics.json").read_text())
    assert SUMMARY <= set(summary)
    assert len(summary["teachers"]) == len([r["sha256"] for r in summary["teacher_rows"]]) == 2
    assert summary["cache_computed"] > 0 and summary["setup_cpu_seconds"] > 0
    assert summary["composition"]["weights"] == "ca"
    judged_again(run, summary)

def judged_again(run, summary: dict) -> None:
    "An artifact, in a tracker run of its own."
    out = dkd("evaluate", f"model-{run.name}:best", "--split", "val", "--tracker", "wandb")
    assert out.returncode == 0, out.stderr
    told = dict(line.split() for line in out.stdout.splitlines() if line.startswith("val/"))
    assert abs(float(told["val/accuracy"]) - summary["val/accuracy"]) < 1e-3
    assert {"val/loss", "val/accuracy_percent", "val/auroc", "val/ece", "val/teacher_agreement"} <= set(told)
    assert any("evaluate" in key for key in json.loads((run / "tracker.json").read_text()))
    assert list(run.glob("wandb/offline-run-*"))

KILLED = [dict(feature="fitnet"), pytest.param(dict(cache="lazy"), marks=pytest.mark.slow)]

@pytest.mark.parametrize("teachers", KILLED, ids=["live", "cached"])
def test_killed_and_resumed_is_the_same(lab, teachers):
    "With cross-fitted confidences, and regressors that belong to no model, or logits that the killed run kept."
    settings = SMALL | teachers | dict(method="dynamic", confidences="crossfit", epochs=12, save_every=1, eval_every=6)
    whole = train(run_name="whole", **settings)
    assert whole.returncode == 0, whole.stderr
    process = train(run_name="killed", wait=False, **settings)
    while not list((lab / "runs/killed/checkpoints").glob("step_*.pt")): time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (lab / "runs/killed/metrics.json").exists()
    out = train(run_name="killed", resume=True, **settings)
    assert out.returncode == 0, out.stderr
    assert same_weights(lab / "runs/whole", lab / "runs/killed")
    assert losses(lab / "runs/whole") == losses(lab / "runs/killed")
    assert not any("regressor" in name for name in weights(lab / "runs/whole"))

REFUSED = """from drifting_kd.train import Loop
import atexit, shutil, torch
from drifting_kd.run import Run
from drifting_kd.distill import Distill, DistillConfig
base = {k: v for k, v in json.loads(sys.argv[1]).items() if k not in ("family", "run_name")}
def make(name, **more):
    cfg = TrainConfig(**base | dict(run_name=name) | more)
    data = prepare(cfg)
    fit(Classify(classifier(cfg, data), data, cfg), cfg, Run(cfg))
make("teacher")
make("shapes", dataset="shapes100", limit=400)
class Stop(Exception): pass
def stopped(self): raise Stop
kept, Loop.finish = Loop.finish, stopped
try: make("unfinished")
except Stop: pass
Loop.finish, told, disk = kept, [], shutil.disk_usage
for bad in (dict(method="hinten"), dict(teachers="shapes"), dict(teachers="teacher", split_seed=7),
            dict(teachers="unfinished"), dict(method="none", feature="drift"), dict(teachers="teacher", cache="ahead")):
    if "cache" in bad: shutil.disk_usage = lambda path: type(disk(path))(10**12, 10**12, 0)
    try:
        cfg = DistillConfig(**base | bad)
        data = prepare(cfg)
        Distill(classifier(cfg, data), data, cfg).setup(torch.device("cpu"))
        told.append("accepted")
    except LabError as e: told.append(str(e))
atexit.register(lambda: print(json.dumps(told)))
"""
WHY = ("did you mean 'hinton'", "has 100 classes", "of the student's", "is not finished", "does nothing",
       "half of the disk")

def test_what_cannot_work_is_refused_in_one_line(lab):
    "Before a run folder is made; in one process of its own, since each costs seconds to start."
    given = {k: v for k, v in SMALL.items() if k not in ("family", "teacher_models", "teacher_epochs")}
    out = train(REFUSED, **given | dict(epochs=1, run_name="good"))
    assert out.returncode == 0, out.stderr
    told = json.loads(out.stdout.splitlines()[-1])
    for words, said in zip(WHY, told, strict=True): assert words in said and "\n" not in said, (words, told)
    made = sorted(p.name for p in (lab / "runs").iterdir() if p.name[0] != "." and p.name != "artifacts.json")
    assert made == ["good", "shapes", "teacher", "unfinished"]

SHARED = [dict(cache="lazy"), pytest.param(dict(feature="fitnet"), marks=pytest.mark.slow)]

@pytest.mark.parametrize("teachers", SHARED, ids=["cached", "regressors"])
def test_two_processes_distil_as_one(lab, teachers):
    """Weights, gates and cached logits (or regressors) of each process's half of a batch.

    The losses of one process, to summation order."""
    settings = SMALL | teachers | dict(method="dynamic", confidences="crossfit", epochs=2, log_every=1, lr=0.02)
    one, two = train(run_name="one", **settings), train("", two_processes(), run_name="two", **settings)
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr[-3000:]
    gaps = differences(losses(lab / "runs/one"), losses(lab / "runs/two"))
    assert len(gaps) >= 6 and max(gaps[:3]) < 1e-4 and max(gaps) < 1e-2, gaps
    a, b = (json.loads((lab / f"runs/{name}/metrics.json").read_text()) for name in ("one", "two"))
    assert (a["processes"], b["processes"]) == (1, 2)
    assert abs(a["test/teacher_agreement"] - b["test/teacher_agreement"]) < .01
