"""Stages and columns: the command lines that numbers come from, and how these are read from what they write.

A stage is one command line of this project. Its run folder, data folder or JSON file is named by a checksum
of that line, so that tables share stages and nothing is computed twice. A column of a table says which
command measures a model, and which of the numbers that it writes count.
"""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.verdicts import Cell, mean_cell
from objectives import OBJECTIVES
from run import PRESETS
from tasks import glue

UNIGRAMS, MEAN_COLOUR = "Unigrams, majority class", "Mean colour, majority class"  # rows without a network

# ---------------------------------------------------------------------------- budgets

FEWER = 6.7  # 1/0.15: with so many times fewer tokens a loss at every token has as many targets
PAPER_TEXT = "hf:monology/pile-uncopyrighted"  # the Pile itself is no longer distributed

# All models of one kind, text or images, get the same flags, the same data and the same budget.
#   seeds             pretraining runs of each model
#   tokens, epochs    what a text model reads, and passes over the images
#   curve             shares of the epochs after which `dose` probes, each a training of its own
#   prepare, train    {kind of data: flags of data.py, of train.py}
#   evaluate          {command, or command and kind: flags of evaluate.py}
#   TARGET            what differs for that target; sizes: {preset: shares of the tokens}
SCALES = {
    "smoke": {
        "about": "two cores, minutes, nothing downloaded; the numbers mean nothing",
        "seeds": 2, "tokens": 10_240, "epochs": 0.08, "curve": (1,), "prepare": {},
        "train": {"text": "--preset tiny --length 32 --batch-size 8",
                  "images": "--preset vit-tiny --batch-size 16"},
        "evaluate": {"perplexity": "--max-sequences 16", "connectivity": "--features 500 --top 2000",
                     "probe": "--max-train 300 --max-test 300", "reconstruct": "--max-images 20",
                     "finetune": "--epochs 1 --max-train 300 --max-test 300",
                     "transfer": "--max-train 300 --max-test 300"},
        "trend": {"sizes": {"tiny": (0.5, 1)}, "train": {"text": "--length 32 --batch-size 8"}}},
    "cpu": {
        "about": "4 layers x 128; texts of 128 tokens (WordPiece, 1,024 words), perplexity on 64 of them, "
                 "probes on at most 5,000; images of 32 x 32 in 16 patches, probes and fine-tuning on "
                 "10,000, L2 on 200",
        "seeds": 3, "tokens": 1_500_000, "epochs": 4, "curve": (0.25, 1),
        "prepare": {"text": "--tokenizer wordpiece --vocab 1024", "images": "--size 32"},
        "train": {"text": "--preset tiny --batch-size 16 --optimizer muon",
                  "images": "--preset vit-tiny --patch 8 --batch-size 64 --optimizer muon --lr 4e-3"},
        "evaluate": {"perplexity": "--max-sequences 64", "probe text": "--pool mean --max-train 5000",
                     "probe images": "--max-train 10000", "finetune": "--epochs 8 --max-train 10000",
                     "reconstruct": "--max-images 200", "transfer": "--max-train 10000",
                     "glue": "--seeds 1 --epochs 3 --max-train 5000 --pool mean"},
        "trend": {
            "about": "4 layers; texts of 128 tokens (WordPiece, 4,096 words: 80 novels have 17.2 million), "
                     "perplexity on 64 of them; after less (1 million at 4 x 128, 3 million at 4 x 256) one "
                     "of two [0.15, 0.3] models knew only unigrams",
            "tokens": 2.4e7, "sizes": {"tiny": (0.125, 0.25, 1), "mini": (0.25,)},
            "prepare": {"text": "--tokenizer wordpiece --vocab 4096"},
            "train": {"text": "--batch-size 16 --optimizer muon --lr 12e-3"}}},
    "gpu": {
        "about": "8 layers x 512 for text and 12 x 384 for images of 32 x 32; one H100 or H200",
        "seeds": 3, "tokens": 4e8, "epochs": 100, "curve": (0.1, 0.2, 0.5, 1),
        "prepare": {"text": "--tokenizer wordpiece --vocab 8192", "images": "--size 32"},
        "train": {"text": "--preset small",
                  "images": "--preset vit-small --size 32 --patch 4 --batch-size 1024 --lr 2e-3"},
        "evaluate": {"perplexity": "--max-sequences 1024", "probe text": "--pool mean",
                     "finetune": "--epochs 50", "reconstruct": "--max-images 10000",
                     "glue": "--seeds 1 --max-train 60000"},
        "trend": {"tokens": 5e8, "sizes": {"small": (0.03, 0.1, 0.3, 1)}, "train": {"text": ""}}},
    "paper": {
        "about": "the paper's settings",
        "seeds": 1, "tokens": 100_000 * 8192 * 128, "epochs": 200, "curve": (1,),
        "prepare": {"text": "--tokenizer wordpiece --vocab 32768 --val-fraction 0.001 "
                            "--max-bytes 330000000000",
                    "images": "--size 224", "images100": "--size 224"},
        "train": {"text": "--preset paper", "images": "--preset vit-base", "images100": "--preset vit-small"},
        "evaluate": {"perplexity": "--max-sequences 4096", "probe images": "--classifier sgd",
                     "finetune": "--batch-size 4096", "reconstruct": "--max-images 50000 --lpips alex",
                     "glue": "--seeds 3"},
        "trend": {"sizes": {"paper": (0.01, 0.1, 1)}, "train": {"text": ""}}}}


