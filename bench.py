"""How fast a training step is: throughput, memory, FLOP utilisation, against other models, and how its cost grows.

    python bench.py                                     ar, dar, mlm and vl at 4 layers x 256
    python bench.py --peers --dtype fp32,bf16           against Hugging Face's models of the same size
    python bench.py --scaling                           sequence length, batch, layers and width doubled in turn
    python bench.py --loop                              how close the loop of train.py comes to the bare step
    python bench.py --preset vit-tiny --objectives mlm --batch-size 64 --peers           images: MAE

A step is that of train.py: a batch drawn ahead by a thread, loss, gradients, clipping, fused AdamW. All that is compared
lives in one process and runs in turn, A B C A B C ..., so that whatever else the machine does slows all of it alike.
Times are medians over these rounds, after a warm-up, with the range over the rounds beside them. Tokens are random ids.
Peak memory is what a step needs above the loaded libraries, on a CPU in a process of its own.

MFU, model FLOP utilisation, is the FLOPs of the step's matrix products over its time, over the speed of a large matrix
product that is measured here, in the same rounds, device, precision and number of threads. Causal attention counts half of
its square for every model.

The peers are transformers' models with random weights and their usual shape: dropout 0, feed-forward 4 x width with GELU
(here: GEGLU, 2 x width after the gate), `sdpa` attention where they have it (XLNet has not). They get the same batches,
optimiser, clipping, precision (autocast) and compiler, and read their inputs from the same Batch. So the ratios compare what
a user gets from either at the same width, depth and vocabulary, and the ratio of FLOPs says how much of it is less work.

    causal      GPT2LMHeadModel       scores every position
    mask        BertForMaskedLM       scores every position, hidden or not
    two-stream  XLNetLMHeadModel      perm_mask and target_mapping from the same f; relative positions
    mae         ViTMAEForPreTraining  draws its own masks, of the same ratio; 4 x width in the decoder too
"""

import argparse
import inspect
import itertools
import json
import math
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Sequences
from engine.machine import LossModule, choose_device, choose_dtype, flops_per_sequence
from engine.runs import load_examples
from engine.settings import IMAGE_MASKS, PRESETS, Settings
from engine.steps import ahead, make_optimizer
from experiments.peers import PEERS, has_peer, make_peer, peer_inputs
from model import SIZES, VIT_SIZES, Config, Transformer
from objectives import OBJECTIVES, add_options, choose_path, describe, draw_batch, from_options, loss_sum
from support.cli import BadInput, Parser, command_line, output_file, positive, write_json
from support.objective import show
from train import train, update

SECONDS = 0.5  # that one case runs in one round, at least


SIDES = {True: (1024, 2048), False: (4096, 8192)}  # of the matrices of the reference product, on a CPU and elsewhere


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One thing to time: an objective, or the peer that does the same, at one size and precision."""

    objective: object
    path: str
    config: Config
    batch: int               # sequences per step
    dtype: torch.dtype
    peer: bool = False
    compiled: bool = False

    @property
    def name(self):
        two = " two-stream" if self.path == "two-stream" and self.objective.one_stream else ""
        return PEERS[self.path] if self.peer else describe(self.objective) + two


# ---------------------------------------------------------------------------- one step

def make_loss(case):
    """A function of (model, batch, path) that returns the sum of the losses over the targets: loss_sum, or the peer's."""
    def peers(model, batch, path):
        return model(**peer_inputs(batch, path, case.config)).loss * batch.total[0]  # their loss is the mean

    return peers if case.peer else loss_sum


def make_draw(case):
    """A function that draws the next batch, as train.py does, from random tokens or patches: -> (Batch, its targets)."""
    c, generator = case.config, torch.Generator().manual_seed(0)
    if c.patch:
        images = torch.randn(4 * case.batch, c.length, c.values, generator=generator)
    else:
        tokens = np.random.default_rng(0).integers(c.vocab, size=64 * case.batch * c.length, dtype=np.uint32)
        sequences = Sequences(tokens, c.length, 0, seed=0)
    seen = 0

    def draw():
        nonlocal seen
        if c.patch:
            tokens = images[torch.arange(seen, seen + case.batch) % len(images)]
        else:
            tokens = sequences.batch(seen, case.batch)
        seen += case.batch
        batch = draw_batch(case.objective, case.path, tokens, c.vocab, generator, "bert")
        return batch, float(batch.total[0])

    return draw


