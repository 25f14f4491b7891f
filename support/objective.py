"""What every objective offers to all that trains, evaluates, counts and draws it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from masks import ar_groups
from support.cli import BadInput


class Queries(NamedTuple):
    """What is asked of B sequences: row (p, c) predicts token p from its context {j : 0 < f(j) < c}."""

    targets: Tensor  # (B, n) positions p, from 0
    cuts: Tensor     # (B, n) c
    weight: Tensor   # (B, n) float32, how much the row counts in the loss; 0 for filler, which nobody scores


def asked(groups, weight, n):
    """Queries for the tokens with weight (B, S) > 0, each at the cut c = f(p), and filler up to n.

    Raises BadInput (a ValueError) where a sequence asks for more than the n tokens that max_targets promises.
    """
    wanted = weight > 0
    most = int(wanted.sum(1).max())
    if most == groups.shape[1]:  # the first of them has nothing before it
        raise BadInput("every token of a sequence is asked for, so that some would see nothing; begin with a "
                       "group of f = 1, which is given")
    if most > n:
        raise BadInput(f"a sequence asks for {most} tokens, and max_targets promises at most {n}; let it "
                       f"return {most} or more")
    targets = (~wanted).long().argsort(dim=1, stable=True)[:, :n]
    return Queries(targets, groups.gather(1, targets), weight.gather(1, targets))


def option(default, help, type=None):
    """A dataclass field that is also a flag: what --help says of it, and how its text is read, as argparse's
    `type`. Without that the default's own type reads it, as it does for a plain `name: int = 2`."""
    return field(default=default, metadata={"help": help, "type": type})


