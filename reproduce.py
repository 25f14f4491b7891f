"""Every table and figure of the paper with one command, the paper's numbers beside ours, and a verdict on each claim.

    python reproduce.py table7 --scale smoke                              proves the pipeline: minutes, nothing to download
    python reproduce.py table7 --scale cpu --data-dir DIR --seeds 3       hours on two cores, on your data
    python reproduce.py all --scale gpu --data-dir DIR --minutes 55       one GPU; no stage takes 8 minutes, run again to go on
    python reproduce.py all --scale paper --list                          what it takes: data, hours, memory
    python reproduce.py table7 --scale paper --data-dir DIR --dry-run     the exact commands
    python reproduce.py report                                            the results section of README.md, from results/*.json

A target (tables.py) is a table: its rows are models, its columns measures, and each cell comes from stages. A stage is one
command line of train.py, evaluate.py, spectral.py or data.py. Tables share stages, what is there is not computed again, and
an interrupted training goes on. DIR holds, as far as the targets need it:

    text/    raw text or a token folder of data.py     images/      class folders, CIFAR files or an image folder of data.py
    glue/    the official GLUE files                   transfer/    any number of image sets (optional; Table 6)
    other/   text of another kind (optional; Table 7)  paper scale: also images100/ (ImageNet-100), wikitext2/

Verdicts. A claim is a difference that the paper says is positive; [ours] are comparisons that it does not make, under its
ideas. The 95% interval is a bootstrap over seeds, the same seeds on both sides and their spread widened as Student's t is for so
few, and over the evaluation: over its samples, the same on both sides, where the command tells of each, else by the standard
errors of both sides as if they were independent, which is cautious. One seed says nothing about how seeds vary. Above 0:
confirmed at this scale. With 0 inside: not seen at this scale. Below 0: contradicted at this scale. Intervals are not
corrected for the number of claims, and where there is none, nothing is judged.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from engine.runs import load_checkpoint
from engine.settings import Settings
from experiments.tables import SCALES, TARGETS, Cell, Place, matplotlib, pretrain
from support.cli import BadInput, Parser, command_line, import_optional, positive, write_json
from train import parse

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% quantiles, from 1 degree of freedom


HERE = Path(__file__).resolve().parent


MARKERS = "<!-- results -->", "<!-- /results -->"


CONFIRMED, NOT_SEEN, CONTRADICTED = (f"{word} at this scale" for word in ("confirmed", "not seen", "contradicted"))


NOT_JUDGED = "no interval, not judged"


# ---------------------------------------------------------------------------- stages

def with_needs(stages):
    """These stages and all that they need, each once, in an order in which they can run."""
    found = {}
    for stage in stages:
        for one in (*with_needs(stage.needs), stage):
            found.setdefault(one.out, one)
    return list(found.values())


def finished(stage):
    """Whether the result of a stage is there: with its record, or whole without it (adopted, or cut off at the very end)."""
    if stage.record().exists() and stage.out.exists():
        return True
    seconds = None
    if stage.argv[0] == "train.py" and (stage.out / "ckpt.pt").exists() and (stage.out / "config.json").exists():
        content = load_checkpoint(stage.out)
        if content["step"] >= json.loads((stage.out / "config.json").read_text())["steps"]:
            seconds = content["seconds"]
    elif stage.argv[0] == "data.py" and (stage.out / "manifest.json").exists():
        seconds = 0.0
    if seconds is not None:
        write_record(stage, seconds, "not recorded", None)
    return seconds is not None


def write_record(stage, seconds, machine, code):
    write_json(stage.record(), {"command": readable(stage.line()), "seconds": seconds, "hardware": machine, "code": code})


def adopt(stage, parent):
    """If a run folder inside `parent` has the settings of this training stage and all its steps, link to it."""
    if stage.argv[0] != "train.py" or stage.out.exists():
        return
    wanted = settings_of(asdict(parse(stage.argv[1:])[0]))
    for config in sorted(Path(parent).glob("*/config.json")):
        with contextlib.suppress(BadInput, TypeError, ValueError):  # a run of another version or kind
            if settings_of(json.loads(config.read_text())) == wanted:
                stage.out.parent.mkdir(parents=True, exist_ok=True)
                stage.out.symlink_to(config.parent.resolve())
                if finished(stage):
                    return
                stage.out.unlink()


def settings_of(saved):
    """A run's settings so that equal ones compare equal, whoever wrote them."""
    known = {f.name for f in fields(Settings)} - ({"steps"} if saved["epochs"] else set())
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items() if name in known}
    if given["objective"] == "dar" and given["t"] == 1:
        given.update(objective="ar", t=None, streams=2)  # the same f in the same architecture
    return Settings(**{**given, "data": str(Path(given["data"]).resolve())})


