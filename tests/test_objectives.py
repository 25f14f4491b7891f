"""The losses against plain formulas, the registry's promises, and the refusal of wrong combinations."""
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import evaluate
import objectives
import spectral
from masks import query_mask
from objectives import (
    OBJECTIVES,
    choose_path,
    describe,
    draw_batch,
    from_options,
    loss_sum,
    scores_next,
    spectral_loss,
    target_nll,
)
from support.cli import BadInput
from support.kernels import LinearCrossEntropy
from support.objective import Objective


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_linear_cross_entropy_values_and_gradients(chunk):
    generator = torch.Generator().manual_seed(0)
    x, E = (torch.randn(n, 5, generator=generator, requires_grad=True) for n in (7, 9))
    labels, weight = torch.randint(9, (7,), generator=generator), torch.rand(7, generator=generator)
    ours = LinearCrossEntropy.apply(4 * x, E, labels, weight, chunk)
    plain = (F.cross_entropy(4 * x @ E.T, labels, reduction="none") * weight).sum()
    assert torch.allclose(ours, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(2 * ours, (x, E)), torch.autograd.grad(2 * plain, (x, E))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_survives_improbable_labels():
    x = torch.tensor([[200.0], [-200.0]])
    loss = LinearCrossEntropy.apply(x, torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 0]), torch.ones(2), 8)
    assert loss.item() == pytest.approx(800)


def test_loss_is_the_sum_over_targets(way, make_model):
    objective, path = way
    model = make_model(dtype=torch.float32)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    batch = draw_batch(objective, path, tokens, 11, torch.Generator().manual_seed(2), "always")
    total = 0.0
    for b in range(3):
        for p in range(8):
            if batch.groups[b, p] > 1:
                total += target_nll(model, tokens[b:b + 1], batch.groups[b:b + 1], torch.tensor([[p]]), path).item() \
                    if path != "mask" else masked_nll(model, tokens[b], batch.groups[b], p)
    assert loss_sum(model, batch, path).item() == pytest.approx(total, rel=1e-4)


def masked_nll(model, tokens, groups, p):
    """-log P of token p with [MASK] at all targets at once, by the plain softmax."""
    everything = torch.arange(len(tokens))[None]
    logits = model.logits(model(tokens[None], groups[None], everything, "mask"))[0, p]
    return (logits.logsumexp(0) - logits[tokens[p]]).item()


def test_one_graph_whatever_is_drawn(way, make_model):
    """torch.compile sees the same shapes in every batch: one graph, no breaks, the same loss."""
    objective, path = way
    model = make_model(dtype=torch.float32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss_sum, dynamic=False, backend="eager")
    for seed in range(4):
        batch = draw_batch(objective, path, torch.randint(11, (4, 8)), 11, torch.Generator().manual_seed(seed))
        assert torch.allclose(compiled(model, batch, path), loss_sum(model, batch, path))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_vl_with_equal_ends_equals_mlm(make_model):
    model, tokens = make_model(dtype=torch.float32), torch.randint(11, (4, 8))
    losses = []
    for objective in (from_options("mlm", mask=0.3), from_options("vl", mask=(0.3, 0.3))):
        batch = draw_batch(objective, "mask", tokens, 11, torch.Generator().manual_seed(0))
        losses.append((batch.tokens, batch.blank, batch.targets, loss_sum(model, batch, "mask")))
    assert all(torch.equal(a, b) for a, b in zip(*losses))


def test_80_10_10_rule():
    tokens = torch.arange(400)[None].expand(500, -1)  # ids 0..399, so that a changed token shows
    batch = draw_batch(from_options("mlm", mask=0.5), "mask", tokens, 400, torch.Generator().manual_seed(0), "bert")
    target = batch.groups == 2
    changed = batch.tokens != tokens
    n = target.sum().item()
    assert not batch.blank[~target].any() and not changed[~target].any()
    assert not (changed & batch.blank).any()
    for share, expected in ((batch.blank[target], 0.8), (changed[target], 0.1 * 399 / 400)):
        assert abs(share.double().mean().item() - expected) < 4 * math.sqrt(0.25 / n)
    assert torch.equal(batch.labels, tokens.gather(1, batch.targets))
    always = draw_batch(from_options("mlm", mask=0.5), "mask", tokens, 400, torch.Generator().manual_seed(0), "always")
    assert torch.equal(always.blank, always.groups == 2) and torch.equal(always.tokens, tokens)


def test_groups_can_be_pinned(way):
    """CUDA pins a batch in place, which a tensor that repeats its memory refuses."""
    batch = draw_batch(*way, torch.zeros(3, 8, dtype=torch.long), 11)
    assert all(0 not in field.stride() for field in batch)


def test_dar_first_group_is_uniform():
    first = (from_options("dar", t=3).groups(6000, 9, torch.Generator().manual_seed(0)) == 1).sum(1)
    counts = Counter(first.tolist())
    assert set(counts) == {1, 2, 3} and all(abs(c - 2000) < 4 * math.sqrt(6000 * 2 / 9) for c in counts.values())


