"""The noisy toy model against brute force, and networks against the exact optimum."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_both, call_json, seeded

from experiments import toy
from experiments.spectrum import normalised, pairs
from objectives import describe, from_options, spectral_loss

RESULTS = Path(__file__).resolve().parent.parent / "results"
SMALL = [("ar", {}), ("prefix", {}), ("dar", {"t": 2}), ("mlm", {"mask": 0.5}), ("permutation", {}),
         ("vl", {"mask": (0.25, 0.75)})]


def enumerated(model, contexts, q):
    """P_M token by token, from the definition of the noisy model, and P(y | context)."""
    r, T, eps = model.r, model.T, model.eps
    token = np.array([[(1 - eps) * (y == v // T) + eps / r for v in range(r * T)] for y in range(r)]) / T
    P, posterior = [], []
    for S, weight in zip(contexts, q):
        for x in itertools.product(range(r * T), repeat=int(S.sum())):
            joint = np.prod([token[:, v] for v in x], axis=0) / r * np.ones(r)                # P(y, x_S)
            if joint.sum() > 0:
                P.append(np.outer(weight, joint @ token).ravel())  # q(S, p) P(x_S, x_p)
                posterior.append(joint / joint.sum())
    return np.array(P), np.array(posterior)


@pytest.mark.parametrize("eps", [0, 0.3])
@pytest.mark.parametrize(("name", "options"), SMALL)
def test_spectrum_splits_into_positions_once_and_the_class_r_minus_1_times(name, options, eps):
    model = toy.NoisyToy(r=3, s=4, T=2 if name == "ar" else 1, eps=eps)
    contexts, q = pairs(from_options(name, **options), 4)
    P, posterior = enumerated(model, contexts, q)
    expected = np.linalg.svd(normalised(P[:, P.sum(0) > 0]), compute_uv=False)
    position, classes, every, needs = toy.split(model, contexts, q)
    found = np.append(every, np.zeros(len(expected)))[:len(expected)]
    assert P.sum() == pytest.approx(1) and np.abs(found - expected).max() < 1e-10
    assert len(classes) == len(position) and (classes <= position + 1e-12).all()
    # Merged contexts give the probe of all contexts. The sector rule's t keeps the class, one less does not.
    for found in (toy.exact_probe(P, posterior, [needs - 1, needs, 12], 5),
                  toy.exact_probe(*toy.merged(model, contexts, q), [needs - 1, needs, 12], 5)):
        assert found[1:] == pytest.approx([0, 0], abs=1e-10) and (found[0] > 0.01 or not eps)
    P = P.reshape(len(P), 4, -1)                                               # (contexts, positions, tokens)
    for blind, asked in ((True, (1, 2)), (False, 2)):
        chance = P / np.where(P > 0, P.sum(asked, keepdims=True), 1)
        least = -(P * np.log(np.where(P > 0, chance, 1))).sum()
        assert toy.bayes_loss(model, contexts, q, blind) == pytest.approx(least, abs=1e-12)


def test_sector_rule_where_contexts_and_targets_are_connected():
    r, s = 4, 8
    for eps, (name, options) in itertools.product((0.3, 0.5), (("dar", {"t": 2}), ("mlm", {"mask": 0.25}))):
        model, (contexts, q) = toy.NoisyToy(r, s, eps=eps), pairs(from_options(name, **options), s)
        position, classes, _, needs = toy.split(model, contexts, q)
        assert needs == (position > classes[0] - 1e-9).sum() + r - 1
        P, pi = toy.merged(model, contexts, q)
        ts = [max(needs - r + 1, 1), needs - 1, needs, needs + 3, r * s]
        error = toy.exact_probe(P, pi, ts, rotations=3)
        assert error[2:].max() < 1e-10 and error[1] > 1e-3
        assert error[0] == pytest.approx(P.sum(1) @ pi.max(1) - 1 / r, abs=1e-9)  # without a copy it is gone


def test_a_smaller_tail_can_need_a_larger_bottleneck():
    """Theorem 4.1's tail, of the noisy model at that t: it orders the first two and misorders the last."""
    model = toy.NoisyToy(4, 8, eps=0.5)
    for (name, options), expected in ((("mlm", {"mask": 0.25}), (0.254, 11, 0.624)),
                                      (("dar", {"t": 2}), (0.112, 8, 0)),
                                      (("vl", {"mask": (0.125, 0.875)}), (0.064, 11, 0.482))):
        contexts, q = pairs(from_options(name, **options), 8)
        sigma, needs = toy.split(model, contexts, q)[2:]
        [error] = toy.exact_probe(*toy.merged(model, contexts, q), [8], rotations=2)
        assert ((sigma[8:] ** 4).sum(), needs, error) == pytest.approx(expected, abs=1e-3)


def test_published_tails_are_theorem_41s():
    """Of the noisy model, beyond the t at hand, in the pages that are published."""
    toys, bridges = (json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("toy", "bridge"))
    published = {(row["objective"], row["eps"]): row["tail"] for row in bridges["found"]["results"]["rows"]}
    for name, options, eps in (("mlm", {"mask": 0.25}, 0.5), ("dar", {"t": 2}, 0.3), ("ar", {}, 0.0)):
        objective = from_options(name, **options)
        sigma = toy.split(toy.NoisyToy(4, 8, 2, eps), *pairs(objective, 8))[2]
        name, tails = describe(objective), [(sigma[t:] ** 4).sum() for t in (4, 8, 12)]
        [line, few] = [x.split() for x in toys["text"] if x.startswith(f"{name} ") and f" {eps:g} " in x]
        assert [*line[-12::4], few[-7]] == [f"{tail:.3f}" for tail in (*tails, tails[0])]
        if eps < 0.5:  # which the bridge does not have
            assert published[name, eps] == pytest.approx(tails[0])


