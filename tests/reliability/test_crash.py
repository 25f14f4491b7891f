"""Runs that are killed, disks that are full, batches that are not finite."""

import errno
import functools
import json
import os
import resource
import signal

import crash
import pytest
import torch
import torch.distributed as dist
from conftest import flip_a_weight, words
from conftest import quietly as run

import train
from engine import machine, runs
from engine.settings import resolve
from support.cli import BadInput, command_line
from text.folders import prepare_text

SMALL = {"length": 32, "batch_size": 8, "steps": 30, "lr": 2e-3, "schedule": "cosine"}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- kills and power losses


def test_kills_at_random_moments(tmp_path, capsys):
    """The short form of crash.py."""
    found = crash.crash(3, ["vl text", "dar images"], tmp_path, seed=3, each=2, steps=30)
    assert found["kills"] == 3 and not found["differences"], capsys.readouterr().out


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
def test_four_processes_of_which_one_is_killed_at_a_random_moment(tmp_path, capsys):
    """As on four machines: the others end too, and all four go on from the last checkpoint."""
    launch = functools.partial(crash.start_group, processes=4)
    found = crash.crash(2, ["vl text, large batches"], tmp_path, 1, launch, each=2, steps=20, rounding=2e-5)
    assert found["kills"] == 2 and not found["differences"], capsys.readouterr().out


def test_crash_would_see_a_difference(tmp_path):
    crash.write_inputs(tmp_path)
    for name, more in (("a", ()), ("b", ("--seed", "1"))):
        train.main([*crash.command("ar text", tmp_path, tmp_path / name, steps=2), *more])
    assert any("weight" in word for word in crash.differences(tmp_path / "a", tmp_path / "b"))
    assert any("weight" in word for word in crash.differences(tmp_path / "a", tmp_path / "b", 2e-5))
    assert not crash.differences(tmp_path / "a", tmp_path / "a")


class PowerLoss(Exception):
    pass


@pytest.mark.parametrize("moment", ["fsync", "link", "replace"])
def test_power_loss_while_saving(tmp_path, text, monkeypatch, moment):
    """All ends at a system call that follows the writing; the file of the last checkpoint is whole."""
    prepare_text([text], tmp_path / "tokens", quiet=True)  # which has system calls of its own
    settings = resolve(data=str(tmp_path / "tokens"), **{**SMALL, "steps": 12})
    run(settings, tmp_path / "whole", save_every=5, log_every=2)
    calls, genuine = [], getattr(os, moment)

    def lose(source, *target):
        if not target or "ckpt" in str(target[0]):
            calls.append(source)
            if (
                len(calls) == {"fsync": 4, "link": 1, "replace": 2}[moment]
            ):  # of the second checkpoint, at step 10
                raise PowerLoss
        return genuine(source, *target)

    with monkeypatch.context() as patch, pytest.raises(PowerLoss):
        patch.setattr(os, moment, lose)
        run(settings, tmp_path / "run", save_every=5, log_every=2)
    assert (
        runs.load_checkpoint(tmp_path / "run")["step"] == 5 and (tmp_path / "run" / "ckpt.partial").exists()
    )
    run(settings, tmp_path / "run", resume=True, save_every=5, log_every=2)
    assert not crash.differences(tmp_path / "whole", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "ckpt.pt",
        "ckpt.prev.pt",
        "config.json",
        "metrics.jsonl",
    }


