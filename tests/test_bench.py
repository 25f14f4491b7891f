"""What bench.py times is a whole training step; FLOPs, memory and peers are what it says."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, call_json

import bench
from bench import Case, cpu_memory, draw, make_model, make_peer, set_up, step_flops
from model import Config, Transformer
from objectives import choose_path, from_options, loss_sum
from run import resolve
from train import make_optimizer

TEXT = Config(vocab=23, length=8, layers=2, width=16, heads=2)
IMAGES = Config(0, length=16, layers=2, width=16, heads=2, patch=4, mean=(0.5,) * 3, std=(0.25,) * 3,
                decoder=(2, 8, 2))


def case_of(flag, config=TEXT, **options):
    objective = from_options(flag, **options)
    return Case(objective, choose_path(objective, images=config.patch > 0), config, 3, "fp32")


CASES = {"ar": case_of("ar"), "dar": case_of("dar", t=2), "mlm": case_of("mlm", mask=0.3),
         "vl": case_of("vl", mask=(0.2, 0.5)), "mae": case_of("mlm", IMAGES, mask=0.75)}


@pytest.mark.parametrize("name", CASES)
def test_a_timed_step_is_a_training_step(name):
    case = CASES[name]
    run, model = set_up(case, torch.device("cpu"))
    assert run(1) > 0 and run(2) > 0
    torch.manual_seed(0)
    plain = Transformer(case.config)
    settings = resolve(optimizer="adamw")
    optimizer = make_optimizer(plain, settings)
    for step in range(3):
        batch = draw(case, step)
        (loss_sum(plain, batch, case.path) / batch.weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for timed, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(timed, expected)


def flops_by_hand(config, path, length, targets, given):
    """FLOPs of the matrix products of one training step for one sequence: forward once, backward twice.
    Attention counts half of S^2 on the causal path."""
    S, n, D, width = length, targets, config.width, config.width

    def stack(D, rows, content, share=1.0):
        """Multiply-adds of layers, of which layer l sends rows[l] rows to attend to `content` rows."""
        return sum(r * 8 * D * D + content * 2 * D * D + 2 * r * content * share * D for r in rows)

    if path == "mae":
        layers, width, _ = config.decoder
        v = given
        macs = stack(D, [v] * config.layers, v) + v * D * width + stack(width, [S] * (layers - 1) + [n], S)
    else:
        half = path == "causal"
        inner, last = {"causal": (S, S), "mask": (S, n), "two-stream": (S + n, n)}[path]
        macs = stack(D, [inner] * (config.layers - 1) + [last], S, 0.5 if half else 1.0)
    macs += n * width * config.values + S * D * config.values if config.patch else n * D * config.vocab
    return 2 * 3 * macs


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_products(name):
    """The formula counts every product three times, but the gradient of the input pixels is not computed."""
    case, c = CASES[name], CASES[name].config
    most, least = case.objective.max_targets(c.length), case.objective.min_targets(c.length)
    formula = flops_by_hand(c, case.path, c.length, most, c.length - least)
    pixels = 2 * c.length * c.values * c.width if c.patch else 0
    assert step_flops(case) == case.batch * (formula - pixels)


def test_memory_is_that_of_a_process_of_its_own():
    """Weights, gradients and two moments take 16 bytes for each parameter; nothing takes as much again."""
    config = replace(TEXT, vocab=32_768, width=256)
    parameters = sum(p.numel() for p in Transformer(config).parameters())
    memory = cpu_memory(replace(CASES["ar"], config=config, batch=1))
    assert math.isnan(memory) or 16 * parameters < memory < 32 * parameters


def test_ratios_are_of_medians_and_show_the_range():
    names = "name", "ms_per_step", "ms_rounds", "peak_memory", "flops_per_step"
    a = dict(zip(names, ("a", 4.0, [2.0, 4.0, 10.0], 50, 3)))
    b = dict(zip(names, ("b", 8.0, [6.0, 8.0, 10.0], 100, 6)))
    assert list(bench.speed_ratio(a, b).values()) == ["a", "b", 2.0, 1.0, 3.0, 0.5, 0.5]


def peer(name):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return replace(CASES[name], peer="transformers")


@pytest.mark.parametrize("name", ["ar", "dar", "mlm", "vl"])
def test_peers_score_the_same_targets(name):
    case = peer(name)
    batch, (model, loss), (_, inputs) = draw(case, 0), make_model(case), make_peer(case)
    logits = model.train()(**inputs(batch)).logits
    nll = []
    for b, k in (batch.weight > 0).nonzero().tolist():
        position = batch.targets[b, k]
        row = {"causal": position - 1, "mask": position, "two-stream": k}[case.path]
        nll.append(F.cross_entropy(logits[b, row], batch.tokens[b, position]))
    torch.testing.assert_close(loss(model, batch, case.path), torch.stack(nll).sum())


def test_the_peer_for_images_hides_as_many_patches():
    case = peer("mae")
    batch, (model, inputs) = draw(case, 0), make_peer(case)
    out = model(**inputs(batch))
    assert torch.equal(out.mask.sum(1), batch.weight.sum(1))
    assert out.logits.shape == (case.batch, case.config.length, case.config.values)


NANOGPT = """
from types import SimpleNamespace as GPTConfig
import torch
from torch.nn import functional as F

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters")
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.head(self.table(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


def test_the_command_compares_with_peers(tmp_path, monkeypatch):
    """GPT-2's FLOPs by hand; nanoGPT scores the next tokens. conftest's tiny: 2 layers x 32."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "cpu_memory", lambda case: 2000 if case.peer else 1000)
    (tmp_path / "model.py").write_text(NANOGPT)
    line = (f"bench.py --objectives ar,vl --mask 0.2,0.4 --preset tiny --length 8 --batch-size 2 --rounds 2 "
            f"--device cpu --dtype fp32 --peers --peer-nanogpt {tmp_path}")
    found = call_json(line)
    assert re.fullmatch(r".+, \d+ threads?", found["device"])
    pairs = [(r["name"], r["peer"], r["memory"]) for r in found["ratios"]]
    assert pairs == [("ar", "GPT2LMHeadModel", 0.5), ("ar", "nanoGPT", 0.5),
                     ("vl 0.2,0.4", "BertForMaskedLM", 0.5)]
    D, L, V, S, B = 32, 2, 4096, 8, 2
    for r in found["results"]:
        assert len(r["ms_rounds"]) == 2 and min(r["ms_rounds"]) <= r["ms_per_step"] <= max(r["ms_rounds"])
        assert r["tokens_per_second"] == pytest.approx(B * S / r["ms_per_step"] * 1e3)
    flops = {r["name"]: r["flops_per_step"] for r in found["results"]}
    assert flops["GPT2LMHeadModel"] == 6 * B * (L * (S * 12 * D * D + S * S * D) + S * D * V)

    case = replace(CASES["ar"], peer=str(tmp_path))
    (model, loss), batch = make_model(case), draw(case, 0)
    logits = model.head(model.table(batch.tokens))[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss(model, batch, "causal"), expected)
    assert "ar / nanoGPT" in call(line)