@dataclass(frozen=True)
class Objective:
    """An objective is a frozen dataclass. Its fields are its options: the flag --NAME sets the field NAME.

    Only `groups` must be defined. Where other things are asked than every p with f(p) > 1, at the cut f(p)
    and the weight 1, `queries` says what, and `max_targets` where that can be more than S - 1 rows.
    """

    paper = ""           # name and source
    one_stream = None    # the one-stream path that can run it, "causal" or "mask"; None: two streams only
    attention = "full"   # what its network is probed with: "causal" where it only knows the past, or "full"
    generation = "left"  # by default: "left" to right, or "confident", the surest tokens of `decoding` first
    images_only = False  # whether it speaks of squares of patches

    def groups(self, batch, length, generator=None):
        """Draw f for `batch` sequences -> LongTensor (batch, length)."""
        raise TypeError(f"{type(self).__name__} does not define groups(batch, length, generator)")

    def queries(self, groups):
        """What is asked under f (B, S) -> Queries of n = max_targets(S) rows."""
        return asked(groups, (groups > 1).float(), self.max_targets(groups.shape[1]))

    def max_targets(self, length):
        """The query rows of every sequence, filler included: the static shape of the output layer's input."""
        return length - 1

    def min_targets(self, length):
        """The fewest tokens with f > 1. On the mae path the encoder has room for all others."""
        return 1

    def outcomes(self, length, limit=200_000):
        """The distribution of f: (f LongTensor (K, S), probability double (K,)). None where there are more
        than `limit` outcomes or nobody wrote them down; the theory then samples `groups`."""

    def left_to_right(self, length, path):
        """How to compute P(x_p | x_1 .. x_{p-1}) for p = 2..S (Eq. 2) the way the model was trained.

        Returns {regime: LongTensor (passes, length)}: group indices such that every p = 2..S has the whole
        prefix and nothing else as its context (`objectives.scores_next`) in a pass of each regime, of which
        the first counts; or None where the objective has no exact left-to-right likelihood.
        """

    def bound(self, batch, length, generator=None):
        """Draw f (B, S) and weights (B, S) with a loss whose mean bounds -log P(x_2 .. x_S | x_1) from above:
        E sum_p weight_p * -log P(x_p | context of p). None where no such bound is known."""

    def orders(self, batch, length, generator=None):
        """Draw orders of x_2 .. x_S, one a sequence -> f (B, passes, S) and asked, bool (B, passes, S): every
        token is asked in one pass, where its context is x_1 and what comes before it in that order. `bound`
        estimates the mean over orders of the sum over asked of -log P. None as there."""

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

    Such a network can uncover x_2 .. x_S, given x_1, in any order o. The mixture P = E_o P_o is one
    distribution, and by Jensen -log P <= E_o sum_k -log P(x_{o_k} | x_1, x_{o_1} .. x_{o_{k-1}}). Where n
    tokens are still hidden, they are a uniform subset and the next one is uniform among them; so the right
    side is also E_n E_mask (S - 1)/n sum_hidden -log P(x_p | visible), n uniform in 1..S-1.
    """

    one_stream = "mask"

    def bound(self, batch, length, generator=None):
        n = stratified(batch, length - 1, generator)[:, None]
        hidden = random_order(batch, length, generator) >= length - n
        return 1 + hidden.long(), hidden * ((length - 1) / n)

    def orders(self, batch, length, generator=None):
        order, step = random_order(batch, length, generator)[:, None], torch.arange(1, length)[:, None]
        return 1 + (order >= step).long(), order == step

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


def draw_queries(objective, path, batch, length, generator=None):
    """Draw f for `batch` sequences -> f (batch, length) and its Queries. BadInput where one of model.PATHS
    cannot compute them, or nothing could."""
    groups = objective.groups(batch, length, generator)
    if not isinstance(groups, Tensor) or groups.dtype != torch.long or groups.shape != (batch, length):
        is_tensor = isinstance(groups, Tensor)
        found = f"{groups.dtype} of {tuple(groups.shape)}" if is_tensor else f"a {type(groups).__name__}"
        raise BadInput(f"{objective}: groups gave {found} where torch.int64 of {(batch, length)} was due")
    return groups, checked_queries(objective, path, groups)


def checked_queries(objective, path, groups):
    """The Queries of f (B, S), drawn or listed. BadInput where one is wrong or the path cannot compute it."""
    B, S = groups.shape
    n, least = objective.max_targets(S), objective.min_targets(S)
    try:
        targets, cuts, weight = queries = objective.queries(groups)
    except BadInput as error:
        raise BadInput(f"{objective}: {error}") from None
    due = [(torch.long, (B, n)), (torch.long, (B, n)), (torch.float32, (B, n))]
    found = [(x.dtype, tuple(x.shape)) for x in queries]
    if found != due:
        raise BadInput(f"{objective}: queries gave targets, cuts and weights of {found}, and not of {due}, "
                       f"n = {n} rows being what max_targets promises")

    def refuse(wrong, reason):
        """`wrong` is bool (B, n) or (B, 1). The reason may name f, a query's token p, its f_p and cut c."""
        if wrong.any():
            b, k = wrong.nonzero()[0].tolist()
            f, p = groups[b].tolist(), targets[b, k].item()
            first = " ".join(map(str, f[:16])) + (" .." if S > 16 else "")
            raise BadInput(f"{objective}: " + reason.format(f=first, p=p + 1, f_p=f[p], c=cuts[b, k].item()))

    refuse((groups < 0).any(1, keepdim=True), "f = {f} has a group below 0")
    refuse(~(weight >= 0) | weight.isinf(), "token {p} has a weight that is not a number of at least 0")
    wanted, own = weight > 0, groups.gather(1, targets)
    refuse(~wanted.any(1, keepdim=True) & (weight.sum() == 0), "nothing is asked for, in f = {f}")
    smallest = groups.masked_fill(groups == 0, torch.iinfo(torch.long).max).amin(1, keepdim=True)
    refuse(wanted & (cuts <= smallest), "token {p} is asked for and would see nothing, since no token has "
           "0 < f < {c} in f = {f}. Begin with a group of f = 1, which is given")
    refuse(wanted & (own > 0) & (own < cuts), "token {p}, of f = {f_p}, is asked for at the cut {c} and "
           "would see itself; a cut is at most f(p)")
    if path != "two-stream":
        cannot = f", which one stream ({path}) cannot compute; let one_stream be None"
        refuse(wanted & (cuts != own), "token {p}, of f = {f_p}, is asked for at the cut {c}" + cannot)
        fits = groups == ar_groups(S) if path == "causal" else (groups == 1) | (groups == 2)
        refuse(~fits.all(1, keepdim=True), "f = {f}" + cannot)
    if path == "mae":
        hidden = (groups > 1).sum(1, keepdim=True)
        refuse((hidden < least) | (hidden > n), f"f = {{f}} hides fewer tokens than min_targets, {least}, or "
               f"more than max_targets, {n}")
    return queries


def one_query_per_prefix(length):
    """(S - 1, S): pass k gives x_1 .. x_k, asks for x_{k+1}, and leaves out the rest."""
    i = torch.arange(length)
    return (i < i[1:, None]).long() + 2 * (i == i[1:, None])


def equally_likely(groups):
    """Outcomes (K, S) with probability 1/K each."""
    return groups, torch.full((len(groups),), 1 / len(groups), dtype=torch.float64)


def show(value):
    """An option's value as one types it: 0.15 or 0.15,0.3."""
    if isinstance(value, (tuple, list)):
        return ",".join(show(part) for part in value)
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
