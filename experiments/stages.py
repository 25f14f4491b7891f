"""Stages: the command lines of which every result is made, where their results go, and what they cost.

A stage is one command line of train.py, evaluate.py, spectral.py, data.py or a module of this folder. Its
folder or file is named by a checksum of that line, so that tables share stages.
"""

import functools
import hashlib
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from engine.machine import flops_per_sequence
from experiments.scales import HUB, PAPER_TEXT, SAFER, Scale
from model import SIZES, VIT_SIZES, Config
from train import batch_sizes, parse, steps_for

# else --json
RESULT_FLAGS = {"train.py": ("--no-report", "--out"), "data.py": ("--out",),
                "experiments.authors": ("--out",)}


@dataclass(frozen=True)
class Stage:
    """One command line, where its result goes, and what has to be there first."""

    argv: tuple          # the program or module and its arguments, without those that name the result
    out: Path            # run folder, data folder, or JSON file
    needs: tuple = ()    # stages
    flops: float = 0.0   # for the estimate of its time
    each: float = 0.0    # train.py: those of one sequence
    memory: float = 0.0  # bytes, a guess
    disk: float = 0.0    # bytes, a guess

    def line(self):
        """The whole line."""
        return (*self.argv, *RESULT_FLAGS.get(self.argv[0], ("--json",)), str(self.out))

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
    scale: Scale
    safer: bool = False

    def stage(self, title, argv, *needs, suffix=".json", plot=None, **estimate):
        """A Stage whose result is named by its command line. `plot` is the flag for a picture, which goes
        beside the JSON."""
        line = shlex.join(argv).replace(str(self.work), "WORK")
        path = self.work / f"{title}-{hashlib.sha1(line.encode()).hexdigest()[:8]}"
        argv = (*argv, plot, f"{path}.png") if plot else tuple(argv)
        return Stage(argv, path.with_name(path.name + suffix), needs, **estimate)


@dataclass(frozen=True)
class Model:
    """A row of a table: '[untrained|pixels|counts] KIND [xBUDGET]: OBJECTIVE AND ITS FLAGS', such as 'text
    x6.7: mlm --mask 0.15', or hf:NAME. No network at all: 'pixels', and 'counts' of tokens and of classes."""

    text: str

    @property
    def hub(self):
        return self.text.startswith("hf:")

    @property
    def words(self):
        return self.text.split(": ")[0].split()

    @property
    def kind(self):
        """text, images or images100."""
        kinds = [word for word in self.words if word.startswith(("text", "images"))]
        return "text" if self.hub else kinds[0]

    @property
    def flags(self):
        return self.text.split(": ", 1)[1]

    @property
    def budget(self):
        """What its budget is multiplied with."""
        return next((float(word[1:]) for word in self.words if word[0] == "x"), 1.0)

    @property
    def learned(self):
        """Whether this is a trained model."""
        return self.hub or self.words[0] not in ("untrained", "pixels", "counts")

    def as_trained(self):
        """The trained model whose architecture this row has."""
        return self if self.learned else Model(self.text.partition(" ")[2])

    def times(self, share):
        """The same with a budget multiplied by `share`."""
        head, first = " ".join(word for word in self.words if word[0] != "x"), self.budget * share
        return Model(f"{head}: {self.flags}" if first == 1 else f"{head} x{first:g}: {self.flags}")


def source(place, kind):
    """(what --data is for this kind of data, the stages that make it)."""
    if place.name == "smoke":
        return ("pydoc" if kind == "text" else "shapes"), ()
    raw = PAPER_TEXT if (place.name, kind) == ("paper", "text") else str(place.data / kind)
    if kind not in place.scale.prepare or Path(raw, "manifest.json").exists():
        return raw, ()
    flags = place.scale.prepare[kind].split()
    size = int(flags[flags.index("--size") + 1]) if "--size" in flags else 0
    bytes_each = 3 * size ** 2 if size else 2  # pixels of an image, or two bytes for a token
    stage = place.stage(f"data-{kind}", ("data.py", kind[:6], raw, *flags), suffix="", disk=bytes_each
                        * place.scale.counts[kind])
    return str(stage.out), (stage,)


