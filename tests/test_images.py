"""Reading images in every format, augmenting and mixing batches, patches, and the drawn set."""

import gzip
import json
import math
import multiprocessing
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from images import files, patches, sets, shapes
from images import pixels as px
from images.raw import open_folder as folder_files
from images.sets import load_images
from images.sets import prepare_images as prepare
from support.cli import BadInput


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ---------------------------------------------------------------------------- CIFAR and MNIST files


def write_cifar(root, hundred=False, sizes=(6, 4, 5)):
    """Files as their documentation describes them; returns (train images, labels), (test images, labels)."""
    root.mkdir(exist_ok=True)
    names = (
        ["train.bin", "test.bin"] if hundred else ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"]
    )
    parts = []
    for i, (name, size) in enumerate(zip(names, sizes[-len(names) :])):
        pixels, labels = noise(size, 32, 32, 3, seed=i), noise(size, seed=9 + i) % (100 if hundred else 10)
        with open(root / name, "wb") as file:
            for image, label in zip(pixels, labels):
                file.write(bytes([7, label] if hundred else [label]))
                file.writelines(
                    bytes(image[y, x, channel] for y in range(32) for x in range(32)) for channel in range(3)
                )
        parts.append((pixels, labels))
    text = "fine_label_names.txt" if hundred else "batches.meta.txt"
    (root / text).write_text("".join(f"name{i}\n" for i in range(100 if hundred else 10)) + "\n")
    return tuple(map(np.concatenate, zip(*parts[:-1]))), parts[-1]


def write_idx(path, array):
    content = (
        bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape) + array.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(root, end="", shape=(28, 28)):
    root.mkdir(exist_ok=True)
    parts = []
    for i, (side, size) in enumerate((("train", 20), ("t10k", 7))):
        pixels, labels = noise(size, *shape, seed=i), np.arange(size, dtype=np.uint8) % 10
        write_idx(root / f"{side}-images-idx3-ubyte{end}", pixels)
        write_idx(root / f"{side}-labels-idx1-ubyte{end}", labels)
        parts.append((np.stack([pixels] * 3, axis=-1), labels))
    return tuple(parts)


@pytest.mark.parametrize(
    "write, classes",
    [
        (write_cifar, 10),
        (lambda root: write_cifar(root, hundred=True), 100),
        (write_mnist, 10),
        (lambda root: write_mnist(root, ".gz"), 10),
    ],
    ids=["cifar10", "cifar100", "mnist", "mnist-gz"],
)
def test_published_files_directly_and_prepared(tmp_path, write, classes):
    expected = write(tmp_path / "raw")
    assert sets.is_images(str(tmp_path / "raw"))
    manifest = prepare(str(tmp_path / "raw"), tmp_path / "out", quiet=True)
    assert sets.is_images(tmp_path / "out") and manifest["train"]["images"] == len(expected[0][1])
    for source in (tmp_path / "raw", tmp_path / "out"):
        found = load_images(str(source))
        assert len(found.classes) == classes and found.size == expected[0][0].shape[1]
        scaled = expected[0][0].astype(float) / 255
        assert np.allclose(found.mean, scaled.mean(axis=(0, 1, 2))) and np.allclose(
            found.std, scaled.std(axis=(0, 1, 2))
        )
        for part, (pixels, labels) in zip((found.train, found.val), expected):
            assert np.array_equal(part.images, pixels) and np.array_equal(part.labels, labels)
            x, y = part.batch([3, 0, 3])
            assert (
                x.dtype == torch.uint8
                and np.array_equal(x.numpy(), pixels[[3, 0, 3]])
                and y.tolist() == [*labels[[3, 0, 3]]]
            )
    assert isinstance(found.train.images, np.memmap) and not (tmp_path / "out.partial").exists()
    if classes == 100:
        assert found.classes[42] == "name42"


def test_another_size_is_resized_from_the_centre_square(tmp_path):
    (pixels, _), _ = write_mnist(tmp_path / "raw", shape=(10, 16))
    prepare(str(tmp_path / "raw"), tmp_path / "out", size=6, quiet=True)
    found = load_images(str(tmp_path / "out")).train.images[:4]
    expected = np.stack([plain_crop(image / 255.0, (0.5, 0.5, 10 / 16, 1, 1), 6) for image in pixels[:4]])
    assert np.abs(found / 255.0 - expected).max() < 0.5 / 255 + 1e-6


def damage(change):
    """A test case: files of MNIST that `change(root)` spoils."""
    return lambda root: (write_mnist(root), change(root))


def with_header(name, *lengths):
    def change(root):
        content = (root / name).read_bytes()
        (root / name).write_bytes(
            content[:4] + struct.pack(f">{len(lengths)}I", *lengths) + content[4 + 4 * len(lengths) :]
        )

    return change


