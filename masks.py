"""The one idea: a group index f for every token. From it follow who sees whom, and what is predicted.

A pretraining objective is a rule that gives each token i = 1..S of a sequence a group index f(i):

    f = 0        padding: never seen, never predicted
    f = 1        given: context only, never a target
    f = 2, 3 ..  predicted in this order; the tokens of one group are predicted in parallel

One rule gives every attention mask: a row with limit c sees { j : 0 < f(j) < c } (paper, Eq. 24).

    query of token p     limit f(p)        M_g: everything before its group
    content of token i   limit f(i) + 1    M_h: its own group too
    a query with a cut   limit c           token p is asked for from a shorter context
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from util import BadInput

# ---------------------------------------------------------------------------- group indices

def ar_groups(length):
    """Autoregressive, L_ar: f = 1, 2, ..., S. Returns (S,)."""
    return torch.arange(1, length + 1)


def dar_groups(length, t, first):
    """Diversity-enhanced autoregressive, L_semi,t (Eq. 6): a first group of `first` tokens, then groups of t.

    Ints give (S,), LongTensors (B,) give (B, S). With `first` uniform in 1..t every pair (context 1..k,
    target p) with k < p <= min(k + t, S) is equally likely.
    """
    first, t = torch.as_tensor(first)[..., None], torch.as_tensor(t)[..., None]
    i = torch.arange(1, length + 1)
    return 1 + ((i - first + t - 1) // t).clamp(min=0)  # 1 + ceil((i - first) / t), and 1 in the first group


def masked_groups(batch, length, ratio, generator=None):
    """Masked, L_m (a ratio), and variable-length masked, L_vm of Eq. 5 (a range): 1 visible, 2 hidden. (B, S)

    A range (low, high) is what each sequence draws its own ratio from. All subsets of hidden_count tokens are
    equally likely.
    """
    low, high = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    scores = torch.rand(batch, length, generator=generator)
    # The ratio is drawn even where the range is a point, so that equal ends repeat the fixed ratio exactly.
    rho = low + (high - low) * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    rank = scores.argsort(dim=1).argsort(dim=1)  # of each token in a random order of its sequence: 0..S-1
    return 1 + (rank < hidden_count(rho, length)).long()


def hidden_count(rho, length):
    """How many of `length` tokens a ratio, a number or a tensor, hides: round(rho S), within 1..S-1."""
    return (torch.as_tensor(rho, dtype=torch.float64) * length).round().clamp(1, length - 1).long()


# ---------------------------------------------------------------------------- attention masks

def sees(groups, limits):
    """Row i sees column j where 0 < f(j) < limit(i). groups (..., S), limits (..., n) -> bool (..., n, S)."""
    return (groups[..., None, :] > 0) & (groups[..., None, :] < limits[..., :, None])


def content_mask(groups):
    """M_h of Eq. 24: a token sees its own group and what comes before. (..., S) -> bool (..., S, S)."""
    return sees(groups, groups + 1)


def query_mask(groups, cuts=None):
    """M_g of Eq. 24: a query sees what comes before its cut, by default f. (..., S) -> bool (..., n, S).

    The rows of padding and of the first group see nothing; they are never scored.
    """
    return sees(groups, groups if cuts is None else cuts)


# ---------------------------------------------------------------------------- what an objective may say

class Queries(NamedTuple):
    """What is asked of B sequences: row (p, c) predicts token p from its context { j : 0 < f(j) < c }."""

    targets: Tensor  # (B, n) positions p, from 0
    cuts: Tensor     # (B, n) c
    weight: Tensor   # (B, n) float32, how much the row counts in the loss; 0 for filler, which nobody scores


def queries_of(groups, weight, n):
    """Queries for the tokens with weight (B, S) > 0, each at the cut c = f(p), and filler up to n rows."""
    wanted = weight > 0
    most = int(wanted.sum(1).max())
    if most > n:
        raise BadInput(f"a sequence asks for {most} tokens, max_targets allows {n}; is one given, f = 1?")
    targets = (~wanted).long().argsort(dim=1, stable=True)[:, :n]
    return Queries(targets, groups.gather(1, targets), weight.gather(1, targets))


def option(default, help):
    """A field of an objective, which is also the flag --NAME of every command that takes an objective."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Objective:
    """An objective is a frozen dataclass whose fields are its options. Only `groups` must be written.

    `left_to_right`, `bound` and `decoding` say what evaluation needs; each returns None where there is no
    such thing.
    """

    paper = ""           # name and source
    one_stream = None    # the one-stream path that can run it, "causal" or "mask"; None: two streams only
    attention = "full"   # what its network is probed with: "causal" where it only knows the past
    generation = "left"  # by default: "left" to right, or "confident", the surest tokens of `decoding` first
    images_only = False  # whether it speaks of squares of patches

    def groups(self, batch, length, generator=None):
        """Draw f for `batch` sequences -> LongTensor (batch, length)."""
        raise NotImplementedError(f"{type(self).__name__} does not define groups")

    def queries(self, groups):
        """What is asked under f (B, S) -> Queries of n = max_targets(S) rows. By default every p with
        f(p) > 1, at the cut f(p), with the weight 1."""
        return queries_of(groups, (groups > 1).float(), self.max_targets(groups.shape[1]))

    def max_targets(self, length):
        """The query rows of every sequence, filler included: a static shape."""
        return length - 1

    def min_targets(self, length):
        """The fewest tokens with f > 1: on the mae path the encoder has room for all others."""
        return 1

    def outcomes(self, length, limit=200_000):
        """The distribution of f: (f LongTensor (K, S), probability double (K,)), by default that of 100,000
        draws. None where there are more than `limit` outcomes."""
        f = self.groups(100_000, length, torch.Generator().manual_seed(0))
        f, counts = f.unique(dim=0, return_counts=True)
        return f, counts.double() / counts.sum()

    def left_to_right(self, length, path):
        """How the model computes P(x_p | x_1 .. x_{p-1}), p = 2..S (Eq. 2), the way it was trained:
        {regime: f (passes, length)}. In each regime every p has its whole prefix and nothing else as its
        context in some pass, of which the first counts. None where there is no exact likelihood."""

    def chain(self, length):
        """The positions (length,) in the order of `left_to_right`, of which the first is given."""
        return torch.arange(length)

    def bound(self, batch, length, generator=None):
        """Draw f and weights (B, S) with E sum_p weight_p * -log P(x_p | context) >= -log P(x_2.. | x_1)."""

    def decoding(self, order, given):
        """One step of generation in the objective's own way. order (L,): 1, 2, .. as the tokens became known,
        of which the first `given` were not generated, and 0 where a token is missing -> f (L,), whose highest
        group is asked for. None where it only goes from left to right."""

    def check(self, length):
        """Raise BadInput where the options do not fit sequences of this length."""
        if length < 2:
            raise BadInput(f"a sequence of length {length} leaves nothing to predict; give 2 or more")


