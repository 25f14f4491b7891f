"""Training learns, resumes exactly, and schedules what the protocol says."""

import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flip_a_weight
from conftest import quietly as run

import train as module
from data import Sequences, load_corpus
from engine import log, machine, muon, runs, steps
from engine import settings as settings_module
from engine.runs import load_checkpoint, load_run
from engine.settings import Settings, resolve
from engine.steps import parts
from images import sets
from support import kernels
from support.cli import BadInput
from text import sources
from train import batch_sizes, learning_rate, steps_for, train

ROOT = Path(module.__file__).parent
SMALL = {"length": 32, "batch_size": 8, "steps": 12, "lr": 2e-3}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "ar"},
        {"objective": "ar", "streams": 2},
        {"objective": "dar", "t": 2},
        {"objective": "mlm", "mask": (0.3,)},
        {"objective": "vl", "mask": (0.2, 0.5)},
        {"objective": "vl", "streams": 2},
        {"objective": "permutation"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_objective_learns_a_period(options, text, tmp_path):
    """Whoever sees any of the other tokens knows this one; the unigram entropy is log 7 = 1.95."""
    steps = {"ar": 80, "permutation": 300}.get(" ".join(map(str, options.values())), 200)
    settings = resolve(data=text, **{**SMALL, "batch_size": 16, "steps": steps, "lr": 2e-2}, **options)
    assert run(settings, tmp_path / "run") < 0.5


def test_loss_on_pydoc_falls_clearly_below_the_unigram_entropy(tmp_path, monkeypatch):
    """On a part of it, read once."""
    texts = list(itertools.islice(sources.pydoc_texts(), 150))
    monkeypatch.setattr(sources, "pydoc_texts", lambda: iter(texts))
    counts = np.bincount(load_corpus("pydoc").val)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert 2.8 < entropy < 3.6
    assert run(resolve(steps=120, lr=4e-3), tmp_path / "run") < entropy - 0.4


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [{"objective": "ar", "optimizer": "adamw"}, {"objective": "dar"}, {"objective": "vl"}],
    ids=lambda options: options["objective"],
)
def test_an_interrupted_run_resumes_bit_for_bit(options, text, tmp_path, monkeypatch):
    """With gradient accumulation, a batch ramp, and an epoch that ends between the two halves."""
    settings = resolve(
        data=text, **{**SMALL, "steps": 20, "batch_size": 60}, micro_batch=16, batch_ramp=0.5, **options
    )
    interrupted_run_is_exact(settings, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "options",
    [{"objective": "ar", "streams": 2}, {"objective": "dar", "t": (1, 2)},
     {"objective": "vl", "optimizer": "adamw"}],
    ids=lambda options: options["objective"],
)
def test_so_does_one_on_images(options, small_shapes, tmp_path, monkeypatch):
    settings = resolve(
        data="shapes", size=8, patch=4, steps=20, batch_size=25, micro_batch=16, batch_ramp=0.5, **options
    )
    interrupted_run_is_exact(settings, tmp_path, monkeypatch)
    loaded = load_run(tmp_path / "whole")
    assert loaded.tokenizer is None and loaded.model.config.length == 4 and loaded.settings == settings


@pytest.fixture
def small_shapes(monkeypatch):
    """The drawn images, 200 of them."""
    drawn = sets.shapes
    monkeypatch.setattr(sets, "shapes", lambda count, size, seed: drawn(200, size, seed))


@pytest.mark.parametrize(
    "options",
    [{"objective": "ar"}, {"objective": "dar"}, {"objective": "mlm"}, {"objective": "vl", "streams": 2}],
    ids=lambda options: options["objective"],
)
def test_every_objective_learns_flat_images(options, tmp_path, monkeypatch):
    """Images of one colour each, so that any patch tells all others. Guessing the mean gives a loss of 1."""
    colours = np.random.default_rng(0).integers(0, 256, (300, 1, 1, 3), dtype=np.uint8)
    monkeypatch.setattr(
        sets,
        "shapes",
        lambda count, size, seed: (np.broadcast_to(colours, (300, size, size, 3)), np.zeros(300, np.int64)),
    )
    settings = resolve(data="shapes", size=8, patch=4, steps=150, batch_size=32, lr=5e-3, **options)
    assert run(settings, tmp_path / "run") < 0.1


