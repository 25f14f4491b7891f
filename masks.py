"""Group indices f, and the two attention masks that follow from them (paper, Eq. 24).

A pretraining objective is a rule that gives each token i = 1..S of a sequence a group index f(i):

    f = 0        padding: never seen, never predicted
    f = 1        given: context only, never a target
    f = 2, 3 ..  predicted in this order; the tokens of one group are predicted in parallel

    context of target i = { j : 0 < f(j) <  f(i) }    query_mask,   M_g of Eq. 24
    content of token i  = { j : 0 < f(j) <= f(i) }    content_mask, M_h of Eq. 24

A query may also ask for token p at another cut c than f(p): it then sees { j : 0 < f(j) < c }.

Draw them: python objectives.py dar --t 2 --length 8
"""

from itertools import zip_longest

import torch
from torch import Tensor

# ---------------------------------------------------------------------------- group indices

def ar_groups(length):
    """Autoregressive, L_ar: f = 1, 2, ..., S. Returns (S,)."""
    return torch.arange(1, length + 1)


def dar_groups(length, t, first):
    """Diversity-enhanced autoregressive, L_semi,t (Eq. 6): a first group of `first` tokens, then of `t` each.

    f(i) = 1 + max(0, ceil((i - first) / t)), i from 1. `first`, and `t` too, is an int, giving (S,), or a
    LongTensor (B,), giving (B, S). With `first` uniform in 1..t, every pair (context 1..k, target p),
    k < p <= min(k + t, S), is equally likely. t = 1 is the autoregressive case.
    """
    first, t = torch.as_tensor(first)[..., None], torch.as_tensor(t)[..., None]
    if bool((t < 1).any() or (first < 1).any()):
        raise ValueError("groups need t >= 1 and a first group of at least 1 token, got "
                         f"t = {t[..., 0].tolist()}, first = {first[..., 0].tolist()}")
    i = torch.arange(1, length + 1)
    return 1 + ((i - first + t - 1) // t).clamp(min=0)


def masked_groups(batch, length, ratio, generator=None):
    """Masked, L_m (a ratio), and variable-length masked, L_vm of Eq. 5 (a range): 1 visible, 2 masked. (B, S)

    `ratio` is a float or (low, high), drawn uniformly anew for each sequence. A ratio rho hides exactly
    round(rho S) tokens, at least 1 and at most S - 1, every subset of that size being equally likely.
    """
    low, high = (ratio, ratio) if isinstance(ratio, (int, float)) else ratio
    if not 0 < low <= high <= 1:
        raise ValueError(f"a mask ratio lies in (0, 1] and a range is low,high: got {low},{high}")
    # The ratio is drawn even where the range is a point, so that equal ends repeat the fixed ratio exactly.
    scores = torch.rand(batch, length, generator=generator)
    rho = low + (high - low) * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    hidden = hidden_count(rho, length)                                        # (B, 1)
    rank = scores.argsort(dim=1).argsort(dim=1)                               # (B, S) a permutation of 0..S-1
    return 1 + (rank < hidden).long()


def hidden_count(rho, length):
    """How many of `length` tokens a ratio (a number or a double tensor) hides: round(rho S) within 1..S-1."""
    if isinstance(rho, Tensor):
        return (rho * length).round().clamp(1, length - 1).long()
    return min(max(round(rho * length), 1), length - 1)


# ---------------------------------------------------------------------------- attention masks

def content_mask(groups):
    """M_h of Eq. 24. groups (..., S) -> bool (..., S, S): row i may attend to column j, 0 < f(j) <= f(i)."""
    return (groups[..., None, :] > 0) & (groups[..., None, :] <= groups[..., :, None])


def query_mask(groups, cuts=None):
    """M_g of Eq. 24. groups (..., S), cuts (..., n) -> bool (..., n, S): query row i may attend to column j,
    0 < f(j) < c(i), by default c = f.

    The default rows of padding and of the first group are all False: they see nothing and are never scored.
    """
    cuts = groups if cuts is None else cuts
    return (groups[..., None, :] > 0) & (groups[..., None, :] < cuts[..., :, None])


def by_group(groups, targets, cuts):
    """The same masks for long sequences: in the order of f, what any row sees is a prefix, told by a length.

    groups (B, S); targets and cuts (B, n). Returns order (B, S), the positions by f with padding at the end;
    rows (B, n), the order of the queries by cut; seen (B, S + n), of how many of the ordered tokens each
    ordered content row and then each ordered query row sees the first. Rows that see nothing - padding is one
    - are given something to see all the same: they are never scored, and nothing sees them.
    """
    f, order = groups.masked_fill(groups == 0, torch.iinfo(groups.dtype).max).sort(dim=1, stable=True)
    wanted, rows = cuts.sort(dim=1, stable=True)
    content, query = torch.searchsorted(f, f, right=True), torch.searchsorted(f, wanted)  # f(j) <= f(i), < c
    return order, rows, torch.cat([content, query], dim=1).clamp(min=1)


# ---------------------------------------------------------------------------- drawn as text

def draw(groups, queries=None):
    """f and both masks of one sequence, groups (S,), as text: rows attend, columns are attended to.

    Every token has a row in M_g, unless `queries`, [(position, cut, weight), ..], say what is asked.
    """
    S, f = len(groups), groups.tolist()

    def row(i, seen, note=""):
        return f"{i + 1:3d} " + "".join("■ " if cell else "· " for cell in seen) + note

    content = [row(i, seen) for i, seen in enumerate(content_mask(groups).tolist())]
    if queries is None:
        notes = [f" predicted in step {g - 1}" if g > 1 else " given" if g else " left out" for g in f]
        asked = [row(i, seen, notes[i]) for i, seen in enumerate(query_mask(groups).tolist())]
    else:
        asked = [row(p, [0 < group < c for group in f], f" cut {c}, weight {weight:.3g}")
                 for p, c, weight in queries]
    width, gap = 2 * S + 4, " " * 6
    rows = zip_longest(content, asked, fillvalue="")
    return "\n".join([
        "position i  " + " ".join(f"{i:2d}" for i in range(1, S + 1)),
        "group f(i)  " + " ".join(f"{group:2d}" for group in f), "",
        f"{'M_h, content stream':<{width}}{gap}M_g, query stream",
        *(f"{left:<{width}}{gap}{right}".rstrip() for left, right in rows)])
