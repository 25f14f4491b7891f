"""How stages run: each in a process of its own, one at a time or one on each GPU, never the same one twice.

Every stage is locked while it runs, so that several instances of reproduce.py, on one machine or on several
that share the folder, share the work. A lock is the operating system's (flock): it goes when its holder does,
however that ends.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import torch

from engine.machine import choose_dtype
from engine.runs import load_checkpoint
from engine.settings import Settings
from experiments.stages import with_needs
from support.cli import BadInput, dashed, import_optional, write_json
from train import parse

HERE = Path(__file__).resolve().parent.parent
PREPARED = 1e6  # bytes of tokens or pixels that one core writes in a second, before any was measured


# ---------------------------------------------------------------------------- what is there

def finished(stage):
    """Whether the result of a stage is there: with its record, or whole without it (adopted, or cut off at
    the very end). BadInput: a run of other settings, as stages are named by their flags and not by what
    presets were when it was trained."""
    seconds, config = None, stage.out / "config.json"
    if stage.argv[0] == "train.py" and config.exists():
        check_presets(stage, json.loads(config.read_text()))
    if not stage.out.exists():
        stage.record().unlink(missing_ok=True)  # of a result that was removed
        return False
    if stage.record().exists():
        return json.loads(stage.record().read_text()).get("made_from") in (None, made_from(stage))
    if stage.argv[0] == "train.py" and (stage.out / "ckpt.pt").exists() and config.exists():
        content = load_checkpoint(stage.out)
        if content["step"] >= json.loads(config.read_text())["steps"]:
            seconds = content["seconds"]
    elif stage.argv[0] == "data.py" and (stage.out / "manifest.json").exists():
        seconds = 0.0
    if seconds is not None:
        write_record(stage, seconds, "not recorded", None)
    return seconds is not None


def check_presets(stage, saved):
    """Raise BadInput where a run's settings are not those that its stage has now; its data may have moved."""
    wanted, found = settings_of(asdict(parse(stage.argv[1:])[0])), settings_of(saved)
    changed = [name for name in wanted if name != "data" and wanted[name] != found[name]]
    if changed:
        told = ", ".join(f"{dashed(name)} {found[name]}, now {wanted[name]}" for name in changed)
        raise BadInput(f"{stage.out} was trained with other presets ({told}): give another --work, or remove "
                       "this folder")


def made_from(stage):
    """A checksum of the records of what a stage reads, prepared data aside, which is another one once that
    ran anew; None where it reads no more than data."""
    read = [need for need in stage.needs if need.argv[0] != "data.py"]
    records = [need.record().read_text() for need in read if need.out.exists() and need.record().exists()]
    return hashlib.sha1("".join(records).encode()).hexdigest()[:12] if read else None


def write_record(stage, seconds, machine, code):
    write_json(stage.record(), {"command": readable(stage.line()), "seconds": seconds, "hardware": machine,
                                "code": code, "torch": torch.__version__ if code else "not recorded",
                                "made_from": made_from(stage)})


def adopt(stage, parent):
    """If a run folder inside `parent` has the settings of this training stage and all its steps, link to
    it."""
    if stage.argv[0] != "train.py" or stage.out.exists():
        return
    wanted = settings_of(asdict(parse(stage.argv[1:])[0]))
    for config in sorted(Path(parent).glob("*/config.json")):
        # a run of another version or kind
        with contextlib.suppress(BadInput, KeyError, TypeError, ValueError):
            if settings_of(json.loads(config.read_text())) == wanted:
                stage.out.parent.mkdir(parents=True, exist_ok=True)
                stage.out.symlink_to(config.parent.resolve())
                if finished(stage):
                    record = config.parent.with_name(config.parent.name + ".stage")
                    if record.exists():  # which says where and by what code it was trained
                        write_json(stage.record(), {**json.loads(record.read_text()),
                                                    "command": readable(stage.line())})
                    return
                stage.out.unlink()


def settings_of(saved):
    """A run's settings so that equal ones compare equal, whoever wrote them."""
    known = {f.name for f in fields(Settings)} - ({"steps"} if saved["epochs"] else set())
    saved = {**asdict(Settings()), **saved}  # an older version has fewer
    given = json.loads(json.dumps({name: value for name, value in saved.items() if name in known}))
    if given["objective"] == "dar" and given["options"] == {"t": 1}:
        given.update(objective="ar", options={}, streams=2)  # the same f in the same architecture
    return {**given, "data": str(Path(given["data"]).resolve())}


# ---------------------------------------------------------------------------- running

def command(stage):
    """The line that brings a stage's result about; a training that was interrupted goes on."""
    resumed = stage.argv[0] == "train.py" and (stage.out / "ckpt.pt").exists()
    return ("train.py", "--resume", "--out", str(stage.out), "--no-report") if resumed else stage.line()


def program(name, launcher=()):
    """How a program of this repository is started: a file of the root, or a module."""
    how = launcher if launcher and name == "train.py" else (sys.executable,)
    return (*how, str(HERE / name)) if name.endswith(".py") else (*how, "-m", name)


def readable(argv):
    """A stage's line as one types it in this folder."""
    start = [os.path.relpath(HERE / argv[0])] if argv[0].endswith(".py") else ["-m", argv[0]]
    return shlex.join(["python", *start, *argv[1:]])


@contextlib.contextmanager
def claimed(stage):
    """A file that holds the lock of this stage until the block ends; None where somebody else works on it."""
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    with open(stage.out.with_name(stage.out.name + ".lock"), "w") as file:
        try:
            fcntl = import_optional("fcntl")
        except BadInput:  # Windows: no locks, one instance
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file


