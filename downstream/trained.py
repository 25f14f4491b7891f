"""The co-occurrence operator as trained networks see it.

    python spectral.py trained CKPT [CKPT ...]

Networks are told which position they predict, so the theory's spectrum of every objective is flat for them
(support/operator.py, tell_position): what is measured here is about text, not about the toy model.
"""

import math

import numpy as np
import torch

from downstream.connectivity import features_of
from engine.machine import choose_device
from engine.runs import load_run
from objectives import describe
from support.cli import BadInput, positive
from theory.show import prose, table


def empirical_spectrum(features, targets):
    """The operator from features f(X_i) (N, D) and the target embeddings W_{X_i^+} (N, D).

    sigma_2, sigma_3, .. of Abar are the correlations of the best functions of X and of X+. Among linear
    functions of f and of W they are the singular values of the centred cross-covariance after whitening, each
    at most its sigma_j. -> `correlations`, those; `covariance`, the singular values without whitening as
    shares of their sum. Whitening and directions are fitted on one half of the samples and correlated on the
    other, so that noise averages to zero.
    """
    half = len(features) // 2
    white = []
    for x in (features, targets):
        x = x - x[:half].mean(0)
        _, scale, v = np.linalg.svd(x[:half], full_matrices=False)
        keep = scale > 1e-6 * scale[0]
        white.append(x @ (v[keep].T / scale[keep] * math.sqrt(half)))
    u, _, v = np.linalg.svd(white[0][:half].T @ white[1][:half], full_matrices=False)
    a, b = (x - x.mean(0) for x in (white[0][half:] @ u, white[1][half:] @ v.T))
    correlations = (a * b).mean(0) / np.sqrt((a * a).mean(0) * (b * b).mean(0)).clip(1e-12)
    centred = [x - x.mean(0) for x in (features, targets)]
    covariance = np.linalg.svd(centred[0].T @ centred[1], compute_uv=False)
    return {"correlations": np.sort(correlations)[::-1], "covariance": covariance / covariance.sum()}


@torch.no_grad()
def trained(args):
    """`spectral.py trained CKPT [CKPT ...]`: the empirical spectrum of each checkpoint, from features of
    contexts of held-out text and embeddings of X+.

    args     checkpoints, data, features, seed, device
    Returns {"checkpoints": [{"correlations", "covariance", "tail_sigma4", ..}]}. BadInput: fewer than four
    features for each dimension, a checkpoint of images.
    """
    rows = []
    for path in args.checkpoints:
        run = load_run(path, choose_device(args.device))
        features, ids, _ = features_of(run, args.data, args.features, args.seed)
        targets = run.model.embedding.weight.cpu()[ids]                        # (count, D)
        D = features.shape[1]
        if len(features) < 4 * D:
            raise BadInput(f"{len(features)} features are too few to estimate {D} correlations; give "
                           f"--features and --data for at least {4 * D}")
        values = empirical_spectrum(features.double().numpy(), targets.double().numpy())
        rows.append({"checkpoint": path, "objective": describe(run.objective), "step": run.step,
                     "features": len(features), **values,
                     "tail_sigma4": (values["correlations"].clip(0) ** 4).sum()})
    return {"checkpoints": rows}


def show_trained(x):
    """What `trained` returns, as lines of text."""
    shown = (2, 3, 5, 9, 17, 33)
    rows = [("objective", "features", "sum sigma^4", *(f"sigma_{j}" for j in shown))]
    for y in x["checkpoints"]:
        sigma = [f"{value:.3f}" for j, value in enumerate(y["correlations"], 2) if j in shown]
        rows.append((y["objective"], str(y["features"]), f"{y['tail_sigma4']:.3f}", *sigma))
    return [*table(rows), "",
            *prose("Shown: how strongly linear functions of a network's features and of its embeddings "
                   "depend on each other on held-out text, a lower bound on the sigma_j of what it reads and "
                   "predicts; few features make it lower. Not shown: Abar itself. The best functions need "
                   "not be linear, and a direction counts even if the network ignores it. These networks are "
                   "told the position that they predict: on D_sim all objectives would then have the same "
                   "flat spectrum, so no order of objectives here confirms or contradicts Theorem 4.2. "
                   "Compare with untrained:RUN as CKPT.")]


def add_trained_arguments(parser):
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="run folders or checkpoint files")
    parser.add_argument("--data", help="text or token folder (default: each run's validation text)")
    parser.add_argument("--features", type=positive, default=8000,
                        help="of each checkpoint, 8000 in the paper")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
