"""The commands probe and finetune end to end on small made-up texts, and their refusals; images:
test_vision.py."""
import json

import pytest
from conftest import call
from labelled_texts import write, write_cats, write_glue
from test_glue import LAYOUTS

import evaluate
from downstream import commands
from support.cli import BadInput


def results_of(capsys, *argv):
    return json.loads(call(capsys, *argv, "--json", "-"))["results"]


def test_probe_command(text_runs, capsys, tmp_path):
    path = write_cats(tmp_path / "a.tsv")
    text = call(capsys, "probe", text_runs["vl"], "--data", path, "--layer", "all", "--json",
                tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    layers = content["results"]["layers"]
    assert list(layers) == ["0", "1", "2"] and content["results"]["attention"] == "full"
    assert all(layer["accuracy"] == 1 and layer["train"] == 48 and layer["test"] == 12
               for layer in layers.values())
    assert all(layer["correct"] == [1] * 12 for layer in layers.values())
    assert "95% interval" in text and "majority class" in text and len(text.split("\n")) == 7
    last = results_of(capsys, "probe", text_runs["ar"], "--data", path, "--max-train", 20, "--max-test", 7)
    assert list(last["layers"]) == ["last"] and last["attention"] == "causal" and last["pool"] == "last"
    assert last["layers"]["last"]["train"] == 20 and last["layers"]["last"]["test"] == 7
    assert len(last["layers"]["last"]["correct"]) == 7
    tenth = results_of(capsys, "probe", text_runs["ar"], "--data", path, "--label-fraction", 0.25)
    assert tenth["layers"]["last"]["train"] == 12


def test_probe_of_few_labels_of_each_class(text_runs, capsys, tmp_path):
    """The same labels for every checkpoint, others with another seed."""
    path = write_cats(tmp_path / "a.tsv")
    found = [results_of(capsys, "probe", text_runs[name], "--data", path, "--labels-per-class", 3, "--seed",
                        number)
             for name, number in (("ar", 0), ("vl", 0), ("ar", 1))]
    assert all(result["layers"]["last"]["train"] == 6 for result in found)
    class Args:
        text_column = text_column_b = label_column = glue_dir = dev = max_train = max_test = None
        label_fraction, labels_per_class = 1.0, 3
    chosen = [commands.labelled_texts(Args, str(path), number).train.texts for number in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_an_untrained_network_has_the_same_shape_and_protocol(text_runs, capsys, tmp_path):
    path = write_cats(tmp_path / "a.tsv")
    for argv in (("probe", "--data", path), ("finetune", "--data", path, "--epochs", 1),
                 ("glue", "--glue-dir", write_glue(tmp_path / "glue", LAYOUTS), "--tasks", "rte", "--epochs",
                  1, "--seeds",
                  1, "--results", tmp_path / "glue.json")):
        both = [json.loads(call(capsys, argv[0], before + str(text_runs["vl"]), *argv[1:], "--json", "-"))
                for before in ("", "untrained:")]
        assert [x["step"] for x in both] == [10, 0] and both[0]["objective"] == both[1]["objective"]
        assert both[0].get("protocol") == both[1].get("protocol")
        kept = [{name: value for name, value in x["results"].items()
                 if name in ("train", "dev", "pool", "attention")}
                for x in both]
        assert kept[0] == kept[1]
    with pytest.raises(BadInput, match="only a run of train.py can be initialised anew"):
        call(capsys, "probe", "untrained:hf:gpt2", "--data", path)


def test_finetune_command(text_runs, capsys, tmp_path):
    path = write_cats(tmp_path / "a.tsv")
    text = call(capsys, "finetune", text_runs["ar"], "--data", path, "--epochs", 8, "--lr", 2e-2,
                "--seeds", 2)
    assert "48 texts" in text and "12 dev texts" in text and "accuracy" in text and "100.0" in text
    content = json.loads(call(capsys, "finetune", text_runs["ar"], "--data", path, "--dev", path,
                              "--label-fraction", 0.5,
                              "--epochs", 1, "--json", "-"))
    results = content["results"]
    assert results["train"] == 30 and results["dev"] == 60 and content["protocol"]["attention"] == "causal"
    assert results["accuracy"]["std"] is None
    [predicted], [correct] = results["predictions"], results["correct"]
    assert correct == [int(a == b) for a, b in zip(predicted, results["labels"])] and len(correct) == 60
    assert results["accuracy"]["mean"] == pytest.approx(sum(correct) / 60)


def test_finetune_command_on_scores(text_runs, capsys, tmp_path):
    path = write(tmp_path / "scores.tsv",
                 [["text", "label"], *([f"text {k}", f"{k / 8}"] for k in range(30))])
    results = results_of(capsys, "finetune", text_runs["ar"], "--data", path, "--epochs", 1, "--seeds", 2)
    assert results["classes"] is None and "correct" not in results
    assert [len(row) for row in results["predictions"]] == [6, 6]
    assert all(label % 0.125 == 0 for label in results["labels"])


def test_tables_as_they_come(text_runs, capsys, tmp_path):
    """The same rows as CSV with names of its own, as TSV without names, and as JSON lines: one result."""
    plain = write_cats(tmp_path / "a.tsv")
    rows = [line.split("\t") for line in plain.read_text().splitlines()[1:]]
    (tmp_path / "b.csv").write_text("kind,review\n" + "".join(f'{b},"{a}"\n' for a, b in rows))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"review": a, "kind": b}) + "\n" for a, b in rows))
    (tmp_path / "d.tsv").write_text("".join(f"{b}\t{k}\t{a}\n" for k, (a, b) in enumerate(rows)))
    named = ("--text-column", "review", "--label-column", "kind")
    expected = results_of(capsys, "probe", text_runs["vl"], "--data", plain)["layers"]
    assert expected["last"]["accuracy"] == 1
    for file, flags in (("b.csv", named), ("c.jsonl", named),
                        ("d.tsv", ("--text-column", 3, "--label-column", 1))):
        found = results_of(capsys, "probe", text_runs["vl"], "--data", tmp_path / file, *flags)
        assert found["layers"] == expected