def zip_whole(root):
    for path in list(root.iterdir()):
        (root / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (damage(with_header("train-images-idx3-ubyte", 2**31, 2**31, 2**31)), "by its header"),
        (
            damage(with_header("train-images-idx3-ubyte", 21, 28, 28)),
            "should have 16480 bytes by its header, but has 15696",
        ),
        (
            damage(
                lambda r: (
                    zip_whole(r),
                    (r / "train-images-idx3-ubyte.gz").write_bytes(
                        gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**20, 2**20, 28))
                    ),
                )
            ),
            "by its header",
        ),
        (
            damage(
                lambda r: (
                    zip_whole(r),
                    (r / "t10k-images-idx3-ubyte.gz").write_bytes(
                        (r / "t10k-images-idx3-ubyte.gz").read_bytes()[:-20]
                    ),
                )
            ),
            "t10k-images",
        ),
        (damage(lambda r: (r / "t10k-images-idx3-ubyte").write_bytes(b"\0\0")), "not a whole idx file"),
        (
            damage(lambda r: write_idx(r / "t10k-labels-idx1-ubyte", np.zeros(8, np.uint8))),
            "holds 7 images, .* 8 labels",
        ),
        (
            damage(lambda r: write_idx(r / "t10k-labels-idx1-ubyte", np.full(7, 10, np.uint8))),
            "the training set lacks",
        ),
        (
            damage(lambda r: (r / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x0d\x01" + bytes(11))),
            "not an idx file of bytes",
        ),
        (
            lambda r: (write_cifar(r), (r / "test_batch.bin").write_bytes(bytes(3074))),
            "not a multiple of 3073",
        ),
        (lambda r: (write_cifar(r), (r / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))), "label 10"),
        (
            lambda r: (write_cifar(r), (r / "batches.meta.txt").write_text("cat dog")),
            "names 2 classes, not 10",
        ),
        (lambda r: (r.mkdir(), (r / "data_batch_1").write_bytes(b"\x80\x04")), "binary version"),
        (lambda r: (r.mkdir(), (r / "train").write_bytes(b"\x80\x02")), "binary version"),
        (lambda r: None, "is not a folder"),
        (lambda r: (r.mkdir(), (r / "book.txt").write_text("text")), "no JPEG or PNG files"),
    ],
)
def test_spoilt_files_are_refused_in_one_line(tmp_path, spoil, message):
    spoil(tmp_path / "raw")
    with pytest.raises(BadInput, match=message):
        prepare(str(tmp_path / "raw"), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_image_folders_are_guarded(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cifar(raw)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "out.partial").mkdir()  # of a run that was killed
    prepare(str(raw), out, quiet=True)
    for source, target, message in (
        (raw, tmp_path / "full", "not an empty folder"),
        (raw, raw / "x", "lies inside the input"),
        (out, tmp_path / "y", "is prepared already"),
    ):
        with pytest.raises(BadInput, match=message):
            prepare(str(source), target, quiet=True)
    assert (tmp_path / "full" / "mine").read_text() == "keep" and load_images(str(out), 32).size == 32
    for source in (raw, out):
        with pytest.raises(BadInput, match="32 x 32 pixels.* --size 64 "):
            load_images(str(source), 64)
    labels = (out / "val.labels.bin").read_bytes()
    for name, content, message in (
        ("val.labels.bin", labels[:-8], "has 32 bytes where the manifest says 40"),
        ("val.labels.bin", np.full(5, 10).tobytes(), "beyond the 10 classes"),
        ("train.bin", b"", "has 0 bytes"),
        ("manifest.json", b"{}", "not a whole image folder"),
        ("manifest.json", b"{", "not a whole image folder"),
    ):
        (out / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            load_images(str(out))
        (out / "val.labels.bin").write_bytes(labels)
    assert sets.is_images(out)  # damaged as it is, it is no text
    assert not sets.is_images(tmp_path / "full")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train/cat/1.jpg", "train/dog/1.PNG", "val/cat/1.JPEG", "README.md"], True),
        (["test/cat/1.jpg"], True),
        (["cat/1.jpg", "dog/1.jpg", ".DS_Store", "dog/Thumbs.db"], True),
        (["train/1.jpg", "plane/1.jpg"], True),
        (["1.jpg", "2.JPG", "more/3.png"], True),
        (["1.jpg", "labels.csv"], True),
        (["cat/1.jpg", "dog/1.jpg", "labels.csv", "cat/1.xml"], True),
        (["1.jpg", "notes.txt"], False),
        (["1.jpg", "1.txt", "2.png", "2.TXT"], True),
        (["train/1.txt", "val/1.txt"], False),
        (["train/essays/1.txt", "val/essays/1.txt"], False),
        (["train/a/page.html", "train/a/figure.png", "train/a/figure2.png"], False),
        (["train/figures/1.png", "train/book.txt"], False),
        (["figures/1.png", "book.txt"], False),
        (["chapter/1.txt", "figures/1.png"], False),
        (["train/book.txt", "test/figures/1.png"], False),
        (["train.bin", "val.bin", "tokenizer.json"], False),
        (["train", "val"], False),
        (["train/cat/.1.jpg"], False),
        ([], False),
    ],
)
def test_images_are_told_from_text_by_names(tmp_path, names, expected):
    touch(tmp_path, *names)
    assert sets.is_images(str(tmp_path)) is expected


