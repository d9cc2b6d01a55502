"""The real trackers, offline and with a network that is dead, in processes of their own."""
import pytest
import contextlib, json, os, signal, socket, sqlite3, struct, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from conftest import train

SCRIPT = """
import sys, time, warnings
import numpy as np
from dataclasses import dataclass
import drifting_kd.run
from drifting_kd.core import Config, plain
from drifting_kd.run import Run
drifting_kd.run.environment = lambda *given: {}
from drifting_kd.track import start_tracker
name, resume = sys.argv[1], sys.argv[2] == "resume"
run = Run(Config(run_name="a", tracker=name, project="toy", resume=resume), "toy")
start = time.perf_counter()
tracker = start_tracker(name, run, plain(run.cfg) | {"model/size": 2.5}, resumed=run.resumed)
tracker.log({"model/size": 2.5}, 0)
for step in range(3 * resume, 3 * resume + 3):
    tracker.log({"train/loss": 1 / (step + 1), "dataset/name": "digits", "val/loss": float("nan")}, step)
    (run.path / "last.part").write_bytes(b"weights of step %d" % step)
    (run.path / "last.part").replace(run.path / "last.pt")
    tracker.artifact(run.path / "last.pt", "model-a+b", ("latest",))
    if step == 1: tracker.artifact(run.path / "last.pt", "model-a+b", ("best",))
    if "slowly" in sys.argv:  # each is sent before the next one is saved
        while tracker.calls.qsize(): time.sleep(.01)
        time.sleep(.1)
tracker.images("samples/grey", np.zeros((2, 8, 8, 1), np.uint8), ["a zero", "a one"], step)
tracker.log({"test/accuracy": .97}, step)
tracker.summary({"test/accuracy": .97})
for name in ("config.json", "environment.json"): tracker.file(run.path / name)
print("calls", time.perf_counter() - start)
tracker.finish()
run.close()
print("finished", time.perf_counter() - start)
"""
NAMES = {"train/loss", "dataset/name"}


def track(root, name, *words, wait="30", cwd=None, check=True, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO"))} | {
        "NETRC": str(root / "none"),
        "HOME": str(root / "home"),
        "DKD_ROOT": str(root),
        "DKD_TRACKER_WAIT": wait,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, *(words or ("new",))],
        env=clean | env,
        cwd=cwd or root,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done


