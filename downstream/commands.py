"""downstream.commands."""
import itertools
import sys
from dataclasses import asdict, replace

from tqdm import tqdm

from downstream import glue
from downstream.finetune import fine_tune_once, spread, tell, tokenize_dataset
from downstream.glue_runs import glue_command, print_scores
from downstream.hub import open_run
from downstream.labelled import POOLS, load_dataset, tokenize
from downstream.options import attention_and_pool, describe_run, fewer, protocol_from, refuse
from downstream.probe import frozen_features, print_probes, probe
from downstream.reconstruct import image_run
from downstream.vision import (
    batch_and_steps,
    both_features,
    fine_tune_images,
    load_labelled,
    pixels,
    recipe_from,
    sgd_probe,
    shown,
)
from support.cli import BadInput, positive, seed


def finetune_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        return finetune_images(args, run, autocast)
    refuse(args, run, IMAGE_ONLY)
    protocol = protocol_from(args, run)
    dataset = load_dataset(args.data, args.glue_dir, args.dev, args.regression or None)
    dataset = replace(dataset, train=fewer(dataset.train, args))
    inputs = tokenize_dataset(run, dataset, quiet=False)
    found = [fine_tune_once(run, dataset, inputs, protocol, seed, autocast, quiet=False)[:2] for seed in range(args.seeds)]
    results = {"data": dataset.name, "classes": dataset.classes, "train": len(dataset.train.labels),
               "dev": sum(len(part.labels) for part in dataset.dev.values()), "skipped": dataset.skipped,
               "figures": [figures for _, figures in found],
               **{metric: spread([scores[metric] for scores, _ in found]) for metric in found[0][0]}}
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, fine-tuned on {results['train']:,} texts of {dataset.name}, "
              f"{protocol.pool} pooling, {protocol.attention} attention. Scores x 100 on {results['dev']:,} dev texts")
        print_scores("", results)
        print(tell(found[-1][1]))
    return {"protocol": asdict(protocol), "results": results}, run


# Options that commands share, {name: keywords of add_argument}.
SHARED = {
    "pool": {"choices": POOLS, "help": "of the tokens' features (default: last under causal attention, else mean; images: mean)"},
    "attention": {"choices": ("causal", "full"), "help": "default: causal for left-to-right objectives, else full"},
    "max-train": {"type": positive, "metavar": "N", "help": "use a random N of the training examples only"}}


DATA = {
    "glue-dir": {"metavar": "DIR", "help": f"folder of the official GLUE files, from {glue.ADDRESS}"},
    "dev": {"metavar": "TSV", "help": "dev texts of a TSV (default: a fifth of it, held out)"},
    "label-fraction": {"type": float, "default": 1.0, "help": "share of the training examples, of each class alike"}}


TUNING = {
    "epochs": {"type": positive, "help": "passes over the training examples (default: 5; images: 100, vit-tiny 10)"},
    "batch-size": {"type": positive, "help": "examples per step (default: 16; images: 1024, vit-tiny 128)"},
    "lr": {"type": float, "help": "peak learning rate (default: the paper's 4e-5, for models narrower than 512 5e-4; images: "
                                  "5e-4 x batch/256, vit-tiny 2e-3 x it)"},
    "best-epoch": {"action": "store_true", "help": "choose the best epoch on dev, which flatters the dev score"}}


IMAGE_TUNING = {
    "layer-decay": {"type": float, "help": "images: learning rate of a layer as a share of the next one's (default: 0.65)"},
    "drop-path": {"type": float, "help": "images: share of samples for which the last block is skipped (default: 0.1)"},
    "mixup": {"type": float, "help": "images: the Beta parameter of mixup, 0 for none (default: 0.8)"},
    "cutmix": {"type": float, "help": "images: that of CutMix (default: 1)"},
    "smoothing": {"type": float, "help": "images: of the labels (default: 0.1)"},
    "erase": {"type": float, "help": "images: probability of random erasing (default: 0.25)"},
    "weight-decay": {"type": float, "help": "images: of AdamW, on matrices (default: 0.05)"}}


TEXT_ONLY = ("glue_dir", "dev", "regression")


IMAGE_ONLY = ("classifier", "pixels", *(name.replace("-", "_") for name in IMAGE_TUNING))


def add_options(sub, *groups):
    """Give a command the options of these groups."""
    for name, keywords in itertools.chain.from_iterable(group.items() for group in groups):
        sub.add_argument("--" + name, **keywords)


