"""Pretrain a Transformer with any objective.

    python train.py --objective vl --mask 0.15,0.3                  the default corpus, minutes on a CPU
    python train.py --objective dar --t 2 --data data/novels        own text (see data.py)
    python train.py --objective mlm --data shapes                   images (see images.py)
    python train.py --resume --out runs/vl                          go on where that run stopped

Leaves a run folder: config.json (all settings), metrics.jsonl (one line every few steps), ckpt.pt (everything needed to
evaluate or to go on). Which batch and masks a step takes depends on the seed and the step's number only, so a resumed run
repeats the uninterrupted one, on a CPU bit for bit.
"""
import contextlib
import ctypes
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as architecture
from data import Sequences, load_corpus, tokenizer_from_json
from images import Patches, is_images, load_images
from masks import BadInput, Parser, command_line, group_size, positive, ratios, seed
from model import SIZES, VIT_SIZES, Config, Transformer, cpu_info, flops_per_sequence, parameters
from objectives import OBJECTIVES, choose_path, describe, draw_batch, from_options, loss_sum

TEXT = {"schedule": "triangle", "warmup": 0.0, "weight_decay": 0.01, "beta2": 0.98, "clip": 0.5, "batch_ramp": 0.0,
        "length": 128}
IMAGES = {"schedule": "cosine", "warmup": 0.05, "weight_decay": 0.05, "beta2": 0.95, "clip": 0.0, "batch_ramp": 0.0,
          "crop": 0.2}

PRESETS = {  # a size of model.py and a budget that suits it
    "tiny": {**TEXT, "batch_size": 16, "steps": 1800, "lr": 2e-3},
    "mini": {**TEXT, "batch_size": 64, "steps": 3000, "lr": 2e-3},
    "small": {**TEXT, "batch_size": 256, "steps": 20_000, "lr": 1e-3},
    "base": {**TEXT, "batch_size": 1024, "steps": 50_000, "lr": 1e-3},
    "paper": {**TEXT, "batch_size": 8192, "steps": 100_000, "lr": 1e-3, "batch_ramp": 0.6},
    "vit-tiny": {**IMAGES, "size": 32, "patch": 4, "batch_size": 64, "steps": 1000, "lr": 2e-3},
    "vit-small": {**IMAGES, "size": 224, "patch": 16, "batch_size": 4096, "epochs": 200, "lr": 8e-3},
    "vit-base": {**IMAGES, "size": 224, "patch": 16, "batch_size": 4096, "epochs": 200, "lr": 8e-3},
}
IMAGE_MASKS = {"mlm": (0.75,), "vl": (0.5, 0.75)}  # the defaults of --mask for images

PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets; the first name that fits
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}


# ---------------------------------------------------------------------------- settings

def option(default, text, **arguments):
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, **arguments})


