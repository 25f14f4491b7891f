"""The commands that choose between text and images: glue, probe, finetune and transfer of evaluate.py."""

import functools
import itertools
import math
from dataclasses import asdict, fields, replace

from downstream import glue
from downstream.encoding import POOLS, attention_and_pool, tokenize
from downstream.finetune import (
    Protocol,
    correctness,
    dev_examples,
    fine_tune_once,
    over_seeds,
    tell_figures,
    tokenize_dataset,
)
from downstream.glue_runs import GlueRun, run_glue
from downstream.hub import open_run
from downstream.labelled import label_subset, load_dataset
from downstream.probe import fit_probe, frozen_features, print_probes
from downstream.reconstruct import image_run
from downstream.tables import Columns
from downstream.vision import (
    IMAGE_BUDGETS,
    ImageProtocol,
    batch_and_steps,
    both_features,
    fine_tune_images,
    load_labelled,
    raw_pixels,
    sgd_probe,
)
from images.sets import is_images
from objectives import describe
from support.cli import BadInput, positive, progress, real, seed

# ---------------------------------------------------------------------------- options

SHARED = {
    "pool": {"choices": POOLS,
             "help": "of the tokens' features (default: of text under causal attention last, else mean)"},
    "attention": {"choices": ("causal", "full"),
                  "help": "default: causal for left-to-right objectives, else full"},
    "max-train": {"type": positive, "metavar": "N", "help": "use a random N of the training examples only"}}
DATA = {
    "glue-dir": {"metavar": "DIR", "help": f"folder of the official GLUE files, from {glue.ADDRESS}"},
    "dev": {"metavar": "FILE", "help": "dev texts of a table (default: a fifth of it, held out)"},
    "text-column": {"metavar": "NAME",
                    "help": "column of the text; a number, from 1, where no line names the columns (default: "
                            "text)"},
    "text-column-b": {"metavar": "NAME",
                      "help": "column of the second text of a pair (default: text_b, if there)"},
    "label-column": {"metavar": "NAME", "help": "column of the label (default: label)"},
    "label-fraction": {"type": real, "default": 1.0,
                       "help": "share of the training examples, of each class alike"},
    "labels-per-class": {"type": positive, "metavar": "N", "help": "use N training examples of each class"},
    "max-test": {"type": positive, "metavar": "N",
                 "help": "score a random N of the dev or validation examples only"}}
TUNING = {
    "epochs": {"type": positive,
               "help": "passes over the training examples (default: 5; images: 100, vit-tiny 10)"},
    "batch-size": {"type": positive, "help": "examples per step (default: 16; images: 1024, vit-tiny 128)"},
    "lr": {"type": real, "help": "peak learning rate (default: the paper's 4e-5, for models narrower than "
                                 "512 5e-4; images: 5e-4 x batch/256, vit-tiny 2e-3 x it)"},
    "best-epoch": {"action": "store_true",
                   "help": "choose the best epoch on dev, which flatters the dev score"}}
IMAGE_TUNING = {
    "layer-decay": {"type": real,
                    "help": "images: rate of a layer as a share of the next one's (default: 0.65)"},
    "drop-path": {"type": real, "help": "images: share of samples that skip the last block (default: 0.1)"},
    "mixup": {"type": real, "help": "images: the Beta parameter of mixup, 0 for none (default: 0.8; "
                                "vit-tiny 0 for this and the next three)"},
    "cutmix": {"type": real, "help": "images: that of CutMix (default: 1)"},
    "smoothing": {"type": real, "help": "images: of the labels (default: 0.1)"},
    "erase": {"type": real, "help": "images: probability of random erasing (default: 0.25)"},
    "weight-decay": {"type": real, "help": "images: of AdamW, on matrices (default: 0.05)"}}
COLUMNS = ("text_column", "text_column_b", "label_column")
TEXT_ONLY = ("glue_dir", "dev", "regression", *COLUMNS)
IMAGE_ONLY = ("classifier", "pixels", *(name.replace("-", "_") for name in IMAGE_TUNING))
SOURCES = ("text: a .tsv, .csv or .jsonl file with columns text, label and maybe text_b; a GLUE task; pydoc; "
           "images: as for train.py")


def add_group(sub, *groups):
    """Give a command the options of these groups."""
    for name, keywords in itertools.chain.from_iterable(group.items() for group in groups):
        sub.add_argument("--" + name, **keywords)


