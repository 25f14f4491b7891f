"""Text: what --data names, tokenizers, and sequences of token ids; and the front end of all preparation.

    pydoc        the documentation of the Python that runs, about 2 MB of English: nothing to download
    PATH         any UTF-8 text file or folder of them, also .gz and .xz, as bytes
    DIR          a token folder: python data.py text INPUT... --out DIR --tokenizer wordpiece --vocab 8192
    hf:NAME      a Hugging Face dataset, or hf:NAME::SUBSET, read by the `datasets` package (column `text`)
    toy          sequences of the paper's toy model, or toy:EPS of the noisy one

A token folder holds train.bin and val.bin (documents one after another, each closed by a separator),
tokenizer.json and manifest.json. Images are named the same way: see images.py.
"""

import ast
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import math
import os
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from images import example, files_in, new_folder, prepare_images, read_manifest
from util import BadInput, Parser, command_line, import_optional, note, positive

SEPARATOR, UNKNOWN = "[SEP]", "[UNK]"
LONGEST = 100           # characters of a word; a longer one is cut, as its time would be quadratic
TRAIN_ON = 200_000_000  # bytes of each source that a tokenizer is trained on

# ---------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """`kind`, `vocab`, `separator` (an id that ends each document), encode: str -> array of ids, and back."""

    def encode_all(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Ids -> str; separators become an empty line."""
        parts = itertools.groupby(np.asarray(ids).tolist(), key=lambda i: i == self.separator)
        return "".join("\n\n" if separates else self.decode_text(list(part)) for separates, part in parts)

    def to_json(self):
        return json.dumps({"kind": self.kind, **vars(self)})


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens, and a separator. Needs no package and no training."""

    kind, vocab, separator = "byte", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint16)

    def decode_text(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class IdTokenizer(Tokenizer):
    """For ids that are given from Python: a text is ids with spaces between them."""

    kind, separator = "ids", 0

    def __init__(self, vocab):
        self.vocab = vocab

    def encode(self, text):
        for word in text.split():
            if not (word.isdecimal() and int(word) < self.vocab):
                raise BadInput(f"{word!r} is no id; a text is ids in 0..{self.vocab - 1}, spaces between")
        return np.array(text.split(), token_type(self.vocab))

    def decode(self, ids):
        return " ".join(map(str, np.asarray(ids).tolist()))


class TrainedTokenizer(Tokenizer):
    """WordPiece (lower-cased, accents stripped, as in the Cramming protocol) or byte-level BPE."""

    def __init__(self, tokenizer):
        self.tokenizer, self.kind = tokenizer, type(tokenizer.model).__name__.lower()
        tokenizer.encode_special_tokens = True  # "[SEP]" written in a text is text
        self.vocab, self.separator = tokenizer.get_vocab_size(), tokenizer.token_to_id(SEPARATOR)

    @classmethod
    def train(cls, kind, vocab, texts):
        """A new one of that kind ("wordpiece" or "bpe") and at most `vocab` tokens, from texts (str)."""
        lib, pieces = import_optional("tokenizers"), [piece for text in texts for piece in cut_at_lines(text)]
        if kind == "wordpiece":
            tokenizer = lib.Tokenizer(lib.models.WordPiece(unk_token=UNKNOWN))
            tokenizer.normalizer = lib.normalizers.BertNormalizer(lowercase=True)
            tokenizer.decoder, words = lib.decoders.WordPiece(), lib.pre_tokenizers.BertPreTokenizer()
            trainer, alphabet, special = lib.trainers.WordPieceTrainer, [], [UNKNOWN, SEPARATOR]
        else:
            tokenizer, words = lib.Tokenizer(lib.models.BPE()), lib.pre_tokenizers.ByteLevel(False)
            tokenizer.decoder = lib.decoders.ByteLevel()
            trainer, alphabet, special = lib.trainers.BpeTrainer, words.alphabet(), [SEPARATOR]
        trainer = functools.partial(trainer, initial_alphabet=alphabet, show_progress=False)
        cut = lib.pre_tokenizers.FixedLength(LONGEST)
        tokenizer.pre_tokenizer, inner = lib.pre_tokenizers.Sequence([words, cut]), []
        if kind == "wordpiece":
            # The trainer numbers "##a", "##b", .. at random and settles ties by that. A first training finds
            # them; as special tokens of the second one they come in order.
            tokenizer.train_from_iterator(pieces, trainer(vocab_size=0))
            inner = sorted(token for token in tokenizer.get_vocab() if token.startswith("##"))
        tokenizer.train_from_iterator(pieces, trainer(vocab_size=vocab, special_tokens=special + inner))
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][:len(special)]
        return cls(lib.Tokenizer.from_str(json.dumps(content)))

    def encode(self, text):
        return np.concatenate(self.encode_all([*cut_at_lines(text), ""]))

    def encode_all(self, texts):
        """On all cores."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a surrogate pair: "?"
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(text.ids, token_type(self.vocab)) for text in encoded]

    def decode_text(self, ids):
        return self.tokenizer.decode(ids)

    def to_json(self):
        return self.tokenizer.to_str()


def tokenizer_from_json(text):
    """The tokenizer that `to_json` described."""
    content = json.loads(text)
    if content.get("kind") == ByteTokenizer.kind:
        return ByteTokenizer()
    if content.get("kind") == IdTokenizer.kind:
        return IdTokenizer(content["vocab"])
    return TrainedTokenizer(import_optional("tokenizers").Tokenizer.from_str(text))


def token_type(vocab):
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def cut_at_lines(text, size=1 << 14):
    """Cut a text into pieces of `size` to twice as many characters that end at a line end, before a space if
    the line is longer, or anywhere."""
    start = 0
    while start < len(text):
        stop, end = start + size, start + 2 * size
        if stop < len(text):
            line, space = text.find("\n", stop, end) + 1, text.find(" ", stop, end)
            end = line or (space if space > 0 else end)
        yield text[start:end]
        start = end


# ---------------------------------------------------------------------------- documents

def documents(source, max_bytes=None):
    """(name, text) of each document of a source, in a fixed order; about max_bytes of text at most."""
    if isinstance(source, Texts):
        found = ((str(k), text) for k, text in enumerate(source))
    elif source == "pydoc":
        found = pydoc_texts()
    elif source.startswith("hf:"):
        found = hub_texts(source, streaming=max_bytes is not None)
    else:
        found = text_files(source)
    left = max_bytes or math.inf
    for name, text in found:
        size = byte_count(text)
        yield name, text if size <= left else text[:left]
        left -= size
        if left <= 0:
            return


class Texts(tuple):
    """Documents that are given from Python, each a str."""

    def __str__(self):
        return f"{len(self)} texts"


def byte_count(text):
    return len(text.encode("utf-8", "replace"))


def text_files(source):
    """(name, text) of a file, or of the files in a folder: UTF-8, any line ends, .gz and .xz unpacked."""
    if not source:  # which would be the folder that we are in
        raise BadInput("--data is the empty name")
    if read_manifest(source):
        raise BadInput(f"{source} is prepared already; give it to train.py --data as it is")
    for path in files_in(source):
        try:
            with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)(path, "rb") as file:
                text = file.read().decode("utf-8-sig", "replace")
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            raise BadInput(f"{path} is not a whole {path.suffix[1:]} file: {error}") from None
        if text.count("\ufffd") + text.count("\0") > 0.1 * len(text):
            raise BadInput(f"{path} is not UTF-8 text; give text, or a folder of images")
        name = path.name if path == Path(source) else str(path.relative_to(source))
        yield name, text.replace("\r\n", "\n").replace("\r", "\n")


def hub_texts(source, streaming):
    """(row number, text) of a Hugging Face dataset, but null rows; streamed, or cached by `datasets`."""
    name, _, subset = source[3:].partition("::")
    load_dataset, empty = import_optional("datasets").load_dataset, 0
    try:
        for k, row in enumerate(load_dataset(name, subset or None, split="train", streaming=streaming)):
            text = row.get("text", 0)
            if isinstance(text, str):
                yield str(k), text
            elif text is None:
                empty += 1
            else:
                raise ValueError(f"row {k} has no text in a column 'text': {str(row)[:80]}")
    except Exception as error:  # noqa: BLE001  depends on the network and on the kind of its files
        raise BadInput(f"{source} could not be read: {type(error).__name__}: {error}") from None
    if empty:
        note(f"{source}: null rows left out: {empty:,}")


@functools.cache  # parsing all sources takes seconds
def pydoc_texts():
    """[(name, text)] of every module of the standard library, read without importing it, and of every pydoc
    topic. What some distributions leave out is left out everywhere: the version of Python alone decides."""
    optional = {"test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "tkinter", "turtle",
                "turtledemo", "site-packages", "dist-packages", "pydoc_data", "__pycache__", "venv", "curses",
                "dbm", "sqlite3"}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found, root = [], Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or optional & set(parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):  # a file of bad code, kept for tests
            continue
        texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(filter(None, texts)):
            found.append((".".join(parts).removesuffix(".__init__"), text + "\n"))
    from pydoc_data.topics import topics
    return found + [(f"topics.{name}", topics[name].strip() + "\n") for name in sorted(topics)]


# ---------------------------------------------------------------------------- corpora

@dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus. `val_bytes` is the UTF-8 size of the text behind `val`, for bits per byte."""

    name: str
    tokenizer: object
    train: np.ndarray
    val: np.ndarray
    val_bytes: int


