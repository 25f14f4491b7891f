"""reproduce.py and experiments/: every command line, a table from end to end, the committed results."""

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import reproduce
import train
from experiments import measures, pages
from experiments.measures import NINE, SCALES, Model, Place, Stage, pretrain, scale_of
from experiments.pages import stages_of
from experiments.verdicts import NOT_MEASURED, judge, mean_cell
from run import load_checkpoint
from tasks import glue
from util import BadInput

HERE = Path(__file__).resolve().parent.parent


def place_at(scale, folder, target=""):
    return Place(scale, folder / "data", folder / "work", scale_of(scale, target))


def line_of(folder, target, scale="cpu"):
    paths = f"--data-dir {folder}/data --work {folder}/work --out {folder}/out"
    return [target, "--scale", scale, *paths.split()]


def in_process(stage):
    """What reproduce.run does in a process of its own."""
    name, *argv = reproduce.command(stage)
    stage.out.parent.mkdir(exist_ok=True)
    with open(stage.beside(".log"), "w") as log, contextlib.redirect_stdout(log):
        assert not importlib.import_module(name.removesuffix(".py")).main(argv)
    reproduce.write_record(stage, 1.5)


@pytest.fixture
def little_text(monkeypatch):
    """A few made-up documents in place of the library's documentation, which takes seconds to read."""
    rng = np.random.default_rng(0)
    texts = [(f"module{k}", " ".join(rng.choice(["one", "two", "three", "four"], 400))) for k in range(60)]
    monkeypatch.setattr(data, "pydoc_texts", lambda: iter(texts))


def write_novels(folder):
    (folder / "data" / "text").mkdir(parents=True)
    for name in ("austen_emma", "austen_persuasion", "eliot_romola", "eliot_middlemarch"):
        (folder / "data" / "text" / f"{name}.txt").write_text("x")


# ---------------------------------------------------------------------------- the plan

class Understood(Exception):
    """The arguments were understood and the work would begin."""


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_line_is_understood(scale, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser, argv):
        parse(parser, argv)
        raise Understood

    @functools.wraps(train.train)
    def train_nothing(settings, out, **machine):
        assert Path(out).parent == tmp_path / "work" and settings.task()
        raise Understood

    write_novels(tmp_path)
    kinds = {}  # one of each command and set of flags
    for name, target in reproduce.TARGETS.items():
        place = place_at(scale, tmp_path, name)
        kinds |= {(stage.argv[:2], *(word for word in stage.argv if word[0] == "-")): stage.line()
                  for stage in stages_of(place, target(place), 1)}
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(train, "train", train_nothing)
    for name, *argv in kinds.values():
        module = importlib.import_module(name.removesuffix(".py"))
        with monkeypatch.context() as patch, pytest.raises(Understood):
            if module is not train:  # of which the settings are resolved as well
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
            module.main(argv)
    assert {line[0] for line in kinds.values()} >= {"train.py", "evaluate.py", "spectral.py"}


@pytest.mark.parametrize("scale", SCALES)
def test_claims_are_contrasts_of_cells_that_exist(scale, tmp_path):
    """One primary claim a table at most; all positive in the paper; for every model that is compared what it
    must beat; and every number of the paper in a row and a column that exist."""
    for name, target in reproduce.TARGETS.items():
        place = place_at(scale, tmp_path, name)
        table = target(place)
        cells = {(row, name) for row, model in table.rows.items() for name, column in table.columns.items()
                 if column.stages(place, model, 0)}
        assert sum(claim.primary for claim in table.claims) == bool(table.claims)
        for claim in table.claims:
            assert set(claim.contrast) <= cells and sum(claim.contrast.values()) == pytest.approx(0, abs=1e-9)
            assert claim.effect is None or claim.effect > 0
            assert {row for row, _ in claim.contrast} <= {row for row, _ in claim.floors}
            for key, floor in claim.floors.items():
                assert {key, floor} <= cells and table.rows[key[0]].kind == table.rows[floor[0]].kind
                assert table.rows[floor[0]].instead in ("untrained", "guess") and key[1] == floor[1]
        assert all(set(numbers) <= set(table.columns) for numbers in table.paper.values())
        assert set(table.paper) <= set(table.rows)