@dataclass(frozen=True)
class Settings:
    """What a run computes. None: the preset decides."""

    objective: str = option("ar", "pretraining objective", choices=OBJECTIVES)
    t: int = option(None, "dar: tokens predicted in parallel, or a range such as 1,2 (default: 2)", type=group_size)
    mask: tuple = option(None, "mlm: ratio of hidden tokens (default: 0.15, images 0.75); vl: its range (default: 0.15,0.3, "
                         "images 0.5,0.75)", type=ratios)
    streams: int = option(None, "1 or 2; 2 runs any objective through two streams (default: 1 where possible)",
                          type=int, choices=(1, 2))
    mask_rule: str = option(None, "masks in one stream: bert = 80%% [MASK], 10%% random, 10%% kept; always = [MASK], the "
                            "paper's formula (default: bert)", choices=("bert", "always"))
    data: str = option("pydoc", "text: pydoc, a file or folder, a token folder of data.py, or hf:NAME; images: shapes, a folder "
                       "of class folders, or an image folder of data.py")
    preset: str = option(None, "model size and budget (default: tiny, for images vit-tiny)", choices=PRESETS)
    length: int = option(None, "text: sequence length S", type=positive)
    size: int = option(None, "images: side in pixels; others are resized", type=positive)
    patch: int = option(None, "images: side of a patch in pixels, a divisor of --size", type=positive)
    norm_pix: bool = option(None, "images: predict pixels relative to the mean and spread of their patch", action="store_true")
    crop: float = option(None, "images: least share of the area that a random crop keeps; 1 for no cropping", type=float)
    steps: int = option(None, "optimiser steps", type=positive)
    epochs: float = option(None, "passes over the data, instead of --steps", type=float)
    batch_size: int = option(None, "sequences per step", type=positive)
    batch_ramp: float = option(None, "share of the budget over which the batch grows to its size", type=float)
    micro_batch: int = option(256, "sequences per forward pass at most; the rest is accumulated", type=positive)
    lr: float = option(None, "peak learning rate", type=float)
    schedule: str = option(None, "triangle: 25%% of the peak, peak at 75%% of the budget, 0; or cosine to 0",
                           choices=("triangle", "cosine"))
    warmup: float = option(None, "share of the budget over which the learning rate rises from 0", type=float)
    weight_decay: float = option(None, "decoupled, on matrices only", type=float)
    beta2: float = option(None, "of AdamW; its beta1 is 0.9", type=float)
    clip: float = option(None, "largest norm of the gradient; 0 for no clipping", type=float)
    seed: int = option(0, "of the initial weights, the order of the data and the masks", type=seed)

    def __post_init__(self):
        """Fill in what was left open, and refuse what does not fit together."""
        def fill(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        fill("preset", "vit-tiny" if is_images(self.data) else "tiny")
        for name in ("length", "mask_rule") if self.images else IMAGE_OPTIONS:
            if getattr(self, name):
                raise BadInput(f"--{name.replace('_', '-')} does not go with --preset {self.preset} on --data {self.data}")
        if self.images:
            fill("mask", IMAGE_MASKS.get(self.objective))
        objective, path = self.task()
        fill("t", getattr(objective, "t", None))
        object.__setattr__(self, "mask", getattr(objective, "mask", None))
        if path == "mask":
            fill("mask_rule", "bert")
        elif self.mask_rule is not None:
            raise BadInput(f"--mask-rule {self.mask_rule} is for masks in one stream; {describe(objective)} runs as {path}: "
                           "leave it out")
        for name, value in PRESETS[self.preset].items():
            if not (name in ("steps", "epochs") and (self.steps or self.epochs)):
                fill(name, value)
        if self.images:
            if self.size % self.patch or self.size < 2 * self.patch:
                raise BadInput(f"--patch {self.patch} does not divide images of --size {self.size} into two or more")
            object.__setattr__(self, "norm_pix", bool(self.norm_pix))
        objective.check(self.positions)
        for name, fits, text in (("lr", lambda x: 0 < x < math.inf, "a positive number"),
                                 ("clip", lambda x: 0 <= x < math.inf, "a number of at least 0"),
                                 ("epochs", lambda x: 0 < x < math.inf, "a positive number"),
                                 ("weight_decay", lambda x: 0 <= x < math.inf, "a number of at least 0"),
                                 ("beta2", lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
                                 ("crop", lambda x: 0 < x <= 1, "in 0..1, 0 excluded"),
                                 ("steps", lambda x: x <= 10 ** 8, "at most 100 million"),
                                 ("batch_ramp", lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
                                 ("warmup", lambda x: 0 <= x < 1, "in 0..1, 1 excluded")):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise BadInput(f"--{name.replace('_', '-')} {value:g} is not {text}")

    @property
    def images(self):
        """Whether the tokens are patches of images."""
        return self.preset in VIT_SIZES

    @property
    def positions(self):
        """Tokens in a sequence: S, or the patches of an image."""
        return (self.size // self.patch) ** 2 if self.images else self.length

    def task(self):
        """(objective, which of model.PATHS runs it)."""
        objective = from_options(self.objective, t=self.t, mask=self.mask)
        return objective, choose_path(objective, self.streams, self.images)


IMAGE_OPTIONS = ("size", "patch", "norm_pix", "crop")
MAY_CHANGE = {"steps", "epochs", "micro_batch", "data"}  # on --resume; the data may have moved


# ---------------------------------------------------------------------------- schedules

def warm_cosine(progress, warmup):
    """Share of the peak rate at `progress` in 0..1: linearly up, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def learning_rate(settings, progress):
    """The rate at `progress` in 0..1 through the budget."""
    if settings.schedule == "cosine":
        return settings.lr * warm_cosine(progress, settings.warmup)
    share = 0.25 + progress if progress < 0.75 else 4 * (1 - progress)  # the Cramming protocol's one cycle
    return settings.lr * share * (min(1, progress / settings.warmup) if settings.warmup else 1)


def batch_sizes(settings, steps):
    """The number of sequences of every step: it grows by sixteenths of the full batch over the first `batch_ramp`."""
    full = settings.batch_size
    if not settings.batch_ramp:
        return [full] * steps
    return [math.ceil(full * min(16, 1 + int(16 * step / (steps * settings.batch_ramp))) / 16) for step in range(steps)]


def steps_for(settings, sequences):
    """The fewest steps whose batches make up that many sequences."""
    steps = math.ceil(sequences / settings.batch_size)
    if steps > 10 ** 8:
        raise BadInput(f"--epochs {settings.epochs:g} are more than 100 million steps")
    while (missing := sequences - sum(batch_sizes(settings, steps))) > 0:
        steps += math.ceil(missing / settings.batch_size)
    return steps


def parts(size, micro):
    """Cut a batch into parts of `micro`, the last one smaller: few shapes, each of which is compiled once."""
    return list(itertools.pairwise([*range(0, size, micro), size]))


def ahead(draw, steps):
    """draw(k) for each of the steps, the next one being drawn by a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for k in steps:
            ready, waiting = waiting, pool.submit(draw, k)
            if ready is not None:
                yield ready.result()
        yield waiting.result()


# ---------------------------------------------------------------------------- the machine

def choose_device(name=None):
    """The device: the one asked for, or CUDA, or Apple's MPS, or the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} is not usable here: {str(error).splitlines()[0]}") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise BadInput(f"--device {name} is not one of cuda, mps and cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(device, name=None):
    """Precision of the matrix products: bf16 on CUDA, and on a CPU whose bf16 products measure clearly faster."""
    if name is not None:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    fast = any(flag in cpu_info() for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Let glibc keep freed memory instead of returning it to the system after every step, so that a CPU step's large
    arrays need no fresh pages."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)            # M_MMAP_MAX: never a mapping of its own for a large array
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def peak_flops(device):
    """Dense bf16 FLOP/s of a known GPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


# ---------------------------------------------------------------------------- checkpoints

def save(path, content):
    """Write a checkpoint so that at every moment a whole one is there: temporary file, flush, rename. What it replaces
    stays beside it as ckpt.prev.pt."""
    partial, previous = path.with_suffix(".partial"), path.with_suffix(".prev.pt")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:  # a file system without links
                shutil.copyfile(path, previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk is either, depending on where PyTorch notices it
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise BadInput(f"{path} could not be written ({str(error).splitlines()[0]})"
                       + ("; the checkpoint before it is intact" if path.exists() else "")) from None


def load_checkpoint(path, device="cpu"):
    """Read a run folder's ckpt.pt, or such a file. Nothing in it is executed (weights_only)."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise BadInput(f"{path} does not exist; train.py writes it")
    previous = path.with_suffix(".prev.pt")
    instead = f". The one before it is there: mv {shlex.quote(str(previous))} {shlex.quote(str(path))}" if previous.exists() else ""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        content = torch.load(path, map_location=device, weights_only=True)
        missing = {"settings", "model_config", "model", "optimizer", "step", "seen", "seconds", "dtype", "tokenizer"} - set(content)
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{path} is not a whole checkpoint of train.py ({type(error).__name__}){instead}") from None
    if missing:
        raise BadInput(f"{path} is not a whole checkpoint of train.py: it lacks {', '.join(sorted(missing))}{instead}")
    return content


@contextlib.contextmanager
def from_this_version(path):
    """Whatever fails in this block is blamed on the checkpoint."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{path} was written by another version of the code ({reason}); use that one, or train anew") from None


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


def load_run(path, device="cpu"):
    """The model, objective and tokenizer of a checkpoint, ready for evaluation."""
    content = load_checkpoint(path, device)
    with from_this_version(path):
        settings, config, weights = Settings(**content["settings"]), Config(**content["model_config"]), content["model"]
        with torch.device("meta"):  # compare the sizes before memory is taken for them
            if config.length != settings.positions or config.layers + sum(config.decoder[:1]) > len(weights):
                raise ValueError("its sizes do not fit together")
            Transformer(config).load_state_dict({name: value.to("meta") for name, value in weights.items()})
        model = Transformer(config).to(device)
        model.load_state_dict(weights)
    tokenizer = None if settings.images else tokenizer_from_json(content["tokenizer"])
    return Run(model.eval(), *settings.task(), tokenizer, settings, content["step"], str(path))


# ---------------------------------------------------------------------------- training

def keeps_text(settings):
    """Whether the run folder keeps the tokens of raw text."""
    return not settings.images and settings.data != "pydoc" and not (Path(settings.data) / "manifest.json").exists()


def load_examples(settings, path, cache, overwrite=False, device="cpu"):
    """(Config, training and validation sequences, tokenizer). What text and images differ in, as far as training goes:
    both kinds of sequences have `len` and `batch(start, size)` and know their `total` of tokens or images."""
    if settings.images != is_images(settings.data):
        raise BadInput(f"--preset {settings.preset} is for {'images' if settings.images else 'text'}, and --data "
                       f"{settings.data} is {'not' if settings.images else 'images'}")
    if settings.images:
        images = load_images(settings.data, settings.size)
        size = dict(VIT_SIZES[settings.preset])
        size["decoder"] = size["decoder"] if path == "mae" else ()
        config = Config(0, settings.positions, **size, patch=settings.patch, mean=images.mean, std=images.std,
                        norm_pix=settings.norm_pix)
        return config, Patches(images.train, config, settings.seed, settings.crop, device), Patches(images.val, config), None
    needed = None if settings.epochs else int(1.2 * settings.steps * settings.batch_size * settings.length)
    corpus = load_corpus(settings.data, cache, overwrite, needed)
    tokenizer = corpus.tokenizer
    config = Config(tokenizer.vocab, settings.length, **SIZES[settings.preset])
    return (config, Sequences(corpus.train, settings.length, tokenizer.separator, settings.seed),
            Sequences(corpus.val, settings.length, tokenizer.separator), tokenizer)


def make_optimizer(model, settings):
    """AdamW with the protocol's betas and epsilon; vectors (norms, query, position scale, bias) do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=settings.lr, betas=(0.9, settings.beta2), eps=1e-12,
                             fused=matrices[0].device.type in ("cuda", "cpu") and not isinstance(matrices[0], DTensor))


def update(loss_module, optimizer, batches, count, path, autocast, clip, synchronise=lambda on: None, world=1):
    """One optimiser step on the mean loss over the `count` targets of all `batches`, whose gradients are accumulated.

    Returns, on the device, this process's part of the loss, the norm of the gradient before clipping, and 1.0 where that
    is not finite: the step is then left out, without asking the device whether it was.
    """
    device = next(loss_module.parameters()).device
    total = torch.zeros((), device=device)
    for batch in batches:
        synchronise(batch is batches[-1])
        with autocast():
            loss = loss_module(batch.to(device), path) / count
        (loss * world).backward()  # the processes' gradients are averaged, their losses summed
        total += loss.detach()
    norm = clip_gradients(loss_module, clip)
    wrong = (~norm.isfinite()).float()
    take_step(optimizer, wrong)
    optimizer.zero_grad()
    return total, norm, wrong


@torch.no_grad()
def validation_loss(loss_module, objective, path, sequences, device, autocast, batch, count=256):
    """Mean loss over the targets of the first `count` validation sequences, the same f at every call, [MASK] at every
    target whatever the mask rule."""
    model = loss_module.model.eval()
    generator = torch.Generator().manual_seed(0)
    total = targets = 0
    for start in range(0, min(count, len(sequences)), batch):
        tokens = sequences.batch(start, min(batch, len(sequences) - start))
        drawn = draw_batch(objective, path, tokens, model.config.vocab, generator, "always").to(device)
        with autocast():
            total += loss_module(drawn, path).item()
        targets += drawn.weight.sum().item()
    model.train()
    return total / targets


def train(settings, out, resume=False, overwrite=False, device=None, dtype=None, compiled=None, fsdp=False, log_every=10,
          eval_every=200, save_every=500, quiet=False):
    """Train to the end of the budget. Returns the last validation loss, or None where a signal stopped the run first.

    `settings` is a Settings, `out` the run folder. Everything else concerns the machine and the reports only. Started by
    torchrun, each of W processes takes its part of every batch, and the first one writes the run folder.
    """
    out, (objective, path) = Path(out), settings.task()
    rank, world = join_group(device)
    quiet = quiet or rank > 0

    def say(text):
        if not quiet:
            tqdm.write(text, file=sys.stderr)

    if not resume and not overwrite and (out / "ckpt.pt").exists():
        raise BadInput(f"{out} holds a run; go on with it with --resume --out {out}, replace it with --overwrite, or "
                       "choose another --out")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; choose another --out")
    if fsdp and world == 1:
        raise BadInput("--fsdp spreads the model over several processes; start them with torchrun --nproc_per_node=N train.py")
    device = choose_device(device or (f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and torch.cuda.is_available() else None))
    compiled = device.type == "cuda" if compiled is None else compiled
    content = load_checkpoint(out) if resume else None
    dtype = choose_dtype(device, dtype or (content and content["dtype"]))
    torch.set_float32_matmul_precision("high")

    with first_process_first(rank, world):  # it prepares the data that the others then read
        config, train_set, val_set, tokenizer = load_examples(settings, path, out / "data", overwrite and rank == 0, device)
    identity = {"tokenizer": tokenizer and tokenizer.to_json(), "train_total": train_set.total}
    if content and identity != {name: content.get(name) for name in identity}:
        raise BadInput(f"{settings.data} is not the data of the run in {out}: another amount of it or another tokenizer")
    steps = steps_for(settings, settings.epochs * len(train_set)) if settings.epochs else settings.steps
    sizes = batch_sizes(settings, steps)
    if min(sizes) < world:
        raise BadInput(f"a batch of {min(sizes)} sequences does not fill {world} processes; give a larger --batch-size")
    if fsdp and any(size % world for size in sizes):  # every forward pass is a collective one
        raise BadInput(f"--fsdp takes equal parts: {world} processes do not divide a batch of "
                       f"{next(size for size in sizes if size % world)}; give another --batch-size")

    torch.manual_seed(settings.seed)
    model = Transformer(config).to(device)
    if path in ("causal", "mae"):
        model.query.requires_grad_(False)  # these read it nowhere
    loss_function = maybe_compiled(compiled, say)
    loss_module, synchronise = spread_out(LossModule(model, loss_function), device, world, fsdp)
    validation = loss_module if fsdp else LossModule(model, loss_sum)
    optimizer = make_optimizer(model, settings)
    step, seen, seconds, skipped, last, pending = 0, 0, 0.0, 0, 0, [0.0, 0.0, 0.0]
    if content:
        with from_this_version(out):
            restore(model, optimizer, content)
        step, seen, seconds, skipped = (content.get(name, 0) for name in ("step", "seen", "seconds", "skipped"))
        if step >= steps:
            raise BadInput(f"{out} is at step {step} of {steps}; give more with --steps to go on")
        last, pending = content.get("logged", step), content.get("pending", pending)
    out.mkdir(parents=True, exist_ok=True)
    if not resume and rank == 0:
        for name in ("ckpt.pt", "ckpt.prev.pt"):
            (out / name).unlink(missing_ok=True)
        if overwrite and not keeps_text(settings):
            shutil.rmtree(out / "data", ignore_errors=True)  # an overwritten run's text
    metrics = open_metrics(out / "metrics.jsonl" if rank == 0 else Path(os.devnull), step)
    if rank == 0:
        (out / "config.json").write_text(json.dumps({**asdict(settings), "steps": steps, "path": path}, indent=1) + "\n")

    unit, each = ("images", 1) if settings.images else ("tokens", settings.length)
    say(f"{describe(objective)} ({path}), {parameters(model)[0] / 1e6:.2f}M parameters, "
        + (f"{settings.positions} patches, " if settings.images else f"vocabulary {config.vocab:,}, ") +
        f"{train_set.total:,} training {unit}; {device.type} {str(dtype)[6:]}{' compiled' if compiled else ''}"
        + (f", {world} processes" if world > 1 else "") + (f", going on at step {step:,} of {steps:,}" if step else ""))

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def draw(place):
        """This process's part of the batch of a step, and the number of targets of the whole batch. The step comes with the
        number of sequences that were seen before it."""
        step, seen = place
        size = sizes[step]
        part = slice(size * rank // world, size * (rank + 1) // world)
        tokens = train_set.batch(seen, size, part)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        batch = draw_batch(objective, path, tokens, config.vocab, generator, settings.mask_rule, size, part)
        return (batch.pinned() if device.type == "cuda" else batch), float(batch.total[0])

    def checkpoint():
        content = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if rank == 0:
            os.fsync(metrics.fileno())  # no line that the checkpoint is past may be missing after a power loss
            save(out / "ckpt.pt", {
                "settings": asdict(settings), "model_config": asdict(config), **content, "step": step, "seen": seen,
                "seconds": seconds, "skipped": skipped, "logged": logged[0], "pending": [x.item() for x in (running, bad, streak)],
                "dtype": "bf16" if dtype == torch.bfloat16 else "fp32", **identity})

    flops = flops_per_sequence(config, path, config.length, objective.max_targets(config.length),
                               config.length - objective.min_targets(config.length))
    peak, val_loss = peak_flops(device) if dtype == torch.bfloat16 else None, None
    bar = tqdm(total=steps, initial=last, unit="step", disable=quiet or not sys.stderr.isatty())
    # On the device: the sum of the losses since the last log, the steps skipped since then, and those in a row up to now.
    running, bad, streak = torch.tensor(pending, device=device)
    running *= rank == 0  # the processes' sums will be added up
    logged, clock, agreed = (last, seen), time.perf_counter(), False
    with metrics, bar, stop_signals() as stop:
        for batch, count in ahead(draw, zip(range(step, steps), itertools.accumulate(sizes[step:], initial=seen))):
            rate = learning_rate(settings, step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = [batch.part(*cut) for cut in parts(len(batch.tokens), settings.micro_batch)]
            total, norm, wrong = update(loss_module, optimizer, batches, count, path, autocast, settings.clip, synchronise, world)
            running += total.nan_to_num(0, 0, 0) * (1 - wrong)
            bad += wrong
            streak.add_(wrong).mul_(wrong)
            seen += sizes[step]
            step += 1

            evaluating, saving = step % eval_every == 0 or step == steps, step % save_every == 0 and step < steps
            if evaluating or saving or step % log_every == 0:
                if world > 1:
                    signals = torch.tensor(float(bool(stop)), device=device)
                    for value in (running, signals):
                        dist.all_reduce(value)
                    agreed = bool(signals)  # processes stop after the same step
                new, in_a_row = int(bad), int(streak)  # the only wait for the device
                skipped += new
                if in_a_row >= 10:
                    raise BadInput(f"the gradient was not finite in the last {in_a_row} steps up to {step}; try a smaller --lr than "
                                   f"{settings.lr:g} or --dtype fp32. " + (f"{out / 'ckpt.pt'} holds the last state that was saved"
                                                                         if (out / "ckpt.pt").exists() else "Nothing was saved yet"))
                mean_loss = running.item() / max(1, step - logged[0] - new)
                elapsed = time.perf_counter() - clock
                per_second = (seen - logged[1]) / elapsed
                seconds += elapsed
                line = {"step": step, "loss": round(mean_loss, 4), "lr": rate, "grad_norm": round(float(norm), 4),
                        unit: seen * each, f"{unit}_per_second": round(per_second * each), "seconds": round(seconds, 2)}
                if skipped:
                    line["skipped"] = skipped
                if peak:
                    line["mfu"] = round(per_second * flops / peak / world, 4)
                write_line(metrics, line)
                bar.update(step - logged[0])
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {per_second * each:,.0f} {unit}/s"
                                    + (f", MFU {line['mfu']:.0%}" if peak else "")
                                    + (f", {skipped} steps skipped" if skipped else ""))
                running.zero_()
                bad.zero_()
                logged = step, seen
                if evaluating and (rank == 0 or fsdp):  # a model in parts takes all processes
                    val_loss = validation_loss(validation, objective, path, val_set, device, autocast, min(64, settings.micro_batch))
                    write_line(metrics, {"step": step, "val_loss": round(val_loss, 4)})
                    say(f"step {step:6,}  training loss {mean_loss:.3f}  validation loss {val_loss:.3f}  "
                        f"{per_second * each:,.0f} {unit}/s")
                if saving:
                    checkpoint()
                clock = time.perf_counter()  # neither validation nor saving counts as training time
            if agreed or stop and world == 1:
                break
        checkpoint()
    if (stop or agreed) and step < steps:
        say(f"stopped at step {step}; go on with: python train.py --resume --out {shlex.quote(str(out))}")
        return None
    return val_loss if val_loss is not None else math.nan


# ---------------------------------------------------------------------------- one process or many

class LossModule(nn.Module):
    """The loss as a module, which is what the wrappers for several processes take."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch, path):
        return self.function(self.model, batch, path)


def join_group(device):
    """(number of this process, how many there are): torchrun says so in the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and (device is None or str(device).startswith("cuda"))
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=24))  # the first may prepare data
    return int(os.environ.get("RANK", "0")), world


@contextlib.contextmanager
def first_process_first(rank, world):
    """The others enter this block when the first process has left it."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def spread_out(module, device, world, fsdp=False):
    """(module whose gradients are averaged over the processes, function that switches this on for the next backward)."""
    if world == 1:
        return module, lambda on: None
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device.type, (world,))
        for block in module.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module, module.set_requires_gradient_sync
    wrapped = DistributedDataParallel(module)

    def synchronise(on):
        wrapped.require_backward_grad_sync = on  # what its no_sync() does
    return wrapped, synchronise


def clip_gradients(model, largest):
    """Scale all gradients so that their norm is at most `largest`, unless that is 0 -> the norm before, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def take_step(optimizer, wrong):
    """An optimiser step, unless `wrong` is 1. The fused kernels look at it on the device; the others (MPS, FSDP) wait for it."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = wrong
    elif wrong:
        return
    optimizer.step()


def whole(state):
    """A nested state dict whose tensors are all there, in place of FSDP's parts."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def restore(model, optimizer, content):
    """Load a checkpoint's weights and optimiser, cut into FSDP's parts where the model is."""
    parameters = dict(model.named_parameters())

    def like(value, parameter):
        parted = isinstance(parameter, DTensor) and value.shape == parameter.shape
        return distribute_tensor(value, parameter.device_mesh, parameter.placements) if parted else value

    model.load_state_dict({name: like(value, parameters.get(name)) for name, value in content["model"].items()})
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: {name: like(value, ordered[i]) for name, value in entry.items()}
             for i, entry in content["optimizer"]["state"].items()}
    groups = [{**saved, "fused": group["fused"]} for saved, group in zip(content["optimizer"]["param_groups"], optimizer.param_groups)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextlib.contextmanager
def stop_signals():
    """While this is open, Ctrl-C and SIGTERM append to the list it gives instead of ending the process."""
    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def maybe_compiled(compiled, say):
    """loss_sum, compiled if asked for; without a working compiler, a note and the plain function."""
    if not compiled:
        return loss_sum
    try:
        functions = [torch.compile(loss_sum, dynamic=False)]
        torch._dynamo.config.recompile_limit = 64  # every size of a ramped batch is a graph of its own
    except RuntimeError as error:  # this Python or system has no torch.compile
        say(f"note: no torch.compile here ({error}); going on without it")
        return loss_sum

    def call(*args):
        try:
            return functions[-1](*args)
        except Exception as error:
            if functions[-1] is loss_sum or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            say(f"note: torch.compile does not work here ({type(error).__name__}); going on without it")
            functions.append(loss_sum)
            architecture.LONG = math.inf  # nor FlexAttention, which has to be compiled
            return loss_sum(*args)
    return call


def open_metrics(path, step):
    """metrics.jsonl for appending, without the lines after `step` that a run wrote before it was interrupted."""
    kept = []
    if step and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):  # cut off, or no line of ours
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    if path != Path(os.devnull):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
    return open(path, "a")


def write_line(file, content):
    file.write(json.dumps(content) + "\n")
    file.flush()


# ---------------------------------------------------------------------------- command line

def parse(argv):
    """(Settings, everything else). On --resume the run's own settings stand in for what is not given."""
    parser = Parser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        keep = {key: f.metadata[key] for key in ("type", "choices", "action") if key in f.metadata}
        shown = f" (default: {f.default})" if f.default is not None else " (preset)" if f.name in {**TEXT, **PRESETS["vit-tiny"]} else ""
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"] + shown, **keep)
    machine = parser.add_argument_group("run and machine")
    machine.add_argument("--out", help="run folder (default: runs/ and the objective)")
    machine.add_argument("--resume", action="store_true", help="go on with the run in --out")
    machine.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    machine.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    machine.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    machine.add_argument("--compile", action="store_true", default=None, help="torch.compile (default: on CUDA)")
    machine.add_argument("--no-compile", dest="compile", action="store_false")
    machine.add_argument("--fsdp", action="store_true", help="torchrun: spread weights and optimiser over the processes")
    machine.add_argument("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    machine.add_argument("--eval-every", type=positive, default=200, help="steps between validation losses")
    machine.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    machine.add_argument("--no-report", action="store_true", help="skip the perplexity and the sample at the end")
    args = vars(parser.parse_args(argv))
    given = {f.name: value for f in fields(Settings) if (value := args.pop(f.name)) is not None}
    if "steps" in given and "epochs" in given:
        raise BadInput(f"--steps {given['steps']} and --epochs {given['epochs']:g} both set the budget; give one of them")
    if args["resume"]:
        if args["out"] is None or args["overwrite"]:
            raise BadInput("--resume goes on with the run in a folder: give it as --out DIR, without --overwrite")
        with from_this_version(args["out"]):
            saved = asdict(Settings(**load_checkpoint(args["out"])["settings"]))
        wanted = asdict(Settings(**{**(saved if given.get("objective") in (None, saved["objective"]) else {}), **given}))
        changed = [name for name in given if name not in MAY_CHANGE and wanted[name] != saved[name]]
        if changed:
            raise BadInput(f"the run in {args['out']} has other settings: " + ", ".join(
                f"--{name.replace('_', '-')} {saved[name]}, not {wanted[name]}" for name in changed))
        given = {**saved, **({"epochs": None} if "steps" in given else {}), **given}
    settings = Settings(**given)
    objective, path = settings.task()
    if args["out"] is None:
        two = " two-stream" if path == "two-stream" and objective.one_stream else ""
        args["out"] = "runs/" + (describe(objective) + two).replace(" ", "-").replace("=", "")
    return settings, args


def main(argv=None):
    settings, args = parse(argv)
    out, reported = args.pop("out"), not args.pop("no_report")
    try:
        if train(settings, out, compiled=args.pop("compile"), **args) is None:
            return 130  # stopped by Ctrl-C or SIGTERM
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if reported and os.environ.get("RANK", "0") == "0":
        from evaluate import report  # evaluate.py stands above this file; this is a call at the very end
        report(out, args["device"])
    return 0


if __name__ == "__main__":
    import train as module  # the module that evaluate.py imports, so that classes are the same
    command_line(module.main)
