"""Batches, the probe, fine-tuning, and the commands glue, probe and finetune end to end on small made-up tasks."""
import dataclasses
import json
import re
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_glue import LAYOUTS, write

import evaluate
import train as training
from downstream import finetune, glue, glue_runs, hub, labelled, options, probe
from downstream.finetune import Protocol
from engine import runs, steps
from engine.settings import Settings
from objectives import from_options
from support.cli import BadInput
from text import sources
from text.sources import pydoc_texts
from text.tokenizers import ByteTokenizer

BYTES, CPU = ByteTokenizer(), torch.device("cpu")


@pytest.fixture
def run(make_run):
    """A small network in float32 over bytes, sequences of 24."""
    return make_run(from_options("mlm"), "mask", vocab=257, length=24, scale=1.0, dtype=torch.float32)


def some_texts(count=40, longest=19):
    rng = np.random.default_rng(0)
    return [("".join(rng.choice(list("abcdef "), rng.integers(1, longest + 1))),) for _ in range(count)]


# ---------------------------------------------------------------------------- inputs

def test_truncation_takes_from_the_longer_part_first():
    for m in range(8):
        for n in range(8):
            for room in range(12):
                a, b = list(range(m)), list(range(n))
                while len(a) + len(b) > room:
                    (a if len(a) > len(b) else b).pop()
                assert labelled.truncate(list(range(m)), list(range(n)), room) == (a, b), (m, n, room)
    assert labelled.truncate([1, 2, 3], None, 2) == ([1, 2], None)


def test_layout_of_single_texts_and_pairs(run):
    inputs = labelled.tokenize(run, [("ab", "c"), ("", "x" * 40)])
    assert inputs.ids[0].tolist() == [97, 98, 256, 99, 256] and inputs.segments is None
    assert inputs.ids[1].tolist() == [256] + [120] * 22 + [256] and inputs.lengths.tolist() == [5, 24]
    assert [row.tolist() for row in labelled.tokenize(run, [("ab",), ("",)]).ids] == [[97, 98, 256], [256]]
    assert labelled.tokenize(run, [("y" * 40,)]).lengths.tolist() == [24]


class Pairs(ByteTokenizer):
    """A tokenizer with a layout of its own, as BERT's."""

    @staticmethod
    def pair(a, b=None):
        ids = [1, *a, 2] + ([] if b is None else [*b, 2])
        return ids, [0] * (2 + len(a)) + [1] * (len(ids) - 2 - len(a))


