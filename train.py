"""Pretrain a Transformer with any objective.

    python train.py --objective vl --mask 0.15,0.3                  the default corpus, minutes on a CPU
    python train.py --objective dar --t 2 --data data/novels        own text (see data.py)
    python train.py --objective mlm --data shapes                   images (see images.py)
    python train.py --resume --out runs/vl                          go on where that run stopped

Leaves a run folder: config.json (all settings), metrics.jsonl (one line every few steps), ckpt.pt (everything needed to
evaluate or to go on). Which batch and masks a step takes depends on the seed and the step's number only, so a resumed run
repeats the uninterrupted one, on a CPU bit for bit.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.machine import (
    LossModule,
    choose_device,
    choose_dtype,
    first_process_first,
    flops_per_sequence,
    join_group,
    maybe_compiled,
    parameters,
    peak_flops,
    restore,
    spread_out,
    stop_signals,
    whole,
)
from engine.runs import from_this_version, keeps_text, load_checkpoint, load_examples, open_metrics, save, write_line
from engine.settings import MAY_CHANGE, PRESETS, TEXT, Settings
from engine.steps import ahead, clip_gradients, make_optimizer, parts, take_step, warm_cosine
from evaluate import report
from model import Transformer
from objectives import describe, draw_batch, loss_sum
from support.cli import BadInput, Parser, command_line, positive


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
        report(out, args["device"])
    return 0


if __name__ == "__main__":
    command_line(main)
