"""Reconstruct hidden patches one at a time, each prediction becoming context (paper, Sec. 5.2, Table 8).

    python evaluate.py reconstruct CKPT [CKPT ...] --data DIR --picture pictures.png

The generation task of the image side. Every checkpoint gets the same images with the same patches hidden, and
predicts from what it was trained to predict from:

    mae           all patches that are known by then; the decoder shows [MASK] at the others
    two streams without an order (mlm, vl, ..)   all patches that are known by then; the others are not seen
    ar, dar       the known patches before the predicted one in raster order, under the group index in which
                  it is first of its group; in a random order, earlier patches that are still unknown are left
                  out (f = 0)

The very first patch is never hidden: left-to-right objectives do not predict it.
"""

import functools
import math
import time

import torch

from downstream.finetune import PLAIN
from downstream.hub import open_run
from engine.runs import UNTRAINED, about
from images.patches import order
from images.pixels import contact_sheet, crop, denormalise, normalise, patchify, unpatchify, write_png
from images.sets import load_images
from objectives import describe, scores_next
from support.cli import BadInput, import_optional, output_file, positive, progress, real, seed


def hidden_patches(count, length, share, order="raster", seed=0):
    """Which patches of `count` images are hidden, in the order in which they are predicted -> LongTensor
    (count, n).

    round(share (S - 1)) of the patches 1 .. S - 1, every subset being equally likely.
    """
    if not 0 < share < 1:
        raise BadInput(f"--hide {share:g} is not between 0 and 1")
    n = max(1, round(share * (length - 1)))
    hidden = 1 + torch.rand(count, length - 1,
                            generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :n]
    return hidden.sort(dim=1).values if order == "raster" else hidden


@torch.no_grad()
def reconstruct(run, patches, hidden, bar=None):
    """Predict patches (N, S, values) at `hidden` (N, n), one after another -> a copy with the predictions.

    What stands at a hidden patch is never read.
    """
    model, path = run.model, run.path
    patches, hidden = patches.to(model.query.device), hidden.to(model.query.device)
    N, S, _ = patches.shape
    row, positions = torch.arange(N, device=patches.device)[:, None], torch.arange(S, device=patches.device)
    known = torch.ones(N, S, dtype=torch.bool, device=patches.device)
    known[row, hidden] = False
    filled = patches.masked_fill(~known[..., None], 0)
    passes = run.objective.left_to_right(S, path) if run.objective.one_stream != "mask" else None
    if path == "causal" and not torch.equal(hidden, hidden.sort(dim=1).values):
        raise BadInput(f"{run.name} runs as one causal stream, which reads every earlier patch; --order "
                       "random would show it patches that are not known yet: use --order raster")
    if passes:  # the pass of each target in which its context is exactly what is before it
        *_, passes = passes.values()
        first = torch.stack([scores_next(f) for f in passes]).long().argmax(0).to(patches.device)     # (S,)
        passes = passes.to(patches.device)
    for target in hidden.T[..., None]:                                                   # (N, 1)
        if passes is None:
            groups = known.long() + 2 * (~known).long() * (path == "mae")
            groups[row, target] = 2
        else:
            # One causal stream reads the patches before the target; those after it cannot be kept out, but
            # are not read.
            groups = passes[first[target[:, 0]]]                                         # (N, S)
            groups = groups if path == "causal" else torch.where(known | (positions == target), groups, 0)
        filled[row, target] = model.pixels(model(filled, groups, target, path)).to(filled)
        known[row, target] = True
        if bar is not None:
            bar.update(N)
    return filled.cpu()


# ---------------------------------------------------------------------------- measures

def measures(config, patches, filled, hidden, perceptual=None):
    """{name: (N,)} of reconstructions `filled` of `patches` (N, S, values).

    l2     squared error, the mean over the numbers of the hidden patches, in units of the data's standard
           deviation: the training loss, which guessing the data's mean brings to about 1
    psnr   of the completed image in 0..1, in decibels; predictions outside that range are cut
    lpips  of the completed image, where `perceptual` is given
    """
    row = torch.arange(len(patches))[:, None]
    x, y = (to_pictures(config, p) for p in (patches, filled))
    results = {"l2": (filled - patches)[row, hidden].square().mean(dim=(1, 2)),
               "psnr": -10 * (x - y).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()}
    if perceptual:
        pairs = zip(x.split(100), y.split(100))
        results["lpips"] = torch.cat([perceptual(a * 2 - 1, b * 2 - 1).flatten() for a, b in pairs])
    return results