def test_a_tokenizer_with_a_layout_of_its_own(run, monkeypatch):
    run = dataclasses.replace(run, tokenizer=Pairs())
    inputs = labelled.tokenize(run, [("ab", "c"), ("x" * 30, "y" * 30)])
    assert inputs.ids[0].tolist() == [1, 97, 98, 2, 99, 2] and inputs.segments[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert inputs.ids[1].tolist() == [1] + [120] * 11 + [2] + [121] * 10 + [2]
    assert labelled.tokenize(run, [("x" * 30,)]).ids[0].tolist() == [1] + [120] * 22 + [2]
    batch = labelled.collate(inputs, np.array([0, 1]), 24, CPU)
    assert batch.segments[0].tolist() == [0, 0, 0, 0, 1, 1] + [0] * 18
    seen = []
    monkeypatch.setattr(run.model, "encode", lambda *args, **kwargs: seen.append(kwargs["segments"]))
    labelled.encode(run.model, batch, causal=False)
    assert torch.equal(seen[0], batch.segments)


def test_batches_hold_every_text_once_and_are_seeded():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    epochs = {(seed, epoch): labelled.batch_rows(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for batches in [*epochs.values(), labelled.batch_rows(lengths, 8)]:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
    orders = {tuple(np.concatenate(batches).tolist()) for batches in epochs.values()}
    assert len(orders) == 4
    again = labelled.batch_rows(lengths, 8, 0, 1)
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[0, 1]))
    # like lengths together, but short and long batches in turn
    spans = [np.ptp(lengths[rows]) for rows in epochs[0, 0]]
    assert np.mean(spans) < 10
    assert np.ptp([lengths[rows].mean() for rows in epochs[0, 0][:20]]) > 50


def test_batches_are_padded_to_fixed_lengths():
    assert [labelled.padded_length(n, 128) for n in (1, 8, 9, 33, 64, 65, 97, 128)] == [8, 8, 16, 48, 64, 96, 128, 128]
    assert labelled.padded_length(50, 60) == 60 and labelled.padded_length(600, 1024) == 1024


def test_collate(run):
    inputs = labelled.tokenize(run, [("ab",), ("abcdefghi",), ("",)])
    batch = labelled.collate(inputs, np.array([1, 2, 0]), 24, CPU)
    assert batch.tokens.shape == (3, 16) and batch.lengths.tolist() == [10, 1, 3] and batch.segments is None
    for row, i in enumerate((1, 2, 0)):
        n = inputs.lengths[i]
        assert batch.tokens[row, :n].tolist() == inputs.ids[i].tolist()
        assert batch.padding[row].tolist() == [False] * n + [True] * (16 - n)
    assert labelled.collate(labelled.tokenize(run, [("a" * 7,)]), np.array([0]), 24, CPU).padding is None


@pytest.mark.parametrize("pool", labelled.POOLS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_the_features(make_run, pool, causal):
    """Features in a padded batch against each text alone, pooled by hand."""
    run = make_run(from_options("mlm"), "mask", vocab=257, length=24, dtype=torch.float32)
    inputs = labelled.tokenize(run, some_texts(20))
    features = probe.frozen_features(run, inputs, pool, causal, "all", size=7)
    last = probe.frozen_features(run, inputs, pool, causal)
    assert list(features) == [0, 1, 2, 3] and torch.allclose(last["last"], features[3], atol=1e-4)
    assert torch.allclose(probe.frozen_features(run, inputs, pool, causal, 2)[2], features[2], atol=1e-4)
    for i, ids in enumerate(inputs.ids):
        states = run.model.encode(torch.tensor(ids[None], dtype=torch.long), None, causal, every_layer=True)
        for layer, state in enumerate(states):
            x = {"mean": state[0].mean(0), "last": state[0, -1], "first": state[0, 0]}[pool]
            assert torch.allclose(features[layer][i], x, atol=1e-4)
    with pytest.raises(BadInput, match="--layer 4 is not in 0..3"):
        probe.frozen_features(run, inputs, pool, causal, 4)


def test_attention_and_pooling_by_objective(way, make_run):
    objective, path = way
    run = make_run(objective, path)
    expected = ("causal", "last") if type(objective).__name__ in ("Autoregressive", "DiversityEnhanced") else ("full", "mean")
    assert options.attention_and_pool(run) == expected
    assert options.attention_and_pool(run, "full") == ("full", "mean")
    assert options.attention_and_pool(run, "causal", "mean") == ("causal", "mean")
    with pytest.raises(BadInput, match="--pool first"):
        options.attention_and_pool(run, "causal", "first")


# ---------------------------------------------------------------------------- data

def test_label_subset_is_stratified_and_seeded():
    labels = np.array([0] * 100 + [1] * 50 + [2] * 3)
    rows = labelled.label_subset(labels, 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1] and len(set(rows.tolist())) == 16
    assert np.array_equal(rows, labelled.label_subset(labels, 0.1, seed=0))
    assert not np.array_equal(rows, labelled.label_subset(labels, 0.1, seed=1))
    assert np.array_equal(labelled.label_subset(labels, 1.0, seed=0), np.arange(153))
    assert len(labelled.label_subset(np.linspace(0, 1, 50), 0.1, seed=0)) == 5  # scores: no classes
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(BadInput, match="label-fraction"):
            labelled.label_subset(labels, fraction, 0)


def test_tsv_classes_and_scores(tmp_path):
    rows = [["label", "text"], *([label, f'"text {k}'] for k, label in enumerate(["no", "yes", "maybe"] * 5))]
    data = labelled.tsv_dataset(write(tmp_path / "a.tsv", rows))
    assert data.classes == ("maybe", "no", "yes") and len(data.train.texts) == 12 and len(data.dev[""].texts) == 3
    for part in (data.train, data.dev[""]):
        for (text,), label in zip(part.texts, part.labels):
            assert data.classes[label] == rows[1 + int(text.split()[1])][0]
    assert not {*data.train.texts} & {*data.dev[""].texts}

    for labels, kind in ((["1", "2", "3"], "i"), (["1.0", "2.0"], "i"), (["1", "2.5"], "f"), (["-0.5", "1e-3"], "f"), (["1.5", "x"], "i")):
        path = write(tmp_path / "b.tsv", [["text", "text_b", "label"], *(["a", "b", label] for label in labels)])
        data = labelled.tsv_dataset(path, dev=path)
        assert data.train.labels.dtype.kind == kind and data.train.texts[0] == ("a", "b")
        assert (data.classes is None) == (kind == "f") and len(data.dev[""].labels) == len(labels)
    path = write(tmp_path / "c.tsv", [["text", "label"], ["a", "1"], ["b", "2"]])
    assert labelled.tsv_dataset(path, dev=path, regression=True).train.labels.tolist() == [1.0, 2.0]


def test_pydoc_passages_are_held_out_by_module(monkeypatch):
    documents = list(pydoc_texts())
    monkeypatch.setattr(sources, "pydoc_texts", lambda: documents)  # reading them takes seconds
    data = labelled.pydoc_dataset()
    assert len(data.classes) >= 10 and len(data.train.texts) > 500 and len(data.dev[""].texts) > 100
    where = {}
    for name, text in documents:
        for paragraph in re.split(r"\n\s*\n", text):
            where.setdefault(" ".join(paragraph.split())[:40], set()).add(name)
    sides = [[where[text[:40]] for (text,) in part.texts if text[:40] in where] for part in (data.train, data.dev[""])]
    # beginnings that occur in one module only tell which module a passage is from
    train, dev = ({next(iter(names)) for names in side if len(names) == 1} for side in sides)
    assert len(train) > 50 and len(dev) > 20 and not train & dev
    for part in (data.train, data.dev[""]):
        assert set(part.labels.tolist()) == set(range(len(data.classes)))
        for (text,), label in zip(part.texts, part.labels):
            assert len(text) >= 40 and any(name.startswith(data.classes[label]) for name in where.get(text[:40], [data.classes[label]]))


# ---------------------------------------------------------------------------- the probe

def test_logistic_regression_is_at_its_optimum():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randint(3, (200,))
    for l2 in (1.0, 1e-3):
        w = probe.logistic_regression(x, y, l2, 3)
        ones = torch.cat([x, torch.ones(200, 1, dtype=x.dtype)], dim=1)
        gradient = ones.T @ ((ones @ w).softmax(1) - F.one_hot(y, 3)) / 200
        gradient[:-1] += l2 * w[:-1]
        assert gradient.abs().max() < 1e-5 and w.abs().max() > 0.01


def test_extras_logistic_regression_against_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.integers(4, size=300)
    x[:, 0] += y
    for l2 in (0.1, 1e-3):
        theirs = linear_model.LogisticRegression(C=1 / (300 * l2), tol=1e-8, max_iter=2000).fit(x, y).predict_proba(x)
        ours = probe.linear(torch.tensor(x), probe.logistic_regression(torch.tensor(x), torch.tensor(y), l2, 4)).softmax(1)
        assert np.allclose(ours, theirs, atol=1e-4)


def test_probe_on_separable_and_on_random_labels():
    torch.manual_seed(0)
    y, test_y = torch.randint(3, (400,)), torch.randint(3, (300,))
    centres = 4 * torch.randn(3, 10)
    x, test_x = centres[y] + torch.randn(400, 10), centres[test_y] + torch.randn(300, 10)
    scale = torch.logspace(-3, 3, 10)                       # standardised away
    found = probe.probe(x * scale + 5, y, test_x * scale + 5, test_y.numpy())
    assert found["accuracy"] > 0.97 and found["majority"] < 0.5 and found["train"] == 400 and found["test"] == 300
    low, high = found["interval"]
    assert low < found["accuracy"] <= high and high - low < 0.05 and found["matthews"] > 0.95
    noise = probe.probe(torch.randn(400, 10), y, torch.randn(300, 10), test_y)
    assert noise["l2"] >= 0.1 and noise["accuracy"] < 0.5 and abs(noise["matthews"]) < 0.2
    constant = probe.probe(torch.ones(400, 10), y, torch.ones(300, 10), test_y)
    assert constant["accuracy"] == constant["majority"] and constant["matthews"] == 0


def test_wilson_interval_by_its_definition():
    """Both ends are shares p at which the observed share is 1.96 standard errors away."""
    for correct, n in ((0, 10), (3, 10), (10, 10), (800, 872)):
        for p in probe.wilson(correct, n):
            assert (correct / n - p) ** 2 == pytest.approx(1.959964 ** 2 * p * (1 - p) / n, abs=1e-9)
    assert probe.wilson(0, 10)[0] == 0 and probe.wilson(10, 10)[1] == pytest.approx(1)


# ---------------------------------------------------------------------------- fine-tuning

QUICK = Protocol(lr=1e-2, pool="mean", attention="full", epochs=4, batch_size=8)


def test_learning_rate_rises_and_falls():
    shares = [steps.warm_cosine(p, 0.1) for p in np.linspace(0, 1, 101)]
    assert shares[0] == 0 and shares[5] == pytest.approx(0.5) and shares[10] == 1 and shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0) and all(np.diff(shares[:11]) > 0) and all(np.diff(shares[10:]) < 0)


def test_micro_batches_add_up_to_the_batch(run):
    texts = some_texts(21, longest=7)
    inputs, labels = labelled.tokenize(run, texts), np.arange(21) % 3
    protocol = dataclasses.replace(QUICK, epochs=2, dropout=0.0)
    whole, parted, coarser = (finetune.fine_tune(run, inputs, labels, 3, dataclasses.replace(protocol, **change), 0)
                              for change in ({}, {"micro_batch": 3}, {"batch_size": 16}))
    scores = [predict(inputs) for predict, _ in (whole, parted, coarser)]
    assert whole[1]["train_loss"] == pytest.approx(parted[1]["train_loss"], rel=1e-4)
    assert (scores[0] == scores[1]).all() and whole[1]["train_loss"] != pytest.approx(coarser[1]["train_loss"], rel=1e-4)


@pytest.mark.parametrize("attention, pool", [("full", "mean"), ("causal", "last")])
def test_fine_tuning_learns_classes(run, attention, pool):
    texts = some_texts(200, longest=7)
    labels = np.array([2 if "a" in text else "e" in text for (text,) in texts], np.int64)
    inputs = labelled.tokenize(run, texts)
    before = glue_runs.fingerprint(run.model)
    protocol = dataclasses.replace(QUICK, attention=attention, pool=pool, epochs=8)
    predict, figures = finetune.fine_tune(run, inputs, labels, 3, protocol, seed=0)
    assert np.bincount(labels).max() < 0.5 * 200
    assert (predict(inputs) == labels).mean() > 0.85 and figures["train_loss"] < 0.7
    assert 0 < figures["input_share"] < 0.5 and 0.5 < figures["padding_efficiency"] <= 1
    # of a copy
    assert glue_runs.fingerprint(run.model) == before and all(m.p == 0 for m in run.model.modules() if isinstance(m, torch.nn.Dropout))


def test_fine_tuning_learns_scores(run):
    texts = some_texts(200, longest=7)
    scores = np.array([100 + 7.5 * text.count("a") / len(text) for (text,) in texts])
    inputs = labelled.tokenize(run, texts)
    predict, _ = finetune.fine_tune(run, inputs, scores, 1, dataclasses.replace(QUICK, epochs=8), 0)
    predicted = predict(inputs)
    assert glue.pearson(predicted, scores) > 0.85 and abs(predicted.mean() - scores.mean()) < 0.3 * scores.std()


def test_seeds_repeat_and_differ(run):
    texts = some_texts(24)
    labels = np.arange(24) % 2
    inputs = labelled.tokenize(run, texts)

    def loss(seed, **changes):
        protocol = dataclasses.replace(QUICK, epochs=1, **changes)
        return finetune.fine_tune(run, inputs, labels, 2, protocol, seed)[1]["train_loss"]

    assert loss(0) == loss(0) != loss(1)
    # Without dropout, what has been drawn for it elsewhere changes nothing; the order and the new layer have their own seeds.
    torch.manual_seed(5)
    assert loss(0, dropout=0.0) == loss(0, dropout=0.0) != loss(0)


def test_best_epoch_is_kept_only_when_asked_for(run):
    texts = some_texts(16)
    inputs, labels, script = labelled.tokenize(run, texts), np.arange(16) % 2, [0.1, 0.9, 0.5]
    seen = []

    def validate(predict):
        seen.append(predict(inputs))
        return script[len(seen) - 1]

    protocol = dataclasses.replace(QUICK, epochs=3, lr=0.05, dropout=0.0)
    predict, figures = finetune.fine_tune(run, inputs, labels, 2, protocol, 0, validate=validate)
    assert seen == [] and "best_epoch" not in figures
    predict, figures = finetune.fine_tune(run, inputs, labels, 2, dataclasses.replace(protocol, best_epoch=True), 0, validate=validate)
    assert figures["best_epoch"] == 2 and len(seen) == 3 and np.array_equal(predict(inputs), seen[1])


def test_divergence_is_reported(run):
    inputs = labelled.tokenize(run, some_texts(16))
    with pytest.raises(BadInput, match="smaller --lr"), np.errstate(all="ignore"):
        finetune.fine_tune(run, inputs, np.full(16, np.nan), 1, QUICK, 0)


# ---------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two small runs on repeating text: {name: folder}."""
    base = tmp_path_factory.mktemp("runs")
    text = base / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    folders = {}
    for name, options in {"ar": {}, "vl": {"objective": "vl"}}.items():
        folders[name] = base / name
        settings = Settings(data=str(text), length=16, steps=10, batch_size=8, **options)
        training.train(settings, folders[name], device="cpu", dtype="fp32", quiet=True)
    return folders


@pytest.fixture
def glue_dir(tmp_path):
    """A few rows of every task in the official layout, labels in turn."""
    for name, files in LAYOUTS.items():
        task = glue.TASKS[name]
        for file, (header, row, _, target) in files.items():
            column = (header or task.columns).index(task.label) if target is not None else 0
            labels = ["0.5", "3.25", "4.000"] if task.labels is None else task.labels
            rows = [[*row[:column], labels[k % len(labels)] if target is not None else str(k), *row[column + 1:]] for k in range(6)]
            write(tmp_path / "glue" / task.folder / file, [header, *rows])
    return tmp_path / "glue"


def call(capsys, *argv):
    evaluate.main([*map(str, argv), "--device", "cpu", "--dtype", "fp32"])
    return capsys.readouterr().out


def test_glue_command_on_all_tasks(trained, glue_dir, capsys, tmp_path):
    out, results = tmp_path / "out.json", tmp_path / "results.json"
    text = call(capsys, "glue", trained["vl"], "--glue-dir", glue_dir, "--tasks", "all,wnli,ax", "--seeds", 2, "--epochs", 1,
                "--submit", tmp_path / "submit", "--results", results, "--json", out)
    content = json.loads(out.read_text())
    found = content["results"]
    assert found["split"] == "dev" and "DEV" in text and content["objective"] == "vl 0.15,0.3"
    assert set(found["tasks"]) == set(glue.TASKS) - {"ax"}
    for name, result in found["tasks"].items():
        for metric in glue.TASKS[name].metrics:
            for suffix, *_ in glue.TASKS[name].parts:
                value = result[metric + suffix]
                assert len(value["seeds"]) == 2 and value["mean"] == value["median"] == pytest.approx(np.mean(value["seeds"]))
                assert value["std"] == pytest.approx(np.std(value["seeds"], ddof=1))
    assert len(found["table2"]) == 9 and found["average"] == pytest.approx(np.mean(list(found["table2"].values())))
    assert found["table2"]["MNLI-mm"] == found["tasks"]["mnli"]["accuracy-mm"]["mean"]
    assert found["not_in_submission"] == []
    for k in range(2):
        with zipfile.ZipFile(tmp_path / "submit" / f"seed{k}.zip") as archive:
            assert len(archive.namelist()) == 11
            for name in archive.namelist():
                lines = archive.read(name).decode().split("\n")
                assert lines[0] == "index\tprediction" and len(lines) == 8 and lines[-1] == ""
            assert {line.split("\t")[1] for line in archive.read("AX.tsv").decode().split("\n")[1:-1]} <= set(glue.NLI)


def test_glue_goes_on_where_it_was_interrupted(trained, glue_dir, tmp_path, monkeypatch):
    run = runs.load_run(trained["ar"])
    protocol = dataclasses.replace(QUICK, epochs=1)
    whole = glue_runs.run_glue(run, glue_dir, ["cola", "stsb"], 2, protocol)
    results, calls, original = tmp_path / "results.json", [], finetune.fine_tune_once

    def once(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((args[1].name, args[4]))
        return original(*args)

    monkeypatch.setattr(finetune, "fine_tune_once", once)

    def again(**changes):
        return glue_runs.run_glue(run, glue_dir, ["cola", "stsb"], 2, dataclasses.replace(protocol, **changes), results_file=results)

    with pytest.raises(KeyboardInterrupt):
        again()
    assert calls == [("cola", 0), ("cola", 1), ("stsb", 0)]
    calls[:] = []
    resumed = again()
    assert calls == [("stsb", 1)]
    for name, metric in (("cola", "matthews"), ("stsb", "pearson"), ("stsb", "spearman")):
        assert resumed["tasks"][name][metric] == whole["tasks"][name][metric]
    calls[:] = ["", ""]
    with pytest.raises(KeyboardInterrupt):  # other settings are other results
        again(lr=1e-3)
    assert calls[2:] == [("cola", 0)]
    with torch.no_grad():
        next(run.model.parameters()).mul_(1.01)
    calls[:] = []
    with pytest.raises(KeyboardInterrupt):  # and so are other weights
        again()
    assert len(calls) == 3
    results.write_text("{}")
    with pytest.raises(BadInput, match="not a file of GLUE results"):
        again()


def test_predictions_are_made_again_where_they_are_missing(trained, glue_dir, tmp_path, monkeypatch):
    run, calls, original = runs.load_run(trained["ar"]), [], finetune.fine_tune_once
    monkeypatch.setattr(finetune, "fine_tune_once", lambda *args: calls.append(args[4]) or original(*args))

    def submit(folder):
        return glue_runs.run_glue(run, glue_dir, ["rte"], 1, dataclasses.replace(QUICK, epochs=1),
                                 results_file=tmp_path / "results.json", submit=folder)

    assert submit(None)["tasks"]["rte"] and len(calls) == 1
    content = submit(tmp_path / "submit")
    assert len(calls) == 2 and "QNLI.tsv" in content["not_in_submission"] and "RTE.tsv" not in content["not_in_submission"]
    submit(tmp_path / "submit")
    submit(None)
    assert len(calls) == 2
    (tmp_path / "submit" / "seed0" / "RTE.tsv").write_text("other")
    submit(tmp_path / "submit")
    assert len(calls) == 3 and (tmp_path / "submit" / "seed0" / "RTE.tsv").read_text().startswith("index\tprediction\n")


def labelled_file(path):
    rows = [[("the cat " if k % 3 else "a mat ") + "sat"[:k % 4], "cat" if k % 3 else "mat"] for k in range(60)]
    return write(path, [["text", "label"], *rows])


def test_probe_command(trained, capsys, tmp_path):
    path = labelled_file(tmp_path / "a.tsv")
    text = call(capsys, "probe", trained["vl"], "--data", path, "--layer", "all", "--json", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    layers = content["results"]["layers"]
    assert list(layers) == ["0", "1", "2", "3", "4"] and content["results"]["attention"] == "full"
    assert all(layer["accuracy"] == 1 and layer["train"] == 48 and layer["test"] == 12 for layer in layers.values())
    assert "95% interval" in text and "majority class" in text and len(text.split("\n")) == 9
    last = json.loads(call(capsys, "probe", trained["ar"], "--data", path, "--json", "-", "--max-train", 20))["results"]
    assert list(last["layers"]) == ["last"] and last["attention"] == "causal" and last["pool"] == "last"
    assert last["layers"]["last"]["train"] == 20
    tenth = json.loads(call(capsys, "probe", trained["ar"], "--data", path, "--json", "-", "--label-fraction", 0.25))["results"]
    assert tenth["layers"]["last"]["train"] == 12


def test_finetune_command(trained, capsys, tmp_path):
    path = labelled_file(tmp_path / "a.tsv")
    text = call(capsys, "finetune", trained["ar"], "--data", path, "--epochs", 8, "--lr", 2e-3, "--seeds", 2)
    assert "48 texts" in text and "12 dev texts" in text and "accuracy" in text and "100.0" in text
    content = json.loads(call(capsys, "finetune", trained["ar"], "--data", path, "--dev", path, "--label-fraction", 0.5,
                              "--epochs", 1, "--json", "-"))
    assert content["results"]["train"] == 30 and content["results"]["dev"] == 60 and content["protocol"]["attention"] == "causal"
    assert content["results"]["accuracy"]["std"] is None


@pytest.mark.parametrize("argv, says", [
    (["glue", "{vl}", "--glue-dir", "{tmp}/nowhere"], "nowhere is not a folder; the official files are at https://gluebenchmark"),
    (["glue", "{vl}", "--glue-dir", "{tmp}"], "MNLI/train.tsv does not exist; it is part of MNLI from https://gluebenchmark"),
    (["glue", "{vl}", "--glue-dir", "{tmp}", "--tasks", "sst"], "no GLUE task 'sst'"),
    (["glue", "{vl}", "--glue-dir", "{tmp}", "--tasks", "ax"], "needs|with --submit"), (["glue", "{vl}"], "--glue-dir"),
    (["glue", "{vl}", "--glue-dir", "{glue}", "--lr", "0"], "--lr 0"),
    (["glue", "{vl}", "--glue-dir", "{glue}", "--tasks", "rte", "--results", "no/such/x.json"], "no such folder"),
    (["probe", "{vl}", "--data", "rte"], "--glue-dir"), (["probe", "{vl}", "--data", "ax", "--glue-dir", "{glue}"], "neither a training"),
    (["probe", "{vl}", "--data", "stsb", "--glue-dir", "{glue}"], "finetune does both"), (["probe", "{vl}", "--layer", "-1"], "layer"),
    (["probe", "{vl}", "--data", "rte", "--glue-dir", "{glue}", "--layer", "9"], "not in 0..4"),
    (["probe", "{ar}", "--pool", "first"], "--attention full"), (["probe", "{vl}", "--data", "no.tsv"], "no.tsv does not exist"),
    (["probe", "{vl}", "--dev", "{one}"], "leave out --dev"), (["finetune", "{vl}", "--data", "{one}"], "only one label, 'x'"),
    (["finetune", "{vl}", "--data", "{two}", "--dev", "{one}"], "one.tsv, line 2: the label 'x' is not one of y, z"),
    (["finetune", "{vl}", "--data", "{two}", "--regression"], "line 2: the label 'y' is not a number"),
    (["finetune", "{vl}", "--data", "{two}", "--label-fraction", "0"], "--label-fraction 0"),
    (["finetune", "{vl}", "--data", "{wrong}"], "no column 'label', only text, class")])
def test_wrong_uses_are_refused(trained, glue_dir, tmp_path, argv, says):
    places = {**trained, "glue": glue_dir, "tmp": tmp_path, "one": write(tmp_path / "one.tsv", [["text", "label"], ["a", "x"], ["b", "x"]]),
              "two": write(tmp_path / "two.tsv", [["text", "label"], ["a", "y"], ["b", "z"]]),
              "wrong": write(tmp_path / "wrong.tsv", [["text", "class"], ["a", "y"]])}
    with pytest.raises(BadInput, match=says):
        evaluate.main([part.format(**places) for part in argv])


def test_images_are_refused(run):
    with pytest.raises(BadInput, match="trained on images"):
        options.text_run(dataclasses.replace(run, tokenizer=None))


def test_extras_models_of_the_transformers_package(make_run, tmp_path):
    """BERT with its [CLS], [SEP] and token types through the same code."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32))
    bert.eval().save_pretrained(tmp_path / "bert")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path / "bert")
    run = hub.load_run(f"hf:{tmp_path / 'bert'}", length=16)
    rng = np.random.default_rng(0)
    texts = [(" ".join(rng.choice(list("abc"), rng.integers(1, 6))), " ".join(rng.choice(list("def"), 4))) for _ in range(100)]
    inputs = labelled.tokenize(run, texts)
    assert inputs.ids[0][0] == 2 and inputs.ids[0][-1] == 3 and inputs.segments[0].max() == 1
    assert options.attention_and_pool(run) == ("full", "mean")
    features = probe.frozen_features(run, inputs, "first", False)["last"]
    expected = bert.bert(torch.tensor(inputs.ids[0][None]).long(), token_type_ids=torch.tensor(inputs.segments[0][None]).long())
    assert torch.allclose(features[0], expected.last_hidden_state[0, 0], atol=1e-5)
    labels = np.array(["a" in text[0] for text in texts], np.int64)
    predict, _ = finetune.fine_tune(run, inputs, labels, 2, dataclasses.replace(QUICK, epochs=8), 0)
    assert (predict(inputs) == labels).mean() > 0.9 > np.bincount(labels).max() / 100
