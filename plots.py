"""Every picture, drawn from results alone: plots.NAME(path, results).

`results` is what the command of that name writes as --json, unless the docstring says more. The end of `path`
chooses the format: .png, .pdf or .svg. Needs matplotlib, but no display.
"""

import itertools
import math
import os
import textwrap
from pathlib import Path

import numpy as np

from util import BadInput, import_optional

INK, RED, BLUE = "#1b2a41", "#c8553d", "#3d7ea6"

# ---------------------------------------------------------------------------- what the pictures share

def check(path):
    """Refuse a path where no picture can be drawn. Commands call this before they begin to work."""
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise BadInput(f"{path} is no picture: end its name in .png, .pdf or .svg")
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise BadInput(f"{path}: there is no such folder, or it cannot be written")
    import_optional("matplotlib")


def new_figure(path, width, height):
    """An empty figure for that path, in inches. When it is saved, its parts make room for each other."""
    check(path)
    Figure = import_optional("matplotlib.figure").Figure
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def save(figure, path):
    """Write the picture so that a whole one is there at every moment: temporary file, rename."""
    partial = f"{path}.partial"
    figure.savefig(partial, format=Path(path).suffix[1:].lower())
    os.replace(partial, path)


def style(axes, **labels):
    """Titles, labels and scales, a quiet frame and a pale grid."""
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e8ee")
    axes.set_axisbelow(True)


def legend(figure, panels, columns):
    """One legend below all panels, with every label once."""
    found = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found.update(zip(labels, handles))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize="small",
                  frameon=False, handlelength=3)


def colours(rows):
    """{objective: its colour}, 18 different ones."""
    maps = import_optional("matplotlib").colormaps
    palette = itertools.cycle([*maps["tab10"].colors, *maps["Dark2"].colors])
    return dict(zip(dict.fromkeys(row["objective"] for row in rows), palette))


