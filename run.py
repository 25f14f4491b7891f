"""A run: its settings and presets, its machine, its checkpoint, the Run that evaluation opens, its data."""

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from data import POSITIONS, Corpus, Sequences, load_corpus, load_evaluation, tokenizer_from_json, toy_noise
from images import Patches, is_images, load_images
from model import SIZES, Config, Transformer
from objectives import OBJECTIVES, choose_path, describe, from_options
from util import BadInput, import_optional, note, positive

# ---------------------------------------------------------------------------- settings and presets

TEXT = {"schedule": "triangle", "warmup": 0.0, "optimizer": "muon", "weight_decay": 0.01, "beta2": 0.98,
        "clip": 0.5, "batch_ramp": 0.0, "length": 128, "mask_rule": "always"}
IMAGES = {"schedule": "cosine", "warmup": 0.05, "optimizer": "adamw", "weight_decay": 0.05, "beta2": 0.95,
          "clip": 0.0, "batch_ramp": 0.0, "crop": 0.2}
PRESETS = {  # a size of model.py and a budget that suits it; rates were tuned for tiny and vit-tiny only
    "tiny": {**TEXT, "batch_size": 16, "steps": 1800, "lr": 6e-3},
    "mini": {**TEXT, "batch_size": 64, "steps": 3000, "lr": 4e-3},
    "small": {**TEXT, "batch_size": 256, "steps": 20_000, "lr": 3e-3},
    "base": {**TEXT, "batch_size": 1024, "steps": 50_000, "lr": 2e-3},
    "paper": {**TEXT, "batch_size": 8192, "steps": 100_000, "lr": 1e-3, "batch_ramp": 0.6,
              "optimizer": "adamw", "mask_rule": "bert"},
    "vit-tiny": {**IMAGES, "size": 32, "patch": 4, "batch_size": 64, "steps": 1000, "lr": 4e-3,
                 "optimizer": "muon"},
    "vit-small": {**IMAGES, "size": 224, "patch": 16, "batch_size": 4096, "epochs": 200, "lr": 8e-3},
    "vit-base": {**IMAGES, "size": 224, "patch": 16, "batch_size": 4096, "epochs": 200, "lr": 8e-3},
}
IMAGE_MASKS = {"mlm": 0.75, "vl": (0.5, 0.75)}  # the default of --mask where it differs from text's


def setting(default, help, **arguments):
    """A field of Settings that is also a flag of train.py."""
    return field(default=default, metadata={"help": help, **arguments})


