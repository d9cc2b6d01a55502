"Parts of one's own, by name, from outside: each example that the pages print, in sweeps, papermill, resume, report."
import json, os, re, shutil, subprocess
import pytest, yaml
from conftest import ROOT, TINY, losses, python, same_weights, train

SHORT = TINY | dict(limit=200, epochs=2)

def printed(page: str) -> dict:
    "name -> source of the files that a page shows."
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    return {name: source for source, name in blocks}

EXAMPLES = printed("CONTRIBUTING.md") | printed("README.md")

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project of somebody's own: the notebooks, and his files beside them."
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns("[0-9]*"))
    for name, source in EXAMPLES.items(): (folder / name).write_text(source, encoding="utf-8")
    return folder

def dkd(root, *words, **env) -> subprocess.CompletedProcess:
    env = os.environ | dict(DKD_ROOT=str(root), OMP_NUM_THREADS="1") | env
    return python("-m", "drifting_kd.cli", *words, cwd=root, env=env, timeout=200)

def parameters(settings: dict) -> list[str]: return [w for k, v in settings.items() for w in ("-p", k, str(v))]

def saved(root, name, file="config.json") -> dict:
    return json.loads((root / "runs" / name / file).read_text(encoding="utf-8"))

def test_the_pages_show_each_of_the_six_kinds():
    tables = ("MODELS", "SOURCES", "TASKS", "LOSSES", "GATES", "METHODS")
    assert not [t for t in tables if not any(f'{t}["' in source for source in printed("CONTRIBUTING.md").values())]

@pytest.fixture(scope="module")
def swept(root):
    "Two runs of a matrix with a network, a data set and a task of one's own."
    base = SHORT | dict(plugins="small.py stripes.py margin.py", model="small", dataset="stripes", task="margin")
    matrix = dict(base=base | dict(limit=0), matrix=dict(seed=[0, 1]), name="own-s{seed}")
    (root / "own.yaml").write_text(yaml.safe_dump(matrix))
    return dkd(root, "sweep", "own.yaml", "--workers", "2")

def test_a_sweep_trains_network_data_set_and_task(root, swept):
    assert swept.returncode == 0, swept.stderr
    config, found = saved(root, "own-s0"), saved(root, "own-s0", "metrics.json")
    assert set(config["plugins_sha256"]) == {"small.py", "stripes.py", "margin.py"}
    assert (found["model_name"], found["test/accuracy"] > .5) == ("small", True)
    for name in config["plugins_sha256"]:
        assert (root / "runs/own-s0/plugins" / name).read_text(encoding="utf-8") == EXAMPLES[name]

class edited:
    "Within the block a file has one more line."
    def __init__(self, path): self.path, self.before = path, path.read_text(encoding="utf-8")
    def __enter__(self): self.path.write_text(self.before + "# edited\n", encoding="utf-8")
    def __exit__(self, *_): self.path.write_text(self.before, encoding="utf-8")

def test_a_second_sweep_makes_nothing_and_sees_an_edited_plugin(root, swept):
    again = dkd(root, "sweep", "own.yaml")
    assert again.returncode == 0 and "2 runs, 2 of them finished before" in again.stdout
    with edited(root / "margin.py"):
        other = dkd(root, "sweep", "own.yaml")
    assert other.returncode == 1 and "finished with other parameters: plugins_sha256" in other.stderr

def test_whoever_opens_a_run_names_its_plugin(root, swept):
    without = dkd(root, "evaluate", "own-s0", "--data-root", "data")
    told = "made with the plugin margin.py, small.py, stripes.py, which is not loaded"
    assert without.returncode == 1 and "dataset='stripes' is not known" in without.stderr and told in without.stderr
    with edited(root / "small.py"):
        found = dkd(root, "evaluate", "own-s0", "--plugins", "small.py stripes.py margin.py")
    assert found.returncode == 0 and "test/accuracy" in found.stdout, found.stderr
    assert "plugin small.py is not as it was in this run" in found.stderr and "stripes.py is not" not in found.stderr

def test_the_report_needs_no_plugin(root, swept):
    done = dkd(root, "run", "report", "-p", "pattern", "own-*", "-p", "name", "own")
    assert done.returncode == 0 and (root / "figures").is_dir(), done.stderr

def test_papermill_distils_with_a_loss_a_gate_and_a_method(root):
    settings = SHORT | dict(plugins="squares.py late.py careful.py", method="careful", teacher_models="resnet8",
                            teacher_epochs=1, baseline=False, run_name="careful")
    words = ["-m", "papermill", "nbs/distill.ipynb", "runs/careful.ipynb", *parameters(settings)]
    (root / "runs").mkdir(exist_ok=True)
    done = python(*words, cwd=root, env=os.environ | dict(DKD_ROOT=str(root)), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(saved(root, "careful")["plugins_sha256"]) == {"squares.py", "late.py", "careful.py"}
    lines = [json.loads(line) for line in (root / "runs/careful/metrics.jsonl").read_text().splitlines()]
    gates = [line["train/dynamic_alpha"] for line in lines if "train/dynamic_alpha" in line]
    assert gates[0] == 0 and gates[-1] > 0  # closed in the first half of training

def test_names_are_checked_with_the_plugin_before_a_kernel_starts(root):
    slip = dkd(root, "run", "train", "-p", "plugins", "small.py", "-p", "model", "smal")
    assert slip.returncode == 1 and "model='smal' is not known; did you mean 'small'" in slip.stderr
    gone = dkd(root, "run", "train", DKD_PLUGINS="gone.py")
    assert gone.returncode == 1 and "plugins='gone.py': no such file" in gone.stderr
    assert not (root / "runs/notebooks").exists() or not list((root / "runs/notebooks").glob("train-*.ipynb"))

KILL = """import os
from drifting_kd.train import Loop
before = Loop.train_step
def train_step(self, group):
    before(self, group)
    if self.step == 8: os._exit(9)
Loop.train_step = train_step"""

def test_a_killed_run_goes_on_with_the_same_plugin_only(lab):
    own = lab / "small.py"
    own.write_text(EXAMPLES["small.py"], encoding="utf-8")
    settings = dict(model="small", plugins=str(own), epochs=2)
    whole = train(run_name="whole", **settings)
    assert whole.returncode == 0, whole.stderr
    train(KILL, run_name="killed", **settings)
    with edited(own):
        refused = train(run_name="killed", resume=True, **settings)
    assert refused.returncode != 0 and "plugins_sha256 (there" in refused.stderr
    assert train(run_name="killed", resume=True, **settings).returncode == 0
    runs = lab / "runs/whole", lab / "runs/killed"
    assert same_weights(*runs) and losses(runs[0]) == losses(runs[1])
