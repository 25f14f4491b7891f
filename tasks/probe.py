"""Linear probes: classifiers on the features of a frozen encoder, of labelled text and of images.

    python evaluate.py probe CKPT --data my.csv --labels-per-class 10 --layer all
    python evaluate.py probe CKPT --data DIR --classifier sgd --pixels  MAE's protocol; raw pixels beside it
    python evaluate.py transfer CKPT --data A B C                       Table 6

A text is encoded as `text [SEP]`, a pair as `a [SEP] b [SEP]`; an image as all patches of its centre. The
encoder attends causally for left-to-right objectives, fully for the others. Features of the last layer are
averaged over the tokens; of text under causal attention the last token's are taken, which has seen all.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import prefetch
from images import ImageSet, Patches, load_images
from objectives import describe
from run import warmup_cosine
from tasks import glue
from tasks.hub import finite, open_run
from util import BadInput, printable, table

PLAIN = contextlib.nullcontext()  # in place of an autocast context
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # R8: texts are padded to one of these
L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # strengths of the penalty to choose from
FEW = 1000  # examples; with fewer, the strength is chosen on each fifth in turn


def labelled_data(args, run, source=None, seed=0):
    """The labelled texts or images that the options describe, few of them if asked for -> glue.Dataset."""
    if run.tokenizer is None:
        source = source or run.settings.data
        images = load_images(source, run.model.config.size)
        data = glue.Dataset(images.name, images.classes, ("accuracy",), images.train, {"": images.val})
    elif source in (None, "pydoc"):
        data = glue.pydoc_dataset()
    elif glue.task_key(source) in glue.TASKS and not Path(source).is_file():
        data = glue.glue_dataset(args.glue_dir, glue.task_key(source))
    else:
        data = glue.table_dataset(source, args.dev, getattr(args, "regression", False),
                                  tuple(args.text_column), args.label_column)
    train = data.train
    rows = glue.label_subset(train.labels, args.label_fraction, args.labels_per_class, seed)
    if len(rows) < len(train.labels):  # all may stay on disk
        train = train.only(rows)
    train = at_most(train, args.max_train)
    if len(np.unique(train.labels)) < 2:
        raise BadInput(f"{source} has only one label among its training examples: nothing to tell apart")
    dev = {suffix: at_most(part, args.max_test) for suffix, part in data.dev.items()}
    return replace(data, train=train, dev=dev)


def at_most(part, count):
    """`count` random texts, the same for everyone; about so many images, of each class alike. None: all."""
    total = len(part.labels)
    if count is None or count >= total:
        return part
    if isinstance(part, ImageSet):
        return part.only(glue.label_subset(part.labels, count / total))
    return part.only(np.sort(np.random.default_rng(0).permutation(total)[:count]))


# ---------------------------------------------------------------------------- batches of texts and images

def prepare(run, part):
    """What `every_batch` takes: texts as arrays of ids, of a pair the longer cut first; images as such."""
    if run.tokenizer is None:
        return part

    def separated(*texts):
        return [i for text in texts for i in (*text, run.tokenizer.separator)]

    layout, rows = getattr(run.tokenizer, "pair", separated), []  # hf: models have layouts of their own
    room = run.settings.length - len(layout(*[[] for _ in part.texts[0]]))
    for texts in tqdm(part.texts, desc="tokenizing", unit=" texts", leave=False, delay=2, mininterval=1):
        a, *b = map(run.tokenizer.encode, texts)
        if b:
            a, b = a[:max(room - len(b[0]), (room + 1) // 2)], [b[0][:max(room - len(a), room // 2)]]
        rows.append(np.array(layout(a[:room], *b), np.int32))
    return rows


def batch_rows(lengths, size, seed=None, epoch=0):
    """Which rows make up each batch of an epoch -> list of arrays. seed None: by length, for scoring. R8:
    texts of like length share a batch; a seeded order is sorted within pools of 50 batches."""
    if seed is None:
        return np.split(np.argsort(lengths, kind="stable"), range(size, len(lengths), size))
    rng, batches = np.random.default_rng([seed, epoch]), []
    for pool in np.split(rng.permutation(len(lengths)), range(50 * size, len(lengths), 50 * size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(size, len(pool), size))
    return [batches[k] for k in rng.permutation(len(batches))]


def text_batch(run, prepared, rows):
    """What an encoder takes of these texts: ids (B, L), padding bool (B, L), or None where nothing is."""
    ids, device = [prepared[row] for row in rows], run.model.query.device
    lengths = np.array(list(map(len, ids)))
    L = min([length for length in LENGTHS if length >= lengths.max()] + [run.settings.length])
    padding = np.arange(L) >= lengths[:, None]
    tokens = np.zeros(padding.shape, np.int64)
    tokens[~padding] = np.concatenate(ids)
    padding = torch.from_numpy(padding).to(device) if padding.any() else None
    return torch.from_numpy(tokens).to(device), padding


def every_batch(run, prepared):
    """Every text or image once -> triples (row numbers, ids or patches, padding)."""
    if run.tokenizer is not None:
        batches = batch_rows(np.array(list(map(len, prepared))), 64)
        return ((rows, *text_batch(run, prepared, rows)) for rows in batches)
    source = Patches(prepared, run.model.config, device=run.model.query.device)

    def draw(start):
        rows = np.arange(start, min(start + 128, len(prepared)))
        return rows, source.batch(start, len(rows)), None

    return prefetch(draw, range(0, len(prepared), 128))


# ---------------------------------------------------------------------------- features

def attention_and_pool(run, attention=None, pool=None):
    """What was asked for, or else the defaults that the top of this file names."""
    attention = attention or run.objective.attention
    return attention, pool or ("last" if attention == "causal" and run.tokenizer is not None else "mean")


def pool_features(features, padding, pool):
    """features (B, L, D) -> float32 (B, D): the mean over the tokens, or the last token's."""
    features = features.float()
    if padding is None:
        return features[:, -1] if pool == "last" else features.mean(1)
    lengths = (~padding).sum(1)
    if pool == "last":
        return features[torch.arange(len(features), device=features.device), lengths - 1]
    return features.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None]