@dataclass(frozen=True)
class Settings:
    """What a run computes. `resolve` checks it and takes the preset's value where a field is None; what a
    checkpoint has is not checked again."""

    objective: str = setting("ar", "pretraining objective", choices=OBJECTIVES)
    options: dict = field(default_factory=dict)  # of the objective; each has its own flag
    objective_text: str = None                   # of an objective of one's own, FILE.py:Class
    streams: int = setting(None, "2: two streams also where one suffices", choices=(1, 2))
    mask_rule: str = setting(None, "one stream: always = [MASK] at every target, the paper's formula; "
                             "bert = 80%% [MASK], 10%% random, 10%% kept", choices=("always", "bert"))
    blind: bool = setting(False, "two streams: no query knows the position it predicts", action="store_true")
    data: str = setting("pydoc", "text: pydoc, a file or folder, a token folder of data.py, hf:NAME, toy; "
                        "images: shapes, a folder of JPEG or PNG files, an image folder of data.py")
    preset: str = setting(None, "model size and budget (default: tiny, for images vit-tiny)", choices=PRESETS)
    length: int = setting(None, "text: sequence length S")
    size: int = setting(None, "images: side in pixels; others are resized")
    patch: int = setting(None, "images: side of a patch in pixels, a divisor of --size")
    crop: float = setting(None, "images: least share of the area that a random crop keeps")
    steps: int = setting(None, "optimizer steps")
    epochs: float = setting(None, "passes over the data, instead of --steps")
    batch_size: int = setting(None, "sequences per step")
    batch_ramp: float = setting(None, "share of the budget over which the batch grows to its size")
    micro_batch: int = setting(256, "sequences per forward pass at most; more are accumulated")
    lr: float = setting(None, "peak learning rate")
    schedule: str = setting(None, "triangle: 25%% of the peak, the peak at 75%% of the budget, 0; or cosine",
                            choices=("triangle", "cosine"))
    warmup: float = setting(None, "share of the budget over which the learning rate rises from 0")
    optimizer: str = setting(None, "adamw, or muon for the matrices of the blocks", choices=("adamw", "muon"))
    weight_decay: float = setting(None, "decoupled, on matrices only")
    beta2: float = setting(None, "of AdamW; its beta1 is 0.9")
    clip: float = setting(None, "largest norm of the gradient; 0 for no clipping")
    seed: int = setting(0, "of the initial weights, the order of the data and the masks", type=int)

    @property
    def images(self):
        """Whether the tokens are patches of images."""
        return self.preset.startswith("vit")

    @property
    def positions(self):
        """Tokens in a sequence: S, or the patches of an image."""
        return (self.size // self.patch) ** 2 if self.images else self.length

    def task(self):
        """(objective, which of model.PATHS runs it)."""
        objective = from_options(self.objective, **self.options)
        return objective, choose_path(objective, self.streams, self.images)

    def to_dict(self):
        """What a checkpoint keeps: all but data that was given from Python."""
        return {**vars(self), "data": self.data if isinstance(self.data, str) else None}


def add_settings(parser):
    """One flag for each field of Settings; None where it is not given."""
    by_preset = {name for preset in PRESETS.values() for name in preset}
    for f in fields(Settings):
        if "help" in f.metadata:
            default = "the preset's" if f.name in by_preset else f.default
            shown = "" if default is None or default is False else f" (default: {default})"
            kind = {} if "action" in f.metadata else {"type": positive if f.type is int else f.type}
            parser.add_argument("--" + f.name.replace("_", "-"), default=None,
                                **{**kind, **f.metadata, "help": f.metadata["help"] + shown})


def resolve(**given):
    """Settings from what is given by name, the objective's own options included; the preset does the rest.
    BadInput where something would be ignored, or a number does not fit."""
    given = {name: x for name, x in given.items() if x is not None}
    names = {f.name for f in fields(Settings)}
    options = given.pop("options", {}) | {name: given.pop(name) for name in given.keys() - names}
    if ".py:" in given.get("objective", ""):
        given["objective"] = os.path.abspath(given["objective"])  # found from any folder, too
    data, toy, images = given.get("data", "pydoc"), False, False
    if isinstance(data, str | os.PathLike):
        data = os.fspath(data)
        toy = toy_noise(data) is not None
        if not toy and data not in ("", "pydoc", "shapes") and not data.startswith("hf:"):
            data = os.path.abspath(data)
        images = is_images(data)
    given["data"] = data
    given.setdefault("preset", "vit-tiny" if images else "tiny")
    if toy:
        given.setdefault("length", POSITIONS)
    settings = Settings(**given)
    if settings.images and settings.objective in IMAGE_MASKS:
        options.setdefault("mask", IMAGE_MASKS[settings.objective])
    objective, path = replace(settings, options=options).task()

    this = f"{describe(objective)} runs as {path}"
    ignored = {
        "length": toy and settings.length != POSITIONS and f"the toy model has {POSITIONS} tokens",
        "epochs": "steps" in given and "--steps sets the budget, too",
        "mask_rule": path != "mask" and f"it is for [MASK]s in one stream, and {this}",
        "blind": settings.blind and path != "two-stream" and f"it is for --streams 2, and {this}",
        **({"length": "images have --size and --patch"} if settings.images else
           dict.fromkeys(("size", "patch", "crop"), "it is for images, and this is text"))}
    for name in given:
        if why := ignored.get(name):
            raise BadInput(f"--{name.replace('_', '-')} {given[name]} would be ignored: {why}")

    budget = {"steps": None, "epochs": None} if {"steps", "epochs"} & given.keys() else {}
    rule = {} if path == "mask" else {"mask_rule": None}
    given |= {"options": asdict(objective), "objective_text": objective_text(settings.objective)}
    settings = Settings(**{**PRESETS[settings.preset], **budget, **rule, **given})
    check_ranges(settings)
    objective.check(settings.positions)
    return settings


def resumed(out, given):
    """Settings of the run in `out`, of which the budget, the place of the data and the memory may change."""
    saved = load_checkpoint(out)["settings"]
    values = {**asdict(saved), **saved.options}
    if ".py:" in given.get("objective", ""):
        given["objective"] = os.path.abspath(given["objective"])  # as `resolve` wrote it
    for name in given.keys() - {"steps", "epochs", "data", "micro_batch"}:
        if given[name] != values.get(name):
            raise BadInput(f"the run in {out} has --{name.replace('_', '-')} {values.get(name)}, not "
                           f"{given[name]}")
    tell_of_change(saved, out)
    budget = {"steps": None, "epochs": None} if {"steps", "epochs"} & given.keys() else {}
    return resolve(**{**asdict(saved), **budget, **given})


def objective_text(objective):
    """The text of the file of an objective of one's own, FILE.py:Class; else None."""
    path = Path(objective.rpartition(":")[0])
    return path.read_text(encoding="utf-8") if path.suffix == ".py" and path.exists() else None


def tell_of_change(settings, name):
    """A note where the file of a run's own objective is not what it was trained with."""
    if settings.objective_text != objective_text(settings.objective):
        note(f"{settings.objective} has changed since {name} was trained; config.json there has its old text")


def check_ranges(settings):
    """Raise BadInput where a number is out of its range."""
    for names, fits, allowed in (
            ("lr epochs", lambda x: 0 < x < math.inf, "a positive number"),
            ("clip weight_decay", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("beta2 batch_ramp warmup", lambda x: 0 <= x < 1, "in 0..1, 1 excluded")):
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not fits(value):
                raise BadInput(f"--{name.replace('_', '-')} {value:g} is not {allowed}")
    if settings.images and settings.size % settings.patch:
        raise BadInput(f"--patch {settings.patch} does not divide images of --size {settings.size}")


def warmup_cosine(progress, warmup):
    """Share of the peak rate at `progress` in 0..1: linearly up to `warmup`, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


# ---------------------------------------------------------------------------- device and precision

def choose_device(name=None):
    """The device of that name, or CUDA, or Apple's MPS, or the CPU; under torchrun this process's own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    with contextlib.suppress(OSError, AttributeError):  # glibc that keeps freed memory saves a CPU 5 to 15%
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)            # M_MMAP_MAX: never a mapping of its own for a large array
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    return device


def hardware(device):
    """A GPU by its name, a CPU by its model and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""  # Linux
    model, threads = re.search(r"model name\s*: (.*)", info), torch.get_num_threads()
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def choose_autocast(device, name=None):
    """(a function that gives the context of the forward pass, "bf16" or "fp32"): by default bf16 where its
    matrix products are faster, on CUDA, on a CPU with AMX, and on AMD's with AVX-512 BF16."""
    if name is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
            cpu = Path("/proc/cpuinfo").read_text()
            fast = "amx_bf16" in cpu or "avx512_bf16" in cpu and "AuthenticAMD" in cpu
        name = "bf16" if fast else "fp32"
    return (lambda: torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")), name


# ---------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, content):
    """Write a checkpoint so that a whole one is there at every moment: temporary file, fsync, rename."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path):
    """What a run folder, its ckpt.pt, or a folder of evaluate.py export holds. Nothing in it is executed."""
    path = Path(path)
    exported = (path / "model.safetensors").exists()
    if path.is_dir():
        path = path / ("model.safetensors" if exported else "ckpt.pt")
    if not path.is_file():
        raise BadInput(f"{path} {'is no regular file' if path.exists() else 'does not exist'}; give a run "
                       "folder of train.py, or its ckpt.pt")
    try:
        if exported:
            content = read_exported(path)
        else:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it is compressed, and would unpack to more than it holds")
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name, cls in (("settings", Settings), ("model_config", Config)):
            known = {f.name for f in fields(cls)}  # earlier versions had fields that are gone
            content[name] = cls(**{key: x for key, x in content[name].items() if key in known})
        with torch.device("meta"):  # takes no memory, whatever the settings say
            model = Transformer(content["model_config"])
        due, found = ({name: x.shape for name, x in state.items()}
                      for state in (model.state_dict(), content["model"]))
        if due != found:
            raise ValueError("its weights are not those of its settings")
    except BadInput:  # a package is missing
        raise
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{path} is not a whole checkpoint of train.py ({type(error).__name__}: {error})"
                       ) from None
    return content


def read_exported(path):
    """The content of a checkpoint from a model.safetensors and the files beside it."""
    content = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    content["model"] = import_optional("safetensors.torch").load_file(path)
    if content["tokenizer"] == "byte":
        content["tokenizer"] = json.dumps({"kind": "byte"})
    elif content["tokenizer"]:
        content["tokenizer"] = path.with_name("tokenizer.json").read_text(encoding="utf-8")
    return content


@dataclass
class Run:
    """A trained model with what is needed to evaluate it."""

    model: Transformer
    objective: object
    path: str
    tokenizer: object  # None for images
    settings: Settings
    step: int
    name: str
    total: int = None  # tokens, or images, that it was trained on, if that is known


def load_run(path, device="cpu"):
    """The model, objective and tokenizer of a checkpoint, ready for evaluation; untrained:RUN as it began."""
    name, untrained = str(path), str(path).startswith("untrained:")
    content = load_checkpoint(name.removeprefix("untrained:"))
    settings = replace(content["settings"], **content.get("budget", {}))  # which its data was read for
    tell_of_change(settings, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Transformer(content["model_config"])
    if not untrained:
        model.load_state_dict(content["model"])
    tokenizer = None if settings.images else tokenizer_from_json(content["tokenizer"])
    return Run(model.to(device).eval(), *settings.task(), tokenizer, settings,
               0 if untrained else content["step"], name, content.get("total"))


# ---------------------------------------------------------------------------- the data of a run

def load_examples(settings, path, device="cpu"):
    """(Config, training sequences, validation sequences, tokenizer or None). Sequences of text and images
    have `len`, `batch(start, size, part)`, `lengths(start, size)` and `total`, of tokens or of images."""
    if settings.images != (isinstance(settings.data, str) and is_images(settings.data)):
        kinds = ("text", "images") if settings.images else ("images", "text")
        raise BadInput(f"--data {settings.data} is {kinds[0]}, and --preset {settings.preset} for {kinds[1]}")
    if settings.images:
        images, size = load_images(settings.data, settings.size), dict(SIZES[settings.preset])
        size["decoder"] = size["decoder"] if path == "mae" else ()
        config = Config(0, settings.positions, **size, patch=settings.patch, mean=images.mean, std=images.std,
                        blind=settings.blind)
        train = Patches(images.train, config, settings.seed, settings.crop, device)
        return config, train, Patches(images.val, config), None
    corpus, S = training_corpus(settings), settings.length
    config = Config(corpus.tokenizer.vocab, S, **SIZES[settings.preset], blind=settings.blind)
    train = Sequences(corpus.train, S, corpus.tokenizer.separator, settings.seed)
    return config, train, Sequences(corpus.val, S, corpus.tokenizer.separator), corpus.tokenizer


def training_corpus(settings):
    """The Corpus that a run trains on; of a Hugging Face dataset what its steps read, and a fifth more."""
    needed = None if settings.epochs else int(1.2 * settings.steps * settings.batch_size * settings.length)
    return load_corpus(settings.data, hf_bytes=needed)


def held_out_text(run, data=None):
    """What --data names, or a Corpus, as a Corpus whose `val` is evaluated on. None: what the run's own data
    held out."""
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command reads text")
    if data is not None:
        return data if isinstance(data, Corpus) else load_evaluation(data, run.tokenizer)
    if run.settings.data is None:
        raise BadInput(f"{run.name} does not come with a text to evaluate on; give one with --data")
    corpus = training_corpus(run.settings)
    same_tokenizer = corpus.tokenizer.to_json() == run.tokenizer.to_json()
    if not same_tokenizer or run.total not in (None, len(corpus.train)):
        raise BadInput(f"{run.settings.data} is not the text of {run.name} any more; give a text with --data")
    return corpus


def evaluation_sequences(run, data=None, count=200):
    """(`count` sequences of held-out text (N, S), its tokens per byte, the name of the data), the same for
    every checkpoint of one tokenizer and length. `data` is as for `held_out_text`."""
    corpus = held_out_text(run, data)
    S = run.settings.length
    whole = corpus.val[:len(corpus.val) // S * S]
    if len(whole) < 2 * S or count < 2:
        raise BadInput(f"a standard error takes two sequences of {S} tokens; {corpus.name} has "
                       f"{len(corpus.val):,} tokens to evaluate on, and {count} sequences are asked for")
    sequences = Sequences(whole, S, run.tokenizer.separator, seed=0)
    return sequences.batch(0, min(count, len(sequences))), len(corpus.val) / corpus.val_bytes, corpus.name
