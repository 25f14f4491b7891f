"""Run folders: checkpoints that are whole at every moment, the Run that is evaluated, and the data of a run.

A run folder holds config.json (settings), metrics.jsonl (one line every few steps), ckpt.pt (weights,
optimiser and all else that going on takes), and data/ where raw text was tokenized.
"""

import contextlib
import difflib
import json
import os
import shlex
import shutil
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data import Sequences, load_corpus
from engine.settings import MAY_CHANGE, Settings, resolve
from images.patches import Patches
from images.sets import is_images, load_images
from model import SIZES, VIT_SIZES, Config, Transformer
from objectives import describe
from support.cli import BadInput, dashed
from text.tokenizers import tokenizer_from_json
from text.toy import toy_noise

UNTRAINED = "untrained:"  # before the name of a run: its architecture, freshly initialised
KEYS = {"settings", "model_config", "model", "optimizer", "step", "seen", "seconds", "dtype", "tokenizer"}

# ---------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, content):
    """Write a checkpoint so that at every moment a whole one is there: temporary file, flush, rename. What it
    replaces stays beside it as ckpt.prev.pt."""
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
    folder, path = Path(path), checkpoint_file(path)
    if not path.exists():
        near = similar(folder)
        hint = f"did you mean {' or '.join(near)}?" if near else "train.py writes it"
        raise BadInput(f"{path} does not exist; {hint}")
    previous, instead = path.with_suffix(".prev.pt"), ""
    if previous.exists():
        instead = f". The one before it is there: mv {shlex.quote(str(previous))} {shlex.quote(str(path))}"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        content = torch.load(path, map_location=device, weights_only=True)
        missing = KEYS - set(content)
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{path} is not a whole checkpoint of train.py ({type(error).__name__})"
                       + instead) from None
    if missing:
        raise BadInput(f"{path} is not a whole checkpoint of train.py: it lacks "
                       + ", ".join(sorted(missing)) + instead)
    return content


def checkpoint_file(path):
    """The ckpt.pt of a run folder, or the file itself."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def similar(path):
    """Run folders that somebody who typed `path` may have meant: beside it, or in runs/, and named alike."""
    path, found = Path(path), {}
    for parent in (path.parent, Path("runs")):
        with contextlib.suppress(OSError):
            found.update({folder.name: str(folder) for folder in sorted(parent.iterdir())
                          if (folder / "ckpt.pt").exists()})
    begun = [name for name in found if path.name and name.startswith(path.name)]
    return [found[name] for name in (begun or difflib.get_close_matches(path.name, found))[:3]]


@contextlib.contextmanager
def from_this_version(path):
    """Whatever fails in this block is blamed on the checkpoint."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{path} was written by another version of the code ({reason}); use that one, or "
                       "train anew") from None


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

    @property
    def text(self):
        """Whether it reads text, or images."""
        return self.tokenizer is not None

    @property
    def folder(self):
        """The run folder that its checkpoint lies in."""
        return checkpoint_file(self.name.removeprefix(UNTRAINED)).parent


def load_run(path, device="cpu"):
    """The model, objective and tokenizer of a checkpoint, ready for evaluation; see `untrained`, too."""
    if str(path).startswith(UNTRAINED):
        run = load_run(str(path).removeprefix(UNTRAINED), device)
        return untrained(run, run.settings.seed)  # where that run began
    content = load_checkpoint(path, device)
    with from_this_version(path):
        settings, weights = Settings(**content["settings"]), content["model"]
        config = Config(**content["model_config"])
        task = settings.task()
        with torch.device("meta"):  # compare the sizes before memory is taken for them
            if config.length != settings.positions or config.layers + sum(config.decoder[:1]) > len(weights):
                raise ValueError("its sizes do not fit together")
            Transformer(config).load_state_dict({name: value.to("meta") for name, value in weights.items()})
        model = Transformer(config).to(device)
        model.load_state_dict(weights)
    tokenizer = None if settings.images else tokenizer_from_json(content["tokenizer"])
    return Run(model.eval(), *task, tokenizer, settings, content["step"], str(path))


