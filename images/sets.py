"""What --data names, as images: drawn, prepared, or as they come.

    shapes       a drawn set of 12 classes: nothing to download
    DIR          an image folder written by `python data.py images INPUT --size N --out DIR`, memory-mapped
    DIR          a folder of JPEG or PNG files, decoded while training: train/CLASS/*.jpg and val/CLASS/*.jpg
                 (or test/);
                 or CLASS/*.jpg alone, of which a seeded share of every class is held out; or, for
                 pretraining, images without classes, in folders or not
    DIR          the binary files of CIFAR-10 or CIFAR-100 (fine labels), or the idx files of MNIST and its
                 kin (.gz too)

An image folder holds train.bin and val.bin (uint8, N x size x size x RGB), train.labels.bin and
val.labels.bin (int64) and manifest.json (classes, counts, size, mean and standard deviation per channel, what
was skipped).

Look at any of them: python data.py sheet shapes --out sheet.png
"""

import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from images.files import (
    LABEL,
    FileSet,
    Images,
    ImageSet,
    all_files,
    check_corrupt,
    chunks,
    cifar_files,
    idx_files,
    is_image,
    is_pickled,
)
from images.pixels import channel_histogram, fit, moments
from images.raw import SIDES, open_raw
from images.shapes import SHAPES, shapes
from support.cli import BadInput, progress
from text.toy import toy_noise

