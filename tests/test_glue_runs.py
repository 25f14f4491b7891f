"""The GLUE benchmark: what was computed from the same files is not computed again, and nothing else is taken
for it."""
import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import call
from labelled_texts import QUICK, write_glue
from test_glue import LAYOUTS

import train as training
from downstream import finetune, glue, glue_runs
from downstream.glue_runs import GlueRun, run_glue
from engine.settings import resolve
from objectives import from_options
from support.cli import BadInput

ONCE = dataclasses.replace(QUICK, epochs=1)


@pytest.fixture
def run(make_run):
    return make_run(from_options("ar"), "causal", vocab=257, length=16, scale=1.0, dtype=torch.float32)


@pytest.fixture
def glue_dir(tmp_path):
    return write_glue(tmp_path / "glue", LAYOUTS)


@pytest.fixture
def calls(monkeypatch):
    """The (task, seed) that are computed; a list of them, to be emptied at will."""
    calls, original = [], finetune.fine_tune_once
    monkeypatch.setattr(glue_runs, "fine_tune_once",
                        lambda *args: calls.append((args[1].name, args[4])) or original(*args))
    return calls


def test_glue_command_on_all_tasks(glue_dir, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    settings = resolve(data=str(tmp_path / "text.txt"), objective="vl", length=16, steps=2, batch_size=8)
    training.train(settings, tmp_path / "vl", device="cpu", dtype="fp32", quiet=True)
    out, results = tmp_path / "out.json", tmp_path / "results.json"
    text = call(capsys, "glue", tmp_path / "vl", "--glue-dir", glue_dir, "--tasks", "all,wnli,ax", "--seeds",
                2,
                "--epochs", 1, "--submit", tmp_path / "submit", "--results", results, "--json", out)
    content = json.loads(out.read_text())
    found = content["results"]
    assert found["split"] == "dev" and "DEV" in text and content["objective"] == "vl 0.15,0.3"
    assert set(found["tasks"]) == set(glue.TASKS) - {"ax"}
    for name, result in found["tasks"].items():
        for suffix, *_ in glue.TASKS[name].parts:
            predictions, labels = (np.array(result[key + suffix]) for key in ("predictions", "labels"))
            assert predictions.shape == (2, 6) and labels.shape == (6,)
            for metric in glue.TASKS[name].metrics:
                value = result[metric + suffix]
                assert len(value["seeds"]) == 2 and value["mean"] == value["median"]
                assert value["mean"] == pytest.approx(np.mean(value["seeds"]))
                assert value["std"] == pytest.approx(np.std(value["seeds"], ddof=1))
                # the scores are those of what is told
                again = [glue.METRICS[metric](row, labels) for row in predictions]
                assert value["seeds"] == pytest.approx(again)
            if name == "stsb":
                assert "correct" not in result
            else:
                assert result["correct" + suffix] == (predictions == labels).astype(int).tolist()
    assert len(found["table2"]) == 9
    assert found["average"] == pytest.approx(np.mean(list(found["table2"].values())))
    assert found["table2"]["MNLI-mm"] == found["tasks"]["mnli"]["accuracy-mm"]["mean"]
    assert found["not_in_submission"] == []
    for k in range(2):
        with zipfile.ZipFile(tmp_path / "submit" / f"seed{k}.zip") as archive:
            assert len(archive.namelist()) == 11
            for name in archive.namelist():
                lines = archive.read(name).decode().split("\n")
                assert lines[0] == "index\tprediction" and len(lines) == 8 and lines[-1] == ""
            ax = archive.read("AX.tsv").decode().split("\n")[1:-1]
            assert {line.split("\t")[1] for line in ax} <= set(glue.NLI)


def test_glue_goes_on_where_it_was_interrupted(run, glue_dir, tmp_path, calls, monkeypatch):
    tasks, results = ["cola", "stsb"], tmp_path / "results.json"
    whole = run_glue(GlueRun(run, glue_dir, 2, ONCE), tasks)
    counted, done = glue_runs.fine_tune_once, []

    def once(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[4])
        return counted(*args)

    def again(**changes):
        calls.clear(), done.clear()
        return run_glue(GlueRun(run, glue_dir, 2, dataclasses.replace(ONCE, **changes), results_file=results),
                        tasks)

    monkeypatch.setattr(glue_runs, "fine_tune_once", once)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert calls == [("cola", 0), ("cola", 1), ("stsb", 0)]
    resumed = again()
    assert calls == [("stsb", 1)]
    for name, metric in (("cola", "matthews"), ("stsb", "pearson"), ("stsb", "spearman"),
                         ("stsb", "predictions")):
        assert resumed["tasks"][name][metric] == whole["tasks"][name][metric]
    with pytest.raises(KeyboardInterrupt):  # other settings are other results
        again(lr=1e-3)
    assert len(calls) == 3
    with torch.no_grad():
        next(run.model.parameters()).mul_(1.01)
    with pytest.raises(KeyboardInterrupt):  # and so are other weights
        again()
    assert len(calls) == 3
    results.write_text("{}")
    with pytest.raises(BadInput, match="not a file of GLUE results"):
        again()


@pytest.mark.parametrize("file", ("train.tsv", "dev.tsv"))
def test_another_text_of_the_same_size_is_computed_anew(run, glue_dir, tmp_path, calls, file):
    todo = GlueRun(run, glue_dir, 1, ONCE, results_file=tmp_path / "results.json")
    run_glue(todo, ["rte"])
    run_glue(todo, ["rte"])
    assert len(calls) == 1
    path = glue_dir / "RTE" / file
    content = path.read_bytes()
    path.write_bytes(content.replace(b"She stayed", b"He stayed!"))
    assert path.stat().st_size == len(content) and path.read_bytes() != content
    run_glue(todo, ["rte"])
    assert len(calls) == 2


def test_predictions_belong_to_the_test_file_that_was_read(run, glue_dir, tmp_path, calls):
    """Another test part of the same size: predicted again, and packed with as many rows as it has."""
    todo = GlueRun(run, glue_dir, 1, ONCE, submit=tmp_path / "submit", results_file=tmp_path / "results.json")
    run_glue(todo, ["rte"])
    path = glue_dir / "RTE" / "test.tsv"
    path.write_bytes(path.read_bytes().replace(b"She stayed", b"He stayed!"))
    run_glue(todo, ["rte"])
    assert len(calls) == 2
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[1] + b"\n")
    run_glue(todo, ["rte"])
    assert len(calls) == 3
    with zipfile.ZipFile(tmp_path / "submit" / "seed0.zip") as archive:
        assert archive.read("RTE.tsv").count(b"\n") == 1 + 7


def test_predictions_are_made_again_where_they_are_missing(run, glue_dir, tmp_path, calls):
    def submit(folder):
        return run_glue(GlueRun(run, glue_dir, 1, ONCE, submit=folder,
                                results_file=tmp_path / "results.json"), ["rte"])

    assert submit(None)["tasks"]["rte"] and len(calls) == 1
    content = submit(tmp_path / "submit")
    assert len(calls) == 2 and "QNLI.tsv" in content["not_in_submission"]
    assert "RTE.tsv" not in content["not_in_submission"]
    submit(tmp_path / "submit")
    submit(None)
    assert len(calls) == 2
    (tmp_path / "submit" / "seed0" / "RTE.tsv").write_text("other")
    submit(tmp_path / "submit")
    assert len(calls) == 3
    assert (tmp_path / "submit" / "seed0" / "RTE.tsv").read_text().startswith("index\tprediction\n")


def test_results_of_an_older_version_are_not_taken(run, glue_dir, tmp_path, calls):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"key": {"task": "rte"}, "scores": {}, "figures": {}, "predictions": {}}]))
    run_glue(GlueRun(run, glue_dir, 1, ONCE, results_file=results), ["rte"])
    assert len(calls) == 1
