"Every family on a device that is not the CPU, without one: nothing is left behind on the host, and no step waits."

import json, os, runpy, subprocess, sys
import pytest
from conftest import ROOT, train

torch = pytest.importorskip("torch")
pytest.importorskip("torch.utils.backend_registration")
if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices made of Python", allow_module_level=True)

THERE = f"""import atexit, sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import pretend
pretend.everywhere()
atexit.register(lambda: print(json.dumps(pretend.WAITS)))
"""
SMALL = dict(device="auto", epochs=1, batch_size=25, limit=100, log_every=50)
DRIFT = SMALL | dict(
    family="drift",
    steps=4,
    batch_size=40,
    limit=300,
    positives=16,
    unconditional=4,
    eval_every=2,
    warmup=1,
    eval_samples=60,
)
DIFFUSE = SMALL | dict(
    family="diffuse", steps=4, batch_size=40, limit=300, eval_every=2, warmup=1, eval_samples=40, sample_steps=2
)
DISTILL = SMALL | dict(
    family="distill", val_fraction=0.3, model="judge", teacher_models="judge judge", teacher_epochs=6, crop_padding=1
)


def trained(settings: dict, code: str = "") -> dict:
    "Train there; what a step or a batch waited for."
    out = train(THERE + code, **settings)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])

@pytest.mark.parametrize(
    "settings",
    [
        dict(epochs=2, optimizer="adamw", layer_norms=True, ema_decay=0.9, grad_clip=1.0, noise=0.1, accumulation=2),
        dict(optimizer="muon", precision="bf16", model="mobilenet_v2_half"),
        DRIFT,
        DRIFT | dict(queue=20, model="unet_tiny"),
        DRIFT | dict(model="dit_tiny", chunk=4, encoder="mae", encoder_epochs=1, multi_scale=False),
        DIFFUSE | dict(guidance=2.0, power_averages=2, accumulation=2),
        DISTILL | dict(method="dynamic", confidences="crossfit", feature="fitnet"),
        DISTILL | dict(epochs=2, method="confidence", cache="ahead"),
    ],
    ids=["classify", "bf16", "drift", "queue", "encoder", "diffuse", "distill", "cache"],
)
def test_a_family_trains_where_the_data_are(lab, settings):
    assert trained(SMALL | settings) == {}

def test_the_watch_works(lab):
    "A loss that asks for a number waits; a tensor that stayed on the host is refused."
    own = """own = Classify.loss
def loss(self, batch, step):
    {}
    return own(self, batch, step)
Classify.loss = loss
"""
    assert set(trained(SMALL, own.format("batch.x.float().mean().item()"))) == {"aten._local_scalar_dense.default"}
    out = train(THERE + own.format("batch.x + torch.ones(2)").replace("own =", "import torch\nown =", 1), **SMALL)
    assert out.returncode and "found pretend:0 and cpu" in out.stderr, out.stderr[-2000:]

@pytest.mark.slow
def test_notebooks_run_where_the_data_are(lab):
    "From training to report: answers, landscapes, figures, distances, judges."
    common, samples = (
        dict(tracker="none"),
        dict(
            steps=20,
            warmup=2,
            batch_size=40,
            positives=16,
            unconditional=4,
            eval_every=10,
            eval_samples=60,
            num_samples=120,
        ),
    )
    words = [
        ("train", dict(common, epochs=1, run_name="a")),
        ("train", dict(common, epochs=1, seed=1, run_name="b")),
        ("solutions", dict(pattern="[ab]", images=200)),
        ("drift", dict(common, run_name="d", **samples)),
        ("diffuse", dict(common, run_name="f", steps=4, warmup=1, batch_size=40, eval_every=2, eval_samples=60,
                         num_samples=120, sample_steps=2)),
        ("evaluate", dict(checkpoint="d", num_samples=100)),
        ("evaluators", dict(device="auto", epochs=1, images=60)),
        (
            "distill",
            dict(
                common,
                run_name="k",
                limit=200,
                val_fraction=0.3,
                epochs=1,
                eval_every=1,
                batch_size=40,
                model="judge",
                teacher_models="judge judge",
                teacher_epochs=6,
                cache="lazy",
            ),
        ),
    ]
    command = [
        sys.executable,
        str(ROOT / "tests/pretend.py"),
        *(w for name, settings in words for w in (name, json.dumps(settings))),
    ]
    out = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(MPLBACKEND="agg", OMP_NUM_THREADS="1"),
    )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]

def test_a_measurement_that_failed_reaches_no_aim():
    gpu = runpy.run_path(str(ROOT / "benchmarks/gpu.py"), run_name="gpu")
    assert set(
        gpu["reached"]({name: dict(error="out of memory", wall_seconds=1.0) for name in gpu["MEASUREMENTS"]}).values()
    ) == {"not measured"}
    same = lambda **found: gpu["reached"](dict(determinism=found | dict(wall_seconds=1.0)))[
        "two trainings give the same weights"
    ]
    assert (same(), same(a=True, b=True), same(a=True, b=False)) == ("not measured", "yes", "no")