def untrained(run, seed=None):
    """The Run as it would be before its first step: the same architecture, objective and tokenizer,
    initialised anew from `seed` (default: the run's own). What a task owes to pretraining is the difference
    to this one."""
    device = run.model.query.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.settings.seed if seed is None else seed)
        model = Transformer(run.model.config).to(device).eval()
    return replace(run, model=model, step=0, name=UNTRAINED + run.name.removeprefix(UNTRAINED))


def about(run):
    """What --json says of a checkpoint."""
    return {"step": run.step, "objective": describe(run.objective), "path": run.path}


def resumed(given, out):
    """Settings of the run in `out`, with what was given where that may change."""
    with from_this_version(out):
        saved = Settings(**load_checkpoint(out)["settings"])
        saved.task()
    same = given.get("objective") in (None, saved.objective)
    budget = {"steps": None, "epochs": None} if "steps" in given or "epochs" in given else {}
    wanted = resolve(**{**(asdict(saved) if same else {}), **budget, **given})
    # files may have moved, a model that is drawn from has not
    may_change = MAY_CHANGE if toy_noise(saved.data) is None else MAY_CHANGE - {"data"}
    names = [name for name in given if name not in may_change]
    values = [{**asdict(x), **x.options} for x in (saved, wanted)]
    changed = [f"{dashed(name)} {a}, not {b}" for name in names
               if (a := values[0].get(name)) != (b := values[1][name])]
    if changed:
        raise BadInput(f"the run in {out} has other settings: " + ", ".join(changed))
    return wanted


# ---------------------------------------------------------------------------- data

def keeps_text(settings):
    """Whether the run folder keeps the tokens of raw text."""
    drawn = settings.data == "pydoc" or toy_noise(settings.data) is not None
    raw = not drawn and not (Path(settings.data) / "manifest.json").exists()
    return raw and not settings.images


def load_examples(settings, path, cache, overwrite=False, device="cpu", resume=False):
    """(Config, training and validation sequences, tokenizer). What text and images differ in, as far as
    training goes: both kinds of sequences have `len` and `batch(start, size)` and know their `total` of
    tokens or images."""
    if settings.images != is_images(settings.data):
        raise BadInput(f"--preset {settings.preset} is for {'images' if settings.images else 'text'}, and "
                       f"--data {settings.data} is {'not' if settings.images else 'images'}")
    if settings.images:
        images, size = load_images(settings.data, settings.size), dict(VIT_SIZES[settings.preset])
        size["decoder"] = size["decoder"] if path == "mae" else ()
        config = Config(0, settings.positions, **size, patch=settings.patch, mean=images.mean, std=images.std,
                        norm_pix=settings.norm_pix, blind=settings.blind)
        train = Patches(images.train, config, settings.seed, settings.crop, device)
        return config, train, Patches(images.val, config), None
    needed = None if settings.epochs else int(1.2 * settings.steps * settings.batch_size * settings.length)
    corpus = load_corpus(settings.data, cache, overwrite, needed, resume)
    tokenizer, S = corpus.tokenizer, settings.length
    config = Config(tokenizer.vocab, S, **SIZES[settings.preset], blind=settings.blind)
    train = Sequences(corpus.train, S, tokenizer.separator, settings.seed)
    return config, train, Sequences(corpus.val, S, tokenizer.separator), tokenizer


def open_run_folder(out, settings, steps, fresh, overwrite):
    """Make the run folder, or clear it of the run before, and write config.json."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in ("ckpt.pt", "ckpt.prev.pt"):
            (out / name).unlink(missing_ok=True)
        if overwrite and not keeps_text(settings):
            shutil.rmtree(out / "data", ignore_errors=True)  # an overwritten run's text
    config = {**asdict(settings), "steps": steps, "path": settings.task()[1]}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
