"""The results of theory/toy.py as text and as a picture."""
import numpy as np

from support.cli import import_optional
from theory.show import table


def spearman_text(x):
    """'0.62 [0.60, 0.65]' for a correlation with its interval, '-' for none."""
    return "-" if x is None else "{:.2f} [{:.2f}, {:.2f}]".format(*x)


def show_toy(x):
    """The results of toy.run as lines of text."""
    ts, r, lines, kinds = x["bottlenecks"], x["classes"], [], (*x["losses"], "untrained")
    shown = [t for t in ts if t in (r, 2 * r, 3 * r)] or ts[:1]
    for eps in sorted({row["eps"] for row in x["rows"]}):
        wide = [("objective", "tail", "needs t", "Bayes",
                 *(f"t={t} {kind}" for t in shown for kind in ("exact", *x["losses"])))]
        few = [("objective", "tail", *(f"{place}: {kind}" for place in ("own", "common") for kind in kinds))]
        for row in (row for row in x["rows"] if row["eps"] == eps):
            cells = [row["exact"][t - 1] if kind == "exact" else np.mean(row[kind]["all"], 0)[ts.index(t)]
                     for t in shown for kind in ("exact", *x["losses"])]
            wide.append((row["objective"], f"{row['tail']:.3f}", str(row["needs"]),
                         *(f"{cell:.3f}" for cell in (row["bayes"], *cells))))
            cells = [np.mean(row[kind][place][-1]) for place in ("own", "common") for kind in kinds]
            few.append((row["objective"], *(f"{cell:.3f}" for cell in (row["tail"], *cells))))
        lines += [f"eps = {eps:g}: excess error over Bayes, all labels, bottleneck t", "",
                  *table(wide), "",
                  f"eps = {eps:g}: {x['labels']} labels a class, no bottleneck, own and common contexts", "",
                  *table(few), ""]
    rows = [("eps", "loss", "t", "tail", "needs t", "exact error", "few labels: tail, own", "tail, common")]
    for y in x["findings"]:
        few = [spearman_text(list(y["few"][place].values())[-1]) for place in ("own", "common")]
        for at in y["at"]:
            found = (spearman_text(at[name]) for name in ("tail", "needs", "exact"))
            last = few if at["t"] == ts[-1] else ()
            rows.append((f"{y['eps']:g}", y["loss"], str(at["t"]), *found, *last))
    return [*lines, f"Spearman of excess error with .., over objectives [95% over {x['seeds']} seeds]", "",
            *table(rows, "<"), "", *meaning(x)]


def meaning(x):
    """What the numbers say about Theorem 4.1, as lines."""
    def shares(name, noisy):
        found = [y for y in x["findings"] if (y["eps"] > 0) == noisy and y[name] is not None]
        values = [[y[name] for y in found if y["loss"] == kind] for kind in x["losses"]]
        return " and ".join(f"{np.mean(value):.2f}" if value else "-" for value in values)

    def mean_spearman(y, name):
        found = [at[name][0] for at in y["at"] if at["t"] < x["bottlenecks"][-1] and at[name]]
        return f"{np.mean(found):.2f}" if found else "-"

    ordered = [(f"{y['eps']:g}", y["loss"], *(mean_spearman(y, name) for name in ("tail", "needs")),
                *(spearman_text(list(y["few"][place].values())[-1]) for place in ("own", "common")))
               for y in x["findings"]]
    gap, distance = (np.mean([y[name] for y in x["findings"] if y["loss"] == "spectral"]) for name in
                     ("gap", "distance"))
    least = min(row["told"] for row in x["rows"])
    return [
        "The tail sum of Theorem 4.1 counts each direction that features lose, whether it carries the class",
        "or positions alone; the sector rule counts what stands before the class. Excess error, all labels,",
        "as a share of losing the class altogether, spectral loss and cross-entropy:",
        f"  clean, where the rule says that the class survives, whatever the tail: {shares('kept', False)}",
        f"  noisy, where the rule says that the class survives: {shares('kept', True)}",
        f"  noisy, where the best rank-t features have lost it: {shares('gone', True)} (1: networks too)",
        f"Networks under the spectral loss miss {gap:.1%} of its optimum; on average their errors are",
        f"{distance:.3f} from the exact ones.",
        "With few labels and no bottleneck every direction counts. Spearman of excess error with the tail",
        "and with what the rule needs, all labels (mean over t), and with the tail, few labels:",
        *("  " + line for line in table([("eps", "loss", "tail", "needs", "few labels: own", "common"),
                                         *ordered], "<")),
        "A network that is told the position it predicts has it in its context. Then each has one target, M",
        f"is the identity (least singular value of all objectives here: {least:.6f}), and all tails are",
        "equal: of BERT, two streams and any network that queries positions the theorem says nothing."]


