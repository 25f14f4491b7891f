"""Generation: text token by token in one of three orders, and images completed patch by patch (Table 8).

    python evaluate.py generate CKPT --prompt TEXT [--suffix TEXT] [--order {left,confident,random}]
    python evaluate.py reconstruct CKPT [CKPT ...] --data DIR --picture completed.png
    python evaluate.py reconstruct CKPT --hide 0.75 --at-once --picture mae.png       as MAE's pictures

Each step asks for tokens under an f, keeps one of the answers, and takes it into the context of the next.
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
from tasks.hub import about, open_run
from util import BadInput, import_optional, positive, printable, table

ORDERS = ("left", "confident", "random")

# ---------------------------------------------------------------------------- text

@torch.no_grad()
def generate(run, prompt, count, temperature=0.8, top_k=50, seed=0, order=None, suffix=(),
             watch=None):
    """Continue `prompt`, a list of at least one id, by `count` ids -> list of the new ids.

    temperature  0 takes the most likely token                        top_k  0 for all tokens
    suffix       ids that follow the new ones, which the model sees where its objective lets it
    order        None: the objective's own default; or
        left       from left to right, under the f that gives the next token its whole prefix as context
        confident  the objective's own steps (`Objective.decoding`): of the tokens asked for, keep the surest
        random     the same steps, keep any of them: a sample of the any-order mixture
    watch        called after each step with (tokens, known): 1, 2, .. as they became known, 0 missing
    A text that outgrows the model's sequence is continued from its last half. BadInput: an order that the
    objective cannot follow, a gap longer than a sequence.
    """
    generator, S, ids = torch.Generator().manual_seed(seed), run.settings.length, list(prompt)
    order, next_step = rule(run, order, suffix)
    if suffix and len(prompt) + count + len(suffix) > S:
        raise BadInput(f"{count} tokens between {len(prompt)} and {len(suffix)} others are more than the "
                       f"model's {S}; a gap is filled within one sequence")
    while len(ids) < len(prompt) + count:
        before = ids if len(ids) < S else ids[-(S // 2):]
        P, given = len(before), len(before) + len(suffix)
        new = min(S - P, len(prompt) + count - len(ids))
        tokens = torch.zeros(S, dtype=torch.long)            # what stands at a missing one is not read
        tokens[:P], tokens[P + new:given + new] = torch.tensor(before), torch.tensor(suffix, dtype=torch.long)
        known = torch.zeros(given + new, dtype=torch.long)   # 1, 2, .. as they became known; 0 missing
        known[:P], known[P + new:] = torch.arange(1, P + 1), torch.arange(P + 1, given + 1)
        for k in tqdm(range(new), unit=" tokens", leave=False, delay=2, mininterval=1):
            f, targets = next_step(known, given)
            scores = scores_of(run, tokens, f, targets)                                          # (n, vocab)
            if order == "random":
                row = torch.rand(len(scores), generator=generator).argmax()
            else:
                row = scores.softmax(-1).amax(-1).argmax()
            tokens[targets[row]] = sample(scores[row], temperature, top_k, generator)
            known[targets[row]] = given + k + 1
            if watch:
                watch(tokens[:given + new], known)
        ids += tokens[P:P + new].tolist()
    return ids[len(prompt):]


def show_step(tokenizer, tokens, known):
    """Print a sequence that is being filled: what is missing as dots, the newest token in colour. A terminal
    shows one picture after another, a file one line a step."""
    terminal, text = sys.stdout.isatty(), ""
    state = torch.where(known == known.max(), 2, (known > 0).long())     # 0 missing, 1 known, 2 new
    for kind, part in itertools.groupby(zip(state.tolist(), tokens.tolist()), key=lambda pair: pair[0]):
        ids = [i for _, i in part]
        word = printable(tokenizer.decode(ids)) if kind else "·" * len(ids)
        text += f"\x1b[1;32m{word}\x1b[0m" if terminal and kind == 2 else word
    print("\x1b[H\x1b[J" + text if terminal else text.replace("\n", " "), flush=True)


def continue_text(run, prompt, tokens=100, **how):
    """What the model writes behind a text -> str; `how` is that of `generate`."""
    ids = run.tokenizer.encode(prompt).tolist() or [run.tokenizer.separator]
    return run.tokenizer.decode(generate(run, ids, tokens, **how))


def scores_of(run, tokens, f, targets):
    """The scores (n, vocab) of the positions `targets` of one sequence under f."""
    length = int(f.nonzero()[-1]) + 1                        # nothing after the last f > 0 is read
    inputs = (x[None].to(run.model.query.device) for x in (tokens[:length], f[:length], targets))
    scores = run.model.logits(run.model(*inputs, run.path)[0]).float().cpu()
    if not scores.isfinite().all():
        raise BadInput(f"{run.name} gives scores that are not finite: its training diverged")
    return scores


def sample(scores, temperature, top_k, generator):
    """One id from scores (vocab,)."""
    if temperature < 1e-6:
        return scores.argmax()
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(min(top_k, len(scores))).values[-1], -math.inf)
    return torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[0]


def natural(run):
    """Whether the objective's chain goes from left to right."""
    S = run.model.config.length if run.tokenizer is None else run.settings.length
    return torch.equal(run.objective.chain(S), torch.arange(S))


