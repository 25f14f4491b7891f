"""Labelled text: GLUE in its official layouts, tables, metrics against scikit-learn, the server's files."""

import zipfile

import numpy as np
import pytest
from conftest import call, call_both, call_json

from tasks import glue
from util import BadInput

# Quotation marks that do not balance, and characters that Python counts as line ends but GLUE's files do not.
A, B = 'He said "no, and "left.', "She stayed\x85 here\u2028 now\x0b.\rYes"
MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
        "sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
NLI = ["index", "sentence1", "sentence2"]
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
COLA = ["source", "label", "mark", "sentence"]


def layout(columns, *label, test=None):
    """Columns of the three files of a task whose labels stand in the last one."""
    return {"train.tsv": [*columns, *label], "dev.tsv": [*columns, *label], "test.tsv": test or columns}


# {task: {file: columns}}; of CoLA's train and dev files the columns are not written
LAYOUTS = {
    "cola": layout(COLA, test=["index", "sentence"]),
    "sst2": layout(["sentence", "label"], test=["index", "sentence"]),
    "mrpc": layout(MRPC, test=["index", *MRPC[1:]]), "stsb": layout(STSB, "score"),
    "qqp": layout(QQP, test=["id", "question1", "question2"]),
    "mnli": {"train.tsv": [*MNLI, "label1", "gold_label"],
             "dev_matched.tsv": [*MNLI, "label1", "label2", "gold_label"],
             "dev_mismatched.tsv": [*MNLI, "label1", "label2", "gold_label"],
             "test_matched.tsv": MNLI, "test_mismatched.tsv": MNLI},
    "qnli": layout(["index", "question", "sentence"], "label"),
    "rte": layout(NLI, "label"), "wnli": layout(NLI, "label"), "ax": {"AX.tsv": NLI}}


def write_glue(folder, name, mark="", end="\n"):
    """All files of a task in their official layout, six rows with the labels in turn -> their texts."""
    task = glue.TASKS[name]
    labels, texts = task.labels or ("0.5", "3.25", "4.000"), [(A, B) if k % 2 else (B, A) for k in range(6)]
    for file, columns in LAYOUTS[name].items():
        lines = [] if columns == COLA else [columns]
        for k in range(6):
            cells = dict.fromkeys(columns, "x") | dict(zip(task.text, texts[k]))
            cells |= {task.label: labels[k % len(labels)]} if task.label in columns else {}
            lines.append(list(cells.values()))
        path = folder / task.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((mark + "".join("\t".join(line) + end for line in lines)).encode())
    return [one[:len(task.text)] for one in texts]


