"""reproduce.py and experiments/: stages, budgets, locks, pages, and two targets from end to end."""
import importlib
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import reproduce
import train
from downstream import by_length
from engine import machine, runs
from experiments import measures, pages, running, stages, tables
from experiments.scales import FEWER, RISK, SCALES
from experiments.stages import Model, Place
from experiments.verdicts import SUPPORTED, Cell, judge
from objectives import OBJECTIVES
from reproduce import TARGETS
from support import cli
from support.cli import BadInput
from text import sources

TABLE7 = "Masked (0.15)", "Masked (0.3)", "Variable-length [0.15, 0.3]"


def place_at(scale, work, data="DATA", **more):
    return Place(scale, Path(data).absolute(), work, SCALES[scale], **more)


def all_stages(place, *names, seeds=1):
    return stages.with_needs([stage for name in names or TARGETS
                              for stage in pages.stages_of(place, TARGETS[name](place), seeds)])


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """A few made-up documents in place of the library's documentation, which takes seconds to read."""
    rng, patch = np.random.default_rng(0), pytest.MonkeyPatch()
    texts = [(f"module{k}.part", " ".join(rng.choice(["one", "two", "three", "four"], 400)))
             for k in range(60)]
    patch.setattr(sources, "pydoc_texts", lambda: iter(texts))
    yield
    patch.undo()


def in_process(stage, launcher=(), environment=None, lock=None):
    """What running.run does in a process of its own."""
    name, *rest = running.command(stage)
    assert not importlib.import_module(name.removesuffix(".py")).main(rest)
    running.write_record(stage, 1.5, "test machine", "abc123")


# ---------------------------------------------------------------------------- stages

