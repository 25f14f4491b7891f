"""The theory of the paper as code: what it prints, what holds, and the spectrum of any objective from its group index.

    python spectral.py all                                        every claim on one page
    python spectral.py spectrum --objective dar --t 2 --s 8       singular values of one objective
    python spectral.py theorem4.2 --r 2 --s 4 --T 2 --rho 0.5     a theorem (3.1, 4.1, 4.2, 4.3) with its corrections
    python spectral.py trained CKPT [CKPT ...]                    the same operator as trained networks see it

Set-up (Sec. 3.2). An objective pairs a context X with a target X+; P_M is their joint distribution, P_C and P_G its
marginals, Abar = P_M / sqrt(P_C P_G), sigma_j the j-th singular value of Abar. The toy model D_sim (Sec. 4.1.2) has
r classes, s positions and T values for each class and position; given the class, tokens are independent and uniform.
"""

import itertools
import math

import numpy as np
import torch

from downstream.connectivity import features_of
from downstream.hub import load_run
from engine.machine import choose_device
from objectives import OBJECTIVES, add_options, describe, flag, from_options, spectral_loss
from support.cli import BadInput, Parser, command_line, import_optional, output_file, positive, seed, write_json

TABLE_9 = {1: (56.2, 82.5), 2: (59.4, 82.9), 3: (59.6, 82.7), 4: (58.8, 82.5)}  # dar's t: linear probe, fine-tuning


WEIGHTINGS = ("targets", "sequences", "contexts")


LIMIT = 20_000   # contexts of the enumerated toy model: some seconds


# ---------------------------------------------------------------------------- an objective as pairs (context, target)

def pairs(groups, probability, weighting="targets"):
    """Every pair (context positions S, target position p) that draws of f produce: f(p) > 1, S = {j : 0 < f(j) < f(p)}.

    The targets of one group share their context, so there is one row for each draw and group > 1.
    groups (K, s), probability (K,) -> contexts bool (N, s), weight (N, s) over the targets. What weighs the same?
        targets    every pair of every draw: Eq. 6, and Eq. 5 as a sum over targets; training's mean over a batch
        sequences  every draw of f: each ratio of Eq. 5 counts alike, however many tokens it hides
        contexts   every (draw, context), whose targets share its weight: Eq. 3 for dar
    """
    contexts, weight = [], []
    predicted = (groups > 1).sum(1)
    for step in range(2, groups.max() + 1):
        rows = (groups == step).any(1)
        f = groups[rows]
        target = f == step
        share = {"targets": 1, "sequences": 1 / predicted[rows], "contexts": 1 / target.sum(1)}[weighting]
        contexts.append((f > 0) & (f < step))
        weight.append(target * (probability[rows] * share)[:, None])
    return np.concatenate(contexts), np.concatenate(weight)


def merge(contexts, weight):
    """Rows with the same context become one -> contexts (n, s), q (n, s), the row each came to (N,), how many (n,)."""
    _, first, which, seen = np.unique(np.packbits(contexts, axis=1), axis=0, return_index=True, return_inverse=True,
                                      return_counts=True)
    which, q = which.reshape(-1), np.zeros((len(first), weight.shape[1]))
    np.add.at(q, which, weight)
    return contexts[first], q, which, seen


def tell_position(contexts, weight):
    """The same pairs when the queried position belongs to the context, as in a network told where it predicts."""
    rows, p = weight.nonzero()
    one_hot = np.eye(weight.shape[1])[p]
    return np.hstack([contexts[rows], one_hot > 0]), one_hot * weight[rows, p][:, None]


