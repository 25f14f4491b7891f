"""Image sets in memory and on disk, and the decoding of their files: JPEG, PNG, CIFAR's and MNIST's
formats."""
import contextlib
import functools
import gzip
import itertools
import math
import multiprocessing
import os
import signal
import struct
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.cli import BadInput

SUFFIXES = {".jpg", ".jpeg", ".png"}
JUNK = {"thumbs.db", "desktop.ini"}  # and everything that starts with a dot
LABEL = np.dtype(np.int64)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in memory, or memory-mapped."""

    name: str
    images: np.ndarray  # uint8 (N, size, size, 3), RGB
    labels: np.ndarray  # int64 (N,)
    classes: tuple      # names, by label

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        """-> uint8 array (B, size, size, 3)."""
        return np.asarray(self.images[np.asarray(indices)])

    def batch(self, indices):
        """Images and labels of these numbers -> uint8 (B, size, size, 3), LongTensor (B,)."""
        return torch.from_numpy(self.read(indices)), torch.from_numpy(self.labels[np.asarray(indices)])


@dataclass(frozen=True)
class FileSet:
    """Images decoded from their files whenever they are asked for, many at a time by worker processes."""

    name: str
    files: tuple        # str
    labels: np.ndarray  # int64 (N,)
    classes: tuple
    size: int
    corrupt: set = field(default_factory=set)  # numbers of the files that `batch` could not decode so far

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        """-> for each number a uint8 array (size, size, 3), or a str that says why there is none."""
        files = [self.files[i] for i in indices]
        if len(files) <= 32:
            return decode_all(files, self.size)
        part = math.ceil(len(files) / (4 * os.cpu_count()))
        parts = [files[i:i + part] for i in range(0, len(files), part)]
        try:
            return list(itertools.chain.from_iterable(pool().map(decode_all, parts,
                                                                 itertools.repeat(self.size))))
        except BrokenProcessPool:  # somebody killed a worker; the next call starts others
            pool.cache_clear()
            return decode_all(files, self.size)

    def batch(self, indices):
        """As ImageSet.batch. The next file stands in for a corrupt one, with its label; more than 1% are
        refused."""
        indices = np.array(indices)
        images = self.read(indices)
        for row, image in enumerate(images):
            while isinstance(image, str):
                if indices[row] not in self.corrupt:
                    self.corrupt.add(indices[row])
                    tqdm.write(f"note: {image}; the next file stands in", file=sys.stderr)
                    check_corrupt(len(self.corrupt), len(self), image)
                indices[row] = (indices[row] + 1) % len(self)
                image = decode(self.files[indices[row]], self.size)
            images[row] = image
        return torch.from_numpy(np.stack(images)), torch.from_numpy(self.labels[indices])


@dataclass(frozen=True)
class Images:
    """A training and a validation set of the same classes, and the channels' mean and deviation over the
    former, 0..1."""

    name: str
    size: int
    classes: tuple
    mean: tuple
    std: tuple
    train: object  # ImageSet or FileSet
    val: object


def chunks(rows, size):
    """Cut an array of image numbers into parts of about 64 MB of pixels."""
    return np.array_split(rows, math.ceil(len(rows) * size * size * 3 / 2 ** 26))


# ---------------------------------------------------------------------------- JPEG and PNG files

@functools.cache
def pool():
    """Worker processes that decode. Threads would wait for each other from about five cores on: pillow gives
    up the interpreter's lock for 80% of the time that a photograph of 500 x 375 takes."""
    methods = multiprocessing.get_all_start_methods()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's processes share them
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["images.files"])
    executor = ProcessPoolExecutor(workers, context, initializer=start_worker)
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by what starts now
        executor.submit(int)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return executor


