"""The Transformer: one set of weights, run as causal, as mask-token or as two streams, under any group index f.

    causal       one stream, ordinary GPT: f = 1, 2, ..., S; position p - 1 predicts token p
    mask         one stream, ordinary BERT: f in {1, 2}; targets are replaced by a [MASK] vector
    two-stream   any f: a content stream h that sees itself and a query stream g that does not (Eq. 23, 24)

The [MASK] vector of the second way and the start of the query stream of the third are one parameter: a query *is* a
[MASK] that nothing else can see. Every way returns the features of the target positions only.

Architecture (the Cramming protocol, paper Sec. 5.1): pre-norm with a final norm, GEGLU feed-forward, no biases, scaled
sinusoidal positions, a norm after the embedding, output layer tied to the embedding.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from masks import BadInput, content_mask, query_mask

PATHS = ("causal", "mask", "two-stream")

SIZES = {
    "tiny": {"layers": 4, "width": 128, "heads": 4},      # 0.7M parameters without the embedding: minutes on a CPU
    "mini": {"layers": 4, "width": 256, "heads": 4},      # 2.6M: an hour on a CPU
    "small": {"layers": 8, "width": 512, "heads": 8},     # 21M
    "base": {"layers": 12, "width": 768, "heads": 12},    # 71M
    "paper": {"layers": 16, "width": 768, "heads": 12},   # 94M
}


@dataclass(frozen=True)
class Config:
    vocab: int
    length: int = 128     # longest sequence
    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0  # 0 in pretraining, 0.1 in fine-tuning

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise BadInput(f"width {self.width} does not divide into {self.heads} heads of even size")

    @property
    def hidden(self):
        """Units of the feed-forward after the gate; the layer before it is twice as wide."""
        return 2 * self.width


class Attention(nn.Module):
    """Multi-head attention whose queries come from `x` and whose keys and values come from `content` (Eq. 23)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.q = nn.Linear(D, D, bias=False)
        self.kv = nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x, content, bias=None, causal=False, cache=None):
        B, N, D = x.shape
        split = (B, -1, self.heads, D // self.heads)
        q = self.q(x).view(split).transpose(1, 2)                                        # (B, H, N, d)
        k, v = (part.view(split).transpose(1, 2) for part in self.kv(content).chunk(2, dim=-1))  # (B, H, S, d)
        if cache is not None:                                  # generation: keep what was computed for earlier tokens
            k, v = cache[:] = [torch.cat(pair, dim=2) for pair in zip(cache, (k, v))] if cache else (k, v)
        y = attend(q, k, v, bias, causal)                                                # (B, H, N, d)
        return self.out(y.transpose(1, 2).reshape(B, N, D))


def attend(q, k, v, bias=None, causal=False):
    """softmax(q k^T / sqrt(d) + bias) v, with q (B, H, N, d), k and v (B, H, S, d), bias broadcast to (B, H, N, S)."""
    if q.device.type != "cpu" or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    # On a CPU the fused kernel's backward in bf16 takes four times as long as the plain formula.
    if causal:
        bias = additive(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q.dtype)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                             # (B, H, N, S)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def additive(mask, dtype):
    """A bool mask, True = may attend, as 0 and minus infinity: the M of Eq. 24."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def compute_dtype(device):
    """The precision in which matrix products run: autocast's where it is on, float32 elsewhere."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class FeedForward(nn.Module):
    """GEGLU: one half of the first layer gates the other."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

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

        `rows`, for the last layer, picks the rows that go on (a function of (B, N, D)); the others have served as keys
        and values and nobody reads them again.
        """
        h = self.norm1(x)
        content = h[:, :content_rows]
        if rows is not None:
            x, h = rows(x), rows(h)
        x = x + self.dropout(self.attention(h, content, bias, causal, cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Transformer(nn.Module):
    """Token ids and group indices in, features of the target positions out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.query = nn.Parameter(torch.empty(config.width))           # [MASK], and g^(0) of the query stream
        self.position_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("positions", sinusoids(config.length, config.width), persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Every initial value but that of the norms, which start at 1, is set here.

        The embedding and the query are as large as the scaled positions they are added to, 1 / sqrt(2 D) for each
        element. Matrices are normal(0, sqrt(0.4 / D)), those at the end of a feed-forward divided by sqrt(2 layers).
        Attention starts as "look at what is near and alike, and add some of it" (Trockman & Kolter 2023): queries and
        keys are one map, twice as large, and the output map is the transpose of the values' over sqrt(layers). Otherwise
        small masked models can stay at the unigram loss for millions of tokens (README, results).
        """
        D, L = self.config.width, self.config.layers
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "query"):
                parameter.normal_(std=(2 * D) ** -0.5)
            elif parameter.dim() == 2:
                parameter.normal_(std=(0.4 / D) ** 0.5)
        for block in self.blocks:
            q, kv, out = block.attention.q.weight, block.attention.kv.weight, block.attention.out.weight
            kv[:D] = q.mul_(2)
            out.copy_(kv[D:].T / math.sqrt(L))
            block.feed_forward.down.weight.div_(math.sqrt(2 * L))
        self.position_scale.fill_(D ** -0.5)

    def embed(self, tokens, first=0):
        """tokens (B, N) at positions first, first + 1, ... -> (B, N, D), before the norm."""
        return self.embedding(tokens) + self.position_scale * self.positions[first:first + tokens.shape[1]]

    def forward(self, tokens, groups, targets, path, blank=None, padded=True):
        """Features from which the targets are predicted.

        tokens  (B, S) ids; where `blank` (mask path) or f > 1 (two-stream, causal) a target's own id is not read by its
                own prediction
        groups  (B, S) group indices f
        targets (B, n) positions to predict; entries that are no target (f <= 1) give a feature that means nothing
        path    one of PATHS
        blank   (B, S) bool, mask path: where the input is [MASK]; by default wherever f > 1
        padded  False promises that no f is 0, which saves the mask path its attention mask
        Returns (B, n, D).
        """
        S, dtype = tokens.shape[1], compute_dtype(tokens.device)
        if path == "causal":
            x = self.dropout(self.embedding_norm(self.embed(tokens)))
            for block in self.blocks:
                x = block(x, S, causal=True)
            x = take(x, (targets - 1).clamp(min=0))

        elif path == "mask":
            blank = groups > 1 if blank is None else blank
            x = torch.where(blank[..., None], self.query, self.embedding(tokens))
            x = self.dropout(self.embedding_norm(x + self.position_scale * self.positions[:S]))
            bias = additive((groups > 0)[:, None, None, :], dtype) if padded else None   # (B, 1, 1, S)
            for block in self.blocks[:-1]:
                x = block(x, S, bias)
            x = self.blocks[-1](x, S, bias, rows=lambda x: take(x, targets))

        else:
            # Content rows, then one query row for each target: [h; g] (B, S + n, D). One attention call per layer
            # serves both, since their keys and values are the same.
            h = self.embed(tokens)
            g = self.query + self.position_scale * self.positions[targets]
            x = self.dropout(self.embedding_norm(torch.cat([h, g], dim=1)))
            see_h, see_g = content_mask(groups), take(query_mask(groups), targets)      # (B, S, S), (B, n, S)
            # Softmax over nothing is NaN, so a row that sees nothing sees itself instead. It is never scored.
            own = torch.arange(S, device=tokens.device)
            see_h = see_h | (~see_h.any(-1, keepdim=True) & (own == own[:, None]))
            see_g = see_g | (~see_g.any(-1, keepdim=True) & (own == targets[..., None]))
            bias = additive(torch.cat([see_h, see_g], dim=1)[:, None], dtype)            # (B, 1, S + n, S)
            for block in self.blocks[:-1]:
                x = block(x, S, bias)
            x = self.blocks[-1](x, S, bias[:, :, S:], rows=lambda x: x[:, S:])           # only queries are scored

        return self.norm(x)

    def encode(self, tokens, padding=None, causal=False, every_layer=False):
        """The content stream of every token, for classifiers: as if all of f were 1, or 1, 2, ..., S where `causal`.

        tokens (B, S); padding (B, S) bool, True where there is no token, at the end of a sequence only.
        Returns (B, S, D) after the final norm; with every_layer a list of layers + 1 of them, the embedding first, all but
        the last without that norm.
        """
        x = self.dropout(self.embedding_norm(self.embed(tokens)))
        bias = None if padding is None or causal else additive(~padding[:, None, None, :], compute_dtype(x.device))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], tokens.shape[1], bias, causal))
        states[-1] = self.norm(states[-1])
        return states if every_layer else states[-1]

    def next_features(self, tokens, cache, first=0):
        """Causal generation: tokens (B, N) at positions first.. -> feature (B, D) that predicts the token after them.

        `cache` is a list with one list per layer, empty at first, that keeps the keys and values of what came before.
        """
        x = self.embedding_norm(self.embed(tokens, first))
        for block, kept in zip(self.blocks, cache):
            x = block(x, x.shape[1], causal=first == 0, cache=kept)
        return self.norm(x[:, -1])

    def logits(self, features):
        """Features (..., D) -> scores (..., vocab), through the embedding."""
        return F.linear(features, self.embedding.weight)


def take(x, index):
    """Rows of x (B, N, D) at index (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def sinusoids(length, width):
    """Sine and cosine positions (length, width), Vaswani et al. 2017."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def parameters(model):
    """Number of parameters (with the embedding, without it)."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.embedding.weight.numel()


def flops_per_sequence(config, path, length, targets):
    """Floating-point operations of the matrix products that one training step does for one sequence.

    `targets` rows go through the output layer. Forward once, backward twice. Attention counts what the kernel needs:
    half of S^2 for the causal path. Used for model FLOP utilisation.
    """
    D, S, n, L = config.width, length, targets, config.layers
    query, keys, rest = D * D, 2 * D * D, D * D + 3 * D * config.hidden       # weights of q; of k and v; of the others
    rows = {"causal": [S] * L, "mask": [S] * (L - 1) + [n], "two-stream": [S + n] * (L - 1) + [n]}[path]
    visible = S / 2 if path == "causal" else S
    macs = sum(r * (query + rest) + S * keys + 2 * r * visible * D for r in rows) + n * D * config.vocab
    return 2 * 3 * macs
