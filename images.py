"""Images: what --data names, and sequences of patches.

    shapes       drawn images of eight shapes: nothing to download
    DIR          images in class folders: train/CLASS/*.jpg and val/CLASS/*.jpg (or valid/, test/ ..); or
                 CLASS/*.jpg alone, of which a share of every class is held out; or images without classes
    DIR          the binary files of CIFAR-10 or CIFAR-100 (fine labels)
    DIR          a prepared folder, memory-mapped: python data.py images INPUT --size N --out DIR

Files are decoded into memory when they are opened; a set that memory cannot hold is prepared once. Images of
another size than the model's are resized batch by batch.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from util import BadInput, import_optional, note, printable

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # what a file may be, whatever its name says
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "dev", "test", "testing")  # in any case
IN_MEMORY = 4 << 30  # bytes of pixels that are decoded into memory at most
CHUNK = 1 << 26      # bytes of pixels that are decoded at a time
LARGEST = 1 << 26    # pixels that one image may have


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in memory or memory-mapped."""

    images: np.ndarray         # uint8 (N, size, size, 3), RGB
    labels: np.ndarray         # int64 (N,)
    places: np.ndarray = None  # (N,), the path of each, or its number where it has no file of its own

    def __len__(self):
        return len(self.labels)

    def only(self, rows):
        """The images with these numbers."""
        return ImageSet(*(x if x is None else x[rows] for x in (self.images, self.labels, self.places)))


@dataclass(frozen=True)
class Images:
    """A training and a validation set of the same classes."""

    name: str
    classes: tuple  # names, by label
    mean: tuple     # of each channel of the training images, in 0..1
    std: tuple
    train: ImageSet
    val: ImageSet


def is_images(source):
    """Whether --data names images rather than text: most files of a folder are images."""
    root = Path(source)
    if source == "shapes" or cifar_files(root):
        return True
    if manifest := read_manifest(root):
        return manifest["format"] == "images"
    files = [path for path in itertools.islice(files_in(root), 5000) if path.suffix] if root.is_dir() else []
    return 2 * sum(path.suffix.lower() in SUFFIXES for path in files) > len(files)


def load_images(source, size=None):
    """What --data names as Images. Shapes are drawn (default: 32) and files decoded (224) at that size; CIFAR
    and prepared folders keep their own."""
    root = Path(source)
    if source == "shapes":
        classes = tuple(SHAPES)
        train, val = (ImageSet(*shapes(count, size or 32, seed), np.arange(count))
                      for seed, count in enumerate((8000, 2000)))
    elif read_manifest(root):
        return open_images(root)
    elif cifar_files(root):
        classes, train, val = open_cifar(root)
    else:
        classes, *sides = find_images(root)
        train, val = (decode_all(files, labels, size or 224) for files, labels in sides)
    return Images(str(source), classes, *moments(train.images), train, val)


def load_unlabelled(source, size):
    """The images of a folder and of those below it, or one file, to predict their classes; labels are 0."""
    files = [path for path in sorted(files_in(source), key=str) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise BadInput(f"{source} is neither a folder of images (of {', '.join(FORMATS)}) nor one of them")
    return decode_all(files, np.zeros(len(files), np.int64), size)


# ---------------------------------------------------------------------------- files

def files_in(path, above=()):
    """A file, or the files of a folder and of those below it, in the order of their names, but hidden ones.
    Links are followed."""
    path = Path(path)
    if path.is_file():
        yield path
    elif not path.is_dir():
        raise BadInput(f"{path} does not exist, or is neither a file nor a folder")
    elif (real := path.resolve()) not in above:  # else a link to a folder that it lies in
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                yield from files_in(inner, (*above, real))


def find_images(root, val_fraction=0.1):
    """A folder of image files -> class names, (files, labels (N,)) for training, the same for validation."""
    files = sorted(files_in(root), key=str) if root.is_dir() else []
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise BadInput(f"{root} is not a folder of images (of {', '.join(FORMATS)}) or of CIFAR's files")
    parts = {}  # the images by the folder that they lie in
    for path in images:
        parts.setdefault(path.relative_to(root).parts[0].lower(), []).append(path)
    train, val = (next((parts[name] for name in names if name in parts), []) for names in (TRAIN, VAL))
    if train and val:
        train, val = by_class(train), by_class(val)
    else:  # a folder called train may be a class: then it holds images, and others stand beside it
        alone = train or val or images
        if len(parts) > 1 and any(len(path.relative_to(root).parts) == 2 for path in alone):
            alone = images
        train, val = hold_out(by_class(alone), val_fraction)
    odd = sorted(train.keys() ^ val.keys()) or [name for name, files in train.items() if not files]
    if odd:
        raise BadInput(f"{root} needs images of the same classes for training and for validation, and lacks "
                       f"some of {', '.join(name or 'no class' for name in odd)}")
    taken = set(itertools.chain(*train.values(), *val.values()))
    for kind, found in (("images", images), ("files of other kinds", set(files) - set(images))):
        if left := sorted(set(found) - taken):
            note(f"{root}: {kind} left out: {len(left):,}, such as {left[0]}")
    sides = [(list(itertools.chain(*classes.values())),
              np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()]))
             for classes in (train, val)]
    return tuple(printable(name) for name in train if name), *sides


