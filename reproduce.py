"""Every table and figure of the paper by one command, its numbers beside ours, a verdict on each claim.

    python reproduce.py table7 --scale smoke                  proves the pipeline: minutes, no download
    python reproduce.py table7 --scale cpu --data-dir DIR     on your data; --tokens, --epochs: the budget
    python reproduce.py table7 --scale paper --dry-run        the exact commands
    python reproduce.py report --out results --readme README.md
                                            all results on one page, the verdicts in README.md

A target (experiments/tables.py) is a table: its rows are models, its columns measures, and each cell comes
from stages. A stage is one command line of this project. Tables share stages, what is there is not computed
again, and an interrupted training goes on. DIR holds, as far as the targets need it:

    text/       raw text or a token folder of data.py
    val/        text to measure on (optional; else a share of text/)
    images/     class folders, CIFAR files or an image folder of data.py
    glue/       the official GLUE files
    transfer/   any number of image sets (optional; Table 6)
    other/      text of another kind (optional; Table 7)
    images100/, wikitext2/   ImageNet-100, WikiText-2 (paper scale)

A claim is a difference that the paper, or where marked [ours] this project, says is positive. Its size in the
paper's numbers is the effect that ours is judged against (experiments/verdicts.py).
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.measures import SCALES, Place, read_json, scale_of, with_needs
from experiments.pages import stages_of, write_report, write_results
from experiments.tables import TARGETS
from run import hardware, load_checkpoint
from util import BadInput, Parser, command_line, positive, write_json

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------- stages

def command(stage):
    """The line that brings a stage's result about; a training that was interrupted goes on."""
    if stage.argv[0] == "train.py" and (stage.out / "ckpt.pt").exists():
        return "train.py", "--resume", "--out", str(stage.out), "--no-report"
    return stage.line()


def readable(line):
    """A line as one types it in this folder."""
    return shlex.join(["python", *([] if line[0].endswith(".py") else ["-m"]), *line])


def run(stage):
    """Run a stage in a process of its own: progress to standard error, what it prints to a .log file."""
    line, start, config = command(stage), time.perf_counter(), stage.out / "config.json"
    if "--resume" in line and load_checkpoint(stage.out)["step"] == (read_json(config) or {}).get("steps"):
        return write_record(stage, 0)  # it was cut off after its last step
    print(readable(line), file=sys.stderr)
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    program = [str(HERE / line[0])] if line[0].endswith(".py") else ["-m", line[0]]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUTF8": "1"}
    with (open(stage.beside(".log"), "wb") as log,
          subprocess.Popen([sys.executable, *program, *line[1:]], stdout=log, env=environment) as process):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the stage gets it as well; a training saves its checkpoint
            process.wait()
            raise
    if status:
        raise BadInput(f"a stage ended with exit status {status}, see above: {readable(line)}. Once that is "
                       "mended, the same command goes on from here")
    write_record(stage, time.perf_counter() - start)


def write_record(stage, seconds):
    """Say that a stage is done, what it took, and by what."""
    if stage.argv[0] == "train.py":
        seconds = load_checkpoint(stage.out)["seconds"]  # over all its interruptions
    code = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True,
                          text=True, check=False).stdout.strip()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(stage.beside(".done"), {"command": readable(stage.line()), "seconds": seconds,
                                       "hardware": hardware(device), "torch": torch.__version__,
                                       "code": code or "not recorded"})


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    parser = Parser(description="Every table and figure of the paper, its numbers beside ours.")
    add = parser.add_argument
    add("target", choices=(*TARGETS, "all", "report"), help="report: the page of all that is in --out")
    add("--scale", choices=SCALES, default="smoke", help="the budget of every model")
    add("--seeds", type=positive, help="pretraining runs of each model (or the scale's)")
    add("--tokens", type=float, help="that each text model reads (or the scale's)")
    add("--epochs", type=float, help="of each image model (or the scale's)")
    add("--data-dir", default="DATA", help="folder of text/, images/ and what else is needed; smoke has none")
    add("--dry-run", action="store_true", help="print the commands that are not done")
    add("--work", type=Path, help="folder of the stages (or runs/reproduce/SCALE)")
    add("--out", type=Path, default=Path("results-mine"), help="folder of the tables")
    add("--readme", help="report: a file to write the verdicts into, between its markers")
    args = parser.parse_args(argv)
    if args.target == "report":
        return write_report(args.out, TARGETS, args.readme)
    budgets = {name: x for name in ("tokens", "epochs") if (x := getattr(args, name)) is not None}
    for name, value in budgets.items():
        if not value > 0:
            raise BadInput(f"--{name} {value:g} is not a positive number")
    work, plans, left_out = args.work or Path("runs", "reproduce", args.scale), {}, 0
    for name in TARGETS if args.target == "all" else [args.target]:
        scale = scale_of(args.scale, name) | budgets
        place = Place(args.scale, Path(args.data_dir).absolute(), work, scale)
        table, seeds = TARGETS[name](place), args.seeds or scale["seeds"]
        if all(model.hub for model in table.rows.values()):  # public models; the theory has seeds of its own
            seeds = 1
        plans[name] = place, table, seeds, stages_of(place, table, seeds)
    if args.dry_run:
        stages = with_needs([stage for *_, stages in plans.values() for stage in stages])
        print("\n".join(readable(command(stage)) for stage in stages if not stage.done()))
        return 0
    for name, (place, table, seeds, stages) in plans.items():
        read = {word for stage in stages for word in stage.argv if word.startswith(f"{place.data}{os.sep}")}
        if absent := sorted(word for word in read if not Path(word).exists()):
            text = f"{name} at {place.name} scale reads {', '.join(absent)}, which is not there"
            if args.target != "all":
                raise BadInput(f"{text}; give the folder that holds it as --data-dir DIR")
            print(f"note: {text}; left out", file=sys.stderr)
            left_out = 1
            continue
        for stage in stages:
            if not stage.done():
                run(stage)
        print(write_results(place, name, table, seeds, args.out))
    return left_out


if __name__ == "__main__":
    command_line(main)
