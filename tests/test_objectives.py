"""The losses against plain formulas, the registry's promises, and the refusal of wrong combinations."""
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import WAYS
from torch._dynamo.utils import counters

import evaluate
import objectives
from masks import query_mask
from objectives import (
    OBJECTIVES,
    PAPER,
    add_options,
    choose_path,
    describe,
    draw_batch,
    from_options,
    loss_sum,
    options_of,
    scores_next,
    spectral_loss,
    target_nll,
)
from support.cli import BadInput, Parser
from support.kernels import LinearCrossEntropy
from support.objective import (
    Objective,
    Queries,
    asked,
    checked_queries,
    equally_likely,
    one_query_per_prefix,
    option,
)
from support.operator import spectrum


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_linear_cross_entropy_values_and_gradients(chunk):
    generator = torch.Generator().manual_seed(0)
    x, E = (torch.randn(n, 5, generator=generator, requires_grad=True) for n in (7, 9))
    labels, weight = torch.randint(9, (7,), generator=generator), torch.rand(7, generator=generator)
    ours = LinearCrossEntropy.apply(4 * x, E, labels, weight, chunk)
    plain = (F.cross_entropy(4 * x @ E.T, labels, reduction="none") * weight).sum()
    assert torch.allclose(ours, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(2 * ours, (x, E)), torch.autograd.grad(2 * plain, (x, E))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_survives_improbable_labels():
    x = torch.tensor([[200.0], [-200.0]])
    E, labels = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 0])
    loss = LinearCrossEntropy.apply(x, E, labels, torch.ones(2), 8)
    assert loss.item() == pytest.approx(800)


def test_loss_is_the_weighted_sum_over_queries(way, make_model):
    """Query by query, each in a pass of its own, times a weight that the objective might give."""
    objective, path = way
    model, generator = make_model(dtype=torch.float32), torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (3, 8), generator=generator)
    batch = draw_batch(objective, path, tokens, 11, generator)
    batch = batch._replace(weight=batch.weight * torch.rand(batch.weight.shape, generator=generator))
    assert batch.total.tolist() == pytest.approx([objective.queries(batch.groups).weight.sum().item()] * 3)
    total = 0.0
    for b in range(3):
        for p, c, weight in zip(batch.targets[b].tolist(), batch.cuts[b].tolist(), batch.weight[b].tolist()):
            if weight > 0 and path == "mask":
                total += weight * masked_nll(model, tokens[b], batch.groups[b], p)
            elif weight > 0:
                one = (x[b:b + 1] for x in (tokens, batch.groups))
                nll = target_nll(model, *one, torch.tensor([[p]]), path, cuts=torch.tensor([[c]]))
                total += weight * nll.item()
    assert loss_sum(model, batch, path).item() == pytest.approx(total, rel=1e-4)


def test_a_part_of_a_batch_is_what_it_is_in_the_whole(way):
    """Processes and micro-batches draw the same f, queries and corruption, and know the total of the whole
    batch."""
    objective, path = way
    tokens = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(0))
    rule = "bert" if path == "mask" else "always"
    whole = draw_batch(objective, path, tokens, 11, torch.Generator().manual_seed(1), rule)
    for part in (slice(0, 2), slice(2, 6)):
        drawn = draw_batch(objective, path, tokens[part], 11, torch.Generator().manual_seed(1), rule, 6, part)
        for ours, expected, name in zip(drawn, whole, whole._fields):
            assert torch.equal(ours, expected[part]), name
        assert all(torch.equal(a, b) for a, b in zip(drawn, whole.part(part.start, part.stop)))


def masked_nll(model, tokens, groups, p):
    """-log P of token p with [MASK] at all targets at once, by the plain softmax."""
    everything = torch.arange(len(tokens))[None]
    logits = model.logits(model(tokens[None], groups[None], everything, "mask"))[0, p]
    return (logits.logsumexp(0) - logits[tokens[p]]).item()


