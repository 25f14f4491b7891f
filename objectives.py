"""The pretraining objectives: for each, a sampler of group indices f, and one loss for all of them.

    flag          paper                       f                                                     one stream
    ar            L_ar, Sec. 3.1              1, 2, ..., S                                          causal
    dar           L_semi,t, Eq. 6, for Eq. 3  groups of t after a first group of 1..t               none: two
                  only
    mlm           L_m, Sec. 3.1               1 visible, 2 masked, round(rho S) of them             mask
    vl            L_vm, Eq. 5                 as mlm, rho drawn from a range for each sequence      mask
    others        not in it                   beyond.py

The loss is -log P(x_p | context of p), the *mean over all queries of the batch*, which count by their
weights. Sums and means differ in what they weigh. Under a mean over targets every (context, target) pair that
f produces weighs the same: that is Eq. 6, and Eq. 5 read as a sum over targets, up to the number of targets
of the batch, so a sequence that hides more tokens counts more. Eq. 3, which weighs every *context* the same,
is the same distribution only when contexts near the end count for less. The first token is given: L_ar's sum
over k starts at P(x_2 | x_1).

A new objective is a frozen dataclass with a `groups` method, and a line in OBJECTIVES: beyond.py has seven.
Its fields become flags of train.py and of all that takes an objective. Draw it with: python objectives.py
NAME
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond import BEYOND
from masks import ar_groups, dar_groups, draw, hidden_count, masked_groups, query_mask
from support.cli import BadInput, Parser, command_line, group_size, output_file, positive, ratios, seed
from support.kernels import LinearCrossEntropy, rows_at_once, take
from support.objective import (
    AnyOrder,
    Objective,
    draw_queries,
    equally_likely,
    one_query_per_prefix,
    option,
    show,
)
from support.operator import spectrum
from support.options import add_flags, all_options, make, share_options
from support.sheet import draw_sheets, sheet_of


def main(argv=None):
    parser = Parser(description="Draw the group index of objectives, their attention masks and spectra.")
    parser.add_argument("objectives", nargs="*", metavar="objective", help=f"of {', '.join(OBJECTIVES)}")
    parser.add_argument("--all", action="store_true", help=f"the paper's: {', '.join(PAPER)}")
    parser.add_argument("--length", type=positive, help="sequence length S (default: 8, or 16)")
    parser.add_argument("--samples", type=positive, default=3, help="distinct draws of f to show, at most")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="a picture instead, with spectra")
    add_options(parser)
    args = parser.parse_args(argv)
    names = list(dict.fromkeys([*args.objectives, *PAPER] if args.all else args.objectives))
    if not names:
        raise BadInput(f"name an objective, {' or '.join(OBJECTIVES)}; or give --all for the paper's")
    if (args.length or 0) > 200:
        raise BadInput(f"--length {args.length} is too wide to draw; use at most 200")
    sheets, spectra = [], []
    for name, given in share_options(OBJECTIVES, names, options_of(vars(args))).items():
        objective = from_options(name, **given)
        path = choose_path(objective, images=objective.images_only)
        length = args.length or room_for(objective)
        sheets.append(sheet_of(objective, describe(objective), path, length, args.samples, args.seed))
        spectra.append(spectrum(objective, length, flag=name)["singular_values"] if args.plot else None)
    if args.plot:
        draw_sheets(args.plot, sheets, spectra)
    for sheet in () if args.plot else sheets:
        print(f"{sheet.title}: {sheet.paper}\n")
        print("\n\n".join(draw(torch.tensor(f), queries) for f, queries in sheet.draws) + "\n")


def room_for(objective):
    """8 tokens, or 16 where the objective does not fit into 8."""
    with contextlib.suppress(BadInput):
        objective.check(8)
        return 8
    return 16


# ---------------------------------------------------------------------------- the paper's four

@dataclass(frozen=True)
class Autoregressive(Objective):
    """L_ar: predict each token from all before it."""

    paper = "autoregressive, L_ar (Sec. 3.1)"
    one_stream = "causal"
    attention = "causal"

    def groups(self, batch, length, generator=None):
        return ar_groups(length).repeat(batch, 1)

    def outcomes(self, length, limit=200_000):
        return equally_likely(ar_groups(length)[None])

    def left_to_right(self, length, path):
        return {"next": ar_groups(length)[None]}


@dataclass(frozen=True)
class DiversityEnhanced(Objective):
    """L_semi,t (Eq. 6), the paper's way to L_dar,t (Eq. 3): t tokens in parallel, first group uniform in
    1..t.

    With a range (low, high), as in Table 9, each sequence draws its own t.
    """

    t: int = option(2, "tokens predicted in parallel, or a range such as 1,2", group_size)
    paper = "diversity-enhanced autoregressive, L_semi,t (Eq. 6)"
    attention = "causal"

    def __post_init__(self):
        if isinstance(self.t, tuple) and (len(self.t) != 2 or self.t[0] > self.t[1]):
            raise BadInput(f"--t {show(self.t)} is neither a group size like 2 nor a range like 1,2")

    def check(self, length):
        super().check(length)
        if not 1 <= self.ts()[0] <= self.ts()[-1] < length:
            raise BadInput(f"--t {show(self.t)} is not in 1..{length - 1}: a group is shorter than the "
                           f"sequence of {length}")

    def ts(self):
        """All t that a sequence may draw, equally likely."""
        low, high = self.t if isinstance(self.t, tuple) else (self.t, self.t)
        return range(low, high + 1)

    def groups(self, batch, length, generator=None):
        ts = self.ts()
        t = torch.full((batch,), ts[0])
        if len(ts) > 1:
            t = torch.randint(ts[0], ts[-1] + 1, (batch,), generator=generator)
        first = 1 + (torch.rand(batch, generator=generator) * t).long()
        return dar_groups(length, t, first)

    def outcomes(self, length, limit=200_000):
        groups = [dar_groups(length, t, torch.arange(1, t + 1)) for t in self.ts()]
        share = [torch.full((t,), 1 / t / len(groups), dtype=torch.float64) for t in self.ts()]
        return torch.cat(groups), torch.cat(share)

    def left_to_right(self, length, path):
        # Over the t sizes of the first group each token is first in its group exactly once: a true next-token
        # probability. Of a range, the smallest t takes the fewest passes.
        t = self.ts()[0]
        return {"next": dar_groups(length, t, torch.arange(1, t + 1))}


@dataclass(frozen=True)
class Masked(AnyOrder):
    """L_m: predict a fixed share of the tokens from the others."""

    mask: float = option(0.15, "ratio of hidden tokens", ratios)
    paper = "masked, L_m (Sec. 3.1)"

    def __post_init__(self):
        if not isinstance(self.mask, (int, float)):
            typed = f"--mask {show(self.mask)}"
            raise BadInput(f"mlm hides one fixed ratio, got {typed}; type --mask {self.mask[0]:g}, or "
                           f"--objective vl {typed} to draw the ratio from that range")
        if not 0 < self.mask < 1:
            raise BadInput(f"--mask {self.mask:g} is not between 0 and 1; type a ratio such as --mask 0.15")

    def groups(self, batch, length, generator=None):
        return masked_groups(batch, length, self.mask, generator)

    def max_targets(self, length):
        return max(self.hidden_counts(length))

    def min_targets(self, length):
        return min(self.hidden_counts(length))

    def hidden_counts(self, length):
        """{number of hidden tokens: probability}."""
        return {hidden_count(self.mask, length): 1.0}

    def outcomes(self, length, limit=200_000):
        counts = self.hidden_counts(length)
        if sum(math.comb(length, n) for n in counts) > limit:
            return None
        groups, share = [], []
        for n, probability in counts.items():
            hidden = torch.tensor(list(itertools.combinations(range(length), n)))        # (comb(S, n), n)
            groups.append(torch.ones(len(hidden), length, dtype=torch.long).scatter(1, hidden, 2))
            share.append(torch.full((len(hidden),), probability / len(hidden), dtype=torch.float64))
        return torch.cat(groups), torch.cat(share)

    def left_to_right(self, length, path):
        """In one stream there are two regimes: `truncated`, where the sequence ends at the [MASK], and
        `padded`, where all later positions are [MASK] too, so that it is as long as in training. In two
        streams nobody sees a query, and the two are one."""
        truncated = one_query_per_prefix(length)
        if path == "mask":
            return {"padded": torch.where(truncated == 0, 2, truncated), "truncated": truncated}
        return {"next": truncated}


@dataclass(frozen=True)
class VariableLength(Masked):
    """L_vm (Eq. 5): as L_m, with the ratio drawn uniformly from a range anew for each sequence."""

    mask: tuple = option((0.15, 0.3), "range of the ratio of hidden tokens", ratios)
    paper = "variable-length masked, L_vm (Eq. 5)"

    def __post_init__(self):
        low, *more = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        typed = f"--mask {show(self.mask)}"
        if not more:
            raise BadInput(f"vl draws its ratio from a range, got {typed}; type {typed},{min(2 * low, 1):g}, "
                           f"or --objective mlm {typed} for the fixed ratio")
        if len(more) > 1:
            raise BadInput(f"{typed} is not a range; type two ratios such as --mask 0.15,0.3")
        if low > more[0]:
            raise BadInput(f"{typed} runs downwards; type --mask {more[0]:g},{low:g}")
        if not 0 < low <= more[0] <= 1:
            raise BadInput(f"{typed} does not lie between 0 and 1; type a range such as --mask 0.15,0.3")

    def hidden_counts(self, length):
        low, high = self.mask
        if low == high:
            return {hidden_count(low, length): 1.0}
        # round(rho S) = n on an interval of rho: its share of the range is the probability of n
        shares = {}
        for n in range(int(low * length), int(high * length) + 2):
            share = (min(high, (n + 0.5) / length) - max(low, (n - 0.5) / length)) / (high - low)
            if share > 0:
                kept = min(max(n, 1), length - 1)
                shares[kept] = shares.get(kept, 0.0) + share
        return shares


PAPER = {"ar": Autoregressive, "dar": DiversityEnhanced, "mlm": Masked, "vl": VariableLength}
OBJECTIVES = {**PAPER, **BEYOND}


# ---------------------------------------------------------------------------- from flags to an objective

def add_options(parser):
    """A flag for each option of the registered objectives, to be called when the command's own flags are
    there."""
    add_flags(parser, OBJECTIVES)


def options_of(values):
    """Of {name: value}, such as vars(args), what was given for options of objectives."""
    return {name: values[name] for name in all_options(OBJECTIVES) if values.get(name) is not None}


def from_options(name, /, **options):
    """The objective of that flag. Options are values or text; None leaves a default. Raises BadInput."""
    return make(OBJECTIVES, name, options)


def choose_path(objective, streams=None, images=False):
    """Which of model.PATHS runs this objective, given --streams (None: one stream where one suffices)."""
    if objective.images_only and not images:
        raise BadInput(f"{flag(objective)} speaks of patches of images; this is text")
    if streams == 1 and objective.one_stream is None:
        raise BadInput(f"--streams 1 cannot run {flag(objective)}: tokens predicted in parallel must not see "
                       "each other, which takes two streams; type --streams 2 or leave it out")
    path = "two-stream" if streams == 2 or objective.one_stream is None else objective.one_stream
    return "mae" if images and path == "mask" else path


def flag(objective):
    """The flag under which this objective is registered."""
    cls = type(objective)
    return next((name for name, registered in OBJECTIVES.items() if registered is cls), cls.__name__)


def describe(objective):
    """The flag and the options: 'vl 0.15,0.3', 'dar t=2'."""
    options = [(option.name, show(getattr(objective, option.name))) for option in fields(objective)]
    return " ".join([flag(objective)] + [x if name == "mask" else f"{name}={x}" for name, x in options])


def as_flags(objective):
    """What a command line says for it: 'vl --mask 0.15,0.3', 'dar --t 2'."""
    options = [f"--{option.name} {show(getattr(objective, option.name))}" for option in fields(objective)]
    return " ".join([flag(objective), *options])


# ---------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Everything one step needs, of static shape. B sequences of length S, n = max_targets(S).

    stream  the content stream h holds the tokens, the query stream g what is asked; one stream mixes the two
    path    how the network is run, one of model.PATHS: causal, mask, mae or two-stream
    pass    one run of the network over a sequence under one f
    regime  passes that score every token, the first that does counts (likelihood): padded, truncated, next
    given   what is context only, f = 1
    blank   where the input shows [MASK] instead of the token (mask path)
    padded  whether some f are 0: no token is there
    cut     row (p, c) predicts token p from {j : 0 < f(j) < c}; by default c = f(p)
    weight  how much a row counts in the loss, by default 1; filler, which keeps the shape static, has 0
    """

    tokens: Tensor   # (B, S) input ids, corrupted where 80/10/10 says so; images: (B, S, values) patches
    groups: Tensor   # (B, S) f
    blank: Tensor    # (B, S) bool
    given: Tensor    # (B, v) mae path: positions with f = 1, then others to fill up; other paths: v = 0
    targets: Tensor  # (B, n) positions to predict, filler last
    cuts: Tensor     # (B, n)
    labels: Tensor   # (B, n) their true ids; images: nothing, their pixels are taken from the tokens
    weight: Tensor   # (B, n)
    total: Tensor    # (B,) the sum of the weights of the whole batch, of which this may be a part

    def part(self, start, stop):
        return Batch(*(field[start:stop] for field in self))

    def pinned(self):
        return Batch(*(field if field.is_cuda else field.contiguous().pin_memory() for field in self))

    def to(self, device):
        return Batch(*(field.to(device, non_blocking=field.is_pinned()) for field in self))


