"""How fast a training step is: throughput, memory, FLOP utilisation, other models' too, and how costs grow.

    python bench.py                                     ar, dar, mlm and vl at 4 layers x 256
    python bench.py --peers --dtype fp32,bf16           against Hugging Face's models of the same size
    python bench.py --scaling                           sequence length, batch, layers, width doubled in turn
    python bench.py --loop                              how close the loop of train.py is to the bare step
    python bench.py --peer-nanogpt DIR                  against nanoGPT, from a clone of it in DIR
    python bench.py --preset vit-tiny --objectives mlm --batch-size 64 --peers        images: MAE
    python bench.py --report gpu.json --minutes 9       all that is worth knowing of a GPU, one table

A step is that of train.py: a batch drawn ahead by a thread, loss, gradients, clipping, fused AdamW. All that
is compared lives in one process and runs in turn, A B C A B C ..., so that whatever else the machine does
slows all of it alike. Times are medians over these rounds, after a warm-up, with the range over the rounds
beside them. Tokens are random ids. Peak memory is what a step needs above the loaded libraries, on a CPU in a
process of its own.

MFU, model FLOP utilisation, is the FLOPs of the step's matrix products over its time, over the speed of a
large matrix product that is measured here, in the same rounds, device, precision and number of threads.
Causal attention counts half of its square for every model.

The peers are transformers' models with random weights and their usual shape: dropout 0, feed-forward 4 x
width with GELU (here: GEGLU, 2 x width after the gate), `sdpa` attention where they have it (XLNet has not).
They get the same batches, optimiser, clipping, precision (autocast) and compiler, and read their inputs from
the same Batch. So the ratios compare what a user gets from either at the same width, depth and
vocabulary, and the ratio of FLOPs says how much of it is less work.

    causal      GPT2LMHeadModel       scores every position
    mask        BertForMaskedLM       scores every position, hidden or not
    two-stream  XLNetLMHeadModel      perm_mask and target_mapping from the same f; relative positions
    mae         ViTMAEForPreTraining  draws its own masks, of the same ratio; 4 x width in the decoder too
"""

import argparse
import statistics
import time

import torch

from engine.machine import choose_device, choose_dtype
from engine.settings import IMAGE_OPTIONS, PRESETS
from experiments.gpu import write_report
from experiments.peers import peers_of
from experiments.speed import NAMES, Case, doubled, loop_share, processor, speed_ratio, time_cases
from model import SIZES, VIT_SIZES, Config
from objectives import OBJECTIVES, add_options, choose_path, from_options, options_of
from support.cli import BadInput, Parser, command_line, output_file, positive, real, told, write_json
from support.options import share_options

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ---------------------------------------------------------------------------- tables

