"""Group indices f, and the two attention masks that follow from them (paper, Eq. 24).

A pretraining objective is a rule that gives each token i = 1..S of a sequence a group index f(i):

    f = 0        padding: never seen, never predicted
    f = 1        given: context only, never a target
    f = 2, 3 ..  predicted in this order; the tokens of one group are predicted in parallel

    context of target i = { j : 0 < f(j) <  f(i) }    query_mask,   M_g of Eq. 24
    content of token i  = { j : 0 < f(j) <= f(i) }    content_mask, M_h of Eq. 24

Draw it: python masks.py dar --t 2 --length 8
"""

import torch
from torch import Tensor

# ---------------------------------------------------------------------------- group indices

def ar_groups(length):
    """Autoregressive, L_ar: f = 1, 2, ..., S. Returns (S,)."""
    return torch.arange(1, length + 1)


def dar_groups(length, t, first):
    """Diversity-enhanced autoregressive, L_semi,t (Eq. 6): a first group of `first` tokens, then groups of `t`.

    f(i) = 1 + max(0, ceil((i - first) / t)), i from 1. `first`, and `t` too, is an int, giving (S,), or a LongTensor (B,),
    giving (B, S). With `first` uniform in 1..t, every pair (context 1..k, target p), k < p <= min(k + t, S), is equally
    likely. t = 1 is the autoregressive case.
    """
    first, t = torch.as_tensor(first)[..., None], torch.as_tensor(t)[..., None]
    if bool((t < 1).any() or (first < 1).any()):
        raise ValueError(f"groups need t >= 1 and a first group of at least 1 token, got t = {t[..., 0].tolist()}, "
                       f"first = {first[..., 0].tolist()}")
    i = torch.arange(1, length + 1)
    return 1 + ((i - first + t - 1) // t).clamp(min=0)


def masked_groups(batch, length, ratio, generator=None):
    """Masked, L_m (a ratio) and variable-length masked, L_vm of Eq. 5 (a range): 1 = visible, 2 = masked. (B, S).

    `ratio` is a float or (low, high), drawn uniformly anew for each sequence. A ratio rho hides exactly round(rho S)
    tokens, at least 1 and at most S - 1, every subset of that size being equally likely.
    """
    low, high = (ratio, ratio) if isinstance(ratio, (int, float)) else ratio
    if not 0 < low <= high <= 1:
        raise ValueError(f"a mask ratio lies in (0, 1] and a range is low,high: got {low},{high}")
    # The ratio is drawn even when the range is a point, so that a range with equal ends repeats the fixed ratio exactly.
    scores = torch.rand(batch, length, generator=generator)
    rho = low + (high - low) * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    hidden = hidden_count(rho, length)                                        # (B, 1)
    rank = scores.argsort(dim=1).argsort(dim=1)                               # (B, S) a random permutation of 0..S-1
    return 1 + (rank < hidden).long()


def hidden_count(rho, length):
    """How many of `length` tokens the ratio `rho` (a number or a double tensor) hides: round(rho S) within 1..S-1."""
    if isinstance(rho, Tensor):
        return (rho * length).round().clamp(1, length - 1).long()
    return min(max(round(rho * length), 1), length - 1)


# ---------------------------------------------------------------------------- attention masks

def content_mask(groups):
    """M_h of Eq. 24. groups (..., S) -> bool (..., S, S), True where row i may attend to column j: 0 < f(j) <= f(i)."""
    return (groups[..., None, :] > 0) & (groups[..., None, :] <= groups[..., :, None])


def query_mask(groups):
    """M_g of Eq. 24. groups (..., S) -> bool (..., S, S), True where row i may attend to column j: 0 < f(j) < f(i).

    The rows of padding and of the first group are all False: they see nothing and are never scored.
    """
    return (groups[..., None, :] > 0) & (groups[..., None, :] < groups[..., :, None])


def by_group(groups, targets):
    """The same masks for long sequences: put in the order of f, what any row sees is a prefix, so a length says it all.

    groups (B, S), targets (B, n) positions. Returns order (B, S), the positions by f with padding at the end; rows (B, n),
    the order of the targets by f; seen (B, S + n), of how many of the ordered tokens each ordered content row and then each
    ordered query row sees the first. Rows that see nothing - padding is one - are given something to see all the same: they
    are never scored, and nothing sees them.
    """
    f, order = groups.masked_fill(groups == 0, torch.iinfo(groups.dtype).max).sort(dim=1, stable=True)
    wanted, rows = groups.gather(1, targets).sort(dim=1, stable=True)
    content, query = torch.searchsorted(f, f, right=True), torch.searchsorted(f, wanted)   # f(j) <= f(i), f(j) < f(i)
    return order, rows, torch.cat([content, query], dim=1).clamp(min=1)


def draw(groups):
    """f and both masks of one sequence, groups (S,), as text: rows attend, columns are attended to."""
    S = len(groups)
    cells = [[["■ " if seen else "· " for seen in row] for row in mask(groups).tolist()]
             for mask in (content_mask, query_mask)]
    gap = " " * 6
    lines = ["position i  " + " ".join(f"{i:2d}" for i in range(1, S + 1)),
             "group f(i)  " + " ".join(f"{f:2d}" for f in groups.tolist()), "",
             f"{'M_h, content stream':<{2 * S + 4}}{gap}M_g, query stream"]
    for i in range(S):
        note = f"predicted in step {groups[i] - 1}" if groups[i] > 1 else "given"
        lines.append(f"{i + 1:3d} {''.join(cells[0][i])}{gap}{i + 1:3d} {''.join(cells[1][i])} {note}")
    return "\n".join(lines)
