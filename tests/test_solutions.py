"""solutions.ipynb as its users run it: networks of finished runs compared, every number checked against the library's
own, and what cannot be compared refused in one line."""
import itertools, json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import matplotlib
import numpy as np
import pytest
from conftest import ROOT, train
from drifting_kd.analysis import judge_split, layer_history
from drifting_kd.landscape import loss_of, sharpness, solution
from drifting_kd.solutions import (
    PAIR_KINDS, barrier, cka_matrix, layer_features, linear_cka, match_weights, reestimate_batchnorm, unit_filters)
from drifting_kd.core import LabError
from drifting_kd.run import read_metrics
from drifting_kd.sources import permutation
from drifting_kd.data import Batches, load_dataset
from drifting_kd.checkpoints import frozen
from drifting_kd.metrics import holm

QUICK = dict(images=60, iterations=4, points=3, pairs=1, surface=3)

def dkd(*words):
    return subprocess.run(
        [sys.executable, "-m", "drifting_kd.cli", "run", str(ROOT / "nbs" / "solutions.ipynb"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )

def play(**parameters) -> None:
    "The notebook's code cells in one namespace, without a kernel."
    names = {"__name__": "solutions"}
    with matplotlib.rc_context():
        for c in json.loads((ROOT / "nbs/solutions.ipynb").read_text())["cells"]:
            if c["cell_type"] == "code":
                exec("".join(c["source"]).replace("from IPython.display import display", "display = print"), names)
            if "parameters" in c["metadata"].get("tags", []): names.update(QUICK | parameters)

@pytest.fixture
def runs(lab):
    made = [
        dict(optimizer=o, seed=s, run_name=f"toy-{o}-s{s}", epochs=2, layer_norms=True)
        for o in ("sgd", "adamw")
        for s in (0, 1)
    ] + [dict(run_name="deep-s0", model="resnet14", epochs=1)]
    with ThreadPoolExecutor(2) as pool:
        assert not [p.stderr for p in pool.map(lambda m: train(**m), made) if p.returncode]
    return lab

def check_each_network(runs, tables, nets, train_loss, test):
    "Accuracy and calibration are the runs' own; sharpness is of the training loss."
    for row in tables["networks"]:
        summary = json.loads((runs / "runs" / row["run"] / "metrics.json").read_text())
        assert row["weights"] == "final_model" and (row["test_accuracy"], row["ece"]) == pytest.approx(
            (summary["test/last_accuracy"], summary["test/last_ece"]), abs=1e-5
        )
        assert row["train_loss"] == pytest.approx(train_loss(nets[row["run"]]), rel=1e-4)
    row, sharp = tables["networks"][0], sharpness(nets[tables["networks"][0]["run"]], train_loss, 4, tol=.02)
    assert (row["sharpness"], row["sharpness_residual"]) == pytest.approx((sharp.eigenvalue, sharp.residual), rel=.01)
    for label in ("adamw", "sgd"):
        clean = np.mean(
            [
                (judge_split(frozen(name), test)[0].argmax(1) == test.labels.numpy()).mean()
                for name in nets
                if label in name
            ]
        )
        assert [r["mean"] for r in tables["robustness"] if r["group"] == label and r["severity"] == 0] == pytest.approx(
            [clean] * 3
        )  # noise, blur and contrast

def check_answers(tables, nets, truth, whole):
    "Disagreement, what the accuracy gap forces, and which pairs are of which kind, from the predictions."
    said = {name: judge_split(frozen(name), whole)[0].argmax(1) for name in nets}
    apart = {pair: (said[pair[0]] != said[pair[1]]).mean() for pair in itertools.combinations(said, 2)}
    gap = {(a, b): abs((said[a] == truth).mean() - (said[b] == truth).mean()) for a, b in apart}
    of = dict(
        zip(
            PAIR_KINDS,
            (
                lambda a, b: a[:-1] == b[:-1],
                lambda a, b: a[:-1] != b[:-1] and a[-1] != b[-1],
                lambda a, b: a[:-1] != b[:-1] and a[-1] == b[-1],
            ),
        )
    )
    rows = {r["measure"]: r for r in tables["separation"]}
    for kind, belongs in of.items():
        assert rows["disagreement"][kind] == pytest.approx(np.mean([v for pair, v in apart.items() if belongs(*pair)]))
        assert rows["disagreement beyond the accuracy gap"][kind] == pytest.approx(
            np.mean([v - gap[pair] for pair, v in apart.items() if belongs(*pair)])
        )
    assert (
        rows["disagreement"]["p"] >= rows["disagreement"]["least_p"] == 0.5
    )  # two groups, two seeds: two ways to deal in each, and the names may be swapped
    assert [r["p_holm"] for r in tables["pairs"]] == pytest.approx(
        [*holm([tables["pairs"][0]["p"]]), *holm([tables["pairs"][1]["p"]])]
    ) and tables["pairs"][0]["p"] == rows["disagreement"]["p"]
    across = {(r["one"], r["other"]): r for r in tables["disagreement"]}
    assert (
        across["adamw", "sgd"]["n"] == 4 and across["sgd", "sgd"]["n"] == 1 and 0 < across["adamw", "sgd"]["mean"] < 1
    )
    wrong = np.mean(
        [((said[a] != truth) & (said[b] != truth) & (said[a] != said[b])).mean() for a, b in apart if a[:-1] != b[:-1]]
    )
    assert across["adamw", "sgd"]["both_wrong"] == pytest.approx(wrong) and across["adamw", "sgd"][
        "beyond"
    ] == pytest.approx(across["adamw", "sgd"]["mean"] - across["adamw", "sgd"]["gap"])

def check_layers_and_walls(found, nets, train_loss, test_loss):
    tables = found["tables"]
    a, b = found["layer_cka"]["a"], found["layer_cka"]["b"]
    assert (a, b) == ("toy-adamw-s0", "toy-sgd-s0") and np.array(found["layer_cka"]["cka"]) == pytest.approx(
        cka_matrix(nets[a], nets[b], test_loss.batches, found["layer_cka"]["layers"]), abs=1e-4
    )
    head = {name: layer_features(net, test_loss.batches, ["head"])["head"] for name, net in nets.items()}
    far = {r["measure"]: r for r in tables["separation"]}["1 - CKA of head"]
    assert far[PAIR_KINDS[0]] == pytest.approx(
        np.mean([1 - linear_cka(head[f"toy-{o}-s0"], head[f"toy-{o}-s1"]) for o in ("adamw", "sgd")]), abs=1e-4
    )
    walls = tables["walls"]
    kinds = [(w["kind"], w["one"], w["other"], w["how"]) for w in walls]
    assert len(set(kinds)) == len(kinds) == 8 and all(
        w["alphas"] == [0, 0.5, 1] and w["one"] in w["a"] and w["other"] in w["b"] for w in walls
    )  # each group, and the two groups in both kinds: as they are and matched
    for w in walls[:2]:  # of the first pair, both ways
        one, other = unit_filters(nets[w["a"]]), unit_filters(nets[w["b"]])
        line = barrier(
            one, match_weights(one, other) if w["how"] == "matched" else other, test_loss, [0.5], train_loss.batches
        )
        assert w["losses"] == pytest.approx(line["losses"], rel=1e-3) and w["barrier"] == pytest.approx(
            line["barrier"], abs=1e-3
        )
        assert w["losses"][0] == pytest.approx(
            test_loss(reestimate_batchnorm(nets[w["a"]], train_loss.batches)), rel=1e-2
        )  # unit filters change no function
    assert abs(walls[0]["losses"][1] - walls[1]["losses"][1]) > 1e-3  # matching did something
    for r in tables["barriers"]:
        assert (r["mean"], r["least"], r["most"]) == pytest.approx(
            tuple(
                f([w["barrier"] for w in walls if (w["kind"], w["how"]) == (r["kind"], r["how"])])
                for f in (np.mean, min, max)
            )
        )
    assert found["surfaces"]["sgd"]["losses"][1][1] == pytest.approx(
        train_loss(nets["toy-sgd-s0"]), rel=1e-4
    ) and np.shape(found["surfaces"]["adamw"]["losses"]) == (3, 3)

def test_networks_of_runs_are_compared_or_refused(runs, capsys):
    whole = dkd(
        "-p", "pattern", "toy-*", "-p", "name", "toy", *(word for k, v in QUICK.items() for word in ("-p", k, v))
    )
    assert whole.returncode == 0, whole.stderr
    found = json.loads((runs / "figures" / "toy.json").read_text())
    assert (
        len(found["runs"]) == 4
        and all((runs / "figures" / name).stat().st_size > 1000 for name in found["figures"])
        and {f"toy_{n}.png" for n in ("barriers", "layers", "norms", "surface_sgd", "disagreement")}
        <= set(found["figures"])
    )
    nets = {f"toy-{o}-s{s}": solution(f"toy-{o}-s{s}").model for o in ("adamw", "sgd") for s in (0, 1)}
    data, first = load_dataset("digits", limit=300), solution("toy-sgd-s0")
    train_images, test_images = (split.take(permutation(len(split), 0)[:60]) for split in (data.train, data.test))
    train_loss, test_loss = (
        loss_of(Batches(split, 60, 0, augment=False, shuffle=False, drop_last=False), first.mean, first.std)
        for split in (train_images, test_images)
    )
    check_each_network(runs, found["tables"], nets, train_loss, test_images)
    check_answers(found["tables"], nets, data.test.labels.numpy(), data.test)
    check_layers_and_walls(found, nets, train_loss, test_loss)
    last = {(r["run"], r["kind"]): r for r in found["tables"]["norms"]}
    for name in nets:
        logged = layer_history(read_metrics(runs / "runs" / name), "weight_norm")
        assert (
            last[name, "weight_norm"]["value"]
            == pytest.approx(np.linalg.norm([values[-1] for _, values in logged.values()]))
            and (name, "activation_rms") in last
        )
    assert (
        any(line.startswith("barrier, other group, same seed, matched") for line in found["conclusions"])
        and "compare them also at matched quality" in whole.stdout
    )

    right = {
        run: {
            f"step_{m['step']:08d}": m["val/accuracy"] for m in read_metrics(runs / "runs" / run) if "val/accuracy" in m
        }
        for run in ("toy-adamw-s0", "toy-sgd-s0")
    }
    gap, at = min(
        (abs(a - b), (a + b) / 2)
        for a, b in itertools.product(right["toy-adamw-s0"].values(), list(right["toy-sgd-s0"].values())[:-1])
    )
    assert gap < .1, right
    play(pattern="toy-*-s0", name="early", at=at)  # one seed of each
    heard = capsys.readouterr().out
    assert (
        "nothing to compare with" in heard
        and f"kept checkpoint with a validation accuracy nearest to {at:.4g}" in heard
    )
    found = json.loads((runs / "figures" / "early.json").read_text())
    assert all(r["p"] is None for r in found["tables"]["separation"])
    assert found["tables"]["networks"][1]["weights"] != max(right["toy-sgd-s0"])  # no last one
    for row in found["tables"]["networks"]:
        folder = runs / "runs" / row["run"] / "checkpoints"
        assert right[row["run"]][row["weights"]] == row["val_accuracy"] and abs(row["val_accuracy"] - at) == min(
            abs(v - at) for v in right[row["run"]].values()
        )
        assert row["train_loss"] == pytest.approx(train_loss(solution(folder / f"{row['weights']}.pt").model), rel=1e-4)
    for parameters, messages in (
        (
            dict(pattern="toy-*", at=0.9999),
            ["run toy-adamw-s0 kept no checkpoint with val/accuracy within 0.05 of 0.9999"],
        ),
        (dict(pattern="toy-sgd-s0,deep-s0", by="model"), ["resnet8", "resnet14"]),
        (dict(pattern="toi-*"), ["toi-*"]),
    ):
        with pytest.raises(LabError) as error:
            play(**parameters)
        assert all(m in str(error.value) for m in messages) and "\n" not in str(error.value)
