"""What the tests check of the eleven objectives, for one of your own: python objectives.py my.py:Backward
--check

Each check yields (name, verdict, sentence): True where it holds, False where it does not, None where the
objective lacks the method; the sentence says what that costs. Only masks.py and model.py are needed; the
objective comes as an argument.
"""

import itertools
import math
from collections import Counter

import torch

from masks import Objective, queries_of, sees
from model import Config, Transformer

VOCAB = 3


def check(objective, path, length, draw_batch):
    """Run every check on sequences of `length` tokens. `draw_batch` is that of objectives.py."""
    torch.manual_seed(0)
    model = Transformer(Config(VOCAB, length, layers=2, width=16, heads=2)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 3)  # at its initial size all outputs are nearly the same

    def draw(seed, batch=64):
        tokens = torch.zeros(batch, length, dtype=torch.long)
        return draw_batch(objective, path, tokens, VOCAB, torch.Generator().manual_seed(seed))

    draw(0)
    yield "queries", True, "64 draws of f ask only for what sees something and not itself"
    yield from generator_decides(draw)
    yield from listed_is_drawn(objective, length)
    yield from promised_counts(objective, length)
    yield from no_leak(model, path, draw(1, batch=8))
    yield from chain_is_exact(model, objective, path, length)
    yield from bound_is_one(model, objective, path, length)
    yield from decoding_finishes(objective, length)


def generator_decides(draw):
    state = torch.random.get_rng_state()
    same = all(torch.equal(a, b) for a, b in zip(draw(3), draw(3)))
    same &= torch.equal(state, torch.random.get_rng_state())
    yield "generator", same, "equal seeds give equal draws, and nothing else is drawn from"


def listed_is_drawn(objective, length, draws=20_000):
    """Chi-squared of draws against the list; what comes up less than five times is pooled."""
    if type(objective).outcomes is Objective.outcomes:
        yield "outcomes", None, "not listed: the spectrum is that of 100,000 draws"
        return
    listed = objective.outcomes(length)
    if listed is None:
        yield "outcomes", None, f"too many to list at length {length}: no exact spectrum there"
        return
    expected = {tuple(f): draws * p for f, p in zip(listed[0].tolist(), listed[1].tolist())}
    seen = Counter(map(tuple, objective.groups(draws, length, torch.Generator().manual_seed(0)).tolist()))
    rare = [f for f in expected if expected[f] < 5]
    cells = [(seen[f], count) for f, count in expected.items() if count >= 5]
    cells += [(sum(seen[f] for f in rare), sum(expected[f] for f in rare))] if rare else []
    chi2, k = sum((a - b) ** 2 / b for a, b in cells), len(cells) - 1
    holds = seen.keys() <= expected.keys() and chi2 <= k + 5 * math.sqrt(2 * k) + 1e-6
    yield "outcomes", holds, f"{draws:,} draws have the listed distribution of {len(expected):,} f"


def promised_counts(objective, length):
    groups = objective.groups(2000, length, torch.Generator().manual_seed(0))
    most = int((objective.queries(groups).weight > 0).sum(1).max())
    least = int((groups > 1).sum(1).min())
    at_most, at_least = objective.max_targets(length), objective.min_targets(length)
    yield "counts", most <= at_most and least >= at_least, (
        f"{most} queries at most, max_targets {at_most}; {least} hidden at least, min_targets {at_least}")


def no_leak(model, path, batch):
    """d feature / d token is zero unless 0 < f(j) < c, and is not zero where it should not be."""
    holds = True
    for b in range(len(batch.tokens)):
        x = torch.randn(batch.tokens.shape[1], model.config.width, dtype=torch.float64, requires_grad=True)
        one = batch.part(b, b + 1)
        model.embedding.forward = lambda ids, x=x: x[None]
        features = model(one.tokens, one.groups, one.targets, path, one.cuts, one.blank)[0]
        del model.embedding.forward
        allowed = sees(one.groups[0], one.cuts[0])
        for row in (one.weight[0] > 0).nonzero()[:, 0]:
            gradient, = torch.autograd.grad(features[row].square().sum(), x, retain_graph=True)
            holds &= torch.equal(gradient.abs().sum(1) > 0, allowed[row])
    yield "leaks", holds, "the gradient of each prediction reaches its context, all of it and nothing else"


