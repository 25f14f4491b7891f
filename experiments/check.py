"""What the tests check of the eleven, for an objective of your own: python objectives.py my.py:Every --check

Each check says (name, verdict, sentence): True where it holds, False where it does not, None where the
objective lacks the method; the sentence says what that costs.
"""

import itertools
import math
from collections import Counter

import torch

from masks import Objective, sees
from model import Config, Transformer

VOCAB = 3


def check(objective, path, length, draw_batch):
    """Run every check on sequences of `length` tokens. `draw_batch` is that of objectives.py."""
    torch.manual_seed(0)
    model = Transformer(Config(VOCAB, length, layers=2, width=16, heads=2)).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.mul_(1 if "norm" in name else 3)  # at its initial size all outputs are nearly the same

    def draw(seed, batch=64):
        tokens = torch.zeros(batch, length, dtype=torch.long)
        return draw_batch(objective, path, tokens, VOCAB, torch.Generator().manual_seed(seed))

    draw(0)
    yield "queries", True, "64 draws of f ask only for what sees something and not itself"
    state = torch.random.get_rng_state()
    same = all(torch.equal(a, b) for a, b in zip(draw(3), draw(3)))
    same &= torch.equal(state, torch.random.get_rng_state())
    yield "generator", same, "equal seeds give equal draws, and nothing else is drawn from"
    yield listed_is_drawn(objective, length)
    yield promised_counts(objective, length)
    yield no_leak(model, path, draw(1, batch=8))
    yield from chain_is_exact(model, objective, path, length)
    yield bound_is_one(model, objective, path, length)
    yield decoding_finishes(objective, length)


def listed_is_drawn(objective, length, draws=20_000):
    """Chi-squared of draws against the list; what comes up less than five times is pooled."""
    listed = None if type(objective).outcomes is Objective.outcomes else objective.outcomes(length)
    if listed is None:
        return "outcomes", None, "its spectrum is counted from draws"
    expected = {tuple(f): draws * p for f, p in zip(listed[0].tolist(), listed[1].tolist())}
    seen = Counter(map(tuple, objective.groups(draws, length, torch.Generator().manual_seed(0)).tolist()))
    rare = [f for f in expected if expected[f] < 5]
    cells = [(seen[f], count) for f, count in expected.items() if count >= 5]
    cells += [(sum(seen[f] for f in rare), sum(expected[f] for f in rare))] if rare else []
    chi2, k = sum((a - b) ** 2 / b for a, b in cells), len(cells) - 1
    most = k * (1 - 2 / (9 * k) + 4 * math.sqrt(2 / (9 * k))) ** 3 if k else 1e-6        # quantile 1 - 3e-5
    holds = seen.keys() <= expected.keys() and chi2 <= most
    return "outcomes", holds, f"{draws:,} draws have the listed distribution of {len(expected):,} f"


def promised_counts(objective, length):
    groups = objective.groups(2000, length, torch.Generator().manual_seed(0))
    most = int((objective.queries(groups).weight > 0).sum(1).max())
    least = int((groups > 1).sum(1).min())
    at_most, at_least = objective.max_targets(length), objective.min_targets(length)
    return "counts", most <= at_most and least >= at_least, (
        f"{most} queries at most, max_targets {at_most}; {least} hidden at least, min_targets {at_least}")


def no_leak(model, path, batch):
    """d feature / d token is zero unless 0 < f(j) < c, and is not zero where it should not be."""
    x = torch.randn(*batch.tokens.shape, model.config.width, dtype=torch.float64, requires_grad=True)
    hook = model.embedding.register_forward_hook(lambda *_: x)
    features = model(batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank)
    hook.remove()
    seen, holds = sees(batch.groups, batch.cuts), True                                   # (B, n, S)
    for b, k in (batch.weight > 0).nonzero().tolist():
        gradient, = torch.autograd.grad(features[b, k].square().sum(), x, retain_graph=True)
        holds &= torch.equal(gradient[b].abs().sum(1) > 0, seen[b, k])
    return "leaks", holds, "the gradient of each prediction reaches its context, all of it and nothing else"


def nll(model, tokens, groups, targets, path):
    """-log P of the targets (R, n) under f, of rows of tokens and f (R, S)."""
    logits = model.logits(model(tokens, groups, targets, path)).log_softmax(-1)
    return -logits.gather(2, tokens.gather(1, targets)[..., None])[..., 0]


def all_sequences(length, given):
    """Every sequence over VOCAB whose token `given` is 0."""
    tokens = torch.tensor(list(itertools.product(range(VOCAB), repeat=length)))
    return tokens[tokens[:, given] == 0]


def chain_is_exact(model, objective, path, length):
    """Each token in a pass of its own; the probabilities of all sequences sum to one."""
    regimes, order = objective.left_to_right(length, path), objective.chain(length)
    if regimes is None:
        yield "left_to_right", None, "no perplexity, and no text is written from left to right"
        return
    sequences = all_sequences(length, int(order[0]))
    for name, passes in regimes.items():
        total, found = 0.0, 0
        for k, p in enumerate(order[1:].tolist(), 1):
            context = torch.zeros(length, dtype=torch.bool).index_fill(0, order[:k], True)
            exact = [f for f in passes if f[p] > 1 and torch.equal(sees(f, f[p, None])[0], context)]
            if exact:
                targets = torch.full((len(sequences), 1), p)
                total += nll(model, sequences, exact[0].expand_as(sequences), targets, path)[:, 0]
                found += 1
        one = torch.as_tensor(-total).exp().sum().item()
        yield f"left_to_right, {name}", found == length - 1 and abs(one - 1) < 1e-6, (
            f"{found} of {length - 1} tokens have exactly what comes before them in some pass; all sequences "
            f"have probability {one:.6f}")


def bound_is_one(model, objective, path, length, draws=4000):
    """The bound is at least -log of a distribution, so that exp of minus it sums to one at most."""
    if objective.bound(1, length) is None:
        return "bound", None, "evaluate.py bound has nothing to show"
    f, weight = objective.bound(draws, length, torch.Generator().manual_seed(0))
    rows, counts = torch.cat([f.double(), weight.double()], 1).unique(dim=0, return_counts=True)
    f, weight = rows[:, :length].long(), rows[:, length:]
    targets = torch.arange(length).expand_as(f)
    total = 0.0
    for x in all_sequences(length, 0):
        losses = (nll(model, x.expand_as(f), f, targets, path) * weight).sum(1)
        total += math.exp(-(losses @ (counts.double() / draws)).item())
    return "bound", total <= 1.01, f"exp(-bound) of all sequences sums to {total:.4f}, at most 1"


def decoding_finishes(objective, length):
    order, passes = torch.tensor([1] + [0] * (length - 1)), 0
    while (order == 0).any():
        f = objective.decoding(order, 1)
        if f is None:
            return "decoding", None, "no text is written in another order, or into a gap"
        wanted = ((f == f.max()) & (order == 0)).nonzero()[:, 0]
        if not len(wanted):
            break
        order[wanted[0]], passes = order.max() + 1, passes + 1
    return "decoding", bool((order > 0).all()), f"{passes} passes fill {length - 1} missing tokens"