def load_corpus(source, hf_bytes=None):
    """What --data names, for training: raw text as bytes, of a Hugging Face dataset the first `hf_bytes`; or
    from Python a sequence of str, each a document, or an array of token ids."""
    if not isinstance(source, str | Path):
        return given_corpus(source)
    source = str(source)
    if read_manifest(source):
        return open_tokens(Path(source))
    if toy_noise(source) is not None:
        return toy_corpus(source)
    max_bytes = hf_bytes if source.startswith("hf:") else None
    return in_memory(source, ByteTokenizer(), 0.1 if source == "pydoc" else 0.05, max_bytes)


def given_corpus(data):
    """A sequence of str, or of token ids (N,), as a Corpus; of ids the last twentieth is for validation."""
    if len(data) and isinstance(data[0], str):
        return in_memory(Texts(data), ByteTokenizer(), 0.05)
    ids = np.asarray(data)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 40 or ids.min() < 0:
        raise BadInput("data is a path, a name, a list of texts, or an array of 40 token ids or more")
    tokenizer, cut = IdTokenizer(int(ids.max()) + 1), len(ids) - len(ids) // 20
    return Corpus(f"{len(ids):,} ids", tokenizer, ids[:cut], ids[cut:], len(ids) - cut)


def load_evaluation(source, tokenizer):
    """What --data names, for evaluating a model with that tokenizer: the validation part of pydoc or of a
    token folder, the whole of a text, or its first 50 MB."""
    if not isinstance(source, str | Path):
        return in_memory(Texts(source), tokenizer, 1)
    source = str(source)
    if read_manifest(source) or toy_noise(source) is not None:
        corpus = load_corpus(source)
        if corpus.tokenizer.to_json() != tokenizer.to_json():
            raise BadInput(f"{source} has another tokenizer than the checkpoint; give the text itself")
        return corpus
    return in_memory(source, tokenizer, 0.1 if source == "pydoc" else 1, 50_000_000)


