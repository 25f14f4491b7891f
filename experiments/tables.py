"""The paper's tables and figures as models, measures, printed numbers and claims, at four scales; reproduce.py runs them.

A target is a function of the Place that gives a Table: its rows are models, its columns measures, and each cell comes from
stages. A stage is one command line of train.py, evaluate.py, spectral.py or data.py. Its folder or file is named by a checksum
of that line, so tables share stages.
"""

import hashlib
import importlib.util
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from downstream import glue
from downstream.connectivity import plot_connectivity
from engine.machine import flops_per_sequence
from evaluate import plot_by_length
from model import SIZES, VIT_SIZES, Config
from support.cli import import_optional
from train import batch_sizes, parse, steps_for

# ---------------------------------------------------------------------------- scales

@dataclass(frozen=True)
class Scale:
    """Budgets. Keys of `train` are kinds of models; all models of one kind get the same flags and the same data."""

    about: str
    flops: float      # per second, of which the estimates of time are made
    seeds: int        # pretraining runs of each model
    train: dict       # kind: flags of train.py
    evaluate: dict    # command, or command and kind: flags of evaluate.py
    forward: dict     # command: sequences forward, backward counting twice, for the estimates
    mask_rule: str    # of text models with masks in one stream
    vocab: int
    counts: dict      # kind of data: its training examples, for the estimates
    prepare: dict = field(default_factory=dict)  # kind of data: flags of data.py, where it is raw
    many: tuple = ()  # targets that get three seeds anyway


TINY = "--preset vit-tiny --batch-size 64 --lr 2e-3"


SMALL = "--preset vit-small --size 32 --patch 4 --batch-size 1024 --lr 2e-3"


HUB = 3e11  # FLOPs of a training sequence of GPT-2 medium and BERT large


PAPER_TEXT = "hf:monology/pile-uncopyrighted"  # the Pile itself is no longer distributed


SCALES = {
    "smoke": Scale(
        "two cores, minutes, nothing downloaded; the numbers mean nothing", 2e10, 2, {
            "text": "--preset tiny --length 32 --steps 40 --batch-size 8 --lr 2e-3",
            "images": "--preset vit-tiny --steps 40 --batch-size 16",
            "images half": "--preset vit-tiny --steps 20 --batch-size 16"},
        {"perplexity": "--max-sequences 16", "connectivity": "--features 500 --top 2000", "probe": "--max-train 300",
         "finetune": "--epochs 1 --max-train 300", "reconstruct": "--max-images 20", "transfer": "--max-train 300"},
        {"perplexity": 1e3, "connectivity": 500, "probe": 2000, "finetune": 3000, "reconstruct": 320, "transfer": 2000},
        mask_rule="always", vocab=257, counts={"text": 2e5, "images": 8000}),
    "cpu": Scale(
        "4 layers x 128, texts of 128 tokens, images of 32 x 32, GLUE in 3 epochs on at most 10,000 texts, fine-tuning on images in 4 "
        "epochs on at most 10,000", 8e10, 1, {
            "text": "--preset tiny --steps 4883 --batch-size 16 --lr 2e-3",
            "images": f"{TINY} --epochs 2", "images half": f"{TINY} --epochs 1"},
        {"perplexity": "--max-sequences 256", "connectivity": "", "probe": "", "probe images": "--classifier sgd",
         "finetune": "--epochs 4 --max-train 10000", "reconstruct": "", "transfer": "",
         "glue": "--seeds 3 --epochs 3 --max-train 10000 --pool mean"},
        {"perplexity": 5e4, "connectivity": 8e3, "probe": 6e4, "finetune": 8e5, "reconstruct": 2e4, "transfer": 2e4,
         "glue": 1e5},
        mask_rule="always", vocab=8192, counts={"text": 1e7, "images": 50_000}, many=("table7",),
        prepare={"text": "--tokenizer wordpiece --vocab 8192", "images": "--size 32"}),
    "gpu": Scale(
        "8 layers x 512 for text and 12 x 384 for images of 32 x 32; one H100 or H200 at 40% MFU", 0.4 * 989e12, 3, {
            "text": "--preset small --steps 12000 --lr 1e-3", "images": f"{SMALL} --epochs 100",
            "images half": f"{SMALL} --epochs 50"},
        {"perplexity": "--max-sequences 1024", "connectivity": "", "probe images": "--classifier sgd",
         "finetune": "--epochs 50", "reconstruct": "--max-images 10000", "transfer": "", "glue": "--seeds 1 --max-train 60000"},
        {"perplexity": 2e5, "connectivity": 8e3, "probe": 6e4, "finetune": 8e6, "reconstruct": 2e5, "transfer": 1e5,
         "glue": 6e6},
        mask_rule="always", vocab=8192, counts={"text": 4e8, "images": 50_000},
        prepare={"text": "--tokenizer wordpiece --vocab 8192", "images": "--size 32"}),
    "paper": Scale(
        "the paper's settings; hours are of one H100 at 40% MFU", 0.4 * 989e12, 1, {
            "text": "--preset paper", "images": "--preset vit-base", "images half": "--preset vit-base --epochs 100 --warmup 0.1",
            "images100": "--preset vit-small"},
        {"perplexity": "--max-sequences 4096", "connectivity": "", "probe images": "--classifier sgd",
         "finetune": "--batch-size 4096", "reconstruct": "--max-images 50000 --lpips alex", "transfer": "",
         "glue": "--seeds 3"},
        {"perplexity": 8e5, "connectivity": 8e3, "probe": 1.4e6, "finetune": 4e8, "reconstruct": 3e6, "transfer": 3e5,
         "glue": 2e7},
        mask_rule="bert", vocab=32_768, counts={"text": 7.5e10, "images": 1_281_167, "images100": 126_689},
        prepare={"text": "--tokenizer wordpiece --vocab 32768 --val-fraction 0.001 --max-bytes 330000000000"}),
}


