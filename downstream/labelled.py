"""Labelled data sets: GLUE tasks, a table of one's own, or passages of pydoc; and choices of few labels."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from downstream import glue
from downstream.tables import USUAL, is_number, read_labelled
from support.cli import BadInput, progress
from text.sources import pydoc_texts


class Part(NamedTuple):
    """Labelled texts: each a tuple of one or two str, and their class numbers int64 (N,) or scores float64
    (N,)."""

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
    """A training part and dev parts, {suffix: Part}: one with suffix "", or MNLI's two. `classes` None:
    scores."""

    name: str
    classes: tuple
    metrics: tuple
    train: Part
    dev: dict
    skipped: int = 0  # malformed rows that were left out


def load_dataset(data, glue_dir=None, dev=None, regression=None, columns=USUAL, seed=0):
    """What --data names: a GLUE task, pydoc, or a file as tables.py reads it."""
    if data not in (*glue.TASKS, "pydoc"):
        return table_dataset(data, dev, regression, columns, seed=seed)
    given = {"dev": dev, "regression": regression, "text-column": columns != USUAL}
    for name in (name for name, value in given.items() if value):
        raise BadInput(f"{data} has dev texts, columns and a kind of label of its own; leave out --{name}")
    return pydoc_dataset() if data == "pydoc" else glue_dataset(glue_dir, data)


def glue_dataset(glue_dir, name):
    """The training and dev part of a GLUE task."""
    if not glue_dir:
        raise BadInput(f"{name} is a GLUE task: say with --glue-dir where its files are ({glue.ADDRESS})")
    task = glue.TASKS[name]
    if task.parts[0][1] is None:
        raise BadInput(f"{name} has neither a training nor a labelled part; evaluate.py glue --tasks mnli,ax "
                       "--submit DIR predicts it with the mnli model")
    files = {"train": "train.tsv", **{suffix: dev for suffix, dev, _ in task.parts}}
    read = {key: glue.read_task(glue_dir, name, file) for key, file in files.items()}
    parts = {key: Part(examples.texts, glue.task_labels(name, examples)) for key, examples in read.items()}
    return Dataset(name, task.labels, task.metrics, parts.pop("train"), parts,
                   sum(e.skipped for e in read.values()))


def table_dataset(path, dev=None, regression=None, columns=USUAL, held_out=0.2, seed=0):
    """The table `path`. Without a `dev` file, a seeded share is held out. `regression` None: where all labels
    are numbers and not all of them whole."""
    tables = []
    for file in (path, dev) if dev else (path,):
        if not Path(file).is_file():
            raise BadInput(f"{file} does not exist; give a .tsv, .csv or .jsonl file with columns text and "
                           f"label, pydoc, or a GLUE task: {', '.join(glue.TASKS)}")
        tables.append(read_labelled(file, columns))
    if len({len(table.texts[0]) for table in tables}) > 1:
        raise BadInput(f"{path} and {dev} do not both have a column text_b")
    if regression is None:
        regression = are_scores(tables[0].labels)
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


def are_scores(labels):
    """Whether these label strings are numbers, not all of them whole."""
    return all(map(is_number, labels)) and not all(float(label).is_integer() for label in labels)


def pydoc_dataset(packages=12, size=300):
    """Passages of the standard library's documentation (paragraphs of up to `size` characters), labelled with
    their package: those with the most text among the packages of at least four documented modules. Dev
    passages are from other modules than the training passages: for each package, about a fifth of its
    passages."""
    documents = {}
    for name, text in progress(pydoc_texts(), desc="pydoc", unit=" documents"):
        package, found = name.partition(".")[0], pydoc_passages(text, size)
        if package != "topics" and found:
            documents.setdefault(package, {})[name] = found
    amount = {package: sum(map(len, modules.values())) for package, modules in documents.items()
              if len(modules) >= 4}
    classes = tuple(sorted(sorted(amount, key=amount.get)[-packages:]))
    texts, labels = ([], []), ([], [])
    for k, package in enumerate(classes):
        # the same modules on every machine; the one with the most text is for training
        modules = sorted(documents[package], key=lambda name: zlib.crc32(name.encode()))
        largest, held = max(modules, key=lambda name: len(documents[package][name])), 0
        for name in modules:
            found = documents[package][name]
            dev = name != largest and held < 0.2 * amount[package]
            held += dev * len(found)
            texts[dev].extend((passage,) for passage in found)
            labels[dev].extend([k] * len(found))
    train, dev = (Part(texts[side], np.array(labels[side])) for side in (0, 1))
    return Dataset("pydoc", classes, ("accuracy", "matthews"), train, {"": dev})


def pydoc_passages(text, size):
    """Whole paragraphs, joined up to about `size` characters; shorter than 40 is no passage."""
    found = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if found[-1] and len(found[-1]) + len(paragraph) > size:
            found.append("")
        found[-1] += " " * bool(found[-1]) + paragraph
    return [passage for passage in found if len(passage) >= 40]


def label_subset(labels, fraction=1.0, per_class=None, seed=0):
    """A seeded choice of rows, of each class alike: that share of it, but at least one; or `per_class`, or
    all it has. Of scores that share of all rows. Returns row numbers in order."""
    if not 0 < fraction <= 1:
        raise BadInput(f"--label-fraction {fraction:g} is not in 0..1, 0 excluded")
    scores = labels.dtype.kind != "i"
    if per_class is not None and scores:
        raise BadInput(f"--labels-per-class {per_class} is for classes, and these labels are scores; use "
                       "--label-fraction")
    rng = np.random.default_rng(seed)
    chosen = []
    groups = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    for rows in [np.arange(len(labels))] if scores else groups:
        count = per_class if per_class is not None else max(1, round(fraction * len(rows)))
        chosen.append(rng.permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))