def test_one_graph_whatever_is_drawn(way, make_model):
    """torch.compile sees the same shapes in every batch: one graph, no breaks, the same loss."""
    objective, path = way
    model = make_model(dtype=torch.float32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss_sum, dynamic=False, backend="eager")
    for seed in range(4):
        tokens = torch.randint(11, (4, 8))
        batch = draw_batch(objective, path, tokens, 11, torch.Generator().manual_seed(seed))
        assert torch.allclose(compiled(model, batch, path), loss_sum(model, batch, path))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_vl_with_equal_ends_equals_mlm(make_model):
    model, tokens = make_model(dtype=torch.float32), torch.randint(11, (4, 8))
    losses = []
    for objective in (from_options("mlm", mask=0.3), from_options("vl", mask=(0.3, 0.3))):
        batch = draw_batch(objective, "mask", tokens, 11, torch.Generator().manual_seed(0))
        losses.append((batch.tokens, batch.blank, batch.targets, loss_sum(model, batch, "mask")))
    assert all(torch.equal(a, b) for a, b in zip(*losses))


def test_80_10_10_rule():
    tokens = torch.arange(400)[None].expand(500, -1)  # ids 0..399, so that a changed token shows
    batch, always = (draw_batch(from_options("mlm", mask=0.5), "mask", tokens, 400,
                                torch.Generator().manual_seed(0), rule) for rule in ("bert", "always"))
    target = batch.groups == 2
    changed = batch.tokens != tokens
    n = target.sum().item()
    assert not batch.blank[~target].any() and not changed[~target].any()
    assert not (changed & batch.blank).any()
    for share, expected in ((batch.blank[target], 0.8), (changed[target], 0.1 * 399 / 400)):
        assert abs(share.double().mean().item() - expected) < 4 * math.sqrt(0.25 / n)
    assert torch.equal(batch.labels, tokens.gather(1, batch.targets))
    assert torch.equal(always.blank, always.groups == 2) and torch.equal(always.tokens, tokens)


def test_groups_can_be_pinned(way):
    """CUDA pins a batch in place, which a tensor that repeats its memory refuses."""
    batch = draw_batch(*way, torch.zeros(3, 8, dtype=torch.long), 11)
    assert all(0 not in field.stride() for field in batch)


def test_dar_first_group_is_uniform():
    first = (from_options("dar", t=3).groups(6000, 9, torch.Generator().manual_seed(0)) == 1).sum(1)
    counts = Counter(first.tolist())
    assert set(counts) == {1, 2, 3}
    assert all(abs(c - 2000) < 4 * math.sqrt(6000 * 2 / 9) for c in counts.values())


MORE = [from_options("vl", mask=(0.5, 0.5)), from_options("vl", mask=(0.01, 1.0)),
        from_options("dar", t=(1, 3)), from_options("segments", segment=1)]
LISTED = dict.fromkeys([objective for objective, _ in WAYS] + MORE)  # each once, in order


@pytest.mark.parametrize("objective", LISTED, ids=describe)
def test_listed_outcomes_are_what_the_sampler_draws(objective):
    """Chi-squared of 20,000 draws against the listed distribution."""
    S = 4 if objective.images_only else 5
    if objective.outcomes(S) is None:
        pytest.skip("nobody listed its outcomes")
    groups, probability = objective.outcomes(S)
    assert probability.sum().item() == pytest.approx(1)
    checked_queries(objective, "two-stream", groups)
    expected = Counter()
    for f, p in zip(groups.tolist(), probability.tolist()):
        expected[tuple(f)] += p
    draws = 20_000
    seen = Counter(map(tuple, objective.groups(draws, S, torch.Generator().manual_seed(0)).tolist()))
    assert seen.keys() <= expected.keys()
    chi2 = sum((seen[f] - draws * p) ** 2 / (draws * p) for f, p in expected.items())
    k = len(expected) - 1
    assert chi2 <= k + 5 * math.sqrt(2 * k) + 1e-9


def test_every_token_is_scored_with_its_whole_prefix(way):
    objective, path = way
    for passes in (objective.left_to_right(7, path) or {}).values():
        scored = torch.stack([scores_next(f) for f in passes])
        count = scored.sum(0)
        assert count[0] == 0 and (count[1:] > 0).all()
        if type(objective).queries is Objective.queries:  # others may ask for less than every p with f(p) > 1
            assert count.max() == 1
        for f, row in zip(passes, scored):
            for p in row.nonzero()[:, 0].tolist():
                assert query_mask(f)[p].nonzero()[:, 0].tolist() == list(range(p))


