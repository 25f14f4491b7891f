"""Images in, batches of uint8 out; and what is done to a batch on the device: crops, patches, mixing.

    shapes       a drawn set of 12 classes: nothing to download
    DIR          an image folder written by `python data.py images INPUT --size N --out DIR`, memory-mapped
    DIR          a folder of class folders, decoded while training: train/CLASS/*.jpg and val/CLASS/*.jpg (or test/), or
                 CLASS/*.jpg alone, of which a seeded share of every class is held out
    DIR          the binary files of CIFAR-10 or CIFAR-100 (fine labels), or the idx files of MNIST and its kin (.gz too)

An image folder holds train.bin and val.bin (uint8, N x size x size x RGB), train.labels.bin and val.labels.bin (int64) and
manifest.json (classes, counts, size, mean and standard deviation per channel, what was skipped).

Look at any of them: python images.py shapes --out sheet.png
"""
import contextlib
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import shutil
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

from masks import BadInput, Parser, command_line, output_file, positive
from masks import seed as seed_type
from shapes import SHAPES, shapes

SIDES = ("train", "val")
SUFFIXES = {".jpg", ".jpeg", ".png"}
JUNK = {"thumbs.db", "desktop.ini"}  # and everything that starts with a dot
LABEL = np.dtype(np.int64)


# ---------------------------------------------------------------------------- image sets

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
            return list(itertools.chain.from_iterable(pool().map(decode_all, parts, itertools.repeat(self.size))))
        except BrokenProcessPool:  # somebody killed a worker; the next call starts others
            pool.cache_clear()
            return decode_all(files, self.size)

    def batch(self, indices):
        """As ImageSet.batch. The next file stands in for a corrupt one, with its label; more than 1% are refused."""
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
    """A training and a validation set of the same classes, and the channels' mean and deviation over the former, 0..1."""

    name: str
    size: int
    classes: tuple
    mean: tuple
    std: tuple
    train: object  # ImageSet or FileSet
    val: object


def is_images(source):
    """Whether --data names images rather than text; see the top of this file. Looks at a few hundred names at most.

    A folder of class folders counts if neither it nor the first files of its first class folders hold anything else, so
    that a text with figures beside it remains a text.
    """
    if source == "shapes":
        return True
    if not source or source == "pydoc" or str(source).startswith("hf:"):
        return False
    root = Path(source)
    try:
        if (root / "manifest.json").exists():
            return (root / "train.labels.bin").exists() or json.loads((root / "manifest.json").read_text()).get(
                "format") == "images"
        if not root.is_dir():
            return False
        if cifar_files(root) or idx_files(root) or is_pickled(root):  # the last are refused, but not read as text
            return True
        parent = next((root / side for side in ("train", "val", "test") if (root / side).is_dir()), root)
        parent = parent if folders(parent) else root
        return not any(entry.is_file() for entry in visible(parent)) and all_images(
            itertools.chain.from_iterable(itertools.islice(visible(folder), 10) for folder in folders(parent)[:20]))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def all_images(entries):
    """Whether these directory entries, and there are some, are JPEG or PNG files by name."""
    kinds = [Path(entry.name).suffix.lower() in SUFFIXES for entry in entries]
    return bool(kinds) and all(kinds)


