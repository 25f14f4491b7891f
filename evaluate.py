"""Evaluate a checkpoint of train.py: likelihood, and the front end of all evaluation.

    python evaluate.py perplexity CKPT [CKPT ...]        P(x_{k+1} | x_1 .. x_k), Eq. 2
    python evaluate.py bound CKPT                        the any-order bound beside it
    python evaluate.py curves RUN [RUN ...]              loss, learning rate and speed as a picture
    python evaluate.py generate CKPT --prompt TEXT       a text continued, or a gap in it filled
    python evaluate.py reconstruct CKPT [CKPT ...]       images completed patch by patch, Table 8
    python evaluate.py connectivity CKPT [CKPT ...]      similarity of features, Figure 2
    python evaluate.py export CKPT --out DIR             safetensors, JSON and a model card
    python evaluate.py probe CKPT --data DATA            linear classification of frozen features
    python evaluate.py finetune CKPT --data DATA         classification by the whole network
    python evaluate.py predict CLASSIFIER --data DATA    classes of new texts or images
    python evaluate.py glue CKPT --glue-dir DIR          fine-tuning on the tasks of GLUE, Table 2
    python evaluate.py transfer CKPT --data A B C        probes on several sets of images, Table 6

CKPT is a run folder, a checkpoint file, untrained:RUN (the network before its first step), or hf:PATH (a
model of the transformers package). From `generate` on the commands stand in tasks/.
"""

import itertools
import json
import math
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plots
from data import Corpus, load_evaluation
from masks import queries_of
from model import Transformer
from objectives import describe, scores_next, target_nll
from run import choose_autocast, choose_device, evaluation_sequences, held_out_text, load_run
from tasks import connectivity, export, finetune, generate
from tasks.hub import about, open_run
from util import BadInput, Parser, command_line, positive, printable, table, write_json

# ---------------------------------------------------------------------------- likelihood

@torch.no_grad()
def left_to_right(run, sequences, regime=None, tokens_at_once=1 << 14):
    """-log P(x_p | x_1 .. x_{p-1}), p = 2..S, of sequences (N, S), each from its whole prefix (Eq. 2).

    The objective says which f give each token its whole prefix and nothing else as context: one pass for
    `ar`, t for `dar`, S - 1 for `mlm` and `vl`. Prefixes are in the order of its `chain`, whose first token
    is given, and so are the columns. Returns {regime: float32 (N, S - 1)}. BadInput: an objective that is not
    trained for it, or a regime that it does not have.
    """
    regimes = run.objective.left_to_right(sequences.shape[1], run.path)
    if regimes is None:
        raise BadInput(f"{describe(run.objective)} has no exact left-to-right likelihood: it is not trained "
                       "to predict a token from its whole prefix and nothing else (no `left_to_right`)")
    if regime is not None and regime not in regimes:
        raise BadInput(f"--regime {regime} is for masks in one stream; this {run.path} checkpoint of "
                       f"{describe(run.objective)} knows only {' and '.join(regimes)}")
    return {name: scored_by(run, sequences, passes, tokens_at_once)[:, 1:]
            for name, passes in regimes.items() if regime in (None, name)}