def in_memory(source, tokenizer, fraction, max_bytes=None):
    """A Corpus of which that share (1: all) is for validation."""
    train, val = io.BytesIO(), io.BytesIO()
    counts = write_tokens(train, val, tokenizer, [source], (), fraction, max_bytes)
    train, val = (np.frombuffer(file.getbuffer(), token_type(tokenizer.vocab)) for file in (train, val))
    return Corpus(str(source), tokenizer, train, val, max(1, counts["val"]["bytes"]))


def split(sources, val, fraction, max_bytes=None, total=None):
    """("train" or "val", text) of each document of the sources, and of those in `val`, all for validation.

    Without `val` a share of the documents is held out: by a checksum of its name, of pydoc's modules by that
    of their package, so that every machine holds out the same. Of fewer than 20 documents, or where `total`,
    the number of their characters, is given, the end is held out.
    """
    found = itertools.chain.from_iterable(documents(source, max_bytes) for source in sources)
    few = [len(text) for _, text in itertools.islice(found, 20)] if fraction < 1 and not val else []
    if len(few) < 20:
        total = total or sum(few)
    left = total - max(1, round(fraction * total)) if total else sys.maxsize  # characters for training
    share = 0 if val or total else fraction
    given = {hash(text) for source in val for _, text in documents(source, max_bytes)}
    for source, share in [(source, share) for source in sources] + [(source, 1) for source in val]:
        replaced = twice = 0
        for name, text in documents(source, max_bytes):
            replaced += text.count("\ufffd")
            if share == 0 and hash(text) in given:
                twice += 1
                continue
            if source == "pydoc" and not name.startswith("topics."):
                name = name.partition(".")[0]
            held = zlib.crc32(name.encode("utf-8", "surrogateescape")) < share * 2 ** 32
            if share == 1 or held and text.strip():
                yield "val", text
                continue
            if left < len(text):
                yield "val", text[left:]
            if left:
                yield "train", text[:left]
            left = max(0, left - len(text))
        if replaced:
            note(f"{source} is not all UTF-8: {replaced:,} characters of it are read as U+FFFD")
        if twice:
            note(f"{source}: documents left out of the training, as --val has them: {twice:,}")


