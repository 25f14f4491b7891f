"""What a difference between models says about a claim: its interval, and one of four words.

A claim is a contrast, a sum of cells with weights: {("masked", "probe"): 1, ("autoregressive", "probe"): -1}.
It varies for two reasons. Another pretraining seed would give other models: the spread of the contrast over
seeds, the same seeds on all sides, says how much. Other test examples would give other scores: a bootstrap
over the examples, the same ones on all sides, says how much. With these two variances of the mean, over S
seeds and n examples, and Student's t, half of the interval is

    half^2 = t(S - 1)^2 of_seeds + t(n - 1)^2 of_examples

One t of estimated degrees of freedom for the sum covers too little: where three seeds lie close together by
chance, it takes them for many. Where one contrast is measured at B budgets or widths with few seeds each, all
of these share one variance of seeds, with B (S - 1) degrees of freedom.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SUPPORTED, EXCLUDED = "supported", "paper's size excluded"
UNINFORMATIVE, NOT_MEASURED = "uninformative", "not measured"
MEANING = {
    SUPPORTED: "the test against 0 says that the difference is positive; *smaller than the paper's*: that "
               "against the paper's effect says that it is less",
    EXCLUDED: "it is not seen to be positive, and the test against the paper's effect says that it is less; "
              "*the other way*: the test against 0 says that it is negative, and *excluded* says the same "
              "where the paper prints no effect",
    UNINFORMATIVE: "neither test says anything; or there is one seed only, which says nothing about others",
    NOT_MEASURED: "not all of the models are seen to beat what learned nothing, so that the difference does "
                  "not tell of pretraining: untrained networks of the same architecture in classification, "
                  "how often each token occurs in perplexity, the mean colour in reconstruction"}


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
    """A contrast, and the variances of its mean over `seeds` pretraining seeds and over `n` test examples;
    `freedom` are the degrees of freedom of the first."""

    difference: float
    of_seeds: float
    of_examples: float
    seeds: int
    n: int
    freedom: int


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


def over_seeds(contrast, cells):
    """What each pretraining seed says of a contrast -> (seeds,)."""
    return sum(weight * np.array([cell.value for cell in cells[key]]) for key, weight in contrast.items())


def estimate(contrast, cells, pool=(), draws=1000):
    """The Estimate of a contrast {key: weight} of cells {key: [a Cell for each pretraining seed]}.

    `pool`: contrasts of different models which share one variance of seeds; `contrast` is a sum of them.

    Let d_si be the contrast of seed s and example i, the sum of mu, A_s, B_i and C_si. The spread of the
    seeds' means has A and C in it; the covariance of two seeds' bootstrap draws is that of B alone. One
    seed: its examples are all there is.
    """
    per_seed = over_seeds(contrast, cells)
    seeds, drawn = len(per_seed), bootstrap(contrast, cells, draws)
    n = min((cell.n for key in contrast for cell in cells[key] if cell.n), default=0)
    if seeds == 1:
        return Estimate(float(per_seed[0]), 0.0, float(drawn.var(ddof=1)), 1, n, 0)
    covariance = np.cov(drawn.T)
    of_examples = max(0.0, (covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1)))
    variance, freedom = per_seed.var(ddof=1), seeds - 1
    if pool:
        weights = [contrast.get(key, 0) / weight for key, weight in (next(iter(one.items())) for one in pool)]
        spread = np.mean([over_seeds(one, cells).var(ddof=1) for one in pool])
        variance, freedom = spread * np.sum(np.square(weights)), len(pool) * (seeds - 1)
    return Estimate(float(per_seed.mean()), float(variance) / seeds, float(of_examples), seeds, n, freedom)


# ---------------------------------------------------------------------------- intervals and p-values

@functools.cache
def student(freedom, points=20_001):
    """(a, P(|T| > t)) of Student's distribution on a grid of angles a: with t = sqrt(freedom) tan(a) its
    density is cos(a)^(freedom - 1)."""
    angle = np.linspace(np.pi / 2, 0, points)
    density = np.cos(angle) ** (freedom - 1)
    tail = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return angle, tail / tail[-1]


def quantile(p, freedom):
    """The t that |T| exceeds with probability p."""
    angle, tail = student(max(1, freedom))
    return math.sqrt(max(1, freedom)) * np.tan(np.interp(p, tail, angle))


def half_width(found, p=0.05):
    """Half of the interval of level 1 - p: the smallest effect that such a measurement would tell from 0."""
    return np.sqrt(quantile(p, found.freedom) ** 2 * found.of_seeds
                   + quantile(p, found.n - 1) ** 2 * found.of_examples)


def p_value(found, at=0.0):
    """Two-sided p-value of the hypothesis that the contrast is `at`: the interval of level 1 - p ends
    there."""
    gap, levels = abs(found.difference - at), np.geomspace(1, 1e-12, 4001)
    if found.of_seeds + found.of_examples <= 0:
        return float(gap == 0)
    return float(np.interp(gap, half_width(found, levels), levels))


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
    floors: dict = None     # {key of a cell: that of what learned nothing, which it has to be better than}
    lower: bool = False     # is better, in the cells of floors
    pool: tuple = ()        # contrasts that share one variance of seeds
    at: dict = None         # where a picture shows it


def judge(claim, cells, draws=1000):
    """All about a claim that a page shows, for JSON. The verdict is not corrected for other claims."""
    found, floors, gains = estimate(claim.contrast, cells, claim.pool, draws), claim.floors or {}, {}
    for row in dict.fromkeys(row for row, _ in floors):  # of a column that is a mean all its parts
        pairs = [(key, floor) for key, floor in floors.items() if key[0] == row and floor in cells]
        if pairs:
            weight = (-1 if claim.lower else 1) / len(pairs)
            above = {key: weight for key, _ in pairs} | {floor: -weight for _, floor in pairs}
            gain = estimate(above, cells, draws=draws)
            gains[row] = [gain.difference, float(half_width(gain))]
    half = float(half_width(found))
    judged = {"claim": claim.text, "ours": claim.ours, "primary": claim.primary, "unit": claim.unit,
              "effect": claim.effect, "at": claim.at, "difference": found.difference,
              "interval": [found.difference - half, found.difference + half] if half else None,
              "smallest_visible": half or None, **found._asdict(), "gain_over_untrained": gains,
              "measured": {*floors.values()} <= {*cells} and all(gain > low for gain, low in gains.values()),
              "p_zero": p_value(found) if half else None,
              "p_paper": p_value(found, claim.effect) if half and claim.effect is not None else None}
    return {**judged, "verdict": verdict(judged)}


def says(judged, level=0.05):
    """What the two tests of a judged claim say: (positive, negative, less than the paper's effect)."""
    p_zero, p_paper = (1 if judged[name] is None else judged[name] for name in ("p_zero", "p_paper"))
    positive, negative = (p_zero < level and sign * judged["difference"] > 0 for sign in (1, -1))
    return positive, negative, p_paper < level and judged["difference"] < judged["effect"]


def verdict(judged):
    """One of the four words, by the p-values as they stand."""
    if not judged["measured"]:
        return NOT_MEASURED
    positive, negative, less = says(judged)
    if judged["seeds"] < 2 or not (positive or negative or less):
        return UNINFORMATIVE
    return SUPPORTED if positive else EXCLUDED


def corrected(primaries):
    """Primary claims with the p-values and the verdicts that Holm's adjustment over all of them leaves; each
    test apart. Claims with the same numbers are of the same models: one test, which counts once."""
    tests = {(claim["difference"] or claim["claim"], claim["smallest_visible"], claim["effect"]): claim
             for claim in primaries}
    zero, paper = (holm([claim[name] for claim in tests.values()]) for name in ("p_zero", "p_paper"))
    found = [{**claim, "p_zero": a, "p_paper": b, "alone": claim["verdict"]}
             for claim, a, b in zip(tests.values(), zero, paper)]
    return [{**claim, "verdict": verdict(claim)} for claim in found]


def in_words(judged):
    """The verdict, and in brackets what it does not say by itself."""
    def name(word):  # the paper may print no size that could be excluded
        return "excluded" if word == EXCLUDED and judged["effect"] is None else word

    word, (_, negative, less) = judged["verdict"], says(judged)
    if judged["seeds"] < 2:
        return f"{word} (one seed)"
    if judged.get("alone", word) != word:
        return f"{word} (before the correction: {name(judged['alone'])})"
    if word == EXCLUDED:
        return name(word) + " (the other way)" * negative
    return word + " (smaller than the paper's)" * (word == SUPPORTED and less)