def add_finetune_commands(command):
    """`glue` and `finetune`, for evaluate.py: `command(name, function, text)` gives a parser."""
    sub = command("glue", glue_command, "fine-tune on the GLUE tasks and score their dev parts (Table 2)")
    add_options(sub, {
        "glue-dir": {**DATA["glue-dir"], "required": True},
        "tasks": {"default": "all", "help": f"all = {','.join(glue.TABLE2)}; or some of these, wnli, ax, with commas"},
        "seeds": {"type": positive, "default": 3, "metavar": "N", "help": "runs per task, of seeds 0 .. N - 1"},
        "submit": {"metavar": "DIR", "help": "write test predictions for the GLUE server, one zip per seed"},
        "results": {"metavar": "FILE", "help": "all results so far; what is in it is not computed again (default: glue.json in "
                                               "the run folder)"}}, TUNING, SHARED)
    sub = command("finetune", finetune_command, "fine-tune on labelled text, classes or scores, or on labelled images")
    add_options(sub, {
        "data": {"required": True, "help": "text: a TSV with columns text, label and maybe text_b; a GLUE task; pydoc; images: as "
                                           "for train.py"},
        "regression": {"action": "store_true", "help": "labels are scores (default: if they are numbers, not all whole)"},
        "seeds": {"type": positive, "default": 1, "metavar": "N", "help": "runs, of seeds 0 .. N - 1"}},
        DATA, TUNING, IMAGE_TUNING, SHARED)


# ---------------------------------------------------------------------------- command line

def probe_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        return probe_images(args, run, autocast)
    refuse(args, run, IMAGE_ONLY)
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    dataset = load_dataset(args.data or "pydoc", args.glue_dir, args.dev)
    if dataset.classes is None:
        raise BadInput(f"{args.data} has scores for labels and a probe predicts classes; evaluate.py finetune does both")
    train, (suffix, dev) = fewer(dataset.train, args), next(iter(dataset.dev.items()))
    x, test_x = (frozen_features(run, tokenize(run, part.texts, quiet=False), pool, attention == "causal", args.layer, autocast,
                                 quiet=False) for part in (train, dev))
    layers = {str(layer): probe(x[layer], train.labels, test_x[layer], dev.labels, args.seed)
              for layer in tqdm(x, desc="probe", leave=False, disable=not sys.stderr.isatty())}
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, linear probe on {dataset.name}{suffix}, {len(dataset.classes)} classes, {pool} "
              f"pooling, {attention} attention; {len(train.labels):,} training and {len(dev.labels):,} dev texts")
        print_probes(layers)
    return {"results": {"data": dataset.name + suffix, "classes": dataset.classes, "pool": pool, "attention": attention,
                        "layers": layers}}, run


def layer_number(text):
    """An argparse type: a number from 0, or all."""
    return text if text == "all" else seed(text)


def add_probe_command(command):
    """`probe`, for evaluate.py."""
    sub = command("probe", probe_command, "logistic regression on frozen features")
    add_options(sub, {
        "data": {"help": "text: pydoc, a GLUE task, or a TSV with columns text, label and maybe text_b (default: pydoc); images: as "
                         "for train.py (default: the run's own)"},
        "layer": {"type": layer_number, "help": "0 (the embedding) upwards, or all (default: the last)"},
        "classifier": {"choices": ("lbfgs", "sgd"), "help": "images: logistic regression by L-BFGS or MAE's protocol (default: "
                                                            "lbfgs)"},
        "pixels": {"action": "store_true", "help": "images: also the same classifier on raw pixels"},
        "seed": {"type": seed, "default": 0, "help": "of the split that chooses the L2 strength, or of the SGD"}}, DATA, SHARED)


def probe_images(args, run, autocast):
    """evaluate.py probe, for a checkpoint of images."""
    refuse(args, run, TEXT_ONLY)
    attention, pool = attention_and_pool(run, args.attention, args.pool or "mean")
    images = load_labelled(args.data or run.settings.data, run.model.config.size, args.label_fraction, args.max_train)
    classify = sgd_probe if args.classifier == "sgd" else probe
    (x, y), (test_x, test_y) = both_features(run, images, pool, attention, args.layer, autocast)
    layers = {str(layer): classify(x[layer], y, test_x[layer], test_y, args.seed)
              for layer in tqdm(x, desc="probe", leave=False, disable=not sys.stderr.isatty())}
    if args.pixels:
        layers["pixels"] = classify(*pixels(run, images.train), *pixels(run, images.val), args.seed)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, linear probe ({args.classifier or 'lbfgs'}), {pool} pooling, {attention} "
              f"attention; {len(images.classes)} classes, {shown(images, run.model.config)}")
        print_probes(layers)
    return {"results": {"data": images.name, "classes": images.classes, "classifier": args.classifier or "lbfgs", "pool": pool,
                        "attention": attention, "layers": layers}}, run


