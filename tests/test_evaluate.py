"""Checkpoints that `fit` wrote, evaluated as users do: the notebook, the command line, killed, side by side, on old
tables, with wrong input. CLIP and LPIPS with random weights.
"""
import json, math, multiprocessing, os, shutil, signal, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
import torch
from conftest import ROOT, train as train_classifier
from drifting_kd.core import LabError, environ, import_torchvision
from drifting_kd.perception import CLIP_MEAN, CLIP_STD, clip_score, load_clip, lpips_diversity, lpips_network
from drifting_kd.scores import EvaluateConfig, read_rows, write_row
from drifting_kd.evaluate import evaluate
from drifting_kd.images import to_rgb

TINY = dict(num_samples=300, batch_size=50, tracker="none", device="cpu", threads=1, metrics="")

def call(root, *words, **env):
    "A command in a process of its own, standing in the root."
    own = dict(DKD_ROOT=str(root), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", MPLBACKEND="agg",
               PYTHONPATH=str(ROOT), WANDB_MODE="offline")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | own | env
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=env, timeout=170)

def once(root, code="", launcher=(), **settings):
    return call(root, *launcher, ROOT / "tests/evaluate_once.py", "evaluate", json.dumps(TINY | settings), code)

def dkd(root, *words): return call(root, "-m", "drifting_kd.cli", *words)
def rows_of(root, run="toy"): return read_rows(root / "runs" / run / "eval/fid_metrics.csv")
def timeless(rows): return [{k: v for k, v in r.items() if k != "eval_seconds"} for r in rows]

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A root with a run of a generator and one of a classifier."
    root = tmp_path_factory.mktemp("evaluate")
    done = call(root, ROOT / "tests/evaluate_once.py", "train", json.dumps(dict(run_name="toy")))
    assert done.returncode == 0, done.stderr[-2000:]
    with environ(DKD_ROOT=root, IN_TEST="1"): done = train_classifier(run_name="judge", epochs=1)
    assert done.returncode == 0, done.stderr[-2000:]
    return root

@pytest.fixture
def root(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "root")
    return tmp_path / "root"

def refused(root, message, **settings):
    before = sorted(p for p in root.rglob("*"))
    with environ(DKD_ROOT=root), pytest.raises(LabError) as error:
        evaluate(EvaluateConfig(**TINY | dict(checkpoint="toy") | settings))
    assert message in str(error.value) and "\n" not in str(error.value), error.value
    assert sorted(p for p in root.rglob("*")) == before

# ---- as users run it