def write_tokens(train, val, tokenizer, sources, val_sources, fraction, max_bytes=None, total=None):
    """Write the token ids of all documents, each closed by a separator, to two binary files.
    -> {side: {"tokens": .., "bytes": of the text}}"""
    separator = np.array([tokenizer.separator], token_type(tokenizer.vocab))
    files, size, characters = {"train": train, "val": val}, {"train": 0, "val": 0}, 0
    pieces = ((side, piece) for side, text in split(sources, val_sources, fraction, max_bytes, total)
              for piece in (*cut_at_lines(text), None))
    with tqdm(desc="tokenizing", unit=" bytes", unit_scale=True, delay=5, mininterval=10) as bar:
        while batch := list(itertools.islice(pieces, 256)):
            encoded = tokenizer.encode_all([piece or "" for _, piece in batch])
            for (side, piece), ids in zip(batch, encoded):
                files[side].write((separator if piece is None else ids).tobytes())
                size[side] += byte_count(piece or "")
                characters += len(piece or "")
            bar.update(size["train"] + size["val"] - bar.n)
    if size["train"] and not size["val"] and not val_sources and total is None:  # chance held out no document
        train.seek(0)
        train.truncate()
        return write_tokens(train, val, tokenizer, sources, (), fraction, max_bytes, characters)
    counts = {side: {"tokens": file.seek(0, os.SEEK_END) // separator.itemsize, "bytes": size[side]}
              for side, file in files.items()}
    for side, names in (("train", sources), ("val", val_sources or sources)):
        if min(counts[side].values()) < 2 and (side == "val" or fraction < 1):
            raise BadInput(f"{', '.join(map(str, names))}: {size[side]} bytes of text are too few for "
                           + {"train": "training", "val": "validation"}[side])
    return counts


def prepare_text(sources, out, tokenizer="byte", vocab=8192, val=(), val_fraction=0.05, max_bytes=None):
    """Write a token folder, of the command line's arguments -> its manifest."""
    kind = tokenizer
    with new_folder(out, (*sources, *val)) as folder:
        if kind == ByteTokenizer.kind:
            tokenizer = ByteTokenizer()
        else:
            found = split(sources, val, val_fraction, min(max_bytes or TRAIN_ON, TRAIN_ON))
            tokenizer = TrainedTokenizer.train(kind, vocab, (text for side, text in found if side == "train"))
        with open(folder / "train.bin", "w+b") as train, open(folder / "val.bin", "w+b") as val_file:
            counts = write_tokens(train, val_file, tokenizer, sources, val, val_fraction, max_bytes)
        manifest = {"format": 1, "tokenizer": kind, "vocab": tokenizer.vocab,
                    "dtype": token_type(tokenizer.vocab).__name__, "sources": sources, "val_sources": val,
                    **counts}
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def open_tokens(folder):
    """A token folder as a Corpus, memory-mapped."""
    manifest = read_manifest(folder)
    tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    train, val = (np.memmap(folder / f"{side}.bin", manifest["dtype"], "r") for side in ("train", "val"))
    return Corpus(str(folder), tokenizer, train, val, max(1, manifest["val"]["bytes"]))


# ---------------------------------------------------------------------------- sequences

class Sequences:
    """A token stream cut into sequences of `length`, in an order drawn anew for each epoch (seed None: as it
    is). Separators fill up the last one. Sequence k is the same whoever asks, which makes resuming exact."""

    def __init__(self, tokens, length, separator, seed=None):
        self.tokens, self.length, self.separator, self.seed = tokens, length, separator, seed
        self.total = len(tokens)

    def __len__(self):
        return math.ceil(self.total / self.length)

    def batch(self, start, size, part=slice(None)):
        """Sequences start .. start + size - 1, over epochs, or a part of them -> LongTensor (B, length)."""
        which = [example(k, len(self), self.seed) for k in range(start, start + size)[part]]
        rows = np.full((len(which), self.length), self.separator, dtype=np.int64)
        for row, k in zip(rows, which):
            piece = self.tokens[k * self.length:(k + 1) * self.length]
            row[:len(piece)] = piece
        return torch.from_numpy(rows)

    def lengths(self, start, size):
        """How many tokens of each of these sequences are text, not filler -> LongTensor (size,)."""
        which = [example(k, len(self), self.seed) for k in range(start, start + size)]
        return (self.total - self.length * torch.tensor(which)).clamp(max=self.length)


def prefetch(draw, steps):
    """draw(k) for each of the steps; a thread draws the next one while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        drawn = itertools.chain((pool.submit(draw, k) for k in steps), [None])
        for this, _ in itertools.pairwise(drawn):
            yield this.result()


# ---------------------------------------------------------------------------- the toy model (Sec. 4.1.2)
# All tokens of a sequence are of its class; with toy:EPS the class of each is drawn anew at that rate. A
# token is a class, a position and one of T values, one byte from '0' to 'o'.

CLASSES, POSITIONS, VALUES = 4, 8, 2


def toy_noise(source):
    """How often the class of a token is drawn anew: 0 for toy, EPS for toy:EPS, None for other data."""
    name, _, text = str(source).partition(":")
    if name != "toy":
        return None
    with contextlib.suppress(ValueError):
        if 0 <= float(text or 0) < 1:
            return float(text or 0)
    raise BadInput(f"--data {source}: type toy or toy:EPS, where EPS is at least 0 and less than 1")


def draw_tokens(r, s, T, eps, N, generator):
    """N sequences -> tokens c T + j of class c and value j (N, s), and the class of each sequence (N,)."""
    y = torch.randint(r, (N, 1), generator=generator)
    redrawn = torch.rand(N, s, generator=generator) < eps
    c = torch.where(redrawn, torch.randint(r, (N, s), generator=generator), y)
    return c * T + torch.randint(T, (N, s), generator=generator), y[:, 0]


def toy_bytes(tokens):
    """Tokens of draw_tokens (N, POSITIONS) as --data toy has them."""
    return ord("0") + torch.arange(POSITIONS) * (CLASSES * VALUES) + tokens


def toy_corpus(source, train=1 << 17, val=1 << 12):
    """That many sequences, the same at every call, one after another without separators."""
    generator = torch.Generator().manual_seed(0)
    tokens, _ = draw_tokens(CLASSES, POSITIONS, VALUES, toy_noise(source), train + val, generator)
    cut, ids = train * POSITIONS, toy_bytes(tokens).flatten().numpy().astype(np.uint16)
    return Corpus(source, ByteTokenizer(), ids[:cut], ids[cut:], len(ids) - cut)


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    parser = Parser(description="Prepare data for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="tokenize text into a folder of memory-mapped ids")
    text.add_argument("sources", nargs="+", metavar="INPUT",
                      help="text files or folders, pydoc, hf:NAME or hf:NAME::SUBSET")
    text.add_argument("--tokenizer", choices=("byte", "wordpiece", "bpe"), default="byte")
    text.add_argument("--vocab", type=positive, default=8192, help="vocabulary size of wordpiece and bpe")
    text.add_argument("--val", nargs="+", default=[], metavar="INPUT", help="text for validation")
    text.add_argument("--max-bytes", type=positive, help="stop after about that much text of each INPUT")
    images = commands.add_parser("images", help="decode and resize images into a memory-mapped folder")
    images.add_argument("source", metavar="INPUT", help="class folders of images, or CIFAR's binary files")
    images.add_argument("--size", type=positive, help="side in pixels (default: 224); CIFAR's keep 32")
    for command, fraction in ((text, 0.05), (images, 0.1)):
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--val-fraction", type=float, default=fraction,
                             help="share that is held out if the input has no validation part")
    args = vars(parser.parse_args(argv))
    if not 0 < args["val_fraction"] < 1:
        raise BadInput(f"--val-fraction {args['val_fraction']:g} is not between 0 and 1")
    command = args.pop("command")
    manifest = prepare_text(**args) if command == "text" else prepare_images(**args)
    for side in ("train", "val"):
        print(f"{side:5s}", ", ".join(f"{count:,} {name}" for name, count in manifest[side].items()))


if __name__ == "__main__":
    command_line(main)
