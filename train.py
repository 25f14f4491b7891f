"""Pretrain a Transformer with any objective.

    python train.py --objective vl --mask 0.15,0.3                  the default corpus, minutes on a CPU
    python train.py --objective dar --t 2 --data data/novels        own text (see data.py)
    python train.py --objective mlm --data shapes                   images (see images/sets.py)
    python train.py --resume --out runs/vl-0.15,0.3                 go on where that run stopped

Leaves a run folder: config.json (all settings), metrics.jsonl (one line every few steps), ckpt.pt (everything
needed to evaluate or to go on). Which batch and masks a step takes depends on the seed and the step's number
only, so a resumed run repeats the uninterrupted one, on a CPU bit for bit.
"""

import itertools
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data import check_source
from engine.log import Log, introduction
from engine.machine import (
    LossModule,
    Machine,
    choose_device,
    choose_dtype,
    compiled_loss,
    first_process_first,
    flops_per_sequence,
    free_threads,
    join_group,
    restore,
    spread_out,
    stop_signals,
    whole,
)
from engine.runs import (
    from_this_version,
    load_checkpoint,
    load_examples,
    open_run_folder,
    resumed,
    save_checkpoint,
)
from engine.settings import Settings, add_settings, resolve
from engine.steps import ahead, clip_gradients, make_optimizer, parts, set_rate, take_step, warm_cosine
from evaluate import report
from model import Config, Transformer
from objectives import OBJECTIVES, add_options, describe, draw_batch, loss_sum
from support.cli import BadInput, Parser, command_line, import_optional, positive, told
from support.options import all_options

# ---------------------------------------------------------------------------- schedules

def learning_rate(settings, progress):
    """The rate at `progress` in 0..1 through the budget."""
    if settings.schedule == "cosine":
        return settings.lr * warm_cosine(progress, settings.warmup)
    share = 0.25 + progress if progress < 0.75 else 4 * (1 - progress)  # the Cramming protocol's one cycle
    return settings.lr * share * (min(1, progress / settings.warmup) if settings.warmup else 1)


def batch_sizes(settings, steps):
    """The number of sequences of every step, which grows by sixteenths over the first `batch_ramp`."""
    full = settings.batch_size
    if not settings.batch_ramp:
        return [full] * steps
    ramp = steps * settings.batch_ramp
    return [math.ceil(full * min(16, 1 + int(16 * step / ramp)) / 16) for step in range(steps)]


def steps_for(settings, sequences):
    """The fewest steps whose batches make up that many sequences."""
    steps = math.ceil(sequences / settings.batch_size)
    if steps > 10 ** 8:
        raise BadInput(f"--epochs {settings.epochs:g} are more than 100 million steps")
    while (missing := sequences - sum(batch_sizes(settings, steps))) > 0:
        steps += math.ceil(missing / settings.batch_size)
    return steps


# ---------------------------------------------------------------------------- a step, and the loss in between

