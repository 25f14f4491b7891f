"""Columns of the tables: which stages a number comes from, and how it is read from what they wrote."""

import importlib.util
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from downstream import glue
from experiments.authors import novels_of
from experiments.stages import Model, evaluation, parsed, pretrain, source
from experiments.verdicts import Cell, cell_of
from objectives import OBJECTIVES

# the paper's, Table 6
NINE = ("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers", "food101", "pets")

PASSAGES = 80  # in the dev part, of one novel of every author; 64 for training: see authors.py
FEW_LABELS = f"--train 64 --dev {PASSAGES}"


@dataclass(frozen=True)
class Measure:
    """A column.

    stages(place, model, seed) -> the stages of one cell, () where there is none;  read(model, *what they
    wrote) -> Cell
    """

    stages: Callable = None
    read: Callable = None
    lower: bool = False       # better
    digits: int = 1
    unit: str = "points"      # of differences; "factor": cells hold logarithms
    mean_of: tuple = ()       # instead of stages and read: the mean over other columns
    classifies: bool = False  # worth nothing where untrained networks score as high

    def shown(self, value):
        """A cell's value as people read it."""
        return float(np.exp(value)) if self.unit == "factor" else value

    def judged(self, number):
        """One of the paper's numbers on the scale on which claims are judged."""
        return float(np.log(number)) if self.unit == "factor" else number


def trained_only(stages):
    """A measure of what untrained networks cannot do."""
    return lambda place, model, seed: stages(place, model, seed) if Model(model).learned else ()


def matplotlib():
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


# ---------------------------------------------------------------------------- generation

def regime_of(results, regime):
    """The results of a regime; objectives that know one only have that. 'best': the better of them."""
    regimes = results["results"]["regimes"]
    if regime == "best":
        return min(regimes.values(), key=lambda r: r["nll"])
    return regimes.get(regime) or next(iter(regimes.values()))


def perplexity_column(regime, data="", bits=False):
    """Left-to-right perplexity in a regime, judged as a factor; or bits per byte, which models of two
    vocabularies share.

    Bits per byte are of the text that the tokenizer keeps: WordPiece drops case and spacing. The row 'counts'
    is that of unigrams.
    """
    def read(model, x):
        r = regime_of(x, regime)
        scale = r["bits_per_byte"] / r["nll"] if bits else 1.0
        return cell_of(scale * np.array(r["sequence_nll"]), "mean", f"text {data}")

    def stages(place, model, seed):
        if model.startswith("counts"):
            return () if data or bits else (unigram_stage(place, model, seed),)
        if not Model(model).learned:
            return ()
        return (evaluation(place, model, seed, "perplexity", f"--by-length {data}".strip()),)

    return Measure(stages, read, lower=True, digits=3 if bits else 1, unit="bits" if bits
                   else "factor")


def gain_share(regime, prefixes, reference):
    """Of what the autoregressive model `reference` gains over unigrams after prefixes of lengths k, in bins,
    that prefixes(k, S) picks, the share that another model gains: (H_unigram - L_mlm)/(H_unigram - L_ar)."""
    def mean_nll(results, name):
        bins = [b for b in regime_of(results, name)["by_length"]["bins"]
                if prefixes(b["first"], results["results"]["length"])]
        return np.average([b["sequence_nll"] for b in bins], axis=0,
                          weights=[b["last"] - b["first"] + 1 for b in bins])

    def read(model, unigram, x, ar):
        samples = mean_nll(unigram, "unigram"), mean_nll(x, regime), mean_nll(ar, "next")
        return cell_of(samples, "share", "text")

    def stages(place, model, seed):
        return (unigram_stage(place, reference, seed), *(evaluation(place, name, seed, "perplexity",
                                                                    "--by-length") for name in (model,
                                                                                                reference)))

    return Measure(trained_only(stages), read, digits=3, unit="")


def losses(place, model, seed, what, *flags):
    """The stage of one of experiments.losses' measurements on the sequences that perplexity takes."""
    run = pretrain(place, Model(model), seed)
    count = place.scale.evaluate["perplexity"].split()
    return place.stage(f"{what}-{run.out.name}", ("experiments.losses", what, str(run.out), *count, *flags),
                       run, flops=2e3 * run.each, memory=run.memory, disk=1e6)


def unigram_stage(place, model, seed):
    return losses(place, model, seed, "unigram")


