"""Labelled text: GLUE, a table, passages of pydoc or of novels; metrics, and the GLUE server's files.

    DIR/CoLA/train.tsv   DIR/SST-2/train.tsv   DIR/MNLI/dev_matched.tsv   DIR/AX/AX.tsv   ...

GLUE (Wang et al. 2018) is at https://gluebenchmark.com/tasks. Quotation marks in its files are text and need
not balance. Labels of the test parts are not public; scores here are those of the dev parts.

    python -m tasks.glue FOLDER --out DIR     passages of a folder of novels: who wrote this?
"""

import csv
import json
import math
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import pydoc_texts
from util import BadInput, Parser, command_line, positive

ADDRESS = "https://gluebenchmark.com/tasks"

# ---------------------------------------------------------------------------- the tasks

@dataclass(frozen=True)
class Task:
    """One task of GLUE. The first of `metrics` is that of Table 2."""

    folder: str                   # also the name of the file for the server
    text: tuple                   # the one or two columns of text
    label: str = "label"
    labels: tuple = ("0", "1")    # in the order of their class numbers; None: scores in 0..5
    metrics: tuple = ("accuracy",)
    parts: tuple = (("", "dev.tsv", "test.tsv"),)  # (suffix, dev file, test file)
    columns: tuple = None         # of train and dev, where these have no header line
    ragged: bool = False          # malformed rows of train and dev are known, and left out