@torch.no_grad()
def frozen_features(run, prepared, pool, causal, layer="last", autocast=PLAIN):
    """Pooled features of a frozen encoder -> {layer: float32 (N, D) on the CPU}. layer: "last", after the
    final norm; "0", the embedding, or another number; or "all", in one pass."""
    features, batches = {}, every_batch(run, prepared)
    run.model.eval()
    for rows, tokens, padding in tqdm(batches, desc="features", leave=False, delay=2, mininterval=1):
        with autocast:
            states = run.model.encode(tokens, padding, causal, layer != "last")
        states = {"last": states} if layer == "last" else {str(k): x for k, x in enumerate(states)}
        if layer not in ("all", *states):
            raise BadInput(f"--layer {layer} is not in 0..{len(states) - 1}, 0 being the embedding")
        for key in states if layer == "all" else [layer]:
            pooled = finite(run, pool_features(states[key], padding, pool).cpu())
            found = features.setdefault(key, pooled.new_empty(len(prepared), pooled.shape[1]))
            found[torch.from_numpy(rows)] = pooled
    return features


def features(run, examples, attention=None, pool=None):
    """Features of texts (str, or pairs of them), or of images uint8 (N, H, W, 3) -> float32 (N, D)."""
    attention, pool = attention_and_pool(run, attention, pool)
    if run.tokenizer is None:
        part = ImageSet(np.asarray(examples), np.zeros(len(examples), np.int64))
    else:
        part = glue.Part([(x,) if isinstance(x, str) else tuple(x) for x in examples])
    return frozen_features(run, prepare(run, part), pool, attention == "causal")["last"]


# ---------------------------------------------------------------------------- classifiers

def linear(x, w):
    return torch.addmm(w[-1], x, w[:-1])


