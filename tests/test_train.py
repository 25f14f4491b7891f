"""Training learns, repeats and resumes exactly, stops cleanly, and schedules what the protocol says."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LITTLE, call, logged, seeded

import evaluate
import train as module
from data import Sequences, load_corpus
from objectives import draw_batch, from_options, loss_sum
from run import held_out_text, load_checkpoint, load_examples, load_run, resolve
from train import LossModule, batch_sizes, learning_rate, make_optimizer, steps_for, update, validation_loss
from util import BadInput

ROOT = Path(module.__file__).parent
SMALL = {"length": 32, "batch_size": 8, "steps": 12, "lr": 2e-3}


def train(settings, out, **how):
    """In the way that repeats bit for bit."""
    return module.train(settings, out, device="cpu", dtype="fp32", threads=1, quiet=True, **how)


@pytest.fixture
def text(tmp_path):
    """A text that repeats with a period of 7 bytes: easy to learn from any context."""
    path = tmp_path / "period.txt"
    path.write_text("abcdef\n" * 1000)
    return str(path)


# ---------------------------------------------------------------------------- learning

@pytest.mark.parametrize("objective, steps", [("ar", 50), ("dar", 70), ("vl", 100)])
def test_a_period_is_learned(objective, steps, text, tmp_path):
    """Whoever sees any other token knows this one; the unigram entropy is log 7 = 1.95."""
    settings = resolve(objective=objective, data=text, length=16, batch_size=16, steps=steps, lr=2e-2)
    assert train(settings, tmp_path / "run") < 1.2


def test_flat_images_are_learned(tmp_path):
    """Images of one colour each: any patch tells all others, and guessing the mean gives a loss of 1."""
    image, folder = pytest.importorskip("PIL.Image"), tmp_path / "flat"
    folder.mkdir()
    for i, colour in enumerate(np.random.default_rng(0).integers(0, 256, (120, 3)).tolist()):
        image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{i}.png")
    settings = resolve(objective="vl", data=folder, steps=60, lr=1e-2, size=8, patch=4, batch_size=16)
    assert train(settings, tmp_path / "run") < 0.2


def test_the_command_line_end_to_end(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"train.py --objective vl --steps 5 --length 16 --batch-size 8 --threads 1 --data {text}"
    assert "perplexity" in call(line) and "validation loss" in capsys.readouterr().err
    folder = tmp_path / "runs" / "vl-0.15,0.3"
    assert {"config.json", "metrics.jsonl", "ckpt.pt"} == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["steps"] == 5
    monkeypatch.setattr(evaluate, "report", lambda *_: math.exp(1000))
    call(f"{line} --overwrite")
    assert "note: no report" in capsys.readouterr().err


def test_what_fills_up_a_text_is_not_learned(tmp_path):
    """33 tokens are a sequence of 32 and a token that is no target: the loss is that of the sequence."""
    (tmp_path / "34.txt").write_text("abcdefghijklmnopqrstuvwxyz01234567")  # of its 35 tokens 2 are held out
    settings = resolve(data=str(tmp_path / "34.txt"), length=32, batch_size=2, steps=1)
    train(settings, tmp_path / "run", log_every=1)
    line, = logged(tmp_path / "run")
    model, tokens = load_run(f"untrained:{tmp_path / 'run'}").model, load_examples(settings, "causal")[1]
    first = next(row for row, n in zip(tokens.batch(0, 2), tokens.lengths(0, 2)) if n == 32)
    batch = draw_batch(from_options("ar"), "causal", first[None], 257)
    assert line["loss"] == pytest.approx(loss_sum(model, batch, "causal").item() / 31, abs=2e-4)


# ---------------------------------------------------------------------------- repeating and resuming

@pytest.mark.parametrize("options", [
    {"objective": "ar", "optimizer": "adamw"}, {"objective": "dar"}, {"objective": "vl", "mask_rule": "bert"},
    {"objective": "dar", "t": (1, 2), "data": "shapes"},
    {"objective": "vl", "optimizer": "adamw", "data": "shapes"}],
    ids=lambda options: "-".join([options["objective"], options.get("data", "text")]))
def test_an_interrupted_run_resumes_bit_for_bit(options, text, tmp_path, monkeypatch):
    """It dies right after its first checkpoint. Weights, optimizer and lines are the same, with accumulated
    gradients, a batch ramp, and an epoch that ends between the two halves."""
    size = {"size": 8, "patch": 4} if "data" in options else {"length": 32}
    settings = resolve(**{"data": text, **options, **size}, steps=20, batch_size=25, micro_batch=7,
                       batch_ramp=0.5)
    how = {"save_every": 7, "log_every": 3}
    train(settings, tmp_path / "whole", **how)

    def save_then_die(path, content, save=module.save_checkpoint):
        save(path, content)
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module, "save_checkpoint", save_then_die)
        train(settings, tmp_path / "parts", **how)
    assert load_checkpoint(tmp_path / "parts")["step"] == 7
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1}\n{"step": 9, "lo')  # what was not saved, and a line cut off
    train(settings, tmp_path / "parts", resume=True, **how)

    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 20 and whole["seen"] == parts["seen"]
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    for name, a in whole["optimizer"]["state"].items():
        b = parts["optimizer"]["state"][name]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = [[{key: value for key, value in line.items() if "second" not in key} for line in logged(out)]
             for out in (tmp_path / "whole", tmp_path / "parts")]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [3, 6, 7, 9, 12, 14, 15, 18, 20]
    run = load_run(tmp_path / "whole")
    assert run.settings == settings and (run.tokenizer is None) == ("data" in options)


def test_a_killed_process_goes_on(text, tmp_path):
    """kill -9 while it trains leaves a whole checkpoint, and --resume ends where an undisturbed run does.

    That nobody reads what it says does not stop it. What only some runs need is not imported at its start."""
    line = (f"train.py --objective dar --data {text} --length 16 --steps 60 --batch-size 4 --log-every 1 "
            "--save-every 10 --device cpu --dtype fp32 --threads 1 --no-report --out")
    code = (f"import sys, model, train; model.SIZES['tiny'] = {LITTLE}\n"
            "sys.stderr = train.PatientStderr(sys.stderr)\n"
            "assert not {'matplotlib', 'evaluate', 'torch.distributed.checkpoint'} & sys.modules.keys()\n"
            "train.main()")
    process = subprocess.Popen([sys.executable, "-c", code, *line.split()[1:], tmp_path / "killed"], cwd=ROOT,
                               stderr=subprocess.PIPE)
    process.stderr.close()
    while not (tmp_path / "killed" / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(tmp_path / "killed")["step"] < 60
    call(f"{line} {tmp_path / 'killed'} --resume")
    call(f"{line} {tmp_path / 'whole'}")
    whole, killed = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert [line["step"] for line in logged(tmp_path / "killed")] == list(range(1, 61))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(number, text, tmp_path, monkeypatch, capsys):
    """The step under way is finished and saved. The line on how to go on repeats the flags, and works."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as if without nohup

    def rate(settings, progress):
        if progress >= 0.5:
            signal.raise_signal(number)
        return 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate", rate)
        call(f"train.py --data {text} --length 32 --batch-size 8 --steps 12 --log-every 5 --device cpu "
             f"--threads 1 --no-report --out {tmp_path / 'run'}")
    assert load_checkpoint(tmp_path / "run")["step"] == 7 and logged(tmp_path / "run")[-1]["step"] == 7
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_DFL
    call(capsys.readouterr().err.split("go on with: python ")[1])
    assert load_checkpoint(tmp_path / "run")["step"] == 12
    assert [line["step"] for line in logged(tmp_path / "run")] == [5, 7, 10, 12]