def set_up(case, device, clock=time.perf_counter):
    """Build the model and the optimiser of a case -> (run, model); run(steps) returns the seconds of one step."""
    torch.manual_seed(0)
    model = (make_peer(case) if case.peer else Transformer(case.config)).to(device).train()
    settings = Settings()  # its learning rate, decay and clipping
    optimizer, loss_function, draw = make_optimizer(model, settings), make_loss(case), make_draw(case)
    if case.compiled:
        # Each case has a cache of its own, where this version of PyTorch has an option for that.
        apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
        loss_function = torch.compile(loss_function, dynamic=False, **apart)
    loss_module = LossModule(model, loss_function)

    def autocast():
        return torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32)

    def ready(_):
        batch, count = draw()
        return (batch.pinned() if device.type == "cuda" else batch), count

    batches = ahead(ready, itertools.count())

    def run(steps):
        synchronize(device)
        start = clock()
        for batch, count in itertools.islice(batches, steps):
            update(loss_module, optimizer, [batch], count, case.path, autocast, settings.clip)
        synchronize(device)
        return (clock() - start) / steps

    return run, model


def synchronize(device):
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---------------------------------------------------------------------------- what a step needs

def step_flops(case):
    """FLOPs of the matrix products of one step: by the formula for this project's models, counted for peers."""
    if not case.peer:
        S = case.config.length
        rows = case.objective.max_targets(S), S - case.objective.min_targets(S)
        return case.batch * flops_per_sequence(case.config, case.path, S, *rows)
    one = replace(case, batch=1)
    return case.batch * counted_flops(one, make_peer(one))


def linear_flops(x_shape, weight_shape, *_, **__):
    """Of model.product's kernel, which PyTorch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]


ONEDNN = {torch.ops.mkldnn._linear_pointwise: linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}


def counted_flops(case, model):
    """The FLOPs that PyTorch counts in the matrix products of a step on the CPU. The products of two activations, which
    are attention's, count half on the causal path: the counter knows no triangles."""
    batch, _ = make_draw(case)()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:  # it does not know the fused CPU kernel
        make_loss(case)(model, batch, case.path).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return sum(flops * (0.5 if case.path == "causal" and "bmm" in op else 1) for op, flops in counts.items())


def matrix_product(device, dtype, clock=time.perf_counter):
    """A function that returns the FLOP/s of the fastest of a few large matrix products."""
    repeats = 1 if device.type == "cpu" else 20
    factors = [torch.randn(2, n, n, device=device).to(dtype) for n in SIDES[device.type == "cpu"]]
    kernels = [F.linear]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN. For float32 PyTorch takes MKL, which leaves half of an AMD processor's width unused.
        kernels.append(lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))

    def best():
        speeds = []
        for (x, weight), kernel in itertools.product(factors, kernels):
            for _ in range(3):
                synchronize(device)
                start = clock()
                for _ in range(repeats):
                    kernel(x, weight)
                synchronize(device)
                speeds.append(2 * len(x) ** 3 * repeats / (clock() - start))
        return max(speeds)

    return best


