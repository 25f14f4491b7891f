"""What is written of a finished target: its JSON, its page, and the pages made of all of them."""

import functools
import itertools
import json
import math
import os
import platform
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from experiments.measures import matplotlib
from experiments.pictures import dots, forest
from experiments.scales import SCALES
from experiments.stages import Model, pretrain, with_needs
from experiments.verdicts import MEANING, corrected, judge, remark, word
from support.cli import BadInput, duration, write_json
from theory.toy_report import show_toy

MARKERS = "<!-- results -->", "<!-- /results -->"

# The six rows of the front page: what a reader came for.
HEADLINES = {
    "table1": "autoregressive generates better than masked (Table 1)",
    "masked": "masked classifies images better than autoregressive (Sec. 4.1)",
    "dose": "t = 2 classifies images better than t = 1 (Tables 3, 9)",
    "table7": "[0.15, 0.3] generates better than 0.3 (Table 7)",
    "variety": "[0.15, 0.3] generates better than 0.225, its mean (Table 7, interpolated)",
    "figure3": "masked loses most after short prefixes (Figure 3)"}


# ---------------------------------------------------------------------------- numbers

def stages_of(place, table, seeds):
    """All stages of a target, in order, cell by cell within each seed so that the first seed is complete
    first."""
    cells = [stage for seed in range(seeds) for model in table.rows.values()
             for measure in table.columns.values() if measure.stages
             for stage in measure.stages(place, model, seed)]
    return with_needs([*cells, *table.extra])


def read_cells(place, table, seeds):
    """{(row, column): one Cell for each seed}, without the columns that are means."""
    def cell(model, measure, seed):
        return measure.read(model, *(stage.result() for stage in measure.stages(place, model, seed)))

    cells = {}
    for (row, model), (column, measure) in itertools.product(table.rows.items(), table.columns.items()):
        if measure.stages and measure.stages(place, model, 0):
            cells[row, column] = [cell(model, measure, seed) for seed in range(seeds)]
    return cells


def shown_values(table, cells, row, column):
    """A cell's value of each seed as people read it, [] where there is none."""
    measure = table.columns[column]
    if not measure.mean_of:
        return [measure.shown(cell.value) for cell in cells.get((row, column), [])]
    parts = [cells[row, part] for part in measure.mean_of if (row, part) in cells]
    return [fmean(cell.value for cell in seed) for seed in zip(*parts)]


