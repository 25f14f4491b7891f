"""What a difference between models says about a claim: its interval, and one of four words.

A claim is a contrast, a sum of cells with weights: {("masked", "probe"): 1, ("autoregressive", "probe"): -1}.
It varies for two reasons. Another pretraining seed would give other models: the spread of the contrast over
seeds, the same seeds on all sides, says how much. Other test examples would give other scores: a bootstrap
over the examples, the same ones on all sides, says how much. Both variances are added, and the interval is
Student's with the degrees of freedom of the sum (Satterthwaite 1946), since resampling three seeds would give
intervals that are much too narrow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SUPPORTED, EXCLUDED = "supported", "paper's size excluded"
UNINFORMATIVE, NOT_MEASURED = "uninformative", "not measured"
MEANING = {
    SUPPORTED: "the interval lies above 0",
    EXCLUDED: "the interval lies below the paper's effect, and not above 0; *excluded*, where the paper "
              "prints none: it lies below 0",
    UNINFORMATIVE: "the interval holds 0, and the paper's effect where it prints one; or there is one seed "
                   "only, which says nothing about others",
    NOT_MEASURED: "not all of the models are seen to score above untrained ones of the same architecture, so "
                  "that their scores do not tell of pretraining"}


# ---------------------------------------------------------------------------- cells and contrasts

@dataclass(frozen=True)
class Cell:
    """What one pretraining seed scores in one column, on the scale on which claims are judged."""

    value_of: Callable  # (numbers of test examples, any choice of them (..., n)) -> the scores on these (...)
    n: int = 0          # test examples; 0: nothing is known of them
    test: str = ""      # names them: cells with one name have the same examples in the same order

    @property
    def value(self):
        return float(self.value_of(np.arange(self.n)))


def mean_cell(values, test="", scale=1.0):
    """The Cell of one number for each example, `scale` times their mean."""
    values = np.asarray(values, float)
    return Cell(lambda rows: scale * values[rows].mean(-1), len(values), test)


class Estimate(NamedTuple):
    """A contrast, its variance and the degrees of freedom of that."""

    difference: float
    variance: float
    freedom: float


def bootstrap(contrast, cells, draws):
    """The contrast of every seed with test examples drawn anew, the same for all cells -> (draws, seeds)."""
    rng, drawn = np.random.default_rng(0), {}
    total = np.zeros((draws, len(cells[next(iter(contrast))])))
    for key, weight in contrast.items():
        for seed, cell in enumerate(cells[key]):
            if cell.n and (cell.test, cell.n) not in drawn:
                drawn[cell.test, cell.n] = rng.integers(cell.n, size=(draws, cell.n))
            if cell.n:
                total[:, seed] += weight * cell.value_of(drawn[cell.test, cell.n])
    return total


def estimate(contrast, cells, draws=1000):
    """The Estimate of a contrast {key: weight} of cells {key: [a Cell for each pretraining seed]}.

    Let d_si be the contrast of seed s and example i, the sum of mu, A_s, B_i and C_si. The spread of the
    seeds' means has A and C in it; the covariance of two seeds' bootstrap draws is that of B alone. One
    seed: its examples are all there is.
    """
    per_seed = sum(weight * np.array([cell.value for cell in cells[key]]) for key, weight in contrast.items())
    seeds, drawn = len(per_seed), bootstrap(contrast, cells, draws)
    least = min((cell.n for key in contrast for cell in cells[key] if cell.n), default=2)
    if seeds == 1:
        return Estimate(float(per_seed[0]), float(drawn.var(ddof=1)), float(max(1, least - 1)))
    covariance = np.cov(drawn.T)
    of_examples = max(0.0, (covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1)))
    of_seeds = per_seed.var(ddof=1) / seeds
    variance = of_seeds + of_examples
    parts = of_seeds ** 2 / (seeds - 1) + of_examples ** 2 / max(1, least - 1)
    freedom = variance ** 2 / parts if parts else seeds - 1
    return Estimate(float(per_seed.mean()), float(variance), float(freedom))


# ---------------------------------------------------------------------------- intervals and p-values

def student_tail(freedom, points=20_001):
    """(t, P(|T| > t)) of Student's distribution on a grid. With t = sqrt(freedom) tan(a) its density is
    cos(a)^(freedom - 1)."""
    angle = np.linspace(0, np.pi / 2, points)
    density = np.cos(angle) ** (freedom - 1) if freedom > 1 else np.ones(points)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * np.tan(angle[:-1]), 1 - (mass / mass[-1])[:-1]


def half_width(found, level=0.95):
    """Half of the interval: the smallest effect that such a measurement would tell from 0."""
    t, tail = student_tail(found.freedom)
    return math.sqrt(found.variance) * float(np.interp(-(1 - level), -tail, t))


def p_value(found, at=0.0):
    """Two-sided p-value of the hypothesis that the contrast is `at`."""
    gap = abs(found.difference - at)
    if found.variance <= 0:
        return float(gap == 0)
    t, tail = student_tail(found.freedom)
    return float(np.interp(gap / math.sqrt(found.variance), t, tail))


def holm(p_values):
    """Holm's step-down adjustment (Holm 1979) of p-values; None stays None and is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, highest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


