"""Evaluate a checkpoint of train.py: likelihood, and the front end of all evaluation.

    python evaluate.py perplexity CKPT [--data ...] [--by-length]     P(x_{k+1} | x_1 .. x_k), Eq. 2
    python evaluate.py bound CKPT                                     the any-order bound beside it
    python evaluate.py generate CKPT --prompt TEXT                    samples
    python evaluate.py curves RUN [RUN ...]                           loss, learning rate, speed as a picture
    python evaluate.py connectivity CKPT [CKPT ...]                   similarity of features (Figure 2)
    python evaluate.py glue | probe | finetune CKPT ...               classification
    python evaluate.py transfer CKPT --data A B C                     probes on several image sets
    python evaluate.py reconstruct CKPT [CKPT ...]                    images completed patch by patch

CKPT is a run folder, a checkpoint file, untrained:RUN, or hf:PATH for a model of the transformers package.
What the other commands do stands in downstream/.
"""

import math
import time
from pathlib import Path

import torch

from downstream.by_length import by_length, plot_by_length, print_by_length
from downstream.closing import best_sample, picture_of, unigram_nll, what_to_expect
from downstream.commands import add_labelled_commands
from downstream.connectivity import connectivity_command, evaluation_sequences, held_out_text
from downstream.curves import add_curves_command
from downstream.generation import add_generate_command
from downstream.hub import open_run
from downstream.reconstruct import add_reconstruct_command
from engine.machine import choose_device, free_threads
from engine.runs import about, load_run
from objectives import describe, scores_next, target_nll
from support.cli import (
    BadInput,
    Parser,
    command_line,
    import_optional,
    output_file,
    positive,
    progress,
    seed,
    told,
    write_json,
)
from support.objective import asked

# ---------------------------------------------------------------------------- likelihood

@torch.no_grad()
def left_to_right(run, sequences, regime=None, tokens_at_once=1 << 14, quiet=True):
    """-log P(x_p | x_1 .. x_{p-1}) of every token p = 2..S of sequences (N, S), each from its whole prefix.

    The objective says which group indices give each token its whole prefix and nothing else as context
    (`Objective.left_to_right`): one pass for `ar`, t for `dar`, S - 1 for `mlm` and `vl`. A pass computes the
    tokens up to its last f > 0 only, and the output layer of the rows only that no pass before has scored.
    Returns {regime: float32 (N, S - 1)}.
    """
    N, S = sequences.shape
    regimes = run.objective.left_to_right(S, run.path)
    if regimes is None:
        raise BadInput(f"{describe(run.objective)} has no exact left-to-right likelihood: it is not trained "
                       "to predict a token from its whole prefix and nothing else")
    if regime is not None and regime not in regimes:
        raise BadInput(f"--regime {regime} is for masks in one stream; this {run.path} checkpoint of "
                       f"{describe(run.objective)} knows only {' and '.join(regimes)}: leave out --regime")
    results = {}
    for name in [regime] if regime else regimes:
        passes = [groups[:int(groups.nonzero()[-1]) + 1] for groups in regimes[name]]
        with progress(quiet=quiet, total=N * sum(map(len, passes)), unit=" tokens", unit_scale=True,
                      desc=name if len(regimes) > 1 else "") as bar:
            results[name] = scored_by(run, sequences, passes, tokens_at_once, bar)[:, 1:]
    return results