def plain_log(axes, which):
    """Plain numbers at the logarithmic "x" or "y" axis, at least four: 1, 10, .. or closer."""
    axis, (low, high) = getattr(axes, f"{which}axis"), getattr(axes, f"get_{which}lim")()
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [tick for k in range(-6, 8) for d in digits if low <= (tick := d * 10.0 ** k) <= high]
        if len(ticks) >= 4:
            break
    else:
        steps = import_optional("matplotlib.ticker").MaxNLocator(6, steps=[1, 2, 5, 10])
        ticks = [tick for tick in steps.tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:,.6g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# ---------------------------------------------------------------------------- objectives

def cells(axes, values, title, colour, names):
    """A matrix of values in 0..1 as cells: columns are positions 1, 2, ..., rows have these names."""
    columns, lines = len(values[0]), {"edgecolors": "white", "linewidth": min(1.5, 12 / len(values[0]))}
    axes.pcolormesh(values, cmap=colour, vmin=0, vmax=1.2, **lines)
    across, down = 1 + (columns - 1) // 5, 1 + (len(names) - 1) // 5
    axes.set_xticks(np.arange(0, columns, across) + 0.5, range(1, columns + 1, across))
    axes.set_yticks(np.arange(0, len(names), down) + 0.5, names[::down])
    axes.set_title(title, size=11)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


def objectives(path, sheets):
    """A column for each objective: draws of f, the masks M_h and M_g of the middle draw, singular values.

    sheets  dicts {"title", "length", "draws": [(f, rows)], "singular_values"}, where rows are the queries
            (position, cut, weight) of f
    """
    figure = new_figure(path, max(6, 3.6 * len(sheets)), 7.5)
    for part, sheet in zip(figure.subfigures(1, len(sheets), squeeze=False, wspace=0.04)[0], sheets):
        axes = part.subplot_mosaic([["f", "f"], ["h", "g"], ["s", "s"]], height_ratios=[0.7, 1.1, 1])
        part.suptitle(sheet["title"], size=13, color=INK)
        groups, middle = np.array([f for f, _ in sheet["draws"]]), len(sheet["draws"]) // 2  # (draws, S)
        shades = np.where(groups < 2, 0.1 * groups, 0.35 + 0.5 * (groups - 2) / max(1, groups.max() - 2))
        cells(axes["f"], shades, "group index f of position i", "Blues",
              [f"draw {k + 1}" for k in range(len(groups))])
        for (row, i), group in np.ndenumerate(groups) if sheet["length"] <= 16 else ():
            colour = "white" if shades[row, i] > 0.6 else INK
            size = 10 if sheet["length"] < 10 else 7
            axes["f"].text(i + 0.5, row + 0.5, group, ha="center", va="center", size=size, color=colour)

        which = f"\nof draw {middle + 1}" if len(groups) > 1 else ""
        f, rows = groups[middle], sheet["draws"][middle][1]
        names = sheet.get("words") or range(1, len(f) + 1)
        cells(axes["h"], (0 < f) & (f <= f[:, None]), "$M_h$, content" + which, "Blues", names)
        own = {p: weight for p, cut, weight in rows if cut == f[p]}
        if len(own) == len(rows):  # each target once: a row for every position, empty where it is no target
            rows = [(p, cut, own.get(p, 0)) for p, cut in enumerate(f)]
        heaviest = max(weight for *_, weight in rows)
        seen = [(0 < f) * (f < cut) * (weight / heaviest) for _, cut, weight in rows]
        cells(axes["g"], seen, "$M_g$, queries" + which, "Oranges", [names[p] for p, *_ in rows])
        for mask in (axes["h"], axes["g"]):
            mask.set_aspect("equal" if len(rows) == len(f) else "auto")

        values = sheet["singular_values"]
        axes["s"].plot(range(1, len(values) + 1), values, "o-", color=RED)
        style(axes["s"], ylim=(0, 1.08), xlabel="j", ylabel=r"singular value $\sigma_j$")
        axes["s"].set_xticks(range(1, len(values) + 1, 1 + (len(values) - 1) // 12))
    save(figure, path)


# ---------------------------------------------------------------------------- runs

def curves(path, runs):
    """Losses, learning rate and speed over the tokens or images seen: pale in training, dots in validation.

    runs  dicts {"name", "unit": "tokens" or "images", and lists "seen", "loss", "lr", "speed", "val_seen",
          "val_loss"}
    """
    engineering = import_optional("matplotlib.ticker").EngFormatter(sep="")
    figure, units = new_figure(path, 13, 4.2), " or ".join(sorted({run["unit"] for run in runs}))
    panels = losses, rates, speeds = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for k, run in enumerate(runs):
        how = {"color": f"C{k % 10}", "linestyle": ("-", "--", ":")[k // 10 % 3], "marker": "."}
        losses.plot(run["seen"], run["loss"], **{**how, "marker": ""}, alpha=0.4, linewidth=1)
        losses.plot(run["val_seen"], run["val_loss"], **how, label=run["name"].replace("$", r"\$"))
        rates.plot(run["seen"], run["lr"], **how, markersize=2)
        speeds.plot(run["seen"], run["speed"], **how, markersize=2)
    values = np.array([loss for run in runs for loss in run["loss"] + run["val_loss"]])
    low, high = values.min(), np.quantile(values, 0.98)  # the first losses would press all others together
    margin = 0.05 * (high - low) or 0.1
    style(losses, title="loss: pale in training, dots in validation", ylim=(low - margin, high + margin),
          ylabel="nats for each target" if units == "tokens" else "loss for each target")
    style(rates, title="learning rate", ylim=(0, None))
    style(speeds, title=f"{units} in a second", ylim=(0, None))
    speeds.yaxis.set_major_formatter(engineering)
    for panel in panels:
        panel.set_xlabel(f"{units} seen")
        panel.locator_params(axis="x", nbins=7)
        panel.xaxis.set_major_formatter(engineering)
    legend(figure, [losses], 4)
    save(figure, path)


def by_length(path, results):
    """Figure 3: perplexity of the next token against the length of the prefix, in the bins of by_length.

    results  {"regimes": {regime: {"by_length": {"nll", "bins"}}}} of a model, or {name: the same} of several
    """
    figure = new_figure(path, 7.5, 4.6)
    axes = figure.subplots()
    style(axes, xlabel="tokens in the prefix", xscale="log", ylabel="perplexity of the next token",
          yscale="log")
    models = {"": results} if "regimes" in results else results
    for k, (name, model) in enumerate(models.items()):
        for regime, found in model["regimes"].items():
            curve = found["by_length"]
            bins = [(one["first"], one["last"]) for one in curve["bins"]]
            perplexities = [math.exp(np.mean(curve["nll"][first - 1:last])) for first, last in bins]
            label = ", ".join(filter(None, (name, regime if len(model["regimes"]) > 1 or not name else "")))
            axes.plot([math.sqrt(first * last) for first, last in bins], perplexities,
                      "o--" if regime == "truncated" else "o-", color=f"C{k}", label=label)
    plain_log(axes, "y")
    axes.set_xticks(*[[first for first, _ in bins]] * 2)
    axes.set_xticks([], minor=True)
    legend(figure, [axes], 3)
    save(figure, path)


def ranks(path, results):
    """Figure 2, connectivity: similarity of features over the rank of the pair, one curve a checkpoint."""
    figure = new_figure(path, 9, 4.4)
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("inner_product", "cosine")):
        for row in results["checkpoints"]:
            panel.plot(row[name]["curve"]["rank"], row[name]["curve"]["similarity"], label=row["label"])
        style(panel, xlabel="rank of the pair", ylabel=f"{name.replace('_', ' ')} of features", xscale="log")
        panel.xaxis.set_major_formatter("{x:,.0f}")
    legend(figure, panels, 3)
    save(figure, path)


# ---------------------------------------------------------------------------- theory

def spectra(path, results):
    """A row for each objective: its singular values as dots, with how many there are, and its tail sum."""
    rows = sorted(results["spectra"], key=lambda row: -row["tail_sigma4_per_class"])
    lengths, colour = sorted({row["s"] for row in rows}), colours(rows)
    figure = new_figure(path, 9, 2 + 0.42 * len(rows))
    axes = figure.subplots()
    style(axes, xlabel="singular values of one class; a label where several lie together",
          title=f"Spectra on the toy model, s = {', '.join(map(str, lengths))}")
    for y, row in enumerate(rows):
        values, counts = np.unique(np.round(row["singular_values"], 2), return_counts=True)
        axes.hlines(y, 0, 1, color="#d5dce5", linewidth=1, zorder=1)
        axes.scatter(values, [y] * len(values), s=36 + 14 * counts, color=[colour[row["objective"]]],
                     edgecolor="white", zorder=3)
        for value, count in zip(values[counts > 1], counts[counts > 1]):
            axes.annotate(f"{count} x", (value, y), (0, 8), textcoords="offset points", ha="center", size=8)
        axes.text(1.1, y, f"{row['tail_sigma4_per_class']:.3f}", va="center", color=INK)
    axes.text(1.1, -0.85, r"$\sum_{j>1} \sigma_j^4$", va="center", color=INK)
    names = [row["objective"] + (f" (s = {row['s']})" if len(lengths) > 1 else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(ylim=(len(rows) - 0.4, -1.3), xlim=(-0.04, 1.28), xticks=np.arange(0, 1.01, 0.2))
    axes.grid(axis="y", visible=False)
    save(figure, path)


def of_noise(rows, eps):
    """The rows of one noise, the largest tail first."""
    return sorted((row for row in rows if row["eps"] == eps), key=lambda row: -row["tail"])


def against_tail(axes, rows, colour):
    """Rows (objective, tail, errors of the seeds): dots at the mean, a line from the least to the most."""
    tails = []
    for name, tail, errors in rows:
        x = tail * 1.05 ** sum(math.isclose(tail, other, rel_tol=1e-4) for other in tails)
        tails.append(tail)  # equal ones stand side by side
        how = {"color": colour[name], "markeredgecolor": "black", "markeredgewidth": 0.5}
        axes.plot([x, x], [min(errors), max(errors)], color=colour[name], linewidth=1.2)
        axes.plot(x, np.mean(errors), "o", label=name, **how, zorder=4)
    style(axes, xlabel=r"tail sum $\sum_{j>r} \sigma_j^4$, r classes", xscale="log")
    axes.margins(x=0.1)
    plain_log(axes, "x")


def toy(path, results):
    """A column for each loss. Above: excess error against t at the largest noise, a panel for each objective.
    Below: excess error with few labels against the tail at the least noise."""
    ts, losses = results["bottlenecks"][:-1], results["losses"]  # the last bottleneck is none
    noises, colour = sorted({row["eps"] for row in results["rows"]}), colours(results["rows"])
    clean, noisy = (of_noise(results["rows"], eps) for eps in (noises[0], noises[-1]))
    height, most = 0.8 * (1 + len(noisy)), max(ts, default=1)
    every = np.arange(1, most + 1)
    figure = new_figure(path, 12, height + 5.7)
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 5.7])
    lanes = upper.subplots(len(noisy), len(losses), sharex=True, sharey=True, squeeze=False)
    for row, lane in zip(noisy, lanes):
        how = {"color": colour[row["objective"]]}
        for panel, kind in zip(lane, losses):
            errors = np.array(row[kind]["all"])[:, :-1]  # (seeds, n)
            style(panel, xticks=every)
            panel.plot(every, np.array(row["exact"])[every - 1], **how)
            panel.plot(ts, errors.T, ".", markersize=4, alpha=0.5, **how)
            panel.plot(ts, errors.mean(0), "o", markeredgecolor="black", **how)
            if row["needs"] <= most:
                panel.axvline(row["needs"], color="black", linewidth=1, linestyle=":")
        name = f"{row['objective']}\nneeds {row['needs']}"
        lane[0].set_ylabel(name, rotation=0, ha="right", va="center", size=8)
    for first, last, kind in zip(lanes[0], lanes[-1], losses):
        first.set_title(f"{kind}, eps = {noises[-1]:g}, all labels: excess error over Bayes")
        last.set_xlabel("bottleneck t (line: exact, dots: networks, dotted: the rule's t)")
    panels = lower.subplots(1, len(losses), sharey=True)
    for panel, kind in zip(panels, losses):
        against_tail(panel, [(row["objective"], row["tail"], row[kind]["own"][-1]) for row in clean], colour)
        panel.set_title(f"{kind}, eps = {noises[0]:g}, {results['labels']} labels a class (lines: range)")
    panels[0].set_ylabel("excess error over Bayes")
    legend(lower, panels, 5)
    save(figure, path)


def bridge(path, results):
    """Excess error on common contexts against the tail: left blind, right told, a row for each noise."""
    noises, colour = sorted({row["eps"] for row in results["rows"]}), colours(results["rows"])
    figure = new_figure(path, 12, 1.4 + 4.2 * len(noises))
    panels = figure.subplots(len(noises), 2, sharex=True, sharey="row", squeeze=False)
    for (eps, pair), (k, way) in itertools.product(zip(noises, panels), enumerate(("blind", "told"))):
        rows = of_noise(results["rows"], eps)
        order = next(y[way] for y in results["orders"] if (y["eps"], y["place"]) == (eps, "common"))
        against_tail(pair[k], [(row["objective"], row["tail"], row[way]["common"]) for row in rows], colour)
        pair[k].axhline(np.mean([row[way]["untrained common"] for row in rows]), color="grey", linestyle=":",
                        label="untrained (dots: mean, lines: range over seeds)")
        spearman = "{:.2f} [{:.2f}, {:.2f}]".format(*order) if order else "-"
        pair[k].set_title(f"{way}, eps = {eps:g}: Spearman {spearman}")
        pair[k].set_ylabel("excess error, 5 labels a class")
        pair[k].label_outer()
    legend(figure, panels.flat, 5)
    save(figure, path)


# ---------------------------------------------------------------------------- tables

def dots(path, results):
    """A table of reproduce.py: a panel for each column, with every seed of every row, mean and deviation. A
    row far from all others is written, so that these keep their axis."""
    rows, columns = results["rows"], list(results["rows"][0]["cells"])
    figure = new_figure(path, 2.4 + 2.3 * len(columns), 1.8 + 0.42 * len(rows))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns):
        cells = [row["cells"][column] for row in rows]
        far = far_row([cell["seeds"] for cell in cells])
        for y, cell in enumerate(cells):
            mean, seeds = cell["mean"], cell["seeds"]
            if y == far:
                panel.annotate(f"{mean:.{cell['digits']}f}, off the axis", (0.5, y), ha="center", va="center",
                               xycoords=panel.get_yaxis_transform(), size="small")
                continue
            panel.plot(seeds, [y] * len(seeds), "o", color=BLUE, alpha=0.4, label="one seed")
            if mean is not None:
                panel.errorbar(mean, y, xerr=cell["std"], fmt="|", color="black", markersize=14, capsize=3,
                               label="mean and standard deviation over seeds")
        # the regimes of left-to-right evaluation are columns of their own
        style(panel, xlabel=f"perplexity, {column}" if column in ("padded", "truncated") else column)
        panel.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(rows)), [row["row"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(results["title"], size=11)
    legend(figure, panels, 2)
    save(figure, path)


def trend(path, claims):
    """Effects with intervals over the tokens read: a panel a contrast and regime, a line a size."""
    panels = list(dict.fromkeys(c["at"]["panel"] for c in claims))
    columns = -(-len(panels) // 2)
    figure = new_figure(path, 4 * columns, 6.5)
    axes = figure.subplots(2, columns, sharex=True, squeeze=False)
    for axis, panel in zip(axes.T.flat, panels):
        shown = [c for c in claims if c["at"]["panel"] == panel]
        for k, line in enumerate(dict.fromkeys(c["at"]["line"] for c in shown)):
            points = sorted((c["at"]["tokens"], c["difference"], c["smallest_visible"] or 0) for c in shown
                            if c["at"]["line"] == line)
            tokens, effect, half = np.array(points).T
            low, high = np.exp(effect) - np.exp(effect - half), np.exp(effect + half) - np.exp(effect)
            axis.errorbar(tokens * 1.04 ** k, np.exp(effect), (low, high), fmt="o-", color=f"C{k}", capsize=3,
                          label=line)  # beside that of another size
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.axhline(np.exp(shown[0]["effect"]), color="black", linestyle="--", label="the paper's effect")
        style(axis, xscale="log", xlabel="millions of tokens read", ylabel="ratio of perplexities")
        axis.set_title(panel, size=9)
        read = sorted({c["at"]["tokens"] for c in claims})
        axis.set_xticks(read, [f"{x / 1e6:g}" for x in read])
        axis.set_xticks([], minor=True)
    legend(figure, axes.flat, len(axes) + 1)
    save(figure, path)


def far_row(seeds):
    """The row without which all others span less than a fifth of the axis, or None. seeds: a list a row."""
    for k, row in enumerate(seeds):
        rest = [x for other in seeds[:k] + seeds[k + 1:] for x in other]
        if row and rest and 0 < 5 * np.ptp(rest) < np.ptp(rest + row):
            return k


def forest(path, claims):
    """Judged claims, each on an axis in its own unit: our difference, its interval, the paper's effect."""
    figure = new_figure(path, 9, 0.9 + 0.9 * len(claims))
    panels = figure.subplots(len(claims), 1, squeeze=False)[:, 0]
    for panel, c in zip(panels, claims):
        factor = c["unit"] == "factor"
        scale = np.exp if factor else np.array  # a factor is judged by its logarithm
        style(panel, xscale="log" if factor else "linear", yticks=[])
        if c["interval"]:
            panel.plot(scale(c["interval"]), [0, 0], color=BLUE, linewidth=2.5, label="95% interval")
        panel.plot(scale(c["difference"]), 0, "o", color=BLUE, label="here, mean over seeds")
        if c["effect"] is not None:
            panel.plot(scale(c["effect"]), 0, "D", color=RED, label="the paper's effect")
        panel.axvline(scale(0), color="black", linewidth=0.8)
        panel.margins(x=0.1)
        if factor:
            plain_log(panel, "x")
        else:
            panel.locator_params(axis="x", nbins=7)
            panel.xaxis.set_major_formatter("{x:+g}")
        panel.set_title(textwrap.fill(f"{c['short']}: {c['verdict']}", 110), loc="left", size=9)
        panel.set_ylabel(c["unit"] or "share", rotation=0, ha="right", va="center", size=9)
        panel.tick_params(axis="x", labelsize=8)
    panels[-1].set_xlabel("difference; right of the black line is as the paper has it", size=9)
    legend(figure, panels, 3)
    save(figure, path)
