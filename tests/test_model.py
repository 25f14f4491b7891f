"""What the Transformer's outputs depend on, and that its three ways of running agree where they must."""
import pytest
import torch

from engine.machine import flops_per_sequence, parameters
from masks import ar_groups, by_group, content_mask, query_mask
from model import SIZES, Config, Transformer, grid_sinusoids
from objectives import Batch, draw_batch, from_options, loss_sum
from support.kernels import Linear, additive, attend, prefix_blocks, take


def dependence(model, batch, path, **how):
    """Whether the feature of query k depends on token j, from gradients: bool (n, S), for a Batch of one
    sequence whose tokens are 0, 1, .., S - 1, so that a gradient to an id is one to a position."""
    S, table = batch.tokens.shape[1], model.embedding.weight
    features = model(batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank, **how)[0]
    probe = torch.randn(features.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = (features @ probe.to(features)).unbind()
    rows = [torch.autograd.grad(score, table, retain_graph=True)[0] for score in scores]
    return torch.stack(rows)[:, :S].abs().amax(2) > 0


def sees(batch):
    """What each query of a Batch of one sequence may depend on, from the definition: bool (n, S)."""
    f, cuts = batch.groups[0], batch.cuts[0]
    return torch.tensor([[0 < group < cut for group in f.tolist()] for cut in cuts.tolist()])


def masks_in_full(seen, S):
    """What prefix_blocks stands for; FlexAttention has no gradient on a CPU."""
    return additive(torch.arange(S) < seen[:, None, :, None], torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_no_gradient_leaks_from_outside_the_context(way, make_model, seed, monkeypatch):
    """d feature_k / d token_j is zero unless 0 < f(j) < c(k), and not zero where it should not be: in float64
    under autocast to bf16 too, and with the rows in the order of f."""
    objective, path = way
    model = make_model(vocab=8)
    batch = draw_batch(objective, path, torch.arange(8)[None], 8, torch.Generator().manual_seed(seed))
    asked, expected = batch.weight[0] > 0, sees(batch)
    assert torch.equal(dependence(model, batch, path)[asked], expected[asked])
    leaks = ~expected[asked]
    with torch.autocast("cpu", torch.bfloat16):  # rounding may hide a dependence, but makes none
        rough = dependence(model.float(), batch, path)[asked]
    assert not (rough & leaks).any() and (rough | leaks).float().mean() > 0.9
    if path == "two-stream":
        monkeypatch.setattr("model.prefix_blocks", masks_in_full)
        assert torch.equal(dependence(model.double(), batch, path, long=True)[asked], expected[asked])


@pytest.mark.parametrize("path", ["mask", "two-stream"])
def test_padding_is_never_seen(make_model, path):
    """At the end of a sequence or in a hole within it."""
    groups, targets = torch.tensor([1, 1, 2, 0, 2, 1, 0, 0]), torch.tensor([2, 4])
    batch = plain_batch(groups, targets)
    assert torch.equal(dependence(make_model(vocab=8), batch, path), (groups == 1).expand(2, -1))


def plain_batch(groups, targets):
    """One sequence of tokens 0, 1, .. under f (S,), with targets at their own cuts."""
    f, none = groups[None], torch.empty(1, 0)
    tokens = torch.arange(len(groups))[None]
    return Batch(tokens, f, f > 1, none, targets[None], f[:, targets], none, none, none)


def test_dar_1_and_two_stream_ar_and_causal_depend_on_the_same_tokens(make_model):
    model, tokens = make_model(vocab=8), torch.randint(8, (2, 8))
    ways = [(from_options("ar"), "causal"), (from_options("ar"), "two-stream"),
            (from_options("dar", t=1), "two-stream")]
    batches = [draw_batch(*way, torch.arange(8)[None], 8) for way in ways]
    first, *others = (dependence(model, batch, path) for batch, (_, path) in zip(batches, ways))
    assert all(torch.equal(first, other) for other in others)
    features = [model(tokens, batch.groups.expand(2, -1), batch.targets.expand(2, -1), "two-stream")
                for batch in batches[1:]]
    assert torch.equal(*features)


def dense_two_stream(model, tokens, f, targets, cuts):
    """Eq. 23 and 24 token by token and head by head, for one sequence; NaN-free by letting rows that see
    nothing see the first token. Returns the features (n, D) of the queries."""
    S, D, H = len(tokens), model.config.width, model.config.heads
    d = D // H
    positions = model.position_scale * model.positions[:S]
    h = model.embedding_norm(model.embedding.weight[tokens] + positions)
    g = model.embedding_norm(model.query + positions[targets])
    for block in model.blocks:
        q, kv = block.attention.q.weight, block.attention.kv.weight
        keys, values = block.norm1(h) @ kv[:D].T, block.norm1(h) @ kv[D:].T

        def attended(x, mask, q=q, keys=keys, values=values, block=block):
            rows = []
            for i in range(len(x)):
                seen = [j for j in range(S) if mask[i][j]] or [0]
                query = block.norm1(x[i]) @ q.T
                heads = []
                for k in range(H):
                    part = slice(k * d, (k + 1) * d)
                    scores = torch.stack([query[part] @ keys[j, part] for j in seen]) / d ** 0.5
                    heads.append(sum(w * values[j, part] for w, j in zip(scores.softmax(0), seen)))
                rows.append(torch.cat(heads))
            return torch.stack(rows) @ block.attention.out.weight.T

        h_new = h + attended(h, [[0 < f_j <= f_i for f_j in f] for f_i in f])
        g_new = g + attended(g, [[0 < f_j < c for f_j in f] for c in cuts])
        h, g = (x + block.feed_forward(block.norm2(x)) for x in (h_new, g_new))
    return model.norm(g)


DENSE = [("dar", {"t": 3}), ("vl", {}), ("permutation", {}), ("mtp", {"t": 3})]


@pytest.mark.parametrize("name, options", DENSE)
def test_two_streams_against_a_dense_transcription(make_model, name, options):
    model, objective = make_model(), from_options(name, **options)
    generator = torch.Generator().manual_seed(5)
    groups = objective.groups(1, 8, generator)
    tokens = torch.randint(11, (1, 8), generator=generator)
    (targets,), (cuts,), (weight,) = objective.queries(groups)
    ours = model(tokens, groups, targets[None], "two-stream", cuts[None])[0]
    expected = dense_two_stream(model, tokens[0], groups[0].tolist(), targets.tolist(), cuts.tolist())
    assert torch.allclose(ours[weight > 0], expected[weight > 0], atol=1e-12)


def padded_draw(way, length, vocab=20):
    """A two-stream Batch of three sequences, of which the second has padding at its end and a hole, and which
    of its queries still have a target and see something."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (3, length), generator=generator)
    batch = draw_batch(way[0], "two-stream", tokens, vocab, generator)
    groups = batch.groups.clone()
    groups[1, -length // 4:] = groups[1, 1] = 0
    scored = (batch.weight > 0) & (groups.gather(1, batch.targets) > 0)
    return batch._replace(groups=groups), scored & query_mask(groups, batch.cuts).any(-1)


def test_in_the_order_of_f_every_row_sees_a_prefix(way):
    batch, scored = padded_draw(way, 24)
    order, rows, seen = by_group(batch.groups, batch.targets, batch.cuts)
    for b, f in enumerate(batch.groups):
        prefix = torch.arange(24) < seen[b, :, None]                          # (S + n, S), in the order of f
        real = f[order[b]] > 0
        assert torch.equal(prefix[:24][real], content_mask(f)[order[b]][:, order[b]][real])
        of = scored[b, rows[b]]
        assert torch.equal(prefix[24:][of], query_mask(f, batch.cuts[b])[rows[b]][:, order[b]][of])


@pytest.mark.parametrize("length", [256, 300])
def test_block_masks_against_all_pairs(length):
    seen = torch.randint(1, length + 1, (2, 410), generator=torch.Generator().manual_seed(0))
    seen[1] = seen[1].sort().values
    mask = prefix_blocks(seen, length)
    pairs = torch.nn.functional.pad(torch.arange(length) < seen[..., None], (0, -length % 128, 0, -410 % 128))
    # (B, row blocks, key blocks, 128, 128)
    tiles = pairs.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)
    assert torch.equal(mask.to_dense()[:, 0].bool(), tiles.any(-1).any(-1))
    inside = slice(0, 410 // 128)  # the last rows are not a whole block
    assert torch.equal(mask.full_kv_num_blocks[:, 0, inside], tiles.all(-1).all(-1).sum(-1)[:, inside].int())


def test_long_sequences_have_the_features_and_gradients_of_short_ones(way, make_model, monkeypatch):
    """The order of f with FlexAttention, which has no gradient on a CPU, and with the same masks in full."""
    model, (batch, scored) = make_model(vocab=20, length=40), padded_draw(way, 40)
    results = []
    for long in (False, True, True):
        with torch.set_grad_enabled(len(results) != 1):
            features = model(*batch[:2], batch.targets, "two-stream", batch.cuts, long=long)[scored]
            total = features.sin().sum()
            gradient = torch.autograd.grad(total, list(model.parameters())) if len(results) != 1 else ()
        results.append((features, gradient))
        if len(results) == 2:
            monkeypatch.setattr("model.prefix_blocks", masks_in_full)
    (plain, wanted), (flex, _), (sorted_rows, gradient) = results
    assert torch.allclose(flex, plain, atol=1e-9) and torch.allclose(sorted_rows, plain, atol=1e-9)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(gradient, wanted))


@pytest.mark.parametrize("name", ["permutation", "mtp"])
def test_long_sequences_are_one_graph(name):
    torch.manual_seed(0)
    model, count = Transformer(Config(20, 40)), torch._dynamo.utils.counters["stats"]
    forward = torch.compile(lambda *args: model(*args, long=True), dynamic=False, fullgraph=True,
                            backend="aot_eager")
    before = count["unique_graphs"]
    for seed in range(3):
        draw = draw_batch(from_options(name), "two-stream", torch.randint(20, (2, 40)), 20,
                          torch.Generator().manual_seed(seed))
        inputs = (draw.tokens, draw.groups, draw.targets, "two-stream", draw.cuts)
        with torch.no_grad():
            assert torch.allclose(forward(*inputs), model(*inputs, long=False), atol=1e-5)
    assert count["unique_graphs"] == before + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled, autocast", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name, options", [("dar", {"t": 3}), ("mlm", {"mask": 0.05}), ("mtp", {"t": 2})])
def test_long_sequences_on_a_gpu(name, options, compiled, autocast):
    torch.manual_seed(0)
    model = Transformer(Config(50, 1100, layers=2, width=64, heads=2)).cuda()
    objective, tokens = from_options(name, **options), torch.randint(50, (2, 1100))
    draw = draw_batch(objective, "two-stream", tokens, 50).to("cuda")
    loss = torch.compile(loss_sum, dynamic=False) if compiled else loss_sum
    gradients = []
    for length in (10 ** 9, 1024):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.kernels.LONG", length)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                total = loss(model, draw, "two-stream")
            gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for plain, long in zip(*gradients):
        assert (plain - long).norm() <= (5e-2 if autocast else 1e-2) * plain.norm()


def test_mask_path_with_every_target_masked_sees_masks_but_not_tokens(make_model):
    """A [MASK] is a query vector that others can see: with one target, both paths still differ, since in one
    stream the given tokens look at the mask."""
    model = make_model()
    groups, targets = torch.tensor([[1, 1, 1, 2, 1, 1, 1, 1]]), torch.tensor([[3]])
    tokens = torch.randint(11, (1, 8))
    one, two = (model(tokens, groups, targets, path) for path in ("mask", "two-stream"))
    assert not torch.allclose(one, two)
    other = tokens.clone()
    other[0, 3] = (tokens[0, 3] + 1) % 11
    assert torch.equal(one, model(other, groups, targets, "mask"))


def test_first_group_rows_are_finite_forward_and_backward(make_model):
    """Rows that see nothing (the first group of dar, fillers of vl) must not turn into NaN, even unscored."""
    model = make_model().requires_grad_()
    groups = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3], [0, 0, 1, 1, 1, 2, 2, 2]])
    features = model(torch.randint(11, (2, 8)), groups, torch.arange(8).expand(2, -1), "two-stream")
    features.square().sum().backward()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bf16_is_close_to_fp32(way):
    objective, path = way
    torch.manual_seed(0)
    model = Transformer(Config(vocab=50, length=32, layers=4, width=64, heads=4))
    batch = draw_batch(objective, path, torch.randint(50, (4, 32)), 50, torch.Generator().manual_seed(0))
    arguments = (batch.tokens, batch.groups, batch.targets, path, batch.cuts, batch.blank)
    exact = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*arguments)
    real = batch.weight.bool()
    error = (rough - exact)[real].norm() / exact[real].norm()
    assert 0 < error < 0.02


def test_fast_attention_equals_the_fused_kernel():
    """The plain formula that bf16 training takes on a CPU, against PyTorch's kernel in float32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    for bias, causal in ((None, False), (additive(mask, torch.bfloat16), False), (None, True)):
        ours = attend(q, k, v, bias, causal)
        full = None if bias is None else bias.float()
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=full, is_causal=causal)
        assert (ours.float() - exact).norm() / exact.norm() < 0.02
        ours.float().sum().backward()


def test_linear_layers_have_the_plain_result_and_gradient():
    """Whatever kernel this machine takes, against the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, n, generator=generator).requires_grad_() for n in (24, 40))
    layer = Linear(24, 40)
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, layer.weight), g)
    exact = (x.double() @ layer.weight.double().T, g.double() @ layer.weight.double(),
             torch.einsum("bio,bij->oj", g.double(), x.double()))
    for ours, expected in zip((y, *gradients), exact):
        assert ours.dtype == torch.float32 and (ours - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("chunks", [(3, 1, 1, 1, 1), (3, 4), (1, 2, 3, 1)])
def test_generation_cache_equals_recomputation(make_model, chunks):
    """Several new tokens behind a cache do not see each other's future."""
    model, tokens, first = make_model(), torch.randint(11, (2, 8)), 0
    cache = [[] for _ in model.blocks]
    for count in chunks:
        with torch.no_grad():
            feature = model.next_features(tokens[:, first:first + count], cache, first)
            first += count
            whole = model(tokens, ar_groups(8).expand(2, -1), torch.full((2, 1), first), "causal")
        assert torch.allclose(feature, whole[:, 0], atol=1e-12)


def test_paper_size_and_flops():
    model = Transformer(Config(vocab=32768, **SIZES["paper"]))
    D, L = 768, 16
    # q, k, v, out; both halves of GEGLU; back; two norms
    blocks = L * (4 * D * D + 2 * D * 1536 + 1536 * D + 2 * D)
    assert parameters(model) == (32768 * D + blocks + 2 * D + D + 1, blocks + 2 * D + D + 1)
    # By the usual rule: 6 per weight and token, and 12 L D S / 2 for causal attention (half the square)
    S, config = 128, model.config
    rule = 6 * (blocks - 2 * L * D) * S + 6 * L * D * S * S + 6 * D * 32768 * (S - 1)
    assert flops_per_sequence(config, "causal", S, S - 1) == pytest.approx(rule, rel=1e-6)
    two = flops_per_sequence(config, "two-stream", S, S - 1) / flops_per_sequence(config, "causal", S, S - 1)
    assert 1.5 < two < 2


def test_encode_is_the_content_stream_of_the_training_paths(make_model):
    """Causal features are those that predict the next token, full ones those of a mask path without a mask;
    padding at the end changes nothing."""
    model = make_model(length=9)
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(1, 9).expand(3, -1)
    causal = model.encode(tokens, causal=True)
    torch.testing.assert_close(causal[:, :-1], model(tokens, ar_groups(9).expand(3, -1), targets, "causal"))
    full = model.encode(tokens)
    ones = torch.ones_like(tokens)
    torch.testing.assert_close(full[:, 1:], model(tokens, ones, targets, "mask"))
    assert not torch.allclose(full, causal)
    padding = torch.arange(9).expand(3, -1) >= 6
    for how in (True, False):
        states = model.encode(tokens, padding, how, every_layer=True)
        torch.testing.assert_close(states[-1][:, :6], model.encode(tokens[:, :6], causal=how))
        assert len(states) == 4


# ---------------------------------------------------------------------------- images

@pytest.mark.parametrize("seed", range(2))
def test_a_patch_is_predicted_from_its_context_alone(image_way, make_image_model, seed):
    """The loss of a query has a gradient to exactly the patches 0 < f(j) < c: through a whole batch as
    drawn."""
    objective, path = image_way
    model, generator = make_image_model(path), torch.Generator().manual_seed(seed)
    patches = torch.randn(4, 9, 48, generator=generator, dtype=torch.float64)
    batch = draw_batch(objective, path, patches, 0, generator)
    inputs = batch.tokens.clone().requires_grad_()
    features = model(inputs, batch.groups, batch.targets, path, batch.cuts, batch.blank, False, batch.given)
    probe = torch.randn(features.shape[-1], dtype=torch.float64, generator=generator)
    for b, f in enumerate(batch.groups):
        for k in batch.weight[b].nonzero()[:, 0].tolist():
            gradient, = torch.autograd.grad(features[b, k] @ probe, inputs, retain_graph=True)
            assert torch.equal(gradient[b].abs().amax(1) > 0, f < batch.cuts[b, k])
            assert gradient[:b].count_nonzero() == gradient[b + 1:].count_nonzero() == 0


@pytest.mark.parametrize("mask", [0.6, (0.2, 0.8)])
def test_mae_against_a_plain_index_transcription(make_image_model, mask):
    """Image by image: encode the visible patches alone, put a mask vector wherever one is hidden, decode,
    read the hidden."""
    objective = from_options("mlm" if isinstance(mask, float) else "vl", mask=mask)
    model, generator = make_image_model("mae"), torch.Generator().manual_seed(3)
    patches = torch.randn(6, 9, 48, generator=generator, dtype=torch.float64)
    batch = draw_batch(objective, "mae", patches, 0, generator)
    ours = model(batch.tokens, batch.groups, batch.targets, "mae", padded=False, given=batch.given)
    total = 0.0
    for b, f in enumerate(batch.groups.tolist()):
        visible, hidden = ([i for i in range(9) if f[i] == value] for value in (1, 2))
        x = [model.embedding(patches[b, i]) + model.position_scale * model.positions[i] for i in visible]
        x = model.embedding_norm(torch.stack(x))[None]
        for block in model.blocks:
            x = block(x, len(visible))
        x, decoder = model.norm(x), model.decoder
        whole = torch.stack([decoder.embedding(x[0, visible.index(i)]) if i in visible else decoder.query
                             for i in range(9)])
        whole = (whole + decoder.position_scale * decoder.positions)[None]
        for block in decoder.blocks:
            whole = block(whole, 9)
        expected = decoder.norm(whole)[0, hidden]
        torch.testing.assert_close(ours[b, batch.weight[b] > 0], expected)
        total += (model.pixels(expected) - patches[b, hidden]).square().mean(1).sum()
    torch.testing.assert_close(loss_sum(model, batch, "mae"), total, check_dtype=False)
    # without `given`, the same
    torch.testing.assert_close(model(batch.tokens, batch.groups, batch.targets, "mae", padded=False), ours)


def test_normalised_pixels(make_image_model):
    """--norm-pix compares with each patch's own standard score."""
    model = make_image_model("causal", norm_pix=True)
    patches = torch.randn(2, 9, 48, dtype=torch.float64)
    batch = draw_batch(from_options("ar"), "causal", patches, 0)
    features = model(patches, batch.groups, batch.targets, "causal")
    variance = patches.var(-1, keepdim=True, correction=0)
    scores = (patches - patches.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    expected = (model.pixels(features) - scores[:, 1:]).square().mean(-1).sum()
    torch.testing.assert_close(loss_sum(model, batch, "causal"), expected, check_dtype=False)


def test_positions_of_a_square():
    """Row and column are told apart, by half of the width each."""
    positions = grid_sinusoids(9, 16)
    assert len(positions.unique(dim=0)) == 9
    for i in range(9):
        for j in range(9):
            assert torch.equal(positions[i, :8], positions[j, :8]) == (i // 3 == j // 3)
            assert torch.equal(positions[i, 8:], positions[j, 8:]) == (i % 3 == j % 3)
    assert torch.equal(take(positions[None], torch.tensor([[4]]))[0, 0], positions[4])
