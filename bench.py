"""How fast a training step is: its time, memory and FLOPs, and the same of other projects' models.

    python bench.py                                     ar, dar, mlm and vl at 4 layers x 256
    python bench.py --peers --peer-nanogpt DIR          against transformers' models, and nanoGPT's in DIR
    python bench.py --preset vit-tiny --objectives mlm --batch-size 64 --peers        images: MAE

A step is that of train.py: a batch that a thread draws, loss, gradients, clipping, fused AdamW. All cases
live in one process and run in turn, A B C A B C ..., so that whatever else the machine does slows all alike.
Times are medians over these rounds, with the range beside them.

The peers get the same batches, optimizer, clipping, precision and compiler, at the same width, depth and
vocabulary. Their steps are more work: the ratio of FLOPs says how much.
"""

import argparse
import contextlib
import functools
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
from run import IMAGE_MASKS, PRESETS, choose_autocast, choose_device, hardware, resolve
from train import LossModule, make_optimizer, update
from util import BadInput, Parser, command_line, import_optional, output_file, positive, table, write_json

SECONDS = 0.5  # that one case runs in one round, at least
STATUS = Path("/proc/self/status")  # Linux: where a process reads its own peak memory


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


# ---------------------------------------------------------------------------- models

def make_model(case):
    """(model, loss): loss(model, batch, path) is the sum of the losses over the targets."""
    if not case.peer:
        return Transformer(case.config), loss_sum
    model, inputs = make_peer(case)

    def loss(model, batch, path):
        out = model(**inputs(batch))
        return (out[1] if isinstance(out, tuple) else out.loss) * batch.total[0]

    return model, loss


def make_peer(case):
    """(the peer of a case, without dropout; a function from our Batch to the arguments of its forward)."""
    c = case.config
    if case.peer != "transformers":
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(case.peer, "model.py"))
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where torch.compile looks
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(None):  # it prints its number of parameters
            model = module.GPT(module.GPTConfig(block_size=c.length, vocab_size=c.vocab, n_layer=c.layers,
                                                n_head=c.heads, n_embd=c.width, dropout=0.0, bias=False))
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


# ---------------------------------------------------------------------------- one step

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
    synchronize = getattr(torch, device.type).synchronize  # wait until the device has done all it was given

    def ready(k):
        batch = draw(case, k)
        return batch.pin_memory() if device.type == "cuda" else batch, batch.total[0].item()

    batches = prefetch(ready, itertools.count())

    def run(steps):
        synchronize()
        start = time.perf_counter()
        for batch, count in itertools.islice(batches, steps):
            update(loss_module, optimizer, [batch], count, case.path, autocast, settings.clip, settings.lr)
        synchronize()
        return (time.perf_counter() - start) / steps

    return run, model


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
    """Bytes that three steps take above the loaded libraries, in a process of its own; nan where the system
    does not say. Without torch.compile: the compiler itself takes more than the steps."""
    if not STATUS.exists():
        return math.nan
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(growth, replace(case, compiled=False)).result()


def growth(case):
    """What cpu_memory returns, in that process."""
    c, peaks = case.config, []
    small = replace(c, layers=1, width=32, heads=2, vocab=c.vocab and 16, decoder=c.decoder and (1, 32, 2))
    for one in (replace(case, batch=1, config=small), case):  # first a small one, which loads the libraries
        set_up(one, choose_device("cpu"))[0](3)
        peaks.append(1024 * int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]))
    return peaks[1] - peaks[0]


# ---------------------------------------------------------------------------- rounds

