"""The pretraining objectives: for each, a sampler of group indices f, and one loss for all of them.

    flag    paper                         f                                                   one stream
    ar      L_ar, Sec. 3.1                1, 2, ..., S                                        causal
    dar     L_semi,t, Eq. 6, for Eq. 3    groups of t after a first group of 1..t             none
    mlm     L_m, Sec. 3.1                 1 visible, 2 hidden, round(rho S) of them           mask
    vl      L_vm, Eq. 5                   as mlm, rho drawn from a range for each sequence    mask
    others  not in it                     beyond.py

The loss is -log P(x_p | context of p), the *mean over all queries of the batch*, which count by their
weights. Every (context, target) pair that f produces weighs the same: that is Eq. 6, and Eq. 5 read as a sum
over targets. Eq. 3, which weighs every *context* the same, is `mtp`. The first token is given: L_ar starts at
P(x_2 | x_1). Draw any: python objectives.py dar --t 2 --length 8
"""

import contextlib
import inspect
import math
import runpy
import sys
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import plots
from beyond import BEYOND, subsets
from masks import (
    AnyOrder,
    Objective,
    ar_groups,
    dar_groups,
    draw,
    equally_likely,
    hidden_count,
    masked_groups,
    option,
    query_mask,
    show,
)
from model import LinearCrossEntropy, gather_rows, rows_at_once
from util import BadInput, Parser, command_line, note, numbers, positive

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
    1..t. Of a range, as in Table 9, each sequence draws its own t."""

    t: int = option(2, "tokens predicted in parallel, or a range such as 1,2")
    paper = "diversity-enhanced autoregressive, L_semi,t (Eq. 6)"
    attention = "causal"

    @property
    def ts(self):
        """All t that a sequence may draw, equally likely."""
        low, high = self.t if isinstance(self.t, tuple) else (self.t, self.t)
        return range(low, high + 1)

    def check(self, length):
        super().check(length)
        ends = self.t if isinstance(self.t, tuple) else (self.t,)
        if len(ends) > 2 or list(ends) != sorted(ends) or any(t not in range(1, length) for t in ends):
            raise BadInput(f"--t {show(self.t)} is no group size in 1..{length - 1}, nor a range such as 1,2")

    def groups(self, batch, length, generator=None):
        t = torch.full((batch,), self.ts[0])
        if len(self.ts) > 1:
            t = torch.randint(self.ts[0], self.ts[-1] + 1, (batch,), generator=generator)
        first = 1 + (torch.rand(batch, generator=generator) * t).long()
        return dar_groups(length, t, first)

    def outcomes(self, length, limit=200_000):
        groups = [dar_groups(length, t, torch.arange(1, t + 1)) for t in self.ts]
        return equally_likely(*groups, shares=[1 / len(groups)] * len(groups))

    def left_to_right(self, length, path):
        t = self.ts[0]  # over the t sizes of the first group each token is first in its group exactly once
        return {"next": dar_groups(length, t, torch.arange(1, t + 1))}


@dataclass(frozen=True)
class Masked(AnyOrder):
    """L_m: predict a fixed share of the tokens from the others."""

    mask: float = option(0.15, "ratio of hidden tokens")
    paper = "masked, L_m (Sec. 3.1)"

    def __post_init__(self):
        if isinstance(self.mask, tuple) or not 0 < self.mask < 1:
            raise BadInput(f"mlm takes one ratio between 0 and 1, vl a range; got --mask {show(self.mask)}")

    def groups(self, batch, length, generator=None):
        return masked_groups(batch, length, self.mask, generator)

    def max_targets(self, length):
        return max(self.hidden_counts(length))

    def min_targets(self, length):
        return min(self.hidden_counts(length))

    def hidden_counts(self, length):
        """{number of hidden tokens: probability}."""
        return {int(hidden_count(self.mask, length)): 1.0}

    def outcomes(self, length, limit=200_000):
        counts = self.hidden_counts(length)
        if sum(math.comb(length, n) for n in counts) <= limit:
            return equally_likely(*(1 + subsets(length, n).long() for n in counts), shares=counts.values())

    def left_to_right(self, length, path):
        """In one stream there are two regimes: `padded`, where all later positions are [MASK] too, so that
        the sequence is as long as in training, and `truncated`, where it ends at the [MASK]."""
        i = torch.arange(length)
        truncated = (i < i[1:, None]).long() + 2 * (i == i[1:, None])                    # (S - 1, S)
        if path == "mask":
            return {"padded": torch.where(truncated == 0, 2, truncated), "truncated": truncated}
        return {"next": truncated}


@dataclass(frozen=True)
class VariableLength(Masked):
    """L_vm (Eq. 5): as L_m, with the ratio drawn uniformly from a range anew for each sequence."""

    mask: tuple = option((0.15, 0.3), "range of that ratio")
    paper = "variable-length masked, L_vm (Eq. 5)"

    def __post_init__(self):
        is_range = isinstance(self.mask, tuple) and len(self.mask) == 2
        if not is_range or not 0 < self.mask[0] <= self.mask[1] <= 1:
            raise BadInput(f"vl takes a range such as --mask 0.15,0.3, mlm one ratio; got {show(self.mask)}")

    def hidden_counts(self, length):
        low, high = self.mask
        if low == high:
            return {int(hidden_count(low, length)): 1.0}
        n = torch.arange(length + 1)  # round(rho S) = n where rho S is in n - 1/2 .. n + 1/2
        ends = [((n.double() + half) / length).clamp(low, high) for half in (-0.5, 0.5)]
        share = torch.zeros_like(ends[0]).index_add(0, n.clamp(1, length - 1), ends[1] - ends[0])
        return {k: x / (high - low) for k, x in enumerate(share.tolist()) if x > 0}


# ---------------------------------------------------------------------------- the registry, and flags

PAPER = {"ar": Autoregressive, "dar": DiversityEnhanced, "mlm": Masked, "vl": VariableLength}
OBJECTIVES = {**PAPER, **BEYOND}


def options_of(flag):
    """The names of an objective's options. FILE.py:Class is loaded from that file, and registered. BadInput
    where the class is not written as it must be."""
    if flag not in OBJECTIVES and ".py:" in flag:
        path, _, name = flag.rpartition(":")
        try:
            OBJECTIVES[flag] = runpy.run_path(path)[name]
        except (OSError, SyntaxError, ImportError, KeyError) as error:
            raise BadInput(f"{flag} cannot be loaded: {error}") from None
    if flag not in OBJECTIVES:
        raise BadInput(f"there is no objective {flag!r}; choose one of {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[flag]
    if "__dataclass_fields__" not in vars(cls):
        raise BadInput(f"put @dataclass(frozen=True) above class {cls.__name__}, the objective {flag}")
    if cls.one_stream not in (None, "causal", "mask"):
        raise BadInput(f"{cls.__name__}.one_stream is {cls.one_stream!r}; it may be None, causal or mask")
    methods = [name for name, x in vars(Objective).items() if inspect.isfunction(x) and name[0] != "_"]
    for name in methods:
        wanted, found = (list(inspect.signature(getattr(x, name)).parameters)[1:] for x in (Objective, cls))
        if len(found) != len(wanted) or "generator" in wanted and "generator" not in found:
            raise BadInput(f"{cls.__name__}.{name} takes {', '.join(wanted)}, not {', '.join(found)}")
    return {f.name for f in fields(cls)}


def add_options(parser, argv=None):
    """One flag for each option of the registered objectives, and of those in files that `argv` names."""
    for word in sys.argv[1:] if argv is None else argv:
        if ".py:" in word:
            options_of(word)
    for name in dict.fromkeys(f.name for cls in OBJECTIVES.values() for f in fields(cls)):
        owners = {flag: f for flag, cls in OBJECTIVES.items() for f in fields(cls) if f.name == name}
        text = "; ".join(f"{flag}: {f.metadata.get('help', name)} (default: {show(f.default)})"
                         for flag, f in owners.items())
        parser.add_argument(f"--{name}", type=numbers, metavar=name.upper(), help=text)


def from_options(flag, given=(), /, **options):
    """The objective of that flag. `given`, such as vars(args), may hold None and more than options."""
    own, every = options_of(flag), set().union(*map(options_of, OBJECTIVES))
    options = {name: x for name, x in {**dict(given), **options}.items() if name in every and x is not None}
    for name in options.keys() - own:
        takes = " and ".join(f"--{x}" for x in sorted(own)) or "no options"
        raise BadInput(f"--{name} is no option of {flag}, which takes {takes}")
    return OBJECTIVES[flag](**{name: tuple(x) if isinstance(x, list) else x for name, x in options.items()})


def several(flags, given):
    """The objectives of several flags: an option goes to those that have it."""
    shared = set().union(*map(options_of, flags))
    return [from_options(flag, {name: x for name, x in given.items()
                                if name in options_of(flag) or name not in shared}) for flag in flags]


def flag(objective):
    """The flag under which this objective is registered."""
    cls = type(objective)
    return next((name for name, registered in OBJECTIVES.items() if registered is cls), cls.__name__)


def describe(objective):
    """The flag and the options: 'vl 0.15,0.3', 'dar t=2'; of an objective from a file its class."""
    name = flag(objective).rpartition(":")[2]
    options = [(f.name, show(getattr(objective, f.name))) for f in fields(objective)]
    return " ".join([name, *(x if option == "mask" else f"{option}={x}" for option, x in options)])


def choose_path(objective, streams=None, images=False):
    """Which of model.PATHS runs this objective, given --streams (None: one stream where one suffices)."""
    if objective.images_only and not images:
        raise BadInput(f"{flag(objective)} speaks of squares of patches; it takes --data of images")
    if streams == 1 and objective.one_stream is None:
        raise BadInput(f"--streams 1 cannot run {flag(objective)}, whose targets must not see each other")
    path = "two-stream" if streams == 2 or objective.one_stream is None else objective.one_stream
    return "mae" if images and path == "mask" else path


# ---------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """What one step needs, of static shape: B sequences of length S, n = max_targets(S) queries each."""

    tokens: Tensor   # (B, S) input ids, corrupted where 80/10/10 says so; images: (B, S, values) patches
    groups: Tensor   # (B, S) f
    blank: Tensor    # (B, S) bool, mask path: where the input shows [MASK] instead of the token
    given: Tensor    # (B, v) mae path: positions with f = 1, then others to fill up; other paths: v = 0
    targets: Tensor  # (B, n) positions to predict, filler last
    cuts: Tensor     # (B, n) query k sees { j : 0 < f(j) < cuts[k] }
    labels: Tensor   # (B, n) true ids; images: nothing, their pixels are taken from the tokens
    weight: Tensor   # (B, n) how much a query counts in the loss; filler, which keeps the shape static, has 0
    total: Tensor    # (B,) the sum of the weights of the whole batch

    def part(self, start, stop):
        return Batch(*(x[start:stop] for x in self))

    def pin_memory(self):
        return Batch(*(x if x.is_cuda else x.contiguous().pin_memory() for x in self))

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=x.is_pinned()) for x in self))


def draw_batch(objective, path, tokens, vocab, generator=None, mask_rule="always", size=None,
               part=slice(None), lengths=None):
    """Draw f for tokens (B, S), or patches (B, S, values), and prepare what the model needs -> Batch.

    On the mask path, mask_rule "always" shows [MASK] at every target, which is the paper's formula. "bert"
    (Devlin et al. 2019) shows it at 80% of the targets, a random token at 10%, the token itself at 10%.

    Every process draws f for the whole batch of `size` from one generator and keeps its rows `part`, which
    `tokens` are. `lengths` (size,) says how many tokens of each sequence are text; the rest is filler.
    """
    S, size = tokens.shape[1], size or len(tokens)
    groups = objective.groups(size, S, generator)
    queries = objective.queries(groups)
    check_queries(objective, path, groups, queries, size, S)
    if lengths is not None:  # what fills up a text's last sequence is never asked for
        queries = queries._replace(weight=queries.weight * (queries.targets < lengths[:, None]))
    total, groups = queries.weight.sum(), groups[part]
    targets, cuts, weight = (x[part] for x in queries)

    inputs, blank, given = tokens, groups > 1, targets[:, :0]
    if path == "mask" and mask_rule == "bert":
        dice = torch.rand(size, S, generator=generator)[part]
        noise = torch.randint(vocab, (size, S), generator=generator)[part]
        inputs = torch.where(blank & (dice >= 0.8) & (dice < 0.9), noise, tokens)
        blank = blank & (dice < 0.8)
    if path == "mae":
        given = (groups != 1).long().argsort(dim=1, stable=True)[:, :S - objective.min_targets(S)]
    labels = targets[:, :0] if tokens.dim() == 3 else tokens.gather(1, targets)
    return Batch(inputs, groups, blank, given, targets, cuts, labels, weight, total.repeat(len(groups)))


def check_queries(objective, path, groups, queries, size, S):
    """Refuse what a new objective gets wrong first: shapes, leaks, queries that see nothing, a wrong path."""
    n, long = objective.max_targets(S), torch.long
    found = [(x.dtype, tuple(x.shape)) for x in (groups, *queries)]
    due = [(long, (size, S)), (long, (size, n)), (long, (size, n)), (torch.float32, (size, n))]
    if found != due:
        raise BadInput(f"{objective}: f, targets, cuts and weights are {found} and should be {due}")
    targets, cuts, weight = queries
    wanted, own = weight > 0, groups.gather(1, targets)
    least = groups.masked_fill(groups == 0, S + 1).amin(1, keepdim=True)
    hidden = (groups > 1).sum(1, keepdim=True)
    fits = {"causal": groups == ar_groups(S), "two-stream": groups >= 0}
    fits = fits.get(path, (groups == 1) | (groups == 2))
    for wrong, reason in (
            (wanted & (cuts <= least), "a token is asked for that would see nothing; begin with f = 1"),
            (wanted & (own > 0) & (cuts > own), "a token would see itself; a cut is at most f(p)"),
            (~fits, f"the path {path} cannot compute this f; let one_stream be None"),
            (wanted & (cuts != own) & (path != "two-stream"), f"the path {path} has no cuts but f(p)"),
            ((hidden < objective.min_targets(S)) & (path == "mae"), "fewer are hidden than min_targets says"),
            (~wanted.any() & ~wanted, "nothing is asked for")):
        if wrong.any():
            f = groups[wrong.any(1).nonzero()[0, 0]].tolist()
            raise BadInput(f"{objective}: {reason}; f = {f[:16]}")


# ---------------------------------------------------------------------------- losses and scores

def loss_sum(model, batch, path):
    """The sum over the batch's queries of weight * -log P(x_p | context of p): over `total` it is the loss.

    This is L_ar, L_semi,t, L_m and L_vm: what sets them apart is `batch.groups`. For images -log P is the
    squared error, the mean over a patch's numbers.
    """
    features = model(batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank, padded=False,
                     given=batch.given)
    if model.config.patch:
        labels = gather_rows(batch.tokens, batch.targets)                                # (B, n, values)
        error = (model.pixels(features).float() - labels).square().mean(-1)              # (B, n)
        return (error * batch.weight).sum()
    return LinearCrossEntropy.apply(features.flatten(0, 1), model.embedding.weight, batch.labels.flatten(),
                                    batch.weight.flatten(), rows_at_once(model), torch.is_grad_enabled())


@torch.no_grad()
def target_nll(model, tokens, groups, targets, path, padded=True, cuts=None):
    """-log P of the true tokens at `targets` (B, n) under f, from `cuts` or their own f -> float32 (B, n)."""
    features = model(tokens, groups, targets, path, cuts, padded=padded).flatten(0, 1)
    labels = tokens.gather(1, targets).flatten()
    rows = rows_at_once(model)
    nll = [F.cross_entropy(model.logits(x).float(), y, reduction="none")
           for x, y in zip(features.split(rows), labels.split(rows))]
    return torch.cat(nll).view(targets.shape)


def scores_next(groups, chain=None):
    """Which targets have exactly the tokens before them as context, bool (S,); before in the order of
    `chain`, by default from left to right."""
    rank = torch.arange(len(groups)) if chain is None else chain.argsort()
    return (groups > 1) & (query_mask(groups) == (rank < rank[:, None])).all(-1)


def spectral_loss(scores, targets, target_marginal):
    """||Abar - F W'^T||^2 - ||Abar||^2 (Theorem 3.1) from scores (N, V) = W f(X_i), targets (N,), P_G (V,).
    Eq. 1 prints coefficient 1 on the first term; the 2 is lost between lines 4 and 5 of A.1."""
    return -2 * scores.gather(1, targets[:, None]).mean() + (scores.square() @ target_marginal).mean()


# ---------------------------------------------------------------------------- python objectives.py dar --t 2

def typical_draws(objective, path, length, samples):
    """[(f (S,), [(position, cut, weight), ..])]: distinct draws with few, middling and many targets."""
    tokens, generator = torch.zeros(256, length, dtype=torch.long), torch.Generator().manual_seed(0)
    batch, draws = draw_batch(objective, path, tokens, 1, generator), {}
    for f, *rows in zip(*(x.tolist() for x in (batch.groups, batch.targets, batch.cuts, batch.weight))):
        draws[tuple(f)] = [row for row in zip(*rows) if row[2] > 0]
    draws = sorted(draws.items(), key=lambda draw: len(draw[1]))
    count = min(samples, len(draws))
    chosen = [draws[(2 * k + 1) * len(draws) // (2 * count)] for k in range(count)]
    return [(torch.tensor(f), rows) for f, rows in chosen]


def report_checks(objective, path):
    """Print what experiments/check.py finds on short sequences. BadInput where something does not hold."""
    from experiments.check import check
    for length in (6, 9, 16):
        with contextlib.suppress(BadInput):
            objective.check(length)
            break
    print(f"{describe(objective)}, on {length} tokens of 3 kinds")
    wrong = []
    for name, holds, sentence in check(objective, path, length, draw_batch):
        print(f"{'none' if holds is None else 'ok' if holds else 'WRONG':7s}{name}: {sentence}")
        wrong += [name] if holds is False else []
    if wrong:
        raise BadInput(f"{describe(objective)} is wrong in: {'; '.join(wrong)}")


def main(argv=None):
    parser = Parser(description="Draw the group index of objectives, their attention masks and spectra.")
    add = parser.add_argument
    add("objectives", nargs="*", metavar="NAME", help=f"{', '.join(OBJECTIVES)}, or your own, FILE.py:Class")
    add("--all", action="store_true", help=f"the paper's: {', '.join(PAPER)}")
    add("--length", type=positive, default=16, help="sequence length S")
    add("--samples", type=positive, default=3, help="distinct draws of f to show, at most")
    add("--text", help="words to draw it on, in place of --length")
    add("--plot", metavar="FILE", help="a picture instead, with spectra")
    add("--check", action="store_true", help="check what the objective says, instead")
    add_options(parser, argv)
    args = parser.parse_args(argv)
    names = list(PAPER) if args.all else args.objectives
    if not names:
        raise BadInput(f"name an objective, {' or '.join(OBJECTIVES)}; or give --all for the paper's")
    if args.plot:
        plots.check(args.plot)
    words = args.text.split() if args.text else None
    sheets, S = [], len(words) if words else args.length
    for name, objective in zip(names, several(names, vars(args))):
        objective.check(S)
        path = choose_path(objective, images=objective.images_only)
        if args.check:
            report_checks(objective, path)
            continue
        draws = typical_draws(objective, path, S, args.samples)
        if hasattr(objective, "mask") and objective.max_targets(S) == 1:
            note(f"{describe(objective)} hides one of {S} tokens, so that each context has one target and "
                 "the spectrum is flat; a larger --length shows more")
        if args.plot:
            from experiments.spectrum import spectrum
            values = spectrum(objective, S, flag=name)["singular_values"]
            sheets.append({"title": describe(objective), "length": S, "draws": draws, "words": words,
                           "singular_values": values})
        else:
            print(f"{describe(objective)}: {objective.paper}\n")
            for k, (f, queries) in enumerate(draws, 1):
                print(f"draw {k} of {len(draws)}\n\n{draw(f, queries, words)}\n")
    if args.plot:
        plots.objectives(args.plot, sheets)


if __name__ == "__main__":
    command_line(main)
