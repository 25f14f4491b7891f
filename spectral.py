"""The theory of the paper as code: what it prints, what holds, and the spectrum of any objective.

    python spectral.py all                                        every claim on one page
    python spectral.py spectrum --objective dar mtp --t 2 --s 8   singular values of objectives
    python spectral.py theorem4.2 --r 2 --s 4 --T 2 --rho 0.5     a theorem (3.1, 4.1, 4.2, 4.3), corrected
    python spectral.py toy --quick                                networks on toy models, noisy and not
    python spectral.py trained CKPT [CKPT ...]                    the operator as trained networks see it

Set-up (Sec. 3.2). An objective pairs a context X with a target X+; P_M is their joint distribution, P_C and
P_G its marginals, Abar = P_M / sqrt(P_C P_G), sigma_j the j-th singular value of Abar. The toy model D_sim
(Sec. 4.1.2) has r classes, s positions and T values for each class and position; given the class, tokens are
independent and uniform. How P_M follows from f, and the closed forms, are in support/operator.py; Theorem 4.3
is in theory/attention.py, networks on the toy model are in theory/toy.py. Here are Theorems 3.1, 4.1 and 4.2.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from downstream.trained import add_trained_arguments, show_trained, trained
from objectives import OBJECTIVES, add_options, describe, flag, from_options, options_of, spectral_loss
from support import operator
from support.cli import (
    BadInput,
    Parser,
    command_line,
    import_optional,
    output_file,
    plain,
    positive,
    seed,
    told,
    write_json,
)
from support.objective import Objective
from support.operator import cooccurrence, hidden_of, normalised, spectrum, token_sets
from support.options import share_options
from theory import claims, pictures, show
from theory.attention import theorem43
from theory.toy import add_toy_arguments, run_toy
from theory.toy_report import plot_toy, show_toy

# ---------------------------------------------------------------------------- Theorem 3.1

def theorem31(n=8, m=7, t=3, trials=30, steps=1500, seed=0):
    """The spectral loss as matrix factorisation, on random P_M (n contexts, m targets), f and W of rank t.

        ||Abar - F W'^T||_F^2 = -2 E [W f(X)]_X+ + E ([W f(X)]_X-)^2 + ||Abar||_F^2
        F_X = sqrt(P_C(X)) f(X),  W'_X+ = sqrt(P_G(X+)) W_X+
    since the cross term of the square is 2 Abar_XX+ F_X W'_X+ = 2 P_M(X, X+) [W f(X)]_X+. Eq. 1 prints it
    once. Eq. 7 is the same for contexts X, X' that share a target: P_T / sqrt(P_C P_C) = Abar Abar^T and W' =
    F.

    Returns {NAME_error: the largest over `trials` distributions, for the identity, what is printed and Eq. 7;
    "singular_values" of the last Abar, and where `steps` of gradient descent on its loss end: "descent_loss"
    beside "best_loss", "descent_error" from the truncated SVD}.
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
        printed = corrected + scores.gather(1, target[:, None]).mean().item()               # Eq. 1: once
        FW, norm = (C.sqrt()[:, None] * f @ W.T * G.sqrt()).numpy(), (A ** 2).sum()
        whole, half = ((A - FW) ** 2).sum() - norm, ((A / 2 - FW) ** 2).sum() - norm / 4
        errors.append([*np.abs([whole - corrected, whole - printed, half - printed]),
                       *symmetric_errors(A @ A.T, C.numpy(), f.numpy())])
    # Gradient descent on the last P_M. Its steps are taken in F and W', where the problem is well
    # conditioned.
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
    return {**dict(zip(names, np.max(errors, axis=0))), "rank": t, "constant": norm,
            "sum_sigma2": (sigma ** 2).sum(), "singular_values": sigma, "descent_loss": loss.item(),
            "descent_error": np.abs((F @ W.T).detach().numpy() - truncated).max(),
            "best_loss": -(sigma[:t] ** 2).sum()}


def symmetric_errors(P_T, C, f):
    """How far -c E f(X).f(X') + E (f(X).f(X-))^2 is from ||P_T - F F^T||^2 - ||P_T||^2: with c = 2 and
    F = f sqrt(P_C), and as Eq. 7 has it, c = 1 and F = f / sqrt(P_C). P_T (n, n) normalised, C (n,), f (n,
    t)."""
    inner, root = f @ f.T, np.sqrt(C)[:, None]
    attract, repel = (P_T * root * root.T * inner).sum(), (inner ** 2 * np.outer(C, C)).sum()
    squares = [((P_T - F @ F.T) ** 2).sum() - (P_T ** 2).sum() for F in (f * root, f / root)]
    return [abs(square - repel + c * attract) for square, c in zip(squares, (2, 1))]