def finetune_images(args, run, autocast):
    """evaluate.py finetune, for a checkpoint of images."""
    refuse(args, run, TEXT_ONLY)
    recipe = recipe_from(args, run)
    images = load_labelled(args.data, run.model.config.size, args.label_fraction, args.max_train)
    found = []
    for k in range(args.seeds):
        steps = recipe.epochs * batch_and_steps(len(images.train), recipe)[1]
        with tqdm(total=steps, unit="step", desc=f"seed {k}", leave=False, disable=not sys.stderr.isatty()) as bar:
            found.append(fine_tune_images(run, images, recipe, k, autocast, bar))
    results = {"data": images.name, "classes": images.classes, "train": len(images.train), "dev": len(images.val),
               "figures": [figures for _, figures in found], "accuracy": spread([accuracy for accuracy, _ in found])}
    if args.json != "-":
        figures = found[-1][1]
        print(f"{run.name}: {describe_run(run)}, fine-tuned for {recipe.epochs} epochs, {recipe.pool} pooling, "
              f"{recipe.attention} attention; {shown(images, run.model.config)}. Scores x 100"
              + (", the best epoch chosen on the validation images" if recipe.best_epoch else ""))
        print_scores("", results)
        print(f"{figures['seconds']:.0f} s a seed, {figures['examples_per_second']:,.0f} images/s, {figures['input_share']:.1%} of "
              "the time for waiting for them")
    return {"protocol": asdict(recipe), "results": results}, run


def transfer_command(args):
    run, autocast = image_run(args, args.checkpoint)
    attention, pool = attention_and_pool(run, args.attention, args.pool or "mean")
    config, sets = run.model.config, []
    for images in [load_labelled(source, config.size, max_train=args.max_train) for source in args.data]:  # complain before the work
        (x, y), (test_x, test_y) = both_features(run, images, pool, attention, args.layer, autocast)
        [layer] = x
        sets.append({"data": images.name, "classes": len(images.classes), "size": images.size,
                     **probe(x[layer], y, test_x[layer], test_y, args.seed)})
    mean = sum(row["accuracy"] for row in sets) / len(sets)
    if args.json != "-":
        print(f"{run.name}: {describe_run(run)}, logistic regression on frozen features, {pool} pooling, {attention} "
              f"attention, {config.size} x {config.size} pixels; accuracy x 100 on the validation images\n")
        width = max(len(row["data"]) for row in sets)
        print(f"{'':{width}s}  classes  training   accuracy   95% interval   majority        l2")
        for row in sets:
            low, high = (100 * end for end in row["interval"])
            print(f"{row['data']:{width}s}  {row['classes']:7d}  {row['train']:8,}     {100 * row['accuracy']:6.1f}   {low:5.1f} .. "
                  f"{high:5.1f}     {100 * row['majority']:6.1f}   {row['l2']:7g}")
        print(f"{'mean':{width}s}                        {100 * mean:6.1f}")
    return {"results": {"pool": pool, "attention": attention, "sets": sets, "mean": mean}}, run


def add_transfer_command(command):
    """Register `transfer` with evaluate.py; finetune.py and probe.py register what it shares with text."""
    sub = command("transfer", transfer_command, "logistic regression on frozen features of several image sets (Table 6)")
    sub.add_argument("--data", nargs="+", required=True, metavar="SET", help="images, as for train.py")
    sub.add_argument("--layer", type=seed, help="0 (the embedding) upwards (default: the last)")
    sub.add_argument("--seed", type=seed, default=0, help="of the split that chooses the L2 strength")
    sub.add_argument("--max-train", type=positive, metavar="N", help="use about N training images of each set only")
    sub.add_argument("--pool", choices=POOLS, help="of the patches' features (default: mean)")
    sub.add_argument("--attention", choices=("causal", "full"), help="default: causal for ar and dar, else full")