PAIR, NLI = ("sentence1", "sentence2"), ("entailment", "neutral", "contradiction")
MNLI = (("-m", "dev_matched.tsv", "test_matched.tsv"), ("-mm", "dev_mismatched.tsv", "test_mismatched.tsv"))
TASKS = {
    "cola": Task("CoLA", ("sentence",), metrics=("matthews", "accuracy"),
                 columns=("source", "label", "mark of the source", "sentence")),
    "sst2": Task("SST-2", ("sentence",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), label="Quality", metrics=("f1", "accuracy")),
    "stsb": Task("STS-B", PAIR, label="score", labels=None, metrics=("pearson", "spearman")),
    "qqp": Task("QQP", ("question1", "question2"), label="is_duplicate", metrics=("f1", "accuracy"),
                ragged=True),
    "mnli": Task("MNLI", PAIR, label="gold_label", labels=NLI, parts=MNLI),
    "qnli": Task("QNLI", ("question", "sentence"), labels=("entailment", "not_entailment")),
    "rte": Task("RTE", PAIR, labels=("entailment", "not_entailment")),
    "wnli": Task("WNLI", PAIR),
    "ax": Task("AX", PAIR, labels=NLI, parts=(("", None, "AX.tsv"),)),  # an MNLI model predicts it
}
TABLE2 = ("mnli", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola")  # the paper's columns


class Part(NamedTuple):
    """Texts, each a tuple of one or two str, and class numbers int64 (N,), scores float64 (N,), or None."""

    texts: list
    labels: np.ndarray = None

    def only(self, rows):
        return Part([self.texts[i] for i in rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """A training part and dev parts {suffix: part}: one with suffix "", or MNLI's two; or ImageSets."""

    name: str
    classes: tuple  # None: labels are scores
    metrics: tuple
    train: Part
    dev: dict


# ---------------------------------------------------------------------------- tables

def read_rows(path, columns=None, ragged=False):
    """The rows of a table as {column: cell}. `columns` are their names where no header line has them.

    .csv: commas or semicolons between cells, which may be quoted. .jsonl: one object a line. Anything else:
    tabs and line feeds, as in GLUE. Rows with a wrong number of cells are refused, or if `ragged` left out.
    """
    suffix, left_out = Path(path).suffix.lower(), 0
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if suffix == ".csv" else "\n") as file:
        if suffix == ".csv":
            csv.field_size_limit(1 << 30)
            first = file.readline()
            file.seek(0)
            delimiter = ";" if first.count(";") > first.count(",") else ","
            rows = csv.reader(file, delimiter=delimiter, strict=True)
        elif suffix in (".jsonl", ".json"):
            rows = (json.loads(line) for line in file if line.strip())
        else:
            rows = (line.removesuffix("\n").removesuffix("\r").split("\t") for line in file)
        try:
            for row in rows:
                if isinstance(row, dict):
                    yield {name: x if isinstance(x, str) else json.dumps(x) for name, x in row.items()}
                elif columns is None:
                    columns = row
                elif len(row) == len(columns):
                    yield dict(zip(columns, row))
                elif ragged:
                    left_out += 1
                elif row not in ([], [""]):
                    raise BadInput(f"{path} has a row of {len(row)} cells, not {len(columns)}: {row[0][:40]}"
                                   "... Quotation marks enclose cells in a .csv only")
        except (csv.Error, json.JSONDecodeError) as error:
            raise BadInput(f"{path}: {error}") from None
    if left_out:
        print(f"{path}: {left_out} malformed rows left out", file=sys.stderr)


def read_texts(path, text, label=None, columns=None, ragged=False):
    """Columns of a table -> texts (tuples of str), labels (str; none without `label`)."""
    texts, labels, wanted = [], [], (*text, label) if label else text
    for row in read_rows(path, columns, ragged):
        missing = [name for name in wanted if name not in row]
        if missing:
            raise BadInput(f"{path} has no column {missing[0]!r}, only {', '.join(row)}; say with "
                           "--text-column and --label-column which to read")
        texts.append(tuple(row[name] for name in text))
        labels += [row[label]] if label else []
    if not texts:
        raise BadInput(f"{path} has no rows below the names of its columns")
    return texts, labels


def numbered(labels, classes, path):
    """Labels as class numbers, int64 (N,), or where `classes` is None as scores, float64 (N,)."""
    wrong = [label for label in labels if not (is_number(label) if classes is None else label in classes)]
    if wrong:
        allowed = "a number" if classes is None else f"one of {', '.join(classes)}"
        raise BadInput(f"{path}: the label {wrong[0]!r} is not {allowed}")
    if classes is None:
        return np.array([float(label) for label in labels])
    return np.array([classes.index(label) for label in labels], np.int64)


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------------------- data sets

def choose_tasks(text, submit=None):
    """'all', the eight of Table 2, or names with commas, also 'all,wnli,ax' -> keys of TASKS."""
    names = list(dict.fromkeys(x for part in text.split(",") for x in (TABLE2 if part == "all" else (part,))))
    wrong = [name for name in names if name not in TASKS]
    if wrong:
        raise BadInput(f"there is no GLUE task {wrong[0]!r}; choose from all, {', '.join(TASKS)}")
    if "ax" in names and not (submit and "mnli" in names):
        raise BadInput("ax has no training part: the mnli model predicts it, with --submit DIR and mnli "
                       "among the --tasks")
    return names


def find_file(glue_dir, name, file):
    """The path of one file of a task."""
    if not glue_dir:
        raise BadInput(f"{name} is a GLUE task: say with --glue-dir where its files from {ADDRESS} are")
    path = Path(glue_dir, TASKS[name].folder, file)
    usual = Path(glue_dir, "diagnostic", "diagnostic.tsv")  # what GLUE's download script makes of AX.tsv
    if name == "ax" and usual.is_file():
        return usual
    if not path.is_file():
        raise BadInput(f"{path} does not exist; it is part of {TASKS[name].folder} from {ADDRESS}")
    return path


def check_files(glue_dir, names, submit=None):
    """Refuse what is missing: better now than after hours."""
    for name in names:
        for _, dev, test in TASKS[name].parts:
            for file in (("train.tsv", dev) if dev else ()) + ((test,) if submit else ()):
                find_file(glue_dir, name, file)


def glue_dataset(glue_dir, name):
    """The training and dev parts of a GLUE task."""
    task = TASKS[name]

    def part(file):
        path = find_file(glue_dir, name, file)
        texts, labels = read_texts(path, task.text, task.label, task.columns, task.ragged)
        return Part(texts, numbered(labels, task.labels, path))

    train = part("train.tsv")
    dev = {suffix: part(file) for suffix, file, _ in task.parts}
    return Dataset(name, task.labels, task.metrics, train, dev)


def table_dataset(path, dev=None, regression=False, text="text", text_b=None, label="label", seed=0):
    """The table `path`. Its column text_b, if it has one, is the second text of a pair.

    Without a `dev` file a seeded fifth is held out. Labels are scores if `regression`, or if they are numbers
    and not all of them whole.
    """
    for file in filter(None, (path, dev)):
        if not Path(file).is_file():
            raise BadInput(f"{file} is not a file; give a .tsv, .csv or .jsonl file with columns text and "
                           f"label, pydoc, or a GLUE task: {', '.join(TASKS)}")
    if text_b is None and "text_b" in next(read_rows(path), {}):
        text_b = "text_b"
    read = [read_texts(file, (text, text_b) if text_b else (text,), label) for file in (path, dev) if file]
    labels, classes, metrics = read[0][1], None, ("pearson", "spearman")
    scores = all(map(is_number, labels)) and not all(float(label).is_integer() for label in labels)
    if not (regression or scores):
        classes, metrics = tuple(sorted(set(labels))), ("accuracy", "matthews")
        if len(classes) < 2:
            raise BadInput(f"{path} has only one label, {classes[0]!r}")
    parts = [Part(texts, numbered(labels, classes, file)) for (texts, labels), file in zip(read, (path, dev))]
    if not dev:
        order = np.random.default_rng(seed).permutation(len(labels))
        count = max(1, round(0.2 * len(order)))
        parts = [parts[0].only(np.sort(order[count:])), parts[0].only(np.sort(order[:count]))]
    return Dataset(str(path), classes, metrics, parts[0], {"": parts[1]})


def pydoc_dataset(packages=12, size=300):
    """Passages of the standard library's documentation, labelled with their package: those with the most text
    of at least four documented modules. About a fifth of each are for dev, from modules of their own."""
    documents = {}
    for name, text in pydoc_texts():
        package, found = name.partition(".")[0], passages(text, size)
        if package != "topics" and found:
            documents.setdefault(package, {})[name] = found
    amount = {package: sum(map(len, modules.values())) for package, modules in documents.items()
              if len(modules) >= 4}
    classes = tuple(sorted(sorted(amount, key=amount.get)[-packages:]))
    texts, labels = ([], []), ([], [])
    for k, package in enumerate(classes):
        # R12: the same modules on every machine; the one with the most text is for training
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


def passages(text, size):
    """Whole paragraphs, joined up to about `size` characters; shorter than 40 is no passage."""
    found = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if found[-1] and len(found[-1]) + len(paragraph) > size:
            found.append("")
        found[-1] += " " * bool(found[-1]) + paragraph
    return [passage for passage in found if len(passage) >= 40]


def label_subset(labels, fraction=1.0, per_class=None, seed=0):
    """A seeded choice of rows, of each class alike: `per_class`, or that share of it, but at least one. Of
    scores that share of all rows. Returns row numbers in order."""
    scores = labels.dtype.kind != "i"
    if not 0 < fraction <= 1:
        raise BadInput(f"--label-fraction {fraction:g} is not in 0..1, 0 excluded")
    if per_class and scores:
        raise BadInput(f"--labels-per-class {per_class} is for classes, and these labels are scores; use "
                       "--label-fraction")
    rng, groups = np.random.default_rng(seed), [np.arange(len(labels))]
    if not scores:
        groups = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    chosen = [rng.permutation(rows)[:per_class or max(1, round(fraction * len(rows)))] for rows in groups]
    return np.sort(np.concatenate(chosen))


# ---------------------------------------------------------------------------- metrics and Table 2

def f1(predicted, true):
    """Of class 1; 0 where that is neither predicted nor there."""
    both = np.sum((predicted == 1) & (true == 1))
    return float(2 * both / max(1, np.sum(predicted == 1) + np.sum(true == 1)))


def matthews(predicted, true):
    """Of any number of classes (Gorodkin 2004); 0 where all are predicted, or are, of one class."""
    K, N = 1 + max(predicted.max(), true.max()), len(true)
    p, t = (np.bincount(x, minlength=K).astype(float) for x in (predicted, true))
    scale = (N * N - p @ p) * (N * N - t @ t)
    return float((N * np.sum(predicted == true) - p @ t) / math.sqrt(scale)) if scale else 0.0


def pearson(predicted, true):
    """Correlation; 0 where either is constant."""
    return float(np.corrcoef(predicted, true)[0, 1]) if np.ptp(predicted) and np.ptp(true) else 0.0


def ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


METRICS = {  # of predicted and true class numbers or scores, both (N,)
    "accuracy": lambda predicted, true: float(np.mean(predicted == true)), "f1": f1, "matthews": matthews,
    "pearson": pearson, "spearman": lambda predicted, true: pearson(ranks(predicted), ranks(true))}


def table2_row(results):
    """{task: {metric and suffix: {"mean": score}}} -> {column: score} of Table 2, of which MNLI has two."""
    return {TASKS[name].folder + suffix: results[name][TASKS[name].metrics[0] + suffix]["mean"]
            for name in TABLE2 if name in results for suffix, *_ in TASKS[name].parts}


# ---------------------------------------------------------------------------- the server's files

def server_files(name):
    """{name of the file for the GLUE server: test file} of a task."""
    return {f"{TASKS[name].folder}{suffix}.tsv": test for suffix, _, test in TASKS[name].parts}


def test_part(glue_dir, name, file):
    """The texts of a test file, every row of it: a submission counts rows."""
    return Part(*read_texts(find_file(glue_dir, name, file), TASKS[name].text))


def prediction_file(name, predicted):
    """Class numbers (N,) or scores (N,) of a test part -> the file that the GLUE server expects."""
    labels = TASKS[name].labels
    cells = [f"{min(max(x, 0), 5):.3f}" if labels is None else labels[x] for x in predicted]
    return "\n".join(["index\tprediction", *(f"{i}\t{cell}" for i, cell in enumerate(cells)), ""])


def pack(path, files):
    """Write a submission, {name: text}, as a zip file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)


# ---------------------------------------------------------------------------- who wrote this?

def novels_of(folder):
    """{author: paths} of the authors of two novels or more in a folder of files AUTHOR_TITLE.txt."""
    novels = defaultdict(list)
    for path in sorted(Path(folder).glob("*.txt")):
        novels[path.stem.split("_")[0]].append(path)
    return {author: paths for author, paths in novels.items() if len(paths) > 1}


def authors_dataset(folder, out, train=16, dev=40, characters=600):
    """Write OUT/train.tsv and OUT/dev.tsv, `train` and `dev` passages of every author -> the authors.

    The dev passages are from an author's last novel, so that names and places do not tell who wrote them.
    """
    novels, rng, out = novels_of(folder), np.random.default_rng(0), Path(out)
    if len(novels) < 2:
        raise BadInput(f"{folder} does not hold two or more files AUTHOR_TITLE.txt of at least two authors")

    def cut(path, count):
        """`count` pieces of whole words at random, white space made single."""
        text = " ".join(re.sub(r"\s+", " ", path.read_text(encoding="utf-8-sig", errors="replace")).split())
        margin = len(text) // 20  # neither title page nor index
        starts = rng.integers(margin, max(margin + 1, len(text) - margin - characters), size=count)
        pieces = (text[start:start + characters] for start in sorted(starts))
        return [piece.partition(" ")[2].rpartition(" ")[0] for piece in pieces]

    rows = {"train": [], "dev": []}
    for author, (*known, last) in novels.items():
        shares = np.diff(np.linspace(0, train, len(known) + 1).round().astype(int))
        rows["train"] += [(text, author) for path, share in zip(known, shares) for text in cut(path, share)]
        rows["dev"] += [(text, author) for text in cut(last, dev)]
    out.mkdir(parents=True, exist_ok=True)
    for side, found in rows.items():
        lines = ["text\tlabel", *map("\t".join, found)]
        (out / f"{side}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return sorted(novels)


def main(argv=None):
    parser = Parser(description="Labelled passages of a folder of novels, AUTHOR_TITLE.txt: who wrote this?")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=positive, default=16, help="training passages of every author")
    parser.add_argument("--dev", type=positive, default=40, help="dev passages of every author")
    args = parser.parse_args(argv)
    authors = authors_dataset(args.folder, args.out, args.train, args.dev)
    print(f"{args.out}: passages of {len(authors)} authors")


if __name__ == "__main__":
    command_line(main)
