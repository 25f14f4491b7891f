"""Token folders: text of any size as memory-mapped ids, written document by document.

A folder holds train.bin and val.bin (ids in native byte order, documents one after another, each closed by a
separator), tokenizer.json and manifest.json. While it is written it is called NAME.partial and holds
progress.json too, from which the same command goes on after a network error, Ctrl-C or power loss.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from support.cli import BadInput, progress
from text.sources import Documents, documents
from text.tokenizers import ByteTokenizer, TrainedTokenizer, cut_at_lines, token_type, tokenizer_from_json

SPLITS = ("train", "val")
AT_ONCE = 1 << 21  # characters encoded in one call, on all cores
COMMIT = 1 << 26   # characters after which what is written is made fast


@dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus. `val_bytes` is the UTF-8 size of the text behind `val`, for bits per byte."""

    name: str
    tokenizer: object
    train: np.ndarray
    val: np.ndarray
    val_bytes: int


@dataclass(frozen=True)
class Recipe:
    """What a token folder is made of. sources, val: what `Documents` takes; without `val` a share of the
    documents is held out, or where there are fewer than 20, of the tokens, from the end."""

    sources: tuple
    # byte, wordpiece or bpe; the latter two are trained on at most 200 MB of training text
    tokenizer: str = "byte"
    vocab: int = 8192
    val: tuple = ()
    val_fraction: float = 0.05
    max_bytes: int = None       # stop after about that much text of each source

    def check(self, out):
        """Refuse what cannot be, before anything is read."""
        for source in (*self.sources, *self.val):
            if source and Path(out).resolve().is_relative_to(Path(source).resolve()):
                raise BadInput(f"{out} lies inside the input {source}, which would then be read again; "
                               "write to another folder")
        if not 0 < self.val_fraction < 1:
            raise BadInput(f"--val-fraction {self.val_fraction:g} is not between 0 and 1")
        if self.tokenizer != "byte" and not 300 <= self.vocab < 2 ** 31:
            raise BadInput(f"--vocab {self.vocab} does not suit {self.tokenizer}, "
                           "whose alphabet alone needs 300")

    def inputs(self):
        """[(source, whether all of it is for validation)], in the order of reading."""
        return [(source, False) for source in self.sources] + [(source, True) for source in self.val]

    def by_document(self):
        """Whether documents are held out, or the tail of the tokens."""
        several = itertools.chain.from_iterable(map(documents, self.sources))
        return not self.val and len(list(itertools.islice(several, 20))) == 20

    def texts(self, by_document):
        """The training text for the tokenizer, in pieces."""
        budget = [200 << 20]
        for source in self.sources:
            own = [self.max_bytes or math.inf]
            for document in documents(source):
                if min(own[0], budget[0]) <= 0:
                    break
                if not (by_document and held_out(document, self.val_fraction)):
                    for block in within(within(document.blocks, own), budget):
                        yield from cut_at_lines(block, 1 << 14)


def prepare_text(sources, out, tokenizer="byte", vocab=8192, val=(), val_fraction=0.05, max_bytes=None,
                 replace=False,
                 quiet=False, key=None):
    """Write a token folder (see Recipe) and return its manifest. Memory does not grow with the text.
    `replace` an existing folder; `key` is noted in the manifest."""
    out, recipe = Path(out), Recipe(tuple(map(str, sources)), tokenizer, vocab, tuple(map(str, val)),
                                    val_fraction, max_bytes)
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; choose another --out or remove it")
    recipe.check(out)
    partial, begun = out.with_name(out.name + ".partial"), False  # renamed when complete
    try:
        writer = Writer.resumed(partial, recipe) or Writer.new(partial, recipe)
        begun = any(source.startswith("hf:") for source, _ in recipe.inputs())
        with progress(quiet=quiet, unit=" bytes", unit_scale=True, desc="tokenizing") as bar:
            writer.write_all(bar)
        manifest = writer.finish(key)
        shutil.rmtree(out, ignore_errors=True)  # empty, or to be replaced
        partial.rename(out)
    finally:
        if not begun:  # what came through a network is kept, for the same command to go on
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


