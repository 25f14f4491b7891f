"""Text in, packed sequences of token ids out.

    pydoc        the documentation of the Python that runs, about 2 MB of English: nothing to download
    PATH         any UTF-8 text file or folder of them, also .gz and .xz
    DIR          a token folder written by `python data.py text INPUT... --out DIR --tokenizer wordpiece --vocab 8192`
    hf:NAME      a Hugging Face dataset, streamed through the `datasets` package (column `text`)

`python data.py images` prepares images: see images.py.

A token folder holds train.bin and val.bin (ids in native byte order, documents one after another, each closed by a
separator), tokenizer.json and manifest.json.
"""
import ast
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import shutil
import sys
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from masks import BadInput, Parser, command_line, positive

BLOCK = 1 << 20  # characters read and encoded at a time
SEPARATOR, UNKNOWN = "[SEP]", "[UNK]"


# ---------------------------------------------------------------------------- tokenizers

class ByteTokenizer:
    """UTF-8 bytes as tokens, and a separator. Needs no package and no training."""

    kind, vocab, separator = "byte", 257, 256

    def encode(self, text):
        """str -> uint16 array of ids."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids):
        """Ids -> str; each separator becomes an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if cut else bytes(part).decode("utf-8", "replace") for cut, part in parts)

    def to_json(self):
        return json.dumps({"kind": self.kind})


class TrainedTokenizer:
    """A WordPiece (lower-cased, accents stripped, as in the Cramming protocol) or byte-level BPE tokenizer of the
    `tokenizers` package."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "[SEP]" written in a text is text
        self.kind = type(tokenizer.model).__name__.lower()
        self.vocab = tokenizer.get_vocab_size()
        self.separator = tokenizer.token_to_id(SEPARATOR)
        if self.separator is None:
            raise BadInput(f"the tokenizer has no {SEPARATOR} token; make one with python data.py text")

    @classmethod
    def train(cls, kind, vocab, texts):
        """Train on an iterator of str."""
        tokenizers = import_optional("tokenizers")
        if kind == "wordpiece":
            tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
            tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = tokenizers.decoders.WordPiece()
            trainer = tokenizers.trainers.WordPieceTrainer(
                vocab_size=vocab, special_tokens=[UNKNOWN, SEPARATOR], show_progress=False)
        else:
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=vocab, special_tokens=[SEPARATOR], show_progress=False,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text):
        """str -> array of ids. Encoded line group by line group, on all cores."""
        pieces = list(cut_at_lines(text, 1 << 14))
        encoded = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return np.fromiter(itertools.chain.from_iterable(e.ids for e in encoded), dtype=token_type(self.vocab))

    def decode(self, ids):
        """Ids -> str; each separator becomes an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if cut else self.tokenizer.decode(list(part)) for cut, part in parts)

    def to_json(self):
        return self.tokenizer.to_str()


def tokenizer_from_json(text):
    """The tokenizer that `to_json` described."""
    try:
        content = json.loads(text)
        if content.get("kind") == ByteTokenizer.kind:
            return ByteTokenizer()
        return TrainedTokenizer(import_optional("tokenizers").Tokenizer.from_str(text))
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  the tokenizers package raises nothing more specific
        raise BadInput(f"not a tokenizer that data.py wrote: {error}") from None


