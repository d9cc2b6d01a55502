"What goes wrong from outside, in real processes: one clear line, exit code 1, and earlier results as they were."
import dataclasses, hashlib, importlib, os, pickle, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT, losses, same_weights, train
from drifting_kd.core import LabError, Parameters

SETTINGS = dict(optimizer="adamw", ema_decay=0.9, epochs=4, keep_last=2)  # six steps an epoch, a checkpoint after each
DISK_FULL = """
import resource, torch
def save(content, f, real=torch.save, saves=[0]):
    saves[0] += 1
    if saves[0] == {n}: resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    real(content, f)
torch.save = save
"""
FULL_FROM_THE_START = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))"  # less than config.json
NOT_A_NUMBER = """
import drifting_kd.classify as t
def loss(self, batch, step, real=t.Classify.loss):
    value, metrics = real(self, batch, step)
    return value * (float("nan") if step == 14 else 1.0), metrics
t.Classify.loss = loss
"""
# root may write anywhere: give up that right (CAP_DAC_OVERRIDE), then start Python again
AS_OTHERS = [
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    "One finished run, and the same one broken off at its third checkpoint by a full disk; runs/ did not exist before."
    root = tmp_path_factory.mktemp("errors")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(DKD_ROOT=str(root), IN_TEST="1", OMP_WAIT_POLICY="passive").items():
            patch.setenv(name, value)
        whole, stopped = (
            train(run_name="whole", **SETTINGS),
            train(DISK_FULL.format(n=3, size=200_000), run_name="stopped", **SETTINGS),
        )
    assert whole.returncode == 0, whole.stderr[-2000:]
    return root, stopped

@pytest.fixture
def runs(played, lab) -> Path:
    "A copy of both runs, to damage."
    shutil.copytree(played[0] / "runs", lab / "runs")
    return lab / "runs"

def contents(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def refused(runs: Path, patch: str = "", **settings) -> str:
    "The one line with which a training ends that must not work."
    before = contents(runs / "whole")
    done = train(patch, **SETTINGS | settings)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-3000:]
    assert contents(runs / "whole") == before
    return done.stderr

def finishes_like_the_whole(runs: Path) -> bool:
    done = train(run_name="stopped", resume=True, **SETTINGS)
    assert done.returncode == 0, done.stderr[-2000:]
    return same_weights(runs / "whole", runs / "stopped") and losses(runs / "whole") == losses(runs / "stopped")

def test_disk_full_loses_nothing_that_was_saved(played, runs):
    from drifting_kd.checkpoints import load_checkpoint
    stopped, checkpoints = played[1], runs / "stopped/checkpoints"
    assert not (runs / "stopped/metrics.json").exists() and sorted(p.name for p in checkpoints.iterdir()) == [
        "best.pt",
        "last.pt",
        "step_00000006.pt",
        "step_00000012.pt",
    ]
    assert load_checkpoint(checkpoints / "last.pt")["step"] == 12
    assert finishes_like_the_whole(runs)
    assert stopped.returncode == 1 and len(stopped.stderr.splitlines()) == 1, stopped.stderr[-3000:]
    assert "cannot write to" in stopped.stderr and "free the disk, then continue with resume=True" in stopped.stderr

def test_disk_full_from_the_start(runs):
    line = refused(runs, FULL_FROM_THE_START, run_name="new")
    assert "cannot write to" in line and "free the disk" in line and str(runs) in line
    assert not (runs / "new/metrics.json").exists()

def test_runs_is_a_file(lab):
    (lab / "runs").write_text("not a folder")
    line = refused(lab, run_name="new")
    assert f"cannot write to {lab / 'runs'}" in line and (lab / "runs").read_text() == "not a folder"

def test_runs_is_not_writable(runs):
    before = contents(runs)
    runs.chmod(0o555)
    try:
        probe = subprocess.run(
            [sys.executable, *AS_OTHERS, "-c", f"open({str(runs / 'probe')!r}, 'w')"], capture_output=True, timeout=60
        )
        if probe.returncode == 0: pytest.skip("this user writes anywhere and cannot give that up")
        done = train(launcher=AS_OTHERS, run_name="new", **SETTINGS)
    finally: runs.chmod(0o755)
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and f"cannot write to {runs / 'new'} (Permission denied)" in done.stderr
    ), done.stderr[-3000:]
    assert contents(runs) == before