def run(stage):
    """Run a stage in a process of its own. Its progress goes to standard error, its tables to a .log file."""
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    program, *rest = command(stage)
    line, start = [sys.executable, str(HERE / program), *rest], time.perf_counter()
    with open(f"{stage.out}.log", "a") as log, subprocess.Popen(line, stdout=log) as child:
        while (status := child.poll()) is None:
            with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the stage as well: let it save
                child.wait()
    if status == 130:
        raise KeyboardInterrupt
    if status or not stage.out.exists():
        raise BadInput(f"a stage ended with exit status {status}, see above: {readable(command(stage))}. Once that is "
                       "mended, the same command goes on from here")
    seconds = load_checkpoint(stage.out)["seconds"] if stage.argv[0] == "train.py" else time.perf_counter() - start
    write_record(stage, seconds, hardware(), code_version())


def command(stage):
    """The line that brings a stage's result about; a training that was interrupted goes on."""
    resumed = stage.argv[0] == "train.py" and (stage.out / "ckpt.pt").exists()
    return ("train.py", "--resume", "--out", str(stage.out), "--no-report") if resumed else stage.line()


def readable(argv):
    """A stage's line as one types it in this folder."""
    return shlex.join(["python", os.path.relpath(HERE / argv[0]), *argv[1:]])


def hardware():
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------- results and verdicts

def stages_of(place, table, seeds):
    """All stages of a target, in order, cell by cell within each seed so that the first seed is complete first."""
    cells = [table.stage(place, row, column, seed) for seed in range(seeds) for row in table.rows for column in table.columns]
    return with_needs([*(stage for stage in cells if stage), *table.extra])


def read_cells(place, table, seeds):
    """{(row, column): one Cell for each seed}."""
    cells = {}
    for row in table.rows:
        for column, measure in table.columns.items():
            if measure.mean_of:
                parts = list(zip(*(cells[row, name] for name in measure.mean_of)))
                cells[row, column] = [Cell(fmean(c.value for c in part), math.hypot(*(c.stderr for c in part)) / len(part)
                                           if all(c.stderr is not None for c in part) else None) for part in parts]
            elif table.stage(place, row, column, 0):
                found = [table.stage(place, row, column, seed).result() for seed in range(seeds)]
                cells[row, column] = [measure.read(x) for x in found]
    return cells


def redraw(cells, draws, rng):
    """Bootstrap: {(row, column): (draws,) values}. The evaluation is drawn anew: samples, where cells have them, with
    replacement and the same for all cells and seeds, else a normal error of the cell's own. Then seeds are drawn with
    replacement, the same for all cells."""
    seeds = len(next(iter(cells.values())))
    picked = rng.integers(seeds, size=(draws, seeds))
    # The mean of n drawn of n varies by the share sqrt((n - 1)/n) too little, and a normal interval is not yet Student's.
    wide = 1 if seeds == 1 else (STUDENT[seeds - 2] if seeds <= 10 else 1.96) / 1.96 * math.sqrt(seeds / (seeds - 1))
    shares, drawn = {}, {}
    for key, column in cells.items():
        values, samples = np.array([cell.value for cell in column]), column[0].samples
        if samples:
            n = len(samples)
            if n not in shares:  # how often each sample is drawn, (draws, n)
                shares[n] = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
            centre = np.vectorize(column[0].link)(shares[n] @ np.array([cell.samples for cell in column]).T).mean(1)
        else:  # one test set for all seeds
            centre = values.mean() + np.mean([cell.stderr or 0 for cell in column]) * rng.standard_normal(draws)
        drawn[key] = centre + wide * (values[picked].mean(1) - values.mean())
    return drawn


def judge(claim, cells, draws=2000):
    """A claim's difference, its 95% interval (None where nothing varies), and the verdict."""
    rng = np.random.default_rng(0)
    means = {key: fmean(cell.value for cell in column) for key, column in cells.items()}
    gap, drawn, gaps = float(claim.gap(means, *[claim.rows] * bool(claim.rows))), redraw(cells, draws, rng), []
    for k in range(draws):
        rows = [rng.choice(claim.rows, len(claim.rows))] if claim.rows else []
        gaps.append(claim.gap({key: x[k] for key, x in drawn.items()}, *rows))
    interval = np.percentile(gaps, [2.5, 97.5]).tolist() if np.ptp(gaps) > 1e-12 else None
    verdict = NOT_JUDGED
    if interval:
        verdict = CONFIRMED if interval[0] > 0 else CONTRADICTED if interval[1] < 0 else NOT_SEEN
    return {"claim": claim.text + " [ours]" * claim.ours, "difference": gap, "interval": interval, "verdict": verdict}


