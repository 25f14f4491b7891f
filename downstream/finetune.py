"""Fine-tuning on labelled texts; glue_runs.py and vision.py build on it.

    python evaluate.py finetune CKPT --data my.csv --label-fraction 0.1

It follows the Cramming protocol as the paper does: all weights, a new linear layer on the pooled features,
dropout 0.1, AdamW, cosine decay, 5 epochs of batches of 16. The paper's learning rate of 4e-5 is for its
768-wide model; one of width 128 hardly moves with it and gets 5e-4. The last epoch counts: dev labels choose
nothing unless --best-epoch.
"""

import contextlib
import copy
import math
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from downstream import glue
from downstream.encoding import batch_rows, collate, encode, pool_features, text_batches, tokenize
from engine.steps import clip_gradients, make_optimizer, parts, warm_cosine
from support.cli import BadInput, progress

PLAIN = contextlib.nullcontext()  # in place of an autocast context


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how fast to optimise."""

    lr: float                 # the peak: warm-up, then cosine to 0
    epochs: int = 5
    batch_size: int = 16
    micro_batch: int = 256    # examples per forward pass at most; the rest is accumulated
    warmup: float = 0.06      # share of the steps over which the learning rate rises
    clip: float = 1.0         # largest norm of the gradient; 0 for no clipping
    best_epoch: bool = False  # keep the epoch that scores best on the dev part: optimistic on that part


@dataclass(frozen=True, kw_only=True)
class Protocol(Budget):
    """How to fine-tune a network."""

    pool: str
    attention: str            # causal or full
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    beta2: float = 0.98
    dropout: float = 0.1


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
    """Fine-tune a copy of run.model. Returns a function Inputs -> class numbers (N,) or scores (N,), and
    figures of the run.

    labels    class numbers (N,), or scores (N,) with outputs = 1: those are learned in units of their
              standard deviation
    autocast  the context for the matrix products, entered anew for every step
    validate  with protocol.best_epoch: a function of such a prediction function to a number, the higher the
              better
    The weights of the new layer, the order of the texts and dropout each have a seed of their own, drawn from
    `seed`.
    """
    head_seed, order_seed, dropout_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    device, limit = next(run.model.parameters()).device, run.settings.length
    regression = labels.dtype.kind == "f"
    mean, spread = (labels.mean(), labels.std() or 1.0) if regression else (0.0, 1.0)
    targets = ((labels - mean) / spread).astype(np.float32) if regression else labels
    targets = torch.from_numpy(targets).to(device)
    model = Classifier(copy.deepcopy(run.model), run.model.config.width, outputs, protocol.pool,
                       protocol.attention == "causal", protocol.dropout, head_seed).to(device)
    torch.manual_seed(dropout_seed)

    def predict(inputs):
        scores = class_scores(model, text_batches(inputs, limit, device), len(inputs.lengths), autocast)
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

    figures = optimise(model, make_optimizer(model, protocol), batches,
                       math.ceil(len(labels) / protocol.batch_size),
                       loss, protocol, autocast, validate=validate and (lambda: validate(predict)), bar=bar)
    return predict, {**figures, "examples_per_second": protocol.epochs * len(labels) / figures["seconds"],
                     "padding_efficiency": float(tokens / places)}  # tokens that are not padding


def optimise(model, optimizer, batches, per_epoch, loss, budget, autocast=PLAIN, validate=None, bar=None):
    """Train for budget.epochs, under its schedule and clipping -> figures of the run.

    batches   a function from the epoch to an iterable of at least `per_epoch` pairs (input of the model,
              targets)
    loss      a function of the model's scores and the targets: a mean over them
    validate  with budget.best_epoch: a function of nothing to a number; the weights with the highest are kept
    A parameter group's learning rate is its own peak.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps, step, best, kept = budget.epochs * per_epoch, 0, -math.inf, None
    running = torch.zeros((), device=next(model.parameters()).device)
    preparing, start = 0.0, time.perf_counter()
    for epoch in range(budget.epochs):
        model.train()
        ready = iter(batches(epoch))
        for _ in range(per_epoch):
            clock = time.perf_counter()
            batch, wanted = next(ready)
            preparing += time.perf_counter() - clock
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * warm_cosine((step + 0.5) / steps, budget.warmup)
            cuts = parts(len(wanted), budget.micro_batch)
            for a, b in cuts:
                with autocast:
                    scores = model(batch if len(cuts) == 1 else batch.part(a, b))
                error = loss(scores, wanted[a:b]) * ((b - a) / len(wanted))
                error.backward()
                running += error.detach()
            clip_gradients(model, budget.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if bar is not None:
                bar.update(1)
        mean_loss = running.item() / per_epoch
        running.zero_()
        if not math.isfinite(mean_loss):
            raise BadInput(f"the loss is {mean_loss} in epoch {epoch + 1}; try a smaller --lr than "
                           f"{budget.lr:g}")
        if bar is not None:
            bar.set_postfix_str(f"loss {mean_loss:.3f}")
        if budget.best_epoch and validate and (score := validate()) > best:
            best, kept = score, (epoch + 1, copy.deepcopy(model.state_dict()))
    seconds = time.perf_counter() - start
    figures = {"train_loss": mean_loss, "seconds": seconds,
               "input_share": preparing / seconds}  # of the time, for making batches and moving them
    if kept:
        figures["best_epoch"] = kept[0]
        model.load_state_dict(kept[1])
    return figures


@torch.no_grad()
def class_scores(model, batches, count, autocast):
    """The scores (count, outputs) of all examples, in order; `batches`: pairs (row numbers, TextBatch)."""
    model.eval()
    scores = None
    for rows, batch in batches:
        with autocast:
            found = model(batch).cpu().numpy()
        scores = np.empty((count, found.shape[1]), np.float32) if scores is None else scores
        scores[rows] = found
    return scores


# ---------------------------------------------------------------------------- a data set

class Outcome(NamedTuple):
    """What one seed came to."""

    scores: dict      # {metric and suffix: score} on the dev parts
    predicted: dict   # {suffix: class numbers (N,), or scores (N,)} of the dev parts
    figures: dict     # of the run
    predict: object   # a function Inputs -> class numbers or scores


def fine_tune_once(run, dataset, inputs, protocol, seed, autocast=PLAIN, quiet=True):
    """Fine-tune with one seed on a Dataset whose Inputs are {"train": .., suffix: ..} -> Outcome."""
    def on_dev(predict):
        return {suffix: predict(inputs[suffix]) for suffix in dataset.dev}

    def first_score(predict):
        return next(iter(score_dev(dataset, on_dev(predict)).values()))

    steps = protocol.epochs * math.ceil(len(dataset.train.labels) / protocol.batch_size)
    outputs = 1 if dataset.classes is None else len(dataset.classes)
    with progress(quiet=quiet, total=steps, unit=" steps", desc=f"{dataset.name} seed {seed}") as bar:
        predict, figures = fine_tune(run, inputs["train"], dataset.train.labels, outputs, protocol, seed,
                                     autocast,
                                     validate=first_score, bar=bar)
    predicted = on_dev(predict)
    return Outcome(score_dev(dataset, predicted), predicted, figures, predict)


def score_dev(dataset, predicted):
    """{metric and suffix: score} of predictions {suffix: (N,)} on the dev parts."""
    return {metric + suffix: glue.METRICS[metric](predicted[suffix], part.labels)
            for suffix, part in dataset.dev.items() for metric in dataset.metrics}


def dev_examples(dataset, predicted):
    """What --json says of each dev example, for paired comparisons; `predicted` is {suffix: one array (N,) a
    seed}.

    labels (N,), predictions (seeds, N) and, of classes, correct (seeds, N) as 0 and 1, each with the part's
    suffix.
    """
    found = {}
    for suffix, part in dataset.dev.items():
        found["labels" + suffix] = part.labels.tolist()
        found["predictions" + suffix] = [values.tolist() for values in predicted[suffix]]
        if dataset.classes is not None:
            found["correct" + suffix] = [correctness(values, part.labels) for values in predicted[suffix]]
    return found


def correctness(predicted, true):
    """Which class numbers (N,) are right -> list of 0 and 1."""
    return (np.asarray(predicted) == np.asarray(true)).astype(int).tolist()


def tokenize_dataset(run, dataset, quiet=True):
    """{"train": Inputs, suffix: Inputs}."""
    parts = {"train": dataset.train, **dataset.dev}
    return {key: tokenize(run, part.texts, quiet) for key, part in parts.items()}


def tell_figures(figures):
    return (f"{figures['seconds']:.0f} s, {figures['input_share']:.1%} of them for making batches; "
            f"{figures['padding_efficiency']:.0%} of the places hold tokens")


def over_seeds(values):
    """Seeds summed up. The standard deviation is that of a sample; None for one seed."""
    return {"seeds": values, "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None, "median": statistics.median(values)}
