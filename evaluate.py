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
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from downstream.commands import add_finetune_commands, add_probe_command, add_transfer_command
from downstream.connectivity import connectivity_command, evaluation_sequences
from downstream.generation import generate, generate_command
from downstream.hub import load_run, open_run
from downstream.reconstruct import add_reconstruct_command
from engine.machine import choose_device
from engine.runs import about
from objectives import describe, scores_next, target_nll
from support.cli import BadInput, Parser, command_line, import_optional, output_file, positive, seed, write_json

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

    add_finetune_commands(command)
    add_probe_command(command)
    add_reconstruct_command(command)
    add_transfer_command(command)
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
