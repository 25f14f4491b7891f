"""Many small steps, then many evaluations: memory and open files over time.

    python tests/reliability/soak.py --minutes 60

Linux, or any system with /proc. Exit status 1 if memory or open files of the last third exceed those of the
second by more than 5%.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import evaluate
import train
from engine.settings import resolve


def measure():
    """(resident memory in MB, open files, threads) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


def watch(label, work, seconds, every):
    """Call `work(deadline)` and print the curve -> whether nothing grows."""
    rows, start, done = [], time.monotonic(), threading.Event()

    def sample():
        while not done.wait(every):
            rows.append(measure())
            print(
                f"{label:12s} {time.monotonic() - start:7.0f} s {rows[-1][0]:8.1f} MB {rows[-1][1]:4d} files "
                f"{rows[-1][2]:3d} threads",
                file=sys.__stdout__,
                flush=True,
            )

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        count = work(start + seconds)
    finally:
        done.set()
        thread.join()
    thirds = [rows[len(rows) * k // 3 : len(rows) * (k + 1) // 3] for k in (1, 2)]
    middle, last = ([sum(row[i] for row in third) / max(1, len(third)) for i in (0, 1)] for third in thirds)
    print(
        f"{label}: {count:,} of them; second third {middle[0]:.1f} MB, {middle[1]:.1f} files; "
        f"last third {last[0]:.1f} MB, {last[1]:.1f} files\n"
    )
    return all(b <= 1.05 * a for a, b in zip(middle, last))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=60, help="of steps; evaluations take a third of that"
    )
    args = parser.parse_args()
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "text.txt"), Path(folder, "run")
        text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(5000)))
        steps = [0]
        rate = train.learning_rate

        def counted(settings, progress):
            steps[0] += 1
            return rate(settings, progress)

        train.learning_rate = counted

        def training(deadline):
            """One run whose epochs are short, stopped when time is up."""
            timer = threading.Timer(deadline - time.monotonic(), lambda: os.kill(os.getpid(), signal.SIGTERM))
            timer.start()
            settings = resolve(objective="vl", data=str(text), length=16, batch_size=4, steps=10**7)
            train.train(settings, out, device="cpu", dtype="fp32", quiet=True, eval_every=500, save_every=500)
            return steps[0]

        def evaluating(deadline):
            count = 0
            while time.monotonic() < deadline:
                for command in ("perplexity --max-sequences 8", "generate --tokens 20"):
                    with contextlib.redirect_stdout(io.StringIO()):
                        evaluate.main([*command.split(), str(out), "--device", "cpu", "--dtype", "fp32"])
                    count += 1
            return count

        steady = watch("steps", training, seconds, max(1, seconds / 20))
        steady &= watch("evaluations", evaluating, seconds / 3, max(1, seconds / 60))
    return int(not steady)


if __name__ == "__main__":
    sys.exit(main())