def token_type(vocab):
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def import_optional(name):
    """Import a package, or a module of one, that only some commands need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise BadInput(f"this needs the {package} package: pip install {package}") from None


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


def cut_at_lines(text, size):
    """Cut a text into pieces of about `size` characters that end at line ends."""
    start = 0
    while start < len(text):
        stop = start + size
        stop = text.find("\n", stop) + 1 or len(text) if stop < len(text) else len(text)
        yield text[start:stop]
        start = stop


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


def held_out(document, fraction):
    """Whether this document is for validation: decided by a checksum of its module, the same on every machine."""
    return zlib.crc32(document.module.encode("utf-8", "surrogateescape")) < fraction * 2 ** 32


# ---------------------------------------------------------------------------- token folders

def prepare(sources, out, tokenizer="byte", vocab=8192, val=(), val_fraction=0.05, max_bytes=None, replace=False,
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


def load_corpus(source, cache=None, replace=False, hf_bytes=None):
    """What --data names, for training. Raw text is tokenized to bytes into the folder `cache`, once; of a Hugging Face
    dataset the first `hf_bytes`. `replace` a cache of other text."""
    if source != "pydoc" and not source.startswith("hf:") and (Path(source) / "manifest.json").exists():
        return open_tokens(source)
    if source == "pydoc":
        return in_memory("pydoc", documents("pydoc"), ByteTokenizer(), 0.1)
    cache = Path(cache)
    try:
        known = [str(name) for name in json.loads((cache / "manifest.json").read_text())["sources"]]
    except Exception:  # noqa: BLE001
        known = None  # not there, or damaged: `prepare` refuses to write over it
    if known not in (None, [source]) and not replace:
        raise BadInput(f"{cache} holds the tokens of {', '.join(known)}, not of {source}; choose another --out or remove it")
    if known != [source]:
        prepare([source], cache, max_bytes=hf_bytes if source.startswith("hf:") else None, replace=replace)
    return open_tokens(cache)


def load_evaluation(source, tokenizer):
    """What --data names, for evaluating a model with that tokenizer: the validation part of pydoc or of a token folder,
    the whole of a text, or its first 50 MB."""
    if source != "pydoc" and (Path(source) / "manifest.json").exists():
        corpus = open_tokens(source)
        if sha256(corpus.tokenizer.to_json()) != sha256(tokenizer.to_json()):
            raise BadInput(f"{source} was tokenized with another tokenizer than the checkpoint's; give the text itself")
        return corpus
    return in_memory(source, documents(source), tokenizer, 0.1 if source == "pydoc" else 1, 50_000_000)


def in_memory(name, docs, tokenizer, fraction, max_bytes=math.inf):
    """A Corpus of these documents in memory, of which a share by module (1: all) is the validation part."""
    ids, size, budget = {True: [], False: []}, {True: 0, False: 0}, [max_bytes]
    for document in docs:
        if budget[0] <= 0:
            break
        side = fraction == 1 or held_out(document, fraction)
        for block in within(document.blocks, budget):
            ids[side].append(tokenizer.encode(block))
            size[side] += len(block.encode("utf-8", "replace"))
        ids[side].append(np.array([tokenizer.separator], token_type(tokenizer.vocab)))
    empty = np.zeros(0, token_type(tokenizer.vocab))
    train, val = (np.concatenate([empty, *ids[side]]) for side in (False, True))
    if size[True] == 0:
        raise BadInput(f"no text in {name}")
    return Corpus(name, tokenizer, train, val, size[True])


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


class Sequences:
    """A token stream cut into sequences of `length`, in a seeded order that is drawn anew for each epoch.

    Every token is seen once per epoch; separators fill up the last sequence. Sequence number k of training is the same
    whoever asks, which makes resuming exact.
    """

    def __init__(self, tokens, length, separator, seed=None):
        self.tokens, self.length, self.separator, self.seed = tokens, length, separator, seed
        self.epoch, self.order = -1, None
        self.total = len(tokens)

    def __len__(self):
        return math.ceil(len(self.tokens) / self.length)

    def batch(self, start, size, part=slice(None)):
        """Sequences start .. start + size - 1, counted over epochs, or a part of these -> LongTensor (size, length). seed
        None: in order."""
        numbers = range(start, start + size)[part]
        rows = np.full((len(numbers), self.length), self.separator, dtype=np.int64)
        for row, number in zip(rows, numbers):
            epoch, k = divmod(number, len(self))
            if self.seed is not None:
                if epoch != self.epoch:
                    self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
                k = self.order[k]
            piece = self.tokens[k * self.length:(k + 1) * self.length]
            row[:len(piece)] = piece
        return torch.from_numpy(rows)


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    import images  # stands beside this file and is needed by this command alone
    parser = Parser(description="Prepare data for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="tokenize text into a folder of memory-mapped ids")
    text.add_argument("inputs", nargs="+", metavar="INPUT", help="text files or folders, pydoc, hf:NAME or hf:NAME::SUBSET")
    text.add_argument("--out", required=True, help="folder to write")
    text.add_argument("--tokenizer", choices=("byte", "wordpiece", "bpe"), default="byte")
    text.add_argument("--vocab", type=positive, default=8192, help="vocabulary size of wordpiece and bpe")
    text.add_argument("--val", nargs="+", default=[], metavar="INPUT", help="validation text; default: a share of INPUT")
    text.add_argument("--val-fraction", type=float, default=0.05, help="that share, by document")
    text.add_argument("--max-bytes", type=positive, help="stop after about that much text of each INPUT")
    images.add_options(commands.add_parser("images", help="decode and resize images into a memory-mapped folder"))
    args = parser.parse_args(argv)
    if args.command == "images":
        return images.prepare_command(args)
    manifest = prepare(args.inputs, args.out, args.tokenizer, args.vocab, args.val, args.val_fraction, args.max_bytes)
    for side in ("train", "val"):
        count = manifest[side]
        print(f"{side:5s} {count['documents']:8,} documents {count['tokens']:14,} tokens {count['bytes']:14,} bytes"
              + (f", {count['replaced']:,} characters were not UTF-8" if count["replaced"] else ""))
    print(f"{args.out}: {manifest['tokenizer']} tokenizer with {manifest['vocab']:,} tokens")


if __name__ == "__main__":
    command_line(main)