def test_resume_of_another_configuration_names_what_differs(runs):
    before = contents(runs / "stopped")
    line = refused(runs, run_name="stopped", resume=True, lr=0.5)
    assert "lr (there 0.0, here 0.5)" in line and "seed" not in line and contents(runs / "stopped") == before

def test_truncated_checkpoint_is_named_and_an_earlier_one_continues(runs):
    checkpoints = runs / "stopped/checkpoints"
    before = contents(checkpoints)
    os.truncate(checkpoints / "last.pt", (checkpoints / "last.pt").stat().st_size // 2)
    line = refused(runs, run_name="stopped", resume=True)
    assert f"checkpoint {checkpoints / 'last.pt'} is truncated" in line and "another of the run's checkpoints" in line
    assert {k: v for k, v in contents(checkpoints).items() if k != "last.pt"} == {
        k: v for k, v in before.items() if k != "last.pt"
    }
    shutil.copyfile(checkpoints / "step_00000006.pt", checkpoints / "last.pt")  # what the message advises
    assert finishes_like_the_whole(runs)

class Touch:
    "Creates a file when unpickled."
    def __init__(self, path: Path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize(
    "form, words",
    [("checkpoint", "refused, nothing in it was run"), ("plain pickle", "was not written by this package")],
)
def test_checkpoint_that_executes_code_is_refused(runs, form, words):
    import torch
    last, planted = runs / "stopped/checkpoints/last.pt", runs.parent / "planted"
    if form == "checkpoint": torch.save(torch.load(last, weights_only=True) | {"metrics": Touch(planted)}, last)
    else: last.write_bytes(pickle.dumps(Touch(planted)))
    line = refused(runs, run_name="stopped", resume=True)
    assert str(last) in line and words in line and not planted.exists()

def test_checkpoint_of_another_run_is_refused(runs):
    "Weights only, another configuration, another network, another number of processes: each is named."
    import torch
    last, config = runs / "stopped/checkpoints/last.pt", runs / "stopped/config.json"
    own = torch.load(last, weights_only=True)
    shutil.copyfile(runs / "whole/final_model.pt", last)
    assert "holds weights only" in refused(runs, run_name="stopped", resume=True)
    for other, words in (
        (
            own | {"config": own["config"] | {"optimizer": "sgd"}},
            "is of another run: optimizer (there 'sgd', here 'adamw')",
        ),
        (
            own | {"model": {k.replace("head", "tail"): v for k, v in own["model"].items()}},
            "does not fit this network and optimiser",
        ),
        (own | {"loop": own["loop"] | {"processes": 2}}, "was trained by 2 processes and here there are 1"),
    ):
        torch.save(other, last)
        line = refused(runs, run_name="stopped", resume=True)
        assert words in line and (str(last) in line or "processes" in line) and config.exists()

def test_update_that_diverges_is_one_line(runs):
    "The loss and its gradient are finite; what the update made of the weights is not worth a traceback."
    line = refused(runs, run_name="far", optimizer="sgd", steps=40, lr=100, weight_decay=10.0, schedule="none")
    assert "NotFinite: " in line and "not finite at step 1;" in line and (runs / "far/diverged.json").exists()

def test_damaged_config_is_named(runs):
    config = runs / "stopped/config.json"
    config.write_text(config.read_text()[:100])
    before = contents(runs / "stopped")
    line = refused(runs, run_name="stopped", resume=True)
    assert f"{config} is not valid JSON" in line and "restore it" in line and contents(runs / "stopped") == before

def test_not_finite_names_the_step_and_the_checkpoint(runs):
    from drifting_kd.checkpoints import load_checkpoint
    line = refused(runs, NOT_A_NUMBER, run_name="nan")
    last = runs / "nan/checkpoints/last.pt"
    assert f"not finite at step 14; the last good checkpoint is {last} (step 12)" in line and "smaller lr" in line
    kept = load_checkpoint(last)
    assert (
        kept["step"] == 12
        and all(v.isfinite().all() for v in kept["model"].values())
        and not (runs / "nan/metrics.json").exists()
    )


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("run_name", "../outside", "a run stays inside runs/"),
        ("dataset", "digts", "did you mean 'digits'"),
        ("model", "resnet9", "did you mean 'resnet"),
        ("optimizer", "adamww", "did you mean 'adamw'"),
        ("batch_size", -1, "expected between 1 and"),
        ("epochs", 10**9, "expected between 1 and"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(runs, name, value, words):
    before, folders = contents(runs.parent), sorted(runs.rglob("*/"))
    line = refused(runs, **{name: value})
    assert repr(value) in line and words in line
    assert contents(runs.parent) == before and (sorted(runs.rglob("*/")), list(runs.parent.iterdir())) == (
        folders,
        [runs],
    )

# ---- every number has a least and a most

def configurations(kind: type = Parameters) -> list[type]:
    "Every configuration of the package."
    for path in (ROOT / "drifting_kd").glob("*.py"): importlib.import_module(f"drifting_kd.{path.stem}")
    below = [more for one in kind.__subclasses__() for more in (one, *configurations(one))]
    return sorted({c for c in below if c.__module__.startswith("drifting_kd.")}, key=lambda c: c.__name__)

def test_every_number_has_bounds_and_they_hold():
    "A slip such as ten thousand million images costs a line, not the memory."
    every = configurations()
    assert {"TrainConfig", "DistillConfig", "DriftConfig", "EvaluateConfig"} <= {c.__name__ for c in every}
    for kind in every:
        for f in dataclasses.fields(kind):
            if type(f.default) not in (int, float): continue
            low, high, name = f.metadata["low"], f.metadata["high"], f"{kind.__name__}.{f.name}"
            assert low is not None and high is not None and low <= f.default <= high, name
            assert f.name in ("seed", "split_seed") or abs(high) <= 1e9 and abs(low) <= 1e9, name
            for slip in (type(low)(low - abs(low) - 1), high * 2 + 1, 10**5000):
                given = float(slip) if type(f.default) is float and abs(slip) < 10**300 else slip
                with pytest.raises(LabError, match="expected (between|a finite)"): kind(**{f.name: given})

@pytest.mark.parametrize("name", ["milestones", "betas", "temps"])
def test_lists_in_lists_are_one_short_line(name):
    from drifting_kd.drifting import DriftConfig
    for slip in ([[0.9]], [["0.9"]], "[[0.9]]", {"a": 1}, [None], [10**400], "x" * 1500, [0.5] * 1500 + ["x"]):
        with pytest.raises(LabError) as refusal: DriftConfig(**{name: slip})
        line = str(refusal.value)
        assert line.startswith(f"{name}=") and len(line) < 200 and "\n" not in line
    for slip in (1e-30, 1e30):
        with pytest.raises(LabError, match="expected"): DriftConfig(temps=(slip,))

def test_what_was_given_is_cut_in_every_text_too():
    for kind in configurations():
        for f in dataclasses.fields(kind):
            if type(f.default) is not str: continue
            for slip in ("?" * 1500, "x=" + "1" * 1500, "a " * 750, "dkd+" + "b" * 1500, "a\nb"):
                try: kind(**{f.name: slip})  # some are looked at only when they are used
                except LabError as e:
                    assert len(str(e)) < 400 and "\n" not in str(e), f"{kind.__name__}.{f.name}: {e}"

def test_edited_checkpoint_is_one_line(runs):
    "The notebook of `train` tries many values; here one of each part, as a user meets it."
    import torch
    last = runs / "stopped/checkpoints/last.pt"
    own = torch.load(last, weights_only=True)
    for part, value, words in (
        ("step", 13, "its step is not as this run writes it (13, expected a step"),
        ("rng", own["rng"] | {"numpy": None}, "its rng is not as this run writes it (the random"),
        ("loop", own["loop"] | {"count": float("nan")}, "its loop.count is not as this run writes it (nan, expected"),
        ("config", {}, "is of another run: "),
        ("metrics", {}, "its metrics is not as this run writes it ({}, expected"),
    ):
        torch.save(own | {part: value}, last)
        before = contents(runs / "stopped/checkpoints") | contents(runs / "stopped/figures")
        lines = (runs / "stopped/metrics.jsonl").read_bytes()
        line = refused(runs, run_name="stopped", resume=True)
        assert f"checkpoint {last}" in line and words in line, line
        assert before == contents(runs / "stopped/checkpoints") | contents(runs / "stopped/figures")
        assert (runs / "stopped/metrics.jsonl").read_bytes() == lines
    torch.save(own, last)
    assert finishes_like_the_whole(runs)
