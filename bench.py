"""How fast a training step is: its time, memory and FLOPs, and the same of other projects' models.

    python bench.py                                     ar, dar, mlm and vl at 4 layers x 256
    python bench.py --peers --peer-nanogpt DIR          against transformers' models, and nanoGPT's in DIR
    python bench.py --preset vit-tiny --objectives mlm --batch-size 64 --peers        images: MAE

A step is that of train.py: a batch that a thread draws, loss, gradients, clipping, fused AdamW. All cases
live in one process and run in turn, A B C A B C ..., so that whatever else the machine does slows all alike.
Times are medians over these rounds, with the range beside them.

The peers get the same batches, optimizer, clipping, precision and compiler, at the same width, depth and
vocabulary. Their feed-forward is 4 x width with GELU (here: GEGLU, 2 x width after the gate), and all but
XLNet score every position, so their steps are more work: the ratio of FLOPs says how much.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import prefetch
from masks import query_mask
from model import SIZES, Config, Transformer
from objectives import add_options, choose_path, describe, draw_batch, loss_sum, several
from run import IMAGE_MASKS, PRESETS, choose_autocast, choose_device, resolve
from train import LossModule, make_optimizer, update
from util import BadInput, Parser, command_line, import_optional, positive, table, write_json

SECONDS = 0.5  # that one case runs in one round, at least
PEERS = {"causal": "GPT2LMHeadModel", "mask": "BertForMaskedLM", "two-stream": "XLNetLMHeadModel",
         "mae": "ViTMAEForPreTraining"}


@dataclass(frozen=True)
class Case:
    """One thing to time: an objective, or a peer that does the same."""

    objective: object
    path: str
    config: Config
    batch: int              # sequences per step
    dtype: str              # fp32 or bf16
    compiled: bool = False
    peer: str = ""          # "transformers", or the folder of nanoGPT

    @property
    def name(self):
        if self.peer:
            return PEERS[self.path] if self.peer == "transformers" else "nanoGPT"
        return describe(self.objective)


# ---------------------------------------------------------------------------- peers

def peers_of(case, transformers, nanogpt):
    """The peers of a case: of transformers, where it has one, and nanoGPT in the folder `nanogpt`."""
    text, found = not case.config.patch, []
    fixed_ratio = case.path == "mae" and isinstance(case.objective.mask, float)  # ViTMAE knows no other
    if transformers and (text or fixed_ratio):
        found.append(replace(case, peer="transformers"))
    if nanogpt and text and case.path == "causal":
        if not Path(nanogpt, "model.py").exists():
            raise BadInput(f"--peer-nanogpt {nanogpt}: there is no model.py; give a clone of nanoGPT")
        found.append(replace(case, peer=nanogpt))
    return found


def make_peer(case):
    """(the peer of a case, without dropout; a function from our Batch to the arguments of its forward)."""
    c = case.config
    if case.peer != "transformers":
        model = load_nanogpt(case.peer, block_size=c.length, vocab_size=c.vocab, n_layer=c.layers,
                             n_head=c.heads, n_embd=c.width, dropout=0.0, bias=False)
        return model, lambda batch: {"idx": batch.tokens,  # -1 is not scored
                                     "targets": F.pad(batch.tokens[:, 1:], (0, 1), value=-1)}

    T = import_optional("transformers")
    bert = {"hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "sdpa"}
    if case.path == "causal":
        model = T.GPT2LMHeadModel(T.GPT2Config(
            vocab_size=c.vocab, n_positions=c.length, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM", attn_implementation="sdpa"))
        return model, lambda batch: {"input_ids": batch.tokens, "labels": batch.tokens}

    if case.path == "mae":  # it draws its own masks, and any pixels will do
        layers, width, heads = c.decoder
        model = T.ViTMAEForPreTraining(T.ViTMAEConfig(
            image_size=c.size, patch_size=c.patch, num_channels=len(c.mean), mask_ratio=case.objective.mask,
            decoder_num_hidden_layers=layers, decoder_hidden_size=width, decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * width, **bert))
        return model, lambda batch: {"pixel_values": batch.tokens.view(-1, len(c.mean), c.size, c.size)}

    def labels(batch):
        return torch.where(batch.weight > 0, batch.labels, -100)  # (B, n), -100 is not scored

    if case.path == "mask":  # the last id stands for [MASK]
        model = T.BertForMaskedLM(T.BertConfig(vocab_size=c.vocab, max_position_embeddings=c.length, **bert))
        return model, lambda batch: {
            "input_ids": torch.where(batch.blank, c.vocab - 1, batch.tokens),
            "labels": torch.full_like(batch.tokens, -100).scatter(1, batch.targets, labels(batch))}

    model = T.XLNetLMHeadModel(T.XLNetConfig(vocab_size=c.vocab, d_model=c.width, n_layer=c.layers,
                                             n_head=c.heads, d_inner=4 * c.width, dropout=0.0))
    return model, lambda batch: {
        "input_ids": batch.tokens, "perm_mask": (~query_mask(batch.groups)).float(), "labels": labels(batch),
        "target_mapping": F.one_hot(batch.targets, batch.tokens.shape[1]).float()}


def load_nanogpt(folder, **config):
    """The GPT of the model.py in this folder."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**config))


