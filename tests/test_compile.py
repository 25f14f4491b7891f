"""The compiled step is one graph for each shape, whatever the objective and the path, and a step sees no other shapes than
it must. The branches that only a GPU takes run here on tensors that have a shape and a device but no content."""

import dataclasses
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import objectives
from engine import machine
from engine.settings import resolve
from engine.steps import clip_gradients, make_optimizer, parts, take_step
from model import Config, Transformer
from objectives import OBJECTIVES, choose_path, draw_batch, from_options, loss_sum
from support import kernels
from train import batch_sizes, update

LENGTH, VOCAB = 16, 11
TEXT = [(name, streams) for name, cls in OBJECTIVES.items() if not cls.images_only for streams in (1, 2)
        if streams == 2 or cls.one_stream]
IMAGES = [(name, streams) for name, cls in OBJECTIVES.items() for streams in (1, 2) if streams == 2 or cls.one_stream]


def small_model(path, images=False, dtype=torch.float32):
    torch.manual_seed(0)
    if images:
        size = {"patch": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3, "decoder": (2, 16, 2) if path == "mae" else ()}
        return Transformer(Config(0, LENGTH, 2, 32, 2, **size)).to(dtype)
    return Transformer(Config(VOCAB, LENGTH, 2, 32, 2)).to(dtype)


def make_batch(objective, path, count, images=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(count, LENGTH, 48, generator=generator) if images else
              torch.randint(VOCAB, (count, LENGTH), generator=generator))
    return draw_batch(objective, path, tokens, VOCAB, generator)


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by one for each graph that is compiled: torch.compile with a backend that only counts."""
    torch._dynamo.reset()
    compiled, genuine = [], torch.compile

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **how: genuine(function, **{**how, "backend": backend},
                                                                          fullgraph=True))
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("name, streams, images", [(*way, False) for way in TEXT] + [(*way, True) for way in IMAGES])
def test_one_graph_for_each_shape(name, streams, images, graphs):
    """A ramped batch in micro-batches, over several steps: as many graphs as there are sizes of its parts, and no break."""
    objective = from_options(name)
    path = choose_path(objective, streams, images)
    settings = resolve(batch_size=8, batch_ramp=0.6)
    model, sizes = small_model(path, images), sorted({*batch_sizes(settings, 20)})
    loss_module = machine.LossModule(model, machine.compiled_loss(True))
    optimizer = make_optimizer(model, settings)
    autocast = machine.Machine(torch.device("cpu")).autocast
    shapes = {stop - start for size in sizes for start, stop in parts(size, 3)}
    for seed, size in enumerate(sizes * 2):
        batch = make_batch(objective, path, size, images, seed)
        batches = [batch.part(*cut) for cut in parts(size, 3)]
        total, _, wrong = update(loss_module, optimizer, batches, float(batch.total[0]), path, autocast, 0.5)
        assert total > 0 and not wrong
    assert len(graphs) == len(shapes) <= 3


@pytest.mark.parametrize("name, streams", [("dar", 2), ("vl", 1)])
def test_inductor_computes_the_same(name, streams):
    """The compiler itself, on a CPU."""
    torch._dynamo.reset()
    objective = from_options(name)
    path = choose_path(objective, streams)
    model, batch = small_model(path), make_batch(objective, path, 4)
    results = []
    for function in (loss_sum, machine.compiled_loss(True)):
        model.zero_grad()
        loss = function(model, batch, path)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name, streams, images", [(*way, False) for way in TEXT] + [(*way, True) for way in IMAGES])
@pytest.mark.parametrize("long", [False, True])
def test_the_step_on_cuda_has_the_right_shapes(name, streams, images, long, monkeypatch):
    """Half precision, the fused optimiser, and where asked for the block masks of long sequences, on a GPU that is not
    there: fake tensors say what every operation would give."""
    objective = from_options(name)
    path = choose_path(objective, streams, images)
    if long and path != "two-stream":
        pytest.skip("block masks are for two streams")
    monkeypatch.setattr(kernels, "LONG", LENGTH if long else 10 ** 9)
    batch = make_batch(objective, path, 4, images)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        device = torch.device("cuda")
        model = on_fake(small_model(path, images), device, fake)
        batch = objectives.Batch(*(moved(field, device, fake) for field in batch))
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_sum(model, batch, path) / 7.0
        assert loss.shape == () and loss.device.type == "cuda"
        loss.backward()
        got = {n for n, p in model.named_parameters() if p.grad is not None}
        assert {n for n, _ in model.named_parameters()} - got <= {"query", "pixels.bias"}
        norm = clip_gradients(model, 0.5)
        wrong = (~norm.isfinite()).float()
        for kind in ("adamw", "muon"):
            optimizer = make_optimizer(model, dataclasses.replace(resolve(), optimizer=kind))
            assert optimizer.defaults["fused"] and norm.shape == wrong.shape == ()
            take_step(optimizer, wrong)


def moved(x, device, fake):
    """A fake of x on that device."""
    return fake.from_tensor(x).to(device)


def on_fake(model, device, fake):
    """The model with fake parameters and buffers on that device."""
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(moved(p.detach(), device, fake), p.requires_grad)
        for name, b in [*module._buffers.items()]:
            module._buffers[name] = moved(b, device, fake)
    return model
