"""From the theory to our Transformer: does the order of objectives follow the spectrum only when blind?

    python -m experiments.bridge train --seed 0 --json SEED0.json         every objective, noise and way
    python -m experiments.bridge summary SEED0.json .. --plot FILE.png    the order, over seeds
    python -m experiments.bridge probe RUN                                of train.py --data toy --streams 2

The theory's features f(X) do not know which position they will predict. Neither do those of --blind queries.
Queries that are told it have flat spectra, whatever the objective (theory/toy.py), so that the theory orders
nothing there. Here both kinds learn 12 objectives whose tails of Theorem 4.1 differ.

Network. The Transformer and the steps of train.py, in two streams; one layer, in which a query reads the
embeddings of its context: like f(X), its feature depends on the context alone. In more layers it also depends
on the order in which f let that context read itself.

Feature. The feature of a context is the mean, over all positions outside of it, of the features of their
queries. Blind these are one and the same; told they are what the network predicts those positions from, and
the mean asks the same of every objective, also where training asks less (ar: the next position only).

Probe. As in `spectral.py toy`: ridge regression on 5 labels a class, its excess error over Bayes, the mean
over choices of labels. On common contexts, where all sizes weigh the same, every network meets the same
contexts, tokens and labels, those of its seed. The objective's own differ in size, and with that in how many
positions the told mean is over: there an order has other causes than the spectrum as well.
"""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Sequences, load_corpus
from engine.machine import Machine
from engine.runs import load_run, untrained
from engine.settings import resolve
from engine.steps import set_rate
from model import Config
from objectives import describe, flag
from support.cli import (
    BadInput,
    Parser,
    command_line,
    import_optional,
    output_file,
    plain,
    positive,
    progress,
    seed,
    show_and_write,
)
from text.toy import CLASSES, POSITIONS, VALUES, draw_tokens, toy_bytes, toy_noise
from theory.show import table
from theory.toy import (
    NoisyToy,
    bayes_loss,
    candidates,
    distribution,
    few_label_errors,
    spearman,
    split,
)
from theory.toy_report import annotate, spearman_text
from train import Job, batch_sizes, build, learning_rate, update, validation_loss

WAYS = ("blind", "told")
PLACES = ("common", "own")
RECIPE = {"batch_size": 64, "lr": 8e-3, "streams": 2}
ALIKE = 0.05  # tails that differ by a smaller share are not told apart: the first objective stands for all


# ---------------------------------------------------------------------------- one network

def context_features(network, tokens, contexts):
    """The mean over the positions outside of contexts, bool (N, s), of the features of their queries (N, D);
    tokens (N, s) bytes."""
    targets, outside = torch.arange(tokens.shape[1]).expand(tokens.shape), (~contexts).float()[..., None]
    groups = 2 - contexts.long()
    features = network(tokens, groups, targets, "two-stream", torch.full_like(groups, 2))     # (N, s, D)
    return (features * outside).sum(1) / outside.sum(1)


