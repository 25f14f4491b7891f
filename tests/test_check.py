"""Objectives from a file of one's own: loaded by their name, checked; their chain may have another order."""

import pytest
import torch
from conftest import call

from evaluate import left_to_right
from experiments.check import check
from objectives import describe, draw_batch, from_options
from util import BadInput

BACKWARD = """
from dataclasses import dataclass

import torch

from masks import Objective


@dataclass(frozen=True)
class Backward(Objective):
    skip: int = 0
    paper = "from right to left"
    attention = "causal"

    def groups(self, batch, length, generator=None):
        return torch.arange(length, 0, -1).repeat(batch, 1)

    def chain(self, length):
        return torch.arange(length - 1, -1, -1)

    def left_to_right(self, length, path):
        return {"from right to left": self.groups(1, length)}
"""


@pytest.fixture
def my(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(BACKWARD)
    return f"{path}:Backward"


def test_it_is_named_by_its_file_and_has_its_options(my):
    assert describe(from_options(my, skip=2)) == "Backward skip=2"
    assert "Backward skip=3: from right to left" in call(f"objectives.py {my} --skip 3 --text 'the cat sat'")
    with pytest.raises(BadInput, match="cannot be loaded"):
        from_options(my + "s")


def test_every_check_holds_or_names_what_is_missing(way, my):
    found = {name: holds for name, holds, _ in check(*way, 6, draw_batch)}
    assert False not in found.values() and {"queries", "generator", "leaks"} <= found.keys()
    out = call(f"objectives.py {my} --check")
    assert "ok     left_to_right, from right to left" in out and "none   bound" in out
    assert "WRONG" not in out


WRONG = {
    "generator": """def groups(self, batch, length, generator=None):
        return 1 + (torch.rand(batch, length).argsort(1) > 0).long()""",
    "left_to_right": """def chain(self, length):
        return torch.arange(length)""",
    "outcomes": """def outcomes(self, length, limit=0):
        f = self.groups(2, length).clone()
        f[1, 0] -= 1
        return f, torch.tensor([0.5, 0.5])""",
    "counts": """def min_targets(self, length):
        return length""",
    "decoding": """def decoding(self, order, given):
        return order"""}


@pytest.mark.parametrize("name, method", WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path, name, method):
    path = tmp_path / "wrong.py"
    path.write_text(f"{BACKWARD}\n    {method}\n")
    with pytest.raises(BadInput, match=f"wrong in.*{name}"):
        call(f"objectives.py {path}:Backward --check")


def test_likelihood_in_the_order_of_its_chain(my, make_run):
    run = make_run(from_options(my), "two-stream", vocab=3, length=4)
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 3, torch.tensor([1]))
    (name, nll), = left_to_right(run, sequences).items()
    assert name == "from right to left" and nll.shape == (27, 3)
    assert (-nll.double().sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_wrong_left_to_right_is_told(tmp_path, make_run):
    path = tmp_path / "wrong.py"
    path.write_text(BACKWARD.replace("torch.arange(length - 1, -1, -1)", "torch.arange(length)"))
    run = make_run(from_options(f"{path}:Backward"), "two-stream")
    with pytest.raises(BadInput, match="no pass of left_to_right gives token 2 of 4"):
        left_to_right(run, torch.zeros(1, 4, dtype=torch.long))
