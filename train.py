"""Pretrain a Transformer with any objective.

    python train.py --objective vl --mask 0.15,0.3                  the default corpus, minutes on a CPU
    python train.py --objective dar --t 2 --data data/novels        own text (see data.py)
    python train.py --resume --out runs/vl                          go on where that run stopped

Leaves a run folder: config.json (all settings), metrics.jsonl (one line every few steps), ckpt.pt (everything needed to
evaluate or to go on). What a step does depends on the seed and the step's number only, never on the past, so a resumed
run repeats the uninterrupted one.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

from data import Sequences, load_corpus, tokenizer_from_json
from masks import BadInput, Parser, command_line, positive, ratios, seed
from model import SIZES, Config, Transformer, flops_per_sequence, parameters
from objectives import OBJECTIVES, choose_path, describe, draw_batch, from_options, loss_sum

PRESETS = {  # a size of model.py and a budget that suits it
    "tiny": {"length": 128, "batch_size": 16, "steps": 1800, "lr": 2e-3},
    "mini": {"length": 128, "batch_size": 64, "steps": 3000, "lr": 2e-3},
    "small": {"length": 128, "batch_size": 256, "steps": 20_000, "lr": 1e-3},
    "base": {"length": 128, "batch_size": 1024, "steps": 50_000, "lr": 1e-3},
    "paper": {"length": 128, "batch_size": 8192, "steps": 100_000, "lr": 1e-3, "batch_ramp": 0.6},
}

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
    t: int = option(None, "dar: tokens predicted in parallel (default: 2)", type=positive)
    mask: tuple = option(None, "mlm: ratio of hidden tokens (default: 0.15); vl: its range (default: 0.15,0.3)", type=ratios)
    streams: int = option(None, "1 or 2; 2 runs any objective through two streams (default: 1 where possible)",
                          type=int, choices=(1, 2))
    mask_rule: str = option(None, "masks in one stream: bert = 80%% [MASK], 10%% random, 10%% kept; always = [MASK], the "
                            "paper's formula (default: bert)", choices=("bert", "always"))
    data: str = option("pydoc", "pydoc, a text file or folder, a token folder of data.py, or hf:NAME")
    preset: str = option("tiny", "model size and budget", choices=PRESETS)
    length: int = option(None, "sequence length S", type=positive)
    steps: int = option(None, "optimiser steps", type=positive)
    epochs: float = option(None, "passes over the data, instead of --steps", type=float)
    batch_size: int = option(None, "sequences per step", type=positive)
    batch_ramp: float = option(None, "share of the budget over which the batch grows to its size", type=float)
    micro_batch: int = option(256, "sequences per forward pass at most; the rest is accumulated", type=positive)
    lr: float = option(None, "peak learning rate", type=float)
    schedule: str = option("triangle", "triangle: 25%% of the peak, peak at 75%% of the budget, 0; or cosine to 0",
                           choices=("triangle", "cosine"))
    warmup: float = option(0.0, "share of the budget over which the learning rate also rises from 0", type=float)
    weight_decay: float = option(0.01, "decoupled, on matrices only", type=float)
    clip: float = option(0.5, "largest norm of the gradient", type=float)
    seed: int = option(0, "of the initial weights, the order of the data and the masks", type=seed)

    def __post_init__(self):
        """Fill in what was left open, and refuse what does not fit together."""
        objective, path = self.task()
        defaults = {"t": getattr(objective, "t", None), "batch_ramp": 0.0, **PRESETS[self.preset]}
        if path == "mask":
            defaults["mask_rule"] = "bert"
        elif self.mask_rule is not None:
            raise BadInput(f"--mask-rule {self.mask_rule} is for masks in one stream; {describe(objective)} runs as {path}: "
                           "leave it out")
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "mask", getattr(objective, "mask", None))
        objective.check(self.length)
        for name, fits, text in (("lr", lambda x: 0 < x < math.inf, "a positive number"),
                                 ("clip", lambda x: x > 0, "a positive number"),
                                 ("epochs", lambda x: 0 < x < math.inf, "a positive number"),
                                 ("weight_decay", lambda x: 0 <= x < math.inf, "a number of at least 0"),
                                 ("steps", lambda x: x <= 10 ** 8, "at most 100 million"),
                                 ("batch_ramp", lambda x: 0 <= x < 1, "in 0..1, 1 excluded"),
                                 ("warmup", lambda x: 0 <= x < 1, "in 0..1, 1 excluded")):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise BadInput(f"--{name.replace('_', '-')} {value:g} is not {text}")

    def task(self):
        """(objective, which of model.PATHS runs it)."""
        objective = from_options(self.objective, t=self.t, mask=self.mask)
        return objective, choose_path(objective, self.streams)


MAY_CHANGE = {"steps", "epochs", "micro_batch", "data"}  # on --resume; the data may have moved


# ---------------------------------------------------------------------------- schedules

def learning_rate(settings, progress):
    """The rate at `progress` in 0..1 through the budget."""
    if settings.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:  # the Cramming protocol's one cycle
        share = 0.25 + progress if progress < 0.75 else 4 * (1 - progress)
    return settings.lr * share * (min(1, progress / settings.warmup) if settings.warmup else 1)


def batch_sizes(settings, steps):
    """The number of sequences of every step: it grows by sixteenths of the full batch over the first `batch_ramp`."""
    full, sixteenth = settings.batch_size, max(1, settings.batch_size // 16)
    if not settings.batch_ramp:
        return [full] * steps
    return [min(full, sixteenth * (1 + int(16 * step / (steps * settings.batch_ramp)))) for step in range(steps)]


def steps_for(settings, sequences):
    """The fewest steps whose batches make up that many sequences."""
    steps = math.ceil(sequences / settings.batch_size)
    if steps > 10 ** 8:
        raise BadInput(f"--epochs {settings.epochs:g} are more than 100 million steps")
    while (missing := sequences - sum(batch_sizes(settings, steps))) > 0:
        steps += math.ceil(missing / settings.batch_size)
    return steps


def parts(size, micro):
    """Cut a batch into as few equal parts of at most `micro` as possible; sizes differ by one at most."""
    count = math.ceil(size / micro)
    edges = [size * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


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
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(768, 768, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32


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
    """Write a checkpoint so that the old file stays whole until the new one is: temporary file, flush, rename."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path, device="cpu"):
    """Read a run folder's ckpt.pt, or such a file. Nothing in it is executed (weights_only)."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise BadInput(f"{path} does not exist; train.py writes it")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        missing = {"settings", "model_config", "model", "optimizer", "step", "seen", "seconds", "dtype", "tokenizer",
                   "train_tokens"} - set(content)
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{path} is not a whole checkpoint of train.py ({type(error).__name__})") from None
    if missing:
        raise BadInput(f"{path} is not a whole checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return content


@dataclass
class Run:
    """A trained model with what is needed to evaluate it."""

    model: Transformer
    objective: object
    path: str
    tokenizer: object
    settings: Settings
    step: int
    name: str


def load_run(path, device="cpu"):
    """The model, objective and tokenizer of a checkpoint, ready for evaluation."""
    content = load_checkpoint(path, device)
    try:
        settings = Settings(**content["settings"])
        model = Transformer(Config(**content["model_config"])).to(device)
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError) as error:
        raise BadInput(f"{path} was written by another version of the code: {str(error).splitlines()[0]}") from None
    return Run(model.eval(), *settings.task(), tokenizer_from_json(content["tokenizer"]), settings, content["step"], str(path))


# ---------------------------------------------------------------------------- training

def make_optimizer(model, settings):
    """AdamW with the protocol's betas and epsilon; vectors (norms, query, position scale) do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=settings.lr, betas=(0.9, 0.98), eps=1e-12,
                             fused=matrices[0].device.type in ("cuda", "cpu"))


