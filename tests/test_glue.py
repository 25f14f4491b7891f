"""GLUE files in their official layouts, metrics against their definitions, the server's files."""
import itertools
import math
import zipfile

import numpy as np
import pytest
from labelled_texts import write

from downstream import glue
from support.cli import BadInput

# quotes do not balance; line ends that are none
A, B = 'He said "no, and "left.', "She stayed\x85 here\u2028 now\x0b.\rYes"
MNLI_HEADER = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
               "sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]
MNLI_ROW = ["0", "31193", "31193n", "government", "( A )", "( B )", "(ROOT A)", "(ROOT B)", A, B]
STSB_HEADER = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
               "sentence2"]
STSB_ROW = ["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none", A, B]

# {task: {file: (header or None, row, texts, what `targets` makes of its label)}}, as the official files are
LAYOUTS = {
    "cola": {"train.tsv": (None, ["gj04", "0", "*", A], (A,), 0),
             "dev.tsv": (None, ["gj04", "1", "", B], (B,), 1),
             "test.tsv": (["index", "sentence"], ["0", A], (A,), None)},
    "sst2": {"train.tsv": (["sentence", "label"], [A, "1"], (A,), 1),
             "dev.tsv": (["sentence", "label"], [B, "0"], (B,), 0),
             "test.tsv": (["index", "sentence"], ["0", B], (B,), None)},
    "mrpc": {"train.tsv": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", A, B],
                           (A, B), 1),
             "dev.tsv": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "7", "8", B, A],
                         (B, A), 0),
             "test.tsv": (["index", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "7", "8", A, B],
                          (A, B), None)},
    "stsb": {"train.tsv": (STSB_HEADER + ["score"], STSB_ROW + ["3.800"], (A, B), 3.8),
             "dev.tsv": (STSB_HEADER + ["score"], STSB_ROW + ["0.000"], (A, B), 0.0),
             "test.tsv": (STSB_HEADER, STSB_ROW, (A, B), None)},
    "qqp": {"train.tsv": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                          ["9", "1", "2", A, B, "1"], (A, B), 1),
            "dev.tsv": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                        ["9", "1", "2", B, A, "0"], (B, A), 0),
            "test.tsv": (["id", "question1", "question2"], ["0", A, B], (A, B), None)},
    "mnli": {"train.tsv": (MNLI_HEADER + ["label1", "gold_label"], MNLI_ROW + ["entailment", "contradiction"],
                           (A, B), 2),
             **{f"dev_{part}.tsv": (MNLI_HEADER + [f"label{k}" for k in range(1, 6)] + ["gold_label"],
                                    MNLI_ROW + ["entailment"] * 5 + [label], (A, B), number)
                for part, label, number in (("matched", "neutral", 1), ("mismatched", "entailment", 0))},
             "test_matched.tsv": (MNLI_HEADER, MNLI_ROW, (A, B), None),
             "test_mismatched.tsv": (MNLI_HEADER, MNLI_ROW, (A, B), None)},
    "qnli": {"train.tsv": (["index", "question", "sentence", "label"], ["0", A, B, "not_entailment"], (A, B),
                           1),
             "dev.tsv": (["index", "question", "sentence", "label"], ["0", A, B, "entailment"], (A, B), 0),
             "test.tsv": (["index", "question", "sentence"], ["0", A, B], (A, B), None)},
    "rte": {"train.tsv": (["index", "sentence1", "sentence2", "label"], ["0", A, B, "not_entailment"], (A, B),
                          1),
            "dev.tsv": (["index", "sentence1", "sentence2", "label"], ["0", A, B, "entailment"], (A, B), 0),
            "test.tsv": (["index", "sentence1", "sentence2"], ["0", A, B], (A, B), None)},
    "wnli": {"train.tsv": (["index", "sentence1", "sentence2", "label"], ["0", A, B, "1"], (A, B), 1),
             "dev.tsv": (["index", "sentence1", "sentence2", "label"], ["0", A, B, "0"], (A, B), 0),
             "test.tsv": (["index", "sentence1", "sentence2"], ["0", A, B], (A, B), None)},
    "ax": {"AX.tsv": (["index", "sentence1", "sentence2"], ["0", A, B], (A, B), None)},
}


def test_the_layouts_are_all_files_of_all_tasks():
    assert set(LAYOUTS) == set(glue.TASKS)
    for name, task in glue.TASKS.items():
        files = {file for _, *pair in task.parts for file in pair if file}
        assert set(LAYOUTS[name]) == files | (set() if name == "ax" else {"train.tsv"})