def time_cases(cases, device, rounds):
    """Time the cases in turn -> a dict for each case."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # every case is a graph of its own
    on_gpu, runs, results = device.type == "cuda", [], []
    for case in tqdm(cases, desc="warm-up", unit=" cases"):
        before = torch.cuda.memory_allocated() if on_gpu else 0
        run, model = set_up(case, device)
        run(1)  # compiles
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        runs.append(functools.partial(run, min(math.ceil(SECONDS / min(run(1), run(1))), 100)))
        memory = torch.cuda.max_memory_allocated() - before if on_gpu else math.nan
        names = {"": describe(case.objective), "transformers": type(model).__name__}
        results.append({"name": names.get(case.peer, "nanoGPT"), "ms_rounds": [],
                        "flops_per_step": step_flops(case),
                        "peak_memory": cpu_memory(case) if device.type == "cpu" else memory,
                        "parameters": sum(p.numel() for p in model.parameters())})
    for _ in tqdm(range(rounds), desc="timing", unit=" rounds"):
        for run, result in zip(runs, results):
            result["ms_rounds"].append(1e3 * run())
    for case, result in zip(cases, results):
        result["ms_per_step"] = statistics.median(result["ms_rounds"])
        result["flops_per_second"] = 1e3 * result["flops_per_step"] / result["ms_per_step"]
        result["tokens_per_second"] = 1e3 * case.batch * case.config.length / result["ms_per_step"]
    return results


def speed_ratio(x, peer):
    """How many times as fast x is as its peer, with the range over the rounds; ratios of memory and FLOPs."""
    each = [b / a for a, b in zip(x["ms_rounds"], peer["ms_rounds"])]
    return {"name": x["name"], "peer": peer["name"], "speed": peer["ms_per_step"] / x["ms_per_step"],
            "speed_low": min(each), "speed_high": max(each),
            "memory": x["peak_memory"] / peer["peak_memory"],
            "flops": x["flops_per_step"] / peer["flops_per_step"]}


# ---------------------------------------------------------------------------- command line

def make_cases(args, device):
    """[(case of this project, its peers)] that the arguments ask for."""
    images, preset, size = args.preset.startswith("vit"), PRESETS[args.preset], dict(SIZES[args.preset])
    decoder, nanogpt, cases = size.pop("decoder", ()), args.peer_nanogpt, []
    if images:
        size.update(vocab=0, length=(preset["size"] // preset["patch"]) ** 2, patch=preset["patch"],
                    mean=(0.5,) * 3, std=(0.25,) * 3)
    else:
        size.update(vocab=4096, length=args.length)
    if nanogpt and not Path(nanogpt, "model.py").exists():
        raise BadInput(f"--peer-nanogpt {nanogpt}: there is no model.py; give a clone of nanoGPT")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    _, dtype = choose_autocast(device, args.dtype)
    flags = args.objectives.split(",")
    for name, objective in zip(flags, several(flags, vars(args))):
        if images and args.mask is None and name in IMAGE_MASKS:
            objective = replace(objective, mask=IMAGE_MASKS[name])
        path = choose_path(objective, images=images)
        config = Config(**size, decoder=decoder if path == "mae" else ())
        objective.check(config.length)
        case, peers = Case(objective, path, config, args.batch_size, dtype, compiled), []
        if args.peers and (not images or path == "mae" and isinstance(objective.mask, float)):
            peers.append("transformers")  # of images it has ViTMAE, with a fixed ratio, and no other
        if nanogpt and not images and path == "causal":
            peers.append(nanogpt)
        cases.append((case, [replace(case, peer=peer) for peer in peers]))
    return cases


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
    add("--json", type=output_file, metavar="FILE", help="results as one JSON object; - for standard output")
    add_options(parser)
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    cases = make_cases(args, device)
    everything = list(itertools.chain(*([case, *peers] for case, peers in cases)))
    results = time_cases(everything, device, args.rounds)
    of = dict(zip(everything, results))
    ratios = [speed_ratio(of[case], of[peer]) for case, peers in cases for peer in peers]

    case = everything[0]
    if args.json != "-":
        print(f"{hardware(device)}, {case.dtype}\n")
        rows = [(x["name"], f"{x['ms_per_step']:.1f}", f"{min(x['ms_rounds']):.1f}-{max(x['ms_rounds']):.1f}",
                 f"{x['tokens_per_second']:,.0f}", f"{x['flops_per_second'] / 1e9:,.0f}",
                 f"{x['flops_per_step'] / 1e9:.1f}", f"{x['peak_memory'] / 1e6:.0f}",
                 f"{x['parameters'] / 1e6:.2f}M") for x in results]
        print(table([("", "ms/step", "range", "tokens/s", "GFLOP/s", "GFLOP", "peak MB", "params"), *rows]))
        rows = [(f"{x['name']} / {x['peer']}", f"{x['speed']:.2f}",
                 f"{x['speed_low']:.2f}-{x['speed_high']:.2f}", f"{x['memory']:.2f}", f"{x['flops']:.2f}")
                for x in ratios]
        if rows:
            print("\n" + table([("times as fast", "", "range", "memory", "FLOPs"), *rows]))
    write_json(args.json, {"command": "bench.py", "settings": vars(args), "config": asdict(case.config),
                           "dtype": case.dtype, "compiled": case.compiled, "device": hardware(device),
                           "threads": torch.get_num_threads(), "torch": torch.__version__,
                           "results": results, "ratios": ratios})
    return 0


if __name__ == "__main__":
    command_line(main)
