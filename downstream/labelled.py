"""Labelled text: GLUE tasks, any tab-separated file, or passages of pydoc; tokenized, in batches, as features of an encoder.

A text is encoded as `text [SEP]`, a pair as `a [SEP] b [SEP]`: no segment embedding, the separator tells the two apart.
A tokenizer with a layout of its own (BERT's [CLS] a [SEP] b [SEP] with token types) has a method `pair` for it. What is too
long is cut at the end of the longer part. Batches are of texts of about one length and are padded to a few fixed lengths.
"""

import contextlib
import math
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from downstream import glue
from support.cli import BadInput
from text.sources import pydoc_texts

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # batches are padded to one of these


POOLS = ("mean", "last", "first")


# ---------------------------------------------------------------------------- labelled texts

class Part(NamedTuple):
    """Labelled texts: each a tuple of one or two str, and their class numbers int64 (N,) or scores float64 (N,)."""

    texts: list
    labels: np.ndarray

    def only(self, rows):
        return Part([self.texts[i] for i in rows], self.labels[rows])

    def at_most(self, count):
        """A random choice, the same for everyone, where there are more; None: all."""
        if count is None or count >= len(self.labels):
            return self
        return self.only(np.sort(np.random.default_rng(0).permutation(len(self.labels))[:count]))


@dataclass(frozen=True)
class Dataset:
    """A training part and dev parts, {suffix: Part}: one with suffix "", or MNLI's two. `classes` None: scores."""

    name: str
    classes: tuple
    metrics: tuple
    train: Part
    dev: dict
    skipped: int = 0  # malformed rows that were left out


def glue_dataset(glue_dir, name):
    """The training and dev part of a GLUE task."""
    if not glue_dir:
        raise BadInput(f"{name} is a GLUE task: say with --glue-dir where its files are ({glue.ADDRESS})")
    task = glue.TASKS[name]
    if task.parts[0][1] is None:
        raise BadInput(f"{name} has neither a training nor a labelled part; evaluate.py glue --tasks mnli,ax --submit DIR "
                       "predicts it with the mnli model")
    files = {"train": "train.tsv", **{suffix: dev for suffix, dev, _ in task.parts}}
    read = {key: glue.read(glue_dir, name, file) for key, file in files.items()}
    parts = {key: Part(examples.texts, glue.targets(name, examples)) for key, examples in read.items()}
    return Dataset(name, task.labels, task.metrics, parts.pop("train"), parts, sum(e.skipped for e in read.values()))


def tsv_dataset(path, dev=None, regression=None, held_out=0.2, seed=0):
    """A tab-separated file with a header line and columns text, label and possibly text_b. Without a `dev` file, a seeded
    share is held out. `regression` None: where all labels are numbers and not all of them whole."""
    paths = [Path(path)] + ([Path(dev)] if dev else [])
    tables = []
    for file in paths:
        if not file.is_file():
            raise BadInput(f"{file} does not exist; give a tab-separated file with columns text and label, pydoc, or a GLUE "
                           f"task: {', '.join(glue.TASKS)}")
        with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
            columns = lines.readline().rstrip("\r\n").split("\t")
        tables.append(glue.read_table(file, ("text", "text_b") if "text_b" in columns else ("text",), "label"))
    if len({len(table.texts[0]) for table in tables}) > 1:
        raise BadInput(f"{path} and {dev} do not both have a column text_b")
    if regression is None:
        regression = is_score(tables[0].labels)
    if regression:
        classes, metrics = None, ("pearson", "spearman")
        parts = [Part(table.texts, table.scores()) for table in tables]
    else:
        classes = tuple(sorted(set(tables[0].labels)))
        if len(classes) < 2:
            raise BadInput(f"{path} has only one label, {classes[0]!r}")
        metrics = ("accuracy", "matthews")
        parts = [Part(table.texts, table.classes(classes)) for table in tables]
    if not dev:
        order = np.random.default_rng(seed).permutation(len(parts[0].texts))
        count = max(1, round(held_out * len(order)))
        if len(order) < 2:
            raise BadInput(f"{path} has one row, which leaves nothing to hold out; give more, or --dev")
        parts = [parts[0].only(np.sort(order[count:])), parts[0].only(np.sort(order[:count]))]
    return Dataset(str(path), classes, metrics, parts[0], {"": parts[1]})


