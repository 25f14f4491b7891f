"""What a difference between models says about a claim: its interval, and a verdict against the size that the
paper prints.

A claim is a contrast, a sum of cells with weights: {("masked", "probe"): 1, ("autoregressive", "probe"): -1}.
It varies for two reasons. Another pretraining seed would give other models: the spread of the contrast over
seeds, the same seeds on all sides, is what is known of that. Other test examples would give other scores: a
bootstrap over the examples, the same ones on all sides, says how much. Both variances are added, and the
interval is Student's with the degrees of freedom of the sum (Satterthwaite 1946), since resampling three
seeds would give intervals that are much too narrow.
"""

import math
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


# ---------------------------------------------------------------------------- cells

def matthews_of(m):
    """Matthews correlation from the means of predicted, true and both, classes 0 and 1."""
    p, t, both = np.moveaxis(m, -1, 0)
    scale = np.sqrt(np.maximum(p * (1 - p) * t * (1 - t), 0))
    return 100 * np.divide(both - p * t, scale, out=np.zeros_like(p), where=scale > 1e-12)


def pearson_of(m):
    """Correlation from the means of x, y, x y, x^2 and y^2."""
    x, y, xy, xx, yy = np.moveaxis(m, -1, 0)
    scale = np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0))
    return 100 * np.divide(xy - x * y, scale, out=np.zeros_like(x), where=scale > 1e-12)


# From means over examples (..., k) to a value on the scale on which claims are judged (...).
LINKS = {
    "mean": lambda m: m[..., 0],
    "percent": lambda m: 100 * m[..., 0],
    "log": lambda m: np.log(m[..., 0]),
    "f1": lambda m: 200 * m[..., 2] / np.maximum(m[..., 0] + m[..., 1], 1e-12),  # means as in matthews_of
    "matthews": matthews_of,
    "pearson": pearson_of,
    "share": lambda m: (m[..., 0] - m[..., 1]) / (m[..., 0] - m[..., 2]),
}


@dataclass(frozen=True)
class Cell:
    """What one pretraining seed scores in one column.

    value    on the scale on which claims are judged
    samples  (f, k, n): k numbers of each of n test examples, from f repetitions such as fine-tuning seeds;
             value is the mean over the repetitions of LINKS[link] of the means over the examples. None:
             nothing is known of examples
    test     names the examples: cells with one name have the same examples in the same order
    """

    value: float
    samples: np.ndarray = None
    link: str = "mean"
    test: str = ""


def cell_of(samples, link="mean", test=""):
    """A Cell from samples (n,), (k, n) or (f, k, n)."""
    samples = np.asarray(samples, float)
    samples = samples.reshape((1,) * (3 - samples.ndim) + samples.shape)
    return Cell(float(LINKS[link](samples.mean(-1)).mean()), samples, link, test)


# ---------------------------------------------------------------------------- estimates

class Estimate(NamedTuple):
    """A contrast, its variance and the degrees of freedom of that."""

    difference: float
    variance: float
    freedom: float


def example_draws(cells, contrast, draws, rng):
    """Bootstrap over test examples -> (draws, seeds): the contrast of every seed, with the same examples
    drawn for all."""
    seeds = len(cells[next(iter(contrast))])
    total, shares = np.zeros((draws, seeds)), {}
    for key, weight in contrast.items():
        for seed, cell in enumerate(cells[key]):
            if cell.samples is None:
                continue
            n = cell.samples.shape[-1]
            if (cell.test, n) not in shares:  # how often each example is drawn, as shares (draws, n)
                drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
                shares[cell.test, n] = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n) / n
            means = np.einsum("dn,fkn->dfk", shares[cell.test, n], cell.samples, optimize=True)
            total[:, seed] += weight * LINKS[cell.link](means).mean(1)
    return total


