"""Image sets as they come: folders of JPEG and PNG files, CIFAR's binary files, MNIST's idx files."""
import contextlib
import itertools
import math
from pathlib import Path

import numpy as np

from images.files import (
    LABEL,
    FileSet,
    ImageSet,
    all_files,
    cifar_files,
    folders,
    idx_files,
    image_files,
    is_image,
    is_pickled,
    pillow,
    read_idx,
    visible,
)
from support.cli import BadInput, note_once

SIDES = ("train", "val")


def open_folder(root, size=None, val_fraction=0.1, seed=0):
    """A folder of images as {"train": FileSet, "val": FileSet}.

    Classes are the names of the folders that hold the images; a folder with images of its own, or with one
    folder of them only, has none. train/ and val/, or test/ where there is no val/, must hold the same
    classes; without them, a share of each class is held out. A class without files is refused.
    """
    sides = {name: classes_in(root / name) for name in ("train", "val", "test")}
    sides = {name: files for name, files in sides.items() if any(files.values())}
    if "train" in sides and len(sides) > 1:
        sides = {"train": sides["train"], "val": sides.get("val") or sides["test"]}
        check_classes(root, *sides.values(), "val" if (root / "val").is_dir() else "test")
    else:
        everything = next(iter(sides.values()), None) or classes_in(root)
        if not any(everything.values()):
            raise BadInput(f"{root} holds no JPEG or PNG files, no CIFAR binary files and no idx files")
        sides = hold_out(everything, val_fraction, seed)
    for side, files in sides.items():
        for label, paths in files.items():
            if not paths:
                named = f"class {label} of {root}" if label else str(root)
                raise BadInput(f"{named} has no JPEG or PNG files for {side}; fill or remove its folder")
    classes = tuple(filter(None, sides["train"]))
    counts = {side: [len(paths) for paths in files.values()] for side, files in sides.items()}
    if not classes:
        note_once(f"note: {root} is taken as {sum(counts['train']):,} training and {sum(counts['val']):,} "
                  "validation "
                  "images without classes")
    if size is None:
        size = common_size(list(itertools.chain.from_iterable(sides["train"].values())))
    return {side: FileSet(f"{root}/{side}", tuple(itertools.chain.from_iterable(files.values())),
                          np.repeat(np.arange(len(files)), counts[side]), classes, size)
            for side, files in sides.items()}


def classes_in(folder):
    """{class: its images' paths} of class folders; {"": paths} where there are images but no classes."""
    if not folder.is_dir():
        return {}
    inner = {f.name: image_files(f) for f in folders(folder)}
    own = any(is_image(entry.path) for entry in visible(folder) if entry.is_file())
    filled = sum(map(bool, inner.values()))
    if own or not filled or filled < 2 and folder.name not in ("train", "val", "test"):
        return {"": image_files(folder)}
    # A folder of other things beside class folders, such as annotations, is no class; an empty one may be a
    # mistake.
    return {name: paths for name, paths in inner.items() if paths or not any(all_files(folder / name))}


def check_classes(root, train, val, val_name):
    """Both sides of a set need the same classes."""
    for odd in sorted(train.keys() ^ val.keys()):
        has, lacks = ("train", val_name) if odd in train else (val_name, "train")
        named = f"class folder {odd} is" if odd else "images without a class folder are"
        raise BadInput(f"{named} in {has}/ but not in {lacks}/ of {root}; both need the same classes")


def hold_out(files, fraction, seed):
    """{class: paths} -> {"train": {class: paths}, "val": {class: paths}}, a seeded share of each class in the
    latter."""
    rng, sides = np.random.default_rng(seed), {"train": {}, "val": {}}
    for name, paths in files.items():
        held = set(rng.permutation(len(paths))[:max(1, round(fraction * len(paths)))].tolist())
        for side, chosen in sides.items():
            chosen[name] = [path for i, path in enumerate(paths) if (i in held) == (side == "val")]
    return sides


def common_size(files):
    """The side of these images if 100 of them are squares of one size, else 224."""
    Image, _ = pillow()
    sizes = set()
    for path in files[::math.ceil(len(files) / 100)]:
        # the corrupt are named when they are decoded
        with contextlib.suppress(Exception), Image.open(path) as image:
            sizes.add(image.size)
    wide, high = sizes.pop() if len(sizes) == 1 else (0, 1)
    return wide if wide == high else 224


# ---------------------------------------------------------------------------- CIFAR and MNIST files

def open_raw(source, size=None, val_fraction=0.1, seed=0):
    """{"train": set, "val": set} of files as they were published; `size` and the rest are for files that are
    decoded."""
    root = Path(source)
    if not source or not root.is_dir():
        raise BadInput(f"{source or 'the name of the data'} is not a folder; give a folder of class "
                       "folders, of CIFAR binary "
                       "files or of idx files, or shapes")
    if is_pickled(root):
        raise BadInput(f"{source} holds CIFAR as Python pickles, which can run code when they are read; "
                       "take the binary "
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
    ten = files["val"][0].name == "test_batch.bin"
    labels, names = (1, "batches.meta.txt") if ten else (2, "fine_label_names.txt")
    count = 10 if labels == 1 else 100
    classes = tuple(map(str, range(count)))
    if (root / names).exists():
        classes = tuple((root / names).read_text(encoding="utf-8", errors="replace").split())
    if len(classes) != count:
        raise BadInput(f"{root / names} names {len(classes)} classes, not {count}")
    record, sets = labels + 3 * 32 * 32, {}
    for side, paths in files.items():
        for path in paths:
            if path.stat().st_size == 0 or path.stat().st_size % record:
                raise BadInput(f"{path} has {path.stat().st_size} bytes, not a multiple of {record}: it is "
                               "not whole")
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
