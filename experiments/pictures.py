"""Pictures of the targets, drawn from their JSON content (pages.py) or from what the stages wrote. All need matplotlib."""

import math

import numpy as np

from downstream.connectivity import plot_connectivity as plot_similarity
from downstream.by_length import plot_by_length
from experiments.measures import regime_of
from experiments.stages import evaluation
from support.cli import import_optional

__all__ = ["dots", "forest", "heatmap", "plot_curves_by_length", "plot_doses", "plot_objectives", "plot_similarity"]

SEEDS, MEAN, PAPER = "one seed", "mean and standard deviation over seeds", "the paper"


def new_figure(*size, **grid):
    return import_optional("matplotlib.pyplot").subplots(figsize=size, layout="constrained", **grid)


def save(figure, path):
    figure.savefig(path, dpi=130)
    import_optional("matplotlib.pyplot").close(figure)


def dots(place, seeds, content, path):
    """Every seed of every row, one panel for each column."""
    rows, columns = content["rows"], list(content["rows"][0]["cells"])
    figure, panels = new_figure(2.4 + 2.3 * len(columns), 1.5 + 0.42 * len(rows), nrows=1, ncols=len(columns), sharey=True, squeeze=False)
    for panel, column in zip(panels[0], columns):
        for y, row in enumerate(rows):
            cell = row["cells"][column]
            panel.plot(cell["seeds"], [y] * len(cell["seeds"]), "o", color="C0", alpha=0.5, label=SEEDS)
            if cell["mean"] is not None:
                panel.errorbar(cell["mean"], y, xerr=cell["std"], fmt="k|", markersize=14, capsize=3, label=MEAN)
        panel.set(xlabel=column, ylim=(len(rows) - 0.5, -0.5))
        panel.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(rows)), [row["row"] for row in rows])
    legend(figure, panels.flat)
    save(figure, path)


def legend(figure, panels):
    """One legend below all panels, every label once."""
    found = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), fontsize="small", frameon=False)


def heatmap(place, seeds, content, path):
    """`variety`: loss at each ratio of the test for each row, beside the left-to-right perplexity."""
    rows = content["rows"]
    shown = [column for column in rows[0]["cells"] if column.startswith("loss at")]
    losses = np.array([[row["cells"][column]["mean"] for column in shown] for row in rows])
    figure, (left, right) = new_figure(11, 1.6 + 0.5 * len(rows), nrows=1, ncols=2, width_ratios=(1.15, 1))
    worse = losses - losses.min(0)
    image = left.imshow(worse, cmap="viridis_r", aspect="auto")
    for y, x in np.ndindex(losses.shape):
        left.text(x, y, f"{losses[y, x]:.2f}", ha="center", va="center", fontsize=9,
                  color="white" if worse[y, x] > worse.max() / 2 else "black", weight="bold" if worse[y, x] == 0 else "normal")
    left.set_xticks(range(len(shown)), [column.removeprefix("loss at ") for column in shown])
    left.set_yticks(range(len(rows)), [row["row"] for row in rows])
    left.set(xlabel="share hidden in the test", title="loss per hidden token (nats); bold: best of its column")
    figure.colorbar(image, ax=left, label="above the column's best")
    for k, regime in enumerate(("padded", "truncated")):
        for y, row in enumerate(rows):
            cell = row["cells"][regime]
            right.plot(cell["seeds"], [y + 0.2 * k - 0.1] * len(cell["seeds"]), "os"[k], color=f"C{k}", alpha=0.5, label=f"{regime}, {SEEDS}")
            right.plot(cell["mean"], y + 0.2 * k - 0.1, "|", color=f"C{k}", markersize=16, label=f"{regime}, mean")
    right.set(xlabel="left-to-right perplexity", ylim=(len(rows) - 0.5, -0.5), yticks=[], title="generation")
    right.grid(axis="x", alpha=0.3)
    legend(figure, [right])
    save(figure, path)