def test_what_is_not_a_folder_of_images(tmp_path):
    (tmp_path / "tokens").mkdir()
    for manifest in ('{"format": 1, "dtype": "uint16"}', "[1]", "{"):
        (tmp_path / "tokens" / "manifest.json").write_text(manifest)
        assert not sets.is_images(tmp_path / "tokens")
    (tmp_path / "book.txt").write_text("text")
    assert sets.is_images("shapes")
    for source in ("pydoc", "hf:cifar10", "", tmp_path / "book.txt", tmp_path / "nowhere"):
        assert not sets.is_images(source)


# ---------------------------------------------------------------------------- JPEG and PNG files


def write_png(path, rows, kind, depth=8):
    """A PNG file of the standard's colour type 0 (grey) or 2 (RGB); rows (H, bytes)."""
    channels = {0: 1, 2: 3}[kind]
    wide = rows.shape[1] * 8 // (channels * depth)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", wide, len(rows), depth, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
        )
    )


def class_folders(root, sizes, shape=(8, 8)):
    """{"train/cat": 3, ...} -> that many RGB PNG files in each; returns {folder: images}."""
    pixels = {}
    for i, (folder, count) in enumerate(sizes.items()):
        (root / folder).mkdir(parents=True)
        pixels[folder] = noise(count, *shape, 3, seed=i)
        for k, image in enumerate(pixels[folder]):
            write_png(root / folder / f"{k:04}.png", image.reshape(len(image), -1), 2)
    return pixels


@pytest.mark.parametrize("other", ["val", "test"])
def test_extras_class_folders_decoded_at_once_and_prepared(tmp_path, other):
    pytest.importorskip("PIL")
    sizes = {"train/dog": 40, "train/cat": 30, f"{other}/cat": 3, f"{other}/dog": 2}
    if other == "val":
        sizes |= {"test/cat": 1}  # not read
    pixels = class_folders(tmp_path / "raw", sizes)
    expected = [
        (
            np.concatenate([pixels[f"{side}/{name}"] for name in ("cat", "dog")]),
            np.repeat([0, 1], [sizes[f"{side}/{name}"] for name in ("cat", "dog")]),
        )
        for side in ("train", other)
    ]
    assert data.main(["images", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) is None
    for source in (tmp_path / "raw", tmp_path / "out"):
        assert sets.is_images(source)
        found = load_images(str(source))
        assert found.classes == ("cat", "dog") and found.size == 8
        assert np.allclose(found.mean, expected[0][0].mean(axis=(0, 1, 2)) / 255)
        for part, (x, y) in zip((found.train, found.val), expected):
            rows = np.random.default_rng(0).permutation(len(y))  # 70 at once go to the worker processes
            batch = part.batch(rows)
            assert np.array_equal(batch[0].numpy(), x[rows]) and np.array_equal(batch[1].numpy(), y[rows])
            assert len(part) == len(y) and np.array_equal(part.labels, y)
    workers = multiprocessing.active_children()
    assert workers and files.pool.cache_info().currsize == 1
    workers[0].kill()
    part = load_images(str(tmp_path / "raw")).train
    for _ in range(2):  # a killed worker costs nothing but time
        assert np.array_equal(part.batch(range(70))[0].numpy(), expected[0][0])


def test_extras_a_share_of_each_class_is_held_out(tmp_path):
    pytest.importorskip("PIL")
    pixels = class_folders(tmp_path / "raw", {"a": 20, "b": 4, ".hidden": 2})

    def held(seed):
        found = folder_files(tmp_path / "raw", val_fraction=0.2, seed=seed)
        assert [np.bincount(found[side].labels).tolist() for side in ("train", "val")] == [[16, 3], [4, 1]]
        both = found["train"].files + found["val"].files
        assert len(set(both)) == len(both) == 24 and not any("hidden" in path for path in both)
        return found["val"].files

    assert held(0) == held(0) != held(1)
    found = load_images(str(tmp_path / "raw")).train
    everything = {image.tobytes() for name in "ab" for image in pixels[name]}
    assert {image.numpy().tobytes() for image in found.batch(range(len(found)))[0]} < everything


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"train/cat": 2, "val/cat": 1, "val/dog": 1}, "class folder dog is in val/ but not in train/"),
        ({"train/cat": 2, "train/dog": 1, "test/cat": 1}, "class folder dog is in train/ but not in test/"),
        (
            {"train/cat": 2, "train/dog": 0, "val/cat": 1, "val/dog": 1},
            "class dog .* no JPEG or PNG files for train",
        ),
        ({"cat": 1, "dog": 5}, "class cat .* for train"),
        ({"cat": 0}, "no JPEG or PNG files"),
    ],
)
def test_extras_classes_must_fit(tmp_path, sizes, message):
    pytest.importorskip("PIL")
    class_folders(tmp_path / "raw", sizes)
    with pytest.raises(BadInput, match=message):
        load_images(str(tmp_path / "raw"))


