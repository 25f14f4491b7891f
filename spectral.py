"""The theory of the paper as code: what it prints, what holds, and the spectrum of any objective.

    python spectral.py all                                        every claim on one page
    python spectral.py theorem4.2 --r 2 --s 4 --T 2 --rho 0.5     a theorem (3.1, 4.1, 4.2, 4.3), corrected
    python spectral.py spectrum --objective dar mtp --t 2 --s 8   singular values of objectives
    python spectral.py toy --quick                                networks on toy models, noisy and not

Set-up and toy model are those of experiments/spectrum.py, which computes P_M from f. Each theorem returns its
numbers, and as "rows" what the paper prints beside what was computed. ERRATA.md has the same in words,
THEORY.md the proofs.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import plots
from experiments.generation_bound import theorem43
from experiments.spectrum import (
    best_features,
    cooccurrence,
    hidden_of,
    multiplicities,
    normalised,
    probe_errors,
    row,
    spectrum,
    token_sets,
)
from experiments.toy import add_toy_arguments, run_toy, show_toy
from masks import Objective, ar_groups, equally_likely
from objectives import OBJECTIVES, add_options, describe, flag, from_options, several, spectral_loss
from util import BadInput, Parser, command_line, note, plain, positive, table, write_json

TABLE_9 = {1: (56.2, 82.5), 2: (59.4, 82.9), 3: (59.6, 82.7), 4: (58.8, 82.5)}  # t: linear probe, fine-tuning


# ---------------------------------------------------------------------------- Theorem 3.1

def theorem31(n=8, m=7, t=3, trials=30, steps=1500, seed=0):
    """The spectral loss is matrix factorisation, on random P_M (n contexts, m targets), f and W of rank t.

        ||Abar - F W'^T||_F^2 = -2 E [W f(X)]_X+ + E ([W f(X)]_X-)^2 + ||Abar||_F^2
        F_X = sqrt(P_C(X)) f(X),  W'_X+ = sqrt(P_G(X+)) W_X+

    since the cross term of the square is 2 Abar_XX+ F_X W'_X+ = 2 P_M(X, X+) [W f(X)]_X+. Eq. 1 prints it
    once, which is the loss of Abar / 2. Eq. 7 is the same for contexts X, X' that share a target, where
    P_T / sqrt(P_C P_C) = Abar Abar^T and W' = F = f sqrt(P_C). It prints c = 1 for 2, and F = f / sqrt(P_C).
    """
    rng, errors = np.random.default_rng(seed), []
    for _ in range(trials):
        counts = rng.integers(1, 10, (n, m)) ** 2
        P = torch.tensor(counts / counts.sum())
        A, C, G = normalised(P.numpy()), P.sum(1), P.sum(0)
        X, target = (torch.tensor(np.repeat(i, counts.ravel())) for i in counts.nonzero())  # each pair, often
        f, W = torch.tensor(rng.normal(size=(n, t))), torch.tensor(rng.normal(size=(m, t)))
        scores = (f @ W.T)[X]
        corrected = spectral_loss(scores, target, G).item()
        printed = corrected + scores.gather(1, target[:, None]).mean().item()                  # Eq. 1: once
        FW, norm = (C.sqrt()[:, None] * f @ W.T * G.sqrt()).numpy(), (A ** 2).sum()
        whole, half = ((A - FW) ** 2).sum() - norm, ((A / 2 - FW) ** 2).sum() - norm / 4
        root, f, P_T = C.sqrt().numpy()[:, None], f.numpy(), A @ A.T
        inner, both = f @ f.T, root * root.T
        attract, repel = (P_T * both * inner).sum(), (inner ** 2 * both ** 2).sum()
        symmetric = [((P_T - F @ F.T) ** 2).sum() - (P_T ** 2).sum() - repel + c * attract
                     for F, c in ((f * root, 2), (f / root, 1))]
        errors.append(np.abs([whole - corrected, whole - printed, half - printed, *symmetric]))
    # Gradient descent on the last P_M, in F and W', where the problem is well conditioned.
    F, W = (torch.tensor(rng.normal(size=(size, t)) * 0.1, requires_grad=True) for size in (n, m))
    for _ in range(steps):
        loss = spectral_loss(((F / C.sqrt()[:, None]) @ (W / G.sqrt()[:, None]).T)[X], target, G)
        gradients = torch.autograd.grad(loss, (F, W))
        with torch.no_grad():
            for x, gradient in zip((F, W), gradients):
                x -= 0.2 * gradient
    U, sigma, V = np.linalg.svd(A, full_matrices=False)
    truncated = (U[:, :t] * sigma[:t]) @ V[:t]
    names = ("identity_error", "printed_error", "half_scale_error", "symmetric_error", "eq7_error")
    result = {**dict(zip(names, np.max(errors, axis=0))), "rank": t, "constant": norm,
              "sum_sigma2": (sigma ** 2).sum(), "singular_values": sigma, "descent_loss": loss.item(),
              "descent_error": np.abs((F @ W.T).detach().numpy() - truncated).max(),
              "best_loss": -(sigma[:t] ** 2).sum()}
    return {**result, "rows": list(rows31(result))}


def rows31(x):
    yield row("3.1  ||Abar - F W'^T||^2 = loss + const", "-1 E[W f]_X+",
              f"-2 E[W f]_X+, to {x['identity_error']:.0e}",
              x["identity_error"] < 1e-10 and x["printed_error"] > 0.1, "factor 2 lost")
    yield row("3.1  the printed loss factorises", "Abar", f"Abar / 2, to {x['half_scale_error']:.0e}",
              x["half_scale_error"] < 1e-10, "half the scale")
    yield row("3.1  the constant", "const", f"||Abar||_F^2 = sum sigma_j^2 = {x['constant']:.6f}",
              abs(x["constant"] - x["sum_sigma2"]) < 1e-10, "made exact")
    yield row("3.1  gradient descent = truncated SVD", "implied", f"to {x['descent_error']:.0e}",
              x["descent_error"] < 1e-6, "holds")
    yield row("Eq7  the symmetric loss", "-1 E f.f', F = f/sqrt(P_C)",
              f"-2 E f.f', F = f sqrt(P_C), to {x['symmetric_error']:.0e}",
              x["symmetric_error"] < 1e-10 and x["eq7_error"] > 0.1, "both slip")


# ---------------------------------------------------------------------------- Theorem 4.2

@dataclass(frozen=True)
class FromNothing(Objective):
    """Autoregressive with x_1 predicted too, from the empty context."""

    def max_targets(self, length):
        return length

    def outcomes(self, length, limit=200_000):
        return equally_likely(1 + ar_groups(length)[None])


@dataclass(frozen=True)
class CoinFlips(Objective):
    """The mask of Sec. 3.1: each token is hidden by a coin of its own. Neither all of them nor none are."""

    rho: float = 0.5

    def outcomes(self, length, limit=200_000):
        if 2 ** length > limit:
            return None
        f = 1 + np.indices((2,) * length).reshape(length, -1).T[1:-1]
        share = self.rho ** (f > 1).sum(1) * (1 - self.rho) ** (f == 1).sum(1)
        return torch.tensor(f), torch.tensor(share / share.sum())


def theorem42(r, s, T, rho, literal=False):
    """Singular values of Abar on the enumerated toy model, autoregressive and masked, beside what is printed:

        sigma_j = 1 (autoregressive), sigma'_j = sqrt(s(1 - rho) / (s rho (s - 1))) (masked),  r < j <= rs.

    Autoregressive: each position p = 2..s is a rank-one block of its own per class: r(s-1) ones. A context of
    length 0 adds one block that all classes share: r(s-1) + 1. The statement has rs, which neither gives for
    r >= 2. Masked: computed with exactly n = round(rho s) hidden tokens, where it holds if n = rho s.
    `literal` takes the token sets as Sec. 4.1.2 prints them. BadInput: n = 0 or s, or too many contexts.
    """
    n, ar, tokens = hidden_of(rho, s), from_options("ar"), token_sets(r, s, T, literal)
    masked = from_options("mlm", mask=n / s)
    cases = {"autoregressive": ar, "autoregressive_empty_context": FromNothing(), "masked": masked,
             "masked_by_coin_flips": CoinFlips(rho)}
    matrices = {name: cooccurrence(objective, tokens) for name, objective in cases.items()}
    A = {name: normalised(P) for name, (P, _, _) in matrices.items()}
    values = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in A.items()}
    one, two = (np.append(values[name], np.zeros(r * s))[:r * s] for name in ("autoregressive", "masked"))
    value, C = math.sqrt((1 - rho) / (rho * (s - 1))), math.comb(s - 1, s - n)  # C_{s-1}^{s_m} of A.3
    printed = {"autoregressive": [1.0] * (r * s), "masked": [1.0] * r + [value] * (r * (s - 1)),
               "masked_entry": math.sqrt(s * T * math.comb(s, n) * T ** (s - n)) / C, "zeros_in_row": C}
    own = (A["masked"][matrices["masked"][1] == 0] > 0).any(0)  # targets of class 1
    result = {
        **values, "unit_values": {name: int((sigma > 1 - 1e-9).sum()) for name, sigma in values.items()},
        "not_larger_at": [j + 1 for j in range(r, r * s) if one[j] < two[j] + 1e-9], "printed": printed,
        "masked_entry": A["masked"].max(), "zeros_in_row": int((A["masked"][0, own] == 0).sum()),
        "classes": r, "hidden": n, "rho": rho, "whole": abs(rho * s - n) < 1e-9, "literal_tokens": literal}
    if literal:
        collide = (result["unit_values"]["masked"] < r) == (r >= 2 and T >= 2)
        return {**result, "rows": [row("4.2  the printed tokens tell classes apart", f"{r} unit sigma_j",
                                       f"{result['unit_values']['masked']}", collide, "classes collide")]}
    return {**result, "rows": list(rows42(result, s, T))}


def rows42(x, s, T):
    r, n, rho, printed, fails = x["classes"], x["hidden"], x["rho"], x["printed"], x["not_larger_at"]
    last, units = r * s, x["unit_values"]
    ar, empty = units["autoregressive"], units["autoregressive_empty_context"]
    yield row(f"4.2  AR: unit sigma_j, r = {r}, s = {s}", f"rs = {last}", f"{ar}; {empty} with empty context",
              (ar, empty) == (last - r, last - r + 1), "r(s-1), or plus 1")
    excluded = " (the theorem excludes n = 1)" * (n == 1)
    yield row("4.2  sigma_j (AR) > sigma_j (masked)", f"{r} < j <= {last}", f"fails at j = {fails}{excluded}",
              fails == list(range((r if n == 1 else last - r) + 1, last + 1)), "last r fail")
    exact = np.append(np.ones(r), np.full(last - r, math.sqrt((s - n) / (n * (s - 1)))))
    yield row(f"4.2  masked, n = {n} of {s} hidden, rho = {rho:g}", multiplicities(printed["masked"]),
              multiplicities(x["masked"]), np.allclose(x["masked"][:last], exact),
              "holds" if x["whole"] else "holds where rho s is whole")
    chance = [math.comb(s, k) * rho ** k * (1 - rho) ** (s - k) for k in range(1, s)]
    mean = np.arange(1, s) @ chance / sum(chance)
    coins, formula = x["masked_by_coin_flips"][r], printed["masked"][r]
    yield row(f"4.2  coin-flip mask, rho = {rho:g}", f"sigma_{r + 1} = {formula:.6f}",
              f"sigma_{r + 1} = {coins:.6f}", abs(coins ** 2 - (s / mean - 1) / (s - 1)) < 1e-9,
              "exact counts only" if abs(coins - formula) > 1e-6 else "holds at rho = 1/2")
    entry = math.sqrt(s / (math.comb(s, n) * T ** (s - n + 1))) / n
    yield row("A.3  entries of masked Abar", f"{printed['masked_entry']:.6f}", f"{x['masked_entry']:.6f}",
              abs(x["masked_entry"] - entry) < 1e-9, "sqrt(s/(C T^(s_m+1)))/(s-s_m)")
    yield row("A.3  zeros in a row, in its class", str(printed["zeros_in_row"]), str(x["zeros_in_row"]),
              x["zeros_in_row"] == (s - n) * T, "s_m T")


# ---------------------------------------------------------------------------- Theorem 4.1

def probe_bound(P, labels, rotations=30, seed=0):
    """Error of the least-squares probe on the best rank-t features, and its bound, for t = 1 .. rank, under P
    (n, m). labels (n,).

        error <= 4 max_c P(c) sum_{j>t} sigma_j^4 + 4 alpha~

    with alpha~ <= 2 alpha the probability that two contexts drawn through one target differ in label
    (THEORY.md). The best features are U_t up to an invertible matrix (Eckart-Young). Equal sigma_j leave U_t
    free: a mean over random rotations.
    """
    C, Y = P.sum(1), (labels[:, None] == np.unique(labels)).astype(float)
    turned, sigma = best_features(P, rotations, seed)
    alpha = max(1 - ((P.T @ Y) ** 2 / P.sum(0)[:, None]).sum(), 0.0)  # P_T(X, X') = sum over X+ of P P / P_G
    tail = (sigma ** 4)[::-1].cumsum()[::-1] - sigma ** 4
    return {"error": np.mean([probe_errors(U, C, Y) for U in turned], axis=0), "tail": tail,
            "alpha_tilde": alpha, "singular_values": sigma, "bound": 4 * C.dot(Y).max() * tail + 4 * alpha}


def ties(P, labels, bags, t, seed=0):
    """Where more than t singular values are 1 any t of their directions are optimal: the probe's error with
    the best and with the worst choice, and with that of networks trained on bags of tokens."""
    C, (U, sigma, _) = P.sum(1), np.linalg.svd(normalised(P), full_matrices=False)
    U, Y = U[:, sigma > 1 - 1e-9], (labels[:, None] == np.unique(labels)).astype(float)
    told = np.linalg.qr(np.sqrt(C)[:, None] * Y)[0]  # the class itself
    silent = U @ np.linalg.svd(told.T @ U)[2][told.shape[1]:].T                               # no word of it
    networks = [probe_errors(np.linalg.qr(np.sqrt(C)[:, None] * f)[0], C, Y)[-1]
                for f in trained_on_bags(P, bags, t, seed=seed)]
    best, worst = (probe_errors(np.hstack(x), C, Y)[t - 1] for x in ((told, silent), (silent, told)))
    return {"best": best, "worst": worst, "networks": np.array(networks)}


def trained_on_bags(P, bags, t, networks=10, width=64, steps=1000, seed=0):
    """Networks f(X) = ReLU(bag of X's tokens W1) W2 trained on the exact spectral loss, of all pairs
    -> f (networks, n, t)."""
    generator = torch.Generator().manual_seed(seed)
    P, x = torch.tensor(P), torch.tensor(bags, dtype=torch.float64)
    (C, G), sizes, weights = (P.sum(1), P.sum(0)), (x.shape[1], width, t, P.shape[1]), []
    for a, b, scale in zip(sizes, sizes[1:], (sizes[0] ** -0.5, width ** -0.5, 0.1)):
        start = torch.randn(networks, a, b, generator=generator, dtype=torch.float64) * scale
        weights.append(start.requires_grad_())
    optimizer = torch.optim.Adam(weights, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        f = (x @ weights[0]).relu() @ weights[1]  # (networks, n, t)
        scores = f @ weights[2]  # (networks, n, m)
        loss = -2 * (P * scores).sum() + (C[:, None] * scores.square() * G).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return f.detach().numpy()


def random_directions(r, s, seed, batches=100):
    """The probe's mean error on r random ones of the autoregressive directions, whose values are all 1. It is
    the same for every T, and known to .0003 at r = 3, s = 4."""
    P, classes, _ = cooccurrence(from_options("ar"), token_sets(r, s, 1))
    C, Y, rng, errors = P.sum(1), np.eye(r)[classes], np.random.default_rng(seed), []
    U, root = np.linalg.svd(normalised(P), full_matrices=False)[0], np.sqrt(C)[:, None]
    head = U.T @ (root * Y)                                                    # (r(s-1), r)
    for _ in range(batches):
        Q = np.linalg.qr(rng.normal(size=(1000, len(head), r)))[0]             # (1000, r(s-1), r)
        scores = U @ (Q @ (Q.swapaxes(1, 2) @ head)) / root                                # (1000, r(s-1), r)
        best = scores > scores.max(-1, keepdims=True) - 1e-9
        errors.append((1 - (best * Y).sum(-1) / best.sum(-1)) @ C)
    return np.mean(errors)


def theorem41(r, s, T, rho, rotations=30, seed=0):
    """Probe error and bound for every t: error <= c1 sum_{j>t} sigma_j^4 + c2 alpha.

    Probed are the class, from autoregressive and masked features, and the length of the context, from
    autoregressive and variable-length ones. All r(s-1) autoregressive values are 1, so what the probe finds
    at t = r is left open by the tie. BadInput: as for theorem42.
    """
    n, probes = hidden_of(rho, s), {}
    for name, objective in (("ar", from_options("ar")), ("mlm", from_options("mlm", mask=n / s)),
                            ("vl", from_options("vl", mask=(1 / s, 1 - 1 / s)))):
        P, classes, bags = cooccurrence(objective, token_sets(r, s, T))
        if name != "vl":
            probes[f"{name}_class"] = probe_bound(P, classes, rotations, seed)
        if name != "mlm":
            probes[f"{name}_length"] = probe_bound(P, bags.sum(1), rotations, seed)
        if name == "ar":
            tie = ties(P, classes, bags, r, seed)
        if name == "mlm":
            P_T = P / P.sum(0) @ P.T / np.sqrt(np.outer(P.sum(1), P.sum(1)))
            squares = np.linalg.eigvalsh(P_T)[::-1][:len(probes["mlm_class"]["singular_values"])]
    one, two = probes["ar_class"], probes["mlm_class"]
    padded = np.append(one["tail"], np.zeros(len(two["tail"])))[:len(two["tail"])]
    result = {"probes": probes, "tie": {**tie, "random": random_directions(r, s, seed)}, "classes": r,
              "positions": s, "hidden": n, "units": len(one["error"]),
              "reversed_at": [t for t, (a, b) in enumerate(zip(padded, two["tail"]), 1) if b > a + 1e-9],
              "eigenvalue_error": np.abs(squares - two["singular_values"] ** 2).max()}
    return {**result, "rows": list(rows41(result))}


def rows41(x):
    r, s, tie, probes, reversed_at = x["classes"], x["positions"], x["tie"], x["probes"], x["reversed_at"]
    slack = min((y["bound"] - y["error"]).min() for y in probes.values())
    yield row("4.1  error <= c1 sum sigma_j^4 + c2 alpha", "c1, c2 not given", "c1 = 4 max P(c), c2 = 8",
              slack > -1e-9, "holds")
    yield row("4.1  sigma_j^2 is the j-th singular value", "of Abar", "of Abar Abar^T",
              x["eigenvalue_error"] < 1e-10, "sigma_j is")
    if r > 1 and s > 2 and x["hidden"] > 1:  # else nothing is open for ar, or all is for mlm
        mlm, networks = probes["mlm_class"]["error"][r - 1], tie["networks"]
        yield row(f"4.1  probe of the class, t = r = {r}, s = {s}", "AR worse",
                  f"mlm {mlm:.2f}; ar {tie['best']:.2f} .. {tie['worst']:.2f}, random {tie['random']:.2f}, "
                  f"networks {networks.min():.2f} .. {networks.max():.2f}",
                  max(mlm, tie["best"]) < 1e-9 and tie["worst"] > tie["random"] > networks.mean(),
                  "depends on the tie")
    span = f"{reversed_at[0]} <= t <= {reversed_at[-1]}" if reversed_at else "no t"
    yield row("4.1  the masked tail is the smaller one", "implied, all t", f"larger at {span}",
              set(range(r * (s - 1), r * s)) <= set(reversed_at), "reversed there")
    if s > 2:  # else all contexts are of one length
        ar, vl = (probes[f"{name}_length"]["error"][r * (s - 1) - 1] for name in ("ar", "vl"))
        yield row(f"4.1  probe of the length, t = r(s-1) = {r * (s - 1)}", "AR worse",
                  f"ar {ar:.3f}, vl {vl:.3f}", ar < vl - 0.01, "label decides")


# ---------------------------------------------------------------------------- every objective, every claim

def every_objective(s):
    """All registered objectives, with options that fit s tokens."""
    options = {"dar": [{"t": t} for t in sorted({2, 3, 4, s - 1}) if 1 < t < s], "mtp": [{"t": 2}],
               "mlm": [{"mask": 0.5}], "vl": [{"mask": (1 / s, 1 - 1 / s)}], "blocks": [{"block": 3}],
               "spans": [{"mask": 0.5, "span": 2}]}
    return [from_options(name, **given) for name in OBJECTIVES for given in options.get(name, [{}])]


def spectrum_of(objective, s):
    """What `spectrum` returns, with the names of what it is of."""
    return {"objective": describe(objective), "s": s, **spectrum(objective, s, flag(objective))}


def beyond_the_theorems(s=8):
    """The spectra of all objectives, what Theorem 4.1 says of Table 9, of Eq. 3 and of networks that are told
    the position -> {"spectra", "dar_tails", "table_9", "rows"}."""
    spectra = []
    for objective in every_objective(s):
        with contextlib.suppress(BadInput):  # one that somebody added may not fit
            spectra.append(spectrum_of(objective, 16 if objective.images_only else s))
    tails = [spectrum(from_options("dar", t=t), s)["tail_sigma4_per_class"] for t in range(1, s)]
    eq6, eq3 = (spectrum(from_options(name, t=2), s)["singular_values"][1] for name in ("dar", "mtp"))
    told = min(spectrum(from_options(name), s, told=True)["singular_values"].min()
               for name in ("dar", "mlm", "permutation"))
    rows = []
    for x in spectra:
        tail, closed = x["tail_sigma4_per_class"], x["closed_form_tail"]  # weights are float32
        rows.append(row(f"new  {x['objective']}, s = {x['s']}: tail sum of sigma^4", "", f"{tail:.6f}",
                        closed is None or abs(closed - tail) < 1e-6,
                        "enumerated" if closed is None else f"formula {closed:.6f}"))
    rows += [row("T.9  accuracy peaks at t = 3", f"{TABLE_9[3][0]}, then {TABLE_9[4][0]}",
                 f"tail still falls: {tails[2]:.3f}, {tails[3]:.3f}", (np.diff(tails) < 0).all(),
                 "not explained"),
             row("Eq6  equivalent to Eq. 3, t = 2", "sigma_2 equal", f"{eq6:.6f}, {eq3:.6f}",
                 abs(eq6 - eq3) > 1e-3, "weights differ"),
             row("new  networks told where they predict", "", f"all sigma_j = {told:.6f}", told > 1 - 1e-9,
                 "all spectra flat")]
    return {"spectra": spectra, "dar_tails": tails, "table_9": TABLE_9, "rows": rows}


def every_claim(seed=0):
    """Every claim of the paper that can be computed: the rows of all theorems. Theorem 4.2 is at rho = 3/4,
    where a coin for each token is not the same as an exact count."""
    parts = [theorem31(seed=seed), theorem42(2, 4, 2, 0.75), theorem42(2, 4, 2, 0.75, literal=True),
             beyond_the_theorems(), theorem41(3, 4, 2, 0.5, seed=seed), theorem43(seed=seed)]
    return {"claims": [claim for part in parts for claim in part["rows"]],
            **{name: parts[3][name] for name in ("spectra", "dar_tails", "table_9")}}


# ---------------------------------------------------------------------------- command line

def spectrum_command(args):
    """The objectives of the command line -> {"spectra": [..]}, each with the tail sum over all r classes."""
    names, spectra = list(dict.fromkeys(args.objective)), []
    for objective in several(names, vars(args)):
        if hasattr(objective, "mask") and objective.max_targets(args.s) == 1:
            note(f"{describe(objective)} hides one of {args.s} tokens, so that each context has one target "
                 "and the spectrum is flat; a larger --s shows more")
        x = spectrum_of(objective, args.s)
        others = x.get("singular_values_other_classes", x["singular_values"])
        every = np.sort(np.append(x["singular_values"], np.tile(others, args.r - 1)))[::-1]
        spectra.append({**x, "r": args.r, "tail_sigma4": (every[args.r:] ** 4).sum()})
    return {"spectra": spectra}


def show_rows(x):
    columns = ("claim", "printed", "computed", "verdict")
    return table([columns, *([row[name] for name in columns] for row in x.get("claims") or x["rows"])], "<")


def show_spectra(x):
    rows = [("objective", "s", "tail, j > 1", "singular values of a class", "closed form")]
    for y in x["spectra"]:
        form = y["closed_form_text"] or ""
        rows.append((y["objective"], str(y["s"]), f"{y['tail_sigma4_per_class']:.6f}",
                     multiplicities(y["singular_values"]), f"{form} ({y['method']})".strip()))
    return table(rows, "<")


COMMANDS = {  # what computes, and what it is
    "all": (lambda a: every_claim(a.seed), "every claim: printed, computed, verdict"),
    "theorem3.1": (lambda a: theorem31(seed=a.seed), "spectral loss = matrix factorisation"),
    "theorem4.1": (lambda a: theorem41(a.r, a.s, a.T, a.rho, seed=a.seed), "probe error and its bound"),
    "theorem4.2": (lambda a: theorem42(a.r, a.s, a.T, a.rho, a.literal_tokens), "singular values, toy model"),
    "theorem4.3": (lambda a: theorem43(a.r, a.s, a.T, a.rho, a.steps, seed=a.seed), "generation bounds"),
    "spectrum": (spectrum_command, "singular values of any objective"),
    "toy": (run_toy, "networks on toy models, noisy and not")}


def main(argv=None):
    """Prints what a command found and writes it where --json says -> 0, or 1 where a claim of `all` fails."""
    parser = Parser(description="The theory of the paper, checked and extended to every objective.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    sub = {name: commands.add_parser(name, help=text, description=text)
           for name, (_, text) in COMMANDS.items()}
    for command in sub.values():
        command.add_argument("--json", metavar="FILE", help="write the results as one JSON object; - for "
                             "standard output")
        command.add_argument("--seed", type=int, default=0, help="of every random choice")
    for name, toy in (("theorem4.1", (3, 4, 2)), ("theorem4.2", (2, 4, 2)), ("theorem4.3", (2, 6, 2))):
        for option, size, of in zip("rsT", toy, ("classes", "positions", "values per class and position")):
            sub[name].add_argument(f"--{option}", type=positive, default=size, help=f"toy model: {of}")
        sub[name].add_argument("--rho", type=float, default=0.5, help="mask ratio")
    sub["theorem4.2"].add_argument("--literal-tokens", action="store_true", help="the token sets as printed")
    sub["theorem4.3"].add_argument("--steps", type=positive, default=1000, help="training steps")
    sub["spectrum"].add_argument("--objective", choices=OBJECTIVES, nargs="+", required=True)
    sub["spectrum"].add_argument("--s", type=positive, default=16, help="positions")
    sub["spectrum"].add_argument("--r", type=positive, default=1, help="classes, for the tail sum over them")
    add_options(sub["spectrum"], argv)
    add_toy_arguments(sub["toy"])
    for name in ("all", "spectrum", "toy"):
        sub[name].add_argument("--plot", metavar="FILE", help="a picture of the results")
    args = parser.parse_args(argv)
    picture = getattr(args, "plot", None)
    if picture:
        plots.check(picture)
    target = Path(args.json or "-").absolute()
    if target.is_dir() or not target.parent.is_dir():
        raise BadInput(f"--json {args.json}: name a file in a folder that is there")
    torch.set_num_threads(1)  # the matrices are small
    results = COMMANDS[args.command][0](args)
    if args.json != "-":
        shows = {"toy": show_toy, "spectrum": show_spectra}
        print(shows.get(args.command, show_rows)(results))
    if picture:
        (plots.toy if args.command == "toy" else plots.spectra)(picture, plain(results))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
        write_json(args.json, {"command": f"spectral.py {args.command}", "settings": settings, **results})
    return int(not all(claim["checked"] for claim in results.get("claims", [])))


if __name__ == "__main__":
    command_line(main)
