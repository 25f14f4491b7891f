"""text.folders."""
import hashlib
import itertools
import json
import math
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import BadInput
from text.sources import documents
from text.tokenizers import ByteTokenizer, TrainedTokenizer, cut_at_lines, token_type, tokenizer_from_json


def held_out(document, fraction):
    """Whether this document is for validation: decided by a checksum of its module, the same on every machine."""
    return zlib.crc32(document.module.encode("utf-8", "surrogateescape")) < fraction * 2 ** 32


# ---------------------------------------------------------------------------- token folders

def prepare_text(sources, out, tokenizer="byte", vocab=8192, val=(), val_fraction=0.05, max_bytes=None, replace=False,
            quiet=False):
    """Write a token folder. Reads the sources block by block: memory does not grow with them.

    sources, val     lists of what `documents` takes; without `val`, a share of the documents is held out, or where
                     there are fewer than 20 documents, of the tokens, from the end
    tokenizer        byte, wordpiece or bpe; the latter two are trained on at most 200 MB of the training documents
    max_bytes        stop after about that much text of each source
    """
    out = Path(out)
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; choose another --out or remove it")
    for source in (*sources, *val):
        if source and out.resolve().is_relative_to(Path(source).resolve()):
            raise BadInput(f"{out} lies inside the input {source}, which would then be read again; write to another folder")
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val-fraction {val_fraction:g} is not between 0 and 1")

    def documents_of(names):
        """The documents of all these sources, cut off after max_bytes of each."""
        for name in names:
            budget = [max_bytes or math.inf]
            for document in documents(name):
                if budget[0] <= 0:
                    break
                yield document._replace(blocks=within(document.blocks, budget))

    by_document = not val and len(list(itertools.islice(documents_of(sources), 20))) == 20

    def is_val(document):
        return by_document and held_out(document, val_fraction)

    if tokenizer == "byte":
        tokenizer = ByteTokenizer()
    else:
        tokenizer_budget = [200 << 20]
        if not 300 <= vocab < 2 ** 31:
            raise BadInput(f"--vocab {vocab} does not suit {tokenizer}: its alphabet alone needs 300")
        texts = (piece for document in documents_of(sources) if not is_val(document)
                 for block in within(document.blocks, tokenizer_budget) for piece in cut_at_lines(block, 1 << 14))
        tokenizer = TrainedTokenizer.train(tokenizer, vocab, texts)

    partial = out.with_name(out.name + ".partial")  # renamed when complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = token_type(tokenizer.vocab)
        counts = {side: {"documents": 0, "tokens": 0, "bytes": 0, "replaced": 0} for side in ("train", "val")}
        bar = tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=quiet or not sys.stderr.isatty())
        with open(partial / "train.bin", "wb") as train_file, open(partial / "val.bin", "wb") as val_file:
            for names, forced in ((sources, None), (val, "val")):
                for document in documents_of(names):
                    side = forced or ("val" if is_val(document) else "train")
                    file, count = (val_file if side == "val" else train_file), counts[side]
                    count["documents"] += 1
                    for block in document.blocks:
                        size = len(block.encode("utf-8", "replace"))
                        ids = tokenizer.encode(block).astype(dtype)
                        ids.tofile(file)
                        count["tokens"] += len(ids)
                        count["bytes"] += size
                        count["replaced"] += block.count("\ufffd")
                        bar.update(size)
                    np.array([tokenizer.separator], dtype).tofile(file)
                    count["tokens"] += 1
        bar.close()
        if counts["train"]["bytes"] == 0:
            raise BadInput(f"no text in {', '.join(map(str, sources))}" +
                           (" outside the validation documents" if counts["val"]["bytes"] else ""))
        if counts["val"]["tokens"] == 0:
            cut_tail(partial, counts, dtype, val_fraction)
        text = tokenizer.to_json()
        (partial / "tokenizer.json").write_text(text, encoding="utf-8")
        manifest = {"format": 1, "tokenizer": tokenizer.kind, "vocab": tokenizer.vocab, "dtype": dtype.__name__,
                    "tokenizer_sha256": sha256(text), "sources": [str(s) for s in sources],
                    "val_sources": [str(s) for s in val], **counts}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(out, ignore_errors=True)  # empty, or to be replaced
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def cut_tail(folder, counts, dtype, fraction):
    """Move the last tokens of train.bin to val.bin; the text bytes behind them are shared out in proportion."""
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


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- corpora and batches

@dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus. `val_bytes` is the UTF-8 size of the text behind `val`, for bits per byte."""

    name: str
    tokenizer: object
    train: np.ndarray
    val: np.ndarray
    val_bytes: int


def open_tokens(folder):
    """A token folder as a Corpus, memory-mapped."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[manifest["dtype"]]
        sizes = {side: manifest[side]["tokens"] for side in ("train", "val")}
        val_bytes = max(1, int(manifest["val"]["bytes"]))
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{folder} is not a whole token folder ({error!r}); make it anew with python data.py text") from None
    arrays = {}
    for side, tokens in sizes.items():
        path = folder / f"{side}.bin"
        found = path.stat().st_size // dtype().itemsize if path.exists() else 0
        if found != tokens:
            raise BadInput(f"{path} holds {found} tokens where the manifest says {tokens}; make the folder anew")
        if not tokens:
            raise BadInput(f"{path} is empty; make the folder anew with more text")
        arrays[side] = np.memmap(path, dtype, "r")
        if arrays[side][:10_000_000].max() >= tokenizer.vocab:
            raise BadInput(f"{path} holds ids beyond the vocabulary of {tokenizer.vocab}; make the folder anew")
    return Corpus(str(folder), tokenizer, arrays["train"], arrays["val"], val_bytes)
