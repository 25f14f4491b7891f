"""An image set as sequences of patches, in a seeded order with seeded crops: what training and evaluation
read."""
import functools

import numpy as np
import torch

from images.pixels import crop, normalise, patchify, random_views


def order(count, seed, start, size):
    """Numbers start .. start + size - 1 of an endless stream of epochs over `count` images -> int64 (size,).

    Each epoch is a permutation of its own, the same whoever asks, which makes resuming exact. seed None: in
    order.
    """
    epochs, k = np.divmod(np.arange(start, start + size), count)
    if seed is None:
        return k
    return np.concatenate([epoch_order(count, seed, int(epoch))[k[epochs == epoch]]
                           for epoch in np.unique(epochs)])


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


class Patches:
    """An ImageSet as sequences of patches for a model of that Config. The counterpart of data.Sequences:
    image number k of training, and the crop of it that is shown, are the same whoever asks.

    seed   the order, drawn anew for each epoch; None: in order
    least  of a random crop's share of the area; None: whole images, resized where they are not of the model's
           size
    """

    def __init__(self, images, config, seed=None, least=None, device="cpu"):
        self.images, self.config, self.seed, self.least, self.device = images, config, seed, least, device
        self.total = len(images)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.mean, config.std))

    def __len__(self):
        return self.total

    def labelled(self, start, size, part=slice(None)):
        """Images number start .. start + size - 1, counted over epochs, or a part of these -> patches (B, S,
        values) on the device, labels (B,)."""
        config = self.config
        images, labels = self.images.batch(order(self.total, self.seed, start, size)[part])
        views = None
        if self.least is not None:
            # not that of the masks
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start + 500_000_009)
            views = self.moved(random_views(size, generator, (self.least, 1.0))[part])
        x = normalise(crop(self.moved(images), views, config.size), self.mean, self.std)
        return patchify(x, config.patch), labels

    def moved(self, x):
        """x on the device; through pinned memory the thread need not wait for what the device is doing."""
        on_gpu = torch.device(self.device).type == "cuda"
        return x.pin_memory().to(self.device, non_blocking=True) if on_gpu else x.to(self.device)

    def batch(self, start, size, part=slice(None)):
        """The same without labels."""
        return self.labelled(start, size, part)[0]


def shown_images(images, columns, views=False, seed=0, rows=20):
    """Training images to look at -> uint8 (rows, columns, H, W, 3): each row a class, or where there are
    none, any."""
    labels, rng = images.train.labels, np.random.default_rng(seed)
    picked = [rng.choice(np.flatnonzero(labels == label), columns) for label in np.unique(labels)[:rows]]
    x, _ = images.train.batch(np.concatenate(picked))
    if views:
        x = crop(x, random_views(len(x), torch.Generator().manual_seed(seed)), images.size)
        x = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return x.numpy().reshape(len(picked), columns, *x.shape[1:])