def load_images(source, size=None):
    """What --data names as Images of size x size pixels; None: the size they have, 224 where files differ.

    Mean and deviation are those of all training images, for files that are decoded while training of 1,000 of them.
    """
    if source == "shapes":
        size = size or 32
        train, val = (ImageSet("shapes", *shapes(count, size, seed), tuple(SHAPES)) for count, seed in ((8000, 0), (2000, 1)))
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
        classes, mean, std = list(map(str, manifest["classes"])), *(list(map(float, manifest[key])) for key in ("mean", "std"))
        found, counts = int(manifest["size"]), {side: int(manifest[side]["images"]) for side in SIDES}
        if not (len(mean) == len(std) == 3 and min(*std, found, *counts.values(), len(classes)) > 0
                and all(map(math.isfinite, mean + std))):
            raise ValueError("numbers that cannot be")
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        raise BadInput(f"{folder} is not a whole image folder ({error!r}); make it anew with python data.py images") from None
    if size not in (None, found):
        raise BadInput(f"{folder} holds images of {found} x {found} pixels, not {size} x {size}; make another with "
                       f"python data.py images INPUT --size {size} --out DIR")
    sets = {}
    for side, count in counts.items():
        path, labels = folder / f"{side}.bin", folder / f"{side}.labels.bin"
        for file, expected in ((path, count * found * found * 3), (labels, count * LABEL.itemsize)):
            length = file.stat().st_size if file.exists() else 0
            if length != expected:
                raise BadInput(f"{file} has {length} bytes where the manifest says {expected}; make the folder anew")
        values = np.fromfile(labels, LABEL)
        if values.min() < 0 or values.max() >= len(classes):
            raise BadInput(f"{labels} holds labels beyond the {len(classes)} classes; make the folder anew")
        sets[side] = ImageSet(f"{folder}/{side}", np.memmap(path, np.uint8, "r", shape=(count, found, found, 3)), values,
                              tuple(classes))
    return Images(str(folder), found, tuple(classes), tuple(mean), tuple(std), **sets)


def channel_histogram(images):
    """uint8 (B, H, W, 3) -> counts (3, 256), from which the moments follow exactly."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])


def moments(histogram):
    """Mean and standard deviation per channel, in 0..1; a channel that never varies gets a deviation of one grey level."""
    values, share = np.arange(256) / 255, histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def chunks(rows, size):
    """Cut an array of image numbers into parts of about 64 MB of pixels."""
    return np.array_split(rows, math.ceil(len(rows) * size * size * 3 / 2 ** 26))


def order(count, seed, start, size):
    """Numbers start .. start + size - 1 of an endless stream of epochs over `count` images -> int64 (size,).

    Each epoch is a permutation of its own, the same whoever asks, which makes resuming exact. seed None: in order.
    """
    epochs, k = np.divmod(np.arange(start, start + size), count)
    if seed is None:
        return k
    return np.concatenate([epoch_order(count, seed, int(epoch))[k[epochs == epoch]] for epoch in np.unique(epochs)])


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---------------------------------------------------------------------------- JPEG and PNG files

@functools.cache
def pool():
    """Worker processes that decode. Threads would wait for each other from about five cores on: pillow gives up the
    interpreter's lock for 80% of the time that a photograph of 500 x 375 takes."""
    methods = multiprocessing.get_all_start_methods()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's processes share them
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["images"])
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

    Turned as its EXIF orientation says. Grey is repeated to three channels, 16 bits are cut to the upper 8, palettes are
    resolved, CMYK is converted without colour profile, what is transparent is laid over white. The shorter side is resized
    to `size` (bicubic, antialiased) and the centre cut out; an image of that size already is left as it is.
    """
    Image, ImageOps = pillow()
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))  # a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8
            with contextlib.suppress(Exception):  # damaged EXIF data; damaged pixels fail again below
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "RGB":
                image = image.convert("RGB")
            if image.size != (size, size):
                wide, high = image.size
                side = min(wide, high)
                left, top = (wide - side) / 2, (high - side) / 2
                image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            return np.array(image)
    except Exception as error:  # noqa: BLE001  a file of any content can fail in any way
        return f"{path} is corrupt ({' '.join(str(error).split())[:200]})"


def check_corrupt(corrupt, count, example):
    if corrupt * 100 > count:
        raise BadInput(f"{corrupt} of {count} files cannot be decoded, more than 1%: {example}; remove or replace them")


def visible(folder):
    """The entries of a folder without hidden ones and junk, in no order; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from (entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in JUNK)


def folders(parent):
    """The visible folders in a folder, sorted."""
    return sorted(Path(entry.path) for entry in visible(parent) if entry.is_dir())


def image_files(folder):
    """The JPEG and PNG files in a folder and below, sorted; other files are passed over."""
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names
                  if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES)