def add_labelled_commands(command):
    """Register glue, finetune, probe and transfer: `command(name, function, text)` gives a parser."""
    add_group(command("glue", glue_command,
                      "fine-tune on the GLUE tasks and score their dev parts (Table 2)"), {
        "glue-dir": {**DATA["glue-dir"], "required": True},
        "tasks": {"default": "all",
                  "help": f"all = {','.join(glue.TABLE2)}; or some of these, wnli, ax, with commas"},
        "seeds": {"type": positive, "default": 3, "metavar": "N",
                  "help": "runs per task, of seeds 0 .. N - 1"},
        "submit": {"metavar": "DIR", "help": "write test predictions for the GLUE server, one zip per seed"},
        "results": {"metavar": "FILE",
                    "help": "all results so far; what is in it is not computed again (default: glue.json in "
                            "the run folder)"}}, TUNING, SHARED)
    text = "fine-tune on labelled text, classes or scores, or on labelled images"
    add_group(command("finetune", finetune_command, text), {
        "data": {"required": True, "help": SOURCES},
        "regression": {"action": "store_true",
                       "help": "labels are scores (default: if they are numbers, not all whole)"},
        "seeds": {"type": positive, "default": 1, "metavar": "N", "help": "runs, of seeds 0 .. N - 1"}},
        DATA, TUNING, IMAGE_TUNING, SHARED)
    add_group(command("probe", probe_command, "logistic regression on frozen features"), {
        "data": {"help": f"{SOURCES} (default: pydoc; images: the run's own)"},
        "layer": {"type": layer_number, "help": "0 (the embedding) upwards, or all (default: the last)"},
        "classifier": {"choices": ("lbfgs", "sgd"),
                       "help": "images: logistic regression by L-BFGS or MAE's protocol (default: lbfgs)"},
        "pixels": {"action": "store_true", "help": "images: also the same classifier on raw pixels"},
        "seed": {"type": seed, "default": 0,
                 "help": "of the labels that are used, and of the split that chooses the L2 strength or of "
                         "the SGD"}}, DATA, SHARED)
    text = "logistic regression on frozen features of several image sets (Table 6)"
    add_group(command("transfer", transfer_command, text), {
        "data": {"nargs": "+", "required": True, "metavar": "SET", "help": "images, as for train.py"},
        "layer": {"type": seed, "help": "0 (the embedding) upwards (default: the last)"},
        "seed": {"type": seed, "default": 0, "help": "of the split that chooses the L2 strength"}},
        {"max-test": DATA["max-test"]}, SHARED)


def layer_number(text):
    """An argparse type: a number from 0, or all."""
    return text if text == "all" else seed(text)


# ---------------------------------------------------------------------------- from options to what they mean

def refuse_other_kind(args, run, names):
    """Raise BadInput if one of these options was given, which do not apply to this kind of checkpoint, or
    --data is of the other kind."""
    kind = "text" if run.text else "images"
    for name in names:
        if getattr(args, name, None) is not None and getattr(args, name) is not False:
            raise BadInput(f"--{name.replace('_', '-')} does not apply to a checkpoint of {kind} such as "
                           f"{run.name}; leave it out")
    if run.text and is_images(args.data):
        raise BadInput(f"{run.name} was trained on text and {args.data} holds images")


def labelled_texts(args, data, choice_seed=0):
    """The Dataset that the options describe."""
    given = dict(zip(("text", "text_b", "label"), (getattr(args, name) for name in COLUMNS)))
    columns = Columns(**{name: value for name, value in given.items() if value is not None})
    dataset = load_dataset(data, args.glue_dir, args.dev, getattr(args, "regression", None) or None, columns)
    rows = label_subset(dataset.train.labels, args.label_fraction, args.labels_per_class, choice_seed)
    return replace(dataset, train=dataset.train.only(rows).at_most(args.max_train),
                   dev={suffix: part.at_most(args.max_test) for suffix, part in dataset.dev.items()})


def labelled_images(args, data, run, choice_seed=0):
    """The Images that the options describe."""
    choose = functools.partial(label_subset, fraction=args.label_fraction, per_class=args.labels_per_class,
                               seed=choice_seed)
    return load_labelled(data, run.model.config.size, choose, args.max_train, args.max_test)