def rule(run, order, suffix):
    """-> the order that is taken, and its steps as a function (known (L,), given), as for
    `Objective.decoding` -> f, the positions asked for."""
    objective, name = run.objective, describe(run.objective)
    own = objective.decoding(torch.tensor([1, 0]), 1) is not None
    regimes = objective.left_to_right(run.settings.length, run.path) if natural(run) else None
    if not own and not regimes:
        raise BadInput(f"{name} cannot write text: it says neither how it fills a sequence (`decoding`) nor "
                       "how it predicts from left to right (`left_to_right`)")
    order = order or (objective.generation if regimes else "confident")
    if order != "left" and not own:
        raise BadInput(f"{name} writes from left to right only (it has no `decoding`); leave out --order "
                       f"{order}")
    if order == "left" and not regimes:
        raise BadInput(f"{name} was not trained from left to right; use --order confident")
    if order == "left" and suffix:
        instead = "use --order confident with it" if own else f"{name} cannot fill gaps"
        raise BadInput(f"from left to right nobody sees a --suffix; {instead}")

    def own_step(known, given):
        f = objective.decoding(known, given)
        return f, ((f == f.max()) & (known == 0)).nonzero()[:, 0]

    if order != "left":
        return order, own_step
    *_, passes = regimes.values()
    scored = torch.stack([scores_next(f) for f in passes])                                   # (passes, S)

    def left_step(known, given):
        p = int((known == 0).nonzero()[0])
        f = passes[scored[:, p].nonzero()[0, 0]]     # the first pass that gives p its whole prefix
        # One masked stream may be trained with [MASK]s behind p; for the others nothing behind p matters.
        return (f if run.path == "mask" else f[:p + 1]), torch.tensor([p])

    return order, left_step


# ---------------------------------------------------------------------------- images

def hidden_patches(count, length, share, seed=0):
    """Which patches of `count` images are hidden, in raster order -> LongTensor (count, n).

    round(share (S - 1)) of the patches 1..S-1, every subset being equally likely. The first is never hidden:
    left-to-right objectives do not predict it.
    """
    if not 0 < share < 1:
        raise BadInput(f"--hide {share:g} is not between 0 and 1")
    n, generator = max(1, round(share * (length - 1))), torch.Generator().manual_seed(seed)
    return (1 + torch.rand(count, length - 1, generator=generator).argsort(dim=1)[:, :n]).sort(dim=1).values