# ---------------------------------------------------------------------------- Theorem 4.2

@dataclass(frozen=True)
class CoinFlips(Objective):
    """The mask of Sec. 3.1: each token is hidden by a coin of its own. Neither all of them nor none are."""

    rho: float = 0.5

    def outcomes(self, length, limit=200_000):
        if 2 ** length <= limit:
            f = 1 + np.indices((2,) * length).reshape(length, -1).T[1:-1]
            share = self.rho ** (f > 1).sum(1) * (1 - self.rho) ** (f == 1).sum(1)
            return torch.tensor(f), torch.tensor(share / share.sum())


def theorem42(r, s, T, rho, literal=False):
    """Singular values of Abar on the enumerated toy model, autoregressive and masked, beside what is printed:

        sigma_j = 1 (autoregressive), sigma'_j = sqrt(s(1 - rho) / (s rho (s - 1))) (masked),  r < j <= rs.

    Autoregressive: each position p = 2..s is a rank-one block of its own per class: r(s-1) ones. A context of
    length 0 adds one block that all classes share: r(s-1) + 1. The statement has rs, which neither gives for
    r >= 2. Masked: computed with exactly n = round(rho s) hidden tokens, where it holds if n = rho s.

    Returns {case: singular values, descending; "printed": theirs; "unit_values": how many are 1, by case;
    "not_larger_at": the j at which sigma_j <= sigma'_j; entries, zeros and blocks of the matrices}. BadInput:
    n = 0 or s, or more contexts than can be enumerated.
    """
    n, ar, tokens = hidden_of(rho, s), from_options("ar"), token_sets(r, s, T, literal)
    cases = {"autoregressive": ar, "autoregressive_empty_context": operator.FromNothing(ar),
             "masked": from_options("mlm", mask=n / s)}
    if s <= 12:
        cases["masked_by_coin_flips"] = CoinFlips(rho)
    matrices = {name: cooccurrence(objective, tokens) for name, objective in cases.items()}
    A = {name: normalised(P) for name, (P, _, _) in matrices.items()}
    result = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in A.items()}
    one, two = (np.append(result[name], np.zeros(r * s))[:r * s] for name in ("autoregressive", "masked"))
    value, C = math.sqrt((1 - rho) / (rho * (s - 1))), math.comb(s - 1, s - n)          # C_{s-1}^{s_m} of A.3
    printed = {"autoregressive": [1.0] * (r * s), "masked": [1.0] * r + [value] * (r * (s - 1)),
               "masked_entry": math.sqrt(s * T * math.comb(s, n) * T ** (s - n)) / C, "zeros_in_row": C,
               "blocks": [f"{T ** i} x {T ** i}" for i in range(1, s + 1)]}
    own = (A["masked"][matrices["masked"][1] == 0] > 0).any(0)                 # targets of the first class
    seen, rows = np.unique(A["autoregressive"] > 0, axis=0, return_counts=True)
    sizes = sorted(zip(rows.tolist(), seen.sum(1).tolist()))
    return {**result, "unit_values": {name: int((sigma > 1 - 1e-9).sum()) for name, sigma in result.items()},
            "not_larger_at": [j + 1 for j in range(r, r * s) if one[j] < two[j] + 1e-9], "printed": printed,
            "masked_entry": A["masked"].max(), "zeros_in_row": int((A["masked"][0, own] == 0).sum()),
            "blocks": [f"{height} x {width}" for height, width in sizes[::r]], "classes": r, "hidden": n,
            "rho": rho, "whole": abs(rho * s - n) < 1e-9, "literal_tokens": literal}


# ---------------------------------------------------------------------------- Theorem 4.1

def probe_error(basis, C, labels):
    """Error of the least-squares probe on the first 1, 2, .. columns of an orthonormal basis (n, k) of
    features times sqrt(P_C), C = P_C (n,) -> (k,). Its scores are the projections of v_c = sqrt(P_C) 1[y =
    c]; a tie is a guess."""
    Y = (labels[:, None] == np.unique(labels)).astype(float)
    v, scores, error = np.sqrt(C)[:, None] * Y, np.zeros(Y.shape), []
    for column in basis.T:
        scores = scores + np.outer(column, column @ v)
        best = scores / np.sqrt(C)[:, None]
        best = best > best.max(1, keepdims=True) - 1e-9
        error.append((C * (1 - (best * Y).sum(1) / best.sum(1))).sum())
    return np.array(error)


