"""What every command line shares: wrong use in one line, flags, optional packages, JSON and tables."""

import argparse
import importlib
import json
import math
import os
import re
import sys
import traceback
from pathlib import Path


class BadInput(ValueError):
    """Something the user gave is wrong; the message names the value and what is allowed. It speaks of flags,
    as --batch-size, or, where no command line was parsed, of arguments: batch_size."""

    flags = False

    def __str__(self):
        text = super().__str__()
        if self.flags:
            return text
        return re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), text)


# ---------------------------------------------------------------------------- the command line

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong use as BadInput."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **kwargs})

    def parse_args(self, *args, **kwargs):
        BadInput.flags = True
        return super().parse_args(*args, **kwargs)

    def error(self, message):
        raise BadInput(message)


def command_line(main):
    """Run `main`. A wrong use ends with one line `error: ...` and exit status 2; with TRACEBACK=1 in the
    environment the traceback comes before it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a question mark for what the locale cannot write
    try:
        sys.exit(main())
    except BrokenPipeError:  # somebody piped the output into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError) as error:
        if os.environ.get("TRACEBACK", "0") != "0":
            traceback.print_exc()
        print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text):
    """An argparse type: '2' -> 2, '0.15' -> 0.15, '0.15,0.3' -> (0.15, 0.3)."""
    try:
        values = tuple(int(x) if x.isdecimal() else float(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number like 0.15 or range like 0.15,0.3") from None
    return values if len(values) > 1 else values[0]


def output_file(text):
    """An argparse type: a file that can be written, or -, standard output. It complains before the work."""
    path = Path(text).absolute()
    if text != "-" and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file in a folder that is there")
    return text


def import_optional(name):
    """Import a package, or a module of one, that only some commands need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("PIL", "pillow")
        raise BadInput(f"this needs the {package} package: pip install {package}") from None


# ---------------------------------------------------------------------------- results

def plain(x):
    """Results with arrays and tensors in them -> what JSON knows; numbers that are not finite become null."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if hasattr(x, "tolist"):
        return plain(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_json(target, content):
    """Write one object to a file, or to standard output (-): --json of all commands."""
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    if target == "-":
        print(text)
    elif target:
        write_text(target, text + "\n")


def write_text(path, text):
    """Write a file so that a whole one is there at every moment: temporary file, rename."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def printable(text):
    """Control characters as \\x1b and the like: names and texts of other people are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def note(text):
    """Tell on standard error what is left out, or read in another way."""
    print("note:", printable(text), file=sys.stderr)


def table(rows, align=">"):
    """Rows of text as lines with aligned columns, the first column to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    lines = [row[0].ljust(first) + "".join(f"  {cell:{align}{width}}" for cell, width in zip(row[1:], others))
             for row in rows]
    return "\n".join(line.rstrip() for line in lines)
