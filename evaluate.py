"""Evaluate a checkpoint of train.py: the front end of all evaluation.

    python evaluate.py perplexity CKPT [--data ...] [--by-length]     P(x_{k+1} | x_1 .. x_k), Eq. 2
    python evaluate.py generate CKPT --prompt TEXT                    samples
    python evaluate.py connectivity CKPT [CKPT ...]                   similarity of features (Figure 2)
    python evaluate.py glue | probe | finetune CKPT ...               classification (finetune.py, probe.py; images: vision.py)
    python evaluate.py transfer CKPT --data A B C                     probes on several image sets (vision.py)
    python evaluate.py reconstruct CKPT [CKPT ...]                    images completed patch by patch (reconstruct.py)

CKPT is a run folder, a checkpoint file, or hf:PATH for a model of the transformers package (hub.py).
"""
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import finetune
import probe
import reconstruct
import vision
from data import Sequences, import_optional, load_evaluation
from hub import load_run, open_run
from masks import BadInput, Parser, command_line, output_file, positive, seed
from objectives import describe, draw_batch, scores_next, target_nll
from train import choose_device

# ---------------------------------------------------------------------------- perplexity


@torch.no_grad()
def left_to_right(run, sequences, regime=None, tokens_at_once=1 << 14, quiet=True):
    """-log P(x_p | x_1 .. x_{p-1}) of every token p = 2..S of sequences (N, S), the way the model was trained.

    The objective says which group indices give each token its whole prefix and nothing else as context
    (`Objective.left_to_right`): one pass for `ar`, t for `dar`, S - 1 for `mlm` and `vl`. A pass computes the tokens
    up to its last f > 0 only, and the output layer of the scored rows only.
    Returns {regime: float32 (N, S - 1)}.
    """
    N, S = sequences.shape
    regimes = run.objective.left_to_right(S, run.path)
    if regime is not None and regime not in regimes:
        raise BadInput(f"--regime {regime} is for masks in one stream; this {run.path} checkpoint of "
                       f"{describe(run.objective)} knows one regime only: leave out --regime")
    device, results = run.model.query.device, {}
    for name, passes in regimes.items():
        if regime not in (None, name):
            continue
        nll = torch.full((N, S), math.nan)
        for groups in tqdm(passes, desc=name, leave=False, disable=quiet or not sys.stderr.isatty()):
            targets, length = scores_next(groups).nonzero()[:, 0], int(groups.count_nonzero())
            rows = max(1, tokens_at_once // length)
            for start in range(0, N, rows):
                tokens = sequences[start:start + rows, :length].to(device)
                f, t = (x.to(device).expand(len(tokens), -1) for x in (groups[:length], targets))
                nll[start:start + rows, targets] = target_nll(run.model, tokens, f, t, run.path, padded=False).cpu()
        results[name] = nll[:, 1:]
    return results


@torch.no_grad()
def training_order_nll(run, sequences, most=64):
    """Mean -log P of the targets given their own contexts, over all f where these are few, as for `dar`: the tokens of a
    group given what comes before the group. None where f cannot be listed, or where the order is left to right anyway."""
    listed = run.objective.outcomes(sequences.shape[1], most) if run.objective.one_stream != "mask" else None
    if listed is None or len(listed[0]) > most or all(torch.equal(f > 1, scores_next(f)) for f in listed[0]):
        return None
    total = count = 0
    for f, probability in zip(listed[0], listed[1].tolist()):
        targets = (f > 1).nonzero()[:, 0]
        for tokens in sequences.split(max(1, 2 ** 14 // sequences.shape[1])):
            tokens = tokens.to(run.model.query.device)
            f_, t = (x.to(tokens.device).expand(len(tokens), -1) for x in (f, targets))
            nll = target_nll(run.model, tokens, f_, t, run.path, padded=False)
            total, count = total + probability * nll.sum().item(), count + probability * nll.numel()
    return total / count


def summary(nll, tokens_per_byte):
    """Results from the -log P (N, S - 1) of N sequences. Perplexity is exp of the mean over tokens; the standard error
    treats sequences as the independent samples; `sequence_nll` are theirs, for paired comparisons of checkpoints."""
    mean, stderr = nll.mean().item(), nll.mean(1).std().item() / math.sqrt(len(nll))
    return {"nll": mean, "stderr": stderr, "perplexity": math.exp(mean), "perplexity_stderr": math.exp(mean) * stderr,
            "bits_per_byte": mean / math.log(2) * tokens_per_byte, "tokens": nll.numel(), "sequences": len(nll),
            "sequence_nll": nll.mean(1).tolist()}


def evaluation_sequences(run, data=None, count=200):
    """(`count` sequences of held-out text (N, S), the same for every checkpoint of one tokenizer and length; its tokens
    per byte; the name of the data). `data` None: the validation text of the run."""
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command reads text")
    if data is None:
        data = run.settings.data
        if data is None:
            raise BadInput(f"{run.name} does not come with a text to evaluate on; give one with --data")
        folder = Path(run.name) if Path(run.name).is_dir() else Path(run.name).parent
        if (folder / "data").exists():  # raw text that train.py tokenized
            data = str(folder / "data")
    corpus = load_evaluation(data, run.tokenizer)
    S = run.settings.length
    whole = corpus.val[:len(corpus.val) // S * S]
    if len(whole) < 2 * S or count < 2:
        raise BadInput(f"a standard error takes at least two sequences of {S} tokens; {data} has {len(corpus.val):,} tokens "
                       f"to evaluate on, and {count} sequences are asked for")
    sequences = Sequences(whole, S, run.tokenizer.separator, seed=0)
    return sequences.batch(0, min(count, len(sequences))), len(corpus.val) / corpus.val_bytes, data


def perplexity(run, data=None, max_sequences=200, regime=None, by_length=False, quiet=True):
    """Left-to-right likelihood of held-out text under a Run -> dict of results per regime."""
    sequences, tokens_per_byte, data = evaluation_sequences(run, data, max_sequences)
    results = {"data": data, "length": sequences.shape[1], "regimes": {}}
    start = time.perf_counter()
    for name, nll in left_to_right(run, sequences, regime, quiet=quiet).items():
        results["regimes"][name] = summary(nll, tokens_per_byte)
        if by_length:
            results["regimes"][name]["by_length"] = {
                "prefix": list(range(1, nll.shape[1] + 1)), "nll": nll.mean(0).tolist(),
                "stderr": (nll.std(0) / math.sqrt(len(nll))).tolist(),
                "bins": [{"first": low, "last": high, "sequence_nll": nll[:, low - 1:high].mean(1).tolist()}
                         for low, high in length_bins(nll.shape[1])]}
    scored = sum(r["tokens"] for r in results["regimes"].values())
    results["tokens_per_second"] = scored / (time.perf_counter() - start)
    order = training_order_nll(run, sequences)
    if order is not None:
        results["training_order_nll"], results["training_order_perplexity"] = order, math.exp(order)
    return results


def print_perplexity(results):
    for name, r in results["regimes"].items():
        print(f"{name:10s} perplexity {r['perplexity']:9.2f} ± {r['perplexity_stderr']:.2f}   nll {r['nll']:.4f} ± "
              f"{r['stderr']:.4f}   {r['bits_per_byte']:.3f} bits/byte   {r['tokens']:,} tokens")
    if "training_order_nll" in results:
        print(f"{'in groups':10s} perplexity {results['training_order_perplexity']:9.2f}"
              f"{'':8s}  nll {results['training_order_nll']:.4f}, each token given the groups before its own")


def length_bins(longest):
    """Single lengths are noisy: [(1, 1), (2, 3), (4, 7), ..] up to the longest."""
    edges = [2 ** k for k in range(longest.bit_length())] + [longest + 1]
    return [(low, high - 1) for low, high in itertools.pairwise(edges)]


def in_bins(curve):
    """Perplexity over bins of prefix lengths of a `by_length` dict -> [(first, last, perplexity)]."""
    return [(low, high, math.exp(np.mean(curve["nll"][low - 1:high]))) for low, high in length_bins(curve["prefix"][-1])]


def print_by_length(results):
    """Perplexity against the length of the prefix (Figure 3)."""
    columns = {name: in_bins(regime["by_length"]) for name, regime in results["regimes"].items()}
    print("prefix      " + "".join(f"{name:>12s}" for name in columns))
    for row in zip(*columns.values()):
        low, high, _ = row[0]
        print(f"{str(low) if low == high else f'{low}-{high}':12s}" + "".join(f"{cell:12.2f}" for _, _, cell in row))


def plot_by_length(path, curves):
    """Figure 3, in bins of lengths: curves is {label: by_length dict}. Regimes of one model, "model, regime", share a colour."""
    figure, axes = import_optional("matplotlib.pyplot").subplots(figsize=(7.5, 4), layout="constrained")
    models = list(dict.fromkeys(label.rpartition(", ")[0] or label for label in curves))
    for label, curve in curves.items():
        low, high, cells = zip(*in_bins(curve))
        colour = f"C{models.index(label.rpartition(', ')[0] or label)}"
        axes.plot(np.sqrt(np.multiply(low, high)), cells, "o--" if label.endswith("truncated") else "o-", color=colour, label=label)
    axes.set(xlabel="tokens in the prefix", ylabel="perplexity of the next token", xscale="log", yscale="log")
    axes.set_xticks(low, low)
    axes.minorticks_off()
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if min(axes.get_ylim()) <= t <= max(axes.get_ylim())]
    axes.set_yticks(ticks, ticks)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------- connectivity

@torch.no_grad()
def features_of(run, data, count, seed=0, quiet=True):
    """`count` features f(X) of contexts X in held-out text, from which the run's network predicts X+.

    The same sequences for every checkpoint of one tokenizer and length: `count` of them, or all that there are. From
    each the same number of contexts, drawn by the run's own objective; one, where there are enough sequences.
    Returns features (n, D), float32; targets (n,), the ids of X+; texts (n,), the sequence that each came from; n is less than
    `count` only where the text is too short. All on the CPU.
    """
    sequences = evaluation_sequences(run, data, count)[0]
    each, generator, rows = math.ceil(count / len(sequences)), torch.Generator().manual_seed(seed), []
    for first in tqdm(range(0, len(sequences), 64), desc="features", leave=False, disable=quiet or not sys.stderr.isatty()):
        tokens = sequences[first:first + 64]
        batch = draw_batch(run.objective, run.path, tokens, run.model.config.vocab, generator)
        chosen = (torch.rand(batch.weight.shape, generator=generator) * batch.weight).topk(min(each, batch.weight.shape[1]))
        targets, is_target = batch.targets.gather(1, chosen.indices), chosen.values > 0   # (B, each)
        inputs = (x.to(run.model.query.device) for x in (tokens, batch.groups, targets))
        features = run.model(*inputs, run.path, padded=False).float().cpu()              # (B, each, D)
        texts = torch.arange(first, first + len(tokens))[:, None].expand_as(targets)
        rows.append((features[is_target], tokens.gather(1, targets)[is_target], texts[is_target]))
    features, targets, texts = map(torch.cat, zip(*rows))
    if not features.isfinite().all():
        raise BadInput(f"{run.name} gives features that are not finite: its training diverged")
    pick = torch.randperm(len(texts), generator=generator)[:count].sort().values
    return features[pick], targets[pick], texts[pick]


def top_pairs(x, texts, count=100_000, block=2048, quiet=True):
    """The `count` largest inner products x_i . x_j of pairs from different texts, descending; fewer if there are fewer.

    x (N, D), texts (N,). Block by block: memory is that of a few blocks and of `count`, whatever N.
    """
    best = x.new_empty(0)
    for i in tqdm(range(0, len(x), block), desc="pairs", leave=False, disable=quiet or not sys.stderr.isatty()):
        for j in range(i, len(x), block):
            product = x[i:i + block] @ x[j:j + block].T
            row, column = (product > (best[-1] if len(best) == count else -math.inf)).nonzero(as_tuple=True)
            pair = (i + row < j + column) & (texts[i + row] != texts[j + column])
            best = torch.cat([best, product[row[pair], column[pair]]])
            best = best.topk(min(count, len(best))).values
    return best


def mean_product(x, texts):
    """Mean of x_i . x_j over all pairs from different texts: of the square of the sum, less that within each text."""
    x, texts = x.cpu().double(), texts.cpu()                                   # MPS has no float64
    _, text, size = texts.unique(return_inverse=True, return_counts=True)
    within = x.new_zeros(len(size), x.shape[1]).index_add_(0, text, x)         # sum of x over each text
    pairs = len(x) ** 2 - size.square().sum()
    return ((x.sum(0).square().sum() - within.square().sum()) / pairs).item()


def connectivity(features, texts, count=100_000, quiet=True):
    """Figure 2's surrogate for how connected the samples are: similarity of features f(X) of contexts of different texts.

    `inner_product`, the paper's, is in units of the network's own; `cosine` compares networks. For each: the mean over all
    pairs, and of the `count` most similar pairs the mean, quantiles, least, and the curve over their rank.
    """
    if len(texts.unique()) < 2:
        raise BadInput("similarities are of features from different texts; give more --data or more --features")
    results = {}
    for name, x in (("inner_product", features), ("cosine", torch.nn.functional.normalize(features))):
        top = top_pairs(x, texts, count, quiet=quiet).cpu().double().numpy()
        ranks = np.unique(np.geomspace(1, len(top), 200).round().astype(int))
        results[name] = {"mean_of_all": mean_product(x, texts), "mean": top.mean().item(), "least": top[-1].item(),
                         "quantiles": {f"{q:g}": float(np.quantile(top, q)) for q in (0.1, 0.5, 0.9)},
                         "curve": {"rank": ranks.tolist(), "similarity": top[ranks - 1].tolist()}}
    return {"features": len(texts), "texts": len(texts.unique()), "pairs": len(top), **results}


def print_connectivity(rows):
    """rows: results of `connectivity` with `label`."""
    width = max(len(row["label"]) for row in rows)
    for name in ("inner_product", "cosine"):
        print(f"{name.replace('_', ' '):{width}s} {'all pairs':>10s} {'top pairs':>10s}"
              f"{'90%':>10s} {'median':>10s} {'10%':>10s} {'least':>10s}")
        for row in rows:
            x = row[name]
            cells = (x["mean_of_all"], x["mean"], *(x["quantiles"][q] for q in ("0.9", "0.5", "0.1")), x["least"])
            print(f"{row['label']:{width}s}" + "".join(f" {cell:10.4g}" for cell in cells))
        print()


def plot_connectivity(path, rows):
    """Figure 2: similarity over the rank of the pair, one curve for each checkpoint; inner products, then cosines."""
    figure, both = import_optional("matplotlib.pyplot").subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name in zip(both, ("inner_product", "cosine")):
        for row in rows:
            axes.plot(row[name]["curve"]["rank"], row[name]["curve"]["similarity"], label=row["label"])
        axes.set(xlabel="rank of the pair", ylabel=name.replace("_", " "), xscale="log")
    both[0].legend()
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------- generation

@torch.no_grad()
def generate(run, prompt, count, temperature=0.8, top_k=50, seed=0, at_once=False, confident=False):
    """Continue `prompt`, a list of at least one id, by `count` ids -> list of the new ids.

    temperature  0 takes the most likely token
    at_once      dar: the tokens of a group in parallel, as they were trained
    confident    mlm and vl: start from `count` masks; again and again fill the one that the model is surest of
    A text that outgrows the model's sequence is continued from its last half.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        """One id for each row of logits (n, vocab)."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise BadInput(f"{run.name} gives scores that are not finite: its training diverged")
        if top_k:
            lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        if temperature < 1e-6:
            return logits.argmax(-1).tolist()
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()

    if at_once and (confident or run.path != "two-stream" or run.objective.one_stream == "mask"):
        raise BadInput(f"--at-once samples the tokens of a group in parallel, from left to right; this checkpoint is "
                       f"{describe(run.objective)} ({run.path}){' with --order confident' if confident else ''}; leave it out")
    if confident:
        return fill_confident(run, prompt, count, choose)
    if run.path == "causal" and hasattr(run.model, "next_features"):
        return continue_cached(run, prompt, count, choose)
    return continue_in_groups(run, prompt, count, choose, at_once)


def continue_cached(run, prompt, count, choose):
    """`ar` in one stream: keys and values of earlier tokens are kept, so each token costs one row."""
    model, S, ids = run.model, run.settings.length, list(prompt)
    cache, first, new = [[] for _ in model.blocks], 0, ids[-(S // 2):] if len(ids) > S else ids
    while len(ids) < len(prompt) + count:
        if first + len(new) > S:
            cache, first, new = [[] for _ in model.blocks], 0, ids[-(S // 2):]
        feature = model.next_features(torch.tensor([new], device=model.query.device), cache, first)
        first, new = first + len(new), choose(model.logits(feature))
        ids += new
    return ids[len(prompt):]


def continue_in_groups(run, prompt, count, choose, at_once):
    """Any objective from left to right: under the f that gives the next token its whole prefix as context. With
    at_once, the other tokens of its group are taken from the same pass."""
    model, S, ids, start = run.model, run.settings.length, list(prompt), 0
    *_, passes = run.objective.left_to_right(S, run.path).values()
    scored = torch.stack([scores_next(f) for f in passes])                    # (passes, S)
    while len(ids) < len(prompt) + count:
        if len(ids) - start >= S:
            start = len(ids) - S // 2
        p = len(ids) - start
        f = passes[scored[:, p].nonzero()[0, 0]]
        targets = (f == f[p]).nonzero()[:, 0] if at_once else torch.tensor([p])
        f = f[:int(targets[-1]) + 1]
        tokens = torch.zeros(1, len(f), dtype=torch.long)                     # what stands at the targets is not read
        tokens[0, :p] = torch.tensor(ids[start:])
        features = model(*(x.to(model.query.device) for x in (tokens, f[None], targets[None])), run.path)
        ids += choose(model.logits(features[0]))
    return ids[len(prompt):len(prompt) + count]


def fill_confident(run, prompt, count, choose):
    """`mlm` and `vl`: all new positions are masks; each pass fills the mask whose best token is the most probable."""
    if run.objective.one_stream != "mask":
        raise BadInput(f"--order confident fills masks, and this checkpoint is {describe(run.objective)}; "
                       "leave it out or use an mlm or vl checkpoint")
    if len(prompt) + count > run.settings.length:
        raise BadInput(f"--tokens {count} after a prompt of {len(prompt)} tokens is more than the model's "
                       f"{run.settings.length}; --order confident fills one sequence")
    device = run.model.query.device
    tokens = torch.tensor([list(prompt) + [0] * count])
    groups = torch.tensor([[1] * len(prompt) + [2] * count])
    while (left := (groups[0] == 2).nonzero()[:, 0]).numel():
        features = run.model(*(x.to(device) for x in (tokens, groups, left[None])), run.path)
        logits = run.model.logits(features[0])                                # (left, vocab)
        best = int(logits.softmax(-1).max(-1).values.argmax())
        tokens[0, left[best]] = choose(logits[best:best + 1])[0]
        groups[0, left[best]] = 1
    return tokens[0, len(prompt):].tolist()


# ---------------------------------------------------------------------------- command line

def write_json(target, content):
    """The --json convention of all commands: one object, to a file or to standard output (-)."""
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")


def about(run):
    """What --json says of a checkpoint."""
    return {"step": run.step, "objective": describe(run.objective), "path": run.path}


def perplexity_command(args):
    run, autocast = open_run(args)
    with autocast:
        results = perplexity(run, args.data, args.max_sequences, args.regime, args.by_length or bool(args.plot), quiet=False)
    if args.json != "-":
        trained = f", step {run.step:,}" if run.step else ""
        print(f"{run.name}: {describe(run.objective)} ({run.path}){trained}, on {results['data']}")
        print_perplexity(results)
        if args.by_length:
            print_by_length(results)
    if args.plot:
        plot_by_length(args.plot, {name: r["by_length"] for name, r in results["regimes"].items()})
    return {"results": results}, run


def connectivity_command(args):
    rows, data, tokenizers = [], args.data, set()
    for checkpoint in args.checkpoints:
        run, autocast = open_run(args, checkpoint)
        if data is None:
            data = evaluation_sequences(run, count=2)[2]                       # the first one's text, for all
        with autocast:
            features, _, texts = features_of(run, data, args.features, args.seed, quiet=False)
        device = run.model.query.device
        rows.append({"checkpoint": checkpoint, "label": describe(run.objective), **about(run),
                     **connectivity(features.to(device), texts.to(device), args.top, quiet=False)})
        tokenizers.add((run.tokenizer.to_json(), run.settings.length))
    labels = [row["label"] for row in rows]
    for row in rows:
        if labels.count(row["label"]) > 1 or row["checkpoint"].startswith("hf:"):
            row["label"] = f"{Path(row['checkpoint']).name} {row['label']}"
    if args.json != "-":
        print(f"{rows[0]['features']:,} features f(X) of {rows[0]['texts']:,} sequences of {data}; the {rows[0]['pairs']:,} most "
              "similar pairs\n")
        print_connectivity(rows)
        if len(tokenizers) > 1:
            print("Tokenizers or lengths differ: the sequences come from the same text, but are not the same cuts of it.")
    if args.plot:
        plot_connectivity(args.plot, rows)
    return {"data": data, "same_sequences": len(tokenizers) == 1, "checkpoints": rows}, None


def generate_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command writes text")
    prompt = run.tokenizer.encode(args.prompt).tolist() or [run.tokenizer.separator]
    texts = []
    with autocast:
        for k in range(args.samples):
            ids = generate(run, prompt, args.tokens, args.temperature, args.top_k, args.seed + k, args.at_once,
                           args.order == "confident")
            texts.append(run.tokenizer.decode(prompt + ids))
            if args.json != "-":
                print(texts[-1] + "\n")
    return {"texts": texts}, run


def report(checkpoint, device=None):
    """What train.py shows at the end: a quick perplexity and a sample, or a few reconstructed images."""
    run = load_run(checkpoint, choose_device(device))
    if run.settings.images:
        if not run.settings.norm_pix:
            main(["reconstruct", str(checkpoint), "--max-images", "100", "--picture", str(Path(checkpoint, "reconstruction.png")),
                  *(["--device", device] if device else [])])
        print(f"\nrun folder: {checkpoint}    more: python evaluate.py probe {checkpoint}")
        return
    print(f"\nleft-to-right perplexity of {describe(run.objective)} on a few validation sequences:")
    print_perplexity(perplexity(run, max_sequences=32))
    starts = evaluation_sequences(run, count=32)[0][:, :max(1, run.settings.length // 4)]
    prompt = max(starts, key=lambda start: start.unique().numel()).tolist()    # prose rather than a table or white space
    ids = generate(run, prompt, run.settings.length // 2)
    print("\nsample: " + run.tokenizer.decode(prompt) + " >>> " + run.tokenizer.decode(ids))
    print(f"\nrun folder: {checkpoint}    more: python evaluate.py perplexity {checkpoint} --by-length")


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, text, many=False):
        """A command on one checkpoint, or on many; `function` takes the arguments and returns (content for --json, Run), or
        None in place of the Run where the content tells of each."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        which = {"dest": "checkpoints", "nargs": "+"} if many else {"dest": "checkpoint"}
        sub.add_argument(**which, metavar="CKPT", help="run folder, checkpoint file, or hf:PATH (a transformers model)")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
        sub.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
        sub.add_argument("--json", type=output_file, metavar="FILE", help="write the results as one JSON object; - for standard output")
        return sub

    sub = command("perplexity", perplexity_command, "left-to-right likelihood of held-out text (Eq. 2)")
    sub.add_argument("--data", help="pydoc, text, token folder or hf:NAME (default: the run's validation text)")
    sub.add_argument("--regime", choices=("padded", "truncated"), help="for masks in one stream (default: both)")
    sub.add_argument("--by-length", action="store_true", help="perplexity against the length of the prefix (Figure 3)")
    sub.add_argument("--max-sequences", type=positive, default=200, help="sequences drawn from the text")
    sub.add_argument("--plot", type=output_file, metavar="FILE", help="picture of the curve over prefix length")
    sub.add_argument("--length", type=positive, help="hf: models: tokens of a sequence (default: 128, as our own models)")

    sub = command("connectivity", connectivity_command, "similarity of features of held-out contexts (Figure 2)", many=True)
    sub.add_argument("--data", help="as for perplexity (default: the first checkpoint's validation text)")
    sub.add_argument("--features", type=positive, default=8000, help="contexts, 8000 in the paper")
    sub.add_argument("--top", type=positive, default=100_000, help="most similar pairs to show")
    sub.add_argument("--seed", type=seed, default=0, help="of the choice of contexts")
    sub.add_argument("--plot", type=output_file, metavar="FILE", help="picture of similarity over rank")

    sub = command("generate", generate_command, "sample from the model")
    sub.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    sub.add_argument("--tokens", type=positive, default=100, help="tokens to add")
    sub.add_argument("--samples", type=positive, default=1, help="texts, of seeds --seed, --seed + 1, ...")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    sub.add_argument("--top-k", type=int, default=50, help="0 for all")
    sub.add_argument("--seed", type=seed, default=0, help="of every random choice")
    sub.add_argument("--at-once", action="store_true", help="dar: the tokens of a group in parallel")
    sub.add_argument("--order", choices=("left", "confident"), default="left",
                     help="mlm and vl: left to right, or the surest mask first")

    finetune.add_commands(command)
    probe.add_commands(command)
    reconstruct.add_commands(command)
    vision.add_commands(command)
    args = parser.parse_args(argv)
    if args.command == "generate":
        for name, value in (("temperature", args.temperature), ("top-k", args.top_k)):
            if not 0 <= value < math.inf:
                raise BadInput(f"--{name} {value:g} is not a number of at least 0")
    if getattr(args, "plot", None):
        import_optional("matplotlib.pyplot")                                   # complain before the work, not after it
    results, run = args.function(args)
    settings = {name: value for name, value in vars(args).items() if name not in ("function", "json", "command")}
    write_json(args.json, {"command": f"evaluate.py {args.command}", "settings": settings, **(about(run) if run else {}), **results})


if __name__ == "__main__":
    command_line(main)