# ---------------------------------------------------------------------------- stages

@dataclass(frozen=True)
class Stage:
    """One command line, where its result goes, and what has to be there first."""

    argv: tuple          # the program and its arguments, without those that name the result
    out: Path            # run folder, data folder, or JSON file
    needs: tuple = ()    # stages
    flops: float = 0.0   # for the estimate of its time
    each: float = 0.0    # train.py: those of one sequence
    memory: float = 0.0  # bytes, a guess

    def line(self):
        """The whole line."""
        result = {"train.py": ("--no-report", "--out"), "data.py": ("--out",)}.get(self.argv[0], ("--json",))
        return (*self.argv, *result, str(self.out))

    def result(self):
        """What it wrote."""
        return json.loads(self.out.read_text())

    def record(self):
        """The file that says that this stage is done, and what it took."""
        return self.out.with_name(self.out.name + ".stage")


@dataclass(frozen=True)
class Place:
    """Where the stages of a scale read and write."""

    name: str
    data: Path
    work: Path

    @property
    def scale(self):
        return SCALES[self.name]

    def stage(self, title, argv, *needs, suffix=".json", plot=None, **estimate):
        """A Stage whose result is named by its command line. `plot` is the flag for a picture, which goes beside the JSON."""
        line = shlex.join(argv).replace(str(self.work), "WORK")
        path = self.work / f"{title}-{hashlib.sha1(line.encode()).hexdigest()[:8]}"
        argv = (*argv, plot, f"{path}.png") if plot else tuple(argv)
        return Stage(argv, path.with_name(path.name + suffix), needs, **estimate)


def source(place, kind):
    """(what --data is for this kind of data, the stages that make it)."""
    if place.name == "smoke":
        return ("pydoc" if kind == "text" else "shapes"), ()
    raw = PAPER_TEXT if (place.name, kind) == ("paper", "text") else str(place.data / kind)
    if kind not in place.scale.prepare or Path(raw, "manifest.json").exists():
        return raw, ()
    stage = place.stage(f"data-{kind}", ("data.py", kind, raw, *place.scale.prepare[kind].split()), suffix="")
    return str(stage.out), (stage,)


def pretrain(place, model, seed):
    """The stage that trains a model 'KIND: OBJECTIVE AND ITS FLAGS', such as 'text: mlm --mask 0.15'."""
    (kind, flags), scale = model.split(": "), place.scale
    data, needs = source(place, kind.split()[0])
    one_stream_masks = kind == "text" and flags.startswith(("mlm", "vl")) and "--streams" not in flags
    argv = ("train.py", "--objective", *flags.split(), *scale.train[kind].split(), "--data", data, "--seed", str(seed),
            *(("--mask-rule", scale.mask_rule) if one_stream_masks else ()))
    each, count, memory = cost(argv[1:], scale.vocab, scale.counts[kind.split()[0]])
    title = f"{kind} {flags} seed{seed}".replace("--", "").replace(" ", "-")
    return place.stage(title, argv, *needs, suffix="", flops=each * count, each=each, memory=memory)