def test_notebook_table_and_skipping(root):
    words = [w for k, v in TINY.items() for w in ("-p", k, v if v != "" else "kid,prdc")]
    # without a checkpoint it takes the newest finished run of a generator: not the classifier
    done = dkd(root, "run", ROOT / "nbs/evaluate.ipynb", *words, "--output", root / "out.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    folder, rows = root / "runs/toy/eval", rows_of(root)
    kept = {p.stem for p in (root / "runs/toy/checkpoints").glob("step_*.pt")}
    assert len(rows) == 3 and {r["checkpoint_name"] for r in rows} == kept
    header = (folder / "fid_metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:13] == ("checkpoint checkpoint_name dataset epoch step num_samples batch_size alpha seed "
                           "eval_seconds extractor mode fid").split()
    assert header[-7:] == "loss drift_norm grad_norm feature_dist_mean feature_dist_var avg_loss avg_drift_norm".split()
    measured = "digits_fd digits_kid floor to_test precision loss drift_norm grad_norm prompt_accuracy".split()
    for r in rows:
        assert r["fid"] == r["kid"] == r["avg_loss"] == "nan" and all(math.isfinite(float(r[k])) for k in measured)
        facts = json.loads((folder / r["artifact"] / "eval_metadata.json").read_text())
        assert r["artifact"] == f"{r['checkpoint_name']}_step{r['step']}" and facts["run_config"]["run_name"] == "toy"
        assert facts["scores"]["digits_fd"] == float(r["digits_fd"])
        assert facts["torch_initial_seed"] == facts["seed"] == 42
        files = {p.name for p in (folder / r["artifact"]).iterdir() if p.name[0] != "."}
        assert files == {"preview.png", "neighbours.png", "eval_metadata.json"}
    assert (folder / "fid_vs_step.png").read_bytes().startswith(b"\x89PNG") and rows[0]["ema"] == "True"
    done = json.loads((root / "out.ipynb").read_text())["cells"]
    text = "".join("".join(o.get("text", "")) for c in done for o in c.get("outputs", []))
    best = min(rows, key=lambda r: float(r["digits_fd"]))
    assert f"best of 3: {best['checkpoint']}" in text and str(folder / "fid_metrics.csv") in text
    def state():
        pictures = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
        return (folder / "fid_metrics.csv").read_bytes(), pictures
    before = state()
    done = once(root, checkpoint="toy", metrics="kid,prdc")
    assert done.stdout.count("measured already") == 3 and state() == before, done.stderr
    done = once(root, checkpoint="toy", ema=False)  # the raw weights are other settings
    assert done.returncode == 0 and len(rows_of(root)) == 6, done.stderr
    assert {r["ema"] for r in rows_of(root)} == {"True", "False"}

def test_nothing_to_evaluate_says_what_to_do(tmp_path):
    refused(tmp_path, "no finished run of a generator", checkpoint="")

def test_command_line_distances(root):
    commands = [("reference", "digits", "ref.npz", "--split", "test"), ("fid", "digits:test", "nothing")]
    with ThreadPoolExecutor(2) as pool: made, missing = pool.map(lambda words: dkd(root, *words), commands)
    assert made.returncode == 0 and "digits:test" in made.stdout and (root / "ref.npz").exists(), made.stderr
    assert missing.returncode == 1 and "nothing does not exist" in missing.stderr, missing.stderr
    assert missing.stderr.count("\n") == 1, missing.stderr
    run = dkd(root, "fid", "ref.npz", "toy", "--n", 400)
    assert run.returncode == 0 and run.stdout.startswith("toy: final_model.pt, step "), run.stderr
    for words in (", alpha 1\ndigits-FD ", "real against real", "n=400 against 359"): assert words in run.stdout

@pytest.mark.slow
def test_a_tracker_run_of_its_own(root):
    pytest.importorskip("wandb")
    done = once(root, checkpoint="toy", tracker="wandb")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert list(json.loads((root / "runs/toy/tracker.json").read_text())) == ["schema", "wandb/evaluate"]
    assert len(list((root / "runs/toy/wandb").glob("offline-run-*"))) == 1

# ---- killed, side by side, by several processes

KILL = """
import os, signal
from drifting_kd.samples import State
real = State.save
def save(self, *rest):
    real(self, *rest)
    if self.done == 4: os.kill(os.getpid(), signal.SIGKILL)
State.save = save"""

def test_killed_evaluation_continues_to_the_bit(root):
    whole = root.parent / "whole"
    shutil.copytree(root, whole)
    checkpoint = sorted((root / "runs/toy/checkpoints").glob("step_*.pt"))[-1].name
    settings = dict(checkpoint=f"runs/toy/checkpoints/{checkpoint}", save_every=2, metrics="kid,prdc", save_images=True)
    assert once(root, KILL, **settings).returncode == -signal.SIGKILL
    folder = next((root / "runs/toy/eval").glob("step_*"))
    assert (folder / ".state/0-1/state.pt").exists() and not (root / "runs/toy/eval/fid_metrics.csv").exists()
    with ThreadPoolExecutor(2) as pool: again, other = pool.map(lambda r: once(r, **settings), (root, whole))
    assert again.returncode == other.returncode == 0, again.stderr + other.stderr
    assert "200 samples of an evaluation that was stopped" in again.stdout and "stopped" not in other.stdout
    assert timeless(rows_of(root)) == timeless(rows_of(whole)) and not (folder / ".state").exists()
    pictures = lambda r: {str(p.relative_to(r)): p.read_bytes() for p in (r / "runs/toy/eval").rglob("*.png")}
    assert pictures(root) == pictures(whole) and len(pictures(root)) == 303
    told = lambda r: json.loads(next((r / "runs/toy/eval").glob("step_*/eval_metadata.json")).read_text())
    assert (told(root)["continued_from"], told(whole)["continued_from"]) == (200, 0)
    assert told(root)["scores"]["eval_seconds"] > 0

def _write(table, who):
    for i in range(15):
        write_row(table, dict(checkpoint=f"{who}-{i}.pt", step=i, digits_fd=i + .5, **{f"only_{who}": i}))

def test_rows_of_six_processes(tmp_path):
    table, fork = tmp_path / "eval/fid_metrics.csv", multiprocessing.get_context("fork")  # imports torch once
    running = [fork.Process(target=_write, args=(table, i)) for i in range(6)]
    for p in running: p.start()
    for p in running: p.join(60)
    assert [p.exitcode for p in running] == [0] * 6
    rows = read_rows(table)
    assert sorted(r["checkpoint"] for r in rows) == sorted(f"{p}-{i}.pt" for p in range(6) for i in range(15))
    for r in rows:
        who = r["checkpoint"].split("-")[0]
        assert r[f"only_{who}"] == r["step"] == f"{float(r['digits_fd']) - .5:g}"
    assert [p.name for p in table.parent.iterdir() if p.name != ".table.lock"] == ["fid_metrics.csv"]

@pytest.mark.slow
def test_two_evaluations_share_a_folder_and_ranks_share_a_checkpoint(root):
    alone = root.parent / "alone"
    shutil.copytree(root, alone)
    with ThreadPoolExecutor(2) as pool: done = list(pool.map(lambda _: once(root, checkpoint="toy"), range(2)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert len(rows_of(root)) == 3 and sum(d.stdout.count("digits-FD") for d in done) >= 3
    last = sorted((root / "runs/toy/checkpoints").glob("step_*.pt"))[-1].relative_to(root)
    launcher = "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"
    done = once(alone, checkpoint=str(last), metrics="prdc", launcher=launcher)
    assert done.returncode == 0 and done.stdout.count("best of 1") == 1, done.stderr[-2000:]
    both, one = rows_of(alone)[0], next(r for r in rows_of(root) if r["checkpoint_name"] == last.stem)
    for key in ("digits_fd", "to_test", "feature_diversity", "variance_ratio", "nearest_ratio", "sample_diversity"):
        assert float(both[key]) == pytest.approx(float(one[key]), rel=1e-9)

GATHER = """
import sys, torch, torch.distributed as dist
from drifting_kd.samples import gather_moments
from drifting_kd.fid import Moments
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
x = torch.randn(1001, 24, generator=torch.Generator().manual_seed(3)) * 5 + 100
m = gather_moments(Moments(24, keep=True).add(x[:700] if rank == 0 else x[700:]))
one = Moments(24, keep=True).add(x)
near = lambda a, b: ((a - b).norm() / b.norm()).item()
assert m.n == 1001 and near(m.mean, one.mean) < 1e-12 and near(m.cov, one.cov) < 1e-12 and m.features.equal(x)
dist.destroy_process_group()"""  # one that outlives Python may abort it

def test_moments_of_two_processes_are_those_of_one():
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    def start(rank):
        command = [sys.executable, "-c", GATHER, str(rank), "29612"]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    running = [start(rank) for rank in (0, 1)]
    assert [(p.wait(100), p.stderr.read()[-500:])[0] for p in running] == [0, 0]

# ---- tables of before, wrong input

def test_old_table_is_kept(root, capsys):
    folder = root / "runs/toy/eval"
    folder.mkdir(exist_ok=True)
    (folder / "fid_metrics.csv").write_text("checkpoint,epoch,step,fid\n/old/place/ckpt_10.pt,1,10,31.5\n")
    with environ(DKD_ROOT=root): evaluate(EvaluateConfig(**TINY | dict(checkpoint="toy")))
    rows = rows_of(root)
    assert len(rows) == 4
    assert (rows[0]["checkpoint"], rows[0]["fid"], rows[0]["seed"]) == ("/old/place/ckpt_10.pt", "31.5", "nan")
    assert "best of 3: checkpoints/" in capsys.readouterr().out and not list(folder.glob("*broken*"))

@pytest.mark.parametrize("settings, message", [
    (dict(checkpoint="judge"), "makes no images"), (dict(dataset="shapes"), "has 3x32x32"),
    (dict(alpha=9.), "trained for 1 to 4"), (dict(checkpoint="toi"), "did you mean 'toy'"),
    (dict(extractor="judg"), "judg"), (dict(reference="no.npz"), "does not exist"),
    (dict(reference="cleanfid:cifar10"), "Inception's, not those of digits"),
    (dict(fid_mode="legacy_tensorflow"), "has no modes"), (dict(threads=1, device="cuda:7"), "not on this machine")])
def test_refused_before_anything_is_written(trained, settings, message): refused(trained, message, **settings)

def test_settings_that_make_no_sense():
    wrong = [(dict(num_samples=1), "between 2"), (dict(dataset_split="val"), "known: test, train"),
             (dict(metrics="fdi"), "fdi")]
    for settings, message in wrong:
        with pytest.raises(LabError, match=message): EvaluateConfig(**settings)

def test_damaged_checkpoint_and_truncated_reference(root):
    path = sorted((root / "runs/toy/checkpoints").glob("step_*.pt"))[0]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:len(content) // 2])
    refused(root, "truncated, damaged")
    (root / "half.npz").write_bytes(b"PK\x03\x04 and no more")
    path.write_bytes(content)
    refused(root, "half.npz", reference=str(root / "half.npz"))

def test_judge_of_ones_own(root):
    cfg = EvaluateConfig(**TINY | dict(checkpoint="toy", extractor="judge", dataset_split="test"))
    with environ(DKD_ROOT=root): found = evaluate(cfg)
    assert len(found.rows) == 3
    for r in found.rows:
        assert math.isfinite(float(r["judge_fd"])) and r["extractor"] == "judge" and r["to_test"] == r["judge_fd"]

# ---- words and perception, with random weights

@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    "A folder with a CLIP of random weights and a vocabulary of letters."
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    folder, letters = tmp_path_factory.mktemp("clip"), "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = [str(folder / "vocab.json"), str(folder / "merges.txt")]
    if transformers.__version__ < "5": tokenizer = transformers.CLIPTokenizer(*files)
    else: tokenizer = transformers.CLIPTokenizer(vocab=files[0], merges=files[1])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    first, last = len(words) - 2, len(words) - 1
    text = dict(vocab_size=len(words), max_position_embeddings=40, bos_token_id=first, eos_token_id=last)
    vision = dict(image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder

def test_clip_score_is_the_cosine_of_clips_own_logits(tiny_clip, monkeypatch):
    network, tokenizer = load_clip(str(tiny_clip))
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    captions = [f"a photo of {'abc'[i % 3] * (i + 1)}" for i in range(7)]
    pixels = ((images.numpy() / 255 - CLIP_MEAN) / CLIP_STD).transpose(0, 3, 1, 2)  # already 32 x 32
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad(): logits = network(**tokens, pixel_values=torch.from_numpy(pixels).float()).logits_per_image
    theirs = (logits.diagonal() / network.logit_scale.exp()).detach()
    for batch in (3, 64):
        ours = clip_score(images, captions, str(tiny_clip), batch_size=batch)
        assert ours == pytest.approx(theirs.mean().item(), abs=1e-5)
    assert clip_score(images, captions[::-1], (network, tokenizer)) != pytest.approx(theirs.mean().item(), abs=1e-4)
    assert -1 <= clip_score(images[..., :1], captions, (network, tokenizer)) <= 1  # grey
    for text in (str(tiny_clip / "no"), str(tiny_clip.parent)):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(LabError, match="model.safetensors.*into a folder") as error: load_clip(text)
        assert "\n" not in str(error.value)

def test_lpips_is_the_packages(monkeypatch, tmp_path):
    import_torchvision()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the package has the linear layers, not the trunk
        network = lpips.LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval()
    images, labels = torch.randint(0, 256, (6, 64, 64, 1), dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 1, 2])
    x = to_rgb(images).permute(0, 3, 1, 2) / 127.5 - 1
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and labels[i] == labels[j]]
    with torch.no_grad(): every = {(i, j): network(x[i:i + 1], x[j:j + 1]).item() for i, j in pairs}
    found = lpips_diversity(images, labels, 4000, net=network)
    # the first image is drawn evenly among those that have a partner
    by_first = np.mean([np.mean([v for (i, _), v in every.items() if i == k]) for k in range(5)])
    assert found == pytest.approx(by_first, rel=.03) and found == lpips_diversity(images, labels, 4000, net=network)
    assert lpips_diversity(images[:1].expand(4, -1, -1, -1), None, 20, net=network) == 0
    assert lpips_diversity(torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8), None, 5, net=network) > 0
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(LabError, match=f"alexnet-owt-7be5be79.pth into {tmp_path}"): lpips_network()
    with pytest.raises(LabError, match="'alx'"): lpips_network("alx")

def test_words_and_perception_in_a_row(root, tiny_clip, monkeypatch):
    import_torchvision()
    lpips = pytest.importorskip("lpips")
    def random_trunk(net, device): return lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr("drifting_kd.evaluate.lpips_network", random_trunk)
    with environ(DKD_ROOT=root), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = dict(checkpoint="toy", metrics="clip,lpips", clip_model=str(tiny_clip))
        found = evaluate(EvaluateConfig(**TINY | words))
    assert all(-1 <= float(r["clip_score"]) <= 1 and float(r["lpips_diversity"]) > 0 for r in found.rows)

def test_missing_packages_and_weights_are_told_before_sampling(trained, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    there = "into a folder and give the folder as clip_model"
    refused(trained, there if _there("transformers") else "transformers is not installed", metrics="clip")
    if not _there("lpips"): refused(trained, "lpips is not installed; pip install 'drifting_kd[text]'", metrics="lpips")

def _there(module):
    import importlib.util
    return importlib.util.find_spec(module) is not None
