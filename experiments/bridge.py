"""From the theory to our Transformer: does the order of objectives follow the spectrum only when blind?

    python -m experiments.bridge train --seed 0 --json SEED0.json         every objective, noise and way
    python -m experiments.bridge summary SEED0.json .. --plot FILE.png    the order, over seeds

The theory's features f(X) do not know which position they will predict. Neither do those of --blind queries.
Queries that are told it have flat spectra, so that the theory orders nothing there. Here both kinds learn
objectives whose tails of Theorem 4.1 differ (at t = r, with the noise at hand), in train.py's Transformer of
two streams and one layer: a query's feature depends on its context alone. On common contexts every network
meets the same tokens and labels; an objective's own differ in size, which orders errors as well.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import plots
from data import CLASSES, POSITIONS, VALUES, Sequences, draw_tokens, load_corpus, toy_bytes
from experiments import toy
from experiments.spectrum import pairs
from model import Config, Transformer
from objectives import describe, draw_batch, flag, loss_sum
from run import choose_autocast, resolve
from train import LossModule, learning_rate, make_optimizer, update, validation_loss
from util import BadInput, Parser, command_line, output_file, plain, positive, table, write_json

WAYS = ("blind", "told")
PLACES = ("common", "own")


# ---------------------------------------------------------------------------- one network

def context_features(network, tokens, contexts):
    """The features of contexts, bool (N, s): the mean of the queries for all positions outside (N, D), which
    are one and the same where queries are blind. tokens (N, s) bytes."""
    targets, outside = torch.arange(tokens.shape[1]).expand(tokens.shape), (~contexts).float()[..., None]
    groups = 2 - contexts.long()
    features = network(tokens, groups, targets, "two-stream", torch.full_like(groups, 2))     # (N, s, D)
    return (features * outside).sum(1) / outside.sum(1)


@torch.no_grad()
def errors_of(network, model, own, seed, count=1024):
    """{place: excess over Bayes of a probe with few labels, as in `spectral.py toy`}; own: contexts and q of
    an objective on the NoisyToy model."""
    errors = {}
    for place, (contexts, q) in zip(PLACES, (toy.common_contexts(model.s), map(torch.tensor, own))):
        generator = torch.Generator().manual_seed(seed)
        chosen = contexts[torch.multinomial(q.sum(1), count, True, generator=generator)]      # (count, s)
        tokens, y = draw_tokens(model.r, model.s, model.T, model.eps, count, generator)
        counts = (F.one_hot(tokens // model.T, model.r) * chosen[..., None]).sum(1)           # (count, r)
        f = context_features(network, toy_bytes(tokens), chosen)
        errors[place] = toy.few_label_errors(f[None], model.posterior(counts), y, generator).item()
    return errors


def train_and_probe(objective, eps, blind, seed, steps):
    """One network -> its validation loss, the least there can be, errors by place, trained and untrained."""
    settings = resolve(objective=flag(objective), **asdict(objective), data=f"toy:{eps:g}", blind=blind,
                       seed=seed, steps=steps, batch_size=64, lr=8e-3, streams=2)
    (_, path), size, S = settings.task(), settings.batch_size, settings.length
    noisy, own = toy.NoisyToy(CLASSES, POSITIONS, VALUES, eps), pairs(objective, S)
    corpus = load_corpus(settings.data)
    vocab, separator = corpus.tokenizer.vocab, corpus.tokenizer.separator
    train_set, val_set = Sequences(corpus.train, S, separator, seed), Sequences(corpus.val, S, separator)

    torch.manual_seed(seed)
    model = Transformer(Config(vocab, S, layers=1, width=64, heads=4, blind=blind))
    loss_module, optimizer = LossModule(model, loss_sum), make_optimizer(model, settings)
    device, (autocast, _) = torch.device("cpu"), choose_autocast(torch.device("cpu"), "fp32")

    untrained = errors_of(model, noisy, own, seed)
    for step in range(steps):  # the draws of train.py
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = draw_batch(objective, path, train_set.batch(step * size, size), vocab, generator)
        update(loss_module, optimizer, [batch], float(batch.total[0]), path, autocast, settings.clip,
               learning_rate(settings, step / steps))
    loss = validation_loss(loss_module, objective, path, val_set, device, autocast, micro=64, count=2048)
    return {"loss": loss, "bayes": toy.bayes_loss(noisy, *own, blind), **errors_of(model, noisy, own, seed),
            **{f"untrained {place}": error for place, error in untrained.items()}}


# ---------------------------------------------------------------------------- all networks of a seed

def tail_of(objective, eps):
    """Theorem 4.1's tail at t = r under this noise."""
    _, _, sigma, _ = toy.split(toy.NoisyToy(CLASSES, POSITIONS, VALUES, eps), *pairs(objective, POSITIONS))
    return (sigma[CLASSES:] ** 4).sum()


def one_of_each_tail(quick=False):
    """Objectives with tails of their own on the clean model: where they differ by less than 5%, the first
    objective stands for all."""
    chosen = {}
    for objective in toy.candidates(POSITIONS, quick):
        found = tail_of(objective, 0.0)
        if all(abs(found - other) > 0.05 * other for other in chosen.values()):
            chosen[objective] = found
    return list(chosen)