def text_protocol(args, run):
    """The Protocol that the flags describe."""
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    # The best of three for an untrained tiny, which a comparison must not wrong. Pearson on STS-B at 1.5e-4,
    # 5e-4, 1.5e-3 (5,000 pairs, one seed): untrained 26, 46, 33; ar 13, 15, 15; masks 11, 15, 25.
    # Accuracy on SST-2 at 5e-4, 1.5e-3: untrained 67.9, 67.9; ar 68.9, 70.6; masks 65.4, 71.6.
    lr = (4e-5 if run.model.config.width >= 512 else 5e-4) if args.lr is None else args.lr
    if not 0 < lr < math.inf:
        raise BadInput(f"--lr {lr:g} is not a positive number")
    given = {name: getattr(args, name) for name in ("epochs", "batch_size") if getattr(args, name)}
    return Protocol(lr=lr, pool=pool, attention=attention, best_epoch=args.best_epoch, **given)


LIMITS_OF_IMAGES = {  # option -> (what fits, in words)
    "lr": (lambda x: 0 < x < math.inf, "a positive number"),
    "layer_decay": (lambda x: 0 < x <= 1, "in 0..1, 0 excluded"),
    "drop_path": (lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
    "mixup": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "cutmix": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "smoothing": (lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
    "erase": (lambda x: 0 <= x <= 1, "in 0..1"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
}


def image_protocol(args, run):
    """The ImageProtocol that the flags describe, for a model of this preset."""
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    values = dict(IMAGE_BUDGETS[run.settings.preset])
    base = values.pop("base")
    options = {f.name: getattr(args, f.name, None) for f in fields(ImageProtocol)}
    values.update({name: value for name, value in options.items() if value is not None})
    values.setdefault("lr", base * values["batch_size"] / 256)
    protocol = ImageProtocol(**{**values, "attention": attention, "pool": pool})
    for name, (fits, words) in LIMITS_OF_IMAGES.items():
        if not fits(getattr(protocol, name)):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(protocol, name):g} is not {words}")
    return protocol


# ---------------------------------------------------------------------------- what is printed

def describe_run(run):
    return f"{describe(run.objective)} ({run.path})" + (f", step {run.step:,}" if run.step else "")


def describe_images(images, config):
    note = "" if images.size == config.size else f", resized from {images.size} to {config.size} pixels"
    return f"{len(images.train):,} training and {len(images.val):,} validation images of {images.name}{note}"


def print_scores(name, result):
    """One line for each metric of one data set."""
    for metric, value in result.items():
        if isinstance(value, dict):
            std = f" ± {100 * value['std']:.1f}" if value["std"] is not None else ""
            print(f"{name:8s} {metric:14s} {100 * value['mean']:6.1f}{std:8s} median "
                  f"{100 * value['median']:5.1f}   seeds "
                  + " ".join(f"{100 * score:.1f}" for score in value["seeds"]))
            name = ""


# ---------------------------------------------------------------------------- commands

def glue_command(args):
    """`evaluate.py glue CKPT --glue-dir DIR`: fine-tunes on each task and seed, prints Table 2's row.

    args     checkpoint, glue_dir, tasks, seeds, submit, results, max_train, and the options of fine-tuning
    Returns ({"protocol", "results": what `run_glue` returns}, the Run); what is in --results is not computed
    again. BadInput: files that are missing or not in GLUE's form, a task that there is not, images.
    """
    run, autocast = open_run(args)
    if not run.text:
        raise BadInput(f"{run.name} was trained on images and GLUE is text; probe and finetune take images "
                       "too")
    protocol, tasks = text_protocol(args, run), glue.choose_tasks(args.tasks)
    file = args.results or (f"glue-{run.folder.name or run.name}.json" if run.name.startswith("hf:") else
                            str(run.folder / "glue.json"))
    results = run_glue(GlueRun(run, args.glue_dir, args.seeds, protocol, autocast, args.max_train,
                               args.submit, file,
                               quiet=False), tasks)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, {args.seeds} seed{'s' * (args.seeds > 1)}, {protocol.pool} "
              f"pooling, {protocol.attention} attention. Scores x 100 on the DEV parts"
              + ("; the best epoch chosen on them" if protocol.best_epoch else ""))
        print_glue(results)
        print(f"all results: {file}")
    return {"protocol": asdict(protocol), "results": results}, run


def print_glue(results):
    """What run_glue returns, task by task, and the row of Table 2."""
    for name, result in results["tasks"].items():
        print_scores(glue.TASKS[name].folder, result)
        if result["skipped"]:
            print(f"{'':8s} {result['skipped']} malformed rows left out")
    row = results["table2"]
    if row:
        print("\nTable 2  " + "".join(f"{column:>8s}" for column in row) + "     Avg")
        print("dev      " + "".join(f"{100 * score:8.1f}" for score in row.values())
              + f"{100 * results['average']:8.1f}" + ("" if len(row) == 9 else f"  of these {len(row)} of 9"))
    for path in results.get("submissions", []):
        print(f"for the GLUE server: {path}")
    if results.get("not_in_submission"):
        print(f"the server also wants {', '.join(results['not_in_submission'])}")


def finetune_command(args):
    """`evaluate.py finetune CKPT --data SOURCE`: all weights and a new layer, on labelled texts or images.

    args     checkpoint, data, seeds, the choice of columns, of labels and of rows, and the options of
             fine-tuning
    Returns ({"protocol", "results": scores over seeds, and of each dev example the label and predictions},
    the Run). BadInput: labels that are missing or of one class, options of the other kind of data, a loss
    that is not finite.
    """
    run, autocast = open_run(args)
    if not run.text:
        return finetune_images(args, run, autocast)
    refuse_other_kind(args, run, IMAGE_ONLY)
    protocol = text_protocol(args, run)
    dataset = labelled_texts(args, args.data)
    inputs = tokenize_dataset(run, dataset, quiet=False)
    found = [fine_tune_once(run, dataset, inputs, protocol, k, autocast, quiet=False)
             for k in range(args.seeds)]
    predicted = {suffix: [outcome.predicted[suffix] for outcome in found] for suffix in dataset.dev}
    results = {"data": dataset.name, "classes": dataset.classes, "train": len(dataset.train.labels),
               "dev": sum(len(part.labels) for part in dataset.dev.values()), "skipped": dataset.skipped,
               "figures": [outcome.figures for outcome in found],
               **{metric: over_seeds([outcome.scores[metric] for outcome in found])
                  for metric in found[0].scores},
               **dev_examples(dataset, predicted)}
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, fine-tuned on {results['train']:,} texts of {dataset.name}, "
              f"{protocol.pool} pooling, {protocol.attention} attention. Scores x 100 on {results['dev']:,} "
              "dev texts")
        print_scores("", results)
        print(tell_figures(found[-1].figures))
    return {"protocol": asdict(protocol), "results": results}, run


