"""An objective as an operator: from f, its queries and their weights to the spectrum of the theory.

An objective pairs a context X with a target X+. P_M is their joint distribution, P_C and P_G its marginals,
Abar = P_M / sqrt(P_C P_G), sigma_j its j-th singular value (Sec. 3.2). On the toy model D_sim (Sec. 4.1.2: r
classes, s positions, T values for each class and position, independent and uniform given the class) all of
that follows from q(S, p), how often the positions S are the context of position p, and q follows from the
sampler of f that training uses: no objective needs a theory of its own.

Nothing here imports an objective; they come as arguments.
"""

import itertools
import math

import numpy as np
import torch

from support.cli import BadInput
from support.objective import Queries

WEIGHTINGS = ("targets", "sequences", "contexts")
MOST_CONTEXTS = 20_000   # contexts of the enumerated toy model: some seconds


# ---------------------------------------------------------------------------- pairs (context, target)

def pairs(objective, groups, probability=None, weighting="targets"):
    """Every pair (context positions S, target position p) that draws of f ask for: S = {j : 0 < f(j) < c}.

    groups (K, s), probability (K,), by default 1/K -> contexts bool (N, s), weight (N, s) over the targets: a
    row for each draw and cut. What weighs the same?
        targets    every query, times its own weight: as training's loss does: Eq. 6 for dar
        sequences  every draw of f: each ratio of Eq. 5 counts alike, however many tokens it hides
        contexts   every (draw, cut), whose targets share its weight: Eq. 3 for dar
    """
    groups = torch.as_tensor(groups)
    targets, cuts, weight = (x.numpy() for x in objective.queries(groups))     # (K, n)
    f, weight, (K, s) = groups.numpy(), weight.astype(float), groups.shape
    probability = np.full(K, 1 / K) if probability is None else np.asarray(probability)
    if weighting == "sequences":
        weight = weight / weight.sum(1, keepdims=True)
    contexts, shares = [], []
    for cut in np.unique(cuts[weight > 0]):
        here = np.where(cuts == cut, weight, 0)
        rows = here.any(1)
        share = np.zeros((rows.sum(), s))
        np.add.at(share, (np.arange(len(share))[:, None], targets[rows]), here[rows])
        if weighting == "contexts":
            share /= share.sum(1, keepdims=True)
        contexts.append((f[rows] > 0) & (f[rows] < cut))
        shares.append(share * probability[rows, None])
    return np.concatenate(contexts), np.concatenate(shares)


def merge(contexts, weight):
    """Rows with the same context become one -> contexts (n, s), q (n, s), the row each came to (N,), how many
    came to it (n,)."""
    _, first, which, seen = np.unique(np.packbits(contexts, axis=1), axis=0, return_index=True,
                                      return_inverse=True, return_counts=True)
    which, q = which.reshape(-1), np.zeros((len(first), weight.shape[1]))
    np.add.at(q, which, weight)
    return contexts[first], q, which, seen


def tell_position(contexts, weight):
    """The same pairs when the queried position belongs to the context: a network told where it predicts."""
    rows, p = weight.nonzero()
    one_hot = np.eye(weight.shape[1])[p]
    return np.hstack([contexts[rows], one_hot > 0]), one_hot * weight[rows, p][:, None]


