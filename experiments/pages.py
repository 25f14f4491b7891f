"""What is written of a finished target, one JSON object, and the page that is made of all of them."""

import itertools
import json
import math
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

import plots
from experiments.measures import SCALES, pretrain, with_needs
from experiments.verdicts import MEANING, corrected, in_words, judge
from util import BadInput, write_json

MARKERS = "<!-- results -->", "<!-- /results -->"

HEADLINES = {  # the six rows of the front page: what a reader came for
    "table1": "autoregressive generates better than masked (Table 1)",
    "masked": "masked classifies images better than autoregressive (Sec. 4.1)",
    "dose": "t = 2 classifies images better than t = 1 (Tables 3, 9)",
    "table7": "[0.15, 0.3] generates better than 0.3 (Table 7)",
    "variety": "[0.15, 0.3] generates better than 0.225, its mean (Table 7, interpolated)",
    "figure3": "masked loses most after short prefixes (Figure 3)"}

ORIGIN = ("Written by `python reproduce.py report` from the JSON files of this folder, so that no number in "
          "it can differ from what ran.")
CORRECTED = ("One primary claim for each target; verdicts after Holm's correction over all of these, for the "
             "tests against 0 and for those against the paper's effect apart.")
LEGEND = ("Differences are positive where the claim holds, in points of a percentage, in dB (PSNR), or as "
          "factors where the quantity has no scale of its own (perplexity, L2). Intervals are over "
          "pretraining seeds and test examples, both the same on both sides (experiments/verdicts.py), not "
          "corrected for the number of claims; examples count as independent, though sequences of one novel "
          "are not quite (in the author column an example is a whole novel). Smallest visible: half the "
          "interval, the least effect that such a run would tell from 0. [ours]: the paper does not claim "
          "this.")


# ---------------------------------------------------------------------------- numbers

def stages_of(place, table, seeds):
    """All stages of a target in an order in which they can run, the first seed complete first."""
    cells = [stage for seed in range(seeds) for model in table.rows.values()
             for column in table.columns.values() for stage in column.stages(place, model, seed)]
    return with_needs([*cells, *table.extra])


def read_cells(place, table, seeds):
    """{(row, column): one Cell for each seed}, without the columns that are means."""
    cells = {}
    for (row, model), (name, column) in itertools.product(table.rows.items(), table.columns.items()):
        found = [column.stages(place, model, seed) for seed in range(seeds)]
        if found[0]:
            cells[row, name] = [column.read(model, *(stage.result() for stage in stages)) for stages in found]
    return cells


def row_of(place, table, row, cells):
    """A row of a table with the numbers of every column, for JSON."""
    model, content = table.rows[row], {}
    for name, column in table.columns.items():
        parts = [cells[row, part] for part in column.mean_of or (name,) if (row, part) in cells]
        values = [column.shown(fmean(cell.value for cell in seed)) for seed in zip(*parts)]
        content[name] = {"paper": table.paper.get(row, {}).get(name), "digits": column.digits,
                         "seeds": values, "mean": fmean(values) if values else None,
                         "std": stdev(values) if len(values) > 1 else None}
    seen = {}
    if not model.instead and not model.hub:
        last = (pretrain(place, model, 0).out / "metrics.jsonl").read_text().splitlines()[-1]
        seen = {unit: count for unit, count in json.loads(last).items() if unit in ("tokens", "images")}
    return {"row": row, "model": str(model), "cells": content, **seen}


