"""One training in a process of its own: python tests/train_once.py '{"epochs": 3}' [code]

Exit code 1 and one line on an error. "family": "drift" and "diffuse" train generators, "distill" a student.
"""

import atexit, json, os, sys
from drifting_kd.core import LabError
from drifting_kd.train import fit, open_run
from drifting_kd.classify import Classify, TrainConfig, classifier, prepare

def main() -> None:
    settings = json.loads(sys.argv[1])
    family = settings.pop("family", "classify")
    if len(sys.argv) > 2: exec(sys.argv[2], globals())
    if family == "drift":
        from drifting_kd.drifting import Drift as Task, DriftConfig as Config, drifter as make
    elif family == "diffuse":
        from drifting_kd.diffusion import Diffuse as Task, DiffuseConfig as Config, denoiser as make
    elif family == "distill":
        from drifting_kd.distill import Distill as Task, DistillConfig as Config
        make = classifier
    else: Task, Config, make = Classify, TrainConfig, classifier
    cfg = Config(**settings)
    data = prepare(cfg)
    model = make(cfg, data)
    fit(Task(model, data, cfg), cfg, open_run(cfg))

def told() -> None:
    try: main()
    except LabError as e: sys.exit(f"{type(e).__name__}: {e}")

def in_fork(words: list[str], env: dict, *pipes) -> None:
    "The same in a fork of a process that has imported everything."
    os.setsid()
    sys.argv[1:] = words
    os.environ.clear(), os.environ.update(env)
    for fd, pipe in enumerate(pipes, 1):
        os.dup2(pipe.fileno(), fd)
        pipe.close()
    try: told()
    finally: atexit._run_exitfuncs()

if __name__ == "__main__": told()
