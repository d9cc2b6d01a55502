"""Imports cost what they must: nothing heavy before it is used. CPU seconds of fresh processes, not wall time,
because other work shares the machine."""
import json, resource, subprocess, sys
from conftest import ROOT

HEAVY = (
    "torchvision timm diffusers transformers wandb trackio mlflow keras tensorflow ray optuna sklearn scipy "
    "pandas matplotlib seaborn PIL datasets lpips cleanfid accelerate "
    "papermill nbclient nbdev IPython yaml requests"
).split()
LIGHT = ("core", "sweep", "cli")                         # not even torch
DRAW = """plots gallery charts report judges drift generate drifting diffusion request features teachers distill
samples scores curves subjects evaluate students""".split()
ALLOWED = {name: {"matplotlib", "PIL"} for name in DRAW}  # all but the first draw with plots

def python(code: str, *args: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done

def cpu(code: str, *args: str) -> float:
    "User and system seconds of one process."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(code, *args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

LIBRARY = "import drifting_kd.train"
# a plain import where its compiled operators load
TORCHVISION = "import torch\nfrom drifting_kd.core import import_torchvision\nimport_torchvision()"

def test_train_imports_as_fast_as_torch_and_torchvision():
    "The best of three measurements that alternate."
    times = [(cpu(LIBRARY), cpu(TORCHVISION)) for _ in range(3)]
    ours, theirs = map(min, zip(*times))
    assert ours <= 1.5 * theirs, times

PROBE = """
import importlib, json, sys
found = {}
for name in sys.argv[2:]:
    before = set(sys.modules)
    importlib.import_module(f"drifting_kd.{name}")
    found[name] = sorted(set(json.loads(sys.argv[1])) & (set(sys.modules) - before))
print(json.dumps(found))
"""

def test_command_line_imports_no_torch():
    found = json.loads(python(PROBE, json.dumps([*HEAVY, "torch", "numpy"]), *LIGHT).stdout)
    assert found == {name: [] for name in LIGHT}

def test_nothing_heavy_is_imported_before_it_is_used():
    modules = sorted(
        (p.stem for p in (ROOT / "drifting_kd").glob("*.py") if p.stem[0] != "_"),
        key=lambda m: (m in ALLOWED, m != "train", m),
    )  # those that are allowed something last
    found = json.loads(python(PROBE, json.dumps(HEAVY), *modules).stdout)
    assert "train" in found and not {
        m: extra for m, new in found.items() if (extra := sorted(set(new) - ALLOWED.get(m, set())))
    }

def test_a_configuration_is_checked_without_importing_the_compiler():
    python("import sys\nfrom drifting_kd.optim import check_optimizer\n"
           "for name in ('sgd', 'nesterov', 'adam', 'adamw'): check_optimizer(name, lr=.1, weight_decay=.1)\n"
           "assert 'torch._dynamo' not in sys.modules")

def test_help_answers_at_once():
    assert min(cpu("import sys; from drifting_kd.cli import main; sys.exit(main(['--help']))") for _ in range(3)) < 1