def test_budgets_are_equal_and_the_papers(tmp_path):
    def settings(place, model):
        argv = pretrain(place, model, 0).argv
        return dict(zip(argv[1::2], argv[2::2]))

    cpu, paper = place_at("cpu", tmp_path), place_at("paper", tmp_path)
    for name in ("table2", "table7", "table8", "table9"):
        found = [settings(cpu, model) for model in reproduce.TARGETS[name](cpu).rows.values()]
        own = ("--objective", "--t", "--mask", "--streams")
        assert len({tuple((key, x) for key, x in one.items() if key not in own) for one in found}) == 1
    steps = int(settings(cpu, Model("ar"))["--steps"])
    assert steps * 16 * 128 == pytest.approx(1_500_000, rel=1e-3)
    assert int(settings(cpu, Model("ar", budget=0.25))["--steps"]) == pytest.approx(steps / 4, abs=1)
    assert settings(paper, Model("dar --t 2"))["--steps"] == "100000"  # of the preset's batch and length
    assert not {"--batch-size", "--length", "--lr"} & settings(paper, Model("dar --t 2")).keys()
    half = settings(paper, Model("dar --t 2", "images", 0.5))
    assert (half["--epochs"], half["--warmup"]) == ("100", "0.1")


def test_the_trend(tmp_path):
    """An effect of e^(0.1 + 0.02 log10 tokens), and of e^0.05 more at the second width, has that slope and
    that difference of widths in every regime; the runs differ in objective, width and steps alone."""
    place = place_at("cpu", tmp_path, "trend")
    table = reproduce.TARGETS["trend"](place)

    def cells(row):
        model = table.rows[row]
        gain = 0.1 + 0.02 * math.log10(model.budget * 2.4e7) + 0.05 * (model.preset == "mini")
        nll = 9 if model.instead else 4 - gain * row.startswith("Variable")
        return [mean_cell(np.full(9, float(nll)))] * 2

    known = {(row, regime): cells(row) for row in table.rows for regime in ("padded", "truncated")}
    found = {claim.text: judge(claim, known) for claim in table.claims}
    slopes, widths = ([found[text] for text in found if words in text]
                      for words in ("every tenfold", "more so than at"))
    assert [one["difference"] for one in slopes] == pytest.approx([0.02] * 2)  # in two regimes
    assert [one["difference"] for one in widths] == pytest.approx([0.05] * 2)
    assert {one["freedom"] for one in slopes + widths} == {4}  # two seeds of all contrasts
    lines = [pretrain(place, model, 0).argv for model in table.rows.values() if not model.instead]
    assert len({" ".join(line[line.index("--batch-size"):line.index("--preset")]) for line in lines}) == 1


@pytest.mark.parametrize("slope, interval, word", [
    (0.05, [0.01, 0.09], "towards"), (-0.05, [-0.09, -0.01], "away"), (0.05, [-0.1, 0.2], "not seen to")])
def test_where_an_effect_goes_in_words(slope, interval, word):
    known = {"primary": False, "at": None, "measured": True, "effect": 0.107}
    points = [{**known, "claim": f"padded: a, 4 x 128, {n} tokens", "at": {"tokens": n}, "difference": gap}
              for n, gap in ((3, -0.09), (10, -0.06))]
    fitted = {**known, "claim": "padded: a, 4 x 128: more so with every tenfold of tokens",
              "primary": True, "difference": slope, "interval": interval}
    wide = {**known, "claim": "padded: a, 4 x 256: more so than at 4 x 128",
            "difference": 0.02, "interval": [0, 0.04]}
    [sentence] = pages.trend_findings([{"target": "trend", "claims": [*points, fitted, wide]}])
    assert word in sentence and "x0.942" in sentence and "x1.113" in sentence
    assert "x1.020 (x1.000 .. x1.041) of that at 4 x 128" in sentence
    fitted["measured"] = False
    assert not [*pages.trend_findings([{"target": "trend", "claims": [*points, fitted]}])]


