"""Muon (Jordan et al. 2024): for the matrices inside the blocks, momentum made orthogonal in place of AdamW's
step."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

RATE, MOMENTUM = 1.5, 0.9  # its rate over AdamW's, and the share of the old gradients that it keeps


def muon_groups(named, weight_decay):
    """The parameter group of the matrices of the blocks among [(name, parameter)]. Maps that stand in one
    matrix, as keys and values do, are made orthogonal together: apart they learn no faster."""
    matrices = [p for name, p in named if p.dim() == 2 and "blocks." in name]
    return [{"params": matrices, "scale": RATE, "weight_decay": weight_decay / RATE, "orthogonal": True}]


class Muon(torch.optim.AdamW):
    """AdamW, but groups marked `orthogonal` take Muon's step: Nesterov momentum made orthogonal, with the
    root mean square of AdamW's (Liu et al. 2025).

    Like the fused kernels, found_inf = 1 on the device leaves weights and state as they are. Of a matrix that
    is spread over processes, each gathers the whole update, makes it orthogonal and keeps its own part.
    """

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects its own kind of state everywhere

    @torch.no_grad()
    def step(self):
        """One step of both kinds. It uses up the gradients of Muon's matrices."""
        muon = [(p, group) for group in self.param_groups if "orthogonal" in group
                for p in group["params"] if p.grad is not None]
        if muon:
            self.muon_step(muon)
        for p, _ in muon:
            p.grad = None
        super().step()  # on those that are left

    def muon_step(self, todo):
        """Muon's step on [(parameter, its group)]."""
        wrong, updates = getattr(self, "found_inf", None), []
        go = 1.0 if wrong is None else 1.0 - wrong
        for p, _ in todo:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            grad, momentum = own(p.grad), own(self.state[p]["momentum"])
            grad = grad if wrong is None else grad.masked_fill(wrong.bool(), 0.0)
            momentum.lerp_(grad, go * (1 - MOMENTUM))
            updates.append(gather(grad.lerp(momentum, MOMENTUM), p))
        for (p, group), change in zip(todo, orthogonal(updates)):
            if isinstance(p, DTensor):
                change = distribute_tensor(change, p.device_mesh, p.placements, src_data_rank=None).to_local()
            rate = go * group["lr"]
            own(p).mul_(1 - rate * group["weight_decay"]).sub_(change * rate)


def own(x):
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather(part, p):
    """The whole matrix of which `part` is what this process has, spread like p."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape,
                              stride=p.stride()).full_tensor()


def orthogonal(matrices, steps=5):
    """A matrix U S V^T each -> about 0.2 sqrt(longer side) U V^T, whose elements have root mean square 0.2.
    Those of one shape share the kernels, of which a GPU would otherwise start hundreds."""
    wide = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]
    for shape in {m.shape for m in wide}:
        places = [i for i, m in enumerate(wide) if m.shape == shape]
        x = torch.stack([wide[i] for i in places])
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):  # Newton-Schulz: all singular values s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
        for i, m in zip(places, x * (0.2 * shape[1] ** 0.5)):
            wide[i] = m
    return [w.T if m.shape[0] > m.shape[1] else w for m, w in zip(matrices, wide)]