def scored_by(run, sequences, passes, tokens_at_once, bar):
    """-log P of each token of sequences (N, S) in the first of these f, each (L,), that gives it its prefix
    -> (N, S)."""
    N, S = sequences.shape
    device, nll, left = run.model.query.device, torch.full((N, S), math.nan), torch.ones(S, dtype=torch.bool)
    for groups in passes:
        length = len(groups)
        targets = (scores_next(groups) & left[:length]).nonzero()[:, 0]
        rows, holes, left[targets] = max(1, tokens_at_once // length), not groups.all(), False
        for start in range(0, N, rows):
            tokens = sequences[start:start + rows, :length].to(device)
            f, t = (x.to(device).expand(len(tokens), -1) for x in (groups, targets))
            nll[start:start + rows, targets] = target_nll(run.model, tokens, f, t, run.path, holes).cpu()
            bar.update(tokens.numel())
    return nll


@torch.no_grad()
def weighted_nll(run, tokens, groups, queries, tokens_at_once=1 << 14):
    """sum_p weight_p * -log P(x_p | context of p) of rows of tokens and f (R, S), Queries -> double (R,)."""
    rows, device, found = max(1, tokens_at_once // tokens.shape[1]), run.model.query.device, []
    for *inputs, weight in zip(*(x.split(rows) for x in (tokens, groups, *queries))):
        ids, f, targets, cuts = (x.to(device) for x in inputs)
        nll = target_nll(run.model, ids, f, targets, run.path, not f.all(), cuts)
        found.append((nll.cpu().double() * weight).sum(1))
    return torch.cat(found)


def any_order(run, sequences, draws=8, orders=0, seed=0, quiet=True):
    """Bounds of -log P(x_2 .. x_S | x_1) in nats a token; P = E_o P_o is the model's mixture over orders.

    bound    the mean over orders, from `draws` contexts a sequence, stratified over how many tokens hide
    mixture  -log of the mean of P_o over `orders` orders a sequence, nearer to P the more there are
    Returns {name: double (N,)}. Both are upper bounds in expectation; only the first is unbiased.
    """
    S, generator, found = sequences.shape[1], torch.Generator().manual_seed(seed), {"bound": []}
    if run.objective.bound(1, S, generator) is None:
        raise BadInput(f"{describe(run.objective)} is not trained to predict in any order, so it has no "
                       "any-order bound; see evaluate.py perplexity")

    def total(tokens, f, weight):
        queries = asked(f, weight, int((weight > 0).sum(1).max()))
        return weighted_nll(run, tokens.expand(len(f), -1), f, queries)

    for tokens in progress(sequences, quiet, desc="any order", unit=" sequences"):
        found["bound"].append(total(tokens, *run.objective.bound(draws, S, generator)).mean())
        if orders:
            f, ask = run.objective.orders(orders, S, generator)                          # (orders, passes, S)
            log_p = -total(tokens, f.flatten(0, 1), ask.flatten(0, 1).float()).view(orders, -1).sum(1)
            found.setdefault("mixture", []).append(math.log(orders) - log_p.logsumexp(0))
    return {name: torch.stack(nll) / (S - 1) for name, nll in found.items()}


def as_trained(run, sequences, most=64, quiet=True):
    """Mean -log P of the targets given the contexts they are trained with, weighted as in the loss, over all
    f where these are few, as for `dar` and `mtp`. None where they are not, or are left to right anyway."""
    (N, S), objective = sequences.shape, run.objective
    listed = objective.outcomes(S, most) if objective.one_stream != "mask" else None
    if listed is None or len(listed[0]) > most:
        return None
    groups, probability = listed
    queries = objective.queries(groups)
    next_only = torch.stack([scores_next(f) for f in groups]).gather(1, queries.targets).all()
    if next_only and queries.targets.shape[1] == S - 1:
        return None
    nll = [weighted_nll(run, sequences, f.expand(N, -1), [x.expand(N, -1) for x in rows]).mean()
           for f, *rows in progress(list(zip(groups, *queries)), quiet, desc="as trained", unit=" passes")]
    return (torch.stack(nll) @ probability / (queries.weight.double().sum(1) @ probability)).item()


def summary(nll, tokens_per_byte):
    """Results from the -log P (N, S - 1) of N sequences. Perplexity is exp of the mean over tokens; the
    standard error takes sequences for independent samples; `sequence_nll` are theirs, to pair checkpoints."""
    mean, stderr = nll.mean().item(), nll.mean(1).std().item() / math.sqrt(len(nll))
    return {"nll": mean, "stderr": stderr, "tokens": nll.numel(), "sequences": len(nll),
            "perplexity": math.exp(mean), "perplexity_stderr": math.exp(mean) * stderr,
            "bits_per_byte": mean / math.log(2) * tokens_per_byte, "sequence_nll": nll.mean(1).tolist()}


def perplexity(run, data=None, max_sequences=200, regime=None, lengths=False, quiet=True):
    """Left-to-right likelihood of held-out text under a Run -> dict of results per regime; with `lengths`
    also for each length of the prefix."""
    sequences, tokens_per_byte, data = evaluation_sequences(run, data, max_sequences)
    results, start = {"data": data, "length": sequences.shape[1], "regimes": {}}, time.perf_counter()
    for name, nll in left_to_right(run, sequences, regime, quiet=quiet).items():
        results["regimes"][name] = summary(nll, tokens_per_byte)
        if lengths:
            results["regimes"][name]["by_length"] = by_length(nll)
    scored = sum(r["tokens"] for r in results["regimes"].values())
    results["tokens_per_second"] = scored / (time.perf_counter() - start)
    order = as_trained(run, sequences, quiet=quiet)
    if order is not None:
        results["training_order_nll"], results["training_order_perplexity"] = order, math.exp(order)
    results |= what_is_dropped(run.tokenizer, sequences)
    return results


def bound(run, data=None, max_sequences=200, draws=8, orders=0, seed=0, quiet=True):
    """The any-order bound and the exact left-to-right likelihood of one text under one Run -> dict."""
    sequences, tokens_per_byte, data = evaluation_sequences(run, data, max_sequences)
    wide = (-1, sequences.shape[1] - 1)
    mixed = any_order(run, sequences, draws, orders, seed, quiet)
    exact = left_to_right(run, sequences, quiet=quiet)
    gaps = {name: mixed["bound"] - nll.double().mean(1) for name, nll in exact.items()}
    mixed = {name: nll[:, None].expand(wide) for name, nll in mixed.items()}
    return {"data": data, "length": sequences.shape[1], "sequences": len(sequences),
            "draws": draws, "orders": orders,
            "any_order": {name: summary(nll, tokens_per_byte) for name, nll in mixed.items()},
            "left_to_right": {name: summary(nll, tokens_per_byte) for name, nll in exact.items()},
            **what_is_dropped(run.tokenizer, sequences),
            "difference": {name: {"nll": gap.mean().item(), "stderr": gap.std().item() / math.sqrt(len(gap))}
                           for name, gap in gaps.items()}}


def what_is_dropped(tokenizer, sequences):
    """{"unknown": share of [UNK], "wordpiece": whether that is the tokenizer}, or {} of one without [UNK]."""
    if tokenizer.unknown is None:
        return {}
    return {"unknown": (sequences == tokenizer.unknown).double().mean().item(),
            "wordpiece": tokenizer.kind == "wordpiece"}


# ---------------------------------------------------------------------------- shown

def line_of(name, r, sign=""):
    return (f"{name:10s} perplexity {sign:2s}{r['perplexity']:9.2f} ± {r['perplexity_stderr']:.2f}   "
            f"nll {r['nll']:.4f} ± {r['stderr']:.4f}   {r['bits_per_byte']:.3f} bits/byte")


def print_perplexity(results):
    for name, r in results["regimes"].items():
        print(line_of(name, r) + f"   {r['tokens']:,} tokens")
    if "training_order_nll" in results:
        print(f"{'as trained':10s} perplexity   {results['training_order_perplexity']:9.2f}{'':10s}"
              f"nll {results['training_order_nll']:.4f}, each token in the contexts it is trained with")
    print_dropped(results)


def print_dropped(results):
    """What likelihoods leave out of the text."""
    if "unknown" in results:
        print(f"{results['unknown']:.2%} of these tokens are [UNK].", end=" ")
        print("WordPiece also drops spacing, and letter case unless it is a cased one:\nits bits per byte "
              "leave that out and do not compare with those of other tokenizers." if results["wordpiece"]
              else "")


def print_bound(results, run):
    """What `bound` returns, beside the left-to-right likelihood."""
    print("\nThe mixture over orders of the same network, P = E_o P_o(x_2 .. x_S | x_1): at most")
    notes = {"bound": f"mean over orders, {results['draws']} contexts a sequence",
             "mixture": f"-log of the mean over {results['orders']} orders"}
    for name, r in results["any_order"].items():
        print(line_of(name, r, "<=") + f"   {notes[name]}")
    print("\nThe chain from left to right, another distribution: exactly")
    for name, r in results["left_to_right"].items():
        print(line_of(name, r, "="))
    print()
    for name, gap in results["difference"].items():
        print(f"bound - {name}: {gap['nll']:+.4f} ± {gap['stderr']:.4f} nats a token, paired by sequence")
    print_dropped(results)
    if run.path == "mask" and run.objective.generation == "left":
        print("The bound takes every share of hidden tokens, of which this model was trained with some only.")


# ---------------------------------------------------------------------------- commands

def title(run, results):
    trained = f", step {run.step:,}" if run.step else ""
    return f"{run.name}: {describe(run.objective)} ({run.path}){trained}, on {results['data']}"


def perplexity_command(args):
    """`evaluate.py perplexity CKPT`: left-to-right likelihood of held-out text, printed and as a picture.

    args     checkpoint, data, regime, by_length, max_sequences, plot, length, json, device, dtype
    Returns ({"results": what `perplexity` returns}, the Run). BadInput: an objective without such a
    likelihood, a regime it does not have, text of fewer than two sequences, a checkpoint of images.
    """
    run, autocast = open_run(args)
    with autocast:
        lengths = args.by_length or bool(args.plot)
        results = perplexity(run, args.data, args.max_sequences, args.regime, lengths, quiet=False)
    if args.json != "-":
        print(title(run, results))
        print_perplexity(results)
        if args.by_length:
            print_by_length(results)
    if args.plot:
        plot_by_length(args.plot, {name: r["by_length"] for name, r in results["regimes"].items()})
    return {"results": results}, run


def bound_command(args):
    """`evaluate.py bound CKPT`: the any-order bound beside the left-to-right likelihood, printed.

    args     checkpoint, data, max_sequences, draws, orders, seed, length, json, device, dtype
    Returns ({"results": what `bound` returns}, the Run). BadInput: an objective that is not trained to
    predict in any order, text of fewer than two sequences, a checkpoint of images.
    """
    run, autocast = open_run(args)
    with autocast:
        results = bound(run, args.data, args.max_sequences, args.draws, args.orders, args.seed, quiet=False)
    if args.json != "-":
        print(f"{title(run, results)}, {results['sequences']:,} sequences of {results['length']} tokens")
        print_bound(results, run)
    return {"results": results}, run


def report(checkpoint, device=None):
    """What train.py shows of a run folder at its end: curves, a quick perplexity, a sample and what to expect
    of such a model; of images a few that are reconstructed. BadInput: a text too short to evaluate on.
    """
    run = load_run(checkpoint, choose_device(device))
    if (picture := picture_of(checkpoint)) is not None:
        print(f"curves of loss, learning rate and speed: {picture}")
    if run.settings.images:
        if not run.settings.norm_pix:
            picture = str(Path(checkpoint, "reconstruction.png"))
            main(["reconstruct", str(checkpoint), "--max-images", "100", "--picture", picture,
                  *(["--device", device] if device else [])])
        print(f"\nrun folder: {checkpoint}    more: python evaluate.py probe {checkpoint}")
        return
    exact, text = run.objective.left_to_right(run.settings.length, run.path) is not None, held_out_text(run)
    sequences = evaluation_sequences(run, text, count=32)[0]
    if exact:
        print(f"\nleft-to-right perplexity of {describe(run.objective)} on a few validation sequences:")
        results = perplexity(run, text, max_sequences=32)
        print_perplexity(results)
    else:
        print(f"\n{describe(run.objective)} has no exact left-to-right likelihood, so there is no perplexity")
    if exact or run.objective.decoding(torch.tensor([1, 0]), 1) is not None:
        starts = sequences[:, :max(1, run.settings.length // 4)]
        prompt = max(starts, key=lambda start: start.unique().numel()).tolist()  # prose rather than a table
        ids = best_sample(run, prompt, run.settings.length // 2)
        print("\nsample: " + run.tokenizer.decode(prompt) + " >>> " + run.tokenizer.decode(ids))
    if exact:
        nll = min(regime["nll"] for regime in results["regimes"].values())
        unigram, words = unigram_nll(text, sequences).mean().item(), run.tokenizer.kind == "byte"
        print(f"\nwhat to expect: {what_to_expect(nll, unigram, words)}")
    more = f"perplexity {checkpoint}" if exact else f"probe {checkpoint}"
    print(f"\nrun folder: {checkpoint}    more: python evaluate.py {more}")


def add_likelihood_commands(command):
    """Register perplexity, bound and connectivity: `command(name, function, text)` gives a parser."""
    source = "pydoc, text, token folder or hf:NAME (default: the run's validation text)"
    sub = command("perplexity", perplexity_command, "left-to-right likelihood of held-out text (Eq. 2)")
    sub.add_argument("--data", help=source)
    sub.add_argument("--regime", choices=("padded", "truncated"), help="masks in one stream (default: both)")
    sub.add_argument("--by-length", action="store_true", help="perplexity against the length of the prefix")
    sub.add_argument("--max-sequences", type=positive, default=200, help="sequences drawn from the text")
    sub.add_argument("--plot", type=output_file, metavar="FILE", help="picture of that curve (Figure 3)")
    sub.add_argument("--length", type=positive, help="hf: models: tokens of a sequence (default: 128)")

    sub = command("bound", bound_command, "bound of the any-order likelihood, beside the left-to-right one")
    sub.add_argument("--data", help=source)
    sub.add_argument("--max-sequences", type=positive, default=50, help="sequences drawn from the text")
    sub.add_argument("--draws", type=positive, default=8, help="contexts a sequence, spread over the number "
                     "of hidden tokens")
    sub.add_argument("--orders", type=positive, default=0, metavar="K", help="also the tighter -log of the "
                     "mean over K whole orders a sequence, each of which may take S - 1 passes")
    sub.add_argument("--seed", type=seed, default=0, help="of the contexts and orders")
    sub.add_argument("--length", type=positive, help="as for perplexity")

    text = "similarity of features of held-out contexts (Figure 2)"
    sub = command("connectivity", connectivity_command, text, many=True)
    sub.add_argument("--data", help="as for perplexity (default: the first checkpoint's validation text)")
    sub.add_argument("--features", type=positive, default=8000, help="contexts, 8000 in the paper")
    sub.add_argument("--top", type=positive, default=100_000, help="most similar pairs to show")
    sub.add_argument("--seed", type=seed, default=0, help="of the choice of contexts")
    sub.add_argument("--plot", type=output_file, metavar="FILE", help="picture of similarity over rank")


def main(argv=None):
    """The command line, of `argv` or sys.argv: one command, what it prints, and with --json the object
    {"command", "settings", what is known of the checkpoint, and what the command returns}. BadInput: a wrong
    use.
    """
    parser = Parser(description="Evaluate a checkpoint of train.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, text, many=False):
        """A command on one checkpoint, or on many; `function` takes the arguments and returns (content for
        --json, Run), or None in place of the Run where the content tells of each."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        which = {"dest": "checkpoints", "nargs": "+"} if many else {"dest": "checkpoint"}
        sub.add_argument(**which, metavar="CKPT", help="run folder, checkpoint, untrained:RUN or hf:PATH")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
        sub.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
        sub.add_argument("--threads", type=positive, metavar="N",
                         help="on a CPU (default: as many as other work leaves free)")
        sub.add_argument("--json", type=output_file, metavar="FILE",
                         help="results as one JSON object; - for standard output")
        return sub

    add_likelihood_commands(command)
    for add in (add_generate_command, add_labelled_commands, add_reconstruct_command, add_curves_command):
        add(command)
    args = parser.parse_args(argv)
    if getattr(args, "plot", None):
        import_optional("matplotlib.pyplot")  # complain before the work, not after it
    torch.set_num_threads(args.threads or free_threads())
    with told(args.command):
        results, run = args.function(args)
    inner = ("function", "json", "command")
    settings = {name: value for name, value in vars(args).items() if name not in inner}
    write_json(args.json, {"command": f"evaluate.py {args.command}", "settings": settings,
                           **(about(run) if run else {}), **results})


if __name__ == "__main__":
    command_line(main)
