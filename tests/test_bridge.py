"""The toy model as data, and the bridge from the theory to the Transformer."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import call, call_both

from data import CLASSES, POSITIONS, VALUES, draw_tokens, toy_bytes
from experiments import bridge, toy
from experiments.spectrum import pairs
from model import Config, Transformer
from objectives import from_options


@pytest.mark.parametrize("blind", [True, False])
def test_features_of_one_layer_depend_on_the_context_alone(blind):
    torch.manual_seed(0)
    network = Transformer(Config(257, POSITIONS, 1, 16, 2, blind=blind)).eval()
    tokens = toy_bytes(draw_tokens(CLASSES, POSITIONS, VALUES, 0, 2, torch.Generator().manual_seed(0))[0])
    contexts, changed = torch.arange(POSITIONS).expand(2, -1) < 3, tokens.clone()
    changed[:, 3:] = ord("0")                                                  # outside of the context
    with torch.no_grad():
        found = bridge.context_features(network, tokens, contexts)
        assert torch.equal(found, bridge.context_features(network, changed, contexts))
        for f in ([1, 2, 3, 4, 4, 4, 4, 4], [2, 1, 2, 3, 3, 3, 3, 3]):
            each = network(tokens, torch.tensor([f, f]), torch.arange(3, 8).expand(2, -1), "two-stream",
                           torch.full((2, 5), f[3]))
            assert torch.allclose(found, each.mean(1), atol=1e-6)
            assert torch.allclose(each[:, 0], each[:, 1]) == blind


def test_the_probe_sees_a_network_that_knows_the_class():
    model = toy.NoisyToy(CLASSES, POSITIONS, VALUES, 0.0)
    classes = torch.eye(CLASSES).repeat_interleave(VALUES, 0).repeat(POSITIONS, 1)  # of bytes from '0'

    def knows(tokens, groups, targets, path, cuts):
        seen = (groups == 1).float()[..., None]
        mean = (classes[tokens - ord("0")] * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return mean.expand(-1, POSITIONS, -1)

    own = pairs(from_options("mlm", mask=0.5), POSITIONS)
    assert bridge.errors_of(knows, model, own, 0) == {"common": 0.0, "own": 0.0}
    blank = bridge.errors_of(lambda tokens, *_: torch.zeros(*tokens.shape, 2), model, own, 0)
    assert min(blank.values()) > 0.6


def test_order_of_objectives_and_its_interval():
    tail, rng = np.arange(12.0), np.random.default_rng(0)
    noise = 0.003 * rng.normal(size=(3, 12))
    told = 0.02 * rng.permutation(12) + noise
    found = bridge.tail_order(tail, {"blind": 0.02 * tail + noise, "told": told}, 200)
    assert found["blind"][0] > 0.95 and found["blind"][1] > 0.8
    assert found["told"][1] < 0 < found["told"][2] and found["difference"][0] > 0.3
    found = bridge.tail_order(tail, {"blind": told, "told": np.full((3, 12), 0.1)}, 20)
    assert found["told"] is None and found["difference"] is None


def test_from_training_to_the_picture(tmp_path, monkeypatch):
    chosen = bridge.one_of_each_tail()
    tails = np.sort([bridge.tail_of(objective, 0.0) for objective in chosen])
    assert len(chosen) >= 12 and (np.diff(tails) > 0.04 * tails[:-1]).all() and tails[0] < 0.1
    monkeypatch.setattr(bridge, "one_of_each_tail", lambda quick: [chosen[0], chosen[-1]])
    files = [tmp_path / f"{seed}.json" for seed in (0, 1)]
    call(f"experiments.bridge train --quick --steps 2 --json {files[0]}")
    found = json.loads(files[0].read_text())
    rows = found["results"]["rows"]
    assert all(row[way]["loss"] > row[way]["bayes"] for row in rows for way in bridge.WAYS)
    assert rows[0]["blind"]["bayes"] == pytest.approx(math.log(2))             # ar: one of two values
    errors = [rows[1]["blind"]["common"], rows[1]["blind"]["common"] + 0.1]
    rows[1]["blind"]["common"] = errors[1]
    files[1].write_text(json.dumps(found))
    pytest.importorskip("matplotlib")
    text, content = call_both(f"experiments.bridge summary {files[0]} {files[1]} --plot {tmp_path}/b.png")
    x = content["results"]
    assert x["rows"][1]["blind"]["common"] == errors
    assert [y["place"] for y in x["orders"]][:2] == ["common", "own"] and "nan" not in text
    assert (tmp_path / "b.png").stat().st_size > 10_000
