"""What an image encoder is good for: linear probe, fine-tuning and transfer (paper, Tables 3, 4 and 6).

    python evaluate.py probe CKPT                                        frozen features of its own images
    python evaluate.py probe CKPT --data DIR --classifier sgd --pixels   MAE's protocol; raw pixels beside it
    python evaluate.py finetune CKPT --data DIR --label-fraction 0.1 --seeds 3
    python evaluate.py transfer CKPT --data A B C

Stated once, for all three: an image is cropped to its centre, resized to the model's size and normalised by
the mean and deviation of the images the model was pretrained on; the encoder sees all patches, under causal
attention for ar and dar and under full attention for the others (--attention); its features of the last
layer, after the final norm (--layer), are averaged over the patches (--pool). Training images are the set's
train part, scores are on its val part.

The probe computes each feature once, from the image as it is: MAE's protocol, which --classifier sgd follows
otherwise, draws a new crop in every epoch and uses LARS for its batch of 16,384.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from downstream.encoding import TextBatch
from downstream.finetune import PLAIN, Budget, Classifier, Protocol, class_scores, optimise
from downstream.labelled import label_subset
from downstream.probe import encode_all, probe_figures
from engine.steps import ahead
from images.files import FileSet
from images.patches import Patches
from images.pixels import mix, patchify, random_erase, soft_targets, unpatchify
from images.sets import load_images
from support.cli import BadInput, progress

# ---------------------------------------------------------------------------- labelled images

def load_labelled(source, size, choose=label_subset, max_train=None, max_test=None):
    """load_images, with the training images of which `choose` takes the row numbers by their labels, about
    max_train of these, and about max_test validation images, of every class alike.

    Images in memory of another size than the model's remain as they are: they are resized whenever they are
    read.
    """
    try:
        images = load_images(source, size)
    except BadInput:
        images = load_images(source)  # complains again if it was not the size
    present = len(np.unique(images.train.labels))
    if present < 2:
        raise BadInput(f"{source} has training images of {present} class only: nothing to tell apart")
    train = image_subset(images.train, choose(images.train.labels))
    return replace(images, train=thin_out(source, train, "--max-train", max_train),
                   val=thin_out(source, images.val, "--max-test", max_test))


def thin_out(source, images, flag, count):
    """About that many images, of every class alike; None: all."""
    present = len(np.unique(images.labels))
    if count is not None and count < present:
        raise BadInput(f"{flag} {count} is less than one image for each of the {present} classes of {source}")
    if count is None or count >= len(images):
        return images
    return image_subset(images, label_subset(images.labels, count / len(images)))


def image_subset(images, rows):
    """The images of these numbers, as a set of the same kind."""
    if len(rows) == len(images):
        return images
    if isinstance(images, FileSet):
        return replace(images, files=tuple(images.files[i] for i in rows), labels=images.labels[rows],
                       corrupt=set())
    return replace(images, images=images.images[rows], labels=images.labels[rows])


def patch_batch(patches):
    """Patches (B, S, values) as a TextBatch without padding."""
    lengths = torch.full((len(patches),), patches.shape[1], device=patches.device)
    return TextBatch(patches, lengths, padding=None, segments=None)


def image_batches(images, config, device, labels, size=128):
    """Every image once, as it is -> pairs (row numbers, TextBatch). Writes the labels into `labels` (N,): a
    file that stands in for a corrupt one comes with its own."""
    source = Patches(images, config, device=device)

    def make(start):
        rows = np.arange(start, min(start + size, len(images)))
        patches, labels[rows] = source.labelled(start, len(rows))
        return rows, patch_batch(patches)

    return ahead(make, range(0, len(images), size))


# ---------------------------------------------------------------------------- features and linear probe

def image_features(run, images, pool="mean", causal=False, layer=None, autocast=PLAIN, quiet=True):
    """Features of a frozen encoder -> {layer: float32 (N, D)}, labels (N,), all in memory. See encode_all for
    `layer`."""
    labels = np.empty(len(images), np.int64)
    batches = image_batches(images, run.model.config, run.model.query.device, labels)
    return encode_all(run, batches, len(images), pool, causal, layer, autocast, quiet), labels


def both_features(run, images, pool, attention, layer=None, autocast=PLAIN, quiet=True):
    """image_features of the training and of the validation images."""
    return [image_features(run, part, pool, attention == "causal", layer, autocast, quiet)
            for part in (images.train, images.val)]


def raw_pixels(run, images):
    """The baseline: the numbers that go into the model -> float32 (N, 3 * size * size), labels (N,)."""
    labels = np.empty(len(images), np.int64)
    batches = image_batches(images, run.model.config, torch.device("cpu"), labels)
    return torch.cat([batch.tokens.flatten(1) for _, batch in batches]), labels


def sgd_probe(train_x, train_y, test_x, test_y, seed=0, quiet=True, epochs=90, batch_size=256, base=0.1):
    """MAE's linear probe (He et al. 2021, A.1) on features (N, D) and class numbers (N,): batch norm without
    affine map, then a linear layer; rate base * batch / 256, 10 of 90 epochs of warm-up, cosine to 0, no
    weight decay, momentum 0.9. With plain SGD in place of LARS the batch is small. Returns figures as
    probe.fit_probe."""
    train_y, test_y = torch.as_tensor(train_y), torch.as_tensor(test_y)
    N, D = train_x.shape
    classes, size = int(max(train_y.max(), test_y.max())) + 1, min(batch_size, N)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.BatchNorm1d(D, eps=1e-6, affine=False), nn.Linear(D, classes))
    nn.init.normal_(model[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(model[1].bias)
    budget = Budget(lr=base * size / 256, epochs=epochs, batch_size=size, micro_batch=size, warmup=10 / 90,
                    clip=0)

    def batches(epoch):
        return ((train_x[rows], train_y[rows]) for rows in torch.randperm(N, generator=generator).split(size))

    optimizer = torch.optim.SGD(model.parameters(), lr=budget.lr, momentum=0.9)
    with progress(quiet=quiet, total=epochs * (N // size), unit=" steps", desc="classifier") as bar:
        # drops what is left of an epoch
        optimise(model, optimizer, batches, N // size, F.cross_entropy, budget, bar=bar)
    model.eval()
    with torch.no_grad():
        train_predicted, test_predicted = (model(x).argmax(1) for x in (train_x, test_x))
    return probe_figures(train_predicted, train_y, test_predicted, test_y, epochs=epochs, batch_size=size,
                         lr=budget.lr)


# ---------------------------------------------------------------------------- fine-tuning

@dataclass(frozen=True, kw_only=True)
class ImageProtocol(Protocol):
    """MAE's fine-tuning (He et al. 2021, A.1) without RandAugment."""

    clip: float = 0.0
    warmup: float = 0.05       # 5 of 100 epochs
    weight_decay: float = 0.05
    beta2: float = 0.999
    dropout: float = 0.0
    layer_decay: float = 0.65  # learning rate of a layer as a share of that of the next one
    drop_path: float = 0.1     # share of samples that skip a branch of the last block; 0 in the first
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1     # of the labels
    erase: float = 0.25        # probability of random erasing
    crop: float = 0.08         # least share of the area that a random crop keeps


