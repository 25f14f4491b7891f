"""The theory: spectra against an enumeration that knows no position matrix, closed forms, every theorem."""

import functools
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import call, call_json

import spectral
from experiments import generation_bound as bound
from experiments.spectrum import cooccurrence, normalised, pairs, position_matrix, spectrum, token_sets
from masks import Objective, equally_likely, queries_of
from objectives import OBJECTIVES, from_options
from util import BadInput

S = 4
CHOICES = [("ar", {}), ("prefix", {}), ("permutation", {}), ("diffusion", {}), ("segments", {"segment": 1}),
           *(("dar", {"t": t}) for t in (2, 3, (1, 2))), *(("mtp", {"t": t}) for t in (2, 3)),
           *(("mlm", {"mask": mask}) for mask in (0.25, 0.5)), ("vl", {"mask": (0.2, 0.8)}),
           *(("blocks", {"block": block}) for block in (1, 2)),
           *(("spans", {"mask": 0.5, "span": span}) for span in (1, 2))]


# ---------------------------------------------------------------------------- spectra

def by_enumeration(objective, s, prior=(0.5, 0.5), T=2):
    """Walk over every f, query, class and whole sequence of tokens, add up P(context, target) -> sigma_j."""
    joint = defaultdict(float)
    groups, probability = objective.outcomes(s)
    for f, chance in zip(groups, probability.tolist()):
        rows = [(p, c, w) for p, c, w in zip(*(x[0].tolist() for x in objective.queries(f[None]))) if w > 0]
        f = f.tolist()
        for y, share in enumerate(prior):
            for x in itertools.product(range(T), repeat=s):
                for p, c, w in rows:
                    context = tuple((j, y, x[j]) for j in range(s) if 0 < f[j] < c)
                    joint[context, (p, y, x[p])] += chance * share * w / T ** s
    rows, columns = ({x: i for i, x in enumerate(sorted(set(part)))} for part in zip(*joint))
    P = np.zeros((len(rows), len(columns)))
    for (context, target), mass in joint.items():
        P[rows[context], columns[target]] = mass
    P /= P.sum()
    return np.linalg.svd(P / np.sqrt(np.outer(P.sum(1), P.sum(0))), compute_uv=False)


def copies(values, r, like):
    """r copies of `values`, descending, filled with zeros to the length of `like`."""
    return np.sort(np.append(np.tile(values, r), np.zeros(len(like))))[::-1][:len(like)]


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_spectrum_is_that_of_the_enumerated_toy_model(name, options):
    objective = from_options(name, **options)
    x = spectrum(objective, S)
    for prior, T in (((0.2, 0.8), 2), ((0.1, 0.6, 0.3), 1)):
        dense = by_enumeration(objective, S, prior, T)
        np.testing.assert_allclose(dense, copies(x["singular_values"], len(prior), dense), atol=1e-6)
    tail = (dense[len(prior):] ** 4).sum() / len(prior)
    assert x["method"] == "exact" and x["tail_sigma4_per_class"] == pytest.approx(tail, abs=1e-6)


def test_segments_of_several_patches():
    objective = from_options("segments", segment=2)
    dense = by_enumeration(objective, 16, T=1)
    x = spectrum(objective, 16, flag="segments")
    expected = copies(x["singular_values"], 2, dense)
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert (expected > 1e-6).sum() == 8  # as many as squares, times classes
    np.testing.assert_allclose(x["singular_values"] ** 2, x["closed_form"] ** 2, atol=1e-7)


@dataclass(frozen=True)
class TwoGiven(Objective):
    """A new objective that is only sampled: two tokens are given, the others follow one by one."""

    def groups(self, batch, length, generator=None):
        return torch.rand(batch, length, generator=generator).argsort(1).clamp(min=1)


def test_a_new_objective_needs_no_theory(monkeypatch):
    class Listed(TwoGiven):
        def outcomes(self, length, limit=200_000):
            return equally_likely(torch.tensor(list(itertools.permutations(range(length)))).clamp(min=1))

    x, exact = spectrum(TwoGiven(), S), spectrum(Listed(), S)["singular_values"]
    assert x["method"] == "100,000 draws" and abs(x["singular_values"] - exact).max() < 0.02
    monkeypatch.setitem(OBJECTIVES, "two", TwoGiven)
    [x] = call_json("spectral.py spectrum --objective two --s 5 --r 2")["spectra"]
    assert x["objective"] == "two" and x["tail_sigma4"] == pytest.approx(2 * x["tail_sigma4_per_class"])