def cost(argv, vocab, examples):
    """Of a training's arguments: (FLOPs of a sequence, sequences, bytes of memory)."""
    settings, _ = parse(argv)
    (objective, path), size = settings.task(), dict(SIZES.get(settings.preset) or VIT_SIZES[settings.preset])
    S, n = settings.positions, objective.max_targets(settings.positions)
    if settings.images:
        size.update(patch=settings.patch, mean=(0,) * 3, decoder=size["decoder"] if path == "mae" else ())
    config = Config(0 if settings.images else vocab, S, **size)
    steps = settings.steps or steps_for(settings, math.ceil(settings.epochs * examples))
    rows = min(settings.micro_batch, settings.batch_size) * {"two-stream": S + n, "mae": S - n}.get(path, S)
    D, L, V = config.width, config.layers, config.vocab
    memory = 1e9 + 16 * (12 * L * D * D + V * D) + 50 * rows * L * D + 6 * rows * V * n / S
    return flops_per_sequence(config, path, S, n, S - objective.min_targets(S)), sum(batch_sizes(settings, steps)), memory


def evaluation(place, models, seed, command, flags="", plot=None):
    """The stage of an evaluate.py command on one model or on several."""
    models = [models] if isinstance(models, str) else models
    runs = [model if model.startswith("hf:") else pretrain(place, model, seed) for model in models]
    needs = tuple(run for run in runs if isinstance(run, Stage))
    budgets = place.scale.evaluate
    kind = "images" if needs and needs[0].out.name.startswith("images") else "text"
    argv = ("evaluate.py", command, *(str(run.out) if isinstance(run, Stage) else run for run in runs),
            *budgets.get(f"{command} {kind}", budgets.get(command, "")).split(), *shlex.split(flags))
    title = f"{command}-" + (needs[0].out.name if len(runs) == len(needs) == 1 else f"seed{seed}")
    forward = sum(run.each if isinstance(run, Stage) else HUB for run in runs) / 3
    return place.stage(title, argv, *needs, plot=plot, flops=place.scale.forward[command] * forward,
                       memory=max((run.memory for run in needs), default=2e10))


# ---------------------------------------------------------------------------- measures

@dataclass(frozen=True)
class Measure:
    """A column. `stage(place, model, seed)` is what has to run, `read(its JSON)` the Cell."""

    stage: Callable = None
    read: Callable = None
    lower: bool = False     # better
    digits: int = 1
    mean_of: tuple = ()     # instead of both: the mean over other columns
    only: str = ""          # kind of models that it applies to; all


@dataclass(frozen=True)
class Cell:
    """What one seed gives. `samples` (n,): the same n evaluation samples for every model; value = link(their mean)."""

    value: float
    stderr: float = None
    samples: tuple = None
    link: Callable = float


def perplexity(regime, data="", prefixes=None):
    """Left-to-right perplexity in a regime; or nats per token after prefixes whose lengths k, in bins, prefixes(k, S) picks."""
    def read(x):
        regimes = x["results"]["regimes"]
        r = regimes.get(regime) or next(iter(regimes.values()))             # left-to-right objectives know one regime
        if prefixes:
            bins = [b for b in r["by_length"]["bins"] if prefixes(b["first"], x["results"]["length"])]
            samples = np.average([b["sequence_nll"] for b in bins], axis=0, weights=[b["last"] - b["first"] + 1 for b in bins])
            return Cell(samples.mean(), None, tuple(samples))
        return Cell(r["perplexity"], r["perplexity_stderr"], r.get("sequence_nll"), math.exp)

    flags = f"--by-length {data}".strip()
    return Measure(lambda place, model, seed: evaluation(place, model, seed, "perplexity", flags), read, lower=True,
                   digits=2 if prefixes else 1)


def probe(data="", extra=""):
    """Accuracy of a linear probe on frozen features, in percent."""
    def read(x):
        r = list(x["results"]["layers"].values())[-1]
        return Cell(100 * r["accuracy"], 100 * math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / r["test"]))

    return Measure(lambda place, model, seed: evaluation(place, model, seed, "probe", f"{data} {extra}"), read)


def finetune(extra=""):
    """Accuracy on images after fine-tuning, in percent."""
    def read(x):
        p = x["results"]["accuracy"]["mean"]
        return Cell(100 * p, 100 * math.sqrt(p * (1 - p) / x["results"]["dev"]))

    def stage(place, model, seed):
        data = source(place, model.split(": ")[0].split()[0])[0]
        return evaluation(place, model, seed, "finetune", f"--data {shlex.quote(data)} {extra}")

    return Measure(stage, read)


