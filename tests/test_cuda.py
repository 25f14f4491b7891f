"""What only a GPU shows: every objective and path on CUDA, in bf16, compiled, over long sequences, resumed.

Skipped where there is none. On one: python -m pytest -q tests/test_cuda.py (under five minutes).
"""

import shutil

import pytest
import torch
from conftest import logged, scaled, seeded

import model as architecture
import train as module
from model import Config, Transformer
from objectives import OBJECTIVES, choose_path, draw_batch, from_options, loss_sum
from run import choose_autocast, resolve
from train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TEXT = Config(vocab=512, length=64, layers=2, width=128, heads=4)
IMAGE = {"vocab": 0, "length": 64, "layers": 2, "width": 128, "heads": 4, "patch": 4, "mean": (0.5,) * 3,
         "std": (0.25,) * 3}
ON_TEXT = [name for name, cls in OBJECTIVES.items() if not cls.images_only]


def all_ways():
    """(objective, path, config) for all that is registered, in one stream where it can be and in two."""
    for name, images in [(name, False) for name in ON_TEXT] + [(name, True) for name in OBJECTIVES]:
        objective = from_options(name)
        for path in dict.fromkeys(choose_path(objective, streams, images) for streams in (None, 2)):
            decoder = (1, 64, 2) if path == "mae" else ()
            config = Config(**IMAGE, decoder=decoder) if images else TEXT
            yield pytest.param(objective, path, config, id=f"{name}-{path}-{'images' if images else 'text'}")


def set_up(objective, path, config, batch=8):
    """A model with large weights on the GPU, so that its output depends on its input, and a random batch."""
    torch.manual_seed(0)
    model, generator = scaled(Transformer(config).cuda(), 1.5), seeded()
    data = (torch.randn(batch, config.length, config.values, generator=generator) if config.patch
            else torch.randint(config.vocab, (batch, config.length), generator=generator))
    return model, draw_batch(objective, path, data, config.vocab, generator).pin_memory().to("cuda")


def loss_and_gradients(function, model, batch, path, dtype=torch.float32):
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = function(model, batch, path) / batch.total[0]
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found).double()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("objective, path, config", list(all_ways()))
def test_the_gpu_computes_what_the_cpu_does(objective, path, config):
    """And bf16 and the compiler keep loss and gradient."""
    model, batch = set_up(objective, path, config)
    loss, gradient = loss_and_gradients(loss_sum, model, batch, path)
    low, low_gradient = loss_and_gradients(loss_sum, model, batch, path, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(loss_sum, dynamic=False, fullgraph=True)
    fast, fast_gradient = loss_and_gradients(compiled, model, batch, path, torch.bfloat16)
    expected, expected_gradient = loss_and_gradients(loss_sum, model.cpu(), batch.to("cpu"), path)
    assert loss == pytest.approx(expected, rel=1e-3) and cosine(gradient.cpu(), expected_gradient) > 0.9999
    assert low == pytest.approx(loss, rel=2e-2) and cosine(low_gradient, gradient) > 0.99
    assert fast == pytest.approx(low, rel=2e-2) and cosine(fast_gradient, gradient) > 0.99


@pytest.mark.parametrize("name", ON_TEXT)
def test_block_masks_are_the_dense_mask(name, monkeypatch):
    """Features and gradients of two streams over 1,024 tokens, through FlexAttention and an S x S mask."""
    objective, config = from_options(name), Config(vocab=512, length=1024, layers=2, width=128, heads=4)
    model, batch = set_up(objective, "two-stream", config, batch=2)
    found = []
    for long in (1024, 10_000):
        monkeypatch.setattr(architecture, "LONG", long)
        model.zero_grad()
        x = model(batch.tokens, batch.groups, batch.targets, "two-stream", cuts=batch.cuts, padded=False)
        (x * batch.weight[..., None]).square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append(((x * (batch.weight > 0)[..., None]).detach().double(), gradient.double()))
    assert all(cosine(blocks, dense) > 0.999 for blocks, dense in zip(*found))


@pytest.mark.parametrize("options", [{"objective": "ar"}, {"objective": "dar"}, {"objective": "vl"},
                                     {"objective": "mlm", "data": "shapes", "size": 8, "patch": 4}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, books, options, optimizer, monkeypatch):
    def keep(path, content, save=module.save_checkpoint):
        save(path, content)
        if content["step"] == 10:
            (tmp_path / "half").mkdir()
            shutil.copy(path, tmp_path / "half" / "ckpt.pt")

    monkeypatch.setattr(module, "save_checkpoint", keep)
    small = {"batch_size": 8, "optimizer": optimizer, "steps": 20}
    if "data" not in options:
        small |= {"data": str(books), "length": 32}
    machine = {"device": "cuda", "compiled": False, "log_every": 5, "quiet": True}
    whole = train(resolve(**options, **small), tmp_path / "whole", save_every=10, **machine)
    resumed = train(resolve(**options, **small), tmp_path / "half", resume=True, **machine)
    assert resumed == pytest.approx(whole, rel=1e-3)  # atomics in the gradients of embeddings round otherwise


def test_training_is_compiled_once_and_in_bf16(tmp_path, books):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = resolve(objective="vl", data=str(books), length=64, batch_size=16, steps=60)
    train(settings, tmp_path / "run", device="cuda", log_every=10, quiet=True)
    lines = logged(tmp_path / "run")
    assert choose_autocast(torch.device("cuda"))[1] == "bf16"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert lines[-1]["loss"] < lines[0]["loss"]
