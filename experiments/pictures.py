"""Pictures of the targets, drawn from their JSON content (pages.py) or from what the stages wrote. All need
matplotlib."""

import itertools
import math

import numpy as np

from downstream.by_length import draw_by_length, middles, prefix_axis
from downstream.connectivity import plot_connectivity as plot_similarity
from experiments.measures import gain_share, regime_of, unigram_stage
from experiments.stages import evaluation
from experiments.verdicts import word
from support.cli import import_optional

__all__ = ["dots", "forest", "heatmap", "plot_curves_by_length", "plot_doses", "plot_objectives",
           "plot_similarity"]

SEED, MEAN, MEAN_AND_SPREAD = "one seed", "mean over seeds", "mean and standard deviation over seeds"


def new_figure(*size, **grid):
    return import_optional("matplotlib.pyplot").subplots(figsize=size, layout="constrained", **grid)


def save(figure, path):
    figure.savefig(path, dpi=130)
    import_optional("matplotlib.pyplot").close(figure)


def points(panel, y, cell, name="", k=0, of=1):
    """The seeds of a cell as dots and their mean as a tick, in row y of a panel; series k of so many."""
    at, name = y + 0.2 * (k - (of - 1) / 2), f"{name}, " if name else ""
    panel.plot(cell["seeds"], [at] * len(cell["seeds"]), "os^"[k], color=f"C{k}", alpha=0.4,
               label=f"{name}{SEED}")
    if cell["mean"] is not None:
        panel.errorbar(cell["mean"], at, xerr=cell["std"] if of == 1 else None, fmt="|", color=f"C{k}"
                       if of > 1 else "black", markersize=14, capsize=3,
                       label=f"{name}{MEAN_AND_SPREAD if of == 1 else MEAN}")


def rows_on(panel, names, **axes):
    """The names of rows at the left of a panel, from the top."""
    panel.set_yticks(range(len(names)), names)
    panel.set(ylim=(len(names) - 0.5, -0.5), **axes)
    panel.grid(axis="x", alpha=0.3)


def legend(figure, panels, columns=3):
    """One legend below all panels, every label once."""
    found = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize="small",
                  frameon=False)


