"""What a run computes: the flags of train.py, the presets, and how the two become one Settings."""

import math
from dataclasses import asdict, dataclass, field, fields, replace

from images.sets import is_images
from model import VIT_SIZES
from objectives import OBJECTIVES, choose_path, describe, from_options
from support.cli import BadInput, dashed, positive, real, seed
from text.toy import POSITIONS, toy_noise

TEXT = {"schedule": "triangle", "warmup": 0.0, "optimizer": "muon", "weight_decay": 0.01, "beta2": 0.98,
        "clip": 0.5, "batch_ramp": 0.0, "length": 128, "mask_rule": "always"}
IMAGES = {"schedule": "cosine", "warmup": 0.05, "optimizer": "adamw", "weight_decay": 0.05, "beta2": 0.95,
          "clip": 0.0, "batch_ramp": 0.0, "crop": 0.2, "norm_pix": False}

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
IMAGE_OPTIONS = {"mlm": {"mask": 0.75}, "vl": {"mask": (0.5, 0.75)}}  # defaults where they differ from text's

MAY_CHANGE = {"steps", "epochs", "micro_batch", "data"}  # on --resume; the data may have moved


def setting(default, text, **arguments):
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, **arguments})


@dataclass(frozen=True)
class Settings:
    """What a run computes. None in a flag: `resolve` takes the preset's. Nothing is checked or looked up
    here, so that a checkpoint's settings read back as they were written, wherever its data is by now."""

    objective: str = setting("ar", "pretraining objective", choices=OBJECTIVES)
    options: dict = field(default_factory=dict)  # of the objective; each has its own flag
    streams: int = setting(None, "1 or 2; 2 runs any objective through two streams (default: 1 if possible)",
                           type=int, choices=(1, 2))
    mask_rule: str = setting(None, "one stream: always = [MASK] at every target, the paper's formula; "
                             "bert = 80%% [MASK], 10%% random, 10%% kept, as large models are trained",
                             choices=("always", "bert"))
    blind: bool = setting(False, "two streams: queries are not told the position that they predict, as in "
                          "the paper's theory", action="store_true")
    data: str = setting("pydoc", "text: pydoc, a file or folder, a token folder of data.py, hf:NAME, or toy, "
                        "the paper's toy model; "
                        "images: shapes, a folder of JPEG or PNG files, or an image folder of data.py")
    preset: str = setting(None, "model size and budget (default: tiny, for images vit-tiny)", choices=PRESETS)
    length: int = setting(None, "text: sequence length S", type=positive)
    size: int = setting(None, "images: side in pixels; others are resized", type=positive)
    patch: int = setting(None, "images: side of a patch in pixels, a divisor of --size", type=positive)
    norm_pix: bool = setting(None, "images: predict pixels relative to the mean and spread of their patch",
                             action="store_true")
    crop: float = setting(None, "images: least share of the area that a random crop keeps; 1 for no cropping",
                          type=real)
    steps: int = setting(None, "optimiser steps", type=positive)
    epochs: float = setting(None, "passes over the data, instead of --steps", type=real)
    batch_size: int = setting(None, "sequences per step", type=positive)
    batch_ramp: float = setting(None, "share of the budget over which the batch grows to its size", type=real)
    micro_batch: int = setting(256, "sequences per forward pass at most; more are accumulated", type=positive)
    lr: float = setting(None, "peak learning rate", type=real)
    schedule: str = setting(None, "triangle: 25%% of the peak, peak at 75%% of the budget, 0; or cosine to 0",
                            choices=("triangle", "cosine"))
    warmup: float = setting(None, "share of the budget over which the learning rate rises from 0", type=real)
    optimizer: str = setting(None, "adamw, or muon for the matrices of the blocks", choices=("adamw", "muon"))
    weight_decay: float = setting(None, "decoupled, on matrices only", type=real)
    beta2: float = setting(None, "of AdamW; its beta1 is 0.9", type=real)
    clip: float = setting(None, "largest norm of the gradient; 0 for no clipping", type=real)
    seed: int = setting(0, "of the initial weights, the order of the data and the masks", type=seed)

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
        objective = from_options(self.objective, **self.options)
        return objective, choose_path(objective, self.streams, self.images)


