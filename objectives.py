"""The pretraining objectives: for each, a sampler of group indices f, and one loss for all of them.

    flag          paper                       f                                                     one-stream path
    ar            L_ar, Sec. 3.1              1, 2, ..., S                                          causal
    dar           L_semi,t, Eq. 6, for Eq. 3  groups of t after a first group of 1..t               none: two streams only
    mlm           L_m, Sec. 3.1               1 visible, 2 masked, round(rho S) of them             mask
    vl            L_vm, Eq. 5                 as mlm, rho drawn from a range for each sequence      mask
    permutation   not in it                   a random order                                        none
    prefix        not in it                   a random prefix is given, the rest in order           none

The loss is -log P(x_p | context of p), the *mean over all targets of the batch*. Sums and means differ in what they
weigh. Under a mean over targets every (context, target) pair that f produces weighs the same: that is Eq. 6, and Eq. 5
read as a sum over targets, up to the number of targets of the batch, so a sequence that hides more tokens counts more.
Eq. 3, which weighs every *context* the same, is the same distribution only when contexts near the end count for less.
The first token is given: L_ar's sum over k starts at P(x_2 | x_1).

A new objective is a frozen dataclass with a `groups` method, and a line in OBJECTIVES: see Permutation and PrefixLM.
"""

import itertools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond import Permutation, PrefixLM
from masks import ar_groups, dar_groups, draw, hidden_count, masked_groups, query_mask
from support.cli import BadInput, Parser, command_line, group_size, positive, ratios, seed
from support.kernels import LinearCrossEntropy, rows_at_once, take
from support.objective import Objective, equally_likely, one_query_per_prefix, show


def main(argv=None):
    parser = Parser(description="Draw the group index of an objective and its two attention masks.")
    parser.add_argument("objective", choices=OBJECTIVES)
    add_options(parser)
    parser.add_argument("--length", type=positive, default=8, help="sequence length S")
    parser.add_argument("--samples", type=positive, default=3, help="distinct draws of f to show, at most")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice")
    args = parser.parse_args(argv)
    objective = from_options(args.objective, t=args.t, mask=args.mask)
    objective.check(args.length)
    if args.length > 200:
        raise BadInput(f"--length {args.length} is too wide to draw; use at most 200")
    groups = objective.groups(256, args.length, torch.Generator().manual_seed(args.seed))
    distinct = list(dict.fromkeys(map(tuple, groups.tolist())))[:args.samples]
    print(f"{describe(objective)}: {objective.paper}\n")
    print("\n\n".join(draw(torch.tensor(f)) for f in sorted(distinct, reverse=True)))


@dataclass(frozen=True)
class Autoregressive(Objective):
    """L_ar: predict each token from all before it."""

    paper = "autoregressive, L_ar (Sec. 3.1)"
    one_stream = "causal"

    def groups(self, batch, length, generator=None):
        return ar_groups(length).repeat(batch, 1)

    def outcomes(self, length, limit=200_000):
        return equally_likely(ar_groups(length)[None])


