"""Fine-tuning learns, repeats, leaves the network alone, and gives each layer its rate."""

import copy
import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, call_both, call_json, logged

from images import ImageSet
from model import Config, Transformer
from objectives import from_options
from run import Run, Settings
from tasks import finetune, glue, probe
from tasks.finetune import DropPath, Protocol
from util import BadInput

QUICK = Protocol(lr=1e-2, pool="mean", attention="full", epochs=4, batch_size=8)


@pytest.fixture
def run(make_run):
    """A small network in float32 over bytes, sequences of 24."""
    return make_run(from_options("mlm"), "mask", vocab=257, length=24, scale=1.0, dtype=torch.float32)


def texts(run, count):
    """Random texts, and what `fine_tune` reads of them."""
    rng = np.random.default_rng(0)
    found = ["".join(rng.choice(list("abcdef "), rng.integers(1, 8))) for _ in range(count)]
    return found, probe.prepare(run, glue.Part([(text,) for text in found]))


def tune(run, examples, labels, seed=0, classes="abc", **changes):
    return finetune.fine_tune(run, examples, labels, classes, dataclasses.replace(QUICK, **changes), seed)


@pytest.mark.parametrize("attention, pool", [("full", "mean"), ("causal", "last")])
def test_fine_tuning_learns_classes_on_a_copy(run, attention, pool):
    words, prepared = texts(run, 200)
    labels = np.array([2 if "a" in text else int("e" in text) for text in words])
    before = copy.deepcopy(run.model.state_dict())
    model, losses = tune(run, prepared, labels, attention=attention, pool=pool, epochs=8)
    assert np.bincount(labels).max() < 100
    assert np.mean(finetune.predict(model, run, prepared)[0] == labels) > 0.85 and losses[-1] < 0.7
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())
    assert all(m.p == 0 for m in run.model.modules() if isinstance(m, torch.nn.Dropout))


def test_fine_tuning_learns_scores_of_any_size(run):
    words, prepared = texts(run, 200)
    scores = np.array([100 + 7.5 * text.count("a") / len(text) for text in words])
    model, _ = tune(run, prepared, scores, classes=None, epochs=8)
    predicted, _ = finetune.predict(model, run, prepared)
    assert glue.pearson(predicted, scores) > 0.85
    assert abs(predicted.mean() - scores.mean()) < 0.3 * scores.std()


def test_seeds_repeat_and_micro_batches_add_up_to_the_batch(run):
    _, prepared = texts(run, 21)
    whole, again, other, parted, coarser = (
        tune(run, prepared, np.arange(21) % 3, dropout=0.0, **changes)[1][1]
        for changes in ({}, {}, {"seed": 1}, {"micro_batch": 3}, {"batch_size": 16}))
    assert whole == again != other
    assert whole == pytest.approx(parted, rel=1e-4) and whole != pytest.approx(coarser, rel=1e-4)


def test_divergence_is_reported(run):
    _, prepared = texts(run, 16)
    with pytest.raises(BadInput, match="smaller .*lr than 1e"):
        tune(run, prepared, np.arange(16) % 3, lr=1e30)
    model, _ = tune(run, prepared, np.arange(16) % 3)
    with torch.no_grad():
        model.head[1].bias.fill_(math.nan)
    with pytest.raises(BadInput, match="not finite"):
        finetune.predict(model, run, prepared)


@pytest.fixture
def image_run():
    torch.manual_seed(0)
    model = Transformer(Config(0, 9, 3, 16, 2, patch=4, mean=(0.5,) * 3, std=(0.25,) * 3, decoder=(1, 16, 2)))
    return Run(model.eval(), from_options("mlm"), "mae", None, Settings(preset="vit-tiny"), 0, "test")


