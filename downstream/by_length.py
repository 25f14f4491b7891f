"""Figure 3: perplexity of the next token against the length of the prefix.

    python evaluate.py perplexity CKPT --by-length --plot figure3.png
"""

import itertools
import math

import numpy as np

from support.cli import import_optional


def by_length(nll):
    """-log P (N, S - 1) of N sequences -> for each prefix length the mean over sequences, and for bins of
    lengths the mean of each sequence."""
    return {"prefix": list(range(1, nll.shape[1] + 1)), "nll": nll.mean(0).tolist(),
            "stderr": (nll.std(0) / math.sqrt(len(nll))).tolist(),
            "bins": [{"first": low, "last": high, "sequence_nll": nll[:, low - 1:high].mean(1).tolist()}
                     for low, high in length_bins(nll.shape[1])]}


def length_bins(longest):
    """Single lengths are noisy: [(1, 1), (2, 3), (4, 7), ..] up to the longest."""
    edges = [2 ** k for k in range(longest.bit_length())] + [longest + 1]
    return [(low, high - 1) for low, high in itertools.pairwise(edges)]


def in_bins(curve):
    """Perplexity over bins of prefix lengths of a `by_length` dict -> [(first, last, perplexity)]."""
    return [(low, high, math.exp(np.mean(curve["nll"][low - 1:high])))
            for low, high in length_bins(curve["prefix"][-1])]


def print_by_length(results):
    """Perplexity against the length of the prefix (Figure 3)."""
    columns = {name: in_bins(regime["by_length"]) for name, regime in results["regimes"].items()}
    print("prefix      " + "".join(f"{name:>12s}" for name in columns))
    for row in zip(*columns.values()):
        low, high, _ = row[0]
        print(f"{str(low) if low == high else f'{low}-{high}':12s}"
              + "".join(f"{cell:12.2f}" for _, _, cell in row))


def plot_by_length(path, curves):
    """Figure 3: curves is {label: by_length dict}."""
    figure, axes = import_optional("matplotlib.pyplot").subplots(figsize=(7.5, 4), layout="constrained")
    draw_by_length(axes, curves)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(path, dpi=150)


def draw_by_length(axes, curves):
    """Perplexity in bins of lengths. Regimes of one model, "model, regime", share a colour."""
    models = list(dict.fromkeys(label.rpartition(", ")[0] or label for label in curves))
    for label, curve in curves.items():
        bins = in_bins(curve)
        colour = f"C{models.index(label.rpartition(', ')[0] or label)}"
        style = "o--" if label.endswith("truncated") else "o-"
        axes.plot(middles(bins), [cell for _, _, cell in bins], style, color=colour, label=label)
    axes.set(ylabel="perplexity of the next token", yscale="log")
    prefix_axis(axes, bins)
    least, most = axes.get_ylim()
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):  # the second where the first leaves too few
        ticks = [digit * 10 ** k for k in range(5) for digit in digits if least <= digit * 10 ** k <= most]
        if len(ticks) > 2:
            break
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def middles(bins):
    """Where bins [(first, last, ...)] stand on a logarithmic axis."""
    return [math.sqrt(low * high) for low, high, *_ in bins]


def prefix_axis(axes, bins):
    """Lengths of prefixes below an axis, those with which bins begin."""
    axes.set(xlabel="tokens in the prefix", xscale="log")
    axes.set_xticks([low for low, *_ in bins], [low for low, *_ in bins])
    axes.minorticks_off()
