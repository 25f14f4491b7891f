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

import numpy as np
import torch

import plots
from data import CLASSES, POSITIONS, VALUES
from experiments.generation_bound import descend, theorem43
from experiments.spectrum import (
    best_features,
    cooccurrence,
    hidden_of,
    multiplicities,
    normalised,
    pairs,
    probe_errors,
    row,
    spectrum,
    subsets,
    token_sets,
)
from experiments.toy import run_toy, show_toy
from objectives import OBJECTIVES, add_options, describe, flag, from_options, several, spectral_loss
from util import (
    BadInput,
    Parser,
    command_line,
    note,
    numbers,
    output_file,
    plain,
    positive,
    table,
    write_json,
)

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
        A, C, G = torch.tensor(normalised(P.numpy())), P.sum(1), P.sum(0)
        X, target = (torch.tensor(np.repeat(i, counts.ravel())) for i in counts.nonzero())  # each pair, often
        f, W = torch.tensor(rng.normal(size=(n, t))), torch.tensor(rng.normal(size=(m, t)))
        scores = (f @ W.T)[X]
        corrected = spectral_loss(scores, target, G)
        printed = corrected + scores.gather(1, target[:, None]).mean()                         # Eq. 1: once
        root, inner, norm = C.sqrt()[:, None], f @ f.T, A.square().sum()
        FW, P_T, both = root * f @ W.T * G.sqrt(), A @ A.T, root * root.T
        whole, half = (A - FW).square().sum() - norm, (A / 2 - FW).square().sum() - norm / 4
        attract, repel = (P_T * both * inner).sum(), (inner * both).square().sum()
        symmetric, eq7 = ((P_T - F @ F.T).square().sum() - P_T.square().sum() - repel + c * attract
                          for F, c in ((f * root, 2), (f / root, 1)))
        errors.append([whole - corrected, whole - printed, half - printed, symmetric, eq7])
    factor, lost, halved, symmetric, eq7 = torch.tensor(errors).abs().amax(0).tolist()
    # Gradient descent on the last P_M, in F and W', where the problem is well conditioned.
    F, W = (torch.tensor(rng.normal(size=(size, t)) * 0.1, requires_grad=True) for size in (n, m))
    optimizer = torch.optim.SGD((F, W), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = spectral_loss(((F / C.sqrt()[:, None]) @ (W / G.sqrt()[:, None]).T)[X], target, G)
        loss.backward()
        optimizer.step()
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    descent = (F @ W.T - (U[:, :t] * sigma[:t]) @ Vh[:t]).abs().max().item()
    squares = sigma.square()
    rows = [row("3.1  ||Abar - F W'^T||^2 = loss + const", "-1 E[W f]_X+", f"-2 E[W f]_X+, to {factor:.0e}",
                factor < 1e-10 and lost > 0.1, "factor 2 lost"),
            row("3.1  the printed loss factorises", "Abar", f"Abar / 2, to {halved:.0e}", halved < 1e-10,
                "half the scale"),
            row("3.1  the constant", "const", f"||Abar||_F^2 = sum sigma_j^2 = {norm:.6f}",
                abs(norm - squares.sum()) < 1e-10, "made exact"),
            row("3.1  gradient descent = truncated SVD", "implied", f"to {descent:.0e}", descent < 1e-6,
                "holds"),
            row("Eq7  the symmetric loss", "-1 E f.f', F = f/sqrt(P_C)",
                f"-2 E f.f', F = f sqrt(P_C), to {symmetric:.0e}", symmetric < 1e-10 and eq7 > 0.1,
                "both slip")]
    return {"identity_error": factor, "printed_error": lost, "half_scale_error": halved,
            "symmetric_error": symmetric, "eq7_error": eq7, "rank": t, "constant": norm,
            "sum_sigma2": squares.sum(), "singular_values": sigma, "descent_loss": loss.item(),
            "best_loss": -squares[:t].sum(), "descent_error": descent, "rows": rows}


# ---------------------------------------------------------------------------- Theorem 4.2

def theorem42(r, s, T, rho, literal=False):
    """Singular values of Abar on the enumerated toy model, autoregressive and masked, beside what is printed:

        sigma_j = 1 (autoregressive), sigma'_j = sqrt(s(1 - rho) / (s rho (s - 1))) (masked),  r < j <= rs.

    Autoregressive: each position p = 2..s is a rank-one block of its own per class: r(s-1) ones. A context of
    length 0 adds one block that all classes share. Masked: exactly n = round(rho s) tokens are hidden.
    `literal` takes the token sets as Sec. 4.1.2 prints them.
    """
    tokens, n = token_sets(r, s, T, literal), hidden_of(rho, s)
    visible = subsets(s)
    coins = rho ** (~visible).sum(1) * (1 - rho) ** visible.sum(1)  # Sec. 3.1: not all hidden, nor none
    cases = {"autoregressive": pairs(from_options("ar"), s),
             "autoregressive_empty_context": (np.tri(s, k=-1) > 0, np.eye(s) / s),
             "masked": pairs(from_options("mlm", mask=n / s), s),
             "masked_by_coin_flips": (visible, coins[:, None] * ~visible)}
    toy = {name: cooccurrence(*case, tokens) for name, case in cases.items()}
    A = {name: normalised(P) for name, (P, _, _) in toy.items()}
    sigma = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in A.items()}
    units = {name: int((values > 1 - 1e-9).sum()) for name, values in sigma.items()}
    last, ar, empty = r * s, units["autoregressive"], units["autoregressive_empty_context"]
    one, two = (np.append(sigma[name], np.zeros(last))[:last] for name in ("autoregressive", "masked"))
    not_larger = [j + 1 for j in range(r, last) if one[j] < two[j] + 1e-9]
    printed, exact = (np.append(np.ones(r), np.full(last - r, math.sqrt((s - k) / (k * (s - 1)))))
                      for k in (rho * s, n))
    own = (A["masked"][toy["masked"][1] == 0] > 0).any(0)  # targets of class 1
    entry, zeros = A["masked"].max(), int((A["masked"][0, own] == 0).sum())
    choose, own_choose = math.comb(s, n), math.comb(s - 1, s - n)  # C_s^{s_m} and C_{s-1}^{s_m} of A.3
    printed_entry, whole = math.sqrt(s * T * choose * T ** (s - n)) / own_choose, abs(rho * s - n) < 1e-9
    result = {**sigma, "unit_values": units, "not_larger_at": not_larger,
              "printed": {"autoregressive": np.ones(last), "masked": printed, "masked_entry": printed_entry,
                          "zeros_in_row": own_choose},
              "masked_entry": entry, "zeros_in_row": zeros, "classes": r, "hidden": n, "rho": rho,
              "whole": whole, "literal_tokens": literal}
    if literal:
        collide = (units["masked"] < r) == (r >= 2 and T >= 2)
        return {**result, "rows": [row("4.2  the printed tokens tell classes apart", f"{r} unit sigma_j",
                                       f"{units['masked']}", collide, "classes collide")]}

    mean = coins @ (~visible).sum(1) / coins.sum()  # hidden tokens
    coin, excluded = sigma["masked_by_coin_flips"][r], " (the theorem excludes n = 1)" * (n == 1)
    rows = [
        row(f"4.2  AR: unit sigma_j, r = {r}, s = {s}", f"rs = {last}", f"{ar}; {empty} with empty context",
            (ar, empty) == (last - r, last - r + 1), "r(s-1), or plus 1"),
        row("4.2  sigma_j (AR) > sigma_j (masked)", f"{r} < j <= {last}",
            f"fails at j = {not_larger}{excluded}",
            not_larger == list(range((r if n == 1 else last - r) + 1, last + 1)), "last r fail"),
        row(f"4.2  masked, n = {n} of {s} hidden, rho = {rho:g}", multiplicities(printed),
            multiplicities(two), np.allclose(two, exact),
            "holds" if whole else "holds where rho s is whole"),
        row(f"4.2  coin-flip mask, rho = {rho:g}", f"sigma_{r + 1} = {printed[r]:.6f}",
            f"sigma_{r + 1} = {coin:.6f}", abs(coin ** 2 - (s / mean - 1) / (s - 1)) < 1e-9,
            "exact counts only" if abs(coin - printed[r]) > 1e-6 else "holds at rho = 1/2"),
        row("A.3  entries of masked Abar", f"{printed_entry:.6f}", f"{entry:.6f}",
            abs(entry - math.sqrt(s / (choose * T ** (s - n + 1))) / n) < 1e-9,
            "sqrt(s/(C T^(s_m+1)))/(s-s_m)"),
        row("A.3  zeros in a row, in its class", str(own_choose), str(zeros), zeros == (s - n) * T, "s_m T")]
    return {**result, "rows": rows}


