"""What is done to pixels: crops, normalisation, patches, mixing and erasing, and pictures without a
package."""
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from support.cli import BadInput


def channel_histogram(images):
    """uint8 (B, H, W, 3) -> counts (3, 256), from which the moments follow exactly."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])


def moments(histogram):
    """Mean and standard deviation per channel, in 0..1; a channel that never varies gets a deviation of one
    grey level."""
    values, share = np.arange(256) / 255, histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def fit(images, size):
    """uint8 (B, H, W, 3) -> uint8 (B, size, size, 3): the centre square, resized if need be."""
    if images.shape[1:3] == (size, size):
        return images
    x = crop(torch.from_numpy(np.ascontiguousarray(images)), None, size)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


# ---------------------------------------------------------------------------- crops

def random_views(count, generator, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True):
    """Random resized crops and flips, drawn on the CPU -> (count, 5): centre x, y, width, height in 0..1,
    sign.

    The share of the area is uniform in `scale`, the side ratio log-uniform in that part of `ratio` which fits
    into the image, the place uniform; sign -1 is mirrored left to right, half of the views unless flip is
    False.
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
    """Cut the views out of the images and resize them -> float32 (B, 3, size, size) in 0..1, on the images'
    device.

    images uint8 (B, H, W, 3); views of random_views, or None for the largest centred square, which is exact
    where it has that size already. Bilinear, averaging over the area of a new pixel where that is larger than
    an old one. The filter is separable, so that the whole batch takes two products with (B, size, H) and (B,
    size, W) weights.
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
    0..1 as (B,); a negative extent mirrors. Each row is a triangle around its place, as wide as the larger of
    both pixels, of sum one."""
    place = (torch.arange(size, device=centre.device) + 0.5) / size - 0.5
    place = (centre[:, None] + extent[:, None] * place) * length                # (B, size), in old pixels
    pixel = torch.arange(length, device=centre.device) + 0.5
    width = (extent.abs() * (length / size)).clamp(min=1)[:, None, None]
    weights = (1 - (place[..., None] - pixel).abs() / width).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(x, mean, std):
    """(B, 3, H, W) in 0..1 -> zero mean and unit deviation per channel, given the set's."""
    mean, std = (torch.as_tensor(values, device=x.device, dtype=x.dtype)[:, None, None]
                 for values in (mean, std))
    return (x - mean) / std


def denormalise(x, mean, std):
    """The inverse of normalise."""
    mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype)[:, None, None]
                 for values in (mean, std))
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


# ---------------------------------------------------------------------------- mixing and erasing, for
# fine-tuning

def soft_targets(labels, classes, smoothing=0.0):
    """LongTensor (B,) -> (B, classes): 1 - smoothing on the label, and `smoothing` shared out over all
    classes."""
    return torch.nn.functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix(x, targets, generator, mixup=0.8, cutmix=1.0):
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), by even chance, of each image with the one
    before it.

    x (B, C, H, W), targets (B, K) -> the same. The batch shares one weight lambda ~ Beta(mixup, mixup), or
    one box, of an area 1 - lambda with lambda ~ Beta(cutmix, cutmix), cut off at the border; its targets are
    mixed by the area that is really there. A parameter of 0 switches its kind off.
    """
    if not (mixup >= 0 and cutmix >= 0):
        raise BadInput(f"the parameters of mixup and cutmix are at least 0, got {mixup:g} and {cutmix:g}")
    if not mixup and not cutmix:
        return x, targets
    rng = np.random.default_rng(torch.randint(2 ** 62, (),
                                              generator=generator).item())  # torch's Beta takes no generator
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
    """Random erasing (arXiv 1708.04896) of normalised images (B, C, H, W): with that probability one box of
    2% to 33% of the area, side ratio 0.3 to 3.3, becomes unit normal noise."""
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
    """uint8 (rows, columns, H, W, 3) -> uint8 (height, width, 3) on white, small images enlarged to about 64
    pixels."""
    images = np.asarray(images)
    times = max(1, 64 // images.shape[2])
    images = np.pad(images.repeat(times, 2).repeat(times, 3),
                    ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)),
                    constant_values=255)
    rows, columns, H, W, _ = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3)


def write_png(path, image):
    """Write uint8 (H, W, 3) as a PNG file; needs no package."""
    H, W, _ = image.shape
    # filter 0 before each line
    lines = np.concatenate([np.zeros((H, 1), np.uint8), image.reshape(H, W * 3)], axis=1)

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I",
                                                                              zlib.crc32(kind + content))

    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0))
                           + part(b"IDAT", zlib.compress(lines.tobytes())) + part(b"IEND", b""))
