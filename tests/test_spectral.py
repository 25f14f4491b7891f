"""spectral.py against an enumeration that knows nothing of position matrices, and against random instances."""
import itertools
import json
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import objectives
import spectral
from engine.settings import Settings
from objectives import from_options
from support.cli import BadInput
from support.objective import Objective
from train import train

S = 4
CHOICES = [("ar", {}), ("prefix", {}), ("permutation", {}), ("dar", {"t": 2}), ("dar", {"t": 3}), ("dar", {"t": (1, 2)}),
           ("mlm", {"mask": 0.25}), ("mlm", {"mask": 0.5}), ("vl", {"mask": (0.2, 0.8)})]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def singular_values_by_enumeration(groups, probability, weighting="targets", prior=(0.5, 0.5), T=2):
    """Walk over every f, class and whole sequence of tokens, and add up P(context, target) in a dictionary."""
    joint = defaultdict(float)
    for f, chance in zip(groups.tolist(), probability.tolist()):
        s = len(f)
        targets = [p for p in range(s) if f[p] > 1]
        for y, share in enumerate(prior):
            for x in itertools.product(range(T), repeat=s):
                for p in targets:
                    weight = {"targets": 1, "sequences": 1 / len(targets),
                              "contexts": 1 / sum(f[q] == f[p] for q in targets)}[weighting]
                    context = tuple((j, y, x[j]) for j in range(s) if 0 < f[j] < f[p])
                    joint[context, (p, y, x[p])] += chance * share * weight / T ** s
    rows, columns = (sorted(set(part)) for part in zip(*joint))
    P = np.zeros((len(rows), len(columns)))
    for (context, target), mass in joint.items():
        P[rows.index(context), columns.index(target)] = mass
    P /= P.sum()
    return np.linalg.svd(P / np.sqrt(np.outer(P.sum(1), P.sum(0))), compute_uv=False)


def copies(values, r, like):
    """r copies of `values`, descending, filled with zeros to the length of `like`."""
    full = np.zeros(len(like))
    values = np.sort(np.tile(values, r))[::-1]
    full[:len(values)] = values[:len(full)]
    return full


# ---------------------------------------------------------------------------- position matrix and spectra

@pytest.mark.parametrize("weighting", spectral.WEIGHTINGS)
@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_spectrum_is_that_of_the_enumerated_toy_model(name, options, weighting):
    objective = from_options(name, **options)
    x = spectral.spectrum(objective, S, weighting)
    for prior, T in (((0.5, 0.5), 2), ((0.2, 0.8), 2), ((0.1, 0.6, 0.3), 1)):
        dense = singular_values_by_enumeration(*objective.outcomes(S), weighting, prior, T)
        np.testing.assert_allclose(dense, copies(x["singular_values"], len(prior), dense), atol=1e-7)
    assert x["tail_sigma4_per_class"] == pytest.approx((dense[len(prior):] ** 4).sum() / len(prior), abs=1e-9)


def test_weightings_differ_where_they_should():
    dar = from_options("dar", t=2)
    first, second, third = (spectral.spectrum(dar, 6, w)["singular_values"] for w in spectral.WEIGHTINGS)
    assert min(abs(first - second).max(), abs(first - third).max(), abs(second - third).max()) > 1e-3


@pytest.mark.parametrize("name", ["ar", "prefix", "permutation"])
def test_empty_context_is_shared_by_the_classes(name):
    f, probability = spectral.listed(from_options(name), S, empty_context=True)
    contexts, q, _, _ = spectral.merge(*spectral.pairs(f, probability))
    one = spectral.singular_values(spectral.position_matrix(q), q.sum(0) > 0)
    others = spectral.singular_values(spectral.position_matrix(q, contexts.any(1)), q.sum(0) > 0)
    dense = singular_values_by_enumeration(f, probability, prior=(0.2, 0.5, 0.3))
    expected = np.sort(np.concatenate([one, others, others]))[::-1]
    np.testing.assert_allclose(dense[:len(expected)], expected, atol=1e-7)
    assert one.sum() > others.sum() + 0.1


