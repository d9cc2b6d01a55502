"""The real trackers, offline and with a network that is dead, in processes of their own."""
import pytest
import json, os, socket, sqlite3, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
tracker = start_tracker(name, run, plain(run.cfg), resumed=run.resumed)
for step in range(3 * resume, 3 * resume + 3):
    tracker.log({"train/loss": 1 / (step + 1), "dataset/name": "digits", "val/loss": float("nan")}, step)
tracker.images("samples/grey", np.zeros((2, 8, 8, 1), np.uint8), ["a zero", "a one"], step)
(run.path / "final_model.pt").write_bytes(b"weights")
tracker.summary({"test/accuracy": .97})
tracker.file(run.path / "config.json")
tracker.artifact(run.path / "final_model.pt", "model-a", ("best", "latest"))
print("calls", time.perf_counter() - start)
tracker.finish()
run.close()
print("finished", time.perf_counter() - start)
"""
NAMES = {"train/loss", "dataset/name"}


def track(root, name, *words, wait="30", cwd=None, check=True, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO"))} | {
        "NETRC": str(root / "none"),
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
    assert {r[0] for r in rows} == {"a"} and {s for _, s, m in rows if "train/loss" in m} == set(range(6))
    text = " ".join(r[2] for r in rows)
    assert all(key in text for key in NAMES | {"test/accuracy", "samples/grey", "a zero"})


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
    assert {"summary.json", "config.json", "step00000002_0.png"} <= kept


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
