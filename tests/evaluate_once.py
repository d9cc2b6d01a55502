"""python tests/evaluate_once.py train|evaluate '{"num_samples": 300}' [code]

One training of a toy generator, or one evaluation, in a process of its own.
"""
import json, sys
import torch
from drifting_kd.core import LabError
from drifting_kd.run import Run
from drifting_kd.data import Batches
from drifting_kd.generators import create_generator
from drifting_kd.train import Task, fit
from drifting_kd.classify import TrainConfig, prepare
from drifting_kd.scores import EvaluateConfig
from drifting_kd.evaluate import evaluate

class Imitate(Task):
    "Each sample goes to its class's mean image plus some noise."
    monitor, shown = ("val/loss", "min"), "train/drift_norm"
    def __init__(self, model, data, cfg):
        super().__init__(model)
        x = data.train.images.permute(0, 3, 1, 2) / 127.5 - 1
        self.data, self.cfg, self.means = data, cfg, torch.stack([x[data.train.labels == c].mean(0) for c in range(10)])

    def batches(self, epoch):
        cfg = self.cfg
        return Batches(self.data.train, cfg.batch_size, cfg.seed, epoch, augment=False, device=self.device)

    def loss(self, batch, step):
        noise, spread = torch.randn(len(batch.y), 32), torch.randn(len(batch.y), 1, 1, 1)
        error = self.model(noise, batch.y, 1.5) - (self.means[batch.y] + .1 * spread).clamp(-1, 1)
        return error.square().mean(), {"train/drift_norm": error.flatten(1).norm(dim=1).mean()}

def train(settings: dict) -> None:
    tiny = dict(tracker="none", device="cpu", threads=1, epochs=3, batch_size=100, ema_decay=.9, keep_last=3,
                optimizer="adamw", log_every=5)
    cfg = TrainConfig(**tiny | settings)
    data = prepare(cfg)
    fit(Imitate(create_generator("mlp", 10, 1, 8, 1., 4.), data, cfg), cfg, Run(cfg, "imitate"))

if __name__ == "__main__":
    what, settings = sys.argv[1], json.loads(sys.argv[2])
    if len(sys.argv) > 3: exec(sys.argv[3], globals())
    try:
        if what == "train": train(settings)
        else: evaluate(EvaluateConfig(**dict(tracker="none", device="cpu", threads=1) | settings))
    except LabError as e: sys.exit(f"{type(e).__name__}: {e}")