@dataclass(frozen=True)
class Centre(Objective):
    """A new objective: the two middle tokens from nothing, then one neighbour or the other, then the rest."""

    def groups(self, batch, length, generator=None):
        listed = self.outcomes(length)[0]
        return listed[torch.randint(2, (batch,), generator=generator)]

    def outcomes(self, length, limit=0):
        return torch.tensor([[3, 2, 2, 4], [4, 2, 2, 3]]), torch.tensor([0.5, 0.5], dtype=torch.float64)


def test_new_objective_needs_only_its_group_index(monkeypatch, capsys):
    monkeypatch.setitem(objectives.OBJECTIVES, "centre", Centre)
    x = spectral.spectrum(Centre(), S)
    dense = singular_values_by_enumeration(*Centre().outcomes(S), prior=(0.3, 0.7))
    expected = np.sort(np.append(x["singular_values"], x["singular_values_other_classes"]))[::-1]
    np.testing.assert_allclose(dense[:len(expected)], expected, atol=1e-7)
    assert x["closed_form"] is None
    assert spectral.main(["spectrum", "--objective", "centre", "--s", "4", "--r", "2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tail_sigma4"] == pytest.approx((dense[2:] ** 4).sum(), abs=1e-9)


def test_told_position_every_spectrum_is_flat():
    for name, options in CHOICES:
        pairs = spectral.pairs(*spectral.listed(from_options(name, **options), S))
        _, q, _, _ = spectral.merge(*spectral.tell_position(*pairs))
        M = spectral.position_matrix(q)
        np.testing.assert_allclose(M, np.diag(q.sum(0) > 0), atol=1e-12)


# ---------------------------------------------------------------------------- closed forms

@pytest.mark.parametrize("s", [2, 3, 5, 7])
@pytest.mark.parametrize("weighting", spectral.WEIGHTINGS)
def test_closed_forms_equal_enumeration(s, weighting):
    known = [("ar", {}), ("prefix", {}), ("permutation", {}), ("vl", {"mask": (0.3, 0.7)})]
    known += [("mlm", {"mask": n / s}) for n in range(1, s)]
    if weighting == "targets":
        known += [("dar", {"t": t}) for t in {1, 2, s - 1} if t < s]
    for name, options in known:
        x = spectral.spectrum(from_options(name, **options), s, weighting)
        assert x["method"] == "exact"
        np.testing.assert_allclose(x["singular_values"], x["closed_form"], atol=1e-7)
        assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-9)


def test_dar_tails():
    for t in range(1, 10):
        for s in range(max(2 * t - 1, t + 1), 2 * t + 8):
            x = spectral.spectrum(from_options("dar", t=t), s)
            assert x["closed_form_tail"] == pytest.approx(x["tail_sigma4_per_class"], abs=1e-9)
    for s in (8, 20):
        for t, expected in ((2, (6 * s - 17) / 16), (3, (19 * s - 73) / 81), (4, (66 * s - 323) / 384)):
            assert spectral.dar_tail(s, t) == pytest.approx(expected, abs=1e-12)
    tails = [spectral.spectrum(from_options("dar", t=t), 12)["tail_sigma4_per_class"] for t in range(1, 12)]
    assert (np.diff(tails) < 0).all()
    # between the two ranges nothing is claimed
    for t in (5, (1, 2)):
        assert spectral.closed_form(from_options("dar", t=t), 8) == (None, None, None)


def test_numbers_of_the_page():
    x = spectral.spectrum(from_options("dar", t=2), 8)
    np.testing.assert_allclose(x["singular_values"], [math.cos(j * math.pi / 13) for j in range(7)], atol=1e-9)
    x = spectral.spectrum(from_options("vl", mask=(0.25, 0.75)), 4)      # n = 1, 2, 3 with probability 1/4, 1/2, 1/4
    assert x["singular_values"][1] == pytest.approx(math.sqrt((4 / 2 - 1) / 3), abs=1e-9)
    x = spectral.spectrum(from_options("vl", mask=(0.25, 0.75)), 4, "sequences")
    average = 0.25 * 1 + 0.5 * (2 / 6) + 0.25 * (1 / 9)
    assert x["singular_values"][1] == pytest.approx(math.sqrt(average), abs=1e-9)