@pytest.mark.parametrize(
    "layout, beside",
    [
        ({"": 20}, ["labels.csv"]),
        ({"2023": 20}, []),
        ({"": 4, "more/of/them": 16}, []),
        ({"train": 20}, ["train/notes.md"]),
        ({"train": 16, "val": 4}, []),
    ],
)
def test_extras_images_without_classes_are_good_for_pretraining(tmp_path, capsys, layout, beside):
    pytest.importorskip("PIL")
    for folder in layout:
        class_folders(tmp_path / "made", {folder or "own": layout[folder]})
        target = tmp_path / "raw" / folder
        target.mkdir(parents=True, exist_ok=True)
        for path in (tmp_path / "made" / (folder or "own")).iterdir():
            path.rename(target / path.name)
    touch(tmp_path / "raw", *beside)
    source = str(tmp_path / "raw")
    assert sets.is_images(source)
    found = load_images(source)
    held = 4 if "val" in layout else 2
    assert (len(found.train), len(found.val), found.classes) == (20 - held, held, ())
    assert f"{20 - held} training and {held} validation images without classes" in capsys.readouterr().err
    manifest = prepare(source, tmp_path / "out", quiet=True)
    assert manifest["classes"] == () and len(load_images(str(tmp_path / "out")).train) == 20 - held


def test_extras_other_files_beside_class_folders(tmp_path):
    pytest.importorskip("PIL")
    class_folders(tmp_path / "raw", {"cat": 10, "dog": 10})
    touch(tmp_path / "raw", "labels.csv", "annotations/1.xml", "cat/about.json")
    assert sets.is_images(str(tmp_path / "raw")) and load_images(str(tmp_path / "raw")).classes == (
        "cat",
        "dog",
    )
    class_folders(
        tmp_path / "one", {"train/cat": 10, "train/dog": 10}
    )  # a share is held out where there is no val/
    found = load_images(str(tmp_path / "one"))
    assert found.classes == ("cat", "dog") and (len(found.train), len(found.val)) == (18, 2)


