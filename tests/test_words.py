"""A word that is both a run and a folder: every command opens the same network."""
import json
import pytest
import torch
from conftest import train
from drifting_kd.landscape import solution
from drifting_kd.checkpoints import CHECKPOINT_KEYS, find, find_all, frozen, load_checkpoint, weights_sha256
from drifting_kd.cli import main
from drifting_kd.data import load_dataset
from drifting_kd.extractors import as_judge
from drifting_kd.generators import create_generator
from drifting_kd.teachers import load_teacher


def other_weights(content: dict) -> dict:
    "The same network with other weights."
    draw = torch.Generator().manual_seed(0)
    moved = {k: v + .1 * torch.randn(v.shape, generator=draw) if v.is_floating_point() and v.ndim > 1 else v
             for k, v in content["model"].items()}
    return content | dict(model=moved)


@pytest.fixture
def both(lab, monkeypatch):
    "`classifier` and `generator` are runs, and also folders where the caller stands."
    done = train(run_name="classifier", epochs=1)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = create_generator("mlp")
    facts = dict(config=dict(dataset="digits"), task={}, metrics={}, step=3, epoch=1.)
    content = dict.fromkeys(CHECKPOINT_KEYS) | model.spec | facts | dict(model=model.state_dict())
    (lab / "runs/generator").mkdir()
    for name in ("config", "metrics"): (lab / f"runs/generator/{name}.json").write_text(json.dumps(dict(kind="drift")))
    torch.save(content, lab / "runs/generator/final_model.pt")
    here = lab / "elsewhere"
    for name in ("classifier", "generator"):
        (here / name).mkdir(parents=True)
        torch.save(other_weights(load_checkpoint(lab / f"runs/{name}/final_model.pt")), here / name / "final_model.pt")
        for part in ("config", "metrics"): (here / name / f"{part}.json").write_text("{}")  # a copied run
    monkeypatch.chdir(here)
    return lab


def test_every_command_opens_the_same(both, capsys):
    data = load_dataset("digits", limit=300)

    def dkd(*words):
        "The numbers that a command prints."
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()[1:]

    def sha(model): return weights_sha256(model, (), ())

    commands = dict(
        classifier=[lambda x: sha(find(x).model), lambda x: {c.home for c in find_all(x)}, lambda x: frozen(x).sha256,
                    lambda x: sha(solution(x).model), lambda x: load_teacher(x, data).net.sha256,
                    lambda x: as_judge(x).sha256, lambda x: dkd("evaluate", x)],
        generator=[lambda x: sha(find(x).model), lambda x: {c.home for c in find_all(x)},
                   lambda x: dkd("fid", "digits:test", x, "--n", 64, "--device", "cpu")])
    for word, functions in commands.items():
        for do in functions:
            run, folder = do(word), do(f"./{word}")
            there = both / f"runs/{word}"
            assert run == do(there / "final_model.pt") == do(f"runs/{word}") == do(str(there))
            assert folder == do(both / f"elsewhere/{word}/final_model.pt") == do(f"{word}/final_model.pt")
            assert run != folder


def test_a_word_that_means_nothing(both, capsys):
    for words in (("evaluate", "clasifier"), ("fid", "digits:test", "generatr")):
        assert main(list(words)) == 1
        said = capsys.readouterr().err
        assert said.startswith("dkd: ") and said.count("\n") == 1, said
