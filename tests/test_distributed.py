"""Several processes compute what one computes, and a run goes on with another number of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import LITTLE, call, logged

import train
from run import load_checkpoint
from util import BadInput

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(),
                                reason="this PyTorch has no gloo")
ROOT = Path(train.__file__).parent

# With gradient accumulation and a batch ramp, so that the parts of the processes differ in size.
MUON = "--objective vl --length 16 --batch-size 32 --micro-batch 12 --batch-ramp 0.5"
ADAMW = "--objective ar --length 16 --batch-size 8 --optimizer adamw"
MACHINE = ("--steps 8 --log-every 1 --eval-every 4 --save-every 4 --device cpu --dtype fp32 --threads 1 "
           "--no-report")

SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import model
model.SIZES["tiny"] = {LITTLE}
import test_distributed
test_distributed.train_all(sys.argv[1:])
"""


def train_all(lines):
    """Run command lines of train.py in this process. Their checkpoints at step 4 stay, as half.pt."""
    def keep(path, content, save=train.save_checkpoint):
        save(path, content)
        if content["step"] == 4:
            shutil.copy(path, path.with_name("half.pt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", keep)
        patch.setattr(dist, "destroy_process_group", lambda: None)  # one group for all lines
        for line in lines:
            train.main(line.split())


def half_way(source, out):
    """The run folder as if it had stopped at step 4."""
    out.mkdir()
    shutil.copy(source / "half.pt", out / "ckpt.pt")
    shutil.copy(source / "metrics.jsonl", out / "metrics.jsonl")
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder}: each case by one process, by two with DDP and with FSDP, and across their numbers."""
    base = tmp_path_factory.mktemp("distributed")
    (base / "text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(800)))
    (base / "several.py").write_text(SCRIPT)
    data, resume = f"--data {base}/text.txt {MACHINE} --out {base}", f"{MACHINE} --resume --out"
    train_all([f"{MUON} {data}/muon", f"{ADAMW} {data}/adamw"])
    lines = [f"{MUON} {data}/muon-ddp", f"{ADAMW} --fsdp {data}/adamw-fsdp",
             f"--fsdp {resume} {half_way(base / 'muon', base / 'muon-one-fsdp')}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, base / "several.py", *lines], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("muon-ddp", "adamw-fsdp"):
        call(f"train.py {resume} {half_way(base / name, base / f'{name}-one')}")
    return base


@pytest.mark.parametrize("one, other", [("muon", "muon-ddp"), ("adamw", "adamw-fsdp"),
                                        ("muon", "muon-one-fsdp"),  # begun by one process, resumed by two
                                        ("muon", "muon-ddp-one"), ("adamw", "adamw-fsdp-one")])
def test_any_number_of_processes_follows_one(runs, one, other):
    a, b = (load_checkpoint(runs / name) for name in (one, other))
    assert a.keys() == b.keys() and all(a[key] == b[key] for key in ("step", "seen", "settings", "tokenizer"))
    for name, weight in a["model"].items():
        assert torch.allclose(weight, b["model"][name], rtol=1e-4, atol=2e-5), name
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    lines = [logged(runs / name) for name in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == list(range(1, 9))
    for x, y in zip(*lines):
        for key in x.keys() & {"loss", "val_loss", "grad_norm", "lr"}:
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=2e-4), key


@pytest.mark.parametrize("flags, world", [(MUON, 40), (f"{MUON} --batch-size 33 --fsdp", 2)])
def test_a_batch_that_does_not_suit_the_processes_is_refused(flags, world, books, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "join_processes", lambda device: (torch.device("cpu"), world, 0))
    with pytest.raises(BadInput, match="--batch-size"):
        call(f"train.py {flags} {MACHINE} --data {books} --out {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