def intervals_are_over(cells, claims):
    """What varies in the bootstrap, in words."""
    columns = list(cells.values())
    seeds, samples = len(columns[0]), [bool(column[0].samples) for column in columns]
    words = [f"{seeds} seeds, the same on both sides, widened for so few"] if seeds > 1 else []
    words += ["evaluation samples, the same on both sides"] * any(samples)
    if any(cell.stderr for column in columns for cell in column if not cell.samples):
        words += ["standard errors of the evaluation, taken as independent"]
    words += ["objectives"] * any(claim.rows for claim in claims)
    return ("; ".join(words) or "nothing") + (". One seed: nothing is known about how seeds vary" if seeds == 1 else "")


def seen(place, model, seed):
    """{tokens or images: how many} its training read."""
    lines = map(json.loads, (pretrain(place, model, seed).out / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "seconds" in line][-1]
    return {unit: last[unit] for unit in ("tokens", "images") if unit in last}


def summarise(place, name, table, seeds):
    """Everything that is known of a finished target, as one JSON object: the tables and README are made from it alone."""
    stages = stages_of(place, table, seeds)
    records = [json.loads(stage.record().read_text()) for stage in stages]
    content = {
        "target": name, "scale": place.name, "about": place.scale.about, "title": table.title, "fair": table.fair,
        "seeds": seeds, "rows": [], "claims": [], "wall_seconds": sum(record["seconds"] for record in records),
        "hardware": sorted({record["hardware"] for record in records}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "code": ", ".join(sorted({record.get("code") or "not recorded" for record in records}))},
        "run": f"python reproduce.py {name} --scale {place.name}" + " --data-dir DATA" * (place.name != "smoke")
               + f" --seeds {seeds}" * bool(table.rows),
        "commands": [record["command"].replace(str(place.data), "DATA").replace(str(place.work), f"runs/reproduce/{place.name}")
                     for record in records]}
    if table.rows:
        cells = read_cells(place, table, seeds)
        for row, model in table.rows.items():
            own = {}
            for column, measure in table.columns.items():
                values = [cell.value for cell in cells.get((row, column), [])]
                own[column] = {"paper": table.paper.get(row, {}).get(column), "digits": measure.digits, "seeds": values,
                               "mean": fmean(values) if values else None, "std": stdev(values) if len(values) > 1 else None,
                               "stderr": cells[row, column][0].stderr if len(values) == 1 else None}
            content["rows"].append({"row": row, "model": model, "cells": own,
                                    **({} if model.startswith("hf:") else seen(place, model, 0))})
        content["claims"] = [judge(claim, cells) for claim in table.claims]
        content["intervals_are_over"] = intervals_are_over(cells, table.claims)
    elif name == "theory":
        content["printed_and_computed"] = table.extra[0].result()["claims"]
    return content


def code_version():
    """The commit, where the code is in a git repository, and whether it was changed since."""
    def git(*line):
        return subprocess.run(["git", "-C", HERE, *line], capture_output=True, text=True, check=False)

    with contextlib.suppress(OSError):
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        return commit and commit + "-changed" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode)


# ---------------------------------------------------------------------------- what is shown

def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def shown(cell):
    """A cell of the tables: mean over seeds and its spread, or one seed and its standard error."""
    text = number(cell["mean"], cell["digits"])
    if cell["std"] is not None:
        return f"{text} ± {number(cell['std'], cell['digits'])}"
    return text + (f" (s.e. {number(cell['stderr'], cell['digits'])})" if cell["stderr"] is not None else "")


def rows_of(table):
    """Lists of cells as lines of Markdown, the first list being the header."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def interval_text(claim):
    """A claim's interval as text, with as many digits as it needs."""
    if not claim["interval"]:
        return "none"
    digits = max(0, min(4, 2 - math.floor(math.log10(max(1e-9, *map(abs, claim["interval"]))))))
    while digits < 6 and any(x and not round(x, digits) for x in claim["interval"]):
        digits += 1  # a bound that is not 0 should not look like it
    return "{:+.{d}f} .. {:+.{d}f}".format(*claim["interval"], d=digits)