@pytest.mark.parametrize("mark, end", [("", "\n"), ("\ufeff", "\r\n")], ids=["plain", "mark and CRLF"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_official_layouts(tmp_path, name, mark, end):
    texts, task = write_glue(tmp_path, name, mark, end), glue.TASKS[name]
    for file, test in glue.server_files(name).items():
        assert file == f"{task.folder}{'-m' * ('_matched' in test)}{'-mm' * ('mis' in test)}.tsv"
        assert glue.read_texts(glue.task_file(tmp_path, name, test), task.text).texts == texts
    if name == "ax":
        return
    data = glue.glue_dataset(tmp_path, name)
    assert list(data.dev) == (["-m", "-mm"] if name == "mnli" else [""])
    expected = [0.5, 3.25, 4] * 2 if task.labels is None else [k % len(task.labels) for k in range(6)]
    for part in (data.train, *data.dev.values()):
        assert part.texts == texts and part.labels.tolist() == expected


def test_malformed_rows_are_left_out_of_qqp_and_refused_elsewhere(tmp_path):
    for name in ("qqp", "rte"):
        write_glue(tmp_path, name)
        for file in ("train.tsv", "test.tsv"):
            with open(tmp_path / glue.TASKS[name].folder / file, "a") as out:
                out.write("9\tIs this\n a question?\tyes\t0\n")
    assert len(glue.glue_dataset(tmp_path, "qqp").train.texts) == 6
    with pytest.raises(BadInput, match="row of 2 cells"):
        glue.glue_dataset(tmp_path, "rte")
    with pytest.raises(BadInput, match="row of 2 cells"):  # a submission counts rows
        glue.read_texts(tmp_path / "QQP" / "test.tsv", glue.TASKS["qqp"].text)


@pytest.mark.parametrize("name, content", [
    ("a.csv", 'label,text\nno,"so ""bad"", so\nlong"\nyes,good\n'),
    ("b.csv", 'label;text\nno;"so ""bad"", so\nlong"\nyes;good\n'),
    ("c.jsonl", '{"label": "no", "text": "so \\"bad\\", so\\nlong"}\n\n{"text": "good", "label": "yes"}\n')])
def test_tables_of_ones_own(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = glue.read_table(tmp_path / name, ("text",), "label")
    assert found.labels == ["no", "yes"] and found.texts == [('so "bad", so\nlong',), ("good",)]


def test_classes_scores_and_the_held_out_fifth(tmp_path):
    path = tmp_path / "a.tsv"
    kinds = {("1", "2", "3"): "i", ("1.", "2"): "i", ("1", "2.5"): "f", ("-1", "1e-3"): "f", ("1", "x"): "i"}
    for labels, kind in kinds.items():
        rows = {f"a{k}": labels[k % len(labels)] for k in range(15)}
        path.write_text("text\tsecond\tlabel\n" + "".join(f"{text}\tb\t{rows[text]}\n" for text in rows))
        data = glue.table_dataset(path, columns=("text", "second"))
        assert data.train.labels.dtype.kind == kind and (data.classes is None) == (kind == "f")
        both = data.train.texts + data.dev[""].texts
        assert len(data.dev[""].texts) == 3 and sorted(both) == sorted((text, "b") for text in rows)
        for (text, _), label in zip(both, [*data.train.labels, *data.dev[""].labels]):
            assert label == (float(rows[text]) if kind == "f" else sorted(labels).index(rows[text]))


@pytest.mark.parametrize("name, rows, line", [
    ("a.tsv", b"text\tlabel\nx\ta\ny\t \n", 3),                          # empty
    ("a.jsonl", b'{"text": "x", "label": "a"}\n\n{"text": "y", "label": null}\n', 3),
    ("a.csv", b'text,label\n"x\ny",1.5\nz,2\nw,n/a\n', 5),                 # no score
    ("a.tsv", b"text\tlabel\nx\t1.5\ny\tinf\n", 3),
    ("a.tsv", b"text\tlabel\nx\t1\ny\tNaN\nz\t2\n", 3),
    ("a.tsv", "text\tlabel\nx\tsí\ny\tsó\n".encode("latin-1"), 2),         # not UTF-8
    ("a.jsonl", b'{"text": ["x"], "label": "a"}\n', 1),
    ("a.jsonl", b'{"text": "x", "label": "a"}\n["x", "a"]\n', 2)])
def test_wrong_cells_are_refused_with_their_line(tmp_path, name, rows, line):
    (tmp_path / name).write_bytes(rows)
    with pytest.raises(BadInput, match=f"{name}, line {line}\\b"):
        glue.table_dataset(tmp_path / name)


def test_labels_that_say_the_same_are_one_class(tmp_path):
    rows = ['{"text": "x", "label": ' + label + "}" for label in ("1", '"1"', "1.0", '" 10"', "2")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    table = glue.read_table(tmp_path / "a.jsonl", ("text",), "label")
    assert table.labels == ["1", "1", "1", "10", "2"] and glue.classes_of(table) == ("1", "2", "10")
    assert glue.classes_of(table, regression=True) is None


def test_texts_that_are_not_utf8_are_told_with_their_number(tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes("text,label\nniño,a\nplain,b\nöl,a\n".encode("cp1252"))
    assert glue.read_table(tmp_path / "a.csv", ("text",), "label").texts[0] == ("ni\ufffdo",)
    assert "2 hold U+FFFD" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude00"}')
    assert glue.read_table(tmp_path / "a.jsonl", ("text",)).texts == [("half \ufffd",), ("\U0001f600",)]


def test_a_dev_table_of_training_texts_tests_nothing(tmp_path, capsys):
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    train.write_text("text\tlabel\n" + "".join(f"{k}\t{'ab'[k % 2]}\n" for k in range(10)))
    dev.write_text("text\tlabel\n3\tb\n4\ta\n")
    for same in (train, dev):
        with pytest.raises(BadInput, match="all texts"):
            glue.table_dataset(train, dev=same)
    dev.write_text("text\tlabel\n3\tb\nnew\ta\n")
    assert len(glue.table_dataset(train, dev=dev).dev[""].texts) == 2
    assert "1 of 2 dev texts" in capsys.readouterr().err


def test_label_subset_is_of_each_class_alike():
    labels = np.array([0] * 100 + [1] * 50 + [2] * 3)
    rows = glue.label_subset(labels, 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1] and len(set(rows)) == 16
    assert not np.array_equal(rows, glue.label_subset(labels, 0.1, seed=1))
    assert np.bincount(labels[glue.label_subset(labels, per_class=7)]).tolist() == [7, 7, 3]
    assert len(glue.label_subset(np.linspace(0, 1, 50), 0.1)) == 5  # scores have no classes


def test_pydoc_passages_are_held_out_by_module(monkeypatch):
    words = [f"{k:03d} " + "word " * 20 for k in range(200)]
    found = {f"{package}.m{m}": words[10 * m:10 * m + 3 + m] for package in ("a", "b") for m in range(5)}
    found |= {"few.one": words[:1], "topics.x": words[:1]}
    monkeypatch.setattr(glue, "pydoc_texts", lambda: [(name, "\n\n".join(x)) for name, x in found.items()])
    data = glue.pydoc_dataset(size=150)
    train, dev = ({(int(text[:3]) // 10, label) for (text,), label in zip(part.texts, part.labels)}
                  for part in (data.train, data.dev[""]))
    assert data.classes == ("a", "b") and len(train | dev) == 10 and not train & dev and len(dev) >= 2


def test_authors_dataset_keeps_a_novel_of_each_author_for_dev(tmp_path):
    for name in ("austen_emma", "austen_persuasion", "kafka_america", "kafka_trial", "once_only"):
        (tmp_path / f"{name}.txt").write_text(f"{name.split('_')[1]} " * 2000)
    call(f"tasks.glue {tmp_path} --out {tmp_path / 'out'} --train 5 --dev 3")
    data = glue.table_dataset(tmp_path / "out" / "train.tsv", dev=tmp_path / "out" / "dev.tsv")
    assert data.classes == ("austen", "kafka") and np.bincount(data.train.labels).tolist() == [5, 5]
    assert [{text.split()[0] for (text,) in part.texts} for part in (data.train, data.dev[""])] == [
        {"emma", "america"}, {"persuasion", "trial"}]


def test_tasks_are_named_as_people_write_them_and_all_are_those_that_are_there(tmp_path, capsys):
    for name in ("cola", "sst2", "mnli"):
        write_glue(tmp_path, name)
    assert glue.choose_tasks("CoLA, SST-2,mnli,sst_2", tmp_path) == ["cola", "sst2", "mnli"]
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    assert glue.choose_tasks("all", tmp_path) == ["sst2", "cola"]
    told = capsys.readouterr().err
    assert "MNLI (dev_mismatched.tsv)" in told and "STS-B (train.tsv)" in told and "SST-2" not in told
    for text, folder in (("all,mnli", tmp_path), ("all", tmp_path / "none"), ("cola,ax", tmp_path)):
        with pytest.raises(BadInput):
            glue.choose_tasks(text, folder)


def test_metrics_against_scikit_learn_and_scipy():
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        p, t = rng.integers(classes, size=(2, 300))
        p[:100] = t[:100]
        x, y = p + rng.normal(size=300).round(1), t * 1.0  # many ties
        pairs = [(glue.METRICS["accuracy"](p, t), sklearn.accuracy_score(t, p)),
                 (glue.matthews(p, t), sklearn.matthews_corrcoef(t, p)),
                 (glue.METRICS["pearson"](x, y), scipy.pearsonr(x, y)[0]),
                 (glue.METRICS["spearman"](x, y), scipy.spearmanr(x, y)[0])]
        pairs += [(glue.f1(p, t), sklearn.f1_score(t, p))] if classes == 2 else []
        assert all(ours == pytest.approx(theirs) for ours, theirs in pairs)
    one = np.zeros(300, int)
    assert glue.matthews(one, t) == glue.f1(one, one) == glue.pearson(one, t) == glue.pearson(t, one) == 0


@pytest.mark.parametrize("metric, share", [("accuracy", 0.97), ("matthews", 0.7)])
def test_intervals_over_examples_cover(metric, share):
    """19 times of 20, what the metric is on very many examples."""
    rng = np.random.default_rng(0)

    def draw(n):
        true = rng.integers(2, size=n)
        return np.where(rng.random(n) < share, true, 1 - true), true

    truth, covered = glue.METRICS[metric](*draw(1_000_000)), 0
    for _ in range(200):
        low, high = glue.interval(metric, *draw(60), draws=60)
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.995


def test_glue_writes_results_and_submissions(tmp_path, trained):
    """Every dev score follows from the predictions; a row for every test text; the mnli model predicts ax."""
    for name in ("mnli", "stsb", "ax"):
        write_glue(tmp_path / "glue", name)
    line = f"evaluate.py glue {trained('mlm --mask 0.3')} --glue-dir {tmp_path / 'glue'} --epochs 1"
    shown, content = call_both(f"{line} --tasks mnli,stsb,ax --seeds 2 --submit {tmp_path / 'submit'}")
    results = content["results"]
    assert "STS-B" in shown and list(results["table2"]) == ["MNLI-m", "MNLI-mm", "STS-B"]
    task = results["tasks"]["stsb"]
    pearson = [glue.pearson(np.array(x), np.array(task["labels"])) for x in task["predictions"]]
    assert task["pearson"]["seeds"] == pearson and task["pearson"]["mean"] == pytest.approx(np.mean(pearson))
    assert results["table2"]["MNLI-mm"] == results["tasks"]["mnli"]["accuracy-mm"]["mean"]
    assert results["average"] == pytest.approx(np.mean(list(results["table2"].values())))
    assert "RTE.tsv" in results["not_in_submission"]
    for k in range(2):
        with zipfile.ZipFile(tmp_path / "submit" / f"seed{k}.zip") as archive:
            assert sorted(archive.namelist()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "STS-B.tsv"]
            for name in archive.namelist():
                header, *rows = [row.split("\t") for row in archive.read(name).decode().split("\n")[:-1]]
                assert header == ["index", "prediction"] and [int(row[0]) for row in rows] == list(range(6))
                assert all(0 <= float(x) <= 5 if name == "STS-B.tsv" else x in glue.NLI for _, x in rows)
    again = call_json(f"{line} --tasks stsb --seeds 1")["results"]["tasks"]["stsb"]
    assert again["predictions"] == task["predictions"][:1]


def test_ax_stands_where_the_download_script_puts_it(tmp_path):
    usual = tmp_path / "diagnostic" / "diagnostic.tsv"
    usual.parent.mkdir()
    usual.touch()
    assert glue.task_file(tmp_path, "ax", "AX.tsv") == usual
