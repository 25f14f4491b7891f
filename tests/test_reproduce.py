"""reproduce.py and tables.py: stages, verdicts, and two targets from end to end."""
import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reproduce
import spectral
import train
from downstream import reconstruct
from engine import machine, runs
from experiments import tables
from experiments.tables import SCALES, TARGETS, Cell, Claim, Measure, Place, Table
from support import cli
from support.cli import BadInput
from text import sources

TABLE7 = "Masked (0.15)", "Masked (0.3)", "Variable-length [0.15, 0.3]"


def place_at(scale, work, data="DATA"):
    return Place(scale, Path(data).absolute(), work)


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """A few made-up documents in place of the library's documentation, which takes seconds to read."""
    rng, patch = np.random.default_rng(0), pytest.MonkeyPatch()
    texts = [(f"module{k}.part", " ".join(rng.choice(["one", "two", "three", "four"], 400))) for k in range(60)]
    patch.setattr(sources, "pydoc_texts", lambda: iter(texts))
    yield
    patch.undo()


def in_process(stage):
    """What reproduce.run does in a process of its own."""
    program, *rest = reproduce.command(stage)
    assert not importlib.import_module(program.removesuffix(".py")).main(rest)
    reproduce.write_record(stage, 1.5, "test machine", "abc123")


# ---------------------------------------------------------------------------- stages

