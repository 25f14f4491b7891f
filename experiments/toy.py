"""The theory where it applies: networks that are not told the position, on the toy model and a noisy one.

    python spectral.py toy [--quick] [--plot FILE.png]

The noisy toy model is D_sim (Sec. 4.1.2), but the class of each token is redrawn uniformly with probability
eps. THEORY.md proves how its spectrum splits into positions and classes, and how many features the class
needs. The tail of Theorem 4.1 is the sum over j > t of sigma_j^4 of this Abar, with its noise, at the
bottleneck t; where there is none, errors with few labels are compared with the tail at t = r.
"""

import contextlib
import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import draw_tokens
from experiments.spectrum import best_features, normalised, pairs, probe_errors, subsets
from objectives import OBJECTIVES, PAPER, describe, from_options
from util import BadInput, plain, table

LOSSES = ("spectral", "cross-entropy")
PLACES = ("own", "common")  # contexts
LABELS = 5          # examples of each class, where few
RIDGE = 0.1         # of few-label probes: a share of the mean squared length of the centred examples
RESOLUTION = 0.001  # errors closer than this share a rank


# ---------------------------------------------------------------------------- the noisy toy model, exactly

@dataclass(frozen=True)
class NoisyToy:
    """r classes, s positions, T values for each class and position; eps: how often a class is redrawn."""

    r: int
    s: int
    T: int = 1
    eps: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eps < 1:
            raise BadInput(f"--eps {self.eps:g} is not in [0, 1); at 1 tokens say nothing of the class")

    def kinds(self, m):
        """Contexts of m tokens by how many are of each class -> P(counts) (n,), posterior pi (n, r)."""
        drawn = itertools.combinations_with_replacement(range(self.r), m)
        counts = np.array([[x.count(c) for c in range(self.r)] for x in drawn])
        ways = np.array([math.factorial(m) // math.prod(map(math.factorial, n)) for n in counts.tolist()])
        other = self.eps / self.r
        joint = (1 - self.eps + other) ** counts * other ** (m - counts) * ways[:, None] / self.r  # (n, r)
        joint = joint[joint.sum(1) > 0]
        return joint.sum(1), joint / joint.sum(1, keepdims=True)

    def posterior(self, counts):
        """pi of contexts with `counts` (N, r) tokens of each class, as a tensor."""
        other = self.eps / self.r
        return torch.softmax(counts * math.log((1 - self.eps + other) / max(other, 1e-12)), -1)

    def of_target(self, pi):
        """P(class of another token | x_S), from the posterior of the class."""
        return (1 - self.eps) * pi + self.eps / self.r

    def R(self, m):
        """(r E sum_y P(y | x_S)^2 - 1) / (r - 1): how far m tokens tell the class, from 0 to 1."""
        probability, pi = self.kinds(m)
        return max((self.r * (probability @ pi ** 2).sum() - 1) / (self.r - 1), 0.0)


def split(model, contexts, q):
    """-> singular values of the position part, of each of the r - 1 class parts, of all, and the t that the
    sector rule asks for: how many of all are at least the least of the components' largest class values."""
    Q = normalised(q[:, q.sum(0) > 0])
    weighted = Q * (1 - model.eps) * np.sqrt([[model.R(int(m))] for m in contexts.sum(1)])
    position, classes = (np.linalg.svd(x, compute_uv=False) for x in (Q, weighted))
    every = np.sort(np.append(position, np.tile(classes, model.r - 1)))[::-1]
    linked = np.linalg.matrix_power((weighted.T @ weighted > 0).astype(float), Q.shape[1]) > 0  # two targets
    parts = (weighted[:, part] for part in np.unique(linked, axis=0) if part.any())
    last = min(np.linalg.svd(part, compute_uv=False)[0] for part in parts)
    return position, classes, every, int((every > last - 1e-9).sum())


def merged(model, contexts, q):
    """P_M with contexts of the same S and counts as one row, targets (p, class): (n, s r) -> it, pi (n, r).
    Rows that become one are multiples of each other, and so are columns: the singular values stay."""
    kinds = [model.kinds(int(m)) for m in contexts.sum(1)]
    P = [np.einsum("n,p,nc->npc", probability, targets, model.of_target(pi)).reshape(len(pi), -1)
         for (probability, pi), targets in zip(kinds, q)]
    return np.concatenate(P), np.concatenate([pi for _, pi in kinds])


def bayes_loss(model, contexts, q, blind):
    """The least cross-entropy of a target in nats: H(X_p | x_S, p) where p is told, H(X_p, p | x_S) where a
    network is blind."""
    def entropy(P):  # of each row
        return torch.special.entr(torch.tensor(P)).sum(-1).numpy()

    C, kinds = q.sum(1), (model.kinds(int(m)) for m in contexts.sum(1))
    loss = math.log(model.T) + C @ [P @ entropy(model.of_target(pi)) for P, pi in kinds]
    return loss + C @ entropy(q / C[:, None]) if blind else loss


def exact_probe(P, pi, ts, rotations=10, seed=0):
    """Excess over Bayes of the least-squares probe of the class on the best rank-t features, for t in ts. P
    (n, m), pi (n, r). Equal sigma_j leave the features free: a mean over random rotations."""
    turned, _ = best_features(P[:, P.sum(0) > 0], rotations, seed)
    errors = np.mean([probe_errors(U, P.sum(1), pi) for U in turned], axis=0)
    return errors[np.minimum(ts, len(errors)) - 1]


def common_contexts(s):
    """The same for all objectives: contexts (2^s - 2, s) and q of that shape, every size alike."""
    contexts = subsets(s)
    return torch.tensor(contexts), torch.tensor([[1 / math.comb(s, int(m))] * s for m in contexts.sum(1)])


# ---------------------------------------------------------------------------- networks, many at a time

def draw_texts(model, contexts, q, N, generator):
    """N contexts -> bags of visible tokens (N, V), exact P(target | context) (N, V), pi (N, r), class (N,).
    V = s r T tokens. The conditional in place of one drawn target keeps the expected loss, without noise."""
    r, s, T = model.r, model.s, model.T
    row = torch.multinomial(q.sum(1), N, replacement=True, generator=generator)
    token, y = draw_tokens(r, s, T, model.eps, N, generator)
    bag = torch.zeros(N, s, r * T).scatter_(2, token[..., None], contexts[row, :, None].float())
    counts = bag.view(N, s, r, T).sum((1, 3))                                  # (N, r)
    pi = model.posterior(counts)
    target = model.of_target(pi).repeat_interleave(T, 1) / T                   # (N, r T), at every position
    P = (q[row] / q[row].sum(1, keepdim=True))[..., None] * target[:, None]    # (N, s, r T)
    return bag.flatten(1), P.flatten(1), pi, y


def features(weights, bag):
    """f(X): bag (seeds, N, V) -> (seeds n, N, t). It knows the positions of visible tokens and no others."""
    E, b, W2, _ = weights
    hidden = torch.relu(bag @ E + b).unflatten(2, (-1, W2.shape[1]))           # (seeds, N, n, width)
    return hidden.transpose(1, 2).flatten(0, 1) @ W2


def network_losses(weights, bag, P, root, kind):
    """The loss of each network (seeds, n) on bag and P (seeds, N, V); root = sqrt(P_G). The spectral loss of
    scores z / root, -2 E sum_v P_v z_v / root_v + E sum_v z_v^2, is well conditioned in z."""
    z, P = (features(weights, bag) @ weights[3]).unflatten(0, (len(bag), -1)), P[:, None]  # (seeds, n, N, V)
    each = z.square() - 2 * (P / root) * z if kind == "spectral" else -P * torch.log_softmax(z, -1)
    return each.sum(-1).mean(-1)


def train_networks(model, contexts, q, ts, kind, seeds, steps, generator, batch=64, width=64, lr=0.03):
    """Networks bag -> width -> t -> scores, for every seed and each of n ts, trained at once by Adam, each
    seed on own contexts -> their weights E, b, W2, W, and sqrt(P_G)."""
    V, n, most = model.s * model.r * model.T, len(ts), max(ts)
    used = (torch.arange(most) < torch.tensor(ts)[:, None]).float().repeat(seeds, 1)       # (seeds n, most)
    E = torch.randn(seeds, V, n * width, generator=generator) * 0.5
    W2 = torch.randn(seeds * n, width, most, generator=generator) * width ** -0.5 * used[:, None]
    W = torch.randn(seeds * n, most, V, generator=generator) * most ** -0.5 * used[..., None]
    weights = [x.requires_grad_() for x in (E, torch.zeros(seeds, 1, n * width), W2, W)]
    root = (q.sum(0).repeat_interleave(model.r * model.T) / (model.r * model.T)).sqrt().clamp(min=1e-6)
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)  # what is not used stays 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, k / 20) * 0.5 * (1 + math.cos(math.pi * k / max(steps, 1))))
    for _ in range(steps):
        drawn = draw_texts(model, contexts, q, seeds * batch, generator)
        bag, P = (x.unflatten(0, (seeds, batch)) for x in drawn[:2])
        optimizer.zero_grad()
        network_losses(weights, bag, P, root, kind).sum().backward()           # no weight is shared
        optimizer.step()
        schedule.step()
    return [x.detach() for x in weights], root


def bayes_excess(scores, pi):
    """scores (nets, N, r), pi (N, r) -> the mean over N of max pi minus pi of the highest score (nets,)."""
    best = scores.argmax(-1, keepdim=True)
    return (pi.amax(-1) - pi.expand_as(scores).gather(-1, best)[..., 0]).mean(-1)


def all_labels(f, pi):
    """Excess over Bayes of the least-squares probe on f (nets, N, t) with exact posteriors -> (nets,)."""
    f, pi = F.pad(f, (0, 1), value=1.0).double(), pi.double()
    gram = f.mT @ f
    ridge = 1e-7 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(f.shape[2])
    return bayes_excess(f @ torch.linalg.solve(gram + ridge, f.mT @ pi), pi)


def few_label_errors(f, pi, y, generator, draws=20):
    """Excess over Bayes of ridge regression on a few examples of each class, a mean over draws (nets,)."""
    total = torch.zeros(len(f))
    for _ in range(draws):
        order = torch.randperm(len(y), generator=generator)
        chosen = torch.cat([order[y[order] == c][:LABELS] for c in range(pi.shape[1])])
        centre = f[:, chosen].mean(1, keepdim=True)
        x = f[:, chosen] - centre                                              # (nets, LABELS r, t)
        gram, one_hot = x @ x.mT, torch.eye(pi.shape[1])[y[chosen]]
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        system = gram + (RIDGE * size + 1e-12) * torch.eye(len(chosen))
        alpha = torch.linalg.solve(system, (one_hot - one_hot.mean(0)).expand(len(f), -1, -1))
        total += bayes_excess((f - centre) @ (x.mT @ alpha), pi)
    return total / draws


def measure_networks(model, own, kind, ts, seeds, steps, generator):
    """Train one objective's networks under one loss -> excess errors over Bayes; own: contexts and q. `all`
    (seeds, n): all labels, own contexts. `own`, `common` (1, seeds): few labels, no bottleneck."""
    weights, _ = train_networks(model, *own, ts, kind, seeds, steps if kind in LOSSES else 0, generator)
    found = {}
    for place, (contexts, q) in zip(PLACES, (own, common_contexts(model.s))):
        bag, _, pi, y = draw_texts(model, contexts, q, 2048, generator)
        f = features(weights, bag.expand(seeds, -1, -1))
        found[place] = few_label_errors(f[len(ts) - 1::len(ts)], pi, y, generator)[None]
        if place == "own":
            found["all"] = all_labels(f, pi).view(seeds, -1)
    return {name: value.numpy() for name, value in found.items()}


# ---------------------------------------------------------------------------- what follows from the tail

def spearman(x, y):
    """Rank correlation of x and errors y, mean ranks for ties to RESOLUTION; None where one is constant."""
    x, y = np.round(x, 6), np.round(y / RESOLUTION)
    a, b = ((v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 - len(v) / 2 for v in (x, y))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else None


def correlation(x, errors, resamples=300):
    """Spearman of x (objectives,) and errors (seeds, objectives): of the means, 95% interval over seeds."""
    rng, seeds, middle = np.random.default_rng(0), len(errors), spearman(x, errors.mean(0))
    values = (spearman(x, errors[rng.integers(seeds, size=seeds)].mean(0)) for _ in range(resamples))
    if middle is not None:
        return [middle, *np.percentile([v for v in values if v is not None], (2.5, 97.5)).tolist()]


def findings(rows, ts, r):
    """Spearman correlations of the objectives' errors with Theorem 4.1's tail, for each noise and loss: `at`
    the bottleneck t, there also with the t that is needed and with exact features' errors (`exact_tail`: of
    these with the tail), and of `few` labels without a bottleneck, the tail at r."""
    result = []
    for eps, kind in itertools.product(sorted({row["eps"] for row in rows}), LOSSES):
        group = [row for row in rows if row["eps"] == eps]
        tails, exact, needs = (np.array([row[name] for row in group]).T
                               for name in ("tails", "exact", "needs"))
        errors = np.stack([row[kind]["all"] for row in group], 1)              # (seeds, objectives, n)
        few = {place: correlation(tails[r - 1], np.stack([row[kind][place][0] for row in group], 1))
               for place in PLACES}
        at = [{"t": t, "exact_tail": spearman(tails[t - 1], exact[t - 1]),
               **{name: correlation(x, errors[:, :, k]) for name, x in
                  (("tail", tails[t - 1]), ("needs", needs), ("exact", exact[t - 1]))}}
              for k, t in enumerate(ts)]
        result.append({"eps": eps, "loss": kind, "few": few, "at": at})
    return result


# ---------------------------------------------------------------------------- python spectral.py toy

def candidates(s, quick=False):
    """Objectives for s tokens: the paper's with several options, and every other that is registered."""
    some = [("ar", {}), *(("dar", {"t": t}) for t in (2, 4)),
            *(("mlm", {"mask": n / s}) for n in (s // 4, s // 2)), ("vl", {"mask": (1 / s, 1 - 1 / s)})]
    more = [*(("dar", {"t": t}) for t in (3, s - 1)), *(("mlm", {"mask": n / s}) for n in (1, 3 * s // 4)),
            ("vl", {"mask": (1 / s, 0.5)})]
    sized = {"blocks": {"block": s // 2}, "spans": {"mask": 0.5, "span": 2}}   # for short sequences
    more += [(name, sized.get(name, {})) for name in OBJECTIVES if name not in PAPER]
    made = (from_options(name, **options) for name, options in (some if quick else some + more))
    return [objective for objective in made if not objective.images_only]


def run_toy(args):
    """Exact spectra, probes and trained networks of all objectives and noises -> results of plain numbers."""
    r, s = args.r, args.s
    seeds, steps, noises, ts = 5, 1000, (0.0, 0.3, 0.5), (2, 3, 4, 6, 8, 10, 12, 16)
    if args.quick:
        seeds, steps, noises, ts = 2, 300, (0.0, 0.5), (2, 4, 8)
    noises = np.atleast_1d(noises if args.eps is None else args.eps).tolist()
    ts = [*(t for t in ts if t < r * s), r * s]  # the last: no less than the rank
    models, chosen, rows = [NoisyToy(r, s, args.T, eps) for eps in noises], {}, []
    for objective in candidates(s, args.quick):
        with contextlib.suppress(BadInput):                                    # too many f to list
            chosen[objective] = pairs(objective, s)
    for model, (objective, (contexts, q)) in itertools.product(models, chosen.items()):
        name, eps = describe(objective), model.eps
        _, _, sigma, needs = split(model, contexts, q)
        P, pi = merged(model, contexts, q)
        tails = [(sigma[t:] ** 4).sum() for t in range(1, r * s + 1)]
        row = {"objective": name, "eps": eps, "needs": needs, "tail": tails[r - 1], "tails": tails,
               "bayes": max(1 - P.sum(1) @ pi.max(1), 0.0),
               "exact": exact_probe(P, pi, range(1, r * s + 1), seed=args.seed)}
        own = torch.tensor(contexts), torch.tensor(q, dtype=torch.float32)
        for kind in (*LOSSES, "untrained"):
            key = f"{args.seed} {name} {eps} {kind}"                           # the same whatever else is run
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            row[kind] = measure_networks(model, own, kind, ts, seeds, args.steps or steps, generator)
        rows.append(row)
    return plain({"bottlenecks": ts, "classes": r, "labels": LABELS, "losses": LOSSES, "seeds": seeds,
                  "rows": rows, "findings": findings(rows, ts, r)})


def spearman_text(x):
    """'0.62 [0.60, 0.65]' for a correlation with its interval, '-' for none."""
    return "-" if x is None else "{:.2f} [{:.2f}, {:.2f}]".format(*x)


def show_toy(x):
    """The results of run_toy as text: errors with a bottleneck, errors with few labels, what orders them."""
    ts, r, losses = x["bottlenecks"], x["classes"], x["losses"]
    shown = [t for t in ts if t in (r, 2 * r, 3 * r)] or ts[:1]
    columns = list(itertools.product(PLACES, (*losses, "untrained")))
    narrow = [("objective", "eps", "Bayes", "needs t",
               *(f"t={t} {name}" for t in shown for name in ("tail", "exact", *losses)))]
    few = [("objective", "eps", "Bayes", "tail", *map(": ".join, columns))]
    orders = [("loss", "eps", "bottleneck t", "networks", "exact features")]
    for row in x["rows"]:
        name, cells = (row["objective"], f"{row['eps']:g}", f"{row['bayes']:.3f}"), []
        for t in shown:
            networks = (np.mean(row[kind]["all"], 0)[ts.index(t)] for kind in losses)
            cells += [row["tails"][t - 1], row["exact"][t - 1], *networks]
        narrow.append((*name, str(row["needs"]), *(f"{cell:.3f}" for cell in cells)))
        cells = [row["tail"], *(np.mean(row[kind][place]) for place, kind in columns)]
        few.append((*name, *(f"{cell:.3f}" for cell in cells)))
    for y in x["findings"]:
        name = y["loss"], f"{y['eps']:g}"
        for at in y["at"]:
            exact = "-" if at["exact_tail"] is None else f"{at['exact_tail']:.2f}"
            orders.append((*name, str(at["t"]), spearman_text(at["tail"]), exact))
        orders += [(*name, f"few labels, {place}", spearman_text(y["few"][place]), "") for place in PLACES]
    return "\n\n".join([
        "Excess error over Bayes: all labels, bottleneck t; tail: sum over j > t of sigma_j^4", table(narrow),
        f"{x['labels']} labels a class, no bottleneck; tail: sum over j > r = {r}", table(few),
        f"Spearman of errors and tails over objectives [95% over {x['seeds']} seeds]", table(orders, "<")])