def test_the_papers_numbers(tmp_path):
    paper = place_at("paper", tmp_path)
    for row in reproduce.TARGETS["table2"](paper).paper.values():  # its last column is the mean of the others
        *scores, average = row.values()
        assert len(scores) == 9 and sum(scores) / 9 == pytest.approx(average, abs=0.06)
    [primary] = [claim for claim in reproduce.TARGETS["table7"](paper).claims if claim.primary]
    assert primary.effect == pytest.approx(math.log(50.2 / 45.1)) and primary.unit == "factor"
    [slope] = [claim for claim in reproduce.TARGETS["dose"](paper).claims if "slope" in claim.text]
    weights = {math.log2(int(row.split()[-1])): weight for (row, _), weight in slope.contrast.items()}
    assert sum(weight * (30 + 2.5 * doublings) for doublings, weight in weights.items()) == pytest.approx(2.5)
    for folder in ("SST-2", "STS-B", "RTE", "CoLA"):
        (tmp_path / "data" / "glue" / folder).mkdir(parents=True)
        (tmp_path / "data" / "glue" / folder / "train.tsv").touch()
    [mean] = [claim for claim in reproduce.TARGETS["table2"](paper).claims if claim.primary]
    assert mean.effect == pytest.approx(1.65)  # of means that are not rounded before: 66.05 and 64.4
    assert pages.effect_text(mean.effect, mean.unit) == "+1.65 points"


@pytest.mark.parametrize("target", ["table1", "table7", "table8", "variety", "figure2", "figure3"])
def test_no_verdict_on_models_that_learned_nothing(target, tmp_path):
    """Text models no better than unigrams, images no better than the mean colour, however they differ."""
    table, rng = reproduce.TARGETS[target](place_at("cpu", tmp_path)), np.random.default_rng(0)

    def verdict(guess):
        level = {row: 6 + k % 2 / 10 for k, row in enumerate(table.rows)}
        level |= {row: guess for row, model in table.rows.items() if model.instead == "guess"}
        cells = {(row, name): [mean_cell(level[row] + 0.001 * rng.normal(size=50), "t") for _ in range(3)]
                 for row in table.rows for name in table.columns}
        [primary] = [claim for claim in table.claims if claim.primary]
        return judge(primary, cells)["verdict"]

    assert verdict(6.05) == NOT_MEASURED != verdict(7.0)


# ---------------------------------------------------------------------------- running

def test_table7_at_smoke_scale(tmp_path, monkeypatch, capsys, little_text):
    line = [*line_of(tmp_path, "table7", "smoke"), "--tokens", "1024"]
    monkeypatch.setattr(reproduce, "run", in_process)
    assert reproduce.main(line) == 0
    text, x = capsys.readouterr().out, json.loads((tmp_path / "out" / "table7-smoke.json").read_text())
    wrote = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("work/perplexity-*.json")}
    unigrams, *rows = x["rows"]
    for row in rows:
        flags = row["model"].removeprefix("text: ").replace(" --", "-").replace(" ", "-")
        found = [one["results"] for seed in range(2) for name, one in wrote.items()
                 if f"-{flags}-seed{seed}" in name]
        for regime, cell in row["cells"].items():
            assert cell["seeds"] == pytest.approx([one["regimes"][regime]["perplexity"] for one in found])
            assert f"| {cell['paper']} | {cell['mean']:.1f} ± {cell['std']:.1f} |" in text
        assert row["tokens"] == 1024
    assert unigrams["cells"]["padded"]["mean"] == pytest.approx(math.exp(found[0]["unigram_nll"]))
    assert x["claims"] == [] and "Its numbers mean nothing" in text  # no verdicts
    assert x["run"] == "python reproduce.py table7 --scale smoke --seeds 2 --tokens 1024"
    assert len(x["commands"]) == 12 and str(tmp_path) not in json.dumps(x["commands"])
    assert "nan" not in text and (tmp_path / "out" / "table7-smoke.png").exists() == bool(x["picture"])
    assert reproduce.main([*line, "--dry-run"]) == 0 and capsys.readouterr().out.strip() == ""


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch, little_text):
    stage = pretrain(place_at("smoke", tmp_path), Model("mlm --mask 0.3"), 0)

    def crash(settings, progress):
        if progress > 0.5:
            raise MemoryError
        return 1e-3

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "learning_rate", crash)
        train.main([*stage.line()[1:], "--save-every", "10"])
    assert load_checkpoint(stage.out)["step"] == 20 and not stage.done()
    in_process(stage)
    assert load_checkpoint(stage.out)["step"] == 40 and stage.done()
    stage.beside(".done").unlink()  # as after a crash between its end and the record
    reproduce.run(stage)
    assert stage.done()


