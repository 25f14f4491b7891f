"""Features of texts and images against plain computations; probes against their optimum and scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, call_json

from images import ImageSet
from objectives import from_options
from tasks import probe
from tasks.glue import Part
from util import BadInput


@pytest.fixture
def run(make_run):
    """A small network in float32 over bytes, sequences of 24."""
    return make_run(from_options("mlm"), "mask", vocab=257, length=24, dtype=torch.float32)


def some_texts(count):
    rng = np.random.default_rng(0)
    return [("".join(rng.choice(list("abcdef "), rng.integers(1, 20))),) for _ in range(count)]


def test_pairs_lose_the_end_of_the_longer_text(run):
    for m, n in ((3, 4), (0, 40), (40, 0), (9, 30), (30, 9), (30, 31), (11, 11)):
        a, b = [97] * m, [98] * n
        while len(a) + len(b) > 22:
            (a if len(a) > len(b) else b).pop()
        [ids] = probe.prepare(run, Part([("a" * m, "b" * n)]))
        assert ids.tolist() == [*a, 256, *b, 256]
    assert [len(row) for row in probe.prepare(run, Part([("a" * 40,), ("",)]))] == [24, 1]


def test_batches_hold_every_text_once_in_a_seeded_order():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    epochs = [probe.batch_rows(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for batches in [*epochs, probe.batch_rows(lengths, 8)]:
        assert sorted(np.concatenate(batches)) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
    assert len({tuple(np.concatenate(batches)) for batches in epochs}) == 4
    assert np.mean([np.ptp(lengths[rows]) for rows in epochs[0]]) < 10  # texts of like length share a batch


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_features_are_those_of_each_text_alone(run, pool, causal):
    prepared = probe.prepare(run, Part(some_texts(20)))
    features = probe.frozen_features(run, prepared, pool, causal, "all")
    last = probe.frozen_features(run, prepared, pool, causal)["last"]
    third = probe.frozen_features(run, prepared, pool, causal, "2")["2"]
    assert torch.allclose(last, features["3"], atol=1e-4)
    assert torch.allclose(third, features["2"], atol=1e-4)
    for i, ids in enumerate(prepared):
        states = run.model.encode(torch.tensor(ids[None]).long(), None, causal, True)
        for layer, state in enumerate(states):
            alone = state[0].mean(0) if pool == "mean" else state[0, -1]
            assert torch.allclose(features[str(layer)][i], alone, atol=1e-4)
    with pytest.raises(BadInput, match="layer 4 is not in 0..3"):
        probe.frozen_features(run, prepared, pool, causal, "4")


@pytest.mark.parametrize("size", [12, 20])
def test_features_are_those_of_each_image_alone(image_way, make_run, size):
    run, rng = make_run(*image_way, images=True), np.random.default_rng(0)
    model = run.model.float()
    pictures = ImageSet(rng.integers(0, 256, (5, size, size, 3)).astype(np.uint8), np.arange(5))
    features = probe.frozen_features(run, pictures, "mean", False, "all")
    [(_, inputs, _)] = probe.every_batch(run, pictures)
    for k in range(5):
        x = torch.tensor(pictures.images[k] / 255, dtype=torch.float32).permute(2, 0, 1)
        if size != 12:
            x = F.interpolate(x[None], (12, 12), mode="bilinear", antialias=True)[0]
        x = (x - 0.5) / 0.25
        patches = torch.stack([x[:, i:i + 4, j:j + 4].flatten() for i in (0, 4, 8) for j in (0, 4, 8)])
        assert torch.allclose(inputs[k], patches, atol=1e-4)
        for layer, state in enumerate(model.encode(patches[None], causal=False, every_layer=True)):
            assert torch.allclose(features[str(layer)][k], state[0].mean(0), atol=2e-4)


def test_attention_and_pooling_follow_the_objective(way, make_run):
    objective, path = way
    run, causal = make_run(objective, path), objective.attention == "causal"
    assert probe.attention_and_pool(run) == (("causal", "last") if causal else ("full", "mean"))
    assert probe.attention_and_pool(dataclasses.replace(run, tokenizer=None)) == (objective.attention, "mean")
    assert probe.attention_and_pool(run, "causal", "mean") == ("causal", "mean")


def test_logistic_regression_is_at_its_optimum():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=torch.float64), torch.randint(3, (200,))
    for l2 in (1.0, 1e-3):
        w = probe.logistic_regression(x, y, l2, 3)
        ones = torch.cat([x, torch.ones(200, 1, dtype=x.dtype)], dim=1)
        gradient = ones.T @ ((ones @ w).softmax(1) - F.one_hot(y, 3)) / 200
        gradient[:-1] += l2 * w[:-1]
        assert gradient.abs().max() < 1e-5 and w.abs().max() > 0.01


def test_probes_on_separable_and_on_random_labels():
    torch.manual_seed(0)
    y, test_y = torch.randint(3, (600,)), torch.randint(3, (400,))
    centres, scale = 3 * torch.randn(3, 10), torch.logspace(-3, 3, 10)  # features are standardised
    x, test_x = ((centres[k] + torch.randn(len(k), 10)) * scale + 5 for k in (y, test_y))
    lbfgs, sgd = (fit(x, y, test_x, test_y.numpy()) for fit in (probe.fit_probe, probe.sgd_probe))
    assert lbfgs["accuracy"] == np.mean(lbfgs["correct"]) > 0.97 and lbfgs["majority"] < 0.5
    assert abs(sgd["accuracy"] - lbfgs["accuracy"]) < 0.015 and probe.sgd_probe(x, y, test_x, test_y) == sgd
    noise, test_noise = torch.randn(600, 10), torch.randn(400, 10)
    for fit in (probe.fit_probe, probe.sgd_probe):
        assert fit(noise, y, test_noise, test_y)["accuracy"] < 0.45


def test_few_examples_choose_the_penalty_on_each_fifth_in_turn(monkeypatch):
    """No example is fitted while it is held out, which each is once for a strength."""
    fitted, original, x = [], probe.logistic_regression, torch.arange(10.0)[:, None]
    monkeypatch.setattr(probe, "logistic_regression",
                        lambda x, *args: fitted.append(x.flatten().tolist()) or original(x, *args))
    probe.fit_probe(x, torch.arange(10) % 2, x, torch.arange(10) % 2)
    *fits, last = (set(np.round(np.array(rows) * x.numpy().std(ddof=1) + 4.5)) for rows in fitted)
    assert len(fits) >= 5 and len(fits) % 5 == 0 and last == set(range(10))
    assert all(sorted(i for rows in fits[k:k + 5] for i in last - rows) == sorted(last)
               for k in range(0, len(fits), 5))


def test_probe_of_text(trained, reviews):
    line = f"evaluate.py probe {trained('mlm --mask 0.3')} --data {reviews}"
    last = call_json(line)["results"]["layers"]["last"]
    assert last["train"] == 128 and last["accuracy"] > 0.65
    few = call_json(f"{line} --layer all --labels-per-class 5 --max-test 20")["results"]
    assert list(few["layers"]) == ["0", "1", "2"] and few["classes"] == ["neg", "pos"]
    assert few["layers"]["2"]["train"] == 10 and few["layers"]["2"]["test"] == 20
    assert "largest class" in call(f"{line} --labels-per-class 2")
    labels = np.array([row.endswith("pos") for row in reviews.read_text().splitlines()[1:]])
    predicted = np.array(few["layers"]["2"]["predictions"])
    assert np.array_equal(predicted == labels[few["places"]], few["layers"]["2"]["correct"])


def test_features_that_are_not_finite_are_refused(run):
    with torch.no_grad():
        run.model.embedding.weight.fill_(torch.inf)
    with pytest.raises(BadInput, match="diverged"):
        probe.frozen_features(run, probe.prepare(run, Part(some_texts(3))), "mean", False)


def test_probe_and_transfer_of_images(trained):
    run = trained("mlm --mask 0.5", data="shapes")
    few = "--label-fraction 0.02 --max-test 120"
    found = call_json(f"evaluate.py probe {run} {few} --pixels --classifier sgd")["results"]
    assert list(found["layers"]) == ["last", "pixels"] and found["layers"]["last"]["epochs"] == 90
    found = call_json(f"evaluate.py transfer untrained:{run} --data shapes shapes {few}")["results"]
    first, second = found["sets"]
    assert first == second and first["train"] < 300 and found["mean"] == first["accuracy"]