# beside images: tables of labels, annotations, notes; a .txt only if an image beside it has its name
COMPANIONS = {".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".mat", ".npy", ""}


def is_images(source):
    """Whether --data names images rather than text; see the top of this file. Looks at 5,000 names at most.

    A folder counts if nine files in ten are JPEG or PNG, not counting tables, annotations and the like, so
    that a text with figures beside it remains a text.
    """
    if source == "shapes":
        return True
    if not source or source == "pydoc" or str(source).startswith("hf:") or toy_noise(source) is not None:
        return False
    root = Path(source)
    try:
        if (root / "manifest.json").exists():
            return ((root / "train.labels.bin").exists()
                    or json.loads((root / "manifest.json").read_text()).get("format") == "images")
        if not root.is_dir():
            return False
        # the last are refused, but not read as text
        if cifar_files(root) or idx_files(root) or is_pickled(root):
            return True
        names = list(itertools.islice(all_files(root), 5000))
        images = [name for name in names if is_image(name)]
        stems = {os.path.splitext(name)[0] for name in images}
        others = sum(not is_image(name) and not is_companion(name, stems) for name in names)
        return 0 < len(images) >= 9 * others
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def is_companion(path, stems):
    """Whether a file says something about images whose paths without suffix are `stems`."""
    stem, suffix = os.path.splitext(path)
    return suffix.lower() in COMPANIONS or (suffix.lower() == ".txt" and stem in stems)


def load_images(source, size=None):
    """What --data names as Images of size x size pixels; None: the size they have, 224 where files differ.

    Mean and deviation are those of all training images, for files that are decoded while training of 1,000 of
    them.
    """
    if source == "shapes":
        size = size or 32
        train, val = (ImageSet("shapes", *shapes(count, size, seed), tuple(SHAPES)) for count,
                      seed in ((8000, 0), (2000, 1)))
    elif source and (Path(source) / "manifest.json").exists():
        return open_images(source, size)
    else:
        train, val = open_raw(source, size).values()
        if isinstance(train, FileSet):
            size = train.size
        elif train.images.shape[1:3] != (size or train.images.shape[2],) * 2:
            high, wide = train.images.shape[1:3]
            raise BadInput(f"{source} holds images of {wide} x {high} pixels; for another size: "
                           f"python data.py images {source} --size {size or wide} --out DIR")
        else:
            size = train.images.shape[1]
    rows = np.arange(len(train))
    if isinstance(train, FileSet):
        rows = np.random.default_rng(0).permutation(len(train))[:1000]
    histogram = sum(channel_histogram(train.batch(part)[0].numpy()) for part in chunks(rows, size))
    return Images(str(source), size, train.classes, *moments(histogram), train, val)


def open_images(folder, size=None):
    """An image folder of `prepare` as Images, memory-mapped."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != "images":
            raise BadInput(f"{folder} holds text, not images")
        classes = list(map(str, manifest["classes"]))
        mean, std = (list(map(float, manifest[key])) for key in ("mean", "std"))
        found, counts = int(manifest["size"]), {side: int(manifest[side]["images"]) for side in SIDES}
        if not (len(mean) == len(std) == 3 and min(*std, found, *counts.values()) > 0
                and all(map(math.isfinite, mean + std))):
            raise ValueError("numbers that cannot be")
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{folder} is not a whole image folder ({error!r}); make it anew with python data.py "
                       "images") from None
    if size not in (None, found):
        raise BadInput(f"{folder} holds images of {found} x {found} pixels, not {size} x {size}; make "
                       "another with "
                       f"python data.py images INPUT --size {size} --out DIR")
    sets = {}
    for side, count in counts.items():
        path, labels = folder / f"{side}.bin", folder / f"{side}.labels.bin"
        for file, expected in ((path, count * found * found * 3), (labels, count * LABEL.itemsize)):
            length = file.stat().st_size if file.exists() else 0
            if length != expected:
                raise BadInput(f"{file} has {length} bytes where the manifest says {expected}; make the "
                               "folder anew")
        values = np.fromfile(labels, LABEL)
        if values.min() < 0 or values.max() >= max(1, len(classes)):
            raise BadInput(f"{labels} holds labels beyond the {len(classes)} classes; make the folder anew")
        sets[side] = ImageSet(f"{folder}/{side}", np.memmap(path, np.uint8, "r",
                                                            shape=(count, found, found, 3)), values,
                              tuple(classes))
    return Images(str(folder), found, tuple(classes), tuple(mean), tuple(std), **sets)


# ---------------------------------------------------------------------------- image folders

def prepare_images(source, out, size=None, val_fraction=0.1, seed=0, quiet=False):
    """Write an image folder from a folder of images, CIFAR binary files or idx files; returns its manifest.

    size             of the square images; None: as they are, or 224 where files differ
    val_fraction     held out of each class, by `seed`, where the classes have no train/ and val/

    Corrupt files are named, skipped and listed in the manifest; more than 1% of a set are refused.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; choose another --out or remove it")
    if source and out.resolve().is_relative_to(Path(source).resolve()):
        raise BadInput(f"{out} lies inside the input {source}, which would then be read again; write to "
                       "another folder")
    if (Path(source) / "manifest.json").exists():
        raise BadInput(f"{source} is prepared already; give it to train.py --data as it is")
    sets = open_raw(source, size, val_fraction, seed)
    if size is None:
        train = sets["train"]
        size = train.size if isinstance(train, FileSet) else min(train.images.shape[1:3])
    out.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(map(len, sets.values())), shutil.disk_usage(out.parent).free
    if total * size * size * 3 > free:
        needed = f"{total * size * size * 3 / 1e9:,.0f} GB, but there are {free / 1e9:,.0f} GB free"
        raise BadInput(f"{total:,} images of {size} x {size} pixels need {needed} at {out.parent}; "
                       f"{source} can be given to train.py --data as it is")
    partial = out.with_name(out.name + ".partial")  # renamed when complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    manifest, histogram = {"format": "images", "size": size, "classes": sets["train"].classes,
                           "sources": [str(source)]}, {}
    try:
        with progress(quiet=quiet, total=total, unit=" images") as bar:
            for side, part in sets.items():
                manifest[side], histogram[side] = write_side(partial, side, part, size, bar)
        manifest["mean"], manifest["std"] = moments(histogram["train"])
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(out, ignore_errors=True)  # empty
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def write_side(folder, side, part, size, bar):
    """Pixels and labels of one side of a set, chunk by chunk -> (its entry of the manifest, its channels'
    histogram)."""
    labels, skipped, histogram = [], [], 0
    with open(folder / f"{side}.bin", "wb") as file:
        for rows in chunks(np.arange(len(part)), size):
            whole = []
            for row, image in zip(rows, part.read(rows)):
                if isinstance(image, str):
                    skipped.append(part.files[row])
                    tqdm.write(f"skipped: {image}", file=sys.stderr)
                    check_corrupt(len(skipped), len(part), image)
                else:
                    whole.append(image)
                    labels.append(part.labels[row])
            if whole:
                pixels = fit(np.stack(whole), size)
                pixels.tofile(file)
                histogram += channel_histogram(pixels)
            bar.update(len(rows))
    np.array(labels, LABEL).tofile(folder / f"{side}.labels.bin")
    return {"images": len(labels), "skipped": skipped}, histogram