def test_draws_that_cannot_tell_are_refused():
    """Of 100,000 halves of 24 tokens hardly any two are alike: the spectrum would look flat."""
    class MiddleOnly(TwoGiven):
        def max_targets(self, length):
            return 1

        def queries(self, groups):
            return queries_of(groups, (groups == groups.shape[1] // 2).float(), 1)

    with pytest.raises(BadInput, match="smaller s"):
        spectrum(MiddleOnly(), 24)
    assert spectrum(MiddleOnly(), 8)["method"] == "100,000 draws"

    class SampledMask(type(from_options("mlm"))):  # where all f are 1 or 2 a draw shows all targets
        outcomes = Objective.outcomes

    values = spectrum(SampledMask(mask=0.25), 12)["singular_values"]
    assert np.abs(values[1:] ** 2 - (12 / 3 - 1) / 11).max() < 0.02


def test_told_position_every_spectrum_is_flat():
    for name, options in CHOICES:
        _, q = pairs(from_options(name, **options), S, told=True)
        np.testing.assert_allclose(position_matrix(q), np.diag(q.sum(0) > 0), atol=1e-12)


# ---------------------------------------------------------------------------- closed forms

@pytest.mark.parametrize("s", [2, 3, 5, 7])
def test_closed_forms_equal_enumeration(s):
    known = [("ar", {}), ("prefix", {}), ("permutation", {}), ("vl", {"mask": (0.3, 0.7)}), ("diffusion", {}),
             ("mtp", {"t": 1}), ("spans", {"mask": 0.5, "span": 2})]
    known += [("mlm", {"mask": n / s}) for n in range(1, s)] + [("blocks", {"block": b}) for b in range(1, s)]
    known += [("dar", {"t": t}) for t in {1, 2, s - 1} if t < s]
    for name, options in known:
        x = spectrum(from_options(name, **options), s, flag=name)
        assert x["method"] == "exact"
        np.testing.assert_allclose(x["singular_values"] ** 2, x["closed_form"] ** 2, atol=1e-6)
        assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-6)


def test_closed_form_where_the_list_is_too_long():
    for name, options, s in (("mlm", {"mask": 0.15}, 64), ("permutation", {}, 64), ("diffusion", {}, 40),
                             ("segments", {"segment": 2}, 64), ("blocks", {"block": 8}, 40)):
        x = spectrum(from_options(name, **options), s, flag=name)
        assert x["method"] == "closed form" and len(x["singular_values"]) in (s - 1, s)
    with pytest.raises(BadInput, match="smaller s"):
        spectrum(from_options("permutation"), 64)


def test_dar_tails():
    for t in range(1, 8):
        for s in range(max(2 * t - 1, t + 1), 2 * t + 6):
            x = spectrum(from_options("dar", t=t), s, flag="dar")
            assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-9)
    tails = [spectrum(from_options("dar", t=t), 12)["tail_sigma4_per_class"] for t in range(1, 12)]
    assert (np.diff(tails) < 0).all()
    assert tails[1:4] == pytest.approx([(6 * 12 - 17) / 16, (19 * 12 - 73) / 81, (66 * 12 - 323) / 384])


# ---------------------------------------------------------------------------- Theorem 4.2

@pytest.mark.parametrize(("r", "s", "T", "n"), [(2, 4, 2, 2), (3, 3, 2, 2), (2, 5, 1, 3), (1, 4, 3, 1)])
def test_theorem42(r, s, T, n):
    x = spectral.theorem42(r, s, T, n / s)
    assert x["unit_values"]["autoregressive"] == r * (s - 1)
    assert x["unit_values"]["autoregressive_empty_context"] == r * (s - 1) + 1
    expected = np.append(np.ones(r), np.full(r * (s - 1), math.sqrt((s - n) / (n * (s - 1)))))
    np.testing.assert_allclose(x["masked"][:r * s], expected, atol=1e-9)
    if n > 1:
        assert x["not_larger_at"] == list(range(r * (s - 1) + 1, r * s + 1))   # the last r
    P_C, P_G = 1 / (r * math.comb(s, n) * T ** (s - n)), 1 / (r * s * T)
    [entry] = [row for row in x["rows"] if "entries" in row["claim"]]
    assert float(entry["computed"]) == pytest.approx(P_C / (n * T) / math.sqrt(P_C * P_G), abs=1e-6)
    assert all(row["checked"] for row in x["rows"])


