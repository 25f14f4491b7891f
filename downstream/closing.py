"""What train.py shows when it is done: a sample, what to expect of such a model, the curve of its losses."""

import importlib.util
from pathlib import Path

import torch

from downstream.curves import plot_curves, read_curves
from downstream.generation import generate
from objectives import target_nll

LEVELS = (  # more bits than this for a byte of held-out text, and what samples of such models look like
    (2.6, "letters and word lengths fit, few words are real; more steps help most"),
    (1.7, "most words are real, sentences make no sense; try more --steps, then --preset mini"),
    (1.2, "most sentences are grammatical and keep to a topic, what they say is made up; try --preset small"),
    (0.0, "paragraphs hold together; what they say is still not to be relied on"),
)


def what_to_expect(bits_per_byte):
    """A sentence on the samples of a model with that likelihood of held-out text."""
    return next((text for least, text in LEVELS if bits_per_byte > least), LEVELS[-1][1])


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
