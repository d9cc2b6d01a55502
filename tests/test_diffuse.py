"Diffusion as its users run it: the notebook, images on request, a kill, two processes, and one line for what fails."
import json, signal, subprocess, sys, time
import pytest
from PIL import Image
from conftest import ROOT, losses, same_weights, train
from test_processes import two_processes

SMALL = dict(family="diffuse", epochs=1, steps=24, limit=300, batch_size=40, eval_every=8, save_every=3, warmup=2,
             eval_samples=40, sample_steps=2)

def dkd(*words):
    command = [sys.executable, "-m", "drifting_kd.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run of the notebook, and what it said."
    lab = tmp_path_factory.mktemp("diffuse")
    settings = dict(run_name="small", steps=60, batch_size=40, warmup=5, eval_every=20, eval_samples=60,
                    num_samples=150, sample_steps=3, tracker="none", device="cpu", threads=1,
                    power_averages=2, prompts="'the number 7; a handwritten three'")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("DKD_ROOT", str(lab)), m.setenv("IN_TEST", "1")
        out = dkd("run", ROOT / "nbs/diffuse.ipynb", *(w for k, v in settings.items() for w in ("-p", k, v)))
    assert out.returncode == 0, out.stderr
    return lab, out.stdout

def test_the_notebook_reads_as_a_report(made):
    lab, said = made
    run = lab / "runs/small"
    names = "curves over_training samples chain distances guidance steps averages"
    assert {p.name for p in (run / "figures").iterdir()} >= {f"{name}.png" for name in names.split()}
    rows = (run / "eval/fid_metrics.csv").read_text().splitlines()
    assert len(rows) == 2 and "two_step" in rows[1]  # the sampling is part of the row
    for words in ("140 prompts", "reordered", "foreign", "its words are not known", "has the least", "dkd generate"):
        assert words in said, words
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "eval/digits_fd" in line]) == 3

def test_images_on_request_say_what_was_asked(made, monkeypatch):
    lab, _ = made
    monkeypatch.setenv("DKD_ROOT", str(lab))
    (lab / "asked.txt").write_text("the number 7\nseven\n")
    out = dkd("generate", "small", "--prompt", "a photograph of the number 3", "--prompts", lab / "asked.txt",
              "--num", 2, "--steps", 4, "--guidance", 3, "--out", lab / "images")
    assert out.returncode == 0 and "8 network calls" in out.stdout, (out.stdout, out.stderr)
    said = [Image.open(lab / f"images/{i:06d}.png").text["prompt"] for i in range(6)]
    assert said == [p for p in ("a photograph of the number 3", "the number 7", "seven") for _ in range(2)]
    record = json.loads((lab / "images/generated.json").read_text())
    assert (record["alpha"], record["steps"], record["calls"]) == (3, 4, 8) and (lab / "images/grid.png").exists()
    for step in (20, 40):
        done = dkd("generate", "small", "--prompt", "7", "--num", 1, "--step", step)
        assert (done.returncode == 0) == (step == 40), (done.stdout, done.stderr)  # the newest two are kept
    assert "keeps the steps 40, 60" in dkd("generate", "small", "--step", 20).stderr

@pytest.mark.parametrize("words, told", [
    (("--prompt", "draw a 7"), "draw not known; known words: 0 1 2"), (("--sampler", "eular"), "sampler='eular'"),
    (("--num", "0"), "num=0"), (("--steps", "-1"), "steps=-1"), (("--prompts", "no.txt"), "no.txt")])
def test_a_request_that_cannot_be_met_is_one_line(made, monkeypatch, words, told):
    lab, _ = made
    monkeypatch.setenv("DKD_ROOT", str(lab))
    before = sorted(lab.rglob("*"))
    out = dkd("generate", "small", *words)
    assert out.returncode == 1 and told in out.stderr and out.stderr.strip().count("\n") == 0, out.stderr
    assert sorted(lab.rglob("*")) == before

def test_fid_and_evaluate_take_the_runs_own_sampling(made, monkeypatch):
    lab, _ = made
    monkeypatch.setenv("DKD_ROOT", str(lab))
    out = dkd("fid", "digits:test", "small", "--n", 50)
    assert out.returncode == 0 and "digits-FD" in out.stdout, out.stderr

    out = dkd("evaluate", "small", "--num", 60)
    assert out.returncode == 0 and "digits_fd" in out.stdout and "two_step" in out.stdout, (out.stdout, out.stderr)
    table = (lab / "runs/small/eval/fid_metrics.csv").read_text()
    for settings in ((), ("-p", "sampler", "heun"), ("-p", "sample_steps", 2), ("-p", "sampler", "heun")):
        weights = lab / "runs/small/final_model.pt"
        out = dkd("run", ROOT / "nbs/evaluate.ipynb", "-p", "checkpoint", weights, "-p", "num_samples", 60,
                  "-p", "alpha", 0, "-p", "metrics", "", "-p", "tracker", "none", *settings)
        assert out.returncode == 0, out.stderr
    rows = (lab / "runs/small/eval/fid_metrics.csv").read_text().splitlines()
    assert len(rows) == len(table.splitlines()) + 2  # the first and the last were there

def test_killed_and_resumed_is_the_same(lab):
    assert train(run_name="whole", **SMALL).returncode == 0
    process = train(run_name="killed", wait=False, **SMALL)
    end = time.monotonic() + 120
    while not list((lab / "runs/killed/checkpoints").glob("step_*.pt")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.02)
    process.send_signal(signal.SIGKILL), process.wait()
    assert not (lab / "runs/killed/metrics.json").exists()
    out = train(run_name="killed", resume=True, **SMALL)
    assert out.returncode == 0, out.stderr
    assert same_weights(lab / "runs/whole", lab / "runs/killed")
    assert losses(lab / "runs/whole") == losses(lab / "runs/killed")

def test_two_processes_train_as_one(lab):
    settings = SMALL | dict(steps=6, log_every=1, eval_every=6, judge="none")
    one, two = train(run_name="one", **settings), train("", two_processes(), run_name="two", **settings)
    assert one.returncode == two.returncode == 0, two.stderr[-3000:]
    a, b = ([m["train/loss"] for _, m in losses(lab / f"runs/{name}") if "train/loss" in m] for name in ("one", "two"))
    assert len(a) == 6 and all(abs(x - y) < 1e-4 * x for x, y in zip(a, b)), (a, b)

REFUSED = [(dict(prompts="draw a 7"), "draw not known"), (dict(guidance=2.0, null_share=0.0), "null_share=0"),
           (dict(interval=[0.8, 0.2]), "the smaller first"), (dict(model="mlp"), "model='mlp' is not known"),
           (dict(predict="noise"), "predict='noise'"), (dict(text="bert"), "text='bert'"),
           (dict(judge="mnist"), "28 pixels")]

@pytest.mark.parametrize("settings, words", REFUSED, ids=["-".join(settings) for settings, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(lab, settings, words):
    out = train(run_name="bad", **(SMALL | settings))
    assert out.returncode == 1 and words in out.stderr and out.stderr.strip().count("\n") == 0, out.stderr
    assert not (lab / "runs/bad").exists()
