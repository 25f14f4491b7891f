"""Labelled texts to batches, and batches to the features of an encoder.

A text is encoded as `text [SEP]`, a pair as `a [SEP] b [SEP]`: no segment embedding, the separator tells the
two apart. A tokenizer with a layout of its own (BERT's [CLS] a [SEP] b [SEP] with token types) has a method
`pair` for it. What is too long is cut at the end of the longer part. Batches are of texts of about one length
and are padded to a few fixed lengths.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.cli import BadInput, progress

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # batches are padded to one of these
POOLS = ("mean", "last", "first")


class Inputs(NamedTuple):
    """Tokenized texts, kept in memory."""

    ids: list       # arrays of token ids
    segments: list  # arrays of token types, or None where the model has none
    lengths: np.ndarray


class TextBatch(NamedTuple):
    """What an encoder reads; patches of images too, which have neither padding nor segments."""

    tokens: Tensor    # (B, L)
    lengths: Tensor   # (B,)
    padding: Tensor   # (B, L) bool, True where there is no token, or None where there is one everywhere
    segments: Tensor  # (B, L), or None

    def part(self, start, stop):
        return TextBatch(*(None if field is None else field[start:stop] for field in self))


def tokenize(run, texts, quiet=True):
    """Texts, each a tuple of one or two str -> Inputs of at most the model's length."""
    encode, limit = run.tokenizer.encode, run.settings.length
    separated = functools.partial(with_separators, run.tokenizer.separator)
    layout = getattr(run.tokenizer, "pair", separated)
    second = [] if len(texts[0]) == 2 else None
    room = limit - len(layout([], second)[0])
    rows = []
    for text in progress(texts, quiet, desc="tokenizing", unit=" texts"):
        a, b = truncate(encode(text[0]), second if second is None else encode(text[1]), room)
        rows.append(layout(a, b))
    ids = [np.asarray(row, np.int32) for row, _ in rows]
    segments = None if rows[0][1] is None else [np.asarray(row, np.int32) for _, row in rows]
    return Inputs(ids, segments, np.array([len(row) for row in ids]))


def with_separators(separator, a, b=None):
    """`a [SEP]` or `a [SEP] b [SEP]`, and no segments."""
    return [*a, separator] if b is None else [*a, separator, *b, separator], None


def truncate(a, b, room):
    """Cut two lists of ids (b may be None) to `room` in all, always at the end of the longer one."""
    if b is None:
        return a[:room], None
    return a[:max(room - len(b), (room + 1) // 2)], b[:max(room - len(a), room // 2)]


def padded_length(longest, limit):
    """The fixed length to which a batch is padded."""
    return min([length for length in LENGTHS if length >= longest] + [limit], default=limit)


def batch_rows(lengths, size, seed=None, epoch=0):
    """Which rows make up each batch of an epoch -> list of arrays. Texts of like length share a batch: the
    seeded order is sorted within pools of 50 batches, and the batches are shuffled. seed None: by length, for
    scoring."""
    if seed is None:
        return np.split(order := np.argsort(lengths, kind="stable"), range(size, len(order), size))
    rng, batches = np.random.default_rng([seed, epoch]), []
    order = rng.permutation(len(lengths))
    for pool in np.split(order, range(50 * size, len(order), 50 * size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(size, len(pool), size))
    return [batches[k] for k in rng.permutation(len(batches))]


def collate(inputs, rows, limit, device):
    """The TextBatch of these rows, on the device."""
    lengths = inputs.lengths[rows]
    L = padded_length(lengths.max(), limit)
    padding = np.arange(L) >= lengths[:, None]

    def table(arrays):
        cells = np.zeros((len(rows), L), np.int64)
        cells[~padding] = np.concatenate([arrays[i] for i in rows])
        return cells

    arrays = [table(inputs.ids), lengths, padding if padding.any() else None,
              inputs.segments and table(inputs.segments)]
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [None if x is None else x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return TextBatch(*(None if x is None else x.to(device) for x in tensors))


def text_batches(inputs, limit, device, size=64):
    """Every text once -> pairs (row numbers, TextBatch)."""
    return ((rows, collate(inputs, rows, limit, device)) for rows in batch_rows(inputs.lengths, size))


# ---------------------------------------------------------------------------- features

def attention_and_pool(run, attention=None, pool=None):
    """What was asked for, or the defaults: the objective's own attention; the last token under causal
    attention, where it alone has seen everything, for images and under full attention the mean."""
    attention = attention or run.objective.attention
    pool = pool or ("last" if attention == "causal" and run.text else "mean")
    if (attention, pool) == ("causal", "first"):
        raise BadInput("--pool first sees one token only under causal attention; type --attention full or "
                       "another --pool")
    return attention, pool


def encode(model, batch, causal, every_layer=False):
    """The model's features (B, L, D), or a list of them."""
    segments = {} if batch.segments is None else {"segments": batch.segments}
    return model.encode(batch.tokens, batch.padding, causal, every_layer, **segments)


def pool_features(features, batch, pool):
    """features (B, L, D) -> float32 (B, D): the mean over the tokens, or the last or first token's."""
    features = features.float()
    if pool == "first":
        return features[:, 0]
    if pool == "last":
        return features[torch.arange(len(features), device=features.device), batch.lengths - 1]
    if batch.padding is not None:
        features = features.masked_fill(batch.padding[..., None], 0)
    return features.sum(1) / batch.lengths[:, None]
