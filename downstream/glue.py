"""The GLUE tasks: their official TSV files, their metrics, and the files that the GLUE server takes.

    DIR/CoLA/train.tsv   DIR/SST-2/train.tsv   DIR/MNLI/dev_matched.tsv   DIR/AX/AX.tsv   ...

Quotation marks in them are text and need not balance, and some sentences contain characters that Python
counts as line ends: tables.py reads them as they are. Official address: https://gluebenchmark.com/tasks
(Wang et al. 2018). Labels of the test parts are not public; scores here are those of the dev parts.
"""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from downstream.tables import read_table
from support.cli import BadInput

ADDRESS = "https://gluebenchmark.com/tasks"


@dataclass(frozen=True)
class Task:
    """One task. `labels` are the label strings in the order of their class numbers, or None where the label
    is a score in 0..5. The first of `metrics` is that of Table 2. `parts` is {suffix: (dev file, test
    file)}."""

    folder: str                 # also the name of the file for the server
    text: tuple                 # the one or two columns of text
    label: str = "label"
    labels: tuple = ("0", "1")
    metrics: tuple = ("accuracy",)
    parts: tuple = (("", "dev.tsv", "test.tsv"),)
    columns: tuple = None       # of train and dev, where these have no header line
    ragged: bool = False        # rows with a wrong number of columns are known to exist, and are left out


SENTENCES = ("sentence1", "sentence2")
NLI = ("entailment", "neutral", "contradiction")


TASKS = {
    "cola": Task("CoLA", ("sentence",), metrics=("matthews", "accuracy"),
                 columns=("source", "label", "mark of the source", "sentence")),
    "sst2": Task("SST-2", ("sentence",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), label="Quality", metrics=("f1", "accuracy")),
    "stsb": Task("STS-B", SENTENCES, label="score", labels=None, metrics=("pearson", "spearman")),
    "qqp": Task("QQP", ("question1", "question2"), label="is_duplicate", metrics=("f1", "accuracy"),
                ragged=True),
    "mnli": Task("MNLI", SENTENCES, label="gold_label", labels=NLI,
                 parts=(("-m", "dev_matched.tsv", "test_matched.tsv"),
                        ("-mm", "dev_mismatched.tsv", "test_mismatched.tsv"))),
    "qnli": Task("QNLI", ("question", "sentence"), labels=("entailment", "not_entailment")),
    "rte": Task("RTE", SENTENCES, labels=("entailment", "not_entailment")),
    "wnli": Task("WNLI", SENTENCES),
    # no training part: an MNLI model predicts it
    "ax": Task("AX", SENTENCES, labels=NLI, parts=(("", None, "AX.tsv"),)),
}


# the paper's columns, and what --tasks all means
TABLE2 = ("mnli", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola")


def choose_tasks(text):
    """'all' (the eight of Table 2), or names with commas, also 'all,wnli,ax' -> list of keys of TASKS."""
    names = [name for part in text.split(",") for name in (TABLE2 if part == "all" else (part,))]
    for name in names:
        if name not in TASKS:
            raise BadInput(f"there is no GLUE task {name!r}; choose from all, {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------- reading

def find_file(glue_dir, name, file):
    """The path of one file of a task, which must exist."""
    folder = Path(glue_dir) / TASKS[name].folder
    # the usual download script calls the diagnostic set by other names
    diagnostic = (Path(glue_dir, "diagnostic", "diagnostic.tsv"), folder / "diagnostic.tsv")
    for path in (folder / file, *(diagnostic if name == "ax" else ())):
        if path.is_file():
            return path
    hint = "; make it from the msr_paraphrase files as the GLUE download script does" * (name == "mrpc")
    raise BadInput(f"{folder / file} does not exist; it is part of {TASKS[name].folder} from {ADDRESS}{hint}")


def read_task(glue_dir, name, file):
    """One file of a task: "train.tsv", or a dev or test file of its `parts`. Test files are read without
    labels."""
    task = TASKS[name]
    labelled = file not in [test for _, _, test in task.parts]
    return read_table(find_file(glue_dir, name, file), task.text, task.label if labelled else None,
                      task.columns if labelled else None, task.ragged and labelled)


def task_labels(name, examples):
    """Class numbers, or the scores of STS-B."""
    labels = TASKS[name].labels
    return examples.scores(0, 5) if labels is None else examples.classes(labels)


# ---------------------------------------------------------------------------- metrics

def accuracy(predicted, true):
    """Share of equal class numbers."""
    return float(np.mean(predicted == true))


def f1(predicted, true):
    """Of class 1. 0 where class 1 is neither predicted nor there."""
    both = np.sum((predicted == 1) & (true == 1))
    return float(2 * both / max(1, np.sum(predicted == 1) + np.sum(true == 1)))


def matthews(predicted, true):
    """Matthews correlation, for any number of classes (Gorodkin 2004). 0 where all are predicted, or are, of
    one class."""
    K = 1 + max(predicted.max(), true.max())
    p, t = (np.bincount(x, minlength=K).astype(float) for x in (predicted, true))
    N = len(true)
    scale = (N * N - p @ p) * (N * N - t @ t)
    return float((N * np.sum(predicted == true) - p @ t) / math.sqrt(scale)) if scale else 0.0


def pearson(predicted, true):
    """Correlation. 0 where either is constant."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    x, y = predicted - np.mean(predicted), true - np.mean(true)
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def rank_correlation(predicted, true):
    """Correlation of the ranks. 0 where either is constant."""
    return pearson(ranks(predicted), ranks(true))


def ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson,
           "spearman": rank_correlation}


# ---------------------------------------------------------------------------- Table 2

def average_row(scores):
    """{task: {metric and suffix: score}} -> ({column: score}, their mean), as in the paper's Table 2: the
    first metric of each task, and MNLI's two parts count as two in the mean."""
    row = {}
    for name in TABLE2:
        task = TASKS[name]
        if name in scores:
            for suffix, *_ in task.parts:
                row[task.folder + suffix] = scores[name][task.metrics[0] + suffix]
    return row, (sum(row.values()) / len(row) if row else None)


# ---------------------------------------------------------------------------- the server's files

def server_files(name):
    """{name of the file for the server: name of the test file} of a task."""
    task = TASKS[name]
    return {f"{task.folder}{suffix}.tsv": test for suffix, _, test in task.parts}


def write_predictions(path, name, predicted):
    """Write what the GLUE server expects for a test part of a task: class numbers (N,) or scores (N,)."""
    labels = TASKS[name].labels
    cells = [f"{min(max(x, 0), 5):.3f}" if labels is None else labels[x] for x in predicted]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("index\tprediction\n" + "".join(f"{i}\t{cell}\n" for i, cell in enumerate(cells)),
                    newline="\n")


def pack(folder, rows):
    """Zip the files of a folder that the keys of `rows` name beside it, DIR/seed0 -> DIR/seed0.zip, without
    the folder's name. Returns the path. BadInput where a file does not have as many rows as its test part,
    the value in `rows`."""
    for name, count in rows.items():
        found = Path(folder, name).read_bytes().count(b"\n") - 1
        if found != count:
            raise BadInput(f"{Path(folder, name)} has {found:,} predictions, and the test part {count:,} "
                           "texts; remove it")
    target = Path(f"{folder}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in rows:
            archive.write(Path(folder, name), name)
    return target