def annotate(axes, points):
    """Names beside their points [(x, y, name, colour)], each at the offset where it covers the least, with a
    white rim over whatever lies below."""
    rim = [import_optional("matplotlib.patheffects").withStroke(linewidth=2.5, foreground="white")]
    dots, taken = axes.transData.transform([point[:2] for point in points]), []
    offsets = [(dx, dy) for dy in (-3, 6, -12, 16, -22, 26, -32) for dx in (6, -6, 14, -14)]
    for x, y, name, colour in points:
        costs = []
        for offset in (*offsets, None):
            chosen = offset or offsets[np.argmin(costs)]
            text = axes.annotate(name, (x, y), chosen, textcoords="offset points", fontsize=8,
                                 color=colour, ha="left" if chosen[0] > 0 else "right", path_effects=rim)
            box = text.get_window_extent()
            if offset:
                outside = not axes.bbox.x0 < box.x0 < box.x1 < axes.bbox.x1
                covered = sum(map(box.overlaps, taken)) + sum(box.contains(*dot) for dot in dots)
                costs.append(covered + 5 * outside)
                text.remove()
        taken.append(box)


def plot_toy(x, path):
    """Above: excess error against t at the largest noise, a lane and a colour for each objective; lines
    exact, dots networks and seeds. Below: error with few labels against the tail at the least noise."""
    pyplot, ts = import_optional("matplotlib.pyplot"), x["bottlenecks"][:-1]
    noises = sorted({row["eps"] for row in x["rows"]})
    loud, quiet = (sorted((row for row in x["rows"] if row["eps"] == eps), key=lambda row: -row["tail"])
                   for eps in (noises[-1], noises[0]))
    palette = [*pyplot.get_cmap("tab10").colors, *pyplot.get_cmap("Dark2").colors]
    colours = {row["objective"]: palette[i % len(palette)] for i, row in enumerate(loud)}
    tails = np.array([row["tail"] for row in quiet])                   # equal ones stand beside each other
    places = [tail * 1.06 ** np.isclose(tails[:i], tail).sum() for i, tail in enumerate(tails)]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 6 + 0.6 * len(loud)), layout="constrained",
                                   sharey="row", height_ratios=[0.6 * len(loud), 5])
    every, height = np.arange(1, max(ts) + 1), 1.2 * (1 - 1 / x["classes"])
    for lanes, few, kind in zip(*axes, x["losses"]):
        for i, row in enumerate(loud):
            base, style = i * height, {"color": colours[row["objective"]]}
            lanes.axhline(base, color="0.85", lw=0.8, zorder=0)
            lanes.plot(every, base + np.array(row["exact"])[every - 1], lw=1.6, **style)
            errors = base + np.array(row[kind]["all"])[:, :-1]                 # (seeds, n)
            lanes.plot(ts, errors.T, ".", ms=4, alpha=0.5, **style)
            lanes.plot(ts, errors.mean(0), "o", ms=6, mec="black", mew=0.5, **style)
            lanes.plot(row["needs"] if row["needs"] <= max(ts) else np.nan, base, "k|", ms=9, mew=1.5)
        lanes.set(title=f"{kind}, eps = {noises[-1]:g}, all labels: excess error over Bayes", xticks=every,
                  xlabel=f"bottleneck t (line exact, dots networks, | rule's t; a lane is {height:g} high)")
        for place, row in zip(places, quiet):
            y, style = row[kind]["own"][-1], {"color": colours[row["objective"]]}
            few.plot([place] * 2, [min(y), max(y)], lw=1.2, **style)
            few.plot(place, np.mean(y), "o", ms=6, mec="black", mew=0.5, zorder=4, **style)
        few.set(xscale="log", xlabel="tail sum of sigma_j^4, j > 1, per class",
                title=f"{kind}, eps = {noises[0]:g}, {x['labels']} labels a class: excess error")
        few.margins(x=0.12)
        few.minorticks_off()
        low, high = few.get_xlim()
        few.set_xticks(*[[t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if low < t < high]] * 2)
    names = [f"{row['objective']}\ntail {row['tail']:.2f}, needs {row['needs']}" for row in loud]
    axes[0, 0].set_yticks((np.arange(len(loud)) + 0.3) * height, names, fontsize=8)
    axes[0, 0].set_ylim(-0.2 * height, len(loud) * height)
    for label, row in zip(axes[0, 0].get_yticklabels(), loud):
        label.set_color(colours[row["objective"]])
    figure.canvas.draw()
    for few, kind in zip(axes[1], x["losses"]):
        annotate(few, [(place, np.mean(row[kind]["own"][-1]), row["objective"], colours[row["objective"]])
                       for place, row in zip(places, quiet)])
    figure.savefig(path, dpi=130)