def summarise(place, name, table, seeds):
    """Everything that is known of a finished target, as one JSON object: the page is made from it alone."""
    records = [json.loads(stage.beside(".done").read_text()) for stage in stages_of(place, table, seeds)]
    run = [f"python reproduce.py {name} --scale {place.name}"]
    run += ["--data-dir DATA"] if place.name != "smoke" else []
    run += [f"--seeds {seeds}"] if table.rows else []
    run += [f"--{budget} {place.scale[budget]:.12g}" for budget in ("tokens", "epochs")
            if place.scale[budget] != SCALES[place.name][budget]]
    where = {str(place.data): "DATA", str(place.work): f"runs/reproduce/{place.name}"}
    cells = read_cells(place, table, seeds)
    content = {
        "target": name, "scale": place.name, "about": place.scale["about"], "title": table.title,
        "fair": table.fair, "seeds": seeds, "rows": [row_of(place, table, row, cells) for row in table.rows],
        "claims": [judge(claim, cells) for claim in table.claims],
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "torch": ", ".join(sorted({record["torch"] for record in records})),
                     "code": ", ".join(sorted({record["code"] for record in records}))},
        "wall_seconds": sum(record["seconds"] for record in records),
        "hardware": sorted({record["hardware"] for record in records}), "run": " ".join(run), "commands": []}
    for record in records:
        for path, short in where.items():
            record["command"] = record["command"].replace(path, short)
        content["commands"].append(record["command"])
    if not table.rows:  # theory: its claims; toy and bridge: what their command prints
        [stage] = table.extra
        found = stage.result()
        content["printed_and_computed"] = found.get("claims", [])
        content["found"] = {key: found[key] for key in ("findings", "results") if key in found}
        content["text"] = [] if "claims" in found else stage.beside(".log").read_text().splitlines()
    return content


# ---------------------------------------------------------------------------- text

def markdown_table(rows):
    """Lists of cells as lines of Markdown, the first list being the header."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def effect_text(value, unit):
    """A difference in its unit; a factor as x1.23."""
    if value is None:
        return "none printed"
    if unit == "factor":
        return f"x{math.exp(value):.3f}"
    digits = 1 if unit == "points" else max(0, min(4, 1 - math.floor(math.log10(max(1e-9, abs(value))))))
    return f"{value:+.{digits}f} {unit}".strip()


def claim_rows(claims):
    """Claims as a Markdown table."""
    rows = [["claim", "paper's effect", "ours, 95% interval", "smallest visible", "verdict"]]
    for c in claims:
        name = c.get("short") or "**primary** " * c["primary"] + c["claim"] + " [ours]" * c["ours"]
        ours, visible = effect_text(c["difference"], c["unit"]), "-"
        if c["interval"]:
            low, high = (effect_text(end, c["unit"]).removesuffix(f" {c['unit']}") for end in c["interval"])
            ours, visible = f"{ours} ({low} .. {high})", effect_text(c["smallest_visible"], c["unit"])
        rows.append([name, effect_text(c["effect"], c["unit"]), ours, visible, in_words(c)])
    return markdown_table(rows)


def shown(cell):
    """A cell of the tables: the mean over seeds and its standard deviation."""
    numbers = [f"{x:.{cell['digits']}f}" for x in (cell["mean"], cell["std"]) if x is not None]
    return " ± ".join(numbers) or "-"


def rows_beside_paper(rows):
    """A target's rows as a Markdown table, the paper's numbers beside ours where it has some."""
    columns = rows[0]["cells"]
    printed = [name for name in columns if any(row["cells"][name]["paper"] is not None for row in rows)]
    heads = [[f"{name}, paper", f"{name}, here"] if name in printed else [name] for name in columns]
    lines = [["", *itertools.chain(*heads), "seen"]]
    for row in rows:
        cells = [[cell["paper"] or "-", shown(cell)] if name in printed else [shown(cell)]
                 for name, cell in row["cells"].items()]
        seen = [f"{row[unit]:,} {unit}" for unit in ("tokens", "images") if unit in row] or ["-"]
        lines.append([row["row"], *itertools.chain(*cells), *seen])
    return markdown_table(lines)


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def markdown(x, level=1):
    """A target as Markdown, from its JSON alone."""
    lines, made = ["#" * level + f" {x['title']}", ""], x["fair"]
    if x["rows"]:
        lines[0] += f" ({x['scale']} scale)"
        if x["scale"] == "smoke":
            lines += ["**Smoke scale proves that the pipeline runs. Its numbers mean nothing.**", ""]
        lines += rows_beside_paper(x["rows"])
        made += " ± is the standard deviation over seeds." * (x["seeds"] > 1)
        made += f" {x['seeds']} seed{'s' * (x['seeds'] > 1)}; {x['scale']} scale: {x['about']}."
    if x["claims"]:
        lines += claim_rows(x["claims"])
    if x.get("printed_and_computed"):
        head = ["claim", "printed", "computed", "verdict"]
        lines += markdown_table([head, *([c[name] for name in head] for c in x["printed_and_computed"])])
    if x.get("text"):
        lines += ["```", *x["text"], "```", ""]
    lines += [made, "", f"`{x['run']}`: {duration(x['wall_seconds'])} on {', '.join(x['hardware'])}; "
              + "torch {torch}, code {code}.".format(**x["versions"])]
    if x.get("picture"):
        lines += ["", f"![{x['title']}]({x['picture']})"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- files

def write_results(place, name, table, seeds, folder):
    """Write NAME-SCALE.json and, with matplotlib, .png into the folder -> the target as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    content, picture = summarise(place, name, table, seeds), folder / f"{name}-{place.name}.png"
    drawn = [Path(word) for stage in table.extra for word in stage.argv if word.endswith(".png")]
    if drawn and drawn[0].exists():
        shutil.copyfile(drawn[0], picture)
    elif find_spec("matplotlib") and table.picture:
        column = next(iter(table.columns.values()))
        table.picture(picture, {row: column.stages(place, model, 0)[0].result()
                                for row, model in table.rows.items()})
    elif find_spec("matplotlib") and table.rows:
        plots.dots(picture, content)
    content["picture"] = picture.name if picture.exists() else None
    write_json(picture.with_suffix(".json"), content)
    return markdown(content)


