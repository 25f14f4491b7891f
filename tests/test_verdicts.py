"""experiments/verdicts.py: intervals, p-values and verdicts, against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest

from experiments import verdicts
from experiments.verdicts import Claim, Estimate, corrected, estimate, half_width, in_words, judge, mean_cell
from tasks import glue

A, B = ("a", "x"), ("b", "x")
GAP = {A: 1, B: -1}


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 9999])
def test_students_distribution(freedom):
    student = pytest.importorskip("scipy.stats").t(freedom)
    for of_seeds, of_examples in ((1.0, 0.0), (0.0, 1.0)):
        for t in (0.1, 1.0, 2.5, 6.0):
            expected = pytest.approx(2 * student.sf(t), rel=1e-3, abs=1e-9)
            more = of_seeds, of_examples, freedom + 1, freedom + 1, freedom
            assert verdicts.p_value(Estimate(t, *more)) == expected
            assert verdicts.p_value(Estimate(3 - t, *more), at=3) == expected
        found = Estimate(0.0, 4 * of_seeds, 4 * of_examples, freedom + 1, freedom + 1, freedom)
        assert half_width(found) == pytest.approx(2 * student.ppf(0.975), rel=1e-4)
    assert [verdicts.p_value(Estimate(gap, 0.0, 0.0, 3, 9, 2)) for gap in (1.0, 0.0)] == [0, 1]


def test_seeds_and_examples_have_a_t_of_their_own():
    student = pytest.importorskip("scipy.stats").t
    found = Estimate(2.0, 0.09, 0.16, seeds=3, n=64, freedom=2)
    expected = math.hypot(0.3 * student.ppf(0.975, 2), 0.4 * student.ppf(0.975, 63))
    assert half_width(found) == pytest.approx(expected, rel=1e-4)
    assert verdicts.p_value(found, at=2 + expected) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_holm_is_the_closed_test(count):
    """Of Bonferroni: a hypothesis falls where every set that holds it falls at its smallest p."""
    rng = np.random.default_rng(0)
    sets = [s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
    for p in rng.uniform(0, 0.2, (50, count)):
        closed = [max(min(1, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(count)]
        assert verdicts.holm(list(p)) == pytest.approx(closed)
    assert verdicts.holm([0.5, None, 0.01]) == [0.5, None, 0.02]


def simulated(rng, seeds, n, spread, gap=0.0):
    """Cells of two models whose difference varies by `spread` with the seed, the example, and beyond."""
    of_seed, of_example, rest = spread
    # what both have in common, and pairing takes out
    shared = 3 * rng.normal(size=(1, n)) + rng.normal(size=(seeds, 1))
    difference = gap + of_seed * rng.normal(size=(seeds, 1)) + of_example * rng.normal(size=(1, n))
    difference = difference + rest * rng.normal(size=(seeds, n))
    return {A: [mean_cell(x, "t") for x in shared + difference], B: [mean_cell(x, "t") for x in shared]}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_truth(seeds):
    """About 95% where only seeds or only examples make a difference, more where both do."""
    rng, runs, covered = np.random.default_rng(0), 400, []
    for spread in ((1, 0, 0), (0, 5, 0), (0.3, 3, 3), (0.5, 5, 0)):
        found = [estimate(GAP, simulated(rng, seeds, 50, spread, gap=1.0), draws=100) for _ in range(runs)]
        covered.append(np.mean([abs(one.difference - 1) <= half_width(one) for one in found]))
    assert min(covered) >= 0.93 and np.mean(covered) >= 0.95  # the standard error of each is 0.01


def test_equal_models_are_rarely_told_apart():
    rng, runs = np.random.default_rng(3), 200
    words = [judge(Claim("a better", GAP), simulated(rng, 3, 50, (0.5, 3, 3)), draws=60)["verdict"]
             for _ in range(runs)]
    assert sum(word != "uninformative" for word in words) <= 0.05 * runs + 9.3  # three standard errors


def test_pairing_takes_out_what_examples_share():
    rng = np.random.default_rng(0)
    easy, values = rng.normal(0, 3, 400), []
    a, b = (easy + 0.1 * rng.normal(size=400) for _ in range(2))
    for test, expected in (("t", 0.1), ("others", 3)):
        found = estimate(GAP, {A: [mean_cell(a, "t")], B: [mean_cell(b, test)]})
        values.append(math.sqrt(found.of_examples))
        assert values[-1] == pytest.approx(expected * math.sqrt(2 / 400), rel=0.15)
    # a mean over three tests of its own examples each varies less than one of them
    cells = {("a", task): [mean_cell(rng.normal(size=300), task)] for task in "xyz"}
    assert estimate(dict.fromkeys(cells, 1 / 3), cells).of_examples == pytest.approx(1 / 300 / 3, rel=0.2)


@pytest.mark.parametrize("metric", ["matthews", "pearson", "f1"])
def test_the_bootstrap_of_a_metric_is_its_spread_over_test_sets(metric):
    rng = np.random.default_rng(1)

    def one():
        true, x = (rng.random(400) < 0.4).astype(int), rng.normal(size=400)
        predicted = np.where(rng.random(400) < 0.75, true, 1 - true)
        if metric == "pearson":
            true, predicted = x, x + rng.normal(size=400)

        def score(rows):
            return glue.METRICS[metric](predicted[rows], true[rows])

        return verdicts.Cell(lambda rows: np.apply_along_axis(score, -1, rows), 400, "t")

    spread = np.std([one().value for _ in range(600)])
    found = np.median([estimate({A: 1}, {A: [one()]}, draws=200).of_examples for _ in range(15)])
    assert math.sqrt(found) == pytest.approx(spread, rel=0.15)


def three(*values):
    """Cells of seeds whose means are these values, on the same examples."""
    noise = np.random.default_rng(0).normal(size=500)
    return [mean_cell(value + 0.01 * (noise - noise.mean()), "t") for value in values]


@pytest.mark.parametrize("a, effect, words", [
    ((5.0, 5.1, 4.9), 5.0, "supported"), ((5.0, 5.1, 4.9), None, "supported"),
    ((1.0, 1.1, 0.9), 50.0, "supported (smaller than the paper's)"),
    ((0.1, -0.1, 0.0), 5.0, "paper's size excluded"),
    ((-5.0, -5.1, -4.9), 5.0, "paper's size excluded (the other way)"),
    ((-5.0, -5.1, -4.9), None, "excluded (the other way)"), ((4.0, -3.0, 1.0), 5.0, "uninformative"),
    ((0.1, -0.1, 0.0), None, "uninformative"), ((50.0,), 1.0, "uninformative (one seed)")])
def test_the_four_words(a, effect, words):
    found = judge(Claim("a better", GAP, effect), {A: three(*a), B: three(*[0.0] * len(a))})
    assert in_words(found) == words


def test_what_one_seed_without_examples_says():
    cells = {A: [verdicts.Cell(lambda rows: 5.0)], B: [verdicts.Cell(lambda rows: 1.0)]}
    found = judge(Claim("a better", GAP, 1.0), cells)
    assert found["verdict"] == "uninformative" and found["difference"] == 4
    assert found["interval"] is None and found["smallest_visible"] is None


def test_nothing_is_measured_where_pretraining_gains_nothing():
    base = ("untrained", "x")
    cells = {A: three(9.0, 9.1, 8.9), B: three(5.0, 5.1, 4.9), base: three(4.9, 5.1, 5.0)}
    gated = Claim("a better", GAP, 1.0, floors={A: base, B: base})
    found = judge(gated, cells)
    assert found["verdict"] == "not measured" and found["gain_over_untrained"]["a"][0] == pytest.approx(4)
    assert judge(gated, {**cells, B: three(6.0, 6.1, 5.9)})["verdict"] == "supported"
    assert judge(Claim("a better", GAP, 1.0), cells)["verdict"] == "supported"  # generation is not gated
    assert judge(gated, {A: cells[A], B: cells[B]})["verdict"] == "not measured"  # no untrained row at all


def test_a_mean_is_measured_by_all_its_parts():
    """b lies far below the untrained network in task x, as much above it in y, and nowhere in the mean."""
    cells = {("a", "x"): three(9, 9.1, 9.2), ("a", "y"): three(9, 9.2, 9.1), ("b", "x"): three(1, 1.2, 1.1),
             ("b", "y"): three(9, 9.1, 9.3), ("untrained", "x"): three(5, 5.1, 5.1),
             ("untrained", "y"): three(5, 5.2, 5.1)}
    contrast = {(row, task): sign / 2 for row, sign in (("a", 1), ("b", -1)) for task in "xy"}
    base = {key: ("untrained", key[1]) for key in contrast}
    found = judge(Claim("a better", contrast, floors=base), cells)
    gains = {row: gain for row, (gain, _) in found["gain_over_untrained"].items()}
    assert gains == pytest.approx({"a": 4.0, "b": 0.07}, abs=0.1) and found["verdict"] == "not measured"


def test_one_variance_of_seeds_over_budgets():
    """Contrasts of different models that share one spread of seeds: the mean of their variances, with the
    degrees of freedom of all; a slope over them has the variance of its weights."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2))  # (budgets, seeds)
    cells = {budget: [mean_cell([x]) for x in values[budget]] for budget in range(3)}
    pool = tuple({budget: 1} for budget in range(3))
    spread = values.var(axis=1, ddof=1).mean()
    found = estimate({1: 1}, cells, pool)
    assert (found.difference, found.of_seeds) == pytest.approx((values[1].mean(), spread / 2))
    slope = estimate({0: -1 / 2, 2: 1 / 2}, cells, pool)
    assert slope.difference == pytest.approx((values[2] - values[0]).mean() / 2)
    assert slope.of_seeds == pytest.approx(spread / 2 / 2) and slope.freedom == 3
    assert estimate({1: 1}, cells).freedom == 1