def glue_columns(place):
    """{column of Table 2: Measure} of the tasks that are there, and their mean as the last; at smoke scale a probe instead."""
    if place.name == "smoke":
        return {"pydoc probe": probe()}
    folder = place.data / "glue"
    tasks = [name for name in glue.TABLE2 if (folder / glue.TASKS[name].folder / "train.tsv").exists()] or glue.TABLE2

    def measure(name, suffix):
        metric, n_parts = glue.TASKS[name].metrics[0], len(glue.TASKS[name].parts)

        def read(x):
            task = x["results"]["tasks"][name]
            scores, n = task[metric + suffix], task["dev"] / n_parts
            r = scores["mean"]
            # Another dev part would give another number, and so would other fine-tuning seeds.
            variance = {"pearson": (1 - r * r) ** 2, "matthews": 1 - r * r}.get(metric, r * (1 - r)) / n
            return Cell(100 * r, 100 * math.sqrt(variance + (scores["std"] or 0) ** 2 / len(scores["seeds"])))

        flags = f"--glue-dir {shlex.quote(str(folder))} --tasks {name}"
        return Measure(lambda place, model, seed: evaluation(place, model, seed, "glue", flags), read)

    columns = {glue.TASKS[name].folder + suffix: measure(name, suffix)
               for name in tasks for suffix, *_ in glue.TASKS[name].parts}
    return {**columns, "Avg" if len(tasks) == len(glue.TABLE2) else f"Avg of {len(columns)}": Measure(mean_of=tuple(columns))}


def text_probe(place):
    """{column: Measure}: a probe on a GLUE task that is there, or on pydoc."""
    folder = place.data / "glue"
    found = [name for name in ("sst2", "cola", "rte") if (folder / glue.TASKS[name].folder / "train.tsv").exists()]
    if place.name == "smoke" or not found:
        return {"pydoc probe": probe()}
    return {f"{glue.TASKS[found[0]].folder} probe": probe(f"--data {found[0]} --glue-dir {shlex.quote(str(folder))}")}


def reconstruction(name, digits):
    """Of hidden patches: l2, psnr, ssim or lpips."""
    def read(x):
        r = x["rows"][-1]
        return Cell(r[name], r[f"{name}_stderr"], r.get(f"{name}_of_images"))

    return Measure(lambda place, model, seed: evaluation(place, model, seed, "reconstruct"), read,
                   lower=name in ("l2", "lpips"), digits=digits)


NINE = ("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers", "food101", "pets")  # the paper's, Table 6


def transfer(place):
    """{column: Measure}: mean accuracy of logistic regression over the nine sets, elsewhere those in transfer/, in percent."""
    folder = place.data / "transfer"
    found = [folder / name for name in NINE] if place.name == "paper" else sorted(
        path for path in folder.glob("*") if path.is_dir())
    if place.name == "smoke" or not found:
        found = ["shapes"]

    def read(x):
        sets = x["results"]["sets"]
        return Cell(100 * x["results"]["mean"],
                    100 * math.sqrt(sum(r["accuracy"] * (1 - r["accuracy"]) / r["test"] for r in sets)) / len(sets))

    flags = "--data " + shlex.join(map(str, found))
    return {"Mean" if len(found) == len(NINE) else f"Mean of {len(found)}": Measure(
        lambda place, model, seed: evaluation(place, model, seed, "transfer", flags), read)}


def tail():
    """Theory: the sum over j > 1 of sigma_j^4 per class of the objective's co-occurrence matrix (Theorem 4.1)."""
    def stage(place, model, seed):
        length = parse(pretrain(place, model, seed).argv[1:])[0].positions
        flags = model.split(": ")[1].replace(" --streams 2", "").split()
        return place.stage("spectrum-" + "-".join(flags).replace("--", ""),
                           ("spectral.py", "spectrum", "--objective", *flags, "--s", str(length)))

    return Measure(stage, lambda x: Cell(x["tail_sigma4_per_class"]), lower=True, digits=3)


def connectivity(name, which):
    """Similarity of features of held-out contexts: `which` of evaluate.py connectivity's summaries."""
    return Measure(lambda place, model, seed: evaluation(place, model, seed, "connectivity"),
                   lambda x: Cell(x["checkpoints"][0][name][which]), digits=3)


def by_kind(place):
    """A linear probe: of images on their own set, of text as in text_probe."""
    (text,), images = text_probe(place).values(), probe()
    def stage(place, model, seed):
        return (images if model.startswith("images") else text).stage(place, model, seed)

    return Measure(stage, images.read)


# ---------------------------------------------------------------------------- targets

@dataclass(frozen=True)
class Claim:
    """Something the paper says: `gap`, of {(row, column): value}, is positive. With `rows`, `gap` also takes these rows, and
    the bootstrap draws them anew as well."""

    text: str
    gap: Callable
    rows: tuple = ()
    ours: bool = False  # a comparison that the paper does not make


