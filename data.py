"""What --data names: corpora of text, packed into sequences of token ids; and the front end that prepares
data.

    pydoc        the documentation of the Python that runs, about 2 MB of English: nothing to download
    PATH         any UTF-8 text file or folder of them, also .gz and .xz
    DIR          a token folder written by `python data.py text INPUT... --out DIR --tokenizer wordpiece
                 --vocab 8192`
    hf:NAME      a Hugging Face dataset, streamed through the `datasets` package (column `text`)
    toy          sequences of the paper's toy model, or toy:EPS of the noisy one (text/toy.py)

Images are named the same way: see images/sets.py. `python data.py images` prepares them, `python data.py
sheet` shows them. text/ holds tokenizers, the reading of text, and token folders.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from images.files import SUFFIXES
from images.patches import shown_images
from images.pixels import contact_sheet, write_png
from images.sets import load_images, prepare_images
from support.cli import BadInput, Parser, command_line, output_file, positive, seed, told
from text.folders import SPLITS, Corpus, held_out, open_tokens, prepare_text, sha256, within
from text.sources import checksum_of, documents, existing
from text.tokenizers import ByteTokenizer, token_type
from text.toy import CLASSES, POSITIONS, VALUES, draw_tokens, toy_bytes, toy_noise


def load_corpus(source, cache=None, replace=False, hf_bytes=None, resume=False):
    """What --data names, for training. Raw text is tokenized to bytes into the folder `cache`, once; of a
    Hugging Face dataset the first `hf_bytes`.

    The cache remembers a checksum of what it was read from. One of other text is made anew if `replace`, else
    refused; a run that is resumed (`resume`) keeps what it had of a dataset, however much it would ask for
    now.
    """
    if source != "pydoc" and not source.startswith("hf:") and (Path(source) / "manifest.json").exists():
        return open_tokens(source)
    if source == "pydoc":
        return in_memory("pydoc", documents("pydoc"), ByteTokenizer(), 0.1)
    if toy_noise(source) is not None:
        return toy_corpus(source)
    cache, remote = Path(cache), source.startswith("hf:")
    key = f"{source} {hf_bytes}" if remote else checksum_of(source)
    try:
        manifest = json.loads((cache / "manifest.json").read_text())
        known, kept = [str(name) for name in manifest["sources"]], manifest["key"]
    except Exception:  # noqa: BLE001
        known = kept = None  # not there, or damaged: `prepare_text` refuses to write over it
    if kept == key or resume and remote and known == [source]:
        return open_tokens(cache)
    if known and not replace:
        changed = f"{source} as it was before it changed" if known == [source] else ", ".join(known)
        raise BadInput(f"{cache} holds the tokens of {changed}, not of {source}; choose another --out, "
                       "give --overwrite or remove it")
    prepare_text([source], cache, max_bytes=hf_bytes if remote else None, replace=replace, key=key)
    return open_tokens(cache)


def check_source(source):
    """Refuse what --data names where it is neither drawn nor remote nor there; nothing is read."""
    if source not in ("pydoc", "shapes") and not source.startswith("hf:") and toy_noise(source) is None:
        existing(source)


def load_evaluation(source, tokenizer):
    """What --data names, for evaluating a model with that tokenizer: the validation part of pydoc or of a
    token folder, the whole of a text, or its first 50 MB."""
    if toy_noise(source) is not None:
        if tokenizer.kind != ByteTokenizer.kind:
            raise BadInput(f"--data {source} is made of bytes; the checkpoint's tokens are others")
        return toy_corpus(source)
    if source != "pydoc" and (Path(source) / "manifest.json").exists():
        corpus = open_tokens(source)
        if sha256(corpus.tokenizer.to_json()) != sha256(tokenizer.to_json()):
            raise BadInput(f"{source} was tokenized with another tokenizer than the checkpoint's; give the "
                           "text itself")
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


def toy_corpus(source, train=1 << 17, val=1 << 12):
    """That many sequences of the toy model, the same at every call, one after another without separators."""
    generator = torch.Generator().manual_seed(0)
    tokens, _ = draw_tokens(CLASSES, POSITIONS, VALUES, toy_noise(source), train + val, generator)
    cut, ids = train * POSITIONS, toy_bytes(tokens).flatten().numpy().astype(np.uint16)
    return Corpus(source, ByteTokenizer(), ids[:cut], ids[cut:], len(ids) - cut)


class Sequences:
    """A token stream cut into sequences of `length`, in a seeded order that is drawn anew for each epoch.

    Every token is seen once per epoch; separators fill up the last sequence. Sequence number k of training is
    the same whoever asks, which makes resuming exact.
    """

    def __init__(self, tokens, length, separator, seed=None):
        self.tokens, self.length, self.separator, self.seed = tokens, length, separator, seed
        self.epoch, self.order = -1, None
        self.total = len(tokens)

    def __len__(self):
        return math.ceil(len(self.tokens) / self.length)

    def batch(self, start, size, part=slice(None)):
        """Sequences start .. start + size - 1, counted over epochs, or a part of these -> LongTensor (size,
        length). seed None: in order."""
        numbers = range(start, start + size)[part]
        rows = np.full((len(numbers), self.length), self.separator, dtype=np.int64)
        for row, number in zip(rows, numbers):
            epoch, k = divmod(number, len(self))
            if self.seed is not None:
                if epoch != self.epoch:
                    self.epoch, self.order = epoch, np.random.default_rng([self.seed,
                                                                           epoch]).permutation(len(self))
                k = self.order[k]
            piece = self.tokens[k * self.length:(k + 1) * self.length]
            row[:len(piece)] = piece
        return torch.from_numpy(rows)


# ---------------------------------------------------------------------------- command line

def text_command(args):
    """`python data.py text INPUT... --out DIR`: writes a token folder and prints what it holds.

    args     inputs, out, tokenizer, vocab, val, val_fraction, max_bytes: see `text.folders.prepare_text`
    BadInput: an input that is not there or no text, a folder that is not empty, values out of range.
    """
    manifest = prepare_text(args.inputs, args.out, args.tokenizer, args.vocab, args.val, args.val_fraction,
                            args.max_bytes)
    for side in SPLITS:
        count = manifest[side]
        documents = f"{count['documents']:8,} documents" if count["documents"] else f"{'the end of it':>18s}"
        print(f"{side:5s} {documents} {count['tokens']:14,} tokens "
              f"{count['bytes']:14,} bytes"
              + (f", {count['replaced']:,} characters were not UTF-8" if count["replaced"] else "")
              + (f", {count['unknown'] / max(1, count['tokens']):.3%} of the tokens are [UNK]"
                 if manifest["tokenizer"] == "wordpiece" else ""))
    train, val = (manifest[side]["documents"] for side in SPLITS)
    how = (f"all of {', '.join(args.val)}" if args.val else
           f"{val / (train + val):.1%} of the documents, chosen by a checksum of their names" if val else
           f"the last {args.val_fraction:.1%} of the tokens, as there are too few documents")
    print(f"{args.out}: {manifest['tokenizer']} tokenizer with {manifest['vocab']:,} tokens; held out: {how}")


def images_command(args):
    """`python data.py images INPUT --out DIR`: decodes, resizes and writes an image folder, prints what it
    holds.

    args     input, out, size, val_fraction, seed: see `images.sets.prepare_images`
    BadInput: an input that holds no images, more than 1% corrupt files, a folder that is not empty, a full
    disk.
    """
    manifest = prepare_images(args.input, args.out, args.size, args.val_fraction, args.seed)
    for side in SPLITS:
        count = manifest[side]
        print(f"{side:5s} {count['images']:10,} images"
              + (f", {len(count['skipped']):,} corrupt files skipped" if count["skipped"] else ""))
    print(f"{args.out}: {manifest['size']} x {manifest['size']} pixels, {len(manifest['classes'])} classes")


def sheet_command(args):
    """`python data.py sheet INPUT --out FILE`: writes a PNG of training images, a row for each class.

    args     input, size, columns, views (as random crops), seed, out
    BadInput: an input that holds no images, or others than of that size.
    """
    images = load_images(args.input, args.size)
    write_png(args.out, contact_sheet(shown_images(images, args.columns, args.views, args.seed)))
    print(f"{args.out}: {len(images.train):,} training images of {images.size} x {images.size} pixels; "
          + (f"rows are classes: {', '.join(images.classes)}" if images.classes else "they have no classes"))


def main(argv=None):
    """The command line, of `argv` or sys.argv -> None. BadInput: a wrong use."""
    parser = Parser(description="Prepare data for train.py, or look at it.")
    commands = parser.add_subparsers(dest="command", required=True)

    text = commands.add_parser("text", help="tokenize text into a folder of memory-mapped ids")
    text.add_argument("inputs", nargs="+", metavar="INPUT",
                      help="text files or folders, pydoc, hf:NAME or hf:NAME::SUBSET")
    text.add_argument("--out", required=True,
                      help="folder to write; after an interruption the same command goes on")
    text.add_argument("--tokenizer", choices=("byte", "wordpiece", "bpe"), default="byte")
    text.add_argument("--vocab", type=positive, default=8192, help="vocabulary size of wordpiece and bpe")
    text.add_argument("--val", nargs="+", default=[], metavar="INPUT",
                      help="validation text; default: a share of INPUT")
    text.add_argument("--val-fraction", type=float, default=0.05, help="that share, by document")
    text.add_argument("--max-bytes", type=positive, help="stop after about that much text of each INPUT")
    text.set_defaults(function=text_command)

    kinds = ", ".join(sorted(SUFFIXES))
    images = commands.add_parser("images", help="decode and resize images into a memory-mapped folder")
    images.add_argument("input", metavar="INPUT",
                        help=f"folder of images ({kinds}), in class folders or not, with train/ "
                        "and val/ or test/ or without; or the binary files of CIFAR-10 or CIFAR-100, or "
                        "MNIST's idx files")
    images.add_argument("--out", required=True, help="folder to write")
    images.add_argument("--size", type=positive,
                        help="side in pixels: the shorter side is resized to it and the centre "
                        "cut out (default: as they are, or 224 where files differ)")
    images.add_argument("--val-fraction", type=float, default=0.1,
                        help="held out where there is no val/ or test/")
    images.add_argument("--seed", type=seed, default=0, help="of what is held out")
    images.set_defaults(function=images_command)

    sheet = commands.add_parser("sheet", help="a picture of some training images of each class")
    sheet.add_argument("input", metavar="INPUT", help="images, as for train.py --data")
    sheet.add_argument("--out", type=output_file, default="sheet.png", help="PNG file to write")
    sheet.add_argument("--size", type=positive, help="side in pixels (default: as they are)")
    sheet.add_argument("--columns", type=positive, default=12, help="images in a row")
    sheet.add_argument("--views", action="store_true", help="random crops as in training")
    sheet.add_argument("--seed", type=seed, default=0, help="of the crops")
    sheet.set_defaults(function=sheet_command)

    args = parser.parse_args(argv)
    with told(args.command):
        return args.function(args)


if __name__ == "__main__":
    sys.exit(command_line(main))
