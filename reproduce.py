"""Every table and figure of the paper by one command, its numbers beside ours, a verdict on each claim.

    python reproduce.py table7 --scale smoke                    proves the pipeline: minutes, no download
    python reproduce.py table7 --scale cpu --data-dir DIR       on your data; --tokens, --epochs: the budget
    python reproduce.py all --scale gpu --data-dir DIR --minutes 55
                                            begins no stage that would end later; run again to go on
    python reproduce.py all --scale paper --list                what it takes: data, hours, memory, disk
    python reproduce.py table7 --scale paper --data-dir DIR --dry-run             the exact commands
    python reproduce.py report --out results --readme README.md
                                            all results on one page, the verdicts in README.md

A target (experiments/tables.py, experiments/ours.py) is a table: its rows are models, its columns measures,
and each cell comes from stages. A stage is one command line of this project. Tables share stages, what is
there is not computed again, an interrupted training goes on, and several instances of this program share the
work. DIR holds, as far as the targets need it:

    text/       raw text or a token folder of data.py
    images/     class folders, CIFAR files or an image folder of data.py
    glue/       the official GLUE files
    transfer/   any number of image sets (optional; Table 6)
    other/      text of another kind (optional; Table 7)
    images100/, wikitext2/   ImageNet-100, WikiText-2 (paper scale)

Verdicts (experiments/verdicts.py). A claim is a difference that the paper, or where marked [ours] this
project, says is positive; its size in the paper's numbers is the effect that ours is judged against. The 95%
interval is over pretraining seeds and over test examples, both the same on both sides. Where classification
does not tell a pretrained network from an untrained one, nothing was measured; one seed proves nothing; one
claim of each target is primary, and Holm's correction runs over the primaries.
"""

import itertools
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from experiments import ours, tables
from experiments.pages import markdown, stages_of, write_pages, write_results
from experiments.running import (
    adopt,
    command,
    estimate_seconds,
    finished,
    measured_flops,
    readable,
    run,
    run_all,
)
from experiments.scales import RISK, SCALES
from experiments.stages import Place, with_needs
from support.cli import BadInput, Parser, command_line, duration, positive

TARGETS = {**tables.PAPERS, **ours.OURS}
ONCE = ("theory", "toy", "bridge", "recipe")  # these bring their own seeds


def place_of(scale, args):
    changes = {name: value for name in ("tokens", "epochs") if (value := getattr(args, name))}
    work = args.work or Path("runs", "reproduce", scale)
    return Place(scale, Path(os.path.abspath(args.data_dir or "DATA")), work,
                 replace(SCALES[scale], **changes), args.safer)


def seeds_of(place, name, args):
    if name in ONCE or (name, place.name) == ("table1", "paper"):  # public models, of which there is one each
        return 1
    return args.seeds or place.scale.seeds


def data_of(place, stages):
    """What the stages read from outside: paths in --data-dir, and names on the Hugging Face hub."""
    return sorted({arg for stage in stages for arg in stage.argv
                   if arg.startswith((f"{place.data}{os.sep}", "hf:"))})


def missing(place, stages):
    """Paths in --data-dir that the stages read and that are not there."""
    return [path for path in data_of(place, stages) if not path.startswith("hf:") and not Path(path).exists()]


def at_risk(place, stages):
    """Whether images are trained at the paper's rate, without clipping."""
    images = any("vit-" in " ".join(stage.argv) for stage in stages)
    return place.name == "paper" and not place.safer and images


# ---------------------------------------------------------------------------- what it takes

def show_list(scales, names, args):
    """What every target takes at each scale."""
    here = measured_flops()
    print(f"time here: at {here / 1e9:,.0f} GFLOP/s, 40% of what a product of matrices reaches on this "
          "machine, until stages have run")
    for scale in scales:
        place = place_of(scale, args)
        large = scale in ("gpu", "paper")
        print(f"\n{scale}: {place.scale.about}\n{'':16s} seeds  stages   done        here     longest   "
              "memory     disk" + "      one H100" * large + "   data")
        plans = {name: stages_of(place, TARGETS[name](place), seeds_of(place, name, args)) for name in names}
        if len(names) > 1:
            plans["all together"] = with_needs(itertools.chain.from_iterable(plans.values()))
        for name, stages in plans.items():
            show_line(place, name, stages, seeds_of(place, name, args) if name in TARGETS else "", here,
                      large, args.jobs or max(1, torch.cuda.device_count()))
        if at_risk(place, itertools.chain.from_iterable(plans.values())):
            print(f"note: {RISK}")


def show_line(place, name, stages, seeds, here, large, jobs):
    """One line of the list; `jobs` stages at a time, or one on as many GPUs."""
    left = [stage for stage in stages if not finished(stage)]
    seconds, there = estimate_seconds(stages, here), estimate_seconds(stages, place.scale.flops)
    to_go, longest = sum(seconds[stage.out] for stage in left) / jobs, max(seconds.values())
    memory = max(1, max(stage.memory for stage in stages) / 1e9)
    disk = max(0.1, sum(stage.disk for stage in left) / 1e9)
    hours = f"   {duration(sum(there[stage.out] for stage in left)):>11s}" * large
    data = ", ".join(x if x.startswith("hf:") else os.path.relpath(x) for x in data_of(place, stages))
    print(f"{name:16s} {seeds:>5} {len(stages):7d} {len(stages) - len(left):6d} {duration(to_go):>11s} "
          f"{duration(longest):>11s} {memory:5.0f} GB {disk:5,.1f} GB{hours}   {data or 'nothing'}")


# ---------------------------------------------------------------------------- carrying it out