def rows_beside_paper(x):
    """A target's rows, the paper's numbers beside ours where it has some, as lines of Markdown."""
    columns = list(x["rows"][0]["cells"])
    printed = [c for c in columns if any(row["cells"][c]["paper"] is not None for row in x["rows"])]
    table = [["", *(head for c in columns for head in ([f"{c}, paper", f"{c}, here"] if c in printed else [c])), "seen"]]
    for row in x["rows"]:
        texts = []
        for c in columns:
            cell = row["cells"][c]
            texts += [cell["paper"] or "-", shown(cell)] if c in printed else [shown(cell)]
        table.append([row["row"], *texts, next((f"{row[u]:,} {u}" for u in ("tokens", "images") if u in row), "-")])
    return [*rows_of(table), ""]


def markdown(x):
    """The .md of a target from its JSON alone."""
    lines = [f"### {x['title']}" + f" ({x['scale']} scale)" * bool(x["rows"]), ""]
    if x["scale"] == "smoke" and x["rows"]:
        lines += ["**Smoke scale proves that the pipeline runs. Its numbers mean nothing.**", ""]
    if x["rows"]:
        lines += rows_beside_paper(x)
    if x["claims"]:
        lines += rows_of([["claim", "difference", "95% interval", "verdict"],
                          *([c["claim"], f"{c['difference']:+.3g}", interval_text(c), c["verdict"]] for c in x["claims"])])
        lines += ["", f"Differences are positive where the claim holds. Intervals are over: {x['intervals_are_over']}."]
    if "printed_and_computed" in x:
        columns = ["claim", "printed", "computed", "verdict"]
        lines += rows_of([columns, *([c[name] for name in columns] for c in x["printed_and_computed"])])
    spread = "± is the standard deviation over seeds. " if x["seeds"] > 1 and x["rows"] else ""
    lines += ["", f"{x['fair']} {spread}" + f"Scale: {x['about']}." if x["rows"] else x["fair"], "",
              f"`{x['run']}`: {duration(x['wall_seconds'])} on {', '.join(x['hardware'])}; torch {x['versions']['torch']}"
              + f", code {x['versions']['code']}."]
    if x.get("picture"):
        lines += ["", f"![{x['title']}]({x['picture']})"]
    return "\n".join(lines) + "\n"


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def dots(content, path):
    """Every seed of every row, one panel for each column."""
    columns = list(content["rows"][0]["cells"])
    size = 2 + 2.2 * len(columns), 1 + 0.4 * len(content["rows"])
    figure, panels = import_optional("matplotlib.pyplot").subplots(1, len(columns), figsize=size, layout="constrained",
                                                                   sharey=True, squeeze=False)
    for panel, column in zip(panels[0], columns):
        for y, row in enumerate(content["rows"]):
            cell = row["cells"][column]
            panel.plot(cell["seeds"], [y] * len(cell["seeds"]), "o", color="C0", alpha=0.5)
            if cell["mean"] is not None:
                panel.errorbar(cell["mean"], y, xerr=cell["std"] or cell["stderr"], fmt="k|", markersize=14)
        panel.set(xlabel=column, ylim=(len(content["rows"]) - 0.5, -0.5))
    panels[0, 0].set_yticks(range(len(content["rows"])), [row["row"] for row in content["rows"]])
    figure.savefig(path, dpi=150)


