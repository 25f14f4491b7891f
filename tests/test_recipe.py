"""Time to a loss: experiments/recipe.py."""
import json

import numpy as np
import pytest

from experiments import recipe
from text import sources

OTHERS = [name for name in recipe.RECIPES if name != recipe.DEFAULT]


def runs(ours, others):
    """[recipe, steps, loss, seconds] of our budgets and of the others."""
    found = [(recipe.DEFAULT, *values) for values in ours] + [(name, *values) for name, values in zip(OTHERS,
                                                                                                   others)]
    return [dict(zip(("recipe", "steps", "loss", "seconds"), values)) for values in found]


def test_the_shortest_budget_that_ends_lower_counts():
    found = runs([(150, 2.2, 30.0), (200, 1.9, 40.0), (300, 1.6, 60.0)],
                 [(600, 1.9, 90.0), (600, 1.5, 95.0), (600, 2.5, 85.0)])
    times = [recipe.sooner(found, name) for name in OTHERS]
    assert times[:2] == [90 / 40, None] and times[2] == pytest.approx(85 / 30)


def test_from_training_to_the_summary(tmp_path, monkeypatch, capsys):
    words = np.random.default_rng(0).choice(["one", "two", "three", "four"], (60, 400))
    monkeypatch.setattr(sources, "pydoc_texts", lambda: ((f"module{k}.part", " ".join(row))
                                                         for k, row in enumerate(words)))
    files = [str(tmp_path / f"{seed}.json") for seed in (0, 1)]
    for seed, file in enumerate(files):
        recipe.main(["train", "--objective", "vl", "--seed", str(seed), "--share", "0.01", "--json", file])
    one, two = (json.loads((tmp_path / f"{seed}.json").read_text())["results"]["runs"] for seed in (0, 1))
    assert [run["steps"] for run in one] == [2, 2, 2, 3, 4, 6, 6, 6]
    assert all(a["loss"] != b["loss"] and a["seconds"] > 0 for a, b in zip(one, two))
    assert len({run["loss"] for run in one[-3:]}) == 3          # the flags of a recipe are at work
    recipe.main(["summary", *files, "--json", str(tmp_path / "all.json")])
    rows = json.loads((tmp_path / "all.json").read_text())["results"]["rows"]
    assert [row["loss"] for row in rows] == [[a["loss"], b["loss"]] for a, b in zip(one, two)]
    muon, adamw = (np.median([run["seconds"] / run["steps"] for run in x]) for x in
                   (one[:5] + two[:5], one[5:] + two[5:]))
    assert [row["seconds"] for row in rows] == [pytest.approx([row["steps"] * pace] * 2) for row, pace in
                                                zip(rows, [muon] * 5 + [adamw] * 3)]
    for times, x in zip(rows[-1]["times_sooner"], (one, two)):
        lower = [run["steps"] for run in x[:5] if run["loss"] <= x[-1]["loss"]]
        assert times == (pytest.approx(6 * adamw / min(lower) / muon) if lower else None)
    assert "ours is there" in capsys.readouterr().out


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = runs([(150, [2.2, 2.1], [30.0, 31.0])], [(600, [1.9, 1.8], [90.0, 91.0])] * 3)
    recipe.plot_recipes({"rows": [{"objective": "ar", **run} for run in found]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