def wandb_records(path) -> list:
    "What an offline run holds for `wandb sync`: the records of its log, in LevelDB's format."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, records, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7: at += 2**15 - at % 2**15  # no room for a header in this block
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        if not kind: break
        part += data[at + 7:at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
        at += 7 + length
    return records


def artifacts_in(path) -> list:
    """Name, alias, and the only file of each artifact in such a log: where it is, and what it should hold.

    wandb adds `latest` to whatever comes, so what is `latest` comes last."""
    found = [r.artifact for r in wandb_records(path) if r.WhichOneof("record_type") == "artifact"]
    return [(a.name, "best" if "best" in a.aliases else a.aliases[0], a.manifest.contents[0]) for a in found]


def seconds(done):
    return {
        line.split()[0]: float(line.split()[1])
        for line in done.stdout.splitlines()
        if line.startswith(("calls", "finished"))
    }


def test_wandb_offline_keeps_one_id_and_no_secrets(tmp_path):
    "No key: offline, nothing asked, nothing said, and nothing secret in any file of the run."
    cwd = tmp_path / "checkout"
    cwd.mkdir()
    subprocess.run(["git", "init", "-q", cwd], check=True)
    subprocess.run(
        ["git", "-C", cwd, "remote", "add", "origin", "https://user:planted-git-token@example.invalid/x.git"],
        check=True,
    )
    secrets = dict(MY_SERVICE_TOKEN="planted-env-secret", HF_TOKEN="planted-hf-secret")
    done = track(tmp_path, "wandb", "new", "--password=planted-argument", cwd=cwd, **secrets)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2, (done.stdout, done.stderr)
    saved = json.loads((tmp_path / "runs/a/tracker.json").read_text())["wandb"]["id"]
    track(tmp_path, "wandb", "resume", "--password=planted-argument", cwd=cwd, **secrets)
    files = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    logs = [p for p in files if p.suffix == ".wandb" and "latest-run" not in str(p)]
    assert len(logs) == 2 and all(saved in p.name for p in logs)      # two sessions, one tracker run
    assert (
        all(key.encode() in p.read_bytes() for p in logs for key in NAMES | {"test/accuracy", "samples/grey"})
        and b"a zero" in logs[0].read_bytes()
    )
    for p in files: assert b"planted" not in p.read_bytes(), p
    assert not [p for p in cwd.iterdir() if p.name != ".git"]         # nothing lands where the caller stands


def test_wandb_offline_holds_artifacts_and_files(tmp_path):
    """For a later `wandb sync`: each save is a record, and the newest file of each alias stays as it was recorded.

    A superseded one goes, and nothing lies in the home folder."""
    pytest.importorskip("wandb")
    import base64, hashlib
    (tmp_path / "home").mkdir()
    for word in ("new", "resume"):
        done = track(tmp_path, "wandb", word, "slowly", wait="60")
        assert done.stderr == "", done.stderr
    run = tmp_path / "runs/a"
    (run / "last.pt").unlink()                                                    # and what was held stays
    first, second = sorted(p for p in run.glob("wandb/offline-run-*/*.wandb"))
    for log, aliases, kept in (
        (first, ["latest", "latest", "best", "latest"], {"best": b"weights of step 1"}),
        (second, ["latest"] * 3, {"latest": b"weights of step 5"}),
    ):
        found = artifacts_in(log)
        assert [alias for _, alias, _ in found] == aliases and {name for name, *_ in found} == {"model-a_b"}
        there = {}
        for _, alias, entry in found:
            held = tmp_path.joinpath(entry.local_path)
            assert held.is_absolute() and held.is_relative_to(run / "wandb/held") and entry.path == "model-a_b.pt"
            if not held.exists(): continue
            digest = base64.b64encode(hashlib.md5(held.read_bytes()).digest()).decode()
            assert digest == entry.digest
            there[alias] = held.read_bytes()
        assert there == kept
        records = {str(f.path) for r in wandb_records(log) for f in r.files.files}
        assert {"config.json", "environment.json"} <= records
        assert {"config.json", "environment.json"} <= {p.name for p in (log.parent / "files").iterdir()}
    assert len([p for p in (run / "wandb/held").rglob("*") if p.is_file()]) == 2
    assert not list((tmp_path / "home").rglob("*")), list((tmp_path / "home").rglob("*"))
    known = json.loads((tmp_path / "runs/artifacts.json").read_text())["artifacts"]
    assert known["model-a+b:latest"]["sha256"] == hashlib.sha256(b"weights of step 5").hexdigest()


def test_a_killed_run_has_its_checkpoints(lab):
    "In the local index and at the tracker, which is real and offline."
    pytest.importorskip("wandb")
    settings = dict(tracker="wandb", run_name="killed", limit=200, epochs=5000, eval_every=10, keep_last=1)
    process = train(wait=False, **settings)
    index, end = lab / "runs/artifacts.json", time.time() + 120
    def told() -> list:
        "The aliases in the tracker's log so far; wandb writes it in a thread of its own, in blocks."
        with contextlib.suppress(Exception):  # the last block may be half written
            log, = (lab / "runs/killed/wandb").glob("offline-run-*/*.wandb")
            return [alias for _, alias, _ in artifacts_in(log)]
        return []
    def enough(aliases: list) -> bool: return len(aliases) > 2 and "best" in aliases
    while time.time() < end and process.poll() is None and not enough(told()): time.sleep(.2)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (lab / "runs/killed/metrics.json").exists()
    assert set(json.loads(index.read_text())["artifacts"]) == {"model-killed:best", "model-killed:latest"}
    log, = (lab / "runs/killed/wandb").glob("offline-run-*/*.wandb")
    found = artifacts_in(log)
    assert {alias for _, alias, _ in found} == {"best", "latest"}
    assert len(found) > 2, "only at the end"
    files = {path.name for r in wandb_records(log) for path in (lab.joinpath(f.path) for f in r.files.files)}
    assert {"config.json", "environment.json", "splits.npz"} <= files


def test_wandb_key_never_reaches_the_run_folder(tmp_path):
    key = "planted0" * 5
    done = track(tmp_path, "wandb", WANDB_API_KEY=key, WANDB_MODE="offline")
    assert done.stderr == ""
    for p in (tmp_path / "runs").rglob("*"): assert not p.is_file() or key.encode() not in p.read_bytes(), p


def test_wandb_with_a_key_and_no_network(tmp_path):
    "A server that accepts and never answers: the loop doesn't notice, `finish` gives up, the process ends."
    server = socket.create_server(("127.0.0.1", 0))
    kept = []
    def accept():
        while True:
            try: kept.append(server.accept())
            except OSError: return
    threading.Thread(target=accept, daemon=True).start()
    env = dict(WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}")
    start = time.perf_counter()
    done = track(tmp_path, "wandb", wait="2", **env)
    took = time.perf_counter() - start
    assert (
        done.stderr.count("UserWarning") == 1 and "did not finish in 2 s" in done.stderr and "wandb sync" in done.stderr
    ), done.stderr
    assert seconds(done)["calls"] < 1 and seconds(done)["finished"] < 4 and took < 12, (took, done.stdout)
    done = track(tmp_path, "wandb", "resume", wait="60", WANDB_INIT_TIMEOUT="3", **env)
    assert done.stderr.count("UserWarning") == 1 and "could not go online" in done.stderr, done.stderr
    offline = [p for p in (tmp_path / "runs/a/wandb").glob("offline-run-*/*.wandb")]
    assert len(offline) == 1 and b"train/loss" in offline[0].read_bytes()
    server.close()


class Wandb(BaseHTTPRequestHandler):
    "A wandb server that lets a run start and then answers nothing any more."
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"]))) if self.path == "/graphql" else {}
        query, given = asked.get("query", ""), asked.get("variables", {})
        project = {"id": "p", "name": "toy", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query: data = {"model": project | {"bucket": None}}
        elif "UpsertBucket" in query:
            bucket = {"id": "x", "name": given["name"], "displayName": "a", "description": None, "config": "{}"}
            bucket |= {"sweepName": None, "historyLineCount": 0, "project": project}
            data = {"upsertBucket": {"inserted": True, "bucket": bucket}}
        else: time.sleep(60)
        text = json.dumps({"data": data}).encode()
        self.send_response(200)
        for header in (("Content-Type", "application/json"), ("Content-Length", str(len(text)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *words): pass


def test_wandb_that_loses_its_connection(tmp_path):
    """Online at first, then silence: one warning, and the process ends (the last 32 kB of wandb's own log may be lost
    with it; metrics.jsonl has all)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = time.perf_counter()
    done = track(
        tmp_path, "wandb", wait="4", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}"
    )
    assert (
        done.stderr.count("UserWarning") == 1 and "did not finish in 4 s" in done.stderr and "wandb sync" in done.stderr
    ), done.stderr
    assert seconds(done)["finished"] < 6 and time.perf_counter() - start < 14                   # the process ended, too
    server.shutdown()


def test_trackio_is_local(tmp_path):
    pytest.importorskip("trackio")
    track(tmp_path, "trackio")
    done = track(tmp_path, "trackio", "resume")
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2, (done.stdout, done.stderr)
    with sqlite3.connect(tmp_path / "runs/trackio/toy.db") as db:
        rows = db.execute("select run_name, step, cast(metrics as text) from metrics").fetchall()
        configs = [json.loads(c) for c, in db.execute("select cast(config as text) from configs")]
        versions = db.execute("select name, type from artifacts").fetchall()
    assert {r[0] for r in rows} == {"a"} and {s for _, s, m in rows if "train/loss" in m} == set(range(6))
    text = " ".join(r[2] for r in rows)
    assert all(key in text for key in NAMES | {"test/accuracy", "samples/grey", "a zero"})
    points = [k for _, _, m in rows for k, v in json.loads(m).items() if isinstance(v, (int, float))]
    assert {k for k in points if points.count(k) == 1} == set(), points      # curves, and no chart with one point
    assert configs[0]["model/size"] == 2.5 and "| test/accuracy | 0.97 |" in text
    assert {("model-a_b", "model"), ("a-config.json", "file"), ("a-environment.json", "file")} <= set(versions)


def test_mlflow_is_local(tmp_path):
    pytest.importorskip("mlflow")
    track(tmp_path, "mlflow")
    done = track(tmp_path, "mlflow", "resume")
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2, (done.stdout, done.stderr)
    with sqlite3.connect(tmp_path / "runs/mlruns.db") as db:
        assert db.execute("select count(*) from runs").fetchone() == (1,)
        assert db.execute("select step from metrics where key = 'train/loss' order by step").fetchall() == [
            (i,) for i in range(6)
        ]
        assert db.execute("select value from tags where key = 'dataset/name'").fetchall() == [("digits",)]
        assert db.execute("select value from params where key = 'run_name'").fetchall() == [("a",)]
        assert db.execute("select status from runs").fetchone() == ("FINISHED",)
    kept = {p.name for p in (tmp_path / "runs/mlartifacts").rglob("*")}
    assert {"summary.json", "config.json", "environment.json", "step00000002_0.png"} <= kept
    with sqlite3.connect(tmp_path / "runs/mlruns.db") as db:
        tags = dict(db.execute("select key, value from tags where key like 'artifact.%'").fetchall())
    assert tags == {f"artifact.model-a_b.{alias}": str(tmp_path / "runs/a/last.pt") for alias in ("best", "latest")}


def test_artifacts_of_many_processes(tmp_path):
    "None of the entries that processes write at the same time is lost."
    script = (
        "import sys; from drifting_kd.track import index_artifact; "
        "[index_artifact(sys.argv[1], f'm{sys.argv[2]}-{i}') for i in range(20)]"
    )
    (tmp_path / "m.pt").write_bytes(b"x")
    env = os.environ | {"DKD_ROOT": str(tmp_path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "m.pt"), str(n)], env=env) for n in range(3)
    ]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    index = json.loads((tmp_path / "runs/artifacts.json").read_text())["artifacts"]
    assert set(index) == {f"m{n}-{i}:latest" for n in range(3) for i in range(20)}


LISTEN = """
import json
from drifting_kd import track
class Listener(track.Backend):
    def open(self): self.out = open(self.run.path / "heard.jsonl", "w")
    def write(self, *call): print(json.dumps(call), file=self.out, flush=True)
    def log(self, metrics, step): self.write("log", step, metrics)
    def images(self, key, images, captions, step): self.write("images", step, key, [i.shape for i in images], captions)
    def summary(self, values): self.write("summary", values)
    def file(self, path): self.write("file", path.name)
    def artifact(self, path, name, aliases, kind): self.write("artifact", name, *aliases)
track.BACKENDS["none"] = Listener
"""
GENERATED = dict(family="drift", limit=0, steps=20, warmup=2, eval_every=10, batch_size=100, positives=8,
                 unconditional=4, eval_samples=100, num_samples=100, epochs=1)


@pytest.mark.parametrize("method", ["class", "joint"])
def test_previews_of_generators_reach_the_tracker(lab, method):
    "Pictures with a caption each, at every evaluation, and the files and checkpoints of the run."
    done = train(LISTEN, run_name="made", method=method, **GENERATED)
    assert done.returncode == 0, done.stderr
    heard = [json.loads(line) for line in (lab / "runs/made/heard.jsonl").read_text().splitlines()]
    shown = [call[1:] for call in heard if call[0] == "images"]
    words = [str(c) for c in range(10) for _ in range(2)] if method == "class" else ["any"] * 10
    assert shown == [[step, "eval/samples", [[8, 8]] * len(words), words] for step in (10, 20)]
    assert len(list((lab / "runs/made/samples").glob("*.png"))) == 2
    assert [c[1] for c in heard if c[0] == "file"] == ["config.json", "environment.json", "splits.npz"]
    assert [c[2] for c in heard if c[0] == "artifact"].count("latest") == 2
    assert {"test/digits_fd", "checkpoint_path", "model_name"} <= set(next(c[1] for c in heard if c[0] == "summary"))


def test_a_student_tells_who_taught_it(lab):
    "In the run's own summary, and its own loss on validation at every evaluation."
    done = train(LISTEN, family="distill", run_name="taught", limit=200, val_fraction=.3, batch_size=40, model="judge",
                 teacher_models="judge judge", teacher_epochs=2, baseline=False)
    assert done.returncode == 0, done.stderr
    heard = [json.loads(line) for line in (lab / "runs/taught/heard.jsonl").read_text().splitlines()]
    told = next(c[1] for c in heard if c[0] == "summary")
    assert told["checkpoint_path"] == "checkpoints/best.pt" and told["model_name"] == "judge"
    assert len(told["teachers"]) == 2 and told["kd_method"] == "dynamic" and told["temperature"] > 0
    losses = [c[2]["val/loss_total"] for c in heard if c[0] == "log" and "val/loss" in c[2]]
    assert len(losses) == 3 and told["val/loss_total"] in losses