def listed(objective, s):
    """All f (K, s) and their probabilities (K,); None where nobody wrote them down or they are too many."""
    outcomes = objective.outcomes(s, min(200_000, 20_000_000 // s))
    return outcomes and tuple(x.numpy() for x in outcomes)


class FromNothing:
    """An objective whose first group is predicted too, from the empty context: that is f + 1."""

    def __init__(self, objective):
        self.objective = objective

    def outcomes(self, length, limit=200_000):
        groups, probability = self.objective.outcomes(length, limit)
        return torch.where(groups > 0, groups + 1, 0), probability

    def queries(self, groups):
        return Queries(torch.arange(groups.shape[1]).expand_as(groups), groups, (groups > 1).float())


# ---------------------------------------------------------------------------- the s x s position matrix

def position_matrix(q, rows=slice(None)):
    """M_pp' = sum_S q(S,p) q(S,p') / (q_C(S) sqrt(q_G(p) q_G(p'))) over the given rows S of q (n, s).

    On D_sim the entry of Abar for context (S, x_S) and target (p, x_p) is, within a class,
        q(S,p) / sqrt(q_C(S) q_G(p)) * T^(-|S|/2) * T^(-1/2)
    and 0 between classes. It is constant on the block of each (S, p), so the non-zero singular values are
    those of the matrix q / sqrt(q_C q_G), whose Gram matrix is M: one copy per class, whatever T and the
    prior of the classes. The empty context alone is shared by the classes: one copy of M has its term and
    r - 1 copies do not.
    """
    G = q.sum(0)
    Q = q[rows] / np.sqrt(q[rows].sum(1, keepdims=True) * np.where(G > 0, G, 1))
    return Q.T @ Q


def singular_values(M, positions):
    """sqrt(eig(M)), descending; positions that are never a target have no column in Abar and none here."""
    return np.sqrt(np.linalg.eigvalsh(M[np.ix_(positions, positions)])[::-1].clip(0))


def sample_matrix(objective, s, weighting, samples, generator):
    """A consistent estimate of sum_S q(S,p) q(S,p') / q_C(S), (s, s), and of q_G, (s,), from draws of f; None
    where they cannot tell.

    q(S,p) q(S,p') needs two independent looks at S. Where all f are 1 or 2 one draw shows all targets of its
    context and the product is exact. Otherwise each draw's product with itself is left out (a U-statistic),
    for which contexts have to come up at least twice.
    """
    groups = objective.groups(samples, s, generator)
    contexts, weight = pairs(objective, groups, weighting=weighting)
    _, q, which, seen = merge(contexts, weight / weight.sum())
    weight, C = weight / weight.sum(), q.sum(1)
    if groups.min() > 0 and groups.max() <= 2:
        return q.T @ (q / C[:, None]), q.sum(0)
    if C[seen == 1].sum() > 0.001 * C.sum():
        return None
    a = np.where(seen > 1, seen / np.maximum(seen - 1, 1), 0) / C
    return q.T @ (a[:, None] * q) - weight.T @ (a[which][:, None] * weight), q.sum(0)


def spectrum(objective, s, weighting="targets", samples=100_000, seed=0, flag=None):
    """What the theory says about one objective on sequences of s tokens -> dict. Raises BadInput.

    Exact where all f can be listed; elsewhere the closed form of the objective registered as `flag`; else
    from draws of f, where `noise` tells how far the sigma_j^2 may be off. `tail_sigma4_per_class` is the sum
    over j > 1 within a class: where no context is empty a share 1/r of the sum over j > r.
    """
    objective.check(s)
    text, values, tail = closed_form(flag, objective, s, weighting)
    outcomes = listed(objective, s)
    if outcomes is not None:
        contexts, q, _, _ = merge(*pairs(objective, *outcomes, weighting))
        M, targets = position_matrix(q), q.sum(0) > 0
        result = {"method": "exact", "M": M, "singular_values": singular_values(M, targets)}
        if not contexts.any(1).all():
            others = position_matrix(q, contexts.any(1))
            result["singular_values_other_classes"] = singular_values(others, targets)
    elif values is not None:
        result = {"method": "closed form", "singular_values": values}
    else:
        result = from_draws(objective, s, weighting, samples, seed)
    return {**result, "tail_sigma4_per_class": float((result["singular_values"][1:] ** 4).sum()),
            "closed_form": values, "closed_form_tail": tail, "closed_form_text": text}


def from_draws(objective, s, weighting, samples, seed):
    """M and its singular values where f can neither be listed nor has a closed form.

    No eigenvalue is off by more than the spectral norm of the error of M (Weyl). The difference of two halves
    of the draws, over 2, is about as large as that error: its norm is the `noise`.
    """
    if samples < 1000:
        raise BadInput(f"--samples {samples} are too few; use at least 1000")
    generator = torch.Generator().manual_seed(seed)
    halves = [sample_matrix(objective, s, weighting, samples // 2, generator) for _ in range(2)]
    if None in halves:
        raise BadInput(f"{samples} draws of {objective} at s = {s} meet too many contexts only once to know "
                       "their targets; use a smaller s or more samples, or write its outcomes()")
    G = np.mean([G for _, G in halves], axis=0)
    one, two = (M / np.sqrt(np.outer(G, G)).clip(1e-300) for M, _ in halves)   # positions without mass stay 0
    M = (one + two) / 2
    return {"method": f"{samples} draws", "M": M, "singular_values": singular_values(M, G > 0),
            "noise": np.linalg.norm(one - two, 2) / 2}


# ---------------------------------------------------------------------------- closed forms

def exchangeable(s, inverse):
    """Values per class when all pairs (S, p) of one size weigh the same: n of s positions are hidden, and
    `inverse` is E[1/n] over the pairs.

    q = q_C(S) / n and q_G = 1/s give M_pp = E[1/n], M_pp' = E[(n-1)/n] / (s-1): eigenvalues 1 and, s - 1
    times, M_pp - M_pp' = (s E[1/n] - 1) / (s - 1). With one n this is Theorem 4.2's (s - n) / (n (s - 1)).
    """
    return np.append(1, np.full(s - 1, math.sqrt(max(s * inverse - 1, 0) / max(s - 1, 1))))


def any_order_values(s, given=0):
    """The same where each of n = 1 .. s - given weighs alike, as in a uniform order of s positions of which
    the first `given` are not predicted: E[1/n] = H / (s - given), H = 1 + 1/2 + .. + 1/(s - given)."""
    return exchangeable(s, (1 / np.arange(1, s + 1 - given)).mean())


def path_cosines(s):
    """dar with t = 2 under Eq. 6: cos(pi j / (2s - 3)), j = 0..s-2.

    The context 1..k is paired with the targets k + 1 and k + 2 alike. With contexts and targets as vertices
    and pairs as edges, target 2 - context 1 - target 3 - context 2 - .. - target s - context s - 1 is a path
    of 2s - 2 vertices. Its normalised adjacency matrix has q / sqrt(q_C q_G) and its transpose as blocks, and
    the eigenvalues of the random walk on the path. v_i = cos(a i), i = 0..2s-3, is an eigenvector: inside,
    (cos(a(i-1)) + cos(a(i+1))) / 2 = cos(a) cos(a i); at i = 0 the only neighbour has cos(a); at the other
    end cos(a(2s-4)) = cos(a) cos(a(2s-3)) if sin(a(2s-3)) = 0, so a = pi j / (2s - 3), j = 0..2s-3. On a
    bipartite graph eigenvalues come in pairs +-sigma; the singular values are the s - 1 positive ones.
    """
    return np.cos(np.pi * np.arange(s - 1) / (2 * s - 3))


def polynomial_factors(s):
    """dar with t = s - 1 under Eq. 6: 1 / (j + 1), j = 0..s-2.

    All pairs k < p are alike. A polynomial of degree j in the target has given context k the mean
        E[p^j | k] = (sum of p^j over p = k+1..s) / (s - k).
    The sum is a polynomial in k with leading term -k^(j+1) / (j+1) that vanishes at k = s; divided by s - k
    it has degree j and leading coefficient 1 / (j + 1). In the same way E[k^j | p], the mean over 1..p-1,
    leads with p^j / (j + 1). Both conditional expectations are thus triangular in the monomials, with
    1/(j + 1) on the diagonal. Their product, which is similar to M, has the eigenvalues 1/(j + 1)^2.
    """
    return 1 / np.arange(1, s)


def dar_tail(s, t):
    """Tail sum of sigma^4 for dar under Eq. 6, s >= 2t - 1: (6(2t^2+1) s - 13t^3 - 6t^2 - 8t - 9) / (18 t^3).

    sigma^4 sums to ||M||_F^2. Far from both ends M_pp' = (t - |p - p'|) / t^2, whose squares give the slope
    in s; the ends give the constant. t = 2: (6s - 17)/16, t = 3: (19s - 73)/81, t = 4: (66s - 323)/384.
    """
    return (6 * (2 * t * t + 1) * s - 13 * t ** 3 - 6 * t * t - 8 * t - 9) / (18 * t ** 3)


def closed_form(flag, objective, s, weighting="targets"):
    """-> what it is, singular values per class, tail sum over j > 1; None for each that is not known.

    `flag` is the name under which the objective is registered.
    """
    t, text, values = getattr(objective, "t", None), None, None
    if flag in ("ar", "prefix", "spans") or flag in ("dar", "mtp") and t == 1:
        count = s - 1
        if flag == "spans":  # any token may be hidden, unless there is but one way to hide so many
            n, spans = objective.counts(s)
            count = n if n == spans == s - n + 1 else s
        text, values = "all 1: each context has one target", np.ones(count)
    elif flag in ("mlm", "vl"):
        counts = objective.hidden_counts(s)                                    # {n: probability}
        mean, inverse = (sum(p * g(n) for n, p in counts.items()) for g in (float, lambda n: 1 / n))
        text = "1, then sqrt((s E[1/n] - 1)/(s-1)), n hidden; E[1/n] is 1/mean n if targets weigh the same"
        values = exchangeable(s, 1 / mean if weighting == "targets" else inverse)
    elif flag == "permutation":
        text = "1, then sqrt((H s/(s-1) - 1)/(s-1)), H = 1 + 1/2 + .. + 1/(s-1)"
        values = any_order_values(s, 1)
    elif flag == "segments":
        squares, area = s // objective.segment ** 2, objective.segment ** 2
        text = "as for permutation, of the m squares; 0 for what would tell apart the patches of one square"
        values = np.append(any_order_values(squares, 1), np.zeros(squares * (area - 1)))
    elif flag in ("blocks", "diffusion"):
        block = min(getattr(objective, "block", s - 1), s - 1)
        sizes = [block] * ((s - 1) // block) + [(s - 1) % block] * ((s - 1) % block > 0)
        text = "for each block of b tokens 1, then b-1 times sqrt((H - 1)/(b-1)), H = 1 + 1/2 + .. + 1/b"
        values = np.sort(np.concatenate([any_order_values(b) for b in sizes]))[::-1]
    elif flag == "dar" and weighting == "targets" and t == 2:
        text, values = "cos(pi j/(2s-3)), j = 0..s-2", path_cosines(s)
    elif flag == "dar" and weighting == "targets" and t == s - 1:
        text, values = "1/(j+1), j = 0..s-2", polynomial_factors(s)
    elif flag == "dar" and weighting == "targets" and isinstance(t, int) and s >= 2 * t - 1:
        return "tail (6(2t^2+1)s - 13t^3 - 6t^2 - 8t - 9)/(18t^3)", None, dar_tail(s, t)
    return text, values, None if values is None else (values[1:] ** 4).sum()


# ---------------------------------------------------------------------------- the toy model, token by token

def hidden_of(rho, s, name="--rho"):
    """round(rho s), when it leaves at least one visible and one hidden token of s. The samplers of training
    would bend any other ratio until it does, which is the theory of another ratio."""
    if s < 2:
        raise BadInput(f"--s {s} leaves nothing to predict; use --s 2 or more")
    hidden = round(rho * s) if math.isfinite(rho) else -1
    if not 1 <= hidden <= s - 1:
        raise BadInput(f"{name} {rho:g} of {s} tokens does not leave at least one hidden and one visible; "
                       f"use a ratio from {1 / s:.3g} to {1 - 1 / s:.3g}, or a larger --s")
    return hidden


def token_sets(r, s, T, literal=False):
    """The T tokens of each class and position, ids (r, s, T).

    Sec. 4.1.2 prints kTr + y, kTr + 2y, ..., kTr + Ty (`literal`), which lets classes share tokens once
    r, T >= 2. The theorem needs disjoint sets: kTr + (y - 1)T + {1..T}.
    """
    y, k, j = np.ogrid[1:r + 1, 1:s + 1, 1:T + 1]
    return k * T * r + (y * j if literal else (y - 1) * T + j)


def cooccurrence(objective, tokens):
    """P_M of D_sim by enumeration: an objective that can be listed, tokens (r, s, T). No position matrix.

    -> P_M (contexts, targets), without rows or columns of zeros; the class of each context (contexts,); the
    tokens that it holds, bool (contexts, number of ids).
    """
    (r, s, T), outcomes, contexts = tokens.shape, listed(objective, tokens.shape[1]), np.empty((0, 0))
    if outcomes is not None:
        contexts, q, _, _ = merge(*pairs(objective, *outcomes))
    count = sum(r * T ** int(n) for n in contexts.sum(1))
    if not 0 < count <= MOST_CONTEXTS:
        raise BadInput(f"r = {r}, s = {s}, T = {T} give {count or 'too many'} contexts and the limit is "
                       f"{MOST_CONTEXTS}; use a smaller --r, --s or --T, or the command spectrum, which "
                       "needs no enumeration")
    row, column, entries = {}, {}, []
    for S, weight in zip(contexts, q / q.sum()):
        for y in range(r):
            share = 1 / (r * T ** (int(S.sum()) + 1))                          # P(y) P(x_S | y) P(x_p | y)
            targets = [(x, weight[p] * share) for p in weight.nonzero()[0] for x in tokens[y, p].tolist()]
            for x_S in itertools.product(*tokens[y, S].tolist()):
                i, _ = row.setdefault(x_S, (len(row), y))
                entries += [(i, column.setdefault(x, len(column)), mass) for x, mass in targets]
    P, bags = np.zeros((len(row), len(column))), np.zeros((len(row), tokens.max() - tokens.min() + 1), bool)
    i, j, mass = zip(*entries)
    np.add.at(P, (i, j), mass)
    for x_S, (i, _) in row.items():
        bags[i, np.array(x_S, int) - tokens.min()] = True
    return P, np.array([y for _, y in row.values()]), bags


def normalised(P):
    """Abar = P_M / sqrt(P_C P_G)."""
    return P / np.sqrt(P.sum(1, keepdims=True) * P.sum(0))
