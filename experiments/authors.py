"""Labelled passages of a folder of novels, few of them for training: who wrote this?

    python -m experiments.authors FOLDER --out DIR

Files are named AUTHOR_TITLE...txt. Of every author of two novels or more the last one is kept for the dev
passages, so that names and places do not give the author away. Writes DIR/train.tsv and DIR/dev.tsv with the
columns text and label.
"""

import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.cli import BadInput, Parser, command_line, positive


def passages(path, count, characters, rng):
    """`count` pieces of a text file at random, of whole words and about that many characters, white space
    made single."""
    text = " ".join(re.sub(r"\s+", " ", path.read_text(encoding="utf-8-sig", errors="replace")).split())
    margin = len(text) // 20  # neither title page nor index
    starts = rng.integers(margin, max(margin + 1, len(text) - margin - characters), size=count)
    return [text[start:start + characters].partition(" ")[2].rpartition(" ")[0] for start in sorted(starts)]


def novels_of(folder):
    """{author: paths} of the authors of two novels or more in a folder of AUTHOR_TITLE...txt."""
    novels = defaultdict(list)
    for path in sorted(Path(folder).glob("*.txt")):
        novels[path.stem.split("_")[0]].append(path)
    return {author: paths for author, paths in novels.items() if len(paths) > 1}


def label_authors(folder, out, train=16, dev=40, characters=600):
    """Write DIR/train.tsv and DIR/dev.tsv with `train` and `dev` passages of every author -> the authors."""
    novels, rng, out = novels_of(folder), np.random.default_rng(0), Path(out)
    if len(novels) < 2:
        raise BadInput(f"{folder} does not hold two or more files AUTHOR_TITLE.txt of each of two or more "
                       "authors")
    rows = {"train": [], "dev": []}
    for author, (*known, last) in novels.items():
        shares = np.diff(np.linspace(0, train, len(known) + 1).round().astype(int))
        rows["train"] += [(text, author) for path, share in zip(known, shares)
                          for text in passages(path, share, characters, rng)]
        rows["dev"] += [(text, author) for text in passages(last, dev, characters, rng)]
    partial = out.with_name(out.name + ".partial")  # whole or not at all
    partial.mkdir(parents=True, exist_ok=True)
    for side, lines in rows.items():
        text = "".join(f"{text}\t{author}\n" for text, author in lines)
        (partial / f"{side}.tsv").write_text("text\tlabel\n" + text, encoding="utf-8", newline="\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return sorted(novels)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=positive, default=16, help="training passages of every author")
    parser.add_argument("--dev", type=positive, default=40, help="dev passages of every author")
    args = parser.parse_args(argv)
    found = label_authors(args.folder, args.out, args.train, args.dev)
    print(f"{args.out}: passages of {len(found)} authors")


if __name__ == "__main__":
    command_line(main)
