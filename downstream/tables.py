"""Labelled texts in files, as they come.

    .tsv, .txt, ..       columns between tabs, lines between line feeds and nowhere else; quotation marks are
                         text
    .csv                 columns between commas or semicolons; a quoted cell may hold them, line ends and ""
                         for "
    .jsonl, .json        one object a line

A file begins with a line of column names, byte-order mark and CRLF are taken off, empty lines are skipped,
and bytes that are not UTF-8 become U+FFFD. GLUE's files are such tables too.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cli import BadInput
from text.sources import text_files

JSON_LINES = (".jsonl", ".ndjson", ".json")


class Columns(NamedTuple):
    """The columns of a table that are read: by name, or by number, from 1, in a file without a line of
    names."""

    text: str = "text"
    text_b: str = None  # of the second text of a pair; None: the column text_b, where there is one
    label: str = "label"


USUAL = Columns()


@dataclass(frozen=True)
class Examples:
    """Texts, each a tuple of one or two str, and their labels as the file writes them (None: the file has
    none)."""

    path: Path
    texts: list
    labels: list
    lines: list   # line numbers, from 1
    skipped: int  # rows left out because they have a wrong number of columns

    def classes(self, labels):
        """The labels as class numbers, int64 (N,)."""
        number = {label: k for k, label in enumerate(labels)}
        for label, line in zip(self.labels, self.lines):
            if label not in number:
                raise BadInput(f"{self.path}, line {line}: the label {label!r} is not one of "
                               f"{', '.join(labels)}")
        return np.array([number[label] for label in self.labels], np.int64)

    def scores(self, low=-math.inf, high=math.inf):
        """The labels as numbers in low..high, float64 (N,)."""
        values = []
        for label, line in zip(self.labels, self.lines):
            try:
                values.append(float(label))
            except ValueError:
                values.append(math.nan)
            if not (math.isfinite(values[-1]) and low <= values[-1] <= high):
                raise BadInput(f"{self.path}, line {line}: the label {label!r} is not a number"
                               + (f" from {low:g} to {high:g}" if high < math.inf else ""))
        return np.array(values)


def read_table(path, text, label=None, columns=None, ragged=False):
    """The Examples of a file with these columns of text and this column of labels.

    columns  their names, where the file has no line of them
    ragged   rows with a wrong number of columns are left out and counted; else BadInput
    """
    texts, labels, lines, skipped, places = [], [], [], 0, None
    wanted = (*text, label) if label else tuple(text)
    for number, row in read_objects(path, wanted) if suffix_of(path) in JSON_LINES else read_rows(path):
        if columns is None:
            columns = row
            continue
        if places is None:
            places = find_columns(path, wanted, columns)
        if len(row) != len(columns):
            if not ragged:
                raise BadInput(f"{path}, line {number}: {len(row)} columns where there should be "
                               f"{len(columns)}"
                               + ("; in a .tsv quotation marks are text: call it .csv if they enclose cells"
                                  if any(cell.startswith('"') for cell in row) else ""))
            skipped += 1
            continue
        cells = [row[k] for k in places]
        texts.append(tuple(cells[:len(text)]))
        labels += cells[len(text):]
        lines.append(number)
    if not texts:
        if columns is not None:
            find_columns(path, wanted, columns)
        raise BadInput(f"{path} has no rows")
    return Examples(Path(path), texts, labels if label else None, lines, skipped)


def suffix_of(path):
    return Path(path).suffix.lower()


def find_columns(path, wanted, columns):
    """The places of these names among the columns."""
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise BadInput(f"{path} has no column {missing[0]!r}, only {', '.join(map(shorten, columns))}; "
                       f"{'commas' if suffix_of(path) == '.csv' else 'tabs'} separate columns")
    return [columns.index(name) for name in wanted]


def read_rows(path):
    """The rows of a .csv or a tab-separated file -> (line number, list of cells)."""
    with open(path, encoding="utf-8-sig", errors="replace",
              newline="" if suffix_of(path) == ".csv" else "\n") as file:
        if suffix_of(path) != ".csv":
            for number, line in enumerate(file, 1):  # splits at \n only, translates nothing
                line = line.removesuffix("\n").removesuffix("\r")
                if line:
                    yield number, line.split("\t")
            return
        first = file.readline()
        file.seek(0)
        csv.field_size_limit(1 << 30)
        rows = csv.reader(file, delimiter=";" if first.count(";") > first.count(",") else ",", strict=True)
        try:
            for row in rows:
                if row:
                    yield rows.line_num, row
        except csv.Error as error:
            raise BadInput(f"{path}, line {rows.line_num}: {error}; a quotation mark in a quoted cell is "
                           "doubled") from None


def read_objects(path, wanted):
    """The objects of a file of JSON lines as rows: first the names `wanted`, then their values as text."""
    yield 0, list(wanted)
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            values = read_object(path, number, line)
            missing = [name for name in wanted if values.get(name) is None]
            if missing:
                raise BadInput(f"{path}, line {number}: no {missing[0]!r} among "
                               f"{', '.join(map(shorten, values))}")
            yield number, [x if isinstance(x := values[name], str) else json.dumps(x) for name in wanted]


def read_object(path, number, line):
    """The object in a line of JSON lines."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadInput(f"{path}, line {number} is not a JSON object; a line should look like "
                       '{"text": "so good", "label": "yes"}')
    return values


def read_labelled(path, columns=USUAL):
    """The Examples of somebody's own file. BadInput says which columns there are, or that no line names
    them."""
    text_files(path)  # refuses what is not UTF-8
    if suffix_of(path) in JSON_LINES:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "null")
        header, rows = list(read_object(path, 1, line)), []
    else:
        header, *rows = [row for _, row in zip(range(100), (row for _, row in read_rows(path)))] or [[]]
    pair = columns.text_b or ("text_b" if "text_b" in header else None)
    text = (columns.text, pair) if pair else (columns.text,)
    wanted, names = (*text, columns.label), ", ".join(map(shorten, header))
    if set(wanted) <= set(header):
        return read_table(path, text, columns.label)
    if all(name.isdecimal() for name in wanted) and suffix_of(path) not in JSON_LINES:
        if not all(1 <= int(name) <= len(header) for name in wanted):
            raise BadInput(f"{path} has columns 1 to {len(header)}; {', '.join(wanted)} were asked for")
        return read_table(path, text, columns.label, [str(k + 1) for k in range(len(header))])
    missing = next(name for name in wanted if name not in header)
    if looks_like_a_row(header, rows):
        raise BadInput(f"{path} seems to have no line of column names, since it begins with {names}; name "
                       "columns by their number, such as --text-column 1 --label-column 2, or put a first "
                       "line: text, label")
    raise BadInput(f"{path} has no column {missing!r}, only {names}; say with --text-column and "
                   "--label-column which to read")


def looks_like_a_row(header, rows):
    """Whether a first line holds an example rather than names: a number, a sentence, an empty cell, or one
    that comes again in its column."""
    return any(not cell or is_number(cell) or len(cell) > 40 or cell.count(" ") > 3
               or any(cell == row[k] for row in rows if k < len(row)) for k, cell in enumerate(header))


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def shorten(text, most=30):
    """The beginning of a cell, for a message."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most - 2] + ".."
