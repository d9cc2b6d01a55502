"Drifting as its users run it: the notebook, a kill, two processes, and what cannot work refused in one line."
import json, signal, subprocess, sys, time
import pytest
from conftest import ROOT, losses, same_weights, train
from test_processes import two_processes

SMALL = dict(family="drift", epochs=1, steps=60, limit=0, batch_size=80, positives=16, unconditional=4, eval_every=20,
             save_every=7, warmup=5, eval_samples=200)

def dkd(*words):
    command = [sys.executable, "-m", "drifting_kd.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)

def notebook(**settings):
    "dkd run nbs/drift.ipynb with these parameters."
    out = dkd("run", ROOT / "nbs/drift.ipynb", *(w for k, v in settings.items() for w in ("-p", k, v)))
    assert out.returncode == 0, out.stderr
    return out.stdout

def test_the_notebook_reads_as_a_report(lab):
    said = notebook(run_name="small", steps=80, batch_size=160, positives=16, unconditional=4, eval_every=40,
                    eval_samples=200, num_samples=400, tracker="none", device="cpu", threads=1)
    run = lab / "runs/small"
    figures = {"curves.png", "samples.png", "distances.png", "guidance.png", "guidance_samples.png"}
    assert {p.name for p in (run / "figures").iterdir()} >= figures
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["step_00000040.png", "step_00000080.png"]
    rows = (run / "eval/fid_metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 and "digits_fd" in rows[0]  # four strengths
    for words in ("class agreement", "distance to test images", "variance within classes", "nearest training image",
                  "a Gaussian of each class"):
        assert words in said, words

@pytest.mark.parametrize("queue", [0, 20])
def test_killed_and_resumed_is_the_same(lab, queue):
    settings = SMALL | dict(queue=queue, steps=60, eval_every=30)
    assert train(run_name="whole", **settings).returncode == 0
    process = train(run_name="killed", wait=False, **settings)
    end = time.monotonic() + 120
    while not list((lab / "runs/killed/checkpoints").glob("step_*.pt")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.02)
    process.send_signal(signal.SIGKILL), process.wait()
    assert not (lab / "runs/killed/metrics.json").exists()
    out = train(run_name="killed", resume=True, **settings)
    assert out.returncode == 0, out.stderr
    assert same_weights(lab / "runs/whole", lab / "runs/killed")
    assert losses(lab / "runs/whole") == losses(lab / "runs/killed")

def test_two_processes_share_the_groups(lab):
    "Each process scales the field of its own groups: the first loss is the mean of both shares."
    import torch
    from drifting_kd.drifting import Drift, DriftConfig, drifter
    from drifting_kd.classify import prepare
    settings = SMALL | dict(steps=10, log_every=1, eval_every=10, judge="none", tracker="none", device="cpu", threads=1)
    two = train("", two_processes(), run_name="two", **settings)
    assert two.returncode == 0, two.stderr[-3000:]
    cfg = DriftConfig(**{k: v for k, v in settings.items() if k != "family"})
    data, shares = prepare(cfg), []
    for rank in range(2):
        task = Drift(drifter(cfg, data), data, cfg)
        task.setup(torch.device("cpu"), rank, 2)
        shares.append(task.loss(task.draw(0), 0)[0].item())
    first = next(m["train/loss"] for _, m in losses(lab / "runs/two") if "train/loss" in m)
    assert abs(first - sum(shares) / 2) < 1e-4 * first and abs(shares[0] - shares[1]) > 1e-3, (first, shares)
    assert json.loads((lab / "runs/two/metrics.json").read_text())["processes"] == 2

REFUSED = [(dict(temps=[0.1, 0.0]), "between 0.001"), (dict(alpha=9.0), "outside what is trained"),
           (dict(groups=11), "has 10 classes"), (dict(positives=900), "use at most"),
           (dict(model="resnet8"), "model='resnet8' is not known"), (dict(encoder="no-such"), "is no run"),
           (dict(judge="mnist"), "28 pixels")]

@pytest.mark.parametrize("settings, words", REFUSED, ids=["-".join(settings) for settings, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(lab, settings, words):
    out = train(run_name="bad", **(SMALL | settings))
    assert out.returncode == 1 and words in out.stderr and out.stderr.strip().count("\n") == 0, out.stderr
    assert not (lab / "runs/bad").exists()

@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_defaults_pass_for_real(lab, seed):
    notebook(tracker="none", device="cpu", run_name="whole", seed=seed)
    from drifting_kd.scores import pass_for_real, read_rows
    row = next(r for r in read_rows(lab / "runs/whole/eval/fid_metrics.csv") if float(r["alpha"]) == 1)
    assert pass_for_real(row).reached.tolist() == ["yes"] * 5, pass_for_real(row).to_string()

BROKEN = """
import drifting_kd.drifting as d
kept = d.Drift.after_step
def after_step(self, step):
    kept(self, step)
    if step == 30: self.model.out.weight.data.fill_(float("nan"))
d.Drift.after_step = after_step
"""

def test_weights_that_are_not_finite_name_the_step(lab):
    out = train(BROKEN, run_name="broken", **(SMALL | dict(log_every=5, judge="none")))
    assert out.returncode == 1, out.stderr
    for words in ("NotFinite", "not finite at step 31", "last good checkpoint"): assert words in out.stderr, out.stderr
    assert json.loads((lab / "runs/broken/diverged.json").read_text())["step"] == 31