@torch.no_grad()
def validation_loss(model, objective, path, sequences, vocab, device, autocast, count=256, batch=64):
    """Mean loss over the targets of the first `count` validation sequences, the same f at every call, [MASK] at every
    target whatever the mask rule."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    total = targets = 0
    for start in range(0, min(count, len(sequences)), batch):
        tokens = sequences.batch(start, min(batch, len(sequences) - start))
        drawn = draw_batch(objective, path, tokens, vocab, generator, "always").to(device)
        with autocast():
            total += loss_sum(model, drawn, path).item()
        targets += drawn.weight.sum().item()
    model.train()
    return total / targets


def train(settings, out, resume=False, overwrite=False, device=None, dtype=None, compiled=None, log_every=10,
          eval_every=200, save_every=500, quiet=False):
    """Train to the end of the budget. Returns the last validation loss, or None where a signal stopped the run first.

    `settings` is a Settings, `out` the run folder. Everything else concerns the machine and the reports only.
    """
    out, (objective, path) = Path(out), settings.task()

    def say(text):
        if not quiet:
            tqdm.write(text, file=sys.stderr)

    if not resume and not overwrite and (out / "ckpt.pt").exists():
        raise BadInput(f"{out} holds a run; go on with it with --resume --out {out}, replace it with --overwrite, or "
                       "choose another --out")
    device = choose_device(device)
    compiled = device.type == "cuda" if compiled is None else compiled
    content = load_checkpoint(out, device) if resume else None
    dtype = choose_dtype(device, dtype or (content and content["dtype"]))
    torch.set_float32_matmul_precision("high")

    steps = settings.steps
    needed = None if settings.epochs else int(1.2 * steps * settings.batch_size * settings.length)
    corpus = load_corpus(settings.data, out / "data", overwrite, needed)
    if content and (content["tokenizer"], content["train_tokens"]) != (corpus.tokenizer.to_json(), len(corpus.train)):
        raise BadInput(f"{settings.data} is not the data of the run in {out}: other tokens or another tokenizer")
    vocab, separator = corpus.tokenizer.vocab, corpus.tokenizer.separator
    train_set = Sequences(corpus.train, settings.length, separator, settings.seed)
    val_set = Sequences(corpus.val, settings.length, separator)
    if settings.epochs is not None:
        steps = steps_for(settings, settings.epochs * len(train_set))
    sizes = batch_sizes(settings, steps)

    torch.manual_seed(settings.seed)
    config = Config(vocab=vocab, length=settings.length, **SIZES[settings.preset])
    model = Transformer(config).to(device)
    optimizer = make_optimizer(model, settings)
    step, seen, seconds = 0, 0, 0.0
    if content:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        step, seen, seconds = content["step"], content["seen"], content["seconds"]
        if step >= steps:
            raise BadInput(f"{out} is at step {step} of {steps}; give more with --steps to go on")
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / "ckpt.pt").unlink(missing_ok=True)
        if corpus.name != str(out / "data"):
            shutil.rmtree(out / "data", ignore_errors=True)  # an overwritten run's text
    metrics = open_metrics(out / "metrics.jsonl", step)
    (out / "config.json").write_text(json.dumps({**asdict(settings), "steps": steps, "path": path}, indent=1) + "\n")

    say(f"{describe(objective)} ({path}), {parameters(model)[0] / 1e6:.2f}M parameters, vocabulary {vocab:,}, "
        f"{len(corpus.train):,} training tokens; {device.type} {str(dtype)[6:]}{' compiled' if compiled else ''}")

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def draw(step, seen):
        """The batch of a step, and its number of targets."""
        tokens = train_set.batch(seen, sizes[step])
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        batch = draw_batch(objective, path, tokens, vocab, generator, settings.mask_rule)
        count = float(batch.weight.sum())
        return (batch.pinned() if device.type == "cuda" else batch), count

    def checkpoint():
        save(out / "ckpt.pt", {
            "settings": asdict(settings), "model_config": asdict(config), "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "step": step, "seen": seen, "seconds": seconds,
            "dtype": "bf16" if dtype == torch.bfloat16 else "fp32",
            "tokenizer": corpus.tokenizer.to_json(), "train_tokens": len(corpus.train)})

    loss_function = maybe_compiled(compiled, say)
    flops = flops_per_sequence(config, path, settings.length, objective.max_targets(settings.length))
    peak, val_loss = peak_flops(device) if dtype == torch.bfloat16 else None, None
    bar = tqdm(total=steps, initial=step, unit="step", disable=quiet or not sys.stderr.isatty())
    running, logged, clock = torch.zeros((), device=device), (step, seen), time.perf_counter()
    with ThreadPoolExecutor(1) as pool, metrics, bar, stop_signals() as stop:
        ahead = pool.submit(draw, step, seen)
        while step < steps and not stop:
            batch, count = ahead.result()
            if step + 1 < steps:
                ahead = pool.submit(draw, step + 1, seen + sizes[step])  # while the device is busy with this one
            rate = learning_rate(settings, step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for first, last in parts(sizes[step], settings.micro_batch):
                with autocast():
                    loss = loss_function(model, batch.part(first, last).to(device), path) / count
                loss.backward()
                running += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += sizes[step]
            step += 1

            evaluating, saving = step % eval_every == 0 or step == steps, step % save_every == 0 and step < steps
            if evaluating or saving or step % log_every == 0:
                mean_loss = running.item() / (step - logged[0])  # the only wait for the device
                if not math.isfinite(mean_loss):
                    raise BadInput(f"the loss is {mean_loss} at step {step}; try a smaller --lr than {settings.lr:g}. "
                                   f"{out / 'ckpt.pt'}, if there is one, holds the state before")
                elapsed = time.perf_counter() - clock
                per_second = (seen - logged[1]) / elapsed
                seconds += elapsed
                line = {"step": step, "loss": round(mean_loss, 4), "lr": rate, "grad_norm": round(float(norm), 4),
                        "tokens": seen * settings.length, "tokens_per_second": round(per_second * settings.length),
                        "seconds": round(seconds, 2)}
                if peak:
                    line["mfu"] = round(per_second * flops / peak, 4)
                write_line(metrics, line)
                bar.update(step - logged[0])
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {line['tokens_per_second']:,} tokens/s"
                                    + (f", MFU {line['mfu']:.0%}" if peak else ""))
                running.zero_()
                if evaluating:
                    val_loss = validation_loss(model, objective, path, val_set, vocab, device, autocast)
                    write_line(metrics, {"step": step, "val_loss": round(val_loss, 4)})
                    say(f"step {step:6,}  training loss {mean_loss:.3f}  validation loss {val_loss:.3f}  "
                        f"{line['tokens_per_second']:,} tokens/s")
                if saving:
                    checkpoint()
                logged, clock = (step, seen), time.perf_counter()  # neither validation nor saving counts as training time
        checkpoint()
    if stop and step < steps:
        say(f"stopped at step {step}; go on with: python train.py --resume --out {shlex.quote(str(out))}")
        return None
    return val_loss


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
            return loss_sum(*args)
    return call


def open_metrics(path, step):
    """metrics.jsonl for appending, without the lines after `step` that a run wrote before it was interrupted."""
    kept = []
    if step and path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    path.write_text("".join(kept))
    return open(path, "a")


def write_line(file, content):
    file.write(json.dumps(content) + "\n")
    file.flush()


# ---------------------------------------------------------------------------- command line

def parse(argv):
    """(Settings, everything else). On --resume the run's own settings stand in for what is not given."""
    parser = Parser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        keep = {key: f.metadata[key] for key in ("type", "choices") if key in f.metadata}
        shown = f" (default: {f.default})" if f.default is not None else " (preset)" if f.name in PRESETS["paper"] else ""
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=f.metadata["help"] + shown, **keep)
    machine = parser.add_argument_group("run and machine")
    machine.add_argument("--out", help="run folder (default: runs/ and the objective)")
    machine.add_argument("--resume", action="store_true", help="go on with the run in --out")
    machine.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    machine.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    machine.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    machine.add_argument("--compile", action="store_true", default=None, help="torch.compile (default: on CUDA)")
    machine.add_argument("--no-compile", dest="compile", action="store_false")
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
        saved = load_checkpoint(args["out"])["settings"]
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
    if train(settings, out, compiled=args.pop("compile"), **args) is None:
        return 130  # stopped by Ctrl-C or SIGTERM
    if reported:
        from evaluate import report  # evaluate.py stands above this file; this is a call at the very end
        report(out, args["device"])
    return 0


if __name__ == "__main__":
    import train as module  # the module that evaluate.py imports, so that classes are the same
    command_line(module.main)
