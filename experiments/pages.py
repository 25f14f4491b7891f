"""What is written of a finished target, one JSON object, and the page that is made of all of them."""

import itertools
import json
import math
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import plots
from evaluate import exp
from experiments.measures import SCALES, pretrain, read_json, scale_of, with_needs
from experiments.verdicts import (
    EXCLUDED,
    MEANING,
    NOT_MEASURED,
    SUPPORTED,
    UNINFORMATIVE,
    corrected,
    in_words,
    judge,
    says,
)
from util import BadInput, note, plain, write_json, write_text

MARKERS = "<!-- results -->", "<!-- /results -->"

HEADLINES = {  # the rows of the front page: what a reader came for
    "table1": "autoregressive generates better than masked (Table 1)",
    "masked": "masked classifies images better than autoregressive (Sec. 4.1)",
    "dose": "t = 2 classifies images better than t = 1 (Table 3)",
    "table7": "[0.15, 0.3] generates better than 0.3 (Table 7)",
    "table8": "[0.5, 0.75] reconstructs better than 0.5 (Table 8)",
    "variety": "[0.15, 0.3] generates better than 0.225, its mean (Table 7, interpolated)",
    "figure3": "masked loses most after short prefixes (Figure 3)"}

ORIGIN = ("Written by `python reproduce.py report` from the JSON files of this folder, so that no number in "
          "it can differ from what ran.")
CORRECTED = ("One primary claim for each target, or for several that are of the same runs. Verdicts are by "
             "tests at 5%, after Holm's correction over all of these claims, for the tests against 0 and for "
             "those against the paper's effect apart.")
WORDS = ("*Supported*: seen in our models. *Paper's size excluded*: not seen, and so large an effect would "
         "have been.\n*Uninformative*: too little is known. This holds after Holm's correction; intervals "
         "are over seeds and examples.")
