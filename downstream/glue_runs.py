"""downstream.glue_runs."""
import json
import os
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from downstream import glue
from downstream.finetune import PLAIN, fine_tune_once, spread, tell, tokenize_dataset
from downstream.hub import open_run
from downstream.labelled import glue_dataset, tokenize
from downstream.options import describe_run, protocol_from, text_run
from support.cli import BadInput
from support.kernels import compute_dtype

# ---------------------------------------------------------------------------- GLUE

def run_glue(run, glue_dir, tasks, seeds, protocol, autocast=PLAIN, max_train=None, submit=None, results_file=None,
             quiet=True):
    """Fine-tune on every task with seeds 0 .. seeds - 1 and score the dev part -> dict of results.

    results_file  JSON of all that was ever computed, by settings and weights: what is there is not computed again
    submit        folder for predictions of the test parts: seed0/CoLA.tsv ..., and seed0.zip for the GLUE server
    """
    tests = server_files(tasks, submit)
    check_files(glue_dir, tasks, submit, results_file)
    known, results = read_results(results_file), {}
    with autocast:
        made_by = {"weights": fingerprint(run.model), **asdict(protocol),
                   "precision": str(compute_dtype(next(run.model.parameters())))[6:]}
    for name in tests:
        dataset = glue_dataset(glue_dir, name)
        dataset = replace(dataset, train=dataset.train.at_most(max_train))
        sizes = {"train": len(dataset.train.labels), "dev": sum(len(part.labels) for part in dataset.dev.values())}
        inputs, entries, reused = None, [], 0
        for k in range(seeds):
            key, folder = {"task": name, "seed": k, **sizes, **made_by}, Path(submit or ".", f"seed{k}")
            entry = next((entry for entry in known if entry["key"] == key), None)
            if entry and all(entry["predictions"].get(file, -1) == checksum(folder / file) for file in tests[name]):
                reused += 1
            else:
                if inputs is None:
                    inputs = tokenize_dataset(run, dataset, quiet)
                    test_inputs = {file: tokenize(run, glue.read(glue_dir, *source).texts, quiet)
                                   for file, source in tests[name].items()}
                scores, figures, predict = fine_tune_once(run, dataset, inputs, protocol, k, autocast, quiet)
                for file, (task, _) in tests[name].items():
                    glue.write_predictions(folder / file, task, predict(test_inputs[file]))
                entry = {"key": key, "scores": scores, "figures": figures,
                         "predictions": {file: checksum(folder / file) for file in tests[name]}}
                # read anew: another process may work on other tasks of the same checkpoint
                write_results(results_file, [e for e in read_results(results_file) if e["key"] != key] + [entry])
                if not quiet:
                    tqdm.write(f"{name} seed {k}: " + ", ".join(f"{metric} {100 * score:.1f}" for metric, score in scores.items())
                               + f"  ({tell(figures)})", file=sys.stderr)
            entries.append(entry)
        if reused and not quiet:
            tqdm.write(f"note: {reused} of {seeds} seeds of {name} were in {results_file} already", file=sys.stderr)
        results[name] = {**sizes, "skipped": dataset.skipped, "figures": [entry["figures"] for entry in entries],
                         **{metric: spread([entry["scores"][metric] for entry in entries]) for metric in entries[0]["scores"]}}
    row, average = glue.table2({name: {metric: value["mean"] for metric, value in result.items() if isinstance(value, dict)}
                                for name, result in results.items()})
    content = {"split": "dev", "tasks": results, "table2": row, "average": average}
    if submit:
        files = [file for name in tests for file in tests[name]]
        content["submissions"] = [str(glue.pack(Path(submit, f"seed{k}"), files)) for k in range(seeds)]
        content["not_in_submission"] = [file for name in glue.TASKS for file in glue.server_files(name) if file not in files]
    return content