def write_results(place, name, table, seeds, folder):
    """NAME-SCALE.json, .md and, with matplotlib, .png in the folder -> the content of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    content, path = summarise(place, name, table, seeds), folder / f"{name}-{place.name}"
    picture = Path(f"{path}.png")
    picture.unlink(missing_ok=True)
    drawn = [Path(arg) for stage in table.extra for arg in stage.argv if arg.endswith(".png")]
    if drawn and drawn[0].exists():
        shutil.copyfile(drawn[0], picture)
    elif matplotlib() and table.picture:
        table.picture(place, seeds, content, picture)
    elif matplotlib() and table.rows:
        dots(content, picture)
    else:
        print("note: no picture without matplotlib (pip install matplotlib)", file=sys.stderr)
    content["picture"] = picture.name if picture.exists() else None
    write_json(f"{path}.json", content)
    path.with_name(path.name + ".md").write_text(markdown(content))
    return content


def report(readme, folder):
    """Write the part of `readme` between the two markers anew from the JSON files in `folder`: verdicts and tables."""
    text = Path(readme).read_text()
    if any(text.count(marker) != 1 for marker in MARKERS) or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise BadInput(f"{readme} should have the lines {' and '.join(MARKERS)} once, in this order: results go between")
    found = {}
    for path in sorted(folder.glob("*.json")):
        x = json.loads(path.read_text())
        found.setdefault(x["target"], {})[x["scale"]] = x
    if not found:
        raise BadInput(f"{folder} holds no results; make some with: python reproduce.py theory --scale smoke")
    best = [found[name][max(found[name], key=list(SCALES).index)] for name in TARGETS if name in found]
    told = [x for x in best if x["scale"] != "smoke" or not x["rows"]]
    relative = os.path.relpath(folder, Path(readme).parent)
    lines = [MARKERS[0], "<!-- made by: python reproduce.py report -->", ""]
    claims = [[f"[{x['target']}]({relative}/{x['target']}-{x['scale']}.md)", c["claim"], f"{c['difference']:+.3g}", interval_text(c), c["verdict"],
               x["scale"], x["seeds"]] for x in told for c in x["claims"]]
    if claims:
        lines += rows_of([["", "claim", "difference", "95% interval", "verdict", "scale", "seeds"], *claims])
        legend = ("Differences are positive where the claim holds; [ours] marks what the paper does not claim. With one seed the interval is "
                  "of the evaluation alone: another training may give another verdict. Intervals are not corrected for the number of "
                  "claims. Below, ± is the standard deviation over seeds and s.e., of one seed, the standard error of the evaluation.")
        lines += ["", legend, ""]
    lines += ["<details><summary>The tables</summary>", "",
              *(f"{scale} scale: {about}.\n" for scale, about in sorted({x["scale"]: x["about"] for x in told if x["rows"]}.items()))]
    for x in told:
        lines += [f"### {x['title']}", "", *(rows_beside_paper(x) if x["rows"] else [])]
        file = f"{x['target']}-{x['scale']}.md"
        about = (f"{x['fair']} {x['scale']} scale, {x['seeds']} {'seed' if x['seeds'] == 1 else 'seeds'}. Hardware and time: "
                 if x["rows"] else "Every statement as it is printed and as it is computed: ")
        lines += [f"{about}[{file}]({relative}/{file}).", ""]
    lines += ["</details>", ""]
    smoke = [f"[{x['target']}]({relative}/{x['target']}-{x['scale']}.md) ({x['title']})" for x in best if x not in told]
    if smoke:
        lines += [f"Run at smoke scale only, so no numbers here: {'; '.join(smoke)}.", ""]
    start, end = text.index(MARKERS[0]), text.index(MARKERS[1])
    Path(readme).write_text(text[:start] + "\n".join(lines) + text[end:])


# ---------------------------------------------------------------------------- command line

def estimate(place, stages):
    """{out: seconds} that the stages take, from their FLOPs and from what finished stages of the same program took."""
    guess = {stage.out: 10 + stage.flops / place.scale.flops for stage in stages}
    took, guessed = Counter(), Counter()
    for stage in stages:
        if stage.record().exists():
            took[stage.argv[0]] += json.loads(stage.record().read_text())["seconds"]
            guessed[stage.argv[0]] += guess[stage.out]
    rate = {program: took[program] / guessed[program] for program in took}
    return {stage.out: guess[stage.out] * rate.get(stage.argv[0], 1) for stage in stages}


def data_of(place, stages):
    """What the stages read from outside: paths in --data-dir, and names on the Hugging Face hub."""
    return sorted({arg for stage in stages for arg in stage.argv if arg.startswith((f"{place.data}{os.sep}", "hf:"))})


def missing(place, stages):
    """Paths in --data-dir that the stages read and that are not there."""
    return [path for path in data_of(place, stages) if not path.startswith("hf:") and not Path(path).exists()]


def show_list(scales, names, args):
    """What every target takes at each scale."""
    for scale in scales:
        place = place_of(scale, args)
        print(f"\n{scale}: {place.scale.about}\n{'':16s} seeds  stages   done     to go   longest   memory   data")
        plans = {name: stages_of(place, TARGETS[name](place), seeds_of(place, name, args)) for name in names}
        if len(names) > 1:
            plans["all together"] = with_needs(itertools.chain.from_iterable(plans.values()))
        for name, stages in plans.items():
            seeds = seeds_of(place, name, args) if name in TARGETS else ""
            seconds, done = estimate(place, stages), {stage.out for stage in stages if stage.record().exists()}
            to_go, longest = sum(s for out, s in seconds.items() if out not in done), max(seconds.values())
            memory = max(1, max(stage.memory for stage in stages) / 1e9)
            data = [x if x.startswith("hf:") else os.path.relpath(x) for x in data_of(place, stages)]
            print(f"{name:16s} {seeds:>5} {len(stages):7d} {len(done):6d} {duration(to_go):>9s} {duration(longest):>9s} "
                  f"{memory:5.0f} GB   {', '.join(data) or 'nothing'}")


def place_of(scale, args):
    return Place(scale, Path(os.path.abspath(args.data_dir or "DATA")), args.work or Path("runs", "reproduce", scale))


def seeds_of(place, name, args):
    if name == "theory" or (name, place.name) == ("table1", "paper"):  # public models, of which there is one each
        return 1
    return args.seeds or (3 if name in place.scale.many else place.scale.seeds)


def carry_out(place, names, args):
    """Run what is missing of the targets and write their results. Returns the exit status."""
    tables, left = {name: TARGETS[name](place) for name in names}, []
    plans = {name: stages_of(place, tables[name], seeds_of(place, name, args)) for name in names}
    for name in list(plans):
        if lacking := missing(place, plans[name]):
            text = f"{name} at {place.name} scale reads {', '.join(lacking)}, which is not there" + (
                "" if args.data_dir else "; give the folder that holds it as --data-dir DIR")
            if len(names) == 1:
                raise BadInput(text)
            print(f"note: {text}; left out", file=sys.stderr)
            left.append(name)
            del plans[name]
    everything = with_needs(itertools.chain.from_iterable(plans.values()))
    for stage in everything if args.adopt else ():
        adopt(stage, args.adopt)
    waiting, start, ran = {stage.out for stage in everything if not finished(stage)}, time.perf_counter(), 0
    total = len(waiting)
    for name, stages in plans.items():
        for stage in stages:
            if stage.out not in waiting:
                continue
            seconds = estimate(place, everything)
            to_go = sum(seconds[out] for out in waiting)
            if args.minutes and ran and time.perf_counter() - start + seconds[stage.out] > 60 * args.minutes:
                print(f"the next stage would not be done after {args.minutes:g} minutes; {len(waiting)} stages, about "
                      f"{duration(to_go)}, are left: the same command goes on", file=sys.stderr)
                return 1
            place_in_line = f"[{total - len(waiting) + 1}/{total}, about {duration(to_go)} to go]"
            print(place_in_line, readable(command(stage)), file=sys.stderr)
            run(stage)
            waiting.discard(stage.out)
            ran += 1
        print(markdown(write_results(place, name, tables[name], seeds_of(place, name, args), args.results)))
    return int(bool(left))


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=(*TARGETS, "all", "report"), nargs="?", default="all")
    parser.add_argument("--scale", choices=SCALES, help="smoke, cpu, gpu or paper (default: smoke; --list: every one)")
    parser.add_argument("--seeds", type=positive, help="pretraining runs of each model (default: see --list)")
    parser.add_argument("--data-dir", help="folder of text/, glue/, images/ and what else the target needs")
    parser.add_argument("--list", action="store_true", help="show what each target takes: stages, hours, memory, data")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the stages that are not done")
    parser.add_argument("--minutes", type=float, help="begin no stage that would end later than that; the next call goes on")
    parser.add_argument("--adopt", metavar="DIR", help="use finished run folders inside DIR that have the settings of a stage")
    parser.add_argument("--work", type=Path, help="folder of the stages' results (default: runs/reproduce/SCALE)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the tables")
    parser.add_argument("--readme", default="README.md", help="report: the file to write into")
    args = parser.parse_args(argv)
    if args.target == "report":
        return report(args.readme, args.results)
    names = list(TARGETS) if args.target == "all" else [args.target]
    if args.list:
        return show_list([args.scale] if args.scale else SCALES, names, args)
    scale = args.scale or "smoke"
    if args.data_dir and not Path(args.data_dir).is_dir():
        raise BadInput(f"--data-dir {args.data_dir} is not a folder")
    place = place_of(scale, args)
    if args.dry_run:
        stages = with_needs([s for name in names for s in stages_of(place, TARGETS[name](place), seeds_of(place, name, args))])
        print("\n".join(readable(command(stage)) for stage in stages if not finished(stage)))
        return 0
    return carry_out(place, names, args)


if __name__ == "__main__":
    command_line(main)