# ---------------------------------------------------------------------------- one step

def make_model(case):
    """(model, loss): loss(model, batch, path) is the sum of the losses over the targets."""
    if not case.peer:
        return Transformer(case.config), loss_sum
    model, inputs = make_peer(case)

    def loss(model, batch, path):
        out = model(**inputs(batch))
        mean = out[1] if isinstance(out, tuple) else out.loss
        return mean * batch.total[0]

    return model, loss


def draw(case, k):
    """The batch of step k: random ids, or random pixels."""
    c, generator = case.config, torch.Generator().manual_seed(k)
    if c.patch:
        tokens = torch.randn(case.batch, c.length, c.values, generator=generator)
    else:
        tokens = torch.randint(c.vocab, (case.batch, c.length), generator=generator)
    return draw_batch(case.objective, case.path, tokens, c.vocab, generator)


def set_up(case, device):
    """Build the model and optimizer of a case -> (run, model); run(steps) returns the seconds of one step."""
    torch.manual_seed(0)
    model, loss = make_model(case)
    model = model.to(device).train()
    settings = resolve(optimizer="adamw")  # its learning rate, decay and clipping, alike for all
    optimizer, (autocast, _) = make_optimizer(model, settings), choose_autocast(device, case.dtype)
    loss_module = LossModule(model, torch.compile(loss, dynamic=False) if case.compiled else loss)

    def ready(k):
        batch = draw(case, k)
        return batch.pin_memory() if device.type == "cuda" else batch, batch.total[0].item()

    batches = prefetch(ready, itertools.count())

    def run(steps):
        synchronize(device)
        start = time.perf_counter()
        for batch, count in itertools.islice(batches, steps):
            update(loss_module, optimizer, [batch], count, case.path, autocast, settings.clip, settings.lr)
        synchronize(device)
        return (time.perf_counter() - start) / steps

    return run, model


def synchronize(device):
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---------------------------------------------------------------------------- what a step needs

def step_flops(case):
    """FLOPs that PyTorch counts in the matrix products of one step. Products of two activations, which are
    attention's, count half on the causal path: the counter knows no triangles."""
    one, half = replace(case, batch=1), 0.5 if case.path == "causal" else 1
    model, loss = make_model(one)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no fused kernel
        loss(model, draw(one, 0), case.path).backward()
    counts = counter.get_flop_counts()["Global"]
    return case.batch * sum(n * (half if "bmm" in str(kernel) else 1) for kernel, n in counts.items())


def cpu_memory(case):
    """Bytes that three steps take above the loaded libraries, in a process of its own. None where the system
    does not say. Without torch.compile: the compiler itself takes more than the steps."""
    if not Path("/proc/self/status").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(growth, replace(case, compiled=False)).result()


def growth(case):
    """What cpu_memory returns, in that process."""
    device, c = choose_device("cpu"), case.config
    small = replace(c, layers=1, width=32, heads=2, vocab=c.vocab and 16, decoder=c.decoder and (1, 32, 2))
    peaks = []
    for one in (replace(case, batch=1, config=small), case):  # first a small one, which loads the libraries
        set_up(one, device)[0](3)
        peaks.append(1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))
    return peaks[1] - peaks[0]


# ---------------------------------------------------------------------------- rounds

def time_cases(cases, device, rounds):
    """Time the cases in turn -> a dict for each case."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # every case is a graph of its own
    results, runs = zip(*(warm_up(case, device) for case in tqdm(cases, desc="warm-up", unit=" cases")))
    times = [[] for _ in cases]
    for _ in tqdm(range(rounds), desc="timing", unit=" rounds"):
        for run, seconds in zip(runs, times):
            seconds.append(run())
    for case, result, seconds in zip(cases, results, times):
        median = statistics.median(seconds)
        result.update(ms_per_step=1e3 * median, ms_rounds=[1e3 * s for s in seconds],
                      tokens_per_second=case.batch * case.config.length / median,
                      flops_per_second=result["flops_per_step"] / median)
    return results


def warm_up(case, device):
    """Run the first steps of a case -> (what is known of it by then, a function that runs one round)."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    run, model = set_up(case, device)
    run(1)  # compiles
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps = min(math.ceil(SECONDS / min(run(1), run(1))), 100)
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else None
    known = {"name": case.name, "path": case.path, "dtype": case.dtype,
             "parameters": sum(p.numel() for p in model.parameters()), "flops_per_step": step_flops(case),
             "peak_memory": cpu_memory(case) if device.type == "cpu" else memory}
    return known, lambda: run(steps)


