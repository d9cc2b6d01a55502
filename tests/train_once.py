"python tests/train_once.py '{\"epochs\": 3}' [code]: one training in a process of its own; exit code 1 and one line on an error."
import json, sys
from drifting_kd.core import LabError
from drifting_kd.train import Classify, TrainConfig, classifier, fit, open_run, prepare

def main() -> None:
    settings = json.loads(sys.argv[1])
    if len(sys.argv) > 2: exec(sys.argv[2], globals())
    cfg = TrainConfig(**settings)
    data = prepare(cfg)
    model = classifier(cfg, data)
    fit(Classify(model, data, cfg), cfg, open_run(cfg))

if __name__ == "__main__":
    try: main()
    except LabError as e: sys.exit(f"{type(e).__name__}: {e}")