IMAGE_BUDGETS = {  # by preset: epochs, batch, base rate for a batch of 256
    # Too small to overfit in a few epochs: mixing and erasing slow it down. Of 10,000 images of CIFAR-10, 8
    # epochs, an untrained network learns 43.6% without and 40.2% with them, a pretrained one 47.5 and 44.6.
    "vit-tiny": {"epochs": 10, "batch_size": 128, "base": 2e-3, "crop": 0.2, "mixup": 0.0, "cutmix": 0.0,
                 "smoothing": 0.0, "erase": 0.0},
    "vit-small": {"epochs": 100, "batch_size": 1024, "base": 5e-4},
    "vit-base": {"epochs": 100, "batch_size": 1024, "base": 5e-4},
}


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a branch is left out for a share `rate` of the
    samples, and grows for the others so that its expectation stays."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or not self.rate:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


def image_classifier(run, classes, recipe, seed):
    """A copy of the encoder with drop path; pooled features, layer norm and a new linear layer."""
    encoder = copy.deepcopy(run.model)
    encoder.decoder = encoder.pixels = None
    for block, rate in zip(encoder.blocks, torch.linspace(0, recipe.drop_path, len(encoder.blocks)).tolist()):
        block.dropout = DropPath(rate)
    width = run.model.config.width
    model = Classifier(encoder, width, classes, recipe.pool, recipe.attention == "causal", recipe.dropout,
                       seed)
    model.head = nn.Sequential(nn.LayerNorm(width), model.head)
    return model.to(run.model.query.device)


