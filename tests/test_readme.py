"""What the README shows works as it stands there: the worked example, the flags, the files."""
import json
import re
from pathlib import Path

import pytest

import beyond
import evaluate
import objectives
import spectral
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_worked_example_is_an_objective_with_an_option_of_its_own(tmp_path, monkeypatch, capsys):
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = dict(vars(beyond))
    exec(code, names)  # noqa: S102  the README is ours
    monkeypatch.setitem(objectives.OBJECTIVES, "every", names["Every"])
    objectives.main(["every", "--nth", "2", "--length", "4", "--samples", "1"])
    assert "every n-th token" in capsys.readouterr().out
    f = objectives.from_options("every", nth=4).groups(200, 9)
    assert {tuple((row > 1).nonzero()[0].tolist()) for row in f.numpy()} == {(0, 4, 8), (1, 5), (2, 6),
                                                                             (3, 7)}
    text, out = tmp_path / "text.txt", str(tmp_path / "run")
    text.write_text("a line of text\n" * 400)
    train.main(["--objective", "every", "--nth", "3", "--data", str(text), "--length", "12", "--batch-size",
                "4",
                "--steps", "3", "--out", out, "--no-report", "--threads", "1"])
    spectral.main(["spectrum", "--objective", "every", "--nth", "3", "--s", "6"])
    assert "singular values" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no exact left-to-right likelihood"):
        evaluate.main(["perplexity", out, "--data", str(text)])


def test_every_file_and_folder_it_names_is_there():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)",
                           README)) | set(re.findall(r"`((?:[a-z]+/)?\w+\.(?:py|md|txt|cff))`", README))
    assert len(named) > 4 and not {name for name in named if not (ROOT / name).exists()}


def test_every_flag_it_names_is_defined():
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")
                     if "tests" not in path.parts)
    known = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--nth"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) - known
    missing = {flag for flag in flags if f'"{flag}"' not in code and f'"{flag[2:]}"' not in code
               and not re.search(rf"\b{flag[2:].replace('-', '_')}: ", code)}
    assert len(flags) > 15 and not missing


def test_it_is_one_page():
    assert len(README.splitlines()) <= 180


def test_every_slip_has_a_command_that_shows_it_or_was_found_by_reading():
    text = (ROOT / "ERRATA.md").read_text(encoding="utf-8")
    shown = [line.rstrip(" |").rpartition("|")[2] for line in text.splitlines() if line.startswith("| ")]
    shown = [cell for cell in shown if cell.strip() != "Shown by"]
    assert len(shown) > 30
    for cell in shown:
        commands = re.findall(r"`python spectral.py ([^`]*)`", cell)
        assert commands or "by reading" in cell, cell
        for line in commands:
            assert spectral.read_command(line.split()).command == line.split()[0]


def test_the_orders_that_it_tells_of_the_bridge_are_those_of_the_results():
    found = json.loads((ROOT / "results" / "bridge-cpu.json").read_text())["found"]["results"]["orders"]
    [clean] = [order for order in found if (order["eps"], order["place"]) == (0, "common")]
    (told, low, high), (blind, least, most) = clean["told"], clean["blind"]
    text = " ".join(README.split())
    assert f"Spearman {told:.2f}, 95% interval {low:.2f} to {high:.2f}" in text
    assert f"blind ones ({blind:.2f}, {least:.2f} to {most:.2f})" in text
