"""spectral.py: Theorems 3.1, 4.1 and 4.2 on random instances, its commands, trained networks."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import quietly

import spectral
from beyond import BEYOND
from downstream.trained import empirical_spectrum
from engine.settings import resolve
from objectives import OBJECTIVES, PAPER, from_options
from support import operator
from support.cli import BadInput
from support.objective import Objective
from support.operator import cooccurrence, normalised, token_sets


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- Theorem 3.1

def test_theorem31():
    for seed in (0, 1):
        x = spectral.theorem31(seed=seed)
        assert x["identity_error"] < 1e-10 and x["half_scale_error"] < 1e-10
        assert x["printed_error"] > 0.1
        assert x["symmetric_error"] < 1e-10 and x["eq7_error"] > 0.1
        assert x["constant"] == pytest.approx((x["singular_values"] ** 2).sum(), abs=1e-12)
        assert x["descent_error"] < 1e-6
        assert x["descent_loss"] == pytest.approx(-(x["singular_values"][:x["rank"]] ** 2).sum(), abs=1e-8)


# ---------------------------------------------------------------------------- Theorem 4.2

CASES = [(2, 4, 2, 2), (3, 3, 2, 2), (2, 5, 1, 3), (1, 4, 3, 1), (4, 3, 1, 2)]


@pytest.mark.parametrize(("r", "s", "T", "n"), CASES)
def test_theorem42(r, s, T, n):
    x = spectral.theorem42(r, s, T, n / s)
    assert x["unit_values"]["autoregressive"] == r * (s - 1)
    assert x["unit_values"]["autoregressive_empty_context"] == r * (s - 1) + 1
    assert (x["autoregressive"][r * (s - 1):] < 1e-9).all()
    expected = np.append(np.ones(r), np.full(r * (s - 1), math.sqrt((s - n) / (n * (s - 1)))))
    np.testing.assert_allclose(x["masked"][:r * s], expected, atol=1e-9)
    np.testing.assert_allclose(x["printed"]["masked"], expected)
    if n > 1:
        assert x["not_larger_at"] == list(range(r * (s - 1) + 1, r * s + 1))  # the last r
    assert x["blocks"] == [f"{T ** i} x {T}" for i in range(1, s)]


def test_theorem42_prints_the_formula_at_rho():
    x = spectral.theorem42(2, 4, 2, 0.6)  # 2.4 of 4 tokens: 2 are hidden
    assert x["hidden"] == 2 and not x["whole"]
    assert x["printed"]["masked"][2] == pytest.approx(math.sqrt(4 * 0.4 / (2.4 * 3)))
    assert x["masked"][2] == pytest.approx(math.sqrt(2 / (2 * 3)))


def test_coin_flips_are_masks_of_the_mean_count():
    s, rho = 4, 0.75
    x = spectral.theorem42(2, s, 2, rho)
    chance = {n: math.comb(s, n) * rho ** n * (1 - rho) ** (s - n) for n in range(1, s)}
    mean = sum(n * p for n, p in chance.items()) / sum(chance.values())
    assert x["masked_by_coin_flips"][2] == pytest.approx(math.sqrt((s / mean - 1) / (s - 1)), abs=1e-9)
    assert x["masked_by_coin_flips"][2] - x["masked"][2] > 0.1
    even = spectral.theorem42(2, s, 2, 0.5)  # the mean is s/2
    np.testing.assert_allclose(even["masked_by_coin_flips"][:8], even["masked"][:8], atol=1e-9)


def test_entries_of_the_masked_matrix():
    r, s, T, n = 2, 4, 3, 2
    x = spectral.theorem42(r, s, T, n / s)
    P_C, P_G = 1 / (r * math.comb(s, n) * T ** (s - n)), 1 / (r * s * T)
    assert x["masked_entry"] == pytest.approx(P_C / (n * T) / math.sqrt(P_C * P_G))
    assert x["zeros_in_row"] == (s - n) * T  # of the s T columns of its class
    assert x["printed"]["masked_entry"] == pytest.approx(x["masked_entry"] * s * T ** (s - n + 1))


def test_printed_token_sets_collide():
    sets = token_sets(2, 3, 2, literal=True)
    assert sets[0, 0].tolist() == [5, 6] and sets[1, 0].tolist() == [6, 8]  # 6 in both classes
    for r, T in ((2, 2), (3, 2), (4, 3)):
        tokens = token_sets(r, 3, T)
        assert len(np.unique(tokens)) == tokens.size
        assert len(np.unique(token_sets(r, 3, T, literal=True))) < tokens.size
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
        features = U[:, :t] / np.sqrt(C)[:, None] @ rng.normal(size=(t, t))  # any invertible matrix
        head = np.linalg.lstsq(np.sqrt(C)[:, None] * features, np.sqrt(C)[:, None] * Y, rcond=None)[0]
        wrong = np.unique(label)[(features @ head).argmax(1)] != label
        assert x["error"][t - 1] == pytest.approx(C[wrong].sum(), abs=1e-9)


def test_theorem41_which_label_is_probed_matters():
    r, s = 3, 4
    x = spectral.theorem41(r, s, 2, 0.5, rotations=10)
    probes = x["probes"]
    assert all((y["error"] <= y["bound"] + 1e-9).all() for y in probes.values())
    assert probes["mlm_class"]["error"][r - 1] < 1e-9 and probes["ar_class"]["error"][r - 1] > 0.1
    easy, hard = probes["ar_length"], probes["vl_length"]
    assert easy["error"][r * (s - 1) - 1] < 1e-9 and hard["error"][r * (s - 1) - 1] > 0.1
    assert easy["alpha_tilde"] < 1e-9 and hard["alpha_tilde"] > 0.1
    assert x["reversed_at"] == list(range(r * (s - 1), r * s)) and x["eigenvalue_error"] < 1e-12
    assert probes["ar_class"]["tail"][-1] < 1e-12 < probes["mlm_class"]["tail"][r * (s - 1) - 1]


def test_ties_leave_the_autoregressive_probe_open():
    r, s, T = 3, 4, 2
    P, classes, bags = cooccurrence(from_options("ar"), token_sets(r, s, T))
    x = spectral.ties(P, classes, bags, r)
    assert x["best"] < 1e-9 and x["worst"] == pytest.approx(1 - 1 / r)  # a guess among r classes
    assert x["networks"].mean() < 0.2 and (x["networks"] <= x["worst"] + 1e-9).all()
    # the networks did reach the optimum, so nothing but the tie is left
    f = torch.tensor(spectral.trained_on_bags(P, bags, r, networks=2))
    U, sigma, _ = np.linalg.svd(normalised(P), full_matrices=False)
    for features in f.numpy():
        Q = np.linalg.qr(np.sqrt(P.sum(1))[:, None] * features)[0]
        assert np.linalg.norm(U[:, sigma > 1 - 1e-9].T @ Q) ** 2 > r - 0.01


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
        mix = rng.normal(size=(len(np.unique(code)),) * 2)  # a network has no one-hot basis
        features = np.eye(len(mix))[np.unique(code, return_inverse=True)[1]] @ mix
        targets = np.eye(r * s)[y * s + p]
        x = empirical_spectrum(features, targets)
        values = operator.spectrum(objective, s, "sequences")["singular_values"]
        expected = np.sort(np.tile(values, r))[::-1][1:len(x["correlations"]) + 1]
        np.testing.assert_allclose(x["correlations"][:len(expected)], expected, atol=0.03)
        assert x["covariance"].sum() == pytest.approx(1)
    independent = empirical_spectrum(rng.normal(size=(N, 20)), rng.normal(size=(N, 20)))
    assert abs(independent["correlations"]).max() < 0.05


def test_trained_networks(tmp_path, capsys, real_sizes):
    """In text of period 7 the last token, which causal features hold, gives the next: six values of 1."""
    (tmp_path / "period.txt").write_text("abcdef\n" * 9000)
    for name, options in (("ar", {"objective": "ar"}), ("vl", {"objective": "vl", "mask": (0.3, 0.5)})):
        settings = resolve(data=str(tmp_path / "period.txt"), length=16, batch_size=16, steps=2, **options)
        quietly(settings, tmp_path / name)
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
    assert x["command"] == "spectral.py spectrum" and x["settings"]["s"] == 6
    [x] = x["spectra"]
    assert x["objective"] == "dar t=2"
    np.testing.assert_allclose(x["singular_values"], np.cos(np.pi * np.arange(5) / 9), atol=1e-9)
    np.testing.assert_allclose(x["closed_form"], x["singular_values"], atol=1e-9)
    assert x["tail_sigma4_per_class"] == pytest.approx((6 * 6 - 17) / 16)
    assert x["tail_sigma4"] == pytest.approx(3 * x["tail_sigma4_per_class"])
    path = tmp_path / "out.json"
    argv = ["spectrum", "--objective", "mlm", "ar", "--mask", "0.5", "--s", "6", "--json", str(path)]
    assert spectral.main(argv) == 0
    assert "0.447214 x 5" in capsys.readouterr().out
    mlm, ar = json.loads(path.read_text())["spectra"]
    assert mlm["closed_form"][1] == pytest.approx(math.sqrt(3 / 15)) and ar["objective"] == "ar"


def test_new_objective_in_the_command(monkeypatch, capsys):
    class Centre(Objective):
        def outcomes(self, length, limit=0):
            return torch.tensor([[2, 1, 1, 3], [3, 1, 1, 2]]), torch.tensor([0.5, 0.5], dtype=torch.float64)

    monkeypatch.setitem(OBJECTIVES, "centre", Centre)
    [x] = run_json(capsys, "spectrum", "--objective", "centre", "--s", "4", "--r", "2")["spectra"]
    assert x["closed_form"] is None and x["method"] == "exact"
    # contexts {2, 3}, {1, 2, 3}, {2, 3, 4}; an outer position is a target of the first and of another
    np.testing.assert_allclose(x["singular_values"], [1, math.sqrt(0.5)])
    assert x["tail_sigma4"] == pytest.approx(2 * 0.25)


def test_every_claim_passes_its_check(claims, tmp_path):
    x = json.loads(claims.read_text())
    assert all(claim["checked"] for claim in x["claims"])
    text = [f"{claim['claim']} {claim['computed']} {claim['verdict']}" for claim in x["claims"]]
    for expected in ("6; 7 with empty context", "[7, 8]", "1.937500", "0.975309", "0.533854", "0.434959",
                     "depends on the tie", "9 <= t <= 11", "6 of 6 steps"):
        assert any(expected in line for line in text), expected
    assert len(text) < 45 and not any("nan" in line for line in text)  # one page
    for name in (*PAPER, *BEYOND):
        assert any(f"new  {name}" in line for line in text), name
    pytest.importorskip("matplotlib")
    spectral.pictures.plot_spectra(x, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_theorem_commands(capsys):
    assert run_json(capsys, "theorem4.2", "--r", "2", "--s", "3", "--T", "1", "--rho", "0.34")["hidden"] == 1
    assert len(run_json(capsys, "theorem4.1", "--s", "3", "--rho", "0.4")["probes"]["ar_class"]["error"]) == 6
    assert run_json(capsys, "theorem3.1")["identity_error"] < 1e-10
    assert len(run_json(capsys, "theorem4.3", "--s", "4", "--steps", "5")["prefix"]) == 3
    assert spectral.main(["theorem4.2", "--literal-tokens"]) == 0
    assert "1 unit" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [
    "theorem4.1 --r 1 --s 2 --T 1", "theorem4.1 --r 2 --s 2", "theorem4.1 --s 3 --rho 0.4",
    "theorem4.2 --rho 0.3", "theorem4.2 --r 1 --s 2 --T 1", "theorem4.2 --s 13 --T 1 --r 1",
    "theorem4.3 --s 2 --steps 3", "theorem4.3 --r 1 --s 3 --T 1 --rho 0.7 --steps 3",
    "spectrum --objective ar --s 2", "spectrum --objective segments dar --s 16 --t 5 --segment 2"])
def test_small_toy_models_print_no_warning_and_no_nan(argv, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "nan" not in out and "inf" not in out and len(out) > 100


@pytest.mark.parametrize(("argv", "says"), [
    ("theorem4.2 --s 4 --rho 0.05", "at least one hidden and one visible; use a ratio from 0.25 to 0.75"),
    ("theorem4.2 --s 4 --rho 0.95", "use a ratio"),
    ("theorem4.2 --s 4 --rho nan", "use a ratio"),
    ("theorem4.2 --s 1", "use --s 2 or more"),
    ("theorem4.2 --s 16 --T 8", f"limit is {operator.MOST_CONTEXTS}"),
    ("theorem4.2 --s 16 --T 8", "the command spectrum, which needs no enumeration"),
    ("theorem4.2 --s 26 --T 1", "limit"),
    ("theorem4.1 --s 1", "use --s 2 or more"),
    ("theorem4.1 --s 12 --T 4", "limit"),
    ("theorem4.3 --rho 0", "use a ratio"),
    ("theorem4.3 --s 14", "limit is 2000"),
    ("spectrum --objective ar --s 1", "length 1"),
    ("spectrum --objective mlm --mask 0.01 --s 8", "use a ratio"),
    ("spectrum --objective vl --mask 0.01,0.02 --s 8", "use a ratio"),
    ("spectrum --objective vl --mask 0.97,0.99 --s 8", "use a ratio"),
    ("spectrum --objective dar --t 8 --s 8", "--t 8"),
    ("spectrum --objective ar --t 2 --s 8", "--t belongs to dar"),
    ("spectrum --objective nothing", "nothing"),
    ("trained no/such/run", "no/such/run"),
])
def test_refusals_say_what_to_use(argv, says):
    with pytest.raises(BadInput) as refused:
        spectral.main(argv.split())
    assert says in str(refused.value)


def test_plot_of_an_unknown_kind_is_refused():
    pytest.importorskip("matplotlib")
    with pytest.raises(BadInput, match=r"x\.txt"):
        spectral.main(["spectrum", "--objective", "dar", "--s", "8", "--plot", "x.txt"])


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for i, argv in enumerate(("spectrum --objective ar mlm --s 5 --mask 0.4", "theorem4.1 --s 3 --rho 0.4",
                              "theorem4.3 --s 4 --steps 5")):
        path = tmp_path / f"{i}.png"
        assert spectral.main([*argv.split(), "--plot", str(path)]) == 0
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_missing_matplotlib_is_named(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="pip install matplotlib"):
        spectral.main(["theorem4.3", "--plot", "x.png"])
