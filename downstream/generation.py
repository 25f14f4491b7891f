"""downstream.generation."""
import math

import torch

from downstream.hub import open_run
from objectives import describe, scores_next
from support.cli import BadInput

# ---------------------------------------------------------------------------- generation

@torch.no_grad()
def generate(run, prompt, count, temperature=0.8, top_k=50, seed=0, at_once=False, confident=False):
    """Continue `prompt`, a list of at least one id, by `count` ids -> list of the new ids.

    temperature  0 takes the most likely token
    at_once      dar: the tokens of a group in parallel, as they were trained
    confident    mlm and vl: start from `count` masks; again and again fill the one that the model is surest of
    A text that outgrows the model's sequence is continued from its last half.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        """One id for each row of logits (n, vocab)."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise BadInput(f"{run.name} gives scores that are not finite: its training diverged")
        if top_k:
            lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        if temperature < 1e-6:
            return logits.argmax(-1).tolist()
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()

    if at_once and (confident or run.path != "two-stream" or run.objective.one_stream == "mask"):
        raise BadInput(f"--at-once samples the tokens of a group in parallel, from left to right; this checkpoint is "
                       f"{describe(run.objective)} ({run.path}){' with --order confident' if confident else ''}; leave it out")
    if confident:
        return fill_confident(run, prompt, count, choose)
    if run.path == "causal" and hasattr(run.model, "next_features"):
        return continue_cached(run, prompt, count, choose)
    return continue_in_groups(run, prompt, count, choose, at_once)


def continue_cached(run, prompt, count, choose):
    """`ar` in one stream: keys and values of earlier tokens are kept, so each token costs one row."""
    model, S, ids = run.model, run.settings.length, list(prompt)
    cache, first, new = [[] for _ in model.blocks], 0, ids[-(S // 2):] if len(ids) > S else ids
    while len(ids) < len(prompt) + count:
        if first + len(new) > S:
            cache, first, new = [[] for _ in model.blocks], 0, ids[-(S // 2):]
        feature = model.next_features(torch.tensor([new], device=model.query.device), cache, first)
        first, new = first + len(new), choose(model.logits(feature))
        ids += new
    return ids[len(prompt):]


def continue_in_groups(run, prompt, count, choose, at_once):
    """Any objective from left to right: under the f that gives the next token its whole prefix as context. With
    at_once, the other tokens of its group are taken from the same pass."""
    model, S, ids, start = run.model, run.settings.length, list(prompt), 0
    *_, passes = run.objective.left_to_right(S, run.path).values()
    scored = torch.stack([scores_next(f) for f in passes])                    # (passes, S)
    while len(ids) < len(prompt) + count:
        if len(ids) - start >= S:
            start = len(ids) - S // 2
        p = len(ids) - start
        f = passes[scored[:, p].nonzero()[0, 0]]
        targets = (f == f[p]).nonzero()[:, 0] if at_once else torch.tensor([p])
        f = f[:int(targets[-1]) + 1]
        tokens = torch.zeros(1, len(f), dtype=torch.long)                     # what stands at the targets is not read
        tokens[0, :p] = torch.tensor(ids[start:])
        features = model(*(x.to(model.query.device) for x in (tokens, f[None], targets[None])), run.path)
        ids += choose(model.logits(features[0]))
    return ids[len(prompt):len(prompt) + count]


def fill_confident(run, prompt, count, choose):
    """`mlm` and `vl`: all new positions are masks; each pass fills the mask whose best token is the most probable."""
    if run.objective.one_stream != "mask":
        raise BadInput(f"--order confident fills masks, and this checkpoint is {describe(run.objective)}; "
                       "leave it out or use an mlm or vl checkpoint")
    if len(prompt) + count > run.settings.length:
        raise BadInput(f"--tokens {count} after a prompt of {len(prompt)} tokens is more than the model's "
                       f"{run.settings.length}; --order confident fills one sequence")
    device = run.model.query.device
    tokens = torch.tensor([list(prompt) + [0] * count])
    groups = torch.tensor([[1] * len(prompt) + [2] * count])
    while (left := (groups[0] == 2).nonzero()[:, 0]).numel():
        features = run.model(*(x.to(device) for x in (tokens, groups, left[None])), run.path)
        logits = run.model.logits(features[0])                                # (left, vocab)
        best = int(logits.softmax(-1).max(-1).values.argmax())
        tokens[0, left[best]] = choose(logits[best:best + 1])[0]
        groups[0, left[best]] = 1
    return tokens[0, len(prompt):].tolist()


def generate_command(args):
    run, autocast = open_run(args)
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images; this command writes text")
    prompt = run.tokenizer.encode(args.prompt).tolist() or [run.tokenizer.separator]
    texts = []
    with autocast:
        for k in range(args.samples):
            ids = generate(run, prompt, args.tokens, args.temperature, args.top_k, args.seed + k, args.at_once,
                           args.order == "confident")
            texts.append(run.tokenizer.decode(prompt + ids))
            if args.json != "-":
                print(texts[-1] + "\n")
    return {"texts": texts}, run