def test_text_and_images_are_not_confused(text, tmp_path):
    for options, message in (
        ({"data": "shapes", "preset": "tiny"}, "is for text"),
        ({"data": text, "preset": "vit-tiny"}, "is for images"),
        ({"data": "shapes", "length": 64}, "--length"),
        ({"data": text, "patch": 4}, "--patch"),
        ({"data": "shapes", "size": 30}, "--patch 4 does not divide"),
        ({"data": "shapes", "crop": 0.0}, "--crop 0"),
    ):
        with pytest.raises(BadInput, match=message):
            run(resolve(**options), tmp_path / "run")
    assert resolve(data="shapes", objective="vl").options == {"mask": (0.5, 0.75)}
    assert resolve(objective="vl").options == {"mask": (0.15, 0.3)}


def interrupted_run_is_exact(settings, tmp_path, monkeypatch):
    run(settings, tmp_path / "whole", save_every=7, log_every=3)

    def save_then_die(path, content, save=runs.save_checkpoint):
        save(path, content)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_checkpoint", save_then_die)
        run(settings, tmp_path / "parts", save_every=7, log_every=3)
    assert load_checkpoint(tmp_path / "parts")["step"] == 7
    run(settings, tmp_path / "parts", resume=True, save_every=7, log_every=3)
    whole, resumed = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == resumed["step"] == 20 and whole["seen"] == resumed["seen"]
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [line["step"] for line in lines[0]] == [3, 6, 7, 9, 12, 14, 15, 18, 20, 20]
    assert [line["step"] for line in lines[1]] == [3, 6, 7, 9, 12, 14, 15, 18, 20, 20]
    assert lines[0][-1] == lines[1][-1]  # validation loss


