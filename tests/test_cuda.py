"""What only a GPU can show: every objective and path on CUDA, in bf16, compiled, over long sequences, and
resumed.

Skipped where there is none. On one: python -m pytest -q tests/test_cuda.py (under five minutes).
"""
import json

import pytest
import torch

from engine.machine import choose_dtype
from engine.settings import resolve
from model import Config, Transformer
from objectives import OBJECTIVES, choose_path, draw_batch, from_options, loss_sum
from train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TEXT = Config(vocab=512, length=64, layers=2, width=128, heads=4)
IMAGE = {"vocab": 0, "length": 64, "layers": 2, "width": 128, "heads": 4, "patch": 4, "mean": (0.5,) * 3,
         "std": (0.25,) * 3}


def all_ways():
    """(objective, path, config) for all that is registered, in one stream where it can be and in two."""
    for name in OBJECTIVES:
        objective = from_options(name)
        for images in (False, True):
            if objective.images_only and not images:
                continue
            for path in dict.fromkeys(choose_path(objective, streams, images) for streams in (None, 2)):
                decoder = (1, 64, 2) if path == "mae" else ()
                config = Config(**IMAGE, decoder=decoder) if images else TEXT
                yield pytest.param(objective, path, config,
                                   id=f"{name}-{path}-{'images' if images else 'text'}")


def set_up(objective, path, config, batch=8):
    """A model with large weights on the GPU, so that its output depends on its input, and a batch of random
    data."""
    torch.manual_seed(0)
    model = Transformer(config).cuda()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(1.5)
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(batch, config.length, config.values, generator=generator) if config.patch
            else torch.randint(config.vocab, (batch, config.length), generator=generator))
    return model, draw_batch(objective, path, data, config.vocab, generator).pinned().to("cuda")


def loss_and_gradients(function, model, batch, path, dtype=torch.float32):
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = function(model, batch, path) / batch.total[0]
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found).double()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("objective, path, config", list(all_ways()))
def test_the_gpu_computes_what_the_cpu_does(objective, path, config):
    model, batch = set_up(objective, path, config)
    loss, gradient = loss_and_gradients(loss_sum, model, batch, path)
    cpu = batch.to("cpu")
    expected, expected_gradient = loss_and_gradients(loss_sum, model.cpu(), cpu, path)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert cosine(gradient.cpu(), expected_gradient) > 0.9999


@pytest.mark.parametrize("objective, path, config", list(all_ways()))
def test_bf16_and_the_compiler_keep_loss_and_gradient(objective, path, config):
    model, batch = set_up(objective, path, config)
    loss, gradient = loss_and_gradients(loss_sum, model, batch, path)
    low, low_gradient = loss_and_gradients(loss_sum, model, batch, path, torch.bfloat16)
    assert low == pytest.approx(loss, rel=2e-2) and cosine(low_gradient, gradient) > 0.99
    torch._dynamo.reset()
    compiled = torch.compile(loss_sum, dynamic=False, fullgraph=True)
    fast, fast_gradient = loss_and_gradients(compiled, model, batch, path, torch.bfloat16)
    assert fast == pytest.approx(low, rel=2e-2) and cosine(fast_gradient, gradient) > 0.99


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not from_options(name).images_only])
def test_flex_attention_is_the_dense_mask(name):
    """Features and gradients of two streams over 1,024 tokens, in the order of f and through the S x S
    mask."""
    objective, config = from_options(name), Config(vocab=512, length=1024, layers=2, width=128, heads=4)
    model, batch = set_up(objective, "two-stream", config, batch=2)
    found = {}
    for long in (False, True):
        model.zero_grad()
        x = model(batch.tokens, batch.groups, batch.targets, "two-stream", cuts=batch.cuts, padded=False,
                  long=long)
        (x * batch.weight[..., None]).square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[long] = (x * (batch.weight > 0)[..., None]).detach().double(), gradient.double()
    for dense, blocks in zip(found[False], found[True]):
        assert cosine(dense.flatten(), blocks.flatten()) > 0.999


@pytest.mark.parametrize("options", [{"objective": "ar"}, {"objective": "dar"}, {"objective": "vl"},
                                     {"objective": "mlm", "data": "shapes"}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, options, optimizer):
    small = {"size": 8, "patch": 4} if "data" in options else {"length": 32}
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(3000)))
    settings = {"data": str(text), **options, **small, "batch_size": 8, "optimizer": optimizer}
    machine = {"device": "cuda", "compiled": False, "log_every": 5, "quiet": True}
    whole = train(resolve(**settings, steps=20), tmp_path / "whole", save_every=10, **machine)
    train(resolve(**settings, steps=20), tmp_path / "half", save_every=10, **machine)
    half = torch.load(tmp_path / "half" / "ckpt.prev.pt", weights_only=True)
    assert half["step"] == 10
    torch.save(half, tmp_path / "half" / "ckpt.pt")
    resumed = train(resolve(**settings, steps=20), tmp_path / "half", resume=True, **machine)
    # atomics in the gradients of embeddings may round otherwise
    assert resumed == pytest.approx(whole, rel=1e-3)


def test_deterministic_mode_repeats_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(3000)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        settings = resolve(objective="dar", data=str(text), length=32, batch_size=8, steps=10)
        for name in ("one", "two"):
            train(settings, tmp_path / name, device="cuda", compiled=False, quiet=True)
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"]
                for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_training_is_compiled_once_and_says_its_utilisation(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = resolve(objective="vl", length=64, batch_size=16, steps=60)
    train(settings, tmp_path / "run", device="cuda", log_every=10, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert choose_dtype(torch.device("cuda")) == torch.bfloat16
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert lines[-2]["loss"] < lines[0]["loss"]
