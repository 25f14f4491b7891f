"""Text in, packed sequences of token ids out.

    pydoc        the documentation of the Python that runs, about 2 MB of English: nothing to download
    PATH         any UTF-8 text file or folder of them, also .gz and .xz
    DIR          a token folder written by `python data.py text INPUT... --out DIR --tokenizer wordpiece --vocab 8192`
    hf:NAME      a Hugging Face dataset, streamed through the `datasets` package (column `text`)

`python data.py images` prepares images: see images.py.

A token folder holds train.bin and val.bin (ids in native byte order, documents one after another, each closed by a
separator), tokenizer.json and manifest.json.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from images.raw import SIDES
from images.sets import prepare_images
from support.cli import BadInput, Parser, command_line, positive
from support.cli import seed as seed_type
from text.folders import Corpus, held_out, open_tokens, prepare_text, sha256, within
from text.sources import documents
from text.tokenizers import ByteTokenizer, token_type


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
        known = None  # not there, or damaged: `prepare_text` refuses to write over it
    if known not in (None, [source]) and not replace:
        raise BadInput(f"{cache} holds the tokens of {', '.join(known)}, not of {source}; choose another --out or remove it")
    if known != [source]:
        prepare_text([source], cache, max_bytes=hf_bytes if source.startswith("hf:") else None, replace=replace)
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
    add_image_options(commands.add_parser("images", help="decode and resize images into a memory-mapped folder"))
    args = parser.parse_args(argv)
    if args.command == "images":
        return prepare_images_command(args)
    manifest = prepare_text(args.inputs, args.out, args.tokenizer, args.vocab, args.val, args.val_fraction, args.max_bytes)
    for side in ("train", "val"):
        count = manifest[side]
        print(f"{side:5s} {count['documents']:8,} documents {count['tokens']:14,} tokens {count['bytes']:14,} bytes"
              + (f", {count['replaced']:,} characters were not UTF-8" if count["replaced"] else ""))
    print(f"{args.out}: {manifest['tokenizer']} tokenizer with {manifest['vocab']:,} tokens")


# ---------------------------------------------------------------------------- command line

def prepare_images_command(args):
    """`python data.py images`."""
    manifest = prepare_images(args.input, args.out, args.size, args.val_fraction, args.seed)
    for side in SIDES:
        count = manifest[side]
        print(f"{side:5s} {count['images']:10,} images" + (f", {len(count['skipped']):,} corrupt files skipped"
                                                           if count["skipped"] else ""))
    print(f"{args.out}: {manifest['size']} x {manifest['size']} pixels, {len(manifest['classes'])} classes")


def add_image_options(parser):
    """The options of `python data.py images`."""
    parser.add_argument("input", metavar="INPUT", help="folder of class folders (with train/ and val/ or test/, or without), of "
                        "the binary files of CIFAR-10 or CIFAR-100, or of MNIST's idx files")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--size", type=positive, help="side in pixels: the shorter side is resized to it and the centre cut "
                        "out (default: as they are, or 224 where files differ)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="held out of each class where there is no val/ or test/")
    parser.add_argument("--seed", type=seed_type, default=0, help="of what is held out")


if __name__ == "__main__":
    command_line(main)