class Reached(Exception):
    """The arguments were understood and the work would begin."""


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_line_is_understood(scale, tmp_path, monkeypatch):
    def reached(*args, **kwargs):
        raise Reached

    for module, name in ((hub, "load_run"), (evaluate, "load_run"), (data, "prepare"), (images, "prepare")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(cli, "import_optional", lambda name: None)
    monkeypatch.setattr(reconstruct, "perceptual_distance", lambda net: None)
    monkeypatch.setattr(machine, "choose_dtype", lambda device, name: torch.float32)
    stages = reproduce.with_needs([stage for target in TARGETS.values()
                                   for stage in reproduce.stages_of(place_at(scale, tmp_path), target(place_at(scale, tmp_path)), 1)])
    for program, *rest in {stage.line() for stage in stages}:
        if program == "train.py":
            settings, args = train.parse(rest)
            assert Path(args["out"]).parent == tmp_path and settings.task()
        elif program == "spectral.py":
            assert spectral.parse(rest).json
        else:
            with pytest.raises(Reached):
                importlib.import_module(program.removesuffix(".py")).main(rest)
    assert {stage.argv[0] for stage in stages} >= {"train.py", "evaluate.py", "spectral.py"}


def test_stages_are_named_by_their_command(tmp_path):
    here, there = place_at("smoke", tmp_path / "a"), place_at("smoke", tmp_path / "b")
    stages = [reproduce.stages_of(place, TARGETS["table7"](place), 2) for place in (here, there)]
    assert [stage.out.name for stage in stages[0]] == [stage.out.name for stage in stages[1]]
    assert len({stage.out for stage in stages[0]}) == len(stages[0]) == 2 * 3 * 2   # seeds, models, training and evaluation
    assert all(need in stages[0][:k] for k, stage in enumerate(stages[0]) for need in stage.needs)
    shared = {s.out for s in stages[0]} & {s.out for s in reproduce.stages_of(here, TARGETS["figure3"](here), 2)}
    assert shared == {s.out for s in stages[0]}                                      # Figure 3 has what Table 7 has, and ar
    assert {s.out for s in reproduce.stages_of(here, TARGETS["table7"](here), 1)} < {s.out for s in stages[0]}


def test_the_same_budget_for_all_models_of_a_table(tmp_path):
    for scale in ("cpu", "paper"):
        for name in ("table2", "table7", "ranges", "table8", "table9", "fourbytwo"):
            place = place_at(scale, tmp_path)
            runs = {}
            for stage in reproduce.stages_of(place, TARGETS[name](place), 1):
                if stage.argv[0] == "train.py":
                    settings, _ = train.parse(stage.argv[1:])
                    budget = {k: v for k, v in vars(settings).items() if k not in ("objective", "t", "mask", "streams", "mask_rule")}
                    runs.setdefault(settings.images, []).append((budget, settings.task()[1]))
            for found in runs.values():
                assert all(run == found[0] for run in found), (scale, name)


def test_budgets_of_the_paper(tmp_path):
    place = place_at("paper", tmp_path)
    text, _ = train.parse(tables.pretrain(place, "text: dar --t 2", 0).argv[1:])
    assert (text.steps, text.batch_size, text.length, text.lr, text.mask_rule) == (100_000, 8192, 128, 1e-3, None)
    image, _ = train.parse(tables.pretrain(place, "images: dar --t 2", 0).argv[1:])
    assert (image.epochs, image.batch_size, image.lr) == (200, 4096, 5e-4 * 4096 / 256)
    assert train.parse(tables.pretrain(place, "images half: dar --t 2", 0).argv[1:])[0].epochs == 100
    assert train.parse(tables.pretrain(place, "text: mlm --mask 0.3", 0).argv[1:])[0].mask_rule == "bert"


def test_no_stage_of_the_gpu_scale_is_expected_to_take_eight_minutes(tmp_path):
    place = place_at("gpu", tmp_path)
    for target in TARGETS.values():
        assert max(reproduce.estimate(place, reproduce.stages_of(place, target(place), 1)).values()) < 480


def test_the_papers_numbers():
    place = place_at("paper", Path("work"))
    for row in TARGETS["table2"](place).paper.values():  # its last column is the mean of the others
        *scores, average = row.values()
        assert len(scores) == 9 and sum(scores) / 9 == pytest.approx(average, abs=0.06)
    table9 = list(TARGETS["table9"](place).paper.values())
    assert [tuple(row.values()) for row in table9[:4]] == list(spectral.TABLE_9.values())
    assert list(TARGETS["table5"](place).paper.values())[2:] == table9[:2]
    for target in TARGETS.values():  # every number stands in a row and a column that exist
        table = target(place)
        assert set(table.paper) <= set(table.rows)
        assert all(set(row) <= set(table.columns) for row in table.paper.values())


def test_an_interrupted_training_goes_on_and_a_finished_one_is_adopted(tmp_path, monkeypatch):
    place = place_at("smoke", tmp_path / "work")
    stage = tables.pretrain(place, "text: mlm --mask 0.3", 0)
    elsewhere = tmp_path / "runs" / "mine"
    train.main([*stage.argv[1:], "--no-report", "--out", str(elsewhere)])
    reproduce.adopt(stage, tmp_path / "runs")
    assert stage.out.resolve() == elsewhere and reproduce.finished(stage)
    other = tables.pretrain(place, "text: mlm --mask 0.3", 1)
    reproduce.adopt(other, tmp_path / "runs")
    assert not other.out.exists() and not reproduce.finished(other)

    one, ar = (train.parse(line.split())[0] for line in ("--objective dar --t 1", "--objective ar --streams 2"))
    assert reproduce.settings_of(vars(one)) == reproduce.settings_of(vars(ar)) != reproduce.settings_of(vars(train.parse([])[0]))
    content = runs.load_checkpoint(elsewhere)
    torch.save({**content, "step": 30, "seen": 30 * 8}, elsewhere / "ckpt.pt")
    stage.record().unlink()
    assert not reproduce.finished(stage)
    in_process(stage)
    assert runs.load_checkpoint(stage.out)["step"] == 40
    assert reproduce.finished(stage)


# ---------------------------------------------------------------------------- verdicts

def verdict(a, b, draws=2000):
    cells = {("a", "x"): a, ("b", "x"): b}
    return reproduce.judge(Claim("a more than b", lambda v: v["a", "x"] - v["b", "x"]), cells, draws)


def test_verdicts_are_paired_over_seeds():
    seeds = [10.0, 50.0, 90.0]  # seeds differ by much more than the models
    higher = verdict([Cell(s + d) for s, d in zip(seeds, (1.0, 1.1, 0.9))], [Cell(s) for s in seeds])
    assert higher["verdict"] == reproduce.CONFIRMED and higher["difference"] == pytest.approx(1)
    low, high = higher["interval"]  # Student's interval: 4.303 * 0.1 / sqrt(3)
    assert low == pytest.approx(1 - 0.248, abs=0.04) and high == pytest.approx(1 + 0.248, abs=0.04)
    lower = verdict([Cell(s) for s in seeds], [Cell(s + d) for s, d in zip(seeds, (1.0, 1.1, 0.9))])
    assert lower["verdict"] == reproduce.CONTRADICTED
    mixed = verdict([Cell(s + d) for s, d in zip(seeds, (1.0, 0.2, 0.1))], [Cell(s) for s in seeds])
    assert mixed["verdict"] == reproduce.NOT_SEEN and mixed["interval"][0] < 0 < mixed["interval"][1]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_are_not_enough_to_confirm_noise(seeds):
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        cells = {("a", "x"): [Cell(x) for x in rng.normal(size=seeds)], ("b", "x"): [Cell(x) for x in rng.normal(size=seeds)]}
        wrong += reproduce.judge(Claim("", lambda v: v["a", "x"] - v["b", "x"]), cells, draws=300)["verdict"] != reproduce.NOT_SEEN
    assert wrong <= 25  # 5% of 200 are 10; resampling seeds alone is wrong in 100, 50 and 25 of 200 or more


def test_one_test_set_for_all_seeds_is_not_forgotten():
    """Two equal models of three seeds, each scored on one test set that is one point off."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        a, b = ([Cell(x, 1.0) for x in rng.normal() + 0.5 * rng.normal(size=3)] for _ in "ab")
        wrong += verdict(a, b, 300)["verdict"] != reproduce.NOT_SEEN
    assert wrong <= 20  # 5% of 200 are 10; the seeds alone are wrong in 50 or more


def test_seeds_with_samples_have_about_students_interval():
    """Three seeds on the same 200 texts, the noise of which is not counted twice."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(40):
        texts = rng.normal(5, 1, 200)
        a, b = ([Cell(x.mean(), None, tuple(x)) for x in texts + rng.normal(0, 0.002, (3, 1)) + rng.normal(0, 0.1, (3, 200))]
                for _ in "ab")
        gaps = [x.value - y.value for x, y in zip(a, b)]
        low, high = verdict(a, b, 300)["interval"]
        ratios.append((high - low) / 2 / (4.303 * np.std(gaps, ddof=1) / math.sqrt(3)))
    assert 0.9 < np.median(ratios) < 1.25


def test_one_seed_is_judged_by_its_samples():
    rng = np.random.default_rng(0)
    easy, gain = rng.normal(5, 1, 400), rng.normal(0.02, 0.05, 400)  # texts differ by much more than the models
    a, b = ([Cell(math.exp(x.mean()), 99.0, tuple(x), math.exp)] for x in (easy, easy - gain))
    found = verdict(a, b)
    assert found["verdict"] == reproduce.CONFIRMED
    half = 1.96 * math.exp(easy.mean()) * gain.std() / 20  # delta method
    assert (found["interval"][1] - found["interval"][0]) / 2 == pytest.approx(half, rel=0.15)


def test_one_seed_without_samples_is_judged_by_standard_errors():
    found = verdict([Cell(51.0, 0.6)], [Cell(50.0, 0.8)])
    assert found["interval"] == pytest.approx([1 - 1.96, 1 + 1.96], abs=0.15) and found["verdict"] == reproduce.NOT_SEEN
    assert verdict([Cell(53.0, 0.6)], [Cell(50.0, 0.8)])["verdict"] == reproduce.CONFIRMED
    nothing = verdict([Cell(51.0)], [Cell(50.0)])
    assert nothing["interval"] is None and nothing["verdict"] == reproduce.NOT_JUDGED


def test_claims_follow_the_direction_of_the_measure_and_of_the_paper():
    columns = {"accuracy": Measure(), "loss": Measure(lower=True)}
    paper = {"a": {"accuracy": 2.0}, "b": {"accuracy": 1.0}}
    accuracy, loss = tables.compare(columns, [("a", "b")], paper)
    values = {("a", "accuracy"): 5.0, ("b", "accuracy"): 3.0, ("a", "loss"): 5.0, ("b", "loss"): 3.0}
    assert accuracy.gap(values) == 2 and loss.gap(values) == -2
    assert not accuracy.ours and loss.ours
    assert [claim.text for claim in tables.compare(columns, [("b", "a")], paper)] == ["loss: b better than a"]


def test_a_mean_column_and_the_rank_correlation(monkeypatch):
    table = Table("", "", {"r": "m"}, {"p": Measure(lambda *a: SimpleNamespace(result=lambda: 4), lambda x: Cell(x, 3.0)),
                                       "q": Measure(lambda *a: SimpleNamespace(result=lambda: 8), lambda x: Cell(x, 4.0)),
                                       "mean": Measure(mean_of=("p", "q"))})
    cells = reproduce.read_cells(None, table, 1)
    assert cells["r", "mean"][0].value == 6 and cells["r", "mean"][0].stderr == 2.5
    text = TARGETS["theory_practice"](place_at("smoke", Path("work"))).claims[0]
    values = {(row, "tail sum"): float(k) for k, row in enumerate(text.rows)}
    values |= {(row, "probe"): -float(k) ** 3 for k, row in enumerate(text.rows)}
    assert text.gap(values, text.rows) == pytest.approx(1)


# ---------------------------------------------------------------------------- from end to end

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Table 7 at smoke scale, one seed."""
    folder, patch = tmp_path_factory.mktemp("smoke"), pytest.MonkeyPatch()
    arguments = ["table7", "--scale", "smoke", "--seeds", "1", "--work", str(folder / "work"), "--results", str(folder / "results")]
    patch.setattr(reproduce, "run", in_process)
    assert reproduce.main(arguments) == 0
    patch.undo()
    return folder, arguments


def test_table7_at_smoke_scale(smoke, monkeypatch, capsys):
    folder, arguments = smoke
    x = json.loads((folder / "results" / "table7-smoke.json").read_text())
    assert [row["row"] for row in x["rows"]] == list(TABLE7) and x["seeds"] == 1
    text = (folder / "results" / "table7-smoke.md").read_text()
    for row in x["rows"]:
        [path] = (folder / "work").glob(f"perplexity-text-{row['model'][6:].replace(' --', '-').replace(' ', '-')}*.json")
        regimes = json.loads(path.read_text())["results"]["regimes"]
        for regime, cell in row["cells"].items():
            assert cell["seeds"] == [regimes[regime]["perplexity"]] and f"{cell['mean']:.1f} (s.e." in text
        assert row["tokens"] == 40 * 8 * 32
    assert x["rows"][2]["cells"]["padded"]["paper"] == 45.1 and "| 45.1 |" in text
    assert len(x["claims"]) == 6 and all(claim["interval"] and claim["verdict"] in text for claim in x["claims"])
    assert x["hardware"] == ["test machine"] and x["versions"]["torch"] == torch.__version__ and x["versions"]["code"] == "abc123"
    assert len(x["commands"]) == 6 and all(str(folder) not in command for command in x["commands"])
    assert (folder / "results" / "table7-smoke.png").exists() == (x["picture"] is not None) == tables.matplotlib()

    monkeypatch.setattr(reproduce, "run", lambda stage: pytest.fail("it was there"))
    assert reproduce.main(arguments) == 0
    again = json.loads((folder / "results" / "table7-smoke.json").read_text())
    assert again == x
    capsys.readouterr()
    reproduce.main([*arguments, "--dry-run"])
    assert capsys.readouterr().out.strip() == ""


def test_theory_in_processes_of_their_own_and_the_report(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["theory", "--scale", "smoke"]) == 0
    results = tmp_path / "results"
    x = json.loads((results / "theory-smoke.json").read_text())
    assert len(x["printed_and_computed"]) > 20 and all(row["checked"] for row in x["printed_and_computed"])
    assert len(x["commands"]) == 1 and "spectral.py all" in x["commands"][0] and x["versions"]["python"]

    seven = json.loads((smoke[0] / "results" / "table7-smoke.json").read_text())
    (results / "table7-cpu.json").write_text(json.dumps({**seven, "scale": "cpu"}))
    (results / "table7-smoke.json").write_text(json.dumps({**seven, "rows": [{**row, "row": "smoke"} for row in seven["rows"]]}))
    (results / "table9-smoke.json").write_text(json.dumps({**seven, "target": "table9"}))
    Path("README.md").write_text("before\n<!-- results -->\nOLD\n<!-- /results -->\nafter\n")
    reproduce.main(["report"])
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!-- results -->") and text.endswith("<!-- /results -->\nafter\n") and "OLD" not in text
    assert "(results/theory-smoke.md)" in text and "no numbers here: [table9](results/table9-smoke.md)" in text and "| smoke |" not in text
    assert "r(s-1), or plus 1" in (results / "theory-smoke.md").read_text()
    for row in seven["rows"]:
        assert f"| {row['row']} | {row['cells']['padded']['paper']} | {row['cells']['padded']['mean']:.1f} " in text
    assert text.count(seven["claims"][0]["claim"]) == 1
    for name in re.findall(r"\]\((results/[^)]+)\)", text):
        assert Path(name).exists() or "table7" in name or "table9" in name  # which are made up here
    reproduce.main(["report"])
    assert Path("README.md").read_text() == text


def test_a_glue_score_varies_with_its_dev_part_and_with_its_seeds(tmp_path):
    """Against the spread of scores of simulated dev parts of 400 texts."""
    (tmp_path / "glue").mkdir()
    columns = tables.glue_columns(tables.Place("cpu", tmp_path, tmp_path))
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 2000, 400))
    labels, other = rng.random((2, 2000, 400)) < 0.4
    simulated = {
        "SST-2": ("sst2", "accuracy", np.mean(rng.random((2000, 400)) < 0.8, axis=1)),
        "STS-B": ("stsb", "pearson", np.array([tables.glue.pearson(a, b) for a, b in zip(x, 0.5 * x + noise)])),
        "CoLA": ("cola", "matthews", np.array([tables.glue.matthews(a | b, a) for a, b in zip(labels, other & (x > 1))]))}
    for column, (name, metric, scores) in simulated.items():
        mean = float(scores.mean())
        one, three = (columns[column].read({"results": {"tasks": {name: {"dev": 400, metric: {
            "mean": mean, "std": std, "seeds": [mean] * count}}}}}) for std, count in ((None, 1), (0.03, 3)))
        assert one.value == 100 * mean and one.stderr == pytest.approx(100 * scores.std(), rel=0.2)
        assert three.stderr == pytest.approx(math.hypot(one.stderr, 3 / math.sqrt(3)))


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"text.*--data-dir"):
        reproduce.main(["table7", "--scale", "cpu"])
    (tmp_path / "mine" / "text").mkdir(parents=True)
    with pytest.raises(BadInput, match="images, which is not there$"):
        reproduce.main(["table3", "--scale", "cpu", "--data-dir", "mine"])
    with pytest.raises(BadInput, match="not a folder"):
        reproduce.main(["table3", "--scale", "cpu", "--data-dir", "nowhere"])
    with pytest.raises(BadInput, match="table12"):
        reproduce.main(["table12"])
    Path("README.md").write_text("no markers")
    with pytest.raises(BadInput, match="results"):
        reproduce.main(["report"])
    Path("README.md").write_text("\n".join(reproduce.MARKERS))
    with pytest.raises(BadInput, match="holds no results"):
        reproduce.main(["report"])
    broken = tables.Stage(("spectral.py", "nothing"), tmp_path / "x.json")
    with pytest.raises(BadInput, match="exit status 2"):
        reproduce.run(broken)


def test_the_list_names_data_and_does_not_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["table2", "--list", "--scale", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("table2") and "DATA/glue, DATA/text" in line and " h " in line
    assert list(tmp_path.iterdir()) == []