class Writer:
    """A token folder in the making. `state` is all that is needed to go on: which input, how far, what was
    counted."""

    def __init__(self, folder, recipe, tokenizer, state):
        self.folder, self.recipe, self.tokenizer, self.state = folder, recipe, tokenizer, state
        self.dtype = token_type(tokenizer.vocab)
        self.waiting, self.size, self.uncommitted = [], 0, 0

    @classmethod
    def new(cls, folder, recipe):
        """Begin: decide what is held out and train the tokenizer."""
        shutil.rmtree(folder, ignore_errors=True)
        by_document = recipe.by_document()
        tokenizer = ByteTokenizer()
        if recipe.tokenizer != "byte":
            tokenizer = TrainedTokenizer.train(recipe.tokenizer, recipe.vocab, recipe.texts(by_document))
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        counts = {side: dict.fromkeys(("documents", "tokens", "bytes", "replaced", "unknown"), 0)
                  for side in SPLITS}
        return cls(folder, recipe, tokenizer, {"input": 0, "place": None, "left": None,
                                               "by_document": by_document, **counts})

    @classmethod
    def resumed(cls, folder, recipe):
        """Go on with what the same recipe wrote, or None."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, BadInput):
            saved = json.loads((folder / "progress.json").read_text())
            if saved["recipe"] != described(recipe):
                return None
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            writer = cls(folder, recipe, tokenizer_from_json(text), saved["state"])
            for side in SPLITS:
                os.truncate(folder / f"{side}.bin", writer.state[side]["tokens"] * writer.dtype().itemsize)
            return writer

    def write_all(self, bar):
        """Read all inputs from where the state says, and write their tokens."""
        state, files = self.state, {}
        with contextlib.ExitStack() as stack:
            for side in SPLITS:
                files[side] = stack.enter_context(open(self.folder / f"{side}.bin", "ab"))
            for number, (source, for_validation) in enumerate(self.recipe.inputs()):
                if number < state["input"]:
                    continue
                left = [state["left"] if state["left"] is not None else self.recipe.max_bytes or math.inf]
                reader = Documents(source, state["place"])
                for document in reader:
                    if left[0] <= 0:
                        break
                    held = state["by_document"] and held_out(document, self.recipe.val_fraction)
                    self.add(document, "val" if for_validation or held else "train", left, files, bar)
                    if self.uncommitted >= COMMIT:
                        self.commit(files, number, reader.place(), left[0])
                self.commit(files, number + 1, None, None)

    def add(self, document, side, left, files, bar):
        """A document into the queue, and the queue through the tokenizer where it is long enough."""
        self.state[side]["documents"] += 1
        for block in within(document.blocks, left):
            self.waiting.append((side, block))
            self.size += len(block)
            bar.update(len(block.encode("utf-8", "replace")))
            if self.size >= AT_ONCE:
                self.flush(files)
        self.waiting.append((side, None))  # its end

    def flush(self, files):
        """Encode what waits, in one call, and write it."""
        encoded = iter(self.tokenizer.encode_all([text for _, text in self.waiting if text is not None]))
        separator = np.array([self.tokenizer.separator], self.dtype)
        for side, text in self.waiting:
            count, ids = self.state[side], separator if text is None else next(encoded).astype(self.dtype)
            ids.tofile(files[side])
            count["tokens"] += len(ids)
            if text is not None:
                count["bytes"] += len(text.encode("utf-8", "replace"))
                count["replaced"] += text.count("\ufffd")
                count["unknown"] += int(np.count_nonzero(ids == self.tokenizer.unknown))
        self.uncommitted += self.size
        self.waiting, self.size = [], 0

    def commit(self, files, number, place, left):
        """Make fast what is written, and note where to go on."""
        self.flush(files)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state.update(input=number, place=place, left=None if left == math.inf else left)
        self.uncommitted, note = 0, self.folder / "progress.new"
        note.write_text(json.dumps({"recipe": described(self.recipe), "state": self.state}))
        os.replace(note, self.folder / "progress.json")

    def finish(self, key):
        """Check, hold out the tail where no document is, and write the manifest."""
        counts, recipe = {side: self.state[side] for side in SPLITS}, self.recipe
        if counts["train"]["bytes"] == 0:
            raise BadInput(f"no text in {', '.join(recipe.sources)}"
                           + (" outside the validation documents" if counts["val"]["bytes"] else ""))
        if counts["val"]["tokens"] == 0:
            cut_tail(self.folder, counts, self.dtype, recipe.val_fraction)
        manifest = {"format": 1, "tokenizer": self.tokenizer.kind, "vocab": self.tokenizer.vocab,
                    "dtype": self.dtype.__name__, "tokenizer_sha256": sha256(self.tokenizer.to_json()),
                    "sources": list(recipe.sources), "val_sources": list(recipe.val), "key": key, **counts}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (self.folder / "progress.json").unlink(missing_ok=True)
        return manifest


def described(recipe):
    """A recipe as JSON gives it back."""
    return json.loads(json.dumps(asdict(recipe)))


def held_out(document, fraction):
    """Whether this document is for validation: decided by a checksum of its module, the same on every
    machine."""
    return zlib.crc32(document.module.encode("utf-8", "surrogateescape")) < fraction * 2 ** 32


def within(blocks, budget):
    """The blocks until budget[0] bytes are used up; the last block is cut."""
    for block in blocks:
        if budget[0] <= 0:
            return
        size = len(block.encode("utf-8", "replace"))
        if size > budget[0]:
            block = block[:int(budget[0])]
        budget[0] -= size
        yield block


def cut_tail(folder, counts, dtype, fraction):
    """Move the last tokens of train.bin to val.bin; the text bytes behind them are shared out in
    proportion."""
    total = counts["train"]["tokens"]
    tail = max(1, round(total * fraction))
    with open(folder / "train.bin", "rb+") as file:
        file.seek((total - tail) * dtype().itemsize)
        with open(folder / "val.bin", "wb") as val_file:
            shutil.copyfileobj(file, val_file)
        file.truncate((total - tail) * dtype().itemsize)
    moved = round(counts["train"]["bytes"] * tail / total)
    counts["val"].update(tokens=tail, bytes=moved)
    counts["train"].update(tokens=total - tail, bytes=counts["train"]["bytes"] - moved)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def open_tokens(folder):
    """A token folder as a Corpus, memory-mapped."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[manifest["dtype"]]
        sizes = {side: manifest[side]["tokens"] for side in SPLITS}
        val_bytes = max(1, int(manifest["val"]["bytes"]))
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{folder} is not a whole token folder ({error!r}); "
                       "make it anew with python data.py text") from None
    arrays = {}
    for side, tokens in sizes.items():
        path = folder / f"{side}.bin"
        found = path.stat().st_size // dtype().itemsize if path.exists() else 0
        if found != tokens:
            raise BadInput(f"{path} holds {found} tokens where the manifest says {tokens}; "
                           "make the folder anew")
        if not tokens:
            raise BadInput(f"{path} is empty; make the folder anew with more text")
        arrays[side] = np.memmap(path, dtype, "r")
        if arrays[side][:10_000_000].max() >= tokenizer.vocab:
            raise BadInput(f"{path} holds ids beyond the vocabulary of {tokenizer.vocab}; "
                           "make the folder anew")
    return Corpus(str(folder), tokenizer, arrays["train"], arrays["val"], val_bytes)
