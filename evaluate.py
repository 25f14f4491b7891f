"""Evaluate a checkpoint of train.py: likelihood, and the front end of all evaluation.

    python evaluate.py perplexity CKPT [CKPT ...]        P(x_{k+1} | x_1 .. x_k), Eq. 2
    python evaluate.py bound CKPT                        the any-order bound beside it
    python evaluate.py curves RUN [RUN ...]              loss, learning rate and speed as a picture
    python evaluate.py export CKPT --out DIR             safetensors, JSON and a model card

and in tasks/: generate, reconstruct, connectivity, probe, transfer, finetune, predict, glue. CKPT is a run
folder, a checkpoint file, untrained:RUN (the network before its first step), or hf:PATH (a model of the
transformers package).
"""

import contextlib
import io
import itertools
import json
import math
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plots
from masks import queries_of
from model import Transformer
from objectives import describe, scores_next, target_nll
from run import evaluation_sequences, held_out_text
from tasks import connectivity, export, finetune, generate
from tasks.hub import about, open_run, open_runs
from util import BadInput, Parser, command_line, note, output_file, positive, printable, table, write_json

# ---------------------------------------------------------------------------- likelihood

@torch.no_grad()
def left_to_right(run, sequences, regime=None, tokens_at_once=1 << 14):
    """-log P(x_p | x_1 .. x_{p-1}), p = 2..S, of sequences (N, S), each from its whole prefix (Eq. 2).

    The objective says which f give each token its whole prefix and nothing else as context: one pass for
    `ar`, t for `dar`, S - 1 for `mlm` and `vl`. Prefixes are in the order of its `chain`, whose first token
    is given, and so are the columns. Returns {regime: float32 (N, S - 1)}.
    """
    regimes = run.objective.left_to_right(sequences.shape[1], run.path)
    if regimes is None:
        raise BadInput(f"{describe(run.objective)} has no exact left-to-right likelihood (`left_to_right`)")
    if regime is not None and regime not in regimes:
        raise BadInput(f"--regime {regime} is for masks in one stream; {run.name} knows {', '.join(regimes)}")
    return {name: scored_by(run, sequences, passes, tokens_at_once)[:, 1:]
            for name, passes in regimes.items() if regime in (None, name)}


def scored_by(run, sequences, passes, tokens_at_once):
    """-log P of each token, in the first of these passes that gives it its prefix -> (N, S) in the order of
    the chain."""
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
    if len(missing := chain[1:][~done[chain[1:]]]):
        raise BadInput(f"no pass of left_to_right gives token {missing[0] + 1} of {S} exactly its prefix")
    return nll[:, chain]


@torch.no_grad()
def any_order(run, sequences, draws=8, seed=0):
    """An upper bound of -log P(x_2 .. x_S | x_1) in nats a token, unbiased -> double (N,).

    P = E_o P_o is the model's mixture over orders, and the bound is the mean over orders of -log P_o. It is
    estimated from `draws` contexts a sequence, stratified over how many tokens hide.
    """
    S, generator, nll = sequences.shape[1], torch.Generator().manual_seed(seed), []
    if run.objective.bound(1, S, generator) is None:
        raise BadInput(f"{describe(run.objective)} was not trained to predict in any order (no `bound`)")
    for tokens in tqdm(sequences, unit=" sequences", leave=False, delay=2, mininterval=1):
        f, weight = run.objective.bound(draws, S, generator)                              # (draws, S)
        targets, cuts, weight = queries_of(f, weight, int((weight > 0).sum(1).max()))     # (draws, n)
        inputs = (x.to(run.model.query.device) for x in (tokens.expand(draws, -1), f, targets))
        found = target_nll(run.model, *inputs, run.path, not f.all(), cuts.to(run.model.query.device))
        nll.append((found.cpu().double() * weight).sum(1).mean() / (S - 1))
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
    """-log P (N, S - 1) against the length of the prefix (Figure 3): for each length from 1 the mean over
    sequences; for bins of lengths, 1, 2-3, 4-7, .., which are less noisy, the mean of each sequence."""
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
    corpus = held_out_text(run, data)
    sequences, tokens_per_byte, data = evaluation_sequences(run, corpus, max_sequences)
    nll = left_to_right(run, sequences, regime)
    nll["unigram"] = unigram_nll(corpus, sequences[:, run.objective.chain(sequences.shape[1])])
    results = {name: summary(x, tokens_per_byte) | ({"by_length": by_length(x)} if lengths else {})
               for name, x in nll.items()}
    unigram = results.pop("unigram")
    return {"data": data, "length": sequences.shape[1], "regimes": results, "unigram": unigram,
            "unigram_nll": unigram["nll"]}


