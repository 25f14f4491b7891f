"""What a command tells while it works: bars on a terminal, else a line now and then."""

import json
import re
import time

import pytest
from conftest import quietly
from labelled_texts import write_cats, write_glue
from test_glue import LAYOUTS
from test_images import write_mnist
from test_vision import write_images

import data
import evaluate
import train
from engine.settings import resolve
from images.shapes import shapes
from support import cli


@pytest.fixture
def said(monkeypatch):
    """Lines come every 10 ms here, and what is counted goes on only when one has told of it."""
    lines, genuine = [], cli.Tally.update

    def update(self, n=1):
        genuine(self, n)
        end = time.monotonic() + 20
        while not any(f" {self.unit}" in line for line in list(lines)) and time.monotonic() < end:
            time.sleep(0.005)

    monkeypatch.setattr(cli, "EVERY", 0.01)
    monkeypatch.setattr(cli.Tally, "update", update)
    monkeypatch.setattr(cli, "tell_line", lines.append)
    return lines


def test_lines_say_how_far_it_is_and_how_long_it_takes(said):
    with cli.told("finetune"):
        for _ in cli.progress(range(1200), desc="seed 0", unit=" steps"):
            pass
    line = r"finetune: seed 0, [\d,]+ of 1,200 steps(, about .+ to go)?"
    assert any(re.fullmatch(line, told) for told in said)


def test_what_a_tally_says(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    tally = cli.Tally(total=1024, unit=" sequences")
    now[0] += 10
    tally.update(256)
    assert str(tally) == "256 of 1,024 sequences, about 30 s to go"
    tally.set_postfix_str("loss 0.500")
    assert str(tally) == "256 of 1,024 sequences, loss 0.500, about 30 s to go"
    unknown = cli.Tally(desc="tokenizing", unit=" bytes")
    unknown.update(12_345)
    assert str(unknown) == "tokenizing, 12,345 bytes so far"


def test_short_commands_leave_no_line_and_nothing_runs_on(monkeypatch, capsys):
    monkeypatch.setattr(cli, "EVERY", 10.0)
    with cli.told("probe"):
        assert list(cli.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == "" and not cli.COUNTED
    monkeypatch.setattr(cli, "EVERY", 0.01)
    with pytest.raises(ZeroDivisionError), cli.told("probe"):
        time.sleep(0.1)
        raise ZeroDivisionError
    assert "probe: 0 s so far" in capsys.readouterr().err
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli, "EVERY", 0.01)
    with cli.told("probe"):
        bar = cli.progress(range(3), desc="rows")
        assert not isinstance(bar, cli.Tally) and list(bar) == [0, 1, 2]
        time.sleep(0.05)
    assert "probe:" not in capsys.readouterr().err


def test_durations():
    found = [cli.duration(seconds) for seconds in (40, 720, 12_600, 40 * 86_400, 20 * 31_557_600, 4.7e10)]
    assert found == ["40 s", "12 min", "3.5 h", "40 days", "20 years", "1,489 years"]


COMMANDS = [
    ("perplexity {vl} --max-sequences 4", r"(padded|truncated), [\d,]+ of [\d,]+ tokens"),
    ("perplexity {ar} --by-length", r"[\d,]+ of [\d,]+ tokens"),
    ("perplexity {dar}", r"as trained, \d of 2 passes"),
    ("bound {diffusion} --max-sequences 3", r"any order, \d of 3 sequences"),
    ("generate {ar} --tokens 5 --samples 2", r"text \d of 2, \d of 5 tokens"),
    ("connectivity {ar} --features 50 --top 20", r"features, \d of \d batches"),
    ("probe {vl} --data {cats}", r"features, \d+ of \d+ examples"),
    ("probe {vl} --data {cats}", r"strength of the penalty, \d of 6 strengths"),
    ("finetune {vl} --data {cats} --epochs 1", r".*seed 0, \d of 3 steps"),
    ("glue {vl} --glue-dir {glue} --tasks rte --seeds 1 --epochs 1 --results {tmp}/glue.json",
     r"rte seed 0, \d of 1 steps"),
    ("reconstruct {images} --max-images 4", r"ar \(causal\), \d+ of \d+ patches"),
    ("finetune {images} --data {set} --epochs 1", r"seed 0, \d of \d steps"),
]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "set", {"train": shapes(24, 16, 0), "val": shapes(12, 16, 1)})
    quietly(resolve(objective="ar", data=str(folder / "set"), size=16, steps=1, batch_size=8), folder / "run")
    return folder


@pytest.mark.parametrize("line, says", COMMANDS)
def test_every_command_tells_how_far_it_is(line, says, text_runs, image_run, said, tmp_path, capsys):
    places = {**text_runs, "images": image_run / "run", "set": image_run / "set", "tmp": tmp_path}
    places |= {"cats": write_cats(tmp_path / "cats.tsv"), "glue": write_glue(tmp_path / "glue", LAYOUTS)}
    line = line.format(**places)
    evaluate.main([*line.split(), "--device", "cpu", "--dtype", "fp32", "--json", str(tmp_path / "out.json")])
    name = line.split()[0]
    assert any(re.match(f"{name}: {says}", told) for told in said), said
    assert all(told.startswith(name + ": ") for told in said)
    assert json.loads((tmp_path / "out.json").read_text())["command"] == f"evaluate.py {name}"


def test_so_does_training_before_its_first_step_and_after_its_last(said, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 400)
    argv = ["--data", str(tmp_path / "a.txt"), "--steps", "1", "--length", "32", "--batch-size", "2",
            "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path / "run")]
    train.main(argv)
    assert any(re.match(r"reading the data: (tokenizing, [\d,]+ bytes|\d+ s) so far", line) for line in said)
    assert any(line.startswith("report: ") for line in said)


def test_so_does_the_preparation_of_data(said, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    data.main(["text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "text")])
    assert any(re.match(r"text: tokenizing, [\d,]+ bytes so far", line) for line in said)
    write_mnist(tmp_path / "digits")
    data.main(["images", str(tmp_path / "digits"), "--out", str(tmp_path / "images")])
    assert any(re.match(r"images: \d+ of \d+ images", line) for line in said), said
