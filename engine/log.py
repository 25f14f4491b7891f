"""What a run tells while it trains: metrics.jsonl, a progress bar or lines of text, TensorBoard if asked."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.machine import parameters, peak_flops
from objectives import describe
from support.cli import BadInput, duration, import_optional

IN_A_ROW = 10  # steps whose gradient is not finite, after which a run ends


class Log:
    """What is logged, and how far the run is: `step` optimiser steps, `seen` sequences.

    Losses are summed on the device, and only `write` waits for it. A context manager, which closes the files.
    """

    def __init__(self, out, settings, machine, steps, flops, saved=None, tensorboard=False, quiet=False):
        """steps: of the whole run. flops: of one sequence. saved: the checkpoint to go on from, or None."""
        self.out, self.settings, self.machine, self.steps, saved = out, settings, machine, steps, saved or {}
        self.unit, self.each = ("images", 1) if settings.images else ("tokens", settings.length)
        counted = (saved.get(name, 0) for name in ("step", "seen", "seconds", "skipped"))
        self.step, self.seen, self.seconds, self.skipped = counted
        self.begun, self.logged, self.logged_seen = self.step, saved.get("logged", self.step), self.seen
        # Since the last line: the sum of the losses, the steps skipped; and those in a row up to now.
        pending = saved.get("pending", [0.0] * 3)
        self.loss, self.bad, self.streak = torch.tensor(pending, device=machine.device)
        self.loss *= machine.first  # the processes' sums will be added up
        self.flops = flops
        self.peak = peak_flops(machine.device) if machine.dtype == torch.bfloat16 else None
        self.quiet, self.val_loss = quiet or not machine.first, None
        self.metrics = open_metrics(out / "metrics.jsonl" if machine.first else Path(os.devnull), self.step)
        self.board = open_board(out, self.step) if tensorboard and machine.first else None
        hidden = self.quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=self.logged, unit="step", disable=hidden)
        self.clock = self.started = time.perf_counter()
        self.processor, self.due, self.warned = time.process_time(), 0.0, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.metrics.close()
        self.bar.close()
        if self.board:
            self.board.close()

    def say(self, text):
        """A line on standard error, above the bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def add(self, sequences, loss, norm, wrong):
        """What `update` gave for a step over that many sequences. The first loss is shown at once."""
        self.loss += loss.nan_to_num(0, 0, 0) * (1 - wrong)
        self.bad += wrong
        self.streak.add_(wrong).mul_(wrong)
        self.step, self.seen, self.norm = self.step + 1, self.seen + sequences, norm
        if self.step == self.begun + 1:
            if self.machine.world > 1:
                dist.all_reduce(loss)
            self.say(f"step {self.step:6,}  training loss {loss.item():.3f}")
            self.due = 2 * (time.perf_counter() - self.started)

    def write(self, rate, stop):
        """A line of metrics.jsonl on the steps since the last -> whether all processes know of a signal."""
        agreed = False
        if self.machine.world > 1:
            signals = torch.tensor(float(bool(stop)), device=self.machine.device)
            for value in (self.loss, signals):
                dist.all_reduce(value)
            agreed = bool(signals)  # processes stop after the same step
        new, in_a_row = int(self.bad), int(self.streak)
        self.skipped += new
        if in_a_row >= IN_A_ROW:
            kept = (self.out / "ckpt.pt").exists()
            raise BadInput(f"the gradient was not finite in the last {in_a_row} steps up to {self.step}; try "
                           f"a smaller --lr than {self.settings.lr:g} or --dtype fp32. "
                           + (f"{self.out / 'ckpt.pt'} holds the last state that was saved" if kept else
                              "Nothing was saved yet"))
        self.mean = self.loss.item() / max(1, self.step - self.logged - new)
        elapsed = time.perf_counter() - self.clock
        self.speed = (self.seen - self.logged_seen) / elapsed  # sequences per second
        self.seconds += elapsed
        line = {"step": self.step, "loss": round(self.mean, 4), "lr": rate,
                "grad_norm": round(float(self.norm), 4), self.unit: self.seen * self.each,
                f"{self.unit}_per_second": round(self.speed * self.each), "seconds": round(self.seconds, 2)}
        if self.skipped:
            line["skipped"] = self.skipped
        if self.peak:
            line["mfu"] = round(self.speed * self.flops / self.peak / self.machine.world, 4)
        self.record(line)
        self.show(line)
        self.loss.zero_()
        self.bad.zero_()
        self.logged, self.logged_seen = self.step, self.seen
        return agreed

    def record(self, line):
        """A line of metrics.jsonl, and of TensorBoard."""
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        for name, value in line.items() if self.board else ():
            if name != "step":
                self.board.add_scalar(name, value, line["step"])

    def show(self, line):
        """The same for who watches: on the bar, or as lines at intervals that grow to a minute."""
        more = (f", MFU {line['mfu']:.0%}" if "mfu" in line else "") + (
            f", {self.skipped} steps skipped" if self.skipped else "")
        self.bar.update(self.step - self.logged)
        self.bar.set_postfix_str(f"loss {self.mean:.3f}, {self.speed * self.each:,.0f} {self.unit}/s{more}")
        elapsed = time.perf_counter() - self.started
        if self.bar.disable and elapsed >= self.due:
            left = elapsed / (self.step - self.begun) * (self.steps - self.step)
            self.say(f"step {self.step:6,}  training loss {self.mean:.3f}  {self.speed * self.each:,.0f} "
                     f"{self.unit}/s{more}  {100 * self.step // self.steps}%, {duration(left)} left")
            self.due = elapsed + min(60, max(1, elapsed))
        self.note_waiting(elapsed)

    def note_waiting(self, elapsed):
        """Say once where the threads of a CPU did not get the processors that they are for."""
        threads = torch.get_num_threads()
        if self.warned or elapsed < 5 or threads == 1 or self.machine.device.type != "cpu":
            return
        used = (time.process_time() - self.processor) / elapsed
        if used < 0.75 * threads:
            self.warned = True
            fewer = max(1, int(used))
            self.say(f"note: {threads} threads got {used:.1f} processors and wait for each other: other work "
                     f"runs here. --threads {fewer} may be faster, and so may OMP_WAIT_POLICY=PASSIVE")

    def validation(self, loss):
        """The validation loss of this step."""
        self.val_loss = loss
        self.record({"step": self.step, "val_loss": round(loss, 4)})
        self.say(f"step {self.step:6,}  training loss {self.mean:.3f}  validation loss {loss:.3f}  "
                 f"{self.speed * self.each:,.0f} {self.unit}/s")

    def restart_clock(self):
        """Neither validation nor saving counts as training time."""
        self.clock = time.perf_counter()

    def state(self):
        """What a checkpoint keeps of this."""
        pending = [x.item() for x in (self.loss, self.bad, self.streak)]
        return {"step": self.step, "seen": self.seen, "seconds": self.seconds, "skipped": self.skipped,
                "logged": self.logged, "pending": pending}


def introduction(job, step):
    """The first line: what trains on how much of what, where."""
    settings, steps = job.settings, len(job.sizes)
    size = f"{settings.positions} patches" if settings.images else f"vocabulary {job.config.vocab:,}"
    return (f"{describe(job.objective)} ({job.path}), {parameters(job.model)[0] / 1e6:.2f}M parameters, "
            f"{size}, {job.train_set.total:,} training {'images' if settings.images else 'tokens'}; "
            f"{job.machine}"
            + (f", going on at step {step:,} of {steps:,}" if step else f"; {steps:,} steps"))


def open_metrics(path, step):
    """metrics.jsonl for appending, without the lines after `step` that an interrupted run wrote."""
    kept = []
    if step and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):  # cut off
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    if path != Path(os.devnull):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
    return open(path, "a")


def open_board(out, step):
    """A TensorBoard writer into the run folder, which forgets what an interrupted run wrote after `step`."""
    import_optional("tensorboard")
    return import_optional("torch.utils.tensorboard").SummaryWriter(str(out), purge_step=step + 1)