def finetune_images(args, run, autocast):
    """evaluate.py finetune, for a checkpoint of images."""
    refuse_other_kind(args, run, TEXT_ONLY)
    protocol = image_protocol(args, run)
    images = labelled_images(args, args.data, run)
    steps = protocol.epochs * batch_and_steps(len(images.train), protocol)[1]
    predicted, every_figures = [], []
    for k in range(args.seeds):
        with progress(quiet=False, total=steps, unit=" steps", desc=f"seed {k}") as bar:
            classes, labels, figures = fine_tune_images(run, images, protocol, k, autocast, bar)
        predicted.append(classes)
        every_figures.append(figures)
    correct = [correctness(classes, labels) for classes in predicted]
    results = {"data": images.name, "classes": images.classes, "train": len(images.train),
               "dev": len(images.val),
               "figures": every_figures, "accuracy": over_seeds([sum(row) / len(row) for row in correct]),
               "labels": labels.tolist(), "predictions": [row.tolist() for row in predicted],
               "correct": correct}
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, fine-tuned for {protocol.epochs} epochs, {protocol.pool} "
              f"pooling, {protocol.attention} attention; {describe_images(images, run.model.config)}. Scores "
              "x 100"
              + (", the best epoch chosen on the validation images" if protocol.best_epoch else ""))
        print_scores("", results)
        print(f"{figures['seconds']:.0f} s a seed, {figures['examples_per_second']:,.0f} images/s, "
              f"{figures['input_share']:.1%} of the time for waiting for them")
    return {"protocol": asdict(protocol), "results": results}, run


