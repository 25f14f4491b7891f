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
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import pydoc_texts
from util import BadInput, Parser, command_line, note, positive, write_text

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", re.IGNORECASE)
MISSING = {"n/a", "na", "nan", "none", "null", "-", "?"}  # among numbers these are no class


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
    places: np.ndarray = None  # rows of the file, from 0 below the names of the columns

    def only(self, rows):
        return Part([self.texts[i] for i in rows], self.labels[rows], self.places[rows])


@dataclass(frozen=True)
class Dataset:
    """A training part and dev parts {suffix: part}: one with suffix "", or MNLI's two; or ImageSets."""

    name: str
    classes: tuple  # None: labels are scores
    metrics: tuple
    train: Part
    dev: dict
    columns: tuple = ()  # of the file that held the texts


# ---------------------------------------------------------------------------- tables

def read_rows(path, columns=None, ragged=False):
    """(line number, {column: cell}) of each row of a .csv or .jsonl file, or of one with tabs, as GLUE's.
    `columns` name the cells where no header does; `ragged` leaves malformed rows out and refuses none."""
    suffix, number, left_out = Path(path).suffix.lower(), 0, 0
    objects = suffix in (".jsonl", ".json")
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if suffix == ".csv" else "\n") as file:
        if objects:
            rows = ((k, json.loads(line)) for k, line in enumerate(file, 1) if line.strip())
        elif suffix == ".csv":
            first = file.readline()
            file.seek(0)
            csv.field_size_limit(1 << 30)
            reader = csv.reader(file, delimiter=max(",;", key=first.count), strict=True)
            rows = ((reader.line_num, row) for row in reader)
        else:
            rows = ((k, line.rstrip("\r\n").split("\t")) for k, line in enumerate(file, 1))
        try:
            for number, row in rows:
                if objects and not isinstance(row, dict):
                    raise BadInput(f"{path}, line {number} is not an object with a value for each column")
                if objects:
                    yield number, row
                elif columns is None:
                    columns = row
                elif len(row) == len(columns):
                    yield number, dict(zip(columns, row))
                elif ragged:
                    left_out += 1
                elif row not in ([], [""]):
                    raise BadInput(f"{path}, line {number}: a row of {len(row)} cells, not {len(columns)}")
        except (csv.Error, json.JSONDecodeError) as error:
            raise BadInput(f"{path}, behind line {number}: {error}") from None
    if left_out:
        note(f"{path}: {left_out} malformed rows left out")


class Table(NamedTuple):
    """Columns of a file: texts (tuples of str), labels (str), and the line of each row."""

    path: str
    texts: list
    labels: list
    lines: list

    def check(self, right, why):
        """Refuse the first label that is not right."""
        for line, label in zip(self.lines, self.labels):
            if not right(label):
                raise BadInput(f"{self.path}, line {line}: the label {label!r} {why}")


def read_table(path, text, label=None, columns=None, ragged=False):
    """Read columns of a table, without `label` only texts. In labels white space is made single, and the .0
    that pandas gives to a whole number goes."""
    found, wanted = Table(path, [], [], []), (*text, label) if label else text
    for number, row in read_rows(path, columns, ragged):
        for name in wanted:
            if isinstance(row.get(name, []), (list, dict)):
                raise BadInput(f"{path}, line {number} has no text or label in a column {name!r}, only "
                               f"{listed(row)}; choose with --text-column and --label-column")
        found.texts.append(tuple(as_text(row[name]) for name in text))
        found.lines.append(number)
        if label:
            found.labels.append(re.sub(r"^(-?\d+)\.0*$", r"\1", " ".join(as_text(row[label]).split())))
    found.check(bool, "is empty")
    found.check(lambda label: "\ufffd" not in label, "is not UTF-8")
    joined = ["".join(texts) for texts in found.texts]
    empty, replaced = sum(not x.strip() for x in joined), sum("\ufffd" in x for x in joined)
    if empty == len(joined):
        raise BadInput(f"{path} has no text in its column {text[0]!r}")
    if empty or replaced:
        note(f"{path}: of {len(joined):,} texts {empty:,} are empty, and {replaced:,} hold U+FFFD in place "
             "of what is not UTF-8")
    return found


def as_text(cell):
    """A cell as str: null is empty, half a surrogate pair U+FFFD."""
    if isinstance(cell, str):
        return re.sub(r"[\ud800-\udfff]", "\ufffd", cell)
    return "" if cell is None or math.isnan(cell) else json.dumps(cell)


def classes_of(table, regression=False):
    """The names of a table's classes, in order; None: its labels are scores, numbers and not all whole."""
    numbers = set(filter(NUMBER.fullmatch, table.labels))
    words, fractions = set(table.labels) - numbers, any(not float(x).is_integer() for x in numbers)
    if numbers and words and (fractions or {x.lower() for x in words} <= MISSING):
        table.check(NUMBER.fullmatch, "is not a number, as others are")
    return None if regression or fractions else tuple(sorted(numbers | words, key=str if words else float))


