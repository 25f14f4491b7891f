"""What the README shows works as it stands there: the worked example, the flags, the files."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import call, call_json

import spectral
from objectives import OBJECTIVES, from_options
from run import Settings
from util import BadInput

ROOT = Path(__file__).resolve().parent.parent
README, ERRATA = (ROOT.joinpath(name).read_text(encoding="utf-8") for name in ("README.md", "ERRATA.md"))


def test_the_worked_example_is_an_objective_with_an_option_of_its_own(tmp_path, books):
    (tmp_path / "my.py").write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
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
