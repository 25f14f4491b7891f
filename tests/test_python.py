"""The project from Python: README's lines, data given as it is, objectives of one's own, several calls."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from test_check import BACKWARD

from evaluate import perplexity
from masks import Objective
from objectives import OBJECTIVES
from run import Settings, load_run, resolve
from tasks.probe import features
from train import train
from util import BadInput

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = {"length": 16, "steps": 4, "batch_size": 4}
TEXTS = [f"text number {k} of many, with a few words in it" for k in range(60)]


def small(out, **given):
    loss = train(resolve(**{**SMALL, **given}), out, device="cpu", dtype="fp32", quiet=True)
    return loss, load_run(out)


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr(BadInput, "flags", False)


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    names = {"__name__": "notebook"}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block.replace("steps=1000", "steps=3, batch_size=4, length=16"), names)  # noqa: S102  it is ours
    assert names["x"].shape == (2, 32) and isinstance(names["text"], str)
    assert names["scores"]["perplexity"] > 1 and names["masks"][0].shape == (8, 8)
    assert load_run("runs/every").objective == names["Every"](nth=4)


def test_texts_and_ids_are_data(tmp_path):
    first, run = small(tmp_path / "texts", objective="vl", mask=(0.15, 0.3), data=TEXTS)
    again, _ = small(tmp_path / "again", objective="vl", mask=(0.15, 0.3), data=TEXTS)
    assert first == again                  # two calls in one process
    assert run.settings.data is None       # no text in the checkpoint
    assert perplexity(run, data=TEXTS, max_sequences=4)["regimes"]["padded"]["nll"] > 0
    ids = np.random.default_rng(0).integers(50, size=2000)
    _, run = small(tmp_path / "ids", data=ids)
    assert run.model.config.vocab == int(ids.max()) + 1 and run.total == 1900
    for wrong in (ids[:10], ids - 1, ids / 2.0):
        with pytest.raises(BadInput, match="array of 40 token ids"):
            small(tmp_path / "wrong", data=wrong)


def test_features_of_texts_and_images(tmp_path, trained):
    run = load_run(trained("vl --mask 0.15,0.3"))
    x = features(run, ["one text", ("a pair", "of texts")])
    assert x.shape == (2, run.model.config.width) and x.isfinite().all()
    assert torch.allclose(features(run, ["one text"]), x[:1], atol=1e-5)
    run = load_run(trained("ar --streams 2", data="shapes"))
    pictures = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    assert features(run, pictures).shape == (3, run.model.config.width)


def test_a_preset_that_is_left_out_is_filled_in(tmp_path):
    settings = Settings(data=TEXTS, **SMALL)
    assert settings.preset is None
    assert train(settings, tmp_path / "run", device="cpu", dtype="fp32", quiet=True) > 0


def test_mistakes_speak_of_arguments():
    with pytest.raises(BadInput, match="^batch_ramp 2 is not"):
        resolve(batch_ramp=2.0)
    with pytest.raises(BadInput, match="mask is no option of ar"):
        resolve(objective="ar", mask=0.15)


def test_an_objective_of_a_cell_and_one_of_a_file(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class First(Objective):
        def groups(self, batch, length, generator=None):
            return (1 + (torch.arange(length) > 0)).repeat(batch, 1)

    monkeypatch.setitem(OBJECTIVES, "first", First)
    assert small(tmp_path / "cell", objective="first", data=TEXTS)[1].objective == First()

    path = tmp_path / "my.py"
    path.write_text(BACKWARD)
    monkeypatch.chdir(tmp_path)
    _, run = small(tmp_path / "file", objective="my.py:Backward", skip=1, data=TEXTS)
    assert run.settings.objective == f"{path}:Backward" and run.objective.skip == 1
    monkeypatch.chdir("/")
    assert load_run(tmp_path / "file").settings == run.settings    # found from any folder
    path.write_text(BACKWARD + "\n# changed\n")
    with pytest.raises(BadInput, match="is not the file"):
        load_run(tmp_path / "file")
