"""The machinery of bench.py: what is timed (Case), one training step of it, its FLOPs and memory, and rounds
in turn."""
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

from data import Sequences
from engine.machine import LossModule, choose_device, flops_per_sequence, peak_flops
from engine.runs import load_examples
from engine.settings import resolve
from engine.steps import ahead, make_optimizer
from experiments.peers import make_peer, peer_inputs, peer_name
from model import Config, Transformer
from objectives import describe, draw_batch, flag, loss_sum
from support.cli import progress
from support.kernels import cpu_info
from train import train, update

SECONDS = 0.5  # that one case runs in one round, at least
# sides of the reference product's matrices, on a CPU and elsewhere
SQUARES = {True: (1024, 2048), False: (4096, 8192)}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One thing to time: an objective, or a peer that does the same, at one size and precision."""

    objective: object
    path: str
    config: Config
    batch: int               # sequences per step
    dtype: torch.dtype
    peer: str = ""           # "transformers", or the folder of nanoGPT
    compiled: bool = False

    @property
    def name(self):
        two = " two-stream" if self.path == "two-stream" and self.objective.one_stream else ""
        return peer_name(self) if self.peer else describe(self.objective) + two


# ---------------------------------------------------------------------------- one step

def make_loss(case):
    """A function of (model, batch, path) that returns the sum of the losses over the targets: loss_sum, or
    the peer's."""
    def peers(model, batch, path):
        out = model(**peer_inputs(batch, case))
        return (out[1] if isinstance(out, tuple) else out.loss) * batch.total[0]  # their loss is the mean

    return peers if case.peer else loss_sum


def make_draw(case):
    """A function that draws the next batch, as train.py does, from random tokens or patches: -> (Batch, its
    targets)."""
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
    """Build the model and the optimiser of a case -> (run, model); run(steps) returns the seconds of one
    step."""
    torch.manual_seed(0)
    model = (make_peer(case) if case.peer else Transformer(case.config)).to(device).train()
    settings = resolve(optimizer="adamw")  # its learning rate, decay and clipping, alike for all
    optimizer, loss_function, draw = make_optimizer(model, settings), make_loss(case), make_draw(case)
    if case.compiled:
        # Each case has a cache of its own, where this version of PyTorch has an option for that.
        known = inspect.signature(torch.compile).parameters
        apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
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


def processor():
    """The name of this machine's processor, where Linux says it, and which kernels PyTorch takes on it."""
    found = re.search(r"model name\s*:\s*(.+)", cpu_info())
    return f"{found[1]}, {torch.backends.cpu.get_cpu_capability()} kernels" if found else ""


def synchronize(device):
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---------------------------------------------------------------------------- what a step needs

def step_flops(case):
    """FLOPs of the matrix products of one step: by the formula for this project's models, counted for
    peers."""
    if not case.peer:
        S = case.config.length
        rows = case.objective.max_targets(S), S - case.objective.min_targets(S)
        return case.batch * flops_per_sequence(case.config, case.path, S, *rows)
    one = replace(case, batch=1)
    return case.batch * counted_flops(one, make_peer(one))


def linear_flops(x_shape, weight_shape, *_, **__):
    """Of model.product's kernel, which PyTorch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]


ONEDNN = {}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    ONEDNN[torch.ops.mkldnn._linear_pointwise] = linear_flops


def counted_flops(case, model):
    """The FLOPs that PyTorch counts in the matrix products of a step on the CPU. The products of two
    activations, which are attention's, count half on the causal path: the counter knows no triangles."""
    batch, _ = make_draw(case)()
    # The counter does not know the fused CPU kernel of attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
        make_loss(case)(model, batch, case.path).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return sum(flops * (0.5 if case.path == "causal" and "bmm" in op else 1) for op, flops in counts.items())


def matrix_product(device, dtype, clock=time.perf_counter):
    """A function that returns the FLOP/s of the fastest of a few large matrix products."""
    repeats = 1 if device.type == "cpu" else 20
    factors = [torch.randn(2, n, n, device=device).to(dtype) for n in SQUARES[device.type == "cpu"]]
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
    """Bytes by which the resident memory of a fresh process grows at most over three steps of the case, None
    where the system does not say. Without torch.compile: the compiler itself takes more than the steps."""
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
    """Call functions {name: function} one after the other, `rounds` times over -> {name: [value of each
    round]}."""
    values = {name: [] for name in functions}
    for _ in progress(range(rounds), quiet, desc="timing", unit=" rounds"):
        for name, function in functions.items():
            values[name].append(function())
    return values