def probe_errors(P, labels, rotations=30, seed=0):
    """Error of the probe on the best rank-t features, and its bound, for t = 1 .. rank, under P (n, m).

    The best features are U_t up to an invertible matrix (Eckart-Young). Equal sigma_j leave U_t free: a mean
    over random rotations.

    Bound: the part of v_c outside U_t is at most ||(I - AA^T) v_c|| plus the part of AA^T v_c outside U_t.
    Squared and summed over c these are at most alpha~ and max_c P(c) sum_{j>t} sigma_j^4, the v_c being
    orthogonal of length sqrt(P(c)). A wrong argmax costs a squared error of 1/2, and (a + b)^2 <= 2a^2 +
    2b^2:
        error <= 4 max_c P(c) sum_{j>t} sigma_j^4 + 4 alpha~
    with alpha~ <= 2 alpha the probability that two contexts drawn through one target differ in label.
    """
    rng, C = np.random.default_rng(seed), P.sum(1)
    U, sigma, _ = np.linalg.svd(normalised(P), full_matrices=False)
    U, sigma = U[:, sigma > 1e-9], sigma[sigma > 1e-9]
    Y = (labels[:, None] == np.unique(labels)).astype(float)
    equal = np.split(np.arange(len(sigma)), np.nonzero(-np.diff(sigma) > 1e-9)[0] + 1)
    errors = []
    for _ in range(rotations):
        turned = [U[:, j] @ np.linalg.qr(rng.normal(size=(len(j), len(j))))[0] for j in equal]
        errors.append(probe_error(np.hstack(turned), C, labels))
    alpha = 1 - ((P.T @ Y) ** 2 / P.sum(0)[:, None]).sum()           # P_T(X, X') = sum over X+ of P P / P_G
    tail = (sigma ** 4)[::-1].cumsum()[::-1] - sigma ** 4
    return {"error": np.mean(errors, axis=0), "tail": tail, "alpha_tilde": max(alpha, 0.0),
            "singular_values": sigma, "bound": 4 * C.dot(Y).max() * tail + 4 * max(alpha, 0.0)}


def ties(P, labels, bags, t, seed=0):
    """Where more than t singular values are 1 any t of their directions are optimal: the probe's error with
    the best and with the worst choice, and with that of networks trained on bags of tokens."""
    C, (U, sigma, _) = P.sum(1), np.linalg.svd(normalised(P), full_matrices=False)
    U = U[:, sigma > 1 - 1e-9]
    told = np.linalg.qr(np.sqrt(C)[:, None] * (labels[:, None] == np.unique(labels)))[0]   # the class itself
    silent = U @ np.linalg.svd(told.T @ U)[2][told.shape[1]:].T                            # no word of it
    networks = [probe_error(np.linalg.qr(np.sqrt(C)[:, None] * f)[0], C, labels)[-1]
                for f in trained_on_bags(P, bags, t, seed=seed)]
    best, worst = (probe_error(np.hstack(x), C, labels)[t - 1] for x in ((told, silent), (silent, told)))
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
    optimiser = torch.optim.Adam(weights, lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.02, steps)
    for _ in range(steps):
        f = (x @ weights[0]).relu() @ weights[1]
        scores = f @ weights[2]                                                # (networks, n, m)
        loss = -2 * (P * scores).sum() + (C[:, None] * scores.square() * G).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return f.detach().numpy()