@dataclass(frozen=True)
class DiversityEnhanced(Objective):
    """L_semi,t (Eq. 6), the paper's way to L_dar,t (Eq. 3): predict t tokens in parallel, first group uniform in 1..t.

    With a range (low, high), as in Table 9, each sequence draws its own t.
    """

    t: int = 2
    paper = "diversity-enhanced autoregressive, L_semi,t (Eq. 6)"

    def ts(self):
        """All t that a sequence may draw, equally likely."""
        low, high = self.t if isinstance(self.t, tuple) else (self.t, self.t)
        return range(low, high + 1)

    def groups(self, batch, length, generator=None):
        ts = self.ts()
        t = torch.randint(ts[0], ts[-1] + 1, (batch,), generator=generator) if len(ts) > 1 else torch.full((batch,), ts[0])
        first = 1 + (torch.rand(batch, generator=generator) * t).long()
        return dar_groups(length, t, first)

    def outcomes(self, length, limit=200_000):
        groups = [dar_groups(length, t, torch.arange(1, t + 1)) for t in self.ts()]
        return torch.cat(groups), torch.cat([torch.full((t,), 1 / t / len(groups), dtype=torch.float64) for t in self.ts()])

    def left_to_right(self, length, path):
        # Over the t first-group sizes each token is first in its group exactly once: a true next-token probability. Of a
        # range, the smallest t takes the fewest passes.
        t = self.ts()[0]
        return {"next": dar_groups(length, t, torch.arange(1, t + 1))}

    def check(self, length):
        super().check(length)
        if not 1 <= self.ts()[0] <= self.ts()[-1] < length:
            raise BadInput(f"--t {show(self.t)} is not in 1..{length - 1}: a group is shorter than the sequence of {length}")

    def __post_init__(self):
        if isinstance(self.t, tuple) and (len(self.t) != 2 or self.t[0] > self.t[1]):
            raise BadInput(f"--t {show(self.t)} is neither a group size like 2 nor a range like 1,2")


@dataclass(frozen=True)
class Masked(Objective):
    """L_m: predict a fixed share of the tokens from the others."""

    mask: float = 0.15
    paper = "masked, L_m (Sec. 3.1)"
    one_stream = "mask"

    def __post_init__(self):
        if not isinstance(self.mask, (int, float)):
            raise BadInput(f"mlm hides one fixed ratio, got --mask {show(self.mask)}; type --mask {self.mask[0]:g}, "
                           f"or --objective vl --mask {show(self.mask)} to draw the ratio from that range")
        if not 0 < self.mask < 1:
            raise BadInput(f"--mask {self.mask:g} is not between 0 and 1; type a ratio such as --mask 0.15")

    def groups(self, batch, length, generator=None):
        return masked_groups(batch, length, self.mask, generator)

    def max_targets(self, length):
        return hidden_count(self.mask, length)

    def min_targets(self, length):
        return min(self.hidden_counts(length))

    def hidden_counts(self, length):
        """{number of hidden tokens: probability}."""
        return {hidden_count(self.mask, length): 1.0}

    def outcomes(self, length, limit=200_000):
        counts = self.hidden_counts(length)
        if sum(math.comb(length, n) for n in counts) > limit:
            return None
        groups, weight = [], []
        for n, probability in counts.items():
            hidden = torch.tensor(list(itertools.combinations(range(length), n)))        # (comb(S, n), n)
            groups.append(torch.ones(len(hidden), length, dtype=torch.long).scatter(1, hidden, 2))
            weight.append(torch.full((len(hidden),), probability / len(hidden), dtype=torch.float64))
        return torch.cat(groups), torch.cat(weight)

    def left_to_right(self, length, path):
        # Nobody sees a query of the second stream, so there the two regimes are one.
        return {"next": one_query_per_prefix(length)} if path == "two-stream" else super().left_to_right(length, path)


@dataclass(frozen=True)
class VariableLength(Masked):
    """L_vm (Eq. 5): as L_m, with the ratio drawn uniformly from a range anew for each sequence."""

    mask: tuple = (0.15, 0.3)
    paper = "variable-length masked, L_vm (Eq. 5)"

    def __post_init__(self):
        if isinstance(self.mask, (int, float)):
            raise BadInput(f"vl draws its ratio from a range, got --mask {self.mask:g}; type --mask {self.mask:g},"
                           f"{min(2 * self.mask, 1):g}, or --objective mlm --mask {self.mask:g} for the fixed ratio")
        if len(self.mask) != 2:
            raise BadInput(f"--mask {show(self.mask)} is not a range; type two ratios such as --mask 0.15,0.3")
        low, high = self.mask
        if low > high:
            raise BadInput(f"--mask {show(self.mask)} runs downwards; type --mask {high:g},{low:g}")
        if not 0 < low <= high <= 1:
            raise BadInput(f"--mask {show(self.mask)} does not lie between 0 and 1; type a range such as --mask 0.15,0.3")

    def max_targets(self, length):
        return hidden_count(self.mask[1], length)

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


