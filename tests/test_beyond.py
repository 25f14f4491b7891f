"""What each objective says - f, queries, weights - against its definition, and facts that tie them."""
import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import IMAGE_WAYS, WAYS, name_of

import evaluate
from masks import hidden_count
from objectives import OBJECTIVES, choose_path, draw_batch, from_options, loss_sum
from support.cli import BadInput
from support.objective import asked

SMALL = {"dar": {"t": 2}, "mlm": {"mask": 0.4}, "vl": {"mask": (0.2, 0.7)}, "mtp": {"t": 3},
         "blocks": {"block": 2}, "spans": {"mask": 0.5, "span": 2}, "segments": {"segment": 1}}
LENGTH = {"segments": 4}


def small(name):
    """An objective on so few tokens that everything can be listed, and how many these are."""
    return from_options(name, **SMALL.get(name, {})), LENGTH.get(name, 6)


# Definitions by plain loops: {f: (probability, {(token, cut): weight})} for sequences of S tokens, from 1.

def default_queries(f):
    return {(p, c): 1.0 for p, c in enumerate(f, 1) if c > 1}


def law(pairs, queries=default_queries):
    table = {}
    for f, probability in pairs:
        table[f] = table.get(f, 0) + probability
    return {f: (probability, queries(f)) for f, probability in table.items()}


def subsets(items):
    return [set(chosen) for n in range(len(items) + 1) for chosen in itertools.combinations(items, n)]


def hidden_law(S, counts):
    """mlm, vl: every subset of the drawn size."""
    return law((tuple(1 + (i in hidden) for i in range(S)), counts[len(hidden)] / math.comb(S, len(hidden)))
               for hidden in subsets(range(S)) if len(hidden) in counts)


def vl_counts(S, low, high):
    steps, counts = 200_000, Counter()
    for k in range(steps):
        counts[hidden_count(low + (high - low) * (k + 0.5) / steps, S)] += 1 / steps
    return counts


def dar_law(S, t):
    return law((tuple(1 + max(0, math.ceil((i - first) / t)) for i in range(1, S + 1)), 1 / t)
               for first in range(1, t + 1))


def mtp_law(S, t):
    weight = {(k + h, k + 1): 1 / min(t, S - k) for k in range(1, S) for h in range(1, t + 1) if k + h <= S}
    return {tuple(range(1, S + 1)): (1.0, weight)}


def blocks_law(S, B):
    blocks = [range(start, min(start + B, S + 1)) for start in range(2, S + 1, B)]
    choices = [[hidden for hidden in subsets(block) if hidden] for block in blocks]
    table = {}
    for hidden in itertools.product(*choices):
        f, probability, weight = {1: 1}, 1.0, {}
        for b, (block, chosen) in enumerate(zip(blocks, hidden), 1):
            probability /= len(block) * math.comb(len(block), len(chosen))
            f |= {i: 2 * b + (i in chosen) for i in block}
            weight |= {(i, 2 * b + 1): len(block) / len(chosen) for i in chosen}
        table[tuple(f[i] for i in range(1, S + 1))] = probability, weight
    return table


def diffusion_law(S):
    """n uniform in 1..S-1, then a uniform n-subset of 2..S; weight (S - 1)/n."""
    table = {}
    for hidden in subsets(range(2, S + 1))[1:]:
        f = tuple(2 if i in hidden else 1 for i in range(1, S + 1))
        weight = {(i, 2): (S - 1) / len(hidden) for i in hidden}
        table[f] = 1 / (S - 1) / math.comb(S - 1, len(hidden)), weight
    return table


def spans_law(S, rho, L):
    n = hidden_count(rho, S)
    m = min(max(round(n / L), 1), S - n + 1)
    found = []
    for hidden in itertools.combinations(range(S), n):
        if sum(i - 1 not in hidden for i in hidden) == m:
            found.append(tuple(2 + hidden.index(i) if i in hidden else 1 for i in range(S)))
    return law((f, 1 / len(found)) for f in found)