def seen(place, model):
    """{tokens or images: how many} its training read."""
    if not model.learned or model.hub:
        return {}
    lines = map(json.loads, (pretrain(place, model, 0).out / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "seconds" in line][-1]
    return {unit: last[unit] for unit in ("tokens", "images") if unit in last}


def run_line(place, name, seeds):
    """The command that makes a target, as one types it."""
    words = [f"python reproduce.py {name} --scale {place.name}", "--data-dir DATA" * (place.name != "smoke"),
             f"--seeds {seeds}" if seeds else "", "--safer" * place.safer]
    for budget in ("tokens", "epochs"):
        if getattr(place.scale, budget) != getattr(SCALES[place.name], budget):
            words.append(f"--{budget} {getattr(place.scale, budget):.12g}")
    return " ".join(filter(None, words))


def summarise(place, name, table, seeds):
    """Everything that is known of a finished target, as one JSON object: all pages are made from it alone."""
    stages = stages_of(place, table, seeds)
    records = [json.loads(stage.record().read_text()) for stage in stages]
    versions = {"python": platform.python_version(), "numpy": np.__version__,
                "torch": ", ".join(sorted({record.get("torch", torch.__version__) for record in records})),
                "code": ", ".join(sorted({record.get("code") or "not recorded" for record in records}))}
    short = {str(place.data): "DATA", str(place.work): f"runs/reproduce/{place.name}"}
    content = {
        "target": name, "scale": place.name, "about": place.scale.about, "title": table.title,
        "fair": table.fair, "seeds": seeds, "rows": [], "claims": [], "versions": versions,
        "wall_seconds": sum(record["seconds"] for record in records),
        "hardware": sorted({record["hardware"] for record in records}),
        "run": run_line(place, name, seeds if table.rows else None),
        "commands": [functools.reduce(lambda text, path: text.replace(path, short[path]), short,
                                      record["command"]) for record in records]}
    cells = read_cells(place, table, seeds)
    for row, model in table.rows.items():
        own = {}
        for column, measure in table.columns.items():
            values = shown_values(table, cells, row, column)
            own[column] = {"paper": table.paper.get(row, {}).get(column), "digits": measure.digits,
                           "seeds": values, "mean": fmean(values) if values else None, "std": stdev(values)
                           if len(values) > 1 else None}
        content["rows"].append({"row": row, "model": model, "cells": own, **seen(place, Model(model))})
    content["claims"] = [judge(claim, cells) for claim in table.claims]
    if not table.rows:  # theory: every claim; toy: what its own command prints
        found = table.extra[0].result()
        content["printed_and_computed"] = found.get("claims", [])
        content["found"] = {name: found[name] for name in ("findings", "results") if name in found}
        content["text"] = found.get("text") or (show_toy(found) if "findings" in found else [])
    return content


# ---------------------------------------------------------------------------- text

def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def shown(cell):
    """A cell of the tables: the mean over seeds and its standard deviation."""
    text = number(cell["mean"], cell["digits"])
    return f"{text} ± {number(cell['std'], cell['digits'])}" if cell["std"] is not None else text


def rows_of(table):
    """Lists of cells as lines of Markdown, the first list being the header."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def effect_text(value, unit):
    """A difference in its unit; a factor as x1.23."""
    if value is None:
        return "none printed"
    if unit == "factor":
        return f"x{math.exp(value):.3f}"
    digits = 1 if unit == "points" else max(0, min(4, 1 - math.floor(math.log10(max(1e-9, abs(value))))))
    return f"{value:+.{digits}f}" + f" {unit}" * bool(unit)


def interval_text(claim):
    """A claim's difference and its interval as text."""
    value = effect_text(claim["difference"], claim["unit"])
    if not claim["interval"]:
        return value
    low, high = (effect_text(end, claim["unit"]).removesuffix(" " + claim["unit"])
                 for end in claim["interval"])
    return f"{value} ({low} .. {high})"


def verdict_text(claim):
    said = remark(claim)
    return word(claim) + f" ({said})" * bool(said)


def claim_rows(claims, name="claim"):
    """The claims of a target as a Markdown table."""
    head = [name, "paper's effect", "ours, 95% interval", "smallest visible", "verdict"]
    body = [[c.get("short") or ("**primary** " * c["primary"] + c["claim"] + " [ours]" * c["ours"]),
             effect_text(c["effect"], c["unit"]), interval_text(c), "-" if c["smallest_visible"] is None
             else effect_text(c["smallest_visible"], c["unit"]), verdict_text(c)] for c in claims]
    return rows_of([head, *body])


def rows_beside_paper(x):
    """A target's rows, the paper's numbers beside ours where it has some, as lines of Markdown."""
    columns = list(x["rows"][0]["cells"])
    printed = [c for c in columns if any(row["cells"][c]["paper"] is not None for row in x["rows"])]
    heads = ([f"{c}, paper", f"{c}, here"] if c in printed else [c] for c in columns)
    table = [["", *itertools.chain.from_iterable(heads), "seen"]]
    for row in x["rows"]:
        texts = []
        for c in columns:
            cell = row["cells"][c]
            texts += [cell["paper"] or "-", shown(cell)] if c in printed else [shown(cell)]
        table.append([row["row"], *texts, next((f"{row[u]:,} {u}" for u in ("tokens", "images") if u in row),
                                               "-")])
    return [*rows_of(table), ""]


LEGEND = ("Differences are positive where the claim holds, in points of a percentage, in dB (PSNR), or as "
          "factors where the quantity has no scale of its own (perplexity, L2). Intervals are over "
          "pretraining seeds and test examples, both the same on both sides (experiments/verdicts.py), not "
          "corrected for the number of claims; examples count as independent, though sequences of one "
          "novel are not quite (in the author column an example is a whole novel). Smallest visible: half "
          "the interval, the least effect that such a run would tell from 0. [ours]: the paper does not "
          "claim this.")


def markdown(x, level=1):
    """The page of a target from its JSON alone."""
    lines = ["#" * level + f" {x['title']}" + f" ({x['scale']} scale)" * bool(x["rows"]), ""]
    if x["scale"] == "smoke" and x["rows"]:
        lines += ["**Smoke scale proves that the pipeline runs. Its numbers mean nothing.**", ""]
    if x["rows"]:
        lines += rows_beside_paper(x)
    if x["claims"]:
        lines += [*claim_rows(x["claims"]), ""]
    if x.get("printed_and_computed"):
        columns = ["claim", "printed", "computed", "verdict"]
        lines += [*rows_of([columns, *([c[name] for name in columns] for c in x["printed_and_computed"])]),
                  ""]
    if x.get("text"):
        lines += ["```", *x["text"], "```", ""]
    spread = " ± is the standard deviation over seeds." if x["seeds"] > 1 and x["rows"] else ""
    seeds = f"{x['seeds']} seed{'s' * (x['seeds'] > 1)}"
    scale = f" {seeds}; {x['scale']} scale: {x['about']}." if x["rows"] else ""
    lines += [f"{x['fair']}{spread}{scale}", "", f"`{x['run']}`: {duration(x['wall_seconds'])} on "
              f"{', '.join(x['hardware'])}; torch {x['versions']['torch']}"
              + f", code {x['versions']['code']}."]
    if x.get("picture"):
        lines += ["", f"![{x['title']}]({x['picture']})"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- files

def write_results(place, name, table, seeds, folder):
    """NAME-SCALE.json, .md and, with matplotlib, .png in the folder -> the content of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    content, path = summarise(place, name, table, seeds), folder / f"{name}-{place.name}"
    picture = Path(f"{path}.png")
    drawn = [Path(arg) for stage in table.extra for arg in stage.argv if arg.endswith(".png")]
    if drawn and drawn[0].exists():
        shutil.copyfile(drawn[0], picture)
    elif matplotlib() and table.rows:
        (table.picture or dots)(place, seeds, content, picture)
    else:
        print("note: no new picture without matplotlib (pip install matplotlib)", file=sys.stderr)
    content["picture"] = picture.name if picture.exists() else None
    write_json(f"{path}.json", content)
    path.with_name(path.name + ".md").write_text(markdown(content))
    return content


def best_of(folder, targets, scales):
    """The content of every target in the folder at its largest scale, in the order of the targets."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        x = json.loads(path.read_text())
        found.setdefault(x["target"], {})[x["scale"]] = x
    if not found:
        raise BadInput(f"{folder} holds no results; make some: python reproduce.py theory --out {folder}")
    return [found[name][max(found[name], key=list(scales).index)] for name in targets if name in found]


def primaries_of(told):
    """The primary claims of these targets, with verdicts that Holm's adjustment over all of them leaves."""
    claims = [{**claim, "target": x["target"], "scale": x["scale"],
               "short": HEADLINES.get(x["target"]) or claim["claim"]}
              for x in told for claim in x["claims"] if claim["primary"]]
    return corrected(claims)


def write_pages(folder, targets, scales, readme=None):
    """Write FOLDER/README.md with all tables in full, and their own pages again; in `readme`, if given, the
    part between the two markers."""
    best = best_of(folder, targets, scales)
    told = [x for x in best if x["scale"] != "smoke" or not x["rows"]]
    primaries = primaries_of(told)
    headlines = sorted((c for c in primaries if c["target"] in HEADLINES),
                       key=lambda c: list(HEADLINES).index(c["target"]))
    origin = ("Written by `python reproduce.py report` from the JSON files of this folder, so that no number "
              "in it can differ from what ran.")
    for x in told:
        (folder / f"{x['target']}-{x['scale']}.md").write_text(markdown(x))
    lines = ["# Results", "", origin, ""]
    if primaries:
        corrections = ("One primary claim for each target; verdicts after Holm's correction over all of "
                       "these, for the tests against 0 and for those against the paper's effect apart.")
        lines += [corrections, "", *claim_rows(primaries), ""]
        lines += [*(f"- *{word}*: {meaning}." for word, meaning in MEANING.items()), "", LEGEND, ""]
        if matplotlib() and headlines:
            forest(headlines, folder / "forest.png")
        if (folder / "forest.png").exists():
            lines += ["![Primary claims: ours with intervals, and the paper's effects](forest.png)", ""]
    for x in told:
        lines += [markdown(x, level=2), ""]
    smoke = [f"{x['target']} ({x['title']})" for x in best if x not in told]
    if smoke:
        lines += [f"Run at smoke scale only, so no numbers here: {'; '.join(smoke)}.", ""]
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    if readme:
        write_between_markers(Path(readme), folder, headlines)


def write_between_markers(readme, folder, claims):
    """The short table of the front page and the forest plot."""
    text = readme.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS) or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise BadInput(f"{readme} should have the lines {' and '.join(MARKERS)} once, in this order: results "
                       "go between")
    relative = os.path.relpath(folder, readme.parent)
    lines = [MARKERS[0], "<!-- written by: python reproduce.py report -->", ""]
    if claims:
        link = f"[{relative}/README.md]({relative}/README.md)"
        lines += [*claim_rows(claims), "", f"Words, units and intervals: {link}.", ""]
    if claims and (folder / "forest.png").exists():
        lines += [f"![Primary claims: ours with intervals, and the paper's effects]({relative}/forest.png)",
                  ""]
    readme.write_text(text[:text.index(MARKERS[0])] + "\n".join(lines) + text[text.index(MARKERS[1]):])