def print_results(results, images):
    unit = "images/s" if images else "tokens/s"
    titles = (f"{'':27s}{'ms/step':>9s}{'range':>16s}{unit:>10s}{'MFU':>7s}",
              f"{'GFLOP':>9s}{'peak MB':>9s}{'first s':>9s}{'params':>9s}")
    print("".join(titles))
    for r in results:
        rate = r["sequences_per_second" if images else "tokens_per_second"]
        memory = f"{r['peak_memory'] / 1e6:9.0f}" if r["peak_memory"] else f"{'?':>9s}"
        spread = f"{min(r['ms_rounds']):.1f}-{max(r['ms_rounds']):.1f}"
        name = f"{r['name']} {r['dtype']}"
        print(f"{name:27s}{r['ms_per_step']:9.1f}{spread:>16s}{rate:10,.0f}{r['mfu']:7.1%}"
              f"{r['flops_per_step'] / 1e9:9.1f}{memory}{r['first_step_seconds']:9.2f}"
              f"{r['parameters'] / 1e6:8.2f}M")


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
        print(f"{s['name'] + ' ' + s['dtype']:42s}{s['share']:8.1%}{min(s['rounds']):9.1%} "
              f"-{max(s['rounds']):6.1%}")


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
    size.update({name: value for name in ("layers", "width", "heads")
                 if (value := getattr(args, name)) is not None})
    decoder = size.pop("decoder", ())
    if images:
        side, patch = (getattr(args, name) or PRESETS[args.preset][name] for name in ("size", "patch"))
        if side % patch:
            raise BadInput(f"--size {side} is not a multiple of --patch {patch}")
        size.update(vocab=0, length=(side // patch) ** 2, patch=patch, mean=(0.5,) * 3, std=(0.25,) * 3)
    else:
        size.update(vocab=args.vocab or 4096, length=args.length)
    dtype_list = [choose_dtype(device, name) for name in args.dtype or [None]]
    compiled = device.type == "cuda" if args.compile is None else args.compile
    cases = []
    for objective in chosen(args, images):
        path = choose_path(objective, args.streams, images)
        config = Config(**size, decoder=decoder if path == "mae" else ())
        objective.check(config.length)
        cases += [Case(objective, path, config, args.batch_size, dtype, compiled=compiled)
                  for dtype in dtype_list]
    return cases


def chosen(args, images):
    """The objectives of --objectives, each with those of the given options that it has."""
    flags = list(dict.fromkeys(args.objectives.split(",")))
    for name in flags:
        if name not in OBJECTIVES:
            raise BadInput(f"there is no objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    given, defaults = options_of(vars(args)), IMAGE_OPTIONS if images else {}
    ours = share_options(OBJECTIVES, flags, given)
    if "mask" in given and {"mlm", "vl"} <= set(flags):  # a range is for vl, a ratio for mlm
        ours["mlm" if len(given["mask"]) > 1 else "vl"].pop("mask")
    return [from_options(name, **{**defaults.get(name, {}), **ours[name]}) for name in flags]


def bench_parser():
    """One flag for each thing that can be varied, and the options of the objectives."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--objectives", default="ar,dar,mlm,vl", metavar="A,B,...", help="what to time")
    add("--streams", type=int, choices=(1, 2), help="2 runs every objective through two streams")
    size = parser.add_argument_group("size").add_argument
    size("--preset", default="mini", choices=(*SIZES, *VIT_SIZES),
         help="layers, width and heads; vit: images")
    for name in ("layers", "width", "heads"):
        size(f"--{name}", type=positive, help="instead of the preset's")
    size("--length", type=positive, default=128, help="text: tokens in a sequence")
    size("--vocab", type=positive, help="text: different ids (default: 4096)")
    size("--size", type=positive, help="images: side in pixels (default: the preset's)")
    size("--patch", type=positive, help="images: side of a patch in pixels (default: the preset's)")
    size("--batch-size", type=positive, default=16, help="sequences or images per step")
    add("--peers", action="store_true", help="also transformers' models of the same size")
    add("--peer-nanogpt", metavar="DIR", help="also nanoGPT, of which DIR is a clone")
    add("--scaling", action="store_true", help="also length, batch, layers and width doubled, each alone")
    add("--loop", action="store_true", help="also the loop of train.py, on pydoc or the drawn shapes")
    add("--report", type=output_file, metavar="FILE",
        help="instead: all that is worth knowing of a GPU, as JSON")
    add("--minutes", type=real, default=9, help="of --report: after these it begins nothing new")
    add("--rounds", type=positive, default=5, help="times that everything is timed in turn")
    add("--clock", choices=CLOCKS, default="wall",
        help="cpu: processor time of this process, for a CPU that is shared with other work")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--threads", type=positive, help="of a CPU (default: as PyTorch chooses)")
    add("--dtype", type=dtypes, help="fp32, bf16 or fp32,bf16 (default: bf16 where it is faster)")
    add("--compile", action="store_true", default=None, help="torch.compile (default: on CUDA)")
    add("--no-compile", dest="compile", action="store_false")
    add("--json", type=output_file, metavar="FILE",
        help="write the results as one JSON object; - for standard output")
    add_options(parser)
    return parser


def check(args, device):
    """Refuse flags that do not go together."""
    if args.clock == "cpu" and device.type != "cpu":
        raise BadInput(f"--clock cpu says nothing about the time on {device.type}; leave it out")
    if args.loop and (other := [name for name in ("layers", "width", "heads", "vocab")
                                if getattr(args, name)]):
        raise BadInput(f"--loop times train.py, whose sizes are the presets' and pydoc's; leave out "
                       f"--{other[0]}")
    if args.loop and args.clock == "cpu":
        raise BadInput("--clock cpu does not go with --loop: train.py reports the time of the wall")


def run_cases(args, device):
    """Time everything that is asked for in one interleaved run -> a dict of results and ratios, for
    --json."""
    ours = make_cases(args, device)
    peers = {case: peers_of(case, args.peers, args.peer_nanogpt) for case in ours}
    larger = {case: doubled(case) for case in ours if args.scaling}
    cases = [*ours, *(p for group in peers.values() for p in group),
             *(c for group in larger.values() for c in group.values())]
    cases = list(dict.fromkeys(cases))
    results, peaks = time_cases(cases, device, args.rounds, CLOCKS[args.clock], quiet=False)
    of = dict(zip(cases, results))

    def same_task(case, other):
        return other.objective == case.objective and other.dtype in (case.dtype, torch.float32)

    others = list(dict.fromkeys(p for group in peers.values() for p in group))
    causal = {case.dtype: case for case in ours if case.path == "causal"}
    growth = []
    for case, group in larger.items():
        for what, larger_case in group.items():
            r = speed_ratio(of[larger_case], of[case])
            growth.append({"objective": of[case]["name"], "dtype": of[case]["dtype"], "doubled": what,
                           "time": 1 / r["speed"], "flops": r["flops"], "memory": r["memory"],
                           "mfu": of[larger_case]["mfu"]})
    shares = []
    for case in ours if args.loop else ():
        share = loop_share(case, args.preset, device, args.rounds)
        shares.append({"name": case.name, "dtype": NAMES[case.dtype], "share": statistics.median(share),
                       "rounds": share})
    return {"matrix_product_flops": peaks, "results": results,
            "shown": [of[case] for case in (*ours, *others)],
            "ratios": [speed_ratio(of[case], of[other]) for case in ours for other in others
                       if same_task(case, other)],
            "against_causal": [speed_ratio(of[case], of[causal[case.dtype]])
                               for case in ours if case.path != "causal" and case.dtype in causal],
            "scaling": growth, "loop": shares, "config": vars(ours[0].config), "compiled": ours[0].compiled}


def print_all(found, args, name):
    """What was found, for a person."""
    c = Config(**found["config"])
    data = f"sequence {c.length}, vocabulary {c.vocab:,}"
    if c.patch:
        data = f"{c.length} patches of {c.patch} x {c.patch}"
    compiled, clock = ", compiled" * found["compiled"], ", processor time" * (args.clock == "cpu")
    print(f"{c.layers} layers, {c.width} wide, {c.heads} heads, {data}, batch {args.batch_size}; {name}, "
          f"threads: {torch.get_num_threads()}{compiled}; medians of {args.rounds} rounds{clock}")
    peaks = (f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in found["matrix_product_flops"].items())
    print("matrix product:", ", ".join(peaks), "\n")
    print_results(found["shown"], bool(c.patch))
    print_ratios(found["ratios"], "times as fast as the peer")
    print_ratios(found["against_causal"], "times as fast as the causal path")
    print_growth(found["scaling"])
    print_shares(found["loop"])


def main(argv=None):
    """The command line, of `argv` or sys.argv -> 0. Prints what was timed, or with --json the object
    {"command", "settings", "device", "threads", "torch", and what `run_cases` returns}; with --report the
    file of experiments/gpu.py. BadInput: shapes that do not fit, a device or a peer that is not there.
    """
    args = bench_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    check(args, device)
    with told("bench"):
        if args.report:
            return write_report(args.report, device, args.minutes, args.peer_nanogpt)
        found = run_cases(args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor() or device.type
    if args.json != "-":
        print_all(found, args, name)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, {"command": "bench.py", "settings": settings, "device": name,
                           "threads": torch.get_num_threads(), "torch": torch.__version__,
                           **{key: value for key, value in found.items() if key != "shown"}})
    return 0


if __name__ == "__main__":
    command_line(main)
