"""The spectrum of an objective: from f, its queries and their weights to the singular values of the theory.

An objective pairs a context X with a target X+. P_M is their joint distribution, P_C and P_G are its
marginals, and sigma_j is the j-th singular value of Abar = P_M / sqrt(P_C P_G) (Sec. 3.2). The toy model
D_sim (Sec. 4.1.2) has r classes, s positions and T values for each class and position; given the class,
tokens are independent and uniform. There everything follows from q(S, p), how often the positions S are the
context of position p, and q follows from the f that training draws: no objective needs a theory of its own.
"""

import itertools
import math

import numpy as np

from masks import Objective, sees
from util import BadInput

MOST_CONTEXTS = 20_000  # of the enumerated toy model: some seconds
DRAWS = 100_000         # of f, where nobody wrote down its distribution: Objective.outcomes


# ---------------------------------------------------------------------------- pairs (context, target)

def pairs(objective, s, told=False):
    """All pairs -> contexts S, bool (n, s), and q (n, s): how often S is the context of position p, sum 1.

    `told` is for networks that are told the position they predict: p belongs to the context, which then has
    2 s columns. BadInput: too many f to list.
    """
    objective.check(s)
    outcomes = objective.outcomes(s)
    if outcomes is None:
        raise BadInput(f"{objective} has too many outcomes to list at s = {s}; use a smaller s")
    contexts, q = pairs_of(objective, *outcomes, told)
    return contexts, q / q.sum()


def pairs_of(objective, f, probability, told=False):
    """The same from the distribution of f (K, s), (K,). The sum of q is that of the queries' weights."""
    targets, cuts, weight = objective.queries(f)                              # (K, n) each
    asked, s = weight > 0, f.shape[1]
    draw = asked.nonzero()[:, 0].numpy()                                      # (N,) which f a pair comes from
    p, mass = targets[asked].numpy(), (probability[:, None] * weight)[asked].numpy()          # (N,)
    contexts = sees(f, cuts)[asked].numpy()                                   # (N, s)
    if told:
        contexts = np.hstack([contexts, np.eye(s, dtype=bool)[p]])
    _, first, which = np.unique(np.packbits(contexts, axis=1), axis=0, return_index=True, return_inverse=True)
    q = np.zeros((len(first), s))
    np.add.at(q, (which.reshape(-1), p), mass)
    if sampled(objective) and f.max() > 2:
        # Of a context that came up once, draws show one of its targets: the spectrum would look flat.
        # (Where all f are 1 or 2 one draw shows all targets.)
        met = np.unique(np.stack([which.reshape(-1), draw]), axis=1)
        times = np.bincount(met[0], DRAWS * probability.numpy()[met[1]])      # how often each context came up
        if q[times < 1.5].sum() > 0.001 * q.sum():
            raise BadInput(f"draws of {objective} meet too many contexts only once at s = {s}; use a smaller "
                           "s, or write its outcomes()")
    return contexts[first], q


def sampled(objective):
    """Whether the distribution of f is that of many draws."""
    return type(objective).outcomes is Objective.outcomes


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


def spectrum(objective, s, flag=None, told=False):
    """What the theory says about one objective on sequences of s tokens -> dict. `told` as for `pairs`.

    Exact where all f can be listed; elsewhere the closed form of the objective registered as `flag`. In it
    "tail_sigma4_per_class" is the sum of sigma_j^4 over j > 1 within a class: where no context is empty, a
    share 1/r of the sum over j > r. BadInput: neither is known, or too few draws.
    """
    objective.check(s)
    text, values, tail = CLOSED[flag](objective, s) if flag in CLOSED and not told else NO_FORM
    outcomes = objective.outcomes(s)
    if outcomes is None and values is None:
        raise BadInput(f"{objective} has too many outcomes to list at s = {s}, and no closed form; use a "
                       "smaller s")
    if outcomes is None:
        result = {"method": "closed form", "singular_values": values}
    else:
        contexts, q = pairs_of(objective, *outcomes, told)
        M, targets = position_matrix(q), q.sum(0) > 0
        result = {"method": f"{DRAWS:,} draws" if sampled(objective) else "exact",
                  "M": M, "singular_values": singular_values(M, targets)}
        if not contexts.any(1).all():
            others = position_matrix(q, contexts.any(1))
            result["singular_values_other_classes"] = singular_values(others, targets)
    return {**result, "tail_sigma4_per_class": float((result["singular_values"][1:] ** 4).sum()),
            "closed_form": values, "closed_form_tail": tail, "closed_form_text": text}


# ---------------------------------------------------------------------------- closed forms

NO_FORM = None, None, None


def form(text, values):
    """A closed form: in words, its singular values per class, its tail sum over j > 1."""
    return text, values, float((values[1:] ** 4).sum())


def exchangeable(s, inverse):
    """Values per class when all pairs (S, p) of one size weigh the same: n of s positions are hidden, and
    `inverse` is E[1/n] over the pairs.

    q = q_C(S) / n and q_G = 1/s give M_pp = E[1/n], M_pp' = E[(n-1)/n] / (s-1): eigenvalues 1 and, s - 1
    times, M_pp - M_pp' = (s E[1/n] - 1) / (s - 1). With one n this is Theorem 4.2's (s - n) / (n (s - 1)).
    """
    return np.append(1, np.full(s - 1, math.sqrt(max(s * inverse - 1, 0) / max(s - 1, 1))))


def any_order(s, given=0):
    """The same where each of n = 1 .. s - given weighs alike, as in a uniform order of s positions of which
    the first `given` are not predicted: E[1/n] = H / (s - given), H = 1 + 1/2 + .. + 1/(s - given)."""
    return exchangeable(s, (1 / np.arange(1, s + 1 - given)).mean())