def bound(run, data=None, max_sequences=200, draws=8, seed=0):
    """The any-order bound of one text under one Run, and beside it the exact left-to-right likelihood where
    there is one -> dict."""
    sequences, tokens_per_byte, data = evaluation_sequences(run, data, max_sequences)
    mixture, S = any_order(run, sequences, draws, seed), sequences.shape[1]
    comparable = run.objective.chain(S)[0] == 0 and run.objective.left_to_right(S, run.path)
    exact = left_to_right(run, sequences) if comparable else {}    # both are of P(x_2 .. x_S | x_1)
    every_token = mixture[:, None].expand(-1, S - 1)
    return {"data": data, "length": S, "sequences": len(sequences), "draws": draws,
            "any_order": {"bound": summary(every_token, tokens_per_byte)},
            "left_to_right": {name: summary(nll, tokens_per_byte) for name, nll in exact.items()},
            "difference": {name: paired(mixture - nll.double().mean(1)) for name, nll in exact.items()}}


def paired(gap):
    """Mean of the differences (N,) that each sequence makes, in nats a token, with its 95% interval."""
    mean, stderr = gap.mean().item(), gap.std().item() / math.sqrt(len(gap))
    return {"nll": mean, "stderr": stderr, "interval": [mean - 1.96 * stderr, mean + 1.96 * stderr]}


def difference(a, b):
    """b - a of two `perplexity`, in their first regimes; None where their unigrams are not of one text."""
    if a["unigram"]["sequence_nll"] != b["unigram"]["sequence_nll"]:
        return None
    (first, a), (second, b) = (next(iter(x["regimes"].items())) for x in (a, b))
    gap = paired(torch.tensor(b["sequence_nll"]).double() - torch.tensor(a["sequence_nll"]).double())
    return {"regimes": [second, first], **gap}