OBJECTIVES = {"ar": Autoregressive, "dar": DiversityEnhanced, "mlm": Masked, "vl": VariableLength,
              "permutation": Permutation, "prefix": PrefixLM}


# ---------------------------------------------------------------------------- from flags to an objective and back

def add_options(parser):
    """The options of all objectives, for every command that takes an objective."""
    parser.add_argument("--t", type=group_size, default=None,
                        help="dar: tokens predicted in parallel, or a range such as 1,2 (default: 2)")
    parser.add_argument("--mask", type=ratios, default=None,
                        help="mlm: ratio of hidden tokens (default: 0.15); vl: its range (default: 0.15,0.3)")


def from_options(objective, **options):
    """The objective of that flag with those options; None leaves a default. Raises BadInput on a wrong combination."""
    if objective not in OBJECTIVES:
        raise BadInput(f"there is no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    known = {field.name for field in fields(OBJECTIVES[objective])}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - known:
        owners = [flag for flag, cls in OBJECTIVES.items() if name in {field.name for field in fields(cls)}]
        takes = f"{objective} takes --{next(iter(known))}" if known else f"{objective} takes no options"
        raise BadInput(f"--{name} belongs to {' and '.join(owners)}, and {takes}; leave out --{name} "
                       f"or type --objective {owners[0]}")
    for name, value in given.items():
        if isinstance(value, (tuple, list)):
            given[name] = value[0] if len(value) == 1 else tuple(value)
    return OBJECTIVES[objective](**given)


def choose_path(objective, streams=None, images=False):
    """Which of model.PATHS runs this objective, given --streams (None: one stream where one suffices)."""
    if streams == 1 and objective.one_stream is None:
        raise BadInput(f"--streams 1 cannot run {flag(objective)}: tokens predicted in parallel must not see each "
                       "other, which takes two streams; type --streams 2 or leave it out")
    path = "two-stream" if streams == 2 or objective.one_stream is None else objective.one_stream
    return "mae" if images and path == "mask" else path


def flag(objective):
    """The flag under which this objective is registered."""
    return next((name for name, cls in OBJECTIVES.items() if cls is type(objective)), type(objective).__name__)


def describe(objective):
    """The flag and the options: 'vl 0.15,0.3'."""
    return " ".join([flag(objective)] + [("t=" if field.name == "t" else "") + show(getattr(objective, field.name))
                                         for field in fields(objective)])


# ---------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """Everything one step needs, of static shape. B sequences of length S, n = max_targets(S)."""

    tokens: Tensor   # (B, S) input ids, corrupted where the 80/10/10 rule says so; images: (B, S, values) patches
    groups: Tensor   # (B, S) f
    blank: Tensor    # (B, S) bool: where the mask path shows [MASK]
    given: Tensor    # (B, v) mae path: the positions with f = 1 first, then others to fill up; other paths: v = 0
    targets: Tensor  # (B, n) positions to predict, those that are no target last
    labels: Tensor   # (B, n) their true ids; images: nothing, their pixels are taken from the tokens
    weight: Tensor   # (B, n) 1 for a target, 0 for the rest
    total: Tensor    # (B,) the number of targets of the whole batch, of which this may be a part

    def part(self, start, stop):
        return Batch(*(field[start:stop] for field in self))

    def pinned(self):
        return Batch(*(field if field.is_cuda else field.contiguous().pin_memory() for field in self))

    def to(self, device):
        return Batch(*(field.to(device, non_blocking=field.is_pinned()) for field in self))


def target_positions(groups, n):
    """Positions of the targets f > 1 first, in order, then others to fill up. -> targets (B, n), weight (B, n)."""
    is_target = groups > 1
    most = int(is_target.sum(1).max())
    if most > n:
        raise ValueError(f"a sequence has {most} targets but max_targets promised at most {n}")
    targets = (~is_target).long().argsort(dim=1, stable=True)[:, :n]
    return targets, is_target.gather(1, targets).float()


def draw_batch(objective, path, tokens, vocab, generator=None, mask_rule="always", size=None, part=slice(None)):
    """Draw f for tokens (B, S), or patches (B, S, values), and prepare what the model needs.

    On the mask path, mask_rule "always" shows [MASK] at every target, which is the paper's formula: targets are predicted
    from the unmasked tokens alone. "bert" is the usual practice (Devlin et al. 2019) and the Cramming protocol: [MASK] at
    80% of the targets, a random token at 10%, the token itself at 10%. The other paths never corrupt their input.
    Where `tokens` are the rows `part` of a batch of `size`, everything random is what it would be for the whole batch.
    """
    S, size = tokens.shape[1], size or len(tokens)
    groups = objective.groups(size, S, generator)
    total, groups = (groups > 1).sum(), groups[part]
    if path in ("mask", "mae") and groups.max() > 2 or path == "causal" and not torch.equal(groups, ar_groups(S).expand_as(groups)):
        raise ValueError(f"{describe(objective)} has an f that its one_stream = {path!r} cannot run; leave one_stream None")
    targets, weight = target_positions(groups, objective.max_targets(S))
    blank, inputs = groups > 1, tokens
    if path == "mask" and mask_rule == "bert":
        dice = torch.rand(size, S, generator=generator)[part]
        noise = torch.randint(vocab, (size, S), generator=generator)[part]
        inputs = torch.where(blank & (dice >= 0.8) & (dice < 0.9), noise, tokens)
        blank = blank & (dice < 0.8)
    if path == "mae":
        given = (groups != 1).long().argsort(dim=1, stable=True)[:, :S - objective.min_targets(S)]
    else:
        given = targets[:, :0]
    labels = targets[:, :0] if tokens.dim() == 3 else tokens.gather(1, targets)  # patches are taken on the device
    return Batch(inputs, groups, blank, given, targets, labels, weight, total.repeat(len(groups)))


def loss_sum(model, batch, path):
    """The sum over the batch's targets of -log P(x_p | context of p); divide by the number of targets for the loss.

    This one function is L_ar, L_semi,t, L_m and L_vm: what sets them apart is `batch.groups`. Packed sequences have no
    padding. For images -log P is the squared error, the mean over a patch's numbers: a Gaussian, up to constants.
    """
    features = model(batch.tokens, batch.groups, batch.targets, path, batch.blank, padded=False, given=batch.given)
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

    Eq. 1 prints coefficient 1 on the first term; the 2 is lost between lines 4 and 5 of A.1. With it the loss is
    ||Abar - F W'^T||_F^2 - ||Abar||_F^2; with 1 it has the same subspace at half the scale.
    scores (N, V) = W f(X_i), targets (N,) ids y_i, target_marginal (V,) probabilities P_G -> scalar.
    """
    positive = scores.gather(1, targets[:, None]).mean()
    return -2 * positive + (scores.square() @ target_marginal).mean()


# ---------------------------------------------------------------------------- scoring

def scores_next(groups):
    """groups (S,) -> bool (S,): which targets have exactly the tokens before them as their context."""
    before = torch.ones(len(groups), len(groups), dtype=torch.bool).tril(-1)
    return (groups > 1) & (query_mask(groups) == before).all(-1)


@torch.no_grad()
def target_nll(model, tokens, groups, targets, path, padded=True):
    """-log P of the true tokens at `targets` (B, n) under f -> float32 (B, n). Log-softmax in float32."""
    features = model(tokens, groups, targets, path, None, padded).flatten(0, 1)
    labels = tokens.gather(1, targets).flatten()
    nll = [F.cross_entropy(model.logits(x).float(), y, reduction="none")
           for x, y in zip(features.split(rows_at_once(model)), labels.split(rows_at_once(model)))]
    return torch.cat(nll).view(targets.shape)


if __name__ == "__main__":
    command_line(main)
