"""The parts of one optimiser step: batches ahead of time, the optimiser, clipping."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.tensor import DTensor

from engine.muon import Muon, muon_groups


def warm_cosine(progress, warmup):
    """Share of the peak rate at `progress` in 0..1: linearly up, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def parts(size, micro):
    """Cut a batch into parts of `micro`, the last one smaller: few shapes, each of which is compiled once."""
    return list(itertools.pairwise([*range(0, size, micro), size]))


def ahead(draw, steps):
    """draw(k) for each of the steps, the next one being drawn by a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for k in steps:
            ready, waiting = waiting, pool.submit(draw, k)
            if ready is not None:
                yield ready.result()
        yield waiting.result()


def make_optimizer(model, settings):
    """settings.optimizer for all parameters: AdamW with the protocol's betas and epsilon, or Muon for the
    matrices of the blocks and AdamW for the rest. Vectors (norms, query, position scale, bias) do not
    decay."""
    named, decay = list(model.named_parameters()), settings.weight_decay
    groups = muon_groups(named, decay) if settings.optimizer == "muon" else []
    taken = {p for group in groups for p in group["params"]}
    rest = [p for _, p in named if p not in taken]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}, *groups]
    fused = rest[0].device.type in ("cuda", "cpu") and not isinstance(rest[0], DTensor)
    optimizer = (Muon if settings.optimizer == "muon" else torch.optim.AdamW)(
        groups, lr=settings.lr, betas=(0.9, settings.beta2), eps=1e-12, fused=fused)
    set_rate(optimizer, settings.lr)
    return optimizer


def set_rate(optimizer, rate):
    """Give every group the schedule's rate, or its multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def clip_gradients(model, largest):
    """Scale all gradients so that their norm is at most `largest`, unless that is 0 -> the norm before, on
    the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def take_step(optimizer, wrong):
    """An optimiser step, unless `wrong` is 1. The fused kernels look at it on the device; the others (MPS,
    FSDP) wait for it."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = wrong
    elif wrong:
        return
    optimizer.step()
