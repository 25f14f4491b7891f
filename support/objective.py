"""support.objective."""
from dataclasses import dataclass

import torch

from masks import ar_groups
from support.cli import BadInput


@dataclass(frozen=True)
class Objective:
    """What every objective offers. Its dataclass fields are its options; the flag --NAME sets the field NAME."""

    paper = ""         # name and place in the paper
    one_stream = None  # "causal", "mask", or None where only two streams can compute it

    def groups(self, batch, length, generator=None):
        """Draw f for `batch` sequences -> LongTensor (batch, length)."""
        raise TypeError("an objective defines its group index")

    def max_targets(self, length):
        """An upper bound on the number of targets of one sequence. It fixes the shape of the output layer's input."""
        return length - 1

    def min_targets(self, length):
        """A lower bound on it. On the mae path it fixes the shape of the encoder's input: all tokens but these."""
        return 1

    def outcomes(self, length, limit=200_000):
        """The distribution of f where it can be listed: (f LongTensor (K, S), probability double (K,)), or None when
        there are more than `limit` outcomes or nobody wrote them down (spectral.py then samples `groups`)."""

    def left_to_right(self, length, path):
        """How to evaluate P(x_p | x_1 .. x_{p-1}) for p = 2..S (Eq. 2) the way the model was trained.

        Returns {regime: LongTensor (passes, length)}: group indices such that every p = 2..S has the whole prefix and
        nothing else as its context (`scores_next`) in exactly one pass of each regime. With masks in one stream there
        are two regimes: `truncated`, where the sequence ends at the [MASK], and `padded`, where all later positions are
        [MASK] too, so that it is as long as in training.
        """
        if path == "mask":
            truncated = one_query_per_prefix(length)
            return {"padded": torch.where(truncated == 0, 2, truncated), "truncated": truncated}
        return {"next": ar_groups(length)[None]}

    def check(self, length):
        """Raise BadInput where the options do not fit sequences of this length."""
        if length < 2:
            raise BadInput(f"a sequence of length {length} leaves nothing to predict; give a length of 2 or more")


def one_query_per_prefix(length):
    """(S - 1, S): pass k gives x_1 .. x_k, asks for x_{k+1}, and leaves out the rest."""
    i = torch.arange(length)
    return (i < i[1:, None]).long() + 2 * (i == i[1:, None])


def equally_likely(groups):
    """Outcomes (K, S) with probability 1/K each."""
    return groups, torch.full((len(groups),), 1 / len(groups), dtype=torch.float64)


def show(value):
    return ",".join(f"{part:g}" for part in value) if isinstance(value, (tuple, list)) else f"{value:g}"
