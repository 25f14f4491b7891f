"""Pictures of what spectral.py computes, drawn from the results of its commands. Needs matplotlib."""

import numpy as np

from support.cli import import_optional
from support.sheet import INK

RED, BLUE, GREEN, GOLD = "#c8553d", "#3d7ea6", "#588157", "#c49a3a"


def figure_of(width, height):
    return import_optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def framed(axes, **labels):
    """Titles, labels and a quiet frame."""
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e8ee", zorder=0)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------- spectra

def plot_spectra(x, path):
    """Each objective a row: its singular values as dots, with how many there are; beside it the tail sum.
    Where the results have dar's tail against t, that, and Table 9 on axes of its own."""
    spectra, whole = sorted(x["spectra"], key=lambda y: -y["tail_sigma4_per_class"]), "dar_tails" in x
    figure = figure_of(13 if whole else 8, 1.4 + 0.42 * max(len(spectra), 9 if whole else 2))
    if whole:
        mosaic = figure.subplot_mosaic([["s", "t"], ["s", "a"]], width_ratios=[1.7, 1])
        draw_tails(mosaic["t"], mosaic["a"], x["dar_tails"], x["table_9"])
    axes = mosaic["s"] if whole else figure.subplots()
    colours = import_optional("matplotlib").colormaps["tab20"].colors
    for row, y in enumerate(spectra):
        colour = colours[2 * row % 20 + row // 10 % 2]
        values, counts = np.unique(np.round(y["singular_values"], 2), return_counts=True)
        axes.hlines(row, 0, 1, color="#d5dce5", linewidth=1, zorder=1)
        axes.scatter(values, np.full(len(values), row), s=36 + 14 * counts, color=[colour], edgecolor="white",
                     zorder=3)
        for value, count in zip(values[counts > 1], counts[counts > 1]):
            axes.annotate(f"{count} x", (value, row), (0, 8), textcoords="offset points", ha="center", size=8)
        axes.text(1.1, row, f"{y['tail_sigma4_per_class']:.3f}", va="center", ha="left", color=INK, size=10)
    axes.text(1.1, -0.75, "tail sum", ha="left", size=10, color=INK)
    names = [y["objective"] + ("" if y["s"] == spectra[0]["s"] else f" (s = {y['s']})") for y in spectra]
    axes.set_yticks(range(len(spectra)), names)
    axes.set(ylim=(len(spectra) - 0.4, -1.0), xlim=(-0.04, 1.25), xticks=np.arange(0, 1.01, 0.2))
    framed(axes, xlabel="singular values of one class; a label where several lie together",
         title=f"Spectra on the toy model, s = {spectra[0]['s']}\ntail sum: sigma_j^4 over j > 1 of a class")
    axes.grid(axis="y", visible=False)
    figure.savefig(path, dpi=150)


def draw_tails(tail, accuracy, tails, table):
    """dar's tail sum against t, and below it what Table 9 reports."""
    t = range(1, len(tails) + 1)
    tail.plot(t, tails, "o-", color=INK)
    for k, value in zip(t, tails):
        tail.annotate(f"{value:.2f}", (k, value), (6, 5), textcoords="offset points", size=9, color=INK)
    framed(tail, xlabel="t", ylabel="tail sum, log axis", yscale="log", xticks=list(t),
         xlim=(0.7, len(tails) + 0.6), title="dar: the tail sum falls up to t = s - 1")
    tail.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    tail.minorticks_off()
    for column, (name, marker, colour) in enumerate((("linear probe", "o", RED), ("fine-tuning", "s", BLUE))):
        points = [(int(k), row[column]) for k, row in table.items()]
        gains = [value - points[0][1] for _, value in points]
        accuracy.plot([k for k, _ in points], gains, marker + "-", color=colour)
        accuracy.annotate(name, (points[-1][0], gains[-1]), (9, -3), textcoords="offset points", color=colour)
    framed(accuracy, xlabel="t", ylabel="points above t = 1", xticks=list(t), xlim=(0.7, len(tails) + 0.6),
         title="Table 9 as printed: accuracy peaks at 2 or 3")


# ---------------------------------------------------------------------------- theorems

def plot41(x, path):
    """Error of the probe above, its bound below; left where the class is probed, right the length of the
    context."""
    figure, probes, tie, r = figure_of(12, 7.5), x["probes"], x["tie"], x["classes"]
    cells = figure.subplots(2, 2, sharex="col")
    names = {"ar": ("autoregressive", RED, "o"), "mlm": ("masked", BLUE, "s"),
             "vl": ("variable-length", GREEN, "^")}
    for column, label in enumerate(("class", "length")):
        for name, y in probes.items():
            who, what = name.split("_")
            if what != label:
                continue
            text, colour, marker = names[who]
            t = np.arange(1, len(y["error"]) + 1) + 0.08 * (who == "ar")  # side by side where they are equal
            for row, key in enumerate(("error", "bound")):
                cells[row, column].plot(t, y[key], marker + "-", color=colour, label=text, markersize=5)
        cells[0, column].set_ylim(-0.04, 1)
        framed(cells[0, column], ylabel="probe error", title=f"label: the {label} of the context")
        framed(cells[1, column], ylabel="4 max P(c) tail + 4 alpha~", xlabel="t, the rank of the features",
             title="bound; above 1 it says nothing")
        cells[1, column].axhline(1, color=INK, linewidth=0.8, linestyle=":")
    first, networks = cells[0, 0], np.sort(tie["networks"])
    first.vlines(r + 0.08, tie["best"], tie["worst"], color=RED, linewidth=6, alpha=0.25, zorder=1,
                 label=f"ar at t = {r}: from the best to the worst tie")
    first.scatter(r + 0.3 + 0.03 * np.arange(len(networks)), networks, s=14, color=INK, zorder=4,
                  label=f"ar at t = {r}: {len(networks)} trained networks")
    for axes in cells[0]:
        axes.legend(frameon=False)
    figure.suptitle("Theorem 4.1 on the toy model; errors: means over random choices among equal sigma_j")
    figure.savefig(path, dpi=150)


def plot43(x, path):
    """Losses on the left, the bounds on them on the right: they differ by orders of magnitude."""
    figure = figure_of(12, 4.8)
    left, right = figure.subplots(1, 2)
    curves = ((left, "loss_one_length", f"trained with {x['visible']} visible", RED, "o-"),
              (left, "loss_all_lengths", "trained with all lengths", BLUE, "s-"),
              (left, "ideal_blind", "ideal, not told the position", INK, ":"),
              (left, "ideal_told_position", "ideal, told the position", INK, "--"),
              (right, "printed_bound", "as printed (does not hold)", GOLD, "^-"),
              (right, "corrected_bound", f"corrected, {x['visible']} visible", RED, "o-"),
              (right, "corrected_bound_all_lengths", "corrected, all lengths", BLUE, "s-"))
    for axes, key, text, colour, style in curves:
        beside = 0.07 * (colour == BLUE)  # side by side where they are equal
        axes.plot(x["prefix"][:len(x[key])] + beside, x[key], style, color=colour, label=text)
    bounds = np.concatenate([x[key] for axes, key, *_ in curves if axes is right])
    ticks = [tick for tick in (-1, 0, 1, 10, 100, 1000, 10_000, 100_000) if tick < 10 * bounds.max()]
    right.set_yscale("symlog", linthresh=1)
    right.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    right.set_ylim(min(0, bounds.min() - 0.2), 2 * bounds.max())
    right.minorticks_off()
    framed(left, xlabel="tokens in the prefix", ylabel="spectral loss, coefficient 1", title="Losses")
    framed(right, xlabel="tokens in the prefix", ylabel="bound on that loss, log axis above 1",
         title="Bounds of Theorem 4.3, term by term")
    for axes in (left, right):
        axes.set_xticks(x["prefix"])
        axes.legend(frameon=False)
    figure.suptitle("Linear attention on the toy model")
    figure.savefig(path, dpi=150)
