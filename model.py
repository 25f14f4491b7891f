"""The Transformer: one set of weights, four paths to run an f.

    causal       one stream, ordinary GPT: f = 1, 2, ..., S; position p - 1 predicts token p
    mask         one stream, ordinary BERT: f in {1, 2}; targets are replaced by a [MASK] vector
    mae          f in {1, 2}, images: reads given tokens, a light decoder adds the [MASK]s (He et al. 2021)
    two-stream   any f: a content stream h that sees itself and a query stream g that does not (Eq. 23, 24)

The [MASK] vector of `mask` and the start of the query stream are one parameter: a query *is* a [MASK] that
nothing else can see. Every path returns the features of the target positions only.

A token is an id, embedded by a table that also scores the output; or it is a patch of pixels, embedded and
predicted by linear maps, at a two-dimensional position.

Architecture (the Cramming protocol, paper Sec. 5.1): pre-norm with a final norm, GEGLU feed-forward, no
biases, scaled sinusoidal positions, a norm after the embedding, output layer tied to the embedding.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from masks import content_mask, query_mask

PATHS = ("causal", "mask", "mae", "two-stream")
LONG = 1024  # tokens from which two streams on CUDA use block masks in place of an S x S mask

SIZES = {
    "tiny": {"layers": 4, "width": 128, "heads": 4},      # 0.7M without the embedding: minutes on a CPU
    "mini": {"layers": 4, "width": 256, "heads": 4},      # 2.6M: an hour on a CPU
    "small": {"layers": 8, "width": 512, "heads": 8},     # 21M
    "base": {"layers": 12, "width": 768, "heads": 12},    # 71M
    "paper": {"layers": 16, "width": 768, "heads": 12},   # 94M
    # images; `decoder`: layers, width and heads of the mae path's
    "vit-tiny": {"layers": 4, "width": 128, "heads": 4, "decoder": (1, 64, 2)},       # 0.7M: CIFAR-10, a CPU
    "vit-small": {"layers": 12, "width": 384, "heads": 6, "decoder": (8, 256, 8)},    # 18M
    "vit-base": {"layers": 12, "width": 768, "heads": 12, "decoder": (8, 512, 16)},   # 71M
}


@dataclass(frozen=True)
class Config:
    vocab: int            # 0 for images
    length: int = 128     # longest sequence
    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0  # 0 in pretraining, 0.1 in fine-tuning
    patch: int = 0        # images: side of a patch in pixels; a sequence is a square of patches, row by row
    mean: tuple = ()      # images: of each channel over the training set, in 0..1
    std: tuple = ()
    decoder: tuple = ()   # the mae path: layers, width and heads of its decoder
    blind: bool = False   # two streams: queries are not told which position they predict

    @property
    def values(self):  # numbers in a patch
        return len(self.mean) * self.patch ** 2

    @property
    def size(self):  # side of an image in pixels
        return math.isqrt(self.length) * self.patch


# ---------------------------------------------------------------------------- attention

def attend(q, k, v, bias=None, causal=False):
    """softmax(q k^T / sqrt(d) + bias) v, with q (B, H, N, d), k and v (B, H, S, d).

    `bias` is (B, 1, N, S), 0 or minus infinity, or a block mask, or None where everything is seen.
    """
    if bias is not None and not isinstance(bias, torch.Tensor):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        return flex(q, k, v, block_mask=bias)
    if q.device.type != "cpu" or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    # On a CPU the backward of the fused kernel takes four times as long in bf16 as the formula itself.
    if causal:
        bias = additive(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q.dtype)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                             # (B, H, N, S)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


@functools.cache
def compiled_flex_attention():
    """As plain Python it would make all the scores."""
    return torch.compile(flex_attention)


def block_mask(groups, limits):
    """`masks.sees` for FlexAttention: groups (B, S), limits (B, n) -> BlockMask. Nothing of n x S is made."""
    def may_attend(b, h, i, j):
        return (groups[b, j] > 0) & (groups[b, j] < limits[b, i])

    return create_block_mask(may_attend, len(groups), None, limits.shape[1], groups.shape[1], groups.device,
                             _compile=not torch.compiler.is_compiling())


def additive(mask, dtype):
    """A bool mask, True = may attend, as 0 and minus infinity: the M of Eq. 24."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def compute_dtype(x):
    """The precision in which matrix products with x run: autocast's where it is on, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def gather_rows(x, index):
    """Rows of x (B, N, D) at index (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention: queries come from `x`, keys and values from `content` (Eq. 23)."""

    def __init__(self, config):
        super().__init__()
        self.heads, D = config.heads, config.width
        self.q = nn.Linear(D, D, bias=False)
        self.kv = nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x, content, bias=None, causal=False):
        B, N, D = x.shape
        split = (B, -1, self.heads, D // self.heads)
        q = self.q(x).view(split).transpose(1, 2)                                          # (B, H, N, d)
        k, v = (y.view(split).transpose(1, 2) for y in self.kv(content).chunk(2, dim=-1))  # (B, H, S, d)
        return self.out(attend(q, k, v, bias, causal).transpose(1, 2).reshape(B, N, D))


class FeedForward(nn.Module):
    """GEGLU: one half of the first layer gates the other."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(2 * config.width, config.width, bias=False)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=False)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, S, bias=None, causal=False, select=None):
        """x (B, N, D) -> (B, N, D). The first S rows are the content stream and give the keys and values;
        `select`, in the last layer, is a function that picks the rows that go on."""
        h = self.norm1(x)
        content = h[:, :S]
        if select is not None:
            x, h = select(x), select(h)
        x = x + self.dropout(self.attention(h, content, bias, causal))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


# ---------------------------------------------------------------------------- the Transformer

class Decoder(nn.Module):
    """Of the mae path: encoded given tokens and a [MASK] at every other position in, target features out."""

    def __init__(self, config):
        super().__init__()
        layers, width, heads = config.decoder
        self.embedding = nn.Linear(config.width, width, bias=False)
        self.query = nn.Parameter(torch.empty(width))
        self.position_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("positions", grid_sinusoids(config.length, width), persistent=False)
        inner = replace(config, layers=layers, width=width, heads=heads)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, x, given, filler, targets):
        """Encoded tokens x (B, v, D) of the positions `given`, but not where `filler` -> (B, n, width)."""
        S = len(self.positions)
        x = torch.where(filler[..., None], self.query.to(x.dtype), self.embedding(x))
        h = self.query.to(x.dtype).expand(len(x), S, -1).scatter(1, given[..., None].expand_as(x), x)
        h = h + self.position_scale * self.positions
        for block in self.blocks[:-1]:
            h = block(h, S)
        return self.norm(self.blocks[-1](h, S, select=lambda h: gather_rows(h, targets)))