def theorem41(r, s, T, rho, rotations=30, seed=0):
    """Probe error and bound for every t: the class from autoregressive and masked features, and the length of
    the context from autoregressive and variable-length ones; and what the ties among autoregressive ones
    leave open.

    Returns {"probes": {objective_label: what `probe_errors` returns}, "tie": what `ties` returns,
    "reversed_at": the t at which the masked tail is the larger one, ..}. BadInput: as for theorem42.
    """
    n, probes = hidden_of(rho, s), {}
    for name, objective in (("ar", from_options("ar")), ("mlm", from_options("mlm", mask=n / s)),
                            ("vl", from_options("vl", mask=(1 / s, 1 - 1 / s)))):
        P, classes, bags = cooccurrence(objective, token_sets(r, s, T))
        if name != "vl":
            probes[f"{name}_class"] = probe_errors(P, classes, rotations, seed)
        if name != "mlm":
            probes[f"{name}_length"] = probe_errors(P, bags.sum(1), rotations, seed)
        if name == "ar":
            tie = ties(P, classes, bags, r, seed)
        if name == "mlm":
            P_T = P / P.sum(0) @ P.T / np.sqrt(np.outer(P.sum(1), P.sum(1)))
            squares = np.linalg.eigvalsh(P_T)[::-1][:len(probes["mlm_class"]["singular_values"])]
    one, two = probes["ar_class"], probes["mlm_class"]
    padded = np.append(one["tail"], np.zeros(len(two["tail"])))[:len(two["tail"])]
    return {"probes": probes, "tie": {**tie, "random": one["error"][min(r, len(one["error"])) - 1]},
            "classes": r, "positions": s, "units": len(one["error"]),
            "reversed_at": [t for t, (a, b) in enumerate(zip(padded, two["tail"]), 1) if b > a + 1e-9],
            "eigenvalue_error": np.abs(squares - two["singular_values"] ** 2).max()}


# ---------------------------------------------------------------------------- every objective, every claim

def registered(s):
    """All registered objectives on s tokens, 16 patches for those of images, with options that fit."""
    options = {"dar": [{"t": t} for t in sorted({2, 3, 4, s - 1}) if 1 < t < s], "mtp": [{"t": 2}],
               "mlm": [{"mask": 0.5}], "vl": [{"mask": (1 / s, 1 - 1 / s)}], "blocks": [{"block": 3}],
               "spans": [{"mask": 0.5, "span": 2}]}
    rows = []
    for name in OBJECTIVES:
        for given in options.get(name, [{}]):
            objective = from_options(name, **given)
            try:
                rows.append(of_one(objective, 16 if objective.images_only else s))
            except BadInput:  # one that does not fit s tokens, or whose draws do not tell
                continue
    return rows


def of_one(objective, s, weighting="targets", samples=100_000, seed=0):
    """`support.operator.spectrum` with the names of what it is of."""
    if hasattr(objective, "mask"):
        low, high = np.broadcast_to(objective.mask, 2).tolist()
        for nearest in (1 / s, 1 - 1 / s):  # a range may end outside, not lie there
            hidden_of(min(max(nearest, low), high), s, "--mask")
    return {"objective": describe(objective), "s": s, "weighting": weighting,
            **spectrum(objective, s, weighting, samples, seed, flag(objective))}


def every_claim(seed=0, s=8):
    """Every claim of the paper that can be computed -> {"claims": rows of theory/claims.py, "checked" being
    whether the verdict stands, and what the picture shows: "spectra", "dar_tails", "table_9"}."""
    spectra, eq6, eq3 = registered(s), *(spectrum(from_options(name, t=2), s) for name in ("dar", "mtp"))
    tails = [spectrum(from_options("dar", t=t), s)["tail_sigma4_per_class"] for t in range(1, s)]
    told = []
    for name in ("dar", "mlm", "permutation"):
        objective = from_options(name)
        contexts, weight = operator.pairs(objective, *operator.listed(objective, s))
        q = operator.merge(*operator.tell_position(contexts, weight))[1]
        told.append(operator.singular_values(operator.position_matrix(q), q.sum(0) > 0).min())
    rows = [*claims.factorisation(theorem31(seed=seed)),
            *claims.toy_spectra(*(theorem42(2, 4, 2, *x) for x in ((0.5,), (0.75,), (0.5, True)))),
            *claims.every_objective(spectra, tails, eq6, eq3, min(told)),
            *claims.probes(theorem41(3, 4, 2, 0.5, seed=seed)),
            *claims.generation(theorem43(seed=seed))]
    return {"claims": rows, "spectra": spectra, "dar_tails": tails, "table_9": claims.TABLE_9}


# ---------------------------------------------------------------------------- command line

def spectrum_command(args):
    """`spectral.py spectrum --objective NAME ...`: position matrix and singular values of objectives.

    args     objective (a list), s, r, weighting, samples, seed, and the options of objectives
    Returns {"spectra": what `operator.spectrum` returns of each, with "r" and "tail_sigma4" over all
    classes}.
    BadInput: options that do not suit the objective or the length.
    """
    given, spectra = options_of(vars(args)), []
    for name, ours in share_options(OBJECTIVES, list(dict.fromkeys(args.objective)), given).items():
        x = of_one(from_options(name, **ours), args.s, args.weighting, args.samples, args.seed)
        others = x.get("singular_values_other_classes", x["singular_values"])
        every = np.sort(np.append(x["singular_values"], np.tile(others, args.r - 1)))[::-1]
        spectra.append({**x, "r": args.r, "tail_sigma4": (every[args.r:] ** 4).sum()})
    return {"spectra": spectra}


