"""images.raw."""
import contextlib
import itertools
import math
from pathlib import Path

import numpy as np

from images.files import (
    LABEL,
    FileSet,
    ImageSet,
    cifar_files,
    folders,
    idx_files,
    image_files,
    is_pickled,
    pillow,
    read_idx,
)
from support.cli import BadInput

SIDES = ("train", "val")


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
