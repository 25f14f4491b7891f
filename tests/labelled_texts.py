"""What the tests of labelled texts share: files, texts, and a quick protocol."""
import numpy as np

from downstream import glue
from downstream.finetune import Protocol

QUICK = Protocol(lr=1e-2, pool="mean", attention="full", epochs=4, batch_size=8)


def some_texts(count=40, longest=19):
    rng = np.random.default_rng(0)
    return [("".join(rng.choice(list("abcdef "), rng.integers(1, longest + 1))),) for _ in range(count)]


def write(path, rows, mark=b"", end="\n"):
    """A tab-separated file; a row that is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mark + "".join("\t".join(row) + end for row in rows if row is not None).encode())
    return path


def write_cats(path):
    """60 short texts about a cat or a mat, which a letter tells apart."""
    rows = [[("the cat " if k % 3 else "a mat ") + "sat"[:k % 4], "cat" if k % 3 else "mat"]
            for k in range(60)]
    return write(path, [["text", "label"], *rows])


def write_glue(folder, layouts):
    """Six rows of every file of GLUE in its official layout, the labels in turn."""
    for name, files in layouts.items():
        task = glue.TASKS[name]
        labels = ["0.5", "3.25", "4.000"] if task.labels is None else task.labels
        for file, (header, row, _, target) in files.items():
            column = (header or task.columns).index(task.label) if target is not None else 0
            cells = [labels[k % len(labels)] if target is not None else str(k) for k in range(6)]
            rows = [[*row[:column], cell, *row[column + 1:]] for cell in cells]
            write(folder / task.folder / file, [header, *rows])
    return folder