@dataclass(frozen=True)
class Table:
    title: str
    fair: str             # what makes the comparison fair, and what is not as in the paper
    rows: dict = field(default_factory=dict)     # label: 'KIND: OBJECTIVE AND FLAGS', or hf:NAME
    columns: dict = field(default_factory=dict)  # label: Measure
    paper: dict = field(default_factory=dict)    # row: {column: the paper's number}
    claims: tuple = ()
    extra: tuple = ()     # further stages; the first one's picture becomes that of the target
    picture: Callable = None  # (place, seeds, content of the JSON, path); else that of the first extra stage; else dots

    def stage(self, place, row, column, seed):
        """The stage behind a cell; None where it has none of its own."""
        model, measure = self.rows[row], self.columns[column]
        return measure.stage(place, model, seed) if measure.stage and model.startswith(measure.only) else None


def compare(columns, pairs, paper=None):
    """A claim 'a better than b' for each pair and column: the paper's where it prints both numbers and they say so, none
    where they say the opposite, ours where it prints none."""
    claims = []
    for a, b in pairs:
        for column, measure in columns.items():
            sign = -1 if measure.lower else 1
            printed = [(paper or {}).get(row, {}).get(column) for row in (a, b)]
            ours = None in printed
            if ours or sign * (printed[0] - printed[1]) > 0:
                claims.append(Claim(f"{column}: {a} better than {b}",
                                    lambda v, a=a, b=b, c=column, s=sign: s * (v[a, c] - v[b, c]), ours=ours))
    return tuple(claims)


AR, DAR = "Autoregressive", "Diversity-enhanced"


PAIR = {AR: "ar --streams 2", DAR: "dar --t 2"}  # the paper's t = 1 and t = 2 in one architecture


TWO_STREAMS = ("All run through two streams of one architecture, with the same {} in the same order and the same settings, tuned "
               "for none of them.")


def of(kind, rows):
    return {label: f"{kind}: {flags}" for label, flags in rows.items()}


def table1(place):
    rows = {AR: "text: ar", "Masked": "text: mlm --mask 0.15"}
    fair = ("Stand-ins of one size, trained here on the same tokens, for GPT-2 medium and BERT large; held-out text for WikiText-2, the dev "
            "parts of GLUE.")
    columns, data = glue_columns(place), ""
    if place.name == "paper":
        rows = {AR: "hf:gpt2-medium", "Masked": "hf:bert-large-uncased"}
        data = f"--data {shlex.quote(str(place.data / 'wikitext2'))}"
        fair = ("Two public models of similar size, trained on different data. The paper's perplexity of masked SSL is that of "
                "BERT-Large-CAS, an autoregressively fine-tuned model; here it is BERT's own. The vocabularies differ, sequences have 128 tokens, and scores are of the dev parts of GLUE.")
    columns |= {"Perplexity": perplexity("padded", data)}
    paper = {AR: {"Avg": 72.8, "Perplexity": 22.8}, "Masked": {"Avg": 80.5, "Perplexity": 34.1}}
    classify, generate = ({name: columns[name]} for name in list(columns)[-2:])
    return Table("Table 1: autoregressive and masked models, GLUE and perplexity", fair, rows, columns, paper,
                 tuple(replace(claim, ours=False) for claim in
                       compare(classify, [("Masked", AR)]) + compare(generate, [(AR, "Masked")])))


def table2(place):
    columns = glue_columns(place)
    names = ("MNLI-m", "MNLI-mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA", "Avg")
    paper = {AR: dict(zip(names, (78.2, 79.3, 90.3, 82.1, 54.3, 84.7, 85.6, 81.9, 30.9, 74.1))),
             DAR: dict(zip(names, (80.5, 80.6, 89.9, 83.7, 56.4, 87.2, 86.3, 85.1, 34.2, 76.0)))}
    *single, mean = columns
    for row in paper.values():
        if set(single) <= set(names):
            row[mean] = row.get(mean) or round(np.mean([row[name] for name in single]), 1)
    return Table("Table 2: GLUE, autoregressive against diversity-enhanced", TWO_STREAMS.format("tokens") +
                 " Scores are of the dev parts (the paper: test), on the tasks that are there. SST-2, where the paper's own numbers go the "
                 "other way, is not judged.", of("text", PAIR), columns, paper,
                 compare(columns, [(DAR, AR)], paper))


def images_table(title, paper, columns, rows=None, pairs=((DAR, AR),), note=""):
    rows = rows or of("images", PAIR)
    note = " The paper's numbers are of ViT-B on ImageNet-1K." * (not any(row.startswith("ViT-") for row in rows)) + note
    recipe = " Fine-tuning is MAE's, without RandAugment." if "FT Acc." in columns else ""
    return Table(title, TWO_STREAMS.format("images") + recipe + note, rows, columns, paper, compare(columns, pairs, paper))