def open_folder(root, size=None, val_fraction=0.1, seed=0):
    """A folder of class folders as {"train": FileSet, "val": FileSet}.

    train/ and val/, or test/ where there is no val/, must hold the same classes. Without them, the classes lie in `root`
    and a share of each is held out. A class without files is refused.
    """
    sides = {name: {f.name: image_files(f) for f in folders(root / name)} for name in ("train", "val", "test")}
    if not any(sides.values()):
        files = {f.name: image_files(f) for f in folders(root)}
        if not any(files.values()):
            raise BadInput(f"{root} holds no class folders with JPEG or PNG files, no CIFAR binary files and no idx files")
        rng, train, val = np.random.default_rng(seed), {}, {}
        for name, paths in files.items():
            held = set(rng.permutation(len(paths))[:max(1, round(val_fraction * len(paths)))].tolist())
            train[name] = [path for i, path in enumerate(paths) if i not in held]
            val[name] = [path for i, path in enumerate(paths) if i in held]
        sides = {"train": train, "val": val}
    val = "val" if sides["val"] else "test"
    for missing in (name for name in ("train", val) if not sides[name]):
        raise BadInput(f"{root} has no class folders in {missing}/")
    for odd in sorted(sides["train"].keys() ^ sides[val].keys()):
        has, lacks = ("train", val) if odd in sides["train"] else (val, "train")
        raise BadInput(f"class folder {odd} is in {has}/ but not in {lacks}/ of {root}; both need the same classes")
    for name in ("train", val):
        for label, paths in sides[name].items():
            if not paths:
                raise BadInput(f"class {label} of {root} has no JPEG or PNG files for {name}; fill or remove its folder")
    classes = tuple(sides["train"])
    if size is None:
        size = common_size([path for paths in sides["train"].values() for path in paths])
    return {side: FileSet(f"{root}/{name}", tuple(itertools.chain.from_iterable(sides[name].values())),
                          np.repeat(np.arange(len(classes)), [len(sides[name][label]) for label in classes]), classes, size)
            for side, name in zip(SIDES, ("train", val))}


def common_size(files):
    """The side of these images if 100 of them are squares of one size, else 224."""
    Image, _ = pillow()
    sizes = set()
    for path in files[::math.ceil(len(files) / 100)]:
        with contextlib.suppress(Exception), Image.open(path) as image:  # the corrupt are named when they are decoded
            sizes.add(image.size)
    wide, high = sizes.pop() if len(sizes) == 1 else (0, 1)
    return wide if wide == high else 224


# ---------------------------------------------------------------------------- CIFAR and MNIST files

def open_raw(source, size=None, val_fraction=0.1, seed=0):
    """{"train": set, "val": set} of files as they were published; `size` and the rest are for files that are decoded."""
    root = Path(source)
    if not source or not root.is_dir():
        raise BadInput(f"{source or 'the name of the data'} is not a folder; give a folder of class folders, of CIFAR binary "
                       "files or of idx files, or shapes")
    if is_pickled(root):
        raise BadInput(f"{source} holds CIFAR as Python pickles, which can run code when they are read; take the binary "
                       "version from the same page")
    if files := cifar_files(root):
        return open_cifar(root, files)
    if files := idx_files(root):
        return open_idx(root, files)
    if not 0 < val_fraction < 1:
        raise BadInput(f"--val-fraction {val_fraction:g} is not between 0 and 1")
    return open_folder(root, size, val_fraction, seed)


def is_pickled(root):
    """Whether this folder holds CIFAR-10 or CIFAR-100 as Python pickles, told by a byte that begins no UTF-8 text."""
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


