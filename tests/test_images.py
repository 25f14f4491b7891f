"""Images: folders, CIFAR's files, prepared folders; decoding; crops, patches, mixing; the drawn set."""

import io
import math
import os

import numpy as np
import pytest
import torch
from conftest import call, seeded

import images
from images import ImageSet, Patches, crop, decode, is_images, load_images, random_views, unpatchify
from model import Config
from util import BadInput


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def class_folders(root, sizes):
    """{"train/cat": 3, ...} -> that many PNG files in each; returns {folder: pixels}."""
    pixels = {}
    for i, (folder, count) in enumerate(sizes.items()):
        (root / folder).mkdir(parents=True)
        pixels[folder] = noise(count, 8, 8, 3, seed=i)
        for k, image in enumerate(pixels[folder]):
            save(root / folder / f"{k:04}.png", image)
    return pixels


def save(path, image, **options):
    Image = pytest.importorskip("PIL.Image")
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def write_cifar(root, hundred):
    """Files as their documentation describes them -> (pixels, labels) of training and validation."""
    root.mkdir()
    text = "".join(f"name{i}\n" for i in range(100))
    (root / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text(text)
    train, found = ["train.bin"] if hundred else ["data_batch_1.bin", "data_batch_2.bin"], []
    for side, files in enumerate((train, ["test.bin" if hundred else "test_batch.bin"])):
        pixels, labels = noise(4 * len(files), 32, 32, 3, seed=side), np.arange(4 * len(files)) * 3 % 10
        records = [bytes([7, label] if hundred else [label]) + image.transpose(2, 0, 1).tobytes()
                   for image, label in zip(pixels, labels)]
        for k, name in enumerate(files):
            (root / name).write_bytes(b"".join(records[4 * k:4 * k + 4]))
        found.append((pixels, labels))
    return found


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_directly_and_prepared(tmp_path, hundred):
    raw, out = tmp_path / "raw", tmp_path / "out"
    expected = write_cifar(raw, hundred)
    call(f"data.py images {raw} --out {out}")
    for source in (raw, out):
        found = load_images(str(source))
        assert is_images(str(source)) and found.classes[7] == "name7"
        assert np.allclose(found.mean, expected[0][0].mean(axis=(0, 1, 2)) / 255)
        assert np.allclose(found.std, expected[0][0].std(axis=(0, 1, 2)) / 255)
        for part, (pixels, labels) in zip((found.train, found.val), expected):
            assert np.array_equal(part.images, pixels) and np.array_equal(part.labels, labels)
    assert isinstance(found.train.images, np.memmap)
    (raw / ("test.bin" if hundred else "test_batch.bin")).write_bytes(bytes(5000))
    with pytest.raises(BadInput, match="not whole"):
        load_images(str(raw))


@pytest.mark.parametrize("train, other", [("train", "val"), ("Training", "Valid"), ("TRAIN", "test")])
def test_class_folders_directly_and_prepared(tmp_path, monkeypatch, capsys, train, other):
    raw, out = tmp_path / "raw", tmp_path / "out"
    sizes = {f"{train}/dog": 5, f"{train}/cat": 4, f"{other}/cat": 3, f"{other}/dog": 2,
             f"{train}/.hidden": 1}
    pixels = class_folders(raw, sizes | ({"Testing/cat": 1} if other != "test" else {}))
    (raw / "notes.txt").touch()
    monkeypatch.setattr(images, "CHUNK", 3 * 8 * 8 * 3)  # several chunks
    call(f"data.py images {raw} --out {out} --size 8")
    for source in (raw, out):
        found = load_images(str(source), 8)
        assert is_images(str(source)) and found.classes == ("cat", "dog")
        for side, part in ((train, found.train), (other, found.val)):
            assert np.array_equal(part.images, np.concatenate([pixels[f"{side}/cat"], pixels[f"{side}/dog"]]))
            assert part.labels.tolist() == [0] * sizes[f"{side}/cat"] + [1] * sizes[f"{side}/dog"]
        assert np.allclose(found.mean, found.train.images.mean(axis=(0, 1, 2)) / 255)
    told = capsys.readouterr().err
    assert "other kinds left out: 1," in told and ("images left out: 1," in told) == (other != "test")
    monkeypatch.setattr(images, "IN_MEMORY", 1000)
    with pytest.raises(BadInput, match="too many for memory.*python data.py images .* --size 8"):
        load_images(str(raw), 8)


@pytest.mark.parametrize("layout, classes", [
    ({"a": 20, "b": 10}, ("a", "b")), ({".": 30}, ()), ({"2023": 30}, ()), ({"train": 30}, ()),
    ({"train/a": 20, "train/b": 10}, ("a", "b")), ({"Val/a": 20, "Val/b": 10}, ("a", "b")),
    ({"bus": 20, "train": 10}, ("bus", "train")), ({".": 10, "a": 20}, ()),
    ({"a/1": 12, "a/2": 8, "b/1": 10}, ("a", "b")), ({"all/a": 20, "all/b": 10}, ("a", "b"))])
def test_a_share_of_each_class_is_held_out(tmp_path, layout, classes):
    class_folders(tmp_path / "raw", layout)
    found = load_images(str(tmp_path / "raw"), 8)
    assert found.classes == classes and (len(found.train), len(found.val)) == (27, 3)
    if classes:
        assert [np.bincount(part.labels).tolist() for part in (found.train, found.val)] == [[18, 9], [2, 1]]
    assert len({image.tobytes() for part in (found.train, found.val) for image in part.images}) == 30
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "raw").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert np.array_equal(load_images(str(tmp_path / "links"), 8).train.images, found.train.images)