LP_FT = {"LP Acc.": probe(), "FT Acc.": finetune()}


def lp_ft(numbers):
    return dict(zip(("LP Acc.", "FT Acc."), numbers))


def table3(place):
    numbers = {"ViT-S": ((33.1, 81.1), (36.2, 83.2)), "ViT-B": ((56.2, 82.5), (59.4, 82.9))}
    numbers["ViT"] = numbers["ViT-B"]
    kinds = {"ViT-S": "images100", "ViT-B": "images"} if place.name == "paper" else {"ViT": "images"}
    rows = {f"{size} {label}": f"{kind}: {flags}" for size, kind in kinds.items() for label, flags in PAIR.items()}
    paper = {f"{size} {label}": lp_ft(row) for size in kinds for label, row in zip(PAIR, numbers[size])}
    return images_table("Table 3: images, linear probe and fine-tuning", paper, LP_FT, rows,
                        [(f"{size} {DAR}", f"{size} {AR}") for size in kinds])


def table4(place):
    tenth = "--label-fraction 0.1"
    return images_table("Table 4: a tenth of the labels", {AR: lp_ft((41.2, 70.2)), DAR: lp_ft((45.3, 71.1))},
                        {"LP Acc.": probe(extra=tenth), "FT Acc.": finetune(tenth)},
                        note=" The caption says 10% of the labels, the text 1%; here it is 10%, of every class alike.")


def table5(place):
    rows = {f"{share} budget, {label}": f"{kind}: {flags}" for share, kind in (("half", "images half"), ("full", "images"))
            for label, flags in PAIR.items()}
    numbers = ((48.2, 81.4), (52.6, 82.1), (56.2, 82.5), (59.4, 82.9))
    return images_table("Table 5: half and all of the pretraining epochs (the paper: 100 and 200)",
                        {row: lp_ft(n) for row, n in zip(rows, numbers)}, LP_FT, rows,
                        [(f"{share} budget, {DAR}", f"{share} budget, {AR}") for share in ("half", "full")])


def table6(place):
    return images_table("Table 6: transfer, mean accuracy over other image sets", {AR: {"Mean": 76.2}, DAR: {"Mean": 78.9}},
                        transfer(place), note=" Sets: those in transfer/, else the drawn shapes alone (the paper: nine public sets).")


MASKED = {"Masked (0.15)": "mlm --mask 0.15", "Masked (0.3)": "mlm --mask 0.3",
          "Variable-length [0.15, 0.3]": "vl --mask 0.15,0.3"}


REGIMES = ("padded", "truncated")


def table7(place):
    other = {"paper": "hf:allenai/c4::en"}.get(place.name, str(place.data / "other"))
    columns = {regime: perplexity(regime) for regime in REGIMES}
    if place.name == "paper" or place.name != "smoke" and Path(other).exists():
        columns |= {f"other text, {regime}": perplexity(regime, f"--data {shlex.quote(other)}") for regime in REGIMES}
    fifteen, thirty, vl = MASKED
    paper = {row: {c: numbers[c.startswith("other")] for c in columns} for row, numbers in
             zip(MASKED, ((59.6, 71.2), (50.2, 63.8), (45.1, 59.4)))}
    return Table("Table 7: left-to-right perplexity of masked models", "One architecture, the same tokens read, the same settings. "
                 "The paper names neither regime: padded keeps the later positions as [MASK], truncated cuts them off; its numbers on the "
                 "Pile" + (", and on C4 for the other text," if len(columns) > 2 else "") + " stand beside both.", of("text", MASKED), columns, paper,
                 compare(columns, [(thirty, fifteen), (vl, thirty), (vl, fifteen)], paper))


def table8(place):
    flags = {"Masked (0.75)": "mlm --mask 0.75", "Masked (0.5)": "mlm --mask 0.5",
             "Variable-length [0.5, 0.75]": "vl --mask 0.5,0.75"}
    columns = {"L2": reconstruction("l2", 4), "PSNR": reconstruction("psnr", 2)}
    if "--lpips" in place.scale.evaluate["reconstruct"]:
        columns["Perceptual"] = reconstruction("lpips", 3)
    columns["LP Acc."] = probe()  # what the better reconstruction costs
    large, small, vl = flags
    numbers = ((0.127, 0.201), (0.115, 0.192), (0.072, 0.136))
    paper = {row: dict(zip(("L2", "Perceptual"), pair)) for row, pair in zip(flags, numbers)}
    rows = of("images", flags)
    picture = evaluation(place, list(rows.values()), 0, "reconstruct", "--max-images 8", plot="--picture")
    return Table("Table 8: reconstruction of hidden patches, one at a time", "MAE with the same images seen; the same hidden patches "
                 "for all, never the first. L2 is over hidden patches only and in units of the data's variance (the paper says neither "
                 "the unit nor the part). Its numbers are of ViT-B on ImageNet-1K. "
                 "The linear probe is ours, as in Table 3. Picture: original, hidden in grey, then the rows of the table in order.", rows, columns,
                 paper, compare(columns, [(small, large), (vl, small), (vl, large)], paper), (picture,))