def test_spectral_loss_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(6, 4, generator=generator), torch.randint(4, (6,), generator=generator)
    marginal = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(-2 * scores[i, targets[i]] + sum(marginal[v] * scores[i, v] ** 2 for v in range(4))
                   for i in range(6)) / 6
    assert torch.allclose(spectral_loss(scores, targets, marginal), expected)


# ---------------------------------------------------------------------------- wrong use, and new objectives

@pytest.mark.parametrize("name, options, says", [
    ("vl", {"mask": (0.15,)}, "--objective mlm --mask 0.15"),
    ("vl", {"mask": "0.15"}, "--objective mlm --mask 0.15"),
    ("mlm", {"mask": (0.15, 0.3)}, "--objective vl --mask 0.15,0.3"),
    ("mlm", {"t": 2}, "--objective dar"),
    ("ar", {"mask": (0.15,)}, "--objective mlm"),
    ("ar", {"mask": (0.15,)}, "ar takes no options"),
    ("mlm", {"mask": (0.0,)}, "--mask 0.15"),
    ("mlm", {"mask": (1.0,)}, "--mask 0.15"),
    ("mlm", {"mask": "much"}, "'much'"),
    ("vl", {"mask": (0.3, 0.15)}, "--mask 0.15,0.3"),
    ("vl", {"mask": (0.0, 0.3)}, "--mask 0.15,0.3"),
    ("vl", {"mask": (0.1, 0.2, 0.3)}, "two ratios"),
    ("dar", {"t": "two"}, "--t: 'two'"),
    ("ar", {"heads": 3}, "no objective has an option --heads"),
    ("bert", {}, "ar, dar, mlm, vl"),
])
def test_wrong_combinations_say_what_to_type(name, options, says):
    with pytest.raises(BadInput, match=says.replace("(", r"\(")):
        from_options(name, **options)


@pytest.mark.parametrize("t", [0, 8, 200])
def test_t_must_fit_the_sequence(t):
    with pytest.raises(BadInput, match="1..7"):
        from_options("dar", t=t).check(8)


def test_the_paths_of_the_papers_objectives():
    with pytest.raises(BadInput, match="--streams 2"):
        choose_path(from_options("dar"), 1)
    assert {flag: choose_path(from_options(flag)) for flag in PAPER} == {
        "ar": "causal", "dar": "two-stream", "mlm": "mask", "vl": "mask"}
    assert choose_path(from_options("ar"), 2) == "two-stream"
    assert choose_path(from_options("mlm"), images=True) == "mae"
    with pytest.raises(BadInput, match="images"):
        choose_path(from_options("segments"))


@dataclass(frozen=True)
class EveryNth(Objective):
    """The README's kind of example: an option of its own, queries and weights of its own."""

    nth: int = 2
    heavy: float = option(1.0, "weight of the last token")
    loud: bool = False
    paper = "every n-th token"
    one_stream = "mask"

    def groups(self, batch, length, generator=None):
        return (1 + (torch.arange(length) % self.nth == self.nth - 1).long()).repeat(batch, 1)

    def queries(self, groups):
        weight = (groups > 1).float()
        weight[:, -1] *= self.heavy
        return asked(groups, weight, self.max_targets(groups.shape[1]))

    def left_to_right(self, length, path):
        return {"next": one_query_per_prefix(length)}