# ---------------------------------------------------------------------------- Theorem 4.1

def probe_bound(P, labels, rotations=30, seed=0):
    """Error of the least-squares probe on the best rank-t features, and its bound, for t = 1 .. rank, under P
    (n, m). labels (n,).

        error <= 4 max_c P(c) sum_{j>t} sigma_j^4 + 4 alpha~

    with alpha~ <= 2 alpha the probability that two contexts drawn through one target differ in label
    (THEORY.md). Equal sigma_j leave the best features free: a mean over random rotations.
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
    (C, G), sizes = (P.sum(1), P.sum(0)), (x.shape[1], width, t, P.shape[1])
    weights = [torch.randn(networks, a, b, generator=generator, dtype=torch.float64) * scale
               for a, b, scale in zip(sizes, sizes[1:], (sizes[0] ** -0.5, width ** -0.5, 0.1))]
    W1, W2, W = (start.requires_grad_() for start in weights)

    def loss():
        scores = (x @ W1).relu() @ W2 @ W  # (networks, n, m)
        return -2 * (P * scores).sum() + (C[:, None] * scores.square() * G).sum()

    descend(loss, (W1, W2, W), steps)
    return ((x @ W1).relu() @ W2).detach().numpy()


def random_directions(r, s, seed, batches=100):
    """The probe's mean error on r random ones of the autoregressive directions, whose values are all 1. It is
    the same for every T, and known to .0003 at r = 3, s = 4."""
    P, classes, _ = cooccurrence(*pairs(from_options("ar"), s), token_sets(r, s, 1))
    C, Y, rng, errors = P.sum(1), np.eye(r)[classes], np.random.default_rng(seed), []
    U, root = np.linalg.svd(normalised(P), full_matrices=False)[0], np.sqrt(C)[:, None]
    head = U.T @ (root * Y)                                                    # (r(s-1), r)
    for _ in range(batches):
        Q = np.linalg.qr(rng.normal(size=(1000, len(head), r)))[0]             # (1000, r(s-1), r)
        scores = U @ (Q @ (Q.swapaxes(1, 2) @ head)) / root                                # (1000, r(s-1), r)
        best = scores > scores.max(-1, keepdims=True) - 1e-9
        errors.append((1 - (best * Y).sum(-1) / best.sum(-1)) @ C)
    return np.mean(errors)


def theorem41(r, s, T, rho, seed=0):
    """Probe error and bound for every t: of the class, from autoregressive and masked features, and of the
    length of the context, from autoregressive and variable-length ones. All r(s-1) autoregressive values are
    1, so what the probe finds at t = r is left open by the tie."""
    tokens, n = token_sets(r, s, T), hidden_of(rho, s)
    ar, mlm, vl = (cooccurrence(*pairs(x, s), tokens) for x in (
        from_options("ar"), from_options("mlm", mask=n / s), from_options("vl", mask=(1 / s, 1 - 1 / s))))
    one, two = (probe_bound(P, classes, seed=seed) for P, classes, _ in (ar, mlm))
    ar_length, vl_length = (probe_bound(P, bags.sum(1), seed=seed) for P, _, bags in (ar, vl))
    probes = {"ar_class": one, "mlm_class": two, "ar_length": ar_length, "vl_length": vl_length}
    slack = min((x["bound"] - x["error"]).min() for x in probes.values())
    P = mlm[0]
    P_T, sigma = P / P.sum(0) @ P.T / np.sqrt(np.outer(P.sum(1), P.sum(1))), two["singular_values"]
    eigenvalue_error = np.abs(np.linalg.eigvalsh(P_T)[::-1][:len(sigma)] - sigma ** 2).max()
    tie = {**ties(*ar, r, seed), "random": random_directions(r, s, seed)}
    best, worst, networks, random = (tie[name] for name in ("best", "worst", "networks", "random"))
    padded = np.append(one["tail"], np.zeros(len(sigma)))[:len(sigma)]
    reversed_at = (1 + np.nonzero(two["tail"] > padded + 1e-9)[0]).tolist()
    span = f"{reversed_at[0]} <= t <= {reversed_at[-1]}" if reversed_at else "no t"
    rows = [row("4.1  error <= c1 sum sigma_j^4 + c2 alpha", "c1, c2 not given", "c1 = 4 max P(c), c2 = 8",
                slack > -1e-9, "holds"),
            row("4.1  sigma_j^2 is the j-th singular value", "of Abar", "of Abar Abar^T",
                eigenvalue_error < 1e-10, "sigma_j is")]
    if r > 1 and s > 2 and n > 1:  # else nothing is open for ar, or all is for mlm
        masked = two["error"][r - 1]
        rows.append(row(f"4.1  probe of the class, t = r = {r}, s = {s}", "AR worse",
                        f"mlm {masked:.2f}; ar {best:.2f} .. {worst:.2f}, random {random:.2f}, "
                        f"networks {networks.min():.2f} .. {networks.max():.2f}",
                        max(masked, best) < 1e-9 and worst > random > networks.mean(), "depends on the tie"))
    rows.append(row("4.1  the masked tail is the smaller one", "implied, all t", f"larger at {span}",
                    set(range(r * (s - 1), r * s)) <= set(reversed_at), "reversed there"))
    if s > 2:  # else all contexts are of one length
        a, b = (x["error"][r * (s - 1) - 1] for x in (ar_length, vl_length))
        rows.append(row(f"4.1  probe of the length, t = r(s-1) = {r * (s - 1)}", "AR worse",
                        f"ar {a:.3f}, vl {b:.3f}", a < b - 0.01, "label decides"))
    return {"probes": probes, "tie": tie, "classes": r, "positions": s, "hidden": n,
            "units": len(one["error"]), "reversed_at": reversed_at, "eigenvalue_error": eigenvalue_error,
            "rows": rows}


# ---------------------------------------------------------------------------- every objective, every claim

def spectrum_of(objective, s):
    """What `spectrum` returns, with the names of what it is of."""
    return {"objective": describe(objective), "s": s, **spectrum(objective, s, flag(objective))}


def every_claim(s=8, seed=0):
    """Every claim of the paper that can be computed: the rows of all theorems, then of all objectives on s
    positions. Theorem 4.2 is at rho = 3/4, where a coin for each token is not the same as an exact count."""
    spectra, rows = [], []
    for theorem in (theorem31(seed=seed), theorem42(2, 4, 2, 0.75), theorem42(2, 4, 2, 0.75, literal=True)):
        rows += theorem["rows"]
    options = {"dar": [{"t": t} for t in (2, 3, 4, s - 1)], "mtp": [{"t": 2}], "mlm": [{"mask": 0.5}],
               "vl": [{"mask": (1 / s, 1 - 1 / s)}], "blocks": [{"block": 3}],
               "spans": [{"mask": 0.5, "span": 2}]}
    for objective in (from_options(name, **x) for name in OBJECTIVES for x in options.get(name, [{}])):
        with contextlib.suppress(BadInput):  # one that somebody added may not fit
            spectra.append(spectrum_of(objective, 16 if objective.images_only else s))
    for x in spectra:
        tail, closed = x["tail_sigma4_per_class"], x["closed_form_tail"]  # weights are float32
        rows.append(row(f"new  {x['objective']}, s = {x['s']}: tail sum of sigma^4", "", f"{tail:.6f}",
                        closed is None or abs(closed - tail) < 1e-6,
                        "enumerated" if closed is None else f"formula {closed:.6f}"))
    tails = [spectrum(from_options("dar", t=t), s)["tail_sigma4_per_class"] for t in range(1, s)]
    eq6, eq3 = (spectrum(from_options(name, t=2), s)["singular_values"][1] for name in ("dar", "mtp"))
    told = min(spectrum(from_options(name), s, told=True)["singular_values"].min()
               for name in ("dar", "mlm", "permutation"))
    rows += [row("T.9  accuracy peaks at t = 3", f"{TABLE_9[3][0]}, then {TABLE_9[4][0]}",
                 f"tail still falls: {tails[2]:.3f}, {tails[3]:.3f}", (np.diff(tails) < 0).all(),
                 "not explained"),
             row("Eq6  equivalent to Eq. 3, t = 2", "sigma_2 equal", f"{eq6:.6f}, {eq3:.6f}",
                 abs(eq6 - eq3) > 1e-3, "weights differ"),
             row("new  networks told where they predict", "", f"all sigma_j = {told:.6f}", told > 1 - 1e-9,
                 "all spectra flat")]
    rows += [*theorem41(3, 4, 2, 0.5, seed=seed)["rows"], *theorem43(seed=seed)["rows"]]
    return {"claims": rows, "spectra": spectra, "dar_tails": tails, "table_9": TABLE_9}


# ---------------------------------------------------------------------------- command line

def spectrum_command(args):
    """The objectives of the command line -> {"spectra": [..]}, each with the tail sum over all r classes."""
    spectra = []
    for objective in several(list(dict.fromkeys(args.objective)), vars(args)):
        if hasattr(objective, "mask") and objective.max_targets(args.s) == 1:
            note(f"{describe(objective)} hides one of {args.s} tokens, so that each context has one target "
                 "and the spectrum is flat; a larger --s shows more")
        x = spectrum_of(objective, args.s)
        spectra.append({**x, "r": args.r, "tail_sigma4": args.r * x["tail_sigma4_per_class"]})
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
    "all": (lambda a: every_claim(seed=a.seed), "every claim: printed, computed, verdict"),
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
        command.add_argument("--json", type=output_file, metavar="FILE", help="write the results as one JSON "
                             "object; - for standard output")
        command.add_argument("--seed", type=int, default=0, help="of every random choice")
    for name, toy in (("theorem4.1", (3, 4, 2)), ("theorem4.2", (2, 4, 2)), ("theorem4.3", (2, 6, 2)),
                      ("toy", (CLASSES, POSITIONS, VALUES))):
        for option, size, of in zip("rsT", toy, ("classes", "positions", "values per class and position")):
            sub[name].add_argument(f"--{option}", type=positive, default=size, help=f"toy model: {of}")
        if name != "toy":
            sub[name].add_argument("--rho", type=float, default=0.5, help="mask ratio")
    sub["theorem4.2"].add_argument("--literal-tokens", action="store_true", help="the token sets as printed")
    sub["theorem4.3"].add_argument("--steps", type=positive, default=1000, help="training steps")
    sub["toy"].add_argument("--steps", type=positive, help="training steps (default: 1000, quick 300)")
    sub["toy"].add_argument("--eps", type=numbers, help="how often a class is redrawn (default: 0,0.3,0.5)")
    sub["toy"].add_argument("--quick", action="store_true", help="six objectives, few steps: half a minute")
    sub["spectrum"].add_argument("--objective", choices=OBJECTIVES, nargs="+", required=True)
    sub["spectrum"].add_argument("--s", type=positive, default=16, help="positions")
    sub["spectrum"].add_argument("--r", type=positive, default=1, help="classes, for the tail sum over them")
    add_options(sub["spectrum"], argv)
    for name in ("all", "spectrum", "toy"):
        sub[name].add_argument("--plot", metavar="FILE", help="a picture of the results")
    args = parser.parse_args(argv)
    picture = getattr(args, "plot", None)
    if picture:
        plots.check(picture)
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
