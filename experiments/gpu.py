"""`python bench.py --report FILE`: what is worth knowing of a GPU, the most telling first, in one table and
one file.

Every section is one interleaved run. What there is no time for is left out, and the table says so.
"""
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.machine import choose_dtype
from engine.settings import IMAGE_OPTIONS, PRESETS
from experiments.peers import peers_of
from experiments.speed import Case, in_turn, loop_share, make_draw, speed_ratio, synchronize, time_cases
from images.files import FileSet
from model import SIZES, VIT_SIZES, Config, Transformer
from objectives import PAPER, choose_path, from_options
from support.cli import import_optional, write_json

GOALS = ("ar at half of the data sheet's FLOP/s or more, and as fast as nanoGPT; dar at most 1.85 and mlm "
         "at most 0.75 "
         "of ar's time; train.py's loop at 97% of the bare step")


def write_report(file, device, minutes, nanogpt):
    """Run the sections in turn until the time is over; write FILE after each, print the table at the end."""
    start, found = time.perf_counter(), {}
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else device.type
    for title, section in sections(device, nanogpt, on_gpu):
        spent = (time.perf_counter() - start) / 60
        tqdm.write(f"{spent:5.1f} min  {title}", file=sys.stderr)
        if spent >= minutes:
            found[title] = {"left_out": f"no time left after {spent:.1f} minutes"}
        else:
            found[title] = attempt(section)
            if on_gpu:
                torch.cuda.empty_cache()
        write_json(file, {"command": "bench.py --report", "device": name, "torch": torch.__version__,
                          "goals": GOALS, "minutes": (time.perf_counter() - start) / 60, "sections": found})
    if file != "-":
        print(f"{name}, torch {torch.__version__}. Goals: {GOALS}\n")
        for title, content in found.items():
            print_section(title, content)
    return 0


def attempt(section):
    """What a section found, or how it failed: one that fails must not cost the others."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def sections(device, nanogpt, on_gpu):
    """[(title, function that returns what it found)], in order of importance; small sizes where there is no
    GPU."""
    big, base, vit = ("paper", "base", "vit-base") if on_gpu else ("tiny", "mini", "vit-tiny")
    short, long = ((128, 128), (1024, 16)) if on_gpu else ((32, 4), (64, 2))  # length, batch

    def speed(preset, size, compiled, peers=True):
        return lambda: timed(text_cases(preset, *size, device, compiled), device, nanogpt if peers else None,
                             peers)

    yield f"{big}, S = {short[0]}, compiled", speed(big, short, on_gpu)
    yield f"{big}, S = {long[0]}, compiled", speed(big, long, on_gpu)
    yield "the loop of train.py", lambda: {"shares": loop_shares(text_cases(base, *short, device,
                                                                            on_gpu)[:3], base, device)}
    yield "two streams, long sequences: FlexAttention against the dense mask", lambda: flex(device, on_gpu)
    yield f"{vit}, MAE, compiled", lambda: timed([image_case(vit, device, on_gpu, 128 if on_gpu else 4)],
                                                 device, None, True)
    yield f"{big}, S = {short[0]}, eager", speed(big, short, False, peers=False)
    yield f"{base}, S = {short[0]}, compiled", speed(base, short, on_gpu)
    yield f"{base}, S = {long[0]}, compiled", speed(base, long, on_gpu)
    yield "decoding JPEG files", lambda: decoding(512 if on_gpu else 64)


# ---------------------------------------------------------------------------- sections

def text_cases(preset, length, batch, device, compiled):
    """The paper's four objectives at a preset's size."""
    config, dtype = Config(32768 if device.type == "cuda" else 4096, length,
                           **SIZES[preset]), choose_dtype(device)
    made = [from_options(name) for name in PAPER]
    return [Case(objective, choose_path(objective), config, batch, dtype, compiled=compiled)
            for objective in made]


def image_case(preset, device, compiled, batch):
    """MAE at a preset's size."""
    settings, size = PRESETS[preset], VIT_SIZES[preset]
    config = Config(0, (settings["size"] // settings["patch"]) ** 2, **size, patch=settings["patch"],
                    mean=(0.5,) * 3,
                    std=(0.25,) * 3)
    return Case(from_options("mlm", **IMAGE_OPTIONS["mlm"]), "mae", config, batch, choose_dtype(device),
                compiled=compiled)


def timed(cases, device, nanogpt, transformers):
    """Cases and their peers in one interleaved run."""
    peers = {case: peers_of(case, transformers, nanogpt) for case in cases}
    everything = list(dict.fromkeys([*cases, *itertools.chain.from_iterable(peers.values())]))
    results, peaks = time_cases(everything, device, rounds=3)
    of = dict(zip(everything, results))
    return {"matrix_product_flops": peaks, "results": results,
            "ratios": [speed_ratio(of[case], of[peer]) for case in cases for peer in peers[case]]
            + [speed_ratio(of[case], of[cases[0]]) for case in cases[1:]]}


def loop_shares(cases, preset, device):
    """train.py's loop as a share of the bare step's speed."""
    return {case.name: statistics.median(loop_share(case, preset, device, rounds=3)) for case in cases}


def flex(device, on_gpu):
    """One forward and backward pass of two streams with block masks in the order of f, and with the S x S
    mask."""
    length, batch = (8192, 2) if on_gpu else (256, 1)
    config = Config(4096, length, **SIZES["base" if on_gpu else "tiny"])
    case = Case(from_options("dar"), "two-stream", config, batch, choose_dtype(device))
    drawn = make_draw(case)()[0].to(device)
    model = Transformer(config).to(device)

    autocast = torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32)

    def one(long):
        def run():
            synchronize(device)
            start = time.perf_counter()
            with autocast, torch.set_grad_enabled(on_gpu):  # there is no backward pass on a CPU
                x = model(drawn.tokens, drawn.groups, drawn.targets, "two-stream", cuts=drawn.cuts,
                          padded=False, long=long)
            if on_gpu:
                x.float().square().mean().backward()
                model.zero_grad()
            synchronize(device)
            return time.perf_counter() - start
        return run

    ways, memory = {"block masks": one(True), "dense mask": one(False)}, {}
    for name, run in ways.items():
        run()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run()
        memory[name] = torch.cuda.max_memory_allocated() if on_gpu else None
    seconds = {name: statistics.median(values) for name, values in in_turn(ways, 5).items()}
    return {"length": length, "batch": batch, "seconds": seconds, "peak_memory": memory,
            "times_as_fast": seconds["dense mask"] / seconds["block masks"]}


