"""support/operator.py and theory/attention.py, against an enumeration that knows no position matrices."""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from objectives import OBJECTIVES, flag, from_options
from support import operator
from support.cli import BadInput
from support.objective import Objective, Queries
from support.operator import spectrum
from theory import attention

S = 4


def fits(name):
    """Whether an objective that somebody added can be listed for S tokens with its defaults."""
    try:
        objective = from_options(name)
        objective.check(S)
        return objective.outcomes(S) is not None
    except BadInput:
        return False


CHOICES = [("ar", {}), ("prefix", {}), ("permutation", {}), ("diffusion", {}), ("segments", {"segment": 1}),
           ("dar", {"t": 2}), ("dar", {"t": 3}), ("dar", {"t": (1, 2)}), ("mtp", {"t": 1}), ("mtp", {"t": 2}),
           ("mtp", {"t": 3}), ("mlm", {"mask": 0.25}), ("mlm", {"mask": 0.5}), ("vl", {"mask": (0.2, 0.8)}),
           ("blocks", {"block": 1}), ("blocks", {"block": 2}), ("spans", {"mask": 0.5, "span": 1}),
           ("spans", {"mask": 0.5, "span": 2})]
CHOICES += [(name, {}) for name in OBJECTIVES if name not in dict(CHOICES) and fits(name)]


def by_enumeration(objective, groups, probability, weighting="targets", prior=(0.5, 0.5), T=2):
    """Walk over every f, query, class and whole sequence of tokens, add up P(context, target) -> sigma_j."""
    joint = defaultdict(float)
    for f, chance in zip(groups, probability.tolist()):
        rows = [(p, c, w) for p, c, w in zip(*(x[0].tolist() for x in objective.queries(f[None]))) if w > 0]
        f, s = f.tolist(), len(f)
        for y, share in enumerate(prior):
            for x in itertools.product(range(T), repeat=s):
                for p, c, w in rows:
                    weight = {"targets": w, "sequences": w / sum(row[2] for row in rows),
                              "contexts": w / sum(row[2] for row in rows if row[1] == c)}[weighting]
                    context = tuple((j, y, x[j]) for j in range(s) if 0 < f[j] < c)
                    joint[context, (p, y, x[p])] += chance * share * weight / T ** s
    rows, columns = ({x: i for i, x in enumerate(sorted(set(part)))} for part in zip(*joint))
    P = np.zeros((len(rows), len(columns)))
    for (context, target), mass in joint.items():
        P[rows[context], columns[target]] = mass
    P /= P.sum()
    return np.linalg.svd(P / np.sqrt(np.outer(P.sum(1), P.sum(0))), compute_uv=False)


def copies(values, r, like):
    """r copies of `values`, descending, filled with zeros to the length of `like`."""
    full = np.zeros(len(like))
    values = np.sort(np.tile(values, r))[::-1]
    full[:len(values)] = values[:len(full)]
    return full


# ---------------------------------------------------------------------------- position matrix and spectra

@pytest.mark.parametrize("weighting", operator.WEIGHTINGS)
@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_spectrum_is_that_of_the_enumerated_toy_model(name, options, weighting):
    objective = from_options(name, **options)
    x = spectrum(objective, S, weighting)
    assert x["method"] == "exact"
    outcomes = objective.outcomes(S)
    for prior, T in (((0.2, 0.8), 2), ((0.1, 0.6, 0.3), 1)):
        dense = by_enumeration(objective, *outcomes, weighting, prior, T)
        np.testing.assert_allclose(dense, copies(x["singular_values"], len(prior), dense), atol=1e-6)
    tail = (dense[len(prior):] ** 4).sum() / len(prior)
    assert x["tail_sigma4_per_class"] == pytest.approx(tail, abs=1e-6)


def test_segments_of_several_patches():
    objective = from_options("segments", segment=2)
    dense = by_enumeration(objective, *objective.outcomes(16), T=1, prior=(0.4, 0.6))
    expected = copies(spectrum(objective, 16)["singular_values"], 2, dense)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert (expected > 1e-6).sum() == 8  # as many as squares, times classes


