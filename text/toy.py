"""The paper's toy model D_sim (Sec. 4.1.2) as data to train on: sequences have a class, and so have tokens.

    --data toy          all tokens of a sequence are of its class
    --data toy:0.3      the class of each token is redrawn uniformly with probability 0.3

A class, a position and one of T values make a token, one byte each, so that a token in a context tells its
own position, as in the theory (theory/toy.py). With 4 classes, 8 positions and 2 values these are '0' to 'o'.
"""

import math

import torch

from support.cli import BadInput

CLASSES, POSITIONS, VALUES = 4, 8, 2
FIRST = ord("0")  # the byte of position 0, class 0, value 0


def toy_noise(source):
    """How often the classes of the data named `source` are redrawn: 0 for toy, EPS for toy:EPS; None where it
    is not the toy model. Raises BadInput."""
    name, colon, text = str(source).partition(":")
    if name != "toy":
        return None
    try:
        eps = float(text) if colon else 0.0
    except ValueError:
        eps = math.nan
    if not 0 <= eps < 1:
        raise BadInput(f"--data {source}: type toy or toy:EPS, where EPS, the chance that a token's class is "
                       "redrawn, is at least 0 and less than 1")
    return eps


def draw_tokens(r, s, T, eps, N, generator):
    """N sequences -> tokens c T + j of class c and value j (N, s), and the class of each sequence (N,)."""
    y = torch.randint(r, (N, 1), generator=generator)
    redrawn = torch.rand(N, s, generator=generator) < eps
    c = torch.where(redrawn, torch.randint(r, (N, s), generator=generator), y)
    return c * T + torch.randint(T, (N, s), generator=generator), y[:, 0]


def toy_bytes(tokens):
    """Tokens of draw_tokens (N, POSITIONS) as --data toy has them."""
    return FIRST + torch.arange(POSITIONS) * (CLASSES * VALUES) + tokens
