"""The toy model as data, blind queries, and the bridge from the theory to the Transformer."""
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from data import Sequences, load_corpus, load_evaluation
from engine.runs import load_checkpoint, load_run
from engine.settings import resolve
from experiments import bridge
from model import Config, Transformer
from objectives import draw_batch, from_options
from support.cli import BadInput
from text.toy import CLASSES, FIRST, POSITIONS, VALUES, draw_tokens, toy_bytes, toy_noise
from theory import toy

SMALL = [("ar", {}), ("dar", {"t": 3}), ("mlm", {"mask": 0.5}), ("permutation", {}), ("mtp", {"t": 2})]


# ---------------------------------------------------------------------------- the data

def test_names_of_the_toy_model():
    assert [toy_noise(name) for name in ("toy", "toy:0.3", "pydoc", "toys")] == [0, 0.3, None, None]
    for wrong in ("toy:", "toy:1", "toy:-0.1", "toy:nan", "toy:x"):
        with pytest.raises(BadInput, match=f"{wrong}.*toy:EPS"):
            toy_noise(wrong)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_sequences_are_those_of_the_model(eps):
    corpus = load_corpus(f"toy:{eps}")
    tokens = Sequences(corpus.train, POSITIONS, corpus.tokenizer.separator).batch(0, 40_000) - FIRST
    assert torch.equal(tokens // (CLASSES * VALUES), torch.arange(POSITIONS).expand_as(tokens))
    v = tokens % (CLASSES * VALUES)
    assert (F.one_hot(v, CLASSES * VALUES).float().mean((0, 1)) - 1 / 8).abs().max() < 0.005
    alike = (v[:, :1] // VALUES == v[:, 1:] // VALUES).float().mean()
    expected = (1 - eps) ** 2 + (1 - (1 - eps) ** 2) / CLASSES    # both of their sequence's class, or chance
    assert alike.item() == pytest.approx(expected, abs=0.01)
    again = load_evaluation(f"toy:{eps}", corpus.tokenizer)
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.val, corpus.val)
    assert len(corpus.val) % POSITIONS == 0 and len(corpus.train) % POSITIONS == 0


def test_classes_of_drawn_sequences():
    tokens, y = draw_tokens(CLASSES, POSITIONS, VALUES, 0.3, 20_000, torch.Generator().manual_seed(0))
    share = (tokens // VALUES == y[:, None]).float().mean(0)
    assert (share - (0.7 + 0.3 / CLASSES)).abs().max() < 0.015
    assert toy_bytes(tokens).min() >= FIRST and toy_bytes(tokens).max() < FIRST + CLASSES * POSITIONS * VALUES


def test_length_and_paths_that_do_not_fit():
    assert resolve(objective="ar", data="toy").length == POSITIONS
    with pytest.raises(BadInput, match="--length 16 .*toy:0.3.*8 tokens"):
        resolve(objective="ar", data="toy:0.3", length=16)
    with pytest.raises(BadInput, match="toy:2"):
        resolve(objective="ar", data="toy:2")
    with pytest.raises(BadInput, match="--blind.*causal.*--streams 2"):
        resolve(objective="ar", blind=True)
    assert resolve(objective="ar", blind=True, streams=2).blind and resolve(objective="dar", blind=True).blind
    with pytest.raises(BadInput, match="bytes"):
        load_evaluation("toy", type("Other", (), {"kind": "wordpiece"}))


# ---------------------------------------------------------------------------- blind queries

def networks(layers=3):
    """A told and a blind network with the same weights, large enough to matter."""
    found = []
    for blind in (False, True):
        torch.manual_seed(0)
        model = Transformer(Config(11, 8, layers, 16, 2, blind=blind)).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(3)
        found.append(model)
    return found


@pytest.mark.parametrize("name, options", SMALL)
def test_blind_queries_of_one_context_are_equal_and_see_it_alone(name, options):
    objective, (told, blind) = from_options(name, **options), networks()
    batch = draw_batch(objective, "two-stream", torch.arange(8)[None], 11, torch.Generator().manual_seed(3))
    asked = batch.weight[0] > 0
    same = batch.cuts[0][asked][:, None] == batch.cuts[0][asked]
    for model in (told, blind):
        x = model(batch.tokens, batch.groups, batch.targets, "two-stream", batch.cuts)[0][asked]
        distance = (x[:, None] - x).abs().amax(-1)
        assert (distance[same & ~torch.eye(len(x), dtype=torch.bool)] < 1e-9).all() == (
            model is blind or name in ("ar", "permutation"))
        assert (distance[~same] > 1e-6).all()
    scores = (x @ torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).unbind()
    rows = [torch.autograd.grad(score, blind.embedding.weight, retain_graph=True)[0] for score in scores]
    seen = (batch.groups > 0) & (batch.groups < batch.cuts[0][asked][:, None])
    assert torch.equal(torch.stack(rows)[:, :8].abs().amax(2) > 0, seen)


def test_told_is_the_default_and_has_the_same_weights():
    told, blind = networks()
    assert not Config(11).blind and told.state_dict().keys() == blind.state_dict().keys()
    batch = draw_batch(from_options("mlm", mask=0.5), "two-stream", torch.arange(8)[None], 11,
                       torch.Generator().manual_seed(0))
    x = told(batch.tokens, batch.groups, batch.targets, "two-stream", batch.cuts)
    with torch.no_grad():                               # without positions to tell both are the same
        told.positions.zero_()
        blind.positions.zero_()
    a, b = (model(batch.tokens, batch.groups, batch.targets, "two-stream", batch.cuts)
            for model in (told, blind))
    assert torch.equal(a, b) and not torch.allclose(a, x)


def test_a_blind_run_resumes_exactly_and_is_probed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--objective", "dar", "--t", "2", "--data", "toy:0.3", "--blind", "--batch-size", "8",
              "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--no-report"]
    train.main([*common, "--steps", "6", "--schedule", "cosine", "--out", "whole"])
    settings = resolve(objective="dar", t=2, data="toy:0.3", blind=True, batch_size=8, steps=6,
                       schedule="cosine")
    draw, steps = train.Job.draw, []

    def stop(self, place):
        steps.append(place)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return draw(self, place)

    monkeypatch.setattr(train.Job, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings, "parts", device="cpu", dtype="fp32", threads=1, save_every=2, quiet=True)
    monkeypatch.setattr(train.Job, "draw", draw)
    with pytest.raises(BadInput, match="--data toy:0.3, not toy:0.4"):
        train.main(["--resume", "--data", "toy:0.4", "--out", "parts", "--no-report"])
    train.main(["--resume", "--out", "parts", "--no-report"])
    whole, parts = (load_checkpoint(name) for name in ("whole", "parts"))
    assert whole["model_config"]["blind"] and whole["settings"]["blind"] and parts["step"] == 6
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert load_run("whole").model.config.blind and not (tmp_path / "whole" / "data").exists()
    bridge.main(["probe", "whole", "--json", "probe.json"])
    x = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert x["blind"] and x["eps"] == 0.3 and x["trained"]["common"] != x["untrained"]["common"]
    assert "untrained" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the least loss

@pytest.mark.parametrize("eps", [0, 0.4])
@pytest.mark.parametrize("name, options", SMALL)
def test_least_loss_by_enumeration(name, options, eps):
    model = toy.NoisyToy(r=2, s=3, T=2, eps=eps)
    options = {**options, "t": 2} if "t" in options else options
    contexts, q = toy.distribution(from_options(name, **options), 3)
    token = np.array([[(1 - eps) * (y == v // 2) + eps / 2 for v in range(4)] for y in range(2)]) / 2
    blind = told = 0.0
    for S, weight in zip(contexts, q):
        for x in np.ndindex((4,) * int(S.sum())):
            joint = np.prod([token[:, v] for v in x], axis=0) / 2
            if joint.sum() == 0:
                continue
            mass = np.outer(weight, joint @ token)                     # q(S, p) P(x_S, x_p)
            for p, row in enumerate(mass):
                row = row[row > 0]
                told -= (row * np.log(row / row.sum())).sum() if len(row) else 0
                blind -= (row * np.log(row / mass.sum())).sum() if len(row) else 0
    assert toy.bayes_loss(model, contexts, q, False) == pytest.approx(told, abs=1e-12)
    assert toy.bayes_loss(model, contexts, q, True) == pytest.approx(blind, abs=1e-12)


# ---------------------------------------------------------------------------- the bridge

def test_features_of_one_layer_depend_on_the_context_alone():
    for blind in (True, False):
        torch.manual_seed(0)
        network = Transformer(Config(257, POSITIONS, 1, 16, 2, blind=blind)).eval()
        tokens = toy_bytes(draw_tokens(CLASSES, POSITIONS, VALUES, 0, 2, torch.Generator().manual_seed(0))[0])
        contexts = torch.arange(POSITIONS).expand(2, -1) < 3
        with torch.no_grad():
            found = bridge.context_features(network, tokens, contexts)
            changed = tokens.clone()
            changed[:, 3:] = FIRST                                     # outside of the context
            assert torch.equal(found, bridge.context_features(network, changed, contexts))
            for f in ([1, 2, 3, 4, 4, 4, 4, 4], [2, 1, 2, 3, 3, 3, 3, 3]):
                each = network(tokens, torch.tensor([f, f]), torch.arange(3, 8).expand(2, -1), "two-stream",
                               torch.full((2, 5), f[3]))
                assert torch.allclose(found, each.mean(1), atol=1e-6)
                assert torch.allclose(each[:, 0], each[:, 1]) == blind


def test_one_objective_of_each_tail():
    chosen = bridge.one_of_each_tail()
    tails = np.sort([tail for _, tail in chosen])
    assert len(chosen) >= 12 and (np.diff(tails) > 0.04 * tails[:-1]).all()
    assert tails[0] < 0.05 and tails[-1] >= 6


def test_the_probe_sees_a_network_that_knows_the_class():
    model = toy.NoisyToy(CLASSES, POSITIONS, VALUES, 0.0)
    classes = torch.eye(CLASSES).repeat_interleave(VALUES, 0).repeat(POSITIONS, 1)     # of bytes from FIRST

    def knows(tokens, groups, targets, path, cuts):
        seen = (groups == 1).float()[..., None]
        mean = (classes[tokens - FIRST] * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return mean.expand(-1, POSITIONS, -1)

    own = toy.distribution(from_options("mlm", mask=0.5), POSITIONS)
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
    found = bridge.tail_order(tail, {"blind": 0.02 * tail + noise, "told": np.full((3, 12), 0.1)}, 20)
    assert found["told"] is None and found["difference"] is None
    assert "do not differ enough" in bridge.in_words({"eps": 0, "place": "own", **found})


def test_from_training_to_the_picture(tmp_path, monkeypatch, capsys):
    some = [(from_options(name, **options), tail) for name, options, tail in
            (("ar", {}, 6.0), ("mlm", {"mask": 0.5}, 0.14))]
    monkeypatch.setattr(bridge, "one_of_each_tail", lambda quick: some)
    files = [str(tmp_path / f"{seed}.json") for seed in (0, 1)]
    bridge.main(["train", "--quick", "--steps", "3", "--json", files[0]])
    found = json.loads((tmp_path / "0.json").read_text())
    rows = found["results"]["rows"]
    assert [row["objective"] for row in rows] == ["ar", "mlm 0.5"]
    assert all(row[way]["loss"] > row[way]["bayes"] for row in rows for way in bridge.WAYS)
    again = bridge.train_and_probe(some[1][0], 0.0, True, seed=0, steps=3, layers=1)
    assert again == rows[1]["blind"]
    for k, row in enumerate(rows):                       # another seed
        row["blind"]["common"] += 0.1 * k
    (tmp_path / "1.json").write_text(json.dumps(found))
    bridge.main(["summary", *files, "--json", str(tmp_path / "all.json")])
    x = json.loads((tmp_path / "all.json").read_text())
    assert x["results"]["seeds"] == 2
    assert np.diff(x["results"]["rows"][1]["blind"]["common"]) == pytest.approx([0.1])
    assert [y["place"] for y in x["results"]["orders"]] == ["common", "own", "untrained common",
                                                            "untrained own", "loss - least"]
    assert "nan" not in "\n".join(x["text"]) and "mlm 0.5" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text((tmp_path / "1.json").read_text().replace('"steps": 3', '"steps": 4'))
    with pytest.raises(BadInput, match="same command"):
        bridge.main(["summary", files[0], str(other)])
    pytest.importorskip("matplotlib").use("Agg")
    bridge.plot_bridge(x["results"], tmp_path / "bridge.png")
    assert (tmp_path / "bridge.png").stat().st_size > 10_000


def test_least_loss_is_at_least_that_of_two_values():
    contexts, q = toy.distribution(from_options("ar"), POSITIONS)
    model = toy.NoisyToy(CLASSES, POSITIONS, VALUES, 0.0)
    assert toy.bayes_loss(model, contexts, q, True) == pytest.approx(math.log(2))
