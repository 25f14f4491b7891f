"""Fine-tuning: the GLUE benchmark, and any labelled text.

    python evaluate.py finetune CKPT --data my.tsv --label-fraction 0.1
    python evaluate.py glue CKPT --glue-dir DIR --tasks cola,rte --seeds 3

Fine-tuning follows the Cramming protocol as the paper does: all weights, a new linear layer on the pooled features, dropout
0.1, AdamW, cosine decay, 5 epochs of batches of 16. The paper's learning rate of 4e-5 is for its 768-wide model; one of
width 128 hardly moves with it and gets 5e-4. The last epoch counts: dev labels choose nothing unless --best-epoch.
Pooling and attention: the mean over all tokens under full attention for masked models, the last token under causal
attention for left-to-right ones (--pool, --attention).

Checkpoints of images go from `finetune` to vision.py, which builds on the functions here.
"""
import contextlib
import copy
import itertools
import json
import math
import os
import statistics
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import glue
from hub import open_run
from images import is_images
from labelled import (
    POOLS,
    batch_rows,
    collate,
    encode,
    glue_dataset,
    in_order,
    label_subset,
    load_dataset,
    pool_features,
    tokenize,
)
from masks import BadInput, positive
from model import compute_dtype
from objectives import DiversityEnhanced, describe
from train import clip_gradients, make_optimizer, parts, warm_cosine

PLAIN = contextlib.nullcontext()  # in place of an autocast context


# ---------------------------------------------------------------------------- fine-tuning

@dataclass(frozen=True)
class Protocol:
    """How to fine-tune."""

    lr: float
    pool: str
    attention: str            # causal or full
    epochs: int = 5
    batch_size: int = 16
    micro_batch: int = 256    # examples per forward pass at most; the rest is accumulated
    warmup: float = 0.06      # share of the steps over which the learning rate rises; cosine to 0 afterwards
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0         # largest norm of the gradient; 0 for no clipping
    dropout: float = 0.1
    best_epoch: bool = False  # score the dev part after every epoch and keep the best: optimistic on that part


class Classifier(nn.Module):
    """An encoder, pooling, and a new linear layer with `outputs` scores."""

    def __init__(self, encoder, width, outputs, pool, causal, dropout, seed):
        super().__init__()
        self.encoder, self.pool, self.causal = encoder, pool, causal
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """-> (B, outputs)."""
        features = pool_features(encode(self.encoder, batch, self.causal), batch, self.pool)
        return self.head(self.dropout(features)).float()


def fine_tune(run, inputs, labels, outputs, protocol, seed, autocast=PLAIN, validate=None, bar=None):
    """Fine-tune a copy of run.model. Returns a function Inputs -> class numbers (N,) or scores (N,), and figures of the run.

    labels    class numbers (N,), or scores (N,) with outputs = 1: those are learned in units of their standard deviation
    autocast  the context for the matrix products, entered anew for every step
    validate  with protocol.best_epoch: a function of such a prediction function to a number, the higher the better
    The weights of the new layer, the order of the texts and dropout each have a seed of their own, drawn from `seed`.
    """
    head_seed, order_seed, dropout_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    device, limit = next(run.model.parameters()).device, run.settings.length
    regression = labels.dtype.kind == "f"
    mean, spread = (labels.mean(), labels.std() or 1.0) if regression else (0.0, 1.0)
    targets = torch.from_numpy(((labels - mean) / spread).astype(np.float32) if regression else labels).to(device)
    model = Classifier(copy.deepcopy(run.model), run.model.config.width, outputs, protocol.pool,
                       protocol.attention == "causal", protocol.dropout, head_seed).to(device)
    torch.manual_seed(dropout_seed)

    def predict(inputs):
        scores = predictions(model, in_order(inputs, limit, device), len(inputs.lengths), autocast)
        return scores[:, 0] * spread + mean if regression else scores.argmax(1)

    tokens = places = 0

    def batches(epoch):
        nonlocal tokens, places
        for rows in batch_rows(inputs.lengths, protocol.batch_size, order_seed, epoch):
            batch = collate(inputs, rows, limit, device)
            tokens, places = tokens + inputs.lengths[rows].sum(), places + batch.tokens.numel()
            yield batch, targets[torch.from_numpy(rows).to(device)]

    def loss(scores, wanted):
        return F.mse_loss(scores[:, 0], wanted) if regression else F.cross_entropy(scores, wanted)

    figures = optimise(model, make_optimizer(model, protocol), batches, math.ceil(len(labels) / protocol.batch_size), loss,
                       protocol, autocast, validate and (lambda: validate(predict)), bar)
    return predict, {**figures, "examples_per_second": protocol.epochs * len(labels) / figures["seconds"],
                     "padding_efficiency": float(tokens / places)}  # tokens that are not padding