def run_train(args):
    """Every objective, noise and way, of one seed."""
    noises, steps = ((0.0,), 20) if args.quick else ((0.0, 0.3), 400)
    rows, steps = [], args.steps or steps
    every = list(itertools.product(noises, one_of_each_tail(args.quick)))
    for eps, objective in tqdm(every, desc="objectives", mininterval=10):
        ways = {way: train_and_probe(objective, eps, way == "blind", args.seed, steps) for way in WAYS}
        rows.append({"objective": describe(objective), "eps": eps, "tail": tail_of(objective, eps), **ways})
    return {"seed": args.seed, "steps": steps, "rows": rows}


# ---------------------------------------------------------------------------- over seeds

def tail_order(tails, errors, resamples=1000):
    """errors {way: (seeds, objectives)} -> {way: Spearman of their means with the tails, 95% interval over
    objectives and seeds}, and their `difference`; None where a way's errors are all the same."""
    rng, (seeds, n) = np.random.default_rng(0), next(iter(errors.values())).shape

    def measured(rows, columns):
        found = [toy.spearman(tails[columns], x[rows][:, columns].mean(0)) for x in errors.values()]
        return [*found, None if None in found else found[0] - found[1]]

    middle = measured(np.arange(seeds), np.arange(n))
    drawn = [measured(rng.integers(seeds, size=seeds), rng.integers(n, size=n)) for _ in range(resamples)]
    result = dict.fromkeys((*errors, "difference"))
    for name, value, values in zip(result, middle, zip(*drawn)):
        if value is not None:
            ends = np.percentile([x for x in values if x is not None], (2.5, 97.5))
            result[name] = [value, *ends.tolist()]
    return result


def run_summary(args):
    """The networks of all seeds together."""
    seeds = [json.loads(Path(path).read_text())["results"] for path in args.files]
    if len({(x["steps"], *(row["objective"] for row in x["rows"])) for x in seeds}) > 1:
        raise BadInput(f"{', '.join(args.files)} were not made by the same command but for --seed")
    rows, orders = [], []
    for same in zip(*(x["rows"] for x in seeds)):
        ways = {way: {name: [row[way][name] for row in same] for name in same[0][way]} for way in WAYS}
        rows.append({**same[0], **ways})
    measured = (*PLACES, *(f"untrained {place}" for place in PLACES))
    for eps, place in itertools.product(sorted({row["eps"] for row in rows}), measured):
        group = [row for row in rows if row["eps"] == eps]
        tails = np.array([row["tail"] for row in group])
        errors = {way: np.array([row[way][place] for row in group]).T for way in WAYS}
        orders.append({"eps": eps, "place": place, **tail_order(tails, errors)})
    return {"seeds": len(seeds), "steps": seeds[0]["steps"], "rows": rows, "orders": orders}


def show_bridge(x):
    """The summary as text."""
    names = ("loss", "bayes", "common", "untrained common", "own", "untrained own")
    means = [("objective", "queries", "eps", "tail", *names)]
    for way, row in itertools.product(WAYS, sorted(x["rows"], key=lambda row: (row["eps"], -row["tail"]))):
        cells = (row["tail"], *(np.mean(row[way][name]) for name in names))
        means.append((row["objective"], way, f"{row['eps']:g}", *(f"{cell:.3f}" for cell in cells)))
    orders = [("eps", "Spearman with the tail of", *WAYS, "difference")]
    for y in x["orders"]:
        found = (toy.spearman_text(y[name]) for name in (*WAYS, "difference"))
        orders.append((f"{y['eps']:g}", y["place"], *found))
    return (f"Means over {x['seeds']} seeds. loss: of new sequences, bayes: the least there can be (nats).\n"
            "common, own: excess error of a probe with 5 labels a class on such contexts\n\n"
            f"{table(means)}\n\n{table(orders, '<')}")


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    parser = Parser(description="From the theory to our Transformer: blind queries and told ones.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    train = commands.add_parser("train", help="all networks of one seed")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps", type=positive, help="of training (default: 400, quick 20)")
    train.add_argument("--quick", action="store_true", help="six objectives, no noise, few steps")
    summary = commands.add_parser("summary", help="the order of objectives over seeds")
    summary.add_argument("files", nargs="+", metavar="FILE", help="what train wrote, one for each seed")
    summary.add_argument("--plot", metavar="FILE", help="the picture")
    for command in (train, summary):
        command.add_argument("--json", type=output_file, metavar="FILE", help="- for standard output")
    args = parser.parse_args(argv)
    if args.command == "train":
        results = run_train(args)
    else:
        if args.plot:
            plots.check(args.plot)
        results = plain(run_summary(args))
        if args.json != "-":
            print(show_bridge(results))
        if args.plot:
            plots.bridge(args.plot, results)
    write_json(args.json, {"command": f"experiments.bridge {args.command}", "results": results})


if __name__ == "__main__":
    command_line(main)