class AnyOrder(Objective):
    """What objectives share that predict any hidden tokens, f = 2, from the visible ones, f = 1.

    Such a network can uncover x_2 .. x_S, given x_1, in any order o. By Jensen the mixture P = E_o P_o has
    -log P <= E_o sum_k -log P(x_{o_k} | x_1, x_{o_1} .. x_{o_{k-1}}), which is
    E_n E_mask (S - 1)/n sum_hidden -log P(x_p | visible), n uniform in 1..S-1.
    """

    one_stream = "mask"

    def bound(self, batch, length, generator=None):
        n = stratified(batch, length - 1, generator)[:, None]
        hidden = random_order(batch, length, generator) >= length - n
        return 1 + hidden.long(), hidden * ((length - 1) / n)

    def decoding(self, order, given):
        return 1 + (order == 0).long()


def random_order(batch, length, generator=None):
    """0 for x_1, which is given, then a uniform permutation of 1..S-1. (B, S)"""
    rest = 1 + torch.rand(batch, length - 1, generator=generator).argsort(dim=1)
    return torch.cat([torch.zeros_like(rest[:, :1]), rest], dim=1)


def stratified(batch, n, generator=None):
    """Numbers 1..n, uniform over the batch: one from each of `batch` equal parts of that range. (B,)"""
    place = torch.arange(batch) + torch.rand(batch, generator=generator, dtype=torch.float64)
    return 1 + (place * n / batch).long().clamp(max=n - 1)


def equally_likely(*groups, shares=(1,)):
    """Outcomes: the rows of each of `groups` (K, S) divide its share of the probability evenly."""
    each = [torch.full((len(f),), share / len(f), dtype=torch.float64) for f, share in zip(groups, shares)]
    return torch.cat(groups), torch.cat(each)


# ---------------------------------------------------------------------------- as text

def show(value):
    """An option's value as one types it: 0.15 or 0.15,0.3."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def draw(groups, queries, words=None):
    """f (S,) and both masks; `queries` is [(position, cut, weight), ..], and each row ends with its word."""
    def row(i, limit):
        seen = sees(groups, torch.tensor([limit]))[0].tolist()
        word = f"  {words[i]}" if words else ""
        return f"{i + 1:3d} " + " ".join("■" if cell else "·" for cell in seen) + word

    f = groups.tolist()
    lines = ["position i  " + " ".join(f"{i:2d}" for i in range(1, len(f) + 1)),
             "group f(i)  " + " ".join(f"{group:2d}" for group in f),
             "", "M_h, content stream: what token i may read"]
    lines += [row(i, group + 1) for i, group in enumerate(f)]
    lines += ["", "M_g, query stream: what token i is predicted from"]
    for p, c, weight in queries:
        lines.append(row(p, c) + (f"  cut {c}, weight {weight:.3g}" if (c, weight) != (f[p], 1) else ""))
    return "\n".join(lines)