def test_holm_runs_over_the_primaries():
    found = [judge(Claim("a better", GAP), {A: three(1.0, 1.4, x), B: three(0.0, 0.0, 0.0)})
             for x in (0.7, 0.71, 0.72, 0.73)]
    assert all(claim["verdict"] == "supported" and 0.02 < claim["p_zero"] < 0.05 for claim in found)
    alone, many = corrected(found[:1]), corrected(found)
    assert alone[0]["verdict"] == "supported" and {claim["verdict"] for claim in many} == {"uninformative"}
    assert many[3]["p_zero"] == pytest.approx(min(1, 4 * found[3]["p_zero"]))
    again = {**found[0], "claim": "the same models in another table"}
    assert corrected([found[0], again]) == corrected([again])  # one test


def test_the_words_follow_the_correction():
    """What is negative, or less than the paper's effect, before the correction only is not said to be so."""
    def found(a, effect):
        return judge(Claim("a better", GAP, effect), {A: three(*a), B: three(0.0, 0.0, 0.0)})

    negative, smaller = found((-1.0, -1.4, -0.7), 10.0), found((5.0, 5.4, 4.7), 6.0)
    others = [found((1.0, 1.4, x), None) for x in (-1.2, -1.3, -1.4)]
    paper = [found((1.0, 1.4, x), 1.5) for x in (-1.2, -1.3, -1.4)]
    assert in_words(negative) == "paper's size excluded (the other way)"
    assert in_words(smaller) == "supported (smaller than the paper's)"
    assert in_words(corrected([negative, *others])[0]) == "paper's size excluded"
    assert in_words(corrected([smaller, *paper])[0]) == "supported"


def test_lower_is_better_where_the_claim_says_so():
    floor = ("unigrams", "x")
    claim = Claim("a better", {A: -1, B: 1}, floors={A: floor, B: floor}, lower=True)
    cells = {A: three(4.0, 4.1, 3.9), B: three(5.0, 5.1, 4.9), floor: three(6.0, 6.0, 6.0)}
    assert judge(claim, cells)["verdict"] == "supported"
    assert judge(claim, {**cells, floor: three(5.0, 5.0, 5.0)})["verdict"] == "not measured"