def cpu_memory(case):
    """Bytes by which the resident memory of a fresh process grows at most over three steps of the case, None where the
    system does not say. Without torch.compile: the compiler itself takes more than the steps."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(growth_over_steps, replace(case, compiled=False)).result()


def growth_over_steps(case):
    """What cpu_memory returns, for the process that calls this."""
    device, c = choose_device("cpu"), case.config
    small = replace(c, layers=1, width=32, heads=2, vocab=c.vocab and 16, decoder=c.decoder and (1, 32, 2))
    set_up(replace(case, batch=1, config=small), device)[0](1)  # so that loading libraries does not count
    before = resident_peak()
    run, _ = set_up(case, device)
    run(3)
    return before and resident_peak() - before


def resident_peak():
    """The largest resident memory of this process so far in bytes, or None."""
    try:  # on Linux getrusage includes what the parent had
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        pass
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    except ImportError:
        return None


# ---------------------------------------------------------------------------- rounds

def in_turn(functions, rounds, quiet=True):
    """Call functions {name: function} one after the other, `rounds` times over -> {name: [value of each round]}."""
    values = {name: [] for name in functions}
    for _ in tqdm(range(rounds), desc="rounds", disable=quiet or not sys.stderr.isatty()):
        for name, function in functions.items():
            values[name].append(function())
    return values


def measure(cases, device, rounds, clock=time.perf_counter, quiet=True):
    """Time the cases against each other -> ([a dict for each case], {dtype name: FLOP/s of a matrix product})."""
    torch.set_float32_matmul_precision("high")
    if any(case.compiled for case in cases):
        torch.compiler.config.force_disable_caches = True            # the time to the first step is that of a first run
        torch.compile(torch.neg)(torch.zeros(1, device=device))      # starting the compiler is nobody's time
    results, functions = [], {}
    for number, case in enumerate(tqdm(cases, desc="warm-up", disable=quiet or not sys.stderr.isatty())):
        memory = None
        if device.type == "cpu":
            memory = cpu_memory(case)
        elif device.type == "cuda":
            before = torch.cuda.memory_allocated()
        flops = step_flops(case)
        run, model = set_up(case, device, clock)
        start = time.perf_counter()
        run(1)
        first = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        warm = min(run(1), run(1))  # seconds
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() - before
        steps = min(max(1, math.ceil(SECONDS / warm)), 100)
        functions[number] = lambda run=run, steps=steps: run(steps)
        c = case.config
        results.append({
            "name": case.name, "objective": describe(case.objective), "path": case.path, "peer": case.peer,
            "dtype": NAMES[case.dtype], "compiled": case.compiled, "batch": case.batch, "length": c.length,
            "layers": c.layers, "width": c.width, "parameters": sum(p.numel() for p in model.parameters()),
            "first_step_seconds": first, "flops_per_step": flops, "peak_memory": memory, "steps_per_round": steps})
    kinds = dict.fromkeys(case.dtype for case in cases)
    products = {NAMES[dtype]: matrix_product(device, dtype, clock) for dtype in kinds}
    graphs = graphs_compiled()
    values = in_turn({**functions, **products}, rounds, quiet)
    if graphs_compiled() != graphs:
        raise RuntimeError("a step was compiled again after the warm-up; these times mean nothing")
    peaks = {name: statistics.median(values[name]) for name in products}
    for number, (case, result) in enumerate(zip(cases, results)):
        seconds = values[number]
        median = statistics.median(seconds)
        result.update(ms_per_step=1e3 * median, ms_rounds=[1e3 * s for s in seconds],
                      sequences_per_second=case.batch / median,
                      tokens_per_second=case.batch * case.config.length / median,
                      mfu=result["flops_per_step"] / median / peaks[result["dtype"]])
    return results, peaks


def loop_share(case, args, device, rounds):
    """The speed of train.py's loop - with its real data, schedule, log lines and resumable state, but not its validation and
    checkpoints, which have times of their own - as a share of the speed of the bare step. One number for each round."""
    images, objective = bool(case.config.patch), case.objective
    flag = next(flag for flag, kind in OBJECTIVES.items() if type(objective) is kind)  # vl is a kind of mlm
    size = {"size": args.size, "patch": args.patch, "data": "shapes"} if images else {"length": args.length, "data": "pydoc"}
    settings = Settings(objective=flag, t=getattr(objective, "t", None), mask=getattr(objective, "mask", None), streams=args.streams,
                        preset=args.preset, batch_size=args.batch_size, micro_batch=args.batch_size, steps=1, **size)
    config, *_ = load_examples(settings, case.path, None)

    def loop(steps):
        with TemporaryDirectory() as out:
            train(replace(settings, steps=10 + steps), out, device=device, dtype=NAMES[case.dtype], compiled=case.compiled,
                  eval_every=10 ** 9, save_every=10 ** 9, quiet=True)
            lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "seconds" in line]
        return (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])

    run, _ = set_up(replace(case, config=config), device)
    warm = min(run(1) for _ in range(3))
    steps = 10 * math.ceil(6 * SECONDS / warm / 10)
    seconds = in_turn({"bare": lambda: run(steps), "loop": lambda: loop(steps)}, rounds)
    return [bare / loop for bare, loop in zip(seconds["bare"], seconds["loop"])]


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def compare(result, other):
    """How many times as fast `result` is as `other`, with the range over the rounds; ratios of memory and FLOPs."""
    each = [b / a for a, b in zip(result["ms_rounds"], other["ms_rounds"])]
    memory = result["peak_memory"] and other["peak_memory"] and result["peak_memory"] / other["peak_memory"]
    return {"name": result["name"], "dtype": result["dtype"], "other": other["name"], "other_dtype": other["dtype"],
            "speed": other["ms_per_step"] / result["ms_per_step"], "speed_low": min(each), "speed_high": max(each),
            "memory": memory, "flops": result["flops_per_step"] / other["flops_per_step"]}


def doubled(case):
    """{what is doubled: the case with it}. Images double in their side, and with the width the number of heads."""
    c = case.config
    changes = {"image side" if c.patch else "length": {"length": (4 if c.patch else 2) * c.length},
               "layers": {"layers": 2 * c.layers}, "width": {"width": 2 * c.width, "heads": 2 * c.heads}}
    cases = {name: replace(case, config=replace(c, **change)) for name, change in changes.items()}
    return {"batch": replace(case, batch=2 * case.batch), **cases}


# ---------------------------------------------------------------------------- tables

def print_results(results, images):
    unit = "images/s" if images else "tokens/s"
    print(f"{'':27s}{'ms/step':>9s}{'range':>16s}{unit:>10s}{'MFU':>7s}{'GFLOP':>9s}{'peak MB':>9s}{'first s':>9s}"
          f"{'params':>9s}")
    for r in results:
        rate = r["sequences_per_second" if images else "tokens_per_second"]
        memory = f"{r['peak_memory'] / 1e6:9.0f}" if r["peak_memory"] else f"{'?':>9s}"
        spread = f"{min(r['ms_rounds']):.1f}-{max(r['ms_rounds']):.1f}"
        print(f"{r['name'] + ' ' + r['dtype']:27s}{r['ms_per_step']:9.1f}{spread:>16s}{rate:10,.0f}{r['mfu']:7.1%}"
              f"{r['flops_per_step'] / 1e9:9.1f}{memory}{r['first_step_seconds']:9.2f}{r['parameters'] / 1e6:8.2f}M")


def print_ratios(ratios, title):
    if ratios:
        print(f"\n{title + ', range over rounds':65s}{'memory':>10s}{'FLOPs':>8s}")
    for r in ratios:
        memory = f"{r['memory']:9.2f}x" if r["memory"] else f"{'?':>10s}"
        what = f"{r['name']} {r['dtype']} / {r['other']} {r['other_dtype']}"
        spread = f"{r['speed_low']:.2f}-{r['speed_high']:.2f}"
        print(f"{what:45s}{r['speed']:6.2f}x{spread:>13s}{memory}{r['flops']:7.2f}x")


def print_growth(growth):
    if growth:
        print(f"\n{'twice the ...':40s}{'time':>8s}{'FLOPs':>8s}{'memory':>8s}{'MFU':>8s}")
    for g in growth:
        memory = f"{g['memory']:7.2f}x" if g["memory"] else f"{'?':>8s}"
        what = f"{g['objective']} {g['dtype']}, {g['doubled']}"
        print(f"{what:40s}{g['time']:7.2f}x{g['flops']:7.2f}x{memory}{g['mfu']:8.1%}")


def print_shares(shares):
    if shares:
        print(f"\n{'loop of train.py, of the speed of the bare step':50s}{'range':>16s}")
    for s in shares:
        print(f"{s['name'] + ' ' + s['dtype']:42s}{s['share']:8.1%}{min(s['rounds']):9.1%} -{max(s['rounds']):6.1%}")


# ---------------------------------------------------------------------------- command line

def dtypes(text):
    """An argparse type: 'fp32,bf16' -> ['fp32', 'bf16']."""
    names = text.split(",")
    if not set(names) <= set(NAMES.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not fp32, bf16 or fp32,bf16")
    return list(dict.fromkeys(names))


def make_cases(args, device):
    """The cases of this project that the arguments ask for."""
    images = args.preset in VIT_SIZES
    size = dict((VIT_SIZES if images else SIZES)[args.preset])
    size.update({name: value for name in ("layers", "width", "heads") if (value := getattr(args, name)) is not None})
    decoder = size.pop("decoder", ())
    if images:
        side, patch = (getattr(args, name) or PRESETS[args.preset][name] for name in ("size", "patch"))
        if side % patch:
            raise BadInput(f"--size {side} is not a multiple of --patch {patch}")
        size.update(vocab=0, length=(side // patch) ** 2, patch=patch, mean=(0.5,) * 3, std=(0.25,) * 3)
    else:
        size.update(vocab=args.vocab or 4096, length=args.length)
    flags = list(dict.fromkeys(args.objectives.split(",")))
    given = {flag: {"mask": mask} for flag, mask in IMAGE_MASKS.items()} if images else {}
    for name, owner in (("t", "dar"), ("mask", "vl" if args.mask and len(args.mask) > 1 else "mlm")):
        if value := getattr(args, name):
            given[owner] = {name: value}
            if owner not in flags:
                raise BadInput(f"--{name} {show(value)} is for {owner}, which --objectives {args.objectives} leaves out")
    dtype_list = [choose_dtype(device, name) for name in args.dtype or [None]]
    compiled = device.type == "cuda" if args.compile is None else args.compile
    cases = []
    for flag in flags:
        objective = from_options(flag, **given.get(flag, {}))
        path = choose_path(objective, args.streams, images)
        config = Config(**size, decoder=decoder if path == "mae" else ())
        objective.check(config.length)
        cases += [Case(objective, path, config, args.batch_size, dtype, compiled=compiled) for dtype in dtype_list]
    return cases


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--objectives", default="ar,dar,mlm,vl", metavar="A,B,...", help="what to time")
    add_options(parser)
    parser.add_argument("--streams", type=int, choices=(1, 2), help="2 runs every objective through two streams")
    size = parser.add_argument_group("size")
    size.add_argument("--preset", default="mini", choices=(*SIZES, *VIT_SIZES), help="layers, width and heads; vit: images")
    for name in ("layers", "width", "heads"):
        size.add_argument(f"--{name}", type=positive, help="instead of the preset's")
    size.add_argument("--length", type=positive, default=128, help="text: tokens in a sequence")
    size.add_argument("--vocab", type=positive, help="text: different ids (default: 4096)")
    size.add_argument("--size", type=positive, help="images: side in pixels (default: the preset's)")
    size.add_argument("--patch", type=positive, help="images: side of a patch in pixels (default: the preset's)")
    size.add_argument("--batch-size", type=positive, default=16, help="sequences or images per step")
    parser.add_argument("--peers", action="store_true", help="also transformers' models of the same size")
    parser.add_argument("--scaling", action="store_true", help="also length, batch, layers and width doubled, each alone")
    parser.add_argument("--loop", action="store_true", help="also the loop of train.py, on pydoc or the drawn shapes")
    parser.add_argument("--rounds", type=positive, default=5, help="times that everything is timed in turn")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time of this process, for a CPU that is shared with other work")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--dtype", type=dtypes, help="fp32, bf16 or fp32,bf16 (default: bf16 where it is faster)")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile (default: on CUDA)")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the results as one JSON object; - for standard output")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    if args.clock == "cpu" and device.type != "cpu":
        raise BadInput(f"--clock cpu says nothing about the time on {device.type}; leave it out")
    if args.loop and (other := [name for name in ("layers", "width", "heads", "vocab") if getattr(args, name)]):
        raise BadInput(f"--loop times train.py, whose sizes are the presets' and pydoc's; leave out --{other[0]}")
    if args.loop and args.clock == "cpu":
        raise BadInput("--clock cpu does not go with --loop: train.py reports the time of the wall")
    ours = make_cases(args, device)
    peers = {case: replace(case, peer=True) for case in ours if args.peers and has_peer(case)}
    larger = {case: doubled(case) for case in ours if args.scaling}
    cases = list(dict.fromkeys([*ours, *peers.values(), *(c for group in larger.values() for c in group.values())]))
    results, peaks = measure(cases, device, args.rounds, CLOCKS[args.clock], quiet=False)
    of = dict(zip(cases, results))

    ratios = [compare(of[case], of[peer]) for case in ours for other, peer in peers.items()
              if other.objective == case.objective and other.dtype in (case.dtype, torch.float32)]
    causal = {case.dtype: case for case in ours if case.path == "causal"}
    own = [compare(of[case], of[causal[case.dtype]]) for case in ours if case.path != "causal" and case.dtype in causal]
    growth = []
    for case, what, larger_case in ((case, *item) for case, group in larger.items() for item in group.items()):
        r = compare(of[larger_case], of[case])
        growth.append({"objective": of[case]["name"], "dtype": of[case]["dtype"], "doubled": what, "time": 1 / r["speed"],
                       "flops": r["flops"], "memory": r["memory"], "mfu": of[larger_case]["mfu"]})
    shares = [{"name": case.name, "dtype": NAMES[case.dtype], "share": statistics.median(share), "rounds": share}
              for case in ours if args.loop for share in [loop_share(case, args, device, args.rounds)]]
    c, name = ours[0].config, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if args.json != "-":
        data = f"{c.length} patches of {c.patch} x {c.patch}" if c.patch else f"sequence {c.length}, vocabulary {c.vocab:,}"
        print(f"{c.layers} layers, {c.width} wide, {c.heads} heads, {data}, batch {args.batch_size}; {name}, threads: "
              f"{torch.get_num_threads()}{', compiled' if ours[0].compiled else ''}; medians of {args.rounds} rounds"
              f"{', processor time' if args.clock == 'cpu' else ''}")
        print("matrix product: " + ", ".join(f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in peaks.items()), "\n")
        print_results([of[case] for case in (*ours, *dict.fromkeys(peers.values()))], bool(c.patch))
        print_ratios(ratios, "times as fast as the peer")
        print_ratios(own, "times as fast as the causal path")
        print_growth(growth)
        print_shares(shares)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {
        "command": "bench.py", "settings": settings, "device": name, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "matrix_product_flops": peaks, "results": results, "ratios": ratios,
        "against_causal": own, "scaling": growth, "loop": shares})
    return 0


if __name__ == "__main__":
    command_line(main)
