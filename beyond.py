"""Objectives beyond the paper, each as somebody would write it who adds one of their own.

An objective is a frozen dataclass whose fields are its options: `t: int = 2` is the flag --t. It says three
things about sequences of S tokens; where a class here is silent on the last two, they are the default.

    f          who stands in which group: 0 left out, 1 given, 2, 3, .. predicted in this order
    queries    which (token p, cut c) are asked; row (p, c) sees {j : 0 < f(j) < c}. By default every p with
               f(p) > 1, at c = f(p)
    weights    how much each query counts in the loss. By default 1

Look first at Permutation and PrefixLM, which say f only. MultiToken asks each token several times, Blocks
only some of those with f > 1; Spans and Segments are made of pieces.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from masks import (
    AnyOrder,
    Objective,
    Queries,
    ar_groups,
    equally_likely,
    hidden_count,
    option,
    queries_of,
    random_order,
    show,
    stratified,
)
from util import BadInput


@dataclass(frozen=True)
class Permutation(Objective):
    """Predict the tokens in a random order.

    f          a uniform permutation of 1..S; its first token, anywhere in the sequence, is given
    """

    paper = "permutation order (XLNet, Yang et al. 2019)"

    def groups(self, batch, length, generator=None):
        return 1 + torch.rand(batch, length, generator=generator).argsort(dim=1)

    def outcomes(self, length, limit=200_000):
        if math.factorial(length) <= limit:
            return equally_likely(1 + torch.tensor(list(itertools.permutations(range(length)))))

    def left_to_right(self, length, path):
        return {"next": ar_groups(length)[None]}  # the order 1, 2, .., S is one of those it was trained for

    def bound(self, batch, length, generator=None):
        f = 1 + random_order(batch, length, generator)
        return f, (f > 1).float()

    def decoding(self, order, given):
        return torch.where(order > 0, order, order.max() + 1)


@dataclass(frozen=True)
class PrefixLM(Objective):
    """Continue a prefix that is read in both directions.

    f          1 for a prefix of 1..S-1 tokens, every length being equally likely, then 2, 3, .. in order
    """

    paper = "prefix language model (UniLM, Dong et al. 2019; T5, Raffel et al. 2020)"

    def groups(self, batch, length, generator=None):
        prefix = torch.randint(1, length, (batch, 1), generator=generator)
        return 1 + (ar_groups(length) - prefix).clamp(min=0)

    def outcomes(self, length, limit=200_000):
        return equally_likely(1 + (ar_groups(length) - torch.arange(1, length)[:, None]).clamp(min=0))

    def left_to_right(self, length, path):
        return {"next": ar_groups(length)[None]}  # the prefix of one token


@dataclass(frozen=True)
class MultiToken(Objective):
    """From each prefix predict the next t tokens in parallel: Eq. 3 as it is printed.

    f          1, 2, .., S
    queries    (k + h, k + 1) for each prefix k = 1..S-1 and h = 1..t with k + h <= S
    weights    1/min(t, S - k): each prefix counts the same. With weights of 1 this would be `dar`
    """

    t: int = option(2, "tokens predicted from each prefix")
    paper = "multi-token prediction, L_dar,t itself (Eq. 3; Gloeckle et al. 2024)"
    attention = "causal"

    def groups(self, batch, length, generator=None):
        return ar_groups(length).repeat(batch, 1)

    def queries(self, groups):
        S = groups.shape[1]
        k, h = torch.cartesian_prod(torch.arange(1, S), torch.arange(1, self.t + 1)).T
        k, h = k[k + h <= S], h[k + h <= S]
        return Queries(*(x.repeat(len(groups), 1) for x in (k + h - 1, k + 1, 1 / (S - k).clamp(max=self.t))))

    def max_targets(self, length):
        return sum(min(self.t, length - k) for k in range(1, length))

    def outcomes(self, length, limit=200_000):
        return equally_likely(ar_groups(length)[None])

    def left_to_right(self, length, path):
        return {"next": ar_groups(length)[None]}  # the queries with h = 1

    def check(self, length):
        super().check(length)
        if self.t not in range(1, length):
            raise BadInput(f"--t {show(self.t)} is not in 1..{length - 1}, what a prefix has behind it")


@dataclass(frozen=True)
class Diffusion(AnyOrder):
    """Any number of tokens may be hidden. The expected loss is that of `permutation` with x_1 given.

    f          x_1 is given; n uniform in 1..S-1; a uniform n-subset of the others is hidden, 2, the rest 1
    weights    (S - 1)/n, so that each n counts the same (see AnyOrder)
    """

    paper = "masked diffusion (MDLM, Sahoo et al. 2024; LLaDA, Nie et al. 2025)"
    generation = "confident"

    def groups(self, batch, length, generator=None):
        n = torch.randint(1, length, (batch, 1), generator=generator)
        return 1 + (random_order(batch, length, generator) >= length - n).long()

    def queries(self, groups):
        hidden, S = groups > 1, groups.shape[1]
        return queries_of(groups, hidden * ((S - 1) / hidden.sum(1, keepdim=True)), S - 1)

    def outcomes(self, length, limit=200_000):
        if 2 ** (length - 1) <= limit:
            f = torch.tensor(list(itertools.product([1], *[[1, 2]] * (length - 1))))[1:]
            each = [1 / (length - 1) / math.comb(length - 1, n) for n in (f > 1).sum(1).tolist()]
            return f, torch.tensor(each, dtype=torch.float64)

    def left_to_right(self, length, path):
        """All later tokens are hidden too, as in training; in two streams nobody sees them."""
        i = torch.arange(length)
        return {"padded" if path == "mask" else "next": 1 + (i >= i[1:, None]).long()}


@dataclass(frozen=True)
class Blocks(Objective):
    """Blocks from left to right, masked diffusion within each.

    f          x_1 is given; in block b = 1, 2, .. of B tokens (the last may be shorter) n uniform in 1..B; a
               uniform n-subset of it is hidden, 2b + 1, the rest visible, 2b
    queries    the hidden tokens, which see the blocks before and what is visible in their own
    weights    B/n. B = 1 is `ar`, B = S - 1 `diffusion`

    In two streams one pass serves all blocks: content rows are the clean text, query rows the hidden one.
    """

    block: int = option(8, "tokens in a block")
    paper = "block diffusion (BD3LM, Arriola et al. 2025)"
    attention = "causal"
    generation = "confident"

    def blocks(self, length):
        """The block of each token (S,), 0 for x_1, and the sizes of the blocks."""
        block = (torch.arange(length) + self.block - 1) // self.block
        return block, block.bincount()

    def groups(self, batch, length, generator=None):
        _, size = self.blocks(length)
        n = 1 + (torch.rand(batch, len(size), generator=generator) * size).long()
        return self.hide(batch, length, n, generator)

    def hide(self, batch, length, n, generator):
        """f with n (B, blocks) random tokens of each block hidden."""
        block, size = self.blocks(length)
        place = block + torch.rand(batch, length, generator=generator, dtype=torch.float64)
        rank = place.argsort(dim=1).argsort(dim=1) - (size.cumsum(0) - size)[block]      # within the block
        return 2 * block + (rank < n[:, block]).long()

    def queries(self, groups):
        block, size = self.blocks(groups.shape[1])
        hidden = (groups > 1) & (groups % 2 == 1)
        n = hidden.float() @ F.one_hot(block).float()                                    # (B, blocks)
        return queries_of(groups, hidden * (size / n.clamp(min=1))[:, block], groups.shape[1] - 1)

    def outcomes(self, length, limit=200_000):
        if 2 ** (length - 1) <= limit:
            block, size = self.blocks(length)
            hidden = torch.tensor(list(itertools.product([1], *[[0, 1]] * (length - 1))))
            n = hidden @ F.one_hot(block)                                                # (K, blocks)
            f, n = (2 * block + hidden)[n.amin(1) > 0], n[n.amin(1) > 0].tolist()
            share = [math.prod(1 / B / math.comb(B, k) for B, k in zip(size.tolist(), row)) for row in n]
            return f, torch.tensor(share, dtype=torch.float64)

    def left_to_right(self, length, path):
        """Pass j scores token j of every block: the j before it are visible."""
        block, _ = self.blocks(length)
        hidden = (torch.arange(length) - 1) % self.block >= torch.arange(self.block)[:, None]
        return {"next": torch.where(block == 0, 1, 2 * block + hidden.long())}

    def bound(self, batch, length, generator=None):
        """As in training, but as many tokens are visible in all blocks: the mean is that over orders."""
        visible = stratified(batch, self.block, generator)[:, None] - 1
        block, size = self.blocks(length)
        n = (size - visible).clamp(min=0).index_fill(1, torch.tensor([0]), 1)
        f = self.hide(batch, length, n, generator)
        return f, ((f > 1) & (f % 2 == 1)) * (self.block / n.clamp(min=1))[:, block]

    def decoding(self, order, given):
        block, _ = self.blocks(len(order))
        now = block[order == 0].min()                                            # the first unfinished block
        f = 2 * block + ((block < now) | (order == 0)).long()
        return f.masked_fill(block > now, 0)

    def check(self, length):
        super().check(length)
        if self.block not in range(1, length):
            raise BadInput(f"--block {show(self.block)} is not in 1..{length - 1}: the first token is given")


@dataclass(frozen=True)
class Spans(Objective):
    """Fill in contiguous spans, token by token, from left to right (GLM shuffles them).

    f          visible 1; hidden 2, 3, .. from left to right. All sets of n = round(rho S) hidden tokens that
               form exactly m = round(n/L) spans, or as many as there is room for, are equally likely
    """

    mask: float = option(0.15, "ratio rho of hidden tokens")
    span: int = option(3, "mean length L of a hidden span")
    paper = "span filling (GLM, Du et al. 2022)"
    generation = "confident"

    def check(self, length):
        super().check(length)
        if isinstance(self.mask, tuple) or not 0 < self.mask < 1:
            raise BadInput(f"--mask {show(self.mask)} is not a ratio between 0 and 1, such as 0.15")
        if self.span < 1:
            raise BadInput(f"--span {show(self.span)} is no length of a span: it is at least 1")

    def counts(self, length):
        """Hidden tokens and spans. Two spans have a visible token between them."""
        n = int(hidden_count(self.mask, length))
        return n, min(max(round(n / self.span), 1), length - n + 1)

    def place(self, starts, before):
        """f (B, S) from starts (B, n - 1), whether the second, third .. hidden token begins a span, and
        before (B, S - n + 1), whether a span stands after that many visible tokens."""
        batch, n = len(starts), starts.shape[1] + 1
        span = F.pad(starts.long().cumsum(1), (1, 0))          # (B, n) the span of each hidden token
        visible = before.nonzero()[:, 1].view(batch, -1)       # (B, m) visible tokens before each span
        position = torch.arange(n) + visible.gather(1, span)   # (B, n)
        f = torch.ones(batch, n + before.shape[1] - 1, dtype=torch.long)
        return f.scatter(1, position, torch.arange(2, n + 2).repeat(batch, 1))

    def groups(self, batch, length, generator=None):
        n, m = self.counts(length)
        starts, before = (torch.rand(batch, size, generator=generator).argsort(dim=1).argsort(dim=1) < k
                          for size, k in ((n - 1, m - 1), (length - n + 1, m)))
        return self.place(starts, before)

    def outcomes(self, length, limit=200_000):
        n, m = self.counts(length)
        if math.comb(n - 1, m - 1) * math.comb(length - n + 1, m) <= limit:
            starts, before = subsets(n - 1, m - 1), subsets(length - n + 1, m)
            return equally_likely(self.place(starts.repeat_interleave(len(before), 0),
                                             before.repeat(len(starts), 1)))

    def max_targets(self, length):
        return self.counts(length)[0]

    min_targets = max_targets

    def decoding(self, order, given):
        f = (order - given + 1).clamp(min=1) * (order > 0)
        return f.index_fill(0, (order == 0).nonzero()[0], int(f.max()) + 1)


@dataclass(frozen=True)
class Segments(Objective):
    """Squares of patches of an image in a random order, those of a square in parallel.

    f          the rank, from 1, of the square that the patch lies in; all orders are equally likely
    """

    segment: int = option(2, "side of a square, in patches")
    paper = "random segments (RandSAC, Hua et al. 2023)"
    images_only = True

    def squares(self, length):
        """Which square each patch lies in, (S,)."""
        side = math.isqrt(length)
        line = torch.arange(side) // self.segment
        return (line[:, None] * (side // self.segment) + line).flatten()

    def groups(self, batch, length, generator=None):
        squares = length // self.segment ** 2
        return 1 + torch.rand(batch, squares, generator=generator).argsort(dim=1)[:, self.squares(length)]

    def outcomes(self, length, limit=200_000):
        if math.factorial(length // self.segment ** 2) <= limit:
            orders = torch.tensor(list(itertools.permutations(range(length // self.segment ** 2))))
            return equally_likely(1 + orders[:, self.squares(length)])

    def max_targets(self, length):
        return length - self.segment ** 2

    min_targets = max_targets

    def check(self, length):
        super().check(length)
        side = math.ceil(math.sqrt(length))
        if side ** 2 != length or self.segment not in range(1, side) or side % self.segment:
            raise BadInput(f"--segment {self.segment} does not divide a square of {length} patches, such as "
                           f"{side} x {side}, into two or more squares")


def subsets(n, k):
    """Every choice of k of n -> bool (comb(n, k), n)."""
    chosen = torch.tensor(list(itertools.combinations(range(n), k)), dtype=torch.long)
    return torch.zeros(len(chosen), n, dtype=torch.bool).scatter(1, chosen, True)


BEYOND = {"permutation": Permutation, "prefix": PrefixLM, "mtp": MultiToken, "diffusion": Diffusion,
          "blocks": Blocks, "spans": Spans, "segments": Segments}