def scale_of(name, target):
    """The budgets of a scale for a target."""
    return SCALES[name] | SCALES[name].get(target, {})


# ---------------------------------------------------------------------------- stages

def read_json(path):
    """What a JSON file holds; None where there is no whole one, as after a full disk."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Stage:
    """One command line, where its result goes, and what has to be there first."""

    argv: tuple        # the program or module and its arguments, without those that name the result
    out: Path          # run folder, data folder or JSON file
    needs: tuple = ()  # stages

    def line(self):
        """The whole line."""
        flags = {"train.py": ("--no-report", "--out"), "data.py": ("--out",), "tasks.glue": ("--out",)}
        return (*self.argv, *flags.get(self.argv[0], ("--json",)), str(self.out))

    def beside(self, suffix):
        """The file .done, which says that this stage is done and what it took, or .log, what it printed."""
        return self.out.with_name(self.out.name + suffix)

    def record(self):
        """What is known of its run, None before."""
        return read_json(self.beside(".done"))

    def result(self):
        return read_json(self.out)

    def done(self):
        return self.record() is not None and (self.out.is_dir() or self.result() is not None)


@dataclass(frozen=True)
class Place:
    """Where the stages of a scale read and write."""

    name: str
    data: Path
    work: Path
    scale: dict

    def stage(self, title, argv, *needs, suffix=".json", plot=None):
        """A Stage whose result is named by its command line. `plot` is the flag for a picture beside it."""
        line = shlex.join(argv).replace(str(self.work), "WORK")
        path = self.work / f"{title}-{hashlib.sha1(line.encode()).hexdigest()[:8]}"
        argv = (*argv, plot, f"{path}.png") if plot else tuple(argv)
        return Stage(argv, path.with_name(path.name + suffix), needs)


def with_needs(stages):
    """These stages and all that they need, each once, in an order in which they can run."""
    found = {}
    for stage in stages:
        for one in (*with_needs(stage.needs), stage):
            found.setdefault(one.out, one)
    return list(found.values())


@dataclass(frozen=True)
class Model:
    """A row of a table: a trained model, or what is measured in its place."""

    flags: str           # of the objective, such as "mlm --mask 0.15"; or hf:NAME, a public model
    kind: str = "text"   # of its data: text, images or images100
    budget: float = 1    # what its budget is multiplied with
    instead: str = None  # untrained; or no network: pixels, or a guess by what is frequent or the mean
    preset: str = None   # of train.py, where it is not the scale's

    def __str__(self):
        budget = f" x{self.budget:g}" if self.budget != 1 else ""
        words = [self.instead, self.preset, f"{self.kind}{budget}: {self.flags}"]
        return self.flags if self.hub else " ".join(filter(None, words))

    @property
    def hub(self):
        return self.flags.startswith("hf:")

    @property
    def attention(self):
        """causal or full: what its network is probed with unless --attention says otherwise."""
        return OBJECTIVES[self.flags.split()[0]].attention


def source(place, kind):
    """(what --data is for this kind of data, the stages that make it)."""
    if place.name == "smoke":
        return ("pydoc" if kind == "text" else "shapes"), ()
    raw = PAPER_TEXT if (place.name, kind) == ("paper", "text") else str(place.data / kind)
    if Path(raw, "manifest.json").exists():  # prepared by data.py
        return raw, ()
    argv = "data.py", kind.removesuffix("100"), raw, *place.scale["prepare"][kind].split()
    if kind == "text" and (place.data / "val").exists():
        argv += "--val", str(place.data / "val")
    stage = place.stage(f"data-{kind}", argv, suffix="")
    return str(stage.out), (stage,)


def budget_of(place, model, flags):
    """The flags of train.py that say how long a model trains."""
    given = dict(zip(flags[::2], flags[1::2]))
    preset = PRESETS[given["--preset"]]
    if model.kind == "text":
        batch, length = (int(given.get(flag, preset[name])) for flag, name in
                         (("--batch-size", "batch_size"), ("--length", "length")))
        return "--steps", str(max(1, round(model.budget * place.scale["tokens"] / (batch * length))))
    # the paper's 10 epochs of warm-up remain 10 in half the budget
    warmup = ("--warmup", f"{preset['warmup'] / model.budget:g}") if place.name == "paper" else ()
    return "--epochs", f"{model.budget * place.scale['epochs']:g}", *warmup


def pretrain(place, model, seed):
    """The stage that trains a model."""
    model, (data, needs) = replace(model, instead=None), source(place, model.kind)
    flags = place.scale["train"][model.kind].split() + (["--preset", model.preset] if model.preset else [])
    argv = ("train.py", "--objective", *model.flags.split(), *flags, *budget_of(place, model, flags),
            "--data", data, "--seed", str(seed))
    title = f"{model} seed{seed}".replace(": ", " ").replace("--", "").replace(" ", "-")
    return place.stage(title, argv, *needs, suffix="")


def evaluation(place, models, seed, command, flags="", needs=(), plot=None):
    """The stage of an evaluate.py command on models of one kind, with the flags of the scale."""
    first, budgets = models[0], place.scale["evaluate"]
    runs = () if first.hub else [pretrain(place, model, seed) for model in models]
    untrained = "untrained:" * bool(first.instead)
    names = [first.flags] if first.hub else [f"{untrained}{run.out}" for run in runs]
    budget = budgets.get(f"{command} {first.kind.removesuffix('100')}", budgets.get(command, ""))
    argv = ["evaluate.py", command, *names, *budget.split(), *shlex.split(flags)]
    if first.instead == "pixels":
        argv += ["--pixels"]
    if first.hub and command == "perplexity":
        argv += ["--length", "512"]  # what these were trained with
    title = f"{command}-" + "untrained-" * bool(first.instead) + (
        runs[0].out.name if len(models) == len(runs) == 1 else f"seed{seed}")
    return place.stage(title, argv, *runs, *needs, plot=plot)


# ---------------------------------------------------------------------------- columns

@dataclass(frozen=True)
class Column:
    """A column of a table: a command of evaluate.py on the model of a row, and what is read from its JSON."""

    command: str = None
    read: Callable = None  # (model, what the command wrote[, what it wrote of `reference`]) -> Cell
    flags: str = ""        # of the command; {data} stands for the data that the model is pretrained on
    also: tuple = ()       # which rows have this number beside trained models: untrained, pixels, guess
    floor: str = None      # the row that models must beat; None where it is the untrained network
    lower: bool = False    # is better
    digits: int = 1
    unit: str = "points"   # of differences; "factor": cells hold logarithms
    attention: str = None  # of a probe: causal, full, or own, that which the model was trained with
    share: float = 1       # of the model's budget
    reference: Model = None
    needs: tuple = ()      # stages that the command needs beside the model
    mean_of: tuple = ()    # instead of a command: the mean over these columns

    def stages(self, place, model, seed):
        """The stages of one cell, () where there is no such number."""
        if self.mean_of or model.instead and model.instead not in self.also:
            return ()
        flags = self.flags.replace("{data}", shlex.quote(source(place, model.kind)[0]))
        if model.instead == "pixels":  # which have neither seeds nor attention
            return (evaluation(place, [model], 0, self.command, flags),)
        if self.attention:
            flags += f" --attention {model.attention if self.attention == 'own' else self.attention}"
        if model.instead == "guess":  # is read from what is written of the model
            model = replace(model, instead=None)
        if not model.instead:
            model = replace(model, budget=self.share * model.budget)
        models = [model, self.reference] if self.reference else [model]
        return tuple(evaluation(place, [one], seed, self.command, flags, self.needs) for one in models)

    def shown(self, value):
        """A cell's value as people read it."""
        return float(np.exp(value)) if self.unit == "factor" else value

    def judged(self, number):
        """One of the paper's numbers on the scale on which claims are judged."""
        return float(np.log(number)) if self.unit == "factor" else number