def speed_ratio(x, peer):
    """How many times as fast x is as its peer, with the range over the rounds; ratios of memory and FLOPs."""
    each = [b / a for a, b in zip(x["ms_rounds"], peer["ms_rounds"])]
    return {"name": x["name"], "peer": peer["name"], "speed": peer["ms_per_step"] / x["ms_per_step"],
            "speed_low": min(each), "speed_high": max(each),
            "memory": x["peak_memory"] / peer["peak_memory"] if x["peak_memory"] else None,
            "flops": x["flops_per_step"] / peer["flops_per_step"]}


# ---------------------------------------------------------------------------- command line

def make_cases(args, device):
    """The cases of this project that the arguments ask for."""
    images, preset, size = args.preset.startswith("vit"), PRESETS[args.preset], dict(SIZES[args.preset])
    decoder, cases = size.pop("decoder", ()), []
    if images:
        size.update(vocab=0, length=(preset["size"] // preset["patch"]) ** 2, patch=preset["patch"],
                    mean=(0.5,) * 3, std=(0.25,) * 3)
    else:
        size.update(vocab=4096, length=args.length)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    _, dtype = choose_autocast(device, args.dtype)
    flags = args.objectives.split(",")
    for name, objective in zip(flags, several(flags, vars(args))):
        if images and args.mask is None and name in IMAGE_MASKS:
            objective = replace(objective, mask=IMAGE_MASKS[name])
        path = choose_path(objective, images=images)
        config = Config(**size, decoder=decoder if path == "mae" else ())
        objective.check(config.length)
        cases.append(Case(objective, path, config, args.batch_size, dtype, compiled))
    return cases


def show(found):
    """What was found, for a person."""
    print("{device}, {dtype}, threads: {threads}\n".format(**found))
    rows = [("", "ms/step", "range", "tokens/s", "GFLOP/s", "GFLOP", "peak MB", "params")]
    for r in found["results"]:
        rows.append((r["name"], f"{r['ms_per_step']:.1f}",
                     f"{min(r['ms_rounds']):.1f}-{max(r['ms_rounds']):.1f}",
                     f"{r['tokens_per_second']:,.0f}", f"{r['flops_per_second'] / 1e9:,.0f}",
                     f"{r['flops_per_step'] / 1e9:.1f}",
                     f"{r['peak_memory'] / 1e6:.0f}" if r["peak_memory"] else "?",
                     f"{r['parameters'] / 1e6:.2f}M"))
    print(table(rows))
    rows = [("times as fast", "", "range", "memory", "FLOPs")]
    for r in found["ratios"]:
        rows.append((f"{r['name']} / {r['peer']}", f"{r['speed']:.2f}x",
                     f"{r['speed_low']:.2f}-{r['speed_high']:.2f}",
                     f"{r['memory']:.2f}x" if r["memory"] else "?", f"{r['flops']:.2f}x"))
    if found["ratios"]:
        print("\n" + table(rows))


def main(argv=None):
    parser = Parser(description="How fast a training step is, and the same of other projects' models.")
    add = parser.add_argument
    add("--objectives", default="ar,dar,mlm,vl", metavar="A,B,...", help="what to time")
    add("--preset", default="mini", choices=SIZES, help="layers, width and heads; vit: images")
    add("--length", type=positive, default=128, help="text: tokens in a sequence")
    add("--batch-size", type=positive, default=16, help="sequences or images per step")
    add("--peers", action="store_true", help="also transformers' models of the same size")
    add("--peer-nanogpt", metavar="DIR", help="also nanoGPT, of which DIR is a clone")
    add("--rounds", type=positive, default=5, help="times that everything is timed in turn")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--threads", type=positive, help="of a CPU (default: as PyTorch chooses)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 where it is faster")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--json", metavar="FILE", help="the results as one JSON object; - for standard output")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).absolute().parent.is_dir():  # complain before the work, not after it
        raise BadInput(f"{args.json}: there is no such folder")

    device = choose_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    cases = make_cases(args, device)
    pairs = [(case, peer) for case in cases for peer in peers_of(case, args.peers, args.peer_nanogpt)]
    cases += [peer for _, peer in pairs]
    results = time_cases(cases, device, args.rounds)
    of = dict(zip(cases, results))
    ratios = [speed_ratio(of[case], of[peer]) for case, peer in pairs]

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = {"command": "bench.py", "settings": vars(args), "config": asdict(cases[0].config),
             "dtype": cases[0].dtype, "compiled": cases[0].compiled, "device": name,
             "threads": torch.get_num_threads(), "torch": torch.__version__, "results": results,
             "ratios": ratios}
    if args.json != "-":
        show(found)
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    command_line(main)