def segments_law(side, k):
    squares = (side // k) ** 2
    return law((tuple(1 + order[r // k * (side // k) + c // k] for r in range(side) for c in range(side)),
                1 / math.factorial(squares)) for order in itertools.permutations(range(squares)))


LAWS = {
    "ar": lambda S: law([(tuple(range(1, S + 1)), 1.0)]),
    "dar": lambda S: dar_law(S, 2),
    "mlm": lambda S: hidden_law(S, {hidden_count(0.4, S): 1.0}),
    "vl": lambda S: hidden_law(S, vl_counts(S, 0.2, 0.7)),
    "permutation": lambda S: law((f, 1 / math.factorial(S)) for f in itertools.permutations(range(1, S + 1))),
    "prefix": lambda S: law((tuple(max(1, i - k) for i in range(1, S + 1)), 1 / (S - 1))
                            for k in range(S - 1)),
    "mtp": lambda S: mtp_law(S, 3),
    "diffusion": diffusion_law,
    "blocks": lambda S: blocks_law(S, 2),
    "spans": lambda S: spans_law(S, 0.5, 2),
    "segments": lambda S: segments_law(math.isqrt(S), 1),
}


def asked_of(objective, f):
    """{(token, cut): weight} of one f."""
    rows = zip(*(x[0].tolist() for x in objective.queries(torch.tensor([f]))))
    return {(p + 1, c): w for p, c, w in rows if w > 0}


@pytest.mark.parametrize("name", LAWS)
def test_listed_outcomes_queries_and_weights_are_those_of_the_definition(name):
    objective, S = small(name)
    groups, probability = objective.outcomes(S)
    table = LAWS[name](S)
    listed = Counter()
    for f, p in zip(groups.tolist(), probability.tolist()):
        listed[tuple(f)] += p
    assert listed.keys() == table.keys()
    for f, (p, weight) in table.items():
        assert listed[f] == pytest.approx(p, abs=1e-5 if name == "vl" else 1e-12)
        assert asked_of(objective, f) == pytest.approx(weight)


@pytest.mark.parametrize("name, options, S", [
    ("blocks", {"block": 4}, 7), ("blocks", {"block": 3}, 9), ("spans", {"mask": 0.6, "span": 1}, 7),
    ("spans", {"mask": 0.3, "span": 3}, 8), ("spans", {"mask": 0.9, "span": 1}, 5),
    ("segments", {"segment": 2}, 16),
    ("mtp", {"t": 1}, 5), ("mtp", {"t": 4}, 5)])
def test_other_sizes(name, options, S):
    """A short last block, one span, as many spans as fit, squares of several patches, t at its ends."""
    objective = from_options(name, **options)
    table = {"blocks": lambda: blocks_law(S, options["block"]), "mtp": lambda: mtp_law(S, options["t"]),
             "spans": lambda: spans_law(S, options["mask"], options["span"]),
             "segments": lambda: segments_law(math.isqrt(S), options["segment"])}[name]()
    objective.check(S)
    groups, probability = objective.outcomes(S)
    assert {tuple(f) for f in groups.tolist()} == table.keys() and len(groups) == len(table)
    for f, p in zip(groups.tolist(), probability.tolist()):
        assert p == pytest.approx(table[tuple(f)][0], abs=1e-12)
        assert asked_of(objective, f) == pytest.approx(table[tuple(f)][1])
    drawn = objective.groups(50, S, torch.Generator().manual_seed(0))
    assert {tuple(f) for f in drawn.tolist()} <= table.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samplers_draw_the_listed_outcomes(name):
    """Chi-squared of 20,000 draws; outcomes that would be drawn less than five times are pooled."""
    objective, S = small(name)
    groups, probability = objective.outcomes(S)
    expected, draws = Counter(), 20_000
    for f, p in zip(groups.tolist(), probability.tolist()):
        expected[tuple(f)] += draws * p
    assert sum(expected.values()) == pytest.approx(draws)
    seen = Counter(map(tuple, objective.groups(draws, S, torch.Generator().manual_seed(0)).tolist()))
    assert seen.keys() <= expected.keys()
    rare = [f for f in expected if expected[f] < 5]
    cells = [(seen[f], expected[f]) for f in expected if f not in rare]
    cells += [(sum(seen[f] for f in rare), sum(expected[f] for f in rare))] if rare else []
    chi2, k = sum((a - b) ** 2 / b for a, b in cells), len(cells) - 1
    assert chi2 <= k + 5 * math.sqrt(2 * k) + 1e-9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_promised_numbers_of_targets(name):
    objective, S = small(name)
    groups = objective.outcomes(S)[0]
    weight = objective.queries(groups).weight
    assert weight.shape == (len(groups), objective.max_targets(S)) and (weight > 0).any(1).all()
    hidden = (groups > 1).sum(1)
    assert int(hidden.min()) >= objective.min_targets(S) and (weight > 0).all(1).any()


def sources(f, c):
    """What row (p, c) sees."""
    return {j for j, group in enumerate(f) if 0 < group < c}


def leaks(model, objective, path, batch, x):
    """[(query, what it depends on by its gradient, what it should)] of the first sequence of a batch; x (S,
    D), with requires_grad, are the rows that stand for its tokens."""
    patched = model.config.patch
    tokens = x[None] if patched else batch.tokens[:1]
    if not patched:
        model.embedding.weight.requires_grad_(False)
        table = model.embedding.forward
        model.embedding.forward = lambda ids: x[None]
    inputs = (batch.groups, batch.targets, path, batch.cuts, batch.blank, False, batch.given)
    features = model(tokens, *(y[:1] if isinstance(y, torch.Tensor) else y for y in inputs))[0]
    if not patched:
        model.embedding.forward = table
    f, found = batch.groups[0].tolist(), []
    for row, p, c, w in zip(features, *(y[0].tolist() for y in (batch.targets, batch.cuts, batch.weight))):
        if w > 0:
            grad, = torch.autograd.grad(row.float().square().sum(), x, retain_graph=True)
            found.append(((p, c), set(grad.abs().sum(-1).nonzero()[:, 0].tolist()), sources(f, c)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS + IMAGE_WAYS, ids=name_of)
def test_predictions_depend_on_exactly_their_contexts(way, dtype, make_model, make_image_model):
    objective, path = way
    images = way in IMAGE_WAYS and way not in WAYS or path == "mae"
    model = (make_image_model(path) if images else make_model()).float()
    S = model.config.length
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, S, max(model.config.values, 1), generator=generator)
    tokens = patches if images else torch.randint(11, (1, S), generator=generator)
    for _ in range(3):
        batch = draw_batch(objective, path, tokens, 11, generator)
        x = (tokens[0] if images else 0.2 * torch.randn(S, 16, generator=generator)).clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = leaks(model, objective, path, batch, x)
        assert found
        for query, reads, should in found:
            assert reads == should, query


# ---------------------------------------------------------------------------- facts

def losses(model, objective, path, sequences):
    """Exact distribution of a sequence's loss over f -> [(f, probability, loss (N,))] by enumeration."""
    S = sequences.shape[1]
    groups, probability = objective.outcomes(S)
    found = []
    for f, p in zip(groups, probability.tolist()):
        targets, cuts, weight = objective.queries(f[None])
        rows = [x.expand(len(sequences), -1) for x in (f[None], targets, cuts)]
        nll = evaluate.target_nll(model, sequences, rows[0], rows[1], path, False, rows[2]).double()
        found.append((tuple(f.tolist()), p, (nll * weight).sum(1)))
    return found


def mean_loss(*args):
    return sum(p * loss for _, p, loss in losses(*args))


def all_sequences(vocab, S):
    return torch.tensor(list(itertools.product(range(vocab), repeat=S)))


@pytest.mark.parametrize("name, options", [("mtp", {"t": 1}), ("dar", {"t": 1}), ("blocks", {"block": 1})])
def test_the_smallest_parts_are_autoregressive(name, options, make_model):
    """The same queries see the same tokens: the loss of every sequence is that of ar."""
    model, S = make_model(vocab=3, length=5), 5
    ar, other = from_options("ar"), from_options(name, **options)
    sequences = all_sequences(3, S)[::7]
    assert torch.allclose(mean_loss(model, ar, "two-stream", sequences),
                          mean_loss(model, other, "two-stream", sequences), atol=1e-9)


def test_mtp_is_equation_3(make_model):
    """Eq. 3 by its two sums: over prefixes k, the mean over the next tokens, as many as there are up to t."""
    S, t, model = 6, 3, make_model(vocab=4, length=6)
    tokens = torch.randint(4, (1, S), generator=torch.Generator().manual_seed(1))
    total, f = 0.0, torch.arange(1, S + 1)[None]
    for k in range(1, S):
        last = min(k + t, S)
        rows = torch.arange(k, last)[None]
        features = model(tokens, f, rows, "two-stream", torch.full_like(rows, k + 1))
        scores = model.logits(features)[0].log_softmax(-1)
        total -= sum(scores[j, tokens[0, p]] for j, p in enumerate(range(k, last))).item() / (last - k)
    batch = draw_batch(from_options("mtp", t=t), "two-stream", tokens, 4)
    assert loss_sum(model.float(), batch, "two-stream").item() == pytest.approx(total, rel=1e-5)
    assert batch.total.item() == pytest.approx(S - 1)


def test_one_block_is_diffusion(make_model):
    """B = S - 1: the same sets are hidden with the same probability, context and weight. In one layer, where
    the content is the tokens, so is the loss; in more, x_1 is encoded without the visible ones."""
    S, model = 5, make_model(vocab=3, length=5, layers=1)
    sequences = all_sequences(3, S)[::5]
    one = losses(model, from_options("blocks", block=S - 1), "two-stream", sequences)
    two = {f: (p, loss) for f, p, loss in losses(model, from_options("diffusion"), "two-stream", sequences)}
    assert len(one) == len(two)
    for f, p, loss in one:
        same_p, same_loss = two[(1, *(g - 1 for g in f[1:]))]
        assert p == pytest.approx(same_p) and torch.allclose(loss, same_loss, atol=1e-9)


class Oracle:
    """Stands for a network whose prediction of x_p depends on the tokens of its context and nothing else."""

    def __init__(self, vocab, seed=0):
        self.vocab, self.seed = vocab, seed

    def nll(self, x, p, seen):
        """-log P(x_p | x at the positions `seen`)."""
        context = tuple(sorted((j, x[j]) for j in seen))
        generator = torch.Generator().manual_seed(hash((self.seed, p, context)) % 2 ** 31)
        scores = 2 * torch.randn(self.vocab, generator=generator, dtype=torch.float64)
        return -scores.log_softmax(0)[x[p]].item()

    def order_nll(self, x, order):
        return sum(self.nll(x, p, order[:k]) for k, p in enumerate(order) if k)


def test_diffusion_is_permutation_in_expectation():
    """With x_1 given, exactly: a sum over 24 orders, and over 15 sets of hidden tokens."""
    S, oracle = 5, Oracle(3)
    x = (2, 0, 1, 1, 2)
    orders = [(0, *rest) for rest in itertools.permutations(range(1, S))]
    permutation = sum(oracle.order_nll(x, order) for order in orders) / len(orders)
    objective = from_options("diffusion")
    diffusion = 0.0
    for f, p in zip(*(y.tolist() for y in objective.outcomes(S))):
        for (i, c), w in asked_of(objective, f).items():
            diffusion += p * w * oracle.nll(x, i - 1, sources(f, c))
    assert diffusion == pytest.approx(permutation, rel=1e-6)  # weights are float32


def order_nll(run, sequences, groups, ask):
    """-log P_o of sequences (N, S) by the passes of one order, groups and ask (passes, S) -> (N,)."""
    queries = asked(groups, ask.float(), int(ask.sum(1).max()))
    return torch.stack([evaluate.weighted_nll(run, x.expand(len(groups), -1), groups, queries).sum()
                        for x in sequences])


@pytest.mark.parametrize("options", [
    {"objective": "diffusion"}, {"objective": "mlm", "mask": 0.3}, {"objective": "permutation"},
    {"objective": "blocks", "block": 2}, {"objective": "blocks", "block": 3}], ids=str)
@pytest.mark.parametrize("streams", [None, 2])
def test_any_order_mixture(options, streams, make_run):
    """Enumerated on three tokens after the given one: each order is a distribution, so is their mixture;
    the mean of `bound` is the mean over orders, and no less than -log of the mixture."""
    options = dict(options)
    objective = from_options(options.pop("objective"), **options)
    run, S, V = make_run(objective, choose_path(objective, streams), vocab=3, length=4), 4, 3
    generator, found = torch.Generator().manual_seed(0), {}
    f, ask = objective.orders(400, S, generator)
    for groups, asks in zip(f, ask):
        found[str(groups.tolist()) + str(asks.tolist())] = groups, asks
    count = 2 if options.get("block") == 2 else 6
    assert len(found) == count
    sequences = torch.tensor([(1, *rest) for rest in itertools.product(range(V), repeat=S - 1)])
    nll = torch.stack([order_nll(run, sequences, *order) for order in found.values()])  # (orders, sequences)
    assert (-nll).exp().sum(1).tolist() == pytest.approx([1.0] * count, abs=1e-5)
    mixture, mean = math.log(count) - (-nll).logsumexp(0), nll.mean(0)
    assert (-mixture).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (mean >= mixture - 1e-9).all() and (mean - mixture).max() > 1e-3

    # The mean of `bound` over many draws.
    draws = 6000
    f, weight = objective.bound(draws, S, torch.Generator().manual_seed(1))
    table = Counter(tuple(map(tuple, zip(g, w))) for g, w in zip(f.tolist(), weight.tolist()))
    g, w = (torch.tensor([[pair[k] for pair in row] for row in table]) for k in (0, 1))
    times = torch.tensor(list(table.values()), dtype=torch.float64)
    queries = asked(g, w, S - 1)
    terms = torch.stack([evaluate.weighted_nll(run, x.expand(len(g), -1), g, queries) for x in sequences])
    estimate = (terms * times).sum(1) / draws
    error = ((terms - estimate[:, None]).square() * times).sum(1).sqrt() / draws
    assert ((estimate - mean).abs() < 5 * error + 1e-6).all()


def test_bound_is_stratified():
    """Of 127 draws of 128 tokens, each number of hidden tokens comes once."""
    f, weight = from_options("diffusion").bound(127, 128, torch.Generator().manual_seed(0))
    hidden = (f == 2).sum(1)
    assert sorted(hidden.tolist()) == list(range(1, 128)) and (f[:, 0] == 1).all()
    assert torch.allclose(weight.sum(1), torch.full((127,), 127.0))


@pytest.mark.parametrize("name", ["diffusion", "blocks"])
def test_the_training_loss_is_a_bound(name, make_run):
    """What training minimises is, over all f, at least -log of the mixture over orders, for each sequence."""
    objective = from_options(name, **({"block": 3} if name == "blocks" else {}))
    run = make_run(objective, choose_path(objective, 2), vocab=3, length=4)
    sequences = torch.tensor([(1, *rest) for rest in itertools.product(range(3), repeat=3)])
    trained = mean_loss(run.model, objective, run.path, sequences)
    f, ask = objective.orders(300, 4, torch.Generator().manual_seed(0))
    distinct = {str(a.tolist()): (g, a) for g, a in zip(f, ask)}
    nll = torch.stack([order_nll(run, sequences, *order) for order in distinct.values()])
    assert len(distinct) == 6
    assert torch.allclose(trained, nll.mean(0), atol=1e-6)                 # one block: the two means are one
    assert (trained >= math.log(6) - (-nll).logsumexp(0) - 1e-9).all()


def test_left_to_right_likelihood_is_that_of_ar_where_the_f_are_one(make_run):
    """mtp, permutation and prefix score text by the pass of ar: of one network the numbers are the same."""
    sequences = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    ar = evaluate.left_to_right(make_run(from_options("ar"), "two-stream"), sequences)["next"]
    for name in ("mtp", "permutation", "prefix"):
        run = make_run(from_options(name), "two-stream")
        assert torch.equal(evaluate.left_to_right(run, sequences)["next"], ar)


def test_likelihood_of_blocks_by_a_plain_loop(make_run):
    """Token p in its block: the blocks before, split where it stands in its own, and its own up to it."""
    S, B = 8, 3
    run = make_run(from_options("blocks", block=B), "two-stream")
    sequences = torch.randint(11, (2, S), generator=torch.Generator().manual_seed(0))
    found = evaluate.left_to_right(run, sequences)["next"]
    for p in range(1, S):
        j = (p - 1) % B
        f = [1] + [2 * ((i - 1) // B + 1) + ((i - 1) % B >= j) for i in range(1, p + 1)]
        f = torch.tensor(f).expand(2, -1)
        features = run.model(sequences[:, :p + 1], f, torch.full((2, 1), p), "two-stream")
        nll = -run.model.logits(features)[:, 0].log_softmax(-1).gather(1, sequences[:, p:p + 1])[:, 0]
        assert torch.allclose(found[:, p - 1].double(), nll, atol=1e-5)


@pytest.mark.parametrize("name, options, length, says", [
    ("mtp", {"t": 8}, 8, "1..7"), ("blocks", {"block": 8}, 8, "1..7"), ("segments", {}, 8, "no square"),
    ("segments", {"segment": 2}, 9, "does not divide"), ("segments", {"segment": 3}, 9, "does not divide"),
    ("diffusion", {}, 1, "nothing to predict")])
def test_sizes_that_do_not_fit(name, options, length, says):
    with pytest.raises(BadInput, match=says):
        from_options(name, **options).check(length)


@pytest.mark.parametrize("mask", [0.0, 1.0, 1.5])
def test_spans_need_a_ratio(mask):
    with pytest.raises(BadInput, match="between 0 and 1"):
        from_options("spans", mask=mask)


def test_segments_are_for_images():
    from engine.settings import resolve
    with pytest.raises(BadInput, match="patches of images"):
        resolve(objective="segments", data="pydoc")