def listed(objective, s, empty_context=False):
    """All f (K, s) and their probabilities (K,), or None where they are too many. `empty_context` predicts the first
    group too, from nothing: that is f + 1."""
    outcomes = objective.outcomes(s, min(200_000, 20_000_000 // s))
    if outcomes is not None:
        groups, probability = (x.numpy() for x in outcomes)
        return (np.where(groups > 0, groups + 1, 0) if empty_context else groups), probability


# ---------------------------------------------------------------------------- the s x s position matrix

def position_matrix(q, rows=slice(None)):
    """M_pp' = sum_S q(S,p) q(S,p') / (q_C(S) sqrt(q_G(p) q_G(p'))) over the given rows S of q (n, s).

    On D_sim the entry of Abar for context (S, x_S) and target (p, x_p) is, within a class,
        q(S,p) / sqrt(q_C(S) q_G(p)) * T^(-|S|/2) * T^(-1/2)
    and 0 between classes. It is constant on the block of each (S, p), so the non-zero singular values are those of the
    matrix q / sqrt(q_C q_G), whose Gram matrix is M: one copy per class, whatever T and the prior of the classes.
    The empty context alone is shared by the classes: one copy of M has its term and r - 1 copies do not.
    """
    G = q.sum(0)
    Q = q[rows] / np.sqrt(q[rows].sum(1, keepdims=True) * np.where(G > 0, G, 1))
    return Q.T @ Q


def singular_values(M, positions):
    """sqrt(eig(M)), descending; positions that are never a target have no column in Abar and none here."""
    return np.sqrt(np.linalg.eigvalsh(M[np.ix_(positions, positions)])[::-1].clip(0))


def sample_matrix(objective, s, weighting, samples, generator):
    """Monte Carlo estimates of M before its division by sqrt(q_G q_G') and of q_G, or None where samples cannot tell.

    q(S,p) q(S,p') needs two independent looks at the context S. Where f <= 2 a single draw shows all targets of its
    context and the product is exact. Otherwise each draw's product with itself is left out (a U-statistic), for which
    contexts have to come up at least twice.
    """
    groups = objective.groups(samples, s, generator).numpy()
    contexts, weight = pairs(groups, np.full(samples, 1 / samples), weighting)
    _, q, which, seen = merge(contexts, weight)
    C = q.sum(1)
    if groups.max() <= 2:
        return q.T @ (q / C[:, None]), q.sum(0)
    if C[seen == 1].sum() > 0.001 * C.sum():
        return None
    a = np.where(seen > 1, seen / np.maximum(seen - 1, 1), 0) / C
    return q.T @ (a[:, None] * q) - weight.T @ (a[which][:, None] * weight), q.sum(0)


def monte_carlo(objective, s, weighting, samples, seed, batches=20):
    """M, its singular values and their tail from draws of f, with standard errors; None where samples cannot tell.

    Eigenvectors come from one half of the draws and eigenvalues from the other: with both from the same draws, noise
    would drive equal eigenvalues apart. One pair is known, M sqrt(q_G) = sqrt(q_G), and is set aside first.
    """
    generator, half = torch.Generator().manual_seed(seed), batches // 2
    estimates = [sample_matrix(objective, s, weighting, samples // batches, generator) for _ in range(batches)]
    if None in estimates:
        return None
    M, G = (np.array(x) for x in zip(*estimates))                              # (batches, s, s), (batches, s)
    M, G = M / G.sum(1)[:, None, None], (G / G.sum(1, keepdims=True)).mean(0)
    root = np.sqrt(G)
    M = M / np.outer(root, root).clip(1e-300)                                  # positions without mass stay 0
    others = np.linalg.svd(root[None])[2][1:]                                  # a basis orthogonal to sqrt(q_G)
    v = others.T @ np.linalg.eigh(others @ M[:half].mean(0) @ others.T)[1][:, ::-1][:, :(G > 0).sum() - 1]
    values = np.einsum("pj,bpq,qj->bj", v, M[half:], v)                        # v_j^T M v_j in each batch
    mean, stderr = values.mean(0), values.std(0, ddof=1) / math.sqrt(half)
    stderr = np.maximum(stderr, np.sqrt((stderr ** 2).mean()))                 # sorting picks extremes: no small ones
    first = (2 * values @ mean).std(ddof=1) / math.sqrt(half)                  # of sum_j lambda_j^2; then second order
    order = mean.argsort()[::-1]
    sigma = np.sqrt(mean.clip(0))[order]
    return {"method": f"monte carlo, {samples} draws", "M": M.mean(0), "singular_values": np.append(1, sigma),
            "singular_values_stderr": np.append(0, stderr[order] / (2 * sigma).clip(1e-12)),  # dx / 2 sqrt(x)
            "tail_sigma4_per_class": (mean ** 2).sum(), "tail_sigma4_stderr": math.hypot(first, (stderr ** 2).sum())}


def spectrum(objective, s, weighting="targets", samples=100_000, seed=0):
    """What the theory says about one objective on sequences of s tokens -> dict. Raises BadInput.

    Exact where all f can be listed, Monte Carlo elsewhere, the closed form alone where samples cannot tell either.
    `tail_sigma4_per_class` is the sum over j > 1 within a class: a share 1/r of the sum over j > r.
    """
    objective.check(s)
    if flag(objective) in ("mlm", "vl"):
        low, high = np.broadcast_to(objective.mask, 2).tolist()
        for nearest in (1 / s, 1 - 1 / s):                                     # a range may end outside, not lie there
            hidden_of(min(max(nearest, low), high), s, "--mask")
    text, values, tail = closed_form(objective, s, weighting)
    outcomes = listed(objective, s)
    if outcomes is not None:
        contexts, q, _, _ = merge(*pairs(*outcomes, weighting))
        M, targets = position_matrix(q), q.sum(0) > 0
        sigma = singular_values(M, targets)
        result = {"method": "exact", "M": M, "singular_values": sigma, "tail_sigma4_per_class": (sigma[1:] ** 4).sum()}
        if not contexts.any(1).all():
            result["singular_values_other_classes"] = singular_values(position_matrix(q, contexts.any(1)), targets)
    else:
        if samples < 1000:
            raise BadInput(f"--samples {samples} are too few for error bars; use at least 1000")
        result = monte_carlo(objective, s, weighting, samples, seed)
        if result is None and values is None:
            raise BadInput(f"{samples} draws of {describe(objective)} at --s {s} meet too many contexts only once to "
                           "know their targets; use a smaller --s or more --samples")
        result = result or {"method": "closed form", "singular_values": values, "tail_sigma4_per_class": tail}
    return {"objective": describe(objective), "s": s, "weighting": weighting, **result,
            "closed_form": values, "closed_form_tail": tail, "closed_form_text": text}


def hidden_of(rho, s, name="--rho"):
    """round(rho s), when it leaves at least one visible and one hidden token of s. The samplers of training would bend
    any other ratio until it does, which is the theory of another ratio."""
    if s < 2:
        raise BadInput(f"--s {s} leaves nothing to predict; use --s 2 or more")
    hidden = round(rho * s) if math.isfinite(rho) else -1
    if not 1 <= hidden <= s - 1:
        raise BadInput(f"{name} {rho:g} of {s} tokens does not leave at least one hidden and one visible; use a ratio "
                       f"from {1 / s:.3g} to {1 - 1 / s:.3g}, or a larger --s")
    return hidden


# ---------------------------------------------------------------------------- closed forms

def exchangeable(s, inverse):
    """Values per class when all pairs (S, p) of one size weigh the same, `inverse` = E[1/n] over pairs, n = s - |S|.

    q = q_C(S) / n and q_G = 1/s give M_pp = E[1/n], M_pp' = E[(n-1)/n] / (s-1): eigenvalues 1 and, s - 1 times,
    M_pp - M_pp' = (s E[1/n] - 1) / (s - 1). With one n this is Theorem 4.2's (s - n) / (n (s - 1)).
    """
    return np.append(1, np.full(s - 1, math.sqrt((s * inverse - 1) / (s - 1))))


def dar_tail(s, t):
    """Tail sum of sigma^4 for dar under Eq. 6, s >= 2t - 1: (6(2t^2+1) s - 13t^3 - 6t^2 - 8t - 9) / (18 t^3).

    sigma^4 sums to ||M||_F^2. Far from both ends M_pp' = (t - |p - p'|) / t^2, whose squares give the slope in s; the
    ends give the constant. t = 2: (6s - 17)/16, t = 3: (19s - 73)/81, t = 4: (66s - 323)/384.
    """
    return (6 * (2 * t * t + 1) * s - 13 * t ** 3 - 6 * t * t - 8 * t - 9) / (18 * t ** 3)


def closed_form(objective, s, weighting="targets"):
    """-> what it is, singular values per class, tail sum over j > 1; None for each that has no known closed form."""
    name, t, text, values = flag(objective), getattr(objective, "t", None), None, None
    if name in ("ar", "prefix") or t == 1:
        text, values = "1, s-1 times: each context has one target", np.ones(s - 1)
    elif name in ("mlm", "vl"):
        counts = objective.hidden_counts(s)                                    # {n: probability}
        mean, inverse = (sum(p * g(n) for n, p in counts.items()) for g in (float, lambda n: 1 / n))
        text = "1, then sqrt((s E[1/n] - 1)/(s-1)), n hidden; E[1/n] is 1/mean n if targets weigh the same"
        values = exchangeable(s, 1 / mean if weighting == "targets" else inverse)
    elif name == "permutation":
        text = "1, then sqrt((H s/(s-1) - 1)/(s-1)), H = 1 + 1/2 + .. + 1/(s-1)"
        values = exchangeable(s, (1 / np.arange(1, s)).sum() / (s - 1))
    elif isinstance(t, tuple):
        pass
    elif name == "dar" and weighting == "targets" and t == 2:
        text, values = "cos(pi j/(2s-3)), j = 0..s-2", np.cos(np.pi * np.arange(s - 1) / (2 * s - 3))
    elif name == "dar" and weighting == "targets" and t == s - 1:
        text, values = "1/(j+1), j = 0..s-2", 1 / np.arange(1, s)
    elif name == "dar" and weighting == "targets" and s >= 2 * t - 1:
        return "tail (6(2t^2+1)s - 13t^3 - 6t^2 - 8t - 9)/(18t^3)", None, dar_tail(s, t)
    return text, values, None if values is None else float((values[1:] ** 4).sum())


# ---------------------------------------------------------------------------- the toy model, token by token

def token_sets(r, s, T, literal=False):
    """The T tokens of each class and position, ids (r, s, T).

    Sec. 4.1.2 prints kTr + y, kTr + 2y, ..., kTr + Ty (`literal`), which lets classes share tokens once r, T >= 2. The
    theorem needs disjoint sets: kTr + (y - 1)T + {1..T}.
    """
    y, k, j = np.ogrid[1:r + 1, 1:s + 1, 1:T + 1]
    return k * T * r + (y * j if literal else (y - 1) * T + j)


def cooccurrence(outcomes, tokens):
    """P_M of D_sim by enumeration, for `outcomes` of f and tokens (r, s, T). No position matrix is used.

    -> P_M (contexts, targets), the class of each context, its length. Rows and columns without mass do not arise.
    """
    r, s, T = tokens.shape
    contexts, q, _, _ = merge(*pairs(*outcomes)) if outcomes is not None else (np.empty((0, s)), None, None, None)
    count = sum(r * T ** int(n) for n in contexts.sum(1))
    if not 0 < count <= LIMIT:
        raise BadInput(f"r = {r}, s = {s}, T = {T} give {count or 'too many'} contexts and the limit is {LIMIT}; "
                       "use a smaller --r, --s or --T, or the command spectrum, which needs no enumeration")
    row, column, classes, entries = {}, {}, {}, []
    for S, weight in zip(contexts, q / q.sum()):
        for y in range(r):
            share = 1 / (r * T ** (int(S.sum()) + 1))                          # P(y) P(x_S | y) P(x_p | y)
            targets = [(x, weight[p] * share) for p in weight.nonzero()[0] for x in tokens[y, p].tolist()]
            for x_S in itertools.product(*tokens[y, S].tolist()):
                i = row.setdefault(x_S, len(row))
                classes.setdefault(i, y)
                entries += [(i, column.setdefault(x, len(column)), mass) for x, mass in targets]
    P = np.zeros((len(row), len(column)))
    i, j, mass = zip(*entries)
    np.add.at(P, (i, j), mass)
    return P, np.array([classes[i] for i in range(len(P))]), np.array([len(x_S) for x_S in row])


def normalised(P):
    """Abar = P_M / sqrt(P_C P_G)."""
    return P / np.sqrt(P.sum(1, keepdims=True) * P.sum(0))


# ---------------------------------------------------------------------------- Theorem 3.1

def theorem31(n=8, m=7, t=3, trials=30, steps=1500, seed=0):
    """The spectral loss as matrix factorisation, on random P_M (n contexts, m targets), features and heads of rank t.

        ||Abar - F W'^T||_F^2 = -2 E [W f(X)]_X+ + E ([W f(X)]_X-)^2 + ||Abar||_F^2
        F_X = sqrt(P_C(X)) f(X),  W'_X+ = sqrt(P_G(X+)) W_X+
    since the cross term of the square is 2 Abar_XX+ F_X W'_X+ = 2 P_M(X, X+) [W f(X)]_X+. Eq. 1 prints it once.
    """
    rng, errors = np.random.default_rng(seed), []
    for _ in range(trials):
        counts = rng.integers(1, 10, (n, m)) ** 2
        P = torch.tensor(counts / counts.sum())
        A, C, G = normalised(P.numpy()), P.sum(1), P.sum(0)
        X, target = (torch.tensor(np.repeat(i, counts.ravel())) for i in counts.nonzero())  # each pair, often enough
        f, W = torch.tensor(rng.normal(size=(n, t))), torch.tensor(rng.normal(size=(m, t)))
        scores = (f @ W.T)[X]
        corrected = spectral_loss(scores, target, G).item()
        printed = corrected + scores.gather(1, target[:, None]).mean().item()               # Eq. 1: coefficient 1
        FW, norm = (C.sqrt()[:, None] * f @ W.T * G.sqrt()).numpy(), (A ** 2).sum()
        whole, half = ((A - FW) ** 2).sum() - norm, ((A / 2 - FW) ** 2).sum() - norm / 4
        errors.append(np.abs([whole - corrected, whole - printed, half - printed]))
    # Gradient descent on the last P_M. Its steps are taken in F and W', where the problem is well conditioned.
    F, W = (torch.tensor(rng.normal(size=(size, t)) * 0.1, requires_grad=True) for size in (n, m))
    for _ in range(steps):
        loss = spectral_loss(((F / C.sqrt()[:, None]) @ (W / G.sqrt()[:, None]).T)[X], target, G)
        gradients = torch.autograd.grad(loss, (F, W))
        with torch.no_grad():
            for x, gradient in zip((F, W), gradients):
                x -= 0.2 * gradient
    U, sigma, V = np.linalg.svd(A, full_matrices=False)
    truncated = (U[:, :t] * sigma[:t]) @ V[:t]
    identity, as_printed, half_scale = np.max(errors, axis=0)
    return {"identity_error": identity, "printed_error": as_printed, "half_scale_error": half_scale, "rank": t,
            "constant": norm, "sum_sigma2": (sigma ** 2).sum(), "singular_values": sigma,
            "descent_error": np.abs((F @ W.T).detach().numpy() - truncated).max(), "descent_loss": loss.item(),
            "best_loss": -(sigma[:t] ** 2).sum()}


def show31(x):
    rows = [("-2 E[W f]_X+ + E[..]^2 = ||Abar - F W'^T||^2 - ||Abar||^2    objectives.spectral_loss", "identity_error"),
            ("-1 E[W f]_X+ + E[..]^2 = ||Abar - F W'^T||^2 - ||Abar||^2    as printed, Eq. 1", "printed_error"),
            ("-1 E[W f]_X+ + E[..]^2 = ||Abar/2 - F W'^T||^2 - ||Abar||^2/4 half the scale", "half_scale_error"),
            (f"gradient descent with rank {x['rank']}: entries of F W'^T - truncated SVD of Abar", "descent_error")]
    values = [("||Abar||_F^2, minus the constant of the theorem", "constant"), ("sum of sigma_j^2", "sum_sigma2"),
              ("gradient descent: last loss", "descent_loss"), ("minus the sum of the first sigma_j^2", "best_loss")]
    return table([("largest error over random P_M, f and W", ""), *((text, f"{x[key]:.1e}") for text, key in rows),
                  ("", ""), *((text, f"{x[key]:.6f}") for text, key in values)])


# ---------------------------------------------------------------------------- Theorem 4.2

def theorem42(r, s, T, rho, literal=False):
    """Singular values of Abar on the enumerated toy model, autoregressive and masked, beside the printed statement.

    Autoregressive: each position p = 2..s is a rank-one block of its own per class: r(s-1) ones. A context of length 0
    adds one block that all classes share: r(s-1) + 1. The statement has rs, which neither gives for r >= 2.
    """
    n, ar, tokens = hidden_of(rho, s), from_options("ar"), token_sets(r, s, T, literal)
    cases = {"autoregressive": listed(ar, s), "autoregressive_empty_context": listed(ar, s, True),
             "masked": listed(from_options("mlm", mask=n / s), s)}
    if s <= 12:                                                                # the m of Sec. 3.1: each token by a coin
        f = 1 + np.indices((2,) * s).reshape(s, -1).T[1:-1]                    # neither all visible nor all hidden
        cases["masked_by_coin_flips"] = f, rho ** (f > 1).sum(1) * (1 - rho) ** (f == 1).sum(1)
    A = {name: normalised(cooccurrence(f, tokens)[0]) for name, f in cases.items()}
    result = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in A.items()}
    one, two = (np.append(result[name], np.zeros(r * s))[:r * s] for name in ("autoregressive", "masked"))
    value = math.sqrt((s - n) / (n * (s - 1)))
    zeros = math.comb(s - 1, s - n)                                            # C_{s-1}^{s_m} of A.3
    printed = {"autoregressive": [1.0] * (r * s), "masked": [1.0] * r + [value] * (r * (s - 1)), "zeros_in_row": zeros,
               "masked_entry": math.sqrt(s * T * math.comb(s, n) * T ** (s - n)) / zeros}
    return {**result, "unit_values": {name: int((sigma > 1 - 1e-9).sum()) for name, sigma in result.items()},
            "not_larger_at": [j + 1 for j in range(r, r * s) if one[j] < two[j] + 1e-9], "printed": printed,
            "masked_entry": A["masked"].max(), "zeros_in_row": int((A["masked"][0] == 0).sum()),
            "classes": r, "hidden": n, "literal_tokens": literal}


def show42(x):
    r, last = x["classes"], len(x["printed"]["masked"])
    rows = [(name.replace("_", " "), multiplicities(x["printed"][name.split("_")[0]]), multiplicities(x[name]))
            for name in x["unit_values"]]
    fails = f"fails at j = {', '.join(map(str, x['not_larger_at']))}" if x["not_larger_at"] else "holds"
    fails += " (one hidden token, which the theorem excludes)" if x["hidden"] == 1 else ""
    rows += [("entries of masked Abar (A.3)", f"{x['printed']['masked_entry']:.6f}", f"{x['masked_entry']:.6f}"),
             ("zeros in a row of it (A.3)", f"{x['printed']['zeros_in_row']}", f"{x['zeros_in_row']}")]
    lines = [*table([("singular values", "printed", "computed"), *rows], "<"), "",
             f"sigma_j (autoregressive) > sigma_j (masked), printed for {r} < j <= {last}: {fails}"]
    if x["literal_tokens"]:
        lines.append(f"printed token sets, which classes share: {x['unit_values']['masked']} unit values of masked, "
                     f"where {r} separate classes have {r}")
    return lines


# ---------------------------------------------------------------------------- Theorem 4.1

def probe_errors(P, labels, rotations=30, seed=0):
    """Error of the least-squares probe on the best rank-t features, and its bound, for t = 1 .. rank, under P (n, m).

    The best features are U_t up to an invertible matrix (Eckart-Young), so the probe's scores are the projections on
    U_t of v_c = sqrt(P_C) 1[y = c]; a tie is a guess. Equal sigma_j leave U_t free: a mean over random rotations.

    Bound: the part of v_c outside U_t is at most ||(I - AA^T) v_c|| plus the part of AA^T v_c outside U_t. Squared and
    summed over c these are at most alpha~ and max_c P(c) sum_{j>t} sigma_j^4, the v_c being orthogonal of length
    sqrt(P(c)). A wrong argmax costs a squared error of 1/2, and (a + b)^2 <= 2a^2 + 2b^2, hence
        error <= 4 max_c P(c) sum_{j>t} sigma_j^4 + 4 alpha~
    with alpha~ <= 2 alpha the probability that two contexts drawn through one target differ in label.
    """
    rng, C = np.random.default_rng(seed), P.sum(1)
    U, sigma, _ = np.linalg.svd(normalised(P), full_matrices=False)
    rank = int((sigma > 1e-9).sum())
    U, sigma = U[:, :rank], sigma[:rank]
    Y = (labels[:, None] == np.unique(labels)).astype(float)
    v = np.sqrt(C)[:, None] * Y
    equal = np.split(np.arange(rank), np.nonzero(-np.diff(sigma) > 1e-9)[0] + 1)
    error = np.zeros(rank)
    for _ in range(rotations):
        R = np.hstack([U[:, j] @ np.linalg.qr(rng.normal(size=(len(j), len(j))))[0] for j in equal])
        scores = np.zeros_like(v)
        for t in range(rank):
            scores += np.outer(R[:, t], R[:, t] @ v)
            best = scores / np.sqrt(C)[:, None]
            best = best > best.max(1, keepdims=True) - 1e-9
            error[t] += (C * (1 - (best * Y).sum(1) / best.sum(1))).sum() / rotations
    alpha = 1 - ((P.T @ Y) ** 2 / P.sum(0)[:, None]).sum()                     # P_T(X, X') = sum over X+ of P P / P_G
    tail = (sigma ** 4)[::-1].cumsum()[::-1] - sigma ** 4
    return {"error": error, "tail": tail, "alpha_tilde": max(alpha, 0.0), "singular_values": sigma,
            "bound": 4 * C.dot(Y).max() * tail + 4 * max(alpha, 0.0)}


def theorem41(r, s, T, rho, rotations=30, seed=0):
    """Probe error and bound for every t: the class from autoregressive and masked features, and the length of the
    context from autoregressive and variable-length ones."""
    n, result = hidden_of(rho, s), {}
    for name, objective in (("ar", from_options("ar")), ("mlm", from_options("mlm", mask=n / s)),
                            ("vl", from_options("vl", mask=(1 / s, 1 - 1 / s)))):
        P, classes, lengths = cooccurrence(listed(objective, s), token_sets(r, s, T))
        if name != "vl":
            result[f"{name}_class"] = probe_errors(P, classes, rotations, seed)
        if name != "mlm":
            result[f"{name}_length"] = probe_errors(P, lengths, rotations, seed)
    return result


def show41(x):
    rows = [("t", *(cell for name in x for cell in (name, "tail", "bound")))]
    for t in range(max(len(y["error"]) for y in x.values())):
        cells = ((y[key][t] if t < len(y["error"]) else None) for y in x.values() for key in ("error", "tail", "bound"))
        rows.append((str(t + 1), *("" if cell is None else f"{cell:.6f}" for cell in cells)))
    return ["Least-squares probe on the best rank-t features: error, tail sum of sigma_j^4 over j > t, and bound",
            "4 max P(c) tail + 4 alpha~. sigma_j is the j-th singular value. Where sigma_j are equal the best features",
            "are not unique, and the error is a mean over random rotations.", "",
            *table(rows), "", "alpha~: " + ", ".join(f"{name} {y['alpha_tilde']:.6f}" for name, y in x.items())]


# ---------------------------------------------------------------------------- Theorem 4.3

class LinearAttention:
    """f(X) = sum_u sum_v (x_u W^Q)(x_v W^K)^T x_v W^V over visible one-hot tokens (Sec. 4.2), and scores W f(X).

    Pooled over u, Q K^T V is a double sum: over two positions, not the three of A.4, so n tokens give n^2 terms.
    """

    def __init__(self, Q, K, V, W):
        self.Q, self.K, self.V, self.W = Q, K, V, W                            # (vocab, d) each

    def scores(self, tokens, visible):
        """tokens (B, s), visible bool (B, s) -> W f(X) (B, vocab)."""
        q = (self.Q[tokens] * visible[..., None]).sum(1)                       # (B, d)
        k = self.K[tokens] * visible[..., None]                                # (B, s, d)
        return torch.einsum("bd,bsd,bse->be", q, k, self.V[tokens]) @ self.W.T

    def eta(self, tokens, power):
        """Largest distance of two terms of one sequence: (q_a . k_b) v_b for power 2, (q_a . k_b) v_c for power 3."""
        a = self.Q[tokens] @ self.K[tokens].mT                                 # (B, s, s)
        v = self.V[tokens][:, None]                                            # (B, 1, s, d)
        terms = a[..., None] * v if power == 2 else a[..., None, None] * v[:, None]
        return max(torch.cdist(g, g).max().item() for g in terms.flatten(1, -2))


def printed_bound(s_m, delta, norm, eta):
    """Theorem 4.3 as printed: the term of each k = 2 .. s_m + 1, whose mean is the bound.

    At k = 1 it divides by zero, which is left out here. It rests on ||W f|| = 1 at two lengths at once (Eq. 10, 12, 20,
    21), a triangle inequality without its factor 2 (Eq. 11) and ||eps||^2 <= w eta for (w eta)^2 (Eq. 16, 18).
    """
    k = np.arange(2, s_m + 2)
    w = s_m ** 3 - (k - 1) ** 3
    return (w ** 2 / (k - 1) ** 6 + w * norm ** 2 * eta) / 2 + delta + 1


def corrected_bound(s_m, delta, B, norm, eta, prefix_norms, q=2):
    """What does hold, term by term: delta + E[(1 + 2B) D_k + D_k^2], k = 2 .. s_m + 1. prefix_norms (s_m, samples).

    s_m visible tokens give s_m^q terms and the prefix (k-1)^q of them. Each missing one is within eta of each present
    one, so f(X_m) = s_m^q / (k-1)^q f(X_<k) + eps with ||eps|| <= w_k eta, w_k = s_m^q - (k-1)^q, and no score moves by
    more than D_k = w_k / (k-1)^q ||W f(X_<k)|| + w_k ||W|| eta. delta bounds -a + b^2 for scores a, b of X_m, |b| <= B.
    """
    k = np.arange(2, s_m + 2)[:, None]
    w = s_m ** q - (k - 1) ** q
    D = w / (k - 1) ** q * prefix_norms + w * norm * eta
    return delta + ((1 + 2 * B) * D + D ** 2).mean(1)


def measure(model, tokens, s_m):
    """Loss (coefficient 1) on prefixes of each length 1..s-1, and both bounds for training with s_m visible tokens.

    delta and B are maxima over all sequences, all masks with s_m visible and all tokens. P_G is uniform on D_sim.
    """
    N, s = tokens.shape
    prefixes = torch.ones(s, s).tril(-1)[1:] > 0                               # (s - 1, s): 1 .. s-1 tokens visible
    scores = torch.stack([model.scores(tokens, visible.expand(N, -1)) for visible in prefixes])     # (s - 1, N, vocab)
    loss = [(y.square().mean(1) - y.gather(1, tokens[:, k:k + 1])[:, 0]).mean().item() for k, y in enumerate(scores, 1)]
    delta, B = -math.inf, 0.0
    for visible in itertools.combinations(range(s), s_m):
        mask = torch.tensor([i in visible for i in range(s)])
        y = model.scores(tokens, mask.expand(N, -1))
        worst = y.square().max(1).values - y.gather(1, tokens[:, ~mask]).min(1).values
        delta, B = max(delta, worst.max().item()), max(B, y.abs().max().item())
    norm = torch.linalg.matrix_norm(model.W, 2).item()
    return {"loss": np.array(loss), "printed": printed_bound(s_m, delta, norm, model.eta(tokens, 3)),
            "corrected": corrected_bound(s_m, delta, B, norm, model.eta(tokens, 2), scores.norm(dim=2).numpy()[:s_m])}


def counterexample(c=60.0):
    """A model that breaks the printed bound: one class, three tokens, two of them visible, f = 0 on every pair.

    So delta = 0, while f = c on the first token alone: the loss grows as c^2 and the printed bound as c.
    """
    weights = torch.tensor([[c, -c, -c], [1, 1, 1], [1, 1, -1], [0, 0, 1]], dtype=torch.float64)[..., None]
    return {name: value.mean() for name, value in measure(LinearAttention(*weights), torch.arange(3)[None], 2).items()}


def train_attention(objective, tokens, vocab, d, steps, batch=128, lr=0.02, seed=0):
    """Adam on objectives.spectral_loss, with groups drawn by the objective. The head is halved at the end, which
    minimises Eq. 1 as printed: L_1(f, W/2) = L_2(f, W) / 4."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(vocab, d, generator=generator, dtype=torch.float64).mul_(d ** -0.5).requires_grad_()
               for _ in range(4)]
    marginal = torch.full((vocab,), 1 / vocab, dtype=torch.float64)
    optimiser = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.02, steps)
    for _ in range(steps):
        x = tokens[torch.randint(len(tokens), (batch,), generator=generator)]
        groups = objective.groups(batch, tokens.shape[1], generator)
        row, p = (groups > 1).nonzero(as_tuple=True)
        loss = spectral_loss(LinearAttention(*weights).scores(x, groups == 1)[row], x[row, p], marginal)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    Q, K, V, W = (x.detach() for x in weights)
    return LinearAttention(Q, K, V, W / 2)


def theorem43(r=2, s=6, T=2, rho=0.5, steps=1000, d=32, seed=0):
    """Linear attention trained with masks of one length and of every length, evaluated on prefixes of every length.

    Beside them two ideals, -1/4 sum_v P(v)^2 / P_G(v) with P_G = 1/(rsT): told the position, P = 1/T on T tokens gives
    -rs/4; blind to it, as the masked loss is, P = 1/((s-m)T) on the tokens of all s - m positions outside a prefix of
    m gives -rs / (4(s-m)). No mask ratio closes that gap.
    """
    hidden, vocab, m = hidden_of(rho, s), r * s * T, np.arange(1, s)
    if r * T ** s > 2000:
        raise BadInput(f"r = {r}, s = {s}, T = {T} give {r * T ** s} sequences and the limit is 2000; use a smaller "
                       "--r, --s or --T")
    s_m, sets = s - hidden, token_sets(r, s, T)
    tokens = torch.tensor([x for y in range(r) for x in itertools.product(*sets[y].tolist())]) - int(sets.min())
    one_length, all_lengths = (train_attention(from_options(name, mask=mask), tokens, vocab, d, steps, seed=seed) for
                               name, mask in (("mlm", hidden / s), ("vl", (0.5 / s, 1 - 0.5 / s))))
    x, every = measure(one_length, tokens, s_m), [measure(all_lengths, tokens, int(n)) for n in m]
    blind, told = -r * s / (4 * (s - m)), np.full(s - 1, -r * s / 4)
    return {"visible": s_m, "prefix": m, "loss_one_length": x["loss"], "loss_all_lengths": every[0]["loss"],
            "ideal_blind": blind, "ideal_told_position": told,
            "printed_bound": x["printed"], "corrected_bound": x["corrected"],
            "corrected_bound_all_lengths": np.array([y["corrected"][-1] for y in every]),   # with s_m = m, D = 0
            "share_of_blindness": (blind - told)[:s_m].sum() / (x["loss"] - told)[:s_m].sum(),
            "counterexample": counterexample()}


def show43(x):
    rows = [("prefix", "one length", "all lengths", "ideal blind", "ideal told", "printed", "corrected", "all lengths")]
    for i, m in enumerate(x["prefix"]):
        losses = [f"{x[key][i]:.4f}" for key in
                  ("loss_one_length", "loss_all_lengths", "ideal_blind", "ideal_told_position")]
        bounds = [f"{x[key][i]:.1f}" if i < len(x[key]) else "-" for key in
                  ("printed_bound", "corrected_bound", "corrected_bound_all_lengths")]
        rows.append((f"{m}", *losses, *bounds))
    s_m, share, broken = x["visible"], x["share_of_blindness"], x["counterexample"]
    return ["Linear attention on D_sim: loss (coefficient 1) on a prefix, and bounds on it. Training hides tokens so",
            f"that s_m = {s_m} are visible (one length), or 1 .. s - 1 of them (all lengths).", "",
            f"{'':30s}losses{'':38s}bounds", *table(rows), "",
            f"{share:.0%} of what one length loses to the ideal that is told the position, on prefixes up to {s_m}, is",
            "blindness to the position asked for, which no choice of lengths cures.",
            "A model against the printed bound: " + ", ".join(f"{name} {value:.1f}" for name, value in broken.items())]


# ---------------------------------------------------------------------------- trained networks

def empirical_spectrum(features, targets):
    """The co-occurrence operator as a network sees it: features f(X_i) (N, D) and target embeddings W_{X_i^+} (N, D).

    sigma_2, sigma_3, .. of Abar are the correlations of the best functions of X and of X+. Among linear functions of f
    and of W they are the singular values of the centred cross-covariance after whitening, each at most its sigma_j.
    -> `correlations`, those; `covariance`, the singular values without whitening as shares of their sum. Whitening and
    directions are fitted on one half of the samples and correlated on the other, so that noise averages to zero.
    """
    half = len(features) // 2
    white = []
    for x in (features, targets):
        x = x - x[:half].mean(0)
        _, scale, v = np.linalg.svd(x[:half], full_matrices=False)
        keep = scale > 1e-6 * scale[0]
        white.append(x @ (v[keep].T / scale[keep] * math.sqrt(half)))
    u, _, v = np.linalg.svd(white[0][:half].T @ white[1][:half], full_matrices=False)
    a, b = (x - x.mean(0) for x in (white[0][half:] @ u, white[1][half:] @ v.T))
    correlations = (a * b).mean(0) / np.sqrt((a * a).mean(0) * (b * b).mean(0)).clip(1e-12)
    covariance = np.linalg.svd((features - features.mean(0)).T @ (targets - targets.mean(0)), compute_uv=False)
    return {"correlations": np.sort(correlations)[::-1], "covariance": covariance / covariance.sum()}


@torch.no_grad()
def trained(checkpoints, data=None, count=8000, device=None, seed=0):
    """The empirical spectrum of each checkpoint, from features f(X) of contexts of held-out text and the embeddings of X+."""
    rows = []
    for path in checkpoints:
        run = load_run(path, choose_device(device))
        features, ids, _ = features_of(run, data, count, seed)
        targets = run.model.embedding.weight.cpu()[ids]                        # (count, D)
        if len(features) < 4 * features.shape[1]:
            raise BadInput(f"{len(features)} features are too few to estimate {features.shape[1]} correlations; give --features "
                           f"and --data for at least {4 * features.shape[1]}")
        values = empirical_spectrum(features.double().numpy(), targets.double().numpy())
        rows.append({"checkpoint": path, "objective": describe(run.objective), "step": run.step, "features": len(features),
                     **values, "tail_sigma4": (values["correlations"].clip(0) ** 4).sum()})
    return {"checkpoints": rows}


def show_trained(x):
    shown = (2, 3, 5, 9, 17, 33)
    rows = [("objective", "features", "sum sigma^4", *(f"sigma_{j}" for j in shown))]
    for y in x["checkpoints"]:
        sigma = [f"{value:.3f}" for j, value in enumerate(y["correlations"], 2) if j in shown]
        rows.append((y["objective"], str(y["features"]), f"{y['tail_sigma4']:.3f}", *sigma))
    return [*table(rows), "",
            "Shown: how strongly linear functions of a network's features and of its embeddings depend on each other",
            "on held-out text, a lower bound on the sigma_j of its objective; few features make it lower. Not shown:",
            "Abar itself. The best functions need not be linear, a direction counts even if the network ignores it,",
            "text is not D_sim, and these networks are told the position they predict, which D_sim's theory is not."]


# ---------------------------------------------------------------------------- pictures

def all_objectives(s):
    """The objectives that are compared on sequences of s tokens, with a new one's defaults."""
    options = [("ar", {}), ("prefix", {}), *(("dar", {"t": t}) for t in sorted({2, 3, 4, s - 1}) if 1 < t < s),
               ("mlm", {"mask": 0.5}), ("vl", {"mask": (1 / s, 1 - 1 / s)})]
    options += [(name, {}) for name in OBJECTIVES if name not in ("ar", "prefix", "dar", "mlm", "vl")]
    return [from_options(name, **given) for name, given in options]


def plot_spectra(path, x):
    """Left: singular values of all objectives. Right: dar's tail sum against t, with the accuracies of Table 9."""
    s = x.get("s", 8)
    figure, (left, right) = import_optional("matplotlib.pyplot").subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for objective in all_objectives(s):
        y = spectrum(objective, s)["singular_values"]
        left.plot(range(1, len(y) + 1), y, ".-", label=describe(objective))
    left.set(xlabel="j", ylabel="singular value per class", title=f"D_sim, s = {s}")
    left.legend(fontsize=8)
    t = range(1, s)
    right.plot(t, [spectrum(from_options("dar", t=k), s)["tail_sigma4_per_class"] for k in t], "k.-")
    right.set(xlabel="t", ylabel="tail sum of sigma^4 per class (line)", title="dar: theory and Table 9")
    other = right.twinx()
    for column, (name, marker) in enumerate((("linear probe", "o"), ("fine-tuning", "s"))):
        gains = {k: row[column] - TABLE_9[1][column] for k, row in TABLE_9.items()}
        other.plot(list(gains), list(gains.values()), marker, label=f"Table 9, {name}")
    other.set(ylabel="accuracy minus accuracy at t = 1 (points)")
    other.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot43(path, x):
    figure, axes = import_optional("matplotlib.pyplot").subplots(figsize=(7, 4.5), layout="constrained")
    for key, style in (("loss_one_length", "o-"), ("loss_all_lengths", "s-"), ("ideal_blind", "k:"),
                       ("ideal_told_position", "k--"), ("printed_bound", "r^-"), ("corrected_bound", "mv-"),
                       ("corrected_bound_all_lengths", "c.-")):
        axes.plot(x["prefix"][:len(x[key])], x[key], style, label=key.replace("_", " "))
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="tokens in the prefix", ylabel="spectral loss, coefficient 1",
             title=f"Theorem 4.3; one length = {x['visible']} visible")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------- every claim on one page

def every_claim(seed=0):
    """-> rows: claim, printed, computed, verdict, and whether the check behind the verdict passed."""
    rows = []

    def row(claim, printed, computed, checked, verdict):
        rows.append({"claim": claim, "printed": printed, "computed": computed,
                     "verdict": verdict if checked else "CHECK FAILED", "checked": bool(checked)})

    x = theorem31(seed=seed)
    row("3.1  ||Abar - F W'^T||^2 = loss + const", "-1 E[W f]_X+", f"-2 E[W f]_X+, to {x['identity_error']:.0e}",
        x["identity_error"] < 1e-10 and x["printed_error"] > 0.1, "factor 2 lost")
    row("3.1  the constant", "const", "||Abar||_F^2 = sum sigma_j^2", abs(x["constant"] - x["sum_sigma2"]) < 1e-10,
        "made exact")
    row("3.1  gradient descent = truncated SVD", "implied", f"to {x['descent_error']:.0e}",
        x["descent_error"] < 1e-6, "holds")

    r, s, T = 2, 4, 2
    x = theorem42(r, s, T, 0.5)
    ar, empty, _, _ = x["unit_values"].values()
    row(f"4.2  AR: unit sigma_j, r = {r}, s = {s}", f"rs = {r * s}", f"{ar}; {empty} with empty context",
        (ar, empty) == (r * (s - 1), r * (s - 1) + 1), "r(s-1), or plus 1")
    row("4.2  sigma_j (AR) > sigma_j (masked)", f"{r} < j <= {r * s}", f"fails at j = {x['not_larger_at']}",
        x["not_larger_at"] == list(range(r * (s - 1) + 1, r * s + 1)), "last r fail")
    row("4.2  masked, n = 2 of 4 hidden", multiplicities(x["printed"]["masked"]), multiplicities(x["masked"]),
        np.allclose(x["masked"][:r * s], x["printed"]["masked"]), "holds")
    x = theorem42(r, s, T, 0.75)
    printed, computed = x["printed"]["masked"][r], x["masked_by_coin_flips"][r]
    row("4.2  the same, coin-flip mask, rho = 3/4", f"sigma_{r + 1} = {printed:.6f}", f"sigma_{r + 1} = {computed:.6f}",
        abs(printed - computed) > 0.01, "exact counts only")
    ones = theorem42(r, s, T, 0.5, literal=True)["unit_values"]["masked"]
    row("4.2  the printed tokens tell classes apart", f"{r} unit sigma_j", f"{ones}", ones < r, "classes collide")
    s_a, s_b = 2, 3                                                            # p_a = 3, p_b = 1
    block = np.kron(np.ones((s_b, s_b)) + 2 * np.eye(s_b), np.ones((s_a, s_a)))
    rank = int((np.linalg.svd(block, compute_uv=False) > 1e-9).sum())
    row("A.3  Lemma A.3: first zero, s_a 2, s_b 3", f"s_a + 1 = {s_a + 1}", f"{rank + 1}", rank == s_b, "s_b + 1")

    s = 8
    for objective in all_objectives(s):
        x = spectrum(objective, s)
        tail, closed = x["tail_sigma4_per_class"], x["closed_form_tail"]
        row(f"new  {describe(objective)}, s = {s}: tail sum of sigma^4", "", f"{tail:.6f}",
            closed is None or abs(closed - tail) < 1e-9, "enumerated" if closed is None else f"formula {closed:.6f}")
    tails = [spectrum(from_options("dar", t=t), s)["tail_sigma4_per_class"] for t in range(1, s)]
    row("T.9  accuracy peaks at t = 3", "59.6, then 58.8", f"tail still falls: {tails[2]:.3f}, {tails[3]:.3f}",
        (np.diff(tails) < 0).all(), "not explained")
    six, three = (spectrum(from_options("dar", t=2), s, w)["singular_values"][1] for w in ("targets", "contexts"))
    row("Eq6  equivalent to Eq. 3, t = 2", "sigma_2 equal", f"{six:.6f}, {three:.6f}", abs(six - three) > 1e-3,
        "weights differ")
    told = (merge(*tell_position(*pairs(*listed(from_options(name), s))))[1] for name in ("dar", "mlm", "permutation"))
    least = min(singular_values(position_matrix(q), q.sum(0) > 0).min() for q in told)
    row("new  networks told where they predict", "", f"all sigma_j = {least:.6f}", least > 1 - 1e-9, "all spectra flat")

    r, s = 3, 4
    x = theorem41(r, s, 2, 0.5, rotations=20, seed=seed)
    slack = min((y["bound"] - y["error"]).min() for y in x.values())
    row("4.1  error <= c1 sum sigma_j^4 + c2 alpha", "c1, c2 not given", "c1 = 4 max P(c), c2 = 8", slack > -1e-9,
        "holds")
    ar, mlm = (x[f"{name}_class"]["error"][r - 1] for name in ("ar", "mlm"))
    row(f"4.1  probe of the class, t = r = {r}, s = {s}", "AR worse", f"ar {ar:.3f}, mlm {mlm:.3f}", ar > mlm + 0.01,
        "holds")
    ar, vl = (x[f"{name}_length"]["error"][r * (s - 1) - 1] for name in ("ar", "vl"))
    row(f"4.1  probe of the length, t = r(s-1) = {r * (s - 1)}", "AR worse", f"ar {ar:.3f}, vl {vl:.3f}",
        ar < vl - 0.01, "label decides")

    x = theorem43(seed=seed)
    broken, s_m = x["counterexample"], x["visible"]
    row("4.3  printed bound, a model against it", f"L <= {broken['printed']:.1f}", f"L = {broken['loss']:.1f}",
        broken["loss"] > broken["printed"], "does not hold")
    row("4.3  corrected bound, the same model", "", f"L = {broken['loss']:.1f} <= {broken['corrected']:.1f}",
        broken["loss"] <= broken["corrected"], "holds")
    one, every = x["loss_one_length"], x["loss_all_lengths"]
    printed, bound = x["printed_bound"].mean(), x["corrected_bound"]
    row("4.3  trained linear attention", f"L <= {printed:.1f}", f"L = {one[:s_m].mean():.3f} <= {bound.mean():.1f}",
        (one[:s_m] <= bound).all() and (every <= x["corrected_bound_all_lengths"]).all(), "holds, vacuous")
    one, every, share = *(np.delete(loss, s_m - 1).mean() for loss in (one, every)), x["share_of_blindness"]
    row(f"4.3  loss at lengths other than {s_m}", "all lengths better", f"one {one:.3f}, all {every:.3f}", every < one,
        "holds")
    row(f"4.3  gap to the ideal, prefixes up to {s_m}", "w_k and eta", f"{share:.0%} position-blindness", share > 0.5,
        "mostly neither")
    return rows


# ---------------------------------------------------------------------------- command line

def table(rows, align=">"):
    """Rows of strings as lines with aligned columns; the first column to the left."""
    width = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ["  ".join(f"{cell:{align if i else '<'}{width[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows]


def multiplicities(values):
    """'1.000000 x 2, 0.577350 x 6': descending values and how often each comes; zeros are left out."""
    counts = {}
    for value in (f"{value:.6f}" for value in values if value > 1e-6):
        counts[value] = counts.get(value, 0) + 1
    shown = [f"{value} x {count}" if count > 1 else value for value, count in counts.items()]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "..", shown[-1]])


def show_claims(x):
    columns = ("claim", "printed", "computed", "verdict")
    return table([columns, *([claim[name] for name in columns] for claim in x["claims"])], "<")


def show_spectrum(x):
    lines = [f"{x['objective']}, s = {x['s']}, every {x['weighting'][:-1]} weighs the same ({x['method']})", ""]
    if "M" in x and x["s"] <= 12:
        lines += ["M, positions 1 .. s", *table([[f"{value:.6f}" for value in row] for row in x["M"]]), ""]
    error, plus = x.get("singular_values_stderr"), x.get("tail_sigma4_stderr")
    bar, tail_bar = (f" ± {error.max():.6f}", f" ± {plus:.6f}") if plus else ("", "")
    rows = [("singular values per class", multiplicities(x["singular_values"]) + bar),
            ("tail sum of sigma_j^4, j > 1, per class", f"{x['tail_sigma4_per_class']:.6f}{tail_bar}"),
            (f"tail sum of sigma_j^4, j > r = {x['r']}", f"{x['tail_sigma4']:.6f}")]
    if x["closed_form_text"]:
        rows += [("closed form", x["closed_form_text"]), ("  its tail sum", f"{x['closed_form_tail']:.6f}")]
    return lines + table(rows, "<")


def plain(x):
    """numpy to what JSON knows."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


def spectrum_command(args):
    objective = from_options(args.objective, t=args.t, mask=args.mask)
    x = spectrum(objective, args.s, args.weighting, args.samples, args.seed)
    others = x.get("singular_values_other_classes", x["singular_values"])
    every = np.sort(np.append(x["singular_values"], np.tile(others, args.r - 1)))[::-1]
    return {**x, "r": args.r, "tail_sigma4": (every[args.r:] ** 4).sum()}


def parse(argv):
    parser = Parser(description="The theory of the paper, checked and extended to every objective.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, compute, show, text, toy=(), plot=None, picture=None):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(compute=compute, show=show, draw=plot)
        sub.add_argument("--json", type=output_file, metavar="FILE", help="write the results as one JSON object; - for standard output")
        sub.add_argument("--seed", type=seed, default=0, help="of every random choice")
        for option, default, meaning in zip("rsT", toy, ("classes", "positions", "values per class and position")):
            sub.add_argument(f"--{option}", type=positive, default=default, help=f"toy model: {meaning}")
        if toy:
            sub.add_argument("--rho", type=float, default=0.5, help="mask ratio")
        if plot:
            sub.add_argument("--plot", type=output_file, metavar="FILE.png", help=f"picture of {picture}")
        return sub

    spectra = "the spectra of all objectives, and of dar's tail sum beside Table 9"
    command("all", lambda a: {"claims": every_claim(a.seed)}, show_claims, "every claim: printed, computed, verdict",
            plot=plot_spectra, picture=spectra)
    command("theorem3.1", lambda a: theorem31(seed=a.seed), show31, "spectral loss = matrix factorisation")
    command("theorem4.1", lambda a: theorem41(a.r, a.s, a.T, a.rho, seed=a.seed), show41,
            "probe error and its bound on the toy model", toy=(3, 4, 2))
    sub = command("theorem4.2", lambda a: theorem42(a.r, a.s, a.T, a.rho, a.literal_tokens), show42,
                  "singular values on the enumerated toy model", toy=(2, 4, 2))
    sub.add_argument("--literal-tokens", action="store_true", help="the token sets as Sec. 4.1.2 prints them")
    sub = command("theorem4.3", lambda a: theorem43(a.r, a.s, a.T, a.rho, a.steps, seed=a.seed), show43,
                  "generation bounds, and linear attention trained on the toy model", toy=(2, 6, 2),
                  plot=plot43, picture="loss and bounds against the prefix length")
    sub.add_argument("--steps", type=positive, default=1000, help="training steps")
    sub = command("spectrum", spectrum_command, show_spectrum, "position matrix and singular values of any objective",
                  plot=plot_spectra, picture=spectra)
    sub.add_argument("--objective", choices=OBJECTIVES, required=True)
    add_options(sub)
    sub.add_argument("--s", type=positive, default=8, help="positions")
    sub.add_argument("--r", type=positive, default=1, help="classes, for the tail sum over all of them")
    sub.add_argument("--weighting", choices=WEIGHTINGS, default="targets", help="what weighs the same")
    sub.add_argument("--samples", type=positive, default=100_000, help="draws of f where not all can be listed")
    sub = command("trained", lambda a: trained(a.checkpoints, a.data, a.features, a.device, a.seed), show_trained,
                  "empirical spectrum of checkpoints of train.py")
    sub.add_argument("checkpoints", nargs="+", metavar="CKPT", help="run folders or checkpoint files")
    sub.add_argument("--data", help="text or token folder (default: each run's validation text)")
    sub.add_argument("--features", type=positive, default=8000, help="features of each checkpoint, 8000 in the paper")
    sub.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    return parser.parse_args(argv)


def main(argv=None):
    args, threads = parse(argv), torch.get_num_threads()
    plot = getattr(args, "plot", None)
    if plot:
        import_optional("matplotlib.pyplot")                                   # complain before the work, not after it
    try:
        if args.command != "trained":
            torch.set_num_threads(1)                                           # the matrices are small
        results = args.compute(args)
    finally:
        torch.set_num_threads(threads)
    if args.json != "-":
        print("\n".join(args.show(results)))
    if plot:
        args.draw(plot, results)
    if args.json:
        settings = {name: value for name, value in vars(args).items()
                    if name not in ("command", "json", "compute", "show", "draw")}
        write_json(args.json, plain({"command": f"spectral.py {args.command}", "settings": settings, **results}))
    return int(not all(x["checked"] for x in results.get("claims", [])))


if __name__ == "__main__":
    command_line(main)
