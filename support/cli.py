"""support.cli."""
import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path

# ---------------------------------------------------------------------------- command line, here and in every other file

class BadInput(ValueError):
    """Something the user gave is wrong; the message names the value and what is allowed."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with defaults, where there are any."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default or action.default == 0 and action.type else action.help


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong use as BadInput and shows defaults in --help."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(message)


def command_line(main):
    """Run `main`; bad input ends with one line `error: ...` on standard error and exit status 2, no traceback."""
    sys.stdout.reconfigure(errors="replace")  # where the locale has no sign for a character, a question mark
    try:
        sys.exit(main())
    except BrokenPipeError:  # somebody piped the output into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # NumPy raises the former, PyTorch the latter
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        print(f"error: not enough memory ({str(error).splitlines()[0] if str(error) else 'no details'}); "
              "use smaller batches, a smaller model or less data", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


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


def group_size(text):
    """An argparse type for --t: '2' -> 2, '1,2' -> (1, 2)."""
    sizes = tuple(positive(part) for part in text.split(","))
    return sizes if len(sizes) > 1 else sizes[0]


def output_file(text):
    """An argparse type: a file to write, in a folder that exists; or - for standard output."""
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text


def ratios(text):
    """An argparse type for --mask: '0.15' -> (0.15,), '0.15,0.3' -> (0.15, 0.3)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a ratio like 0.15 nor a range like 0.15,0.3") from None


def import_optional(name):
    """Import a package, or a module of one, that only some commands need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise BadInput(f"this needs the {package} package: pip install {package}") from None


# ---------------------------------------------------------------------------- command line

def write_json(target, content):
    """The --json convention of all commands: one object, to a file or to standard output (-)."""
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")