def optimise(model, optimizer, batches, per_epoch, loss, protocol, autocast=PLAIN, validate=None, bar=None):
    """Train for protocol.epochs, under its schedule and clipping -> figures of the run.

    batches   a function from the epoch to an iterable of at least `per_epoch` pairs (input of the model, targets)
    loss      a function of the model's scores and the targets: a mean over them
    validate  with protocol.best_epoch: a function of nothing to a number; the weights with the highest are kept
    A parameter group's learning rate is its own peak.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps, step, best, kept = protocol.epochs * per_epoch, 0, -math.inf, None
    preparing, running, start = 0.0, torch.zeros((), device=next(model.parameters()).device), time.perf_counter()
    for epoch in range(protocol.epochs):
        model.train()
        ready = iter(batches(epoch))
        for _ in range(per_epoch):
            clock = time.perf_counter()
            batch, wanted = next(ready)
            preparing += time.perf_counter() - clock
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * warm_cosine((step + 0.5) / steps, protocol.warmup)
            cuts = parts(len(wanted), protocol.micro_batch)
            for a, b in cuts:
                with autocast:
                    scores = model(batch if len(cuts) == 1 else batch.part(a, b))
                error = loss(scores, wanted[a:b]) * ((b - a) / len(wanted))
                error.backward()
                running += error.detach()
            clip_gradients(model, protocol.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if bar is not None:
                bar.update(1)
        mean_loss = running.item() / per_epoch
        running.zero_()
        if not math.isfinite(mean_loss):
            raise BadInput(f"the loss is {mean_loss} in epoch {epoch + 1}; try a smaller --lr than {protocol.lr:g}")
        if bar is not None:
            bar.set_postfix_str(f"loss {mean_loss:.3f}")
        if protocol.best_epoch and validate and (score := validate()) > best:
            best, kept = score, (epoch + 1, copy.deepcopy(model.state_dict()))
    seconds = time.perf_counter() - start
    figures = {"train_loss": mean_loss, "seconds": seconds,
               "input_share": preparing / seconds}                 # of the time: making batches and moving them
    if kept:
        figures["best_epoch"] = kept[0]
        model.load_state_dict(kept[1])
    return figures


@torch.no_grad()
def predictions(model, batches, count, autocast):
    """The scores (count, outputs) of all examples, in order; `batches` gives pairs (row numbers, Batch)."""
    model.eval()
    scores = None
    for rows, batch in batches:
        with autocast:
            found = model(batch).cpu().numpy()
        scores = np.empty((count, found.shape[1]), np.float32) if scores is None else scores
        scores[rows] = found
    return scores


def dev_scores(dataset, dev_inputs, predict):
    """{metric and suffix: score} on every dev part."""
    found = {}
    for suffix, part in dataset.dev.items():
        predicted = predict(dev_inputs[suffix])
        found |= {metric + suffix: glue.METRICS[metric](predicted, part.labels) for metric in dataset.metrics}
    return found


def fine_tune_once(run, dataset, inputs, protocol, seed, autocast, quiet=True):
    """One seed on a Dataset whose Inputs are {"train": .., suffix: ..} -> scores on dev, figures, prediction function."""
    steps = protocol.epochs * math.ceil(len(dataset.train.labels) / protocol.batch_size)
    outputs = 1 if dataset.classes is None else len(dataset.classes)
    with tqdm(total=steps, unit="step", desc=f"{dataset.name} seed {seed}", leave=False,
              disable=quiet or not sys.stderr.isatty()) as bar:
        predict, figures = fine_tune(run, inputs["train"], dataset.train.labels, outputs, protocol, seed, autocast,
                                     lambda predict: next(iter(dev_scores(dataset, inputs, predict).values())), bar)
    return dev_scores(dataset, inputs, predict), figures, predict


def tokenize_dataset(run, dataset, quiet=True):
    """{"train": Inputs, suffix: Inputs}."""
    return {key: tokenize(run, part.texts, quiet) for key, part in {"train": dataset.train, **dataset.dev}.items()}


def tell(figures):
    return (f"{figures['seconds']:.0f} s, {figures['input_share']:.1%} of them for making batches; "
            f"{figures['padding_efficiency']:.0%} of the places hold tokens")


def spread(values):
    """Seeds summed up. The standard deviation is that of a sample; None for one seed."""
    return {"seeds": values, "mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "median": statistics.median(values)}


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


# ---------------------------------------------------------------------------- command line

def text_run(run):
    """The run, if it is one of text."""
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images and GLUE is text; probe and finetune take images too")
    return run


def attention_and_pool(run, attention=None, pool=None):
    """--attention and --pool, or their defaults: causal and last for left-to-right objectives, else full and mean."""
    left_to_right = run.objective.one_stream == "causal" or isinstance(run.objective, DiversityEnhanced)
    attention = attention or ("causal" if left_to_right else "full")
    pool = pool or ("last" if attention == "causal" else "mean")
    if (attention, pool) == ("causal", "first"):
        raise BadInput("--pool first sees one token only under causal attention; type --attention full or another --pool")
    return attention, pool


def refuse(args, run, names):
    """Raise BadInput if one of these options was given, which do not apply to this kind of checkpoint, or --data is of the
    other kind."""
    kind = "images" if run.tokenizer is None else "text"
    for name in names:
        if getattr(args, name, None) is not None and getattr(args, name) is not False:
            raise BadInput(f"--{name.replace('_', '-')} does not apply to a checkpoint of {kind} such as {run.name}; leave it out")
    if kind == "text" and is_images(args.data):
        raise BadInput(f"{run.name} was trained on text and {args.data} holds images")


def protocol_from(args, run):
    """The Protocol that the flags describe."""
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    lr = (4e-5 if run.model.config.width >= 512 else 5e-4) if args.lr is None else args.lr
    if not 0 < lr < math.inf:
        raise BadInput(f"--lr {lr:g} is not a positive number")
    given = {name: getattr(args, name) for name in ("epochs", "batch_size") if getattr(args, name)}
    return Protocol(lr, pool, attention, best_epoch=args.best_epoch, **given)


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


def describe_run(run):
    return f"{describe(run.objective)} ({run.path})" + (f", step {run.step:,}" if run.step else "")


def fewer(part, args):
    """The training examples that --label-fraction and --max-train leave."""
    return part.only(label_subset(part.labels, args.label_fraction, seed=0)).at_most(args.max_train)


def finetune_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        import vision  # it stands above this file
        return vision.finetune_images(args, run, autocast)
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


def add_commands(command):
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
