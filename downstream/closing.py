"""What train.py shows when it is done: a sample, what to expect of such a model, the curve of its losses."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from downstream.curves import plot_curves, read_curves
from downstream.generation import generate
from objectives import target_nll

LEVELS = (  # below this share of the unigram loss saved. Real words in samples of byte models on pydoc that
    # saved 4%, 19% and 25%: none of 45; that saved 41% and 45%: 18 of 24
    (0.1, "hardly more than that is learned so far and the sample is noise; train longer, with more --steps"),
    (0.35, "which letters follow each other is learned, and hardly a word; train longer, with more --steps"),
    (0.6, "most words are real, sentences make no sense; more --steps or a larger --preset help"),
)


def unigram_nll(corpus, sequences):
    """-log P of the tokens 2 .. S of sequences (N, S) under a model that knows only how often each token
    stands in the first 5 million of the training text, every count plus one -> float64 (N, S - 1)."""
    tokens = np.asarray((corpus.train if len(corpus.train) else corpus.val)[:5_000_000])
    counts = np.bincount(tokens, minlength=corpus.tokenizer.vocab) + 1.0
    return torch.from_numpy(-np.log(counts / counts.sum()))[sequences[:, 1:]]


def what_to_expect(nll, unigram, words=True):
    """A sentence on a model with that loss on held-out text, beside that of `unigram_nll`, both in nats a
    token. `words`: whether it writes byte by byte, so that a word is something learned."""
    saved = 1 - nll / unigram
    known = f"than the {unigram:.2f} of knowing only how often each token occurs"
    if saved <= 0:
        return f"its loss of {nll:.2f} is no better {known}: nothing of the text's order is learned so far"
    levels = LEVELS if words else LEVELS[:1]
    level = next((text for most, text in levels if saved < most), "judge by the sample")
    return f"its loss of {nll:.2f} is {saved:.0%} better {known}: {level}"


def best_sample(run, prompt, count, tries=4):
    """Of a few continuations of the ids `prompt` by `count`, the one that the model finds most likely -> ids.
    Objectives that take a pass for each token get one try."""
    if run.path != "causal":
        return generate(run, prompt, count)
    samples = [generate(run, prompt, count, seed=seed) for seed in range(tries)]
    room = run.settings.length
    tokens = torch.tensor([(prompt + ids)[:room] for ids in samples], device=run.model.query.device)
    groups = 1 + torch.arange(tokens.shape[1], device=tokens.device).expand(tries, -1)
    targets = groups[:, len(prompt):] - 1
    nll = target_nll(run.model, tokens, groups, targets, run.path)
    return samples[nll.mean(1).argmin()]


def picture_of(folder):
    """curves.png in the run folder -> its path; None where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    path = Path(folder) / "curves.png"
    plot_curves(path, [read_curves(folder)])
    return path
