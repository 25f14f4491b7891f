"""engine.settings."""
import math
from dataclasses import dataclass, field

from images.sets import is_images
from model import VIT_SIZES
from objectives import OBJECTIVES, choose_path, describe, from_options
from support.cli import BadInput, group_size, positive, ratios, seed

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