def test_weightings_differ_where_they_should():
    dar = from_options("dar", t=2)
    first, second, third = (spectrum(dar, 6, w)["singular_values"] for w in operator.WEIGHTINGS)
    assert min(abs(first - second).max(), abs(first - third).max(), abs(second - third).max()) > 1e-3


def test_eq_3_is_mtp_and_dar_with_equal_contexts():
    for t in (1, 2, 3, 5):
        three = spectrum(from_options("mtp", t=t), 6)["singular_values"]
        again = spectrum(from_options("dar", t=t), 6, "contexts")["singular_values"]
        np.testing.assert_allclose(three, again, atol=1e-6)
        if t > 1:
            assert abs(three - spectrum(from_options("dar", t=t), 6)["singular_values"]).max() > 1e-3


@pytest.mark.parametrize("name", ["ar", "prefix", "permutation"])
def test_empty_context_is_shared_by_the_classes(name):
    objective = operator.FromNothing(from_options(name))
    f, probability = objective.outcomes(S)
    contexts, q, _, _ = operator.merge(*operator.pairs(objective, f, probability))
    one = operator.singular_values(operator.position_matrix(q), q.sum(0) > 0)
    others = operator.singular_values(operator.position_matrix(q, contexts.any(1)), q.sum(0) > 0)
    dense = by_enumeration(objective, f, probability, prior=(0.2, 0.5, 0.3))
    expected = np.sort(np.concatenate([one, others, others]))[::-1]
    np.testing.assert_allclose(dense[:len(expected)], expected, atol=1e-7)
    assert one.sum() > others.sum() + 0.1


@dataclass(frozen=True)
class Cuts(Objective):
    """A new objective with queries of its own: the last token from every prefix, later ones counting more."""

    def groups(self, batch, length, generator=None):
        return torch.arange(1, length + 1).repeat(batch, 1)

    def queries(self, groups):
        k = torch.arange(1, groups.shape[1])
        return Queries(*(x.repeat(len(groups), 1) for x in (torch.full_like(k, len(k)), k + 1, k.float())))

    def outcomes(self, length, limit=0):
        return self.groups(1, length), torch.ones(1, dtype=torch.float64)


@dataclass(frozen=True)
class Pairwise(Objective):
    """A new objective that nobody listed: two tokens are given, the others follow one by one."""

    def groups(self, batch, length, generator=None):
        order = torch.rand(batch, length, generator=generator).argsort(1)
        return order.clamp(min=1)


def test_new_objective_needs_no_theory():
    x = spectrum(Cuts(), S)
    dense = by_enumeration(Cuts(), *Cuts().outcomes(S), prior=(0.3, 0.7))
    np.testing.assert_allclose(dense, copies(x["singular_values"], 2, dense), atol=1e-6)
    assert x["closed_form"] is None and len(x["singular_values"]) == 1
    x = spectrum(Pairwise(), S, samples=20_000)
    f = 1 + torch.tensor(list(itertools.permutations(range(S))))
    exact = spectrum_of(Pairwise(), (f - 1).clamp(min=1))
    assert x["method"] == "20000 draws" and 0 < x["noise"] < 0.05
    assert abs(x["singular_values"] ** 2 - exact ** 2).max() < 4 * x["noise"]


def spectrum_of(objective, groups):
    _, q, _, _ = operator.merge(*operator.pairs(objective, groups))
    return operator.singular_values(operator.position_matrix(q), q.sum(0) > 0)


def test_told_position_every_spectrum_is_flat():
    for name, options in CHOICES:
        objective = from_options(name, **options)
        pairs = operator.pairs(objective, *operator.listed(objective, S))
        _, q, _, _ = operator.merge(*operator.tell_position(*pairs))
        M = operator.position_matrix(q)
        np.testing.assert_allclose(M, np.diag(q.sum(0) > 0), atol=1e-12)


# ---------------------------------------------------------------------------- closed forms

