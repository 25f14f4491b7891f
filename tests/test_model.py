"""What the Transformer computes, against plain transcriptions, and what its outputs depend on."""

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded

from masks import ar_groups, sees
from model import Config, LinearCrossEntropy, Transformer, additive, attend, block_mask, grid_sinusoids
from objectives import draw_batch, from_options, loss_sum


def run(model, batch, path):
    return model(batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank, False, batch.given)


def dependence(model, batch, path):
    """Which tokens the feature of each query has a gradient to: bool (B, n, B, S), a query's own sequence and
    the others."""
    embedded = []
    hook = model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    features = run(model, batch, path)                                                   # (B, n, D)
    hook.remove()
    scores = features.float() @ torch.randn(features.shape[-1], generator=seeded(1))     # (B, n)
    gradients = [torch.autograd.grad(score, embedded, retain_graph=True)[0] for score in scores.flatten()]
    return torch.stack(gradients).abs().amax(-1).gt(0).view(*scores.shape, *batch.groups.shape)


def check_dependence(model, batch, path):
    """A query depends on the tokens 0 < f(j) < c of its own sequence, on all of them, and on nothing else."""
    wanted = batch.weight > 0
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = dependence(model.float() if autocast else model, batch, path)
        for b, f in enumerate(batch.groups.tolist()):
            expected = torch.tensor([[0 < group < cut for group in f] for cut in batch.cuts[b].tolist()])
            assert torch.equal(found[b, :, b][wanted[b]], expected[wanted[b]])
            assert not found[b, :, :b].any() and not found[b, :, b + 1:].any()


def test_predictions_depend_on_exactly_their_contexts(way, make_model):
    """In float64, and in bf16 too: rounding makes no dependence."""
    objective, path = way
    generator = seeded()
    tokens = torch.randint(11, (3, 8), generator=generator)
    check_dependence(make_model(), draw_batch(objective, path, tokens, 11, generator), path)


def test_a_patch_is_predicted_from_exactly_its_context(image_way, make_image_model):
    objective, path = image_way
    generator = seeded()
    patches = torch.randn(3, 9, 48, generator=generator)
    batch = draw_batch(objective, path, patches, 0, generator)
    check_dependence(make_image_model(path).float(), batch, path)


@pytest.mark.parametrize("path", ["mask", "two-stream"])
def test_padding_is_never_seen(make_model, path):
    """At the end of a sequence or in a hole within it: neither does it change, nor is there a gradient."""
    model, targets = make_model(), torch.tensor([2, 4])
    f, tokens = torch.tensor([1, 1, 2, 0, 2, 1, 0, 0]), torch.arange(8)
    first, second = (model(x[None], f[None], targets[None], path)[0]
                     for x in (tokens, tokens.where(f > 0, 10)))
    assert torch.equal(first, second)
    gradient, = torch.autograd.grad(first.sin().sum(), model.embedding.weight)
    assert torch.equal(gradient[:8].abs().amax(1) > 0, f == 1)


def dense(model, x, f, g, cuts):
    """Eq. 23 and 24 row by row and head by head, for one sequence: content x (S, D) under f, queries g (n, D)
    at their cuts -> the final features of both. Rows that see nothing look at the first token."""
    D, d, S = model.config.width, model.config.width // model.config.heads, len(x)

    def attended(block, rows, limits, keys, values):
        found = []
        for row, limit in zip(block.norm1(rows) @ block.attention.q.weight.T, limits):
            seen = [j for j in range(S) if 0 < f[j] < limit] or [0]
            heads = []
            for head in (slice(start, start + d) for start in range(0, D, d)):
                scores = torch.stack([row[head] @ keys[j, head] for j in seen]) / d ** 0.5
                heads.append(sum(w * values[j, head] for w, j in zip(scores.softmax(0), seen)))
            found.append(torch.cat(heads))
        return torch.stack(found) @ block.attention.out.weight.T

    h, g = model.embedding_norm(x), model.embedding_norm(g)
    for block in model.blocks:
        keys, values = (block.norm1(h) @ block.attention.kv.weight.T).split(D, dim=1)
        h, g = (rows + attended(block, rows, limits, keys, values)
                for rows, limits in ((h, [group + 1 for group in f]), (g, cuts)))
        h, g = (rows + feed_forward(block, rows) for rows in (h, g))
    return model.norm(h), model.norm(g)


