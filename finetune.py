"""What a pretrained encoder is good for: GLUE, fine-tuning on any labelled text, and a linear probe on frozen features.

    python evaluate.py probe CKPT                                    pydoc passages by package: nothing to download
    python evaluate.py probe CKPT --data sst2 --glue-dir DIR --layer all
    python evaluate.py finetune CKPT --data my.tsv --label-fraction 0.1
    python evaluate.py glue CKPT --glue-dir DIR --tasks cola,rte --seeds 3

A text is encoded as `text [SEP]`, a pair as `a [SEP] b [SEP]`: no segment embedding, the separator tells the two apart.
A tokenizer with a layout of its own (BERT's [CLS] a [SEP] b [SEP] with token types) has a method `pair` for it. What is too
long is cut at the end of the longer part. Batches are of texts of about one length and are padded to a few fixed lengths.

Fine-tuning follows the Cramming protocol as the paper does: all weights, a new linear layer on the pooled features, dropout
0.1, AdamW, cosine decay, 5 epochs of batches of 16. The paper's learning rate of 4e-5 is for its 768-wide model; one of
width 128 hardly moves with it and gets 5e-4. The last epoch counts: dev labels choose nothing unless --best-epoch.
Pooling and attention: the mean over all tokens under full attention for masked models, the last token under causal
attention for left-to-right ones (--pool, --attention).

Checkpoints of images go from `probe` and `finetune` to vision.py, which builds on the functions here.
"""
import contextlib
import copy
import json
import math
import os
import re
import statistics
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import glue
from data import pydoc_texts
from images import is_images
from masks import BadInput, positive, seed
from model import compute_dtype
from objectives import DiversityEnhanced, describe
from train import clip_gradients, make_optimizer, parts, warm_cosine

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # batches are padded to one of these
PLAIN = contextlib.nullcontext()     # in place of an autocast context
POOLS = ("mean", "last", "first")
TUNING = ("layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "erase", "weight_decay")
IMAGE_ONLY, TEXT_ONLY = ("classifier", "pixels", *TUNING), ("glue_dir", "dev", "regression")  # options
L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # the probe's choices, from strong to weak


# ---------------------------------------------------------------------------- labelled texts

class Part(NamedTuple):
    """Labelled texts: each a tuple of one or two str, and their class numbers int64 (N,) or scores float64 (N,)."""

    texts: list
    labels: np.ndarray

    def only(self, rows):
        return Part([self.texts[i] for i in rows], self.labels[rows])

    def at_most(self, count):
        """A random choice, the same for everyone, where there are more; None: all."""
        if count is None or count >= len(self.labels):
            return self
        return self.only(np.sort(np.random.default_rng(0).permutation(len(self.labels))[:count]))


@dataclass(frozen=True)
class Dataset:
    """A training part and dev parts, {suffix: Part}: one with suffix "", or MNLI's two. `classes` None: scores."""

    name: str
    classes: tuple
    metrics: tuple
    train: Part
    dev: dict
    skipped: int = 0  # malformed rows that were left out


def glue_dataset(glue_dir, name):
    """The training and dev part of a GLUE task."""
    if not glue_dir:
        raise BadInput(f"{name} is a GLUE task: say with --glue-dir where its files are ({glue.ADDRESS})")
    task = glue.TASKS[name]
    if task.parts[0][1] is None:
        raise BadInput(f"{name} has neither a training nor a labelled part; evaluate.py glue --tasks mnli,ax --submit DIR "
                       "predicts it with the mnli model")
    files = {"train": "train.tsv", **{suffix: dev for suffix, dev, _ in task.parts}}
    read = {key: glue.read(glue_dir, name, file) for key, file in files.items()}
    parts = {key: Part(examples.texts, glue.targets(name, examples)) for key, examples in read.items()}
    return Dataset(name, task.labels, task.metrics, parts.pop("train"), parts, sum(e.skipped for e in read.values()))


def tsv_dataset(path, dev=None, regression=None, held_out=0.2, seed=0):
    """A tab-separated file with a header line and columns text, label and possibly text_b. Without a `dev` file, a seeded
    share is held out. `regression` None: where all labels are numbers and not all of them whole."""
    paths = [Path(path)] + ([Path(dev)] if dev else [])
    tables = []
    for file in paths:
        if not file.is_file():
            raise BadInput(f"{file} does not exist; give a tab-separated file with columns text and label, pydoc, or a GLUE "
                           f"task: {', '.join(glue.TASKS)}")
        with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
            columns = lines.readline().rstrip("\r\n").split("\t")
        tables.append(glue.read_table(file, ("text", "text_b") if "text_b" in columns else ("text",), "label"))
    if len({len(table.texts[0]) for table in tables}) > 1:
        raise BadInput(f"{path} and {dev} do not both have a column text_b")
    if regression is None:
        regression = is_score(tables[0].labels)
    if regression:
        classes, metrics = None, ("pearson", "spearman")
        parts = [Part(table.texts, table.scores()) for table in tables]
    else:
        classes = tuple(sorted(set(tables[0].labels)))
        if len(classes) < 2:
            raise BadInput(f"{path} has only one label, {classes[0]!r}")
        metrics = ("accuracy", "matthews")
        parts = [Part(table.texts, table.classes(classes)) for table in tables]
    if not dev:
        order = np.random.default_rng(seed).permutation(len(parts[0].texts))
        count = max(1, round(held_out * len(order)))
        if len(order) < 2:
            raise BadInput(f"{path} has one row, which leaves nothing to hold out; give more, or --dev")
        parts = [parts[0].only(np.sort(order[count:])), parts[0].only(np.sort(order[:count]))]
    return Dataset(str(path), classes, metrics, parts[0], {"": parts[1]})


def is_score(labels):
    """Whether these label strings are numbers, not all of them whole."""
    with contextlib.suppress(ValueError):
        values = [float(label) for label in labels]
        return all(map(math.isfinite, values)) and not all(value.is_integer() for value in values)
    return False


def pydoc_dataset(packages=12, size=300):
    """Passages of the standard library's documentation (paragraphs of up to `size` characters), labelled with their package:
    those with the most text among the packages of at least four documented modules. Dev passages are from other modules
    than the training passages: for each package, about a fifth of its passages."""
    documents = {}
    for name, text in pydoc_texts():
        package = name.partition(".")[0]
        if package != "topics":
            documents.setdefault(package, {})[name] = passages(text, size)
    documents = {package: {name: found for name, found in modules.items() if found} for package, modules in documents.items()}
    amount = {package: sum(map(len, modules.values())) for package, modules in documents.items() if len(modules) >= 4}
    classes = tuple(sorted(sorted(amount, key=amount.get)[-packages:]))
    texts, labels = ([], []), ([], [])
    for k, package in enumerate(classes):
        # the same modules on every machine; the one with the most text is for training
        modules = sorted(documents[package], key=lambda name: zlib.crc32(name.encode()))
        largest, held = max(modules, key=lambda name: len(documents[package][name])), 0
        for name in modules:
            dev = name != largest and held < 0.2 * amount[package]
            held += dev * len(documents[package][name])
            texts[dev].extend((passage,) for passage in documents[package][name])
            labels[dev].extend([k] * len(documents[package][name]))
    train, dev = (Part(texts[side], np.array(labels[side])) for side in (0, 1))
    return Dataset("pydoc", classes, ("accuracy", "matthews"), train, {"": dev})


def passages(text, size):
    """Whole paragraphs, joined up to about `size` characters; shorter than 40 is no passage."""
    found = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if found[-1] and len(found[-1]) + len(paragraph) > size:
            found.append("")
        found[-1] += " " * bool(found[-1]) + paragraph
    return [passage for passage in found if len(passage) >= 40]


def load_dataset(data, glue_dir=None, dev=None, regression=None, seed=0):
    """What --data names: a GLUE task, pydoc, or a tab-separated file."""
    if data not in (*glue.TASKS, "pydoc"):
        return tsv_dataset(data, dev, regression, seed=seed)
    if dev or regression:
        raise BadInput(f"{data} has dev texts and a kind of label of its own; leave out --{'dev' if dev else 'regression'}")
    return pydoc_dataset() if data == "pydoc" else glue_dataset(glue_dir, data)


def label_subset(labels, fraction, seed):
    """A seeded share of the rows, stratified: of each class that share, but at least one. Scores: of all rows. Returns row
    numbers in order."""
    if not 0 < fraction <= 1:
        raise BadInput(f"--label-fraction {fraction:g} is not in 0..1, 0 excluded")
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == k) for k in np.unique(labels)] if labels.dtype.kind == "i" else [np.arange(len(labels))]
    return np.sort(np.concatenate([rng.permutation(rows)[:max(1, round(fraction * len(rows)))] for rows in groups]))