def test_same_seed_same_weights(text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(resolve(data=text, **SMALL, seed=seed), tmp_path / name)
    a, b, c = (load_checkpoint(tmp_path / name)["model"]["embedding.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_accumulated_gradients_equal_the_whole_batch(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        kernels, "on_amd", lambda: False
    )  # oneDNN's rounding varies more with the batch, and Adam enlarges it
    for name, micro in (("whole", 64), ("parts", 5)):
        run(resolve(data=text, objective="vl", **{**SMALL, "steps": 3}, micro_batch=micro), tmp_path / name)
    whole, accumulated = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    for name in whole:
        assert torch.allclose(whole[name], accumulated[name], atol=2e-5), name


def test_a_signal_saves_and_stops(text, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def rate(settings, progress):
        if progress >= 0.5:
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    monkeypatch.setattr(module, "learning_rate", rate)
    assert run(resolve(data=text, **SMALL), tmp_path / "run") is None
    assert load_checkpoint(tmp_path / "run")["step"] == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    runs.save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(BadInput, match="No space left on device.*intact"):
        runs.save_checkpoint(tmp_path / "ckpt.pt", {"step": 2})
    assert not list(tmp_path.glob("*.partial"))
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True) == {"step": 1}


def test_schedules():
    settings = resolve(lr=1.0)
    assert [round(learning_rate(settings, p), 9) for p in (0, 0.375, 0.75, 0.875, 1)] == [
        0.25,
        0.625,
        1,
        0.5,
        0,
    ]
    cosine = resolve(lr=1.0, schedule="cosine", warmup=0.1)
    assert learning_rate(cosine, 0) == 0 and learning_rate(cosine, 1) == pytest.approx(0)
    assert (
        learning_rate(cosine, 0.05) == 0.5 and learning_rate(cosine, 0.1) == 1
    )  # the cosine begins where the warm-up ends
    assert learning_rate(cosine, 0.55) == pytest.approx(0.5) and learning_rate(
        cosine, 0.325
    ) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_clipping():
    model = torch.nn.Linear(2, 1, bias=False)
    for largest, kept in ((0, 5.0), (10, 5.0), (1, 1.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert steps.clip_gradients(model, largest) == 5 and model.weight.grad.norm() == pytest.approx(
            kept, rel=1e-5
        )


def test_batch_ramp_and_parts():
    settings = resolve(batch_size=100, batch_ramp=0.6)
    sizes = batch_sizes(settings, 100)
    assert sizes[0] == 7 and sizes[60:] == [100] * 40 and sizes == sorted(sizes) and len(set(sizes)) == 16
    assert (
        abs(sum(sizes[:60]) / 60 - 53.4) < 1
        and batch_sizes(resolve(batch_size=31, batch_ramp=0.6), 100)[60:] == [31] * 40
    )
    assert batch_sizes(resolve(batch_size=7), 3) == [7, 7, 7]
    for sequences in (1, 999, 10_000):
        steps = steps_for(settings, sequences)
        assert sum(batch_sizes(settings, steps)) >= sequences and steps <= 2 + 1.5 * sequences / 100
    for size in range(1, 40):
        cut = parts(size, 16)
        lengths = [b - a for a, b in cut]
        assert sum(lengths) == size and set(lengths[:-1]) <= {16} and lengths[-1] <= 16
        assert cut[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(cut))


def test_what_comes_ahead_comes_in_order():
    assert list(steps.ahead(lambda k: k * k, range(3, 8))) == [9, 16, 25, 36, 49]
    assert list(steps.ahead(str, [1])) == ["1"]
    with pytest.raises(ZeroDivisionError):
        list(steps.ahead(lambda k: 1 / k, [1, 0]))


def test_paper_preset_is_the_paper_s():
    paper = resolve(preset="paper", objective="mlm")
    assert (paper.batch_size, paper.steps, paper.lr, paper.length, paper.batch_ramp) == (
        8192,
        100_000,
        1e-3,
        128,
        0.6,
    )
    assert (paper.clip, paper.weight_decay, paper.schedule, paper.mask_rule) == (
        0.5,
        0.01,
        "triangle",
        "bert",
    )
    assert resolve(preset="paper", batch_size=64).batch_size == 64


def test_a_run_loads_without_its_data(text, tmp_path):
    run(resolve(data=text, objective="vl", mask=(0.2, 0.4), **SMALL), tmp_path / "run")
    loaded = load_run(tmp_path / "run" / "ckpt.pt")
    assert loaded.objective.mask == (0.2, 0.4) and loaded.path == "mask" and loaded.tokenizer.vocab == 257
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["objective"] == "vl" and config["steps"] == 12
    assert not [name for name in load_checkpoint(tmp_path / "run")["model"] if "_orig_mod" in name]


def test_a_run_is_neither_overwritten_nor_mixed(text, tmp_path):
    out, flags = (
        str(tmp_path / "run"),
        ["--data", text, "--length", "32", "--steps", "4", "--no-report", "--device", "cpu"],
    )
    module.main([*flags, "--out", out])
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    for argv, says in (
        ([*flags], "--overwrite"),
        (["--resume", "--lr", "0.5"], f"--lr {module.resolve().lr:g}, not 0.5"),
        (["--resume", "--objective", "dar"], "--objective ar, not dar"),
        (["--resume"], "is at step 4 of 4"),
        (["--overwrite", "--data", "no.txt", "--device", "cpu"], "does not exist"),
        (["--data", "no.txt"], "no.txt does not exist"),  # rather than that the folder holds a run
        (["--overwrite", "--device", "cuda:77"], "cuda:77"),
    ):
        with pytest.raises(BadInput, match=says):
            module.main([*argv, "--out", out])
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    module.main(["--resume", "--steps", "6", "--no-report", "--out", out])
    assert load_checkpoint(out)["step"] == 6
    (tmp_path / "run" / "ckpt.pt").write_bytes(before[:-1000])
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        load_run(out)


def test_the_command_line_end_to_end(text, tmp_path):
    """As a user starts it: trains, reports, leaves a run folder."""

    line = "--objective vl --mask 0.15,0.3 --steps 30 --length 32 --data"
    done = subprocess.run([sys.executable, ROOT / "train.py", *line.split(), text], cwd=tmp_path,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stderr and "tokens/s" in done.stderr
    assert all(
        word in done.stdout for word in ("padded", "truncated", "perplexity", "sample:", "runs/vl-0.15,0.3")
    )
    folder = tmp_path / "runs" / "vl-0.15,0.3"
    picture = {"curves.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "ckpt.pt", "data"} | picture
    assert "what to expect: its loss of" in done.stdout and "on 1 thread" in done.stderr.splitlines()[0]


def test_every_step_can_be_evaluated_and_logged(text, tmp_path):
    """Intervals need not divide each other; the loss in the log is the mean since the last line."""
    for name, log_every, eval_every in (("a", 1, 12), ("b", 5, 3)):
        run(
            resolve(data=text, **SMALL, micro_batch=3),
            tmp_path / name,
            log_every=log_every,
            eval_every=eval_every,
        )
    a, b = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    losses = [line["loss"] for line in a if "loss" in line]
    assert [line["step"] for line in b if "loss" in line] == [3, 5, 6, 9, 10, 12]
    assert [line["step"] for line in b if "val_loss" in line] == [3, 6, 9, 12]
    for line, first in zip([line for line in b if "loss" in line], [0, 3, 5, 6, 9, 10]):
        assert line["loss"] == pytest.approx(
            sum(losses[first : line["step"]]) / (line["step"] - first), abs=2e-4
        )


def test_other_text_is_never_mistaken_for_the_run_s(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("xyz" * 3000)
    settings = {name: resolve(data=path, **SMALL) for name, path in (("text", text), ("other", str(other)))}
    run(settings["text"], tmp_path / "run")
    with pytest.raises(BadInput, match="holds a run"):
        run(settings["text"], tmp_path / "run")
    (tmp_path / "run" / "ckpt.pt").unlink()  # as if that run had died before its first checkpoint
    with pytest.raises(BadInput, match="holds the tokens of"):
        run(settings["other"], tmp_path / "run")
    run(settings["other"], tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "data" / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not an empty folder"):
        run(settings["other"], tmp_path / "run", resume=True)
    with pytest.raises(BadInput, match="does not exist"):
        run(resolve(data=str(tmp_path / "none"), **SMALL), tmp_path / "run", overwrite=True)
    assert load_checkpoint(tmp_path / "run")["settings"]["data"] == str(other)


def test_resume_with_defaults_spelled_out(text, tmp_path):
    out = str(tmp_path / "run")
    base = ["--out", out, "--device", "cpu", "--no-report"]
    module.main(["--objective", "vl", "--data", text, "--length", "32", "--steps", "3", *base])
    with pytest.raises(BadInput, match="--mask"):
        module.main(["--resume", "--mask", "0.1,0.3", "--steps", "5", *base])
    module.main(["--resume", "--mask", "0.15,0.3", "--steps", "5", *base])
    assert load_checkpoint(out)["step"] == 5


@pytest.mark.parametrize("late", [False, True])
def test_a_compiler_that_does_not_work_ends_the_run(text, tmp_path, monkeypatch, late):
    """Rather than training without it, many times slower: whoever wants that says --no-compile."""

    def missing(*_, **__):
        if late:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")
        raise RuntimeError("torch.compile is not supported")

    monkeypatch.setattr(torch, "compile", (lambda *_, **__: missing) if late else missing)
    settings, long = resolve(data=text, **{**SMALL, "steps": 3}), kernels.LONG
    with pytest.raises(BadInput, match="torch.compile does not work here.*--no-compile"):
        run(settings, tmp_path / "run", compiled=True)
    assert kernels.LONG == long and not (tmp_path / "run" / "ckpt.pt").exists()
    assert run(settings, tmp_path / "run", compiled=False, overwrite=True) is not None


def test_other_errors_of_a_compiled_step_stay_what_they_are(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(ZeroDivisionError):
        machine.compiled_loss(True)(None, None, "causal")


def test_the_previous_checkpoint_is_kept_and_offered(text, tmp_path):
    run(resolve(data=text, **SMALL), tmp_path / "run", save_every=5)
    path, previous = tmp_path / "run" / "ckpt.pt", tmp_path / "run" / "ckpt.prev.pt"
    assert (load_checkpoint(path)["step"], load_checkpoint(previous)["step"]) == (12, 10)
    flip_a_weight(path)
    with pytest.raises(BadInput, match=r"not a whole checkpoint.*mv .*ckpt\.prev\.pt .*ckpt\.pt"):
        load_checkpoint(tmp_path / "run")


def test_a_diverging_run_stops_and_keeps_no_broken_checkpoint(text, tmp_path):
    with pytest.raises(BadInput, match="smaller --lr than 1e"):
        run(resolve(data=text, **{**SMALL, "lr": 1e30}), tmp_path / "run")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_an_overwritten_run_forgets_its_text(text, tmp_path):
    run(resolve(data=text, **SMALL), tmp_path / "run")
    run(resolve(**{**SMALL, "steps": 1}), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda content: content.pop("model"), "lacks model"),
        (lambda content: content["settings"].update(foo=1), "foo"),
        (lambda content: content["model"].pop("query"), "another version"),
    ],
)
def test_damaged_checkpoints(text, tmp_path, damage, says):
    run(resolve(data=text, **{**SMALL, "steps": 1}), tmp_path / "run")
    content = load_checkpoint(tmp_path / "run")
    damage(content)
    torch.save(content, tmp_path / "run" / "ckpt.pt")
    with pytest.raises(BadInput, match=says):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        load_run(tmp_path / "run")


# ---------------------------------------------------------------------------- what is easily got wrong


def test_masks_are_the_papers_formula_unless_the_preset_says_otherwise():
    """80/10/10 leaves a tenth of the targets in the input, which small models learn to copy, and no more."""
    assert {resolve(objective=name).mask_rule for name in ("mlm", "vl")} == {"always"}
    assert resolve(objective="mlm", preset="paper").mask_rule == "bert"
    assert resolve(objective="mlm", preset="paper", mask_rule="always").mask_rule == "always"
    assert resolve(preset="paper").mask_rule is None is resolve(objective="mlm", streams=2).mask_rule


@pytest.mark.parametrize(
    "options", [{"objective": "vl"}, {"objective": "dar"}], ids=lambda options: options["objective"]
)
def test_validation_loss_does_not_depend_on_the_micro_batch(text, tmp_path, options):
    """The same sequences and the same f, however many are computed at a time."""
    model = make_small_model(text, tmp_path, **options)
    losses = []
    for micro in (64, 60, 7):
        losses.append(
            module.validation_loss(
                machine.LossModule(model, module.loss_sum),
                *resolve(**options).task(),
                val_set(text, tmp_path),
                torch.device("cpu"),
                machine.Machine(torch.device("cpu")).autocast,
                micro,
                count=130,
            )
        )
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5) and losses[0] > 1


def make_small_model(text, tmp_path, **options):
    run(resolve(data=text, **{**SMALL, "steps": 1}, **options), tmp_path / "small")
    return load_run(tmp_path / "small").model


def val_set(text, tmp_path):
    corpus = load_corpus(text, tmp_path / "small" / "data")
    return Sequences(corpus.train, 32, corpus.tokenizer.separator)


def test_settings_read_back_touch_no_data(tmp_path, monkeypatch):
    """A checkpoint is read where its data is gone, or on a share that hangs."""
    saved = asdict(resolve(objective="vl", data=str(tmp_path), preset="tiny", length=32))

    def touched(*_):
        raise AssertionError("the data was looked at")

    monkeypatch.setattr(settings_module, "is_images", touched)
    assert Settings(**saved).task()[0].mask == (0.15, 0.3)


def test_loading_a_checkpoint_touches_no_data(text, tmp_path, monkeypatch):
    run(resolve(data=text, **{**SMALL, "steps": 1}), tmp_path / "run")
    touched, genuine = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *a, **k: (touched.append(str(path)), genuine(path, *a, **k))[1]
    )
    os.rename(text, text + ".gone")
    assert load_run(tmp_path / "run").settings.data == text
    assert touched and text not in touched


def test_an_edited_text_is_read_again(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdef\n" * 3000)
    settings = resolve(data=str(path), **{**SMALL, "steps": 1})
    run(settings, tmp_path / "run")
    path.write_text("uvwxyz\n" * 3000)
    run(settings, tmp_path / "run", overwrite=True)
    ids = load_corpus(str(path), tmp_path / "run" / "data").train
    assert set(bytes(ids[:70].astype(np.uint8)).decode()) == set("uvwxyz\n")


def test_resume_over_an_edited_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdef\n" * 3000)
    run(resolve(data=str(path), **{**SMALL, "steps": 1}), tmp_path / "run")
    path.write_text("uvwxyz\n" * 3000)
    with pytest.raises(BadInput, match="before it changed"):
        run(resolve(data=str(path), **{**SMALL, "steps": 2}), tmp_path / "run", resume=True)


def test_untrained_is_the_same_architecture_before_its_first_step(text, tmp_path):
    settings = resolve(data=text, objective="vl", **{**SMALL, "steps": 8})
    run(settings, tmp_path / "run")
    trained, fresh = load_run(tmp_path / "run"), load_run(f"untrained:{tmp_path / 'run'}")
    torch.manual_seed(0)
    expected = type(trained.model)(trained.model.config).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in fresh.model.state_dict().items())
    assert not torch.equal(fresh.model.query, trained.model.query) and fresh.step == 0
    assert fresh.settings == trained.settings and fresh.objective == trained.objective and fresh.text
    assert fresh.folder == trained.folder == tmp_path / "run" and fresh.name == f"untrained:{trained.name}"
    other = runs.untrained(trained, 1)
    assert not torch.equal(other.model.query, fresh.model.query) and not other.model.training


def test_a_run_that_is_not_there_suggests_one_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vl-0.15,0.3", "dar-t2", "half"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "half":
            (tmp_path / "runs" / name / "ckpt.pt").write_bytes(b"")
    for typed, meant in (
        ("runs/vl", "runs/vl-0.15,0.3"),
        ("runs/dar-t3", "runs/dar-t2"),
        ("vl", "runs/vl-0.15,0.3"),
    ):
        with pytest.raises(BadInput, match=f"{typed} does not exist; did you mean {meant}"):
            load_run(typed)
    for typed in ("runs/half", "nothing/like/it"):
        with pytest.raises(BadInput, match="does not exist; train.py writes it"):
            load_run(typed)


# ---------------------------------------------------------------------------- what a run tells


def test_the_first_loss_comes_at_once_and_then_ever_more_rarely(text, tmp_path, capsys, monkeypatch):
    now = [0.0]
    genuine = module.update

    def slow(*args, **kwargs):
        now[0] += 3.0  # seconds for a step
        return genuine(*args, **kwargs)

    monkeypatch.setattr(module, "update", slow)
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    train(
        resolve(data=text, **{**SMALL, "steps": 60}),
        tmp_path / "run",
        device="cpu",
        dtype="fp32",
        log_every=1,
    )
    said = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert said == [1, 2, 4, 8, 16, 32, 52, 60]  # doubling, then every minute, and the validation loss
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 61), 60]


@pytest.mark.parametrize("got, notes", [(0.4, 1), (1.9, 0)])
def test_threads_that_wait_for_each_other_are_noted_once(text, tmp_path, capsys, monkeypatch, got, notes):
    """got: processors that two threads had the use of."""
    now, genuine = [0.0], module.update

    def slow(*args, **kwargs):
        now[0] += 3.0
        return genuine(*args, **kwargs)

    monkeypatch.setattr(module, "update", slow)
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(log.time, "process_time", lambda: got * now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    train(resolve(data=text, **SMALL), tmp_path / "run", device="cpu", dtype="fp32", log_every=1)
    assert capsys.readouterr().err.count("wait for each other") == notes


@pytest.mark.parametrize(
    "count, busy, asked, threads",
    [
        (8, 0.2, None, 8),
        (8, 3.1, None, 5),
        (8, 20.0, None, 1),
        (2, 0.9, None, 1),
        (2, 9.0, "2", 2),
        (1, 0.0, None, 1),
    ],
)
def test_threads_leave_processors_to_other_work(monkeypatch, count, busy, asked, threads):
    monkeypatch.setattr(machine, "processors", lambda: count)
    monkeypatch.setattr(machine, "busy_processors", lambda: busy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert machine.free_threads() == threads


def test_processors_are_real():
    assert 1 <= machine.processors() <= os.cpu_count()
    assert 0 <= machine.busy_processors(0.01) <= os.cpu_count()


def test_threads_are_kept_in_the_checkpoint_for_resuming(text, tmp_path):
    before = torch.get_num_threads()
    try:
        run(resolve(data=text, **{**SMALL, "steps": 1}), tmp_path / "run", threads=2)
        torch.set_num_threads(1)
        run(resolve(data=text, **{**SMALL, "steps": 2}), tmp_path / "run", resume=True)
        assert torch.get_num_threads() == 2 and load_checkpoint(tmp_path / "run")["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_tensorboard_gets_every_line(text, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setattr(module, "import_optional", lambda name: None)
    monkeypatch.setattr(log, "import_optional", lambda name: SimpleNamespace(SummaryWriter=Writer))
    run(resolve(data=text, **SMALL), tmp_path / "run", log_every=6, tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written[0] == (str(tmp_path / "run"), 1) and written[-1] == "closed"
    assert written[1:-1] == [
        (name, value, line["step"]) for line in lines for name, value in line.items() if name != "step"
    ]


def test_tensorboard_that_is_not_installed_is_said_before_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadInput, match="pip install tensorboard"):
        run(resolve(data=text, **SMALL), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- Muon


def test_muon_makes_steps_orthogonal_and_leaves_the_rest_to_adamw(make_model):
    model = make_model(dtype=torch.float32)
    settings = resolve(optimizer="muon", weight_decay=0.0)
    optimizer = steps.make_optimizer(model, settings)
    steps.set_rate(optimizer, 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.grad = with_values_from(0.1, torch.randn_like(p)) if p.dim() == 2 else torch.ones_like(p)
    steps.take_step(optimizer, torch.zeros(()))
    for name, p in model.named_parameters():
        change = (before[name] - p.detach()) / 0.01
        if p.dim() == 2 and "blocks." in name:
            values = torch.linalg.svdvals(change) / (muon.RATE * 0.2 * max(change.shape) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.2, name  # those of the gradient were 0.1 to 1
        else:
            assert torch.allclose(change.abs(), torch.ones_like(change), atol=1e-3), name


def with_values_from(least, matrix):
    """A matrix with the singular vectors of this one and singular values from `least` to 1."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(torch.linspace(least, 1, len(s))) @ v


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(make_model, optimizer):
    model = make_model(dtype=torch.float32)
    optimizer = steps.make_optimizer(model, resolve(optimizer=optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    steps.take_step(optimizer, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