def update(loss_module, optimizer, batches, count, path, autocast, clip,
           synchronise=lambda on: None, world=1):
    """One optimiser step on the mean loss over the `count` targets of all `batches`, accumulating gradients.

    Returns, on the device, this process's part of the loss, the norm of the gradient before clipping, and 1.0
    where that is not finite: the step is then left out, without asking the device whether it was.
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
def validation_loss(loss_module, objective, path, sequences, device, autocast, micro, count=256):
    """Mean loss over the targets of the first `count` validation sequences, the same f at every call and for
    every `micro`, [MASK] at every target whatever the mask rule."""
    model, generator = loss_module.model.eval(), torch.Generator().manual_seed(0)
    total = targets = 0
    for first, last in parts(min(count, len(sequences)), 64):  # drawn 64 at a time, whatever `micro`
        tokens = sequences.batch(first, last - first)
        drawn = draw_batch(objective, path, tokens, model.config.vocab, generator)
        targets += drawn.weight.sum().item()
        for cut in parts(len(tokens), micro):
            with autocast():
                total += loss_module(drawn.part(*cut).to(device), path).item()
    model.train()
    return total / targets


# ---------------------------------------------------------------------------- a run

def preflight(out, resume, overwrite, device, dtype, compiled, fsdp, threads, tensorboard):
    """Refuse what can be refused before data is read -> (Machine, the checkpoint to go on from or None)."""
    rank, world = join_group(device)
    if not resume and not overwrite and (out / "ckpt.pt").exists():
        raise BadInput(f"{out} holds a run; go on with it with --resume --out {out}, replace it with "
                       "--overwrite, or choose another --out")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; choose another --out")
    if fsdp and world == 1:
        raise BadInput("--fsdp spreads the model over several processes; start them with torchrun "
                       "--nproc_per_node=N train.py")
    if tensorboard:
        import_optional("tensorboard")
    local = f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and torch.cuda.is_available() else None
    device = choose_device(device or local)
    saved = load_checkpoint(out) if resume else None
    if threads or saved and saved.get("threads"):
        torch.set_num_threads(threads or saved["threads"])  # another number would round otherwise
    torch.set_float32_matmul_precision("high")
    compiled = device.type == "cuda" if compiled is None else compiled
    dtype = choose_dtype(device, dtype or (saved and saved["dtype"]))
    return Machine(device, dtype, compiled, rank, world, fsdp), saved


@dataclass
class Job:
    """All that a run works on."""

    settings: Settings
    machine: Machine
    objective: object
    path: str
    config: Config
    train_set: object
    val_set: object
    identity: dict       # what a checkpoint must agree with: tokenizer and amount of data
    sizes: list          # sequences of each step
    model: Transformer = None
    loss_module: nn.Module = None   # in training; compiled, and wrapped for several processes
    validation: nn.Module = None
    synchronise: object = None      # called with whether the next backward averages gradients over processes
    optimizer: object = None

    def draw(self, place):
        """This process's part of the batch of a step, and the number of targets of the whole batch. The step
        comes with the number of sequences that were seen before it."""
        (step, seen), m, seed = place, self.machine, self.settings.seed
        size = self.sizes[step]
        part = slice(size * m.rank // m.world, size * (m.rank + 1) // m.world)
        tokens = self.train_set.batch(seen, size, part)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = draw_batch(self.objective, self.path, tokens, self.config.vocab, generator,
                           self.settings.mask_rule, size, part)
        return (batch.pinned() if m.device.type == "cuda" else batch), float(batch.total[0])

    def save(self, out, log):
        """The checkpoint, of which every process gathers its part and the first one writes."""
        content = whole({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        if self.machine.first:
            os.fsync(log.metrics.fileno())  # no line that the checkpoint is past may be lost with the power
            save_checkpoint(out / "ckpt.pt", {
                "settings": asdict(self.settings), "model_config": asdict(self.config), **content,
                **log.state(), **self.identity, "dtype": self.machine.precision,
                "threads": torch.get_num_threads()})


def load(settings, out, machine, saved, overwrite):
    """A Job with its data, the model still missing. Refuses data that is not the checkpoint's and batches
    that do not suit the processes; writes nothing but the tokens of a raw text."""
    objective, path = settings.task()
    with first_process_first(machine.rank, machine.world):  # it prepares the data that the others then read
        config, train_set, val_set, tokenizer = load_examples(
            settings, path, out / "data", overwrite and machine.first, machine.device, saved is not None)
    identity = {"tokenizer": tokenizer and tokenizer.to_json(), "train_total": train_set.total}
    if saved and identity != {name: saved.get(name) for name in identity}:
        raise BadInput(f"{settings.data} is not the data of the run in {out}: another amount of it or "
                       "another tokenizer")
    steps = steps_for(settings, settings.epochs * len(train_set)) if settings.epochs else settings.steps
    if saved and saved["step"] >= steps:
        raise BadInput(f"{out} is at step {saved['step']} of {steps}; give more with --steps to go on")
    sizes, world = batch_sizes(settings, steps), machine.world
    if min(sizes) < world:
        raise BadInput(f"a batch of {min(sizes)} sequences does not fill {world} processes; give a larger "
                       "--batch-size")
    uneven = [size for size in sizes if size % world]
    if machine.fsdp and uneven:  # every forward pass is a collective one
        raise BadInput(f"--fsdp takes equal parts: {world} processes do not divide a batch of {uneven[0]}; "
                       "give another --batch-size")
    return Job(settings, machine, objective, path, config, train_set, val_set, identity, sizes)


def build(job, saved, name):
    """Give a Job its model, with the weights of a checkpoint or the initial ones of the seed."""
    torch.manual_seed(job.settings.seed)
    machine, model = job.machine, Transformer(job.config).to(job.machine.device)
    if job.path in ("causal", "mae"):
        model.query.requires_grad_(False)  # these read it nowhere
    loss_module = LossModule(model, compiled_loss(machine.compiled))
    job.model = model
    job.loss_module, job.synchronise = spread_out(loss_module, machine.device, machine.world, machine.fsdp)
    job.validation = job.loss_module if machine.fsdp else LossModule(model, loss_sum)
    job.optimizer = make_optimizer(model, job.settings)
    if saved:
        with from_this_version(name):
            restore(model, job.optimizer, saved)


def train(settings, out, *, resume=False, overwrite=False, device=None, dtype=None, compiled=None, fsdp=False,
          threads=None, log_every=10, eval_every=200, save_every=500, tensorboard=False, quiet=False):
    """Train to the end of the budget -> the last validation loss, or None where a signal stopped the run.

    `settings` is a Settings, `out` the run folder. Everything else concerns the machine and the reports only.
    Started by torchrun, each of W processes takes its part of every batch; the first one writes the folder.
    """
    out = Path(out)
    if not resume:
        check_source(settings.data)
    machine, saved = preflight(out, resume, overwrite, device, dtype, compiled, fsdp, threads, tensorboard)
    with told("reading the data"):
        job = load(settings, out, machine, saved, overwrite)
    build(job, saved, out)
    if machine.first:
        open_run_folder(out, settings, len(job.sizes), not resume, overwrite)
    objective, path, steps, S = job.objective, job.path, len(job.sizes), job.config.length
    flops = flops_per_sequence(job.config, path, S, objective.max_targets(S), S - objective.min_targets(S))
    log = Log(out, settings, machine, steps, flops, saved, tensorboard, quiet)
    log.say(introduction(job, log.step))

    seen_before = itertools.accumulate(job.sizes[log.step:], initial=log.seen)
    stopping, micro = False, settings.micro_batch
    with log, stop_signals() as stop:
        for batch, count in ahead(job.draw, zip(range(log.step, steps), seen_before)):
            rate = learning_rate(settings, log.step / steps)
            set_rate(job.optimizer, rate)
            batches = [batch.part(*cut) for cut in parts(len(batch.tokens), micro)]
            done = update(job.loss_module, job.optimizer, batches, count, path, machine.autocast,
                          settings.clip, job.synchronise, machine.world)
            log.add(job.sizes[log.step], *done)
            evaluating = log.step % eval_every == 0 or log.step == steps
            saving = log.step % save_every == 0 and log.step < steps
            if evaluating or saving or log.step % log_every == 0:
                stopping = log.write(rate, stop)
                if evaluating and (machine.first or fsdp):  # a model in parts takes all processes
                    log.validation(validation_loss(job.validation, objective, path, job.val_set,
                                                   machine.device, machine.autocast, micro))
                if saving:
                    job.save(out, log)
                log.restart_clock()
            if stopping or stop and machine.world == 1:
                break
        job.save(out, log)
    if (stop or stopping) and log.step < steps:
        log.say(f"stopped at step {log.step}; go on with: "
                f"python train.py --resume --out {shlex.quote(str(out))}")
        return None
    return math.nan if log.val_loss is None else log.val_loss


# ---------------------------------------------------------------------------- command line

def train_parser():
    """One flag for each field of Settings, one for each option of an objective, and those of the machine."""
    parser = Parser(description=__doc__.split("\n")[0])
    add_settings(parser)
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", help="run folder (default: runs/ and the objective)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    add("--threads", type=positive, help="on a CPU (default: as many as other work leaves free; where they "
        "are shared, OMP_WAIT_POLICY=PASSIVE in the environment helps too)")
    add("--compile", action="store_true", default=None, help="torch.compile (default: on CUDA)")
    add("--no-compile", dest="compile", action="store_false")
    add("--fsdp", action="store_true", help="torchrun: spread weights and optimiser over the processes")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, into the run folder")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add("--eval-every", type=positive, default=200, help="steps between validation losses")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--no-report", action="store_true", help="skip the perplexity and the sample at the end")
    add_options(parser)
    return parser


def parse(argv):
    """(Settings, everything else). On --resume the run's own settings stand in for what is not given."""
    args = vars(train_parser().parse_args(argv))
    names = [*all_options(OBJECTIVES), *(f.name for f in fields(Settings))]
    given = {name: value for name in names if (value := args.pop(name, None)) is not None}
    if args["resume"] and (args["out"] is None or args["overwrite"]):
        raise BadInput("--resume goes on with the run in a folder: give it as --out DIR, without --overwrite")
    settings = resumed(given, args["out"]) if args["resume"] else resolve(**given)
    objective, path = settings.task()
    if args["out"] is None:
        two = " two-stream" if path == "two-stream" and objective.one_stream else ""
        args["out"] = "runs/" + (describe(objective) + two).replace(" ", "-").replace("=", "")
    return settings, args


def main(argv=None):
    """The command line, of `argv` or sys.argv -> exit status: 130 where a signal stopped the run, else 0.
    BadInput: settings that do not fit each other, data that is not there, a run folder that is taken, a loss
    that is not finite.
    """
    settings, args = parse(argv)
    out, reported = args.pop("out"), not args.pop("no_report")
    if args["threads"] is None and not args["resume"]:  # a resumed run takes those it had
        args["threads"] = free_threads()
    try:
        if train(settings, out, compiled=args.pop("compile"), **args) is None:
            return 130  # stopped by Ctrl-C or SIGTERM
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if reported and os.environ.get("RANK", "0") == "0":
        try:
            with told("report"):
                report(out, args["device"])
        except BadInput as error:  # a text too short to evaluate on, say: the run itself is whole
            print(f"note: no report on {out}: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    command_line(main)
