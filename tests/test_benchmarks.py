"""Every benchmark runs, at a size that says nothing: so that none of them rots between the days when it is needed."""
import functools, importlib.util, json, sys
from pathlib import Path
from types import ModuleType
import pytest
import torch
from conftest import ROOT
from drifting_kd.core import LabError, read_json, same_determinism, write_json

FOLDER = ROOT / "benchmarks"

def script(name: str) -> ModuleType:
    "A benchmark, imported from its file."
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.fixture
def bench(lab, monkeypatch):
    "Runs a benchmark with these words, and `smaller` instead of what stands in the script; its result."
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    threads = torch.get_num_threads()
    def run(name: str, *words, **smaller) -> dict:
        module, out = script(name), lab / f"{name}.json"
        for key, value in smaller.items(): monkeypatch.setattr(module, key, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words), "--out", str(out)])
        module.main()
        return read_json(out)
    with same_determinism(): yield run
    torch.set_num_threads(threads)

def test_kd(bench):
    found = bench("kd", "--repeats", 2, "--live", 1, "--batch", 4, PAIRS={"small": ("resnet8", "resnet8")})
    assert found["pairs"]["small"]["turns"] == dict(alone=2, cached=2, live=1) and found["environment"]["python"]

def test_kds_splits_share_no_index():
    data = script("kd").random_data(300)
    indices = torch.cat([s.indices for s in (data.train, data.val, data.test)])
    assert len(indices.unique()) == len(indices) == 500

def test_data(bench):
    found = bench("data", "--repeats", 1, "--threads", 1, "--images", 520)
    assert [row["batch_size"] for row in found["loaders"]] == [128, 512] and found["step"]["images_per_second"] > 0

def test_loop(bench):
    loop = script("loop")
    few = dict(random_data=functools.partial(loop.random_data, 300), parts=functools.partial(loop.parts, n=2))
    found = bench("loop", "--repeats", 2, "--steps", 1, "--threads", 1, **few)
    assert found["threads_1"]["cpu_ms_per_step"].keys() == {"bare", "fit"} and found["threads_1"]["parts"]["cpu_ms"]

def test_fid(bench):
    found = bench("fid", "--images", 20, "--dims", 16, "--repeats", 1)
    assert len(found["pixels"]["ways"]) == 4 and found["trace"]["relative_difference"] < 1e-6

@pytest.mark.parametrize("name", ["data", "fid", "kd", "loop"])
def test_what_the_readme_quotes_is_of_a_clean_commit(name):
    assert read_json(FOLDER / f"results/{name}.json")["environment"]["git"]["dirty"] is False

@pytest.mark.slow
def test_fid_agrees_with_clean_fid(bench):
    assert max(v for k, v in bench("fid", "--agreement", "--dims", 32)["rows"].items() if "pixels" not in k) < 1e-6

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux alone")
def test_drift(bench):
    found = bench("drift", "--threads", 1, SIZES={"small": (2, 16, 8, 1)}, MEMORY={"small": (64, 8, 0)})
    assert found["threads_1"]["small"]["relative_difference"] < 1e-4 and "extra_megabytes" in found["memory"]["small"]

def on_cpu(bench, images: int, *names: str) -> dict:
    "What these measurements of gpu.py find on a CPU."
    return bench("gpu", "--device", "cpu", "--epochs", 1, "--images", images, "--only", *names)

def test_gpu(bench):
    found = on_cpu(bench, 400, "drift", "drift_step")
    assert found["drift"]["sizes"] and found["drift_step"]["mlp_wide"]["ms"] > 0 and len(found["aims"]) == 6

@pytest.mark.slow
def test_nearly_all_of_gpu(bench):
    "All but `evaluation`, which looks at 400 images through Inception: a minute and a half without a GPU."
    names = "training", "determinism", "overhead", "optimizers", "diffusion_step", "distillation"
    found = on_cpu(bench, 1000, *names)
    assert all("error" not in found[name] for name in names)

def test_pages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pages.py", "--by-notebook", "--long"])
    script("pages").main()
    assert "00_core" in capsys.readouterr().out

# ---- tables and figures of studies, from what is committed

REPORTS = [FOLDER / "results" / f"distill_{name}.json" for name in ("cifar10_jpeg", "shapes100")]

def test_distill_study(lab, capsys):
    script("distill_study").main(REPORTS, str(lab / "distill.png"), "")
    lines = capsys.readouterr().out.splitlines()
    assert (lab / "distill.png").stat().st_size > 10_000 and any(line.startswith("| none |") for line in lines)

@pytest.mark.parametrize(
    "leave_out, words",
    [
        (lambda row: row["group"].split(",")[0] == "none", "has no method none (labels only)"),
        (lambda row: row["metric"] == "test/ece", "no test/ece; make the report with the keys"),
        (lambda row: True, "no test/accuracy, test/last_accuracy, "),
    ],
)
def test_distill_study_says_what_a_report_lacks(lab, leave_out, words):
    report = read_json(REPORTS[0])
    report["tables"]["summary"] = [row for row in report["tables"]["summary"] if not leave_out(row)]
    write_json(lab / "distill_less.json", report)
    with pytest.raises(LabError) as error:
        script("distill_study").main([lab / "distill_less.json"], str(lab / "none.png"), "")
    assert words in str(error.value) and "\n" not in str(error.value) and not (lab / "none.png").exists()

def test_distill_study_of_no_report(lab):
    (lab / "other.json").write_text(json.dumps(dict(schema=1)))
    with pytest.raises(LabError, match="is no report"): script("distill_study").main([lab / "other.json"], "", "")

def test_drift_study(lab):
    source = FOLDER / "results/drift_digits.json"
    script("drift_study").main([str(source)], str(lab / "again.json"), str(lab / "drift.png"))
    assert read_json(lab / "again.json")["groups"] == read_json(source)["groups"] and (lab / "drift.png").exists()