def dar_tail(s, t):
    """Tail sum of sigma^4 for dar under Eq. 6, s >= 2t - 1: (6(2t^2+1) s - 13t^3 - 6t^2 - 8t - 9) / (18 t^3).

    sigma^4 sums to ||M||_F^2. Far from both ends M_pp' = (t - |p - p'|) / t^2, whose squares give the slope
    in s; the ends give the constant. t = 2: (6s - 17)/16, t = 3: (19s - 73)/81, t = 4: (66s - 323)/384.
    """
    return (6 * (2 * t * t + 1) * s - 13 * t ** 3 - 6 * t * t - 8 * t - 9) / (18 * t ** 3)


def ones_form(objective, s):
    return form("all 1: each context has one target", np.ones(s - 1))


def spans_form(objective, s):
    n, spans = objective.counts(s)  # any token may be hidden, unless there is but one way to hide so many
    return form("all 1: each context has one target", np.ones(n if n == spans == s - n + 1 else s))


def dar_form(objective, s):
    """Eq. 6. The proofs for t = 2 and t = s - 1 are in THEORY.md."""
    t = objective.t
    if t == 1:
        return ones_form(objective, s)
    if t == 2:
        return form("cos(pi j/(2s-3)), j = 0..s-2", np.cos(np.pi * np.arange(s - 1) / (2 * s - 3)))
    if t == s - 1:
        return form("1/(j+1), j = 0..s-2", 1 / np.arange(1, s))
    if isinstance(t, int) and s >= 2 * t - 1:
        return "tail (6(2t^2+1)s - 13t^3 - 6t^2 - 8t - 9)/(18t^3)", None, dar_tail(s, t)
    return NO_FORM


def masked_form(objective, s):
    mean = sum(probability * n for n, probability in objective.hidden_counts(s).items())
    return form("1, then sqrt((s/n - 1)/(s-1)), n hidden on average", exchangeable(s, 1 / mean))


def permutation_form(objective, s):
    return form("1, then sqrt((H s/(s-1) - 1)/(s-1)), H = 1 + 1/2 + .. + 1/(s-1)", any_order(s, 1))


def blocks_form(objective, s):
    size = min(getattr(objective, "block", s - 1), s - 1)  # diffusion is one block
    sizes = [size] * ((s - 1) // size) + [(s - 1) % size] * ((s - 1) % size > 0)
    return form("for each block of b tokens 1, then b-1 times sqrt((H - 1)/(b-1)), H = 1 + 1/2 + .. + 1/b",
                np.sort(np.concatenate([any_order(b) for b in sizes]))[::-1])


def segments_form(objective, s):
    area = objective.segment ** 2
    return form("as for permutation, of the m squares; 0 for what would tell apart the patches of one square",
                np.append(any_order(s // area, 1), np.zeros(s // area * (area - 1))))


CLOSED = {"ar": ones_form, "prefix": ones_form, "spans": spans_form, "dar": dar_form, "mlm": masked_form,
          "vl": masked_form, "permutation": permutation_form, "blocks": blocks_form, "diffusion": blocks_form,
          "segments": segments_form,
          "mtp": lambda objective, s: ones_form(objective, s) if objective.t == 1 else NO_FORM}


# ---------------------------------------------------------------------------- the toy model, token by token

def hidden_of(rho, s):
    """round(rho s), where it leaves at least one visible and one hidden token of s; else BadInput."""
    hidden = round(rho * s) if math.isfinite(rho) else -1
    if s < 2 or not 1 <= hidden <= s - 1:
        raise BadInput(f"--rho {rho:g} of {s} tokens does not leave at least one hidden and one visible; use "
                       f"a ratio from {1 / s:.3g} to {1 - 1 / s:.3g} and --s 2 or more")
    return hidden


def token_sets(r, s, T, literal=False):
    """The T tokens of each class and position, ids (r, s, T).

    Sec. 4.1.2 prints kTr + y, kTr + 2y, ..., kTr + Ty (`literal`), which lets classes share tokens once
    r, T >= 2. The theorem needs disjoint sets: kTr + (y - 1)T + {1..T}.
    """
    y, k, j = np.ogrid[1:r + 1, 1:s + 1, 1:T + 1]
    return k * T * r + (y * j if literal else (y - 1) * T + j)


def cooccurrence(objective, tokens):
    """P_M of D_sim by enumeration, without a position matrix. tokens (r, s, T).

    -> P_M (contexts, targets), without rows or columns of zeros; the class of each context (contexts,); the
    tokens that it holds, bool (contexts, number of ids). BadInput: too many contexts.
    """
    (r, s, T), (contexts, q) = tokens.shape, pairs(objective, tokens.shape[1])
    count = sum(r * T ** int(n) for n in contexts.sum(1))
    if count > MOST_CONTEXTS:
        raise BadInput(f"r = {r}, s = {s}, T = {T} give {count} contexts and the limit is {MOST_CONTEXTS}; "
                       "use a smaller --r, --s or --T, or the command spectrum, which needs no enumeration")
    row, column, entries = {}, {}, []
    for S, weight in zip(contexts, q):
        for y in range(r):
            share = 1 / (r * T ** (int(S.sum()) + 1))                         # P(y) P(x_S | y) P(x_p | y)
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
    counts = {}
    for value in (f"{value:.6f}" for value in values if value > 1e-6):
        counts[value] = counts.get(value, 0) + 1
    shown = [f"{value} x {count}" if count > 1 else value for value, count in counts.items()]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "..", shown[-1]])
