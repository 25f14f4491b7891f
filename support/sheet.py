"""One sheet about an objective: typical draws of f, both masks, how many targets there are, and its
spectrum."""

from pathlib import Path
from typing import NamedTuple

import torch

from masks import content_mask
from support.cli import BadInput, import_optional
from support.objective import checked_queries, draw_queries

INK, BAR, LINE, TITLE = "#1b2a41", "#3d7ea6", "#c8553d", 15


class Sheet(NamedTuple):
    """What there is to draw of an objective on sequences of `length` tokens."""

    title: str
    paper: str
    length: int
    draws: list    # of (f, [(position, cut, weight), ..] of what is asked, or None where that is the default)
    targets: list  # the probability that a sequence asks for 0, 1, 2, .. tokens


def sheet_of(objective, title, path, length, samples, seed):
    """The Sheet of an objective. The draws are typical: of few, middling and many targets where their number
    varies."""
    objective.check(length)
    generator = torch.Generator().manual_seed(seed)
    groups, queries = draw_queries(objective, path, 256, length, generator)
    draws = {}
    for f, *rows in zip(groups.tolist(), *(x.tolist() for x in queries)):
        asked = [row for row in zip(*rows) if row[2] > 0]
        default = sorted(asked) == [(p, group, 1) for p, group in enumerate(f) if group > 1]
        draws.setdefault(tuple(f), (len(asked), None if default else asked))
    in_order = sorted(draws, key=lambda f: draws[f][0])  # by the number of targets; equal ones stay as drawn
    count = min(samples, len(draws))
    chosen = [in_order[(2 * k + 1) * len(in_order) // (2 * count)] for k in range(count)]
    listed = objective.outcomes(length)
    share = torch.full((len(groups),), 1 / len(groups), dtype=torch.float64)
    if listed is not None:
        queries, share = checked_queries(objective, path, listed[0]), listed[1]
    targets = torch.zeros(queries.weight.shape[1] + 1, dtype=torch.float64)
    targets.index_add_(0, (queries.weight > 0).sum(1), share)
    return Sheet(title, objective.paper, length, [(f, draws[f][1]) for f in chosen], targets.tolist())


def draw_sheets(path, sheets, spectra):
    """Write a picture with the sheets side by side, each with the singular values that `spectra` has for
    it."""
    Figure = import_optional("matplotlib.figure").Figure
    if Path(path).suffix[1:].lower() not in ("png", "pdf", "svg"):
        raise BadInput(f"{path} is no picture: end its name in .png, .pdf or .svg")
    alone = len(sheets) == 1
    rows = [["f", "f", "n"], ["h", "g", "s"]] if alone else [["f", "f"], ["h", "g"], ["n", "n"], ["s", "s"]]
    ratios = {"height_ratios": [1, 1.5]} if alone else {"height_ratios": [0.8, 1.5, 0.8, 1.2]}
    figure = Figure(figsize=(16, 9) if alone else (4 * len(sheets), 9), layout="constrained")
    parts = [figure] if alone else figure.subfigures(1, len(sheets), wspace=0.04)
    for part, sheet, values in zip(parts, sheets, spectra):
        axes = part.subplot_mosaic(rows, gridspec_kw=ratios)
        part.suptitle(f"{sheet.title}: {sheet.paper}" if alone else sheet.title, size=22, color=INK)
        draw_groups(axes["f"], sheet, 15 if alone or sheet.length <= 12 else 9)
        draw_masks(axes["h"], axes["g"], sheet)
        draw_bars(axes["n"], sheet)
        draw_spectrum(axes["s"], values, max(map(len, spectra)))
    figure.savefig(path, dpi=120)


def draw_groups(axes, sheet, size):
    """Each draw of f as a row of cells with its numbers, of that font size."""
    f = [draw for draw, _ in sheet.draws]
    last = max(max(map(max, f)), 3)
    shades = [[0.1 * g if g < 2 else 0.35 + 0.4 * (g - 2) / (last - 2) for g in row] for row in f]
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if sheet.length <= 24:
        for row, groups in enumerate(f):
            for i, group in enumerate(groups):
                colour = "white" if shades[row][i] > 0.6 else INK
                axes.text(i, row, group, ha="center", va="center", size=size, color=colour)
    tidy(axes, "group index f of position i", sheet.length, [f"draw {k + 1}" for k in range(len(f))])


def draw_masks(content, query, sheet):
    """M_h and M_g of the middle draw: a row attends to the dark columns, less dark where it weighs less."""
    middle = len(sheet.draws) // 2
    f, asked = sheet.draws[middle]
    which = f"\nof draw {middle + 1}" if len(sheet.draws) > 1 else ""
    content.imshow(content_mask(torch.tensor(f)).float().numpy(), cmap="Blues", vmin=0, vmax=1.2)
    tidy(content, "$M_h$, content" + which, sheet.length, [i + 1 for i in range(len(f))])
    asked = asked or [(p, group, 1) for p, group in enumerate(f) if group > 1]
    weights = {p: weight for p, _, weight in asked}
    once = len(weights) == len(asked) and all(cut == f[p] for p, cut, _ in asked)
    rows = [(p, cut, weights.get(p, 0)) for p, cut in enumerate(f)] if once else asked
    most = max(weight for *_, weight in rows)
    seen = [[weight / most * (0 < group < cut) for group in f] for _, cut, weight in rows]
    query.imshow(seen, cmap="Oranges", vmin=0, vmax=1.3, aspect="equal" if once else "auto")
    tidy(query, "$M_g$, queries" + which, sheet.length, [p + 1 for p, *_ in rows])


def draw_bars(axes, sheet):
    """How many tokens a sequence asks for."""
    axes.bar(range(len(sheet.targets)), sheet.targets, color=BAR)
    axes.set(xlim=(-0.6, max(sheet.length, len(sheet.targets)) - 0.4), ylim=(0, 1.08), ylabel="probability")
    axes.set_xticks(range(0, len(sheet.targets), 1 + len(sheet.targets) // 12))
    axes.set_title("targets of a sequence", size=TITLE)


def draw_spectrum(axes, values, longest):
    """Singular values of the normalised co-occurrence matrix, one class, largest first."""
    axes.plot(range(1, len(values) + 1), values, "o-", color=LINE, linewidth=2, markersize=8)
    axes.set(xlim=(0.5, longest + 0.5), ylim=(0, 1.08), ylabel="$\\sigma_j$")
    axes.set_title("singular values", size=TITLE)
    axes.set_xticks(range(1, longest + 1, 1 + longest // 12))
    axes.grid(alpha=0.3)


def tidy(axes, title, columns, rows):
    """Name the rows, and the columns by position; draw lines between the cells, where there is room."""
    axes.set_title(title, size=TITLE)
    across, down = (1 if n < 14 else 1 + (n - 1) // 6 for n in (columns, len(rows)))
    axes.set_xticks(range(0, columns, across), range(1, columns + 1, across))
    axes.set_yticks(range(0, len(rows), down), rows[::down])
    axes.tick_params(length=0, labelsize=11)
    if columns <= 24:
        axes.set_xticks([i + 0.5 for i in range(columns - 1)], minor=True)
        axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
