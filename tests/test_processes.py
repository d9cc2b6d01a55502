"Two processes (gloo) give the losses of one with the same global batch, to summation order; one of them writes."
import json, os, signal, socket, subprocess, sys
import pytest
from conftest import losses, same_weights, train, weights

NO_BATCHNORM = """
import drifting_kd.classify as t, torch
create = t.create_model
def plain(*a, **k):
    m = create(*a, **k)
    for x in m.modules():
        for n, c in x.named_children():
            if isinstance(c, torch.nn.BatchNorm2d): setattr(x, n, torch.nn.Identity())
    return m
t.create_model = plain
"""



def two_processes() -> list[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    ]


def differences(a, b) -> list[float]:
    "The largest relative difference of each logged step: rounding at first, then what ReLU and BatchNorm make of it."
    kinds = ("train/", "epoch/")
    a, b = ([(step, {k: v for k, v in m.items() if k.startswith(kinds)}) for step, m in x] for x in (a, b))
    assert [(s, sorted(m)) for s, m in a] == [(s, sorted(m)) for s, m in b]
    return [max(abs(m[k] - n[k]) / max(1, abs(m[k])) for k in m) for (_, m), (_, n) in zip(a, b) if m]

def summary(run) -> dict: return json.loads((run / "metrics.json").read_text())

# runs after what is registered later
AT_EXIT = """import atexit, torch
def say(): print('still in a group' if torch.distributed.is_initialized() else 'on its own', flush=True)
atexit.register(say)
"""


@pytest.mark.parametrize("patch", [NO_BATCHNORM, ""], ids=["without BatchNorm", "with BatchNorm"])
def test_two_processes_are_one(lab, patch):
    settings = dict(epochs=2, log_every=1, lr=0.02)
    one, two = (
        train(patch, run_name="one", **settings),
        train(AT_EXIT + patch, two_processes(), run_name="two", **settings),
    )
    assert one.returncode == 0 and two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("on its own") == 2, two.stdout[-500:]  # a group that outlives Python may abort it
    a, b = lab / "runs/one", lab / "runs/two"
    assert (summary(a)["processes"], summary(b)["processes"]) == (1, 2)
    gaps = differences(losses(a), losses(b))
    assert len(gaps) == 12 + 2 + 2 and max(gaps[:3]) < 1e-4 and max(gaps) < 1e-2, gaps
    assert [step for step, m in losses(b) if "epoch/train_loss" in m] == [6, 12]  # over both ranks' images
    for name in ("running_mean", "running_var"):
        for key in (k for k in weights(a) if k.endswith(name)):
            assert (weights(a)[key] - weights(b)[key]).abs().max() < 1e-3
    for key, tolerance in (("test/accuracy", 0.02), ("val/loss", 1e-2)):
        assert abs(summary(a)[key] - summary(b)[key]) < tolerance  # metrics cover all ranks
    assert [p.name for p in (lab / "runs").iterdir() if p.is_dir() and p.name.startswith("two")] == [
        "two"
    ]  # one rank makes the folder


def test_processes_parameter(lab):
    "The same from one process that launches the others, as a notebook does."
    for name, processes in (("one", 1), ("two", 2)):
        out = train(run_name=name, processes=processes, epochs=1, log_every=1, lr=0.02, layer_norms=True)
        assert out.returncode == 0, out.stderr[-3000:]
    assert summary(lab / "runs/two")["processes"] == 2
    gaps = differences(losses(lab / "runs/one"), losses(lab / "runs/two"))
    assert max(gaps[:2]) < 1e-5 and max(gaps) < 1e-2, gaps  # of each layer, too
    one, two = (
        {
            k: v
            for _, line in losses(lab / "runs" / name)
            for k, v in line.items()
            if k.startswith("val/activation_rms/")
        }
        for name in ("one", "two")
    )
    assert (
        "val/activation_rms/conv1" in one
        and one.keys() == two.keys()
        and all(abs(one[k] - two[k]) < 1e-2 * one[k] for k in one)
    )  # each process saw its share of the images


def test_two_processes_killed_and_resumed(lab):
    "Between two log lines and inside an epoch: the half-full sums of both go on."
    die = """import os, signal
import drifting_kd.classify as t
def after_step(self, step):
    if step == 8: os.killpg(0, signal.SIGKILL)
t.Classify.after_step = after_step"""
    settings = dict(processes=2, steps=12, log_every=4, save_every=7, eval_every=12)
    whole, killed = train(run_name="whole", **settings), train(die, run_name="killed", **settings)
    assert (
        whole.returncode == 0
        and killed.returncode == -signal.SIGKILL
        and not (lab / "runs/killed/metrics.json").exists()
    )
    resumed = train(run_name="killed", resume=True, **settings)
    assert resumed.returncode == 0 and "after step 7 " in resumed.stdout, resumed.stderr[-2000:]
    assert losses(lab / "runs/whole") == losses(lab / "runs/killed") and same_weights(
        lab / "runs/whole", lab / "runs/killed"
    )