@pytest.mark.parametrize("s", [2, 3, 5, 7])
@pytest.mark.parametrize("weighting", operator.WEIGHTINGS)
def test_closed_forms_equal_enumeration(s, weighting):
    known = [("ar", {}), ("prefix", {}), ("permutation", {}), ("vl", {"mask": (0.3, 0.7)}), ("diffusion", {}),
             ("mtp", {"t": 1}), ("spans", {"mask": 0.5, "span": 2})]
    known += [("mlm", {"mask": n / s}) for n in range(1, s)] + [("blocks", {"block": b}) for b in range(1, s)]
    if weighting == "targets":
        known += [("dar", {"t": t}) for t in {1, 2, s - 1} if t < s]
    for name, options in known:
        x = spectrum(from_options(name, **options), s, weighting, flag=name)
        assert x["method"] == "exact"
        np.testing.assert_allclose(x["singular_values"] ** 2, x["closed_form"] ** 2, atol=1e-6)
        assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-6)


def test_closed_form_of_segments():
    for s, segment in ((4, 1), (9, 1), (16, 2)):
        x = spectrum(from_options("segments", segment=segment), s, flag="segments")
        assert x["method"] == "exact" or s == 9
        np.testing.assert_allclose(x["singular_values"] ** 2, x["closed_form"] ** 2, atol=1e-7)


def test_dar_tails():
    for t in range(1, 10):
        for s in range(max(2 * t - 1, t + 1), 2 * t + 8):
            x = spectrum(from_options("dar", t=t), s, flag="dar")
            assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-9)
    for s in (8, 20):
        for t, expected in ((2, (6 * s - 17) / 16), (3, (19 * s - 73) / 81), (4, (66 * s - 323) / 384)):
            assert operator.dar_tail(s, t) == pytest.approx(expected, abs=1e-12)
    tails = [spectrum(from_options("dar", t=t), 12)["tail_sigma4_per_class"] for t in range(1, 12)]
    assert (np.diff(tails) < 0).all()
    # between the two ranges nothing is claimed
    for t in (5, (1, 2)):
        assert operator.closed_form("dar", from_options("dar", t=t), 8) == (None, None, None)


def test_dar_2_is_a_walk_on_a_path():
    """The argument of path_cosines, step by step: the graph, its walk, the eigenvectors, the values."""
    for s in (3, 5, 8):
        objective = from_options("dar", t=2)
        contexts, q, _, _ = operator.merge(*operator.pairs(objective, *operator.listed(objective, s)))
        edges = [(f"context {int(seen.sum())}", f"target {p + 1}")
                 for seen, row in zip(contexts, q) for p in row.nonzero()[0]]
        path = [name for k in range(1, s) for name in (f"target {k + 1}", f"context {k}")]
        assert {frozenset(edge) for edge in edges} == {frozenset(two) for two in itertools.pairwise(path)}
        assert len(np.unique(q[q > 0])) == 1 and len(path) == 2 * s - 2
        walk = np.zeros((len(path), len(path)))
        for i in range(len(path)):
            beside = [j for j in (i - 1, i + 1) if 0 <= j < len(path)]
            walk[i, beside] = 1 / len(beside)
        for j in range(2 * s - 2):
            a = math.pi * j / (2 * s - 3)
            v = np.cos(a * np.arange(len(path)))
            np.testing.assert_allclose(walk @ v, math.cos(a) * v, atol=1e-12)
        values = spectrum(objective, s)["singular_values"]
        np.testing.assert_allclose(values, operator.path_cosines(s), atol=1e-7)


def test_longest_dar_maps_polynomials_to_polynomials():
    """The argument of polynomial_factors: degree j to degree j, leading coefficient times 1/(j + 1)."""
    s = 7
    objective = from_options("dar", t=s - 1)
    _, q, _, _ = operator.merge(*operator.pairs(objective, *operator.listed(objective, s)))
    q = q[np.argsort(-(q > 0).sum(1))]  # contexts 1..k, k = 1..s-1
    k, p = np.arange(1.0, s), np.arange(2.0, s + 1)
    forward = q[:, 1:] / q[:, 1:].sum(1, keepdims=True)  # E[. | k]
    backward = q[:, 1:].T / q[:, 1:].sum(0)[:, None]  # E[. | p]
    for j in range(s - 1):
        for operator_, inputs, outputs in ((forward, p, k), (backward, k, p)):
            y = operator_ @ inputs ** j
            fit = np.polynomial.Polynomial.fit(outputs, y, j).convert().coef
            np.testing.assert_allclose(np.polynomial.Polynomial(fit)(outputs), y, rtol=1e-8)
            assert fit[-1] == pytest.approx(1 / (j + 1), rel=1e-6)
    values = np.sort(np.linalg.eigvals(forward @ backward).real)[::-1]
    np.testing.assert_allclose(values, operator.polynomial_factors(s) ** 2, atol=1e-9)


