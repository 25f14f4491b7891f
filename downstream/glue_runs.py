"""The GLUE benchmark: every task with every seed, so that what was computed once is not computed again.

    python evaluate.py glue CKPT --glue-dir DIR --tasks cola,rte --seeds 3 --submit submissions
"""

import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from downstream import glue
from downstream.encoding import tokenize
from downstream.finetune import (
    PLAIN,
    Protocol,
    dev_examples,
    fine_tune_once,
    over_seeds,
    tell_figures,
    tokenize_dataset,
)
from downstream.labelled import glue_dataset
from engine.runs import Run
from support.cli import BadInput
from support.kernels import compute_dtype


@dataclass(frozen=True)
class GlueRun:
    """What to compute, and where it goes."""

    run: Run
    glue_dir: str
    seeds: int                # runs per task, of seeds 0 .. seeds - 1
    protocol: Protocol
    autocast: object = PLAIN
    max_train: int = None     # use that many of the training examples, at random
    submit: str = None        # folder for test predictions: seed0/CoLA.tsv .., seed0.zip for the GLUE server
    results_file: str = None  # JSON of all that was ever computed, by settings, weights and checksums
    quiet: bool = True


def run_glue(todo, tasks):
    """Fine-tune on every task with every seed and score the dev part -> dict of results."""
    tests = submission_files(tasks, todo.submit)
    check_files(todo, tasks)
    with todo.autocast:
        precision = str(compute_dtype(next(todo.run.model.parameters()))).removeprefix("torch.")
    made_by = {"weights": fingerprint(todo.run.model), **asdict(todo.protocol), "precision": precision}
    results = {name: run_task(todo, name, files, made_by) for name, files in tests.items()}
    means = {name: {metric: value["mean"] for metric, value in result.items() if isinstance(value, dict)}
             for name, result in results.items()}
    row, average = glue.average_row(means)
    content = {"split": "dev", "tasks": results, "table2": row, "average": average}
    if todo.submit:
        rows = {}
        for files in tests.values():
            for file, (task, test) in files.items():
                rows[file] = len(glue.read_task(todo.glue_dir, task, test).texts)
        content["submissions"] = [str(glue.pack(Path(todo.submit, f"seed{k}"), rows))
                                  for k in range(todo.seeds)]
        wanted = [file for name in glue.TASKS for file in glue.server_files(name)]
        content["not_in_submission"] = [file for file in wanted if file not in rows]
    return content


def run_task(todo, name, files, made_by):
    """One task with every seed -> what run_glue reports of it. `files`: {file for the server: (task, test
    file)}."""
    dataset = glue_dataset(todo.glue_dir, name)
    dataset = replace(dataset, train=dataset.train.at_most(todo.max_train))
    sizes = {"train": len(dataset.train.labels),
             "dev": sum(len(part.labels) for part in dataset.dev.values())}
    read = {"train.tsv", *(dev for _, dev, _ in glue.TASKS[name].parts)}
    sources = {file: checksum(glue.find_file(todo.glue_dir, name, file)) for file in sorted(read)}
    sources |= {test: checksum(glue.find_file(todo.glue_dir, task, test)) for task, test in files.values()}
    inputs, entries, reused = {}, [], 0
    for k in range(todo.seeds):
        key = {"task": name, "seed": k, **sizes, "files": {file: sources[file] for file in sorted(read)},
               **made_by}
        folder = Path(todo.submit or ".", f"seed{k}")
        entry = next((entry for entry in read_results(todo.results_file) if entry["key"] == key), None)
        if entry and all(entry["submitted"].get(file) == [sources[test], checksum(folder / file)]
                         for file, (_, test) in files.items()):
            reused += 1
        else:
            inputs = inputs or tokenize_dataset(todo.run, dataset, todo.quiet)
            outcome = fine_tune_once(todo.run, dataset, inputs, todo.protocol, k, todo.autocast, todo.quiet)
            submitted = {}
            for file, (task, test) in files.items():
                texts = glue.read_task(todo.glue_dir, task, test).texts
                predicted = outcome.predict(tokenize(todo.run, texts, todo.quiet))
                glue.write_predictions(folder / file, task, predicted)
                submitted[file] = [sources[test], checksum(folder / file)]
            predicted = {suffix: values.tolist() for suffix, values in outcome.predicted.items()}
            entry = {"key": key, "scores": outcome.scores, "figures": outcome.figures, "predicted": predicted,
                     "submitted": submitted}
            add_result(todo.results_file, entry)
            if not todo.quiet:
                scores = ", ".join(f"{metric} {100 * score:.1f}" for metric, score in outcome.scores.items())
                tqdm.write(f"{name} seed {k}: {scores}  ({tell_figures(outcome.figures)})", file=sys.stderr)
        entries.append(entry)
    if reused and not todo.quiet:
        tqdm.write(f"note: {reused} of {todo.seeds} seeds of {name} were in {todo.results_file} already",
                   file=sys.stderr)
    predicted = {suffix: [np.array(entry["predicted"][suffix]) for entry in entries]
                 for suffix in dataset.dev}
    scores = {metric: over_seeds([entry["scores"][metric] for entry in entries])
              for metric in entries[0]["scores"]}
    return {**sizes, "skipped": dataset.skipped, "figures": [entry["figures"] for entry in entries], **scores,
            **dev_examples(dataset, predicted)}


