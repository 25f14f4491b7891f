"""What bench.py times is a whole training step; FLOPs, memory and peers are what it says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import call, call_json

import bench
from bench import Case, counted_flops, cpu_memory, make_draw, make_loss, make_peer, peer_inputs, set_up
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
    """The weights after three timed steps are those of a plain loop over the same batches."""
    case = CASES[name]
    run, model = set_up(case, torch.device("cpu"))
    assert run(1) > 0 and run(2) > 0
    torch.manual_seed(0)
    plain = Transformer(case.config)
    start = [p.clone() for p in plain.parameters()]
    settings, draw = resolve(optimizer="adamw"), make_draw(case)
    optimizer = make_optimizer(plain, settings)
    for step in range(3):
        batch = draw(step)
        (loss_sum(plain, batch, case.path) / batch.weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for timed, expected, first in zip(model.parameters(), plain.parameters(), start):
        torch.testing.assert_close(timed, expected)
        assert expected.grad is None or not torch.equal(timed, first)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_pytorch_counts(name):
    """The formula against the products that really run. It counts every product three times, but the gradient
    of the input pixels is not computed."""
    case = CASES[name]
    c = case.config
    counted = case.batch * counted_flops(replace(case, batch=1), Transformer(c))
    pixels = 2 * case.batch * c.length * c.values * c.width if c.patch else 0
    assert bench.step_flops(case) == counted + pixels


def test_memory_is_that_of_a_process_of_its_own():
    """Weights, gradients and two moments take 16 bytes for each parameter."""
    config = replace(TEXT, vocab=32_768, width=256)
    parameters = sum(p.numel() for p in Transformer(config).parameters())
    memory = cpu_memory(replace(CASES["ar"], config=config, batch=1))
    assert memory is None or 16 * parameters < memory < 16 * parameters + 100e6


def test_ratios_are_of_medians_and_show_the_range():
    a, b = ({"name": name, "dtype": "fp32", "ms_per_step": ms[1], "ms_rounds": ms, "peak_memory": memory,
             "flops_per_step": flops}
            for name, ms, memory, flops in (("a", [2.0, 4.0, 10.0], 50, 3), ("b", [6.0, 8.0, 10.0], 100, 6)))
    ratio = bench.speed_ratio(a, b)
    names = ("speed", "speed_low", "speed_high", "memory", "flops")
    assert [ratio[name] for name in names] == [2.0, 1.0, 3.0, 0.5, 0.5]


@pytest.fixture
def quick(monkeypatch):
    """Short rounds, and a memory and a matrix product that are not measured."""
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "cpu_memory", lambda case: 2000 if case.peer else 1000)
    monkeypatch.setattr(bench, "matrix_product", lambda device, dtype: lambda: 1e12)


# ---------------------------------------------------------------------------- peers

def peer(name, scale=1.0):
    """A peer's case, its model with larger weights, so that its output depends on its input, and a batch."""
    pytest.importorskip("transformers")
    case = replace(CASES[name], peer="transformers")
    torch.manual_seed(0)
    model = make_peer(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() >= 2 else 1.0)
    return case, model, make_draw(case)(0)


@pytest.mark.parametrize("name", ["ar", "dar", "mlm", "vl"])
def test_peers_score_the_same_targets(name):
    """The loss they train on is the sum over exactly this batch's targets of -log P of their true ids."""
    case, model, batch = peer(name, 5.0)
    logits = model.train()(**peer_inputs(batch, case)).logits
    nll = []
    for b, k in (batch.weight > 0).nonzero().tolist():
        position = batch.targets[b, k]
        row = {"causal": position - 1, "mask": position, "two-stream": k}[case.path]
        nll.append(F.cross_entropy(logits[b, row], batch.tokens[b, position]))
    torch.testing.assert_close(make_loss(case)(model, batch, case.path), torch.stack(nll).sum())


@torch.no_grad()
def test_a_peers_prediction_sees_the_context_of_its_group_and_nothing_else():
    """XLNet: whether a prediction changes with a token, for every pair, against 0 < f(j) < f(i)."""
    case, model, batch = peer("dar", 8.0)
    logits = model.eval()(**peer_inputs(batch, case)).logits
    for j in range(case.config.length):
        tokens = batch.tokens.clone()
        tokens[:, j] = (tokens[:, j] + 1) % case.config.vocab
        other = model(**peer_inputs(batch._replace(tokens=tokens), case)).logits
        changed = (other != logits).any(-1)  # (B, n)
        context = batch.groups[:, j:j + 1] < batch.groups.gather(1, batch.targets)
        assert torch.equal(changed | (batch.weight == 0), context | (batch.weight == 0))


def test_the_peer_for_images_hides_as_many_patches():
    case, model, batch = peer("mae")
    out = model(**peer_inputs(batch, case))
    assert torch.equal(out.mask.sum(1), batch.weight.sum(1))
    assert out.logits.shape == (case.batch, case.config.length, case.config.values)


def test_the_command_compares_with_peers(quick):
    """Objectives against their peers in both precisions; GPT-2's FLOPs by hand. conftest's tiny: 2 x 32."""
    pytest.importorskip("transformers")
    found = call_json("bench.py --objectives ar,vl --mask 0.2,0.4 --preset tiny --length 8 --batch-size 2 "
                      "--rounds 2 --device cpu --dtype fp32,bf16 --peers")
    pairs = [(r["name"], r["other"], r["dtype"], r["other_dtype"]) for r in found["ratios"]]
    assert [pair[2:] for pair in pairs] == [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")] * 2
    assert {pair[:2] for pair in pairs} == {("ar", "GPT2LMHeadModel"), ("vl 0.2,0.4", "BertForMaskedLM")}
    assert [(r["name"], r["other"]) for r in found["against_causal"]] == [("vl 0.2,0.4", "ar")] * 2
    assert all(r["memory"] == 0.5 and r["flops"] < 1 for r in found["ratios"])
    D, L, V, S, B = 32, 2, 4096, 8, 2
    for r in found["results"]:
        assert len(r["ms_rounds"]) == 2 and min(r["ms_rounds"]) <= r["ms_per_step"] <= max(r["ms_rounds"])
        assert r["tokens_per_second"] == pytest.approx(B * S / r["ms_per_step"] * 1e3)
        assert r["mfu"] == pytest.approx(r["flops_per_step"] / r["ms_per_step"] * 1e3 / 1e12)
        if r["peer"] and r["path"] == "causal":
            assert r["flops_per_step"] == 6 * B * (L * (S * 12 * D * D + S * S * D) + S * D * V)


NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

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


def test_nanogpt_is_a_peer_that_scores_the_next_tokens(tmp_path, quick):
    (tmp_path / "model.py").write_text(NANOGPT)
    case = replace(CASES["ar"], peer=str(tmp_path))
    model, batch = make_peer(case), make_draw(case)(0)
    logits = model.head(model.table(batch.tokens))[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(make_loss(case)(model, batch, "causal"), expected)
    printed = call("bench.py --objectives ar,mlm --preset tiny --length 8 --batch-size 2 --rounds 1 "
                   f"--device cpu --dtype fp32 --peer-nanogpt {tmp_path}")
    assert "ar fp32 / nanoGPT fp32" in printed and "mlm 0.15 fp32 / nano" not in printed