@torch.no_grad()
def reconstruct(run, patches, hidden, at_once=False):
    """Predict patches (N, S, values) at `hidden` (N, n), one after another -> a copy with the predictions.

    Each is predicted from what the objective was trained to predict from: `ar` and `dar` from all patches
    before it, under the f in which it is first of its group; the others from all patches that are known by
    then. mae's decoder shows [MASK] at the rest, and two streams leave it out (f = 0). What stands at a
    hidden patch is never read. at_once: all in one pass from the visible ones, as in MAE's pictures.
    """
    model, path, (N, S) = run.model, run.path, patches.shape[:2]
    patches, hidden = patches.to(model.query.device), hidden.to(model.query.device)
    row, known = torch.arange(N, device=patches.device)[:, None], visible(patches, hidden)
    filled = patches.masked_fill(~known[..., None], 0)
    regimes = run.objective.left_to_right(S, path) if run.objective.one_stream != "mask" else None
    if regimes and not natural(run):
        raise BadInput(f"{describe(run.objective)} predicts in another order than these patches are taken in")
    if regimes and at_once:
        raise BadInput(f"--at-once is for masks; {describe(run.objective)} predicts from the patches before")
    if regimes:
        *_, passes = regimes.values()
        first = torch.stack([scores_next(f) for f in passes]).long().argmax(0).to(patches.device)     # (S,)
        passes = passes.to(patches.device)
    steps = [hidden] if at_once else hidden.T[..., None]                                    # (N, 1) or (N, n)
    for targets in tqdm(steps, unit=" patches", leave=False, delay=2, mininterval=1):
        if regimes:
            groups = passes[first[targets[:, 0]]]                                                     # (N, S)
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
    colour = mean.unflatten(2, (3, -1)).mean(3, keepdim=True).expand(-1, -1, -1, mean.shape[2] // 3)
    return torch.where(known, patches, colour.flatten(2))


def measures(config, patches, filled, hidden, perceptual=None):
    """{name: (N,)} of reconstructions `filled` of `patches` (N, S, values).

    l2     squared error, the mean over the numbers of the hidden patches: the training loss
    psnr   of the completed image in 0..1, in decibels
    lpips  of the completed image (Zhang et al. 2018), where `perceptual` is that network
    """
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
    """`count` of all images in the folder `data`, where no run was trained on it; else, and of data without
    files of its own, the validation images. data None: what the first run was trained on."""
    source, files = data or runs[0].settings.data, []
    own = {Path(run.settings.data).resolve() for run in runs}
    if Path(source).is_dir() and Path(source).resolve() not in own:
        files = [path for path in files_in(source) if path.suffix.lower() in SUFFIXES]
    if files:
        rows = np.random.default_rng(seed).permutation(len(files))[:count]
        pixels = np.concatenate([*decoded([files[row] for row in rows], size)])
        return ImageSet(pixels, np.zeros(len(rows), np.int64))
    images, total = load_images(source, size), runs[0].total
    if not data and total not in (None, len(images.train)):
        raise BadInput(f"{source} is not what {runs[0].name} was trained on: it has {len(images.train):,} "
                       f"training images, not {total:,}; give images with --data")
    return images.val


def complete(source, hidden, fill, perceptual):
    """Complete the first images of `source` (Patches), 100 at a time, by fill(patches, hidden) -> means and
    standard errors of `measures` with the values of each image; the first 100 images."""
    found, pictures = [], []
    for start in range(0, len(hidden), 100):
        part = hidden[start:start + 100]
        patches = source.batch(start, len(part))
        filled = fill(patches, part)
        found.append(measures(source.config, patches, filled, part, perceptual))
        pictures = pictures if start else to_pictures(source.config, filled)
    results = {}
    for name in found[0]:
        x = torch.cat([part[name] for part in found])
        spread = x.std().item() if len(x) > 1 else math.nan
        results |= {name: x.mean().item(), f"{name}_stderr": spread / math.sqrt(len(x)),
                    f"{name}_of_images": x.tolist()}
    return results, pictures


# ---------------------------------------------------------------------------- commands

def generate_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command writes text")
    if not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise BadInput(f"--temperature {args.temperature:g} and --top-k {args.top_k} are not both at least 0")
    prompt = run.tokenizer.encode(args.prompt).tolist() or [run.tokenizer.separator]
    suffix, texts = run.tokenizer.encode(args.suffix).tolist(), []
    watch = functools.partial(show_step, run.tokenizer) if args.watch and args.json != "-" else None
    for k in range(args.samples):
        with autocast:
            ids = generate(run, prompt, args.tokens, args.temperature, args.top_k, args.seed + k, args.order,
                           suffix, watch)
        texts.append(run.tokenizer.decode(prompt + ids + suffix))
        if args.json != "-":
            print(printable(texts[-1]) + "\n")
    return {"texts": texts}, run


def reconstruct_command(args):
    perceptual = import_optional("lpips").LPIPS(net=args.lpips, verbose=False).eval() if args.lpips else None
    runs = [open_run(args, checkpoint) for checkpoint in args.checkpoints]
    first, config = runs[0][0], runs[0][0].model.config
    for run, _ in runs:
        own = run.model.config
        if run.tokenizer:
            raise BadInput(f"{run.name} was trained on text; this command needs a checkpoint of images")
        if (own.size, own.patch) != (config.size, config.patch):
            raise BadInput(f"{run.name} cuts images of {own.size} pixels into patches of {own.patch}, "
                           f"{first.name} of {config.size} into {config.patch}: compare those that see alike")
    data = args.data or first.settings.data
    images = images_of(args.data, [run for run, _ in runs], config.size, args.max_images, args.seed)
    hidden = hidden_patches(min(args.max_images, len(images)), config.length, args.hide, args.seed)
    source = Patches(images, config, args.seed)
    results, pictures = complete(source, hidden, with_mean, perceptual)
    rows = [{"checkpoint": None, "label": "mean colour", **results}]
    columns = [to_pictures(config, source.batch(0, len(pictures))), pictures]
    for checkpoint, (run, autocast) in zip(args.checkpoints, runs):
        label = "untrained " * checkpoint.startswith("untrained:") + f"{describe(run.objective)} ({run.path})"
        source = Patches(images, run.model.config, args.seed)
        fill = functools.partial(reconstruct, run, at_once=args.at_once)
        with autocast:
            results, pictures = complete(source, hidden, fill, perceptual)
        rows.append({"checkpoint": checkpoint, "label": label, **about(run), **results})
        columns.append(pictures)
    if args.picture:
        pixels = torch.stack(columns, dim=1)[:8].permute(0, 1, 3, 4, 2)           # (rows, columns, H, W, 3)
        write_png(args.picture, (pixels * 255).round().byte().numpy())
    if args.json != "-":
        how = "at once" if args.at_once else "one by one"
        print(printable(f"{len(hidden):,} images of {data}, {hidden.shape[1]} of {config.length} patches "
                        f"hidden and predicted {how}, never the first; mean ± standard error over images\n"))
        names = [name for name in ("l2", "psnr", "lpips") if name in results]
        several = len(hidden) > 1
        print(table([["", *names], *([row["label"], *(
            f"{row[name]:.4f}" + f" ± {row[f'{name}_stderr']:.4f}" * several for name in names)]
            for row in rows)]))
        if args.picture:
            print(f"\n{args.picture}: original, {', '.join(row['label'] for row in rows)}")
    return {"data": data, "images": len(hidden), "hidden": hidden.shape[1], "patches": config.length,
            "rows": rows}, None


def add_commands(command):
    """Register `generate` and `reconstruct` with evaluate.py: `command(name, function, text, many)` gives a
    parser."""
    sub = command("generate", generate_command, "sample from the model")
    sub.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    sub.add_argument("--suffix", default="", help="text behind what is added, for objectives that fill gaps")
    sub.add_argument("--tokens", type=positive, default=100, help="tokens to add; a text that outgrows "
                     "the model's sequence goes on from its last half")
    sub.add_argument("--samples", type=positive, default=1, help="texts, of seeds --seed, --seed + 1, ...")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    sub.add_argument("--top-k", type=int, default=50, help="0 for all")
    sub.add_argument("--seed", type=int, default=0, help="of every random choice")
    sub.add_argument("--watch", action="store_true", help="show how the sequence is filled, step by step")
    sub.add_argument("--order", choices=ORDERS, help="left to right, the surest hidden token first, or any "
                     "of them (default: confident for diffusion, blocks and spans, else left)")

    text = "predict hidden patches, from the second on, and compare with what was there (Table 8)"
    sub = command("reconstruct", reconstruct_command, text, many=True)
    sub.add_argument("--data", help="images: all of a folder that was not trained on (default: the "
                     "validation images of the first checkpoint's data)")
    sub.add_argument("--hide", type=float, default=0.25, help="share of the patches to hide; 0.75 for MAE")
    sub.add_argument("--at-once", action="store_true", help="masks: all in one pass, not one by one")
    sub.add_argument("--max-images", type=positive, default=1000, help="the same for every checkpoint")
    sub.add_argument("--seed", type=int, default=0, help="of the images and the hidden patches")
    sub.add_argument("--lpips", choices=("alex", "vgg"), help="also LPIPS with that network")
    sub.add_argument("--picture", metavar="FILE", help="of 8 images the original, with the mean colour, and "
                     "each reconstruction")