# ---------------------------------------------------------------------------- Monte Carlo

def hide_outcomes(monkeypatch, name):
    cls = objectives.OBJECTIVES[name]
    hidden = type("Sampled" + cls.__name__, (cls,), {"outcomes": lambda self, length, limit=0: None})
    monkeypatch.setitem(objectives.OBJECTIVES, "sampled", hidden)
    return hidden


@pytest.mark.parametrize("weighting", spectral.WEIGHTINGS)
@pytest.mark.parametrize(("name", "options"), [("permutation", {}), ("dar", {"t": 3}), ("vl", {"mask": (0.2, 0.6)})])
def test_samples_agree_with_enumeration_within_their_error(monkeypatch, name, options, weighting):
    exact = spectral.spectrum(from_options(name, **options), 6, weighting)
    x = spectral.spectrum(hide_outcomes(monkeypatch, name)(**options), 6, weighting, samples=40_000)
    assert x["method"].startswith("monte carlo")
    error = abs(x["singular_values"] - exact["singular_values"])
    assert (error <= 4.5 * x["singular_values_stderr"] + 1e-9).all()
    # and the bars are worth something; a value near zero is the square root of a noisy one
    large = exact["singular_values"] > 0.3
    assert x["singular_values_stderr"][large].max() < 0.02
    assert abs(x["tail_sigma4_per_class"] - exact["tail_sigma4_per_class"]) <= 4.5 * x["tail_sigma4_stderr"]
    assert 0 < x["tail_sigma4_stderr"] < 0.02
    np.testing.assert_allclose(x["M"], exact["M"], atol=0.03)


def test_long_sequences():
    x = spectral.spectrum(from_options("mlm", mask=0.15), 64, samples=8000)
    assert x["method"].startswith("monte carlo")
    assert x["tail_sigma4_per_class"] == pytest.approx(x["closed_form_tail"], abs=4.5 * x["tail_sigma4_stderr"])
    x = spectral.spectrum(from_options("permutation"), 64, samples=2000)        # nearly every context comes up once
    assert x["method"] == "closed form" and len(x["singular_values"]) == 64


def test_samples_that_cannot_tell_are_refused(monkeypatch):
    hidden = hide_outcomes(monkeypatch, "permutation")
    with pytest.raises(BadInput, match="smaller --s or more --samples"):
        spectral.spectrum(hidden(), 30, samples=2000)


# ---------------------------------------------------------------------------- Theorem 3.1

def test_theorem31():
    for seed in (0, 1):
        x = spectral.theorem31(seed=seed)
        assert x["identity_error"] < 1e-10 and x["half_scale_error"] < 1e-10
        assert x["printed_error"] > 0.1
        assert x["constant"] == pytest.approx((x["singular_values"] ** 2).sum(), abs=1e-12)
        assert x["descent_error"] < 1e-6
        assert x["descent_loss"] == pytest.approx(-(x["singular_values"][:x["rank"]] ** 2).sum(), abs=1e-8)


# ---------------------------------------------------------------------------- Theorem 4.2

@pytest.mark.parametrize(("r", "s", "T", "n"), [(2, 4, 2, 2), (3, 3, 2, 2), (2, 5, 1, 3), (1, 4, 3, 1), (4, 3, 1, 2)])
def test_theorem42(r, s, T, n):
    x = spectral.theorem42(r, s, T, n / s)
    assert x["unit_values"]["autoregressive"] == r * (s - 1)
    assert x["unit_values"]["autoregressive_empty_context"] == r * (s - 1) + 1
    assert (x["autoregressive"][r * (s - 1):] < 1e-9).all()
    expected = np.append(np.ones(r), np.full(r * (s - 1), math.sqrt((s - n) / (n * (s - 1)))))
    np.testing.assert_allclose(x["masked"][:r * s], expected, atol=1e-9)
    np.testing.assert_allclose(x["printed"]["masked"], expected)
    if n > 1:
        assert x["not_larger_at"] == list(range(r * (s - 1) + 1, r * s + 1))     # the last r, where it is printed
    dense = singular_values_by_enumeration(*from_options("mlm", mask=n / s).outcomes(s), prior=(1 / r,) * r, T=T)
    np.testing.assert_allclose(dense[:r * s], expected, atol=1e-9)