def test_extras_corrupt_files_are_skipped_and_counted(tmp_path, capsys):
    pytest.importorskip("PIL")
    raw = tmp_path / "raw"
    pixels = class_folders(raw, {"train/a": 60, "train/b": 60, "val/a": 1, "val/b": 1})
    bad = raw / "train" / "a" / "0059.png"
    bad.write_bytes(bad.read_bytes()[:60])
    manifest = prepare(str(raw), tmp_path / "out", quiet=True)
    assert (
        manifest["train"] == {"images": 119, "skipped": [str(bad)]}
        and f"skipped: {bad} is corrupt" in capsys.readouterr().err
    )
    x, y = load_images(str(tmp_path / "out")).train.batch(range(119))
    assert np.array_equal(x.numpy(), np.concatenate([pixels["train/a"][:59], pixels["train/b"]]))
    assert y.tolist() == [0] * 59 + [1] * 60

    train = folder_files(raw)["train"]  # while training, the next file stands in
    for _ in range(2):
        x, y = train.batch([58, 59])
        assert np.array_equal(x.numpy(), [pixels["train/a"][58], pixels["train/b"][0]]) and y.tolist() == [
            0,
            1,
        ]
    assert capsys.readouterr().err.count("stands in") == 1

    (raw / "train" / "b" / "0000.png").write_text("text")
    with pytest.raises(BadInput, match="2 of 120 files cannot be decoded, more than 1%"):
        prepare(str(raw), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.partial").exists()
    with pytest.raises(BadInput, match="2 of 120"):
        train.batch([59])


def saved(tmp_path, image, name="image.png", size=None, **options):
    image.save(tmp_path / name, **options)
    found = files.decode(str(tmp_path / name), size or min(image.size))
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8, found
    return found


def test_extras_every_kind_of_pixel_becomes_rgb(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rgb, grey, alpha = noise(9, 9, 3), noise(9, 9, seed=1), noise(9, 9, seed=2)
    three = np.stack([grey] * 3, axis=-1)
    over_white = np.round(rgb * (alpha / 255.0)[..., None] + 255.0 * (1 - alpha / 255.0)[..., None])
    assert np.array_equal(saved(tmp_path, Image.fromarray(rgb)), rgb)
    assert np.array_equal(saved(tmp_path, Image.fromarray(grey)), three)
    rgba = saved(tmp_path, Image.fromarray(np.dstack([rgb, alpha])))
    assert np.abs(rgba - over_white).max() <= 1
    la = saved(tmp_path, Image.fromarray(np.dstack([grey, np.zeros_like(grey)]), "LA"))
    assert (la == 255).all()
    assert np.array_equal(saved(tmp_path, Image.fromarray(grey > 99)), np.where(three > 99, 255, 0))
    palette = Image.fromarray(rgb).quantize(7)
    assert np.array_equal(saved(tmp_path, palette), np.asarray(palette.convert("RGB")))
    clear = np.asarray(palette) == 3
    holes = saved(tmp_path, palette, transparency=3)
    assert (holes[clear] == 255).all() and np.array_equal(
        holes[~clear], np.asarray(palette.convert("RGB"))[~clear]
    )
    sixteen = noise(9, 18, seed=3)  # big-endian pairs: the first byte is the upper one
    write_png(tmp_path / "16.png", sixteen, 0, 16)
    assert np.array_equal(files.decode(tmp_path / "16.png", 9)[..., 1], sixteen[:, ::2])
    sixteen = noise(9, 54, seed=4)
    write_png(tmp_path / "16.png", sixteen, 2, 16)
    assert np.array_equal(files.decode(tmp_path / "16.png", 9), sixteen[:, ::2].reshape(9, 9, 3))
    cmyk = saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "image.jpg")
    assert np.abs(cmyk.astype(int) - [0, 255, 255]).max() < 8
    assert (saved(tmp_path, Image.new("L", (16, 16), 77), "image.jpg") == 77).all()


def test_extras_orientation_and_odd_sizes(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rgb = noise(6, 6, 3)
    turned = Image.fromarray(rgb)
    for code, expected in (
        (3, rgb[::-1, ::-1]),
        (6, np.rot90(rgb, -1)),
        (8, np.rot90(rgb)),
        (2, rgb[:, ::-1]),
    ):
        exif = Image.Exif()
        exif[0x0112] = code
        assert np.array_equal(saved(tmp_path, turned, exif=exif), expected)
    assert np.array_equal(saved(tmp_path, turned, exif=b"Exif\0\0not a header"), rgb)
    centre = np.zeros((10, 40, 3), np.uint8)
    centre[:, 15:25] = 200
    for image in (centre, centre.transpose(1, 0, 2)):
        assert (saved(tmp_path, Image.fromarray(image)) == 200).all()
    smooth = np.add.outer(np.arange(400), np.arange(700))[..., None].repeat(3, axis=2) * 200 // 1100
    small = saved(
        tmp_path, Image.fromarray(smooth.astype(np.uint8)), "large.jpg", size=20, quality=95
    )  # at 1/8, then resized
    expected = smooth[:, 150:550].reshape(20, 20, 20, 20, 3).mean(axis=(1, 3))
    assert small.shape == (20, 20, 3) and np.abs(small - expected)[1:-1, 1:-1].max() < 2
    assert saved(tmp_path, Image.fromarray(noise(1, 3000, 3)), size=8).shape == (8, 8, 3)


def test_a_missing_pillow_is_named(monkeypatch, tmp_path):
    touch(tmp_path, "train/a/1.png", "val/a/1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match="pip install pillow"):
        load_images(str(tmp_path))


# ---------------------------------------------------------------------------- order, crops


def test_order_is_stateless_and_each_epoch_a_permutation():
    whole = np.concatenate([patches.order(10, 3, start, 7) for start in range(0, 70, 7)])
    assert all(sorted(epoch) == list(range(10)) for epoch in whole.reshape(7, 10).tolist())
    assert len({tuple(epoch) for epoch in whole.reshape(7, 10).tolist()}) == 7
    for start, size in ((33, 1), (5, 40), (0, 10)):  # in any order, across epochs
        assert np.array_equal(patches.order(10, 3, start, size), whole[start : start + size])
    assert not np.array_equal(patches.order(10, 4, 0, 10), whole[:10])
    assert patches.order(4, None, 2, 5).tolist() == [2, 3, 0, 1, 2]


def plain_crop(image, view, size):
    """One image (H, W, C) in 0..1, one view, pixel by pixel: the weight of an old pixel falls off linearly
    from the centre of the new one, reaching 0 at a distance of one new or old pixel, the larger of both."""
    cx, cy, wide, high, sign = map(float, view)
    H, W, C = image.shape
    out = np.zeros((size, size, C))
    for i in range(size):
        y, step_y = (cy - high / 2 + high * (i + 0.5) / size) * H, max(1, high * H / size)
        for j in range(size):
            k = j if sign > 0 else size - 1 - j
            x, step_x = (cx - wide / 2 + wide * (k + 0.5) / size) * W, max(1, wide * W / size)
            total = 0
            for a in range(H):
                for b in range(W):
                    weight = max(0, 1 - abs(a + 0.5 - y) / step_y) * max(0, 1 - abs(b + 0.5 - x) / step_x)
                    out[i, j] += weight * image[a, b]
                    total += weight
            out[i, j] /= total
    return out


@pytest.mark.parametrize("H, W, size", [(7, 7, 7), (5, 9, 6), (12, 10, 4)])
def test_crop_is_the_plain_loop(H, W, size):
    pixels = noise(4, H, W, 3)
    views = px.random_views(4, generator(1))
    views[3] = torch.tensor([0.5, 0.5, 1, 1, -1])
    found = px.crop(torch.from_numpy(pixels), views, size)
    assert found.shape == (4, 3, size, size) and found.dtype == torch.float32
    for x, image, view in zip(found, pixels, views):
        assert np.abs(x.permute(1, 2, 0).numpy() - plain_crop(image / 255.0, view, size)).max() < 1e-5


def test_crop_that_enlarges_is_grid_sample():
    pixels, views = torch.from_numpy(noise(8, 16, 16, 3)), px.random_views(8, generator())
    theta = torch.zeros(8, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = (
        views[:, 4] * views[:, 2],
        2 * views[:, 0] - 1,
        views[:, 3],
        2 * views[:, 1] - 1,
    )
    grid = F.affine_grid(theta, (8, 3, 20, 20), align_corners=False)
    expected = F.grid_sample(
        pixels.permute(0, 3, 1, 2) / 255, grid, padding_mode="border", align_corners=False
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert (px.crop(pixels, views, 20) - expected).abs().max() < 1e-5


def test_crop_without_views_is_the_centre():
    pixels = torch.from_numpy(noise(3, 8, 8, 3))
    assert torch.equal(px.crop(pixels, None, 8), pixels.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(
        px.crop(pixels, None, 4), px.crop(pixels, torch.tensor([[0.5, 0.5, 1, 1, 1]] * 3), 4)
    )
    wide = torch.from_numpy(noise(3, 8, 14, 3))
    assert torch.allclose(px.crop(wide, None, 8), wide[:, :, 3:11].permute(0, 3, 1, 2) / 255, atol=1e-6)


def test_extras_crop_resizes_as_pillow(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pixels, views = noise(6, 40, 40, 3), px.random_views(6, generator(2), flip=False)
    for x, image, (cx, cy, wide, high, _) in zip(
        px.crop(torch.from_numpy(pixels), views, 12), pixels, views.tolist()
    ):
        box = tuple(40 * edge for edge in (cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2))
        box = tuple(min(40, max(0, edge)) for edge in box)
        expected = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR, box))
        assert np.abs(x.permute(1, 2, 0).numpy() * 255 - expected).max() < 1.1  # pillow rounds twice


def test_random_views():
    views = px.random_views(20_000, generator(), scale=(0.3, 0.9))
    cx, cy, wide, high, sign = views.unbind(1)
    for centre, extent in ((cx, wide), (cy, high)):
        assert (centre - extent / 2).min() > -1e-6 and (centre + extent / 2).max() < 1 + 1e-6
        free = (centre - extent / 2)[extent < 0.9] / (1 - extent)[extent < 0.9]
        assert abs(free.mean() - 0.5) < 0.02 and abs(free.std() - 12**-0.5) < 0.02  # uniform
    area, ratio = wide * high, (wide / high).log()
    assert area.min() > 0.299 and area.max() < 0.901
    assert abs(area.mean() - 0.6) < 0.01 and abs(area.std() - 0.6 / 12**0.5) < 0.01
    assert ratio.abs().max() < math.log(4 / 3) + 1e-5 and abs(ratio.mean()) < 0.01 and ratio.std() > 0.1
    assert set(sign.tolist()) == {-1, 1} and abs(sign.mean()) < 0.03
    assert torch.equal(px.random_views(5, generator(7)), px.random_views(5, generator(7)))
    assert (px.random_views(99, generator(), flip=False)[:, 4] == 1).all()
    assert torch.allclose(
        px.random_views(9, generator(), (1, 1), flip=False), torch.tensor([0.5, 0.5, 1, 1, 1])
    )
    for arguments in ({"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"ratio": (1.2, 2)}):
        with pytest.raises(BadInput, match="crops need"):
            px.random_views(2, generator(), **arguments)


def test_normalise_and_back():
    x, mean, std = torch.rand(5, 3, 6, 6, generator=generator()), (0.1, 0.5, 0.6), (0.2, 0.25, 0.3)
    y = px.normalise(x, mean, std)
    assert torch.allclose(y[:, 1], (x[:, 1] - 0.5) / 0.25) and torch.allclose(y[:, 2], (x[:, 2] - 0.6) / 0.3)
    assert torch.allclose(px.denormalise(y, mean, std), x)
    constant = px.channel_histogram(np.full((2, 4, 4, 3), 51, np.uint8))
    assert np.allclose(px.moments(constant), [[0.2] * 3, [1 / 255] * 3])


# ---------------------------------------------------------------------------- patches


def test_patches_are_in_raster_order_and_come_back():
    x = torch.randn(2, 3, 12, 12, generator=generator())
    patches = px.patchify(x, 4)
    assert torch.equal(patches, F.unfold(x, 4, stride=4).transpose(1, 2))
    assert torch.equal(patches[:, 5].reshape(2, 3, 4, 4), x[:, :, 4:8, 8:12])
    assert torch.equal(px.unpatchify(patches, 4), x)
    assert torch.equal(px.unpatchify(px.patchify(x[:, :1], 3), 3, channels=1), x[:, :1])
    with pytest.raises(BadInput, match="12 x 12 pixels cannot be cut into patches of 5 x 5"):
        px.patchify(x, 5)
    with pytest.raises(BadInput, match="6 patches"):
        px.unpatchify(patches[:, :6], 4)


# ---------------------------------------------------------------------------- mixing and erasing


def test_soft_targets_are_those_of_label_smoothing():
    logits, labels = torch.randn(6, 5, generator=generator()), torch.tensor([0, 4, 2, 2, 1, 3])
    soft = px.soft_targets(labels, 5, 0.1)
    assert torch.allclose(F.cross_entropy(logits, soft), F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(px.soft_targets(labels, 5), F.one_hot(labels, 5).float())


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_treats_images_and_targets_alike(mixup, cutmix):
    """Image i is all i, its target one-hot: what a pixel shows, the target must say."""
    B, kinds = 6, set()
    x = torch.arange(B).float()[:, None, None, None].expand(B, 3, 16, 12)
    for seed in range(40):
        mixed, soft = px.mix(x, torch.eye(B), generator(seed), mixup, cutmix)
        assert torch.allclose(soft.sum(dim=1), torch.ones(B)) and mixed.shape == x.shape
        means = mixed.mean(dim=(1, 2, 3))
        assert torch.allclose(means, soft @ torch.arange(B).float(), atol=1e-4)
        whole = (mixed == mixed.round()).all().item()
        kinds.add("cutmix" if whole else "mixup")
        if whole:  # a box, the same in every image and channel
            other = mixed[1:] != x[1:]
            assert (other == other[0, 0]).all()
            rows, columns = other[0, 0].any(dim=1).sum(), other[0, 0].any(dim=0).sum()
            assert rows * columns == other[0, 0].sum()
    assert kinds == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())
    again = [px.mix(x, torch.eye(B), generator(5), mixup, cutmix) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]) and torch.equal(again[0][1], again[1][1])


def test_mixing_weights_are_beta():
    def shares(**kinds):
        x = torch.zeros(2, 1, 24, 24)
        return torch.stack(
            [px.mix(x, torch.eye(2), generator(seed), **kinds)[1][0, 0] for seed in range(1500)]
        )

    found = shares(mixup=0.8, cutmix=0)
    assert (
        abs(found.mean() - 0.5) < 0.03 and abs(found.var() - 1 / (4 * 2.6)) < 0.01
    )  # variance of Beta(a, a): 1/(4(2a+1))
    assert shares(mixup=0, cutmix=1.0).mean() > 0.55  # boxes are cut off at the border
    x, eye = torch.rand(2, 3, 4, 4), torch.eye(2)
    assert px.mix(x, eye, generator(), 0, 0)[0] is x
    with pytest.raises(BadInput, match="mixup and cutmix"):
        px.mix(x, eye, generator(), -1, 1)


def test_random_erasing():
    x = torch.full((4000, 3, 16, 16), 9.0)
    y = px.random_erase(x, generator(), 0.25)
    changed = (y != 9).all(dim=1)
    assert torch.equal(changed, (y != 9).any(dim=1))  # all channels
    hit = changed.flatten(1).any(dim=1)
    assert abs(hit.float().mean() - 0.25) < 0.03
    rows, columns = changed[hit].any(dim=2).sum(dim=1), changed[hit].any(dim=1).sum(dim=1)
    area = changed[hit].sum(dim=(1, 2))
    assert torch.equal(rows * columns, area)  # boxes
    assert 2 <= area.min() and area.max() < 0.4 * 256 and abs(area.float().mean() / 256 - 0.177) < 0.01
    erased = y[hit].permute(0, 2, 3, 1)[changed[hit]]
    assert abs(erased.mean()) < 0.02 and abs(erased.std() - 1) < 0.02
    assert torch.equal(y, px.random_erase(x, generator(), 0.25)) and (x == 9).all()
    assert torch.equal(px.random_erase(x[:50], generator(), 0), x[:50])


# ---------------------------------------------------------------------------- shapes

AREAS = {
    "circle": math.pi * 0.85**2,
    "square": 1.5**2,
    "triangle": 3 * 3**0.5 / 4,
    "star": 5 * 0.42 * math.sin(math.pi / 5),
    "cross": 2 * 2 * 0.6 - 0.6**2,
    "ring": math.pi * (0.92**2 - 0.52**2),
    "bar": 2 * 0.6,
    "arrow": 1.05 * 0.44 + 0.95 * 0.7,
    "angle": 0.5 * 1.7 + 1.0 * 0.5,
}


def test_shapes_have_the_right_area_and_distance():
    grid = np.linspace(-1.2, 1.2, 601)
    x, y = np.meshgrid(grid, grid)
    assert len(shapes.SHAPES) >= 10
    for name, distance in shapes.SHAPES.items():
        d = distance(x, y)
        area = (d < 0).mean() * 2.4**2
        assert 0.5 < area < 2.8 and (d[(x**2 + y**2) > 1.2**2] > 0).all()
        if name in AREAS:
            assert abs(area - AREAS[name]) < 0.02, name
    corners = np.array([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
    outline = np.concatenate(
        [a + (b - a) * np.linspace(0, 1, 2000)[:, None] for a, b in zip(corners, np.roll(corners, -1, 0))]
    )
    for x, y in np.random.default_rng(0).uniform(-1.2, 1.2, (50, 2)):
        nearest = np.hypot(*(outline - (x, y)).T).min()
        sign = -1 if abs(x) < 1 and abs(y) < 0.3 else 1
        assert abs(shapes.SHAPES["bar"](np.array([x]), np.array([y]))[0] - sign * nearest) < 1e-3


def test_shapes_are_drawn_alike_balanced_and_no_task_for_a_linear_model():
    x, y = shapes.shapes(2400, 16, seed=0)
    again, labels = shapes.shapes(2400, 16, seed=0)
    assert np.array_equal(x, again) and np.array_equal(y, labels)
    assert (np.bincount(y) == 200).all() and (np.diff(y[:200]) != 0).mean() > 0.8
    other, labels = shapes.shapes(1200, 16, seed=1)
    assert not np.array_equal(other, x[:1200])
    assert len(shapes.shapes(5, 48)[0]) == 5
    # ridge regression on the pixels
    x, other = (np.c_[set_.reshape(len(set_), -1) / 255.0 - 0.5, np.ones(len(set_))] for set_ in (x, other))
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ np.eye(12)[y])
    assert ((other @ weights).argmax(axis=1) == labels).mean() < 0.2


def test_the_default_set(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        sets,
        "shapes",
        lambda count, size, seed: (
            drawn.append((count, size, seed)),
            (noise(count, size, size, 3), np.arange(count) % 12),
        )[1],
    )
    found = load_images("shapes")
    assert (
        drawn == [(8000, 32, 0), (2000, 32, 1)] and found.size == 32 and found.classes == tuple(shapes.SHAPES)
    )
    assert load_images("shapes", 8).train.batch([1])[0].shape == (1, 8, 8, 3)


# ---------------------------------------------------------------------------- pictures


def unpack(path):
    """A PNG file of write_png: RGB, 8 bits, no filter."""
    content = path.read_bytes()
    wide, high = struct.unpack(">II", content[16:24])
    length = struct.unpack(">I", content[33:37])[0]
    return (
        np.frombuffer(zlib.decompress(content[41 : 41 + length]), np.uint8)
        .reshape(high, 1 + wide * 3)[:, 1:]
        .reshape(high, wide, 3)
    )


def test_contact_sheet_of_any_set(tmp_path, capsys):
    (pixels, labels), _ = write_mnist(tmp_path / "raw")
    for options in ([], ["--views"]):
        data.main(
            ["sheet", str(tmp_path / "raw"), "--out", str(tmp_path / "sheet.png"), "--columns", "3", *options]
        )
        sheet = unpack(tmp_path / "sheet.png")
        assert sheet.shape == (10 * 60, 3 * 60, 3) and (sheet[:2] == 255).all()
        cell = sheet[2:58:2, 2:58:2]
        assert (cell.tobytes() in {image.tobytes() for image in pixels[labels == 0]}) is (not options)
    assert "0, 1, 2" in capsys.readouterr().out


def test_extras_png_files_can_be_read(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    picture = noise(5, 8, 3)
    px.write_png(tmp_path / "x.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), picture)


def test_command_line(tmp_path, capsys):
    write_cifar(tmp_path / "raw")
    data.main(["images", str(tmp_path / "raw"), "--size", "16", "--out", str(tmp_path / "a" / "out")])
    assert "16 x 16 pixels, 10 classes" in capsys.readouterr().out
    manifest = json.loads((Path(tmp_path) / "a" / "out" / "manifest.json").read_text())
    assert manifest["format"] == "images" and manifest["sources"] == [str(tmp_path / "raw")]
    with pytest.raises(BadInput, match="--val-fraction 2"):
        touch(tmp_path, "photos/a/1.png")
        data.main(["images", str(tmp_path / "photos"), "--out", str(tmp_path / "b"), "--val-fraction", "2"])