def by_class(files):
    """{class: files} by the folders in the one that holds all of them; {"": files}, no classes, if images
    stand beside these folders."""
    root, classes = os.path.commonpath([path.parent for path in files]), {}
    for path in files:
        folder, *inner = path.relative_to(root).parts
        classes.setdefault(folder if inner else "", []).append(path)
    if "" in classes and len(classes) > 1:
        note(f"{root}: its folders are no classes, as images stand beside them, such as {classes[''][0]}")
        return {"": files}
    return dict(sorted(classes.items()))


def hold_out(classes, fraction):
    """{class: files} -> the same for training and for validation, which gets a seeded share of each class."""
    rng, train, val = np.random.default_rng(0), {}, {}
    for name, files in classes.items():
        order, count = rng.permutation(len(files)), max(1, round(fraction * len(files)))
        train[name] = [files[k] for k in sorted(order[count:])]
        val[name] = [files[k] for k in sorted(order[:count])]
    return train, val


def decode(path, size):
    """An image file -> uint8 (size, size, 3): turned as EXIF says, the shorter side resized, the centre cut
    out. 16 bits are cut to the upper 8, what is transparent is laid over white."""
    Image, ImageOps = import_optional("PIL.Image"), import_optional("PIL.ImageOps")
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (2 * size, 2 * size))  # decodes a much larger JPEG at 1/2, 1/4 or 1/8
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {LARGEST:,}")
            with contextlib.suppress(Exception):     # EXIF data may be damaged where the pixels are not
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a channel have no white of their own")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))
    except Exception as error:  # noqa: BLE001  a damaged file can fail in any way
        raise BadInput(f"{path} cannot be decoded ({error}); remove or replace it") from None


def decoded(files, size):
    """Image files -> uint8 (n, size, size, 3), chunk by chunk."""
    count = max(1, CHUNK // (size * size * 3))
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(files), count), desc="decoding", delay=5, mininterval=10):
            yield np.stack(list(pool.map(decode, files[start:start + count], itertools.repeat(size))))


def decode_all(files, labels, size):
    """Image files and their labels as an ImageSet in memory."""
    total = len(files) * size * size * 3
    if total > IN_MEMORY:
        raise BadInput(f"{files[0]} and others have {total / 1e9:.1f} GB of pixels, too many for memory; "
                       f"prepare them once: python data.py images INPUT --size {size} --out DIR")
    return ImageSet(np.concatenate([*decoded(files, size)]), labels, np.array(list(map(str, files))))


def cifar_files(root):
    """Binary files of CIFAR-10 or CIFAR-100 -> (that of the class names, bytes before the pixels, those for
    training, those for validation); None in any other folder."""
    if (root / "test_batch.bin").exists():
        return root / "batches.meta.txt", 1, sorted(root.glob("data_batch_*.bin")), [root / "test_batch.bin"]
    if (root / "fine_label_names.txt").exists():
        return root / "fine_label_names.txt", 2, [root / "train.bin"], [root / "test.bin"]
    return None