def start_worker():
    """A worker leaves Ctrl-C to its parent, which may want to finish and save, and ends when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def decode_all(files, size):
    return [decode(file, size) for file in files]


def pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise BadInput("JPEG and PNG files need the pillow package: pip install pillow") from None
    return Image, ImageOps


def decode(path, size):
    """A JPEG or PNG file as RGB -> uint8 (size, size, 3); a str that names file and reason if it is corrupt.

    Turned as its EXIF orientation says. Grey is repeated to three channels, 16 bits are cut to the upper 8,
    palettes are resolved, CMYK is converted without colour profile, what is transparent is laid over white.
    The shorter side is resized to `size` (bicubic, antialiased) and the centre cut out; an image of that size
    already is left as it is.
    """
    Image, ImageOps = pillow()
    try:
        with Image.open(path) as image:
            # a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8
            image.draft(None, (2 * size, 2 * size))
            with contextlib.suppress(Exception):  # damaged EXIF data; damaged pixels fail again below
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0,
                                                                                       255).astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "RGB":
                image = image.convert("RGB")
            if image.size != (size, size):
                wide, high = image.size
                side = min(wide, high)
                left, top = (wide - side) / 2, (high - side) / 2
                image = image.resize((size, size), Image.Resampling.BICUBIC,
                                     (left, top, left + side, top + side))
            return np.array(image)
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        return f"{path} is corrupt ({' '.join(str(error).split())[:200]})"


def check_corrupt(corrupt, count, example):
    if corrupt * 100 > count:
        raise BadInput(f"{corrupt} of {count} files cannot be decoded, more than 1%: {example}; remove or "
                       "replace them")


def visible(folder):
    """The entries of a folder without hidden ones and junk, in no order; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from (entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in JUNK)


def folders(parent):
    """The visible folders in a folder, sorted."""
    return sorted(Path(entry.path) for entry in visible(parent) if entry.is_dir())


def all_files(folder):
    """The paths of all files in a folder and below, without hidden ones, hidden folders and junk."""
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        yield from (os.path.join(parent, name) for name in names if name[0] != "."
                    and name.lower() not in JUNK)


def is_image(path):
    """Whether this is a JPEG or PNG file by its name."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def image_files(folder):
    """The JPEG and PNG files in a folder and below, sorted; other files are passed over."""
    return sorted(filter(is_image, all_files(folder)))


def is_pickled(root):
    """Whether this folder holds CIFAR-10 or CIFAR-100 as Python pickles, told by a byte that begins no UTF-8
    text."""
    for path in (root / "data_batch_1", root / "train"):
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(1) == b"\x80"
    return False


def cifar_files(root):
    """{"train": files, "val": files} of CIFAR-10 or CIFAR-100 in binary, or nothing."""
    ten = {"train": sorted(root.glob("data_batch_*.bin")), "val": [root / "test_batch.bin"]}
    hundred = {"train": [root / "train.bin"], "val": [root / "test.bin"]}
    for files, sign in ((ten, root / "test_batch.bin"), (hundred, root / "fine_label_names.txt")):
        if sign.is_file() and files["train"] and all(map(Path.is_file, files["train"] + files["val"])):
            return files
    return None


def idx_files(root):
    """{"train": (images, labels), "val": (images, labels)} of MNIST's idx files, or nothing."""
    found = {}
    for side, prefix in (("train", "train"), ("val", "t10k")):
        pair = [next((root / (name + end) for end in ("", ".gz")
                      for name in (f"{prefix}-{kind}-idx{dims}-ubyte",
                f"{prefix}-{kind}.idx{dims}-ubyte") if (root / (name + end)).is_file()), None)
                for kind, dims in (("images", 3), ("labels", 1))]
        if None in pair:
            return None
        found[side] = tuple(pair)
    return found


def read_idx(path, dims):
    """An idx file of bytes -> uint8 array of `dims` dimensions. Header: 0, 0, 8 (bytes), dims, then each
    length in 4 bytes, big-endian. The lengths are checked against the size of the file before anything is
    allocated."""
    with open(path, "rb") as file:
        if zipped := path.suffix == ".gz":
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            size = int.from_bytes(file.read(), "little")  # of the content, modulo 2^32
        else:
            size = path.stat().st_size
        file.seek(0)
        try:
            content = gzip.GzipFile(fileobj=file) if zipped else file
            magic, *shape = struct.unpack(f">{1 + dims}I", content.read(4 + 4 * dims))
            count = math.prod(shape)
            if magic != 0x0800 + dims or count == 0:
                raise BadInput(f"{path} is not an idx file of bytes in {dims} dimensions")
            if count + 4 + 4 * dims != size:
                raise BadInput(f"{path} should have {count + 4 + 4 * dims} bytes by its header, but has "
                               f"{size}")
            data = content.read(count)
        except (EOFError, OSError, struct.error, zlib.error) as error:
            raise BadInput(f"{path} is not a whole idx file: {error}") from None
    return np.frombuffer(data, np.uint8).reshape(shape)