def bright(count, seed):
    """Images whose class is the bright channel."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 85, (count, 12, 12, 3)), rng.permutation(np.arange(count) % 3)
    pixels[np.arange(count), :, :, labels] += 100
    return ImageSet(pixels.astype(np.uint8), labels)


def test_fine_tuning_of_images_learns_with_mixing(image_run):
    train, val = bright(96, 0), bright(60, 1)

    def accuracy_and_loss(seed=0, **changes):
        changes = {**finetune.MAE, "epochs": 6, "batch_size": 16, **changes}
        model, losses = tune(image_run, train, train.labels, seed, **changes)
        return np.mean(finetune.predict(model, image_run, val)[0] == val.labels), losses[-1]

    accuracy, loss = accuracy_and_loss()
    assert accuracy > 0.9 and accuracy_and_loss(lr=1e-9, epochs=1)[0] < 0.7
    assert accuracy_and_loss(epochs=1) == accuracy_and_loss(epochs=1) != accuracy_and_loss(1, epochs=1)
    # A smoothed label cannot be met exactly: the loss is at least its entropy.
    share = 0.1 / 3
    entropy = -(1 - 2 * share) * math.log(1 - 2 * share) - 2 * share * math.log(share)
    _, plain = accuracy_and_loss(mixup=0.0, cutmix=0.0, smoothing=0.0, crop=1.0, drop_path=0.0)
    assert plain < entropy < accuracy_and_loss(mixup=0.0, cutmix=0.0)[1] < loss


def test_every_parameter_has_the_rate_of_its_layer(image_run):
    protocol = dataclasses.replace(QUICK, lr=1.0, layer_decay=0.5, weight_decay=0.3)
    model = finetune.Classifier(image_run, "abc", protocol, 0)
    found = {id(x): (group["lr"], group["weight_decay"]) for group in model.groups() for x in group["params"]}
    shares = {"head": 1, "encoder.norm": 1, "encoder.blocks.2": 1 / 2, "encoder.blocks.1": 1 / 4,
              "encoder.blocks.0": 1 / 8}  # and 1 / 16 for all that comes before the blocks
    for name, parameter in model.named_parameters():
        share = next((shares[prefix] for prefix in shares if name.startswith(prefix + ".")), 1 / 16)
        assert found.pop(id(parameter)) == (share, 0.3 if parameter.dim() == 2 else 0), name
    assert not found


def test_drop_path_leaves_out_whole_samples_and_rises_with_depth(image_run):
    x, drop = torch.rand(500, 2, 3) + 1, DropPath(0.3)
    y = drop.train()(x)
    out = (y == 0).all(2).all(1)
    assert torch.allclose(y[~out], x[~out] / 0.7) and 50 < out.sum() < 250
    assert torch.equal(drop.eval()(x), x)
    model = finetune.Classifier(image_run, "abc", dataclasses.replace(QUICK, drop_path=0.4, dropout=0.0), 0)
    assert [block.dropout.p for block in model.encoder.blocks] == pytest.approx([0, 0.2, 0.4])
    assert all(isinstance(block.dropout, torch.nn.Dropout) for block in image_run.model.blocks)  # of a copy
    x, block = torch.randn(6, 9, 16), model.encoder.blocks[2].train()
    block.dropout.p = 1 - 1e-9
    assert torch.equal(block(x, 9), x)  # with every branch skipped


def test_a_classifier_is_the_encoder_and_a_head(image_run):
    model, patches = finetune.Classifier(image_run, "abc", QUICK, 0).eval(), torch.randn(4, 9, 48)
    h = F.layer_norm(image_run.model.encode(patches).mean(1), (16,))
    assert torch.allclose(model(patches), h @ model.head[1].weight.T + model.head[1].bias, atol=1e-5)


def test_what_finetune_says_of_its_scores(trained, tmp_path):
    run, train, dev = trained("vl --mask 0.15,0.3"), tmp_path / "train.tsv", tmp_path / "dev.tsv"
    for path, count, every in ((train, 30, 3), (dev, 20, 4)):
        rows = [f"{path.stem} {k}\t{'b' if k % every else 'a' + chr(27)}" for k in range(count)]
        path.write_text("\n".join(["text\tlabel", *rows]))
    shown, content = call_both(f"evaluate.py finetune {run} --data {train} --dev {dev} --epochs 1")
    results = content["results"]
    accuracy, predicted, true = results["accuracy"], results["predictions"][0], results["labels"]
    low, high = accuracy["interval"]
    assert accuracy["majority"] == 0.75 and results["matthews"]["majority"] == 0
    assert low < accuracy["mean"] < high
    assert f"{100 * low:.1f} to {100 * high:.1f}" in shown and "largest class 75.0" in shown
    assert "2 classes: a\\x1b, b" in shown and "\x1b" not in shown
    for name, k in (("a\\x1b", 0), ("b", 1)):
        cells = [sum(p == j for p, t in zip(predicted, true) if t == k) for j in range(2)]
        assert [name, *map(str, cells)] in [row.split() for row in shown.splitlines()]


def test_a_classifier_predicts_what_finetune_reported(trained, reviews, tmp_path):
    """Of a table and of lines of text; of two seeds the first one's; its folder is whole, or not there."""
    run, out, line = trained("vl --mask 0.15,0.3"), tmp_path / "out", "evaluate.py predict"
    tune = (f"evaluate.py finetune {run} --data {reviews} --epochs 2 --lr 1e-3 --batch-size 8 --seeds 2 "
            f"--label-fraction 0.25 --out {out}")
    tuned = call_json(tune)
    results, accuracy = tuned["results"], tuned["results"]["accuracy"]
    assert tuned["protocol"]["batch_size"] == 8 and results["train"] == results["dev"] == 32
    assert accuracy["seeds"] == [np.mean(correct) for correct in results["correct"]]
    assert accuracy["interval"] is None and results["classes"] == ["neg", "pos"]
    assert np.array_equal(np.array(results["predictions"]) == results["labels"], results["correct"])
    *losses, metrics = logged(out)
    assert [row["loss"] for row in losses] == results["figures"][0]["epochs"] and losses[1]["epoch"] == 2
    assert metrics["accuracy"] == accuracy["seeds"][0]
    with pytest.raises(BadInput, match="out exists"):
        call(tune)
    found = call_json(f"{line} {out} --data {reviews} --csv {tmp_path / 'new.csv'}")["results"]
    places, probabilities = results["places"], np.array(found["probabilities"])
    names = [["neg", "pos"][k] for k in results["predictions"][0]]
    assert [found["class"][k] for k in places] == names and found["places"] == list(range(160))
    assert np.allclose(probabilities.sum(1), 1) and probabilities.shape == (160, 2)
    with open(reviews) as file, open(tmp_path / "new.csv") as new:
        table, rows = list(csv.DictReader(file)), list(csv.DictReader(new))
    texts = [row["text"] for row in table]
    assert [table[k]["label"] == "pos" for k in places] == results["labels"]
    assert [(row["text"], row["class"]) for row in rows] == list(zip(texts, found["class"]))
    assert np.allclose([float(row["probability"]) for row in rows], probabilities.max(1), atol=1e-4)
    (tmp_path / "new.txt").write_text("".join(text + "\n" for text in texts))
    lines = f"{line} {out} --data {tmp_path / 'new.txt'}"
    assert call_json(lines)["results"]["class"] == found["class"] and "the first 10 of 160" in call(lines)
    assert "perplexity" in call(f"evaluate.py perplexity {out / 'classifier.pt'} --max-sequences 4")
    for wrong, why in ((f"--data {reviews} --csv {reviews}", "would replace what is read"),
                       (f"--data {tmp_path}", "is a folder; give texts")):
        with pytest.raises(BadInput, match=why):
            call(f"{line} {out} {wrong}")
    for wrong in (f"{line} {run} --data {reviews}", f"{line} {out} --data {reviews} --text-column text label",
                  f"{line} {out} --data {tmp_path / 'none.csv'}",
                  f"evaluate.py finetune hf:x --data {reviews} --out {tmp_path / 'other'}"):
        with pytest.raises((BadInput, OSError)):
            call(wrong)
    with pytest.raises(BadInput, match="smaller --lr"):
        call(f"evaluate.py finetune {run} --data {reviews} --lr 1e30 --out {tmp_path / 'other'}")
    assert not list(tmp_path.glob("other*"))