def read_curves(folder):
    """metrics.jsonl of a run folder -> its curves over the tokens or images seen, which is the "unit". The
    last line may be cut off, if the run is still going. Losses that are not finite are only counted."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a run folder of train.py")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    data = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["data"]

    def finite(key):
        return [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]

    train = finite("loss")
    if not train:
        raise BadInput(f"{path} holds no finite losses; train.py writes one every few steps")
    unit = "images" if "images" in train[0] else "tokens"
    val = [row for row in finite("val_loss") if unit in row]
    return {"name": printable(Path(folder).resolve().name), "unit": unit, "data": data,
            "not_finite": sum("loss" in row for row in rows) - len(train),
            "seen": [row[unit] for row in train], "loss": [row["loss"] for row in train],
            "lr": [row["lr"] for row in train], "speed": [row[f"{unit}_per_second"] for row in train],
            "val_seen": [row[unit] for row in val], "val_loss": [row["val_loss"] for row in val]}


# ---------------------------------------------------------------------------- commands

WHAT = {  # the rows of perplexity and bound in words
    "next": "each token from all before it",
    "padded": "all later tokens are [MASK], as in training",
    "truncated": "the sequence ends at the [MASK]",
    "bound": "any order: the mixture over orders has at most this",
    "unigram": "how often each token stands in the text, for comparison"}


def shortly(x):
    return f"{x:.2f}" if x < 1e6 else f"{x:.3g}"


def in_words(gap):
    return f"{gap['nll']:+.4f} ({gap['interval'][0]:+.4f} to {gap['interval'][1]:+.4f})"


def show(run, results, rows):
    """Print one line for each of `rows`, {name: what `summary` returned}."""
    trained = f", step {run.step:,}" if run.step else ""
    count = next(iter(rows.values()))["sequences"]
    print(printable(f"\n{run.name}: {describe(run.objective)} ({run.path}){trained}, on {results['data']}: "
                    f"{count:,} sequences of {results['length']} tokens\n"))
    cells = [[name, f"{shortly(r['perplexity'])} ± {shortly(r['perplexity_stderr'])}",
              f"{r['nll']:.4f} ± {r['stderr']:.4f}", f"{r['bits_per_byte']:.3f}", WHAT.get(name, "")]
             for name, r in rows.items()]
    print(table([["", "perplexity", "loss", "bits/byte", ""], *cells], align="<"))


def perplexity_command(args):
    """One checkpoint, or several on one text: by default what the first one's data held out."""
    rows, one = [], len(args.checkpoints) == 1
    for name, run, autocast, text in open_runs(args):
        regime = args.regime if one or run.path == "mask" else None
        with autocast:
            results = perplexity(run, text, args.max_sequences, regime, args.by_length or args.plot)
        show(run, results, results["regimes"] | {"unigram": results["unigram"]})
        if args.by_length:
            regimes = results["regimes"]
            bins = zip(*(r["by_length"]["bins"] for r in regimes.values()))
            cells = [[f"{same[0]['first']}-{same[0]['last']}",
                      *(shortly(exp(np.mean(b["sequence_nll"]))) for b in same)] for same in bins]
            print("\n" + table([["tokens in the prefix", *regimes], *cells]))
        rows.append({"checkpoint": name, **about(run), **results})
    if args.plot:
        plots.by_length(args.plot, results if one else {row["checkpoint"]: row for row in rows})
    if one:
        return {"results": results}, run
    cells = []
    for row in rows[1:]:
        row["difference"] = gap = difference(rows[0], row)
        told = "not paired, other tokens: compare bits/byte"
        if gap:
            told = f"{in_words(gap)}, {' against '.join(gap['regimes'])}"
        cells.append([printable(row["checkpoint"]), told])
    print("\n" + table([["", "nats a token more than the first, 95% interval"], *cells], align="<"))
    return {"checkpoints": rows}, None


def bound_command(args):
    run, autocast = open_run(args)
    with autocast:
        results = bound(run, args.data, args.max_sequences, args.draws, args.seed)
    show(run, results, results["any_order"] | results["left_to_right"])
    print("\nThe chain from left to right is another distribution than the mixture over orders.")
    for name, gap in results["difference"].items():
        print(f"bound - {name}: {in_words(gap)} nats a token, paired by sequence, 95% interval")
    return {"results": results}, run


def curves_command(args):
    runs = [read_curves(folder) for folder in args.checkpoints]
    picture = args.plot or Path(args.checkpoints[0], "curves.png")
    plots.curves(picture, runs)
    for x in runs:
        validation = f"{x['val_loss'][-1]:.4f}" if x["val_loss"] else "none yet"
        diverged = f"  ({x['not_finite']} losses are not finite: it diverged)" * (x["not_finite"] > 0)
        print(f"{x['name']:30s} {x['seen'][-1]:14,} {x['unit']}  loss {x['loss'][-1]:.4f}  "
              f"validation {validation}{diverged}")
    if len({x["data"] for x in runs}) > 1:
        print("note: the runs have different data; where tokenizers differ compare bits per byte "
              "(evaluate.py perplexity)")
    print(f"picture: {picture}")
    return {"results": runs, "picture": str(picture)}, None


def report(out, device=None):
    """What train.py shows at its end: a quick perplexity and a sample, or a picture of completed images."""
    run, autocast = open_run(Namespace(device=device, dtype=None), out)
    if run.tokenizer is None:
        as_trained = ["--hide", "0.75", "--at-once"] if run.path == "mae" else []
        main(["reconstruct", str(out), "--max-images", "100", "--picture", str(Path(out, "completed.png")),
              "--device", str(run.model.query.device), *as_trained])
        return
    corpus = held_out_text(run)
    with autocast:
        if run.objective.left_to_right(run.settings.length, run.path) is not None:
            results = perplexity(run, corpus, 32)
            show(run, results, results["regimes"] | {"unigram": results["unigram"]})
        lines = run.tokenizer.decode(corpus.val[:4096]).splitlines()[1:]  # the first may lack its start
        start = next((line[:24] for line in lines if len(line) > 40), "")
        text = generate.continue_text(run, start.rpartition(" ")[0] or start, 120)
    print(f"\nSample, the first words given:\n{printable(text)}")