def decoding(count):
    """Images a second that the worker processes decode from photographs of 500 x 375 pixels, for 224 x
    224."""
    Image, rng = import_optional("PIL.Image"), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for k in range(16):  # smooth, as photographs are
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            files.append(str(Path(folder, f"{k}.jpg")))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(files[-1], quality=90)
        images = FileSet("made", tuple(files) * math.ceil(count / 16),
                         np.zeros(16 * math.ceil(count / 16), np.int64), (), 224)
        images.batch(range(64))  # starts the workers
        start = time.perf_counter()
        images.batch(range(len(images)))
        return {"images_per_second": len(images) / (time.perf_counter() - start), "cores": os.cpu_count()}


# ---------------------------------------------------------------------------- table

def print_section(title, content):
    """One section for a person; what has no table of its own is printed as it is."""
    print(f"## {title}")
    for r in content.get("results", ()):
        rate = r["mfu_of_data_sheet"]
        print(f"  {r['name']:28s}{r['ms_per_step']:9.2f} ms{r['tokens_per_second']:14,.0f} tokens/s"
              f"{r['mfu']:8.1%} of the product" + (f"{rate:8.1%} MFU" if rate else "")
              + (f"{r['peak_memory'] / 1e9:7.2f} GB" if r["peak_memory"] else "")
              + f"{r['first_step_seconds']:7.1f} s first")
    for r in content.get("ratios", ()):
        print(f"  {r['name']} / {r['other']}: {r['speed']:.2f} times as fast ({r['speed_low']:.2f} .. "
              f"{r['speed_high']:.2f}), "
              f"{r['flops']:.2f} of the FLOPs")
    rest = {key: value for key, value in content.items()
            if key not in ("results", "ratios", "matrix_product_flops")}
    if rest:
        print("  " + json.dumps(rest))
    print()