def test_pairs_with_scores(trained, tmp_path):
    out, table = tmp_path / "out", tmp_path / "pairs.tsv"
    table.write_text("a\tb\tscore\n" + "".join(f"one {k}\ttwo\t{50 + k / 4}\n" for k in range(20)))
    shown, content = call_both(f"evaluate.py finetune {trained('vl --mask 0.15,0.3')} --data {table} "
                               f"--text-column a b --label-column score --epochs 1 --out {out}")
    results = content["results"]
    assert "pearson" in shown and "spearman" in shown and "predict" in shown
    table.write_text(table.read_text().replace("a\tb", "c\tb"))  # another name, and no need of a label
    found = call_json(f"evaluate.py predict {out} --data {table} --text-column c b")["results"]
    assert [found["score"][k] for k in results["places"]] == pytest.approx(results["predictions"][0])
    assert found["classes"] is found["probabilities"] is None


def test_images_and_their_files(trained, tmp_path):
    pil, folder, out = pytest.importorskip("PIL.Image"), tmp_path / "data", tmp_path / "out"
    for k in range(40):
        path = folder / ("dark", "light")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pil.new("RGB", (40, 32), (k + 200 * (k % 2),) * 3).save(path)
    run = trained("ar --streams 2", data="shapes")
    tuned = call_json(f"evaluate.py finetune {run} --data {folder} --epochs 1 --batch-size 8 --out {out}")
    found = call_json(f"evaluate.py predict {out} --data {folder}")["results"]
    assert tuned["protocol"]["lr"] == 2e-3 * 8 / 256 and tuned["protocol"]["attention"] == "causal"
    assert len(found["places"]) == 40 and np.allclose(np.sum(found["probabilities"], 1), 1)
    classes, results = dict(zip(found["places"], found["class"])), tuned["results"]
    names = [results["classes"][k] for k in results["predictions"][0]]
    assert results["train"] == 36 and [classes[place] for place in results["places"]] == names
    assert "light/1.png" in call(f"evaluate.py predict {out} --data {folder / 'light' / '1.png'}")
    probed = call_json(f"evaluate.py probe {run} --data {folder}")["results"]  # names the files, too
    right = [place in results["places"] and probed["classes"][k] in place
             for place, k in zip(probed["places"], probed["layers"]["last"]["predictions"])]
    assert len(right) == 4 and right == list(map(bool, probed["layers"]["last"]["correct"]))
