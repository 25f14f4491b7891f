"""Pretrain a Transformer with any objective.

    python train.py --objective vl --mask 0.15,0.3                  the default corpus, minutes on a CPU
    python train.py --objective dar --t 2 --data data/novels        own text (see data.py)
    python train.py --objective mlm --data shapes                   images (see images.py)
    python train.py --resume --out runs/vl-0.15,0.3                 go on where that run stopped
    torchrun --nproc_per_node=8 train.py --preset base ...          DistributedDataParallel, or --fsdp

Leaves a run folder: config.json (all settings), metrics.jsonl (one line every few steps), ckpt.pt (everything
needed to evaluate or to go on). The batch and the masks of a step depend on the seed and the step alone, so
that a resumed run repeats the uninterrupted one, on a CPU bit for bit.
"""

import contextlib
import inspect
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import prefetch
from model import Transformer
from objectives import add_options, describe, draw_batch, loss_sum
from run import (
    add_settings,
    choose_autocast,
    choose_device,
    load_checkpoint,
    load_examples,
    resolve,
    resumed,
    save_checkpoint,
    warmup_cosine,
)
from util import BadInput, Parser, command_line, import_optional, note, positive, write_text

# ---------------------------------------------------------------------------- schedules

def learning_rate(settings, progress):
    """The rate at `progress` in 0..1 through the budget."""
    if settings.schedule == "cosine":
        return settings.lr * warmup_cosine(progress, settings.warmup)
    share = 0.25 + progress if progress < 0.75 else 4 * (1 - progress)  # the Cramming protocol's one cycle
    return settings.lr * share * (min(1, progress / settings.warmup) if settings.warmup else 1)


def batch_sizes(settings, steps):
    """The number of sequences of every step, which grows by sixteenths over the first `batch_ramp`."""
    full, ramp = settings.batch_size, steps * settings.batch_ramp
    if not ramp:
        return [full] * steps
    return [math.ceil(full * min(16, 1 + int(16 * step / ramp)) / 16) for step in range(steps)]


def steps_for(settings, sequences):
    """The fewest steps whose batches make up that many sequences."""
    steps = math.ceil(sequences / settings.batch_size)
    while (missing := sequences - sum(batch_sizes(settings, steps))) > 0:
        steps += math.ceil(missing / settings.batch_size)
    return steps


# ---------------------------------------------------------------------------- optimizers

class Muon(torch.optim.AdamW):
    """AdamW, but groups marked `orthogonal` take Muon's step (Jordan et al. 2024): Nesterov momentum made
    orthogonal, with the root mean square of AdamW's step (Liu et al. 2025)."""

    RATE, MOMENTUM = 1.5, 0.9  # its rate over AdamW's, and the share of the old gradients that it keeps

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects its own state everywhere

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if "orthogonal" not in group:
                continue
            todo, updates = [p for p in group["params"] if p.grad is not None], []
            for p in todo:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                updates.append(full_tensor(p.grad.lerp(momentum, self.MOMENTUM)))
                p.grad = None  # AdamW passes over it
            for p, update in zip(todo, orthogonal(updates)):
                update = update * group["lr"]
                if hasattr(p, "full_tensor"):  # FSDP: each process keeps its own part
                    from torch.distributed.tensor import distribute_tensor
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
        super().step()


def orthogonal(matrices, steps=5):
    """A matrix U S V^T each -> about 0.2 sqrt(longer side) U V^T, whose elements have root mean square 0.2.
    Those of one shape are stacked, which a GPU does at once."""
    wide = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]
    for shape in {m.shape for m in wide}:
        places = [i for i, m in enumerate(wide) if m.shape == shape]
        x = torch.stack([wide[i] for i in places])
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):  # Newton-Schulz: all singular values s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
        for i, m in zip(places, x * (0.2 * shape[1] ** 0.5)):
            wide[i] = m
    return [w.T if m.shape[0] > m.shape[1] else w for m, w in zip(matrices, wide)]