def test_a_new_objective_is_one_class(monkeypatch, make_run, capsys):
    """Registered, it has flags, is drawn, trained for a step, evaluated and given a spectrum."""
    monkeypatch.setitem(OBJECTIVES, "nth", EveryNth)
    parser = Parser()
    add_options(parser)
    args = parser.parse_args(["--nth", "2", "--heavy", "0.5", "--loud"])
    objective = from_options("nth", **options_of(vars(args)))
    assert objective == EveryNth(2, 0.5, True) and describe(objective) == "nth nth=2 heavy=0.5 loud=True"
    assert "nth: weight of the last token (default: 1)" in " ".join(parser.format_help().split())
    objectives.main(["nth", "--length", "4", "--heavy", "0.5"])
    assert "cut 2, weight 0.5" in capsys.readouterr().out
    for path in ("mask", "two-stream"):
        run = make_run(objective, path, vocab=3, length=4)
        batch = draw_batch(objective, path, torch.randint(3, (2, 4)), 3)
        assert batch.weight.tolist() == [[1, 0.5, 0]] * 2 and batch.targets[:, :2].tolist() == [[1, 3]] * 2
        assert batch.total.tolist() == [3, 3]
        assert loss_sum(run.model.float(), batch, path).isfinite()
        sequences = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(3)] * 3)
        for nll in evaluate.left_to_right(run, sequences).values():
            assert (-nll.double().sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert spectrum(objective, 4, samples=2000)["singular_values"].shape == (2,)


def make_class(**members):
    """An objective with those members, as a fork might have it."""
    return dataclass(frozen=True)(type("Fork", (Objective,), members))


@pytest.mark.parametrize("default, text, value", [
    (2, "5", 5), (0.5, "0.25", 0.25), ("a", "b", "b"), (2, "0", None), (0.5, "inf", None), (0.5, "x", None),
    (2, 2.5, None), (0.5, 1, 1), ("a", 3, None), ((1, 2), "3,4", None)])
def test_an_option_is_read_as_its_default(monkeypatch, default, text, value):
    fork = make_class(width=default, __annotations__={"width": type(default)})
    monkeypatch.setitem(OBJECTIVES, "fork", fork)
    if value is None:
        with pytest.raises(BadInput, match="--width"):
            from_options("fork", width=text)
    else:
        assert from_options("fork", width=text).width == value


def test_an_option_that_clashes_says_what_to_rename(monkeypatch):
    parser = Parser()
    parser.add_argument("--lr")
    monkeypatch.setitem(OBJECTIVES, "fork", make_class(lr=0.1, __annotations__={"lr": float}))
    with pytest.raises(BadInput, match="option lr of fork is already a flag"):
        add_options(parser)
    monkeypatch.setitem(OBJECTIVES, "fork", make_class(t=True, __annotations__={"t": bool}))
    with pytest.raises(BadInput, match="option t is a switch"):
        add_options(Parser())
    plain = type("Plain", (Objective,), {"span": 2, "__annotations__": {"span": int}})
    monkeypatch.setitem(OBJECTIVES, "fork", plain)
    with pytest.raises(BadInput, match="dataclass"):
        from_options("ar")


def f_of(*rows):
    return {"groups": lambda self, batch, length, generator=None: torch.tensor(rows).repeat(batch, 1)[:batch]}


def wide(self, groups):
    """Asks for token 3 from what includes itself."""
    shape = (len(groups), 3)
    return Queries(torch.full(shape, 2), torch.full(shape, 5), torch.ones(shape))


@pytest.mark.parametrize("members, path, says", [
    (f_of([2, 3, 4, 5]), "two-stream", "every token of a sequence is asked for.* begin with a group of f"),
    (f_of([3, 2, 2, 0]), "two-stream", "token 2 is asked for and would see nothing.* Begin with a group"),
    (f_of([0, 2, 3, 4]), "two-stream", "token 2 is asked for and would see nothing"),
    (f_of([1, 1, 1, 1]), "two-stream", "nothing is asked for"),
    (f_of([1, -1, 2, 3]), "two-stream", "group below 0"),
    (f_of([2, 2, 2, 2]), "mask", "every token of a sequence is asked for"),
    (f_of([1, 1, 2, 2]) | {"max_targets": lambda *_: 1}, "mask", "2 tokens, and max_targets promises at"),
    (f_of([1, 2, 1, 3]), "mask", r"f = 1 2 1 3, which one stream \(mask\) cannot compute"),
    (f_of([1, 2, 0, 1]), "mask", "f = 1 2 0 1, which one stream"),
    (f_of([1, 2, 0, 3]), "causal", "f = 1 2 0 3, which one stream"),
    (f_of([1, 1, 2, 1]) | {"min_targets": lambda self, length: 2}, "mae", "fewer tokens than min_targets, 2"),
    (f_of([1, 2, 3, 4]) | {"queries": wide}, "two-stream", "token 3, of f = 3, is asked for at the cut 5"),
    (f_of([1, 2, 3, 4]) | {"queries": wide, "max_targets": lambda *_: 4}, "two-stream", "what max_targets"),
    (f_of([1.0, 2, 3, 4]), "two-stream", "torch.float32"),
    (f_of([1, 2, 3]), "two-stream", r"\(2, 3\) where torch.int64 of \(2, 4\)"),
    ({"groups": lambda self, *_: [1, 2, 3, 4]}, "two-stream", "a list where"),
])
def test_an_f_that_cannot_be_computed_is_refused_where_it_is_drawn(members, path, says, monkeypatch):
    fork = make_class(**members)
    with pytest.raises(BadInput, match=says):
        draw_batch(fork(), path, torch.zeros(2, 4, dtype=torch.long), 3)
    if path != "mae":
        fork = make_class(**members, one_stream=None if path == "two-stream" else path)
        monkeypatch.setitem(OBJECTIVES, "fork", fork)
        with pytest.raises(BadInput, match=says.replace("2, ", "256, ") if "where torch" in says else says):
            objectives.main(["fork", "--length", "4"])


def test_too_many_targets_are_refused_where_they_are_listed(monkeypatch):
    fork = make_class(**f_of([1, 1, 2, 2]), max_targets=lambda self, length: 2,
                      outcomes=lambda self, *_: equally_likely(torch.tensor([[1, 1, 2, 2], [1, 2, 2, 2]])))
    monkeypatch.setitem(OBJECTIVES, "fork", fork)
    with pytest.raises(BadInput, match="asks for 3 tokens"):
        objectives.main(["fork", "--length", "4"])
    with pytest.raises(BadInput, match="asks for 3 tokens"):
        spectrum(fork(), 4)


def test_a_hole_in_f_is_seen_by_nobody(make_model):
    """f = 0 between tokens, in two streams: what stands there changes nothing."""
    model, fork = make_model(dtype=torch.float32), make_class(**f_of([1, 0, 2, 3]))
    tokens = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]])
    batch = draw_batch(fork(), "two-stream", tokens, 11)
    losses = [loss_sum(model, batch.part(b, b + 1), "two-stream").item() for b in range(2)]
    assert losses[0] == losses[1]