def test_theorem42_elsewhere():
    x = spectral.theorem42(2, 4, 2, 0.6)                                       # 2.4 of 4 tokens: 2 are hidden
    assert x["masked"][2] == pytest.approx(math.sqrt(2 / (2 * 3))) and x["hidden"] == 2
    assert [x["rows"][2][name] for name in ("printed", "verdict")] == [
        f"1.000000 x 2, {math.sqrt(4 * 0.4 / (2.4 * 3)):.6f} x 6", "holds where rho s is whole"]
    chance = {n: math.comb(4, n) * 0.75 ** n * 0.25 ** (4 - n) for n in range(1, 4)}
    mean = sum(n * p for n, p in chance.items()) / sum(chance.values())  # coins are masks of the mean count
    x = spectral.theorem42(2, 4, 2, 0.75)
    assert x["masked_by_coin_flips"][2] == pytest.approx(math.sqrt((4 / mean - 1) / 3), abs=1e-9)
    sets = token_sets(2, 3, 2, literal=True)
    assert sets[0, 0].tolist() == [5, 6] and sets[1, 0].tolist() == [6, 8]     # 6 in both classes
    assert len(np.unique(token_sets(4, 3, 3))) == 36
    assert spectral.theorem42(2, 4, 2, 0.5, literal=True)["unit_values"]["masked"] == 1


# ---------------------------------------------------------------------------- Theorem 4.1

def test_probe_bound_on_random_joint_distributions():
    rng = np.random.default_rng(0)
    for _ in range(40):
        n, m, classes = rng.integers(4, 12), rng.integers(3, 9), rng.integers(2, 4)
        label, target_label = rng.integers(classes, size=n), rng.integers(classes, size=m)
        P = rng.random((n, m)) ** 3 * (0.02 + (label[:, None] == target_label))
        P /= P.sum()
        x = spectral.probe_bound(P, label, rotations=1)
        assert (x["error"] <= x["bound"] + 1e-9).all()
        P_T = np.einsum("ik,jk,k->ij", P, P, 1 / P.sum(0))                     # alpha~ by its definition
        assert x["alpha_tilde"] == pytest.approx(P_T[label[:, None] != label].sum(), abs=1e-12)
        assert x["alpha_tilde"] <= 2 * P[label[:, None] != target_label].sum() + 1e-12


def test_probe_error_is_that_of_a_least_squares_fit():
    rng = np.random.default_rng(1)
    P, label = rng.random((9, 6)) ** 4, rng.integers(3, size=9)
    P /= P.sum()
    x = spectral.probe_bound(P, label, rotations=1)
    C, Y = P.sum(1), (label[:, None] == np.unique(label)).astype(float)
    U = np.linalg.svd(P / np.sqrt(np.outer(C, P.sum(0))))[0]
    for t in range(1, 7):
        features = U[:, :t] / np.sqrt(C)[:, None] @ rng.normal(size=(t, t))    # any invertible matrix
        head = np.linalg.lstsq(np.sqrt(C)[:, None] * features, np.sqrt(C)[:, None] * Y, rcond=None)[0]
        wrong = np.unique(label)[(features @ head).argmax(1)] != label
        assert x["error"][t - 1] == pytest.approx(C[wrong].sum(), abs=1e-9)


def test_ties_leave_the_autoregressive_probe_open():
    P, _, bags = cooccurrence(*pairs(from_options("ar"), 4), token_sets(2, 4, 1))
    U, sigma, _ = np.linalg.svd(normalised(P), full_matrices=False)
    for features in spectral.trained_on_bags(P, bags, 2, networks=2, steps=500):  # they reach the optimum
        Q = np.linalg.qr(np.sqrt(P.sum(1))[:, None] * features)[0]
        assert np.linalg.norm(U[:, sigma > 1 - 1e-9].T @ Q) ** 2 > 2 - 0.01
    # A random one of the rotations that leave every best autoregressive feature a best one: .336 wrong.
    assert spectral.random_directions(3, 4, seed=1) == pytest.approx(0.3357, abs=1e-3)
    P, label, _ = cooccurrence(*pairs(from_options("ar"), 3), token_sets(2, 3, 2))  # another T, one at a time
    error = spectral.probe_bound(P, label, rotations=3000)["error"][1]
    assert spectral.random_directions(2, 3, seed=0, batches=20) == pytest.approx(error, abs=0.015)


# ---------------------------------------------------------------------------- Theorem 4.3