def probe_command(args):
    """`evaluate.py probe CKPT`: a linear classifier on frozen features of labelled texts or images, printed.

    args     checkpoint, data (default: pydoc passages by package; images: the run's own), layer, classifier,
             pixels, seed, pool, attention, and the choice of columns, of labels and of rows
    Returns ({"results": {"layers": {layer: what `probe_figures` returns}, ..}}, the Run). BadInput: labels
    that are scores or of one class, a layer that there is not, options of the other kind of data.
    """
    run, autocast = open_run(args)
    if not run.text:
        return probe_images(args, run, autocast)
    refuse_other_kind(args, run, IMAGE_ONLY)
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    dataset = labelled_texts(args, args.data or "pydoc", args.seed)
    if dataset.classes is None:
        raise BadInput(f"{args.data} has scores for labels and a probe predicts classes; evaluate.py "
                       "finetune does both")
    train, (suffix, dev) = dataset.train, next(iter(dataset.dev.items()))
    x, test_x = (frozen_features(run, tokenize(run, part.texts, quiet=False), pool, attention == "causal",
                                 args.layer,
                                 autocast, quiet=False) for part in (train, dev))
    layers = {str(layer): fit_probe(x[layer], train.labels, test_x[layer], dev.labels, args.seed, quiet=False)
              for layer in x}
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, linear probe on {dataset.name}{suffix}, "
              f"{len(dataset.classes)} classes, {pool} pooling, {attention} attention; {len(train.labels):,} "
              f"training and {len(dev.labels):,} dev texts")
        print_probes(layers)
    return {"results": {"data": dataset.name + suffix, "classes": dataset.classes, "pool": pool,
                        "attention": attention,
                        "layers": layers}}, run


def probe_images(args, run, autocast):
    """evaluate.py probe, for a checkpoint of images."""
    refuse_other_kind(args, run, TEXT_ONLY)
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    images = labelled_images(args, args.data or run.settings.data, run, args.seed)
    classifier = args.classifier or "lbfgs"
    fit = sgd_probe if classifier == "sgd" else fit_probe
    (x, y), (test_x, test_y) = both_features(run, images, pool, attention, args.layer, autocast, quiet=False)
    layers = {str(layer): fit(x[layer], y, test_x[layer], test_y, args.seed, quiet=False) for layer in x}
    if args.pixels:
        layers["pixels"] = fit(*raw_pixels(run, images.train), *raw_pixels(run, images.val), args.seed,
                               quiet=False)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, linear probe ({classifier}), {pool} pooling, {attention} "
              f"attention; {len(images.classes)} classes, {describe_images(images, run.model.config)}")
        print_probes(layers)
    return {"results": {"data": images.name, "classes": images.classes, "classifier": classifier,
                        "pool": pool,
                        "attention": attention, "layers": layers}}, run


def transfer_command(args):
    """`evaluate.py transfer CKPT --data SET [SET ...]`: such a classifier on each of several image sets
    (Table 6).

    args     checkpoint, data (a list), layer, seed, max_train, max_test, pool, attention
    Returns ({"results": {"sets": what `probe_figures` returns of each, "mean": of the accuracies, ..}}, the
    Run). BadInput: a checkpoint of text, a set that is not there or of one class.
    """
    run, autocast = image_run(args, args.checkpoint)
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    config, rows = run.model.config, []
    sets = [load_labelled(source, config.size, max_train=args.max_train, max_test=args.max_test)
            for source in args.data]
    for images in sets:  # all are read before the work: complaints come first
        (x, y), (test_x, test_y) = both_features(run, images, pool, attention, args.layer, autocast,
                                                 quiet=False)
        [layer] = x
        rows.append({"data": images.name, "classes": len(images.classes), "size": images.size,
                     **fit_probe(x[layer], y, test_x[layer], test_y, args.seed, quiet=False)})
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, logistic regression on frozen features, {pool} pooling, "
              f"{attention} attention, {config.size} x {config.size} pixels; accuracy x 100 on the "
              "validation images\n")
        width = max(len(row["data"]) for row in rows)
        print(f"{'':{width}s}  classes  training   accuracy   95% interval   majority        l2")
        for row in rows:
            low, high = (100 * end for end in row["interval"])
            print(f"{row['data']:{width}s}  {row['classes']:7d}  {row['train']:8,}     "
                  f"{100 * row['accuracy']:6.1f}   {low:5.1f} .. {high:5.1f}     "
                  f"{100 * row['majority']:6.1f}   {row['l2']:7g}")
        print(f"{'mean':{width}s}                        {100 * mean:6.1f}")
    return {"results": {"pool": pool, "attention": attention, "sets": rows, "mean": mean}}, run