def test_the_order_is_that_of_the_tail_at_hand():
    """Errors that follow the tail at t = 2, and with few labels the tail at t = r = 3."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(6):
        tails = rng.random(6)
        network = {"all": [[tails[1], 0.0]] * 2, "own": [[tails[2]] * 2], "common": [[0.1] * 2]}
        rows.append({"eps": 0.5, "tails": tails, "exact": tails, "needs": -tails[1],
                     **dict.fromkeys(toy.LOSSES, network)})
    for x in toy.findings(rows, [2, 6], 3):
        at = x["at"][0]
        assert at["tail"] == pytest.approx([1, 1, 1]) == at["exact"] and at["exact_tail"] == pytest.approx(1)
        assert at["needs"] == pytest.approx([-1, -1, -1])
        assert x["few"]["own"] == pytest.approx([1, 1, 1]) and x["few"]["common"] is None


def test_draw_agrees_with_the_exact_model():
    model = toy.NoisyToy(3, 4, T=2, eps=0.4)
    contexts, q = pairs(from_options("dar", t=2), 4)
    own = torch.tensor(contexts), torch.tensor(q, dtype=torch.float32)
    bag, P, pi, y = toy.draw_texts(model, *own, 40_000, seeded(1))
    merged, exact = toy.merged(model, contexts, q)
    assert P.mean(0).numpy() == pytest.approx(merged.sum(0).repeat(2) / 2, abs=4e-3)  # T = 2 values a class
    assert pi.max(1).values.mean().item() == pytest.approx(merged.sum(1) @ exact.max(1), abs=6e-3)
    assert pi.gather(1, y[:, None]).mean().item() == pytest.approx((pi ** 2).sum(1).mean().item(), abs=6e-3)
    assert set(bag.sum(1).long().tolist()) == set(contexts.sum(1).tolist())


def test_spectral_networks_reach_the_optimum_and_loss_is_that_of_the_theorem():
    model, ts, seeds = toy.NoisyToy(3, 4, eps=0.3), [2, 5, 12], 2
    contexts, q = pairs(from_options("vl", mask=(0.25, 0.75)), 4)
    own = torch.tensor(contexts), torch.tensor(q, dtype=torch.float32)
    sigma = toy.split(model, contexts, q)[2]
    generator = seeded()
    weights, root = toy.train_networks(model, *own, ts, "spectral", seeds, 600, generator)
    bag, P, _, _ = toy.draw_texts(model, *own, 20_000, generator)
    loss = toy.network_losses(weights, bag.expand(seeds, -1, -1), P.expand(seeds, -1, -1), root, "spectral")
    best = -torch.tensor([(sigma[:t] ** 2).sum() for t in ts])
    assert ((loss - best) / -best).abs().max() < 0.06
    z = (toy.features(weights, bag.expand(seeds, -1, -1)) @ weights[3])[0]     # the same from drawn targets
    targets = torch.multinomial(P, 1, generator=generator)[:, 0]
    assert spectral_loss(z / root, targets, root ** 2).item() == pytest.approx(loss[0, 0].item(), abs=0.05)


def test_spectral_loss_against_its_formula():
    scores, targets = torch.randn(6, 4, generator=seeded()), torch.randint(4, (6,), generator=seeded())
    marginal = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(-2 * scores[i, targets[i]] + sum(marginal[v] * scores[i, v] ** 2 for v in range(4))
                   for i in range(6)) / 6
    torch.testing.assert_close(spectral_loss(scores, targets, marginal), expected)


def test_probes_of_features_that_are_known():
    y, generator = torch.arange(400) % 4, seeded()
    f = torch.stack([torch.eye(4)[y], torch.rand(400, 4, generator=generator)])
    for error in toy.all_labels(f, f[0]), toy.few_label_errors(f, f[0], y, generator):
        assert error.shape == (2,) and error[0] == 0 and error[1] > 0.4


def test_spearman():
    x, y = np.array([1.0, 2, 2, 3, 5, 8]), np.array([0.3, 0.1, 0.2, 0.2, 0.7, 0.5])
    ranks = np.corrcoef([1, 2.5, 2.5, 4, 5, 6], [4, 1, 2.5, 2.5, 6, 5])
    assert toy.spearman(x, y) == pytest.approx(ranks[0, 1])
    assert toy.spearman(x, np.zeros(6)) is None and toy.spearman(x, x * 1e-5) is None  # all within RESOLUTION
    middle, low, high = toy.correlation(x, np.array([x / 10, x / 10, -x / 20]))
    assert low <= middle <= high and middle == pytest.approx(1)
    assert toy.correlation(x, np.zeros((3, 6))) is None


def test_command(tmp_path, monkeypatch):
    assert {"permutation", "ar", "mtp t=2"} <= {describe(objective) for objective in toy.candidates(8)}
    pytest.importorskip("matplotlib")
    small = "spectral.py toy --quick --s 4 --r 3 --T 1 --steps 3 --eps 0.5 --seed 3"
    text, content = call_both(f"{small} --plot {tmp_path / 'toy.png'}")
    assert "Spearman" in text and "nan" not in text and (tmp_path / "toy.png").stat().st_size > 10_000
    rows = content["rows"]
    assert len(rows) == 5 and np.shape(rows[0]["spectral"]["all"]) == (2, 4)
    last = toy.candidates(4, quick=True)[-1:]
    monkeypatch.setattr(toy, "candidates", lambda s, quick: last)
    assert call_json(small)["rows"] == rows[-1:]  # rows depend on nothing else that is run