LEGEND = ("Differences are positive where the claim holds, in points of a percentage, in dB (PSNR), or as "
          "factors where the quantity has no scale of its own (perplexity, L2). Intervals are over "
          "pretraining seeds and test examples, both the same on both sides (experiments/verdicts.py). Like "
          "the verdicts in the sections below, they are not corrected for the number of claims. Examples "
          "count as independent, though sequences of one novel are not quite (in the author column an "
          "example is a whole novel). Smallest visible: half the interval, the least effect that such a run "
          "would tell from 0. [ours]: the paper does not claim this.")


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
        values = [column.shown(float(np.mean([cell.value for cell in seed]))) for seed in zip(*parts)]
        content[name] = {"paper": table.paper.get(row, {}).get(name), "digits": column.digits,
                         "seeds": values, "mean": float(np.mean(values)) if values else None,
                         "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    seen = {}
    if not model.instead and not model.hub:
        lines = (pretrain(place, model, 0).out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seen = {unit: count for unit, count in json.loads(lines[-1]).items() if unit in ("tokens", "images")}
    return {"row": row, "model": str(model), "cells": content, **seen}


def summarise(place, name, table, seeds):
    """Everything that is known of a finished target, as one JSON object: the page is made from it alone."""
    records = [stage.record() for stage in stages_of(place, table, seeds)]
    run = [f"python reproduce.py {name} --scale {place.name}"]
    run += ["--data-dir DATA"] if place.name != "smoke" else []
    run += [f"--seeds {seeds}"] if table.rows else []
    run += [f"--{budget} {place.scale[budget]:.12g}" for budget in ("tokens", "epochs")
            if place.scale[budget] != scale_of(place.name, name)[budget]]
    where = {str(place.data): "DATA", str(place.work): f"runs/reproduce/{place.name}"}
    cells = read_cells(place, table, seeds)
    content = {
        "target": name, "scale": place.name, "about": place.scale["about"], "title": table.title,
        "fair": table.fair, "seeds": seeds, "rows": [row_of(place, table, row, cells) for row in table.rows],
        "claims": [judge(claim, cells) for claim in table.claims if place.name != "smoke"],
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
        content["text"] = [] if "claims" in found else stage.beside(".log").read_text(
            encoding="utf-8", errors="replace").splitlines()
    return content


# ---------------------------------------------------------------------------- text

def markdown_table(rows):
    """Lists of cells as lines of Markdown, the first list being the header."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def effect_text(value, unit):
    """A difference in its unit; a factor as x1.23."""
    if value is None:
        return "-"
    if unit == "factor":
        return f"x{exp(value):.3f}"
    digits = 2 if unit == "points" else max(0, min(4, 1 - math.floor(math.log10(max(1e-9, abs(value))))))
    return f"{value:+.{digits}f} {unit}".strip()


def claim_rows(claims):
    """Claims as a Markdown table."""
    rows = [["claim", "paper's effect", "ours, 95% interval", "smallest visible", "verdict"]]
    for c in claims:
        name = c.get("short") or "**primary** " * c["primary"] + c["claim"] + " [ours]" * c["ours"]
        ours, visible = effect_text(c["difference"], c["unit"]), "-"
        if c["smallest_visible"] is not None:  # which one seed, or a model that diverged, has not
            low, high = (effect_text(end, c["unit"]).removesuffix(f" {c['unit']}") for end in c["interval"])
            ours, visible = f"{ours} ({low} .. {high})", effect_text(c["smallest_visible"], c["unit"])
        printed = "none printed" if c["effect"] is None else effect_text(c["effect"], c["unit"])
        rows.append([name, printed, ours, visible, in_words(c)])
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
        cells = [["-" if cell["paper"] is None else f"{cell['paper']:.4g}", shown(cell)] if name in printed
                 else [shown(cell)]
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


# ---------------------------------------------------------------------------- in short

SAID = {SUPPORTED: "seen", EXCLUDED: "not seen, and an effect as large as the paper's is excluded",
        UNINFORMATIVE: "open, as this says too little",
        NOT_MEASURED: "not measured, as not all of the models beat what learned nothing"}


def finding(c):
    """What was found of a primary claim, in a sentence."""
    said = "the other way round" if c["verdict"] == EXCLUDED and says(c)[1] else SAID[c["verdict"]]
    where = "" if c["target"] in HEADLINES else f" ({c['title'].split(':')[0]})"
    ours, paper = (effect_text(c[name], c["unit"]) for name in ("difference", "effect"))
    beside = "no number" if c["effect"] is None else paper
    return f"- {c['short']}{where}: **{said}** ({ours} here, {beside} in the paper)"


def tail_findings(reported):
    """What was found of Theorem 4.1 with our Transformer, in sentences."""
    found = [x.get("found", {}).get("results", {}) for x in reported if x["target"] == "bridge"]
    for order in found[0].get("orders", ()) if found else ():
        if order["place"] == "common" and order["blind"] and order["told"]:
            blind, told = ("{:.2f} ({:.2f} .. {:.2f})".format(*order[way]) for way in ("blind", "told"))
            yield (f"- a smaller tail goes with fewer errors (Theorem 4.1, noise {order['eps']:g}): by "
                   f"Spearman's correlation **{blind}** over networks that do not know which position they "
                   f"predict, **{told}** over those that do")


def trend_findings(reported):
    """Where the effect of the trend's primary claim goes, in a sentence."""
    for claims in [x["claims"] for x in reported if x["target"] == "trend"]:
        [slope] = [c for c in claims if c["primary"]]
        if not slope["measured"] or slope["interval"] is None:
            continue
        name = slope["claim"].split(": more")[0]
        last = [c for c in claims if c["at"] and c["claim"].startswith(name)][-1]
        (low, high), gap = slope["interval"], last["effect"] - last["difference"]
        goes = "is not seen to move"
        if not low < 0 < high:
            goes = "moves towards the paper's" if (low > 0) == (gap > 0) else "moves away from the paper's"
        ours, paper, tenfold, low, high = (effect_text(value, "factor") for value in (
            last["difference"], last["effect"], slope["difference"], low, high))
        text = (f"- with more tokens the effect of [0.15, 0.3] against 0.3 **{goes}**: it is {ours} at the "
                f"largest budget ({paper} in the paper) and grows {tenfold} ({low} .. {high}) with every "
                "tenfold of tokens")
        for wide in claims:  # of the same regime
            named = wide["claim"].startswith(name.split(":")[0]) and ": more so than at " in wide["claim"]
            if named and wide["measured"]:
                size, other = wide["claim"].split(", ")[-1].split(": more so than at ")
                ours, low, high = (effect_text(x, "factor") for x in (wide["difference"], *wide["interval"]))
                text += f"; at {size} it is {ours} ({low} .. {high}) of that at {other}"
        yield text


def in_short(reported, primaries, missing):
    """Half a page in plain words: what was run, what was found, what cannot be said."""
    tables, paper = [x for x in reported if x["rows"]], SCALES["paper"]
    trainings = {line for x in tables for line in x["commands"] if line.startswith("python train.py")}
    seen = {unit: max(row.get(unit, 0) for x in tables for row in x["rows"]) for unit in ("tokens", "images")}
    most = " or ".join(f"{count:,} {unit}" for unit, count in seen.items() if count)
    seeds, scales = (sorted({str(x[name]) for x in tables}) for name in ("seeds", "scale"))
    run = (f"**What was run.** {len(trainings)} models were pretrained at {' and '.join(scales)} scale, "
           f"{' or '.join(seeds)} seeds of every kind, each on at most {most}, and measured for "
           f"{len(tables)} tables and figures of the paper and questions beside them.")
    theory = [c for x in reported for c in x.get("printed_and_computed") or ()
              if c["printed"] and not c["claim"].startswith("new")]
    if theory:
        hold = sum(c["verdict"].startswith("holds") for c in theory)
        run += (f" Of the theory, {len(theory)} printed statements were computed on the paper's toy model: "
                f"{hold} hold as printed, the others as corrected below.")
    limits = ("**What cannot be said.** These models are small and read little; the paper's read up to "
              f"{paper['tokens'] / 1e9:.0f} billion tokens, or ImageNet {paper['epochs']} times. What is "
              "excluded is an effect of the paper's size in models like ours, not in the paper's. All "
              "objectives have the same settings, and other settings may order them in another way. What is "
              "uninformative is not absent: anything below the column *smallest visible* would have gone "
              "unseen. Where models do not beat what learned nothing, their difference tells of no "
              "pretraining, however large it is.")
    if missing:
        limits += f" Of {', '.join(missing)} nothing is known, as they did not run."
    found = [*(finding(c) for c in primaries if c["target"] != "trend"), *trend_findings(reported),
             *tail_findings(reported)]
    return [run, "", "**What was found.**", "", *found, "", limits, ""]


# ---------------------------------------------------------------------------- files

def write_results(place, name, table, seeds, folder):
    """Write NAME-SCALE.json and, with matplotlib, .png into the folder -> the target as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    content, picture = plain(summarise(place, name, table, seeds)), folder / f"{name}-{place.name}.png"
    drawn = [Path(word) for stage in table.extra for word in stage.argv if word.endswith(".png")]
    if drawn and drawn[0].exists():
        shutil.copyfile(drawn[0], f"{picture}.partial")
        os.replace(f"{picture}.partial", picture)
    elif find_spec("matplotlib") and table.picture:
        column = next(iter(table.columns.values()))
        table.picture(picture, {row: stages[0].result() for row, model in table.rows.items()
                                if (stages := column.stages(place, model, 0))})
    elif find_spec("matplotlib") and (placed := [c for c in content["claims"] if c["at"]]):
        plots.trend(picture, placed)
    elif find_spec("matplotlib") and table.rows:
        rows = [{**row, "cells": {name: cell if cell["mean"] is not None else {**cell, "seeds": []}
                                  for name, cell in row["cells"].items()}} for row in content["rows"]]
        plots.dots(picture, {**content, "rows": rows})  # a model that diverged in one seed has no dots
    content["picture"] = picture.name if picture.exists() else None
    write_json(picture.with_suffix(".json"), content)
    return markdown(content)


def write_report(folder, targets, readme=None):
    """Write FOLDER/README.md with every target at its largest scale, and the verdicts on the primary claims
    between the markers of the file `readme`."""
    scales, largest = list(SCALES), {}
    for path in sorted(folder.glob("*.json")):
        x = read_json(path)
        if not isinstance(x, dict) or not {"target", "scale"} <= x.keys():
            note(f"{path} is no whole result; left out")
        elif x["scale"] == "smoke" and x["rows"]:
            continue  # its numbers mean nothing
        elif scales.index(x["scale"]) >= scales.index(largest.get(x["target"], x)["scale"]):
            largest[x["target"]] = x
    reported = [largest[name] for name in targets if name in largest]
    if not reported:
        raise BadInput(f"{folder} holds no results; make some: python reproduce.py theory --out {folder}")
    primaries = [{**claim, "target": x["target"], "title": x["title"],
                  "short": HEADLINES.get(x["target"], claim["claim"])}
                 for x in reported for claim in x["claims"] if claim["primary"]]
    primaries = corrected(primaries)
    headlines = [claim for name in HEADLINES for claim in primaries if claim["target"] == name]
    drawn = [{**c, "verdict": in_words(c)} for c in headlines if c["difference"] is not None]
    if drawn and find_spec("matplotlib"):
        plots.forest(folder / "forest.png", drawn)
    forest = "![Primary claims: ours with intervals, and the paper's effects](forest.png)\n"
    forest *= (folder / "forest.png").exists()
    lines = ["# Results", "", ORIGIN, ""]
    if primaries:
        lines += in_short(reported, primaries, [name for name in targets if name not in largest])
        meaning = [f"- *{word}*: {text}." for word, text in MEANING.items()]
        lines += [CORRECTED, "", *claim_rows(primaries), *meaning, "", LEGEND, "", forest]
    for x in reported:
        lines += [markdown(x, level=2)]
    write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")
    if readme:
        relative = os.path.relpath(folder, Path(readme).parent)
        link = f"{WORDS} More on [{relative}/README.md]({relative}/README.md).\n"
        lines = [*claim_rows(headlines), link] if headlines else []
        write_between_markers(Path(readme), lines)


def write_between_markers(readme, lines):
    text = readme.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in MARKERS) or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise BadInput(f"{readme} should have the lines {' and '.join(MARKERS)} once, in this order")
    lines = [MARKERS[0], "<!-- written by: python reproduce.py report -->", "", *lines]
    write_text(readme, text[:text.index(MARKERS[0])] + "\n".join(lines) + text[text.index(MARKERS[1]):])