# ---------------------------------------------------------------------------- generation

def regime_of(x, name):
    """The results of a regime; objectives that know one only have that."""
    regimes = x["results"]["regimes"]
    return regimes.get(name) or next(iter(regimes.values()))


def perplexity(regime, data="", bits=False):
    """Left-to-right perplexity in a regime, judged as a factor; or bits per byte of the text that the
    tokenizer keeps, which models of two vocabularies share. The guess is that of unigrams."""
    def read(model, x):
        found = x["results"]["unigram"] if model.instead == "guess" else regime_of(x, regime)
        scale = found["bits_per_byte"] / found["nll"] if bits else 1
        return mean_cell(found["sequence_nll"], f"text {data}", scale)

    return Column("perplexity", read, f"--by-length {data}", ("guess",), UNIGRAMS, lower=True,
                  digits=3 if bits else 1, unit="bits" if bits else "factor")


def gain_share(regime, prefixes, reference):
    """Of what the autoregressive model `reference` gains over unigrams after prefixes of lengths k, in bins
    that prefixes(k, S) picks, the share that another gains: (H_unigram - L_masked)/(H_unigram - L_ar)."""
    def mean_nll(found, S):
        bins = [one for one in found["by_length"]["bins"] if prefixes(one["first"], S)]
        lengths = [one["last"] - one["first"] + 1 for one in bins]
        return np.average([one["sequence_nll"] for one in bins], axis=0, weights=lengths)

    def read(model, x, best):
        three = x["results"]["unigram"], regime_of(x, regime), regime_of(best, "next")
        nll = np.stack([mean_nll(found, x["results"]["length"]) for found in three])  # (3, sequences)

        def share(rows):
            unigram, masked, ar = nll[:, rows].mean(-1)
            return (unigram - masked) / (unigram - ar)

        return Cell(share, nll.shape[1], "text")

    return Column("perplexity", read, "--by-length", digits=3, unit="", reference=reference)


