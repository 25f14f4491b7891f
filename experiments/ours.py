"""Targets beyond the paper: its claims taken apart, every objective beside every other, and the theory's
pages."""

from dataclasses import replace

import numpy as np

from experiments.measures import (
    any_order_bound,
    by_kind,
    exact_or_none,
    few_labels,
    loss_at,
    matplotlib,
    perplexity_column,
    probe,
    probe_after,
    reconstruction,
    told_of_authors,
)
from experiments.pictures import heatmap, plot_doses, plot_objectives
from experiments.scales import CPU_SCALE, FEWER
from experiments.tables import (
    REGIMES,
    STEP_PAIRS,
    STEPS,
    TWO_STREAMS,
    Table,
    claim,
    compare,
    of,
    with_counts,
    with_untrained,
)
from objectives import OBJECTIVES, as_flags
from theory.claims import TABLE_9

TEST_RATIOS = (0.15, 0.225, 0.3, 0.575, 0.75, 0.95)


def variety(place):
    """Table 7's question: does a range of ratios help because it varies, or because it hides more?"""
    fixed = {f"fixed {r}": f"text: mlm --mask {r}" for r in (0.15, 0.225, 0.3, 0.575)}
    drawn = {f"[0.15, {high:g}]": f"text: vl --mask 0.15,{high:g}" for high in (0.3, 1.0)}
    fewer, budget = f"{FEWER:g} x fewer tokens", f"text x{1 / FEWER:g}"
    rows = fixed | drawn | {f"fixed 0.3, {fewer}": f"{budget}: mlm --mask 0.3",
                            f"[0.15, 1], {fewer}": f"{budget}: vl --mask 0.15,1"}
    columns = {regime: perplexity_column(regime) for regime in REGIMES}
    columns |= {f"loss at {ratio}": loss_at(ratio, TEST_RATIOS) for ratio in TEST_RATIOS}
    paper = {"fixed 0.15": 59.6, "fixed 0.225": round(float(np.sqrt(59.6 * 50.2)), 1), "fixed 0.3": 50.2,
             "[0.15, 0.3]": 45.1}
    paper = {row: dict.fromkeys(REGIMES, number) for row, number in paper.items()}
    pairs = [("[0.15, 0.3]", "fixed 0.225"), ("[0.15, 1]", "fixed 0.575"), ("[0.15, 0.3]", "fixed 0.3"),
             ("[0.15, 1]", "fixed 0.3"), ("[0.15, 1]", "fixed 0.15"), ("fixed 0.3", "fixed 0.15"),
             ("fixed 0.15", f"fixed 0.3, {fewer}"), ("fixed 0.15", f"[0.15, 1], {fewer}")]
    judged = {regime: columns[regime] for regime in REGIMES}
    rows = with_counts(rows)
    return Table("Variety or ratio?", "One architecture, the same settings; the same tokens but for the last "
                 f"two rows, which read {FEWER:g} times fewer: beside these, fixed 0.15 is a model that "
                 "was trained so much longer. A range is compared with the fixed ratio of the same mean, "
                 "which hides as many tokens. The paper's number beside 0.225 is not printed there: it is "
                 "the geometric mean of those for 0.15 and 0.3. Right: loss per hidden token (nats) where "
                 "another share is hidden in the test.", rows, columns,
                 paper, compare(judged, pairs, paper, primary=("padded", *pairs[0])), picture=heatmap)