def time_cases(cases, device, rounds, clock=time.perf_counter, quiet=True):
    """Time the cases against each other -> ([a dict for each case], {dtype name: FLOP/s of a matrix
    product})."""
    torch.set_float32_matmul_precision("high")
    if any(case.compiled for case in cases):
        # the time to the first step is that of a first run
        torch.compiler.config.force_disable_caches = True
        torch.compile(torch.neg)(torch.zeros(1, device=device))      # starting the compiler is nobody's time
    results, functions = [], {}
    for number, case in enumerate(progress(cases, quiet, desc="warm-up", unit=" cases")):
        result, functions[number] = warm_up(case, device, clock)
        results.append(result)
    products = {NAMES[dtype]: matrix_product(device, dtype, clock)
                for dtype in dict.fromkeys(c.dtype for c in cases)}
    graphs = graphs_compiled()
    values = in_turn({**functions, **products}, rounds, quiet)
    if graphs_compiled() != graphs:
        raise RuntimeError("a step was compiled again after the warm-up; these times mean nothing")
    peaks = {name: statistics.median(values[name]) for name in products}
    sheet = peak_flops(device)
    for number, (case, result) in enumerate(zip(cases, results)):
        median, flops = statistics.median(values[number]), result["flops_per_step"]
        result.update(ms_per_step=1e3 * median, ms_rounds=[1e3 * s for s in values[number]],
                      sequences_per_second=case.batch / median,
                      tokens_per_second=case.batch * case.config.length / median,
                      mfu=flops / median / peaks[result["dtype"]],
                      mfu_of_data_sheet=flops / median / sheet if sheet and case.dtype == torch.bfloat16
                      else None)
    return results, peaks


def warm_up(case, device, clock):
    """Run the first steps of a case -> (what is known of it by then, a function that runs one round)."""
    memory, on_gpu = None, device.type == "cuda"
    if device.type == "cpu":
        memory = cpu_memory(case)
    elif on_gpu:
        before = torch.cuda.memory_allocated()
    flops = step_flops(case)
    run, model = set_up(case, device, clock)
    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm = min(run(1), run(1))  # seconds
    if on_gpu:
        memory = torch.cuda.max_memory_allocated() - before
    steps = min(max(1, math.ceil(SECONDS / warm)), 100)
    c = case.config
    return {"name": case.name, "objective": describe(case.objective), "path": case.path, "peer": case.peer,
            "dtype": NAMES[case.dtype], "compiled": case.compiled, "batch": case.batch, "length": c.length,
            "layers": c.layers, "width": c.width, "parameters": sum(p.numel() for p in model.parameters()),
            "first_step_seconds": first, "flops_per_step": flops, "peak_memory": memory,
            "steps_per_round": steps}, lambda: run(steps)


def loop_share(case, preset, device, rounds):
    """The speed of train.py's loop - with its real data, schedule, log lines and resumable state, but not its
    validation and checkpoints, which have times of their own - as a share of the speed of the bare step. One
    number for each round."""
    c, objective = case.config, case.objective
    size = {"size": c.size, "patch": c.patch, "data": "shapes"} if c.patch else {"length": c.length,
                                                                                 "data": "pydoc"}
    settings = resolve(objective=flag(objective), options=dict(vars(objective)), preset=preset,
                       optimizer="adamw",
                       streams=2 if case.path == "two-stream" else None, batch_size=case.batch,
                       micro_batch=case.batch,
                       steps=1, **size)
    config, *_ = load_examples(settings, case.path, None)

    def loop(steps):
        with TemporaryDirectory() as out:
            train(replace(settings, steps=10 + steps), out, device=device, dtype=NAMES[case.dtype],
                  compiled=case.compiled, eval_every=10 ** 9, save_every=10 ** 9, quiet=True)
            lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "seconds" in line and line["step"] >= 10]
        return (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])

    run, _ = set_up(replace(case, config=config), device)
    warm = min(run(1) for _ in range(3))
    steps = 10 * math.ceil(6 * SECONDS / warm / 10)
    seconds = in_turn({"bare": lambda: run(steps), "loop": lambda: loop(steps)}, rounds)
    return [bare / loop for bare, loop in zip(seconds["bare"], seconds["loop"])]


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def speed_ratio(result, other):
    """How many times as fast `result` is as `other`, with the range over the rounds; ratios of memory and
    FLOPs."""
    each = [b / a for a, b in zip(result["ms_rounds"], other["ms_rounds"])]
    memory = result["peak_memory"] and other["peak_memory"] and result["peak_memory"] / other["peak_memory"]
    return {"name": result["name"], "dtype": result["dtype"], "other": other["name"],
            "other_dtype": other["dtype"],
            "speed": other["ms_per_step"] / result["ms_per_step"], "speed_low": min(each),
            "speed_high": max(each),
            "memory": memory, "flops": result["flops_per_step"] / max(1, other["flops_per_step"])}


def doubled(case):
    """{what is doubled: the case with it}. Images double in their side, and with the width the number of
    heads."""
    c = case.config
    changes = {"image side" if c.patch else "length": {"length": (4 if c.patch else 2) * c.length},
               "layers": {"layers": 2 * c.layers}, "width": {"width": 2 * c.width, "heads": 2 * c.heads}}
    cases = {name: replace(case, config=replace(c, **change)) for name, change in changes.items()}
    return {"batch": replace(case, batch=2 * case.batch), **cases}
