"""Several processes compute what one computes, and a run goes on with another number of them."""

import json
import os
import shutil

import crash
import pytest
import torch
import torch.distributed as dist

import train
from engine import runs
from support import cli

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    crash.write_inputs(folder)
    return folder


def launch(folder, case, out, processes, *more):
    """Train in that many processes at once, joined as torchrun joins them."""
    argv, log = [*crash.command(case, folder, folder / out, steps=STEPS), *more], folder / f"{out}.log"
    poll = crash.start(argv, log)[1] if processes == 1 else crash.start_group(argv, log, processes)[1]
    assert crash.wait(poll, 120) == 0, log.read_text()


def half_way(folder, run, out):
    """A folder as if that run had stopped at the checkpoint before its last."""
    shutil.copytree(folder / run, folder / out)
    os.replace(folder / out / "ckpt.prev.pt", folder / out / "ckpt.pt")
    assert runs.load_checkpoint(folder / out)["step"] == crash.SAVE_EVERY


def same(folder, run, other):
    """Two run folders agree up to rounding: files, keys, weights, and every number that is logged."""
    assert {path.name for path in (folder / run).iterdir()} == {
        path.name for path in (folder / other).iterdir()
    }
    a, b = (runs.load_checkpoint(folder / name) for name in (run, other))
    assert a.keys() == b.keys() and all(
        a[key] == b[key] for key in ("step", "seen", "settings", "model_config", "tokenizer")
    )
    assert list(a["model"]) == list(b["model"])
    for name, weight in a["model"].items():
        assert torch.allclose(weight, b["model"][name], rtol=1e-4, atol=2e-5), (
            name,
            (weight - b["model"][name]).abs().max(),
        )
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    lines = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in (run, other)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for x, y in zip(*lines):
        assert x.keys() == y.keys()
        for key in x.keys() & {"loss", "val_loss", "grad_norm", "lr"}:
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=2e-4), (x, y)


@pytest.mark.parametrize("case", ["vl text", "mlm images"])
def test_two_processes_follow_one(folder, case):
    """With gradient accumulation and a batch ramp, the parts of the processes not always of one size."""
    one, two = (f"{case} {count}" for count in (1, 2))
    launch(folder, case, one, 1)
    launch(folder, case, two, 2)
    same(folder, one, two)
    first = json.loads((folder / one / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((folder / one / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["loss"] < first["loss"]


def test_a_run_goes_on_with_fewer_processes(folder):
    half_way(folder, "vl text 2", "2 then 1")
    launch(folder, "vl text", "2 then 1", 1, "--resume")
    same(folder, "vl text 1", "2 then 1")


@pytest.mark.parametrize("case, fsdp", [("vl text", False), ("vl text", True), ("mlm images", True)])
def test_and_with_more(folder, case, fsdp):
    """Muon's case, and AdamW's."""
    out = f"{case} 1 then 2 {fsdp}"
    half_way(folder, f"{case} 1", out)
    launch(folder, case, out, 2, "--resume", *["--fsdp"] * fsdp)
    same(folder, f"{case} 1", out)
    assert "2 processes" in (folder / f"{out}.log").read_text()


def test_a_batch_too_small_for_the_processes_is_refused(folder, monkeypatch):
    argv = crash.command("ar images", folder, folder / "small", steps=STEPS)
    monkeypatch.setattr(train, "join_group", lambda device: (0, 40))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    with pytest.raises(
        cli.BadInput, match="a batch of 2 sequences does not fill 40 processes; give a larger --batch-size"
    ):
        train.main(argv)
    assert not (folder / "small").exists()


def test_torchrun_itself(folder, real_sizes):
    """The command of the README, once."""
    _, poll = crash.start_torchrun(
        [*crash.command("ar text", folder, folder / "torchrun", steps=3), "--fsdp"],
        folder / "torchrun.log",
        2,
    )
    assert crash.wait(poll, 200) == 0, (folder / "torchrun.log").read_text()
    assert runs.load_run(folder / "torchrun").step == 3
    assert all(
        torch.isfinite(value).all() for value in runs.load_checkpoint(folder / "torchrun")["model"].values()
    )
    # What FSDP wrote goes on without it, with another kind of optimiser step.
    assert train.main([*crash.command("ar text", folder, folder / "torchrun", steps=5), "--resume"]) == 0
    assert runs.load_run(folder / "torchrun").step == 5