def test_numbers_of_the_page():
    x = spectrum(from_options("dar", t=2), 8)
    cosines = [math.cos(j * math.pi / 13) for j in range(7)]
    np.testing.assert_allclose(x["singular_values"], cosines, atol=1e-9)
    vl = from_options("vl", mask=(0.25, 0.75))  # n = 1, 2, 3 with probability 1/4, 1/2, 1/4
    assert spectrum(vl, 4)["singular_values"][1] == pytest.approx(math.sqrt((4 / 2 - 1) / 3), abs=1e-9)
    average = 0.25 * 1 + 0.5 * (2 / 6) + 0.25 * (1 / 9)
    assert spectrum(vl, 4, "sequences")["singular_values"][1] == pytest.approx(math.sqrt(average), abs=1e-9)


# ---------------------------------------------------------------------------- from draws

def hide_outcomes(name, **options):
    cls = OBJECTIVES[name]
    return type("Sampled" + cls.__name__, (cls,), {"outcomes": lambda self, length, limit=0: None})(**options)


@pytest.mark.parametrize("weighting", operator.WEIGHTINGS)
@pytest.mark.parametrize(("name", "options"), [
    ("permutation", {}), ("dar", {"t": 3}), ("vl", {"mask": (0.2, 0.6)}), ("mtp", {"t": 2}),
    ("diffusion", {}), ("blocks", {"block": 2})])
def test_draws_agree_with_enumeration_within_their_noise(name, options, weighting):
    exact = spectrum(from_options(name, **options), 6, weighting)
    x = spectrum(hide_outcomes(name, **options), 6, weighting, samples=40_000)
    assert x["method"] == "40000 draws" and x["noise"] < 0.03
    assert abs(x["singular_values"] ** 2 - exact["singular_values"] ** 2).max() <= 4 * x["noise"] + 1e-6
    np.testing.assert_allclose(x["M"], exact["M"], atol=0.03)


def test_long_sequences():
    for name, options, s in (("mlm", {"mask": 0.15}, 64), ("permutation", {}, 64), ("diffusion", {}, 40),
                             ("segments", {"segment": 2}, 64)):
        x = spectrum(from_options(name, **options), s, flag=name)
        assert x["method"] == "closed form" and len(x["singular_values"]) in (s - 1, s)
    x = spectrum(hide_outcomes("mlm", mask=0.15), 64, samples=8000)
    assert abs(x["singular_values"][1:] ** 2 - (64 / 10 - 1) / 63).max() < 4 * x["noise"]


def test_draws_that_cannot_tell_are_refused():
    with pytest.raises(BadInput, match="smaller s or more samples"):
        spectrum(hide_outcomes("permutation"), 30, samples=2000)
    with pytest.raises(BadInput, match="at least 1000"):
        spectrum(hide_outcomes("permutation"), 5, samples=10)


# ---------------------------------------------------------------------------- Theorem 4.3

