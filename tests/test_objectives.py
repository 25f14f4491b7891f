"""What each objective says - f, queries, weights - against its definition; facts that tie them; the loss."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from conftest import call, seeded

from experiments.check import listed_is_drawn
from masks import Objective, Queries, hidden_count
from objectives import OBJECTIVES, choose_path, describe, draw_batch, flag, from_options, loss_sum, target_nll
from util import BadInput

# ---------------------------------------------------------------------------- definitions by plain loops
#
# {f: (probability, {(token, cut): weight})} for sequences of S tokens, counted from 1.

def by_default(pairs):
    """Every token with f(p) > 1 is asked for at the cut f(p) and counts 1."""
    table = Counter()
    for f, probability in pairs:
        table[f] += probability
    return {f: (share, {(p, c): 1.0 for p, c in enumerate(f, 1) if c > 1}) for f, share in table.items()}


def subsets(items):
    return [set(chosen) for n in range(len(items) + 1) for chosen in itertools.combinations(items, n)]


def dar(S, t):
    low, high = t if isinstance(t, tuple) else (t, t)
    return by_default((tuple(1 + max(0, math.ceil((i - first) / t)) for i in range(1, S + 1)),
                       1 / t / (high - low + 1)) for t in range(low, high + 1) for first in range(1, t + 1))


def masked(S, mask):
    """Every subset of the drawn size; where the ratio is drawn, the sizes by a fine grid of ratios."""
    low, high = mask if isinstance(mask, tuple) else (mask, mask)
    rho = torch.linspace(low, high, 2_000_001, dtype=torch.float64) if low < high else torch.tensor([low])
    sizes = hidden_count(rho, S).bincount(minlength=S + 1).double() / len(rho)
    return by_default((tuple(1 + (i in hidden) for i in range(S)),
                       sizes[len(hidden)].item() / math.comb(S, len(hidden)))
                      for hidden in subsets(range(S)) if sizes[len(hidden)] > 0)


def mtp(S, t):
    """Eq. 3: over prefixes k, the mean over the next tokens, as many as there are up to t."""
    weight = {(k + h, k + 1): 1 / min(t, S - k) for k in range(1, S) for h in range(1, t + 1) if k + h <= S}
    return {tuple(range(1, S + 1)): (1.0, weight)}


def diffusion(S):
    """n uniform in 1..S-1, then a uniform n-subset of 2..S is hidden and counts (S - 1)/n."""
    return {tuple(1 + (i in hidden) for i in range(1, S + 1)):
            (1 / (S - 1) / math.comb(S - 1, len(hidden)), {(i, 2): (S - 1) / len(hidden) for i in hidden})
            for hidden in subsets(range(2, S + 1))[1:]}


def blocks(S, block):
    """In every block of B tokens after the first: n uniform in 1..B, a uniform n-subset, weights B/n."""
    places = [range(start, min(start + block, S + 1)) for start in range(2, S + 1, block)]
    table = {}
    for chosen in itertools.product(*(subsets(place)[1:] for place in places)):
        f, share, weight = [1], 1.0, {}
        for b, (place, hidden) in enumerate(zip(places, chosen), 1):
            f += [2 * b + (i in hidden) for i in place]
            share /= len(place) * math.comb(len(place), len(hidden))
            weight |= {(i, 2 * b + 1): len(place) / len(hidden) for i in hidden}
        table[tuple(f)] = share, weight
    return table


def spans(S, mask, span):
    n = int(hidden_count(mask, S))
    m = min(max(round(n / span), 1), S - n + 1)
    found = [hidden for hidden in itertools.combinations(range(S), n)
             if sum(i - 1 not in hidden for i in hidden) == m]
    return by_default((tuple(2 + hidden.index(i) if i in hidden else 1 for i in range(S)), 1 / len(found))
                      for hidden in found)


def segments(S, segment):
    side = math.isqrt(S)
    across = side // segment
    orders = list(itertools.permutations(range(1, across ** 2 + 1)))
    return by_default((tuple(order[r // segment * across + c // segment] for r in range(side)
                             for c in range(side)), 1 / len(orders)) for order in orders)


DEFINITIONS = {
    "ar": lambda S: by_default([(tuple(range(1, S + 1)), 1.0)]),
    "dar": dar,
    "mlm": masked,
    "vl": masked,
    "permutation": lambda S: by_default((f, 1 / math.factorial(S))
                                        for f in itertools.permutations(range(1, S + 1))),
    "prefix": lambda S: by_default((tuple(max(1, i - k) for i in range(1, S + 1)), 1 / (S - 1))
                                   for k in range(S - 1)),
    "mtp": mtp, "diffusion": diffusion, "blocks": blocks, "spans": spans, "segments": segments,
}

# On so few tokens that everything can be listed. A short last block, one span, as many spans as fit, squares
# of several patches, t at its ends.
CASES = [("ar", {}, 6), ("dar", {"t": 2}, 6), ("dar", {"t": 5}, 6), ("dar", {"t": (1, 3)}, 6),
         ("dar", {"t": (2, 4)}, 9), ("mlm", {"mask": 0.4}, 6),
         ("vl", {"mask": (0.2, 0.7)}, 6), ("vl", {"mask": (0.01, 1.0)}, 5), ("vl", {"mask": (0.5, 0.5)}, 5),
         ("permutation", {}, 5), ("prefix", {}, 6), ("mtp", {"t": 3}, 6), ("mtp", {"t": 1}, 5),
         ("mtp", {"t": 4}, 5), ("diffusion", {}, 6), ("blocks", {"block": 2}, 6), ("blocks", {"block": 4}, 7),
         ("blocks", {"block": 3}, 9), ("spans", {"mask": 0.5, "span": 2}, 6),
         ("spans", {"mask": 0.6, "span": 1}, 7), ("spans", {"mask": 0.3, "span": 3}, 8),
         ("spans", {"mask": 0.9, "span": 1}, 5), ("segments", {"segment": 1}, 4),
         ("segments", {"segment": 2}, 16)]
IDS = [f"{describe(from_options(name, **options))} S={S}".replace(" ", "-") for name, options, S in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    """(objective, S, its table by the definition)."""
    name, options, S = request.param
    return from_options(name, **options), S, DEFINITIONS[name](S, **options)


def queries_by_token(objective, f):
    """{(token, cut): weight} of one f, the tokens counted from 1."""
    rows = zip(*(x[0].tolist() for x in objective.queries(torch.tensor([f]))))
    return {(p + 1, c): w for p, c, w in rows if w > 0}


def test_listed_outcomes_queries_and_weights_are_those_of_the_definition(case):
    objective, S, table = case
    objective.check(S)
    listed = Counter()
    for f, p in zip(*(x.tolist() for x in objective.outcomes(S))):
        listed[tuple(f)] += p
    assert listed.keys() == table.keys()
    for f, (p, weight) in table.items():
        assert listed[f] == pytest.approx(p, abs=1e-5 if flag(objective) == "vl" else 1e-12)
        assert queries_by_token(objective, f) == pytest.approx(weight)


def test_the_sampler_draws_the_listed_outcomes_and_keeps_its_promises(case):
    """Both promised numbers of targets hold in every outcome, and the larger one is needed."""
    objective, S, table = case
    assert listed_is_drawn(objective, S)[1]
    groups = torch.tensor(list(table))
    weight, hidden = objective.queries(groups).weight, (groups > 1).sum(1)
    assert weight.shape == (len(groups), objective.max_targets(S))
    assert (weight > 0).any(1).all() and (weight > 0).all(1).any()
    assert int(hidden.min()) >= objective.min_targets(S)


# ---------------------------------------------------------------------------- facts

def pairs(name, S, **options):
    """{(target, its context): weight in the expected loss}, tokens counted from 1."""
    objective, total = from_options(name, **options), Counter()
    for f, share in zip(*(x.tolist() for x in objective.outcomes(S))):
        for (p, c), weight in queries_by_token(objective, f).items():
            total[p, frozenset(j for j, group in enumerate(f, 1) if 0 < group < c)] += share * weight
    return dict(total)


@pytest.mark.parametrize("S", [5, 6])
def test_objectives_that_are_one(S):
    """The same tokens are predicted from the same contexts, with the same weights."""
    ar = {(p, frozenset(range(1, p))): 1.0 for p in range(2, S + 1)}
    for name, options in (("ar", {}), ("dar", {"t": 1}), ("mtp", {"t": 1}), ("blocks", {"block": 1})):
        assert pairs(name, S, **options) == pytest.approx(ar)
    assert pairs("blocks", S, block=S - 1) == pytest.approx(pairs("diffusion", S))
    eq_6 = {(p, frozenset(range(1, k + 1))): 1 / 3
            for k in range(1, S) for p in range(k + 1, min(k + 3, S) + 1)}
    assert pairs("dar", S, t=3) == pytest.approx(eq_6)


class Oracle:
    """Stands for a network whose prediction of x_p depends on the tokens of its context and nothing else."""

    def __init__(self, sequence, vocab=3):
        self.sequence, self.vocab, self.known = sequence, vocab, {}

    def nll(self, p, context):
        """-log P(x_p | the tokens of the context), by a random softmax for each pair."""
        key = p, frozenset(context)
        if key not in self.known:
            generator = seeded(7 + len(self.known))
            scores = 2 * torch.randn(self.vocab, generator=generator, dtype=torch.float64)
            self.known[key] = -scores.log_softmax(0)[self.sequence[p - 1]].item()
        return self.known[key]

    def mean_over_orders(self, places):
        """Places (lists of tokens) are uncovered one after the other, the tokens of each in a random order;
        what stands in none is given."""
        given, means = sorted(set(range(1, len(self.sequence) + 1)).difference(*places)), []
        for orders in itertools.product(*map(itertools.permutations, places)):
            order = [*given, *itertools.chain(*orders)]
            means.append(sum(self.nll(p, order[:k]) for k, p in enumerate(order) if k >= len(given)))
        return sum(means) / len(means)


SEQUENCE, REST = (2, 0, 1, 1, 2), [[2, 3, 4, 5]]


@pytest.mark.parametrize("name, options, places", [
    ("diffusion", {}, REST), ("blocks", {"block": 4}, REST), ("blocks", {"block": 2}, [[2, 3], [4, 5]]),
    ("blocks", {"block": 3}, [[2, 3, 4], [5]])])
def test_the_expected_loss_is_the_mean_over_orders(name, options, places):
    """So diffusion is permutation in expectation, with x_1 given, and each is a bound by Jensen."""
    oracle = Oracle(SEQUENCE)
    loss = sum(weight * oracle.nll(*pair) for pair, weight in pairs(name, 5, **options).items())
    assert loss == pytest.approx(oracle.mean_over_orders(places), rel=1e-6)


@pytest.mark.parametrize("name, options, places", [
    ("mlm", {"mask": 0.3}, REST), ("vl", {}, REST), ("diffusion", {}, REST), ("permutation", {}, REST),
    ("blocks", {"block": 2}, [[2, 3], [4, 5]]), ("blocks", {"block": 3}, [[2, 3, 4], [5]])])
def test_the_bound_is_the_mean_over_orders(name, options, places):
    """The mean of 20,000 draws of `bound`, within five standard errors."""
    f, weight = from_options(name, **options).bound(20_000, 5, seeded(1))
    oracle, table = Oracle(SEQUENCE), Counter(zip(map(tuple, f.tolist()), map(tuple, weight.tolist())))
    terms = [sum(w * oracle.nll(p, [j for j, group in enumerate(f, 1) if 0 < group < f[p - 1]])
                 for p, w in enumerate(weights, 1) if w > 0) for f, weights in table]
    terms, times = (torch.tensor(x, dtype=torch.float64) for x in (terms, list(table.values())))
    mean = (terms * times).sum() / 20_000
    error = ((terms - mean).square() * times).sum().sqrt() / 20_000
    assert abs(mean - oracle.mean_over_orders(places)) < 5 * error + 1e-6


def test_only_objectives_that_have_them_claim_a_likelihood_or_a_bound():
    claims = {name: (objective.left_to_right(8, "two-stream") is not None, objective.bound(2, 8) is not None)
              for name, objective in ((name, from_options(name)) for name in DEFINITIONS if name != "blocks")}
    assert {name for name, (exact, _) in claims.items() if not exact} == {"spans", "segments"}
    assert {name for name, (_, bound) in claims.items() if bound} == {"mlm", "vl", "permutation", "diffusion"}
    plain = Objective()
    assert plain.left_to_right(8, "mask") is plain.bound(2, 8) is plain.decoding(None, 1) is None


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if name != "segments"])
def test_a_step_of_generation_asks_for_missing_tokens_from_known_ones(name):
    """All that are missing, or those of the first block, or the next one: from all that are known so far."""
    objective = from_options(name, **({"block": 3} if name == "blocks" else {}))
    for order in ([1, 2, 0, 0, 0, 0, 0], [1, 2, 0, 4, 3, 0, 0], [1, 2, 3, 4, 0, 5, 0]):
        f = objective.decoding(torch.tensor(order), 2)
        if f is None:
            assert objective.generation == "left"
            continue
        top = int(f.max())
        wanted = [i for i, group in enumerate(f.tolist()) if group == top and order[i] == 0]
        seen = {i for i, group in enumerate(f.tolist()) if 0 < group < top}
        missing = [i for i in range(7) if order[i] == 0]
        known = {i for i in range(7) if order[i] > 0}
        if name == "blocks":  # two blocks of three: nothing of a later one than is asked for
            last = 3 if missing[0] <= 3 else 6
            missing, known = [i for i in missing if i <= last], {i for i in known if i <= last}
        assert wanted == (missing[:1] if name == "spans" else missing) and seen == known


# ---------------------------------------------------------------------------- the batch and the loss

def test_80_10_10_rule():
    tokens = torch.arange(400)[None].expand(500, -1)  # ids 0..399, so that a changed token shows
    batch, always = (draw_batch(from_options("mlm", mask=0.5), "mask", tokens, 400,
                                seeded(), rule) for rule in ("bert", "always"))
    target, changed = batch.groups == 2, batch.tokens != tokens
    assert not batch.blank[~target].any() and not changed[~target].any() and not (changed & batch.blank).any()
    for share, expected in ((batch.blank[target], 0.8), (changed[target], 0.1 * 399 / 400)):
        assert abs(share.double().mean().item() - expected) < 4 * math.sqrt(0.25 / len(share))
    assert torch.equal(batch.labels, tokens.gather(1, batch.targets))
    assert torch.equal(always.blank, always.groups == 2) and torch.equal(always.tokens, tokens)


def test_a_part_of_a_batch_is_what_it_is_in_the_whole(way):
    """Processes and micro-batches draw the same f, queries and corruption, and know the total of the whole
    batch. What fills up the last text is never asked for."""
    objective, path = way
    tokens, lengths = torch.randint(11, (6, 8), generator=seeded()), torch.tensor([8, 8, 8, 8, 8, 3])
    full = draw_batch(objective, path, tokens, 11, seeded(1), "bert")
    whole = draw_batch(objective, path, tokens, 11, seeded(1), "bert", lengths=lengths)
    asked = full.targets < lengths[:, None]
    assert torch.equal(whole.weight, full.weight * asked) and (full.weight * ~asked).sum() > 0
    assert whole.total.tolist() == pytest.approx([whole.weight.sum().item()] * 6)
    for part in (slice(0, 2), slice(2, 6)):
        drawn = draw_batch(objective, path, tokens[part], 11, seeded(1), "bert", 6, part, lengths)
        for ours, expected, cut in zip(drawn, whole, whole.part(part.start, part.stop)):
            assert torch.equal(ours, expected[part]) and torch.equal(ours, cut)


def test_the_loss_is_the_weighted_sum_over_queries(way, make_model):
    """Query by query, each in a pass of its own, times a weight that the objective might give."""
    objective, path = way
    model, generator = make_model(dtype=torch.float32), seeded(1)
    tokens = torch.randint(11, (3, 8), generator=generator)
    batch = draw_batch(objective, path, tokens, 11, generator)
    batch = batch._replace(weight=batch.weight * torch.rand(batch.weight.shape, generator=generator))
    total = 0.0
    for b, k in batch.weight.nonzero().tolist():
        one = tokens[b:b + 1], batch.groups[b:b + 1], batch.targets[b:b + 1, k:k + 1]
        cut = batch.cuts[b:b + 1, k:k + 1]
        logits = model.logits(model(*one, path, cut))[0, 0]
        nll = logits.logsumexp(0) - logits[tokens[b, batch.targets[b, k]]]
        torch.testing.assert_close(target_nll(model, *one, path, cuts=cut)[0, 0], nll)
        total += (batch.weight[b, k] * nll).item()
    assert loss_sum(model, batch, path).item() == pytest.approx(total, rel=1e-4)


def test_the_loss_of_images_is_the_squared_error(image_way, make_image_model):
    objective, path = image_way
    model, generator = make_image_model(path), seeded()
    patches = torch.randn(3, 9, 48, generator=generator, dtype=torch.float64)
    batch = draw_batch(objective, path, patches, 0, generator)
    if path == "mae":  # the encoder has room for as many patches as are ever given, and for no more
        assert batch.given.shape == (3, 9 - objective.min_targets(9))
    features = model(patches, batch.groups, batch.targets, path, batch.cuts, given=batch.given)
    total = 0.0
    for b, k in batch.weight.nonzero().tolist():
        error = model.pixels(features[b, k]) - patches[b, batch.targets[b, k]]
        total += batch.weight[b, k] * error.square().mean()
    torch.testing.assert_close(loss_sum(model, batch, path), total, check_dtype=False)


# ---------------------------------------------------------------------------- new objectives, and the demo

def fork(f, **members):
    """An objective whose every draw is f, as somebody might write it."""
    members["groups"] = lambda self, batch, length, generator=None: torch.tensor([f]).repeat(batch, 1)
    return dataclass(frozen=True)(type("Fork", (Objective,), members))()


def rows(n, target, cut, weight=1.0):
    """A `queries` that asks n times for one target at one cut."""
    def queries(self, groups):
        shape = len(groups), n
        return Queries(torch.full(shape, target), torch.full(shape, cut), torch.full(shape, weight))
    return queries


@pytest.mark.parametrize("objective, path, says", [
    (fork([1, 2, 3]), "two-stream", "should be"),
    (fork([1.0, 2, 3, 4]), "two-stream", "should be"),
    (fork([1, 2, 3, 4], queries=rows(4, 2, 3)), "two-stream", "should be"),
    (fork([1, 2, 2, 2], max_targets=lambda *_: 2), "two-stream", "asks for 3 tokens"),
    (fork([2, 3, 4, 5]), "two-stream", "asks for 4 tokens"),
    (fork([3, 2, 2, 0]), "two-stream", "would see nothing"),
    (fork([1, 2, 3, 4], queries=rows(3, 2, 5)), "two-stream", "would see itself"),
    (fork([1, 1, 1, 1]), "two-stream", "nothing is asked for"),
    (fork([1, -1, 2, 3]), "two-stream", "cannot compute this f"),
    (fork([1, 2, 1, 3]), "mask", "cannot compute this f"),
    (fork([1, 2, 0, 3]), "causal", "cannot compute this f"),
    (fork([1, 2, 3, 4], queries=rows(3, 3, 3)), "causal", "no cuts but f"),
    (fork([1, 1, 2, 1], min_targets=lambda *_: 2), "mae", "min_targets")])
def test_what_cannot_be_computed_is_refused_where_it_is_drawn(objective, path, says):
    with pytest.raises(BadInput, match=says):
        draw_batch(objective, path, torch.zeros(2, 4, dtype=torch.long), 3)


def test_a_class_that_is_not_written_as_it_must_be_is_refused_by_name(monkeypatch):
    plain = type("Plain", (Objective,), {"span": 2, "__annotations__": {"span": int}})
    bert = type(fork([1, 2], one_stream="bert"))
    unseeded = type("Unseeded", (Objective,), {"groups": lambda self, batch, length: None})
    unseeded = dataclass(frozen=True)(unseeded)
    for cls, says in ((plain, "dataclass.*above class Plain"), (bert, "one_stream is 'bert'"),
                      (unseeded, "Unseeded.groups takes batch, length, generator, not batch, length")):
        monkeypatch.setitem(OBJECTIVES, "fork", cls)
        with pytest.raises(BadInput, match=says):
            from_options("fork")


def test_a_ratio_that_hides_one_token_is_told(capsys):
    call("objectives.py mlm --length 8")
    assert "hides one of 8 tokens" in capsys.readouterr().err
    call("objectives.py mlm vl spans")
    assert "hides one" not in capsys.readouterr().err


def test_the_path_of_each_objective():
    paths = {name: choose_path(from_options(name), images=name == "segments") for name in DEFINITIONS}
    assert paths == {**dict.fromkeys(DEFINITIONS, "two-stream"), "ar": "causal",
                     **dict.fromkeys(["mlm", "vl", "diffusion"], "mask")}
    for name, images in (("ar", False), ("mlm", True)):
        assert choose_path(from_options(name), 2, images) == "two-stream"
    assert choose_path(from_options("mlm"), images=True) == "mae"
    for name, streams in (("dar", 1), ("segments", None)):
        with pytest.raises(BadInput):
            choose_path(from_options(name), streams)


def test_drawing_in_the_terminal():
    """Who may read whom, and a query each with its cut and weight where these are not f(i) and 1."""
    lines = call("objectives.py mtp --t 2 --length 4 --samples 1").splitlines()
    seen = [line.split(maxsplit=5) for line in lines if line[:4].strip().isdigit()]
    assert ["".join(row[1:5]) for row in seen] == ["■···", "■■··", "■■■·", "■■■■",
                                                   "■···", "■···", "■■··", "■■··", "■■■·"]
    assert seen[5][0] == "3" and seen[5][5] == "cut 2, weight 0.5" and len(seen[8]) == 5
    text = call("objectives.py dar --t 2 --length 4")
    drawn = [line.split()[2:] for line in text.splitlines() if line.startswith("group")]
    assert sorted(drawn) == [["1", "1", "2", "2"], ["1", "2", "2", "3"]]
    text = call("objectives.py vl --mask 0.2,0.8 --length 20")
    hidden = [line.split().count("2") for line in text.splitlines() if line.startswith("group")]
    assert 4 <= hidden[0] < hidden[1] < hidden[2] <= 16  # few, middling and many