def reconstruction(name, digits):
    """Of hidden patches: l2, psnr or lpips. l2 and lpips are judged as factors. A guess: mean colour."""
    factor = name in ("l2", "lpips")

    def read(model, x):
        mean = mean_cell(x["rows"][0 if model.instead == "guess" else -1][f"{name}_of_images"], "images")
        return replace(mean, value_of=lambda rows: np.log(mean.value_of(rows))) if factor else mean

    return Column("reconstruct", read, "", ("guess",), MEAN_COLOUR, lower=factor, digits=digits,
                  unit="factor" if factor else "dB")


def connectivity(name, which):
    """Similarity of features of held-out contexts: `which` of evaluate.py connectivity's summaries."""
    return Column("connectivity", lambda model, x: Cell(lambda rows: x["checkpoints"][0][name][which]),
                  also=("untrained",), digits=3, unit="")


# ---------------------------------------------------------------------------- classification

def probe(flags="", **more):
    """Accuracy of a linear probe on frozen features, in percent. The row 'pixels' is the same classifier on
    raw pixels, a guess the largest class."""
    def read(model, x):
        layers = x["results"]["layers"]
        last = [name for name in layers if name != "pixels"][-1]
        found = layers["pixels" if model.instead == "pixels" else last]
        if model.instead == "guess":
            return Cell(lambda rows: 100 * found["majority"])
        return mean_cell(found["correct"], f"{x['results']['data']} {found['test']}", 100)

    return Column("probe", read, flags, ("untrained", "pixels", "guess"), **more)