def server_files(tasks, submit):
    """What to predict with the model of each task: {task: {file for the server: (task of the texts, test file)}}."""
    if "ax" in tasks and not (submit and "mnli" in tasks):
        raise BadInput("ax has no public labels and no training part: the mnli model predicts it, with --submit DIR and "
                       "mnli among the --tasks")
    return {name: {file: (of, test) for of in ([name, "ax"] if name == "mnli" and "ax" in tasks else [name])
                   for file, test in glue.server_files(of).items()} if submit else {} for name in tasks if name != "ax"}


def check_files(glue_dir, tasks, submit, results_file):
    """Raise BadInput where anything is missing: better now than after hours."""
    if not Path(glue_dir).is_dir():
        raise BadInput(f"--glue-dir {glue_dir} is not a folder; the official files are at {glue.ADDRESS}")
    if results_file and not Path(results_file).absolute().parent.is_dir():
        raise BadInput(f"--results {results_file}: there is no such folder")
    for name in tasks:
        files = ["train.tsv"] * (name != "ax") + [file for _, dev, test in glue.TASKS[name].parts
                                                  for file in (dev, test if submit else None) if file]
        for file in files:
            glue.find(glue_dir, name, file)


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
    if path is None or not Path(path).exists():
        return []
    try:
        entries = json.loads(Path(path).read_text())
        if isinstance(entries, list) and all(entry.keys() >= {"key", "scores", "figures", "predictions"} for entry in entries):
            return entries
    except (ValueError, AttributeError, TypeError):
        pass
    raise BadInput(f"{path} is not a file of GLUE results; move it away or give another --results")


def write_results(path, entries):
    """Whole or not at all."""
    if path is not None:
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps(entries, indent=1) + "\n")
        os.replace(partial, path)


def print_scores(name, result):
    """One line for each metric of one data set."""
    for metric, value in result.items():
        if isinstance(value, dict):
            std = f" ± {100 * value['std']:.1f}" if value["std"] is not None else ""
            print(f"{name:8s} {metric:14s} {100 * value['mean']:6.1f}{std:8s} median {100 * value['median']:5.1f}   seeds "
                  + " ".join(f"{100 * score:.1f}" for score in value["seeds"]))
            name = ""


def glue_command(args):
    run, autocast = open_run(args)
    text_run(run)
    protocol, tasks = protocol_from(args, run), glue.choose_tasks(args.tasks)
    results_file = args.results or default_results(args.checkpoint)
    results = run_glue(run, args.glue_dir, tasks, args.seeds, protocol, autocast, args.max_train, args.submit,
                       results_file, quiet=False)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, {args.seeds} seed{'s' * (args.seeds > 1)}, {protocol.pool} pooling, {protocol.attention} attention. "
              "Scores x 100 on the DEV parts" + ("; the best epoch chosen on them" if protocol.best_epoch else ""))
        for name, result in results["tasks"].items():
            print_scores(glue.TASKS[name].folder, result)
            if result["skipped"]:
                print(f"{'':8s} {result['skipped']} malformed rows left out")
        if results["table2"]:
            complete = len(results["table2"]) == 9
            print("\nTable 2  " + "".join(f"{column:>8s}" for column in results["table2"]) + "     Avg")
            print("dev      " + "".join(f"{100 * score:8.1f}" for score in results["table2"].values())
                  + f"{100 * results['average']:8.1f}" + ("" if complete else f"  of these {len(results['table2'])} of 9"))
        for path in results.get("submissions", []):
            print(f"for the GLUE server: {path}")
        if results.get("not_in_submission"):
            print(f"the server also wants {', '.join(results['not_in_submission'])}")
        print(f"all results: {results_file}")
    return {"protocol": asdict(protocol), "results": results}, run


def default_results(checkpoint):
    """glue.json in the run folder; for hf:NAME in the current folder."""
    if checkpoint.startswith("hf:"):
        return f"glue-{Path(checkpoint[3:]).name}.json"
    return str((Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent) / "glue.json")