def test_a_thread_trains_and_nohup_is_left_alone(text, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with module.stop_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor() as pool:
        pool.submit(train, resolve(data=text, **{**SMALL, "steps": 2}), tmp_path / "run").result()
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_the_budget_may_change_on_resume(text, tmp_path):
    """Also of a run by epochs. What may not change stands in test_wrong_use.py."""
    out = tmp_path / "run"
    line = f"train.py --device cpu --dtype fp32 --threads 1 --no-report --out {out}"
    call(f"{line} --objective vl --data {text} --length 32 --batch-size 64 --epochs 1 --lr 0.001")
    assert load_checkpoint(out)["step"] == math.ceil(6651 / 32 / 64)
    call(f"{line} --resume --steps 20 --lr 0.001 --mask 0.15,0.3")
    assert load_checkpoint(out)["step"] == 20


def test_an_overwritten_run_goes_when_the_new_one_has_saved(text, tmp_path, monkeypatch):
    """A run that fails before leaves the old one whole: its settings, its log and its checkpoint."""
    out, names = tmp_path / "run", ("ckpt.pt", "config.json", "metrics.jsonl")
    train(resolve(data=text, **{**SMALL, "steps": 2}), out, log_every=1)
    before = [(out / name).read_bytes() for name in names]
    for settings in ({"data": text, "lr": 1e30}, {"data": str(tmp_path / "none.txt")}):
        with pytest.raises(BadInput):
            train(resolve(**{**SMALL, **settings}), out, overwrite=True)
        assert [(out / name).read_bytes() for name in names] == before
    train(resolve(data=text, **SMALL), out, overwrite=True, log_every=1, save_every=5)
    assert load_checkpoint(out)["step"] == 12 and json.loads((out / "config.json").read_text())["steps"] == 12
    assert [line["step"] for line in logged(out)] == [*range(1, 13)]
    assert {path.name for path in out.iterdir()} == set(names)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "ckpt.pt", "completed.png"])