def run(stage, launcher=(), environment=None, lock=None):
    """Run a stage in a process of its own. Its progress goes to standard error, its tables to a .log file."""
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    name, *rest = command(stage)
    # the lock lives as long as the stage, should this process be killed
    keep = (lock.fileno(),) if lock else ()
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    with open(f"{stage.out}.log", "a") as log, subprocess.Popen(
            [*program(name, launcher), *rest], stdout=log, pass_fds=keep,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})}) as child:
        while (status := child.poll()) is None:
            with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the stage as well: let it save
                child.wait()
    if status == 130:
        raise KeyboardInterrupt
    if status or not stage.out.exists():
        raise BadInput(f"a stage ended with exit status {status}, see above: {readable(command(stage))}. "
                       "Once that is mended, the same command goes on from here")
    trained = stage.argv[0] == "train.py"
    seconds = load_checkpoint(stage.out)["seconds"] if trained else time.perf_counter() - start
    write_record(stage, seconds, hardware(), code_version())


class Worker:
    """Runs stages in order of need, on as many slots as there are; each slot is an environment of its own,
    such as a GPU."""

    def __init__(self, stages, slots, run_one, about=None, may_begin=None):
        self.waiting = [stage for stage in with_needs(stages) if not finished(stage)]
        self.slots, self.run_one = slots, run_one
        self.about = about or (lambda stage: None)
        self.may_begin = may_begin or (lambda stage: True)
        self.busy, self.mutex, self.stopped = set(), threading.Lock(), False

    def take(self):
        """A stage whose needs are there and that no slot of this instance works on; None where there is none
        now."""
        with self.mutex:
            left = {stage.out for stage in self.waiting}
            for stage in self.waiting:
                if stage.out not in self.busy and not any(need.out in left for need in stage.needs):
                    self.busy.add(stage.out)
                    return stage

    def give_back(self, stage, done):
        with self.mutex:
            self.busy.discard(stage.out)
            if done:
                self.waiting = [one for one in self.waiting if one.out != stage.out]
            else:
                self.waiting.append(self.waiting.pop(self.waiting.index(stage)))  # try others before it

    def slot(self, environment, pause=2.0):
        """Run stages until none is left, or none may begin."""
        while self.waiting and not self.stopped:
            stage = self.take()
            if stage is None:
                time.sleep(pause)  # what is left needs what runs now
                continue
            done = False
            try:
                with claimed(stage) as lock:
                    done = lock is not None and finished(stage)
                    if lock is not None and not done:
                        if not self.may_begin(stage):
                            self.stopped = True
                            return
                        self.about(stage)
                        self.run_one(stage, environment, lock)
                        done = True
            except BaseException:
                self.stopped = True
                raise
            finally:
                self.give_back(stage, done)
            if not done and lock is None:
                time.sleep(pause)  # another instance works on it

    def run(self):
        """-> the stages that are left."""
        if len(self.slots) == 1:
            self.slot(self.slots[0])
        else:
            with ThreadPoolExecutor(len(self.slots)) as pool:
                slots = [pool.submit(self.slot, environment) for environment in self.slots]
                try:
                    for one in slots:
                        one.result()
                finally:
                    self.stopped = True
        return self.waiting


def run_all(stages, launcher, jobs, gpus, run_one, about=None, may_begin=None):
    """Run what is missing of these stages -> those that are left. Training with a launcher takes all GPUs, so
    that nothing runs beside it; everything else takes one each."""
    trainings = [stage for stage in stages if launcher and stage.argv[0] == "train.py"]
    left = Worker(trainings, [{}], run_one, about, may_begin).run()
    return left or Worker(stages, slots_for(jobs, gpus), run_one, about, may_begin).run()


def slots_for(jobs, device_count):
    """Environments for parallel stages: one GPU each where there are GPUs, one thread each where there are
    none."""
    if jobs == 1 and device_count <= 1:
        return [{}]
    if device_count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(device_count)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": visible[k % len(visible)]} for k in range(jobs)]
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "PASSIVE"}
            for _ in range(jobs)]


# ---------------------------------------------------------------------------- the machine and the code

def hardware():
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


@functools.cache
def measured_flops(share=0.4):
    """FLOP/s that a training can be expected to reach here: a share of what a product of matrices does in the
    precision of training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, best = 4096 if device.type == "cuda" else 768, 0.0
    x = torch.randn(size, size, device=device).to(choose_dtype(device))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size ** 3 / (time.perf_counter() - start))
    return share * best


@functools.cache
def seconds_in(record):
    """What a finished stage took."""
    return json.loads(record.read_text())["seconds"]


def estimate_seconds(stages, flops):
    """{out: seconds} that the stages take, from their FLOPs, from the bytes of data that they prepare, and
    from what finished stages of the same program took."""
    prepared = PREPARED * (os.cpu_count() or 1)
    guess = {stage.out: 10 + stage.flops / flops + stage.disk / prepared * (stage.argv[0] == "data.py")
             for stage in stages}
    took, guessed = Counter(), Counter()
    for stage in stages:
        if stage.record().exists():
            took[stage.argv[0]] += seconds_in(stage.record())
            guessed[stage.argv[0]] += guess[stage.out]
    rate = {name: took[name] / guessed[name] for name in took}
    return {stage.out: guess[stage.out] * rate.get(stage.argv[0], 1) for stage in stages}


def code_version():
    """The commit, where the code is in a git repository, and whether it was changed since."""
    def git(*line):
        return subprocess.run(["git", "-C", HERE, *line], capture_output=True, text=True, check=False)

    with contextlib.suppress(OSError):
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        return commit and commit + "-changed" * bool(git("diff", "--quiet", "HEAD", "--", "*.py").returncode)
