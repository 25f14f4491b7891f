"""The project from Python: data given as it is, objectives of one's own. What the README shows."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, call_json
from test_check import BACKWARD

import spectral
from evaluate import perplexity
from masks import Objective
from objectives import OBJECTIVES, from_options
from run import Settings, load_run, resolve, resumed
from tasks.probe import features
from train import train
from util import BadInput

ROOT = Path(__file__).resolve().parent.parent
README, ERRATA = (ROOT.joinpath(name).read_text(encoding="utf-8") for name in ("README.md", "ERRATA.md"))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # first an objective of one's own
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
    (tmp_path / "my.py").write_text(PYTHON[0])
    names = {"__name__": "notebook"}
    for block in PYTHON:
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
    assert run.tokenizer.encode("3 0 49").tolist() == [3, 0, 49]
    for word in ("word", "50", "70000", "-1"):
        with pytest.raises(BadInput, match=f"'{word}' is no id"):
            run.tokenizer.encode(f"3 {word}")


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


def test_an_objective_of_a_cell_and_one_of_a_file(tmp_path, monkeypatch, capsys):
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
    monkeypatch.chdir(tmp_path)
    assert resumed("file", {"objective": "my.py:Backward", "steps": 9}).steps == 9  # as it was typed
    path.write_text(BACKWARD + "\n# changed\n")
    assert load_run(tmp_path / "file").objective == run.objective
    resumed("file", {})
    assert capsys.readouterr().err.count("my.py:Backward has changed") == 2


# ---------------------------------------------------------------------------- README.md and ERRATA.md

def test_the_worked_example_is_an_objective_with_an_option_of_its_own(tmp_path, books):
    (tmp_path / "my.py").write_text(PYTHON[0])
    name = f"{tmp_path / 'my.py'}:Every"
    f = from_options(name, nth=4).groups(200, 9)
    hidden = {tuple((row > 1).nonzero()[:, 0].tolist()) for row in f}
    assert hidden == {(0, 4, 8), (1, 5), (2, 6), (3, 7)}
    assert "Every nth=2" in call(f"objectives.py {name} --nth 2 --length 4 --samples 1")
    assert "WRONG" not in call(f"objectives.py {name} --check")
    call(f"train.py --objective {name} --nth 3 --data {books} --length 12 --batch-size 4 --steps 3 "
         f"--no-report --threads 1 --device cpu --out {tmp_path / 'run'}")
    found, = call_json(f"spectral.py spectrum --objective {name} --nth 3 --s 6")["spectra"]
    assert found["singular_values"] == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-9)
    with pytest.raises(BadInput):
        call(f"evaluate.py perplexity {tmp_path / 'run'}")


def test_every_file_and_folder_it_names_is_there():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"`((?:[a-z]+/)?\w+\.(?:py|md|txt|cff))`", README))
    named -= {"my.py"}  # the reader's own
    assert len(named) > 4 and not {name for name in named if not (ROOT / name).exists()}


def test_every_flag_and_command_it_names_is_defined():
    files = (path for folder in (".", "tasks", "experiments") for path in ROOT.glob(f"{folder}/*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    known = set(re.findall(r'"--([a-z][a-z-]*)"', code))
    known |= {f.name.replace("_", "-") for cls in (Settings, *OBJECTIVES.values()) for f in fields(cls)}
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "help", "nth", "s"}
    for text in (README, ERRATA):
        flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_-]*)", text))
        assert len(flags) > 3 and flags <= known
    commands = re.findall(r"spectral\.py ([a-z][\w.]*)", README + ERRATA)
    assert len(commands) > 10 and not set(commands) - set(spectral.COMMANDS)