def open_cifar(root, files):
    """Records of one label byte (CIFAR-100: coarse and fine, the fine one is kept) and 3 x 32 x 32 bytes."""
    labels, names = (1, "batches.meta.txt") if files["val"][0].name == "test_batch.bin" else (2, "fine_label_names.txt")
    count = 10 if labels == 1 else 100
    classes = tuple((root / names).read_text(encoding="utf-8", errors="replace").split()) if (root / names).exists() else tuple(map(str, range(count)))
    if len(classes) != count:
        raise BadInput(f"{root / names} names {len(classes)} classes, not {count}")
    record, sets = labels + 3 * 32 * 32, {}
    for side, paths in files.items():
        for path in paths:
            if path.stat().st_size == 0 or path.stat().st_size % record:
                raise BadInput(f"{path} has {path.stat().st_size} bytes, not a multiple of {record}: it is not whole")
        data = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, record) for path in paths])
        fine = data[:, labels - 1].astype(LABEL)
        if fine.max() >= count:
            raise BadInput(f"{root} holds the label {fine.max()}, beyond the {count} classes of this format")
        images = np.ascontiguousarray(data[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        sets[side] = ImageSet(f"{root}/{side}", images, fine, classes)
    return sets


def idx_files(root):
    """{"train": (images, labels), "val": (images, labels)} of MNIST's idx files, or nothing."""
    found = {}
    for side, prefix in (("train", "train"), ("val", "t10k")):
        pair = [next((root / (name + end) for end in ("", ".gz") for name in (f"{prefix}-{kind}-idx{dims}-ubyte",
                f"{prefix}-{kind}.idx{dims}-ubyte") if (root / (name + end)).is_file()), None)
                for kind, dims in (("images", 3), ("labels", 1))]
        if None in pair:
            return None
        found[side] = tuple(pair)
    return found


def open_idx(root, files):
    sets, classes = {}, ()
    for side, (image_path, label_path) in files.items():
        images, labels = read_idx(image_path, 3), read_idx(label_path, 1).astype(LABEL)
        if len(images) != len(labels):
            raise BadInput(f"{image_path} holds {len(images)} images, {label_path} {len(labels)} labels")
        classes = classes or tuple(map(str, range(labels.max() + 1)))  # those of the training set
        if labels.max() >= len(classes):
            raise BadInput(f"{label_path} holds the label {labels.max()}, which the training set lacks")
        sets[side] = ImageSet(f"{root}/{side}", np.repeat(images[..., None], 3, axis=3), labels, classes)
    return sets


def read_idx(path, dims):
    """An idx file of bytes -> uint8 array of `dims` dimensions. Header: 0, 0, 8 (bytes), dims, then each length in 4 bytes,
    big-endian. The lengths are checked against the size of the file before anything is allocated."""
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
                raise BadInput(f"{path} should have {count + 4 + 4 * dims} bytes by its header, but has {size}")
            data = content.read(count)
        except (EOFError, OSError, struct.error, zlib.error) as error:
            raise BadInput(f"{path} is not a whole idx file: {error}") from None
    return np.frombuffer(data, np.uint8).reshape(shape)


# ---------------------------------------------------------------------------- image folders

def prepare(source, out, size=None, val_fraction=0.1, seed=0, quiet=False):
    """Write an image folder from a folder of class folders, CIFAR binary files or idx files; returns its manifest.

    size             of the square images; None: as they are, or 224 where files differ
    val_fraction     held out of each class, by `seed`, where the classes have no train/ and val/

    Corrupt files are named, skipped and listed in the manifest; more than 1% of a set are refused.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty folder; choose another --out or remove it")
    if source and out.resolve().is_relative_to(Path(source).resolve()):
        raise BadInput(f"{out} lies inside the input {source}, which would then be read again; write to another folder")
    if (Path(source) / "manifest.json").exists():
        raise BadInput(f"{source} is prepared already; give it to train.py --data as it is")
    sets = open_raw(source, size, val_fraction, seed)
    if size is None:
        size = sets["train"].size if isinstance(sets["train"], FileSet) else min(sets["train"].images.shape[1:3])
    out.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(map(len, sets.values())), shutil.disk_usage(out.parent).free
    if total * size * size * 3 > free:
        raise BadInput(f"{total:,} images of {size} x {size} pixels need {total * size * size * 3 / 1e9:,.0f} GB, but there "
                       f"are {free / 1e9:,.0f} GB free at {out.parent}; {source} can be given to train.py --data as it is")
    partial = out.with_name(out.name + ".partial")  # renamed when complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    manifest = {"format": "images", "size": size, "classes": sets["train"].classes, "sources": [str(source)]}
    histogram = {side: 0 for side in SIDES}
    try:
        with tqdm(total=total, unit="image", disable=quiet or not sys.stderr.isatty()) as bar:
            for side, part in sets.items():
                labels, skipped = [], []
                with open(partial / f"{side}.bin", "wb") as file:
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
                            histogram[side] += channel_histogram(pixels)
                        bar.update(len(rows))
                np.array(labels, LABEL).tofile(partial / f"{side}.labels.bin")
                manifest[side] = {"images": len(labels), "skipped": skipped}
        manifest["mean"], manifest["std"] = moments(histogram["train"])
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(out, ignore_errors=True)  # empty
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def fit(images, size):
    """uint8 (B, H, W, 3) -> uint8 (B, size, size, 3): the centre square, resized if need be."""
    if images.shape[1:3] == (size, size):
        return images
    x = crop(torch.from_numpy(np.ascontiguousarray(images)), None, size)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


# ---------------------------------------------------------------------------- crops

def random_views(count, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True):
    """Random resized crops and flips, drawn on the CPU -> (count, 5): centre x, y, width, height in 0..1, sign.

    The share of the area is uniform in `scale`, the side ratio log-uniform in that part of `ratio` which fits into the
    image, the place uniform; sign -1 is mirrored left to right, half of the views unless flip is False.
    """
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= 1 <= ratio[1]):
        raise BadInput(f"crops need 0 < scale <= 1 and a ratio range around 1, got {scale} and {ratio}")
    u = torch.rand(5, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    low, high = area.log().clamp(min=math.log(ratio[0])), (-area.log()).clamp(max=math.log(ratio[1]))
    shape = (low + (high - low) * u[1]).exp()
    wide, high = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    sign = torch.where(u[4] < 0.5, -1.0, 1.0) if flip else torch.ones(count)
    return torch.stack([wide / 2 + (1 - wide) * u[2], high / 2 + (1 - high) * u[3], wide, high, sign], dim=1)


def crop(images, views, size):
    """Cut the views out of the images and resize them -> float32 (B, 3, size, size) in 0..1, on the images' device.

    images uint8 (B, H, W, 3); views of random_views, or None for the largest centred square, which is exact where it has
    that size already. Bilinear, averaging over the area of a new pixel where that is larger than an old one. The filter is
    separable, so that the whole batch takes two products with (B, size, H) and (B, size, W) weights.
    """
    B, H, W, _ = images.shape
    x = images.permute(0, 3, 1, 2).float() / 255                                # (B, 3, H, W)
    if views is None:
        if H == W == size:
            return x
        views = torch.tensor([[0.5, 0.5, min(H, W) / W, min(H, W) / H, 1]]).expand(B, 5)
    cx, cy, wide, high, sign = views.to(images.device, torch.float32).unbind(1)
    with torch.autocast(images.device.type, enabled=False):  # bf16 would lose grey levels
        rows, columns = resize_weights(cy, high, H, size), resize_weights(cx, sign * wide, W, size)
        return rows[:, None] @ x @ columns[:, None].transpose(2, 3)


def resize_weights(centre, extent, length, size):
    """Weights (B, size, length) that resample `length` pixels to `size` within centre +- extent/2, given in 0..1 as (B,); a
    negative extent mirrors. Each row is a triangle around its place, as wide as the larger of both pixels, of sum one."""
    place = (torch.arange(size, device=centre.device) + 0.5) / size - 0.5
    place = (centre[:, None] + extent[:, None] * place) * length                # (B, size), in old pixels
    pixel = torch.arange(length, device=centre.device) + 0.5
    width = (extent.abs() * (length / size)).clamp(min=1)[:, None, None]
    weights = (1 - (place[..., None] - pixel).abs() / width).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(x, mean, std):
    """(B, 3, H, W) in 0..1 -> zero mean and unit deviation per channel, given the set's."""
    mean, std = (torch.as_tensor(values, device=x.device, dtype=x.dtype)[:, None, None] for values in (mean, std))
    return (x - mean) / std


def denormalise(x, mean, std):
    """The inverse of normalise."""
    mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype)[:, None, None] for values in (mean, std))
    return x * std + mean