def to_pictures(config, patches):
    """Patches (N, S, values) -> images (N, 3, H, W) in 0..1."""
    images = unpatchify(patches, config.patch, len(config.mean))
    return denormalise(images, config.mean, config.std).clamp(0, 1)


def perceptual_distance(net):
    """LPIPS (Zhang et al. 2018) through the lpips package, which needs torchvision and its weights."""
    if net is None:
        return None
    lpips = import_optional("lpips")
    with torch.no_grad():
        model = lpips.LPIPS(net=net, verbose=False).eval()
    return torch.no_grad()(model)


def with_mean(patches, hidden):
    """The baseline: every hidden patch becomes the mean colour of the image's known patches."""
    N, S, values = patches.shape
    known = torch.ones(N, S, dtype=torch.bool)
    known[torch.arange(N)[:, None], hidden] = False
    colour = (patches * known[..., None]).sum(1) / known.sum(1, keepdim=True)            # (N, values)
    colour = colour.view(N, 3, -1).mean(2, keepdim=True).expand(-1, -1, values // 3).reshape(N, 1, values)
    return torch.where(known[..., None], patches, colour)


def in_grey(patches, hidden):
    """The data's mean colour in the place of every hidden patch."""
    return patches.scatter(1, hidden[..., None].expand(-1, -1, patches.shape[-1]), 0.0)


# ---------------------------------------------------------------------------- command line

def image_run(args, checkpoint):
    """hub.open_run, for checkpoints of images: -> Run, autocast context."""
    run, autocast = open_run(args, checkpoint)
    if run.text:
        raise BadInput(f"{run.name} was trained on text; this command needs a checkpoint of images")
    return run, autocast


def complete(config, images, numbers, hidden, fill, keep, perceptual=None, autocast=PLAIN):
    """Read the images `numbers`, a few at a time, and fill them by fill(patches, hidden).
    -> {name: (N,)} of `measures`, the first `keep` as pictures (keep, 3, H, W) in 0..1."""
    found, kept = [], []
    for start in range(0, len(numbers), 250):
        part = slice(start, start + 250)
        uint8 = images.batch(numbers[part])[0]
        patches = patchify(normalise(crop(uint8, None, config.size), config.mean, config.std), config.patch)
        with autocast:
            filled = fill(patches, hidden[part])
        found.append(measures(config, patches, filled, hidden[part], perceptual))
        kept.append(to_pictures(config, filled[:max(0, keep - start)]))
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}, torch.cat(kept)


def reconstruct_command(args):
    """`evaluate.py reconstruct CKPT [CKPT ...]`: Table 8, the same hidden patches for all, and a picture.

    args     checkpoints, data, hide (share of the patches), order, max_images, seed, lpips, rows, picture
    Returns ({"data", "images", "hidden" and "patches" of an image, "rows": means and standard errors of
    `measures`, the mean colour first, with the values of each image}, None). BadInput: a checkpoint of text
    or with --norm-pix, checkpoints that cut images differently, a random order in one causal stream.
    """
    perceptual, first, rows, columns = perceptual_distance(args.lpips), None, [], []
    for checkpoint in args.checkpoints:
        run, autocast = image_run(args, checkpoint)
        config = run.model.config
        if config.norm_pix:
            raise BadInput(f"{checkpoint} was trained with --norm-pix: it predicts neither the brightness "
                           "nor the contrast of a patch, so it cannot fill an image")
        if first is None:
            first, source = config, args.data or run.settings.data
            images = load_images(source, config.size).val
            numbers = order(len(images), args.seed, 0, min(args.max_images, len(images)))
            hidden = hidden_patches(len(numbers), config.length, args.hide, args.order, args.seed)
            for title, fill in (("original", lambda patches, _: patches), ("hidden", in_grey)):
                _, kept = complete(config, images, numbers[:args.rows], hidden[:args.rows], fill, args.rows)
                columns.append((title, kept))
            found, _ = complete(config, images, numbers, hidden, with_mean, 0, perceptual)
            rows.append({"checkpoint": None, "label": "mean colour", **mean_and_stderr(found)})
        elif (config.size, config.patch) != (first.size, first.patch):
            raise BadInput(f"{checkpoint} cuts images of {config.size} pixels into patches of "
                           f"{config.patch}, {args.checkpoints[0]} of {first.size} into {first.patch}: "
                           "compare those that see alike")
        start, label = time.perf_counter(), f"{describe(run.objective)} ({run.path})"
        label = "untrained " + label if checkpoint.startswith(UNTRAINED) else label
        with progress(quiet=False, total=hidden.numel(), unit=" patches", desc=label) as bar:
            fill = functools.partial(reconstruct, run, bar=bar)
            found, kept = complete(config, images, numbers, hidden, fill, args.rows, perceptual, autocast)
        rows.append({"checkpoint": checkpoint, "label": label, **about(run),
                     "seconds": time.perf_counter() - start,
                     **mean_and_stderr(found),
                     # for paired comparisons
                     **{f"{name}_of_images": values.tolist() for name, values in found.items()}})
        columns.append((label, kept))
    if args.json != "-":
        print(f"{len(numbers):,} validation images of {source}, --hide {args.hide:g}: {hidden.shape[1]} of "
              f"{first.length} patches hidden (never the first), whatever share a model was trained with; "
              f"predicted in {args.order} order; mean ± standard error over images\n")
        print_reconstructions(rows)
    if args.picture:
        save_grid(args.picture, columns)
        if args.json != "-":
            print(f"\n{args.picture}: {', '.join(title for title, _ in columns)}")
    return {"data": source, "images": len(numbers), "hidden": hidden.shape[1], "patches": first.length,
            "rows": rows}, None