def test_coin_flips_are_masks_of_the_mean_count():
    s, rho = 4, 0.75
    x = spectral.theorem42(2, s, 2, rho)
    chance = {n: math.comb(s, n) * rho ** n * (1 - rho) ** (s - n) for n in range(1, s)}
    mean = sum(n * p for n, p in chance.items()) / sum(chance.values())
    assert x["masked_by_coin_flips"][2] == pytest.approx(math.sqrt((s / mean - 1) / (s - 1)), abs=1e-9)
    assert x["masked_by_coin_flips"][2] - x["masked"][2] > 0.1
    even = spectral.theorem42(2, s, 2, 0.5)                                      # at 1/2 the mean is s/2: no difference
    np.testing.assert_allclose(even["masked_by_coin_flips"][:8], even["masked"][:8], atol=1e-9)


def test_entries_of_the_masked_matrix():
    r, s, T, n = 2, 4, 3, 2
    x = spectral.theorem42(r, s, T, n / s)
    P_C, P_G = 1 / (r * math.comb(s, n) * T ** (s - n)), 1 / (r * s * T)
    assert x["masked_entry"] == pytest.approx(P_C / (n * T) / math.sqrt(P_C * P_G))
    assert x["zeros_in_row"] == r * s * T - n * T
    assert x["printed"]["masked_entry"] == pytest.approx(x["masked_entry"] * s * T ** (s - n + 1))


def test_printed_token_sets_collide():
    sets = spectral.token_sets(2, 3, 2, literal=True)
    assert sets[0, 0].tolist() == [5, 6] and sets[1, 0].tolist() == [6, 8]       # 6 in both classes
    for r, T in ((2, 2), (3, 2), (4, 3)):
        tokens = spectral.token_sets(r, 3, T)
        assert len(np.unique(tokens)) == tokens.size
        assert len(np.unique(spectral.token_sets(r, 3, T, literal=True))) < tokens.size
    x = spectral.theorem42(2, 4, 2, 0.5, literal=True)
    assert x["unit_values"]["masked"] == 1
    assert spectral.theorem42(2, 4, 2, 0.5)["unit_values"]["masked"] == 2


# ---------------------------------------------------------------------------- Theorem 4.1

def test_probe_bound_on_random_joint_distributions():
    rng = np.random.default_rng(0)
    tight = 0.0
    for _ in range(60):
        n, m, classes = rng.integers(4, 12), rng.integers(3, 9), rng.integers(2, 4)
        label = rng.integers(classes, size=n)
        target_label = rng.integers(classes, size=m)
        P = rng.random((n, m)) ** 3 * (0.02 + (label[:, None] == target_label))
        P /= P.sum()
        x = spectral.probe_errors(P, label, rotations=1)
        assert (x["error"] <= x["bound"] + 1e-9).all()
        tight = max(tight, (x["error"] / np.maximum(x["bound"], 1e-9)).max())
        # alpha~ by its definition, and alpha~ <= 2 alpha
        P_T = np.einsum("ik,jk,k->ij", P, P, 1 / P.sum(0))
        assert x["alpha_tilde"] == pytest.approx(P_T[label[:, None] != label].sum(), abs=1e-12)
        assert x["alpha_tilde"] <= 2 * P[label[:, None] != target_label].sum() + 1e-12
    assert tight > 0.05