def numbered(table, classes):
    """A Table as a Part: labels as class numbers, or where `classes` is None as scores."""
    if classes is None:
        table.check(NUMBER.fullmatch, "is not a number")
        labels = np.array([float(label) for label in table.labels])
    else:
        number = {name: k for k, name in enumerate(classes)}
        table.check(number.__contains__, f"is not of {listed(classes)}")
        labels = np.array([number[label] for label in table.labels])
    return Part(table.texts, labels, np.arange(len(labels)))


def listed(names):
    return ", ".join([*names][:10]) + ", ..." * (len(names) > 10)


# ---------------------------------------------------------------------------- data sets

def task_key(name):
    """SST-2, say -> its key in TASKS."""
    return re.sub("[-_ ]", "", name).lower()


def choose_tasks(text, glue_dir, submit=None):
    """Names of tasks with commas -> keys of TASKS; all: those of Table 2 whose files are there. What is not
    there is refused or told: better now than after hours."""
    lacking, names = {}, []  # {task: paths of its files that are not there}
    for name, task in TASKS.items():
        files = [file for _, dev, test in task.parts for file in (dev and "train.tsv", dev, submit and test)]
        paths = [task_file(glue_dir, name, file) for file in filter(None, files)]
        lacking[name] = [path for path in paths if not path.is_file()]
    there = [name for name in TABLE2 if not lacking[name]]
    for name in map(task_key, text.split(",")):
        names += (there or TABLE2) if name == "all" else [name]
    for name in names:
        if name not in TASKS:
            raise BadInput(f"there is no GLUE task {name!r}; choose from all, {', '.join(TASKS)}")
        if lacking[name]:
            raise BadInput(f"{lacking[name][0]} is not there; GLUE is at https://gluebenchmark.com/tasks")
    if "ax" in names and not (submit and "mnli" in names):
        raise BadInput("the mnli model predicts ax: it needs --submit DIR and mnli among the --tasks")
    left_out = [f"{TASKS[name].folder} ({lacking[name][0].name})" for name in TABLE2 if lacking[name]]
    if left_out and "all" in text:
        note(f"left out, as files are not in {glue_dir}: {', '.join(left_out)}")
    return list(dict.fromkeys(names))


def task_file(glue_dir, name, file):
    if not glue_dir:
        raise BadInput(f"{name} is a GLUE task: say with --glue-dir where its files are")
    usual = Path(glue_dir, "diagnostic", "diagnostic.tsv")  # what GLUE's download script makes of AX.tsv
    return usual if name == "ax" and usual.is_file() else Path(glue_dir, TASKS[name].folder, file)


def glue_dataset(glue_dir, name):
    task = TASKS[name]

    def part(file):
        path = task_file(glue_dir, name, file)
        return numbered(read_table(path, task.text, task.label, task.columns, task.ragged), task.labels)

    dev = {suffix: part(file) for suffix, file, _ in task.parts}
    return Dataset(name, task.labels, task.metrics, part("train.tsv"), dev, task.text)


def table_dataset(path, dev=None, regression=False, columns=("text",), label="label", seed=0):
    """The table `path`, of one or two `columns` of text. Labels are scores if `regression`, else as in
    classes_of. Without a `dev` file a seeded fifth is held out."""
    files = [path, dev] if dev else [path]
    for file in files:
        if not Path(file).is_file():
            raise BadInput(f"{file} is no file with columns text and label, and no GLUE task")
    tables = [read_table(file, columns, label) for file in files]
    classes = classes_of(tables[0], regression)
    train, *held = (numbered(table, classes) for table in tables)
    if not held:
        order = np.random.default_rng(seed).permutation(len(train.texts))
        count = max(1, round(0.2 * len(order)))
        train, *held = train.only(np.sort(order[count:])), train.only(np.sort(order[:count]))
    known, tested = set(train.texts), held[0].texts
    again = sum(texts in known for texts in tested)
    if dev and again == len(tested):
        raise BadInput(f"all texts of {dev} are in {path}, too, so that it tests nothing")
    if again:
        note(f"{dev or path}: {again:,} of {len(tested):,} dev texts are trained on, too")
    metrics = ("pearson", "spearman") if classes is None else ("accuracy", "matthews")
    return Dataset(str(path), classes, metrics, train, {"": held[0]}, columns)


def read_texts(path, columns):
    """Texts without labels, of a table or, one a line, of a .txt file, as a Part."""
    if Path(path).suffix.lower() == ".txt" and len(columns) == 1:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").removesuffix("\n").split("\n")
        texts = [(line,) for line in lines]
    else:
        if Path(path).is_dir():
            raise BadInput(f"{path} is a folder; give texts as a .csv, .tsv, .jsonl or .txt file")
        texts = read_table(path, columns).texts
    return Part(texts, places=np.arange(len(texts)))


