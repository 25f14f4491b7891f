"""Training learns, repeats and resumes exactly, stops cleanly, and schedules what the protocol says."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LITTLE, call

import train as module
from data import Sequences
from model import Config, Transformer
from objectives import choose_path, draw_batch, from_options, loss_sum
from run import (
    PRESETS,
    choose_autocast,
    evaluation_sequences,
    held_out_text,
    load_checkpoint,
    load_run,
    resolve,
    warmup_cosine,
)
from train import (
    LossModule,
    batch_sizes,
    chunks,
    learning_rate,
    make_optimizer,
    steps_for,
    update,
    validation_loss,
)
from util import BadInput

ROOT = Path(module.__file__).parent
CPU = torch.device("cpu")
SMALL = {"length": 32, "batch_size": 8, "steps": 12, "lr": 2e-3}


def train(settings, out, **how):
    """In the way that repeats bit for bit."""
    return module.train(settings, out, device="cpu", dtype="fp32", threads=1, quiet=True, **how)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def text(tmp_path):
    """A text that repeats with a period of 7 bytes: easy to learn from any context."""
    path = tmp_path / "period.txt"
    path.write_text("abcdef\n" * 3000)
    return str(path)


# ---------------------------------------------------------------------------- learning

@pytest.mark.parametrize("objective, steps", [("ar", 60), ("dar", 100), ("vl", 140)])
def test_a_period_is_learned(objective, steps, text, tmp_path):
    """Whoever sees any other token knows this one; the unigram entropy is log 7 = 1.95."""
    settings = resolve(objective=objective, data=text, length=16, batch_size=16, steps=steps, lr=2e-2)
    assert train(settings, tmp_path / "run") < 1


def test_flat_images_are_learned(tmp_path):
    """Images of one colour each: any patch tells all others, and guessing the mean gives a loss of 1."""
    image = pytest.importorskip("PIL.Image")
    colours = np.random.default_rng(0).integers(0, 256, (120, 3))
    for side, part in (("train", colours[:100]), ("val", colours[100:])):
        (tmp_path / "flat" / side).mkdir(parents=True)
        for i, colour in enumerate(part):
            image.new("RGB", (8, 8), tuple(colour.tolist())).save(tmp_path / "flat" / side / f"{i}.png")
    settings = resolve(objective="vl", data=str(tmp_path / "flat"), size=8, patch=4, steps=80, batch_size=16,
                       lr=1e-2)
    assert train(settings, tmp_path / "run") < 0.2


def test_the_command_line_end_to_end(text, tmp_path, monkeypatch, capsys):
    """It trains, reports, and leaves a run folder."""
    monkeypatch.chdir(tmp_path)
    shown = call(f"train.py --objective vl --steps 5 --length 16 --batch-size 8 --threads 1 --data {text}")
    assert "validation loss" in capsys.readouterr().err and "perplexity" in shown
    folder = tmp_path / "runs" / "vl-0.15,0.3"
    assert {"config.json", "metrics.jsonl", "ckpt.pt"} == {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["steps"] == 5


# ---------------------------------------------------------------------------- repeating and resuming

class Killed(Exception):
    pass


def interrupted_run_is_exact(settings, tmp_path, monkeypatch):
    """Stop a run right after its first checkpoint and resume it: weights, optimizer, lines are the same."""
    how = {"save_every": 7, "log_every": 3}
    train(settings, tmp_path / "whole", **how)

    def save_then_die(path, content, save=module.save_checkpoint):
        save(path, content)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_checkpoint", save_then_die)
        train(settings, tmp_path / "parts", **how)
    assert load_checkpoint(tmp_path / "parts")["step"] == 7
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1}\n{"step": 9, "lo')  # what was not saved, and a line cut off
    train(settings, tmp_path / "parts", resume=True, **how)

    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 20 and whole["seen"] == parts["seen"]
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    for a, b in ((whole["optimizer"]["state"][name], parts["optimizer"]["state"][name])
                 for name in whole["optimizer"]["state"]):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    lines = [[{key: value for key, value in line.items() if "second" not in key} for line in metrics(out)]
             for out in (tmp_path / "whole", tmp_path / "parts")]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [3, 6, 7, 9, 12, 14, 15, 18, 20]


@pytest.mark.parametrize("options", [{"objective": "ar", "optimizer": "adamw"}, {"objective": "dar"},
                                     {"objective": "vl", "mask_rule": "bert"}],
                         ids=lambda options: options["objective"])
def test_an_interrupted_run_resumes_bit_for_bit(options, text, tmp_path, monkeypatch):
    """With accumulated gradients, a batch ramp, and an epoch that ends between the two halves."""
    settings = resolve(data=text, length=32, steps=20, batch_size=60, micro_batch=16, batch_ramp=0.5,
                       **options)
    interrupted_run_is_exact(settings, tmp_path, monkeypatch)


@pytest.mark.parametrize("options", [{"objective": "dar", "t": (1, 2)},
                                     {"objective": "vl", "optimizer": "adamw"}],
                         ids=lambda options: options["objective"])
def test_so_does_one_on_images(options, tmp_path, monkeypatch):
    settings = resolve(data="shapes", size=8, patch=4, steps=20, batch_size=25, micro_batch=16,
                       batch_ramp=0.5, **options)
    interrupted_run_is_exact(settings, tmp_path, monkeypatch)
    run = load_run(tmp_path / "whole")
    assert run.tokenizer is None and run.model.config.length == 4 and run.settings == settings


def test_a_killed_process_goes_on(text, tmp_path):
    """kill -9 while it trains leaves a whole checkpoint, and --resume ends where an undisturbed run does."""
    line = (f"train.py --objective dar --data {text} --length 16 --steps 60 --batch-size 4 --log-every 1 "
            "--save-every 2 --device cpu --dtype fp32 --threads 1 --no-report --out")
    code = f"import model; model.SIZES['tiny'] = {LITTLE}; import train; train.main()"  # as small as in tests
    process = subprocess.Popen([sys.executable, "-c", code, *line.split()[1:], tmp_path / "killed"], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_checkpoint(tmp_path / "killed")["step"] < 60
    call(f"{line} {tmp_path / 'killed'} --resume")
    call(f"{line} {tmp_path / 'whole'}")
    whole, killed = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 61))


def test_a_signal_saves_and_stops(text, tmp_path, monkeypatch):
    """The step under way is finished and saved; the run goes on from there."""
    before = signal.getsignal(signal.SIGINT)

    def rate(settings, progress):
        if progress >= 0.5:
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate", rate)
        assert train(resolve(data=text, **SMALL), tmp_path / "run") is None
    assert load_checkpoint(tmp_path / "run")["step"] == 7 and metrics(tmp_path / "run")[-1]["step"] == 7
    assert signal.getsignal(signal.SIGINT) is before
    assert train(resolve(data=text, **SMALL), tmp_path / "run", resume=True) > 0


def test_what_may_change_on_resume(text, tmp_path):
    """The budget may, also of a run by epochs; settings, data and tokenizer may not."""
    out = tmp_path / "run"
    line = f"train.py --device cpu --dtype fp32 --threads 1 --no-report --out {out}"
    call(f"{line} --objective vl --data {text} --length 32 --batch-size 64 --epochs 1 --lr 0.001")
    assert load_checkpoint(out)["step"] == math.ceil(20_000 / 32 / 64)
    before = (out / "ckpt.pt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("abcdef\n" * 2999)
    for flags in ("", "--resume", "--resume --steps 20 --lr 0.5", "--resume --steps 20 --objective dar",
                  "--resume --steps 20 --mask 0.1,0.3", f"--resume --steps 20 --data {other}",
                  "--resume --steps 20 --overwrite", "--overwrite --data no.txt"):
        with pytest.raises(BadInput):
            call(f"{line} {flags}")
        assert (out / "ckpt.pt").read_bytes() == before
    call(f"{line} --resume --steps 20 --lr 0.001 --mask 0.15,0.3")
    assert load_checkpoint(out)["step"] == 20


def test_a_run_that_overwrites_another_first_removes_its_checkpoint(text, tmp_path, monkeypatch):
    """Were it killed before its own, --resume would go on with the wrong run."""
    train(resolve(data=text, **{**SMALL, "steps": 2}), tmp_path / "run")

    def die(*_):
        raise Killed

    monkeypatch.setattr(module, "update", die)
    with pytest.raises(Killed):
        train(resolve(data=text, **SMALL), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "ckpt.pt").exists() and metrics(tmp_path / "run") == []


def test_what_is_not_finite_is_never_saved(text, tmp_path, monkeypatch):
    """Neither a loss that diverged, nor weights that the gradient of the very last step has ruined."""
    with pytest.raises(BadInput, match="smaller --lr"):
        train(resolve(data=text, **{**SMALL, "lr": 1e30}), tmp_path / "diverged", save_every=2)
    assert not (tmp_path / "diverged" / "ckpt.pt").exists()
    steps = itertools.count(1)

    def ruin(*args):
        loss, norm = update(*args)
        return loss, norm * (math.nan if next(steps) == 6 else 1)

    monkeypatch.setattr(module, "update", ruin)
    with pytest.raises(BadInput, match="smaller --lr"):
        train(resolve(data=text, **SMALL), tmp_path / "ruined", save_every=2)
    assert load_checkpoint(tmp_path / "ruined")["step"] == 4


# ---------------------------------------------------------------------------- one step

def test_accumulated_gradients_equal_the_whole_batch(text, tmp_path):
    for name, micro in (("whole", 64), ("parts", 5)):
        settings = resolve(data=text, objective="vl", **{**SMALL, "steps": 3}, micro_batch=micro)
        train(settings, tmp_path / name)
    whole, parts = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.allclose(whole[name], parts[name], atol=2e-5) for name in whole)


def test_intervals_need_not_divide_each_other(text, tmp_path):
    """The loss in the log is the mean since the last line."""
    settings = resolve(data=text, **SMALL, micro_batch=3)
    train(settings, tmp_path / "each", log_every=1)
    train(settings, tmp_path / "some", log_every=5, eval_every=3, save_every=4)
    losses = [line["loss"] for line in metrics(tmp_path / "each")]
    lines = metrics(tmp_path / "some")
    assert [line["step"] for line in lines] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 9, 12]
    for first, line in zip([0, 3, 4, 5, 6, 8, 9, 10], lines):
        assert line["loss"] == pytest.approx(np.mean(losses[first:line["step"]]), abs=2e-4)


def test_validation_loss_is_the_mean_over_its_targets(make_model):
    """For every micro-batch, the plain mean over batches that are drawn with seed 0, 64 at a time."""
    model, objective = make_model(vocab=11, dtype=torch.float32), from_options("vl")
    tokens = np.random.default_rng(0).integers(0, 10, 8 * 130)
    sequences, autocast = Sequences(tokens, 8, 10), choose_autocast(CPU, "fp32")[0]
    loss_module = LossModule(model, loss_sum)
    found = [validation_loss(loss_module, objective, "mask", sequences, CPU, autocast, micro, 130)
             for micro in (64, 60, 7)]
    generator, losses, count = torch.Generator().manual_seed(0), 0.0, 0.0
    for first in (0, 64, 128):
        batch = draw_batch(objective, "mask", sequences.batch(first, min(64, 130 - first)), 11, generator)
        losses, count = losses + loss_sum(model, batch, "mask").item(), count + batch.weight.sum().item()
    assert found == pytest.approx([losses / count] * 3, rel=1e-5)


def test_clipping_and_rates():
    """The norm is that before clipping; every group gets the schedule's rate, or its multiple of it."""
    class Linear(torch.nn.Linear):
        def forward(self, batch, path):  # its gradient is (3, 4)
            return (self.weight * torch.tensor([3.0, 4.0])).sum()

    class Batch(list):
        def to(self, device):
            return self

    for clip, kept in ((0, 5.0), (10, 5.0), (1, 1.0)):
        linear = Linear(2, 1, bias=False)
        before = linear.weight.detach().clone()
        groups = [{"params": [linear.weight], "scale": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=7.0)
        _, norm = update(linear, optimizer, [Batch()], 1.0, "", choose_autocast(CPU, "fp32")[0], clip, 0.2)
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


@pytest.mark.parametrize("name, path, images", [("mtp", "two-stream", False), ("vl", "mae", True)])
def test_one_graph_for_each_shape(name, path, images):
    """A ramped batch in micro-batches: as many graphs as its chunks have sizes, none anew, and no break."""
    graphs = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    extra = {"patch": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3} if images else {}
    model = Transformer(Config(11, 9, 1, 16, 2, decoder=(1, 8, 2) if path == "mae" else (), **extra))
    loss_module = LossModule(model, torch.compile(loss_sum, dynamic=False, fullgraph=True, backend=backend))
    optimizer, autocast = make_optimizer(model, resolve()), choose_autocast(CPU, "fp32")[0]
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 2):
        tokens = (torch.rand(size, 9, 48, generator=generator) if images
                  else torch.randint(11, (size, 9), generator=generator))
        batch = draw_batch(from_options(name), path, tokens, 11, generator)
        batches = [batch.part(*chunk) for chunk in chunks(size, 2)]
        loss, norm = update(loss_module, optimizer, batches, batch.total[0].item(), path, autocast, 0.5, 1e-3)
        assert loss > 0 and norm.isfinite()
    assert len(graphs) == 2  # chunks of 2 and 1
    torch._dynamo.reset()