def scored_by(run, sequences, passes, tokens_at_once):
    """-log P of each token of sequences (N, S), in the first of these passes that gives it its prefix -> (N,
    S) in the order of the chain."""
    (N, S), device = sequences.shape, run.model.query.device
    chain = run.objective.chain(S)
    nll, done = torch.full((N, S), math.nan), torch.zeros(S, dtype=torch.bool)
    for f in tqdm(passes, unit=" passes", leave=False, delay=2, mininterval=1):
        new = (scores_next(f, chain) & ~done).nonzero()[:, 0]       # what this pass is the first to score
        done[new] = True
        f = f[:int(f.nonzero()[-1]) + 1]                            # nothing after the last f > 0 is read
        rows = max(1, tokens_at_once // len(f))
        for tokens, found in zip(sequences.split(rows), nll.split(rows)):    # `found` is a view of nll
            tokens = tokens[:, :len(f)].to(device)
            groups, targets = (x.to(device).expand(len(tokens), -1) for x in (f, new))
            found[:, new] = target_nll(run.model, tokens, groups, targets, run.path, padded=not f.all()).cpu()
    if not done[chain[1:]].all():
        p = chain[1:][~done[chain[1:]]][0].item()
        raise BadInput(f"{describe(run.objective)}: no pass of left_to_right gives token {p + 1} of {S} its "
                       "prefix, and nothing else, as context")
    return nll[:, chain]


@torch.no_grad()
def any_order(run, sequences, draws=8, seed=0):
    """An upper bound of -log P(x_2 .. x_S | x_1) in nats a token, unbiased -> double (N,).

    P = E_o P_o is the model's mixture over orders, and the bound is the mean over orders of -log P_o. It is
    estimated from `draws` contexts a sequence, stratified over how many tokens hide. BadInput: an objective
    without such a bound.
    """
    S, generator, nll = sequences.shape[1], torch.Generator().manual_seed(seed), []
    if run.objective.bound(1, S, generator) is None:
        raise BadInput(f"{describe(run.objective)} is not trained to predict in any order, so it has no "
                       "any-order bound (no `bound`); see evaluate.py perplexity")
    for tokens in tqdm(sequences, unit=" sequences", leave=False, delay=2, mininterval=1):
        f, weight = run.objective.bound(draws, S, generator)                              # (draws, S)
        targets, cuts, weight = queries_of(f, weight, int((weight > 0).sum(1).max()))     # (draws, n)
        inputs = (x.to(run.model.query.device) for x in (tokens.expand(draws, -1), f, targets, cuts))
        ids, groups, targets, cuts = inputs
        found = target_nll(run.model, ids, groups, targets, run.path, not f.all(), cuts).cpu().double()
        nll.append((found * weight).sum(1).mean() / (S - 1))
    return torch.stack(nll)


def unigram_nll(corpus, sequences):
    """-log P of the tokens 2..S of sequences (N, S) under a model that knows only how often each token stands
    in the first 5 million of the training text, every count plus one -> double (N, S - 1)."""
    tokens = np.asarray((corpus.train if len(corpus.train) else corpus.val)[:5_000_000])
    counts = np.bincount(tokens, minlength=corpus.tokenizer.vocab) + 1.0
    return torch.from_numpy(-np.log(counts / counts.sum()))[sequences[:, 1:]]


# ---------------------------------------------------------------------------- results

def exp(x):
    """e^x, infinite where a float has no room for it: the perplexity of a diverged model."""
    return math.inf if x > 709 else math.exp(x)


def summary(nll, tokens_per_byte):
    """Results from the -log P (N, S - 1) of N sequences. Perplexity is exp of the mean over tokens; the
    standard error takes sequences for independent samples; `sequence_nll` are theirs, to pair checkpoints."""
    mean, stderr = nll.mean().item(), nll.mean(1).std().item() / math.sqrt(len(nll))
    return {"nll": mean, "stderr": stderr, "tokens": nll.numel(), "sequences": len(nll),
            "perplexity": exp(mean), "perplexity_stderr": exp(mean) * stderr,
            "bits_per_byte": mean / math.log(2) * tokens_per_byte, "sequence_nll": nll.mean(1).tolist()}


def by_length(nll):
    """-log P (N, S - 1) against the length of the prefix (Figure 3): for each length the mean over sequences;
    for bins of lengths, 1, 2-3, 4-7, .., since single lengths are noisy, the mean of each sequence."""
    longest = nll.shape[1]
    edges = [2 ** k for k in range(longest.bit_length())] + [longest + 1]
    return {"prefix": list(range(1, longest + 1)), "nll": nll.mean(0).tolist(),
            "stderr": (nll.std(0) / math.sqrt(len(nll))).tolist(),
            "bins": [{"first": low, "last": end - 1, "sequence_nll": nll[:, low - 1:end - 1].mean(1).tolist()}
                     for low, end in itertools.pairwise(edges)]}


def perplexity(run, data=None, max_sequences=200, regime=None, lengths=False):
    """Left-to-right likelihood of held-out text under a Run -> dict of results per regime, with `lengths`
    also against the length of the prefix; and the loss of the training text's unigram frequencies on the same
    tokens. `data` is what --data names, or a Corpus."""
    corpus = data if isinstance(data, Corpus) else held_out_text(run, data)
    sequences, tokens_per_byte, data = evaluation_sequences(run, corpus, max_sequences)
    chain = run.objective.chain(sequences.shape[1])
    regimes = left_to_right(run, sequences, regime)
    regimes["unigram"] = unigram_nll(corpus, sequences[:, chain])
    results = {name: summary(nll, tokens_per_byte) for name, nll in regimes.items()}
    for name in regimes if lengths else ():
        results[name]["by_length"] = by_length(regimes[name])
    unigram = results.pop("unigram")
    return {"data": data, "length": sequences.shape[1], "regimes": results, "unigram": unigram,
            "unigram_nll": unigram["nll"]}


def paired(a, b):
    """The difference b - a of two `summary` of the same sequences, in nats a token, with its 95% interval."""
    gap = torch.tensor(b["sequence_nll"]).double() - torch.tensor(a["sequence_nll"]).double()
    mean, stderr = gap.mean().item(), gap.std().item() / math.sqrt(len(gap))
    return {"nll": mean, "stderr": stderr, "interval": [mean - 1.96 * stderr, mean + 1.96 * stderr]}


def same_text(run, first, corpus):
    """The held-out text `corpus` of the Run `first`, as another Run reads it."""
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command reads text")
    if run.tokenizer.to_json() == first.tokenizer.to_json():
        return corpus
    if first.tokenizer.kind not in ("byte", "bpe"):  # the others do not give back what they have read
        raise BadInput(f"{run.name} does not have the tokenizer of {first.name}; give a text for all with "
                       "--data")
    return replace(load_evaluation([first.tokenizer.decode(corpus.val)], run.tokenizer), name=corpus.name)


def bound(run, data=None, max_sequences=200, draws=8, seed=0):
    """The any-order bound of one text under one Run, and beside it the exact left-to-right likelihood where
    there is one -> dict."""
    sequences, tokens_per_byte, data = evaluation_sequences(run, data, max_sequences)
    mixture = any_order(run, sequences, draws, seed)
    S, objective = sequences.shape[1], run.objective
    given_first = int(objective.chain(S)[0]) == 0    # both are of P(x_2 .. x_S | x_1)
    exact = objective.left_to_right(S, run.path) is not None and given_first
    exact = left_to_right(run, sequences) if exact else {}
    gaps = {name: mixture - nll.double().mean(1) for name, nll in exact.items()}
    every_token = mixture[:, None].expand(-1, sequences.shape[1] - 1)
    return {"data": data, "length": sequences.shape[1], "sequences": len(sequences), "draws": draws,
            "any_order": {"bound": summary(every_token, tokens_per_byte)},
            "left_to_right": {name: summary(nll, tokens_per_byte) for name, nll in exact.items()},
            "difference": {name: {"nll": gap.mean().item(), "stderr": gap.std().item() / math.sqrt(len(gap))}
                           for name, gap in gaps.items()}}


def read_curves(folder):
    """metrics.jsonl of a run folder -> its curves over the tokens or images seen, which is the "unit". The
    last line may be cut off, if the run is still going. Losses that are not finite are only counted."""
    path, rows, data = Path(folder) / "metrics.jsonl", [], None
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a run folder of train.py")
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            rows.append(json.loads(line))
    if (config := path.with_name("config.json")).exists():
        data = json.loads(config.read_text(encoding="utf-8")).get("data")

    def finite(key):
        return [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]

    train = finite("loss")
    if not train:
        raise BadInput(f"{path} holds no finite losses; train.py writes one every few steps")
    unit = "images" if "images" in train[0] else "tokens"
    seen = {row["step"]: row[unit] for row in rows if unit in row}
    val = [row for row in finite("val_loss") if row["step"] in seen]
    return {"name": printable(Path(folder).resolve().name), "unit": unit, "data": data,
            "not_finite": sum("loss" in row for row in rows) - len(train),
            "seen": [row[unit] for row in train], "loss": [row["loss"] for row in train],
            "lr": [row["lr"] for row in train], "speed": [row[f"{unit}_per_second"] for row in train],
            "val_seen": [seen[row["step"]] for row in val], "val_loss": [row["val_loss"] for row in val]}


# ---------------------------------------------------------------------------- commands

WHAT = {  # the rows of perplexity and bound in words
    "next": "each token from all before it",
    "padded": "all later tokens are [MASK], as in training",
    "truncated": "the sequence ends at the [MASK]",
    "bound": "any order: the mixture over orders has at most this",
    "unigram": "how often each token stands in the text, for comparison"}


def shortly(x):
    return f"{x:.2f}" if x < 1e6 else f"{x:.3g}"


def show(run, results, rows, loss="left-to-right loss"):
    """Print one line for each of `rows`, {name: what `summary` returned}."""
    if not generate.natural(run):
        loss = "loss"
    trained = f", step {run.step:,}" if run.step else ""
    count = next(iter(rows.values()))["sequences"]
    print(printable(f"{run.name}: {describe(run.objective)} ({run.path}){trained}, on {results['data']}: "
                    f"{count:,} sequences of {results['length']} tokens\n"))
    cells = [[name, f"{shortly(r['perplexity'])} ± {shortly(r['perplexity_stderr'])}",
              f"{r['nll']:.4f} ± {r['stderr']:.4f}", f"{r['bits_per_byte']:.3f}", WHAT.get(name, "")]
             for name, r in rows.items()]
    print(table([["", "perplexity", loss, "bits/byte", ""], *cells], align="<"))


def perplexity_command(args):
    """One checkpoint, or several on one text: by default what the first one's data held out."""
    names, rows, first, corpus = args.checkpoints, [], None, None
    if len(names) == 1:
        args.checkpoint = args.__dict__.pop("checkpoints")[0]
    elif args.plot:
        raise BadInput("--plot draws one checkpoint; leave it out, or give one")
    own_length = any(name.startswith("hf:") for name in names)     # --length is for those
    for name in names:
        length = args.length if name.startswith("hf:") or not own_length else None
        run, autocast = open_run(Namespace(**{**vars(args), "length": length}), name)
        first = first or run
        regime = args.regime if run.path == "mask" or len(names) == 1 else None
        if args.data or corpus is None:
            corpus = text = held_out_text(run, args.data)
        else:
            text = same_text(run, first, corpus)
        with autocast:
            results = perplexity(run, text, args.max_sequences, regime, args.by_length or args.plot)
        if args.json != "-":
            print("\n" * bool(rows), end="")
            show_perplexity(run, results, args.by_length)
        rows.append({"checkpoint": name, **about(run), **results})
        alike = run.tokenizer.to_json() == first.tokenizer.to_json()
        if run is not first:
            rows[-1]["difference"] = difference(rows, alike, run, first)
    if args.plot:
        plots.by_length(args.plot, results)
    if len(names) == 1:
        return {"results": results}, run
    if args.json != "-":
        show_differences(rows)
    return {"checkpoints": rows}, None


def difference(rows, alike, run, first):
    """The last of `rows` against the first, each in its first regime; None where they are of other tokens."""
    (a, *_), (b, *_) = (rows[k]["regimes"].values() for k in (0, -1))
    chains = [x.objective.chain(x.settings.length) for x in (first, run)]
    same = alike and len(chains[0]) == len(chains[1]) and chains[0][0] == chains[1][0]
    return paired(a, b) if same and a["sequences"] == b["sequences"] else None


def show_perplexity(run, results, lengths):
    show(run, results, results["regimes"] | {"unigram": results["unigram"]})
    if lengths:
        regimes = results["regimes"]
        bins = zip(*(r["by_length"]["bins"] for r in regimes.values()))
        rows = [[f"{same[0]['first']}-{same[0]['last']}",
                 *(shortly(exp(np.mean(b['sequence_nll']))) for b in same)] for same in bins]
        print("\n" + table([["tokens in the prefix", *regimes], *rows]))


def show_differences(rows):
    """One line for each checkpoint, in its first regime."""
    cells = []
    for row in rows:
        name, x = next(iter(row["regimes"].items()))
        gap = "the first"
        if "difference" in row:
            d = row["difference"]
            gap = "not paired, other tokens: compare bits/byte" if d is None else (
                f"{d['nll']:+.4f} ({d['interval'][0]:+.4f} to {d['interval'][1]:+.4f})")
        cells.append([printable(row["checkpoint"]), name, f"{x['bits_per_byte']:.3f}", gap])
    print("\n" + table([["", "", "bits/byte", "nats a token more than the first, 95% interval"], *cells],
                       align="<"))


def bound_command(args):
    run, autocast = open_run(args)
    with autocast:
        results = bound(run, args.data, args.max_sequences, args.draws, args.seed)
    if args.json != "-":
        show(run, results, results["any_order"] | results["left_to_right"], "loss")
        print(f"\nThe bound is of P = E_o P_o(x_2 .. x_S | x_1) over orders o, from {args.draws} contexts a "
              "sequence. The chain from left to right is another distribution of the same network.")
        for name, gap in results["difference"].items():
            print(f"bound - {name}: {gap['nll']:+.4f} ± {gap['stderr']:.4f} nats a token, paired by sequence")
        if run.path == "mask" and run.objective.generation == "left":
            print("The bound takes every share of hidden tokens; this model was trained with some only.")
    return {"results": results}, run


def curves_command(args):
    runs, first = [read_curves(folder) for folder in args.checkpoints], Path(args.checkpoints[0])
    if differ := len({run["data"] for run in runs}) > 1:
        for run in runs:
            run["name"] += f", {printable(str(run['data']))}"
    picture = args.plot or first / ("curves.png" if len(runs) == 1 else "compared.png")
    plots.curves(picture, runs)
    results = []
    for folder, x in zip(args.checkpoints, runs):
        last, best = (x["val_loss"] or [None])[-1], min(x["val_loss"], default=None)
        results.append({"run": folder, "data": x["data"], x["unit"]: x["seen"][-1], "loss": x["loss"][-1],
                        "val_loss": last, "best_val_loss": best, "not_finite": x["not_finite"],
                        f"{x['unit']}_per_second": x["speed"][-1]})
        if args.json != "-":
            print(f"{x['name']:30s} {x['seen'][-1]:14,} {x['unit']}  loss {x['loss'][-1]:.4f}  "
                  f"validation {'none yet' if last is None else f'{last:.4f}'}"
                  + f"  ({x['not_finite']} losses are not finite: it diverged)" * (x["not_finite"] > 0))
    if args.json != "-":
        if differ:
            print("note: the runs have different data. Where tokenizers differ a loss is of other tokens; "
                  "compare bits per byte instead (evaluate.py perplexity).")
        print(f"picture: {picture}")
    return {"results": results, "picture": str(picture)}, None


def report(out, device=None):
    """What train.py shows of a run folder at its end: of text a quick perplexity and a sample, of images a
    picture of some that are completed."""
    device = choose_device(device)
    run, (autocast, _) = load_run(out, device), choose_autocast(device)
    print()
    if run.tokenizer is None:
        if not generate.natural(run):
            return
        trained_so = ["--hide", "0.75", "--at-once"] if run.path == "mae" else []
        main(["reconstruct", str(out), "--max-images", "100", "--picture", str(Path(out, "completed.png")),
              "--device", str(device), *trained_so])
        return
    corpus = held_out_text(run)
    exact = run.objective.left_to_right(run.settings.length, run.path) is not None
    left = exact and generate.natural(run)
    with autocast():
        if exact:
            results = perplexity(run, corpus, 32)
            show(run, results, results["regimes"] | {"unigram": results["unigram"]})
        if left or run.objective.decoding(torch.tensor([1, 0]), 1) is not None:
            lines = run.tokenizer.decode(corpus.val[:4096]).splitlines()
            line = next((line for line in lines[1:] if len(line) > 40), "")   # the first may lack its start
            start = line[:24].rpartition(" ")[0] or line[:24]
            prompt = run.tokenizer.encode(start).tolist() or [run.tokenizer.separator]
            new = generate.generate(run, prompt, 120, order="left" if left else None)
            print(f"\nSample, the first words given:\n{printable(run.tokenizer.decode(prompt + new))}")


def export_command(args):
    run, autocast = open_run(args)
    if not isinstance(run.model, Transformer):
        raise BadInput(f"{run.name} is no run of train.py; it has its own files")
    exact = run.tokenizer is not None and run.settings.data is not None
    exact = exact and run.objective.left_to_right(run.settings.length, run.path) is not None
    with autocast:
        regimes = perplexity(run, max_sequences=32)["regimes"] if exact else {}
    export.export(run, args.out, regimes)
    if args.json != "-":
        tokenizer = ", tokenizer.json" if run.tokenizer is not None else ""
        print(f"{args.out}: model.safetensors, config.json, README.md{tokenizer}")
    return {"results": {"out": args.out}}, run


def add_commands(command):
    """Register what this file evaluates: `command(name, function, text)` gives a parser."""
    source = "pydoc, text, token folder or hf:NAME (default: the run's validation text)"
    sub = command("perplexity", perplexity_command, "left-to-right likelihood of held-out text (Eq. 2)", True)
    sub.add_argument("--data", help=source)
    sub.add_argument("--regime", choices=("padded", "truncated"), help="masks in one stream (default: both)")
    sub.add_argument("--by-length", action="store_true", help="perplexity against the length of the prefix")
    sub.add_argument("--max-sequences", type=positive, default=200, help="sequences drawn from the text")
    sub.add_argument("--plot", metavar="FILE", help="picture of that curve (Figure 3)")
    sub.add_argument("--length", type=positive, help="hf: models: tokens of a sequence (default: 128)")

    sub = command("bound", bound_command, "bound of the any-order likelihood, beside the left-to-right one")
    sub.add_argument("--data", help=source)
    sub.add_argument("--max-sequences", type=positive, default=50, help="sequences drawn from the text")
    sub.add_argument("--draws", type=positive, default=8, help="contexts a sequence")
    sub.add_argument("--seed", type=int, default=0, help="of the contexts")
    sub.add_argument("--length", type=positive, help="as for perplexity")

    sub = command("export", export_command, "write a run as safetensors, JSON and a model card")
    sub.add_argument("--out", required=True, help="folder to write")

    sub = command("curves", curves_command, "draw training runs: loss, learning rate, speed", many=True)
    sub.add_argument("--plot", metavar="FILE", help="picture (default: curves.png in the run folder, of "
                     "several runs compared.png in that of the first)")


def main(argv=None):
    """One command of `argv` or sys.argv: what it prints, and with --json the object {"command", "settings",
    what is known of the checkpoint, and what the command returns}."""
    parser = Parser(description="Evaluate a checkpoint of train.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, text, many=False):
        """A command on one checkpoint, or on many. `function` takes the arguments and returns (content for
        --json, Run), or None in place of the Run where the content tells of each."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        which = {"dest": "checkpoints", "nargs": "+"} if many else {"dest": "checkpoint"}
        sub.add_argument(**which, metavar="CKPT", help="run folder, checkpoint, untrained:RUN or hf:PATH")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
        sub.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
        sub.add_argument("--threads", type=positive, metavar="N", help="on a CPU")
        sub.add_argument("--json", metavar="FILE", help="results as one JSON object; - for standard output")
        return sub

    for add in (add_commands, generate.add_commands, connectivity.add_commands, finetune.add_commands):
        add(command)
    args = parser.parse_args(argv)
    picture = getattr(args, "picture", None)    # complain before the work, not after it
    for file in filter(None, (args.json, picture, getattr(args, "csv", None))):
        path = Path(file).absolute()
        if file != "-" and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise BadInput(f"{file} cannot be written: it is a folder, or lies in no folder that you can "
                           "write to")
    if getattr(args, "plot", None):
        plots.check(args.plot)
    if picture and Path(picture).suffix.lower() != ".png":
        raise BadInput(f"--picture {picture} is no PNG file: end its name in .png")
    if os.path.lexists(getattr(args, "out", None) or ""):
        raise BadInput(f"{args.out} exists; choose another --out or remove it")
    if args.threads:
        torch.set_num_threads(args.threads)
    content, run = args.function(args)
    inner = ("function", "json", "command")
    settings = {name: value for name, value in vars(args).items() if name not in inner}
    write_json(args.json, {"command": f"evaluate.py {args.command}", "settings": settings,
                           **(about(run) if run else {}), **content})


if __name__ == "__main__":
    command_line(main)