def test_names_are_shown_and_kinds_told_by_content(tmp_path):
    Image, root = pytest.importorskip("PIL.Image"), tmp_path / "raw"
    kinds = {".jpg": "WEBP", ".webp": "WEBP", ".bmp": "BMP", ".TIFF": "TIFF", ".gif": "GIF", ".jpeg": "JPEG"}
    for k, folder in enumerate(("evil\x1b[2J", "b")):
        (root / folder).mkdir(parents=True)
        for name, kind in kinds.items():
            Image.new("RGB", (8, 8), (250 * k, 0, 0)).save(root / folder / f"image{name}", kind)
    found = load_images(str(root), 8)
    assert found.classes == ("b", "evil\\x1b[2J") and (len(found.train), len(found.val)) == (10, 2)
    assert np.abs(found.train.images[:, 4, 4, 0] - 250.0 * (1 - found.train.labels)).max() < 9


def test_a_file_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path):
    class_folders(tmp_path / "raw", {"a": 9, "b": 9})
    path, bomb = tmp_path / "raw" / "b" / "0003.png", io.BytesIO()
    pytest.importorskip("PIL.Image").new("1", (9000, 9000)).save(bomb, "PNG")
    for content, why in ((path.read_bytes()[:60], "cannot be decoded"),
                         (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot be decoded"),
                         (bomb.getvalue(), "9000 x 9000 pixels"), (None, "neither a file nor a folder")):
        path.unlink()
        path.write_bytes(content) if content else os.mkfifo(path)
        with pytest.raises(BadInput, match=f"0003.png .*{why}"):
            call(f"data.py images {tmp_path / 'raw'} --out {tmp_path / 'out'} --size 8")
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_manifest_of_somebody_else_prepares_nothing(tmp_path):
    class_folders(tmp_path / "raw", {"a": 9, "b": 9})
    for content in ('["mine"]', '{"format": 2}', "cut {"):
        (tmp_path / "raw" / "manifest.json").write_text(content)
        assert is_images(str(tmp_path / "raw")) and len(load_images(str(tmp_path / "raw"), 8).train) == 16
    os.remove(tmp_path / "raw" / "manifest.json")
    os.mkfifo(tmp_path / "raw" / "manifest.json")  # is not waited for
    with pytest.raises(BadInput, match="manifest.json .* neither a file"):
        load_images(str(tmp_path / "raw"), 8)


@pytest.mark.parametrize("layout", [{"train/a": 2, "val/a": 1, "val/b": 1}, {"a": 1, "b": 9}])
def test_both_sides_need_the_same_classes(tmp_path, layout):
    class_folders(tmp_path / "raw", layout)
    with pytest.raises(BadInput, match="same classes"):
        load_images(str(tmp_path / "raw"), 8)


def test_text_is_not_taken_for_images(tmp_path, books):
    (tmp_path / "figure.png").touch()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    for source in (books, tmp_path, tmp_path / "a.txt", tmp_path / "nowhere", "pydoc", "hf:cifar10"):
        assert not is_images(str(source))
    with pytest.raises(BadInput, match="not a folder of images"):
        load_images(str(books))


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    Image, path = pytest.importorskip("PIL.Image"), tmp_path / "image.png"
    rgb, grey, alpha = noise(9, 9, 3), noise(9, 9, seed=1), noise(9, 9, seed=2)
    three = np.stack([grey] * 3, axis=-1)
    over_white = np.round(rgb * (alpha / 255.0)[..., None] + 255.0 * (1 - alpha / 255.0)[..., None])
    sixteen = np.random.default_rng(3).integers(0, 1 << 16, (9, 9), np.uint16)
    palette = Image.fromarray(rgb).quantize(7)
    for image, expected, options in (
            (rgb, rgb, {}), (grey, three, {}), (np.dstack([rgb, alpha]), over_white, {}),
            (Image.fromarray(np.dstack([grey, 0 * grey]), "LA"), 0 * rgb + 255, {}),
            (grey > 99, np.where(three > 99, 255, 0), {}), (palette, np.asarray(palette.convert("RGB")), {}),
            (sixteen, np.stack([sixteen >> 8] * 3, axis=-1), {})):
        save(path, image, **options)
        assert np.abs(decode(path, 9).astype(int) - expected).max() <= (expected is over_white)
    save(path, palette, transparency=3)
    assert (decode(path, 9)[np.asarray(palette) == 3] == 255).all()
    for kind in (np.int32, np.float32):  # nothing says which number is white
        Image.fromarray(grey.astype(kind)).save(tmp_path / "deep.tiff")
        with pytest.raises(BadInput, match="32 bits"):
            decode(tmp_path / "deep.tiff", 9)
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))
    assert np.abs(decode(tmp_path / "cmyk.jpg", 16).astype(int) - [0, 255, 255]).max() < 8