# ---------------------------------------------------------------------------- patches

def patchify(x, patch):
    """(B, C, H, W) -> (B, S, C * patch * patch): patches in raster order, each channel by channel."""
    B, C, H, W = x.shape
    if H % patch or W % patch:
        raise BadInput(f"images of {W} x {H} pixels cannot be cut into patches of {patch} x {patch}")
    x = x.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, -1, C * patch * patch)


def unpatchify(patches, patch, channels=3):
    """The inverse of patchify for square images: (B, S, C * patch * patch) -> (B, C, H, W)."""
    B, S, _ = patches.shape
    side = math.isqrt(S)
    if side * side != S:
        raise BadInput(f"{S} patches do not make up a square image")
    x = patches.reshape(B, side, side, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, channels, side * patch, side * patch)


class Patches:
    """An ImageSet as sequences of patches for a model of that Config. The counterpart of data.Sequences: image number k
    of training, and the crop of it that is shown, are the same whoever asks.

    seed   the order, drawn anew for each epoch; None: in order
    least  of a random crop's share of the area; None: whole images, resized where they are not of the model's size
    """

    def __init__(self, images, config, seed=None, least=None, device="cpu"):
        self.images, self.config, self.seed, self.least, self.device = images, config, seed, least, device
        self.total = len(images)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.mean, config.std))

    def __len__(self):
        return self.total

    def labelled(self, start, size, part=slice(None)):
        """Images number start .. start + size - 1, counted over epochs, or a part of these -> patches (B, S, values) on the
        device, labels (B,)."""
        config = self.config
        images, labels = self.images.batch(order(self.total, self.seed, start, size)[part])
        views = None
        if self.least is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start + 500_000_009)  # not that of the masks
            views = self.moved(random_views(size, generator, (self.least, 1.0))[part])
        x = normalise(crop(self.moved(images), views, config.size), self.mean, self.std)
        return patchify(x, config.patch), labels

    def moved(self, x):
        """x on the device; through pinned memory the thread need not wait for what the device is doing."""
        return x.pin_memory().to(self.device, non_blocking=True) if torch.device(self.device).type == "cuda" else x.to(self.device)

    def batch(self, start, size, part=slice(None)):
        """The same without labels."""
        return self.labelled(start, size, part)[0]