def read_command(argv):
    """The command and its options, with the function that computes and the one that shows."""
    parser = Parser(description="The theory of the paper, checked and extended to every objective.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, compute, lines, text, toy=(), picture=None):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(compute=compute, lines=lines, picture=picture)
        sub.add_argument("--json", type=output_file, metavar="FILE",
                         help="write the results as one JSON object; - for standard output")
        sub.add_argument("--seed", type=seed, default=0, help="of every random choice")
        for option, size, of in zip("rsT", toy, ("classes", "positions", "values per class and position")):
            sub.add_argument(f"--{option}", type=positive, default=size, help=f"toy model: {of}")
        if toy:
            sub.add_argument("--rho", type=float, default=0.5, help="mask ratio")
        if picture:
            sub.add_argument("--plot", type=output_file, metavar="FILE.png", help="a picture of the results")
        return sub

    command("all", lambda a: every_claim(a.seed), show.show_claims, "every claim: printed, computed, verdict",
            picture=pictures.plot_spectra)
    command("theorem3.1", lambda a: theorem31(seed=a.seed), show.show31, "spectral loss = matrix "
                                                                         "factorisation")
    command("theorem4.1", lambda a: theorem41(a.r, a.s, a.T, a.rho, seed=a.seed), show.show41,
            "probe error and its bound on the toy model", (3, 4, 2), pictures.plot41)
    sub = command("theorem4.2", lambda a: theorem42(a.r, a.s, a.T, a.rho, a.literal_tokens), show.show42,
                  "singular values on the enumerated toy model", (2, 4, 2))
    sub.add_argument("--literal-tokens", action="store_true", help="the token sets as Sec. 4.1.2 prints them")
    sub = command("theorem4.3", lambda a: theorem43(a.r, a.s, a.T, a.rho, a.steps, seed=a.seed), show.show43,
                  "generation bounds, and linear attention on the toy model", (2, 6, 2), pictures.plot43)
    sub.add_argument("--steps", type=positive, default=1000, help="training steps")
    sub = command("spectrum", spectrum_command, show.show_spectrum, "position matrix and singular values",
                  picture=pictures.plot_spectra)
    sub.add_argument("--objective", choices=OBJECTIVES, nargs="+", required=True, help="one or more")
    sub.add_argument("--s", type=positive, default=8, help="positions")
    sub.add_argument("--r", type=positive, default=1, help="classes, for the tail sum over all of them")
    sub.add_argument("--weighting", choices=operator.WEIGHTINGS, default="targets",
                     help="what weighs the same")
    sub.add_argument("--samples", type=positive, default=100_000,
                     help="draws of f where not all can be listed")
    add_options(sub)
    sub = command("toy", run_toy, show_toy, "networks on toy models, noisy and not", picture=plot_toy)
    add_toy_arguments(sub)
    sub = command("trained", trained, show_trained, "empirical spectrum of checkpoints of train.py")
    add_trained_arguments(sub)
    return parser.parse_args(argv)


def main(argv=None):
    """The command line, of `argv` or sys.argv -> 0. Prints what a command found, or with --json the object
    {"command", "settings", what was found}; with --plot draws it. BadInput: a wrong use, a toy model that is
    too large to enumerate.
    """
    args, threads = read_command(argv), torch.get_num_threads()
    plot = getattr(args, "plot", None)
    if plot:
        import_optional("matplotlib.figure")  # complain before the work, not after it
        if not plot.lower().endswith((".png", ".pdf", ".svg")):
            raise BadInput(f"--plot {plot} is no picture: end its name in .png, .pdf or .svg")
    try:
        if args.command != "trained":
            torch.set_num_threads(1)                                           # the matrices are small
        with told(args.command):
            results = args.compute(args)
    finally:
        torch.set_num_threads(threads)
    if args.json != "-":
        print("\n".join(args.lines(results)))
    if plot:
        args.picture(results, plot)
    if args.json:
        settings = {name: value for name, value in vars(args).items()
                    if name not in ("command", "json", "compute", "lines", "picture")}
        command = f"spectral.py {args.command}"
        write_json(args.json, {"command": command, "settings": plain(settings), **plain(results)})
    return int(not all(x["checked"] for x in results.get("claims", [])))


if __name__ == "__main__":
    command_line(main)