@torch.no_grad()
def nll(model, tokens, groups, queries, path):
    """-log P of the queries' targets (R, n), of rows of tokens and f (R, S)."""
    features = model(tokens, groups, queries.targets, path, queries.cuts)
    labels = tokens.gather(1, queries.targets)
    return -model.logits(features).log_softmax(-1).gather(2, labels[..., None])[..., 0]


def all_sequences(length, given):
    """Every sequence over VOCAB whose token `given` is 0."""
    tokens = torch.tensor(list(itertools.product(range(VOCAB), repeat=length)))
    return tokens[tokens[:, given] == 0]


def chain_is_exact(model, objective, path, length):
    """Each token in a pass of its own; the probabilities of all sequences sum to one."""
    regimes = objective.left_to_right(length, path)
    if regimes is None:
        yield "left_to_right", None, "no perplexity, and no generation token by token"
        return
    order = objective.chain(length)
    sequences = all_sequences(length, int(order[0]))
    for name, passes in regimes.items():
        total, found = torch.zeros(len(sequences), dtype=torch.float64), []
        for k in range(1, length):
            context = torch.zeros(length, dtype=torch.bool).index_fill(0, order[:k], True)
            p = order[k]
            exact = [f for f in passes if f[p] > 1 and torch.equal((f > 0) & (f < f[p]), context)]
            found.append(bool(exact))
            if exact:
                f = exact[0].expand(len(sequences), -1)
                queries = queries_of(f, (torch.arange(length) == p).float().expand(len(f), -1), 1)
                total += nll(model, sequences, f, queries, path)[:, 0]
        one = (-total).exp().sum().item()
        yield f"left_to_right, {name}", all(found) and abs(one - 1) < 1e-6, (
            f"{sum(found)} of {length - 1} tokens have exactly what comes before them in some pass; all "
            f"sequences have probability {one:.6f}")


def bound_is_one(model, objective, path, length, draws=4000):
    """The bound is at least -log of a distribution, so that exp of minus it sums to one at most."""
    if objective.bound(1, length) is None:
        yield "bound", None, "evaluate.py bound has nothing to show"
        return
    f, weight = objective.bound(draws, length, torch.Generator().manual_seed(0))
    rows, counts = torch.cat([f.double(), weight.double()], 1).unique(dim=0, return_counts=True)
    f, weight = rows[:, :length].long(), rows[:, length:]
    queries = queries_of(f, weight.float(), length - 1)
    sequences, share = all_sequences(length, 0), counts.double() / draws
    total = 0.0
    for x in sequences:
        losses = (nll(model, x.expand(len(f), -1), f, queries, path) * queries.weight).sum(1)
        total += math.exp(-(losses @ share).item())
    yield "bound", total <= 1.01, f"exp(-bound) of all sequences is {total:.4f} in all, and must not exceed 1"


def decoding_finishes(objective, length):
    if objective.decoding(torch.tensor([1] + [0] * (length - 1)), 1) is None:
        yield "decoding", None, "generation goes from left to right only"
        return
    order, passes = torch.tensor([1] + [0] * (length - 1)), 0
    while (order == 0).any() and passes <= length:
        f = objective.decoding(order, 1)
        wanted = ((f == f.max()) & (order == 0)).nonzero()[:, 0]
        if not len(wanted):
            break
        order[wanted[0]], passes = order.max() + 1, passes + 1
    yield "decoding", bool((order > 0).all()), f"{passes} passes fill {length - 1} missing tokens"
