"""Figure 2: how similar the features of held-out contexts are, in different texts.

    python evaluate.py connectivity CKPT [CKPT ...] --plot figure2.png
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import plots
from objectives import draw_batch
from run import evaluation_sequences
from tasks.hub import about, finite, open_runs
from util import BadInput, positive, table


@torch.no_grad()
def features_of(run, corpus, count, seed=0):
    """`count` features f(X) of contexts X in held-out text, drawn by the run's own objective, equally many
    from each sequence -> features float32 (n, D) and the sequence that each came from (n,), on the CPU."""
    sequences, device = evaluation_sequences(run, corpus, count)[0], run.model.query.device
    each, generator, rows = math.ceil(count / len(sequences)), torch.Generator().manual_seed(seed), []
    for first in tqdm(range(0, len(sequences), 64), unit=" batches", leave=False, delay=2, mininterval=1):
        tokens = sequences[first:first + 64]
        batch = draw_batch(run.objective, run.path, tokens, run.model.config.vocab, generator)
        wanted = torch.rand(batch.weight.shape, generator=generator) * batch.weight
        chosen = wanted.topk(min(each, wanted.shape[1]))
        targets, cuts = (x.gather(1, chosen.indices) for x in (batch.targets, batch.cuts))   # (B, each)
        x, f, p, c = (part.to(device) for part in (tokens, batch.groups, targets, cuts))
        features = run.model(x, f, p, run.path, c, padded=False).float().cpu()               # (B, each, D)
        texts = torch.arange(first, first + len(tokens))[:, None].expand_as(targets)
        rows.append((features[chosen.values > 0], texts[chosen.values > 0]))
    features, texts = map(torch.cat, zip(*rows))
    pick = torch.randperm(len(texts), generator=generator)[:count].sort().values
    return finite(run, features)[pick], texts[pick]


def top_pairs(x, texts, count=100_000, block=256):
    """The `count` largest x_i . x_j of pairs from different texts, descending: x (N, D), texts (N,)."""
    best = x.new_empty(0)
    for i in range(0, len(x), block):            # so that memory grows with N and not with its square
        product = x[i:i + block] @ x[i:].T                                       # (block, N - i)
        pairs = (texts[i:i + block, None] != texts[i:]).triu(1)                  # each pair once
        best = torch.cat([best, product[pairs]])
        best = best.topk(min(count, len(best))).values
    return best


def mean_product(x, texts):
    """Mean of x_i . x_j over all pairs from different texts."""
    x, texts = x.cpu().double(), texts.cpu()                                   # MPS has no float64
    _, text, size = texts.unique(return_inverse=True, return_counts=True)
    within = x.new_zeros(len(size), x.shape[1]).index_add_(0, text, x)         # sum of x over each text
    pairs = len(x) ** 2 - size.square().sum()
    return ((x.sum(0).square().sum() - within.square().sum()) / pairs).item()


def similarities(features, texts, count=100_000):
    """Figure 2's surrogate for how connected the samples are. `inner_product` is the paper's; `cosine`, which
    has no unit of the network's own, compares networks."""
    if len(texts.unique()) < 2:
        raise BadInput("similarities take features from two texts; give more --data or more --features")
    results = {}
    for name, x in (("inner_product", features), ("cosine", F.normalize(features))):
        top = top_pairs(x, texts, count).cpu().double().numpy()
        ranks = np.unique(np.geomspace(1, len(top), 200).round().astype(int))
        results[name] = {"mean_of_all": mean_product(x, texts), "mean": top.mean().item(),
                         "least": top[-1].item(),
                         "curve": {"rank": ranks.tolist(), "similarity": top[ranks - 1].tolist()}}
    return {"features": len(texts), "texts": len(texts.unique()), "pairs": len(top), **results}


def connectivity_command(args):
    rows = []
    for name, run, autocast, text in open_runs(args):
        with autocast:
            features, texts = features_of(run, text, args.features, args.seed)
        device = run.model.query.device
        rows.append({"checkpoint": name, "label": name, **about(run),
                     **similarities(features.to(device), texts.to(device), args.top)})
    print("{features:,} features f(X) of {texts:,} sequences of {data}; the {pairs:,} most similar pairs"
          .format(data=text.name, **rows[0]))
    for name in ("inner_product", "cosine"):
        cells = [[row["label"], *(f"{row[name][key]:.4g}" for key in ("mean_of_all", "mean", "least"))]
                 for row in rows]
        print("\n" + table([[name.replace("_", " "), "all pairs", "top pairs", "least"], *cells]))
    results = {"data": text.name, "checkpoints": rows}
    if args.plot:
        plots.ranks(args.plot, results)
    return results, None


def add_commands(command):
    """Register it with evaluate.py: `command(name, function, text, many)` gives a parser."""
    add = command("connectivity", connectivity_command, many=True,
                  text="similarity of features of held-out contexts (Figure 2)").add_argument
    add("--data", help="as for perplexity (default: the first checkpoint's validation text)")
    add("--features", type=positive, default=8000, help="contexts, 8000 in the paper")
    add("--top", type=positive, default=100_000, help="most similar pairs to show")
    add("--seed", type=int, default=0, help="of the choice of contexts")
    add("--plot", metavar="FILE", help="picture of similarity over rank")