def logistic_regression(x, y, l2, classes, start=None):
    """Mean cross-entropy + l2/2 ||W||^2 at its minimum: x (N, D), y (N,) -> weights (D + 1, classes), the
    intercept last. scikit-learn's C is 1 / (N l2); for two classes, with one vector for both, 2 / (N l2)."""
    w = (x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x, w), y) + 0.5 * l2 * w[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def fit_probe(train_x, train_y, test_x, test_y, seed=0):
    """Logistic regression on standardised features (N, D) and class numbers (N,), in float64 (R9). The L2
    strength is chosen by cross-entropy on a fifth of the training data (on each fifth in turn where they are
    FEW), from strong to weak until it gets worse."""
    train_y, test_y = torch.as_tensor(train_y), torch.as_tensor(test_y)
    classes = int(max(train_y.max(), test_y.max())) + 1
    mean, std = train_x.double().mean(0), train_x.double().std(0)
    train_x, test_x = ((x.double() - mean) / torch.where(std > 1e-8, std, 1.0) for x in (train_x, test_x))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    fifths = [order[k * len(order) // 5:(k + 1) * len(order) // 5] for k in range(5)]
    held = [rows for rows in fifths[:5 if len(order) < FEW else 1] if len(rows)]
    fits = [order[~torch.isin(order, rows)] for rows in held]
    best, start = math.inf, [None] * len(held)
    for l2 in L2:  # each fit starts from the weights of the stronger penalty
        start = [logistic_regression(train_x[fit], train_y[fit], l2, classes, w)
                 for fit, w in zip(fits, start)]
        loss = sum(F.cross_entropy(linear(train_x[rows], w), train_y[rows], reduction="sum").item()
                   for rows, w in zip(held, start))
        if loss > best:
            break
        best, strength, kept = loss, l2, start[0]
    w = logistic_regression(train_x, train_y, strength, classes, kept)
    return figures(linear(test_x, w).argmax(1), train_y, test_y, l2=strength)


def sgd_probe(train_x, train_y, test_x, test_y, seed=0, epochs=90):
    """MAE's linear probe (He et al. 2021, A.1) on the same: batch norm without affine map, a linear layer;
    rate 0.1 * batch / 256, 10 of 90 epochs of warm-up, cosine to 0, momentum 0.9, no decay. Each feature is
    computed once; small batches of SGD stand in for LARS."""
    train_y, test_y = torch.as_tensor(train_y), torch.as_tensor(test_y)
    (N, D), classes = train_x.shape, int(max(train_y.max(), test_y.max())) + 1
    size, generator = min(256, N), torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.BatchNorm1d(D, eps=1e-6, affine=False), nn.Linear(D, classes))
    nn.init.normal_(model[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(model[1].bias)
    lr, steps = 0.1 * size / 256, epochs * (N // size)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine((step + 0.5) / steps, 10 / 90))
    for _ in range(epochs):
        for rows in torch.randperm(N, generator=generator).split(size)[:N // size]:  # drops the rest
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[rows]), train_y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        predicted = model.eval()(test_x).argmax(1)
    return figures(predicted, train_y, test_y, epochs=epochs, batch_size=size, lr=lr)


def figures(predicted, train_y, test_y, **settings):
    """What a probe reports. `majority`: what the largest class of the training data would score."""
    correct = (predicted == test_y).int().tolist()
    accuracy = sum(correct) / len(correct)
    return {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / len(correct)),
            "majority": float((test_y == train_y.bincount().argmax()).double().mean()), **settings,
            "train": len(train_y), "test": len(test_y), "correct": correct, "predictions": predicted.tolist()}


# ---------------------------------------------------------------------------- commands

def probe(args, run, autocast, source):
    """A classifier on the features of each layer that was asked for, of one labelled set -> dict."""
    data = labelled_data(args, run, source, args.seed)
    if data.classes is None:
        raise BadInput(f"{source} has scores for labels and a probe predicts classes; finetune does both")
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    suffix, dev = next(iter(data.dev.items()))
    parts = [prepare(run, part) for part in (data.train, dev)]
    x, test_x = (frozen_features(run, part, pool, attention == "causal", args.layer, autocast)
                 for part in parts)
    if args.pixels:
        x["pixels"], test_x["pixels"] = (
            torch.cat([x.flatten(1).cpu() for _, x, _ in every_batch(run, part)]) for part in parts)
    fit = sgd_probe if args.classifier == "sgd" else fit_probe
    layers = {name: fit(x[name], data.train.labels, test_x[name], dev.labels, args.seed) for name in x}
    return {"data": data.name + suffix, "classes": data.classes, "classifier": args.classifier, "pool": pool,
            "attention": attention, "layers": layers, "places": dev.places}


def percent(found):
    return f"{100 * found['accuracy']:.1f} ± {100 * found['stderr']:.1f}"


def probe_command(args):
    run, autocast = open_run(args)
    if args.pixels and run.tokenizer is not None:
        raise BadInput(f"--pixels is for images, and {run.name} was trained on text")
    results = probe(args, run, autocast, args.data)
    *_, last = results["layers"].values()
    rows = [[name, percent(found)] for name, found in results["layers"].items()]
    rows = [["layer", "accuracy, %"], *rows, ["largest class", f"{100 * last['majority']:.1f}"]]
    print(printable(
        f"{run.name}: {describe(run.objective)}, linear probe on {results['data']}, {results['pool']} "
        f"pooling, {results['attention']} attention\n{len(results['classes'])} classes: "
        f"{glue.listed(results['classes'])}; {last['train']:,} training and {last['test']:,} dev "
        f"examples\n\n{table(rows)}"))
    return {"results": results}, run


def transfer_command(args):
    run, autocast = open_run(args, kind="images")
    sets, rows = [], [["", "classes", "training", "largest class", "accuracy, %"]]
    for source in args.data:
        found = probe(args, run, autocast, source)
        *_, last = found.pop("layers").values()
        sets.append({**found, **last, "classes": len(found["classes"]), "size": run.model.config.size})
        rows.append([found["data"], str(len(found["classes"])), f"{last['train']:,}",
                     f"{100 * last['majority']:.1f}", percent(last)])
    mean = sum(one["accuracy"] for one in sets) / len(sets)
    print(printable(table([*rows, ["mean", "", "", "", f"{100 * mean:.1f}"]])))
    return {"results": {"sets": sets, "mean": mean}}, run
