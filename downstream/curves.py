"""Training curves: losses, learning rate and speed of one run or of several, as a picture."""

import json
import math
from pathlib import Path

from engine.runs import similar
from support.cli import BadInput, import_optional, output_file

COLOURS = 10  # of matplotlib's cycle; runs beyond that differ in their dashes


def read_curves(folder):
    """metrics.jsonl of a run folder -> {"name", "unit": "tokens" or "images", and lists "seen", "loss", "lr",
    "speed", "val_seen", "val_loss"}. Its last line may be cut off, where a run is still going."""
    path, rows = Path(folder) / "metrics.jsonl", []
    if not path.exists():
        near = similar(folder)
        hint = f"did you mean {' or '.join(near)}?" if near else "give a run folder of train.py"
        raise BadInput(f"{path} does not exist; {hint}")
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    train = [row for row in rows if "loss" in row and "lr" in row]
    if not train:
        raise BadInput(f"{path} holds no losses yet; train.py writes them every few steps")
    unit = "images" if "images" in train[0] else "tokens"
    seen = {row["step"]: row[unit] for row in train}
    val = [row for row in rows if "val_loss" in row and row["step"] in seen]
    name = Path(folder).resolve().name  # which may hold bytes that are no text, and no font draws
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {"name": name, "unit": unit, "seen": [row[unit] for row in train],
            "loss": [row["loss"] for row in train], "lr": [row["lr"] for row in train],
            "speed": [row[f"{unit}_per_second"] for row in train],
            "val_seen": [seen[row["step"]] for row in val], "val_loss": [row["val_loss"] for row in val]}


def plot_curves(path, runs):
    """Three panels over the tokens or images seen: training and validation loss, learning rate, speed."""
    plt, ticker = import_optional("matplotlib.pyplot"), import_optional("matplotlib.ticker")
    figure, (losses, rates, speeds) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained",
                                                   width_ratios=(2, 1, 1))
    for k, run in enumerate(runs):
        how = {"color": f"C{k % COLOURS}", "linestyle": ("-", "--", ":")[k // COLOURS % 3]}
        losses.plot(run["seen"], run["loss"], alpha=0.4, linewidth=1, **how)
        if run["val_loss"]:
            losses.plot(run["val_seen"], run["val_loss"], marker=".", **how)
        rates.plot(run["seen"], run["lr"], **how)
        speeds.plot(run["seen"], run["speed"], **how)
        losses.plot([], [], label=run["name"].replace("$", r"\$"), **how)
    units = " or ".join(sorted({run["unit"] for run in runs}))
    losses.set(title="loss: pale in training, dots on validation data", ylabel="nats for each target"
               if units == "tokens" else "loss for each target")
    rates.set(title="learning rate")
    speeds.set(title=f"{units} in a second")
    for axes in (losses, rates, speeds):
        axes.set_xlabel(f"{units} seen")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    speeds.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for axes in (rates, speeds):
        axes.set_ylim(bottom=0)
    values = sorted(x for run in runs for x in run["loss"] + run["val_loss"])
    most = values[math.ceil(0.98 * (len(values) - 1))]  # the first few losses would press all others together
    losses.set_ylim(values[0] - 0.05 * (most - values[0]), most + 0.05 * (most - values[0]))
    figure.legend(*losses.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_command(args):
    """`evaluate.py curves RUN [RUN ...]`: losses, rates and speed as a picture, and the last of each printed.

    args     checkpoints (run folders), plot (the picture; by default curves.png in the run folder, of several
             runs compared.png in that of the first), json
    Returns ({"results": one dict a run, "picture": its path}, None). BadInput: a folder without losses, or no
    matplotlib.
    """
    runs, folders = [read_curves(folder) for folder in args.checkpoints], args.checkpoints
    picture = args.plot or Path(folders[0], "curves.png" if len(folders) == 1 else "compared.png")
    plot_curves(picture, runs)
    results = []
    for folder, run in zip(folders, runs):
        val, unit = run["val_loss"] or [None], run["unit"]
        results.append({"run": str(folder), unit: run["seen"][-1], "loss": run["loss"][-1],
                        "val_loss": val[-1], "best_val_loss": min(run["val_loss"], default=None),
                        f"{unit}_per_second": run["speed"][-1]})
        if args.json != "-":
            last = f"{val[-1]:.4f}" if run["val_loss"] else "none yet"
            print(f"{run['name']:30s} {run['seen'][-1]:14,} {unit}  "
                  f"loss {run['loss'][-1]:.4f}  validation {last}")
    if args.json != "-":
        print(f"picture: {picture}")
    return {"results": results, "picture": str(picture)}, None


def add_curves_command(command):
    """evaluate.py curves RUN [RUN ...]"""
    sub = command("curves", curves_command, "draw training runs: loss, learning rate, speed", many=True)
    sub.add_argument("--plot", type=output_file, metavar="FILE", help="picture (default: curves.png in the "
                     "run folder, of several runs compared.png in that of the first)")
