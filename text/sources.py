"""text.sources."""
import ast
import functools
import gzip
import io
import lzma
import os
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

from support.cli import BadInput, import_optional
from text.tokenizers import cut_at_lines

BLOCK = 1 << 20  # characters read and encoded at a time


# ---------------------------------------------------------------------------- documents

class Document(NamedTuple):
    name: str       # unique within its source
    module: str     # documents of one module go to the same side of the train/validation split
    blocks: object  # iterator of str, each of about BLOCK characters


def documents(source):
    """All documents of a source (see the top of this file), in a fixed order, as an iterator."""
    if source == "pydoc":
        for name, text in pydoc_texts():
            yield Document(name, name if name.startswith("topics.") else name.partition(".")[0], iter([text]))
    elif not source or source == "hf:":
        raise BadInput("the name of the data is empty; give a text file, a folder, pydoc or hf:NAME")
    elif source.startswith("hf:"):
        name, _, subset = source[3:].partition("::")
        rows = import_optional("datasets").load_dataset(name, subset or None, split="train", streaming=True)
        for i, row in enumerate(rows):
            if "text" not in row:
                raise BadInput(f"the dataset {name} has no column 'text', only {', '.join(row)}")
            yield Document(str(i), str(i), cut_at_lines(row["text"], BLOCK))
    else:
        root = Path(source)
        if not root.exists():
            raise BadInput(f"{source} does not exist; give a text file, a folder, pydoc or hf:NAME")
        if root.is_file():
            yield Document(root.name, root.name, read_text(root))
            return
        if (root / "manifest.json").exists():
            raise BadInput(f"{source} holds tokens already; give it to train.py --data as it is")
        files = sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)
        for path in files:
            name = str(path.relative_to(root))
            if not any(part.startswith(".") for part in Path(name).parts) and path.is_file():
                yield Document(name, name, read_text(path))


def read_text(path):
    """The text of a file in blocks: UTF-8 with or without byte-order mark, any line ends, .gz and .xz unpacked.

    Bytes that are not UTF-8 become U+FFFD. Blocks end at a line end, or at BLOCK characters where a line is longer.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace") as file:
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


@functools.cache  # parsing all sources takes seconds
def pydoc_texts():
    """[(name, text)] of every module of the standard library - its docstrings, read from the sources without importing
    them - and of every pydoc topic. Parts that some distributions leave out (tests, Tk, IDLE, ...) are left out
    everywhere, so that the corpus depends on the version of Python alone."""
    optional = {"test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtle", "turtledemo",
                "site-packages", "dist-packages", "pydoc_data", "__pycache__", "venv", "curses", "dbm", "sqlite3"}
    found, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if optional & set(parts) or parts[0] not in sys.stdlib_module_names or parts[0].startswith("_sysconfig"):
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
