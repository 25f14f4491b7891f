"""Linear probes: logistic regression on the features of a frozen encoder.

    python evaluate.py probe CKPT                                    pydoc passages by package
    python evaluate.py probe CKPT --data sst2 --glue-dir DIR --layer all
    python evaluate.py probe CKPT --data my.csv --labels-per-class 10

The strength of the L2 penalty is chosen on a part of the training examples, where these are few on each fifth
in turn. Checkpoints of images go to vision.py.
"""

import math

import torch
import torch.nn.functional as F

from downstream import glue
from downstream.encoding import encode, pool_features, text_batches
from downstream.finetune import PLAIN, correctness
from support.cli import BadInput, progress

L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # the choices, from strong to weak
FEW = 1000  # examples; with fewer, the strength is chosen on each fifth in turn


def frozen_features(run, inputs, pool, causal, layer=None, autocast=PLAIN, quiet=True, size=64):
    """encode_all of tokenized texts."""
    batches = text_batches(inputs, run.settings.length, next(run.model.parameters()).device, size)
    return encode_all(run, batches, len(inputs.lengths), pool, causal, layer, autocast, quiet)


@torch.no_grad()
def encode_all(run, batches, count, pool, causal, layer=None, autocast=PLAIN, quiet=True):
    """Pooled features of a frozen encoder -> {layer: float32 (count, D) on the CPU}, one pass for all layers.

    batches  pairs (row numbers, TextBatch) that make up `count` rows
    layer    None: the last, after the final norm; a number from 0 (the embedding); or "all"
    """
    features = {}
    run.model.eval()
    with progress(quiet=quiet, total=count, desc="features", unit=" examples") as bar:
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
                table = features.setdefault(key, pooled.new_empty(count, pooled.shape[1]))
                table[torch.from_numpy(rows)] = pooled
            bar.update(len(rows))
    if not all(x.isfinite().all() for x in features.values()):
        raise BadInput("the features are not finite: the model's training diverged")
    return features


def logistic_regression(x, y, l2, classes, start=None, iterations=500):
    """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + l2/2 ||W||^2, the intercept
    left free.

    x (N, D) floating point, y (N,) class numbers -> weights (D + 1, classes), the intercept last.
    scikit-learn's C is 1 / (N l2), but 2 / (N l2) for two classes: it has one vector v for both, where ours
    are v/2 and -v/2, whose squares add up to half of v's. `start`: weights to start from.
    """
    w = (x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()).requires_grad_()
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


def fit_probe(train_x, train_y, test_x, test_y, seed=0, quiet=True):
    """Linear probe: features (N, D), standardised as the training part is, and class numbers (N,).

    The L2 strength is chosen by cross-entropy on a fifth of the training data (on each fifth in turn, where
    these are fewer than FEW), from strong to weak until it gets worse; the classifier is then fitted to all
    of them. Returns the figures of probe_figures.
    """
    train_y, test_y = (torch.as_tensor(y, device=train_x.device) for y in (train_y, test_y))
    classes = int(max(train_y.max(), test_y.max())) + 1
    mean, std = train_x.double().mean(0), train_x.double().std(0)
    train_x, test_x = ((x.double() - mean) / torch.where(std > 1e-8, std, 1.0) for x in (train_x, test_x))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed)).to(train_x.device)
    fifths = [order[k * len(order) // 5:(k + 1) * len(order) // 5] for k in range(5)]
    held = [rows for rows in fifths[:5 if len(order) < FEW else 1] if 0 < len(rows) < len(order)]
    fits = [order[~torch.isin(order, rows)] for rows in held]
    best, strength, start, kept = math.inf, L2[0], [None] * len(held), None
    for l2 in progress(L2 if held else (), quiet, desc="strength of the penalty", unit=" strengths"):
        start = [logistic_regression(train_x[fit], train_y[fit], l2, classes, w)
                 for fit, w in zip(fits, start)]
        loss = sum(F.cross_entropy(linear(train_x[rows], w), train_y[rows], reduction="sum").item()
                   for rows, w in zip(held, start))  # each started from the stronger penalty's weights
        if loss > best:
            break
        best, strength, kept = loss, l2, start[0]
    w = logistic_regression(train_x, train_y, strength, classes, kept)
    return probe_figures(linear(train_x, w).argmax(1), train_y, linear(test_x, w).argmax(1), test_y,
                         l2=strength)


def probe_figures(train_predicted, train_y, test_predicted, test_y, **settings):
    """What a probe reports of its predicted and the true class numbers, all (N,), and of its settings:
    accuracy with its 95% interval, `majority`, what the largest class of the training data would score, and
    `correct`, a 0 or 1 for every test example."""
    right = int((test_predicted == test_y).sum())
    majority = float((test_y == train_y.bincount().argmax()).double().mean())
    return {"accuracy": right / len(test_y), "interval": wilson(right, len(test_y)), "majority": majority,
            "matthews": glue.matthews(test_predicted.cpu().numpy(), test_y.cpu().numpy()),
            "train_accuracy": float((train_predicted == train_y).double().mean()), **settings,
            "train": len(train_y), "test": len(test_y),
            "correct": correctness(test_predicted.cpu(), test_y.cpu())}


def wilson(correct, n, z=1.959964):
    """95% confidence interval of a share (Wilson 1927) -> [low, high]."""
    p, scale = correct / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / scale, z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def print_probes(probes):
    """A table of {layer: figures of a probe}."""
    print(" layer   accuracy   95% interval     matthews   training        l2")
    for name, r in probes.items():
        low, high = (100 * end for end in r["interval"])
        print(f"{name:>6s}     {100 * r['accuracy']:6.1f}   {low:5.1f} .. {high:5.1f}     "
              f"{r['matthews']:8.3f}     {100 * r['train_accuracy']:6.1f}   {r.get('l2', '-'):>7}")
    print(f"majority class: {100 * r['majority']:.1f}")