def loss_at(ratio, ratios):
    """Loss per hidden token where a share `ratio` is hidden, one of those `ratios` that are tested together;
    of 'counts', to which it makes no difference, per token."""
    def stages(place, model, seed):
        if model.startswith("counts"):
            return (unigram_stage(place, model, seed),)
        return (losses(place, model, seed, "ratios", "--ratios", ",".join(map(str, ratios))),)

    def read(model, x):
        r = x["results"]
        samples = r["ratios"][str(ratio)] if "ratios" in r else r["regimes"]["unigram"]["sequence_nll"]
        return cell_of(samples, "mean", f"text {ratio}")

    return Measure(stages, read, lower=True, digits=2, unit="nats")


def exact_or_none(place):
    """Perplexity of objectives that have an exact left-to-right likelihood, the better regime where there are
    two."""
    measure = perplexity_column("best")

    def stages(place, model, seed):
        objective, path, length = task_of(model)
        exact = model.startswith("counts") or objective.left_to_right(length, path)
        return measure.stages(place, model, seed) if exact else ()

    return Measure(stages, measure.read, lower=True, digits=1, unit="factor")


def any_order_bound():
    """exp of the any-order bound on -log P per token."""
    def stages(place, model, seed):
        objective, _, length = task_of(model)
        return (evaluation(place, model, seed, "bound"),) if objective.bound(1, length) is not None else ()

    def read(model, x):
        return cell_of(x["results"]["any_order"]["bound"]["sequence_nll"], "mean", "text")

    return Measure(trained_only(stages), read, lower=True, digits=1, unit="factor")


def task_of(model):
    """(objective, path, positions) of a text model; length does not matter to what is asked of it here."""
    settings = parsed(("--objective", *Model(model).as_trained().flags.split()))
    return *settings.task(), settings.positions


def reconstruction(name, digits):
    """Of hidden patches: l2, psnr or lpips. l2 and lpips are judged as factors."""
    factor = name in ("l2", "lpips")

    def read(model, x):
        samples = x["rows"][-1].get(f"{name}_of_images")
        value = x["rows"][-1][name]
        if samples:
            return cell_of(samples, "log" if factor else "mean", "images")
        return Cell(float(np.log(value)) if factor else value)

    return Measure(trained_only(lambda place, model, seed: (evaluation(place, model, seed, "reconstruct"),)),
                   read, lower=factor, digits=digits, unit="factor" if factor else "dB")


# ---------------------------------------------------------------------------- classification

def probe(data="", extra=""):
    """Accuracy of a linear probe on frozen features, in percent. The row 'pixels' is the same classifier on
    raw pixels, 'counts' the largest class."""
    def read(model, x):
        layers = x["results"]["layers"]
        last = [name for name in layers if name != "pixels"][-1]
        name = "pixels" if model.startswith("pixels") else last
        if model.startswith("counts"):
            return Cell(100 * layers[name]["majority"])
        return cell_of(layers[name]["correct"], "percent", f"{x['results']['data']} {layers[name]['test']}")

    def stages(place, model, seed):
        if model.startswith("pixels"):  # which have neither seeds nor attention
            return (evaluation(place, model, 0, "probe", data),)
        model = Model(model).as_trained().text if model.startswith("counts") else model
        return (evaluation(place, model, seed, "probe", f"{data} {extra}"),)

    return Measure(stages, read, classifies=True)


def probe_after(share):
    """The probe after this share of the budget, under the attention that the objective was trained with."""
    def stages(place, model, seed):  # neither pixels nor an untrained network have a budget
        at = Model(model).times(share).text if Model(model).learned else model
        return probe(extra=f"--attention {attention_of(model)}").stages(place, at, seed)

    return replace(probe(), stages=stages)


def finetune(extra=""):
    """Accuracy on images after fine-tuning, in percent."""
    def stages(place, model, seed):
        data = source(place, Model(model).kind)[0]
        return (evaluation(place, model, seed, "finetune", f"--data {shlex.quote(data)} {extra}"),)

    def read(model, x):
        return cell_of(np.array(x["results"]["correct"])[:, None], "percent", f"{x['results']['data']} "
                       f"{x['results']['dev']}")

    return Measure(stages, read, classifies=True)


def glue_cell(task, suffix, metric, name):
    """A Cell from what glue wrote of a task: the predictions on the dev part of every fine-tuning seed."""
    predicted = np.array(task["predictions" + suffix], float)
    true = np.broadcast_to(np.array(task["labels" + suffix], float), predicted.shape)
    if metric == "accuracy":
        return cell_of((predicted == true)[:, None], "percent", name + suffix)
    features = [predicted, true, predicted * true]
    if metric == "pearson":
        features += [predicted ** 2, true ** 2]
    return cell_of(np.stack(features, axis=1), metric, name + suffix)