def finetune(flags=""):
    """Accuracy on images after fine-tuning, in percent."""
    def read(model, x):
        x = x["results"]
        return mean_cell(np.mean(x["correct"], 0), f"{x['data']} {x['dev']}", 100)

    return Column("finetune", read, "--data {data} " + flags, ("untrained",))


def with_mean(columns, name, count):
    """Columns and their mean, called `name` where these are all `count` columns of the paper."""
    name = name if len(columns) == count else f"{name} of {len(columns)}"
    return columns | {name: Column(mean_of=tuple(columns), also=("untrained",))}


def tasks_in(place, names):
    """(a flag that names the folder, those of the GLUE tasks whose files are in it)."""
    folder = place.data / "glue"
    found = [name for name in names if (folder / glue.TASKS[name].folder / "train.tsv").exists()]
    return f"--glue-dir {shlex.quote(str(folder))}", found


def glue_columns(place):
    """{column of Table 2: Column} of the tasks that are there, and their mean; at smoke scale a probe."""
    if place.name == "smoke":
        return {"pydoc probe": probe()}

    def task_column(name, suffix):
        metric = glue.METRICS[glue.TASKS[name].metrics[0]]

        def read(model, x):
            x = x["results"]["tasks"][name]
            predicted, true = np.array(x["predictions" + suffix]), np.array(x["labels" + suffix])

            def score(rows):  # the mean over fine-tuning seeds
                return 100 * np.mean([metric(one[rows], true[rows]) for one in predicted])

            return Cell(lambda rows: np.apply_along_axis(score, -1, rows), len(true), name + suffix)

        return Column("glue", read, f"{folder} --tasks {name}", ("untrained",))

    folder, found = tasks_in(place, glue.TABLE2)
    columns = {glue.TASKS[name].folder + suffix: task_column(name, suffix)
               for name in found or glue.TABLE2 for suffix, *_ in glue.TASKS[name].parts}
    return with_mean(columns, "Avg", 9)


def text_probe(place):
    """{column: Column}: a probe on a GLUE task that is there, or on pydoc."""
    folder, found = tasks_in(place, ("sst2", "cola", "rte"))
    if place.name == "smoke" or not found:
        return {"pydoc probe": probe()}
    return {f"{glue.TASKS[found[0]].folder} probe": probe(f"--data {found[0]} {folder}")}


def few_labels(place, passages=80):
    """{column: Column}: a probe with few labels on who wrote a passage of a novel that it has not seen; where
    the text is no folder of novels of two authors or more, the probe of text_probe."""
    raw = place.data / "text"
    if place.name == "smoke" or len(glue.novels_of(raw)) < 2:
        return text_probe(place)
    argv = "tasks.glue", str(raw), "--train", "64", "--dev", str(passages)
    stage = place.stage("authors", argv, suffix="")
    train, dev = (shlex.quote(f"{stage.out}/{side}.tsv") for side in ("train", "dev"))
    column = probe(f"--data {train} --dev {dev}", needs=(stage,))

    def read(model, x):  # passages of one novel are alike, so that novels are the examples
        cell = column.read(model, x)
        novels = np.arange(cell.n).reshape(-1, passages)
        return mean_cell(cell.value_of(novels), cell.test) if cell.n else cell

    return {"author, few labels": replace(column, read=read)}


# Table 6's
NINE = ("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers", "food101", "pets")


def transfer(place):
    """{column: Column}: logistic regression on the paper's nine sets, elsewhere on those in transfer/ and the
    drawn shapes, and the mean."""
    folder = place.data / "transfer"
    there = sorted(path for path in folder.glob("*") if path.is_dir() and place.name != "smoke")
    found = [folder / name for name in NINE] if place.name == "paper" else [*there, Path("shapes")]

    def column(k):
        def read(model, x):
            one = x["results"]["sets"][k]
            return mean_cell(one["correct"], one["data"], 100)

        return Column("transfer", read, f"--data {shlex.join(map(str, found))}", ("untrained",))

    return with_mean({path.name: column(k) for k, path in enumerate(found)}, "Mean", len(NINE))