# ---------------------------------------------------------------------------- verdicts

@dataclass(frozen=True)
class Claim:
    """A contrast that the paper, or this project, says is positive."""

    text: str
    contrast: dict          # {key of a cell: weight}
    effect: float = None    # its size in the paper's numbers, on the judged scale, where it gives any
    ours: bool = False
    primary: bool = False
    unit: str = ""          # of the contrast: points, factor (it is a logarithm), dB
    untrained: dict = None  # {key of a cell that classifies: that of the untrained network}


def judge(claim, cells, draws=1000):
    """All about a claim that a page shows, for JSON. The verdict is not corrected for other claims."""
    found, bases, gains = estimate(claim.contrast, cells, draws), claim.untrained or {}, {}
    for row in dict.fromkeys(row for row, _ in bases):  # of a column that is a mean all its parts
        pairs = [(key, base) for key, base in bases.items() if key[0] == row and base in cells]
        if pairs:
            above = {key: 1 / len(pairs) for key, _ in pairs} | {base: -1 / len(pairs) for _, base in pairs}
            gain = estimate(above, cells, draws)
            gains[row] = [gain.difference, half_width(gain)]
    half = half_width(found)
    judged = {"claim": claim.text, "ours": claim.ours, "primary": claim.primary, "unit": claim.unit,
              "effect": claim.effect, "difference": found.difference,
              "interval": [found.difference - half, found.difference + half] if half else None,
              "smallest_visible": half or None, "seeds": len(next(iter(cells.values()))),
              "gain_over_untrained": gains,
              "measured": {*bases.values()} <= {*cells} and all(gain > half for gain, half in gains.values()),
              "p_zero": p_value(found) if half else None,
              "p_paper": p_value(found, claim.effect) if half and claim.effect is not None else None}
    return {**judged, "verdict": verdict(judged, judged["p_zero"], judged["p_paper"])}


def verdict(judged, p_zero, p_paper, level=0.05):
    """One of the four words. Holm's adjustment may have raised the p-values."""
    difference, effect = judged["difference"], judged["effect"]
    if not judged["measured"]:
        return NOT_MEASURED
    if judged["seeds"] < 2 or p_zero is None:
        return UNINFORMATIVE
    if difference > 0 and p_zero < level:
        return SUPPORTED
    below_paper = p_paper is not None and difference < effect and p_paper < level
    return EXCLUDED if below_paper or difference < 0 and p_zero < level else UNINFORMATIVE


def corrected(primaries):
    """Primary claims with the verdicts that Holm's adjustment over all of them leaves; each test apart."""
    zero, paper = (holm([claim[name] for claim in primaries]) for name in ("p_zero", "p_paper"))
    return [{**claim, "verdict": verdict(claim, a, b), "p_zero_holm": a, "p_paper_holm": b}
            for claim, a, b in zip(primaries, zero, paper)]


def in_words(judged):
    """The verdict, and in brackets what it does not say by itself."""
    word, high = judged["verdict"], (judged["interval"] or [0, 0])[1]
    if judged["seeds"] < 2:
        return f"{word} (one seed)"
    if word == EXCLUDED and judged["effect"] is None:  # the paper prints no size that could be excluded
        word = "excluded"
    if judged["verdict"] in (SUPPORTED, EXCLUDED) and high < 0:
        return f"{word} (the other way)"
    if word == SUPPORTED and judged["effect"] and high < judged["effect"]:
        return f"{word} (smaller than the paper's)"
    return word
