"""That a reconstruction reads what it may and nothing else, and the measures of its quality."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import call, quietly
from test_vision import write_images

from downstream import reconstruct
from downstream.reconstruct import hidden_patches, measures, to_pictures, with_mean
from engine.runs import Run
from engine.settings import Settings, resolve
from images.shapes import shapes
from support.cli import BadInput


@pytest.fixture
def run(image_way, make_image_model):
    objective, path = image_way
    return Run(make_image_model(path), objective, path, None, Settings(preset="vit-tiny"), 0, "test")


def some_patches(count=3):
    return torch.randn(count, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ["raster", "random"])
def test_hidden_pixels_are_never_read(run, order):
    patches, hidden = some_patches(), hidden_patches(3, 9, 0.5, order)
    if run.path == "causal" and order == "random":
        with pytest.raises(BadInput, match="--order raster"):
            reconstruct.reconstruct(run, patches, hidden)
        return
    filled = reconstruct.reconstruct(run, patches, hidden)
    secret = patches.clone()
    secret[torch.arange(3)[:, None], hidden] = math.nan
    assert torch.equal(reconstruct.reconstruct(run, secret, hidden), filled)
    kept = torch.ones(3, 9, dtype=torch.bool)
    kept[torch.arange(3)[:, None], hidden] = False
    assert torch.equal(filled[kept], patches[kept]) and not torch.isclose(filled, patches)[~kept].any()


@pytest.mark.parametrize("order", ["raster", "random"])
def test_each_prediction_has_its_own_context(run, order):
    """Which patches the j-th prediction depends on, by changing them one at a time: the known ones, before it
    in raster order where the objective goes from left to right. Earlier predictions pass on what they have
    seen."""
    if run.path == "causal" and order == "random":
        return
    patches, hidden = some_patches(1), hidden_patches(1, 9, 0.4, order, seed=4)
    base = reconstruct.reconstruct(run, patches, hidden)
    reached = {}
    left_to_right = run.objective.one_stream != "mask" and run.objective.left_to_right(9,
                                                                                       run.path) is not None
    for target in hidden[0].tolist():
        known = {i for i in range(9) if i not in hidden[0].tolist() or i in reached}
        context = {i for i in known if i < target or not left_to_right}
        # what a prediction in the context has itself been computed from
        reached[target] = set().union(*(reached.get(i, {i}) for i in context))
        for i in set(range(9)) - set(hidden[0].tolist()):
            other = patches.clone()
            other[0, i] += 1
            changed = not torch.equal(reconstruct.reconstruct(run, other, hidden)[0, target], base[0, target])
            assert changed == (i in reached[target]), (target, i)


def test_hidden_patches_are_uniform_subsets_without_the_first():
    hidden = hidden_patches(4000, 5, 0.5, "raster")
    assert hidden.shape == (4000, 2) and hidden.min() == 1 and (hidden[:, 0] < hidden[:, 1]).all()
    _, counts = hidden.unique(dim=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 4000 / 6).abs() < 4 * math.sqrt(4000 / 6)).all()
    shuffled = hidden_patches(4000, 5, 0.5, "random")
    assert torch.equal(shuffled.sort(1).values,
                       hidden) and 1800 < (shuffled[:, 0] < shuffled[:, 1]).sum() < 2200
    with pytest.raises(BadInput, match="--hide 1.5"):
        hidden_patches(2, 5, 1.5)


def test_measures_against_plain_formulas(make_image_model):
    config = make_image_model("causal").config
    patches, hidden = some_patches() * 0.3, torch.tensor([[1, 4], [2, 3], [7, 8]])
    filled = patches.clone()
    filled[torch.arange(3)[:, None], hidden] += 0.1 * torch.arange(1.0, 4.0)[:, None, None]
    result = measures(config, patches, filled, hidden)
    assert torch.allclose(result["l2"], torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))
    images = [np.zeros((3, 3, 12, 12)) for _ in range(2)]                      # pixel by pixel, in 0..1
    for image, source in zip(images, (patches, filled)):
        for n in range(3):
            for s in range(9):
                for v in range(48):
                    c, y, x = v // 16, v % 16 // 4, v % 4
                    image[n, c, s // 3 * 4 + y,
                          s % 3 * 4 + x] = min(1, max(0, source[n, s, v].item() * 0.25 + 0.5))
    error = ((images[0] - images[1]) ** 2).mean((1, 2, 3))
    assert np.allclose(result["psnr"].numpy(), 10 * np.log10(1 / error))
    assert np.allclose(to_pictures(config, patches).numpy(), images[0])


def test_the_baseline_is_the_mean_colour_of_what_is_known():
    patches, hidden = some_patches(1), torch.tensor([[2, 5]])
    filled = with_mean(patches, hidden)
    known = [0, 1, 3, 4, 6, 7, 8]
    for c in range(3):
        expected = patches[0, known, 16 * c:16 * (c + 1)].mean()
        assert torch.allclose(filled[0, hidden[0], 16 * c:16 * (c + 1)], expected)
    assert torch.equal(filled[0, known], patches[0, known])


def test_command_and_picture(tmp_path, capsys, monkeypatch):
    """One column for the images, one for what was hidden, one for each checkpoint; without matplotlib no
    titles."""
    data = write_images(tmp_path / "data", {"train": shapes(60, 32, 0), "val": shapes(30, 32, 1)})
    settings = resolve(objective="ar", data=str(data), steps=1, batch_size=8)
    quietly(settings, tmp_path / "ar")
    picture, both = tmp_path / "grid.png", (str(tmp_path / "ar"), f"untrained:{tmp_path / 'ar'}")
    few = ("--max-images", 20, "--hide", 0.1)

    def height_of_picture():
        text = call(capsys, "reconstruct", *both, *few, "--rows", 3, "--picture", picture)
        assert "original, hidden, ar (causal), untrained ar (causal)" in text and "mean colour" in text
        assert "--hide 0.1: 6 of 64 patches hidden (never the first)" in text
        assert picture.read_bytes()[:4] == b"\x89PNG"
        return int.from_bytes(picture.read_bytes()[20:24], "big")

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert 3 * 60 < height_of_picture() < 3 * 75
    rows = json.loads(call(capsys, "reconstruct", both[0], *few, "--json", "-"))["rows"]
    assert rows[1]["step"] == 1 and len(rows[1]["l2_of_images"]) == 20
    assert rows[1]["l2"] == pytest.approx(np.mean(rows[1]["l2_of_images"]), rel=1e-5)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert height_of_picture() > 3 * 150
