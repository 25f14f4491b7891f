"""Sampling text: one loop, whatever the objective. Each step asks for the tokens of one group under an f and
keeps some of the answers; an order of generation is a rule that names that f.

    left       from left to right, under the f that gives the next token its whole prefix as context
    confident  the objective's own steps (`Objective.decoding`): of all tokens asked for, the surest are kept
    random     the same steps, and those that are kept are drawn at random: a sample of the any-order mixture
"""

import math

import torch

from downstream.hub import open_run
from objectives import describe, scores_next
from support.cli import BadInput, positive, progress, seed
from support.kernels import additive, compute_dtype

ORDERS = ("left", "confident", "random")


@torch.no_grad()
def generate(run, prompt, count, temperature=0.8, top_k=50, seed=0, at_once=False, order=None, per_step=1,
             suffix=(), bar=None):
    """Continue `prompt`, a list of at least one id, by `count` ids -> list of the new ids.

    temperature  0 takes the most likely token
    order        one of ORDERS (None: the objective's own default)
    at_once      left: also the other tokens that are trained in parallel with the next one (dar, mtp)
    per_step     the other orders: tokens that are kept of each step
    suffix       ids that follow the new ones, which the model sees where its objective lets it
    bar          of `progress`, which counts the new ids
    A text that outgrows the model's sequence is continued from its last half.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        """One id for each row of logits (n, vocab) -> (n,)."""
        if bar is not None:
            bar.update(len(logits))
        if top_k:
            lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        if temperature < 1e-6:
            return logits.argmax(-1)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    def keep(logits):
        """The rows whose ids are kept: all of them from left to right, else `per_step` of them."""
        if order == "left":
            return slice(None)
        n = len(logits)
        score = torch.rand(n, generator=generator) if order == "random" else logits.softmax(-1).amax(-1)
        return score.topk(min(per_step, n)).indices

    order = order or run.objective.generation
    next_step = rule(run, order, at_once, suffix)
    S, ids = run.settings.length, list(prompt)
    if suffix and len(prompt) + count + len(suffix) > S:
        raise BadInput(f"{count} tokens between {len(prompt)} and {len(suffix)} others are more than the "
                       f"model's {S}; a gap is filled within one sequence")
    while len(ids) < len(prompt) + count:
        known = ids if len(ids) < S else ids[-(S // 2):]
        new = min(S - len(known), len(prompt) + count - len(ids))
        ids += fill(run, known, new, list(suffix), next_step, keep, choose)
    return ids[len(prompt):]


def fill(run, before, new, after, next_step, keep, choose):
    """The `new` ids between `before` and `after`, at most a sequence together."""
    given, P, ask = len(before) + len(after), len(before), Asker(run)
    tokens = torch.zeros(run.settings.length, dtype=torch.long)  # what stands at a missing one is not read
    tokens[:P], tokens[P + new:given + new] = torch.tensor(before), torch.tensor(after, dtype=torch.long)
    order = torch.zeros(given + new, dtype=torch.long)           # 1, 2, .. as they became known; 0 missing
    order[:P], order[P + new:] = torch.arange(1, P + 1), torch.arange(P + 1, given + 1)
    while (order == 0).any():
        f, targets, cut = next_step(order, given)
        targets = targets[targets < given + new]
        logits = ask(tokens, f, targets, cut).float().cpu()
        if not logits.isfinite().all():
            raise BadInput(f"{run.name} gives scores that are not finite: its training diverged")
        kept = keep(logits)
        found = targets[kept]
        tokens[found] = choose(logits[kept])
        order[found] = order.max() + torch.arange(1, len(found) + 1)
    return tokens[P:P + new].tolist()


def rule(run, order, at_once, suffix):
    """The rule of an order: (order (L,), given) of `Objective.decoding` -> f, the positions asked for, and
    the cut at which they are."""
    objective, name = run.objective, describe(run.objective)
    if order != "left":
        if at_once:
            raise BadInput(f"--at-once goes from left to right, and --order {order} does not; use --per-step")
        if objective.decoding(torch.tensor([1, 0]), 1) is None:
            raise BadInput(f"{name} generates from left to right only; leave out --order {order}")

        def own_step(state, given):
            f = objective.decoding(state, given)
            return f, ((f == f.max()) & (state == 0)).nonzero()[:, 0], int(f.max())

        return own_step
    regimes = objective.left_to_right(run.settings.length, run.path)
    if regimes is None:
        raise BadInput(f"{name} was not trained from left to right; use --order confident")
    if at_once and (run.path != "two-stream" or objective.one_stream == "mask"):
        raise BadInput(f"--at-once samples the tokens that are trained in parallel, from left to right; this "
                       f"checkpoint is {name} ({run.path}); leave it out")
    if suffix:
        raise BadInput("from left to right nobody sees a --suffix; use --order confident with it")
    *_, passes = regimes.values()
    scored = torch.stack([scores_next(f) for f in passes])                       # (passes, S)

    def left_step(state, given):
        p = int((state == 0).nonzero()[0])
        f = passes[scored[:, p].nonzero()[0, 0]]
        if not at_once:
            return f, torch.tensor([p]), int(f[p])
        targets, cuts, weight = (x[0] for x in objective.queries(f[None]))
        return f, targets[(cuts == f[p]) & (weight > 0)], int(f[p])

    return left_step


class Asker:
    """Scores of tokens, given the others, step after step over one text that fills up. In two streams the
    keys and values of content are kept for as long as no f changes up to their group."""

    def __init__(self, run):
        self.model, self.path = run.model, run.path
        self.caches = [[] for _ in getattr(run.model, "blocks", ())]
        self.kept = torch.zeros(2, 0, dtype=torch.long)  # positions in the cache, and their f

    def __call__(self, tokens, f, targets, cut):
        """tokens (S,), f (L,), targets (n,), all asked for at the cut -> scores (n, vocab)."""
        model, device = self.model, self.model.query.device
        if self.path == "two-stream":
            features = self.behind(tokens.to(device), f, targets, cut)
        elif self.path == "causal" and self.caches:
            first, p = self.kept.shape[1], int(targets[0])                    # tokens 0 .. first - 1 are kept
            features = model.next_features(tokens[None, first:p].to(device), self.caches, first)
            self.kept = torch.zeros(2, p)
        else:
            length = int(f.nonzero()[-1]) + 1
            inputs = (x[None].to(device) for x in (tokens[:length], f[:length], targets))
            features = model(*inputs, self.path)[0]
        return model.logits(features)

    def behind(self, tokens, f, targets, cut):
        """Features (n, D): those of Transformer.two_streams, without what was computed before."""
        place = f.argsort(stable=True)
        place = place[(f[place] > 0) & (f[place] < cut)]                         # the content, group by group
        now = torch.stack([place, f[place]])
        n = min(now.shape[1], self.kept.shape[1])
        same = int((now[:, :n] == self.kept[:, :n]).all(0).long().cumprod(0).sum())
        for state in (now, self.kept):                                           # whole groups only
            if 0 < same < state.shape[1] and state[1, same] == state[1, same - 1]:
                same = int((state[1] < state[1, same]).sum())
        self.kept, new, model = now, place[same:].to(tokens.device), self.model
        limit = torch.cat([now[1, same:] + 1, torch.full_like(targets, cut)])  # rows see f below their limit
        sees = (now[1] < limit[:, None]).to(tokens.device)
        h = model.embedding(tokens[new]) + model.position_scale * model.positions[new]
        g = model.ask(targets.to(tokens.device))
        x = model.embedding_norm(torch.cat([h, g])[None])
        bias = additive(sees, compute_dtype(x))
        for block, cache in zip(model.blocks, self.caches):
            cache[:] = [rows[:, :, :same] for rows in cache]
            x = block(x, len(new), bias, cache=cache)
        return model.norm(x[0, len(new):])


# ---------------------------------------------------------------------------- command line

def generate_command(args):
    """`evaluate.py generate CKPT`: continuations of a prompt, or what fills the gap before a suffix, printed.

    args     checkpoint, prompt, suffix, tokens, samples, temperature, top_k, seed, order, per_step, at_once
    Returns ({"texts": one str a sample, prompt and suffix included}, the Run). BadInput: a checkpoint of
    images, an order or option that the objective cannot follow, a gap longer than a sequence.
    """
    run, autocast = open_run(args)
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command writes text")
    for name, value in (("temperature", args.temperature), ("top-k", args.top_k)):
        if not 0 <= value < math.inf:
            raise BadInput(f"--{name} {value:g} is not a number of at least 0")
    prompt = run.tokenizer.encode(args.prompt).tolist() or [run.tokenizer.separator]
    suffix, texts = run.tokenizer.encode(args.suffix).tolist(), []
    with autocast:
        for k in range(args.samples):
            name = f"text {k + 1} of {args.samples}" if args.samples > 1 else ""
            with progress(total=args.tokens, unit=" tokens", desc=name) as bar:
                ids = generate(run, prompt, args.tokens, args.temperature, args.top_k, args.seed + k,
                               args.at_once, args.order, args.per_step, suffix, bar)
            texts.append(run.tokenizer.decode(prompt + ids + suffix))
            if args.json != "-":
                print(texts[-1] + "\n")
    return {"texts": texts}, run


def add_generate_command(command):
    """`generate`, for evaluate.py: `command(name, function, text)` gives a parser."""
    sub = command("generate", generate_command, "sample from the model")
    sub.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    sub.add_argument("--suffix", default="", help="text behind what is added, for objectives that fill gaps")
    sub.add_argument("--tokens", type=positive, default=100, help="tokens to add; a text that outgrows the "
                     "model's sequence goes on, in whatever order, from its last half")
    sub.add_argument("--samples", type=positive, default=1, help="texts, of seeds --seed, --seed + 1, ...")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    sub.add_argument("--top-k", type=int, default=50, help="0 for all")
    sub.add_argument("--seed", type=seed, default=0, help="of every random choice")
    sub.add_argument("--order", choices=ORDERS, help="left to right, the surest hidden token first, or any "
                     "of them (default: confident for diffusion, blocks and spans, else left)")
    sub.add_argument("--per-step", type=positive, default=1, help="not left: tokens kept of each pass")
    sub.add_argument("--at-once", action="store_true", help="dar, mtp: also what is predicted in parallel "
                     "with the next token")