def write_report(folder, targets, readme=None):
    """Write FOLDER/README.md with every target at its largest scale, and the verdicts on the primary claims
    between the markers of the file `readme`. Pictures that are missing are drawn from the rows."""
    scales, largest = list(SCALES), {}
    for path in sorted(folder.glob("*.json")):
        x = json.loads(path.read_text())
        if scales.index(x["scale"]) >= scales.index(largest.get(x["target"], x)["scale"]):
            largest[x["target"]] = x
    found = [largest[name] for name in targets if name in largest]
    if not found:
        raise BadInput(f"{folder} holds no results; make some: python reproduce.py theory --out {folder}")
    reported = [x for x in found if x["scale"] != "smoke" or not x["rows"]]
    primaries = [{**claim, "target": x["target"], "short": HEADLINES.get(x["target"], claim["claim"])}
                 for x in reported for claim in x["claims"] if claim["primary"]]
    primaries = corrected(primaries)
    headlines = [claim for name in HEADLINES for claim in primaries if claim["target"] == name]
    if find_spec("matplotlib"):
        for x in reported:
            if x["rows"] and x["picture"] and not (folder / x["picture"]).exists():
                plots.dots(folder / x["picture"], x)
        if headlines:
            plots.forest(folder / "forest.png", [{**c, "verdict": in_words(c)} for c in headlines])
    forest = "![Primary claims: ours with intervals, and the paper's effects]({}forest.png)\n"
    forest *= (folder / "forest.png").exists()
    lines = ["# Results", "", ORIGIN, ""]
    if primaries:
        meaning = [f"- *{word}*: {text}." for word, text in MEANING.items()]
        lines += [CORRECTED, "", *claim_rows(primaries), *meaning, "", LEGEND, "", forest.format("")]
    for x in reported:
        lines += [markdown(x, level=2)]
    smoke = [f"{x['target']} ({x['title']})" for x in found if x not in reported]
    lines += [f"Run at smoke scale only, so no numbers here: {'; '.join(smoke)}."] if smoke else []
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    if readme:
        relative = os.path.relpath(folder, Path(readme).parent)
        link = f"Words, units and intervals: [{relative}/README.md]({relative}/README.md).\n"
        lines = [*claim_rows(headlines), link, forest.format(f"{relative}/")] if headlines else []
        write_between_markers(Path(readme), lines)


def write_between_markers(readme, lines):
    text = readme.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS) or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise BadInput(f"{readme} should have the lines {' and '.join(MARKERS)} once, in this order")
    lines = [MARKERS[0], "<!-- written by: python reproduce.py report -->", "", *lines]
    readme.write_text(text[:text.index(MARKERS[0])] + "\n".join(lines) + text[text.index(MARKERS[1]):])
