"""The compiled step is one graph for each shape, whatever the objective and the path. The branches that only
a GPU takes run here on tensors that have a shape and a device but no content."""

import functools

import pytest
import torch

import model as architecture
from engine import machine
from engine.settings import resolve
from engine.steps import clip_gradients, make_optimizer, parts
from model import Config, Transformer
from objectives import OBJECTIVES, choose_path, draw_batch, from_options, loss_sum
from support import kernels
from train import batch_sizes, update

LENGTH, VOCAB = 16, 11
TEXT = [(name, streams) for name, cls in OBJECTIVES.items() if not cls.images_only for streams in (1, 2)
        if streams == 2 or cls.one_stream]
IMAGES = [("ar", 1), ("ar", 2), ("mlm", 1), ("vl", 1), ("vl", 2), ("segments", 2)]
WAYS = [(*way, False) for way in TEXT] + [(*way, True) for way in IMAGES if way[0] in OBJECTIVES]


def small_model(path, images=False, dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    if images:
        size = {"patch": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3}
        size["decoder"] = (2, 16, 2) if path == "mae" else ()
        return Transformer(Config(0, LENGTH, layers, 32, 2, **size)).to(dtype)
    return Transformer(Config(VOCAB, LENGTH, layers, 32, 2)).to(dtype)


def make_batch(objective, path, count, images=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(count, LENGTH, 48, generator=generator) if images else
              torch.randint(VOCAB, (count, LENGTH), generator=generator))
    return draw_batch(objective, path, tokens, VOCAB, generator)


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by one for each graph compiled: torch.compile with a backend that only counts."""
    torch._dynamo.reset()
    compiled, genuine = [], torch.compile

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    def counted(function, dynamic):
        return genuine(function, dynamic=dynamic, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", counted)
    yield compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("name, streams, images", WAYS)
def test_one_graph_for_each_shape(name, streams, images, graphs):
    """A ramped batch in micro-batches: as many graphs as its parts have sizes, none anew, and no break."""
    objective = from_options(name)
    path = choose_path(objective, streams, images)
    settings = resolve(batch_size=8, batch_ramp=0.6)
    model, sizes = small_model(path, images, layers=1), sorted({*batch_sizes(settings, 20)})
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
    model, batch = small_model(path, layers=1), make_batch(objective, path, 4)
    results = []
    for function in (loss_sum, machine.compiled_loss(True)):
        model.zero_grad()
        loss = function(model, batch, path)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name, streams, images", WAYS)
@pytest.mark.parametrize("long", [False, True])
def test_the_loss_off_the_cpu(name, streams, images, long, monkeypatch):
    """The branches of other devices than the CPU, in bf16 and with the block masks of long sequences, on
    tensors without content: to ask for a value, for which a GPU would be waited for, raises."""
    objective = from_options(name)
    path = choose_path(objective, streams, images)
    if long and path != "two-stream":
        pytest.skip("block masks are for two streams")
    blocks, genuine = [], kernels.prefix_blocks
    monkeypatch.setattr(architecture, "prefix_blocks", lambda *args: (blocks.append(1), genuine(*args))[1])
    monkeypatch.setattr(kernels, "compiled_flex_attention", lambda: stand_in)
    for module in (kernels, architecture):
        monkeypatch.setattr(module, "compute_dtype", lambda x: x.dtype)  # no autocast for such tensors
    model = small_model(path, images, torch.bfloat16).to("meta")
    model.forward = functools.partial(model.forward, long=long)
    batch = make_batch(objective, path, 4, images).to("meta")
    batch = batch._replace(tokens=batch.tokens.bfloat16() if images else batch.tokens)
    loss = loss_sum(model, batch, path)
    loss.backward()
    assert loss.shape == () and loss.device.type == "meta" and bool(blocks) == long
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused <= {"query"}, unused


def stand_in(q, k, v, block_mask):
    """The shape that attention has, for a kernel that only exists compiled."""
    assert block_mask.seq_lengths == (q.shape[2], k.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_muon_never_waits_for_the_device():
    """found_inf is a tensor that stays there: to ask for its value would raise here."""
    model = small_model("two-stream").to("meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer = make_optimizer(model, resolve(optimizer="muon"))
    norm = clip_gradients(model, 0.5)
    optimizer.found_inf = (~norm.isfinite()).float()
    groups = [group for group in optimizer.param_groups if "orthogonal" in group]
    with torch.no_grad():
        optimizer.muon_step([(p, group) for group in groups for p in group["params"]])
    assert norm.shape == () and norm.device.type == "meta"


def test_a_batch_is_pinned_before_it_goes_to_a_gpu(monkeypatch):
    """Every field, made contiguous first, without which pin_memory copies more than the part."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (pinned.append(x.is_contiguous()), x)[1])
    batch = make_batch(from_options("vl"), "mask", 8).part(2, 6)
    assert all(torch.equal(a, b) for a, b in zip(batch.pinned(), batch, strict=True))
    assert pinned == [True] * len(batch)
