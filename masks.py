"""Group indices f, and the two attention masks that follow from them (paper, Eq. 24).

A pretraining objective is a rule that gives each token i = 1..S of a sequence a group index f(i):

    f = 0        padding: never seen, never predicted
    f = 1        given: context only, never a target
    f = 2, 3 ..  predicted in this order; the tokens of one group are predicted in parallel

    context of target i = { j : 0 < f(j) <  f(i) }    query_mask,   M_g of Eq. 24
    content of token i  = { j : 0 < f(j) <= f(i) }    content_mask, M_h of Eq. 24

Draw it: python masks.py dar --t 2 --length 8
"""
import argparse
import os
import re
import sys
from pathlib import Path

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
        raise BadInput(f"groups need t >= 1 and a first group of at least 1 token, got t = {t[..., 0].tolist()}, "
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
        raise BadInput(f"a mask ratio lies in (0, 1] and a range is low,high: got {low},{high}")
    # The ratio is drawn even when the range is a point, so that a range with equal ends repeats the fixed ratio exactly.
    scores = torch.rand(batch, length, generator=generator)
    rho = low + (high - low) * torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    hidden = hidden_count(rho, length)                                        # (B, 1)
    rank = scores.argsort(dim=1).argsort(dim=1)                               # (B, S) a random permutation of 0..S-1
    return 1 + (rank < hidden).long()


def permutation_groups(batch, length, generator=None):
    """XLNet's permuted order: f is a uniform permutation of 1..S, so its first token is given. (B, S)."""
    return 1 + torch.rand(batch, length, generator=generator).argsort(dim=1)


def prefix_groups(batch, length, generator=None):
    """Prefix language model: a prefix of 1..S-1 tokens is given, the rest is autoregressive. (B, S)."""
    prefix = torch.randint(1, length, (batch, 1), generator=generator)
    return 1 + (ar_groups(length) - prefix).clamp(min=0)


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


# ---------------------------------------------------------------------------- command line, here and in every other file

class BadInput(ValueError):
    """Something the user gave is wrong; the message names the value and what is allowed."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with defaults, where there are any."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default or action.default == 0 and action.type else action.help


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong use as BadInput and shows defaults in --help."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(message)


def command_line(main):
    """Run `main`; bad input ends with one line `error: ...` on standard error and exit status 2, no traceback."""
    sys.stdout.reconfigure(errors="replace")  # where the locale has no sign for a character, a question mark
    try:
        sys.exit(main())
    except BrokenPipeError:  # somebody piped the output into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # NumPy raises the former, PyTorch the latter
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        print(f"error: not enough memory ({str(error).splitlines()[0] if str(error) else 'no details'}); "
              "use smaller batches, a smaller model or less data", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def positive(text):
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def seed(text):
    """An argparse type: a whole number in 0..2^31 - 1."""
    if not text.isdecimal() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2 ** 31 - 1}")
    return int(text)


def group_size(text):
    """An argparse type for --t: '2' -> 2, '1,2' -> (1, 2)."""
    sizes = tuple(positive(part) for part in text.split(","))
    return sizes if len(sizes) > 1 else sizes[0]


def output_file(text):
    """An argparse type: a file to write, in a folder that exists; or - for standard output."""
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text


def ratios(text):
    """An argparse type for --mask: '0.15' -> (0.15,), '0.15,0.3' -> (0.15, 0.3)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a ratio like 0.15 nor a range like 0.15,0.3") from None


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


def main(argv=None):
    import objectives  # the registry stands above this file; a new objective can be drawn as soon as it is there
    parser = Parser(description="Draw the group index of an objective and its two attention masks.")
    parser.add_argument("objective", choices=objectives.OBJECTIVES)
    objectives.add_options(parser)
    parser.add_argument("--length", type=positive, default=8, help="sequence length S")
    parser.add_argument("--samples", type=positive, default=3, help="distinct draws of f to show, at most")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice")
    args = parser.parse_args(argv)
    objective = objectives.from_options(args.objective, t=args.t, mask=args.mask)
    objective.check(args.length)
    if args.length > 200:
        raise BadInput(f"--length {args.length} is too wide to draw; use at most 200")
    groups = objective.groups(256, args.length, torch.Generator().manual_seed(args.seed))
    distinct = list(dict.fromkeys(map(tuple, groups.tolist())))[:args.samples]
    print(f"{objectives.describe(objective)}: {objective.paper}\n")
    print("\n\n".join(draw(torch.tensor(f)) for f in sorted(distinct, reverse=True)))


if __name__ == "__main__":
    import masks  # the module that objectives.py imports, so that there is one BadInput
    masks.command_line(masks.main)
