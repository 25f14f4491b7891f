"""What the Transformer computes with: products, attention and its masks, cross-entropy over a vocabulary.

Each has one plain formula, which the tests compare it with; what is added here is speed.
"""

import contextlib
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from masks import content_mask, query_mask

LONG = 1024  # tokens from which two streams on CUDA do without an S x S mask

# ---------------------------------------------------------------------------- matrix products

def product(a, b):
    """a b^T: (..., I) and (O, I) -> (..., O). No gradient through oneDNN: see Linear."""
    if not takes_onednn(a):
        return F.linear(a, b)
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def takes_onednn(x):
    """PyTorch multiplies float32 by MKL, which uses half of an AMD processor's width; oneDNN uses all."""
    return (not torch.compiler.is_compiling() and x.device.type == "cpu"
            and x.dtype == compute_dtype(x) == torch.float32 and on_amd())


@functools.cache
def on_amd():
    """Whether this is an AMD processor with AVX-512 and PyTorch has oneDNN: fixed, so that runs repeat."""
    return (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and "AuthenticAMD" in cpu_info() and torch.backends.cpu.get_cpu_capability() == "AVX512")


def cpu_info():
    """What Linux says of the processor; elsewhere nothing."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


class Product(torch.autograd.Function):
    """`product` with its gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (product(grad, weight.T) if ctx.needs_input_grad[0] else None,
                product(grad.flatten(0, -2).T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None)


class Linear(nn.Linear):
    """nn.Linear without a bias, through the faster kernel."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return Product.apply(x, self.weight) if takes_onednn(x) else F.linear(x, self.weight)


# ---------------------------------------------------------------------------- attention

def attend(q, k, v, bias=None, causal=False):
    """softmax(q k^T / sqrt(d) + bias) v, with q (B, H, N, d), k and v (B, H, S, d), bias broadcast to (B, H,
    N, S), or a block mask."""
    if not isinstance(bias, torch.Tensor | None):
        from torch.nn.attention.flex_attention import flex_attention
        if q.device.type != "cpu" and not torch.compiler.is_compiling():  # else it is compiled with the step
            flex_attention = compiled_flex_attention()
        return flex_attention(q, k, v, block_mask=bias)
    if q.device.type != "cpu" or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    # On a CPU the fused kernel's backward in bf16 takes four times as long as the plain formula.
    if causal:
        bias = additive(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q.dtype)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                             # (B, H, N, S)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


@functools.cache
def compiled_flex_attention():
    """As plain Python it would make all the scores."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


def additive(mask, dtype):
    """A bool mask, True = may attend, as 0 and minus infinity: the M of Eq. 24."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def two_stream_bias(groups, targets, cuts, dtype):
    """The masks of Eq. 24 for S content rows, then n queries, targets and cuts (B, n) -> (B, 1, S + n, S)."""
    see_h = content_mask(groups)                                                         # (B, S, S), M_h
    see_g = query_mask(groups, cuts)                                                     # (B, n, S), M_g
    # Softmax over nothing is NaN, so a row that sees nothing sees itself instead. It is never scored:
    # draw_batch refuses an objective that would.
    own = torch.arange(groups.shape[1], device=groups.device)
    see_h = see_h | (~see_h.any(-1, keepdim=True) & (own == own[:, None]))
    see_g = see_g | (~see_g.any(-1, keepdim=True) & (own == targets[..., None]))
    return additive(torch.cat([see_h, see_g], dim=1)[:, None], dtype)


def prefix_blocks(seen, length, size=128):
    """FlexAttention's block mask for rows of which each sees the first `seen` (B, N) of `length` keys. Which
    blocks it sees whole or in part follows from the least and the most in `size` rows: nothing of N x S is
    ever made."""
    from torch.nn.attention.flex_attention import BlockMask
    B, N = seen.shape
    missing = -N % size
    tiles = torch.cat([seen, seen[:, -1:].expand(B, missing)], dim=1).view(B, 1, -1, size)
    whole = tiles.amin(-1) // size                                                       # (B, 1, row blocks)
    part = (tiles.amax(-1) + size - 1) // size - whole
    keys = torch.arange((length + size - 1) // size, device=seen.device)
    return BlockMask.from_kv_blocks(
        part.int(), (whole[..., None] + keys).clamp(max=len(keys) - 1).int(), whole.int(),
        keys.int().expand(*whole.shape, -1).contiguous(), BLOCK_SIZE=size, seq_lengths=(N, length),
        mask_mod=lambda b, h, i, j: j < seen[b, i])


def compute_dtype(x):
    """The precision in which matrix products with x run: autocast's where it is on, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def take(x, index):
    """Rows of x (B, N, D) at index (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------------------- losses

class LinearCrossEntropy(torch.autograd.Function):
    """sum_i weight_i * -log softmax(x_i E^T)[y_i], one chunk of rows at a time.

    The scores of all rows never exist at once, and each chunk's gradient is computed while its scores are in
    cache. tests/test_objectives.py compares it with the plain formula.
    """

    @staticmethod
    def forward(ctx, x, embedding, labels, weight, chunk, differentiate=True):
        """x (N, D), embedding (V, D), labels (N,), weight (N,) -> the loss, a scalar in fp32. The gradients
        of x and embedding come with it, unless `differentiate` is false."""
        dtype = compute_dtype(x)
        x_low, E = x.to(dtype), embedding.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dE = torch.empty_like(x_low), torch.zeros_like(embedding)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            y, w = labels[rows, None], weight[rows, None]
            scores = product(x_low[rows], E).float()                                     # (chunk, V)
            p = torch.softmax(scores, dim=-1)
            # log-sum-exp from the largest probability, which cannot underflow
            total = scores.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log()
            loss += ((total - scores.gather(1, y)) * w).sum()
            if differentiate:
                p = p.scatter_add_(1, y, torch.full_like(w, -1.0)).mul_(w).to(dtype)     # d loss / d scores
                dx[rows] = product(p, E.T)
                dE += product(p.T, x_low[rows].T)
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