def dose(place):
    """Tables 3 and 9 as a dose-response curve: the more tokens at once, the better the features?"""
    ts = (1, 2, 4, 8)
    rows = {f"t = {t}": "images: " + ("ar --streams 2" if t == 1 else f"dar --t {t}") for t in ts}
    rows |= {f"masked {ratio}": f"images: mlm --mask {ratio} --streams 2" for ratio in (0.5, 0.75)}
    rows, untrained = with_untrained(rows)
    rows |= {"Raw pixels": f"pixels {rows['t = 1']}"}
    columns = {f"after {share:.0%}": probe_after(share) for share in place.scale.curve}
    columns |= {f"{attention} attention": probe(extra=f"--attention {attention}")
                for attention in ("causal", "full")}
    last = [*columns][len(place.scale.curve) - 1]
    paper = {f"t = {t}": {last: TABLE_9[t][0]} for t in (1, 2, 4)}
    x = np.log2(ts) - np.mean(np.log2(ts))
    doubling = claim(columns, last, "slope of accuracy on log2 t",
                     dict(zip(t_rows(ts), x / np.sum(x * x))), paper, untrained)
    slope = replace(doubling, effect=slope_of({t: probed for t, (probed, _) in TABLE_9.items()}), ours=True)
    claims = compare({last: columns[last]}, [("t = 2", "t = 1"), ("t = 4", "t = 1"), ("t = 8", "t = 1")],
                     paper, untrained, (last, "t = 2", "t = 1"))
    attention = {name: columns[name] for name in columns if name.endswith("attention")}
    pairs = [(f"masked {ratio}", f"t = {t}") for ratio in (0.5, 0.75) for t in (1, 2)]
    return Table("Dose and response: t, and masked against autoregressive", TWO_STREAMS.format("images")
                 + " Linear probes after shares of the budget, each a training of its own, under the "
                 "attention that the objective was trained with, and at the end under either attention. The "
                 "paper's numbers, of ViT-B on ImageNet-1K, are those of Table 9, whose slope is over t = 1 "
                 "to 4.", rows, columns, paper,
                 (*claims, slope, *compare(attention, pairs, untrained=untrained)), picture=plot_doses)


def t_rows(ts):
    return [f"t = {t}" for t in ts]


def slope_of(numbers):
    """Least-squares slope of {t: number} on log2 t."""
    return float(np.polyfit(np.log2(list(numbers)), list(numbers.values()), 1)[0])


def masked(place):
    """Does the masked objective classify better than the autoregressive one, on images, each in its own
    attention?"""
    rows, untrained = with_untrained({"t = 1": "images: ar --streams 2",
                                      "masked 0.75": "images: mlm --mask 0.75 --streams 2"})
    columns = {"LP Acc.": probe_after(1)}
    return Table("Masked against autoregressive, images", TWO_STREAMS.format("images")
                 + " The paper compares them in classification by the GLUE scores of two public models "
                 "(Table 1) and prints no number for images.", rows, columns, {},
                 (claim(columns, "LP Acc.", "masked 0.75 better than t = 1", {"masked 0.75": 1, "t = 1": -1},
                        {}, untrained, True, False),))


def objectives(place):
    """All text objectives of the registry with their defaults: likelihood, or a bound on it, and a probe with
    few labels."""
    flags = {name: as_flags(cls()) for name, cls in OBJECTIVES.items() if not cls.images_only}
    rows, _ = with_untrained(of("text", flags))
    rows, few = with_counts(rows), few_labels(place)
    return Table("Every objective", "The same tokens in the same order, the same settings, tuned for none, "
                 "each on the path that it takes by default. Perplexity: exact, from left to right, where "
                 "the objective has such a likelihood (masks in one stream: the better of padded and "
                 "truncated). Bound: exp of the any-order bound per token, where there is one; it is "
                 f"of another distribution than the exact value beside it.{told_of_authors(place)} These "
                 "claims are nobody's, so none is judged.", rows,
                 {"perplexity": exact_or_none(place), "bound": any_order_bound(), **few},
                 picture=plot_objectives)


def fourbytwo(place):
    """The paper's four objectives on text and images, both tasks, all through two streams."""
    rows = {}
    for kind, fixed, drawn in (("text", "0.15", "0.15,0.3"), ("images", "0.75", "0.5,0.75")):
        flags = {"ar": "ar", "dar t=2": "dar --t 2", "mlm": f"mlm --mask {fixed}", "vl": f"vl --mask {drawn}"}
        rows |= {f"{kind} {label}": f"{kind}: {x}" + " --streams 2" * (label != "dar t=2")
                 for label, x in flags.items()}
    rows, untrained = with_untrained(rows)
    classify = {"classification (probe)": by_kind(place)}
    text = {"generation (perplexity)": only("text", perplexity_column("next"))}
    images = {"generation (L2)": only("images", reconstruction("l2", 4))}
    better = [("mlm", "ar"), ("dar t=2", "ar"), ("vl", "mlm")]
    pairs = [(f"{kind} {a}", f"{kind} {b}") for kind in ("text", "images") for a, b in better]
    claims = compare(classify, pairs, untrained=untrained, primary=("classification (probe)", *pairs[0]))
    claims += compare(text, [("text ar", "text mlm"), ("text vl", "text mlm"), ("text ar", "text dar t=2")])
    return Table("Every objective of the paper, both tasks", "All eight run through two streams; within text "
                 "and within images the same data in the same order and the same settings. L2 of ar and dar "
                 f"is from their left-to-right context only.{told_of_authors(place)}", rows,
                 classify | text | images, {}, claims + compare(images, [("images vl", "images mlm")]))