def test_what_is_not_whole_counts_as_absent(tmp_path):
    stage = Stage(("spectral.py", "all"), tmp_path / "x.json")
    for path, text in ((stage.out, '{"claims": []}'), (stage.beside(".done"), '{"seconds": 1}')):
        assert not stage.done()
        path.write_text(text)
    assert stage.done()
    for path in (stage.out, stage.beside(".done")):
        text = path.read_text()
        path.write_text(text[:8])  # as after a full disk
        assert not stage.done()
        path.write_text(text)


def test_a_report_in_a_locale_without_utf_8(tmp_path):
    x = json.loads((HERE / "results" / "theory-cpu.json").read_text())
    reproduce.write_json(tmp_path / "theory-cpu.json", {**x, "fair": "± σ é"})
    reproduce.main(["report", "--out", str(tmp_path)])
    expected = (tmp_path / "README.md").read_bytes()
    (tmp_path / "cut-cpu.json").write_text('{"target": "table1", "sc')
    line = [sys.executable, HERE / "reproduce.py", "report", "--out", tmp_path]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(line, env={**os.environ, **locale}, capture_output=True, check=True)
    assert b"cut-cpu.json" in done.stderr and "± σ é".encode() in expected
    assert (tmp_path / "README.md").read_bytes() == expected


