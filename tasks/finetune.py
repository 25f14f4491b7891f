"""Fine-tuning on labelled text and images, and GLUE; all commands of evaluate.py that need labels.

    python evaluate.py finetune CKPT --data my.csv --out CLASSIFIER
    python evaluate.py predict CLASSIFIER --data new.csv --csv classes.csv    or new.txt, or images
    python evaluate.py glue CKPT --glue-dir DIR --tasks all --seeds 3 --submit DIR        Table 2

Text follows the Cramming protocol: all weights, a new linear layer on the pooled features, dropout 0.1,
AdamW, cosine decay, 5 epochs of batches of 16. Images follow MAE's (He et al. 2021, A.1) without RandAugment
and random erasing. The last epoch counts: dev labels choose nothing. In --json, `places` says which row of
its file (from 0, below the names of the columns) or which image file each prediction is of.

A classifier is a folder: classifier.pt, a checkpoint of the fine-tuned weights with the new layer beside
them, and metrics.jsonl, the mean loss of each epoch and at last the metrics on the dev examples.
"""

import contextlib
import copy
import csv
import io
import json
import math
import os
import statistics
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import prefetch
from images import Patches, load_unlabelled, mix, new_folder, patchify, unpatchify
from objectives import describe
from run import load_checkpoint, save_checkpoint, warmup_cosine
from tasks import glue, probe
from tasks.hub import open_run
from util import BadInput, output_file, positive, printable, table, write_text


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How to fine-tune; the defaults are those of text."""

    lr: float                 # the peak: warm-up, then cosine to 0
    pool: str
    attention: str            # causal or full
    epochs: int = 5
    batch_size: int = 16
    micro_batch: int = 256    # examples per forward pass at most; the rest is accumulated
    warmup: float = 0.06      # share of the steps over which the learning rate rises
    clip: float = 1.0         # largest norm of the gradient; 0 for no clipping
    weight_decay: float = 0.01
    beta2: float = 0.98
    eps: float = 1e-12
    dropout: float = 0.1
    layer_decay: float = 1.0  # learning rate of a layer as a share of that of the next one
    drop_path: float = 0.0    # images: share of samples that skip a branch of the last block; 0 in the first
    mixup: float = 0.0        # images: parameter of the Beta distribution, 0 for none
    cutmix: float = 0.0       # images: the same
    smoothing: float = 0.0    # images: of the labels
    crop: float = 0.08        # images: least share of the area that a random crop keeps


MAE = {"epochs": 100, "batch_size": 1024, "warmup": 0.05, "clip": 0.0, "weight_decay": 0.05, "beta2": 0.999,
       "eps": 1e-8, "dropout": 0.0, "layer_decay": 0.65, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0,
       "smoothing": 0.1}
VIT_TINY = {**MAE, "epochs": 10, "batch_size": 128, "crop": 0.2, "mixup": 0.0, "cutmix": 0.0,
            "smoothing": 0.0}  # too small to overfit in a few epochs: mixing slows it down


def protocol_of(args, run):
    """The Protocol of this kind and size of model, but for what the options say."""
    attention, pool = probe.attention_and_pool(run, args.attention, args.pool)
    given = {name: x for name in ("lr", "epochs", "batch_size") if (x := getattr(args, name)) is not None}
    if run.tokenizer is not None:  # the paper's rate is for its 768-wide model; tiny hardly moves with it
        usual = {"lr": 4e-5 if run.model.config.width >= 512 else 5e-4}
    else:
        tiny = run.settings.preset == "vit-tiny"
        usual = VIT_TINY if tiny else MAE
        usual = {**usual, "lr": (2e-3 if tiny else 5e-4) * given.get("batch_size", usual["batch_size"]) / 256}
    protocol = Protocol(**{**usual, **given, "attention": attention, "pool": pool})
    if not 0 < protocol.lr < math.inf:
        raise BadInput(f"--lr {protocol.lr:g} is not a positive number")
    return protocol


# ---------------------------------------------------------------------------- the network

class DropPath(nn.Dropout1d):
    """Stochastic depth (Huang et al. 2016): dropout of whole samples."""

    def forward(self, x):
        return super().forward(x.flatten(1)[None])[0].view_as(x)


class Classifier(nn.Module):
    """A copy of the encoder, pooling, and a new linear layer: a score for each class, or where `classes` is
    None one, in units of `spread` from `mean`."""

    def __init__(self, run, classes, protocol, seed, mean=0.0, spread=1.0):
        super().__init__()
        self.classes, self.protocol, self.mean, self.spread = classes, protocol, mean, spread
        self.encoder, width = copy.deepcopy(run.model), run.model.config.width
        between = nn.Dropout(protocol.dropout)
        if run.tokenizer is None:
            between = nn.LayerNorm(width)
            self.encoder.decoder = self.encoder.pixels = None
            rates = torch.linspace(0, protocol.drop_path, len(self.encoder.blocks)).tolist()
            for block, rate in zip(self.encoder.blocks, rates):
                block.dropout = DropPath(rate)
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = protocol.dropout
        self.head = nn.Sequential(between, nn.Linear(width, 1 if classes is None else len(classes)))
        nn.init.normal_(self.head[1].weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head[1].bias)

    def forward(self, tokens, padding=None):
        """-> (B, classes) or (B, 1)."""
        features = self.encoder.encode(tokens, padding, self.protocol.attention == "causal")
        return self.head(probe.pool_features(features, padding, self.protocol.pool)).float()

    def groups(self):
        """Parameter groups with layer-wise rates lr * decay^(L + 1 - l): l = L + 1 for the head and the final
        norm, 1 .. L for the blocks, 0 for what comes before them. Vectors have no weight decay."""
        p, top, found = self.protocol, len(getattr(self.encoder, "blocks", ())) + 1, {}
        for name, parameter in self.named_parameters():
            if name.startswith("encoder.blocks."):
                layer = int(name.split(".")[2]) + 1
            else:
                layer = top if name.startswith(("head.", "encoder.norm.")) else 0
            found.setdefault((layer, parameter.dim() >= 2), []).append(parameter)
        return [{"params": parameters, "lr": p.lr * p.layer_decay ** (top - layer),
                 "weight_decay": p.weight_decay * matrices}
                for (layer, matrices), parameters in found.items()]


@torch.no_grad()
def predict(model, run, prepared, autocast=probe.PLAIN):
    """-> (class numbers (N,), probabilities (N, classes)), or (scores (N,), None)."""
    model.eval()
    scores = np.empty((len(prepared), model.head[1].out_features), np.float32)
    for rows, *batch in probe.every_batch(run, prepared):
        with autocast:
            scores[rows] = model(*batch).cpu().numpy()
    if not np.isfinite(scores).all():
        raise BadInput(f"the scores are not finite; try a smaller --lr than {model.protocol.lr:g}")
    if model.classes is None:
        return scores[:, 0] * np.float64(model.spread) + model.mean, None
    return scores.argmax(1), torch.from_numpy(scores).softmax(1).numpy()


# ---------------------------------------------------------------------------- the loop

def text_batches(run, prepared, targets, protocol, seed):
    """All batches of all epochs: ids, padding and targets."""
    lengths = np.array(list(map(len, prepared)))
    for epoch in range(protocol.epochs):
        for rows in probe.batch_rows(lengths, protocol.batch_size, seed, epoch):
            yield *probe.text_batch(run, prepared, rows), targets[torch.from_numpy(rows)]


def image_batches(run, images, classes, protocol, steps, seed, mix_seed):
    """The same of images: patches, None and targets (B, classes), mixed as images are."""
    patch, device, p = run.model.config.patch, run.model.query.device, protocol
    size, source = min(p.batch_size, len(images)), Patches(images, run.model.config, seed, p.crop, device)

    def draw(step):
        patches, labels = source.labelled(step * size, size)
        targets = F.one_hot(labels.to(device), classes) * (1 - p.smoothing) + p.smoothing / classes
        generator = torch.Generator().manual_seed(mix_seed * 1_000_003 + step)
        x, targets = mix(unpatchify(patches, patch), targets, generator, p.mixup, p.cutmix)
        return patchify(x, patch), None, targets

    return prefetch(draw, range(steps))


def fine_tune(run, prepared, labels, classes, protocol, seed, autocast=probe.PLAIN, title=""):
    """Fine-tune a copy of run.model on what probe.prepare made of a part and its class numbers (N,), or where
    `classes` is None its scores (N,) -> the Classifier, each epoch's mean loss. R8: the new layer, the order,
    mixing, and dropout or drop path each have a seed of their own."""
    p, images, device = protocol, run.tokenizer is None, run.model.query.device
    seeds = np.random.SeedSequence(seed).generate_state(3 + images).tolist()
    head_seed, order_seed, *mix_seed, drop_seed = seeds
    loss, mean, spread, targets = F.cross_entropy, 0.0, 1.0, labels
    if classes is None:
        loss, mean, spread = F.mse_loss, labels.mean(), labels.std() or 1.0
        targets = ((labels - mean) / spread).astype(np.float32)[:, None]
    model = Classifier(run, classes, p, head_seed, mean, spread).to(device).train()
    per_epoch = len(prepared) / min(p.batch_size, len(prepared))
    per_epoch = round(per_epoch) if images else math.ceil(per_epoch)
    steps, losses, running = p.epochs * per_epoch, [], 0.0
    if images:
        batches = image_batches(run, prepared, len(classes), p, steps, order_seed, *mix_seed)
    else:
        batches = text_batches(run, prepared, torch.from_numpy(targets).to(device), p, order_seed)
    optimizer = torch.optim.AdamW(model.groups(), betas=(0.9, p.beta2), eps=p.eps,
                                  fused=device.type in ("cuda", "cpu"))
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine((step + 0.5) / steps, p.warmup))
    torch.manual_seed(drop_seed)
    bar = tqdm(batches, total=steps, desc=title, unit=" steps", leave=False, mininterval=1)
    for step, (tokens, padding, wanted) in enumerate(bar, 1):
        for start in range(0, len(wanted), p.micro_batch):
            part = slice(start, start + p.micro_batch)
            with autocast:
                scores = model(tokens[part], None if padding is None else padding[part])
            error = loss(scores, wanted[part]) * (len(scores) / len(wanted))
            error.backward()
            running += error.detach()
        nn.utils.clip_grad_norm_(model.parameters(), p.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % per_epoch == 0:
            losses.append(running.item() / per_epoch)
            if not math.isfinite(losses[-1]):
                raise BadInput(f"the loss is {losses[-1]}; try a smaller --lr than {p.lr:g}")
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            running = 0.0
    return model, losses


def fine_tune_seeds(run, data, protocol, seeds, autocast, tests):
    """Fine-tune on a Dataset with seeds 0 .. seeds - 1 -> what is reported of its dev parts; {name: each
    seed's predictions} of these and of `tests` {name: Part}; the first seed's Classifier."""
    train = probe.prepare(run, data.train)
    prepared = {name: probe.prepare(run, part) for name, part in {**data.dev, **tests}.items()}
    predicted, figures, first = {name: [] for name in prepared}, [], None
    for seed in range(seeds):
        model, losses = fine_tune(run, train, data.train.labels, data.classes, protocol, seed, autocast,
                                  printable(f"{data.name} seed {seed}"))
        first = first or model
        figures.append({"train_loss": losses[-1], "epochs": losses})
        for name, examples in prepared.items():
            predicted[name].append(predict(model, run, examples, autocast)[0])
    results = {"classes": data.classes, "train": len(train),
               "dev": sum(len(part.labels) for part in data.dev.values()), "figures": figures}
    for suffix, part in data.dev.items():
        found, true = predicted[suffix], part.labels
        results |= {metric + suffix: summary(metric, found, true, data) for metric in data.metrics}
        results |= {"labels" + suffix: true, "predictions" + suffix: found, "places" + suffix: part.places}
        if data.classes is not None:
            results["correct" + suffix] = [(one == true).astype(int) for one in found]
    return results, predicted, first


def summary(metric, predicted, true, data):
    """A metric over seeds; of one seed its interval over examples; what the largest class would score."""
    score, majority = glue.METRICS[metric], None
    values, one = [score(found, true) for found in predicted], len(predicted) == 1
    if data.classes is not None:
        majority = score(np.full(len(true), np.bincount(data.train.labels).argmax()), true)
    return {"seeds": values, "mean": statistics.fmean(values), "median": statistics.median(values),
            "std": None if one else statistics.stdev(values), "majority": majority,
            "interval": glue.interval(metric, predicted[0], true) if one else None}


# ---------------------------------------------------------------------------- commands

def print_scores(name, results):
    """The metrics of one data set, and of at most ten classes who was taken for whom by all seeds."""
    classes, rows = results["classes"], []
    labels = "scores" if classes is None else f"{len(classes):,} classes: {glue.listed(classes)}"
    lines = [f"{name}: {labels}; {results['train']:,} training and {results['dev']:,} dev examples"]
    for metric, x in results.items():
        if isinstance(x, dict):
            sure = "" if x["std"] is None else f"± {100 * x['std']:.1f} of seeds"
            if x["interval"]:
                sure = "{:.1f} to {:.1f} (95% of examples)".format(*(100 * end for end in x["interval"]))
            majority = "" if x["majority"] is None else f"largest class {100 * x['majority']:.1f}"
            rows.append(["  " + metric, f"{100 * x['mean']:.1f}", sure, majority])
    lines.append(table(rows))
    for suffix in ("", "-m", "-mm") if classes is not None and len(classes) <= 10 else ():
        if "labels" + suffix in results:
            counts = np.zeros((len(classes), len(classes)), int)
            np.add.at(counts, (results["labels" + suffix], np.array(results["predictions" + suffix])), 1)
            rows = [["  " + true, *map(str, row)] for true, row in zip(classes, counts)]
            lines.append(table([[f"  true{suffix} \\ predicted", *classes], *rows]))
    print(printable("\n".join(lines)))


def finetune_command(args):
    """Fine-tune with each seed and score the dev parts; --out keeps the first seed's classifier."""
    if args.out and args.checkpoint.startswith("hf:"):
        raise BadInput(f"--out is for checkpoints of train.py; {args.checkpoint} is of another package")
    run, autocast = open_run(args)
    with new_folder(args.out, [args.data]) if args.out else contextlib.nullcontext() as folder:
        protocol, data = protocol_of(args, run), probe.labelled_data(args, run, args.data)
        results, _, model = fine_tune_seeds(run, data, protocol, args.seeds, autocast, {})
        if folder:  # a checkpoint that every command can open; what only pretraining needs stays as it was
            save_checkpoint(folder / "classifier.pt", {
                "settings": run.settings.to_dict(), "model_config": asdict(run.model.config),
                "step": run.step, "tokenizer": run.tokenizer and run.tokenizer.to_json(),
                "model": {**run.model.state_dict(), **model.encoder.state_dict()},
                "classifier": {"head": model.head.state_dict(), "protocol": asdict(protocol),
                               "classes": data.classes, "columns": data.columns, "mean": float(model.mean),
                               "spread": float(model.spread)}})
            rows = [{"epoch": k, "loss": loss} for k, loss in enumerate(results["figures"][0]["epochs"], 1)]
            rows.append({metric: x["seeds"][0] for metric, x in results.items() if isinstance(x, dict)})
            write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(printable(f"{run.name}: {describe(run.objective)}, fine-tuned, {protocol.pool} pooling, "
                    f"{protocol.attention} attention; scores x 100 on dev examples"))
    print_scores(data.name, results)
    if folder:
        print(f"{args.out} is a classifier now: python evaluate.py predict {args.out} --data FILE")
    return {"protocol": asdict(protocol), "results": {"data": data.name, **results}}, run


def predict_command(args):
    """The class and its probability, or the score, of new texts or images."""
    path = Path(args.checkpoint, "classifier.pt")
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a folder that evaluate.py finetune --out wrote")
    (run, autocast), saved = open_run(args, path), load_checkpoint(path)["classifier"]
    protocol, columns, classes = Protocol(**saved["protocol"]), saved["columns"], saved["classes"]
    model = Classifier(run, classes, protocol, 0, saved["mean"], saved["spread"]).to(run.model.query.device)
    model.head.load_state_dict(saved["head"])
    if run.tokenizer is None:
        part, texts = load_unlabelled(args.data, run.model.config.size), {}
    else:
        given = tuple(args.text_column or columns)
        if len(given) != len(columns):
            raise BadInput(f"--text-column {' '.join(given)}: {args.checkpoint} takes {len(columns)} of them")
        part = glue.read_texts(args.data, given)
        texts = dict(zip(given, zip(*part.texts)))
    predicted, probabilities = predict(model, run, probe.prepare(run, part), autocast)
    if classes is None:
        found = {"score": predicted.tolist()}
    else:
        found = {"class": [classes[k] for k in predicted], "probability": probabilities.max(1).tolist()}
    content = {"file or row": part.places.tolist(), **texts, **found}
    rows = [list(content), *([f"{x:.4f}" if isinstance(x, float) else str(x) for x in row]
                             for row in zip(*content.values()))]
    if args.csv:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        write_text(args.csv, lines.getvalue())
    short = [[place, *(" ".join(cell.split())[:40] for cell in cells)] for place, *cells in rows[:11]]
    print(printable(table(short, "<") + f"\nthe first 10 of {len(part.places):,}" * (len(rows) > 11)))
    return {"results": {"data": args.data, "classes": classes, "places": part.places, **found,
                        "probabilities": probabilities}}, run


def glue_command(args):
    """Fine-tune on each GLUE task; --submit writes the zip files that the server takes, one for each seed."""
    run, autocast = open_run(args, kind="text")
    protocol, tasks = protocol_of(args, run), glue.choose_tasks(args.tasks, args.glue_dir, args.submit)
    done, submission = {}, {}  # {file: its text by each seed}
    for name in (task for task in tasks if task != "ax"):
        data = glue.glue_dataset(args.glue_dir, name)
        data = replace(data, train=probe.at_most(data.train, args.max_train))
        predicts = [name, "ax"] if name == "mnli" and "ax" in tasks else [name]
        tests = {file: glue.read_texts(glue.task_file(args.glue_dir, task, test), glue.TASKS[task].text)
                 for task in predicts if args.submit for file, test in glue.server_files(task).items()}
        done[name], predicted, _ = fine_tune_seeds(run, data, protocol, args.seeds, autocast, tests)
        for file in tests:
            submission[file] = [glue.prediction_file(data.classes, x) for x in predicted[file]]
        print_scores(glue.TASKS[name].folder, done[name])
    row = {glue.TASKS[name].folder + suffix: done[name][glue.TASKS[name].metrics[0] + suffix]["mean"]
           for name in glue.TABLE2 if name in done for suffix, *_ in glue.TASKS[name].parts}
    results = {"tasks": done}
    if row:
        results |= {"table2": row, "average": statistics.fmean(row.values())}
        scores = [f"{100 * score:.1f}" for score in (*row.values(), results["average"])]
        print(printable(f"\n{run.name}: {describe(run.objective)}, scores x 100 on DEV, {len(row)} of Table "
                        f"2's 9\n{table([['', *row, 'mean'], ['dev', *scores]])}"))
    if args.submit:
        Path(args.submit).mkdir(parents=True, exist_ok=True)
        paths = [f"{args.submit}/seed{seed}.zip" for seed in range(args.seeds)]
        for seed, path in enumerate(paths):
            with zipfile.ZipFile(f"{path}.partial", "w", zipfile.ZIP_DEFLATED) as archive:
                for file, texts in submission.items():
                    archive.writestr(file, texts[seed])
            os.replace(f"{path}.partial", path)
        wanted = [file for task in glue.TASKS for file in glue.server_files(task)]
        missing = [file for file in wanted if file not in submission]
        results |= {"submissions": paths, "not_in_submission": missing}
        print(f"for the GLUE server: {', '.join(paths)}, without {', '.join(missing) or 'a gap'}")
    return {"protocol": asdict(protocol), "results": results}, run


def add_commands(command):
    """Register all with evaluate.py: `command(name, function, text, many)` gives a parser."""
    for name, function, text in (
            ("probe", probe.probe_command, "linear classifier on frozen features of labelled text or images"),
            ("transfer", probe.transfer_command, "the same on several image sets (Table 6)"),
            ("finetune", finetune_command, "fine-tune on labelled text, classes or scores, or on images"),
            ("glue", glue_command, "fine-tune on the GLUE tasks and score their dev parts (Table 2)")):
        add, count = command(name, function, text).add_argument, {"type": positive, "metavar": "N"}
        add("--pool", choices=("mean", "last"), help="of the tokens' features (default: by attention)")
        add("--attention", choices=("causal", "full"), help="default: the objective's own")
        add("--max-train", **count, help="use a random N of the training examples only")
        add("--glue-dir", metavar="DIR", required=name == "glue", help="the official GLUE files")
        if name == "glue":
            add("--tasks", default="all", help="names with commas; all: Table 2's whose files are there")
            add("--submit", metavar="DIR", help="write test predictions for GLUE's server, one zip a seed")
        else:
            add("--data", required=name != "probe", nargs="+" if name == "transfer" else None,
                help="text: a .tsv, .csv or .jsonl file with columns text and label; a GLUE task; pydoc; "
                     "images: as for train.py")
            add("--dev", metavar="FILE", help="dev texts of a table (default: a fifth of it, held out)")
            add("--text-column", metavar="NAME", nargs="+", default=["text"], help="two of them: pairs")
            add("--label-column", metavar="NAME", default="label")
            add("--label-fraction", type=float, default=1.0, help="of training examples, each class alike")
            add("--labels-per-class", **count, help="use N training examples of each class")
            add("--max-test", **count, help="score a random N of the dev examples only")
        if name in ("probe", "transfer"):
            add("--layer", default="last", metavar="N", help="0 (the embedding) upwards, or all")
            add("--classifier", choices=("lbfgs", "sgd"), default="lbfgs", help="sgd: MAE's protocol")
            add("--pixels", action="store_true", help="images: also the same classifier on raw pixels")
            add("--seed", type=int, default=0, help="of the choice of labels and of the classifier")
            continue
        add("--seeds", **count, default=3 if name == "glue" else 1, help="runs, of seeds 0 .. N - 1")
        add("--epochs", type=positive, help="default: 5; images 100, vit-tiny 10")
        add("--batch-size", type=positive, help="default: 16; images 1024, vit-tiny 128")
        add("--lr", type=float, help="peak (default: 4e-5, for models narrower than 512 5e-4; images "
                                     "5e-4 x batch/256, vit-tiny 2e-3 x batch/256)")
        if name == "finetune":
            add("--regression", action="store_true", help="labels are scores (default: if fractions)")
            add("--out", metavar="DIR", help="keep the classifier (of several seeds the first) for predict")
    text = "the classes of new texts or images, by a classifier that finetune --out wrote"
    add = command("predict", predict_command, text).add_argument
    add("--data", required=True, help="a table as for finetune, a .txt file with one text a line, a folder "
                                      "of images, or an image")
    add("--text-column", metavar="NAME", nargs="+", help="default: as in training")
    add("--csv", type=output_file, metavar="FILE", help="write file or row, text, class and probability")