def full_tensor(x):
    """All of a tensor of which FSDP may have left this process a shard."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def make_optimizer(model, settings):
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest. Vectors do not decay."""
    decay, named = settings.weight_decay, list(model.named_parameters())
    inner = [p for name, p in named if settings.optimizer == "muon" and p.dim() == 2 and "blocks." in name]
    rest = [p for _, p in named if p not in set(inner)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    if inner:
        groups.append({"params": inner, "scale": Muon.RATE, "weight_decay": decay / Muon.RATE,
                       "orthogonal": True})
    # the fused kernels round in their own way, and a run repeats only with what it began with
    fused = rest[0].device.type in ("cuda", "cpu") and not hasattr(rest[0], "full_tensor")
    return (Muon if inner else torch.optim.AdamW)(groups, lr=settings.lr, betas=(0.9, settings.beta2),
                                                  eps=1e-12, fused=fused)


# ---------------------------------------------------------------------------- one step, and validation

class LossModule(nn.Module):
    """The loss as a module, which is what the wrappers for several processes take."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch, path):
        return self.function(self.model, batch, path)


def update(loss_module, optimizer, batches, count, path, autocast, clip, rate, world=1):
    """One optimizer step on the mean loss over the `count` targets of all `batches`, whose gradients add up
    -> this process's part of the loss, and the norm of the gradient before clipping, both on the device."""
    device = next(loss_module.parameters()).device
    total = torch.zeros((), device=device)
    for batch in batches:
        if hasattr(loss_module, "set_requires_gradient_sync"):  # FSDP: gradients are averaged at the last one
            loss_module.set_requires_gradient_sync(batch is batches[-1])
        elif world > 1:                                         # DDP: what its no_sync() does
            loss_module.require_backward_grad_sync = batch is batches[-1]
        with autocast():
            loss = loss_module(batch.to(device), path) / count
        (loss * world).backward()  # the processes' gradients are averaged, their losses summed
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(loss_module.parameters(), clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    with autocast():  # for Muon's matrix products; parameters and averages stay fp32
        optimizer.step()
    optimizer.zero_grad()
    return total, full_tensor(norm)


@torch.no_grad()
def validation_loss(loss_module, objective, path, sequences, device, autocast, micro, count=256):
    """Mean loss over the targets of the first `count` validation sequences: the same f at every call and for
    every `micro`, and [MASK] at every target whatever the mask rule. What fills up a text does not count."""
    model, generator = loss_module.model.eval(), torch.Generator().manual_seed(0)
    total, targets, count = 0.0, 0.0, min(count, len(sequences))
    for first in range(0, count, 64):  # drawn 64 at a time, whatever `micro`
        size = min(64, count - first)
        batch = draw_batch(objective, path, sequences.batch(first, size), model.config.vocab, generator,
                           lengths=sequences.lengths(first, size))
        targets += batch.weight.sum().item()
        for k in range(0, size, micro):
            with autocast():
                total += loss_module(batch.part(k, k + micro).to(device), path).item()
    model.train()
    if not targets:
        raise BadInput(f"{sequences.total} tokens for validation are too few: none of them is predicted")
    return total / targets


# ---------------------------------------------------------------------------- processes and their state

def join_processes(device):
    """(this process's device, the number of processes that torchrun started, which of them this is)."""
    device, world = choose_device(device), int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        return device, 1, 0
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise BadInput(f"WORLD_SIZE={world} without {', '.join(missing)}: start processes with torchrun")
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, world, dist.get_rank()


def wrap_distributed(module, device, world, fsdp, sizes):
    """The module, its gradients averaged over processes that share batches of `sizes`; FSDP shards it."""
    if uneven := [size for size in sizes if size < world or fsdp and size % world]:
        raise BadInput(f"a batch of {uneven[0]} sequences cannot be cut for {world} processes"
                       + " in equal parts" * fsdp + "; give another --batch-size")
    if fsdp and world == 1:
        raise BadInput("--fsdp shards over several processes; start them with torchrun --nproc_per_node=N")
    if not fsdp:
        return nn.parallel.DistributedDataParallel(module) if world > 1 else module
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(device.type, (world,))
    for block in module.model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def full_state(model, optimizer, world):
    """{"model", "optimizer"}: their state by the parameters' names, whole though there are many processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=world > 1)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))


def load_state(model, optimizer, saved):
    """Set what `full_state` gave; each process of FSDP keeps its shard."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]  # this machine's, not the one's that wrote it
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                   options=StateDictOptions(full_state_dict=True))


# ---------------------------------------------------------------------------- the run folder, signals, output

def load_saved(out, resume, overwrite):
    """The checkpoint that a resumed run goes on from, {} for a new run. Before any work this refuses a folder
    that cannot be written, is in use, or holds what is not to be replaced."""
    there = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{there} is not a folder that can be written; choose another --out")
    config, metrics, checkpoint = out / "config.json", out / "metrics.jsonl", out / "ckpt.pt"
    if metrics.is_file():
        with open(metrics, "rb") as file:
            lock(file, "LOCK_SH")
    if resume:
        saved = load_checkpoint(out)
        if "total" not in saved:
            raise BadInput(f"{out} was written by an earlier version: it can be evaluated, but not resumed")
        return saved
    if checkpoint.exists() and not overwrite:
        raise BadInput(f"{out} holds a run; --resume goes on with it, --overwrite replaces it")
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    if '"objective":' not in text or '"preset":' not in text:  # not the config.json of a run
        for file in (config, metrics, checkpoint, out / "completed.png"):  # the last one is of the report
            if os.path.lexists(file):
                raise BadInput(f"{file} was not written by train.py; choose another --out")
    return {}


def lock(metrics, how="LOCK_EX"):
    """Until this file is closed no other training writes into its folder."""
    try:
        import fcntl
        fcntl.flock(metrics, getattr(fcntl, how) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another training is writing {metrics.name}; choose another --out") from None
    except (ImportError, OSError):  # Windows and some file systems know no such lock
        pass


@contextlib.contextmanager
def run_folder(out, config, step, new):
    """Lock the folder and write config.json -> metrics.jsonl to append to, without the lines after `step`,
    which were not saved. `new` ends both names while they stand beside those of a run that is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"metrics.jsonl{new}", "a+") as metrics:
        lock(metrics)
        if not step and not new and (out / "ckpt.pt").exists():
            raise BadInput(f"another training has filled {out} meanwhile; choose another --out")
        write_text(out / f"config.json{new}", json.dumps(config, indent=1) + "\n")
        metrics.seek(0)
        lines = [line for line in metrics if line.endswith("}\n")]  # the last may be cut off
        metrics.truncate(sum(len(line) for line in lines if json.loads(line)["step"] <= step))
        yield metrics


@contextlib.contextmanager
def stop_signals():
    """While this is open, Ctrl-C, SIGTERM and a terminal that is closed (but for nohup) append to the list it
    gives instead of ending the process. Python gives signals to the main thread alone."""
    stop, wanted = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        wanted = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in wanted}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class PatientStderr:
    """Standard error whose reader may go away: the training does not end with it."""

    def __init__(self, file):
        self.file = file or io.StringIO()  # None: it was closed from the start

    def write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            self.file = io.StringIO()

    def __getattr__(self, name):
        return getattr(self.file, name)


def open_board(out, step):
    """A TensorBoard writer into the run folder."""
    import_optional("tensorboard")
    return import_optional("torch.utils.tensorboard").SummaryWriter(str(out), purge_step=step + 1)


# ---------------------------------------------------------------------------- a run

def train(settings, out, *, resume=False, overwrite=False, device=None, dtype=None, compiled=None, fsdp=False,
          threads=None, log_every=10, eval_every=200, save_every=500, tensorboard=False, quiet=False):
    """Train to the end of the budget -> the last validation loss, or None where a signal stopped the run.

    Started by torchrun, each of W processes takes its part of every batch; the first one writes the folder.
    """
    # where it runs, and what it goes on from
    out = Path(out)
    if settings.preset is None:
        settings = resolve(**vars(settings))
    saved = load_saved(out, resume, overwrite)
    device, world, rank = join_processes(device)
    is_main = rank == 0
    autocast, precision = choose_autocast(device, dtype or saved.get("dtype"))
    torch.set_num_threads(threads or saved.get("threads") or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")

    # what is learned from what
    objective, path = settings.task()
    budget = saved.get("budget") or {"steps": settings.steps, "epochs": settings.epochs}
    config, train_set, val_set, tokenizer = load_examples(replace(settings, **budget), path, device)
    data = {"tokenizer": tokenizer and tokenizer.to_json(), "total": train_set.total}
    if saved and data != {name: saved[name] for name in data}:
        raise BadInput(f"{settings.data} is not the data of the run in {out}: its amount or tokenizer differ")
    steps = steps_for(settings, settings.epochs * len(train_set)) if settings.epochs else settings.steps
    step, seen, seconds = (saved.get(name, 0) for name in ("step", "seen", "seconds"))
    if step >= steps:
        raise BadInput(f"{out} is at step {step} of {steps}; give more with --steps to go on")
    sizes, micro, clip = batch_sizes(settings, steps), settings.micro_batch, settings.clip

    # the model, its loss and its optimizer
    torch.manual_seed(settings.seed)  # right before the weights are drawn
    model = Transformer(config).to(device)
    if path in ("causal", "mae"):
        model.query.requires_grad_(False)  # these read it nowhere
    function = loss_sum
    if compiled or compiled is None and device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # every size of a ramped batch is a graph of its own
        function = torch.compile(loss_sum, dynamic=False)
    loss_module = wrap_distributed(LossModule(model, function), device, world, fsdp, sizes)
    val_module = loss_module if fsdp else LossModule(model, loss_sum)
    optimizer = make_optimizer(model, settings)
    if saved:
        load_state(model, optimizer, saved)

    def draw(place):
        """This process's part of the batch of a step, and the number of targets of the whole batch."""
        step, seen = place
        size, part = sizes[step], slice(sizes[step] * rank // world, sizes[step] * (rank + 1) // world)
        tokens = train_set.batch(seen, size, part)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        batch = draw_batch(objective, path, tokens, config.vocab, generator, settings.mask_rule, size, part,
                           train_set.lengths(seen, size))
        return batch.pin_memory() if device.type == "cuda" else batch, batch.total[0].item() or 1.0

    def save():
        """The checkpoint, of which every process gathers its part and the first one writes."""
        state = full_state(model, optimizer, world)
        if is_main:
            save_checkpoint(out / "ckpt.pt", {
                **state, **data, "settings": settings.to_dict(), "model_config": asdict(config),
                "budget": budget, "step": step, "seen": seen, "seconds": seconds, "dtype": precision,
                "threads": torch.get_num_threads()})
            for name in ("config.json", "metrics.jsonl"):  # take the names of the run that is replaced
                if new and (out / f"{name}{new}").exists():
                    os.replace(out / f"{name}{new}", out / name)

    def say(text):  # above the bar
        if is_main and not quiet:
            tqdm.write(text, file=sys.stderr)

    # what is written: from here on the folder is this run's
    new = ".new" if overwrite and (out / "ckpt.pt").exists() else ""
    config_json = {**settings.to_dict(), "steps": steps, "path": path}
    unit, each = ("images", 1) if settings.images else ("tokens", config.length)
    losses, logged, logged_seen, val_loss = torch.zeros((), device=device), step, seen, 0.0
    seen_before, clock = itertools.accumulate(sizes[step:], initial=seen), time.perf_counter()
    with (run_folder(out, config_json, step, new) if is_main else io.StringIO() as metrics,
          stop_signals() as stop,
          tqdm(total=steps, initial=step, unit="step", disable=quiet or not is_main,
               mininterval=1 if sys.stderr.isatty() else 10) as bar,
          open_board(out, step) if tensorboard and is_main else contextlib.nullcontext() as board):
        say(f"{describe(objective)} ({path}), {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{train_set.total:,} training {unit}; {world} x {device.type} {precision}; "
            f"{steps - step:,} steps")
        for batch, count in prefetch(draw, zip(range(step, steps), seen_before)):
            rate = learning_rate(settings, step / steps)
            batches = [batch.part(k, k + micro) for k in range(0, len(batch.tokens), micro)]
            loss, norm = update(loss_module, optimizer, batches, count, path, autocast, clip, rate, world)
            losses, seen, step = losses + loss, seen + sizes[step], step + 1
            bar.update()
            evaluating = step % eval_every == 0 or step == steps
            if not (evaluating or step % log_every == 0 or step % save_every == 0 or stop and world == 1):
                continue

            # the mean loss since the last line; here the device is waited for, and processes agree to stop
            sums = torch.stack([losses, torch.full_like(losses, len(stop))])
            if world > 1:
                dist.all_reduce(sums)
            total, stopping = sums.tolist()
            mean, norm, elapsed = total / (step - logged), norm.item(), time.perf_counter() - clock
            if evaluating:
                val_loss = validation_loss(val_module, objective, path, val_set, device, autocast, micro)
            for name, x in (("loss", mean), ("gradient", norm), ("validation loss", val_loss)):
                if not math.isfinite(x):  # what is so is never saved: the last checkpoint stays
                    raise BadInput(f"the {name} is not finite at step {step}; try a smaller --lr than "
                                   f"{settings.lr:g}, or --dtype fp32")

            # a line of metrics.jsonl
            per_second, seconds = (seen - logged_seen) / elapsed, seconds + elapsed
            line = {"step": step, "loss": round(mean, 4), "lr": rate, "grad_norm": round(norm, 4),
                    unit: seen * each, f"{unit}_per_second": round(per_second * each),
                    "seconds": round(seconds, 2)}
            if evaluating:
                line["val_loss"] = round(val_loss, 4)
                masked = "masked " if path in ("mask", "mae") else ""  # not a left-to-right loss
                say(f"step {step:6,}  training loss {mean:.3f}  {masked}validation loss {val_loss:.3f}")
            bar.set_postfix_str(f"loss {mean:.3f}, {per_second * each:,.0f} {unit}/s", refresh=False)
            print(json.dumps(line), file=metrics, flush=True)
            for name in line.keys() - {"step"} if board else ():
                board.add_scalar(name, line[name], step)

            # the next steps, or the end
            if stopping or step == steps:
                break
            if step % save_every == 0:
                save()
            losses, logged, logged_seen, clock = torch.zeros_like(losses), step, seen, time.perf_counter()
        save()
    return val_loss if step == steps else None


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    parser = Parser(description="Pretrain a Transformer with any objective.")
    add_settings(parser)
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", help="run folder (default: runs/ and the objective)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    add("--threads", type=positive, help="on a CPU (default: as PyTorch chooses)")
    add("--compile", dest="compiled", action=BooleanOptionalAction, help="default: on CUDA")
    add("--fsdp", action="store_true", help="torchrun: shard weights and optimizer over the processes")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, into the run folder")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add("--eval-every", type=positive, default=200, help="steps between validation losses")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--no-report", action="store_true", help="skip the perplexity and the sample at the end")
    add_options(parser, argv)

    argv = sys.argv[1:] if argv is None else argv
    given = {name: x for name, x in vars(parser.parse_args(argv)).items() if x is not None}
    out, no_report = given.pop("out", None), given.pop("no_report")
    machine = {name: given.pop(name) for name in inspect.signature(train).parameters if name in given}
    if machine["resume"] and (out is None or machine["overwrite"]):
        raise BadInput("--resume goes on with the run in a folder: give it as --out DIR, without --overwrite")
    settings = resumed(out, given) if machine["resume"] else resolve(**given)
    if out is None:
        objective, path = settings.task()
        two = " two-stream" if path == "two-stream" and objective.one_stream else ""
        out = "runs/" + (describe(objective) + two).replace(" ", "-").replace("=", "")
    out = os.path.normpath(out)

    try:
        stopped = train(settings, out, **machine) is None
        world, is_main = (dist.get_world_size(), dist.get_rank() == 0) if dist.is_initialized() else (1, True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if stopped and is_main:
        again = [word for word in argv if word not in ("--resume", "--overwrite")] + ["--resume"]
        again += [] if any(word.startswith("--out") for word in argv) else ["--out", out]
        launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
        print(f"stopped and saved; go on with: {launcher} train.py {shlex.join(again)}", file=sys.stderr)
    if not stopped and is_main and not no_report:
        from evaluate import report
        try:
            report(out, machine.get("device"))
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  a text too short to evaluate on, say: the run is whole
            note(f"no report on {out}: {error}")
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.stderr = PatientStderr(sys.stderr)
    command_line(main)
