"""Where text comes from: pydoc, files and folders, Hugging Face datasets; read as documents, block by
block."""
import ast
import functools
import gzip
import io
import itertools
import lzma
import os
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

from support.cli import BadInput, import_optional, note_once
from text.tokenizers import cut_at_lines

BLOCK = 1 << 20  # characters read and encoded at a time
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
NOT_TEXT = 0.1   # share of characters that are no UTF-8, or NUL, from which a file is not taken for text


class Document(NamedTuple):
    name: str       # unique within its source
    module: str     # documents of one module go to the same side of the train/validation split
    blocks: object  # iterator of str, each of about BLOCK characters


class Documents:
    """All documents of a source (see data.py), in a fixed order. `place()` says how far an iteration has
    come, as JSON; given back as `start`, another process goes on from there."""

    def __init__(self, source, start=None):
        self.source, self.done, self.rows = source, 0, None
        if not source or source == "hf:":
            raise BadInput("the name of the data is empty; give a text file, a folder, pydoc or hf:NAME")
        if source.startswith("hf:"):
            self.iterator = self.stream(*(start or (0, None)))
        else:
            self.iterator = itertools.islice(read_documents(source), (start or [0])[0], None)
            self.done = (start or [0])[0]

    def __iter__(self):
        for document in self.iterator:
            self.done += 1
            yield document

    def place(self):
        """(documents so far, what the datasets package needs to find the next one without reading those
        again)."""
        return [self.done, self.rows.state_dict() if self.rows is not None else None]

    def stream(self, done, state):
        """The rows of a Hugging Face dataset. What it raises depends on the network and on the kind of its
        files."""
        self.done = done
        name, _, subset = self.source[3:].partition("::")
        try:
            self.rows = import_optional("datasets").load_dataset(name, subset or None, split="train",
                                                                 streaming=True)
            if state:
                self.rows.load_state_dict(state)
            for row in self.rows:
                if "text" not in row:
                    raise BadInput(f"the dataset {name} has no column 'text', only {', '.join(row)}")
                yield Document(str(self.done), str(self.done), cut_at_lines(row["text"], BLOCK))
        except BadInput:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if "zstd" in reason.lower() or "zstandard" in reason.lower():
                raise BadInput(f"{self.source} holds .zst files, which need the zstandard package: "
                               "pip install zstandard") from error
            raise BadInput(f"{self.source} could not be read beyond document {self.done:,} ({reason}); "
                           "the same command goes on from what was written") from error


def documents(source):
    """The documents of a source from its first on."""
    return iter(Documents(source))


def read_documents(source):
    """Documents of pydoc, a file or a folder."""
    if source == "pydoc":
        for name, text in pydoc_texts():
            yield Document(name, name if name.startswith("topics.") else name.partition(".")[0], iter([text]))
        return
    root, files = Path(source), text_files(source)
    for path in files:
        name = root.name if path == root else str(path.relative_to(root))
        yield Document(name, name, read_text(path))


def existing(source):
    """The Path of a file or folder; BadInput where there is none."""
    if not source or not Path(source).exists():
        raise BadInput(f"{source or 'the empty name'} does not exist; give a text file, a folder, pydoc "
                       "or hf:NAME")
    return Path(source)


def text_files(source):
    """The files of a file or folder that hold text, sorted, without hidden ones. What is mostly not UTF-8 is
    left out of a folder with a note, and refused where it is the whole or the larger part."""
    root = existing(source)
    if (root / "manifest.json").exists():
        raise BadInput(f"{source} holds tokens already; give it to train.py --data as it is")
    walked = sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    hidden = {path for path in walked if any(part.startswith(".") for part in path.relative_to(root).parts)}
    files = [root] if root.is_file() else [path for path in walked if path not in hidden and path.is_file()]
    others = [path for path in files if not holds_text(path)]
    some = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
    found = f"{len(others)} of {len(files)} files of {source} are not UTF-8 text ({some})"
    if 2 * len(others) > len(files):
        raise BadInput(f"{found}; give text, or a folder that holds images for the most part")
    if others:
        note_once(f"note: {found} and are left out")
    return [path for path in files if path not in set(others)]


def holds_text(path):
    """Whether the first 64 KB of a file, unpacked, look like UTF-8."""
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            start = file.read(1 << 16).decode("utf-8", "replace")
    except (EOFError, OSError, lzma.LZMAError, zlib.error):
        return True  # reading it says what is wrong
    return start.count("\ufffd") + start.count("\0") <= NOT_TEXT * len(start)


def read_text(path):
    """The text of a file in blocks: UTF-8 with or without byte-order mark, any line ends, .gz and .xz
    unpacked.

    Bytes that are not UTF-8 become U+FFFD. Blocks end at a line end, or at BLOCK characters where a line is
    longer.
    """
    try:
        with (OPENERS.get(path.suffix.lower(), open)(path, "rb") as raw,
              io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace") as file):
            rest = ""
            while block := file.read(BLOCK):
                block = rest + block
                cut = block.rfind("\n") + 1 if len(block) < 2 * BLOCK else len(block)
                rest = block[cut:]
                if cut:
                    yield block[:cut]
            if rest:
                yield rest
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"{path} is not a whole {path.suffix[1:]} file: {error}") from None


def checksum_of(source):
    """A checksum of the names and the content of what a file or folder holds, or of the Python behind pydoc:
    what is read again is the same if this is."""
    if source == "pydoc" or source.startswith("hf:"):
        return f"{source} {sys.version}" if source == "pydoc" else source
    root, total = Path(source), 0
    for path in text_files(source):
        total = zlib.crc32(str(path.relative_to(root)).encode("utf-8", "surrogateescape"), total)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total = zlib.crc32(block, total)
    return f"{total:08x}"


@functools.cache  # parsing all sources takes seconds
def pydoc_texts():
    """[(name, text)] of every module of the standard library - its docstrings, read from the sources without
    importing them - and of every pydoc topic. Parts that some distributions leave out (tests, Tk, IDLE, ...)
    are left out everywhere, so that the corpus depends on the version of Python alone."""
    optional = {"test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtle",
                "turtledemo",
                "site-packages", "dist-packages", "pydoc_data", "__pycache__", "venv", "curses", "dbm",
                "sqlite3"}
    found, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        foreign = parts[0] not in sys.stdlib_module_names or parts[0].startswith("_sysconfig")
        if foreign or optional & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(filter(None, texts))
        if text:
            found.append((".".join(parts).removesuffix(".__init__"), text + "\n"))
    from pydoc_data.topics import topics
    for name in sorted(topics):
        found.append((f"topics.{name}", topics[name].strip() + "\n"))
    return found
