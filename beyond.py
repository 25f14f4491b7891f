"""beyond."""
import itertools
import math
from dataclasses import dataclass

import torch

from masks import ar_groups
from support.objective import Objective, equally_likely


def permutation_groups(batch, length, generator=None):
    """XLNet's permuted order: f is a uniform permutation of 1..S, so its first token is given. (B, S)."""
    return 1 + torch.rand(batch, length, generator=generator).argsort(dim=1)


def prefix_groups(batch, length, generator=None):
    """Prefix language model: a prefix of 1..S-1 tokens is given, the rest is autoregressive. (B, S)."""
    prefix = torch.randint(1, length, (batch, 1), generator=generator)
    return 1 + (ar_groups(length) - prefix).clamp(min=0)


@dataclass(frozen=True)
class Permutation(Objective):
    """Beyond the paper: predict the tokens in a random order (XLNet; Yang et al. 2019)."""

    paper = "permutation order (XLNet), not in the paper"

    def groups(self, batch, length, generator=None):
        return permutation_groups(batch, length, generator)

    def outcomes(self, length, limit=200_000):
        if math.factorial(length) <= limit:
            return equally_likely(1 + torch.tensor(list(itertools.permutations(range(length)))))


@dataclass(frozen=True)
class PrefixLM(Objective):
    """Beyond the paper: a prefix of random length is given, the rest is predicted from left to right."""

    paper = "prefix language model, not in the paper"

    def groups(self, batch, length, generator=None):
        return prefix_groups(batch, length, generator)

    def outcomes(self, length, limit=200_000):
        return equally_likely(1 + (ar_groups(length) - torch.arange(1, length)[:, None]).clamp(min=0))
