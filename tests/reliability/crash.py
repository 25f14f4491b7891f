"""Kill training at random moments, resume it, and compare with a run that nobody disturbed.

    python tests/reliability/crash.py --kills 50                     minutes
    python tests/reliability/crash.py --kills 10 --processes 2       through torchrun

Signals, moments and the order of the cases come from --seed. A kill falls into the start of the process, into
training, or into the writing of a checkpoint. Exit status 1 if a weight, the optimiser or a line of
metrics.jsonl differs in the end.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train
from engine import runs
from images import shapes
from support.cli import command_line

SAVE_EVERY = 5
CASES = {  # name: what it adds to the command
    "ar text": "--objective ar --optimizer adamw",
    "dar text": "--objective dar --t 2",
    "mlm text": "--objective mlm",
    "vl text": "--objective vl",
    "permutation text": "--objective permutation",
    "vl text, two streams": "--objective vl --streams 2",
    "ar images": "--objective ar",
    "dar images": "--objective dar --t 1,2",
    "mlm images": "--objective mlm --mask 0.5 --optimizer adamw",
    "vl images": "--objective vl --streams 2",
    "vl text, large batches": "--objective vl",
}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


def write_inputs(folder):
    """A text, and drawn shapes of 8 x 8 pixels as idx files."""
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(2000)))
    (folder / "shapes").mkdir()
    for prefix, count, seed in (("train", 150, 0), ("t10k", 40, 1)):
        pixels, labels = shapes.shapes(count, 8, seed)
        (folder / "shapes" / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, count, 8, 8) + pixels[..., 0].tobytes()
        )
        (folder / "shapes" / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + labels.astype("uint8").tobytes()
        )


def command(case, folder, out, resume=False, steps=60):
    """Arguments of train.py: with gradient accumulation, a batch ramp, more than one epoch of the images."""
    data = (
        f"--data {folder}/shapes --size 8 --patch 4"
        if "images" in case
        else f"--data {folder}/text.txt --length 16"
    )
    batch = 64 if "large" in case else 32
    return [
        *f"{CASES[case]} {data} --batch-size {batch} --micro-batch 12 --batch-ramp 0.5 --steps {steps} "
        f"--log-every 3 --eval-every 25 "
        f"--save-every {SAVE_EVERY} --device cpu --dtype fp32 --no-report".split(),
        *["--resume"] * resume,
        "--out",
        str(out),
    ]


# ---------------------------------------------------------------------------- processes


def child(argv, log, environment):
    """What a process does that `start` started: train.py's command line, output into a file."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    command_line(lambda: train.main(argv))


def start(argv, log, **environment):
    """Train in a process of its own -> (its id, function that gives its exit status or None). It is forked
    from one that has imported PyTorch already."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")])
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash"])
    process = context.Process(target=child, args=(argv, str(log), environment))
    process.start()
    return process.pid, lambda: process.exitcode


def start_torchrun(argv, log, processes):
    """The same through torchrun."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
                ROOT / "train.py",
                *argv,
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return process.pid, process.poll


