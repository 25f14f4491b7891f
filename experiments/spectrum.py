"""The spectrum of an objective: from f, its queries and their weights to the singular values of the theory.

An objective pairs a context X with a target X+. P_M is their joint distribution, P_C and P_G are its
marginals, and sigma_j is the j-th singular value of Abar = P_M / sqrt(P_C P_G) (Sec. 3.2). The toy model
D_sim (Sec. 4.1.2) has r classes, s positions and T values for each class and position; given the class,
tokens are independent and uniform. There everything follows from q(S, p), how often the positions S are the
context of position p, and q follows from the f that training draws: no objective needs a theory of its own.
THEORY.md has the proofs.
"""

import itertools
import math
from collections import Counter

import numpy as np

from masks import Objective, sees
from util import BadInput

MOST_CONTEXTS = 20_000  # of the enumerated toy model: some seconds
DRAWS = 100_000         # of f, where nobody wrote down its distribution: Objective.outcomes


# ---------------------------------------------------------------------------- pairs (context, target)

def pairs(objective, s, told=False):
    """All pairs -> contexts S, bool (n, s), and q (n, s): how often S is the context of position p, sum 1.

    `told` is for networks that are told the position they predict: p belongs to the context, which then has
    2 s columns. BadInput: too many f to list, too few draws, or an empty context.
    """
    objective.check(s)
    outcomes = objective.outcomes(s)
    if outcomes is None:
        raise BadInput(f"{objective} has too many outcomes to list at s = {s}; use a smaller s")
    f, probability = outcomes                                                 # (K, s), (K,)
    targets, cuts, weight = objective.queries(f)                              # (K, n) each
    asked = weight > 0
    draw = asked.nonzero()[:, 0].numpy()                                      # (N,) which f a pair comes from
    p, mass = targets[asked].numpy(), (probability[:, None] * weight)[asked].numpy()          # (N,)
    contexts = sees(f, cuts)[asked].numpy()                                   # (N, s)
    if not contexts.any(1).all():
        raise BadInput(f"{objective} asks for a token that would see nothing; begin with f = 1")
    if told:
        contexts = np.hstack([contexts, np.eye(s, dtype=bool)[p]])
    _, first, which = np.unique(np.packbits(contexts, axis=1), axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)                                                 # (N,) which context a pair has
    q = np.zeros((len(first), s))
    np.add.at(q, (which, p), mass)
    if sampled(objective) and f.max() > 2:
        # Of a context that came up once, draws show one of its targets: the spectrum would look flat.
        # (Where all f are 1 or 2 one draw shows all targets.)
        met = np.unique(np.stack([which, draw]), axis=1)
        times = np.bincount(met[0], DRAWS * probability.numpy()[met[1]])      # how often each context came up
        if q[times < 1.5].sum() > 0.001 * q.sum():
            raise BadInput(f"draws of {objective} meet too many contexts only once at s = {s}; use a smaller "
                           "s, or write its outcomes()")
    return contexts[first], q / q.sum()


def sampled(objective):
    """Whether the distribution of f is that of many draws."""
    return type(objective).outcomes is Objective.outcomes


# ---------------------------------------------------------------------------- the s x s position matrix

def position_matrix(q):
    """M_pp' = sum_S q(S,p) q(S,p') / (q_C(S) sqrt(q_G(p) q_G(p'))), from q (n, s).

    The non-zero singular values of Abar are sqrt(eig(M)), once for each class, whatever T and the prior.
    """
    G = q.sum(0)
    Q = q / np.sqrt(q.sum(1, keepdims=True) * np.where(G > 0, G, 1))
    return Q.T @ Q


def spectrum(objective, s, flag=None, told=False):
    """What the theory says about one objective on sequences of s tokens -> dict. `told` as for `pairs`.

    Exact where all f can be listed; elsewhere the closed form of the objective registered as `flag`.
    "tail_sigma4_per_class" is the sum of sigma_j^4 over j > 1 within a class, a share 1/r of that over j > r.
    """
    objective.check(s)
    text, values, tail = closed_form(None if told else flag, objective, s)
    try:
        q = pairs(objective, s, told)[1]
    except BadInput:
        if values is None:
            raise
        found = {"method": "closed form", "singular_values": values}
    else:
        M, targets = position_matrix(q), q.sum(0) > 0  # Abar has no column for what is never a target
        eigenvalues = np.linalg.eigvalsh(M[np.ix_(targets, targets)])[::-1]
        found = {"method": f"{DRAWS:,} draws" if sampled(objective) else "exact", "M": M,
                 "singular_values": np.sqrt(eigenvalues.clip(0))}
    return {**found, "tail_sigma4_per_class": float((found["singular_values"][1:] ** 4).sum()),
            "closed_form": values, "closed_form_tail": tail, "closed_form_text": text}