@torch.no_grad()
def few_label_error(network, model, contexts, weight, seed, count=1024, labels=5, draws=20):
    """Excess over Bayes of a probe with few labels, on `count` contexts of the NoisyToy model drawn from
    contexts, bool (n, s), of that weight (n,)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(contexts)[torch.multinomial(torch.tensor(weight), count, True, generator=generator)]
    tokens, y = draw_tokens(model.r, model.s, model.T, model.eps, count, generator)
    counts = (F.one_hot(tokens // model.T, model.r) * chosen[..., None]).sum(1)               # (count, r)
    f = context_features(network, toy_bytes(tokens), chosen)
    return few_label_errors(f[None], model.posterior(counts), y, labels, draws, generator)[-1, 0].item()


def errors_of(network, model, own, seed):
    """{place: few-label error}; own: contexts and q of an objective."""
    subsets = np.indices((2,) * model.s).reshape(model.s, -1).T[1:-1] > 0
    sizes = [1 / math.comb(model.s, int(m)) for m in subsets.sum(1)]
    pairs = (subsets, sizes), (own[0], own[1].sum(1))
    return {place: few_label_error(network, model, *pair, seed) for place, pair in zip(PLACES, pairs)}


def train_and_probe(objective, eps, blind, seed, steps, layers):
    """{loss, of validation; each place; each place untrained} of one network."""
    settings = resolve(objective=flag(objective), **asdict(objective), data=f"toy:{eps:g}", blind=blind,
                       seed=seed, steps=steps, **RECIPE)
    corpus, S, model = load_corpus(settings.data), settings.length, NoisyToy(CLASSES, POSITIONS, VALUES, eps)
    config = Config(corpus.tokenizer.vocab, S, layers, width=64, heads=4, blind=blind)
    train_set, val_set = (Sequences(x, S, corpus.tokenizer.separator, seed=number)
                          for x, number in ((corpus.train, seed), (corpus.val, None)))
    job = Job(settings, Machine(torch.device("cpu")), *settings.task(), config, train_set, val_set, {},
              batch_sizes(settings, steps))
    build(job, None, None)
    own, autocast = distribution(objective, S), job.machine.autocast
    before = errors_of(job.model, model, own, seed)
    for step in range(steps):
        batch, count = job.draw((step, step * settings.batch_size))
        set_rate(job.optimizer, learning_rate(settings, step / steps))
        update(job.loss_module, job.optimizer, [batch], count, job.path, autocast, settings.clip)
    loss = validation_loss(job.validation, objective, job.path, val_set, job.machine.device, autocast,
                           micro=64, count=2048)
    return {"loss": loss, "bayes": bayes_loss(model, *own, blind), **errors_of(job.model, model, own, seed),
            **{f"untrained {place}": error for place, error in before.items()}}


# ---------------------------------------------------------------------------- all networks of a seed

def one_of_each_tail(quick=False):
    """[(objective, tail of Theorem 4.1 per class on the clean model)]: where tails are alike the first."""
    chosen = []
    for objective in candidates(POSITIONS, quick):
        position = split(NoisyToy(CLASSES, POSITIONS), *distribution(objective, POSITIONS))[0]
        tail = (position[1:] ** 4).sum()
        if all(abs(tail - other) > ALIKE * other for _, other in chosen):
            chosen.append((objective, tail))
    return chosen


def run_train(args):
    """Every objective, noise and way, of one seed."""
    noises, steps = ((0.0,), 20) if args.quick else ((0.0, 0.3), 400)
    rows, steps = [], args.steps or steps
    every = list(itertools.product(noises, one_of_each_tail(args.quick)))
    for eps, (objective, tail) in progress(every, desc="objectives"):
        ways = {way: train_and_probe(objective, eps, way == "blind", args.seed, steps, args.layers)
                for way in WAYS}
        rows.append({"objective": describe(objective), "eps": eps, "tail": tail, **ways})
    return {"seed": args.seed, "steps": steps, "layers": args.layers, "rows": rows}


# ---------------------------------------------------------------------------- over seeds

def tail_order(tail, errors, resamples=1000):
    """Does the error of the objectives grow with their tail? errors {way: (seeds, objectives)}.

    -> {way: Spearman of the means over seeds, 95% interval over objectives and seeds}, and of their
    `difference`; None where a way's errors are all the same.
    """
    rng, (seeds, n) = np.random.default_rng(0), next(iter(errors.values())).shape

    def measured(rows, columns):
        found = [spearman(tail[columns], x[rows][:, columns].mean(0)) for x in errors.values()]
        return [*found, None if None in found else found[0] - found[1]]

    middle = measured(np.arange(seeds), np.arange(n))
    drawn = [measured(rng.integers(seeds, size=seeds), rng.integers(n, size=n)) for _ in range(resamples)]
    names, result = (*errors, "difference"), {}
    for name, value, values in zip(names, middle, zip(*drawn)):
        known = [x for x in values if x is not None]
        ends = np.percentile(known, (2.5, 97.5)).tolist() if known else []
        result[name] = None if value is None else [value, *ends]
    return result


def run_summary(args):
    """The networks of all seeds together, and as text."""
    seeds = [json.loads(Path(path).read_text())["results"] for path in args.files]
    if any([row["objective"] for row in x["rows"]] != [row["objective"] for row in seeds[0]["rows"]]
           or x["steps"] != seeds[0]["steps"] for x in seeds):
        raise BadInput(f"{', '.join(args.files)} were not made by the same command but for --seed")
    rows = []
    for same in zip(*(x["rows"] for x in seeds)):
        ways = {way: {name: [row[way][name] for row in same] for name in same[0][way]} for way in WAYS}
        for found in ways.values():
            found["loss - least"] = [loss - least for loss, least in zip(found["loss"], found["bayes"])]
        rows.append({**same[0], **ways})
    noises, orders = sorted({row["eps"] for row in rows}), []
    measured = (*PLACES, *(f"untrained {place}" for place in PLACES), "loss - least")
    for eps, place in itertools.product(noises, measured):
        group = [row for row in rows if row["eps"] == eps]
        tail, errors = (np.array([row["tail"] for row in group]),
                        {way: np.array([row[way][place] for row in group]).T for way in WAYS})
        orders.append({"eps": eps, "place": place, **tail_order(tail, errors)})
    x = plain({"seeds": len(seeds), "steps": seeds[0]["steps"], "layers": seeds[0]["layers"], "rows": rows,
               "orders": orders})
    return {**x, "text": show_bridge(x)}


def show_bridge(x):
    """The summary as lines of text."""
    several = x["seeds"] > 1

    def cell(values):
        return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if several else "")

    lines = ["loss, least: cross-entropy on new sequences, and the least there can be (nats)",
             "common, own: excess error of a probe with 5 labels a class on such contexts; and untrained", ""]
    for eps, way in itertools.product(sorted({row["eps"] for row in x["rows"]}), WAYS):
        rows = [("objective", "tail", "loss", "least", "common", "untrained", "own", "untrained")]
        for row in sorted((row for row in x["rows"] if row["eps"] == eps), key=lambda row: -row["tail"]):
            found = row[way]
            errors = [cell(found[name]) for place in PLACES for name in (place, f"untrained {place}")]
            rows.append((row["objective"], f"{row['tail']:.3f}", cell(found["loss"]),
                         f"{found['bayes'][0]:.3f}", *errors))
        lines += [f"eps = {eps:g}, {way}", "", *table(rows), ""]
    rows = [("eps", "of", "blind", "told", "blind - told")]
    rows += [(f"{y['eps']:g}", y["place"], *(spearman_text(y[name]) for name in (*WAYS, "difference")))
             for y in x["orders"]]
    return [*lines, "Spearman with the tail over objectives [95% over objectives and seeds]: of errors on",
            "common and own contexts, of untrained networks' errors, and of what the loss lacks", "",
            *table(rows, "<"), "", *(in_words(y) for y in x["orders"] if y["place"] in PLACES)]


def in_words(y):
    """What the orders of one noise and kind of contexts say, in a line."""
    blind, told, both = (y[name] for name in (*WAYS, "difference"))
    where = f"eps = {y['eps']:g}, {y['place']} contexts"
    if both is None:
        return f"{where}: errors do not differ enough to order the objectives."
    follows = {way: "follow" if low > 0 else "run against" if high < 0 else "do not show"
               for way, (_, low, high) in zip(WAYS, (blind, told))}
    more = ("blind ones more closely" if both[1] > 0 else "told ones more closely" if both[2] < 0 else
            "whether one kind does so more closely is open")
    return (f"{where}: blind networks {follows['blind']} the order of the tails, told ones "
            f"{follows['told']} it; {more}.")


def plot_bridge(x, path):
    """Error on common contexts against the tail: left blind, right told, a row for each noise."""
    pyplot = import_optional("matplotlib.pyplot")
    noises = sorted({row["eps"] for row in x["rows"]})
    figure, axes = pyplot.subplots(len(noises), 2, figsize=(13, 0.6 + 4.6 * len(noises)), sharex=True,
                                   sharey="row", squeeze=False, layout="constrained")
    for (eps, panels), (k, way) in itertools.product(zip(noises, axes), enumerate(WAYS)):
        panel, rows = panels[k], [row for row in x["rows"] if row["eps"] == eps]
        for row in rows:
            errors = row[way]["common"]
            panel.plot([row["tail"]] * 2, [min(errors), max(errors)], color=f"C{k}", linewidth=1.2)
            panel.plot(row["tail"], np.mean(errors), "o", color=f"C{k}", markeredgecolor="black", ms=6,
                       zorder=4)
        level = np.mean([row[way]["untrained common"] for row in rows])
        panel.axhline(level, color="grey", linestyle=":", label="untrained (dots: mean over seeds; upright "
                      "lines: range)")
        found = next(y for y in x["orders"] if (y["eps"], y["place"]) == (eps, "common"))
        panel.set(xscale="log", title=f"{way}, eps = {eps:g}: Spearman {spearman_text(found[way])}")
        panel.margins(x=0.14, y=0.12)
        panel.xaxis.set_major_formatter("{x:g}")
    for panel in axes[:, 0]:
        panel.set_ylabel("excess error on common contexts, 5 labels a class")
    for panel in axes[-1]:
        panel.set_xlabel("tail of Theorem 4.1: sum of sigma_j^4, j > 1, per class")
    axes[0, 0].legend(frameon=False, fontsize="small", loc="upper left")
    figure.canvas.draw()
    for (eps, panels), (k, way) in itertools.product(zip(noises, axes), enumerate(WAYS)):
        annotate(panels[k], [(row["tail"], np.mean(row[way]["common"]), row["objective"], "black")
                             for row in x["rows"] if row["eps"] == eps])
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------------------- command line

def run_probe(args):
    """A run of train.py, and the same untrained."""
    run = load_run(args.run)
    eps = toy_noise(run.settings.data)
    if eps is None or run.path != "two-stream":
        raise BadInput(f"{args.run} ({run.path}) was trained on {run.settings.data}; this reads runs of "
                       "train.py --data toy --streams 2")
    model, own = NoisyToy(CLASSES, POSITIONS, VALUES, eps), distribution(run.objective, POSITIONS)
    errors = {name: errors_of(one.model, model, own, run.settings.seed)
              for name, one in (("trained", run), ("untrained", untrained(run)))}
    lines = table([("", *PLACES), *((name, *(f"{e[p]:.3f}" for p in PLACES)) for name, e in errors.items())])
    return {"objective": describe(run.objective), "blind": run.model.config.blind, "eps": eps, **errors,
            "text": ["Excess error of a probe with 5 labels a class, by contexts:", *lines]}


def bridge_arguments(argv=None):
    """The arguments of a command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="all networks of one seed")
    train.add_argument("--seed", type=seed, default=0)
    train.add_argument("--steps", type=positive, help="of training (default: 400, quick 20)")
    train.add_argument("--layers", type=positive, default=1, help="of the Transformer")
    train.add_argument("--quick", action="store_true", help="six objectives, no noise, few steps")
    summary = commands.add_parser("summary", help="the order of objectives over seeds")
    summary.add_argument("files", nargs="+", metavar="FILE", help="what train wrote, one for each seed")
    summary.add_argument("--plot", type=output_file, metavar="FILE", help="the picture, PNG")
    probe = commands.add_parser("probe", help="few-label errors of a run of train.py --data toy --streams 2")
    probe.add_argument("run", metavar="RUN")
    for command, function in ((train, run_train), (summary, run_summary), (probe, run_probe)):
        command.add_argument("--json", type=output_file, metavar="FILE", help="- for standard output")
        command.set_defaults(function=function)
    return parser.parse_args(argv)


def main(argv=None):
    show_and_write("experiments.bridge", bridge_arguments(argv), plot_bridge)


if __name__ == "__main__":
    command_line(main)