def plans_of(place, names, args):
    """{target: (Table, stages)} of the targets whose data is there; where it is not, a note, or of one target
    an error."""
    plans = {}
    for name in names:
        table = TARGETS[name](place)
        stages = stages_of(place, table, seeds_of(place, name, args))
        if lacking := missing(place, stages):
            text = f"{name} at {place.name} scale reads {', '.join(lacking)}, which is not there" + (
                "" if args.data_dir else "; give the folder that holds it as --data-dir DIR")
            if len(names) == 1:
                raise BadInput(text)
            print(f"note: {text}; left out", file=sys.stderr)
        else:
            plans[name] = table, stages
    return plans


def carry_out(place, names, args):
    """Run what is missing of the targets and write their results. Returns the exit status."""
    plans = plans_of(place, names, args)
    everything = with_needs(itertools.chain.from_iterable(stages for _, stages in plans.values()))
    if at_risk(place, everything):
        print(f"note: {RISK}", file=sys.stderr)
    for stage in everything if args.adopt else ():
        adopt(stage, args.adopt)
    gpus = torch.cuda.device_count()
    jobs = args.jobs or max(1, gpus)
    start, total, ran = time.perf_counter(), sum(not finished(stage) for stage in everything), []

    def about(stage):
        seconds = estimate_seconds(everything, measured_flops())
        left = [one for one in everything if not finished(one)]
        to_go = sum(seconds[one.out] for one in left) / jobs
        print(f"[{total - len(left) + 1}/{total}, about {duration(to_go)} to go] "
              f"{readable(command(stage))}", file=sys.stderr)
        ran.append(stage)

    def may_begin(stage):
        seconds = estimate_seconds(everything, measured_flops())[stage.out]
        return not args.minutes or not ran or time.perf_counter() - start + seconds <= 60 * args.minutes

    def run_one(stage, environment, lock):
        run(stage, shlex.split(args.launcher or ""), environment, lock)

    for name, (table, stages) in plans.items():
        left = run_all(stages, args.launcher, jobs, gpus, run_one, about, may_begin)
        if left:
            print(f"the next stage would not be done after {args.minutes:g} minutes; "
                  f"{sum(not finished(s) for s in everything)} stages are left: the same command goes on",
                  file=sys.stderr)
            return 1
        print(markdown(write_results(place, name, table, seeds_of(place, name, args), args.out)))
    return int(len(plans) < len(names))


# ---------------------------------------------------------------------------- command line

def make_parser():
    """The target, and where and how its stages run."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=(*TARGETS, "all", "report"), nargs="?", help="a table or figure of "
                        "the paper, or beyond it: " + ", ".join(ours.OURS) + "; all; report: pages from "
                        "--out")
    parser.add_argument("--scale", choices=SCALES, help="smoke, cpu, gpu or paper (default: smoke; --list: "
                        "every one)")
    parser.add_argument("--seeds", type=positive, help="pretraining runs of each model (default: see --list)")
    parser.add_argument("--tokens", type=float, help="tokens that each text model reads (default: the "
                        "scale's, experiments/scales.py)")
    parser.add_argument("--epochs", type=float, help="epochs of each image model (default: the scale's)")
    parser.add_argument("--data-dir", help="folder of text/, glue/, images/ and what else the target needs")
    parser.add_argument("--list", action="store_true", help="show what each target takes: stages, time, "
                        "memory, disk, data")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the stages that are "
                        "not done")
    parser.add_argument("--minutes", type=float, help="begin no stage that would end later than that; the "
                        "next call goes on")
    parser.add_argument("--jobs", type=positive, help="stages at a time (default: one on each GPU)")
    parser.add_argument("--launcher", help='starts train.py in place of python, such as "torchrun '
                        '--nproc_per_node=8"')
    parser.add_argument("--safer", action="store_true", help="images: MAE's smaller rate, and clipping")
    parser.add_argument("--adopt", metavar="DIR", help="use finished run folders inside DIR that have the "
                        "settings of a stage")
    parser.add_argument("--work", type=Path, help="folder of the stages' results (default: "
                        "runs/reproduce/SCALE)")
    parser.add_argument("--out", type=Path, default=Path("results-mine"), help="folder of the tables")
    parser.add_argument("--readme", help="report: a file to write the verdicts into, between its markers")
    return parser


def main(argv=None):
    """The command line, of `argv` or sys.argv -> exit status: 1 where stages are left (--minutes) or targets
    were left out for want of data. Writes NAME-SCALE.json, .md and .png for each target. BadInput: a target
    that there is not, data that is not there, a stage that failed.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.target is None and not args.list:
        parser.print_help()
        return 0
    if args.target == "report":
        return write_pages(args.out, TARGETS, SCALES, args.readme)
    for name in ("tokens", "epochs", "minutes"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1e15:
            raise BadInput(f"--{name} {getattr(args, name):g} is not a positive number")
    names = list(TARGETS) if args.target in (None, "all") else [args.target]
    if args.list:
        return show_list([args.scale] if args.scale else SCALES, names, args)
    if args.data_dir and not Path(args.data_dir).is_dir():
        raise BadInput(f"--data-dir {args.data_dir} is not a folder")
    place = place_of(args.scale or "smoke", args)
    if args.dry_run:
        plans = [stages_of(place, TARGETS[name](place), seeds_of(place, name, args)) for name in names]
        print("\n".join(readable(command(stage)) for stage in with_needs(itertools.chain(*plans))
                        if not finished(stage)))
        return 0
    return carry_out(place, names, args)


if __name__ == "__main__":
    command_line(main)