def export_command(args):
    run, autocast = open_run(args)
    if not isinstance(run.model, Transformer):
        raise BadInput(f"{run.name} is no run of train.py; it has its own files")
    regimes = {}
    if run.tokenizer and run.objective.left_to_right(run.settings.length, run.path):
        try:
            with autocast:
                regimes = perplexity(run, max_sequences=32)["regimes"]
        except (BadInput, OSError) as error:  # the text may be elsewhere, or short
            note(f"the model card says no perplexity: {error}")
    export.export(run, args.out, regimes)
    print(f"exported to {args.out}")
    return {"results": {"out": args.out}}, run


def add_commands(command):
    """Register what this file evaluates: `command(name, function, text)` gives a parser."""
    source = "pydoc, text, token folder or hf:NAME (default: the run's validation text)"
    text = "left-to-right likelihood of held-out text (Eq. 2)"
    add = command("perplexity", perplexity_command, text, many=True).add_argument
    add("--data", help=source)
    add("--regime", choices=("padded", "truncated"), help="masks in one stream (default: both)")
    add("--by-length", action="store_true", help="perplexity against the length of the prefix")
    add("--max-sequences", type=positive, default=200, help="sequences drawn from the text")
    add("--plot", metavar="FILE", help="picture of that curve (Figure 3)")
    add("--length", type=positive, help="hf: models: tokens of a sequence (default: 128)")

    text = "bound of the any-order likelihood, beside the left-to-right one"
    add = command("bound", bound_command, text).add_argument
    add("--data", help=source)
    add("--max-sequences", type=positive, default=50, help="sequences drawn from the text")
    add("--draws", type=positive, default=8, help="contexts a sequence")
    add("--seed", type=int, default=0, help="of the contexts")
    add("--length", type=positive, help="as for perplexity")

    add = command("export", export_command, "write a run as safetensors, JSON and a model card").add_argument
    add("--out", required=True, help="folder to write")

    text = "draw training runs: loss, learning rate, speed"
    add = command("curves", curves_command, text, many=True).add_argument
    add("--plot", metavar="FILE", help="picture (default: curves.png in the folder of the first run)")


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, text, many=False):
        """`function` takes the arguments and returns (content for --json, Run, or None where the content
        tells of each of many)."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        which = {"dest": "checkpoints", "nargs": "+"} if many else {"dest": "checkpoint"}
        sub.add_argument(**which, metavar="CKPT", help="run folder, checkpoint, untrained:RUN or hf:PATH")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
        sub.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
        sub.add_argument("--threads", type=positive, metavar="N", help="on a CPU")
        sub.add_argument("--json", type=output_file, metavar="FILE", help="results as one JSON object; - for "
                         "standard output")
        return sub

    for add in (add_commands, generate.add_commands, connectivity.add_commands, finetune.add_commands):
        add(command)
    args = parser.parse_args(argv)
    check_outputs(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(io.StringIO()) if args.json == "-" else contextlib.nullcontext():
        content, run = args.function(args)
    settings = {name: x for name, x in vars(args).items() if name not in ("function", "json", "command")}
    write_json(args.json, {"command": f"evaluate.py {args.command}", "settings": settings,
                           **(about(run) if run else {}), **content})


def check_outputs(args):
    """Complain of what cannot be written before the work, not after it."""
    picture, plot, out = (getattr(args, name, None) for name in ("picture", "plot", "out"))
    if plot:
        plots.check(plot)
    if picture and Path(picture).suffix.lower() != ".png":
        raise BadInput(f"--picture {picture} is no PNG file: end its name in .png")
    if out and os.path.lexists(out):
        raise BadInput(f"{out} exists; choose another --out or remove it")
    read = [os.path.abspath(path) for name in ("data", "dev")  # transfer takes several
            for path in np.atleast_1d(getattr(args, name, None) or [])]
    for name in ("json", "csv", "plot", "picture"):
        path = getattr(args, name, None)
        if path and os.path.abspath(path) in read:
            raise BadInput(f"--{name} {path} would replace what is read; choose another name")


if __name__ == "__main__":
    command_line(main)