def mean_and_stderr(values):
    """{name: (N,)} -> {name: mean, name_stderr: standard error}."""
    result = {}
    for name, value in values.items():
        result[name] = value.mean().item()
        result[f"{name}_stderr"] = value.std().item() / math.sqrt(len(value)) if len(value) > 1 else math.nan
    return result


def print_reconstructions(rows):
    names = [name for name in ("l2", "psnr", "lpips") if name in rows[0]]
    width = max(len(row["label"]) for row in rows)
    print(" " * width + "".join(f"{name + (' (dB)' if name == 'psnr' else ''):>19s}" for name in names))
    for row in rows:
        cells = (f"{row[name]:10.4f} ± {row[name + '_stderr']:.4f}" for name in names)
        print(f"{row['label']:{width}s}" + "".join(cells))


def save_grid(path, columns, inches=1.6):
    """A picture of images side by side, a title over each column; `columns` is [(title, (rows, 3, H, W) in
    0..1)]. Without matplotlib the titles are left out."""
    # (rows, columns, H, W, 3)
    images = torch.stack([images for _, images in columns], dim=1).permute(0, 1, 3, 4, 2)
    pixels = (images * 255).round().byte().numpy()
    try:
        pyplot = import_optional("matplotlib.pyplot")
    except BadInput:
        write_png(path, contact_sheet(pixels))
        return
    high, wide = pixels.shape[:2]
    figure, cells = pyplot.subplots(high, wide, figsize=(inches * wide, inches * high + 0.4), squeeze=False,
                                    layout="constrained")
    for row, images in zip(cells, pixels):
        for cell, image in zip(row, images):
            cell.imshow(image, interpolation="nearest")
            cell.set_axis_off()
    for cell, (title, _) in zip(cells[0], columns):
        cell.set_title(title.replace(" (", "\n("), fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def add_reconstruct_command(command):
    """Register `reconstruct` with evaluate.py."""
    sub = command("reconstruct", reconstruct_command, "predict hidden patches one at a time (Table 8)",
                  many=True)
    sub.add_argument("--data", help="images (default: the validation images of the first checkpoint's data)")
    sub.add_argument("--hide", type=real, default=0.25, help="share of the patches to hide")
    sub.add_argument("--order", choices=("raster", "random"), default="raster", help="of predicting")
    sub.add_argument("--max-images", type=positive, default=1000, help="the same for every checkpoint")
    sub.add_argument("--seed", type=seed, default=0, help="of the images and the hidden patches")
    sub.add_argument("--lpips", choices=("alex", "vgg"),
                     help="also LPIPS with that network (pip install lpips)")
    sub.add_argument("--rows", type=positive, default=8, help="images in the picture")
    sub.add_argument("--picture", type=output_file, metavar="FILE",
                     help="picture: original, hidden input, each checkpoint's reconstruction")
