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
import math
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from downstream import glue
from downstream.labelled import batch_rows, collate, encode, in_order, pool_features, tokenize
from engine.steps import clip_gradients, make_optimizer, parts, warm_cosine
from support.cli import BadInput

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