class Transformer(nn.Module):
    """Tokens - ids or patches - and group indices in, features of the target positions out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.patch:
            self.embedding = nn.Linear(config.values, config.width, bias=False)
            self.pixels = nn.Linear(config.decoder[1] if config.decoder else config.width, config.values)
        else:
            self.embedding = nn.Embedding(config.vocab, config.width)  # its weight is also the output layer's
        self.query = nn.Parameter(torch.empty(config.width))  # [MASK], and where the query stream starts
        self.position_scale = nn.Parameter(torch.empty(1))
        positions = grid_sinusoids if config.patch else sinusoids
        self.register_buffer("positions", positions(config.length, config.width), persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.decoder = Decoder(config) if config.decoder else None
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Embedding and query are as large as the scaled positions they are added to, 1 / sqrt(2 D).

        Attention starts as "look at what is near and alike, and add some of it" (Trockman & Kolter 2023).
        Otherwise small masked models can stay at the unigram loss for millions of tokens.
        """
        if self.config.patch:
            self.pixels.weight.normal_(std=0.02)
            self.pixels.bias.zero_()
        for stack in filter(None, (self, self.decoder)):
            D, L = len(stack.query), len(stack.blocks)
            inputs = 1 if isinstance(stack.embedding, nn.Embedding) else stack.embedding.in_features
            stack.embedding.weight.normal_(std=(2 * D * inputs) ** -0.5)
            stack.query.normal_(std=(2 * D) ** -0.5)
            stack.position_scale.fill_(D ** -0.5)
            for block in stack.blocks:
                for matrix in (p for p in block.parameters() if p.dim() == 2):
                    matrix.normal_(std=(0.4 / D) ** 0.5)
                q, kv, out = block.attention.q.weight, block.attention.kv.weight, block.attention.out.weight
                q.mul_(2)
                kv[:D] = q                                # queries and keys are one map
                out.copy_(kv[D:].T / math.sqrt(L))        # the output map is the values' transposed
                block.feed_forward.down.weight.div_(math.sqrt(2 * L))

    def embed(self, tokens):
        """Tokens (B, N), or patches (B, N, values) -> (B, N, D), not normalised yet."""
        return self.embedding(tokens) + self.position_scale * self.positions[:tokens.shape[1]]

    def run(self, x, S, bias=None, causal=False, select=None, last_bias=None):
        """All blocks and the final norm over embedded x (B, N, D). `select` picks the rows of the last block,
        whose mask is `last_bias`."""
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks[:-1]:
            x = block(x, S, bias, causal)
        return self.norm(self.blocks[-1](x, S, bias if last_bias is None else last_bias, causal, select))

    def forward(self, tokens, groups, targets, path, cuts=None, blank=None, padded=True, given=None):
        """The features from which the targets are predicted, (B, n, D).

        tokens   (B, S) ids or (B, S, values) patches
        groups   (B, S) group indices f
        targets  (B, n) positions to predict; n may exceed S, where a token is asked for more than once
        path     one of PATHS
        cuts     (B, n) two-stream: row k sees { j : 0 < f(j) < cuts[k] }; by default f(targets)
        blank    (B, S) bool, mask: where the input is [MASK]; by default wherever f > 1
        padded   mask: False promises that no f is 0, which saves an attention mask
        given    (B, v) mae: the positions with f = 1, then any others up to the v of static shape
        """
        S = tokens.shape[1]

        if path == "causal":  # GPT: the feature of position p - 1 predicts token p
            x = self.run(self.embed(tokens), S, causal=True)
            return gather_rows(x, (targets - 1).clamp(min=0))

        if path == "mask":    # BERT: everything sees everything that is not padding
            blank = groups > 1 if blank is None else blank
            x = torch.where(blank[..., None], self.query, self.embedding(tokens))
            x = x + self.position_scale * self.positions[:S]
            bias = additive((groups > 0)[:, None, None, :], compute_dtype(x)) if padded else None
            return self.run(x, S, bias, select=lambda x: gather_rows(x, targets))

        if path == "mae":
            return self.mae(tokens, groups, targets, given)
        return self.two_streams(tokens, groups, targets, groups.gather(1, targets) if cuts is None else cuts)

    def two_streams(self, tokens, groups, targets, cuts):
        """Any f: content rows, then one query row for each (target, cut), [h; g] (B, S + n, D). One attention
        call per layer serves both, since their keys and values are the same (Eq. 23)."""
        S, asked = tokens.shape[1], self.query.expand(*targets.shape, -1)     # the theory's f(X), or f(X, p)
        if not self.config.blind:
            asked = asked + self.position_scale * self.positions[targets]
        x = torch.cat([self.embed(tokens), asked], dim=1)
        if tokens.device.type == "cuda" and S >= LONG:
            bias = block_mask(groups, torch.cat([groups + 1, cuts], dim=1))
            last_bias = block_mask(groups, cuts)
        else:
            see = torch.cat([content_mask(groups), query_mask(groups, cuts)], dim=1)     # (B, S + n, S)
            see[..., 0] |= ~see.any(-1)  # softmax over nothing is NaN; these rows are never scored or seen
            bias = additive(see[:, None], compute_dtype(x))
            last_bias = bias[:, :, S:]
        return self.run(x, S, bias, select=lambda x: x[:, S:], last_bias=last_bias)  # only queries are scored

    def mae(self, tokens, groups, targets, given):
        """He et al. 2021: the encoder reads the given tokens, the decoder a [MASK] for each other one too."""
        if given is None:
            most = int((groups == 1).sum(1).max())
            given = (groups != 1).long().argsort(dim=1, stable=True)[:, :most]
        filler, v = groups.gather(1, given) != 1, given.shape[1]
        has_filler = v + targets.shape[1] > tokens.shape[1]  # else v + n = S, and no row is filler
        bias = additive(~filler[:, None, None, :], compute_dtype(self.query)) if has_filler else None
        x = self.run(gather_rows(self.embed(tokens), given), v, bias)
        return self.decoder(x, given, filler, targets)

    def encode(self, tokens, padding=None, causal=False, every_layer=False):
        """The content stream (B, S, D), for classifiers: f = 1 for all, or 1, 2, .., S where `causal`; with
        every_layer the states of all layers, the embedding first. Padding (B, S) is at the end only."""
        x = self.dropout(self.embedding_norm(self.embed(tokens)))
        bias = None if padding is None or causal else additive(~padding[:, None, None, :], compute_dtype(x))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], tokens.shape[1], bias, causal))
        states[-1] = self.norm(states[-1])
        return states if every_layer else states[-1]

    def logits(self, features):
        """Features (..., D) -> scores (..., vocab), through the embedding."""
        return F.linear(features, self.embedding.weight)