def plot_doses(place, seeds, content, path):
    """`dose`: accuracy against t after each share of the budget, and every objective under either attention at the end."""
    rows = {row["row"]: row["cells"] for row in content["rows"]}
    ts = [name for name in rows if name.startswith("t = ")]
    shares = [column for column in rows[ts[0]] if column.startswith("after")]
    figure, (left, right) = new_figure(11, 4.5, nrows=1, ncols=2)
    x = [int(name.removeprefix("t = ")) for name in ts]
    for k, column in enumerate(shares):
        cells = [rows[name][column] for name in ts]
        for one_x, cell in zip(x, cells):
            left.plot([one_x] * len(cell["seeds"]), cell["seeds"], "o", color=f"C{k}", alpha=0.35)
        left.plot(x, [cell["mean"] for cell in cells], "-", color=f"C{k}", label=f"{column} of the budget (dots: {SEEDS})")
    for name, style in (("Untrained, causal attention", ":"), ("Raw pixels", "-.")):
        if name in rows and rows[name][shares[-1]]["mean"] is not None:
            left.axhline(rows[name][shares[-1]]["mean"], color="grey", linestyle=style, label=name.lower())
    left.set(xscale="log", xlabel="t, tokens predicted at once", ylabel="linear probe (%)", title="dose and response")
    left.set_xticks(x, x)
    left.minorticks_off()
    left.legend(fontsize="small")
    named = [name for name in rows if rows[name]["causal attention"]["mean"] is not None and name != "Raw pixels"]
    for k, column in enumerate(("causal attention", "full attention")):
        for y, name in enumerate(named):
            cell = rows[name][column]
            right.plot(cell["seeds"], [y + 0.2 * k - 0.1] * len(cell["seeds"]), "os"[k], color=f"C{k}", alpha=0.4, label=f"{column}, {SEEDS}")
            right.plot(cell["mean"], y + 0.2 * k - 0.1, "|", color=f"C{k}", markersize=15, label=f"{column}, mean")
    right.set_yticks(range(len(named)), named)
    right.set(xlabel="linear probe (%)", ylim=(len(named) - 0.5, -0.5), title="probed under")
    right.grid(axis="x", alpha=0.3)
    legend(figure, [right])
    save(figure, path)


def plot_objectives(place, seeds, content, path):
    """`objectives`: perplexity and bound side by side on the left, the probe on the right."""
    rows = content["rows"]
    *_, last = rows[0]["cells"]
    figure, (left, right) = new_figure(11, 1.6 + 0.42 * len(rows), nrows=1, ncols=2, sharey=True)
    for k, (column, name) in enumerate((("perplexity", "left to right, exact"), ("bound", "any order, bound"))):
        for y, row in enumerate(rows):
            cell = row["cells"][column]
            left.plot(cell["seeds"], [y + 0.2 * k - 0.1] * len(cell["seeds"]), "os"[k], color=f"C{k}", alpha=0.4, label=f"{name}, {SEEDS}")
            if cell["mean"] is not None:
                left.plot(cell["mean"], y + 0.2 * k - 0.1, "|", color=f"C{k}", markersize=15, label=f"{name}, mean")
    for y, row in enumerate(rows):
        cell = row["cells"][last]
        right.plot(cell["seeds"], [y] * len(cell["seeds"]), "o", color="C2", alpha=0.4, label=f"probe, {SEEDS}")
        if cell["mean"] is not None:
            right.plot(cell["mean"], y, "|", color="C2", markersize=15, label="probe, mean")
    left.set_yticks(range(len(rows)), [row["row"] for row in rows])
    left.set(xlabel="perplexity per token", ylim=(len(rows) - 0.5, -0.5), title="generation")
    right.set(xlabel=f"{last} (%)", title="classification")
    for panel in (left, right):
        panel.grid(axis="x", alpha=0.3)
    legend(figure, [left, right])
    save(figure, path)


def plot_curves_by_length(path, place, rows, seeds):
    """Figure 3: perplexity by the length of the prefix, the mean over seeds of the loss."""
    curves = {}
    for row, model in rows.items():
        found = [evaluation(place, model, seed, "perplexity", "--by-length").result() for seed in range(seeds)]
        for regime, r in found[0]["results"]["regimes"].items():
            nll = np.mean([regime_of(x, regime)["by_length"]["nll"] for x in found], axis=0)
            several = len(found[0]["results"]["regimes"]) > 1
            curves[f"{row}, {regime}" if several else row] = {**r["by_length"], "nll": nll.tolist()}
    plot_by_length(path, curves)


def forest(claims, path):
    """Every primary claim: our difference and its interval in units of what each could show, the paper's effect beside it.

    Units differ from row to row (points, factors), so each row is divided by its smallest visible effect: left of -1 or right
    of 1 an interval does not hold 0.
    """
    figure, axes = new_figure(9, 1.3 + 0.55 * len(claims))
    for y, c in enumerate(claims):
        unit = c["smallest_visible"] or 1
        low, high = ((end / unit for end in c["interval"]) if c["interval"] else (math.nan, math.nan))
        axes.plot([low, high], [y, y], "-", color="C0", linewidth=2, label="95% interval")
        axes.plot(c["difference"] / unit, y, "o", color="C0", label="here")
        if c["effect"] is not None:
            axes.plot(c["effect"] / unit, y, "D", color="C3", label=PAPER)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(claims)), [f"{c['short']}\n{c['verdict']}" for c in claims], fontsize=9)
    axes.set_ylim(len(claims) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=4)
    ticks = [t for t in (-100, -20, -4, -2, 0, 2, 4, 20, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_xlabel("difference, in units of the smallest that would be visible here; positive: as the paper has it")
    axes.grid(axis="x", alpha=0.3)
    legend(figure, [axes])
    save(figure, path)
