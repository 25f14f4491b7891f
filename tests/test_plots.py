"""Every picture is drawn, and shows as many things as there are to show."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import call

pytest.importorskip("matplotlib")

import plots
from experiments.spectrum import spectrum
from objectives import describe, from_options

RESULTS = Path(__file__).resolve().parent.parent / "results"


def committed(name):
    return json.loads((RESULTS / f"{name}-cpu.json").read_text())


def curve(name):
    return {"name": name, "unit": "tokens", "seen": [1000, 2000, 3000], "loss": [5.5, 4.0, 3.5],
            "lr": [1e-3, 2e-3, 1e-3], "speed": [900, 1100, 1000], "val_seen": [3000], "val_loss": [3.6]}


def by_length(*regimes):
    bins = [{"first": 1, "last": 1}, {"first": 2, "last": 3}, {"first": 4, "last": 7}]
    nll = np.linspace(5, 3, 7).tolist()
    return {"regimes": {regime: {"by_length": {"nll": nll, "bins": bins}} for regime in regimes}}


def similarities(label):
    curve = {"rank": [1, 10, 100], "similarity": [0.9, 0.8, 0.5]}
    return {"label": label, "inner_product": {"curve": curve}, "cosine": {"curve": curve}}


def spectra():
    made = [from_options("ar"), from_options("dar", t=2), from_options("mlm", mask=0.5)]
    return {"spectra": [{"objective": describe(x), "s": 6, **spectrum(x, 6)} for x in made]}


def toy():
    losses = ("spectral", "cross-entropy")
    row = {"tail": 1.5, "needs": 2, "exact": [0.4, 0.2, 0.1, 0.0]}
    found = {"all": [[0.4, 0.2, 0.1], [0.3, 0.2, 0.0]], "own": [[0.3, 0.2], [0.2, 0.1]]}
    rows = [{"objective": name, "eps": eps, **row, **dict.fromkeys(losses, found)}
            for name in ("ar", "dar t=2") for eps in (0.0, 0.3)]
    return {"bottlenecks": [2, 4, 16], "classes": 4, "labels": 5, "losses": losses, "rows": rows}


def claims():
    return [{**claim, "short": claim["claim"]} for name in ("table7", "figure3")
            for claim in committed(name)["claims"]]


PICTURES = {"curves": lambda: [curve("ar"), curve("mlm $0.15")],
            "spectra": spectra, "toy": toy, "forest": claims,
            "by_length": lambda: {"ar": by_length("next"), "mlm": by_length("padded", "truncated")},
            "ranks": lambda: {"checkpoints": [similarities("ar"), similarities("mlm")]},
            "bridge": lambda: committed("bridge")["found"]["results"], "dots": lambda: committed("table1")}


def is_drawn(path):
    """Whether the file is a PNG with lines or dots in colour on white, and nothing else is beside it."""
    pixels = plots.import_optional("matplotlib.image").imread(path)[..., :3]  # (H, W, 3) in 0..1
    coloured = pixels.max(-1) - pixels.min(-1) > 0.3
    whole = list(path.parent.iterdir()) == [path]
    return whole and (pixels == 1).all(-1).mean() > 0.5 and 2e-4 < coloured.mean() < 0.5


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_and_its_words_are_not_cut(name, tmp_path, monkeypatch):
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    path = tmp_path / "picture.png"
    getattr(plots, name)(path, PICTURES[name]())
    assert is_drawn(path)
    [figure] = figures
    x0, y0, x1, y1 = figure.get_tightbbox().extents  # inches
    width, height = figure.get_size_inches()
    assert min(x0, y0) > -0.02 and x1 < width + 0.02 and y1 < height + 0.02


def test_the_demo_draws_objectives_with_masks_and_spectra(tmp_path):
    path = tmp_path / "picture.png"
    call(f"objectives.py mtp --t 2 --plot {path}")
    assert is_drawn(path)


@pytest.mark.parametrize("low, high", [(1, 2), (30, 60), (40, 250), (35, 400), (0.01, 12)])
def test_a_logarithmic_axis_has_enough_numbers(low, high):
    axes = plots.new_figure("x.png", 4, 3).subplots()
    axes.set(yscale="log", ylim=(low, high))
    plots.plain_log(axes, "y")
    ticks = axes.get_yticks()
    assert 4 <= len(ticks) <= 9 and low <= min(ticks) and max(ticks) <= high


def test_a_row_far_from_all_others_does_not_squeeze_them():
    rows = committed("table7")["rows"]
    assert plots.far_row([row["cells"]["padded"]["seeds"] for row in rows]) == 0  # the unigrams
    assert plots.far_row([[10.0, 11.0], [12.0], [15.0, 14.0]]) is None
    assert plots.far_row([[1.0], [2.0]]) is None