WRONG = [
    (["glue", "{vl}", "--glue-dir", "{tmp}/nowhere"], "nowhere is not a folder; the files are at https"),
    (["glue", "{vl}", "--glue-dir", "{tmp}"], "MNLI/train.tsv does not exist; it is part of MNLI"),
    (["glue", "{vl}", "--glue-dir", "{tmp}", "--tasks", "sst"], "no GLUE task 'sst'"),
    (["glue", "{vl}", "--glue-dir", "{tmp}", "--tasks", "ax"], "with --submit"),
    (["glue", "{vl}"], "--glue-dir"),
    (["glue", "{vl}", "--glue-dir", "{glue}", "--lr", "0"], "--lr 0"),
    (["glue", "{vl}", "--glue-dir", "{glue}", "--tasks", "rte", "--results", "no/such/x.json"],
     "no such folder"),
    (["probe", "{vl}", "--data", "rte"], "--glue-dir"),
    (["probe", "{vl}", "--data", "ax", "--glue-dir", "{glue}"], "neither a training"),
    (["probe", "{vl}", "--data", "stsb", "--glue-dir", "{glue}"], "finetune does both"),
    (["probe", "{vl}", "--layer", "-1"], "layer"),
    (["probe", "{vl}", "--data", "rte", "--glue-dir", "{glue}", "--layer", "9"], "not in 0..2"),
    (["probe", "{ar}", "--pool", "first"], "--attention full"),
    (["probe", "{vl}", "--data", "no.tsv"], "no.tsv does not exist"),
    (["probe", "{vl}", "--dev", "{one}"], "leave out --dev"),
    (["probe", "{vl}", "--label-column", "x"], "leave out --text-column"),
    (["probe", "{vl}", "--labels-per-class", "0"], "at least 1"),
    (["finetune", "{vl}", "--data", "{one}"], "only one label, 'x'"),
    (["finetune", "{vl}", "--data", "{two}", "--dev", "{one}"], "one.tsv, line 2: the label 'x' is not one"),
    (["finetune", "{vl}", "--data", "{two}", "--regression"], "line 2: the label 'y' is not a number"),
    (["finetune", "{vl}", "--data", "{two}", "--label-fraction", "0"], "--label-fraction 0"),
    (["finetune", "{vl}", "--data", "{scores}", "--labels-per-class", "2"],
     "--labels-per-class 2 is for classes"),
    (["finetune", "{vl}", "--data", "{wrong}"],
     "no column 'label', only text, class; say with --text-column and --label")]


@pytest.mark.parametrize("argv, says", WRONG)
def test_wrong_uses_are_refused(text_runs, tmp_path, argv, says):
    glue_dir = write_glue(tmp_path / "glue", LAYOUTS) if "{glue}" in argv else None
    places = {**text_runs, "glue": glue_dir, "tmp": tmp_path,
              "one": write(tmp_path / "one.tsv", [["text", "label"], ["a", "x"], ["b", "x"]]),
              "two": write(tmp_path / "two.tsv", [["text", "label"], ["a", "y"], ["b", "z"]]),
              "scores": write(tmp_path / "scores.tsv", [["text", "label"], ["a", "0.5"], ["b", "1.5"]]),
              "wrong": write(tmp_path / "wrong.tsv", [["text", "class"], ["a", "y"]])}
    with pytest.raises(BadInput, match=says):
        evaluate.main([part.format(**places) for part in argv])