def submission_files(tasks, submit):
    """What to predict with the model of each task: {task: {file for the server: (task of the texts, test
    file)}}."""
    if "ax" in tasks and not (submit and "mnli" in tasks):
        raise BadInput("ax has no public labels and no training part: the mnli model predicts it, with "
                       "--submit DIR and mnli among the --tasks")
    found = {name: {} for name in tasks if name != "ax"}
    for name in tasks if submit else ():
        by = "mnli" if name == "ax" else name
        found[by].update({file: (name, test) for file, test in glue.server_files(name).items()})
    return found


def check_files(todo, tasks):
    """Raise BadInput where anything is missing: better now than after hours."""
    if not Path(todo.glue_dir).is_dir():
        raise BadInput(f"--glue-dir {todo.glue_dir} is not a folder; the files are at {glue.ADDRESS}")
    if todo.results_file and not Path(todo.results_file).absolute().parent.is_dir():
        raise BadInput(f"--results {todo.results_file}: there is no such folder")
    for name in tasks:
        if name != "ax":
            glue.find_file(todo.glue_dir, name, "train.tsv")
        for _, dev, test in glue.TASKS[name].parts:
            for file in (dev, test if todo.submit else None):
                if file:
                    glue.find_file(todo.glue_dir, name, file)


# ---------------------------------------------------------------------------- the results file

def fingerprint(model):
    """A checksum of all weights."""
    crc = 0
    for parameter in model.parameters():
        crc = zlib.crc32(parameter.detach().cpu().flatten().view(torch.uint8).numpy(), crc)
    return crc


def checksum(path):
    """That of a file; None where it is not there."""
    return zlib.crc32(path.read_bytes()) if path.exists() else None


def read_results(path):
    """The entries of a results file; none where there is no file."""
    if path is None or not Path(path).exists():
        return []
    try:
        entries = json.loads(Path(path).read_text())
        known = {"key", "scores", "figures"}
        if isinstance(entries, list) and all(entry.keys() >= known for entry in entries):
            # not an older version's
            return [entry for entry in entries if entry.keys() >= {"predicted", "submitted"}]
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise BadInput(f"{path} is not a file of GLUE results; move it away or give another --results")


def add_result(path, entry):
    """Put an entry in the place of that with its key, whole or not at all."""
    if path is not None:
        # read anew: another process may work on other tasks of the same checkpoint. Of two that end at once
        # one may drop the other's entry; that is then computed again when it is asked for.
        entries = read_results(path)
        entries = [one for one in entries if one["key"] != entry["key"]] + [entry]
        partial = Path(f"{path}.{os.getpid()}.partial")
        partial.write_text("[" + ",\n ".join(map(json.dumps, entries)) + "]\n")
        os.replace(partial, path)