def glue_columns(place):
    """{column of Table 2: Measure} of the tasks that are there, and their mean as the last; at smoke scale a
    probe instead."""
    if place.name == "smoke":
        return {"pydoc probe": probe()}
    folder = place.data / "glue"
    tasks = tasks_in(folder, glue.TABLE2) or glue.TABLE2

    def measure(name, suffix):
        flags = f"--glue-dir {shlex.quote(str(folder))} --tasks {name}"
        return Measure(lambda place, model, seed: (evaluation(place, model, seed, "glue", flags),),
                       lambda model, x: glue_cell(x["results"]["tasks"][name], suffix,
                                                  glue.TASKS[name].metrics[0], name), classifies=True)

    columns = {glue.TASKS[name].folder + suffix: measure(name, suffix)
               for name in tasks for suffix, *_ in glue.TASKS[name].parts}
    mean = "Avg" if len(tasks) == len(glue.TABLE2) else f"Avg of {len(columns)}"
    return {**columns, mean: Measure(mean_of=tuple(columns), classifies=True)}


def tasks_in(folder, names):
    """Those of the GLUE tasks whose files are in the folder."""
    return [name for name in names if (folder / glue.TASKS[name].folder / "train.tsv").exists()]


def text_probe(place):
    """{column: Measure}: a probe on a GLUE task that is there, or on pydoc."""
    folder = place.data / "glue"
    found = tasks_in(folder, ("sst2", "cola", "rte"))
    if place.name == "smoke" or not found:
        return {"pydoc probe": probe()}
    data = f"--data {found[0]} --glue-dir {shlex.quote(str(folder))}"
    return {f"{glue.TASKS[found[0]].folder} probe": probe(data)}


def few_labels(place):
    """{column: Measure}: a probe with few labels on who wrote a passage of a novel that it has not seen;
    where the text is no folder of novels of two authors or more (authors.py), the probe of text_probe."""
    raw = place.data / "text"
    if place.name == "smoke" or len(novels_of(raw)) < 2:
        return text_probe(place)
    labelled = place.stage("authors", ("experiments.authors", str(raw), *FEW_LABELS.split()), suffix="",
                           disk=1e7)
    measure = probe(f"--data {shlex.quote(f'{labelled.out}/train.tsv')} --dev "
                    f"{shlex.quote(f'{labelled.out}/dev.tsv')}")

    def stages(place, model, seed):
        [stage] = measure.stages(place, model, seed)
        return (replace(stage, needs=(*stage.needs, labelled)),)

    def read(model, x):  # passages of one novel are alike, so that novels are the examples
        cell = measure.read(model, x)
        return cell if cell.samples is None else replace(cell, samples=cell.samples.reshape(
            1, 1, -1, PASSAGES).mean(-1))

    return {"author, few labels": replace(measure, stages=stages, read=read)}


def told_of_authors(place):
    """What the column of few_labels asks, as a sentence, where it asks for authors."""
    asks = "author, few labels" in few_labels(place)
    return (" Author: who wrote a passage of a novel that the probe has not seen, from 64 passages of each "
            "author.") * asks


def transfer(place):
    """{column: Measure}: mean accuracy of logistic regression over the nine sets, elsewhere those in
    transfer/, in percent."""
    folder = place.data / "transfer"
    found = [folder / name for name in NINE] if place.name == "paper" else sorted(
        path for path in folder.glob("*") if path.is_dir())
    if place.name == "smoke" or not found:
        found = ["shapes"]
    flags = "--data " + shlex.join(map(str, found))

    def measure(k):
        def read(model, x):
            one = x["results"]["sets"][k]
            return cell_of(one["correct"], "percent", one["data"])
        return Measure(lambda place, model, seed: (evaluation(place, model, seed, "transfer", flags),), read,
                       classifies=True)

    columns = {getattr(path, "name", path): measure(k) for k, path in enumerate(found)}
    return columns | {"Mean" if len(found) == len(NINE) else f"Mean of {len(found)}": Measure(
        mean_of=tuple(columns), classifies=True)}


# ---------------------------------------------------------------------------- features

def connectivity(name, which):
    """Similarity of features of held-out contexts: `which` of evaluate.py connectivity's summaries."""
    return Measure(trained_only(lambda place, model, seed: (evaluation(place, model, seed, "connectivity"),)),
                   lambda model, x: Cell(x["checkpoints"][0][name][which]), digits=3, unit="")


def by_kind(place):
    """A linear probe: of images on their own set, of text as in few_labels."""
    (text,), images = few_labels(place).values(), probe()

    def measure(model):
        return images if Model(model).kind == "images" else text

    return Measure(lambda place, model, seed: measure(model).stages(place, model, seed),
                   lambda model, x: measure(model).read(model, x), classifies=True)


def attention_of(model):
    """'causal' or 'full': what a model's network is probed with unless --attention says otherwise."""
    return OBJECTIVES[Model(model).as_trained().flags.split()[0]].attention