def test_a_new_objective_claims_nothing():
    """Neither a left-to-right likelihood nor a bound nor causal attention comes by inheritance."""
    fork = make_class(**f_of([1, 2, 1, 1]))()
    assert fork.left_to_right(4, "two-stream") is fork.bound(2, 4) is fork.outcomes(4) is None
    assert fork.attention == "full"
    assert {name for name in PAPER if from_options(name).attention == "causal"} == {"ar", "dar"}


# ---------------------------------------------------------------------------- the command line

def run_main(code, **environment):
    """Run `code` with support.cli at hand in a process of its own -> (status, standard error)."""
    result = subprocess.run([sys.executable, "-c", "import sys, io\nfrom support import cli\n" + code],
                            text=True, capture_output=True, check=False, cwd=Path(objectives.__file__).parent,
                            env={**os.environ, **environment})
    return result.returncode, result.stderr


@pytest.mark.parametrize("error, line", [
    ("cli.BadInput('no such\\nthing')", "error: no such thing"), ("OSError('disk')", "error: disk"),
    ("MemoryError()", "error: not enough memory (no details)"),
    ("RuntimeError('CUDA out of memory.\\nmore')", "error: not enough memory (CUDA out of memory.)")])
def test_errors_are_one_line_and_a_switch_shows_where(error, line):
    code = f"def main():\n    raise {error}\ncli.command_line(main)"
    status, quiet = run_main(code, TRACEBACK="0")
    assert status == 2 and quiet.startswith(line) and len(quiet.splitlines()) == 1
    status, loud = run_main(code, TRACEBACK="1")
    assert status == 2 and "Traceback" in loud and "in main" in loud
    assert loud.splitlines()[-1] == quiet.strip()


def test_other_errors_keep_their_traceback():
    status, text = run_main("def main():\n    raise RuntimeError('bug')\ncli.command_line(main)")
    assert status == 1 and "RuntimeError: bug" in text


def test_a_notebook_has_no_reconfigure():
    status, text = run_main("sys.stdout = io.StringIO()\ncli.command_line(lambda: 3)")
    assert (status, text) == (3, "")