def start_group(argv, log, processes):
    """The same in several processes, joined as torchrun joins them -> (the id of one of them, poll). Where
    one ends badly the others are ended, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    members = [start(argv, log, **several, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    since = []

    def poll():
        states = [member() for _, member in members]
        if any(state is not None for state in states) and None in states:
            since.append(time.monotonic())
            bad = any(state not in (None, 0, 130) for state in states)
            if bad or since[-1] - since[0] > 10:
                for (pid, _), state in zip(members, states):
                    if state is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        return None if None in states else max(states, key=abs)

    return random.Random(log.name).choice(members)[0], poll


def wait(poll, seconds=300):
    """The exit status."""
    deadline = time.monotonic() + seconds
    while (status := poll()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("a training process does not end")
        time.sleep(0.005)
    return status


# ---------------------------------------------------------------------------- kills


def strike(pid, poll, out, rng, seconds, group):
    """Send a random signal at a random moment -> its name, or None where the process ended before that."""
    metrics, partial = out / "metrics.jsonl", out / "ckpt.partial"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    kind, name = rng.choice(("start", "training", "saving")), rng.choice(list(SIGNALS))
    if kind == "start":
        wait_for(lambda: False, poll, rng.uniform(0, 0.5 * seconds))
    else:
        wait_for(lambda: metrics.exists() and metrics.stat().st_mtime_ns != before, poll, 300)
        if kind == "training":
            wait_for(lambda: False, poll, rng.uniform(0, 0.7 * seconds))
        else:
            wait_for(partial.exists, poll, 300)
    if poll() is not None:
        return None
    (os.killpg if group and name == "KILL" else os.kill)(pid, SIGNALS[name])
    return name


def wait_for(condition, poll, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def steps_in(out):
    """(step of the checkpoint, last step in metrics.jsonl), 0 where there is none."""
    saved = runs.load_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    logged = 0
    for line in lines:
        try:
            logged = json.loads(line)["step"]
        except json.JSONDecodeError:  # the kill fell into it
            break
    return saved, logged


def differences(whole, other, rounding=0.0):
    """What differs between two finished runs by more than `rounding`, as a list of words. More than two
    processes add up gradients in another order after a resume."""
    a, b = (runs.load_checkpoint(out) for out in (whole, other))

    def equal(x, y):
        return torch.equal(x, y) if not rounding else torch.allclose(x, y, rtol=10 * rounding, atol=rounding)
    found = [f"weight {name}" for name in a["model"] if not equal(a["model"][name], b["model"][name])]
    for i, entry in a["optimizer"]["state"].items():
        state = b["optimizer"]["state"][i]
        found += [f"optimiser {i} {name}" for name, x in entry.items() if not equal(x, state[name])]
    found += [name for name in ("step", "seen", "skipped") if a[name] != b[name]]
    for x, y in itertools.zip_longest(logged(whole), logged(other), fillvalue={}):
        if x.keys() != y.keys() or any(abs(x[key] - y[key]) > 100 * rounding for key in x):
            return [*found, f"metrics.jsonl {y} instead of {x}"]
    return found


def logged(out):
    """The lines of metrics.jsonl without what the clock says."""
    clocked = ("seconds", "tokens_per_second", "images_per_second", "mfu")
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def crash(kills, cases, folder, seed=0, launch=start, each=5, steps=60, rounding=0.0, say=print):
    """Disturb runs of these cases in turn, `each` kills at most per run, until that many kills are done.
    -> {"kills", "resumes", "lost": steps at most, "differences": list}."""
    folder, rng, reference = Path(folder), random.Random(seed), {}
    write_inputs(folder)
    total = {"kills": 0, "resumes": 0, "lost": 0, "differences": []}

    group = getattr(launch, "func", None) is start_torchrun  # whose processes end together
    for number, case in enumerate(itertools.cycle(cases)):
        if total["kills"] >= kills:
            return total
        if case not in reference:
            whole, clock = folder / f"whole {case}", time.monotonic()
            if wait(launch(command(case, folder, whole, steps=steps), folder / "log")[1]):
                raise RuntimeError((folder / "log").read_text())
            reference[case] = whole, time.monotonic() - clock
        whole, seconds = reference[case]
        out, used, resumes, lost = folder / f"disturbed {number}", [], 0, 0
        while True:
            saved = steps_in(out)[0]
            if saved == steps:
                break
            resumes += saved > 0
            pid, poll = launch(
                command(case, folder, out, resume=saved > 0, steps=steps), folder / f"log {number}"
            )
            if len(used) < min(each, kills - total["kills"]):
                used += filter(None, [strike(pid, poll, out, rng, seconds, group)])
            status = wait(poll)
            if status not in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT) and launch is start:
                raise RuntimeError(f"exit status {status}: " + (folder / f"log {number}").read_text())
            lost = max(lost, steps_in(out)[1] - steps_in(out)[0])
        found = differences(whole, out, rounding)
        say(
            f"{case:22s} {len(used)} kills ({', '.join(used)}), {resumes} resumes, {lost} steps lost, "
            + (f"DIFFERENT: {'; '.join(found[:3])}" if found else "no difference")
        )
        total["kills"] += len(used)
        total["resumes"] += resumes
        total["lost"] = max(total["lost"], lost)
        total["differences"] += [f"{case}: {word}" for word in found]
        shutil.rmtree(out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--processes", type=int, default=1, help="more than one: through torchrun")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        launch = functools.partial(start_torchrun, processes=args.processes) if args.processes > 1 else start
        total = crash(args.kills, CASES, folder, args.seed, launch, rounding=2e-5 * (args.processes > 2))
    print(
        f"\n{total['kills']} kills, {total['resumes']} resumes, {total['lost']} steps lost at most "
        f"(a checkpoint every {SAVE_EVERY}), "
        f"{len(total['differences'])} differences"
    )
    return int(bool(total["differences"]))


if __name__ == "__main__":
    sys.exit(main())