@pytest.mark.parametrize("mark, end", [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n")],
                         ids=["plain", "mark and CRLF"])
@pytest.mark.parametrize("name, file", [(name, file) for name, files in LAYOUTS.items() for file in files])
def test_official_layouts(tmp_path, name, file, mark, end):
    header, row, texts, target = LAYOUTS[name][file]
    path = write(tmp_path / glue.TASKS[name].folder / file, [header, row, row], mark, end)
    examples = glue.read_task(tmp_path, name, file)
    assert examples.path == path and examples.texts == [texts, texts] and examples.skipped == 0
    if target is None:
        assert examples.labels is None
    else:
        targets = glue.task_labels(name, examples)
        assert targets.tolist() == [target, target]
        assert targets.dtype == (float if name == "stsb" else np.int64)


def test_malformed_qqp_rows_are_counted(tmp_path):
    header, row, *_ = LAYOUTS["qqp"]["train.tsv"]
    broken = [["9", "1", "2", "Is this", ], [" a question?\tyes", "0"], [""], [*row, "more"]]
    write(tmp_path / "QQP" / "train.tsv", [header, row, *broken, row])
    examples = glue.read_task(tmp_path, "qqp", "train.tsv")
    assert len(examples.texts) == 2 and examples.skipped == 3  # the empty line is no row
    assert examples.lines == [2, 7]


def test_diagnostic_set_under_its_other_name(tmp_path):
    header, row, texts, _ = LAYOUTS["ax"]["AX.tsv"]
    write(tmp_path / "diagnostic" / "diagnostic.tsv", [header, row])
    assert glue.read_task(tmp_path, "ax", "AX.tsv").texts == [texts]


@pytest.mark.parametrize("name, rows, says", [
    ("rte", [["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "entailment"],
             ["1", "a", "b", "neutral"]],
     "train.tsv, line 3: the label 'neutral' is not one of entailment, not_entailment"),
    ("cola", [["gj04", "1", "", "a"], ["gj04", "2", "", "b"]], "line 2: the label '2'"),
    ("stsb", [STSB_HEADER + ["score"], STSB_ROW + ["5.1"]],
     "line 2: the label '5.1' is not a number from 0 to 5"),
    ("stsb", [STSB_HEADER + ["score"], STSB_ROW + ["good"]], "line 2: the label 'good'"),
    ("stsb", [STSB_HEADER + ["score"], STSB_ROW + ["nan"]], "line 2: the label 'nan'"),
    ("rte", [["index", "sentence1", "sentence2", "label"], ["0", "a", "entailment"]],
     "line 2: 3 columns where there should be 4"),
    ("sst2", [["text", "label"], ["a", "1"]], "no column 'sentence', only text, label"),
    ("sst2", [["sentence", "label"]], "no rows"), ("sst2", [], "no rows"),
    ("sst2", None, "train.tsv does not exist; it is part of SST-2 from https://gluebenchmark.com/tasks"),
    ("mrpc", None, "msr_paraphrase")])
def test_bad_files_are_refused(tmp_path, name, rows, says):
    if rows is not None:
        write(tmp_path / glue.TASKS[name].folder / "train.tsv", rows)
    with pytest.raises(BadInput, match=says):
        glue.task_labels(name, glue.read_task(tmp_path, name, "train.tsv"))


def test_choice_of_tasks():
    assert glue.choose_tasks("all") == list(glue.TABLE2) and len(glue.TABLE2) == 8
    assert glue.choose_tasks("cola,rte,cola") == ["cola", "rte"]
    assert glue.choose_tasks("all,wnli,ax") == [*glue.TABLE2, "wnli", "ax"]
    with pytest.raises(BadInput, match="no GLUE task 'imdb'; choose from all, cola"):
        glue.choose_tasks("cola,imdb")


# ---------------------------------------------------------------------------- metrics

def test_binary_metrics_by_counting():
    """All pairs of vectors of length 4: accuracy, F1 and Matthews from the four counts."""
    for p, t in itertools.product(itertools.product((0, 1), repeat=4), repeat=2):
        tp, tn, fp, fn = (sum((a, b) == pair for a, b in zip(p, t))
                          for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
        p, t = np.array(p), np.array(t)
        assert glue.accuracy(p, t) == (tp + tn) / 4
        precision, recall = (tp / (tp + n) if tp else 0 for n in (fp, fn))
        assert glue.f1(p, t) == pytest.approx(2 * precision * recall / (precision + recall) if tp else 0)
        scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        assert glue.matthews(p, t) == pytest.approx((tp * tn - fp * fn) / math.sqrt(scale) if scale else 0)


def test_correlations():
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([10.0, 20.0, 25.0, 24.0])
    assert glue.rank_correlation(x, y) == pytest.approx(1) and glue.rank_correlation(x,
                                                                                     -y) == pytest.approx(-1)
    assert glue.pearson(x, 3 * x - 1) == pytest.approx(1) and 0.9 < glue.pearson(x, y) < 0.999
    assert glue.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert glue.ranks(np.array([5, 1, 5, 7])).tolist() == [2.5, 1, 2.5, 4]


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_predictions_correlate_with_nothing(metric):
    assert glue.METRICS[metric](np.full(4, 0.1), np.arange(4.0)) == 0.0
    assert glue.METRICS[metric](np.arange(4.0), np.full(4, 0.1)) == 0.0


def test_extras_metrics_against_scikit_learn_and_scipy():
    sklearn, scipy = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        p, t = rng.integers(classes, size=(2, 300))
        p[:100] = t[:100]
        assert glue.accuracy(p, t) == pytest.approx(sklearn.accuracy_score(t, p))
        assert glue.matthews(p, t) == pytest.approx(sklearn.matthews_corrcoef(t, p))
        if classes == 2:
            assert glue.f1(p, t) == pytest.approx(sklearn.f1_score(t, p))
        x, y = p + rng.normal(size=300).round(1), t * 1.0  # many ties
        assert glue.pearson(x, y) == pytest.approx(scipy.pearsonr(x, y)[0])
        assert glue.rank_correlation(x, y) == pytest.approx(scipy.spearmanr(x, y)[0])
    one = np.zeros(300, int)
    assert glue.matthews(one, t) == sklearn.matthews_corrcoef(t, one) == 0 == glue.f1(one, one)


@pytest.mark.parametrize("scores, average", [((78.2, 79.3, 90.3, 82.1, 54.3, 84.7, 85.6, 81.9, 30.9), 74.1),
                                             ((80.5, 80.6, 89.9, 83.7, 56.4, 87.2, 86.3, 85.1, 34.2), 76.0)])
def test_average_of_the_papers_table2(scores, average):
    """The paper's two rows: MNLI's two parts count as two."""
    mnli, mm, sst2, stsb, rte, qnli, qqp, mrpc, cola = scores
    row, mean = glue.average_row({"cola": {"accuracy": 0, "matthews": cola},
                                  "mnli": {"accuracy-m": mnli, "accuracy-mm": mm},
                             "sst2": {"accuracy": sst2}, "stsb": {"pearson": stsb, "spearman": 0},
                                  "rte": {"accuracy": rte},
                             "qnli": {"accuracy": qnli}, "qqp": {"f1": qqp, "accuracy": 0},
                                  "mrpc": {"f1": mrpc, "accuracy": 0},
                             "wnli": {"accuracy": 0}})
    assert tuple(row.values()) == scores and round(mean, 1) == average
    assert list(row) == ["MNLI-m", "MNLI-mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA"]
    assert glue.average_row({}) == ({}, None)


# ---------------------------------------------------------------------------- the server's files

def test_names_of_the_servers_files():
    names = sorted(file for name in glue.TASKS for file in glue.server_files(name))
    assert names == sorted(["AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "MRPC.tsv", "QNLI.tsv",
                            "QQP.tsv", "RTE.tsv",
                            "SST-2.tsv", "STS-B.tsv", "WNLI.tsv"])
    assert glue.server_files("mnli") == {"MNLI-m.tsv": "test_matched.tsv",
                                         "MNLI-mm.tsv": "test_mismatched.tsv"}


def test_predictions_for_the_server(tmp_path):
    for name, predicted, cells in (("rte", np.array([1, 0]), ["not_entailment", "entailment"]),
                                   ("cola", np.array([0, 1]), ["0", "1"]),
                                   ("ax", np.array([2, 1]), ["contradiction", "neutral"]),
                                   ("stsb", np.array([-0.3, 2.34567, 7.0]), ["0.000", "2.346", "5.000"])):
        (file,) = glue.server_files(name)
        glue.write_predictions(tmp_path / "seed0" / file, name, predicted)
        lines = (tmp_path / "seed0" / file).read_bytes().decode().split("\n")
        assert lines == ["index\tprediction", *(f"{i}\t{cell}" for i, cell in enumerate(cells)), ""]
    path = glue.pack(tmp_path / "seed0", {"RTE.tsv": 2, "STS-B.tsv": 3})
    assert path == tmp_path / "seed0.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["RTE.tsv", "STS-B.tsv"]
        assert archive.read("RTE.tsv") == (tmp_path / "seed0" / "RTE.tsv").read_bytes()
    path.unlink()
    with pytest.raises(BadInput, match="STS-B.tsv has 3 predictions, and the test part 4 texts"):
        glue.pack(tmp_path / "seed0", {"RTE.tsv": 2, "STS-B.tsv": 4})
    assert not path.exists()