def is_score(labels):
    """Whether these label strings are numbers, not all of them whole."""
    with contextlib.suppress(ValueError):
        values = [float(label) for label in labels]
        return all(map(math.isfinite, values)) and not all(value.is_integer() for value in values)
    return False


def pydoc_dataset(packages=12, size=300):
    """Passages of the standard library's documentation (paragraphs of up to `size` characters), labelled with their package:
    those with the most text among the packages of at least four documented modules. Dev passages are from other modules
    than the training passages: for each package, about a fifth of its passages."""
    documents = {}
    for name, text in pydoc_texts():
        package = name.partition(".")[0]
        if package != "topics":
            documents.setdefault(package, {})[name] = passages(text, size)
    documents = {package: {name: found for name, found in modules.items() if found} for package, modules in documents.items()}
    amount = {package: sum(map(len, modules.values())) for package, modules in documents.items() if len(modules) >= 4}
    classes = tuple(sorted(sorted(amount, key=amount.get)[-packages:]))
    texts, labels = ([], []), ([], [])
    for k, package in enumerate(classes):
        # the same modules on every machine; the one with the most text is for training
        modules = sorted(documents[package], key=lambda name: zlib.crc32(name.encode()))
        largest, held = max(modules, key=lambda name: len(documents[package][name])), 0
        for name in modules:
            dev = name != largest and held < 0.2 * amount[package]
            held += dev * len(documents[package][name])
            texts[dev].extend((passage,) for passage in documents[package][name])
            labels[dev].extend([k] * len(documents[package][name]))
    train, dev = (Part(texts[side], np.array(labels[side])) for side in (0, 1))
    return Dataset("pydoc", classes, ("accuracy", "matthews"), train, {"": dev})


def passages(text, size):
    """Whole paragraphs, joined up to about `size` characters; shorter than 40 is no passage."""
    found = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if found[-1] and len(found[-1]) + len(paragraph) > size:
            found.append("")
        found[-1] += " " * bool(found[-1]) + paragraph
    return [passage for passage in found if len(passage) >= 40]


def load_dataset(data, glue_dir=None, dev=None, regression=None, seed=0):
    """What --data names: a GLUE task, pydoc, or a tab-separated file."""
    if data not in (*glue.TASKS, "pydoc"):
        return tsv_dataset(data, dev, regression, seed=seed)
    if dev or regression:
        raise BadInput(f"{data} has dev texts and a kind of label of its own; leave out --{'dev' if dev else 'regression'}")
    return pydoc_dataset() if data == "pydoc" else glue_dataset(glue_dir, data)


def label_subset(labels, fraction, seed):
    """A seeded share of the rows, stratified: of each class that share, but at least one. Scores: of all rows. Returns row
    numbers in order."""
    if not 0 < fraction <= 1:
        raise BadInput(f"--label-fraction {fraction:g} is not in 0..1, 0 excluded")
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == k) for k in np.unique(labels)] if labels.dtype.kind == "i" else [np.arange(len(labels))]
    return np.sort(np.concatenate([rng.permutation(rows)[:max(1, round(fraction * len(rows)))] for rows in groups]))


# ---------------------------------------------------------------------------- texts to batches

class Inputs(NamedTuple):
    """Tokenized texts, kept in memory."""

    ids: list       # arrays of token ids
    segments: list  # arrays of token types, or None where the model has none
    lengths: np.ndarray


