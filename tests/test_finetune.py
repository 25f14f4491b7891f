"""Fine-tuning learns, repeats, and leaves the network alone."""
import dataclasses

import numpy as np
import pytest
import torch
from labelled_texts import QUICK, some_texts

from downstream import encoding, finetune, glue, glue_runs
from engine import steps
from objectives import from_options
from support.cli import BadInput


@pytest.fixture
def run(make_run):
    """A small network in float32 over bytes, sequences of 24."""
    return make_run(from_options("mlm"), "mask", vocab=257, length=24, scale=1.0, dtype=torch.float32)


def test_learning_rate_rises_and_falls():
    shares = [steps.warm_cosine(p, 0.1) for p in np.linspace(0, 1, 101)]
    assert shares[0] == 0 and shares[5] == pytest.approx(0.5) and shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0) and all(np.diff(shares[:11]) > 0) and all(np.diff(shares[10:]) < 0)


def test_micro_batches_add_up_to_the_batch(run):
    texts = some_texts(21, longest=7)
    inputs, labels = encoding.tokenize(run, texts), np.arange(21) % 3
    protocol = dataclasses.replace(QUICK, epochs=2, dropout=0.0)
    whole, parted, coarser = (finetune.fine_tune(run, inputs, labels, 3,
                                                 dataclasses.replace(protocol, **change), 0)
                              for change in ({}, {"micro_batch": 3}, {"batch_size": 16}))
    scores = [predict(inputs) for predict, _ in (whole, parted, coarser)]
    assert whole[1]["train_loss"] == pytest.approx(parted[1]["train_loss"], rel=1e-4)
    assert (scores[0] == scores[1]).all()
    assert whole[1]["train_loss"] != pytest.approx(coarser[1]["train_loss"], rel=1e-4)


@pytest.mark.parametrize("attention, pool", [("full", "mean"), ("causal", "last")])
def test_fine_tuning_learns_classes(run, attention, pool):
    texts = some_texts(200, longest=7)
    labels = np.array([2 if "a" in text else "e" in text for (text,) in texts], np.int64)
    inputs = encoding.tokenize(run, texts)
    before = glue_runs.fingerprint(run.model)
    protocol = dataclasses.replace(QUICK, attention=attention, pool=pool, epochs=8)
    predict, figures = finetune.fine_tune(run, inputs, labels, 3, protocol, seed=0)
    assert np.bincount(labels).max() < 0.5 * 200
    assert (predict(inputs) == labels).mean() > 0.85 and figures["train_loss"] < 0.7
    assert 0 < figures["input_share"] < 0.5 and 0.5 < figures["padding_efficiency"] <= 1
    # of a copy
    assert glue_runs.fingerprint(run.model) == before
    assert all(m.p == 0 for m in run.model.modules() if isinstance(m, torch.nn.Dropout))


def test_fine_tuning_learns_scores(run):
    texts = some_texts(200, longest=7)
    scores = np.array([100 + 7.5 * text.count("a") / len(text) for (text,) in texts])
    inputs = encoding.tokenize(run, texts)
    predict, _ = finetune.fine_tune(run, inputs, scores, 1, dataclasses.replace(QUICK, epochs=8), 0)
    predicted = predict(inputs)
    assert glue.pearson(predicted,
                        scores) > 0.85 and abs(predicted.mean() - scores.mean()) < 0.3 * scores.std()


def test_seeds_repeat_and_differ(run):
    texts = some_texts(24)
    labels = np.arange(24) % 2
    inputs = encoding.tokenize(run, texts)

    def loss(seed, **changes):
        protocol = dataclasses.replace(QUICK, epochs=1, **changes)
        return finetune.fine_tune(run, inputs, labels, 2, protocol, seed)[1]["train_loss"]

    assert loss(0) == loss(0) != loss(1)
    # Without dropout, what has been drawn for it elsewhere changes nothing; the order and the new layer have
    # their own seeds.
    torch.manual_seed(5)
    assert loss(0, dropout=0.0) == loss(0, dropout=0.0) != loss(0)


def test_best_epoch_is_kept_only_when_asked_for(run):
    texts = some_texts(16)
    inputs, labels, script = encoding.tokenize(run, texts), np.arange(16) % 2, [0.1, 0.9, 0.5]
    seen = []

    def validate(predict):
        seen.append(predict(inputs))
        return script[len(seen) - 1]

    protocol = dataclasses.replace(QUICK, epochs=3, lr=0.05, dropout=0.0)
    predict, figures = finetune.fine_tune(run, inputs, labels, 2, protocol, 0, validate=validate)
    assert seen == [] and "best_epoch" not in figures
    predict, figures = finetune.fine_tune(run, inputs, labels, 2,
                                          dataclasses.replace(protocol, best_epoch=True), 0,
                                          validate=validate)
    assert figures["best_epoch"] == 2 and len(seen) == 3 and np.array_equal(predict(inputs), seen[1])


def test_divergence_is_reported(run):
    inputs = encoding.tokenize(run, some_texts(16))
    with pytest.raises(BadInput, match="smaller --lr"), np.errstate(all="ignore"):
        finetune.fine_tune(run, inputs, np.full(16, np.nan), 1, QUICK, 0)