def test_what_train_did_not_write_stays(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('{"precious": 1}')
    for out in (".", "sub/.."):
        with pytest.raises(BadInput, match=r"ckpt.pt|holds a run" if name == "ckpt.pt" else name):
            call(f"train.py --data {text} --steps 1 --device cpu --overwrite --out {out}")
    assert (tmp_path / name).read_text() == '{"precious": 1}' and len([*tmp_path.iterdir()]) == 2


def test_a_folder_that_cannot_be_written_or_is_in_use_is_refused_before_the_work(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_examples", None)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("link", "link/run", "period.txt", "period.txt/run"):
        with pytest.raises(BadInput, match="written"):
            train(resolve(data=text), tmp_path / out)
    with open(tmp_path / "metrics.jsonl", "a") as metrics, pytest.raises(BadInput, match="another training"):
        module.lock(metrics)
        train(resolve(data=text), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"period.txt", "link", "metrics.jsonl"}


def test_of_two_runs_that_start_at_once_the_second_is_refused(text, tmp_path, monkeypatch):
    """Also where the first one has already ended when the second one has read its data."""
    def load(*args):
        monkeypatch.undo()
        train(settings, tmp_path / "run")
        return load_examples(*args)

    settings = resolve(data=text, **{**SMALL, "steps": 2})
    monkeypatch.setattr(module, "load_examples", load)
    with pytest.raises(BadInput, match="another training"):
        train(settings, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("environment, fits", [("WORLD_SIZE=2", False), ("WORLD_SIZE=2 RANK=0", False),
                                               ("WORLD_SIZE=", True), ("RANK=3", True)])
def test_several_processes_need_torchrun(environment, fits, text, tmp_path, monkeypatch):
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    with nullcontext() if fits else pytest.raises(BadInput, match="torchrun"):
        train(resolve(data=text, **{**SMALL, "steps": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "ckpt.pt").exists() == fits


def test_a_run_finds_its_data_from_any_folder_and_notices_when_it_has_changed(text, tmp_path, monkeypatch):
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "book.txt").write_text(f"{folder.name} lies a book of its own. " * 400)
    monkeypatch.chdir(tmp_path / "here")
    train(resolve(data="book.txt", **{**SMALL, "steps": 1}), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")
    held_out = held_out_text(load_run(tmp_path / "run"))
    assert np.array_equal(held_out.val, load_corpus(str(tmp_path / "here" / "book.txt")).val)
    train(resolve(data="../here/book.txt", **{**SMALL, "steps": 2}), tmp_path / "run", resume=True)
    (tmp_path / "here" / "book.txt").write_text("another book. " * 400)
    with pytest.raises(BadInput, match="is not the text"):
        held_out_text(load_run(tmp_path / "run"))


def test_a_checkpoint_is_a_regular_file_that_holds_what_it_unpacks_to(trained, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with (zipfile.ZipFile(trained("ar") / "ckpt.pt") as whole,
          zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    content = torch.load(trained("ar") / "ckpt.pt", weights_only=True)
    content["model_config"]["width"] = 1 << 30
    torch.save(content, tmp_path / "huge.pt")
    for path, words in ((tmp_path / "fifo", "regular"), ("/dev/zero", "regular"),
                        (tmp_path / "small.pt", "compressed"), (tmp_path / "huge.pt", "whole")):
        with pytest.raises(BadInput, match=words):
            load_run(path)


def test_what_is_not_finite_is_never_saved(text, tmp_path, monkeypatch):
    """Neither a loss that diverged, nor weights that the gradient of the very last step has ruined."""
    with pytest.raises(BadInput, match="smaller --lr"):
        train(resolve(data=text, **{**SMALL, "lr": 1e30}), tmp_path / "diverged", save_every=2)
    assert not (tmp_path / "diverged" / "ckpt.pt").exists()
    steps = itertools.count(1)

    def ruin(*args):
        loss, norm = update(*args)
        return loss, norm * (math.nan if next(steps) == 6 else 1)

    with monkeypatch.context() as patch, pytest.raises(BadInput, match="gradient"):
        patch.setattr(module, "update", ruin)
        train(resolve(data=text, **SMALL), tmp_path / "norm", save_every=2)
    monkeypatch.setattr(module, "validation_loss", lambda *_: math.inf)
    with pytest.raises(BadInput, match="validation"):
        train(resolve(data=text, **SMALL), tmp_path / "validation", save_every=4, eval_every=6)
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("norm", "validation")] == [4, 4]
    assert all(math.isfinite(x) for line in logged(tmp_path / "norm") for x in line.values())


# ---------------------------------------------------------------------------- one step

def test_micro_batches_and_intervals_change_no_step(text, tmp_path):
    """Gradients add up to those of the whole batch; a loss in the log is the mean since the last line."""
    train(resolve(data=text, objective="vl", **SMALL, micro_batch=3), tmp_path / "each", log_every=1)
    how = {"log_every": 5, "eval_every": 3, "save_every": 4}
    train(resolve(data=text, objective="vl", **SMALL), tmp_path / "some", **how)
    each, some = (load_checkpoint(tmp_path / name)["model"] for name in ("each", "some"))
    assert all(torch.allclose(each[name], some[name], atol=2e-5) for name in each)
    losses, lines = [line["loss"] for line in logged(tmp_path / "each")], logged(tmp_path / "some")
    assert [line["step"] for line in lines] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 9, 12]
    for first, line in zip([0, 3, 4, 5, 6, 8, 9, 10], lines):
        assert line["loss"] == pytest.approx(np.mean(losses[first:line["step"]]), abs=2e-4)


def test_validation_loss_is_the_mean_over_its_targets(make_model):
    """For every micro-batch, the plain mean over batches that are drawn with seed 0, 64 at a time.

    What fills up the last sequence does not count, and a text without a target has no loss."""
    model, objective = make_model(vocab=11, dtype=torch.float32), from_options("vl")
    tokens, cpu = np.random.default_rng(0).integers(0, 10, 8 * 130 - 5), torch.device("cpu")
    sequences, loss_module = Sequences(tokens, 8, 10), LossModule(model, loss_sum)
    found = [validation_loss(loss_module, objective, "mask", sequences, cpu, nullcontext, micro, 130)
             for micro in (64, 60, 7)]
    generator, losses, count = seeded(), 0.0, 0.0
    for first in (0, 64, 128):
        batch = draw_batch(objective, "mask", sequences.batch(first, min(64, 130 - first)), 11, generator)
        if first == 128:
            batch.weight[-1] *= batch.targets[-1] < 3
        losses, count = losses + loss_sum(model, batch, "mask").item(), count + batch.weight.sum().item()
    assert found == pytest.approx([losses / count] * 3, rel=1e-5)
    one, ar = Sequences(tokens[:1], 8, 10), from_options("ar")
    with pytest.raises(BadInput, match="too few"):
        validation_loss(loss_module, ar, "causal", one, cpu, nullcontext, 7)


def test_clipping_and_rates():
    """The norm is that before clipping; every group gets the schedule's rate, or its multiple of it."""
    class Linear(torch.nn.Linear):
        def forward(self, batch, path):  # its gradient is (3, 4)
            return (self.weight * torch.tensor([3.0, 4.0])).sum()

    for clip, kept in ((0, 5.0), (10, 5.0), (1, 1.0)):
        linear = Linear(2, 1, bias=False)
        before = linear.weight.detach().clone()
        optimizer = torch.optim.SGD([{"params": [linear.weight], "scale": 0.5}], lr=7.0)
        _, norm = update(linear, optimizer, [torch.zeros(1)], 1.0, "", nullcontext, clip, 0.2)
        assert norm == 5 and (before - linear.weight).norm().item() == pytest.approx(0.1 * kept, rel=1e-4)


def test_muon_makes_steps_orthogonal_and_leaves_the_rest_to_adamw(make_model):
    model = make_model(dtype=torch.float32)
    optimizer = make_optimizer(model, resolve(optimizer="muon", weight_decay=0.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("scale", 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        u, s, v = torch.linalg.svd(torch.randn_like(p) if p.dim() == 2 else torch.eye(2), full_matrices=False)
        gradient = u @ torch.diag(torch.linspace(0.1, 1, len(s))) @ v  # singular values from 0.1 to 1
        p.grad = gradient if p.dim() == 2 else torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        change = (before[name] - p.detach()) / 0.01
        if p.dim() == 2 and "blocks." in name:
            values = torch.linalg.svdvals(change) / (module.Muon.RATE * 0.2 * max(change.shape) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.2, name
        else:
            assert torch.allclose(change.abs(), torch.ones_like(change), atol=1e-3), name


@pytest.mark.parametrize("name, path", [("ar", "causal"), ("vl", "mask"), ("mtp", "two-stream"),
                                        ("vl", "mae")])
def test_one_graph_for_each_shape(name, path, make_model, make_image_model):
    """A ramped batch in micro-batches: as many graphs as its chunks have sizes, none anew, and no break."""
    graphs, images, generator = [], path == "mae", seeded()
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_image_model(path).float() if images else make_model(length=9, dtype=torch.float32)
    loss_module = LossModule(model, torch.compile(loss_sum, dynamic=False, fullgraph=True, backend=backend))
    optimizer = make_optimizer(model, resolve())
    for size in (2, 3, 2):
        tokens = (torch.rand(size, 9, 48, generator=generator) if images
                  else torch.randint(11, (size, 9), generator=generator))
        batch = draw_batch(from_options(name), path, tokens, 11, generator)
        batches, count = [batch.part(k, k + 2) for k in range(0, size, 2)], batch.total[0].item()
        expected = sum(loss_sum(model, part, path).item() for part in batches) / count
        loss, norm = update(loss_module, optimizer, batches, count, path, nullcontext, 0.5, 1e-3)
        assert loss == pytest.approx(expected) and norm.isfinite()
    assert len(graphs) == 2  # chunks of 2 and 1
    torch._dynamo.reset()


# ---------------------------------------------------------------------------- schedules, settings, runs

def test_schedules_of_rate_and_batch():
    triangle, cosine = resolve(lr=1.0), resolve(lr=1.0, schedule="cosine", warmup=0.1)
    rates = [learning_rate(triangle, p) for p in (0, 0.375, 0.75, 0.875, 1)]
    assert rates == pytest.approx([0.25, 0.625, 1, 0.5, 0])
    rates = [learning_rate(cosine, p) for p in (0, 0.05, 0.1, 0.325, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0])
    ramp = resolve(batch_size=100, batch_ramp=0.6)
    sizes = batch_sizes(ramp, 100)
    assert sizes[0] == 7 and sizes[60:] == [100] * 40 and sizes == sorted(sizes) and len(set(sizes)) == 16
    assert batch_sizes(resolve(batch_size=7), 3) == [7, 7, 7]
    for sequences in (1, 999, 10_000):
        steps = steps_for(ramp, sequences)
        assert sum(batch_sizes(ramp, steps)) >= sequences > sum(batch_sizes(ramp, steps - 1))


def test_presets_resolve():
    """The paper preset is the paper's; masks are its formula, 80/10/10 comes with its size alone."""
    paper = resolve(preset="paper", objective="mlm")
    assert (paper.batch_size, paper.steps, paper.lr, paper.length) == (8192, 100_000, 1e-3, 128)
    assert (paper.batch_ramp, paper.clip, paper.weight_decay, paper.schedule) == (0.6, 0.5, 0.01, "triangle")
    assert paper.mask_rule == "bert" and resolve(objective="vl").mask_rule == "always"
    assert resolve(preset="paper").mask_rule is None is resolve(objective="mlm", streams=2).mask_rule
    assert resolve(data="shapes", objective="vl").options == {"mask": (0.5, 0.75)}
    assert resolve(data="toy").length == 8 and resolve(preset="vit-small", steps=3).epochs is None
    for preset in ("tiny", "mini", "small", "base", "paper", "vit-tiny", "vit-small", "vit-base"):
        assert resolve(preset=preset).task()[1] == "causal"


def test_a_checkpoint_of_an_earlier_version_is_evaluated_and_not_resumed(trained, tmp_path):
    """Settings that are gone are ignored, and the optimizer's state had other keys."""
    content = torch.load(trained("vl --mask 0.2,0.4") / "ckpt.pt", weights_only=True)
    content["settings"]["norm_pix"], content["model_config"]["norm_pix"] = None, False
    del content["total"], content["budget"]
    torch.save(content, tmp_path / "ckpt.pt")
    run = load_run(tmp_path)
    assert run.objective.mask == (0.2, 0.4) and run.path == "mask" and run.tokenizer.vocab == 257
    with pytest.raises(BadInput, match="earlier version"):
        train(run.settings, tmp_path, resume=True)


def test_untrained_is_the_run_before_its_first_step(trained):
    run, fresh = load_run(trained("ar")), load_run(f"untrained:{trained('ar')}")
    torch.manual_seed(run.settings.seed)
    expected = type(run.model)(run.model.config).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in fresh.model.state_dict().items())
    assert not torch.equal(fresh.model.embedding.weight, run.model.embedding.weight)
    assert (fresh.step, fresh.settings, fresh.objective) == (0, run.settings, run.objective)


def test_tensorboard_gets_every_line(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(resolve(data=text, **SMALL), tmp_path / "run", log_every=6, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    found = [(event.step, round(event.value, 4)) for event in board.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in logged(tmp_path / "run")]