def test_orientation_and_odd_sizes(tmp_path):
    Image, path = pytest.importorskip("PIL.Image"), tmp_path / "image.png"
    rgb = noise(6, 6, 3)
    turned = {3: rgb[::-1, ::-1], 6: np.rot90(rgb, -1), 8: np.rot90(rgb), 2: rgb[:, ::-1]}
    for code, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = code
        save(path, rgb, exif=exif)
        assert np.array_equal(decode(path, 6), expected)
    save(path, rgb, exif=b"Exif\0\0not a header")
    assert np.array_equal(decode(path, 6), rgb)
    smooth = np.add.outer(np.arange(400), np.arange(700))[..., None].repeat(3, axis=2) * 200 // 1100
    save(tmp_path / "large.jpg", smooth.astype(np.uint8), quality=95)  # decoded at 1/8, then resized
    expected = smooth[:, 150:550].reshape(20, 20, 20, 20, 3).mean(axis=(1, 3))
    assert np.abs(decode(tmp_path / "large.jpg", 20) - expected)[1:-1, 1:-1].max() < 2


def pillow_crop(image, view, size):
    """The same of one image (H, W, C), by Pillow -> (C, size, size)."""
    Image, (H, W, _) = pytest.importorskip("PIL.Image"), image.shape
    cx, cy, wide, high, sign = map(float, view)
    ends = np.clip([cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2], 0, 1) * [W, H, W, H]
    channels = [Image.fromarray(np.float32(channel)) for channel in np.moveaxis(image, 2, 0)]
    return np.stack([channel.resize((size, size), Image.Resampling.BILINEAR, tuple(ends))
                     for channel in channels])[:, :, ::int(sign)]


@pytest.mark.parametrize("H, W, size", [(7, 7, 7), (5, 9, 6), (12, 10, 4)])
def test_crops_are_those_of_pillow(H, W, size):
    pixels, views = noise(3, H, W, 3), random_views(3, seeded(1))
    views[2] = torch.tensor([0.5, 0.5, 1, 1, -1])
    with torch.autocast("cpu", torch.bfloat16):
        found = crop(torch.from_numpy(pixels), views, size).numpy()
    centre = crop(torch.from_numpy(pixels), None, size).numpy()
    square = (0.5, 0.5, min(H, W) / W, min(H, W) / H, 1)
    for k, image in enumerate(pixels / 255):
        assert np.abs(found[k] - pillow_crop(image, views[k], size)).max() < 1e-5
        assert np.abs(centre[k] - pillow_crop(image, square, size)).max() < 1e-5