def random_attention(vocab, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = scale * torch.randn(4, vocab, d, generator=generator, dtype=torch.float64)
    return attention.LinearAttention(*weights)


TOKENS = torch.tensor(list(itertools.product((0, 1), (2, 3), (4, 5), (6, 7))))


def test_linear_attention_is_the_pooled_product():
    model, tokens = random_attention(7, 3, 1.0, 0), torch.tensor([[0, 3, 5, 6]])
    seen = torch.tensor([True, False, True, True])
    x = tokens[0, seen]
    f = (model.Q[x] @ model.K[x].T @ model.V[x]).sum(0)
    torch.testing.assert_close(model.features(tokens, seen[None])[0], f)
    torch.testing.assert_close(model.scores(tokens, seen[None])[0], model.W @ f)
    pair = [(model.Q[a] @ model.K[b]) * model.V[b] for a in tokens[0] for b in tokens[0]]
    triple = [(model.Q[a] @ model.K[b]) * model.V[c] for a in tokens[0] for b in tokens[0] for c in tokens[0]]
    for power, terms in ((2, pair), (3, triple)):
        largest = max((u - v).norm().item() for u in terms for v in terms)
        assert model.eta(tokens, power) == pytest.approx(largest, rel=1e-6)
    assert attention.growth(model, tokens[:, :1].expand(1, 4)) == pytest.approx(16)


def test_corrected_bound_holds_and_the_printed_one_does_not():
    for seed, scale in itertools.product(range(8), (0.3, 1.0, 3.0)):
        x = attention.measure_attention(random_attention(8, 2, scale, seed), TOKENS, 2)
        assert (x["loss"][:2] <= x["corrected"] + 1e-9).all()
    measured = attention.measure_attention(*attention.broken_model(60.0))
    x = {key: value.mean() for key, value in measured.items()}
    assert x["loss"] == pytest.approx((60 ** 2 / 3 + 60 + 0) / 2)  # c^2/3 + c after one token, 0 after two
    assert x["printed"] == pytest.approx(((7 ** 2 + 7 * 120) / 2 + 1 + 1) / 2)  # w = 7 and 0, eta = 2c
    assert x["corrected"] == pytest.approx((540 + 540 ** 2) / 2)  # w = 3: D = 3c + 3 * 2c
    assert x["printed"] < x["loss"] < x["corrected"]


def test_steps_of_the_proof():
    """What is marked as holding does for any model; each printed step fails for the counterexample."""
    def wrong(steps):
        return [step for step, (left, right) in steps.items()
                if (abs(left - right) if " = " in step else left - right) > 1e-9 * max(1, abs(right))]

    for seed, scale in itertools.product(range(6), (0.3, 1.0, 3.0)):
        failed = wrong(attention.proof_steps(random_attention(8, 2, scale, seed), TOKENS, 3))
        assert not any("here" in step for step in failed)
    failed = wrong(attention.proof_steps(*attention.broken_model()))
    assert [step.split()[1] for step in failed] == ["10", "11", "12", "16", "19", "21"]


def test_theorem43_experiment():
    x = attention.theorem43(steps=500)
    s_m = x["visible"]
    assert s_m == 3
    assert (x["loss_one_length"][:s_m] <= x["corrected_bound"]).all()
    assert (x["loss_all_lengths"] <= x["corrected_bound_all_lengths"]).all()
    # at its own length the model comes near the best that a blind one can do; lengths it never saw cost it
    assert x["loss_one_length"][s_m - 1] < 0.8 * x["ideal_blind"][s_m - 1]
    others = [0, 1, 3, 4]
    assert x["loss_all_lengths"][others].mean() < x["loss_one_length"][others].mean() - 0.02
    # the ideals: -E[P/P_G] / 2 + E_(P_G)[(P/P_G)^2] / 4 for a P that is uniform on `likely` of 24 tokens
    for i, m in enumerate(x["prefix"]):
        for name, likely in (("ideal_blind", 2 * (6 - m)), ("ideal_told_position", 2)):
            score = 24 / likely / 2
            assert x[name][i] == pytest.approx(-score + likely / 24 * score ** 2)
    assert x["share_of_blindness"] > 0.85 > x["share_of_blindness_all_prefixes"] > 0.58
    assert np.diff(x["norm_one_length"]).min() > 0.5 and x["w"].tolist() == [27, 26, 19, 0, -37, -98]


def test_flags_reach_the_closed_forms():
    """The names in closed_form are flags of the registry."""
    for name, options in (("diffusion", {}), ("permutation", {}), ("spans", {"mask": 0.5})):
        objective = from_options(name, **options)
        assert operator.closed_form(flag(objective), objective, 8)[1] is not None