def estimate(contrast, cells, draws=1000, seed=0):
    """The Estimate of a contrast {key: weight} of cells {key: [a Cell for each pretraining seed]}.

    Let d_si be the contrast of seed s and example i, the sum of mu, A_s, B_i and C_si. The spread of the
    seeds' means has A and C in it; the covariance of two seeds' bootstrap draws is that of B alone. One seed:
    its examples are all there is.
    """
    per_seed = sum(weight * np.array([cell.value for cell in cells[key]]) for key, weight in contrast.items())
    seeds = len(per_seed)
    drawn = example_draws(cells, contrast, draws, np.random.default_rng(seed))
    counts = [cell.samples.shape[-1] for key in contrast for cell in cells[key] if cell.samples is not None]
    if seeds == 1:
        return Estimate(float(per_seed[0]), float(drawn.var(ddof=1)), float(min(counts, default=1) - 1 or 1))
    covariance = np.cov(drawn.T)
    of_examples = max(0.0, (covariance.sum() - np.trace(covariance)) / (seeds * (seeds - 1)))
    of_seeds = per_seed.var(ddof=1) / seeds
    variance = of_seeds + of_examples
    parts = of_seeds ** 2 / (seeds - 1) + of_examples ** 2 / max(1, min(counts, default=2) - 1)
    return Estimate(float(per_seed.mean()), float(variance), float(variance ** 2 / parts) if parts
                    else float(seeds - 1))


def student_tail(freedom, points=20_001):
    """(t, P(|T| > t)) of Student's distribution on a grid; with t = sqrt(freedom) tan(a) its density is
    cos(a)^(freedom-1)."""
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
    """A contrast that the paper, or this project, says is positive.

    effect     its size in the paper's numbers, on the judged scale; None where the paper gives none
    untrained  {row and column: row and column of the untrained network of the same architecture}, of all
               cells that classify; one that is not there makes the claim not measured
    unit       "points", "factor" (the contrast is a logarithm) or "" for what has none
    """

    text: str
    contrast: dict
    effect: float = None
    ours: bool = False
    primary: bool = False
    unit: str = ""
    untrained: dict = None


def judge(claim, cells, draws=1000):
    """Everything about a claim that a page shows, as a dict for JSON. The verdict is not corrected for other
    claims."""
    found, gains, pairs = estimate(claim.contrast, cells, draws), {}, {}
    bases = claim.untrained or {}
    for key, base in bases.items():
        if base in cells:
            pairs.setdefault(key[0], []).append((key, base))
    for row, own in pairs.items():  # of a mean column all its parts
        share = 1 / len(own)
        gain = estimate({key: share for key, _ in own} | {base: -share for _, base in own}, cells, draws)
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
    """One of the four words, from a judged claim and its p-values, which Holm's adjustment may have
    raised."""
    difference, effect = judged["difference"], judged["effect"]
    if not judged["measured"]:
        return NOT_MEASURED
    if judged["seeds"] < 2 or p_zero is None:
        return UNINFORMATIVE
    if difference > 0 and p_zero < level:
        return SUPPORTED
    below_paper = p_paper is not None and difference < effect and p_paper < level
    return EXCLUDED if below_paper or difference < 0 and p_zero < level else UNINFORMATIVE


def word(judged):
    """The verdict; where the paper prints no size, none can be excluded but that the claim is so."""
    return "excluded" if judged["verdict"] == EXCLUDED and judged["effect"] is None else judged["verdict"]


def remark(judged):
    """What the verdict does not say by itself."""
    if judged["verdict"] in (NOT_MEASURED, UNINFORMATIVE) or not judged["interval"]:
        return "one seed" if judged["seeds"] < 2 else ""
    high = judged["interval"][1]
    if high < 0:
        return "the other way"
    smaller = judged["effect"] and high < judged["effect"]
    return "smaller than the paper's" if judged["verdict"] == SUPPORTED and smaller else ""


def corrected(primaries):
    """Primary claims with the verdicts that remain when Holm's adjustment runs over all of them; each test
    apart."""
    zero, paper = (holm([claim[name] for claim in primaries]) for name in ("p_zero", "p_paper"))
    return [{**claim, "verdict": verdict(claim, a, b), "p_zero_holm": a, "p_paper_holm": b}
            for claim, a, b in zip(primaries, zero, paper)]