class Batch(NamedTuple):
    tokens: Tensor   # (B, L)
    lengths: Tensor  # (B,)
    padding: Tensor  # (B, L) bool, True where there is no token, or None where there is one everywhere
    segments: Tensor  # (B, L), or None

    def part(self, start, stop):
        return Batch(*(None if field is None else field[start:stop] for field in self))


def tokenize(run, texts, quiet=True):
    """Texts, each a tuple of one or two str -> Inputs of at most the model's length."""
    encode, limit = run.tokenizer.encode, run.settings.length
    layout = getattr(run.tokenizer, "pair", None) or (lambda a, b: (with_separators(run.tokenizer.separator, a, b), None))
    second = [] if len(texts[0]) == 2 else None
    room = limit - len(layout([], second)[0])
    rows = []
    for text in tqdm(texts, desc="tokenizing", leave=False, disable=quiet or not sys.stderr.isatty()):
        a, b = truncate(encode(text[0]), second if second is None else encode(text[1]), room)
        rows.append(layout(a, b))
    ids = [np.asarray(row, np.int32) for row, _ in rows]
    segments = None if rows[0][1] is None else [np.asarray(row, np.int32) for _, row in rows]
    return Inputs(ids, segments, np.array([len(row) for row in ids]))


def with_separators(separator, a, b=None):
    """`a [SEP]` or `a [SEP] b [SEP]`."""
    return [*a, separator] if b is None else [*a, separator, *b, separator]


def truncate(a, b, room):
    """Cut two lists of ids (b may be None) to `room` in all, always from the end of the one that is longer."""
    if b is None:
        return a[:room], None
    return a[:max(room - len(b), (room + 1) // 2)], b[:max(room - len(a), room // 2)]


def padded_length(longest, limit):
    """The fixed length to which a batch is padded."""
    return min([length for length in LENGTHS if length >= longest] + [limit], default=limit)


def batch_rows(lengths, size, seed=None, epoch=0):
    """Which rows make up each batch of an epoch -> list of arrays. Texts of like length share a batch: the seeded order is
    sorted within pools of 50 batches, and the batches are shuffled. seed None: by length, for scoring."""
    if seed is None:
        return np.split(order := np.argsort(lengths, kind="stable"), range(size, len(order), size))
    rng, batches = np.random.default_rng([seed, epoch]), []
    order = rng.permutation(len(lengths))
    for pool in np.split(order, range(50 * size, len(order), 50 * size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(size, len(pool), size))
    return [batches[k] for k in rng.permutation(len(batches))]


def collate(inputs, rows, limit, device):
    """The Batch of these rows, on the device."""
    lengths = inputs.lengths[rows]
    L = padded_length(lengths.max(), limit)
    padding = np.arange(L) >= lengths[:, None]

    def table(arrays):
        cells = np.zeros((len(rows), L), np.int64)
        cells[~padding] = np.concatenate([arrays[i] for i in rows])
        return cells

    arrays = [table(inputs.ids), lengths, padding if padding.any() else None, inputs.segments and table(inputs.segments)]
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [None if x is None else x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return Batch(*(None if x is None else x.to(device) for x in tensors))


def in_order(inputs, limit, device, size=64):
    """Every text once -> pairs (row numbers, Batch)."""
    return ((rows, collate(inputs, rows, limit, device)) for rows in batch_rows(inputs.lengths, size))


def pool_features(features, batch, pool):
    """features (B, L, D) -> float32 (B, D): their mean over the tokens, or that of the last or the first token."""
    features = features.float()
    if pool == "first":
        return features[:, 0]
    if pool == "last":
        return features[torch.arange(len(features), device=features.device), batch.lengths - 1]
    if batch.padding is not None:
        features = features.masked_fill(batch.padding[..., None], 0)
    return features.sum(1) / batch.lengths[:, None]


def encode(model, batch, causal, every_layer=False):
    """The model's features (B, L, D), or a list of them."""
    segments = {} if batch.segments is None else {"segments": batch.segments}
    return model.encode(batch.tokens, batch.padding, causal, every_layer, **segments)