def test_a_stop_between_two_lines_of_the_log_changes_none(tmp_path, text, monkeypatch):
    settings = resolve(data=text, **{**SMALL, "steps": 20})
    run(settings, tmp_path / "whole", log_every=7)
    rate = train.learning_rate

    def stop(settings, progress):
        if progress == 0.5:
            signal.raise_signal(signal.SIGTERM)
        return rate(settings, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        assert run(settings, tmp_path / "run", log_every=7) is None
    assert runs.load_checkpoint(tmp_path / "run")["step"] == 11
    run(settings, tmp_path / "run", resume=True, log_every=7)
    assert not crash.differences(tmp_path / "whole", tmp_path / "run") and [
        line["step"] for line in lines(tmp_path / "run")
    ][:2] == [7, 14]


def full_disk(patch):
    """Files may not grow beyond 64 KB; a checkpoint takes several times that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(patch):
    genuine = torch.save

    def save(content, file):
        genuine(content, file)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(torch, "save", save)
    return lambda: None


@pytest.mark.parametrize("fill", [full_disk, no_space])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, text, monkeypatch, capsys, fill):
    argv = [
        "--data", text, *words("--length 32 --batch-size 8 --device cpu --dtype fp32 --no-report --out"),
        str(tmp_path / "run")]
    train.main([*argv, "--steps", "2"])
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        undo = fill(patch)
        try:
            command_line(lambda: train.main([*argv, "--resume", "--steps", "4"]))
        finally:
            undo()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        end.value.code == 2
        and len(errors) == 1
        and "ckpt.pt could not be written" in errors[0]
        and "intact" in errors[0]
    )
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before and not (
        tmp_path / "run" / "ckpt.partial"
    ).exists()
    train.main([*argv, "--resume", "--steps", "4"])
    assert runs.load_checkpoint(tmp_path / "run")["step"] == 4


def test_a_damaged_checkpoint_offers_the_one_before(tmp_path, text):
    settings = resolve(data=text, **{**SMALL, "steps": 12})
    run(settings, tmp_path / "run", save_every=5)
    flip_a_weight(tmp_path / "run" / "ckpt.pt")
    with pytest.raises(BadInput, match="not a whole checkpoint.*mv .*ckpt.prev.pt"):
        runs.load_run(tmp_path / "run")
    os.replace(tmp_path / "run" / "ckpt.prev.pt", tmp_path / "run" / "ckpt.pt")
    assert runs.load_run(tmp_path / "run").step == 10


# ---------------------------------------------------------------------------- what is not finite


def spoil(monkeypatch, steps):
    """The training loss of these steps, from 1, is not a number. Validation is left alone."""
    genuine, step = machine.loss_sum, [0]

    def loss_sum(model, batch, path):
        loss = genuine(model, batch, path)
        if torch.is_grad_enabled():
            step[0] += 1
            loss = loss * (torch.nan if step[0] in steps else 1)
        return loss

    monkeypatch.setattr(machine, "loss_sum", loss_sum)


def test_a_step_that_is_not_finite_never_happened(tmp_path, text, monkeypatch):
    settings, step = resolve(data=text, **SMALL), [0]
    with monkeypatch.context() as patch:
        spoil(patch, {4, 12, 13})
        run(settings, tmp_path / "run", log_every=5)

    def take_step(optimizer, wrong):
        step[0] += 1
        if step[0] not in (4, 12, 13):
            optimizer.step()

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        run(settings, tmp_path / "without", log_every=5)
    a, b = (runs.load_checkpoint(tmp_path / name) for name in ("run", "without"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(x[name], y[name]) for name in x) and x.get("step", 27) == 27
    assert (a["skipped"], b["skipped"]) == (3, 0)
    assert [line.get("skipped", 0) for line in lines(tmp_path / "run") if "loss" in line] == [
        1,
        1,
        3,
        3,
        3,
        3,
    ]
    assert all(0 < line["loss"] < 7 for line in lines(tmp_path / "run") if "loss" in line)


def test_ten_in_a_row_stop_the_run(tmp_path, text, monkeypatch, capsys):
    spoil(monkeypatch, {3, *range(12, 99)})
    argv = [
        "--data", text, *words("--length 32 --batch-size 8 --device cpu --dtype fp32 --no-report --out"),
        str(tmp_path / "run"), *words("--lr 0.002 --steps 60 --save-every 7 --log-every 5")]
    with pytest.raises(SystemExit) as end:
        command_line(lambda: train.main(argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1
    assert all(
        word in errors[0]
        for word in ("last 10 steps up to 21", "smaller --lr than 0.002", "--dtype fp32", "ckpt.pt holds")
    )
    saved = runs.load_checkpoint(tmp_path / "run")
    assert saved["step"] == 14 and saved["skipped"] == 4
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path, text, monkeypatch):
    settings = resolve(data=text, **{**SMALL, "steps": 9})
    with monkeypatch.context() as patch:
        spoil(patch, range(4, 99))
        run(settings, tmp_path / "run")
        spoil(patch, range(99))
        with pytest.raises(BadInput, match="last 10 steps up to 13"):
            run(resolve(data=text, **SMALL), tmp_path / "run", resume=True, log_every=1)