def layer_groups(model, recipe):
    """Parameter groups with layer-wise rates: lr * decay^(L + 1 - l), where l = L + 1 for the head and the
    final norm, l = 1 .. L for the blocks and l = 0 for what comes before them. Vectors do not decay."""
    top, groups = len(model.encoder.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = top if name.startswith(("head.", "encoder.norm.")) else 0
        groups.setdefault((layer, parameter.dim() >= 2), []).append(parameter)
    return [{"params": parameters, "lr": recipe.lr * recipe.layer_decay ** (top - layer),
             "weight_decay": recipe.weight_decay * matrices}
            for (layer, matrices), parameters in groups.items()]


def fine_tune_images(run, images, recipe, seed, autocast=PLAIN, bar=None):
    """Fine-tune a copy of run.model on images.train -> class numbers (N,) that it predicts for images.val,
    their true ones (N,), figures of the run.

    The new layer, the order and crops of the images, mixing and erasing, and drop path have seeds of their
    own, from `seed`.
    """
    head_seed, order_seed, mix_seed, drop_seed = np.random.SeedSequence(seed).generate_state(4).tolist()
    config, device, classes = run.model.config, run.model.query.device, len(images.classes)
    model = image_classifier(run, classes, recipe, head_seed)
    size, per_epoch = batch_and_steps(len(images.train), recipe)
    source = Patches(images.train, config, order_seed, recipe.crop, device)

    def draw(step):
        patches, labels = source.labelled(step * size, size)
        generator = torch.Generator().manual_seed(mix_seed * 1_000_003 + step)
        x = random_erase(unpatchify(patches, config.patch), generator, recipe.erase)
        targets = soft_targets(source.moved(labels), classes, recipe.smoothing)
        x, targets = mix(x, targets, generator, recipe.mixup, recipe.cutmix)
        return patch_batch(patchify(x, config.patch)), targets

    def on_val():
        labels = np.empty(len(images.val), np.int64)
        batches = image_batches(images.val, config, device, labels)
        return class_scores(model, batches, len(labels), autocast).argmax(1), labels

    def accuracy():
        predicted, labels = on_val()
        return float((predicted == labels).mean())

    torch.manual_seed(drop_seed)
    optimizer = torch.optim.AdamW(layer_groups(model, recipe), betas=(0.9, recipe.beta2),
                                  fused=device.type in ("cuda", "cpu"))
    figures = optimise(model, optimizer,
                       lambda epoch: ahead(draw, range(epoch * per_epoch, (epoch + 1) * per_epoch)),
                       per_epoch, F.cross_entropy, recipe, autocast, validate=accuracy, bar=bar)
    return *on_val(), {**figures,
                       "examples_per_second": recipe.epochs * per_epoch * size / figures["seconds"]}


def batch_and_steps(count, recipe):
    """Images per step, at most all of them, and steps per epoch; what is left over begins the next epoch."""
    size = min(recipe.batch_size, count)
    return size, max(1, round(count / size))
