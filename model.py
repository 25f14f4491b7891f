"""The Transformer: one set of weights, run as causal, as mask-token or as two streams, under any f.

    causal       one stream, ordinary GPT: f = 1, 2, ..., S; position p - 1 predicts token p
    mask         one stream, ordinary BERT: f in {1, 2}; targets are replaced by a [MASK] vector
    mae          f in {1, 2}, images: reads given tokens, a light decoder adds the [MASK]s (He et al. 2021)
    two-stream   any f: a content stream h that sees itself and a query stream g that does not (Eq. 23, 24);
                 the only one that takes a token's queries from other cuts than its own f

The [MASK] vector of the second way and the start of the query stream of the last are one parameter: a query
*is* a [MASK] that nothing else can see. Every way returns the features of the target positions only.

Text and images differ at the two ends alone. A token is an id, embedded by a table that also scores the
output; or it is a patch of pixels, embedded and predicted by linear maps, at a two-dimensional position.

Architecture (the Cramming protocol, paper Sec. 5.1): pre-norm with a final norm, GEGLU feed-forward, no
biases, scaled sinusoidal positions, a norm after the embedding, output layer tied to the embedding.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from masks import by_group
from support import kernels
from support.cli import BadInput
from support.kernels import Linear, additive, attend, compute_dtype, prefix_blocks, take, two_stream_bias

PATHS = ("causal", "mask", "mae", "two-stream")

SIZES = {
    "tiny": {"layers": 4, "width": 128, "heads": 4},      # 0.7M without the embedding: minutes on a CPU
    "mini": {"layers": 4, "width": 256, "heads": 4},      # 2.6M: an hour on a CPU
    "small": {"layers": 8, "width": 512, "heads": 8},     # 21M
    "base": {"layers": 12, "width": 768, "heads": 12},    # 71M
    "paper": {"layers": 16, "width": 768, "heads": 12},   # 94M
}

VIT_SIZES = {  # and for the mae path the decoder's layers, width and heads
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
    norm_pix: bool = False  # images: predict pixels relative to the mean and the spread of their own patch
    decoder: tuple = ()   # the mae path: layers, width and heads of its decoder
    blind: bool = False   # two streams: queries are not told which position they predict

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise BadInput(f"width {self.width} does not divide into {self.heads} heads of even size")
        if self.patch and (self.width % 4 or math.isqrt(self.length) ** 2 != self.length):
            raise BadInput(f"an image is a square of patches and its positions take a width that 4 divides: "
                           f"got {self.length} patches, width {self.width}")

    @property
    def hidden(self):
        """Units of the feed-forward after the gate; the layer before it is twice as wide."""
        return 2 * self.width

    @property
    def values(self):
        """Numbers in a patch."""
        return len(self.mean) * self.patch ** 2

    @property
    def size(self):
        """Side of an image in pixels."""
        return math.isqrt(self.length) * self.patch


class Attention(nn.Module):
    """Multi-head attention: queries come from `x`, keys and values from `content` (Eq. 23)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.q = Linear(D, D)
        self.kv = Linear(D, 2 * D)
        self.out = Linear(D, D)

    def forward(self, x, content, bias=None, causal=False, cache=None):
        B, N, D = x.shape
        split = (B, -1, self.heads, D // self.heads)
        q = self.q(x).view(split).transpose(1, 2)                                        # (B, H, N, d)
        k, v = (x.view(split).transpose(1, 2) for x in self.kv(content).chunk(2, dim=-1))  # (B, H, S, d)
        if cache is not None:                                  # generation: keep what earlier tokens computed
            k, v = cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else (k, v)
        y = attend(q, k, v, bias, causal)                                                # (B, H, N, d)
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class FeedForward(nn.Module):
    """GEGLU: one half of the first layer gates the other."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.width, 2 * config.hidden)
        self.down = Linear(config.hidden, config.width)

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

    def forward(self, x, content_rows, bias=None, causal=False, rows=None, cache=None):
        """x (B, N, D), of which the first `content_rows` are the content stream and give the keys and values.

        `rows`, for the last layer, picks the rows that go on (a function of (B, N, D)); the others have
        served as keys and values and nobody reads them again.
        """
        h = self.norm1(x)
        content = h[:, :content_rows]
        if rows is not None:
            x, h = rows(x), rows(h)
        x = x + self.dropout(self.attention(h, content, bias, causal, cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Decoder(nn.Module):
    """Of the mae path: encoded given tokens and a [MASK] at every other position in, target features out."""

    def __init__(self, config):
        super().__init__()
        layers, width, heads = config.decoder
        inner = replace(config, layers=layers, width=width, heads=heads)
        self.embedding = Linear(config.width, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("positions", grid_sinusoids(config.length, width), persistent=False)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, x, given, filler, targets, bias=None):
        """x (B, v, D) are the encoded tokens of positions `given` (B, v), but not where `filler` (B, v)
        -> (B, n, width)."""
        S = len(self.positions)
        x = torch.where(filler[..., None], self.query.to(x.dtype), self.embedding(x))
        h = self.query.to(x.dtype).expand(len(x), S, -1).scatter(1, given[..., None].expand_as(x), x)
        h = h + self.position_scale * self.positions
        for block in self.blocks[:-1]:
            h = block(h, S, bias)
        return self.norm(self.blocks[-1](h, S, bias, rows=lambda h: take(h, targets)))


class Transformer(nn.Module):
    """Tokens - ids or patches - and group indices in, features of the target positions out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.patch:
            self.embedding = Linear(config.values, config.width)
            self.pixels = nn.Linear(config.decoder[1] if config.decoder else config.width, config.values)
        else:
            self.embedding = nn.Embedding(config.vocab, config.width)  # its weight is also the output layer's
        self.query = nn.Parameter(torch.empty(config.width))           # [MASK], and g^(0) of the query stream
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
        """Every initial value but that of the norms, which start at 1, is set here.

        The embedding and the query are as large as the scaled positions they are added to, 1 / sqrt(2 D) for
        each element. Matrices are normal(0, sqrt(0.4 / D)), those at the end of a feed-forward divided by
        sqrt(2 layers). Attention starts as "look at what is near and alike, and add some of it" (Trockman &
        Kolter 2023): queries and keys are one map, twice as large, and the output map is the transpose of the
        values' over sqrt(layers). Otherwise small masked models can stay at the unigram loss for millions of
        tokens.
        """
        if self.config.patch:
            self.pixels.weight.normal_(std=0.02)
            self.pixels.bias.zero_()
        for stack in filter(None, (self, self.decoder)):
            D, L = len(stack.query), len(stack.blocks)
            inputs = getattr(stack.embedding, "in_features", 1)       # a table has one input, the id
            stack.embedding.weight.normal_(std=(2 * D * inputs) ** -0.5)
            stack.query.normal_(std=(2 * D) ** -0.5)
            stack.position_scale.fill_(D ** -0.5)
            for block in stack.blocks:
                for matrix in block.parameters():
                    if matrix.dim() == 2:
                        matrix.normal_(std=(0.4 / D) ** 0.5)
                q, kv, out = block.attention.q.weight, block.attention.kv.weight, block.attention.out.weight
                kv[:D] = q.mul_(2)
                out.copy_(kv[D:].T / math.sqrt(L))
                block.feed_forward.down.weight.div_(math.sqrt(2 * L))

    def embed(self, tokens, first=0):
        """tokens (B, N) or patches (B, N, values) at positions first, first + 1, .. -> (B, N, D), no norm."""
        return self.embedding(tokens) + self.position_scale * self.positions[first:first + tokens.shape[1]]

    def ask(self, targets):
        """What the query stream starts from, for positions targets (B, n) -> (B, n, D), no norm. Blind
        queries with one context are all alike: the theory's f(X), where told ones are f(X, p)."""
        if self.config.blind:
            return self.query.expand(*targets.shape, -1)
        return self.query + self.position_scale * self.positions[targets]

    def forward(self, tokens, groups, targets, path, cuts=None, blank=None, padded=True, given=None,
                long=None):
        """Features from which the targets are predicted.

        tokens  (B, S) ids or (B, S, values) patches; where `blank` (mask path) or f > 1 (the others) a
                target's own token is not read by its own prediction
        groups  (B, S) group indices f
        targets (B, n) positions to predict; n may exceed S, where a token is asked more than once
        path    one of PATHS; the first three know the queries' default cuts only
        cuts    (B, n) two-stream path: query row k sees {j : 0 < f(j) < cuts[k]}; by default f(targets). A
                row that sees nothing, such as a filler with f <= 1, gives a feature that means nothing
        blank   (B, S) bool, mask path: where the input is [MASK]; by default wherever f > 1
        padded  False promises that no f is 0, which saves the mask and mae paths an attention mask
        given   (B, v) mae path: the positions with f = 1, then any others up to the v of static shape
        long    two-stream path: whether to sort by f and use block masks in place of an S x S mask; by
                default on CUDA from LONG tokens, where the heads are wide enough for its kernel
        Returns (B, n, D), of the decoder's width on the mae path.
        """
        if path == "causal":
            return self.causal(tokens, targets)
        if path == "mask":
            return self.masked(tokens, groups, targets, groups > 1 if blank is None else blank, padded)
        if path == "mae":
            return self.mae(tokens, groups, targets, given, padded)
        cuts = groups.gather(1, targets) if cuts is None else cuts
        return self.two_streams(tokens, groups, targets, cuts, long)

    def causal(self, tokens, targets):
        """The ordinary GPT: the feature of position p - 1 predicts token p."""
        x = self.dropout(self.embedding_norm(self.embed(tokens)))
        for block in self.blocks:
            x = block(x, tokens.shape[1], causal=True)
        return self.norm(take(x, (targets - 1).clamp(min=0)))

    def masked(self, tokens, groups, targets, blank, padded):
        """The ordinary BERT: [MASK] wherever `blank`, and everything sees everything that is not padding."""
        S = tokens.shape[1]
        x = torch.where(blank[..., None], self.query, self.embedding(tokens))
        x = self.dropout(self.embedding_norm(x + self.position_scale * self.positions[:S]))
        bias = additive((groups > 0)[:, None, None, :], compute_dtype(x)) if padded else None  # (B, 1, 1, S)
        for block in self.blocks[:-1]:
            x = block(x, S, bias)
        return self.norm(self.blocks[-1](x, S, bias, rows=lambda x: take(x, targets)))

    def mae(self, tokens, groups, targets, given, padded):
        """He et al. 2021: the encoder reads the given tokens, the decoder a [MASK] for each other one too."""
        if given is None:
            given = (groups != 1).long().argsort(dim=1, stable=True)[:, :int((groups == 1).sum(1).max())]
        filler = groups.gather(1, given) != 1
        x = self.dropout(self.embedding_norm(take(self.embed(tokens), given)))
        dtype, v = compute_dtype(x), given.shape[1]
        # Where v + n = S every sequence has exactly v given tokens, and nothing needs to be masked.
        masked = padded or v + targets.shape[1] > tokens.shape[1]
        bias = additive(~filler[:, None, None, :], dtype) if masked else None
        for block in self.blocks:
            x = block(x, v, bias)
        bias = additive((groups > 0)[:, None, None, :], dtype) if padded else None
        return self.decoder(self.norm(x), given, filler, targets, bias)

    def two_streams(self, tokens, groups, targets, cuts, long):
        """Content rows, then one query row for each (target, cut): [h; g] (B, S + n, D). One attention call
        per layer serves both, since their keys and values are the same (Eq. 23)."""
        S, h, g = tokens.shape[1], self.embed(tokens), self.ask(targets)
        if long is None:
            long = (S >= kernels.LONG and tokens.device.type == "cuda"
                    and self.config.width >= 16 * self.config.heads)
        if long:
            order, rows, seen = by_group(groups, targets, cuts)
            h, g = take(h, order), take(g, rows)
            bias, query_bias = prefix_blocks(seen, S), prefix_blocks(seen[:, S:], S)
        else:
            bias = two_stream_bias(groups, targets, cuts, compute_dtype(h))
            query_bias = bias[:, :, S:]
        x = self.dropout(self.embedding_norm(torch.cat([h, g], dim=1)))
        for block in self.blocks[:-1]:
            x = block(x, S, bias)
        x = self.blocks[-1](x, S, query_bias, rows=lambda x: x[:, S:])               # only queries are scored
        return self.norm(take(x, rows.argsort(dim=1)) if long else x)

    def encode(self, tokens, padding=None, causal=False, every_layer=False):
        """The content stream of every token, for classifiers: f = 1 for all, or 1, 2, .., S where `causal`.

        tokens (B, S); padding (B, S) bool, True where there is no token, at the end of a sequence only.
        Returns (B, S, D) after the final norm; with every_layer a list of layers + 1 of them, the embedding
        first, all but the last without that norm.
        """
        x = self.dropout(self.embedding_norm(self.embed(tokens)))
        bias = None if padding is None or causal else additive(~padding[:, None, None, :], compute_dtype(x))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], tokens.shape[1], bias, causal))
        states[-1] = self.norm(states[-1])
        return states if every_layer else states[-1]

    def next_features(self, tokens, cache, first=0):
        """Causal generation: tokens (B, N) at positions first.. -> feature (B, D) that predicts the next one.

        `cache` has one list per layer, empty at first, which keeps the keys and values of the `first` tokens
        that came before.
        """
        x, N, bias = self.embedding_norm(self.embed(tokens, first)), tokens.shape[1], None
        if first and N > 1:  # row i of the new ones sees all that came before and 0..i of the new ones
            sees = torch.ones(N, first + N, dtype=torch.bool, device=x.device).tril(first)
            bias = additive(sees, compute_dtype(x))
        for block, kept in zip(self.blocks, cache):
            x = block(x, N, bias, causal=first == 0, cache=kept)
        return self.norm(x[:, -1])

    def logits(self, features):
        """Features (..., D) -> scores (..., vocab), through the embedding."""
        return F.linear(features, self.embedding.weight)


def sinusoids(length, width):
    """Sine and cosine positions (length, width), Vaswani et al. 2017."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def grid_sinusoids(length, width):
    """Two-dimensional positions (length, width) of a square in raster order: half of the width for the row,
    half for the column (MAE)."""
    side = math.isqrt(length)
    line = sinusoids(side, width // 2)
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)