def test_probe_error_is_that_of_a_least_squares_fit():
    rng = np.random.default_rng(1)
    P, label = rng.random((9, 6)) ** 4, rng.integers(3, size=9)
    P /= P.sum()
    x = spectral.probe_errors(P, label, rotations=1)
    C, Y = P.sum(1), (label[:, None] == np.unique(label)).astype(float)
    U = np.linalg.svd(P / np.sqrt(np.outer(C, P.sum(0))))[0]
    for t in range(1, 7):
        features = U[:, :t] / np.sqrt(C)[:, None] @ rng.normal(size=(t, t))      # any invertible matrix
        head = np.linalg.lstsq(np.sqrt(C)[:, None] * features, np.sqrt(C)[:, None] * Y, rcond=None)[0]
        wrong = np.unique(label)[(features @ head).argmax(1)] != label
        assert x["error"][t - 1] == pytest.approx(C[wrong].sum(), abs=1e-9)


def test_theorem41_which_label_is_probed_matters():
    r, s = 3, 4
    x = spectral.theorem41(r, s, 2, 0.5, rotations=10)
    assert all((y["error"] <= y["bound"] + 1e-9).all() for y in x.values())
    assert x["mlm_class"]["error"][r - 1] < 1e-9 and x["ar_class"]["error"][r - 1] > 0.1
    easy, hard = x["ar_length"], x["vl_length"]
    assert easy["error"][r * (s - 1) - 1] < 1e-9 and hard["error"][r * (s - 1) - 1] > 0.1
    assert easy["alpha_tilde"] < 1e-9 and hard["alpha_tilde"] > 0.1


# ---------------------------------------------------------------------------- Theorem 4.3

