"""experiments/verdicts.py: intervals, p-values and verdicts, against scipy, brute force and simulation."""
import itertools
import math

import numpy as np
import pytest

from downstream import glue
from experiments import verdicts
from experiments.verdicts import (
    EXCLUDED,
    NOT_MEASURED,
    SUPPORTED,
    UNINFORMATIVE,
    Cell,
    Claim,
    Estimate,
    cell_of,
    corrected,
    estimate,
    half_width,
    holm,
    judge,
    p_value,
)

A, B = ("a", "x"), ("b", "x")
GAP = {A: 1, B: -1}


# ---------------------------------------------------------------------------- distributions and metrics

@pytest.mark.parametrize("freedom", [1, 1.7, 2, 4.3, 30, 9999])
def test_students_distribution(freedom):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.1, 1.0, 2.5, 6.0):
        assert p_value(Estimate(t, 1.0, freedom)) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-3,
                                                                   abs=1e-9)
    assert half_width(Estimate(0.0, 4.0, freedom)) == pytest.approx(2 * stats.t.ppf(0.975, freedom), rel=1e-4)


def test_p_values_of_another_hypothesis_and_without_variance():
    assert p_value(Estimate(5.0, 1.0, 10), at=3.0) == p_value(Estimate(2.0, 1.0,
                                                                       10)) == p_value(Estimate(-2.0, 1.0,
                                                                                                10))
    assert p_value(Estimate(1.0, 0.0, 2)) == 0 and p_value(Estimate(0.0, 0.0, 2)) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_holm_against_the_closed_test(count):
    """Holm is the closed test of Bonferroni: a hypothesis falls where every set that holds it falls at its
    smallest p."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.2, count)
        sets = [s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
        brute = [max(min(1, len(s) * p[list(s)].min()) for s in sets if i in s) for i in range(count)]
        assert holm(list(p)) == pytest.approx(brute)
    assert holm([0.5, None, 0.01]) == [0.5, None, 0.02]
    assert holm([None]) == [None]


def test_metrics_from_means_are_those_of_glue():
    rng = np.random.default_rng(0)
    true, x = rng.random(300) < 0.4, rng.normal(size=300)
    predicted = np.where(rng.random(300) < 0.7, true, ~true)
    y = x + rng.normal(size=300)
    both = np.stack([predicted, true, predicted & true]).astype(float)
    assert cell_of(both, "matthews").value == pytest.approx(100 * glue.matthews(predicted * 1, true * 1))
    assert cell_of(both, "f1").value == pytest.approx(100 * glue.f1(predicted * 1, true * 1))
    assert cell_of([x, y, x * y, x * x, y * y], "pearson").value == pytest.approx(100 * glue.pearson(x, y))
    nothing = np.stack([np.zeros(300), true, np.zeros(300)])
    assert cell_of(nothing, "matthews").value == 0 == cell_of(nothing, "f1").value
    assert cell_of([[3.0, 5.0], [1.0, 3.0], [0.0, 2.0]], "share").value == pytest.approx((4 - 2) / (4 - 1))
    assert cell_of([1.0, math.e ** 2], "log").value == pytest.approx(math.log((1 + math.e ** 2) / 2))


# ---------------------------------------------------------------------------- intervals

def simulated(rng, seeds, n, spread, gap=0.0):
    """Cells of two models: `spread` holds the deviations of a seed's effect, an example's, and what is left,
    of the difference."""
    of_seed, of_example, rest = spread
    # what both have in common, and pairing takes out
    shared = 3 * rng.normal(size=(1, n)) + rng.normal(size=(seeds, 1))
    difference = gap + of_seed * rng.normal(size=(seeds, 1)) + of_example * rng.normal(size=(1, n))
    difference = difference + rest * rng.normal(size=(seeds, n))
    return {A: [cell_of(x, test="t") for x in shared + difference], B: [cell_of(x, test="t") for x in shared]}


@pytest.mark.parametrize("seeds, spread", [(3, (1, 0, 0)), (3, (0, 5, 0)), (3, (0, 0, 5)), (3, (0.3, 3, 3)),
                                           (5, (0.3, 3, 3)), (2, (0.5, 5, 0))])
def test_intervals_cover_the_truth(seeds, spread):
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        found = estimate(GAP, simulated(rng, seeds, 100, spread, gap=1.0), draws=150)
        covered += abs(found.difference - 1) <= half_width(found)
    assert 0.92 <= covered / runs <= 0.995  # the standard error of 0.95 is 0.011


def test_pairing_over_examples_takes_out_what_they_share():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 3, 400)
    a, b = ([cell_of(easy + gap + 0.1 * rng.normal(size=400), test="t")] for gap in (0.1, 0.0))
    paired = estimate(GAP, {A: a, B: b})
    assert math.sqrt(paired.variance) == pytest.approx(0.1 * math.sqrt(2 / 400), rel=0.15)
    other = [Cell(b[0].value, b[0].samples, "mean", "other examples")]
    assert math.sqrt(estimate(GAP, {A: a, B: other}).variance) == pytest.approx(3 * math.sqrt(2 / 400),
                                                                                rel=0.15)


@pytest.mark.parametrize("link", ["matthews", "pearson", "f1"])
def test_the_bootstrap_of_a_metric_is_its_spread_over_test_sets(link):
    rng = np.random.default_rng(1)

    def one():
        true, x = (rng.random(400) < 0.4).astype(float), rng.normal(size=400)
        predicted, y = np.where(rng.random(400) < 0.75, true, 1 - true), x + rng.normal(size=400)
        if link == "pearson":
            return cell_of([x, y, x * y, x * x, y * y], link, "t")
        return cell_of([predicted, true, predicted * true], link, "t")

    spread = np.std([one().value for _ in range(1000)])
    assert math.sqrt(np.median([estimate({A: 1}, {A: [one()]}).variance
                                for _ in range(20)])) == pytest.approx(spread, rel=0.12)


def test_the_mean_of_tasks_varies_less_than_each():
    rng = np.random.default_rng(0)
    cells = {("a", task): [cell_of(rng.normal(size=300), test=task)] for task in "xyz"}
    variance = estimate({key: 1 / 3 for key in cells}, cells).variance
    assert variance == pytest.approx(1 / 300 / 3, rel=0.2)


def test_fine_tuning_seeds_are_averaged():
    rng = np.random.default_rng(0)
    three = rng.normal(size=(3, 1, 200))
    assert cell_of(three).value == pytest.approx(three.mean())
    assert estimate({A: 1}, {A: [cell_of(three)]}).variance == pytest.approx(three.mean((0, 1)).var() / 200,
                                                                             rel=0.15)


# ---------------------------------------------------------------------------- verdicts

def three_seeds(values, seed=0, n=500):
    """Cells whose means are these values, on the same examples."""
    noise = np.random.default_rng(seed).normal(size=n)
    return [cell_of(value + 0.01 * (noise - noise.mean()), test="t") for value in values]


def claim_of(effect, **more):
    return Claim("a better than b", GAP, effect, **more)


@pytest.mark.parametrize("a, effect, word", [((5.0, 5.1, 4.9), 5.0, SUPPORTED),
                                             ((5.0, 5.1, 4.9), None, SUPPORTED),
                                             ((0.1, -0.1, 0.0), 5.0, EXCLUDED),
                                             ((-5.0, -5.1, -4.9), None, EXCLUDED),
                                             ((4.0, -3.0, 1.0), 5.0, UNINFORMATIVE),
                                             ((0.1, -0.1, 0.0), None, UNINFORMATIVE)])
def test_the_four_words(a, effect, word):
    assert judge(claim_of(effect), {A: three_seeds(a), B: three_seeds((0.0, 0.0, 0.0))})["verdict"] == word


def test_one_seed_never_supports_or_excludes():
    for value, effect in ((50.0, 1.0), (-50.0, 1.0), (0.0, 50.0)):
        found = judge(claim_of(effect), {A: three_seeds([value]), B: three_seeds([0.0], seed=1)})
        assert found["verdict"] == UNINFORMATIVE and found["interval"]
        assert verdicts.remark(found) == "one seed"
    without = judge(claim_of(1.0), {A: [Cell(5.0)], B: [Cell(1.0)]})
    assert without["verdict"] == UNINFORMATIVE
    assert without["interval"] is None and without["smallest_visible"] is None


def test_nothing_is_measured_where_pretraining_gains_nothing():
    base = {("untrained", "x"): three_seeds((4.9, 5.1, 5.0))}
    cells = {A: three_seeds((9.0, 9.1, 8.9)), B: three_seeds((5.0, 5.1, 4.9)), **base}
    gated = claim_of(1.0, untrained={A: ("untrained", "x"), B: ("untrained", "x")})
    found = judge(gated, cells)
    assert found["verdict"] == NOT_MEASURED and not found["measured"]
    assert found["gain_over_untrained"]["a"][0] == pytest.approx(4)
    cells[B] = three_seeds((6.0, 6.1, 5.9))
    assert judge(gated, cells)["verdict"] == SUPPORTED
    # generation is not gated
    assert judge(claim_of(1.0), {A: cells[A], B: three_seeds((5.0, 5.1, 4.9))})["verdict"] == SUPPORTED


def test_a_mean_is_measured_by_all_its_parts():
    """b lies far below the untrained network in task x, as much above it in y, and nowhere in the mean."""
    cells = {(row, task): three_seeds(values) for row, task, values in (
        ("a", "x", (9, 9.1, 9.2)), ("a", "y", (9, 9.2, 9.1)), ("b", "x", (1, 1.2, 1.1)),
        ("b", "y", (9, 9.1, 9.3)), ("untrained", "x", (5, 5.1, 5.1)), ("untrained", "y", (5, 5.2, 5.1)))}
    contrast = {(row, task): sign / 2 for row, sign in (("a", 1), ("b", -1)) for task in "xy"}
    base = {key: ("untrained", key[1]) for key in contrast}
    found = judge(Claim("a beats b", contrast, untrained=base), cells)
    gains = {row: gain for row, (gain, _) in found["gain_over_untrained"].items()}
    assert gains == pytest.approx({"a": 4.0, "b": 0.07}, abs=0.1) and found["verdict"] == "not measured"


def test_where_the_paper_prints_no_size_none_is_excluded():
    cells = {A: three_seeds((-5.0, -5.1, -4.9)), B: three_seeds((0.0, 0.0, 0.0))}
    found = [judge(claim_of(effect), cells) for effect in (None, 5.0)]
    assert [verdicts.word(one) for one in found] == ["excluded", "paper's size excluded"]


def test_remarks():
    small = judge(claim_of(50.0), {A: three_seeds((1.0, 1.1, 0.9)), B: three_seeds((0.0, 0.0, 0.0))})
    assert small["verdict"] == SUPPORTED and verdicts.remark(small) == "smaller than the paper's"
    other = judge(claim_of(50.0), {A: three_seeds((-1.0, -1.1, -0.9)), B: three_seeds((0.0, 0.0, 0.0))})
    assert other["verdict"] == EXCLUDED and verdicts.remark(other) == "the other way"


def test_holm_runs_over_the_primaries():
    weak = judge(claim_of(None), {A: three_seeds((1.0, 1.4, 0.7)), B: three_seeds((0.0, 0.0, 0.0))})
    assert weak["verdict"] == SUPPORTED and 0.02 < weak["p_zero"] < 0.05
    alone, many = corrected([weak]), corrected([weak] * 4)
    assert alone[0]["verdict"] == SUPPORTED and {c["verdict"] for c in many} == {UNINFORMATIVE}
    assert many[0]["p_zero_holm"] == pytest.approx(min(1, 4 * weak["p_zero"]))


def test_equal_models_are_rarely_told_apart():
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(300):
        found = judge(claim_of(None), simulated(rng, 3, 100, (0.5, 3, 3)), draws=150)
        wrong += found["verdict"] != UNINFORMATIVE
    assert wrong <= 27  # 5% of 300 are 15, plus three standard errors