class Reached(Exception):
    """The arguments were understood and the work would begin."""


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_line_is_understood(scale, tmp_path, monkeypatch):
    def reached(*args, **kwargs):
        raise Reached

    for name in ("data", "experiments.losses", "experiments.authors"):
        importlib.import_module(name)
    ours = [x for x in sys.modules.values() if str(getattr(x, "__file__",
                                                           None)).startswith(str(running.HERE))]
    for module, name in itertools.product(ours, ("open_run", "load_run", "prepare_text", "prepare_images",
                                                 "label_authors", "perceptual_distance")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(cli, "import_optional", lambda name: None)
    monkeypatch.setattr(machine, "choose_dtype", lambda device, name: torch.float32)
    for name in ("text", "work"):
        (tmp_path / name).mkdir()
    found = all_stages(place_at(scale, tmp_path / "work", tmp_path))
    kinds = {(stage.argv[:2], *(word for word in stage.argv if word.startswith("--"))): stage.line()
             for stage in found}
    for name, *rest in kinds.values():  # one of each command and set of flags
        if name == "train.py":
            settings, args = train.parse(rest)
            assert Path(args["out"]).parent == tmp_path / "work" and settings.task()
        elif name == "spectral.py":
            assert importlib.import_module("spectral").read_command(rest).json
        elif name in ("experiments.bridge", "experiments.recipe"):
            arguments = getattr(importlib.import_module(name), name.partition(".")[2] + "_arguments")
            assert arguments(rest).json
        else:
            with pytest.raises(Reached):
                importlib.import_module(name.removesuffix(".py")).main(rest)
    assert {stage.argv[0] for stage in found} >= {"train.py", "evaluate.py", "spectral.py",
                                                  "experiments.losses"}


def test_stages_are_named_by_their_command(tmp_path):
    here, there = place_at("smoke", tmp_path / "a"), place_at("smoke", tmp_path / "b")
    found = [pages.stages_of(place, TARGETS["table7"](place), 2) for place in (here, there)]
    assert [stage.out.name for stage in found[0]] == [stage.out.name for stage in found[1]]
    # seeds, models, training and evaluation; and the unigrams of each seed
    assert len({stage.out for stage in found[0]}) == len(found[0]) == 2 * 3 * 2 + 2
    assert all(need in found[0][:k] for k, stage in enumerate(found[0]) for need in stage.needs)
    shared = {s.out for s in found[0]} & {s.out for s in pages.stages_of(here, TARGETS["figure3"](here), 2)}
    unigrams = {s.out for s in found[0] if s.argv[:2] == ("experiments.losses", "unigram")}
    assert shared == {s.out for s in found[0]} - unigrams  # Figure 3 has what Table 7 has, and ar
    assert {s.out for s in pages.stages_of(here, TARGETS["table7"](here), 1)} < {s.out for s in found[0]}


def test_models_as_text():
    model = Model("untrained images x0.5: dar --t 2")
    assert (model.kind, model.budget, model.flags, model.learned) == ("images", 0.5, "dar --t 2", False)
    assert model.as_trained() == Model("images x0.5: dar --t 2")
    assert model.times(2).text == "untrained images: dar --t 2"
    assert Model("hf:gpt2").hub and Model("hf:gpt2").learned and Model("images100: ar").kind == "images100"


def budgets_of(place, name):
    """{kind: [(settings without the objective's own, path) of each training stage of a target]}."""
    found, own = {}, ("objective", "options", "streams", "mask_rule")
    for stage in pages.stages_of(place, TARGETS[name](place), 1):
        if stage.argv[0] == "train.py":
            settings, _ = train.parse(stage.argv[1:])
            found.setdefault(settings.images, []).append(
                ({key: value for key, value in vars(settings).items() if key not in own}, settings.task()[1]))
    return found


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", ["table2", "table7", "table8", "table9", "fourbytwo", "masked"])
def test_the_same_budget_for_all_models_of_a_table(scale, name, tmp_path):
    for found in budgets_of(place_at(scale, tmp_path), name).values():
        assert all(one == found[0] for one in found)


def test_variety_gives_equal_tokens_but_to_two(tmp_path):
    place = place_at("cpu", tmp_path)
    steps = [budget["steps"] for budget, _ in budgets_of(place, "variety")[False]]
    assert set(steps[:-2]) == {steps[0]}
    assert steps[-2:] == [pytest.approx(steps[0] / FEWER, rel=0.01)] * 2
    assert steps[0] * 16 * 128 == pytest.approx(place.scale.tokens, rel=0.01)


def test_budgets_of_the_paper(tmp_path):
    place = place_at("paper", tmp_path)

    def settings(text, place=place):
        return train.parse(stages.pretrain(place, Model(text), 0).argv[1:])[0]

    text = settings("text: dar --t 2")
    assert (text.steps, text.batch_size, text.length, text.lr, text.mask_rule) == (100_000, 8192, 128, 1e-3,
                                                                                   None)
    image = settings("images: dar --t 2")
    assert (image.epochs, image.batch_size, image.lr, image.clip) == (200, 4096, 5e-4 * 4096 / 256, 0)
    assert settings("images x0.5: dar --t 2").epochs == 100
    assert settings("text: mlm --mask 0.3").mask_rule == "bert"
    safer = settings("images: dar --t 2", place_at("paper", tmp_path, safer=True))
    assert safer.lr == 1.5e-4 * 4096 / 256 and safer.clip == 1
    assert any(stage.argv[:2] == ("data.py", "images") for stage in stages.pretrain(place,
                                                                                    Model("images: ar"),
                                                                                    0).needs)
    assert any("--length 512" in " ".join(stage.argv) for stage in all_stages(place, "table1")
               if stage.argv[1] == "perplexity")


def test_no_stage_of_the_gpu_scale_is_expected_to_take_eight_minutes(tmp_path):
    place = place_at("gpu", tmp_path)
    found = all_stages(place)
    seconds = running.estimate_seconds(found, place.scale.flops)
    assert max(seconds.values()) < 480


def test_the_papers_numbers():
    place = place_at("paper", Path("work"))
    for row in TARGETS["table2"](place).paper.values():  # its last column is the mean of the others
        *scores, average = row.values()
        assert len(scores) == 9 and sum(scores) / 9 == pytest.approx(average, abs=0.06)
    table9 = list(TARGETS["table9"](place).paper.values())
    assert list(TARGETS["table5"](place).paper.values())[2:] == table9[:2]
    [primary] = [claim for claim in TARGETS["table7"](place).claims if claim.primary]
    assert primary.effect == pytest.approx(math.log(50.2 / 45.1)) and primary.unit == "factor"
    for target in TARGETS.values():  # every number stands in a row and a column that exist
        table = target(place)
        assert set(table.paper) <= set(table.rows)
        assert all(set(row) <= set(table.columns) for row in table.paper.values())


@pytest.mark.parametrize("scale", SCALES)
def test_claims_are_contrasts_of_cells_that_exist(scale, tmp_path):
    """One primary claim a table at most, all positive in the paper, and an untrained row beside every
    classification."""
    place = place_at(scale, tmp_path)
    for name, target in TARGETS.items():
        table = target(place)
        assert sum(claim.primary for claim in table.claims) == bool(table.claims), name
        cells = {(row, column) for row, model in table.rows.items()
                 for column, measure in table.columns.items() if measure.stages
                 and measure.stages(place, model, 0)}
        for claim in table.claims:
            assert set(claim.contrast) <= cells and sum(claim.contrast.values()) == pytest.approx(0, abs=1e-9)
            assert claim.effect is None or claim.effect > 0
            for key, base in (claim.untrained or {}).items():
                assert key in cells and base in cells
                assert Model(table.rows[base[0]]).as_trained().kind == Model(table.rows[key[0]]).kind
        classified = [row for row, column in cells if table.columns[column].classifies
                      and not Model(table.rows[row]).hub]
        assert not classified or any(row.startswith("Untrained") for row in table.rows), name


def test_the_doubling_of_t_is_a_slope(tmp_path):
    place = place_at("cpu", tmp_path)
    [claim] = [claim for claim in TARGETS["dose"](place).claims if "slope" in claim.text]
    cells = {key: [Cell(30 + 2.5 * math.log2(int(key[0].split()[-1])))] * 2 for key in claim.contrast}
    assert judge(replace(claim, untrained=None), cells)["difference"] == pytest.approx(2.5)
    assert judge(claim, cells)["verdict"] == "not measured"  # no untrained row among the cells
    assert claim.effect == pytest.approx(np.polyfit([0, 1, math.log2(3), 2], [56.2, 59.4, 59.6, 58.8], 1)[0])


def test_all_text_objectives_of_the_registry_are_compared(tmp_path):
    table = TARGETS["objectives"](place_at("cpu", tmp_path))
    assert {row for row in table.rows if not row.startswith(("Untrained", "Unigrams"))} == {
        name for name, cls in OBJECTIVES.items() if not cls.images_only}
    assert not table.claims


# ---------------------------------------------------------------------------- running

def test_an_interrupted_training_goes_on_and_a_finished_one_is_adopted(tmp_path):
    place = place_at("smoke", tmp_path / "work")
    stage = stages.pretrain(place, Model("text: mlm --mask 0.3"), 0)
    elsewhere = tmp_path / "runs" / "mine"
    train.main([*stage.argv[1:], "--no-report", "--out", str(elsewhere)])
    record = {"command": "python train.py there", "seconds": 5.0, "hardware": "a machine", "code": "abc"}
    elsewhere.with_name("mine.stage").write_text(json.dumps(record))
    running.adopt(stage, tmp_path / "runs")
    assert stage.out.resolve() == elsewhere and running.finished(stage)
    adopted = json.loads(stage.record().read_text())
    assert adopted == {**record, "command": running.readable(stage.line())}
    other = stages.pretrain(place, Model("text: mlm --mask 0.3"), 1)
    running.adopt(other, tmp_path / "runs")
    assert not other.out.exists() and not running.finished(other)

    one, ar, other = (running.settings_of(vars(train.parse(line.split())[0])) for line in (
        "--objective dar --t 1", "--objective ar --streams 2", "--objective ar"))
    assert one == ar != other
    content = runs.load_checkpoint(elsewhere)
    torch.save({**content, "step": 30, "seen": 30 * 8}, elsewhere / "ckpt.pt")
    stage.record().unlink()
    assert not running.finished(stage)
    in_process(stage)
    assert runs.load_checkpoint(stage.out)["step"] == 40
    assert running.finished(stage)
    saved = json.loads((stage.out / "config.json").read_text())
    (stage.out / "config.json").write_text(json.dumps({**saved, "lr": 0.5, "data": "/moved"}))
    with pytest.raises(BadInput, match=r"other presets \(--lr 0.5, now [\d.e-]+\): give another --work"):
        running.finished(stage)


def test_what_was_measured_on_a_training_counts_no_more_once_that_ran_anew(tmp_path):
    place = place_at("smoke", tmp_path)
    scored = stages.evaluation(place, "text: ar", 0, "perplexity")
    [training] = scored.needs
    training.out.mkdir(parents=True)
    scored.out.write_text("{}")
    running.write_record(training, 5.0, "here", "abc")
    running.write_record(scored, 1.0, "here", "abc")
    assert running.finished(scored)
    running.write_record(training, 6.0, "here", "abc")
    assert not running.finished(scored)
    running.write_record(scored, 1.0, "here", "abc")
    assert running.finished(scored)
    training.out.rmdir()
    assert not running.finished(training) and not running.finished(scored)
    training.out.mkdir()  # as a training that has begun
    assert not running.finished(training) and not running.finished(scored)


def test_who_wrote_it_needs_two_novels_of_two_authors(tmp_path):
    place = place_at("cpu", tmp_path, tmp_path / "data")
    (place.data / "text").mkdir(parents=True)
    for name in ("austen_emma", "austen_persuasion", "eliot_romola"):
        (place.data / "text" / f"{name}.txt").write_text("x")
        assert [*measures.few_labels(place)] == [*measures.text_probe(place)]
    (place.data / "text" / "eliot_middlemarch.txt").write_text("x")
    [(name, measure)] = measures.few_labels(place).items()
    assert name == "author, few labels"
    correct = np.repeat([1, 0, 1], 80)  # all or none of a novel: three examples, not 240
    cell = measure.read("text: ar", {"results": {"data": "x", "layers": {"4": {"correct": correct.tolist(),
                                                                               "test": 240}}}})
    assert cell.value == pytest.approx(200 / 3) and cell.samples.tolist() == [[[1, 0, 1]]]


# ---------------------------------------------------------------------------- pages, from made-up results

def fake_nll(rng, model, mean=4, n=12, length=32):
    """By-length results of a regime."""
    nll = mean - 0.2 * ("ar" in model) + rng.normal(0, 0.1, (n, length - 1)) - 0.02 * np.arange(length - 1)
    bins = [{"first": low, "last": high, "sequence_nll": nll[:, low - 1:high].mean(1).tolist()}
            for low, high in by_length.length_bins(length - 1)]
    return {"nll": nll.mean(), "perplexity": math.exp(nll.mean()), "bits_per_byte": nll.mean() / 3,
            "sequence_nll": nll.mean(1).tolist(), "by_length": {"prefix": list(range(1, length)),
                                                                "nll": nll.mean(0).tolist(), "stderr": [0.1]
                                                                * (length - 1), "bins": bins}}


def test_the_share_that_a_model_gains_of_what_the_autoregressive_one_gains():
    """Unigrams lose 5 nats everywhere; after short prefixes 3 of 4 are gained, after long ones 2 of 3."""
    def results(name, short, long):
        bins = [{"first": low, "last": high, "sequence_nll": [short if high < 8 else long] * 3}
                for low, high in by_length.length_bins(31)]
        return {"results": {"length": 32, "regimes": {name: {"nll": 0.0, "by_length": {"bins": bins}}}}}

    given = results("unigram", 5, 5), results("padded", 2, 3), results("next", 1, 2)
    for span, share in ((lambda k, S: k < S / 4, 3 / 4), (lambda k, S: k >= S / 4, 2 / 3)):
        cell = measures.gain_share("padded", span, "text: ar").read("text: mlm", *given)
        assert cell.value == pytest.approx(share)


def fake_result(stage, rng):
    """What a command writes, as far as the tables read it."""
    name, what, *rest = stage.argv
    labels = rng.integers(0, 2, 40)
    right = (rng.random(40) < 0.7).astype(int).tolist()
    if name == "spectral.py":
        return {"claims": [{"claim": "c", "printed": "p", "computed": "q", "verdict": "v"}], "results": {}}
    if name == "experiments.losses":
        if what == "unigram":
            return {"results": {"length": 32, "regimes": {"unigram": fake_nll(rng, "", 6)}}}
        ratios = rest[rest.index("--ratios") + 1].split(",")
        return {"results": {"length": 32, "ratios": {x: rng.normal(3, 0.1, 12).tolist() for x in ratios}}}
    if what == "perplexity":
        one_stream = ("mlm" in rest[0] or "vl" in rest[0]) and "streams" not in rest[0]
        regimes = ("padded", "truncated") if one_stream else ("next",)
        return {"results": {"length": 32, "regimes": {regime: fake_nll(rng, rest[0]) for regime in regimes}}}
    if what == "bound":
        return {"results": {"any_order": {"bound": {"sequence_nll": rng.normal(4, 0.1, 12).tolist()}}}}
    if what == "connectivity":
        summary = {"mean": 1.0, "mean_of_all": 0.5, "sorted": [1.0, 0.5], "median": 0.4}
        return {"checkpoints": [{"inner_product": summary, "cosine": summary, "curve": []}]}
    if what == "reconstruct":
        return {"rows": [{"l2": 0.5, "psnr": 12.0, "l2_of_images": rng.uniform(0.4, 0.6, 12).tolist(),
                          "psnr_of_images": [12.0] * 12}]}
    if what == "glue":
        scores = {"predictions": rng.integers(0, 2, (3, 40)).tolist(), "labels": labels.tolist()}
        return {"results": {"tasks": {task: {key + suffix: value for suffix,
                                             *_ in measures.glue.TASKS[task].parts
                                             for key, value in scores.items()}
                                      for task in measures.glue.TABLE2}}}
    if what == "transfer":
        sets = [{"data": path, "correct": right} for path in rest[rest.index("--data") + 1:]]
        return {"results": {"sets": sets}}
    if what == "finetune":
        return {"results": {"correct": [right], "data": "x", "dev": 40}}
    probed = {"correct": right, "test": 40, "majority": 0.5}
    layers = ("last", "pixels") if "--pixels" in rest else ("last",)
    return {"results": {"layers": dict.fromkeys(layers, probed), "data": "x"}}


def pretend(stage, *ignored):
    """In place of running a stage."""
    rng = np.random.default_rng(abs(hash(stage.out.name)) % 2 ** 32)
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    if stage.argv[0] in ("train.py", "data.py", "experiments.authors"):
        stage.out.mkdir(exist_ok=True)
        line = json.dumps({"step": 1, "seconds": 1.0, "tokens": 1000})
        (stage.out / "metrics.jsonl").write_text(line + "\n")
    else:
        stage.out.write_text(json.dumps(fake_result(stage, rng)))
    running.write_record(stage, 1.0, "no machine", None)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("scale, names", [("cpu", list(TARGETS)), ("paper", ["table1", "table6", "table7"])])
def test_every_target_makes_its_page(scale, names, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run", pretend)
    monkeypatch.setattr(tables, "plot_similarity", lambda path, found: Path(path).write_text("picture"))
    for name in ("text", "glue", "images", "images100", "wikitext2", "transfer/one", "transfer/two", "other",
                 *(f"transfer/{name}" for name in measures.NINE)):
        (tmp_path / "data" / name).mkdir(parents=True)
    arguments = ["--scale", scale, "--data-dir", str(tmp_path / "data"), "--work", str(tmp_path / "work"),
                 "--out", str(tmp_path / "out")]
    for name in ["all"] if len(names) == len(TARGETS) else names:
        assert reproduce.main([name, "--seeds", "2", *arguments]) == 0
    for name in names:
        text, x = ((tmp_path / "out" / f"{name}-{scale}{suffix}").read_text() for suffix in (".md", ".json"))
        assert "nan" not in text and "NaN" not in x and "None" not in text
        assert (tmp_path / "out"
                / f"{name}-{scale}.png").exists() == measures.matplotlib() or name in (*reproduce.ONCE,
                                                                                       "table8")
        x = json.loads(x)
        assert all(column["seeds"] == [] or column["mean"] is not None for row in x["rows"]
                   for column in row["cells"].values())
    reproduce.main(["report", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text().count("\n## ") == len(names)


# ---------------------------------------------------------------------------- from end to end

def reproduce_in_process(patch, *arguments):
    patch.setattr(reproduce, "run", in_process)
    return reproduce.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Table 7 at smoke scale, two seeds."""
    folder, patch = tmp_path_factory.mktemp("smoke"), pytest.MonkeyPatch()
    arguments = ["table7", "--scale", "smoke", "--seeds", 2, "--work", folder / "work", "--out", folder
                 / "results"]
    assert reproduce_in_process(patch, *arguments) == 0
    patch.undo()
    return folder, list(map(str, arguments))


def test_table7_at_smoke_scale(smoke, monkeypatch, capsys):
    folder, arguments = smoke
    x = json.loads((folder / "results" / "table7-smoke.json").read_text())
    assert [row["row"] for row in x["rows"][1:]] == list(TABLE7) and x["seeds"] == 2
    text = (folder / "results" / "table7-smoke.md").read_text()
    unigrams, *rows = x["rows"]
    found = [json.loads(path.read_text())["results"]["regimes"]["unigram"]["nll"]
             for path in (folder / "work").glob("unigram-text-*.json")]
    assert unigrams["cells"]["padded"]["seeds"] == pytest.approx(np.exp(found)) and "tokens" not in unigrams
    for row in rows:
        flags = row["model"][6:].replace(" --", "-").replace(" ", "-")
        found = [json.loads(path.read_text())["results"]["regimes"] for seed in range(2)
                 for path in (folder / "work").glob(f"perplexity-text-{flags}-seed{seed}*.json")]
        for regime, cell in row["cells"].items():
            assert cell["seeds"] == pytest.approx([one[regime]["perplexity"] for one in found])
            assert f"{cell['mean']:.1f} ± {cell['std']:.1f}" in text
        assert row["tokens"] == 40 * 8 * 32
    assert rows[2]["cells"]["padded"]["paper"] == 45.1 and "| 45.1 |" in text
    assert len(x["claims"]) == 6
    assert all(claim["interval"] and claim["verdict"] in text for claim in x["claims"])
    assert x["hardware"] == ["test machine"]
    assert x["versions"]["torch"] == torch.__version__ and x["versions"]["code"] == "abc123"
    assert len(x["commands"]) == 14 and all(str(folder) not in command for command in x["commands"])
    picture = folder / "results" / "table7-smoke.png"
    assert picture.exists() == (x["picture"] is not None) == measures.matplotlib()
    assert "nan" not in text and "NaN" not in json.dumps(x)

    monkeypatch.setattr(reproduce, "run", lambda *args: pytest.fail("it was there"))
    assert reproduce.main(arguments) == 0
    assert json.loads((folder / "results" / "table7-smoke.json").read_text()) == x
    capsys.readouterr()
    reproduce.main([*arguments, "--dry-run"])
    assert capsys.readouterr().out.strip() == ""


def test_without_matplotlib_a_picture_stays(smoke, monkeypatch, capsys):
    folder, arguments = smoke
    picture = folder / "results" / "table7-smoke.png"
    before = picture.read_bytes() if picture.exists() else None
    picture.write_bytes(before or b"drawn elsewhere")
    monkeypatch.setattr(pages, "matplotlib", lambda: False)
    reproduce.main(arguments)
    assert picture.read_bytes() == (before or b"drawn elsewhere")
    assert "no new picture" in capsys.readouterr().err
    assert json.loads((folder / "results" / "table7-smoke.json").read_text())["picture"] == picture.name


def made_up(claims, name="table7", scale="cpu", seeds=3):
    """A result of a target with these claims."""
    row = {"row": "a row", "model": "text: ar", "tokens": 1000,
           "cells": {"padded": {"paper": 45.1, "digits": 1, "seeds": [1.0, 2.0], "mean": 1.5, "std": 0.5}}}
    return {"target": name, "scale": scale, "about": "little", "title": f"The title of {name}",
            "fair": "Fair.", "seeds": seeds, "rows": [row], "claims": claims, "wall_seconds": 5.0,
            "hardware": ["a machine"], "versions": {"torch": "2", "code": "abc"}, "run": "run",
            "commands": [], "picture": None}


def test_the_report(tmp_path):
    primary = {"claim": "one better than two", "ours": False, "primary": True, "unit": "factor",
               "effect": 0.4, "difference": 0.5, "interval": [0.3, 0.7], "smallest_visible": 0.2, "seeds": 3,
               "gain_over_untrained": {}, "measured": True, "p_zero": 0.02, "p_paper": 0.4,
               "verdict": SUPPORTED}
    other = {**primary, "claim": "a secondary claim", "primary": False, "unit": "points",
             "interval": [-1.0, 2.0]}
    results = tmp_path / "results"
    results.mkdir()
    (results / "table7-cpu.json").write_text(json.dumps(made_up([primary, other])))
    (results / "figure3-cpu.json").write_text(json.dumps(made_up([{**primary, "p_zero": 0.03, "effect": None,
                                                                   "p_paper": None}], "figure3")))
    (results / "table9-smoke.json").write_text(json.dumps(made_up([primary], "table9", "smoke")))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nOLD\n<!-- /results -->\nafter\n")
    reproduce.main(["report", "--out", str(results), "--readme", str(readme)])
    text, full = readme.read_text(), (results / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->") and text.endswith("<!-- /results -->\nafter\n")
    assert "OLD" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "smallest visible" not in line]
    assert [row.split("|")[1].strip() for row in rows] == [pages.HEADLINES["table7"],
                                                           pages.HEADLINES["figure3"]]
    assert "| x1.492 | x1.649 (x1.350 .. x2.014) | x1.221 | supported |" in rows[0]
    assert "none printed" in rows[1] and "a secondary claim" in full and "secondary" not in text
    assert "The title of table9" in full.splitlines()[-1]
    assert (results / "forest.png").exists() == measures.matplotlib()
    reproduce.main(["report", "--out", str(results), "--readme", str(readme)])
    assert readme.read_text() == text

    (results / "figure3-cpu.json").write_text(json.dumps(made_up([{**primary, "p_zero": 0.2}], "figure3")))
    (results / "table7-cpu.json").write_text(json.dumps(made_up([{**primary, "p_zero": 0.03}])))
    reproduce.main(["report", "--out", str(results), "--readme", str(readme)])
    assert "supported" not in readme.read_text()  # 2 x 0.03 is not below 0.05


def test_theory(claims, tmp_path, monkeypatch):
    def found(stage, *ignored):
        assert stage.argv[:2] == ("spectral.py", "all")
        stage.out.parent.mkdir(parents=True, exist_ok=True)
        stage.out.write_bytes(claims.read_bytes())
        running.write_record(stage, 1.5, "test machine", "abc123")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run", found)
    assert reproduce.main(["theory", "--scale", "smoke"]) == 0
    x = json.loads((tmp_path / "results-mine" / "theory-smoke.json").read_text())
    assert len(x["printed_and_computed"]) > 20 and all(row["checked"] for row in x["printed_and_computed"])
    assert len(x["commands"]) == 1 and "spectral.py all" in x["commands"][0] and x["versions"]["python"]
    reproduce.main(["report", "--out", "results-mine"])
    assert "what is printed and what holds" in (tmp_path / "results-mine" / "README.md").read_text()


def test_passages_by_author(tmp_path, capsys):
    from experiments import authors
    rng = np.random.default_rng(0)
    for author, words, titles in (("Ann", "red green blue", "AB"), ("Bob", "one two three", "ABC"),
                                  ("Cid", "alone", "A")):
        for title in titles:
            text = " ".join(rng.choice(words.split(), 3000)) + f"\r\n {title.lower() * 3}\t"
            (tmp_path / f"{author}_{title}_1900.txt").write_text((text + " ") * 2, encoding="utf-8-sig")
    authors.main([str(tmp_path), "--out", str(tmp_path / "out"), "--train", "5", "--dev", "3"])
    written = ((tmp_path / "out" / f"{side}.tsv").read_text().splitlines() for side in ("train", "dev"))
    train_rows, dev_rows = ([line.split("\t") for line in lines] for lines in written)
    assert train_rows[0] == dev_rows[0] == ["text", "label"]
    assert [row[1] for row in train_rows[1:]] == ["Ann"] * 5 + ["Bob"] * 5 and len(dev_rows) == 1 + 6
    assert all(len(row) == 2 and 400 < len(row[0]) <= 600 for row in train_rows[1:])
    assert set(train_rows[1][0].split()) <= {"red", "green", "blue", "aaa"}
    with pytest.raises(BadInput, match="two or more"):
        authors.label_authors(tmp_path / "out", tmp_path / "none")


# ---------------------------------------------------------------------------- the command line

def test_usage_and_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main([]) == 0 and "usage" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"text.*--data-dir"):
        reproduce.main(["table7", "--scale", "cpu"])
    (tmp_path / "mine" / "text").mkdir(parents=True)
    with pytest.raises(BadInput, match="images, which is not there$"):
        reproduce.main(["table3", "--scale", "cpu", "--data-dir", "mine"])
    with pytest.raises(BadInput, match="not a folder"):
        reproduce.main(["table3", "--scale", "cpu", "--data-dir", "nowhere"])
    with pytest.raises(BadInput, match="table12"):
        reproduce.main(["table12"])
    with pytest.raises(BadInput, match="--tokens -5"):
        reproduce.main(["table7", "--tokens", "-5"])
    (tmp_path / "r").mkdir()
    with pytest.raises(BadInput, match="holds no results"):
        reproduce.main(["report", "--out", "r"])
    (tmp_path / "r" / "table7-cpu.json").write_text(json.dumps(made_up([])))
    Path("README.md").write_text("no markers")
    with pytest.raises(BadInput, match="results"):
        reproduce.main(["report", "--out", "r", "--readme", "README.md"])


def test_the_list_names_data_disk_and_risk_and_does_not_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["table2", "--list", "--scale", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("table2") and "DATA/glue, DATA/text" in line and line.count(" GB") == 2
    reproduce.main(["table3", "--list", "--scale", "paper"])
    text = capsys.readouterr().out
    assert RISK in text and "one H100" in text and "images100" in text
    disk = float(text.splitlines()[-2].split(" GB")[1].split()[-1].replace(",", ""))
    assert disk > 1_281_167 * 3 * 224 ** 2 / 1e9
    reproduce.main(["table3", "--list", "--scale", "paper", "--safer"])
    assert RISK not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_list_gives_no_time_in_thousands_of_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "measured_flops", lambda: 1e10)
    reproduce.main(["all", "--list", "--scale", "paper"])
    lines = capsys.readouterr().out.splitlines()
    [together] = [line for line in lines if line.startswith("all together")]
    assert " years " in together and " days " in together
    assert not any(float(number.replace(",", "")) >= 100 for line in lines[1:]
                   for number in re.findall(r"([\d,.]+) h\b", line))


def test_minutes_begin_no_stage_that_would_end_later(tmp_path, monkeypatch, capsys):
    ran = []

    def pretend(stage, launcher, environment, lock):
        ran.append(stage)
        stage.out.parent.mkdir(parents=True, exist_ok=True)
        stage.out.write_text("{}")
        running.write_record(stage, 500.0, "", None)

    monkeypatch.setattr(reproduce, "run", pretend)
    assert reproduce.main(["table7", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "r"), "--minutes",
                           "1"]) == 1
    # of each of the three kinds of stages the first one, whose time is only estimated
    assert len(ran) <= 3 and "stages are left" in " ".join(capsys.readouterr().err.split())