def feed_forward(block, rows):
    """GEGLU."""
    up = block.feed_forward.up.weight
    value, gate = (block.norm2(rows) @ half.T for half in (up[:len(up) // 2], up[len(up) // 2:]))
    return (value * gate * (1 + torch.erf(gate / 2 ** 0.5)) / 2) @ block.feed_forward.down.weight.T


def test_every_path_against_a_dense_transcription(way, make_model):
    objective, path = way
    model, generator = make_model(), seeded(5)
    batch = draw_batch(objective, path, torch.randint(11, (1, 8), generator=generator), 11, generator)
    f, cuts, targets = batch.groups[0].tolist(), batch.cuts[0].tolist(), batch.targets[0]
    place = model.position_scale * model.positions
    x, g = model.embedding.weight[batch.tokens[0]] + place, model.query + place[targets]
    if path == "mask":  # everybody sees everybody; where a token is hidden stands what a query starts from
        x = torch.where(batch.groups[0, :, None] == 2, model.query + place, x)
        f = [1] * 8
    h, g = dense(model, x, f, g, cuts)
    expected = {"causal": h[targets - 1], "mask": h[targets], "two-stream": g}[path]
    wanted = batch.weight[0] > 0
    torch.testing.assert_close(run(model, batch, path)[0][wanted], expected[wanted], rtol=0, atol=1e-11)


@pytest.mark.parametrize("mask", [0.6, (0.2, 0.8)])
def test_mae_against_a_plain_transcription(make_image_model, mask):
    """Image by image: encode the visible patches alone, put a mask vector wherever one is hidden, decode,
    read the hidden."""
    objective = from_options("vl" if isinstance(mask, tuple) else "mlm", mask=mask)
    model, generator = make_image_model("mae"), seeded(3)
    patches = torch.randn(6, 9, 48, generator=generator, dtype=torch.float64)
    batch = draw_batch(objective, "mae", patches, 0, generator)
    ours, decoder, total = run(model, batch, "mae"), model.decoder, 0.0
    for b, f in enumerate(batch.groups):
        visible, hidden = ((f == value).nonzero()[:, 0] for value in (1, 2))
        x = model.embedding(patches[b, visible]) + model.position_scale * model.positions[visible]
        x = model.embedding_norm(x)[None]
        for block in model.blocks:
            x = block(x, len(visible))
        full = decoder.query.repeat(9, 1)
        full[visible] = decoder.embedding(model.norm(x)[0])
        full = (full + decoder.position_scale * decoder.positions)[None]
        for block in decoder.blocks:
            full = block(full, 9)
        expected = decoder.norm(full)[0, hidden]
        torch.testing.assert_close(ours[b, batch.weight[b] > 0], expected)
        total += (model.pixels(expected) - patches[b, hidden]).square().mean(1).sum()
    torch.testing.assert_close(loss_sum(model, batch, "mae"), total, check_dtype=False)
    torch.testing.assert_close(run(model, batch._replace(given=None), "mae"), ours)


def test_encode_is_the_content_stream_of_the_training_paths(make_model):
    """Causal features are those that predict the next token, full ones those of a mask path without a mask;
    padding at the end changes nothing."""
    model = make_model(length=9)
    tokens = torch.randint(11, (3, 9), generator=seeded())
    targets = torch.arange(1, 9).expand(3, -1)
    causal, full = model.encode(tokens, causal=True), model.encode(tokens)
    torch.testing.assert_close(causal[:, :-1], model(tokens, ar_groups(9).expand(3, -1), targets, "causal"))
    torch.testing.assert_close(full[:, 1:], model(tokens, torch.ones_like(tokens), targets, "mask"))
    padding = torch.arange(9).expand(3, -1) >= 6
    for causal in (True, False):
        states = model.encode(tokens, padding, causal, every_layer=True)
        torch.testing.assert_close(states[-1][:, :6], model.encode(tokens[:, :6], causal=causal))
        assert len(states) == 4


def test_positions_of_a_square():
    """Row and column are told apart, by half of the width each."""
    positions = grid_sinusoids(9, 16)
    row, column = torch.arange(9) // 3, torch.arange(9) % 3
    for half, line in ((positions[:, :8], row), (positions[:, 8:], column)):
        assert torch.equal((half[:, None] == half).all(-1), line[:, None] == line)


def test_block_masks_see_what_the_masks_say(monkeypatch):
    """Cell by cell, block by block, and attention through them."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # else both would be compiled here
    groups, limits = torch.randint(0, 6, (2, 300), generator=seeded()), torch.randint(0, 6, (2, 410))
    groups[:, 0], limits[:, :200] = 1, limits[:, :200].clamp(max=1)
    mask, expected = block_mask(groups, limits), sees(groups, limits)                    # (2, 410, 300)
    cells = torch.meshgrid(*map(torch.arange, expected.shape), indexing="ij")
    assert torch.equal(mask.mask_mod(cells[0], 0, *cells[1:]), expected)
    tiles = F.pad(expected, (0, -300 % 128, 0, -410 % 128)).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    assert torch.equal(mask.to_dense()[:, 0].bool(), tiles.any(4).any(2))
    q, k, v = (torch.randn(2, 2, n, 16, generator=seeded(n), dtype=torch.float64) for n in (410, 300, 300))
    bias, rows = additive(expected[:, None], torch.float64), expected.any(-1)
    with torch.no_grad():
        ours, plain = (attend(q, k, v, bias).transpose(1, 2)[rows] for bias in (mask, bias))
    torch.testing.assert_close(ours, plain)


def test_bf16_attention_on_a_cpu_is_that_of_the_fused_kernel():
    q, k, v = (torch.randn(2, 3, 6, 8, generator=seeded(n)).bfloat16().requires_grad_() for n in range(3))
    mask = (torch.rand(2, 1, 6, 6, generator=seeded()) < 0.5) | torch.eye(6, dtype=torch.bool)
    for see, causal in ((None, False), (mask, False), (None, True)):
        ours = attend(q, k, v, None if see is None else additive(see, torch.bfloat16), causal)
        full = [x.detach().float().requires_grad_() for x in (q, k, v)]
        exact = F.scaled_dot_product_attention(*full, attn_mask=see, is_causal=causal)
        results = [(ours, exact), *zip(torch.autograd.grad(ours.float().sin().sum(), (q, k, v)),
                                       torch.autograd.grad(exact.sin().sum(), full))]
        assert all(0 < (a.float() - b).norm() / b.norm() < 0.02 for a, b in results)


def test_bf16_is_close_to_fp32(way):
    objective, path = way
    torch.manual_seed(0)
    model = Transformer(Config(vocab=50, length=32, layers=4, width=64, heads=4))
    batch = draw_batch(objective, path, torch.randint(50, (4, 32)), 50, seeded())
    exact = run(model, batch, path)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(model, batch, path)
    wanted = batch.weight > 0
    assert 0 < (rough - exact)[wanted].norm() / exact[wanted].norm() < 0.02


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_linear_cross_entropy_values_and_gradients(chunk):
    generator = seeded()
    x, E = (torch.randn(n, 5, generator=generator, requires_grad=True) for n in (7, 9))
    labels, weight = torch.randint(9, (7,), generator=generator), torch.rand(7, generator=generator)
    ours = LinearCrossEntropy.apply(4 * x, E, labels, weight, chunk)
    plain = (F.cross_entropy(4 * x @ E.T, labels, reduction="none") * weight).sum()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(LinearCrossEntropy.apply(4 * x, E, labels, weight, chunk, False), plain)
    torch.testing.assert_close(torch.autograd.grad(2 * ours, (x, E)), torch.autograd.grad(2 * plain, (x, E)),
                               rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_of_improbable_labels():
    x, E = torch.tensor([[200.0], [-200.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert LinearCrossEntropy.apply(x, E, torch.tensor([2, 0]), torch.ones(2), 8).item() == pytest.approx(800)