STEPS = {"t = 1": "ar --streams 2", "t = 2": "dar --t 2", "t = 3": "dar --t 3", "t = 4": "dar --t 4",
         "t = 1 or 2": "dar --t 1,2"}


STEP_PAIRS = [("t = 2", "t = 1"), ("t = 3", "t = 1"), ("t = 4", "t = 1"), ("t = 2", "t = 4"), ("t = 3", "t = 4"),
              ("t = 1 or 2", "t = 1"), ("t = 2", "t = 1 or 2"), ("t = 3", "t = 1 or 2")]


def table9(place):
    numbers = ((56.2, 82.5), (59.4, 82.9), (59.6, 82.7), (58.8, 82.5), (58.1, 82.5))
    return images_table("Table 9: the choice of t", {row: lp_ft(n) for row, n in zip(STEPS, numbers)}, LP_FT,
                        of("images", STEPS), STEP_PAIRS, " How the paper mixes t is not said; here each sequence draws 1 or 2.")


def table9_text(place):
    classify, generate = text_probe(place), {"Perplexity": perplexity("")}
    return Table("Beyond the paper: the choice of t in text", TWO_STREAMS.format("tokens"), of("text", STEPS), classify | generate,
                 {}, compare(classify, STEP_PAIRS) + compare(generate, [("t = 1", f"t = {t}") for t in (2, 3, 4)]))


def figure2(place):
    rows = of("text", {AR: "ar", "Masked (0.15)": "mlm --mask 0.15", DAR: "dar --t 2", "Variable-length": "vl --mask 0.15,0.3"})
    columns = {"inner product, top pairs": connectivity("inner_product", "mean"),
               "cosine, top pairs": connectivity("cosine", "mean"), "cosine, all pairs": connectivity("cosine", "mean_of_all")}

    # The paper compares inner products, and shows them in a picture without numbers.
    claims = tuple(replace(claim, ours=not claim.text.startswith("inner")) for claim in compare(columns, [("Masked (0.15)", AR)]))

    def picture(place, seeds, content, path):
        found = {row: evaluation(place, model, 0, "connectivity").result() for row, model in rows.items()}
        plot_connectivity(path, [{**x["checkpoints"][0], "label": row} for row, x in found.items()])

    return Table("Figure 2: similarity of features of different texts", "One size, the same tokens, contexts from the same held-out "
                 "sequences. Inner products are in units of each network's own; cosines compare networks.", rows, columns, {},
                 claims, picture=picture)


def figure3(place):
    rows = of("text", {AR: "ar", **MASKED})
    spans = {"below S/8": lambda k, S: k < S / 8, "from S/2": lambda k, S: k >= S / 2}
    columns = {f"{regime}, {span}": perplexity(regime, prefixes=cut)
               for regime in REGIMES for span, cut in spans.items()}

    def extra(v, row, regime):
        """How much more a model loses to the autoregressive one after short prefixes than after long ones."""
        short, long = (v[row, f"{regime}, {span}"] - v[AR, f"{regime}, {span}"] for span in spans)
        return short - long

    fifteen, _, vl = MASKED
    claims = []
    for r in REGIMES:
        claims += [Claim(f"{r}: {fifteen} loses more to {AR} after short prefixes than after long ones",
                         lambda v, r=r: extra(v, fifteen, r)),
                   Claim(f"{r}: {vl} has less of that extra loss", lambda v, r=r: extra(v, fifteen, r) - extra(v, vl, r), ours=True)]

    def picture(place, seeds, content, path):
        curves = {}
        for row, model in rows.items():
            found = [evaluation(place, model, k, "perplexity", "--by-length").result() for k in range(seeds)]
            for regime, r in found[0]["results"]["regimes"].items():
                nll = np.mean([x["results"]["regimes"][regime]["by_length"]["nll"] for x in found], axis=0)
                curves[f"{row}, {regime}" if model != "text: ar" else row] = {**r["by_length"], "nll": nll.tolist()}
        plot_by_length(path, curves)

    return Table("Figure 3: the length of the prefix, in nats per token", "One size, the same tokens, the same held-out sequences. "
                 "Every model loses more after short prefixes, so the claims are about the distance to the autoregressive model.",
                 rows, columns, {}, tuple(claims), picture=picture)


