"""Labelled data sets and choices of few labels."""
import re

import numpy as np
import pytest
from labelled_texts import write

from downstream import labelled
from support.cli import BadInput
from text.sources import pydoc_texts


def test_label_subset_is_stratified_and_seeded():
    labels = np.array([0] * 100 + [1] * 50 + [2] * 3)
    rows = labelled.label_subset(labels, 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1] and len(set(rows.tolist())) == 16
    assert np.array_equal(rows, labelled.label_subset(labels, 0.1, seed=0))
    assert not np.array_equal(rows, labelled.label_subset(labels, 0.1, seed=1))
    assert np.array_equal(labelled.label_subset(labels, 1.0, seed=0), np.arange(153))
    assert len(labelled.label_subset(np.linspace(0, 1, 50), 0.1, seed=0)) == 5  # scores: no classes
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(BadInput, match="label-fraction"):
            labelled.label_subset(labels, fraction, 0)


def test_tsv_classes_and_scores(tmp_path):
    rows = [["label", "text"], *([label, f'"text {k}'] for k, label in enumerate(["no", "yes", "maybe"] * 5))]
    data = labelled.table_dataset(write(tmp_path / "a.tsv", rows))
    assert data.classes == ("maybe", "no",
                            "yes") and len(data.train.texts) == 12 and len(data.dev[""].texts) == 3
    for part in (data.train, data.dev[""]):
        for (text,), label in zip(part.texts, part.labels):
            assert data.classes[label] == rows[1 + int(text.split()[1])][0]
    assert not {*data.train.texts} & {*data.dev[""].texts}

    for labels, kind in ((["1", "2", "3"], "i"), (["1.0", "2.0"], "i"), (["1", "2.5"], "f"),
                         (["-0.5", "1e-3"], "f"), (["1.5", "x"], "i")):
        path = write(tmp_path / "b.tsv",
                     [["text", "text_b", "label"], *(["a", "b", label] for label in labels)])
        data = labelled.table_dataset(path, dev=path)
        assert data.train.labels.dtype.kind == kind and data.train.texts[0] == ("a", "b")
        assert (data.classes is None) == (kind == "f") and len(data.dev[""].labels) == len(labels)
    path = write(tmp_path / "c.tsv", [["text", "label"], ["a", "1"], ["b", "2"]])
    assert labelled.table_dataset(path, dev=path, regression=True).train.labels.tolist() == [1.0, 2.0]


def test_pydoc_passages_are_held_out_by_module(monkeypatch):
    documents = list(pydoc_texts())
    monkeypatch.setattr(labelled, "pydoc_texts", lambda: documents)  # reading them takes seconds
    data = labelled.pydoc_dataset()
    assert len(data.classes) >= 10 and len(data.train.texts) > 500 and len(data.dev[""].texts) > 100
    where = {}
    for name, text in documents:
        for paragraph in re.split(r"\n\s*\n", text):
            where.setdefault(" ".join(paragraph.split())[:40], set()).add(name)
    sides = [[where[text[:40]] for (text,) in part.texts if text[:40] in where]
             for part in (data.train, data.dev[""])]
    # beginnings that occur in one module only tell which module a passage is from
    train, dev = ({next(iter(names)) for names in side if len(names) == 1} for side in sides)
    assert len(train) > 50 and len(dev) > 20 and not train & dev
    for part in (data.train, data.dev[""]):
        assert set(part.labels.tolist()) == set(range(len(data.classes)))
        for (text,), label in zip(part.texts, part.labels):
            assert len(text) >= 40 and any(name.startswith(data.classes[label])
                                           for name in where.get(text[:40], [data.classes[label]]))
