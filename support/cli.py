"""The command line of every file: reading it, bad input in one line, and --json."""

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path

from tqdm import tqdm


class BadInput(ValueError):
    """Something the user gave is wrong; the message names the value and what is allowed."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with defaults, where there are any."""

    def _get_help_string(self, action):
        shown = action.default or action.default == 0 and action.type
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong use as BadInput and shows defaults in --help."""

    def __init__(self, *args, **kwargs):
        epilog = "Errors are one line; with TRACEBACK=1 in the environment they show where they arose."
        kwargs = {"formatter_class": Help, "allow_abbrev": False, "epilog": epilog, **kwargs}
        super().__init__(*args, **kwargs)

    def error(self, message):
        raise BadInput(message)


def command_line(main):
    """Run `main`. Bad input, a file that fails and memory that runs out end with one line `error: ...` on
    standard error and exit status 2; with TRACEBACK=1 in the environment the traceback comes before it."""
    if hasattr(sys.stdout, "reconfigure"):        # a notebook's cannot
        sys.stdout.reconfigure(errors="replace")  # a question mark for what the locale has no sign for
    try:
        sys.exit(main())
    except BrokenPipeError:  # somebody piped the output into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if not isinstance(error, (BadInput, OSError)):
            no_memory = "out of memory|can't allocate memory"  # PyTorch's RuntimeError; NumPy has MemoryError
            if not isinstance(error, MemoryError) and not re.search(no_memory, message):
                raise
            message = (f"not enough memory ({str(error).partition(chr(10))[0] or 'no details'}); use smaller "
                       "batches, a smaller model or less data")
        if os.environ.get("TRACEBACK", "0") != "0":
            traceback.print_exc()
        print("error: " + message, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------- types of flags

def positive(text):
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def seed(text):
    """An argparse type: a whole number in 0..2^31 - 1."""
    if not text.isdecimal() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2 ** 31 - 1}")
    return int(text)


def real(text):
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def group_size(text):
    """An argparse type for --t: '2' -> 2, '1,2' -> (1, 2)."""
    sizes = tuple(positive(part) for part in text.split(","))
    return sizes if len(sizes) > 1 else sizes[0]


def ratios(text):
    """An argparse type for --mask: '0.15' -> (0.15,), '0.15,0.3' -> (0.15, 0.3)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is neither a ratio like 0.15 nor a range like 0.15,0.3"
        raise argparse.ArgumentTypeError(message) from None


def dashed(name):
    """The flag of a field or of an argument: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def output_file(text):
    """An argparse type: a file to write, in a folder that exists; or - for standard output."""
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text


# ---------------------------------------------------------------------------- what commands share

def import_optional(name):
    """Import a package, or a module of one, that only some commands need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise BadInput(f"this needs the {package} package: pip install {package}") from None


def plain(x):
    """Results with numpy arrays and numbers in them -> what JSON knows."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x.tolist() if hasattr(x, "tolist") else x


def write_json(target, content):
    """The --json convention of all commands: one object, to a file or to standard output (-)."""
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")


def show_and_write(module, args, plot):
    """Run args.function(args) -> {"text": lines, results}: prints the lines, writes all of it where --json
    says and a picture, plot(results, path), where --plot does."""
    results = args.function(args)
    text = results.pop("text", [])
    write_json(args.json, {"command": f"{module} {args.command}", "results": results, "text": text})
    if args.json != "-" and text:
        print("\n".join(text))
    if getattr(args, "plot", None):
        plot(results, args.plot)


@functools.cache
def note_once(text):
    """A line on standard error, the first time only."""
    tell_line(text)


# ---------------------------------------------------------------------------- how far a command is

EVERY = 10.0  # seconds between the lines of `told`
COUNTED = []  # what is counted now, the innermost last


def progress(steps=None, quiet=False, **options):
    """A tqdm bar over `steps` on standard error, gone when done. Where that is a file or a pipe, a Tally
    with the same methods: `told` writes how far it is."""
    if quiet or sys.stderr.isatty():
        return tqdm(steps, leave=False, disable=quiet, **options)
    return Tally(steps, **options)


class Tally:
    """Counts without a bar. `str` of it says how far it is, and about how long the rest takes."""

    def __init__(self, steps=None, total=None, desc="", unit="steps", **_):
        self.steps, self.total, self.desc, self.unit = steps, total, desc, unit.strip()
        if total is None and hasattr(steps, "__len__"):
            self.total = len(steps)
        self.n, self.note, self.started = 0, "", time.monotonic()

    def update(self, n=1):
        self.n += n

    def set_postfix_str(self, note):
        self.note = note

    def __enter__(self):
        COUNTED.append(self)
        return self

    def __exit__(self, *_):
        COUNTED.remove(self)

    def __iter__(self):
        with self:
            for step in self.steps:
                yield step
                self.update()

    def __str__(self):
        words = [self.desc] if self.desc else []
        if self.total is None:
            words.append(f"{self.n:,} {self.unit} so far")
        else:
            words.append(f"{self.n:,} of {self.total:,} {self.unit}")
        words += [self.note] if self.note else []
        if self.total and self.n:
            left = (time.monotonic() - self.started) / self.n * (self.total - self.n)
            words.append(f"about {duration(left)} to go")
        return ", ".join(words)


def tell_line(text):
    """Onto standard error, at once."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def told(command):
    """While the block runs, a line every EVERY seconds on standard error, where that is no terminal: how far
    what is counted is, or how long `command` has worked. A command that is done before that leaves none."""
    done, started = threading.Event(), time.monotonic()

    def tell():
        while not done.wait(EVERY):
            counted = COUNTED[-1:]  # one copy, as the other thread may end it now
            state = str(counted[0]) if counted else f"{duration(time.monotonic() - started)} so far"
            tell_line(f"{command}: {state}")

    teller = threading.Thread(target=tell, daemon=True)
    if not sys.stderr.isatty():
        teller.start()
    try:
        yield
    finally:
        done.set()
        if teller.ident:
            teller.join()


def duration(seconds):
    """40 s, 12 min, 3.5 h, 40 days, 20 years"""
    for least, unit, text in ((100, 1, "{:.0f} s"), (6000, 60, "{:.0f} min"), (360_000, 3600, "{:.1f} h"),
                              (86_400_000, 86_400, "{:.0f} days")):
        if seconds < least:
            return text.format(seconds / unit)
    return f"{seconds / 31_557_600:,.0f} years"