def only(kind, measure):
    """A measure of one kind of models."""
    def stages(place, model, seed):
        return measure.stages(place, model, seed) if kind in model.split(": ")[0] else ()

    return replace(measure, stages=stages)


def table9_text(place):
    """Table 9's question in text: how many tokens at once?"""
    classify, generate = few_labels(place), {"Perplexity": perplexity_column("")}
    rows, untrained = with_untrained(of("text", STEPS))
    return Table("The choice of t in text", TWO_STREAMS.format("tokens") + told_of_authors(place), rows,
                 classify | generate, {}, compare(classify, STEP_PAIRS, untrained=untrained,
                         primary=(next(iter(classify)), *STEP_PAIRS[-1]))
                 + compare(generate, [("t = 1", f"t = {t}") for t in (2, 3, 4)]))


def theory(place):
    """Every claim of the theory, as `spectral.py all` checks it."""
    stage = place.stage("spectral", ("spectral.py", "all"), plot="--plot" if matplotlib() else None)
    return Table("Theory: what is printed and what holds", "Computed on the paper's toy model.",
                 extra=(stage,))


def toy(place):
    """The theory where it applies, as `spectral.py toy` runs it."""
    quick = ("--quick",) * (place.name == "smoke")
    stage = place.stage("toy", ("spectral.py", "toy", *quick), plot="--plot" if matplotlib() else None,
                        flops=300 * CPU_SCALE.flops)
    return Table("The theory on its own ground", "Networks on the paper's toy model and on a noisy one; see "
                 "spectral.py toy.", extra=(stage,))


def bridge(place):
    """The Transformer on the toy model, blind and told, a stage for each seed: experiments/bridge.py."""
    quick, each = (("--quick",), 2) if place.name == "smoke" else ((), 3)
    seeds = [place.stage(f"bridge-seed{seed}", ("experiments.bridge", "train", "--seed", str(seed), *quick),
                         flops=240 * CPU_SCALE.flops) for seed in range(each)]
    stage = place.stage("bridge", ("experiments.bridge", "summary", *(str(one.out) for one in seeds)), *seeds,
                        plot="--plot" if matplotlib() else None)
    return Table("From the theory to our Transformer", "The Transformer of train.py on the paper's toy "
                 "model, its queries blind or told which position they predict; see experiments/bridge.py.",
                 extra=(stage,))


def recipe(place):
    """Time to a loss, of our recipe and of others: experiments/recipe.py."""
    seeds, share = (1, ("--share", "0.01")) if place.name == "smoke" else (2, ())
    train = "experiments.recipe", "train", *share
    runs = [place.stage(f"recipe-{objective}-seed{seed}",
                        (*train, "--objective", objective, "--seed", str(seed)),
                        flops=500 * CPU_SCALE.flops) for seed in range(seeds) for objective in ("ar", "vl")]
    stage = place.stage("recipe", ("experiments.recipe", "summary", *(str(one.out) for one in runs)), *runs,
                        plot="--plot" if matplotlib() else None)
    return Table("Which recipe learns soonest", "tiny on pydoc, the same batches of 16 x 128 bytes in the "
                 "same order, each budget with a schedule of its own. See experiments/recipe.py.",
                 extra=(stage,))


OURS = {f.__name__: f for f in (variety, dose, masked, objectives, fourbytwo, table9_text, theory, toy,
                                bridge, recipe)}