@pytest.mark.parametrize("objective", [
    from_options("ar"), from_options("dar", t=3), from_options("mlm", mask=0.4), from_options("vl", mask=(0.2, 0.7)),
    from_options("vl", mask=(0.5, 0.5)), from_options("vl", mask=(0.01, 1.0)), from_options("permutation"),
    from_options("prefix")], ids=describe)
def test_listed_outcomes_are_what_the_sampler_draws(objective):
    """Chi-squared of 20,000 draws against the listed distribution."""
    groups, probability = objective.outcomes(5)
    assert probability.sum().item() == pytest.approx(1)
    expected = Counter()
    for f, p in zip(groups.tolist(), probability.tolist()):
        expected[tuple(f)] += p
    draws = 20_000
    seen = Counter(map(tuple, objective.groups(draws, 5, torch.Generator().manual_seed(0)).tolist()))
    assert seen.keys() <= expected.keys()
    chi2 = sum((seen[f] - draws * p) ** 2 / (draws * p) for f, p in expected.items())
    k = len(expected) - 1
    assert chi2 <= k + 5 * math.sqrt(2 * k) + 1e-9


def test_every_token_is_scored_once_with_its_whole_prefix(way):
    objective, path = way
    for passes in objective.left_to_right(7, path).values():
        scored = torch.stack([scores_next(f) for f in passes])
        assert scored.sum(0).tolist() == [0] + [1] * 6
        for f, row in zip(passes, scored):
            for p in row.nonzero()[:, 0].tolist():
                assert query_mask(f)[p].nonzero()[:, 0].tolist() == list(range(p))


def test_spectral_loss_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(6, 4, generator=generator), torch.randint(4, (6,), generator=generator)
    marginal = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(-2 * scores[i, targets[i]] + sum(marginal[v] * scores[i, v] ** 2 for v in range(4))
                   for i in range(6)) / 6
    assert torch.allclose(spectral_loss(scores, targets, marginal), expected)


@pytest.mark.parametrize("options, says", [
    ({"objective": "vl", "mask": (0.15,)}, "--objective mlm --mask 0.15"),
    ({"objective": "mlm", "mask": (0.15, 0.3)}, "--objective vl --mask 0.15,0.3"),
    ({"objective": "mlm", "t": 2}, "--objective dar"),
    ({"objective": "ar", "mask": (0.15,)}, "--objective mlm"),
    ({"objective": "mlm", "mask": (0.0,)}, "--mask 0.15"),
    ({"objective": "mlm", "mask": (1.0,)}, "--mask 0.15"),
    ({"objective": "vl", "mask": (0.3, 0.15)}, "--mask 0.15,0.3"),
    ({"objective": "vl", "mask": (0.0, 0.3)}, "--mask 0.15,0.3"),
    ({"objective": "vl", "mask": (0.1, 0.2, 0.3)}, "two ratios"),
    ({"objective": "bert"}, "ar, dar, mlm, vl"),
])
def test_wrong_combinations_say_what_to_type(options, says):
    with pytest.raises(BadInput, match=says.replace("(", r"\(")):
        from_options(**options)


@pytest.mark.parametrize("t", [0, 8, 200])
def test_t_must_fit_the_sequence(t):
    with pytest.raises(BadInput, match="1..7"):
        from_options("dar", t=t).check(8)


def test_one_stream_cannot_run_dar():
    with pytest.raises(BadInput, match="--streams 2"):
        choose_path(from_options("dar"), 1)
    assert {flag: choose_path(from_options(flag)) for flag in OBJECTIVES} == {
        "ar": "causal", "dar": "two-stream", "mlm": "mask", "vl": "mask", "permutation": "two-stream",
        "prefix": "two-stream"}
    assert choose_path(from_options("ar"), 2) == "two-stream"


def test_a_new_objective_is_one_function(monkeypatch, make_run):
    """The README's example: registered, drawn, trained for a step, evaluated and given a spectrum."""

    @dataclass(frozen=True)
    class EverySecond(Objective):
        paper = "every second token"
        one_stream = "mask"

        def groups(self, batch, length, generator=None):
            return (1 + torch.arange(length) % 2).repeat(batch, 1)

    monkeypatch.setitem(OBJECTIVES, "second", EverySecond)
    objective = from_options("second")
    objectives.main(["second", "--length", "4"])
    for path in ("mask", "two-stream"):
        run = make_run(objective, path, vocab=3, length=4)
        batch = draw_batch(objective, path, torch.randint(3, (2, 4)), 3)
        assert batch.weight.tolist() == [[1, 1, 0]] * 2 and batch.targets[:, :2].tolist() == [[1, 3]] * 2
        assert loss_sum(run.model.float(), batch, path).isfinite()
        sequences = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(3)] * 3)
        for nll in evaluate.left_to_right(run, sequences).values():
            assert (-nll.double().sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert spectral.spectrum(objective, 4, samples=2000)["singular_values"].shape == (2,)


def test_an_f_that_one_stream_cannot_run_is_refused():
    @dataclass(frozen=True)
    class Wrong(type(from_options("prefix"))):
        one_stream = "causal"

    with pytest.raises(ValueError, match="one_stream"):
        draw_batch(Wrong(), "causal", torch.zeros(4, 6, dtype=torch.long), 3)
