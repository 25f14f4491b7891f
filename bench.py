"""How fast a training step is: throughput, memory, FLOP utilisation, and the same of other projects' models.

    python bench.py                                     ar, dar, mlm and vl at 4 layers x 256
    python bench.py --peers --dtype fp32,bf16           against Hugging Face's models of the same size
    python bench.py --peer-nanogpt DIR                  against nanoGPT, from a clone of it in DIR
    python bench.py --preset vit-tiny --objectives mlm --batch-size 64 --peers        images: MAE

A step is that of train.py: a batch that a thread draws, loss, gradients, clipping, fused AdamW. All that is
compared lives in one process and runs in turn, A B C A B C ..., so that whatever else the machine does slows
all of it alike. Times are medians over these rounds, with the range beside them. Tokens are random ids. Peak
memory is what steps need above the loaded libraries, on a CPU in a process of its own. MFU, model FLOP
utilisation, is the FLOPs of a step's matrix products over its time, over the speed of a large matrix product
in the same rounds. Causal attention counts half of its square for every model.

The peers get the same batches, optimizer, clipping, precision and compiler, at the same width, depth and
vocabulary. They have random weights, no dropout, and a feed-forward of 4 x width with GELU (here: GEGLU, 2 x
width after the gate), so their steps are more work. The ratio of FLOPs says how much.

    causal      GPT2LMHeadModel       scores every position
    mask        BertForMaskedLM       scores every position, hidden or not
    two-stream  XLNetLMHeadModel      perm_mask and target_mapping from the same f; relative positions
    mae         ViTMAEForPreTraining  draws its own masks, of the same ratio; 4 x width in the decoder too
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

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Sequences, prefetch
from masks import query_mask
from model import SIZES, Config, Transformer
from objectives import add_options, choose_path, describe, draw_batch, loss_sum, several
from run import IMAGE_MASKS, PRESETS, choose_autocast, choose_device, resolve
from train import LossModule, flops_per_sequence, make_optimizer, update
from util import BadInput, Parser, command_line, import_optional, positive, table, write_json

SECONDS = 0.5  # that one case runs in one round, at least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS = {"causal": "GPT2LMHeadModel", "mask": "BertForMaskedLM", "two-stream": "XLNetLMHeadModel",
         "mae": "ViTMAEForPreTraining"}


@dataclass(frozen=True)
class Case:
    """One thing to time: an objective, or a peer that does the same, at one size and precision."""

    objective: object
    path: str
    config: Config
    batch: int               # sequences per step
    dtype: str               # of DTYPES
    peer: str = ""           # "transformers", or the folder of nanoGPT
    compiled: bool = False

    @property
    def name(self):
        if self.peer:
            return PEERS[self.path] if self.peer == "transformers" else "nanoGPT"
        one_or_two = self.path == "two-stream" and self.objective.one_stream
        return describe(self.objective) + (" two-stream" if one_or_two else "")


# ---------------------------------------------------------------------------- peers

def peers_of(case, transformers, nanogpt):
    """The peers of a case: of transformers, where it has one, and nanoGPT in the folder `nanogpt`."""
    images, found = case.config.patch > 0, []
    fixed_ratio = case.path == "mae" and isinstance(case.objective.mask, float)  # ViTMAE knows no other
    if transformers and (fixed_ratio or not images):
        found.append(replace(case, peer="transformers"))
    if nanogpt and case.path == "causal" and not images:
        if not Path(nanogpt, "model.py").exists():
            raise BadInput(f"--peer-nanogpt {nanogpt}: there is no model.py; give a clone of nanoGPT")
        found.append(replace(case, peer=nanogpt))
    return found


def make_peer(case):
    """The peer of a case, of the same width, depth, heads and vocabulary, without dropout."""
    return make_transformers(case) if case.peer == "transformers" else make_nanogpt(case)


def make_nanogpt(case):
    """GPT of the model.py in the folder case.peer, without biases, as its author recommends."""
    path, c = Path(case.peer, "model.py"), case.config
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(block_size=c.length, vocab_size=c.vocab, n_layer=c.layers,
                                           n_head=c.heads, n_embd=c.width, dropout=0.0, bias=False))


def make_transformers(case):
    """transformers' model for the path of the case."""
    T, c = import_optional("transformers"), case.config
    bert = {"hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": 4 * c.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "sdpa"}
    if case.path == "causal":
        return T.GPT2LMHeadModel(T.GPT2Config(
            vocab_size=c.vocab, n_positions=c.length, n_embd=c.width, n_layer=c.layers, n_head=c.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM", attn_implementation="sdpa"))
    if case.path == "mask":
        return T.BertForMaskedLM(T.BertConfig(vocab_size=c.vocab, max_position_embeddings=c.length, **bert))
    if case.path == "two-stream":
        return T.XLNetLMHeadModel(T.XLNetConfig(vocab_size=c.vocab, d_model=c.width, n_layer=c.layers,
                                                n_head=c.heads, d_inner=4 * c.width, dropout=0.0))
    layers, width, heads = c.decoder
    return T.ViTMAEForPreTraining(T.ViTMAEConfig(
        image_size=c.size, patch_size=c.patch, num_channels=len(c.mean), mask_ratio=case.objective.mask,
        decoder_num_hidden_layers=layers, decoder_hidden_size=width, decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width, **bert))


def peer_inputs(batch, case):
    """What the peer of a case takes, from the Batch that this project's model takes."""
    if case.peer != "transformers":  # nanoGPT takes the next tokens as they are; -1 is not scored
        return {"idx": batch.tokens, "targets": F.pad(batch.tokens[:, 1:], (0, 1), value=-1)}
    if case.path == "causal":
        return {"input_ids": batch.tokens, "labels": batch.tokens}
    if case.path == "mae":  # any pixels will do
        c = case.config
        return {"pixel_values": batch.tokens.view(-1, len(c.mean), c.size, c.size)}
    labels = torch.where(batch.weight > 0, batch.labels, -100)  # -100 is not scored
    if case.path == "mask":  # the last id stands for [MASK]
        return {"input_ids": torch.where(batch.blank, case.config.vocab - 1, batch.tokens),
                "labels": torch.full_like(batch.tokens, -100).scatter(1, batch.targets, labels)}
    return {"input_ids": batch.tokens, "perm_mask": (~query_mask(batch.groups)).float(), "labels": labels,
            "target_mapping": F.one_hot(batch.targets, batch.tokens.shape[1]).float()}


# ---------------------------------------------------------------------------- one step

def make_draw(case):
    """A function that draws the batch of step k, as train() does, from random tokens or patches."""
    c = case.config
    if c.patch:
        images = torch.randn(4 * case.batch, c.length, c.values, generator=torch.Generator().manual_seed(0))
    else:
        tokens = np.random.default_rng(0).integers(c.vocab, size=64 * case.batch * c.length, dtype=np.uint32)
        sequences = Sequences(tokens, c.length, 0, seed=0)

    def draw(k):
        first = k * case.batch
        tokens = (images[torch.arange(first, first + case.batch) % len(images)] if c.patch
                  else sequences.batch(first, case.batch))
        generator = torch.Generator().manual_seed(k)
        return draw_batch(case.objective, case.path, tokens, c.vocab, generator, "bert")

    return draw


def make_loss(case):
    """A function of (model, batch, path): the sum of the losses over the targets."""
    def peer_loss(model, batch, path):
        out = model(**peer_inputs(batch, case))
        mean = out[1] if isinstance(out, tuple) else out.loss
        return mean * batch.total[0]

    return peer_loss if case.peer else loss_sum


def set_up(case, device):
    """Build the model and optimizer of a case -> (run, model); run(steps) returns the seconds of one step."""
    torch.manual_seed(0)
    model = (make_peer(case) if case.peer else Transformer(case.config)).to(device).train()
    settings = resolve(optimizer="adamw")  # its learning rate, decay and clipping, alike for all
    optimizer, loss, draw = make_optimizer(model, settings), make_loss(case), make_draw(case)
    if case.compiled:
        loss = torch.compile(loss, dynamic=False)
    loss_module, (autocast, _) = LossModule(model, loss), choose_autocast(device, case.dtype)

    def ready(k):
        batch = draw(k)
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
    """FLOPs of the matrix products of one step: by the formula for our models, counted for peers."""
    if case.peer:
        one = replace(case, batch=1)
        return case.batch * counted_flops(one, make_peer(one))
    S = case.config.length
    targets, given = case.objective.max_targets(S), S - case.objective.min_targets(S)
    return case.batch * flops_per_sequence(case.config, case.path, S, targets, given)


def counted_flops(case, model):
    """The FLOPs that PyTorch counts in the matrix products of a step on the CPU. Products of two activations,
    which are attention's, count half on the causal path: the counter knows no triangles."""
    batch, half = make_draw(case)(0), 0.5 if case.path == "causal" else 1
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no fused kernel
        make_loss(case)(model, batch, case.path).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops * (half if "bmm" in str(kernel) else 1) for kernel, flops in counts.items())


def matrix_product(device, dtype):
    """A function that returns the FLOP/s of the fastest of a few large matrix products."""
    cpu = device.type == "cpu"
    sides, repeats = ((1024, 2048), 1) if cpu else ((4096, 8192), 20)
    factors = [torch.randn(2, side, side, device=device).to(DTYPES[dtype]) for side in sides]

    def best():
        speeds = []
        for x, weight in factors * 3:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                F.linear(x, weight)
            synchronize(device)
            speeds.append(2 * len(x) ** 3 * repeats / (time.perf_counter() - start))
        return max(speeds)

    return best


def cpu_memory(case):
    """Bytes by which the resident memory of a fresh process grows at most over three steps; None where the
    system does not say. Without torch.compile: the compiler itself takes more than the steps."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(memory_of_steps, replace(case, compiled=False)).result()


def memory_of_steps(case):
    """What cpu_memory returns, for the process that calls this."""
    status, device, c = Path("/proc/self/status"), choose_device("cpu"), case.config
    if not status.exists():
        return None
    small = replace(c, layers=1, width=32, heads=2, vocab=c.vocab and 16, decoder=c.decoder and (1, 32, 2))
    peaks = []
    for one in (replace(case, batch=1, config=small), case):  # first a small one, which loads the libraries
        set_up(one, device)[0](3)
        peaks.append(1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]))
    return peaks[1] - peaks[0]


# ---------------------------------------------------------------------------- rounds

def time_cases(cases, device, rounds):
    """Time the cases in turn -> ([a dict for each case], {dtype: FLOP/s of a large matrix product})."""
    torch.set_float32_matmul_precision("high")
    if cases[0].compiled:
        torch._dynamo.config.recompile_limit = 64            # every case is a graph of its own
        torch.compiler.config.force_disable_caches = True    # the first step takes as long as in a first run
        torch.compile(torch.neg)(torch.zeros(1, device=device))  # nor is starting the compiler part of it
    results, functions = zip(*(warm_up(case, device) for case in tqdm(cases, desc="warm-up", unit=" cases")))
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    functions = [*functions, *(matrix_product(device, dtype) for dtype in dtypes)]
    values = [[] for _ in functions]
    for _ in tqdm(range(rounds), desc="timing", unit=" rounds"):
        for function, seconds in zip(functions, values):
            seconds.append(function())
    peaks = {dtype: statistics.median(speeds) for dtype, speeds in zip(dtypes, values[len(cases):])}
    for case, result, seconds in zip(cases, results, values):
        median = statistics.median(seconds)
        result.update(ms_per_step=1e3 * median, ms_rounds=[1e3 * s for s in seconds],
                      sequences_per_second=case.batch / median,
                      tokens_per_second=case.batch * case.config.length / median,
                      mfu=result["flops_per_step"] / median / peaks[case.dtype])
    return list(results), peaks


def warm_up(case, device):
    """Run the first steps of a case -> (what is known of it by then, a function that runs one round)."""
    memory, on_gpu = cpu_memory(case) if device.type == "cpu" else None, device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    run, model = set_up(case, device)
    first = run(1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm = min(run(1), run(1))  # seconds
    if on_gpu:
        memory = torch.cuda.max_memory_allocated() - before
    steps = min(math.ceil(SECONDS / warm), 100)
    known = {"name": case.name, "objective": describe(case.objective), "path": case.path, "peer": case.peer,
             "dtype": case.dtype, "parameters": sum(p.numel() for p in model.parameters()),
             "first_step_seconds": first, "flops_per_step": step_flops(case), "peak_memory": memory}
    return known, lambda: run(steps)


def speed_ratio(x, other):
    """How many times as fast x is as `other`, with the range over the rounds; ratios of memory and FLOPs."""
    each = [b / a for a, b in zip(x["ms_rounds"], other["ms_rounds"])]
    return {"name": x["name"], "dtype": x["dtype"], "other": other["name"], "other_dtype": other["dtype"],
            "speed": other["ms_per_step"] / x["ms_per_step"], "speed_low": min(each), "speed_high": max(each),
            "memory": x["peak_memory"] / other["peak_memory"] if x["peak_memory"] else None,
            "flops": x["flops_per_step"] / other["flops_per_step"]}


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
    flags = list(dict.fromkeys(args.objectives.split(",")))
    for name, objective in zip(flags, several(flags, vars(args))):
        if images and args.mask is None and name in IMAGE_MASKS:
            objective = replace(objective, mask=IMAGE_MASKS[name])
        path = choose_path(objective, args.streams, images)
        config = Config(**size, decoder=decoder if path == "mae" else ())
        objective.check(config.length)
        for dtype in (args.dtype or choose_autocast(device)[1]).split(","):
            cases.append(Case(objective, path, config, args.batch_size, dtype, compiled=compiled))
    return cases


def run_cases(args, device):
    """Time all that is asked for in one interleaved run -> results and ratios, for --json."""
    ours = make_cases(args, device)
    peers = [peer for case in ours for peer in peers_of(case, args.peers, args.peer_nanogpt)]
    results, peaks = time_cases([*ours, *peers], device, args.rounds)
    of = dict(zip([*ours, *peers], results))
    causal = {case.dtype: case for case in ours if case.path == "causal"}
    return {"matrix_product_flops": peaks, "results": results,
            "ratios": [speed_ratio(of[case], of[peer]) for case in ours for peer in peers
                       if peer.objective == case.objective and peer.dtype in (case.dtype, "fp32")],
            "against_causal": [speed_ratio(of[case], of[causal[case.dtype]]) for case in ours
                               if case.path != "causal" and case.dtype in causal],
            "config": asdict(ours[0].config), "compiled": ours[0].compiled}


def print_all(found):
    """What was found, for a person."""
    c, settings = found["config"], found["settings"]
    data = f"{c['length']} patches" if c["patch"] else f"sequence {c['length']}, vocabulary {c['vocab']:,}"
    print(f"{c['layers']} layers, {c['width']} wide, {c['heads']} heads, {data}, batch "
          f"{settings['batch_size']}; {found['device']}, threads: {found['threads']}"
          + ", compiled" * found["compiled"] + f"; medians of {settings['rounds']} rounds")
    for dtype, speed in found["matrix_product_flops"].items():
        print(f"matrix product, {dtype}: {speed / 1e12:.3g} TFLOP/s")
    unit = "sequences" if c["patch"] else "tokens"
    rows = [("", "ms/step", "range", f"{unit}/s", "MFU", "GFLOP", "peak MB", "first s", "params")]
    for r in found["results"]:
        rows.append((f"{r['name']} {r['dtype']}", f"{r['ms_per_step']:.1f}",
                     f"{min(r['ms_rounds']):.1f}-{max(r['ms_rounds']):.1f}",
                     f"{r[f'{unit}_per_second']:,.0f}", f"{r['mfu']:.1%}", f"{r['flops_per_step'] / 1e9:.1f}",
                     f"{r['peak_memory'] / 1e6:.0f}" if r["peak_memory"] else "?",
                     f"{r['first_step_seconds']:.2f}", f"{r['parameters'] / 1e6:.2f}M"))
    print("\n" + table(rows))
    rows = [("times as fast", "", "range", "memory", "FLOPs")]
    for r in found["ratios"] + found["against_causal"]:
        rows.append((f"{r['name']} {r['dtype']} / {r['other']} {r['other_dtype']}", f"{r['speed']:.2f}x",
                     f"{r['speed_low']:.2f}-{r['speed_high']:.2f}",
                     f"{r['memory']:.2f}x" if r["memory"] else "?", f"{r['flops']:.2f}x"))
    if len(rows) > 1:
        print("\n" + table(rows))


def main(argv=None):
    parser = Parser(description="How fast a training step is, and the same of other projects' models.")
    add = parser.add_argument
    add("--objectives", default="ar,dar,mlm,vl", metavar="A,B,...", help="what to time")
    add("--streams", type=int, choices=(1, 2), help="2 runs every objective through two streams")
    add("--preset", default="mini", choices=SIZES, help="layers, width and heads; vit: images")
    add("--length", type=positive, default=128, help="text: tokens in a sequence")
    add("--batch-size", type=positive, default=16, help="sequences or images per step")
    add("--peers", action="store_true", help="also transformers' models of the same size")
    add("--peer-nanogpt", metavar="DIR", help="also nanoGPT, of which DIR is a clone")
    add("--rounds", type=positive, default=5, help="times that everything is timed in turn")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--threads", type=positive, help="of a CPU (default: as PyTorch chooses)")
    add("--dtype", choices=(*DTYPES, ",".join(DTYPES)), help="default: bf16 where it is faster")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--json", metavar="FILE", help="the results as one JSON object; - for standard output")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, name = choose_device(args.device), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        name = re.search(r"model name\s*:\s*(.+)|$", Path("/proc/cpuinfo").read_text())[1]
    found = run_cases(args, device)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    found = {"command": "bench.py", "settings": settings, "device": name or device.type,
             "threads": torch.get_num_threads(), "torch": torch.__version__, **found}
    if args.json != "-":
        print_all(found)
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    command_line(main)