def budget_flags(place, model, given):
    """The steps or epochs of a model; `given` are its other arguments."""
    tokens, epochs = place.scale.tokens, place.scale.epochs
    settings = parsed(given)
    if model.kind == "text":
        tokens = tokens or settings.steps * settings.batch_size * settings.length
        return ("--steps", str(max(1, round(model.budget * tokens / settings.batch_size / settings.length))))
    # the paper's 10 epochs remain 10
    warmup = ("--warmup", f"{settings.warmup / model.budget:g}") if epochs is None else ()
    return ("--epochs", f"{model.budget * (epochs or settings.epochs):g}", *warmup)


def pretrain(place, model, seed):
    """The stage that trains a Model."""
    model, scale = model.as_trained(), place.scale
    data, needs = source(place, model.kind)
    safer = SAFER if place.safer and model.kind != "text" else ""
    flags = (*scale.train[model.kind].split(), *safer.split())
    given = ("--objective", *model.flags.split(), *flags)
    preset = model.budget == 1 and (scale.tokens if model.kind == "text" else scale.epochs) is None
    # stand-ins, so that nothing has to be there to know the settings
    kind = "pydoc" if model.kind == "text" else "shapes"
    budget = () if preset else budget_flags(place, model, (*given, "--data", kind))
    argv = ("train.py", *given, *budget, "--data", data, "--seed", str(seed))
    each, count, memory, disk = cost((*given, *budget, "--data", kind), scale.vocab, scale.counts[model.kind])
    title = f"{' '.join(model.words)} {model.flags} seed{seed}".replace("--", "").replace(" ", "-")
    return place.stage(title, argv, *needs, suffix="", flops=each * count, each=each, memory=memory,
                       disk=disk)


@functools.cache
def parsed(argv):
    """The Settings of a train.py command line."""
    return parse(argv)[0]


@functools.cache
def cost(argv, vocab, examples):
    """Of a training's arguments: (FLOPs of a sequence, sequences, bytes of memory, bytes of disk)."""
    settings = parsed(argv)
    (objective, path), size = settings.task(), dict(SIZES.get(settings.preset) or VIT_SIZES[settings.preset])
    S, n = settings.positions, objective.max_targets(settings.positions)
    if settings.images:
        size.update(patch=settings.patch, mean=(0,) * 3, decoder=size["decoder"] if path == "mae" else ())
    config = Config(0 if settings.images else vocab, S, **size)
    steps = settings.steps or steps_for(settings, math.ceil(settings.epochs * examples))
    rows = min(settings.micro_batch, settings.batch_size) * {"two-stream": S + n, "mae": S - n}.get(path, S)
    D, L, V = config.width, config.layers, config.vocab
    weights = 12 * L * D * D + V * D
    memory = 1e9 + 16 * weights + 50 * rows * L * D + 6 * rows * V * n / S
    each = flops_per_sequence(config, path, S, n, S - objective.min_targets(S))
    # two checkpoints of weights and two moments
    return each, sum(batch_sizes(settings, steps)), memory, 2 * 12 * weights


def checkpoint(place, model, seed):
    """(what stands for CKPT, the training stages that it needs)."""
    if model.hub:
        return model.text, ()
    stage = pretrain(place, model, seed)
    return (str(stage.out) if model.learned else f"untrained:{stage.out}"), (stage,)


def evaluation(place, models, seed, command, flags="", plot=None):
    """The stage of an evaluate.py command on one model or on several. `models` are texts of Models."""
    models = [Model(model) for model in ([models] if isinstance(models, str) else models)]
    names, needs = zip(*(checkpoint(place, model, seed) for model in models))
    needs, budgets, kind = sum(needs, ()), place.scale.evaluate, models[0].kind[:6]
    pixels = ("--pixels",) if models[0].text.startswith("pixels") else ()
    # what these were trained with
    length = ("--length", "512") if models[0].hub and command == "perplexity" else ()
    argv = ("evaluate.py", command, *names, *budgets.get(f"{command} {kind}",
                                                         budgets.get(command, "")).split(),
            *shlex.split(flags), *pixels, *length)
    title = f"{command}-" + ("" if models[0].learned else "untrained-") + (
        needs[0].out.name if len(models) == len(needs) == 1 else f"seed{seed}")
    forward = sum(stage.each for stage in needs) / 3 + HUB / 3 * (not needs)
    return place.stage(title, argv, *needs, plot=plot, flops=place.scale.forward[command] * forward,
                       memory=max((stage.memory for stage in needs), default=2e10), disk=1e6)


def with_needs(stages):
    """These stages and all that they need, each once, in an order in which they can run."""
    found = {}
    for stage in stages:
        for one in (*with_needs(stage.needs), stage):
            found.setdefault(one.out, one)
    return list(found.values())