def test_a_model_that_diverged_has_a_page(tmp_path, monkeypatch):
    """A probability of 0 in one seed: no mean, no interval, no verdict, and no traceback."""
    def diverged(argv, rng):
        x = made_up(argv, rng)
        if "vl-mask-0.15,0.3-seed1" in argv[2]:
            x["results"]["regimes"]["padded"]["sequence_nll"] = [float("inf"), *[3.0] * 19]
        return x

    monkeypatch.setattr(reproduce, "run", functools.partial(pretend, result=diverged))
    (tmp_path / "data" / "text").mkdir(parents=True)
    reproduce.main(line_of(tmp_path, "table7"))
    reproduce.main(["report", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| x1.113 | - | - | not measured |" in text and "nan" not in text and "None" not in text


def test_the_first_failure_is_the_end(tmp_path, monkeypatch):
    def fail(stage):
        ran.append(stage)
        raise BadInput("no memory")

    ran = []
    (tmp_path / "data" / "images").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "run", fail)
    with pytest.raises(BadInput, match="no memory"):
        reproduce.main(line_of(tmp_path, "table8"))
    assert len(ran) == 1


# ---------------------------------------------------------------------------- pages

def made_up(argv, rng):
    """A result as the stage's program would write it."""
    def regime():
        nll = rng.normal(3, 0.1, 20)
        bins = [{"first": k, "last": 2 * k - 1, "sequence_nll": list(nll)} for k in (1, 2, 4, 8, 16, 32, 64)]
        return {"nll": nll.mean(), "bits_per_byte": 2.0, "sequence_nll": list(nll),
                "by_length": {"nll": list(rng.normal(3, 0.1, 127)), "bins": bins}}

    right = list(rng.integers(0, 2, 160))
    layer = {"correct": right, "test": 160, "majority": 0.1}
    images = {f"{name}_of_images": list(rng.random(9)) for name in ("l2", "psnr", "lpips")}
    similar = {"mean": rng.random(), "mean_of_all": 0.1, "curve": {"rank": [1, 2], "similarity": [1, 0.5]}}
    tasks = {name: {f"{what}{suffix}": rng.integers(0, 2, (2, 12) if what == "predictions" else 12)
                    for suffix, *_ in task.parts for what in ("predictions", "labels")}
             for name, task in glue.TASKS.items()}
    if argv[1] == "all":
        return {"claims": [dict.fromkeys(("claim", "printed", "computed", "verdict"), "x")]}
    return {
        "results": {"length": 128, "regimes": {"padded": regime(), "truncated": regime()},
                    "unigram": regime(), "data": "x", "dev": 160, "tasks": tasks,
                    "layers": {"4": layer, "pixels": layer},
                    "correct": [right] if argv[1] == "finetune" else right,
                    "sets": [{"data": "x", "correct": right}] * 10},
        "rows": [images], "checkpoints": [{"inner_product": similar, "cosine": similar}], "findings": []}


def pretend(stage, result=made_up):
    """In place of running a stage, after all that it needs."""
    assert all(need.out.exists() for need in stage.needs)
    rng = np.random.default_rng(sum(map(ord, str(stage.argv))))
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    if stage.line()[-2] == "--out":
        stage.out.mkdir()
        (stage.out / "metrics.jsonl").write_text('{"step": 1, "tokens": 1000}\n')
    else:
        reproduce.write_json(stage.out, result(stage.argv, rng))
    stage.beside(".log").write_text("what it printed\n")
    reproduce.write_json(stage.beside(".done"), {"command": str(stage.out), "seconds": 1.0,
                                                 "hardware": "none", "torch": "2", "code": "x"})


def test_cells_are_metrics_of_what_is_written(tmp_path):
    x = made_up(("evaluate.py", "glue"), np.random.default_rng(0))
    place, written, ar = place_at("cpu", tmp_path), x["results"], Model("ar")
    columns = measures.glue_columns(place)
    for name, suffix, column in (("cola", "", "CoLA"), ("mnli", "-mm", "MNLI-mm"), ("stsb", "", "STS-B")):
        metric = glue.METRICS[glue.TASKS[name].metrics[0]]
        labels, predictions = (written["tasks"][name][what + suffix] for what in ("labels", "predictions"))
        expected = 100 * np.mean([metric(one, labels) for one in predictions])
        cell = columns[column].read(ar, x)
        assert cell.value == pytest.approx(expected) and cell.n == 12
        assert cell.value_of(np.arange(6)) == pytest.approx(
            100 * np.mean([metric(one[:6], labels[:6]) for one in predictions]))
    assert measures.probe().read(ar, x).value == pytest.approx(100 * np.mean(written["correct"]))
    assert measures.probe().read(Model("ar", instead="guess"), x).value == pytest.approx(10)
    assert [*measures.few_labels(place)] == ["pydoc probe"]  # two novels of two authors are needed
    write_novels(tmp_path)
    [column] = measures.few_labels(place).values()
    written["layers"]["4"]["correct"] = [1] * 80 + [0] * 80
    cell = column.read(ar, x)
    assert (cell.value, cell.n) == (50, 2)  # examples are novels, all right or all wrong
    share = measures.gain_share("padded", lambda k, S: k < S / 8, ar).read(ar, x, x)
    three = [written["unigram"], written["regimes"]["padded"], written["regimes"]["padded"]]
    unigram, masked, best = (np.average([np.mean(b["sequence_nll"]) for b in one["by_length"]["bins"][:4]],
                                        weights=[1, 2, 4, 8]) for one in three)
    assert share.value == pytest.approx((unigram - masked) / (unigram - best))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("scale, names", [("cpu", list(reproduce.TARGETS)), ("paper", ["table1"])])
def test_every_target_makes_its_page(scale, names, tmp_path, monkeypatch, capsys):
    for picture in ("dots", "ranks", "by_length", "forest"):
        monkeypatch.setattr(pages.plots, picture, lambda path, results: path.touch())
    monkeypatch.setattr(reproduce, "run", pretend)
    monkeypatch.setattr(pages, "judge", functools.partial(pages.judge, draws=10))
    for name in ("text", "glue", "images", "wikitext2", "other", *(f"transfer/{name}" for name in NINE)):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ["all"] if scale == "cpu" else names:
        assert reproduce.main([*line_of(tmp_path, name, scale), "--seeds", "2"]) == 0
    for name in names:
        x = json.loads((tmp_path / "out" / f"{name}-{scale}.json").read_text())
        assert all(column["seeds"] == [] or column["mean"] is not None for row in x["rows"]
                   for column in row["cells"].values())
        assert x["rows"] or x["printed_and_computed"] or x["text"] == ["what it printed"]
    assert reproduce.main(["report", "--out", str(tmp_path / "out")]) is None
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("\n## ") == len(names) and "nan" not in text and "None" not in text


def test_the_committed_results_give_the_committed_pages(tmp_path):
    shutil.copytree(HERE / "results", tmp_path / "results")
    shutil.copy(HERE / "README.md", tmp_path)
    (tmp_path / "results" / "README.md").unlink()
    reproduce.main(["report", "--out", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")])
    for name in ("README.md", "results/README.md"):
        assert (tmp_path / name).read_text() == (HERE / name).read_text()
    for line in (tmp_path / "results" / "README.md").read_text().splitlines():
        if line.startswith("!["):
            assert (tmp_path / "results" / line.rpartition("(")[2].rstrip(")")).exists()