def sinusoids(length, width):
    """Sine and cosine positions (length, width), Vaswani et al. 2017."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def grid_sinusoids(length, width):
    """Positions of a square in raster order: half of the width for the row, half for the column."""
    side = math.isqrt(length)
    line = sinusoids(side, width // 2)
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)


# ---------------------------------------------------------------------------- loss over a vocabulary

class LinearCrossEntropy(torch.autograd.Function):
    """sum_i weight_i * -log softmax(x_i E^T)[y_i], a chunk of rows at a time: the scores of all rows never
    exist at once, and each chunk's gradient is computed while its scores are in cache."""

    @staticmethod
    def forward(ctx, x, embedding, labels, weight, chunk, differentiate=True):
        """x (N, D), embedding (V, D), labels (N,), weight (N,) -> the loss, a scalar in fp32."""
        dtype = compute_dtype(x)
        x_low, E, loss = x.to(dtype), embedding.to(dtype), x.new_zeros((), dtype=torch.float32)
        dx, dE = torch.empty_like(x_low), torch.zeros_like(embedding)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            y, w = labels[rows, None], weight[rows, None]
            scores = F.linear(x_low[rows], E).float()                                    # (chunk, V)
            p = torch.softmax(scores, dim=-1)
            # log-sum-exp from the largest probability, which cannot underflow
            total = scores.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
            loss += ((total - scores.gather(1, y)) * w).sum()
            if differentiate:
                p = p.scatter_add_(1, y, torch.full_like(w, -1.0)).mul_(w).to(dtype)     # d loss / d scores
                dx[rows] = F.linear(p, E.T)
                dE += F.linear(p.T, x_low[rows].T)
        ctx.save_for_backward(dx, dE)
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dE = ctx.saved_tensors
        return dx.to(ctx.dtype) * grad, dE * grad, None, None, None, None


def rows_at_once(model):
    """How many rows to send through the output layer at once. On a CPU their scores stay in cache (4 MB)."""
    return max(1, (2 ** 20 if model.query.device.type == "cpu" else 2 ** 28) // model.config.vocab)
