"""Training curves, and what a run ends with."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from downstream import closing, curves
from objectives import from_options, target_nll
from support.cli import BadInput
from text.folders import Corpus

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(folder, losses, unit="tokens"):
    folder.mkdir()
    lines = []
    for k, loss in enumerate(losses, 1):
        lines.append({"step": 10 * k, "loss": loss, "lr": 1e-3, unit: 1000 * k, f"{unit}_per_second": 50 * k})
        if k % 2 == 0:
            lines.append({"step": 10 * k, "val_loss": loss + 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    return folder


def test_what_is_read(tmp_path):
    run = curves.read_curves(write_metrics(tmp_path / "a", [4, 3, 2, 1]))
    assert run == {"name": "a", "unit": "tokens", "seen": [1000, 2000, 3000, 4000], "loss": [4, 3, 2, 1],
                   "lr": [1e-3] * 4, "speed": [50, 100, 150, 200], "val_seen": [2000, 4000],
                   "val_loss": [3.5, 1.5]}


def test_runs_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="holds no losses yet"):
        curves.read_curves(tmp_path / "empty")
    with pytest.raises(BadInput, match="give a run folder"):
        curves.read_curves(tmp_path / "none")


def test_plot_of_several_runs(tmp_path, capsys):
    """What the panels show, and the command around it."""
    plt = pytest.importorskip("matplotlib.pyplot")
    folders = [write_metrics(tmp_path / "a", [4, 3, 2, 1]), write_metrics(tmp_path / "b", [5, 4])]
    drawn, genuine = [], plt.close
    plt.close = drawn.append
    try:
        curves.plot_curves(tmp_path / "x.png", [curves.read_curves(folder) for folder in folders])
    finally:
        plt.close = genuine
    losses, rates, speeds = drawn[0].axes
    shown = [list(line.get_ydata()) for line in losses.lines if len(line.get_ydata())]
    assert shown == [[4, 3, 2, 1], [3.5, 1.5], [5, 4], [4.5]]
    assert [list(line.get_ydata()) for line in speeds.lines] == [[50, 100, 150, 200], [50, 100]]
    assert len(rates.lines) == 2 and drawn[0].legends[0].get_texts()[1].get_text() == "b"
    plt.close("all")

    out = ["--plot", str(tmp_path / "y.png"), "--json", str(tmp_path / "y.json")]
    evaluate.main(["curves", *map(str, folders), *out])
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("x.png", "y.png"))
    results = json.loads((tmp_path / "y.json").read_text())["results"]
    assert [(r["loss"], r["val_loss"], r["best_val_loss"], r["tokens"]) for r in results] == [
        (1, 1.5, 1.5, 4000), (4, 4.5, 4.5, 2000)]
    assert "loss 1.0000" in capsys.readouterr().out


def test_plot_of_a_run_whose_name_no_font_has(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_metrics(tmp_path / "r$\udcc3\udcbcn", [2, 1])
    assert closing.picture_of(folder) == folder / "curves.png" and (folder / "curves.png").exists()


def test_the_sample_shown_is_the_likeliest(make_run):
    run = make_run(from_options("ar"), "causal", vocab=257, length=16, scale=1.0, dtype=torch.float32)
    prompt, tries = [65, 66, 67], [closing.generate(run, [65, 66, 67], 8, seed=seed) for seed in range(4)]
    tokens = torch.tensor([prompt + ids for ids in tries])
    groups = 1 + torch.arange(11).expand(4, -1)
    nll = target_nll(run.model, tokens, groups, groups[:, 3:] - 1, "causal").sum(1)
    assert closing.best_sample(run, prompt, 8) == tries[nll.argmin()]


def test_the_picture_goes_into_the_folder_of_the_first_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    a, b = (str(write_metrics(tmp_path / name, [3, 2])) for name in "ab")
    evaluate.main(["curves", a])
    evaluate.main(["curves", b, a])
    assert (tmp_path / "a" / "curves.png").exists() and (tmp_path / "b" / "compared.png").exists()
    assert str(tmp_path / "b" / "compared.png") in capsys.readouterr().out
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "b" / "curves.png").exists()


def test_a_model_is_called_what_its_loss_says():
    """3.22 is the unigram loss of pydoc; 20 steps of the tiny preset come to about 3.11."""
    texts = [closing.what_to_expect(nll, 3.22) for nll in (3.3, 3.11, 2.6, 1.78, 0.9)]
    for text, words in zip(texts, ("no better than the 3.22", "3% better.*the sample is noise",
                                   "19%.*hardly a word", "45%.*most words are real",
                                   "72%.*judge by the sample")):
        assert re.search(words, text), text
    assert "judge by the sample" in closing.what_to_expect(5.0, 7.0, words=False)  # tokens that are words


def test_unigram_loss_by_counting():
    tokenizer = SimpleNamespace(vocab=4)
    corpus = Corpus("x", tokenizer, np.array([0, 0, 0, 1, 1, 2]), np.array([3]), 1)
    found = closing.unigram_nll(corpus, torch.tensor([[3, 0, 1], [2, 2, 3]]))
    assert np.allclose(found.exp(), [[10 / 4, 10 / 3], [10 / 2, 10 / 1]])
    alone = Corpus("x", tokenizer, np.array([], int), np.array([3, 3]), 1)  # a text that is all held out
    assert np.allclose(closing.unigram_nll(alone, torch.tensor([[0, 3, 1]])).exp(), [[2, 6]])