# ---------------------------------------------------------------------------- texts to batches

class Inputs(NamedTuple):
    """Tokenized texts, kept in memory."""

    ids: list       # arrays of token ids
    segments: list  # arrays of token types, or None where the model has none
    lengths: np.ndarray


class Batch(NamedTuple):
    tokens: Tensor   # (B, L)
    lengths: Tensor  # (B,)
    padding: Tensor  # (B, L) bool, True where there is no token, or None where there is one everywhere
    segments: Tensor  # (B, L), or None

    def part(self, start, stop):
        return Batch(*(None if field is None else field[start:stop] for field in self))


def tokenize(run, texts, quiet=True):
    """Texts, each a tuple of one or two str -> Inputs of at most the model's length."""
    encode, limit = run.tokenizer.encode, run.settings.length
    layout = getattr(run.tokenizer, "pair", None) or (lambda a, b: (with_separators(run.tokenizer.separator, a, b), None))
    second = [] if len(texts[0]) == 2 else None
    room = limit - len(layout([], second)[0])
    rows = []
    for text in tqdm(texts, desc="tokenizing", leave=False, disable=quiet or not sys.stderr.isatty()):
        a, b = truncate(encode(text[0]), second if second is None else encode(text[1]), room)
        rows.append(layout(a, b))
    ids = [np.asarray(row, np.int32) for row, _ in rows]
    segments = None if rows[0][1] is None else [np.asarray(row, np.int32) for _, row in rows]
    return Inputs(ids, segments, np.array([len(row) for row in ids]))


