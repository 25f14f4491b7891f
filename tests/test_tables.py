"""Labelled texts in files of every kind, whole and broken."""
import json
import random

import pytest

from downstream.tables import Columns, read_labelled
from support.cli import BadInput

ROWS = [('He said "no, and" left', "b; c", "yes"), ("two\nlines,\r\nor three", "é\u2028", "no"),
        ("", "'", "yes")]


def csv_text(rows, delimiter, end):
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + end for row in rows)


@pytest.mark.parametrize("delimiter", (",", ";"))
@pytest.mark.parametrize("mark, end", (("", "\n"), ("\ufeff", "\r\n")), ids=("plain", "mark and CRLF"))
def test_csv_as_spreadsheets_write_it(tmp_path, delimiter, mark, end):
    path = tmp_path / "a.csv"
    path.write_text(mark + csv_text([("text", "text_b", "label"), *ROWS], delimiter, end) + end, newline="",
                    encoding="utf-8")
    examples = read_labelled(path)
    assert examples.texts == [row[:2] for row in ROWS] and examples.labels == ["yes", "no", "yes"]
    only = read_labelled(path, Columns("text_b", "text", "label"))
    assert only.texts == [(b, a) for a, b, _ in ROWS]


def test_quotation_marks_in_tab_separated_files_are_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so\tyes\n"so"\tno\n', encoding="utf-8")
    assert read_labelled(path).texts == [('"so',), ('"so"',)]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    values = [True, 3, 0.5, "x"]
    lines = [json.dumps({"label": value, "more": None, "text": f"{k}\n\t"}) for k, value in enumerate(values)]
    path.write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8", newline="")
    examples = read_labelled(path)
    assert examples.labels == ["true", "3", "0.5", "x"]
    assert examples.texts == [(f"{k}\n\t",) for k in range(4)]
    assert examples.lines == [1, 3, 5, 7]


@pytest.mark.parametrize("name", ("a.tsv", "a.csv"))
def test_columns_by_number_where_no_line_names_them(tmp_path, name):
    path = tmp_path / name
    path.write_text("1,good film,x\n0,bad film,y\n".replace(",", "\t" if name == "a.tsv" else ","))
    examples = read_labelled(path, Columns("2", None, "1"))
    assert examples.texts == [("good film",), ("bad film",)] and examples.labels == ["1", "0"]
    assert read_labelled(path, Columns("2", "3", "1")).texts == [("good film", "x"), ("bad film", "y")]
    with pytest.raises(BadInput, match="has columns 1 to 3; 4, 1 were asked for"):
        read_labelled(path, Columns("4", None, "1"))


@pytest.mark.parametrize("name, content, columns, says", [
    ("a.tsv", "text\tclass\na\tx\n", Columns(),
     "no column 'label', only text, class; say with --text-column"),
    ("a.csv", "review,label\na,x\n", Columns(),
     "no column 'text', only review, label; say with --text-column"),
    ("a.csv", "text,label\na,x\n", Columns(text="review"), "no column 'review', only text, label"),
    ("a.tsv", "a wonderful film\t1\nawful\t0\n", Columns(),
     "no line of column names, since it begins with a wonderful film, 1;"),
    ("a.csv", "so good,yes\nbad,no\nnice,yes\n", Columns(),
     "by their number, such as --text-column 1 --label-column 2"),
    ("a.csv", '"a very long text, in which there are words and words",x\n', Columns(),
     "no line of column names"),
    ("a.tsv", "text\tlabel\n\"a\tb\"\tx\n", Columns(),
     "line 2: 3 columns where there should be 2; in a .tsv quotation marks"),
    ("a.csv", 'text,label\n"a"b,x\n', Columns(), "line 2: .*; a quotation mark in a quoted cell is doubled"),
    ("a.csv", 'text,label\n"a,x\nb,y\n', Columns(), "quoted cell"),
    ("a.csv", "text,label\n", Columns(), "no rows"), ("a.tsv", "", Columns(), "no column 'text'|no rows"),
    ("a.jsonl", "", Columns(), "line 1 is not a JSON object"),
    ("a.jsonl", "[1]\n", Columns(), "line 1 is not a JSON object"),
    ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', Columns(), "line 2: no 'label' among text"),
    ("a.jsonl", '{"text": "a", "label": "x"}\nnot\n', Columns(), "line 2 is not a JSON object"),
    ("a.json", '{"review": "a", "label": "x"}\n', Columns(),
     "no column 'text', only review, label; say with --text-column")])
def test_what_is_wrong_is_said(tmp_path, name, content, columns, says):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    with pytest.raises(BadInput, match=says):
        read_labelled(tmp_path / name, columns)


def test_what_is_no_text_is_refused_with_the_count(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(BadInput, match="1 of 1 files of .*a.csv are not UTF-8 text"):
        read_labelled(path)


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "A.CSV").write_text('text,label\n"so, so",yes\n', encoding="utf-8")
    (tmp_path / "A.JSONL").write_text('{"text": "so, so", "label": "yes"}\n', encoding="utf-8")
    for name in ("A.CSV", "A.JSONL"):
        found = read_labelled(tmp_path / name)
        assert found.texts == [("so, so",)] and found.labels == ["yes"]
