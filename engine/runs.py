"""engine.runs."""
import contextlib
import json
import os
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data import Sequences, load_corpus
from engine.settings import Settings
from images.patches import Patches
from images.sets import is_images, load_images
from model import SIZES, VIT_SIZES, Config, Transformer
from objectives import describe
from support.cli import BadInput
from text.tokenizers import tokenizer_from_json

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


def about(run):
    """What --json says of a checkpoint."""
    return {"step": run.step, "objective": describe(run.objective), "path": run.path}