# ---------------------------------------------------------------------------- schedules, settings, runs

def test_schedules():
    triangle, cosine = resolve(lr=1.0), resolve(lr=1.0, schedule="cosine", warmup=0.1)
    rates = [learning_rate(triangle, p) for p in (0, 0.375, 0.75, 0.875, 1)]
    assert rates == pytest.approx([0.25, 0.625, 1, 0.5, 0])
    rates = [learning_rate(cosine, p) for p in (0, 0.05, 0.1, 0.325, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0])
    assert warmup_cosine(0.0, 0.0) == 1


def test_batch_ramp_steps_and_chunks():
    settings = resolve(batch_size=100, batch_ramp=0.6)
    sizes = batch_sizes(settings, 100)
    assert sizes[0] == 7 and sizes[60:] == [100] * 40 and sizes == sorted(sizes) and len(set(sizes)) == 16
    assert batch_sizes(resolve(batch_size=7), 3) == [7, 7, 7]
    for sequences in (1, 999, 10_000):
        steps = steps_for(settings, sequences)
        assert sum(batch_sizes(settings, steps)) >= sequences > sum(batch_sizes(settings, steps - 1))
    for size in range(1, 40):
        cut = chunks(size, 16)
        assert [stop - start for start, stop in cut] == [16] * (size // 16) + [size % 16] * (size % 16 > 0)
        assert cut[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(cut))


def test_presets_resolve():
    """The paper preset is the paper's; masks are its formula, 80/10/10 comes with its size alone."""
    paper = resolve(preset="paper", objective="mlm")
    assert (paper.batch_size, paper.steps, paper.lr, paper.length) == (8192, 100_000, 1e-3, 128)
    assert (paper.batch_ramp, paper.clip, paper.weight_decay, paper.schedule) == (0.6, 0.5, 0.01, "triangle")
    assert paper.mask_rule == "bert" and resolve(objective="vl").mask_rule == "always"
    assert resolve(preset="paper").mask_rule is None is resolve(objective="mlm", streams=2).mask_rule
    assert resolve(data="shapes", objective="vl").options == {"mask": (0.5, 0.75)}
    assert resolve(data="toy").length == 8 and resolve(preset="vit-small", steps=3).epochs is None
    for preset in PRESETS:
        assert choose_path(*resolve(preset=preset).task()[:1], images=preset.startswith("vit")) == "causal"


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
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:-1000])
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        load_run(tmp_path)


def test_untrained_is_the_run_before_its_first_step(trained):
    run, fresh = load_run(trained("ar")), load_run(f"untrained:{trained('ar')}")
    torch.manual_seed(run.settings.seed)
    expected = type(run.model)(run.model.config).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in fresh.model.state_dict().items())
    assert not torch.equal(fresh.model.embedding.weight, run.model.embedding.weight)
    assert (fresh.step, fresh.settings, fresh.objective) == (0, run.settings, run.objective)


def test_held_out_text_is_the_part_that_training_left(trained, books):
    """With data None the validation split of the run's own text, not all of it."""
    run = load_run(trained("ar"))
    own, all_of_it = held_out_text(run), held_out_text(run, str(books))
    assert 0 < len(own.val) < len(all_of_it.val) / 2 and own.val_bytes < all_of_it.val_bytes
    sequences, tokens_per_byte, name = evaluation_sequences(run, count=3)
    assert sequences.shape == (3, 32) and 0.5 < tokens_per_byte < 1.5 and name == str(books)


def test_tensorboard_gets_every_line(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(resolve(data=text, **SMALL), tmp_path / "run", log_every=6, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    found = [(event.step, round(event.value, 4)) for event in board.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in metrics(tmp_path / "run")]