def random_attention(vocab, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return spectral.LinearAttention(*scale * torch.randn(4, vocab, d, generator=generator, dtype=torch.float64))


def test_linear_attention_is_the_pooled_product():
    model, tokens = random_attention(7, 3, 1.0, 0), torch.tensor([[0, 3, 5, 6]])
    seen = torch.tensor([True, False, True, True])
    x = tokens[0, seen]
    f = (model.Q[x] @ model.K[x].T @ model.V[x]).sum(0)
    torch.testing.assert_close(model.scores(tokens, seen[None])[0], model.W @ f)
    pair = [(model.Q[a] @ model.K[b]) * model.V[b] for a in tokens[0] for b in tokens[0]]
    triple = [(model.Q[a] @ model.K[b]) * model.V[c] for a in tokens[0] for b in tokens[0] for c in tokens[0]]
    for power, terms in ((2, pair), (3, triple)):
        largest = max((u - v).norm().item() for u in terms for v in terms)
        assert model.eta(tokens, power) == pytest.approx(largest, rel=1e-6)


def test_corrected_bound_holds_and_the_printed_one_does_not():
    tokens = torch.tensor(list(itertools.product((0, 1), (2, 3), (4, 5), (6, 7))))
    for seed, scale in itertools.product(range(8), (0.3, 1.0, 3.0)):
        x = spectral.measure(random_attention(8, 2, scale, seed), tokens, 2)
        assert (x["loss"][:2] <= x["corrected"] + 1e-9).all()
    x = spectral.counterexample(60.0)
    assert x["loss"] == pytest.approx((60 ** 2 / 3 + 0) / 2)                      # c^2/3 after one token, 0 after two
    assert x["printed"] == pytest.approx(((7 ** 2 + 7 * 120) / 2 + 1 + 1) / 2)    # w = 7 and 0, eta = 2c, delta = 0
    assert x["corrected"] == pytest.approx((540 + 540 ** 2) / 2)                  # w = 3: D = 3c + 3 * 2c
    assert x["printed"] < x["loss"] < x["corrected"]


def test_theorem43_experiment():
    x = spectral.theorem43(steps=500)
    s_m = x["visible"]
    assert s_m == 3
    assert (x["loss_one_length"][:s_m] <= x["corrected_bound"]).all()
    assert (x["loss_all_lengths"] <= x["corrected_bound_all_lengths"]).all()
    # at its own length the model comes near the best that a blind one can do, and lengths it never saw cost it
    assert x["loss_one_length"][s_m - 1] < 0.8 * x["ideal_blind"][s_m - 1]
    others = [0, 1, 3, 4]
    assert x["loss_all_lengths"][others].mean() < x["loss_one_length"][others].mean() - 0.02
    # the ideals: -E[P/P_G] / 2 + E_(P_G)[(P/P_G)^2] / 4 for a P that is uniform on `likely` of 24 tokens
    for i, m in enumerate(x["prefix"]):
        for name, likely in (("ideal_blind", 2 * (6 - m)), ("ideal_told_position", 2)):
            score = 24 / likely / 2
            assert x[name][i] == pytest.approx(-score + likely / 24 * score ** 2)


# ---------------------------------------------------------------------------- trained networks

def test_empirical_spectrum_recovers_that_of_the_toy_model():
    rng, r, s, N = np.random.default_rng(0), 2, 4, 20_000
    for name, options in (("mlm", {"mask": 0.5}), ("dar", {"t": 2})):
        objective = from_options(name, **options)
        f = objective.groups(N, s, torch.Generator().manual_seed(0)).numpy()
        y = rng.integers(r, size=N)
        p = np.array([rng.choice(np.nonzero(row > 1)[0]) for row in f])
        visible = f < f[np.arange(N), p][:, None]
        # the best functions of a context know its class and its positions
        code = y * 2 ** s + visible @ 2 ** np.arange(s)
        mix = rng.normal(size=(len(np.unique(code)),) * 2)                       # a network has no one-hot basis
        features = np.eye(len(mix))[np.unique(code, return_inverse=True)[1]] @ mix
        targets = np.eye(r * s)[y * s + p]
        x = spectral.empirical_spectrum(features, targets)
        expected = np.sort(np.tile(spectral.spectrum(objective, s, "sequences")["singular_values"], r))[::-1][1:]
        np.testing.assert_allclose(x["correlations"][:len(expected)], expected[:len(x["correlations"])], atol=0.03)
        assert x["covariance"].sum() == pytest.approx(1)
    independent = spectral.empirical_spectrum(rng.normal(size=(N, 20)), rng.normal(size=(N, 20)))
    assert abs(independent["correlations"]).max() < 0.05


def test_trained_networks(tmp_path, capsys):
    """In text of period 7 the last token, which any causal network's features hold, gives the next: six values of 1."""
    (tmp_path / "period.txt").write_text("abcdef\n" * 9000)
    for name, options in (("ar", {"objective": "ar"}), ("vl", {"objective": "vl", "mask": (0.3, 0.5)})):
        settings = Settings(data=str(tmp_path / "period.txt"), length=16, batch_size=16, steps=2, **options)
        train(settings, tmp_path / name, device="cpu", dtype="fp32", quiet=True)
    ar, vl = run_json(capsys, "trained", str(tmp_path / "ar"), str(tmp_path / "vl"), "--features", "800",
                      "--device", "cpu")["checkpoints"]
    assert ar["objective"] == "ar" and vl["objective"] == "vl 0.3,0.5"
    np.testing.assert_allclose(ar["correlations"][:6], 1, atol=1e-3)
    assert ar["tail_sigma4"] == pytest.approx(6, abs=0.01) and vl["tail_sigma4"] < 5.9
    for row in (ar, vl):
        assert row["features"] == 800
        assert row["step"] == 2 and max(row["correlations"]) <= 1 + 1e-6
    with pytest.raises(BadInput, match="too few"):
        spectral.main(["trained", str(tmp_path / "ar"), "--data", str(short_text(tmp_path))])


def short_text(folder):
    (folder / "short.txt").write_text("abcdef\n" * 30)
    return folder / "short.txt"


# ---------------------------------------------------------------------------- command line

def run_json(capsys, *argv):
    assert spectral.main([*argv, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_spectrum(capsys, tmp_path):
    x = run_json(capsys, "spectrum", "--objective", "dar", "--t", "2", "--s", "6", "--r", "3")
    assert x["command"] == "spectral.py spectrum" and x["objective"] == "dar t=2" and x["settings"]["s"] == 6
    np.testing.assert_allclose(x["singular_values"], np.cos(np.pi * np.arange(5) / 9), atol=1e-9)
    np.testing.assert_allclose(x["closed_form"], x["singular_values"], atol=1e-9)
    assert x["tail_sigma4_per_class"] == pytest.approx((6 * 6 - 17) / 16)
    assert x["tail_sigma4"] == pytest.approx(3 * x["tail_sigma4_per_class"])
    path = tmp_path / "out.json"
    assert spectral.main(["spectrum", "--objective", "mlm", "--mask", "0.5", "--s", "6", "--json", str(path)]) == 0
    assert "0.447214 x 5" in capsys.readouterr().out
    assert json.loads(path.read_text())["closed_form"][1] == pytest.approx(math.sqrt(3 / 15))


def test_every_claim_passes_its_check(capsys):
    claims = run_json(capsys, "all")["claims"]
    assert all(claim["checked"] for claim in claims)
    text = [f"{claim['claim']} {claim['computed']} {claim['verdict']}" for claim in claims]
    for expected in ("6; 7 with empty context", "[7, 8]", "1.937500", "0.975309", "0.533854", "0.434959"):
        assert any(expected in line for line in text)
    assert len(claims) < 40                                                      # one page


def test_theorem_commands(capsys):
    assert run_json(capsys, "theorem4.2", "--r", "2", "--s", "3", "--T", "1", "--rho", "0.34")["hidden"] == 1
    assert len(run_json(capsys, "theorem4.1", "--s", "3", "--rho", "0.4")["ar_class"]["error"]) == 6
    assert run_json(capsys, "theorem3.1")["identity_error"] < 1e-10
    assert len(run_json(capsys, "theorem4.3", "--s", "4", "--steps", "5")["prefix"]) == 3
    assert spectral.main(["theorem4.2", "--literal-tokens"]) == 0
    assert "1 unit" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "says"), [
    ("theorem4.2 --s 4 --rho 0.05", "at least one hidden and one visible; use a ratio from 0.25 to 0.75"),
    ("theorem4.2 --s 4 --rho 0.95", "use a ratio"),
    ("theorem4.2 --s 4 --rho nan", "use a ratio"),
    ("theorem4.2 --s 1", "use --s 2 or more"),
    ("theorem4.2 --s 16 --T 8", f"limit is {spectral.LIMIT}"),
    ("theorem4.2 --s 16 --T 8", "the command spectrum, which needs no enumeration"),
    ("theorem4.2 --s 26 --T 1", "limit"),
    ("theorem4.1 --s 1", "use --s 2 or more"),
    ("theorem4.1 --s 12 --T 4", "limit"),
    ("theorem4.3 --rho 0", "use a ratio"),
    ("theorem4.3 --s 14", "limit is 2000"),
    ("spectrum --objective ar --s 1", "length of 2 or more"),
    ("spectrum --objective mlm --mask 0.01 --s 8", "use a ratio"),
    ("spectrum --objective vl --mask 0.01,0.02 --s 8", "use a ratio"),
    ("spectrum --objective vl --mask 0.97,0.99 --s 8", "use a ratio"),
    ("spectrum --objective dar --t 8 --s 8", "--t 8"),
    ("spectrum --objective ar --t 2 --s 8", "--t belongs to dar"),
    ("spectrum --objective nothing", "nothing"),
    ("spectrum --objective vl --s 40 --samples 10", "at least 1000"),
    ("trained no/such/run", "no/such/run"),
])
def test_refusals_say_what_to_use(argv, says):
    with pytest.raises(BadInput) as refused:
        spectral.main(argv.split())
    assert says in str(refused.value)


def test_refusal_is_one_line_with_status_2():
    command = [sys.executable, Path(spectral.__file__), "theorem4.2", "--rho", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert spectral.main(["spectrum", "--objective", "ar", "--s", "5", "--plot", str(tmp_path / "a.png")]) == 0
    assert spectral.main(["theorem4.3", "--s", "4", "--steps", "5", "--plot", str(tmp_path / "b.png")]) == 0
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("a.png", "b.png"))


def test_missing_matplotlib_is_named(monkeypatch):
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        spectral.main(["theorem4.3", "--plot", "x.png"])
