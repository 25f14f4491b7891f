"""Generation: text token by token in one of three orders, and images completed patch by patch (Table 8).

    python evaluate.py generate CKPT --prompt TEXT [--suffix TEXT] [--order {left,confident,random}]
    python evaluate.py reconstruct CKPT [CKPT ...] --data DIR --picture completed.png
    python evaluate.py reconstruct CKPT --hide 0.75 --at-once --picture mae.png       as MAE's pictures
"""

import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from images import SUFFIXES, ImageSet, Patches, decoded, files_in, load_images, unpatchify, write_png
from objectives import describe, scores_next
from tasks.hub import about, finite, open_run
from util import BadInput, import_optional, output_file, positive, printable, table

# ---------------------------------------------------------------------------- text

@torch.no_grad()
def generate(run, prompt, count, temperature=0.8, top_k=50, seed=0, order=None, suffix=(), watch=None):
    """Continue `prompt`, a list of at least one id, by `count` ids, which `suffix` follows -> the new ids.

    order   left       left to right, under the f that gives the next token its whole prefix as context
            confident  the objective's own steps (`Objective.decoding`): of the tokens asked for, the surest
            random     the same steps, any of them: a sample of the any-order mixture
            None       the objective's own default
    watch   called after each step with (tokens, known): 1, 2, .. as they became known, 0 missing

    A text that outgrows the model's sequence goes on from its last half.
    """
    generator, S, ids = torch.Generator().manual_seed(seed), run.settings.length, list(prompt)
    order, forward = choose_order(run, order, suffix)
    end = len(prompt) + count
    if suffix and end + len(suffix) > S:
        raise BadInput(f"{end + len(suffix)} tokens are more than the model's {S}")
    while len(ids) < end:
        before = ids if len(ids) < S else ids[-(S // 2):]
        P, given = len(before), len(before) + len(suffix)
        new = min(S - P, end - len(ids))
        tokens = torch.tensor([*before, *[0] * new, *suffix, *[0] * (S - given - new)])
        known = torch.tensor([*range(1, P + 1), *[0] * new, *range(P + 1, given + 1)])
        for k in tqdm(range(new), unit=" tokens", leave=False, delay=2, mininterval=1):
            f, targets = asked(run, known, given, forward)
            if suffix and not 0 < f[-1] < f.max():
                raise BadInput(f"{describe(run.objective)} writes without seeing a --suffix")
            length = int(f.nonzero()[-1]) + 1                    # nothing after the last f > 0 is read
            inputs = (x[None].to(run.model.query.device) for x in (tokens[:length], f[:length], targets))
            scores = run.model.logits(run.model(*inputs, run.path)[0]).float().cpu()             # (n, vocab)
            surest = finite(run, scores).softmax(-1).amax(-1)
            row = (torch.rand(len(scores), generator=generator) if order == "random" else surest).argmax()
            tokens[targets[row]] = sample(scores[row], temperature, top_k, generator)
            known[targets[row]] = given + k + 1
            if watch:
                watch(tokens, known)
        ids += tokens[P:P + new].tolist()
    return ids[len(prompt):]


def choose_order(run, order, suffix):
    """-> the order that is taken; from left to right also the f that asks for each token (S, S)."""
    objective, name, S = run.objective, describe(run.objective), run.settings.length
    forward, fills = left_to_right(run, S), objective.decoding(torch.tensor([1, 0]), 1) is not None
    can = {"left": forward is not None, "confident": fills, "random": fills}
    if not any(can.values()):
        raise BadInput(f"{name} cannot write text: it has neither `decoding` nor `left_to_right`")
    order = order or (objective.generation if can["left"] else "confident")
    if not can[order]:
        raise BadInput(f"{name} was not trained to write so; leave out --order {order}")
    if order == "left" and suffix:
        raise BadInput("from left to right nobody sees a --suffix; gaps are filled by --order confident")
    return order, forward if order == "left" else None


def left_to_right(run, S):
    """Of each token the first f that gives it its whole prefix (S, S); None if that is not how it learned."""
    regimes = run.objective.left_to_right(S, run.path)
    if regimes is None or not torch.equal(run.objective.chain(S), torch.arange(S)):
        return None
    *_, passes = regimes.values()
    return passes[torch.stack([scores_next(f) for f in passes]).long().argmax(0)]


def asked(run, known, given, forward):
    """The f of the next step, and the positions that it asks for."""
    if forward is None:
        f = run.objective.decoding(known, given)
        return f, ((f == f.max()) & (known == 0)).nonzero()[:, 0]
    p = int((known == 0).nonzero()[0])
    # One masked stream may be trained with [MASK]s behind p; for the others nothing behind p matters.
    return (forward[p] if run.path == "mask" else forward[p, :p + 1]), torch.tensor([p])


def sample(scores, temperature, top_k, generator):
    """One id from scores (vocab,)."""
    if temperature < 1e-6:
        return scores.argmax()
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(min(top_k, len(scores))).values[-1], -math.inf)
    return torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[0]


def continue_text(run, prompt, tokens=100, suffix="", **how):
    """A text with what the model writes behind it, or before a suffix; `how` is that of `generate`."""
    before = run.tokenizer.encode(prompt).tolist() or [run.tokenizer.separator]
    after = run.tokenizer.encode(suffix).tolist()
    return run.tokenizer.decode(before + generate(run, before, tokens, suffix=after, **how) + after)


def show_step(tokenizer, tokens, known):
    """Print a sequence that is being filled, with dots for gaps: a line, or on a terminal a new screen."""
    terminal, text = sys.stdout.isatty(), ""
    state = torch.where(known == known.max(), 2, (known > 0).long())     # 0 missing, 1 known, 2 new
    for kind, part in itertools.groupby(zip(tokens.tolist(), state.tolist()), key=lambda pair: pair[1]):
        ids = [i for i, _ in part]
        word = printable(tokenizer.decode(ids)) if kind else "·" * len(ids)
        text += f"\x1b[1;32m{word}\x1b[0m" if terminal and kind == 2 else word
    print("\x1b[H\x1b[J" + text if terminal else text.replace("\n", " "), flush=True)


# ---------------------------------------------------------------------------- images

def hidden_patches(count, length, share, seed=0):
    """Which patches of `count` images are hidden (count, n), in raster order: a uniform subset of all but the
    first, which left-to-right objectives do not predict."""
    if not 0 < share < 1:
        raise BadInput(f"--hide {share:g} is not between 0 and 1")
    n, generator = max(1, round(share * (length - 1))), torch.Generator().manual_seed(seed)
    return (1 + torch.rand(count, length - 1, generator=generator).argsort(dim=1)[:, :n]).sort(dim=1).values


@torch.no_grad()
def reconstruct(run, patches, hidden, at_once=False):
    """Predict patches (N, S, values) at `hidden` (N, n), one after another -> a copy with the predictions.

    `ar` and `dar` predict each from all patches before it, under the f in which it is first of its group;
    the others from all that are known by then, with [MASK] (mae) or nothing (two streams, f = 0) at the rest.
    at_once: all in one pass from the visible ones, as in MAE's pictures.
    """
    model, path, (N, S) = run.model, run.path, patches.shape[:2]
    patches, hidden = patches.to(model.query.device), hidden.to(model.query.device)
    row, known = torch.arange(N, device=patches.device)[:, None], visible(patches, hidden)
    filled = patches.masked_fill(~known[..., None], 0)
    directed = run.objective.one_stream != "mask" and run.objective.left_to_right(S, path) is not None
    forward = left_to_right(run, S) if directed else None                                             # (S, S)
    if directed and (at_once or forward is None):
        raise BadInput(f"--at-once is for masks; {describe(run.objective)} predicts in an order of its own")
    steps = [hidden] if at_once else hidden.T[..., None]                                    # (N, 1) or (N, n)
    for targets in tqdm(steps, unit=" patches", leave=False, delay=2, mininterval=1):
        if directed:
            groups = forward[targets[:, 0].cpu()].to(patches.device)                                  # (N, S)
        else:
            groups = torch.where(known, 1, 2 if path == "mae" else 0).scatter(1, targets, 2)
        filled[row, targets] = model.pixels(model(filled, groups, targets, path)).to(filled)
        known[row, targets] = True
    return filled.cpu()


def visible(patches, hidden):
    """Which patches (N, S) are not among `hidden` (N, n)."""
    known = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    return known.scatter(1, hidden, False)


def with_mean(patches, hidden):
    """The baseline: every hidden patch becomes the mean colour of the image's known patches."""
    known = visible(patches, hidden)[..., None]                                              # (N, S, 1)
    mean = (patches * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)               # (N, 1, values)
    colour = mean.unflatten(2, (3, -1)).mean(3).repeat_interleave(mean.shape[2] // 3, dim=2)
    return torch.where(known, patches, colour)


def measures(config, patches, filled, hidden, perceptual=None):
    """{name: (N,)} of reconstructions `filled` of `patches` (N, S, values): l2, the training loss, of the
    hidden patches; psnr in decibels, and lpips (Zhang et al. 2018) by a network, of the completed images."""
    row = torch.arange(len(patches))[:, None]
    x, y = to_pictures(config, patches), to_pictures(config, filled)
    results = {"l2": (filled - patches)[row, hidden].square().mean(dim=(1, 2)),
               "psnr": -10 * (x - y).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()}
    if perceptual:
        results["lpips"] = perceptual(x * 2 - 1, y * 2 - 1).detach().flatten()
    return results


def to_pictures(config, patches):
    """Patches (N, S, values) -> images (N, 3, H, W) in 0..1."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))
    return (unpatchify(patches, config.patch) * std + mean).clamp(0, 1)


def images_of(data, runs, size, count, seed):
    """`count` of all images in the folder `data`, or the validation images of a set that a run was trained on
    or that has no files of its own. None: the first run's."""
    source, own = data or runs[0].settings.data, {Path(run.settings.data).resolve() for run in runs}
    if Path(source).is_dir() and Path(source).resolve() not in own:
        files = [path for path in files_in(source) if path.suffix.lower() in SUFFIXES]
        if files:
            rows = np.random.default_rng(seed).permutation(len(files))[:count]
            pixels = np.concatenate([*decoded([files[row] for row in rows], size)])
            return ImageSet(pixels, np.zeros(len(rows), np.int64))
    images = load_images(source, size)
    if not data and runs[0].total not in (None, len(images.train)):
        raise BadInput(f"{source} is not what {runs[0].name} was trained on; give images with --data")
    return images.val


def complete(source, hidden, fill, perceptual):
    """Complete images of `source` (Patches) by fill(patches, hidden) -> `measures`, over images and of each;
    the first 8 images."""
    found, pictures, results = [], None, {}
    for k, part in enumerate(hidden.split(100)):
        patches = source.batch(100 * k, len(part))
        filled = fill(patches, part)
        found.append(measures(source.config, patches, filled, part, perceptual))
        if k == 0:
            pictures = to_pictures(source.config, filled[:8])
    for name in found[0]:
        x = torch.cat([part[name] for part in found])
        stderr = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
        results |= {name: x.mean().item(), f"{name}_stderr": stderr, f"{name}_of_images": x.tolist()}
    return results, pictures


# ---------------------------------------------------------------------------- commands

def generate_command(args):
    run, autocast = open_run(args, kind="text")
    if not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise BadInput(f"--temperature {args.temperature:g} and --top-k {args.top_k} are not both at least 0")
    how = {name: getattr(args, name) for name in ("tokens", "suffix", "temperature", "top_k", "order")}
    texts, watch = [], functools.partial(show_step, run.tokenizer) if args.watch else None
    for seed in range(args.seed, args.seed + args.samples):
        with autocast:
            texts.append(continue_text(run, args.prompt, seed=seed, watch=watch, **how))
        print(printable(texts[-1]) + "\n")
    return {"texts": texts}, run


def reconstruct_command(args):
    """Complete the same images with every checkpoint, beside their mean colour."""
    perceptual = import_optional("lpips").LPIPS(net=args.lpips, verbose=False).eval() if args.lpips else None
    runs = [open_run(args, checkpoint, "images") for checkpoint in args.checkpoints]
    first, config = runs[0][0], runs[0][0].model.config
    for run, _ in runs:
        if (run.model.config.size, run.model.config.patch) != (config.size, config.patch):
            raise BadInput(f"{run.name} has other sizes of images or patches than {first.name}")
    images = images_of(args.data, [run for run, _ in runs], config.size, args.max_images, args.seed)
    hidden = hidden_patches(min(args.max_images, len(images)), config.length, args.hide, args.seed)
    original = Patches(images, config, args.seed)
    results, pictures = complete(original, hidden, with_mean, perceptual)
    rows = [{"checkpoint": None, "label": "mean colour", **results}]
    columns = [to_pictures(config, original.batch(0, min(8, len(hidden)))), pictures]
    for checkpoint, (run, autocast) in zip(args.checkpoints, runs):
        label = "untrained " * checkpoint.startswith("untrained:") + f"{describe(run.objective)} ({run.path})"
        source = Patches(images, run.model.config, args.seed)
        fill = functools.partial(reconstruct, run, at_once=args.at_once)
        with autocast:
            results, pictures = complete(source, hidden, fill, perceptual)
        rows.append({"checkpoint": checkpoint, "label": label, **about(run), **results})
        columns.append(pictures)
    data, how = args.data or first.settings.data, "at once" if args.at_once else "one by one"
    print(printable(f"{len(hidden):,} images of {data}, {hidden.shape[1]} of {config.length} patches hidden "
                    f"and predicted {how}, never the first; mean ± standard error over images\n"))
    names = [name for name in ("l2", "psnr", "lpips") if name in rows[0]]
    error = " ± {:.4f}" * (len(hidden) > 1)
    cells = [[row["label"], *(f"{row[name]:.4f}" + error.format(row[f"{name}_stderr"]) for name in names)]
             for row in rows]
    print(table([["", *names], *cells]))
    if args.picture:
        pixels = torch.stack(columns, dim=1).permute(0, 1, 3, 4, 2)               # (rows, columns, H, W, 3)
        write_png(args.picture, (pixels * 255).round().byte().numpy())
        print(f"\n{args.picture}: original, {', '.join(row['label'] for row in rows)}")
    return {"data": data, "images": len(hidden), "hidden": hidden.shape[1], "patches": config.length,
            "rows": rows}, None


def add_commands(command):
    """Register both with evaluate.py: `command(name, function, text, many)` gives a parser."""
    add = command("generate", generate_command, "sample from the model").add_argument
    add("--prompt", default="", help="text to continue (default: the start of a document)")
    add("--suffix", default="", help="text behind what is added, for objectives that fill gaps")
    add("--tokens", type=positive, default=100,
        help="tokens to add; a text that outgrows the model's sequence goes on from its last half")
    add("--samples", type=positive, default=1, help="texts, of seeds --seed, --seed + 1, ...")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    add("--top-k", type=int, default=50, help="0 for all")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--watch", action="store_true", help="show how the sequence is filled, step by step")
    add("--order", choices=("left", "confident", "random"), help="left to right, the surest hidden token "
        "first, or any of them (default: confident for diffusion, blocks and spans, else left)")

    text = "predict hidden patches, from the second on, and compare with what was there (Table 8)"
    add = command("reconstruct", reconstruct_command, text, many=True).add_argument
    add("--data", help="images: all of a folder that was not trained on "
                       "(default: the validation images of the first checkpoint's data)")
    add("--hide", type=float, default=0.25, help="share of the patches to hide; 0.75 for MAE")
    add("--at-once", action="store_true", help="masks: all in one pass, not one by one")
    add("--max-images", type=positive, default=1000, help="the same for every checkpoint")
    add("--seed", type=int, default=0, help="of the images and the hidden patches")
    add("--lpips", choices=("alex", "vgg"), help="also LPIPS with that network")
    add("--picture", type=output_file, metavar="FILE",
        help="of 8 images the original, with the mean colour, and each reconstruction")