def with_separators(separator, a, b=None):
    """`a [SEP]` or `a [SEP] b [SEP]`."""
    return [*a, separator] if b is None else [*a, separator, *b, separator]


def truncate(a, b, room):
    """Cut two lists of ids (b may be None) to `room` in all, always from the end of the one that is longer."""
    if b is None:
        return a[:room], None
    return a[:max(room - len(b), (room + 1) // 2)], b[:max(room - len(a), room // 2)]


def padded_length(longest, limit):
    """The fixed length to which a batch is padded."""
    return min([length for length in LENGTHS if length >= longest] + [limit], default=limit)


def batch_rows(lengths, size, seed=None, epoch=0):
    """Which rows make up each batch of an epoch -> list of arrays. Texts of like length share a batch: the seeded order is
    sorted within pools of 50 batches, and the batches are shuffled. seed None: by length, for scoring."""
    if seed is None:
        return np.split(order := np.argsort(lengths, kind="stable"), range(size, len(order), size))
    rng, batches = np.random.default_rng([seed, epoch]), []
    order = rng.permutation(len(lengths))
    for pool in np.split(order, range(50 * size, len(order), 50 * size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(size, len(pool), size))
    return [batches[k] for k in rng.permutation(len(batches))]


def collate(inputs, rows, limit, device):
    """The Batch of these rows, on the device."""
    lengths = inputs.lengths[rows]
    L = padded_length(lengths.max(), limit)
    padding = np.arange(L) >= lengths[:, None]

    def table(arrays):
        cells = np.zeros((len(rows), L), np.int64)
        cells[~padding] = np.concatenate([arrays[i] for i in rows])
        return cells

    arrays = [table(inputs.ids), lengths, padding if padding.any() else None, inputs.segments and table(inputs.segments)]
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [None if x is None else x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return Batch(*(None if x is None else x.to(device) for x in tensors))


def in_order(inputs, limit, device, size=64):
    """Every text once -> pairs (row numbers, Batch)."""
    return ((rows, collate(inputs, rows, limit, device)) for rows in batch_rows(inputs.lengths, size))


def pool_features(features, batch, pool):
    """features (B, L, D) -> float32 (B, D): their mean over the tokens, or that of the last or the first token."""
    features = features.float()
    if pool == "first":
        return features[:, 0]
    if pool == "last":
        return features[torch.arange(len(features), device=features.device), batch.lengths - 1]
    if batch.padding is not None:
        features = features.masked_fill(batch.padding[..., None], 0)
    return features.sum(1) / batch.lengths[:, None]


def encode(model, batch, causal, every_layer=False):
    """The model's features (B, L, D), or a list of them."""
    segments = {} if batch.segments is None else {"segments": batch.segments}
    return model.encode(batch.tokens, batch.padding, causal, every_layer, **segments)


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
            optimizer.zero_grad(set_to_none=True)
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


# ---------------------------------------------------------------------------- linear probe

def frozen_features(run, inputs, pool, causal, layer=None, autocast=PLAIN, quiet=True, size=64):
    """encode_all of tokenized texts."""
    batches = in_order(inputs, run.settings.length, next(run.model.parameters()).device, size)
    return encode_all(run, batches, len(inputs.lengths), pool, causal, layer, autocast, quiet)


@torch.no_grad()
def encode_all(run, batches, count, pool, causal, layer=None, autocast=PLAIN, quiet=True):
    """Pooled features of a frozen encoder -> {layer: float32 (count, D) on the CPU}, one pass for all layers.

    batches  pairs (row numbers, Batch) that make up `count` rows
    layer    None: the last, after the final norm; a number from 0 (the embedding); or "all"
    """
    features = {}
    run.model.eval()
    with tqdm(total=count, desc="features", leave=False, disable=quiet or not sys.stderr.isatty()) as bar:
        for rows, batch in batches:
            with autocast:
                states = encode(run.model, batch, causal, every_layer=layer is not None)
            if layer is None:
                states = {"last": states}
            elif layer == "all":
                states = dict(enumerate(states))
            elif layer < len(states):
                states = {layer: states[layer]}
            else:
                raise BadInput(f"--layer {layer} is not in 0..{len(states) - 1}, 0 being the embedding")
            for key, state in states.items():
                pooled = pool_features(state, batch, pool).cpu()
                features.setdefault(key, pooled.new_empty(count, pooled.shape[1]))[torch.from_numpy(rows)] = pooled
            bar.update(len(rows))
    if not all(x.isfinite().all() for x in features.values()):
        raise BadInput("the features are not finite: the model's training diverged")
    return features


def logistic_regression(x, y, l2, classes, start=None, iterations=500):
    """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + l2/2 ||W||^2, the intercept left free.

    x (N, D) floating point, y (N,) class numbers -> weights (D + 1, classes), the intercept last. scikit-learn's C is
    1 / (N l2). `start`: weights to start from.
    """
    w = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype, device=x.device) if start is None else start.clone()
    w.requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x, w), y) + 0.5 * l2 * w[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach()


def linear(x, w):
    return torch.addmm(w[-1], x, w[:-1])


def probe(train_x, train_y, test_x, test_y, seed=0):
    """Linear probe: features (N, D) and class numbers (N,), standardised with the training part's mean and spread.

    The L2 strength is chosen by cross-entropy on a fifth of the training data, from strong to weak until it gets worse; the
    classifier is then fitted to all of them. Returns accuracy with its 95% interval, and `majority`, what the largest class
    of the training data would score.
    """
    train_y, test_y = (torch.as_tensor(y, device=train_x.device) for y in (train_y, test_y))
    classes = int(max(train_y.max(), test_y.max())) + 1
    mean, std = train_x.double().mean(0), train_x.double().std(0)
    train_x, test_x = ((x.double() - mean) / torch.where(std > 1e-8, std, 1.0) for x in (train_x, test_x))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    fit, held = order[len(order) // 5:], order[:len(order) // 5]
    best, strength, w, kept = math.inf, L2[0], None, None
    for l2 in L2 if len(held) else ():
        w = logistic_regression(train_x[fit], train_y[fit], l2, classes, w)  # starting from the stronger one's
        loss = F.cross_entropy(linear(train_x[held], w), train_y[held]).item()
        if loss > best:
            break
        best, strength, kept = loss, l2, w
    w = logistic_regression(train_x, train_y, strength, classes, kept)
    return probe_figures(linear(train_x, w).argmax(1), train_y, linear(test_x, w).argmax(1), test_y, l2=strength)


def probe_figures(train_predicted, train_y, test_predicted, test_y, **settings):
    """What a probe reports of its predicted and the true class numbers, all (N,), and of its settings."""
    correct = int((test_predicted == test_y).sum())
    majority = float((test_y == train_y.bincount().argmax()).double().mean())
    return {"accuracy": correct / len(test_y), "interval": wilson(correct, len(test_y)), "majority": majority,
            "matthews": glue.matthews(test_predicted.cpu().numpy(), test_y.cpu().numpy()),
            "train_accuracy": float((train_predicted == train_y).double().mean()), **settings,
            "train": len(train_y), "test": len(test_y)}


def wilson(correct, n, z=1.959964):
    """95% confidence interval of a share (Wilson 1927) -> [low, high]."""
    p, scale = correct / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / scale, z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


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


def open_any(args):
    """evaluate.open_run: -> Run, autocast context."""
    from evaluate import open_run  # evaluate.py stands above this file and is there when a command runs
    return open_run(args)


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
    run, autocast = open_any(args)
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
    run, autocast = open_any(args)
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


def probe_command(args):
    run, autocast = open_any(args)
    if run.tokenizer is None:
        import vision  # it stands above this file
        return vision.probe_images(args, run, autocast)
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


def print_probes(probes):
    """A table of {layer: figures of a probe}."""
    print(" layer   accuracy   95% interval     matthews   training        l2")
    for name, r in probes.items():
        low, high = (100 * end for end in r["interval"])
        print(f"{name:>6s}     {100 * r['accuracy']:6.1f}   {low:5.1f} .. {high:5.1f}     {r['matthews']:8.3f}     "
              f"{100 * r['train_accuracy']:6.1f}   {r.get('l2', '-'):>7}")
    print(f"majority class: {100 * r['majority']:.1f}")


def layer_number(text):
    """An argparse type: a number from 0, or all."""
    return text if text == "all" else seed(text)


def add_commands(command):
    """The commands of this file, for evaluate.py: `command(name, function, text)` gives a parser."""
    shared = {"pool": {"choices": POOLS, "help": "of the tokens' features (default: last under causal attention, else mean; images: mean)"},
              "attention": {"choices": ("causal", "full"), "help": "default: causal for left-to-right objectives, else full"},
              "max-train": {"type": positive, "metavar": "N", "help": "use a random N of the training examples only"}}
    tuning = {"epochs": {"type": positive, "help": "passes over the training examples (default: 5; images: 100, vit-tiny 10)"},
              "batch-size": {"type": positive, "help": "examples per step (default: 16; images: 1024, vit-tiny 128)"},
              "lr": {"type": float, "help": "peak learning rate (default: the paper's 4e-5, for models narrower than 512 5e-4; images: "
                                      "5e-4 x batch/256, vit-tiny 2e-3 x it)"},
              "best-epoch": {"action": "store_true", "help": "choose the best epoch on dev, which flatters the dev score"}}
    images = {"layer-decay": {"type": float, "help": "images: learning rate of a layer as a share of the next one's (default: 0.65)"},
              "drop-path": {"type": float, "help": "images: share of samples for which the last block is skipped (default: 0.1)"},
              "mixup": {"type": float, "help": "images: the Beta parameter of mixup, 0 for none (default: 0.8)"},
              "cutmix": {"type": float, "help": "images: that of CutMix (default: 1)"},
              "smoothing": {"type": float, "help": "images: of the labels (default: 0.1)"},
              "erase": {"type": float, "help": "images: probability of random erasing (default: 0.25)"},
              "weight-decay": {"type": float, "help": "images: of AdamW, on matrices (default: 0.05)"}}
    data = {"glue-dir": {"metavar": "DIR", "help": f"folder of the official GLUE files, from {glue.ADDRESS}"},
            "dev": {"metavar": "TSV", "help": "dev texts of a TSV (default: a fifth of it, held out)"},
            "label-fraction": {"type": float, "default": 1.0, "help": "share of the training examples, of each class alike"}}

    def add(sub, *groups):
        for name, keywords in [item for group in groups for item in group.items()]:
            sub.add_argument("--" + name, **keywords)

    sub = command("glue", glue_command, "fine-tune on the GLUE tasks and score their dev parts (Table 2)")
    add(sub, {"glue-dir": {**data["glue-dir"], "required": True},
              "tasks": {"default": "all", "help": f"all = {','.join(glue.TABLE2)}; or some of these, wnli, ax, with commas"},
              "seeds": {"type": positive, "default": 3, "metavar": "N", "help": "runs per task, of seeds 0 .. N - 1"},
              "submit": {"metavar": "DIR", "help": "write test predictions for the GLUE server, one zip per seed"},
              "results": {"metavar": "FILE", "help": "all results so far; what is in it is not computed again (default: "
                                                     "glue.json in the run folder)"}}, tuning, shared)
    sub = command("probe", probe_command, "logistic regression on frozen features")
    add(sub, {"data": {"help": "text: pydoc, a GLUE task, or a TSV with columns text, label and maybe text_b (default: pydoc); "
                               "images: as for train.py (default: the run's own)"},
              "layer": {"type": layer_number, "help": "0 (the embedding) upwards, or all (default: the last)"},
              "classifier": {"choices": ("lbfgs", "sgd"), "help": "images: logistic regression by L-BFGS or MAE's protocol "
                                                                  "(default: lbfgs)"},
              "pixels": {"action": "store_true", "help": "images: also the same classifier on raw pixels"},
              "seed": {"type": seed, "default": 0, "help": "of the split that chooses the L2 strength, or of the SGD"}},
        data, shared)
    sub = command("finetune", finetune_command, "fine-tune on labelled text, classes or scores, or on labelled images")
    add(sub, {"data": {"required": True, "help": "text: a TSV with columns text, label and maybe text_b; a GLUE task; pydoc; "
                                                 "images: as for train.py"},
              "regression": {"action": "store_true", "help": "labels are scores (default: if they are numbers, not all whole)"},
              "seeds": {"type": positive, "default": 1, "metavar": "N", "help": "runs, of seeds 0 .. N - 1"}},
        data, tuning, images, shared)