# ---------------------------------------------------------------------------- closed forms

def exchangeable(s, inverse):
    """Singular values of a class where all pairs (S, p) of one size weigh the same; `inverse` is E[1/n] over
    the pairs, n the number of hidden positions."""
    return np.append(1, np.full(s - 1, math.sqrt(max(s * inverse - 1, 0) / max(s - 1, 1))))


def any_order(s, given=0):
    """The same in a uniform order of s positions, of which the first `given` are not predicted."""
    return exchangeable(s, (1 / np.arange(1, s + 1 - given)).mean())


def closed_form(flag, objective, s):
    """A formula in words, its singular values of a class, its tail sum over j > 1; None where unknown."""
    t, one_target = getattr(objective, "t", None), "all 1: each context has one target"
    if flag in ("ar", "prefix") or flag in ("dar", "mtp") and t == 1:
        text, values = one_target, np.ones(s - 1)
    elif flag == "spans":
        n, spans = objective.counts(s)  # any token may be hidden, unless there is but one way to hide so many
        text, values = one_target, np.ones(n if n == spans == s - n + 1 else s)
    elif flag == "dar" and t == 2:
        text, values = "cos(pi j/(2s-3)), j = 0..s-2", np.cos(np.pi * np.arange(s - 1) / (2 * s - 3))
    elif flag == "dar" and t == s - 1:
        text, values = "1/(j+1), j = 0..s-2", 1 / np.arange(1, s)
    elif flag == "dar" and isinstance(t, int) and s >= 2 * t - 1:
        tail = (6 * (2 * t * t + 1) * s - 13 * t ** 3 - 6 * t * t - 8 * t - 9) / (18 * t ** 3)
        return "tail (6(2t^2+1)s - 13t^3 - 6t^2 - 8t - 9)/(18t^3)", None, tail
    elif flag in ("mlm", "vl"):
        mean = sum(probability * n for n, probability in objective.hidden_counts(s).items())
        text, values = "1, then sqrt((s/n - 1)/(s-1)), n hidden on average", exchangeable(s, 1 / mean)
    elif flag == "permutation":
        text = "1, then sqrt((H s/(s-1) - 1)/(s-1)), H = 1 + 1/2 + .. + 1/(s-1)"
        values = any_order(s, 1)
    elif flag in ("blocks", "diffusion"):  # diffusion is one block
        text = "for each block of b tokens 1, then b-1 times sqrt((H - 1)/(b-1)), H = 1 + 1/2 + .. + 1/b"
        size = min(getattr(objective, "block", s - 1), s - 1)
        sizes = [min(size, s - first) for first in range(1, s, size)]
        values = np.sort(np.concatenate([any_order(b) for b in sizes]))[::-1]
    elif flag == "segments":
        text = "as for permutation, of the m squares; 0 for what would tell apart the patches of one square"
        area = objective.segment ** 2
        values = np.append(any_order(s // area, 1), np.zeros(s // area * (area - 1)))
    else:
        return None, None, None
    return text, values, float((values[1:] ** 4).sum())


# ---------------------------------------------------------------------------- the toy model, token by token

def hidden_of(rho, s):
    """round(rho s). BadInput where that is none or all of s tokens."""
    hidden = round(rho * s)
    if not 1 <= hidden < s:
        raise BadInput(f"--rho {rho:g} hides {hidden} of {s} tokens; hide at least one and not all")
    return hidden


def subsets(s):
    """All sets of positions, but for none and all: bool (2^s - 2, s)."""
    return np.indices((2,) * s).reshape(s, -1).T[1:-1] > 0


def token_sets(r, s, T, literal=False):
    """The T tokens of each class and position, ids (r, s, T). BadInput: too many contexts to enumerate.

    Sec. 4.1.2 prints kTr + y, kTr + 2y, ..., kTr + Ty (`literal`), which lets classes share tokens once
    r, T >= 2. The theorem needs disjoint sets: kTr + (y - 1)T + {1..T}.
    """
    count = r * (T + 1) ** s
    if count > MOST_CONTEXTS:
        raise BadInput(f"r = {r}, s = {s}, T = {T} give {count:.3g} contexts and the limit is "
                       f"{MOST_CONTEXTS}; use a smaller --r, --s or --T")
    y, k, j = np.ogrid[1:r + 1, 1:s + 1, 1:T + 1]
    return k * T * r + (y * j if literal else (y - 1) * T + j)


def cooccurrence(contexts, q, tokens):
    """P_M of D_sim by enumeration, without a position matrix, from `pairs` and tokens (r, s, T).

    -> P_M (contexts, targets), without rows or columns of zeros; the class of each context (contexts,); the
    tokens that it holds, bool (contexts, number of ids).
    """
    (r, _, T), classes, columns, entries = tokens.shape, {}, {}, []
    for (S, weight), y in itertools.product(zip(contexts, q), range(r)):
        share = 1 / (r * T ** (int(S.sum()) + 1))                             # P(y) P(x_S | y) P(x_p | y)
        targets = [(x, weight[p] * share) for p in weight.nonzero()[0] for x in tokens[y, p].tolist()]
        for x_S in itertools.product(*tokens[y, S].tolist()):
            classes.setdefault(x_S, y)
            entries += [(x_S, columns.setdefault(x, len(columns)), mass) for x, mass in targets]
    rows, ids = {x_S: i for i, x_S in enumerate(classes)}, np.arange(tokens.min(), tokens.max() + 1)
    P = np.zeros((len(rows), len(columns)))
    for x_S, j, mass in entries:
        P[rows[x_S], j] += mass
    return P, np.array(list(classes.values())), np.array([np.isin(ids, x_S) for x_S in classes])


def normalised(P):
    """Abar = P_M / sqrt(P_C P_G)."""
    return P / np.sqrt(P.sum(1, keepdims=True) * P.sum(0))


# ---------------------------------------------------------------------------- the probe of Theorem 4.1

def best_features(P, rotations, seed):
    """The left singular vectors of Abar (n, rank) as often as `rotations`, and its singular values (rank,).

    Equal sigma_j leave their vectors free up to a rotation: each time a random one.
    """
    rng = np.random.default_rng(seed)
    U, sigma, _ = np.linalg.svd(normalised(P), full_matrices=False)
    U, sigma = U[:, sigma > 1e-8], sigma[sigma > 1e-8]
    equal = np.split(np.arange(len(sigma)), np.nonzero(-np.diff(sigma) > 1e-9)[0] + 1)
    turned = [np.hstack([U[:, j] @ np.linalg.qr(rng.normal(size=(len(j), len(j))))[0] for j in equal])
              for _ in range(rotations)]
    return turned, sigma


def probe_errors(basis, C, pi):
    """Excess over Bayes of the least-squares probe of the class on the first 1, 2, .. columns of a basis.

    basis (n, k) is orthonormal: features times sqrt(P_C), C = P_C (n,). pi (n, r) is P(class | context),
    one-hot where the context tells it. Scores are projections of sqrt(P_C) pi; a tie is a guess. -> (k,)
    """
    root, scores, errors = np.sqrt(C)[:, None], np.zeros(pi.shape), []
    for column in basis.T:
        scores = scores + np.outer(column, column @ (root * pi))
        best = scores / root
        best = best > best.max(1, keepdims=True) - 1e-9
        errors.append(C @ (pi.max(1) - (best * pi).sum(1) / best.sum(1)))
    return np.array(errors)


# ---------------------------------------------------------------------------- what a theorem reports

def row(claim, printed, computed, holds, verdict):
    """A claim, what the paper prints, what was computed, and a verdict, which stands if its check holds."""
    return {"claim": claim, "printed": printed, "computed": computed,
            "verdict": verdict if holds else "CHECK FAILED", "checked": bool(holds)}


def multiplicities(values):
    """'1.000000 x 2, 0.577350 x 6': descending values and how often each comes; zeros are left out."""
    counts = Counter(f"{value:.6f}" for value in values if value > 1e-6)
    shown = [f"{value} x {count}" if count > 1 else value for value, count in counts.items()]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "..", shown[-1]])