def open_cifar(root):
    """Records of one label byte (CIFAR-100: coarse and fine, the fine one is kept) and 3 x 32 x 32 bytes ->
    class names, an ImageSet for training, one for validation."""
    names, first, *sides = cifar_files(root)
    sets = []
    for paths in sides:
        data = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
        if len(data) % (first + 3072):
            raise BadInput(f"{', '.join(map(str, paths))}: not a multiple of {first + 3072} bytes, not whole")
        data = data.reshape(-1, first + 3072)
        images = np.ascontiguousarray(data[:, first:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        sets.append(ImageSet(images, data[:, first - 1].astype(np.int64), np.arange(len(data))))
    return tuple(map(printable, names.read_text(encoding="utf-8").split())), *sets


# ---------------------------------------------------------------------------- prepared folders
# train.bin and val.bin (uint8, N x size x size x RGB), their labels (int64), manifest.json

@contextlib.contextmanager
def new_folder(out, sources):
    """A folder to write, which gets its name `out` when it is whole. Nothing remains of a failure."""
    out = Path(out)
    partial = Path(f"{out}.partial")
    for path in (out, partial):  # never removed: it may be of somebody else
        if os.path.lexists(path):
            raise BadInput(f"{path} exists; choose another --out, or remove it if nothing is writing it")
    if any(out.resolve().is_relative_to(Path(source).resolve()) for source in sources):
        raise BadInput(f"{out} lies inside the input and would be read with it; write to another folder")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_manifest(folder):
    """The manifest of a folder that data.py prepared, or None."""
    path = Path(folder) / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("format") in (1, "images") else None


def prepare_images(source, out, size=None, val_fraction=0.1):
    """Write a prepared folder, chunk by chunk -> its manifest. size: as in load_images."""
    root, size = Path(source), size or 224
    with new_folder(out, [source]) as folder:
        if cifar_files(root):
            classes, *sets = open_cifar(root)
            size, sides = 32, [([part.images], part.labels) for part in sets]
        else:
            classes, *sides = find_images(root, val_fraction)
            sides = [(decoded(files, size), labels) for files, labels in sides]
        manifest = {"format": "images", "size": size, "classes": classes, "sources": [source]}
        for side, (chunks, labels) in zip(("train", "val"), sides):
            with open(folder / f"{side}.bin", "wb") as file:
                for chunk in chunks:
                    chunk.tofile(file)
            labels.tofile(folder / f"{side}.labels.bin")
            manifest[side] = {"images": len(labels)}
        manifest["mean"], manifest["std"] = moments(
            np.memmap(folder / "train.bin", np.uint8, "r").reshape(-1, size, size, 3))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def open_images(folder):
    """A prepared folder as Images, memory-mapped."""
    manifest, sets = read_manifest(folder), []
    size = manifest["size"]
    for side in ("train", "val"):
        labels = np.fromfile(folder / f"{side}.labels.bin", np.int64)
        pixels = np.memmap(folder / f"{side}.bin", np.uint8, "r").reshape(-1, size, size, 3)
        sets.append(ImageSet(pixels, labels, np.arange(len(labels))))
    classes = tuple(map(printable, manifest["classes"]))
    return Images(str(folder), classes, tuple(manifest["mean"]), tuple(manifest["std"]), *sets)


def moments(images):
    """Mean and standard deviation of each channel, in 0..1; the latter is at least one grey level."""
    counts = np.zeros((3, 256))
    for part in np.array_split(images, 1 + len(images) // 1000):
        counts += [np.bincount(part[..., c].ravel(), minlength=256) for c in range(3)]
    values, share = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


# ---------------------------------------------------------------------------- crops and patches

def random_views(count, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """Random resized crops and flips, drawn on the CPU -> (count, 5): centre x, y, width, height in 0..1, and
    -1 for the half that is mirrored. The share of the area is uniform in `scale`, the side ratio log-uniform
    in that part of `ratio` which fits into the image, the place uniform."""
    u = torch.rand(5, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    low, high = area.log().clamp(min=math.log(ratio[0])), (-area.log()).clamp(max=math.log(ratio[1]))
    shape = (low + (high - low) * u[1]).exp()
    wide, high = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    sign = torch.where(u[4] < 0.5, -1.0, 1.0)
    return torch.stack([wide / 2 + (1 - wide) * u[2], high / 2 + (1 - high) * u[3], wide, high, sign], dim=1)


def crop(images, views, size):
    """Cut views out of images and resize them -> float32 (B, 3, size, size) in 0..1, on the images' device.

    images uint8 (B, H, W, 3); views of random_views, or None for the largest centred square. Bilinear,
    averaging over the area of a new pixel if that is larger than an old one: two products for the batch.
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
    """Weights (B, size, length) that resample `length` pixels to `size` within centre +- extent/2, given in
    0..1 as (B,): triangles as wide as the larger of both pixels. A negative extent mirrors."""
    place = (torch.arange(size, device=centre.device) + 0.5) / size - 0.5
    place = (centre[:, None] + extent[:, None] * place) * length                # (B, size), in old pixels
    pixel = torch.arange(length, device=centre.device) + 0.5
    width = (extent.abs() * (length / size)).clamp(min=1)[:, None, None]
    weights = (1 - (place[..., None] - pixel).abs() / width).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def patchify(x, patch):
    """(B, C, H, W) -> (B, S, C * patch * patch): patches in raster order, each channel by channel."""
    return F.unfold(x, patch, stride=patch).transpose(1, 2).contiguous()


def unpatchify(patches, patch):
    """The inverse of patchify for square images: (B, S, C * patch * patch) -> (B, C, H, W)."""
    side = math.isqrt(patches.shape[1]) * patch
    return F.fold(patches.transpose(1, 2), (side, side), patch, stride=patch)


def example(number, count, seed):
    """Which of `count` examples has that number in an endless stream of epochs, each in an order of its own,
    the same whoever asks. seed None: in order."""
    epoch, k = divmod(number, count)
    return k if seed is None else epoch_order(count, seed, epoch)[k]


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


class Patches:
    """An ImageSet as sequences of patches for a model of that Config: the counterpart of data.Sequences.

    seed   of the order and of the crops, both the same whoever asks; None: in order
    least  share of the area that a random crop keeps; None: the whole centred square
    """

    def __init__(self, images, config, seed=None, least=None, device="cpu"):
        self.images, self.config, self.seed, self.least, self.device = images, config, seed, least, device
        self.mean, self.std = (torch.tensor(x, device=device)[:, None, None]
                               for x in (config.mean, config.std))
        self.total = len(images)

    def __len__(self):
        return self.total

    def batch(self, start, size, part=slice(None)):
        """Images number start .. start + size - 1, or a part of them -> patches (B, S, values)."""
        return self.labelled(start, size, part)[0]

    def lengths(self, start, size):
        """How many patches of each image are real: all."""

    def labelled(self, start, size, part=slice(None)):
        """The same on the device, and labels (B,) on the CPU."""
        rows = np.array([example(k, self.total, self.seed) for k in range(start, start + size)[part]])
        views = None
        if self.least is not None:  # drawn for the whole batch, with other seeds than the masks
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start + 500_000_009)
            views = self.moved(random_views(size, generator, (self.least, 1.0))[part])
        x = crop(self.moved(torch.from_numpy(self.images.images[rows])), views, self.config.size)
        x = (x - self.mean) / self.std                                          # (B, 3, size, size)
        return patchify(x, self.config.patch), torch.from_numpy(self.images.labels[rows])

    def moved(self, x):
        """x on the device. Through pinned memory this thread need not wait for what a GPU is doing."""
        on_gpu = torch.device(self.device).type == "cuda"
        return x.pin_memory().to(self.device, non_blocking=True) if on_gpu else x.to(self.device)


# ---------------------------------------------------------------------------- mixing, and pictures

def mix(x, targets, generator, mixup=0.8, cutmix=1.0):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), by even chance, of each image with the one before it.

    x (B, C, H, W), targets (B, K) -> the same. The batch shares one weight lambda ~ Beta(mixup, mixup), or
    one box of area 1 - lambda with lambda ~ Beta(cutmix, cutmix). A parameter of 0 switches its kind off.
    """
    if not mixup and not cutmix:
        return x, targets
    seed = torch.randint(2 ** 62, (), generator=generator).item()
    rng = np.random.default_rng(seed)  # torch's Beta takes no generator
    boxes = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = rng.beta(*[cutmix if boxes else mixup] * 2)
    if boxes:
        H, W = x.shape[2:]
        high, wide = (round(length * math.sqrt(1 - share)) for length in (H, W))
        top, left = rng.integers(H) - high // 2, rng.integers(W) - wide // 2
        box = np.s_[:, :, max(0, top):max(0, top + high), max(0, left):max(0, left + wide)]
        mixed = x.clone()
        mixed[box] = x.roll(1, 0)[box]
        share = 1 - x[box].numel() / x.numel()  # by what of the box lies inside
    else:
        mixed = share * x + (1 - share) * x.roll(1, 0)
    return mixed, share * targets + (1 - share) * targets.roll(1, 0)


def write_png(path, images, gap=2):
    """Write uint8 images (rows, columns, H, W, 3) as one PNG file, small ones enlarged. Needs no package."""
    times = max(1, 64 // images.shape[2])
    images = np.pad(images.repeat(times, 2).repeat(times, 3),
                    ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    rows, columns, H, W, _ = images.shape
    lines = images.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W * 3)
    lines = np.pad(lines, ((0, 0), (1, 0)))  # filter 0 before each line

    def part(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", columns * W, rows * H, 8, 2, 0, 0, 0)
    partial = Path(f"{path}.partial")  # a whole file, or none
    partial.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header)
                        + part(b"IDAT", zlib.compress(lines.tobytes())) + part(b"IEND", b""))
    os.replace(partial, path)


# ---------------------------------------------------------------------------- drawn shapes

def polygon(corners, x, y):
    """A regular polygon around the circle of radius 0.6; a corner points up."""
    angle = np.arctan2(x, y) % (2 * np.pi / corners) - np.pi / corners
    return np.hypot(x, y) * np.cos(angle) - 0.6


SHAPES = {  # class: about the signed distance of (x, y), y down, to its outline, within the unit circle
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.2,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.45, y)),
    "triangle": lambda x, y: polygon(3, x, y),
    "square": lambda x, y: polygon(4, x, y),
    "star": lambda x, y: np.hypot(x, y) - 0.7 - 0.3 * np.cos(5 * np.arctan2(x, y)),
    "cross": lambda x, y: np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.3, np.hypot(x, y) - 1),
    "bar": lambda x, y: np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3),
}


@functools.lru_cache(maxsize=4)  # drawing takes seconds
def shapes(count, size=32, seed=0):
    """Draw images, as many of each class -> uint8 (count, size, size, 3), int64 (count,).

    A shape of random place, size, rotation and colour stands on another colour, both with waves and noise.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, size, size, 3), np.uint8)
    for label, distance in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        for part in np.array_split(rows, 1 + len(rows) * size * size // 2 ** 18):  # about 1 MB for each array
            images[part] = draw_shape(distance, len(part), size, rng)
    return images, labels


def draw_shape(distance, count, size, rng):
    """Images of one shape -> uint8 (count, size, size, 3)."""
    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (count, 1, 1, channels)).astype(np.float32)

    def textured(colour):
        """(count, 1, 1, 3) -> (count, size, size, 3): the colour, varied along a wave."""
        cycles, direction, phase = np.exp(uniform(-1, 1.8)), uniform(0, 2 * np.pi), uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * cycles * (x * np.cos(direction) + y * np.sin(direction)) + phase)
        return colour + wave * uniform(-0.15, 0.15, 3)

    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = grid[None, :, None], grid[:, None, None]
    radius, angle = uniform(0.26, 0.44), uniform(0, 2 * np.pi)
    dx, dy = ((axis - radius - (1 - 2 * radius) * uniform(0, 1)) / radius for axis in (x, y))
    cos, sin = np.cos(angle), np.sin(angle)
    pixels = distance(cos * dx + sin * dy, cos * dy - sin * dx) * radius * size  # (count, size, size, 1)
    colour = uniform(0, 1, 3)
    other = (colour + uniform(0.3, 0.7, 3)) % 1
    cover = np.clip(0.5 - pixels, 0, 1)
    image = cover * textured(colour) + (1 - cover) * textured(other)
    image += 0.02 * rng.standard_normal(image.shape, np.float32)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