def draw_batch(objective, path, tokens, vocab, generator=None, mask_rule="always", size=None,
               part=slice(None)):
    """Draw f for tokens (B, S), or patches (B, S, values), and prepare what the model needs. Raises BadInput
    where the path cannot compute what the objective asks.

    On the mask path, mask_rule "always" shows [MASK] at every target, which is the paper's formula: targets
    are predicted from the unmasked tokens alone. "bert" is the usual practice (Devlin et al. 2019) and the
    Cramming protocol: [MASK] at 80% of the targets, a random token at 10%, the token itself at 10%. The other
    paths never corrupt their input. Where `tokens` are the rows `part` of a batch of `size`, everything
    random is what it would be for the whole batch.
    """
    S, size = tokens.shape[1], size or len(tokens)
    groups, queries = draw_queries(objective, path, size, S, generator)
    total, groups = queries.weight.sum(), groups[part]
    targets, cuts, weight = (x[part] for x in queries)
    blank, inputs, given = groups > 1, tokens, targets[:, :0]
    if path == "mask" and mask_rule == "bert":
        dice = torch.rand(size, S, generator=generator)[part]
        noise = torch.randint(vocab, (size, S), generator=generator)[part]
        inputs = torch.where(blank & (dice >= 0.8) & (dice < 0.9), noise, tokens)
        blank = blank & (dice < 0.8)
    if path == "mae":
        given = (groups != 1).long().argsort(dim=1, stable=True)[:, :S - objective.min_targets(S)]
    labels = targets[:, :0] if tokens.dim() == 3 else tokens.gather(1, targets)  # patches: on the device
    return Batch(inputs, groups, blank, given, targets, cuts, labels, weight, total.repeat(len(groups)))