def pydoc_dataset(packages=12, size=300):
    """Passages of the standard library's documentation, labelled with their package: those with the most text
    of at least four documented modules. About a fifth of each are for dev, from modules of their own."""
    documents = {}  # {package: [(module, passages)]}
    for name, text in pydoc_texts():
        package, found = name.partition(".")[0], passages(text, size)
        if package != "topics" and found:
            documents.setdefault(package, []).append((name, found))
    amount = {package: sum(len(found) for _, found in modules)
              for package, modules in documents.items() if len(modules) >= 4}
    classes = tuple(sorted(sorted(amount, key=amount.get)[-packages:]))
    sides = Table("pydoc", [], [], []), Table("pydoc", [], [], [])  # for training, for dev
    for package in classes:
        # R12: the same modules on every machine; the one with the most text is for training
        modules = sorted(documents[package], key=lambda module: zlib.crc32(module[0].encode()))
        (largest, _), held = max(modules, key=lambda module: len(module[1])), 0
        for name, found in modules:
            dev = name != largest and held < 0.2 * amount[package]
            held += dev * len(found)
            sides[dev].texts.extend((passage,) for passage in found)
            sides[dev].labels.extend([package] * len(found))
    train, dev = (numbered(side, classes) for side in sides)
    return Dataset("pydoc", classes, ("accuracy", "matthews"), train, {"": dev}, ("text",))


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
    """Row numbers, a seeded choice: `per_class` or that share of each class, but at least one; of scores that
    share of all."""
    if not 0 < fraction <= 1:
        raise BadInput(f"--label-fraction {fraction:g} is not in 0..1, 0 excluded")
    rng, groups = np.random.default_rng(seed), [np.arange(len(labels))]
    if labels.dtype.kind == "i":
        groups = [np.flatnonzero(labels == k) for k in np.unique(labels)]
    elif per_class:
        raise BadInput("--labels-per-class is for classes, and these labels are scores; use --label-fraction")
    chosen = [rng.permutation(rows)[:per_class or max(1, round(fraction * len(rows)))] for rows in groups]
    return np.sort(np.concatenate(chosen))


# ---------------------------------------------------------------------------- metrics, and the server's files

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


def interval(metric, predicted, true, draws=1000):
    """95%, over examples: Wilson's of an accuracy, else of the bootstrap; None where no draw differs."""
    n = len(true)
    if metric == "accuracy":
        share, z2 = np.mean(predicted == true), 1.96 ** 2 / n
        middle, half = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2 ** 2 / 4)
        return (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(n, size=n) for _ in range(draws))
    low, high = np.percentile([METRICS[metric](predicted[rows], true[rows]) for rows in drawn], (2.5, 97.5))
    return (low, high) if low < high else None


def server_files(name):
    """{name of the file for the GLUE server: test file} of a task."""
    return {f"{TASKS[name].folder}{suffix}.tsv": test for suffix, _, test in TASKS[name].parts}


def prediction_file(classes, predicted):
    """Class numbers (N,) or scores (N,) of a test file -> the file that the GLUE server expects."""
    cells = [f"{min(max(x, 0), 5):.3f}" if classes is None else classes[x] for x in predicted]
    return "\n".join(["index\tprediction", *(f"{i}\t{cell}" for i, cell in enumerate(cells)), ""])


# ---------------------------------------------------------------------------- who wrote this?

def novels_of(folder):
    """{author: paths} of the authors of two novels or more in a folder of files AUTHOR_TITLE.txt."""
    novels = {}
    for path in sorted(Path(folder).glob("*.txt")):
        novels.setdefault(path.stem.split("_")[0], []).append(path)
    return {author: paths for author, paths in novels.items() if len(paths) > 1}


def pieces(path, count, rng, characters=600):
    """`count` random pieces of a text, of whole words, white space made single."""
    text = " ".join(path.read_text(encoding="utf-8-sig", errors="replace").split())
    margin = len(text) // 20  # neither title page nor index
    starts = rng.integers(margin, max(margin + 1, len(text) - margin - characters), size=count)
    return [text[start:start + characters].partition(" ")[2].rpartition(" ")[0] for start in sorted(starts)]


def main(argv=None):
    """Write OUT/train.tsv and OUT/dev.tsv. The dev passages are from an author's last novel, so that names
    and places do not tell who wrote them."""
    parser = Parser(description="Labelled passages of a folder of novels, AUTHOR_TITLE.txt: who wrote this?")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=positive, default=16, help="training passages of every author")
    parser.add_argument("--dev", type=positive, default=40, help="dev passages of every author")
    args = parser.parse_args(argv)
    novels, rng, out = novels_of(args.folder), np.random.default_rng(0), Path(args.out)
    if len(novels) < 2:
        raise BadInput(f"{args.folder} does not hold files AUTHOR_TITLE.txt, two or more of two authors")
    train, dev = [], []
    for author, (*known, last) in novels.items():
        shares = np.diff(np.linspace(0, args.train, len(known) + 1).round().astype(int))
        train += [(text, author) for path, share in zip(known, shares) for text in pieces(path, share, rng)]
        dev += [(text, author) for text in pieces(last, args.dev, rng)]
    out.mkdir(parents=True, exist_ok=True)
    for side, rows in (("train", train), ("dev", dev)):
        write_text(out / f"{side}.tsv", "\n".join(["text\tlabel", *map("\t".join, rows), ""]))
    print(f"{out}: passages of {len(novels)} authors")


if __name__ == "__main__":
    command_line(main)