def matplotlib():
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def theory(place):
    stage = place.stage("spectral", ("spectral.py", "all"), plot="--plot" if matplotlib() else None)
    return Table("Theory: what is printed and what holds", "Computed on the paper's toy model.", extra=(stage,))


def fourbytwo(place):
    rows = {}
    for kind, fixed, drawn in (("text", "0.15", "0.15,0.3"), ("images", "0.75", "0.5,0.75")):
        flags = {"ar": "ar", "dar t=2": "dar --t 2", "mlm": f"mlm --mask {fixed}", "vl": f"vl --mask {drawn}"}
        rows |= {f"{kind} {label}": f"{kind}: {x}" + " --streams 2" * (label != "dar t=2") for label, x in flags.items()}
    classify = {"classification (probe)": by_kind(place)}
    text = {"generation (perplexity)": replace(perplexity(""), only="text")}
    images = {"generation (L2)": replace(reconstruction("l2", 4), only="images")}
    better = [("mlm", "ar"), ("dar t=2", "ar"), ("vl", "mlm")]
    claims = compare(classify, [(f"{kind} {a}", f"{kind} {b}") for kind in ("text", "images") for a, b in better])
    claims += compare(text, [("text ar", "text mlm"), ("text vl", "text mlm"), ("text ar", "text dar t=2")])
    return Table("Beyond the paper: every objective, both tasks", "All eight run through two streams; within text and within images "
                 "the same data in the same order and the same settings. L2 of ar and dar is from their left-to-right context only.",
                 rows, classify | text | images, {}, claims + compare(images, [("images vl", "images mlm")]))


def ranges(place):
    fixed = {f"fixed {r}": f"mlm --mask {r}" for r in (0.15, 0.225, 0.3, 0.325, 0.5, 0.575)}
    drawn = {f"[0.15, {high}]": f"vl --mask 0.15,{high}" for high in (0.3, 0.5, 1.0)}
    columns = {regime: perplexity(regime) for regime in REGIMES}
    pairs = [*zip(drawn, ("fixed 0.225", "fixed 0.325", "fixed 0.575")), *zip(drawn, ("fixed 0.3", "fixed 0.5"))]
    return Table("Beyond the paper: variety or a larger ratio?", "One architecture, the same tokens, the same settings. A range is "
                 "compared with the fixed ratio of the same mean, which hides as many tokens, and with its upper end.",
                 of("text", fixed | drawn), columns, {}, compare(columns, pairs))


def theory_practice(place):
    def gap(v, rows):
        return -glue.spearman(*(np.array([v[row, column] for row in rows]) for column in ("tail sum", "probe")))

    rows, claims = {}, []
    for kind, low, high in (("text", 0.15, 0.3), ("images", 0.5, 0.75)):
        masked = {f"mlm {low}": f"mlm --mask {low}", f"mlm {high}": f"mlm --mask {high}",
                  f"vl [{low}, {high}]": f"vl --mask {low},{high}"}
        own = {f"{kind} {label}": f"{kind}: {flags}" for label, flags in STEPS.items()}
        own |= {f"{kind} {label}": f"{kind}: {flags} --streams 2" for label, flags in masked.items()}
        claims.append(Claim(f"{kind}: a smaller tail sum goes with a better probe (minus the rank correlation)", gap, tuple(own),
                            True))
        rows |= own
    return Table("Beyond the paper: theory against practice", "All run through two streams on the same data with the same settings. "
                 "These networks are told which position they predict; the theorem's contexts are not.", rows,
                 {"tail sum": tail(), "probe": by_kind(place)}, {}, tuple(claims), picture=scatter)


def scatter(place, seeds, content, path):
    """The probe's accuracy against the theory's tail sum, one point for each objective; text and images apart."""
    figure, panels = import_optional("matplotlib.pyplot").subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, kind in zip(panels, ("text", "images")):
        for row in content["rows"]:
            if row["row"].startswith(kind):
                x, y = row["cells"]["tail sum"]["mean"], row["cells"]["probe"]
                panel.errorbar(x, y["mean"], yerr=y["std"] or y["stderr"], fmt="o")
                panel.annotate(row["row"].removeprefix(kind + " "), (x, y["mean"]), textcoords="offset points", xytext=(5, 3))
        panel.set(xlabel="tail sum of sigma^4 per class", ylabel="accuracy of the probe (%)", title=kind, xscale="symlog")
    figure.savefig(path, dpi=150)


TARGETS = {f.__name__: f for f in (table1, table2, table3, table4, table5, table6, table7, table8, table9, figure2, figure3,
                                   theory, fourbytwo, ranges, table9_text, theory_practice)}