def random_attention(vocab, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return bound.LinearAttention(*scale * torch.randn(4, vocab, d, generator=generator, dtype=torch.float64))


def test_linear_attention_is_the_pooled_product():
    model, tokens = random_attention(7, 3, 1.0, 0), torch.tensor([[0, 3, 5, 6]])
    seen = torch.tensor([True, False, True, True])
    x = tokens[0, seen]
    f = (model.Q[x] @ model.K[x].T @ model.V[x]).sum(0)
    torch.testing.assert_close(model.scores(tokens, seen)[0], model.W @ f)
    pair = [(model.Q[a] @ model.K[b]) * model.V[b] for a in tokens[0] for b in tokens[0]]
    triple = [(model.Q[a] @ model.K[b]) * model.V[c] for a in tokens[0] for b in tokens[0] for c in tokens[0]]
    for power, terms in ((2, torch.stack(pair)), (3, torch.stack(triple))):
        largest = (terms[:, None] - terms).norm(dim=-1).max().item()
        assert model.eta(tokens, power) == pytest.approx(largest, rel=1e-6)


def test_corrected_bound_and_steps_hold_and_the_printed_ones_do_not():
    tokens = torch.tensor(list(itertools.product((0, 1), (2, 3), (4, 5), (6, 7))))
    for seed, scale in itertools.product(range(6), (0.3, 1.0, 3.0)):
        model = random_attention(8, 2, scale, seed)
        x = bound.measure_attention(model, tokens, 2)
        assert (x["loss"][:2] <= x["corrected"] + 1e-9).all()
        rows = bound.proof_rows(bound.proof_steps(model, tokens, 3))
        assert all(row["checked"] for row in rows if "corrected" in row["claim"])
    x = {key: value.mean() for key, value in bound.measure_attention(*bound.broken_model(60.0)).items()}
    assert x["loss"] == pytest.approx((60 ** 2 / 3 + 60 + 0) / 2)  # c^2/3 + c after one token, 0 after two
    assert x["printed"] == pytest.approx(((7 ** 2 + 7 * 120) / 2 + 1 + 1) / 2)  # w = 7 and 0, eta = 2c
    assert x["corrected"] == pytest.approx((540 + 540 ** 2) / 2)               # w = 3: D = 3c + 3 * 2c
    rows = list(bound.proof_rows(bound.proof_steps(*bound.broken_model())))
    wrong = [row["claim"][9:11] for row in rows if row["verdict"] == "does not hold"]
    assert wrong == ["10", "11", "12", "16", "19", "21"] and all(row["checked"] for row in rows)


# ---------------------------------------------------------------------------- commands

def test_every_claim_passes_its_check(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, steps in (("theorem43", 150), ("trained_on_bags", 300)):         # of 1000
        monkeypatch.setattr(spectral, name, functools.partial(getattr(spectral, name), steps=steps))
    x = call_json(f"spectral.py all --plot {tmp_path / 'all.png'}")
    assert all(claim["checked"] for claim in x["claims"])
    text = [f"{claim['claim']} {claim['computed']} {claim['verdict']}" for claim in x["claims"]]
    for expected in ("6; 7 with empty context", "[7, 8]", "1.937500", "0.434959", "depends on the tie",
                     "9 <= t <= 11", "mostly neither", *(f"new  {name}" for name in OBJECTIVES)):
        assert any(expected in line for line in text), expected
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("line", [
    "theorem4.1 --r 2 --s 2 --T 1", "theorem4.2 --rho 0.3", "theorem4.2 --literal-tokens",
    "theorem4.2 --r 1 --s 2 --T 1", "theorem4.3 --s 2 --steps 3",
    "theorem4.3 --r 1 --s 3 --T 1 --rho 0.7 --steps 3"])
@pytest.mark.filterwarnings("error")
def test_theorems_on_small_toy_models(line):
    text = call(f"spectral.py {line}")
    assert "nan" not in text and "inf" not in text and len(text.splitlines()) > 1


def test_spectrum_command(capsys):
    x = call_json("spectral.py spectrum --objective ar mlm vl")["spectra"]     # told apart by the default s
    assert [round(y["singular_values"][1], 2) for y in x] == [1, 0.68, 0.48] and not capsys.readouterr().err
    call("spectral.py spectrum --objective ar mlm --s 8")
    assert "note: mlm 0.15 hides one of 8 tokens" in capsys.readouterr().err
    dar, mlm = call_json("spectral.py spectrum --objective dar mlm --t 2 --mask 0.5 --s 6 --r 3")["spectra"]
    np.testing.assert_allclose(dar["singular_values"], np.cos(np.pi * np.arange(5) / 9), atol=1e-9)
    assert dar["tail_sigma4"] == pytest.approx(3 * dar["tail_sigma4_per_class"])
    assert mlm["closed_form"][1] == pytest.approx(math.sqrt(3 / 15)) and np.shape(mlm["M"]) == (6, 6)
    assert "0.447214 x 5" in call("spectral.py spectrum --objective mlm --mask 0.5 --s 6")