def test_random_views_are_uniform_and_inside():
    cx, cy, wide, high, sign = random_views(20_000, seeded(), scale=(0.3, 0.9)).unbind(1)
    for centre, extent in ((cx, wide), (cy, high)):
        assert (centre - extent / 2).min() > -1e-6 and (centre + extent / 2).max() < 1 + 1e-6
        free = ((centre - extent / 2) / (1 - extent))[extent < 0.9]
        assert abs(free.mean() - 0.5) < 0.02 and abs(free.std() - 12 ** -0.5) < 0.02
    area, ratio = wide * high, (wide / high).log()
    assert area.min() > 0.299 and area.max() < 0.901 and abs(area.std() - 0.6 / 12 ** 0.5) < 0.01
    assert ratio.abs().max() < math.log(4 / 3) + 1e-5 and abs(ratio.mean()) < 0.01 and ratio.std() > 0.1
    assert set(sign.tolist()) == {-1, 1} and abs(sign.mean()) < 0.03


def test_batches_are_the_same_whoever_asks():
    part = ImageSet(noise(10, 8, 8, 3), np.arange(10))
    config = Config(0, 4, 1, 16, 2, patch=4, mean=(0.1, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    x, labels = Patches(part, config).labelled(8, 4)
    assert labels.tolist() == [8, 9, 0, 1]
    expected = (part.images[labels] / 255 - [0.1, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    assert np.allclose(unpatchify(x, 4).permute(0, 2, 3, 1), expected, atol=1e-5)
    assert Patches(ImageSet(noise(10, 20, 12, 3), np.arange(10)), config).batch(0, 3).shape == x[:3].shape
    source = Patches(part, config, seed=3, least=0.3)
    epochs = torch.cat([source.labelled(k, 7)[1] for k in range(0, 70, 7)]).reshape(7, 10)
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7
    whole, again = source.batch(6, 8), Patches(part, config, seed=3, least=0.3)
    assert torch.equal(again.batch(6, 8, slice(1, 5)), whole[1:5]) and source.lengths(6, 8) is None
    assert not torch.equal(source.batch(6, 8), Patches(part, config, seed=3).batch(6, 8))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_treats_images_and_targets_alike(mixup, cutmix):
    """Image i is all i, its target one-hot: what a pixel shows, the target must say."""
    B, kinds = 6, set()
    x = torch.arange(B).float()[:, None, None, None].expand(B, 3, 16, 12)
    for seed in range(40):
        mixed, soft = images.mix(x, torch.eye(B), seeded(seed), mixup, cutmix)
        assert torch.allclose(soft.sum(dim=1), torch.ones(B)) and mixed.shape == x.shape
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(B).float(), atol=1e-4)
        whole = (mixed == mixed.round()).all().item()
        kinds.add("cutmix" if whole else "mixup")
        if whole:  # a box, the same in every image and channel
            other = (mixed != x)[1:]
            rows, columns = other[0, 0].any(dim=1).sum(), other[0, 0].any(dim=0).sum()
            assert (other == other[0, 0]).all() and rows * columns == other[0, 0].sum()
    assert kinds == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_mixing_weights_are_beta():
    x, eye = torch.zeros(2, 1, 24, 24), torch.eye(2)
    share = torch.stack([images.mix(x, eye, seeded(seed), 0.8, 0)[1][0, 0] for seed in range(1500)])
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.var() - 1 / (4 * 2.6)) < 0.01


def test_a_png_comes_back(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    grid = noise(2, 3, 64, 64, 3)
    images.write_png(tmp_path / "grid.png", grid)
    found = np.asarray(Image.open(tmp_path / "grid.png"))
    assert found.shape == (2 * 68, 3 * 68, 3) and (found[:2] == 255).all()
    assert np.array_equal(found[70:134, 138:202], grid[1, 2])


def test_drawn_shapes_have_the_right_area_and_differ():
    x, y = np.meshgrid(*[np.linspace(-1.3, 1.3, 651)] * 2)
    areas = {name: (distance(x, y) < 0).mean() * 2.6 ** 2 for name, distance in images.SHAPES.items()}
    expected = {"circle": math.pi * 0.85 ** 2, "ring": math.pi * (0.92 ** 2 - 0.52 ** 2), "square": 1.2 ** 2,
                "triangle": 3 * 3 ** 0.5 * 0.6 ** 2, "star": math.pi * (0.7 ** 2 + 0.3 ** 2 / 2)}
    assert len(areas) == 8 and all(abs(areas[name] - area) < 0.02 for name, area in expected.items())
    found, labels = images.shapes(80, 24, seed=5)
    assert found.shape == (80, 24, 24, 3) and np.bincount(labels).tolist() == [10] * 8
    assert np.array_equal(images.shapes.__wrapped__(80, 24, seed=5)[0], found)
    assert not np.array_equal(images.shapes(80, 24, seed=6)[0], found)