# ---------------------------------------------------------------------------- losses and scores

def loss_sum(model, batch, path):
    """The sum over the batch's queries of weight * -log P(x_p | context of p); over `total` it is the loss.

    This one function is L_ar, L_semi,t, L_m and L_vm: what sets them apart is `batch.groups`. Packed
    sequences have no padding. For images -log P is the squared error, the mean over a patch's numbers: a
    Gaussian, up to constants.
    """
    features = model(batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank, padded=False,
                     given=batch.given)
    if model.config.patch:
        labels = take(batch.tokens, batch.targets)                                       # (B, n, values)
        labels = F.layer_norm(labels, labels.shape[-1:]) if model.config.norm_pix else labels
        error = (model.pixels(features).float() - labels).square().mean(-1)              # (B, n)
        return (error * batch.weight).sum()
    return LinearCrossEntropy.apply(features.flatten(0, 1), model.embedding.weight, batch.labels.flatten(),
                                    batch.weight.flatten(), rows_at_once(model), torch.is_grad_enabled())


def spectral_loss(scores, targets, target_marginal):
    """The spectral loss in the form that equals matrix factorisation (Theorem 3.1).

        -2 mean_i scores[i, y_i] + mean_i sum_v target_marginal[v] scores[i, v]^2

    Eq. 1 prints coefficient 1 on the first term; the 2 is lost between lines 4 and 5 of A.1. With it the loss
    is ||Abar - F W'^T||_F^2 - ||Abar||_F^2; with 1 it has the same subspace at half the scale. scores (N, V)
    = W f(X_i), targets (N,) ids y_i, target_marginal (V,) probabilities P_G -> scalar.
    """
    positive = scores.gather(1, targets[:, None]).mean()
    return -2 * positive + (scores.square() @ target_marginal).mean()


def scores_next(groups):
    """groups (S,) -> bool (S,): which targets have exactly the tokens before them as their context."""
    before = torch.ones(len(groups), len(groups), dtype=torch.bool).tril(-1)
    return (groups > 1) & (query_mask(groups) == before).all(-1)


@torch.no_grad()
def target_nll(model, tokens, groups, targets, path, padded=True, cuts=None):
    """-log P of the true tokens at `targets` (B, n) under f, from `cuts` (B, n) or their own f -> float32 (B,
    n)."""
    features = model(tokens, groups, targets, path, cuts, padded=padded).flatten(0, 1)
    labels = tokens.gather(1, targets).flatten()
    nll = [F.cross_entropy(model.logits(x).float(), y, reduction="none")                 # in float32
           for x, y in zip(features.split(rows_at_once(model)), labels.split(rows_at_once(model)))]
    return torch.cat(nll).view(targets.shape)


if __name__ == "__main__":
    command_line(main)