JOINED = """
import torch, torch.distributed as dist
from torch import nn
from torch.testing import assert_close
from drifting_kd.processes import globalize_batchnorm
dist.init_process_group("gloo")
half = lambda x: x.chunk(2)[dist.get_rank()]
torch.manual_seed(0)
x, upstream, one, own = 2 * torch.randn(6, 3, 4, 4) + 1, torch.randn(6, 3, 4, 4), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
for p in one.parameters(): nn.init.normal_(p)
own.load_state_dict(one.state_dict())
globalize_batchnorm(own, torch.device("cpu"))
a, b = x.clone().requires_grad_(), half(x).clone().requires_grad_()
for _ in range(2): whole, part = one(a), own(b)
(whole * upstream).sum().backward(), (part * half(upstream)).sum().backward()
for p in own.parameters(): dist.all_reduce(p.grad)
pairs = [(part, half(whole)), (b.grad, half(a.grad))]
pairs += [(own.weight.grad, one.weight.grad), (own.bias.grad, one.bias.grad)]
pairs += [(own.running_mean, one.running_mean), (own.running_var, one.running_var)]
pairs += [(own.num_batches_tracked, one.num_batches_tracked), (own.eval()(b), half(one.eval()(a)))]
for mine, theirs in pairs: assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
"""

def test_global_batchnorm_is_batchnorm_of_the_joined_batch(tmp_path):
    (tmp_path / "joined.py").write_text(JOINED)
    done = subprocess.run(
        [sys.executable, *two_processes(), str(tmp_path / "joined.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]

def test_a_batchnorm_that_cannot_be_shared_is_refused():
    import torch
    from drifting_kd.processes import globalize_batchnorm
    for odd in (dict(affine=False), dict(momentum=None), dict(track_running_stats=False)):
        with pytest.raises(ValueError, match="use processes=1"):
            globalize_batchnorm(torch.nn.BatchNorm2d(2, **odd), torch.device("cpu"))


BESIDE = NO_BATCHNORM + """
class Classify(t.Classify):
    def setup(self, *where):
        super().setup(*where)
        self.head = torch.nn.Linear(10, 10)
        torch.nn.init.eye_(self.head.weight), torch.nn.init.zeros_(self.head.bias)
    def parameters(self): return [*super().parameters(), *self.head.parameters()]
    def loss(self, batch, step):
        logits = self.head(self.net(t.normalize(batch.x, self.data.mean, self.data.std)))
        return t.F.cross_entropy(logits, batch.y), {}
    def state(self): return dict(head=self.head.state_dict())
"""

def test_parameters_beside_the_model_are_averaged(lab):
    import torch
    for name, processes in (("one", 1), ("two", 2)):
        done = train(BESIDE, run_name=name, processes=processes, epochs=1, lr=0.1, schedule="none")
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        torch.load(lab / "runs" / n / "checkpoints/last.pt", weights_only=True)["task"]["state"]["head"]
        for n in ("one", "two")
    )
    assert (one["weight"] - torch.eye(10)).abs().max() > 1e-3 and all((one[k] - two[k]).abs().max() < 1e-5 for k in one)

def test_a_batch_that_does_not_divide_is_refused(lab):
    out = train(processes=2, batch_size=51)
    assert out.returncode == 1 and "does not divide among 2 processes" in out.stderr

def test_more_processes_than_cores_are_refused_before_anything_is_written(lab):
    many = 1 + os.cpu_count()
    out = train(processes=many, batch_size=2 * many)
    assert out.returncode == 1 and f"processes={many}: this machine has {many - 1} cores" in out.stderr
    assert len(out.stderr.splitlines()) == 1 and not list(lab.iterdir())

def test_what_stops_a_child_is_one_line(lab):
    "Also with three processes, whose shares of an evaluation differ."
    nan = """import drifting_kd.classify as t
real = t.Classify.loss
def loss(self, batch, step):
    l, m = real(self, batch, step)
    return l * (float('nan') if step == 4 else 1), m
t.Classify.loss = loss"""
    out = train(nan, run_name="nan", processes=2)
    assert out.returncode == 1 and out.stderr.strip().splitlines()[-1].startswith(
        "LabError: the loss or its gradient is not finite at step 4"
    ), out.stderr[-2000:]
    enough = "import os; os.cpu_count = lambda: 8"
    three = train(enough, run_name="three", processes=3, batch_size=51, epochs=1)
    assert three.returncode == 0 and summary(lab / "runs/three")["processes"] == 3, three.stderr[-2000:]

FORKED = """
import os, sys
from pathlib import Path
from drifting_kd.run import is_held, try_lock
path = Path(sys.argv[1])
lock = try_lock(path)
if (child := os.fork()) == 0:
    lock.release()
    os._exit(0)
os.waitpid(child, 0)
sys.exit(not is_held(path))
"""

def test_a_process_of_a_training_does_not_free_its_parents_run(tmp_path):
    "`fit` forks, and each of its processes closes the run in its turn."
    assert subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / ".lock")]).returncode == 0