def add_settings(parser):
    """One flag for each field of Settings, all of them None where they are not given."""
    by_preset = {name for preset in PRESETS.values() for name in preset}
    for f in fields(Settings):
        if "help" not in f.metadata:
            continue
        keep = {key: f.metadata[key] for key in ("type", "choices", "action") if key in f.metadata}
        default = "" if f.default is None else f" (default: {f.default})"
        shown = " (preset)" if f.name in by_preset else default
        parser.add_argument(dashed(f.name), default=None, help=f.metadata["help"] + shown, **keep)


LIMITS = {  # flag -> (what fits, in words)
    "lr": (lambda x: x > 0, "a positive number"),
    "epochs": (lambda x: x > 0, "a positive number"),
    "clip": (lambda x: x >= 0, "a number of at least 0"),
    "weight_decay": (lambda x: x >= 0, "a number of at least 0"),
    "beta2": (lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
    "crop": (lambda x: 0 < x <= 1, "in 0..1, 0 excluded"),
    "batch_ramp": (lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
    "warmup": (lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
    "steps": (lambda x: x <= 10 ** 8, "at most 100 million"),
}


def resolve(**given):
    """Settings from what was given by name, the objective's own options included; the preset does the rest.

    resolve(objective="vl", mask=(0.15, 0.3), steps=100) has options {"mask": (0.15, 0.3)}. Raises BadInput
    where things do not fit together, in a sentence that names the flag.
    """
    known = {f.name for f in fields(Settings)}
    options = {**given.pop("options", {}), **{name: given[name] for name in given if name not in known}}
    given = {name: value for name, value in given.items() if name in known and value is not None}
    if "steps" in given and "epochs" in given:
        raise BadInput(f"--steps {given['steps']} and --epochs {given['epochs']:g} both set the budget; "
                       "give one of them")
    is_toy = toy_noise(given.get("data")) is not None
    if is_toy and given.setdefault("length", POSITIONS) != POSITIONS:
        raise BadInput(f"--length {given['length']} does not go with --data {given['data']}, whose sequences "
                       f"have {POSITIONS} tokens: leave it out")
    settings = Settings(**given)
    if "preset" not in given:
        settings = replace(settings, preset="vit-tiny" if is_images(settings.data) else "tiny")
    if settings.preset not in PRESETS:
        raise BadInput(f"there is no --preset {settings.preset}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[settings.preset]
    for name in ("length", "mask_rule") if settings.images else ("size", "patch", "norm_pix", "crop"):
        if given.get(name):
            raise BadInput(f"{dashed(name)} does not go with --preset {settings.preset} on --data "
                           f"{settings.data}")
    if settings.images:
        options = {**IMAGE_OPTIONS.get(settings.objective, {}),
                   **{k: v for k, v in options.items() if v is not None}}
    settings = replace(settings, options=options)
    objective, path = settings.task()
    if path != "mask" and settings.mask_rule is not None:
        raise BadInput(f"--mask-rule {settings.mask_rule} is for masks in one stream; {describe(objective)} "
                       f"runs as {path}: leave it out")
    if settings.blind and path != "two-stream":
        raise BadInput(f"--blind is about the queries of two streams; {describe(objective)} runs as {path}: "
                       "add --streams 2")
    unused = [] if path == "mask" else ["mask_rule"]
    unused += ["steps", "epochs"] if "steps" in given or "epochs" in given else []
    filled = {name: value for name, value in preset.items() if name not in given and name not in unused}
    settings = replace(settings, **filled, options=asdict(objective))
    check_settings(settings, objective)
    return settings


def check_settings(settings, objective):
    """Raise BadInput where a number is out of its range, or the sizes do not fit the objective."""
    for name, (fits, words) in LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not (fits(value) and value < math.inf):
            raise BadInput(f"{dashed(name)} {value:g} is not {words}")
    if settings.images and (settings.size % settings.patch or settings.size < 2 * settings.patch):
        raise BadInput(f"--patch {settings.patch} does not divide images of --size {settings.size} into two "
                       "or more")
    objective.check(settings.positions)