# ---------------------------------------------------------------------------- mixing and erasing, for fine-tuning

def soft_targets(labels, classes, smoothing=0.0):
    """LongTensor (B,) -> (B, classes): 1 - smoothing on the label, and `smoothing` shared out over all classes."""
    return torch.nn.functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix(x, targets, generator, mixup=0.8, cutmix=1.0):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), by even chance, of each image with the one before it.

    x (B, C, H, W), targets (B, K) -> the same. The batch shares one weight lambda ~ Beta(mixup, mixup), or one box, of an
    area 1 - lambda with lambda ~ Beta(cutmix, cutmix), cut off at the border; its targets are mixed by the area that is
    really there. A parameter of 0 switches its kind off.
    """
    if not (mixup >= 0 and cutmix >= 0):
        raise BadInput(f"the parameters of mixup and cutmix are at least 0, got {mixup:g} and {cutmix:g}")
    if not mixup and not cutmix:
        return x, targets
    rng = np.random.default_rng(torch.randint(2 ** 62, (), generator=generator).item())  # torch's Beta takes no generator
    boxes = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = rng.beta(*[cutmix if boxes else mixup] * 2)
    if boxes:
        H, W = x.shape[2:]
        high, wide = (round(length * math.sqrt(1 - share)) for length in (H, W))
        top, left = rng.integers(H) - high // 2, rng.integers(W) - wide // 2
        box = np.s_[:, :, max(0, top):max(0, top + high), max(0, left):max(0, left + wide)]
        mixed = x.clone()
        mixed[box] = x.roll(1, 0)[box]
        share = 1 - x[box].numel() / x.numel()
    else:
        mixed = share * x + (1 - share) * x.roll(1, 0)
    return mixed, share * targets + (1 - share) * targets.roll(1, 0)


def random_erase(x, generator, probability=0.25):
    """Random erasing (arXiv 1708.04896) of normalised images (B, C, H, W): with that probability one box of 2% to 33% of the
    area, side ratio 0.3 to 3.3, becomes unit normal noise."""
    B, _, H, W = x.shape
    u = torch.rand(5, B, generator=generator)
    area, shape = (0.02 + (1 / 3 - 0.02) * u[0]) * H * W, (math.log(0.3) + math.log(3.3 / 0.3) * u[1]).exp()
    high, wide = (area * shape).sqrt().round().clamp(1, H), (area / shape).sqrt().round().clamp(1, W)
    top, left = (u[2] * (H - high + 1)).floor(), (u[3] * (W - wide + 1)).floor()
    row, column = torch.arange(H), torch.arange(W)
    inside = (((row >= top[:, None]) & (row < (top + high)[:, None]))[:, :, None]
              & ((column >= left[:, None]) & (column < (left + wide)[:, None]))[:, None, :])     # (B, H, W)
    inside &= (u[4] < probability)[:, None, None]
    device = torch.Generator(x.device).manual_seed(torch.randint(2 ** 62, (), generator=generator).item())
    noise = torch.randn(x.shape, generator=device, device=x.device, dtype=x.dtype)
    return torch.where(inside[:, None].to(x.device), noise, x)


# ---------------------------------------------------------------------------- pictures

def contact_sheet(images, gap=2):
    """uint8 (rows, columns, H, W, 3) -> uint8 (height, width, 3) on white, small images enlarged to about 64 pixels."""
    images = np.asarray(images)
    times = max(1, 64 // images.shape[2])
    images = np.pad(images.repeat(times, 2).repeat(times, 3), ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)),
                    constant_values=255)
    rows, columns, H, W, _ = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3)


def write_png(path, image):
    """Write uint8 (H, W, 3) as a PNG file; needs no package."""
    H, W, _ = image.shape
    lines = np.concatenate([np.zeros((H, 1), np.uint8), image.reshape(H, W * 3)], axis=1)  # filter 0 before each line

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0))
                           + part(b"IDAT", zlib.compress(lines.tobytes())) + part(b"IEND", b""))


# ---------------------------------------------------------------------------- command line

def prepare_command(args):
    """`python data.py images`."""
    manifest = prepare(args.input, args.out, args.size, args.val_fraction, args.seed)
    for side in SIDES:
        count = manifest[side]
        print(f"{side:5s} {count['images']:10,} images" + (f", {len(count['skipped']):,} corrupt files skipped"
                                                           if count["skipped"] else ""))
    print(f"{args.out}: {manifest['size']} x {manifest['size']} pixels, {len(manifest['classes'])} classes")


def add_options(parser):
    """The options of `python data.py images`."""
    parser.add_argument("input", metavar="INPUT", help="folder of class folders (with train/ and val/ or test/, or without), of "
                        "the binary files of CIFAR-10 or CIFAR-100, or of MNIST's idx files")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--size", type=positive, help="side in pixels: the shorter side is resized to it and the centre cut "
                        "out (default: as they are, or 224 where files differ)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="held out of each class where there is no val/ or test/")
    parser.add_argument("--seed", type=seed_type, default=0, help="of what is held out")


def main(argv=None):
    parser = Parser(description="Draw a contact sheet of an image set: one row for each class.")
    parser.add_argument("source", metavar="DATA", help="shapes, or a folder of images (see the top of this file)")
    parser.add_argument("--out", type=output_file, default="sheet.png", help="PNG file to write")
    parser.add_argument("--size", type=positive, help="side of the images in pixels (default: as they are)")
    parser.add_argument("--columns", type=positive, default=16, help="images of each class")
    parser.add_argument("--rows", type=positive, default=20, help="classes at most")
    parser.add_argument("--views", action="store_true", help="random resized crops and flips, as in training")
    args = parser.parse_args(argv)
    data = load_images(args.source, args.size)
    labels, rng = data.train.labels, np.random.default_rng(0)
    shown = np.unique(labels)[:args.rows]
    rows = [rng.choice(np.flatnonzero(labels == label), args.columns) for label in shown]
    images, _ = data.train.batch(np.concatenate(rows))
    if args.views:
        x = crop(images, random_views(len(images), torch.Generator().manual_seed(0)), data.size)
        images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    write_png(args.out, contact_sheet(images.numpy().reshape(len(rows), args.columns, *images.shape[1:])))
    print(f"{args.out}: {', '.join(data.classes[label] for label in shown)}, from the top")
    print(f"{len(data.train):,} training and {len(data.val):,} validation images of {data.size} x {data.size} pixels, mean "
          f"{', '.join(f'{v:.3f}' for v in data.mean)}, deviation {', '.join(f'{v:.3f}' for v in data.std)}")


if __name__ == "__main__":
    command_line(main)