def plain_log(panel):
    """A logarithmic x axis with numbers that people read, where there is room for a few of them."""
    low, high = panel.get_xlim()
    ticks = [tick * 10 ** k for k in range(5) for tick in (1, 1.5, 2, 3, 5, 7)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > 2:
        panel.set_xscale("log")
        panel.set_xticks(shown, [f"{tick:g}" for tick in shown])
        panel.minorticks_off()


def dots(place, seeds, content, path):
    """Every seed of every row, one panel for each column."""
    rows, columns = content["rows"], list(content["rows"][0]["cells"])
    figure, panels = new_figure(2.4 + 2.3 * len(columns), 1.5 + 0.42 * len(rows), nrows=1, ncols=len(columns),
                                sharey=True, squeeze=False)
    for panel, column in zip(panels[0], columns):
        for y, row in enumerate(rows):
            points(panel, y, row["cells"][column])
        rows_on(panel, [row["row"] for row in rows], xlabel=column)
    legend(figure, panels.flat)
    save(figure, path)


def heatmap(place, seeds, content, path):
    """`variety`: loss at each ratio of the test for each row, beside the left-to-right perplexity."""
    rows, names = content["rows"], [row["row"] for row in content["rows"]]
    columns = [column for column in rows[0]["cells"] if column.startswith("loss at")]
    losses = np.array([[row["cells"][column]["mean"] for column in columns] for row in rows])
    figure, (left, right) = new_figure(11, 1.6 + 0.5 * len(rows), nrows=1, ncols=2, width_ratios=(1.15, 1))
    worse = losses - losses.min(0)
    limit = 3 * np.median(worse) or None  # so that unigrams and short trainings do not bleach the others
    image = left.imshow(worse, cmap="viridis_r", aspect="auto", vmin=0, vmax=limit)
    for y, x in np.ndindex(losses.shape):
        left.text(x, y, f"{losses[y, x]:.2f}", ha="center", va="center", fontsize=9,
                  color="white" if worse[y, x] > image.norm.vmax / 2 else "black",
                  weight="bold" if worse[y, x] == 0 else "normal")
    left.set_xticks(range(len(columns)), [column.removeprefix("loss at ") for column in columns])
    left.set_yticks(range(len(rows)), names)
    left.set(xlabel="share hidden in the test",
             title="loss per hidden token (nats); bold: best of its column")
    figure.colorbar(image, ax=left, label="above the column's best", extend="max")
    for (k, regime), (y, row) in itertools.product(enumerate(("padded", "truncated")), enumerate(rows)):
        points(right, y, row["cells"][regime], regime, k, 2)
    rows_on(right, [""] * len(names), xlabel="left-to-right perplexity", title="generation")
    plain_log(right)
    legend(figure, [right], 4)
    save(figure, path)


def plot_doses(place, seeds, content, path):
    """`dose`: accuracy against t after each share of the budget, and every objective under either attention
    at the end."""
    rows = {row["row"]: row["cells"] for row in content["rows"]}
    ts = [name for name in rows if name.startswith("t = ")]
    shares = [column for column in rows[ts[0]] if column.startswith("after")]
    figure, (left, right) = new_figure(11, 4.6, nrows=1, ncols=2)
    x = [int(name.removeprefix("t = ")) for name in ts]
    for k, column in enumerate(shares):
        cells = [rows[name][column] for name in ts]
        for one_x, cell in zip(x, cells):
            left.plot([one_x] * len(cell["seeds"]), cell["seeds"], "o", color=f"C{k + 2}", alpha=0.35)
        left.plot(x, [cell["mean"] for cell in cells], "-", color=f"C{k + 2}", label=f"{column} of the "
                  f"budget (dots: {SEED})")
    for name, style in (("Untrained, causal attention", ":"), ("Raw pixels", "-.")):
        left.axhline(rows[name][shares[-1]]["mean"], color="grey", linestyle=style, label=name.lower())
    left.set(xscale="log", xlabel="t, tokens predicted at once", ylabel="linear probe (%)",
             title="dose and response")
    left.set_xticks(x, x)
    left.minorticks_off()
    left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    named = [name for name in rows if name != "Raw pixels"]
    for (k, attention), (y, name) in itertools.product(enumerate(("causal attention", "full attention")),
                                                       enumerate(named)):
        points(right, y, rows[name][attention], attention, k, 2)
    rows_on(right, named, xlabel="linear probe (%)", title="probed under")
    right.legend(*unique(right), fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2,
                 frameon=False)
    save(figure, path)


def unique(panel):
    """Handles and labels of a panel, every label once."""
    found = dict(reversed([*zip(*reversed(panel.get_legend_handles_labels()))]))
    return found.values(), found.keys()


def plot_objectives(place, seeds, content, path):
    """`objectives`: perplexity and bound side by side on the left, the probe on the right."""
    rows, names = content["rows"], [row["row"] for row in content["rows"]]
    *_, last = rows[0]["cells"]
    figure, (left, right) = new_figure(11, 1.8 + 0.42 * len(rows), nrows=1, ncols=2, sharey=True)
    kinds = ("perplexity", "left to right, exact"), ("bound", "any order, bound")
    for (k, (column, name)), (y, row) in itertools.product(enumerate(kinds), enumerate(rows)):
        points(left, y, row["cells"][column], name, k, 2)
    for y, row in enumerate(rows):
        points(right, y, row["cells"][last])
    rows_on(left, names, xlabel="perplexity per token", title="generation")
    rows_on(right, names, xlabel=f"{last} (%)", title="classification")
    plain_log(left)
    legend(figure, [left, right])
    save(figure, path)


def plot_curves_by_length(path, place, rows, reference, seeds):
    """Figure 3, means over seeds by the length of the prefix: left perplexity, right what each model gains of
    what the row `reference` gains over unigrams."""
    curves, unigram = {}, [unigram_stage(place, rows[reference], seed).result() for seed in range(seeds)]
    ar = [evaluation(place, rows[reference], seed, "perplexity", "--by-length").result()
          for seed in range(seeds)]
    bins = [(one["first"], one["last"]) for one in regime_of(ar[0], "next")["by_length"]["bins"]]
    figure, (left, right) = new_figure(11, 4.6, nrows=1, ncols=2)
    right.axhline(1, color="C0", label=reference)
    for k, (row, model) in enumerate(rows.items()):
        found = [evaluation(place, model, seed, "perplexity", "--by-length").result()
                 for seed in range(seeds)]
        for regime, r in found[0]["results"]["regimes"].items():
            nll = np.mean([regime_of(x, regime)["by_length"]["nll"] for x in found], axis=0)
            several = len(found[0]["results"]["regimes"]) > 1
            curves[f"{row}, {regime}" if several else row] = {**r["by_length"], "nll": nll.tolist()}
            if row != reference:
                shares = [np.mean([gain_of(first, regime, unigram[seed], found[seed], ar[seed])
                                   for seed in range(seeds)]) for first, _ in bins]
                right.plot(middles(bins), shares, "o--" if regime == "truncated" else "o-", color=f"C{k}")
    draw_by_length(left, curves)
    prefix_axis(right, bins)
    right.set(ylabel="(H of unigrams - L) / (H of unigrams - L_ar)", title=f"of what {reference} gains over "
              "unigrams")
    left.set(title="perplexity")
    legend(figure, (left, right))
    save(figure, path)


def gain_of(first, regime, unigram, x, ar):
    """measures.gain_share in the bin of prefixes that begins with the length `first`."""
    return gain_share(regime, lambda k, S: k == first, None).read(None, unigram, x, ar).value


def forest(claims, path):
    """Claims below one another, each on an axis of its own in its own unit: our difference with its
    interval, the paper's effect."""
    figure, panels = new_figure(9, 0.5 + 0.85 * len(claims), nrows=len(claims), squeeze=False)
    for panel, c in zip(panels[:, 0], claims):
        if c["interval"]:
            panel.plot(c["interval"], [0, 0], "-", color="C0", linewidth=2.5, label="95% interval")
        panel.plot(c["difference"], 0, "o", color="C0", label="here, mean over seeds")
        if c["effect"] is not None:
            panel.plot(c["effect"], 0, "D", color="C3", label="the paper's effect")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.margins(x=0.1)
        if c["unit"] == "factor":
            ticks = round_factors(*panel.get_xlim())
            panel.set_xticks(np.log(ticks), [f"x{tick:g}" for tick in ticks])
        else:
            panel.xaxis.set_major_locator(import_optional("matplotlib.ticker").MaxNLocator(5))
            panel.xaxis.set_major_formatter("{x:+g}")
        panel.tick_params(labelsize=8)
        unit = "share" if not c["unit"] else c["unit"]
        panel.set_yticks([0], [f"{c['short']}\n{word(c)}; axis: {unit}"], fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("difference; right of the black line, no difference, is as the paper has it")
    legend(figure, panels[:, 0])
    save(figure, path)


def round_factors(low, high):
    """At most six round numbers whose logarithms lie between."""
    for step in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        ticks = np.arange(math.ceil(np.exp(low) / step), math.floor(np.exp(high) / step) + 1) * step
        if len(ticks) <= 6:
            break
    return ticks[ticks > 0].round(2)
