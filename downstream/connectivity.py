"""Figure 2: how similar the features of held-out contexts are, in different texts.

    python evaluate.py connectivity CKPT [CKPT ...] --plot figure2.png
"""

import math
from pathlib import Path

import numpy as np
import torch

from data import Sequences, load_evaluation
from downstream.hub import open_run
from engine.runs import about
from objectives import describe, draw_batch
from support.cli import BadInput, import_optional, progress
from text.folders import Corpus


def held_out_text(run, data=None):
    """What --data names, as a Corpus whose `val` is evaluated on. None: the data of the run, as its folder
    keeps it where that was raw text."""
    if not run.text:
        raise BadInput(f"{run.name} was trained on images; this command reads text")
    if data is None:
        data = run.settings.data
        if data is None:
            raise BadInput(f"{run.name} does not come with a text to evaluate on; give one with --data")
        if (run.folder / "data").exists():  # raw text that train.py tokenized
            data = str(run.folder / "data")
    return load_evaluation(data, run.tokenizer)


def evaluation_sequences(run, data=None, count=200):
    """(`count` sequences of held-out text (N, S), the same for every checkpoint of one tokenizer and length;
    its tokens per byte; the name of the data). `data`: as for `held_out_text`, or what that returned."""
    corpus = data if isinstance(data, Corpus) else held_out_text(run, data)
    data, S = corpus.name, run.settings.length
    whole = corpus.val[:len(corpus.val) // S * S]
    if len(whole) < 2 * S or count < 2:
        raise BadInput(f"a standard error takes at least two sequences of {S} tokens; {data} has "
                       f"{len(corpus.val):,} tokens to evaluate on, and {count} sequences are asked for")
    sequences = Sequences(whole, S, run.tokenizer.separator, seed=0)
    return sequences.batch(0, min(count, len(sequences))), len(corpus.val) / corpus.val_bytes, data


# ---------------------------------------------------------------------------- similarity

@torch.no_grad()
def features_of(run, data, count, seed=0, quiet=True):
    """`count` features f(X) of contexts X in held-out text, from which the run's network predicts X+.

    The same sequences for every checkpoint of one tokenizer and length: `count` of them, or all that there
    are. From each the same number of contexts, drawn by the run's own objective; one, where there are enough
    sequences.

    Returns features (n, D), float32; targets (n,), the ids of X+; texts (n,), the sequence that
    each came from; n is less than `count` only where the text is too short. All on the CPU.
    """
    sequences = evaluation_sequences(run, data, count)[0]
    each, generator, rows = math.ceil(count / len(sequences)), torch.Generator().manual_seed(seed), []
    for first in progress(range(0, len(sequences), 64), quiet, desc="features", unit=" batches"):
        tokens = sequences[first:first + 64]
        batch = draw_batch(run.objective, run.path, tokens, run.model.config.vocab, generator)
        wanted = torch.rand(batch.weight.shape, generator=generator) * batch.weight
        chosen = wanted.topk(min(each, wanted.shape[1]))
        targets, is_target = batch.targets.gather(1, chosen.indices), chosen.values > 0   # (B, each)
        cuts, device = batch.cuts.gather(1, chosen.indices), run.model.query.device
        x, f, p, c = (part.to(device) for part in (tokens, batch.groups, targets, cuts))
        features = run.model(x, f, p, run.path, c, padded=False).float().cpu()           # (B, each, D)
        texts = torch.arange(first, first + len(tokens))[:, None].expand_as(targets)
        rows.append((features[is_target], tokens.gather(1, targets)[is_target], texts[is_target]))
    features, targets, texts = map(torch.cat, zip(*rows))
    if not features.isfinite().all():
        raise BadInput(f"{run.name} gives features that are not finite: its training diverged")
    pick = torch.randperm(len(texts), generator=generator)[:count].sort().values
    return features[pick], targets[pick], texts[pick]


def top_pairs(x, texts, count=100_000, block=2048, quiet=True):
    """The `count` largest inner products x_i . x_j of pairs from different texts, descending; fewer if there
    are fewer.

    x (N, D), texts (N,). Block by block: memory is that of a few blocks and of `count`, whatever N.
    """
    best = x.new_empty(0)
    for i in progress(range(0, len(x), block), quiet, desc="most similar pairs", unit=" blocks"):
        for j in range(i, len(x), block):
            product = x[i:i + block] @ x[j:j + block].T
            row, column = (product > (best[-1] if len(best) == count else -math.inf)).nonzero(as_tuple=True)
            pair = (i + row < j + column) & (texts[i + row] != texts[j + column])
            best = torch.cat([best, product[row[pair], column[pair]]])
            best = best.topk(min(count, len(best))).values
    return best


def mean_product(x, texts):
    """Mean of x_i . x_j over all pairs from different texts: of the square of the sum, less that within each
    text."""
    x, texts = x.cpu().double(), texts.cpu()                                   # MPS has no float64
    _, text, size = texts.unique(return_inverse=True, return_counts=True)
    within = x.new_zeros(len(size), x.shape[1]).index_add_(0, text, x)         # sum of x over each text
    pairs = len(x) ** 2 - size.square().sum()
    return ((x.sum(0).square().sum() - within.square().sum()) / pairs).item()


def similarities(features, texts, count=100_000, quiet=True):
    """Figure 2's surrogate for how connected the samples are: similarity of features f(X) of contexts of
    different texts.

    `inner_product`, the paper's, is in units of the network's own; `cosine` compares networks. For each: the
    mean over all pairs, and of the `count` most similar pairs the mean, quantiles, least, and the curve over
    their rank.
    """
    if len(texts.unique()) < 2:
        raise BadInput("similarities are of features from different texts; give more --data or more "
                       "--features")
    results = {}
    for name, x in (("inner_product", features), ("cosine", torch.nn.functional.normalize(features))):
        top = top_pairs(x, texts, count, quiet=quiet).cpu().double().numpy()
        ranks = np.unique(np.geomspace(1, len(top), 200).round().astype(int))
        results[name] = {"mean_of_all": mean_product(x, texts), "mean": top.mean().item(),
                         "least": top[-1].item(),
                         "quantiles": {f"{q:g}": float(np.quantile(top, q)) for q in (0.1, 0.5, 0.9)},
                         "curve": {"rank": ranks.tolist(), "similarity": top[ranks - 1].tolist()}}
    return {"features": len(texts), "texts": len(texts.unique()), "pairs": len(top), **results}


def print_connectivity(rows):
    """rows: results of `similarities` with `label`."""
    width = max(len(row["label"]) for row in rows)
    for name in ("inner_product", "cosine"):
        print(f"{name.replace('_', ' '):{width}s} {'all pairs':>10s} {'top pairs':>10s}"
              f"{'90%':>10s} {'median':>10s} {'10%':>10s} {'least':>10s}")
        for row in rows:
            x = row[name]
            cells = (x["mean_of_all"], x["mean"], *(x["quantiles"][q] for q in ("0.9", "0.5", "0.1")),
                     x["least"])
            print(f"{row['label']:{width}s}" + "".join(f" {cell:10.4g}" for cell in cells))
        print()


def plot_connectivity(path, rows):
    """Figure 2: similarity over the rank of the pair, one curve for each checkpoint; inner products, then
    cosines."""
    figure, both = import_optional("matplotlib.pyplot").subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name in zip(both, ("inner_product", "cosine")):
        for row in rows:
            axes.plot(row[name]["curve"]["rank"], row[name]["curve"]["similarity"], label=row["label"])
        axes.set(xlabel="rank of the pair", ylabel=name.replace("_", " "), xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows),
                  fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def connectivity_command(args):
    """`evaluate.py connectivity CKPT [CKPT ...]`: Figure 2 as a table, and as a picture.

    args     checkpoints, data (default: the first one's text, for all), features, top, seed, plot
    Returns ({"data", "same_sequences": whether all read the same cuts of it, "checkpoints": what
    `similarities` returns of each}, None). BadInput: text that is too short, a checkpoint of images, features
    not finite.
    """
    rows, data, tokenizers = [], args.data, set()
    for checkpoint in args.checkpoints:
        run, autocast = open_run(args, checkpoint)
        if data is None:
            data = evaluation_sequences(run, count=2)[2]                       # the first one's text, for all
        with autocast:
            features, _, texts = features_of(run, data, args.features, args.seed, quiet=False)
        device = run.model.query.device
        rows.append({"checkpoint": checkpoint, "label": describe(run.objective), **about(run),
                     **similarities(features.to(device), texts.to(device), args.top, quiet=False)})
        tokenizers.add((run.tokenizer.to_json(), run.settings.length))
    labels = [row["label"] for row in rows]
    for row in rows:
        if labels.count(row["label"]) > 1 or row["checkpoint"].startswith("hf:"):
            row["label"] = f"{Path(row['checkpoint']).name} {row['label']}"
    if args.json != "-":
        print(f"{rows[0]['features']:,} features f(X) of {rows[0]['texts']:,} sequences of {data}; the "
              f"{rows[0]['pairs']:,} most similar pairs\n")
        print_connectivity(rows)
        if len(tokenizers) > 1:
            print("Tokenizers or lengths differ: the sequences come from the same text, but are not the same "
                  "cuts of it.")
    if args.plot:
        plot_connectivity(args.plot, rows)
    return {"data": data, "same_sequences": len(tokenizers) == 1, "checkpoints": rows}, None
