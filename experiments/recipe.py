"""Which recipe learns soonest: validation loss against seconds on one thread, each budget with a schedule of
its own.

    python -m experiments.recipe train --objective ar --seed 0 --json a.json
    python -m experiments.recipe summary a.json b.json ... [--plot FILE]

A recipe is a set of flags of train.py. All train tiny on pydoc in turn, in one process. Ours has several
budgets; of those that end below the loss of another recipe, the shortest says how much sooner it is there.
"""

import json
import statistics
import tempfile
from pathlib import Path

from engine.runs import load_checkpoint
from engine.settings import resolve
from support.cli import Parser, command_line, import_optional, output_file, real, seed, show_and_write
from theory.show import table
from train import train

DEFAULT = "Muon, as by default"
RECIPES = {  # name: (flags of train.py, budgets in steps)
    DEFAULT: ({}, (150, 200, 250, 300, 400)),
    "AdamW, rate 2e-3": ({"optimizer": "adamw", "lr": 2e-3}, (600,)),
    "AdamW, rate 6e-3": ({"optimizer": "adamw", "lr": 6e-3}, (600,)),
    "AdamW as nanoGPT": ({"optimizer": "adamw", "lr": 1e-3, "beta2": 0.99, "weight_decay": 0.1, "clip": 1.0,
                          "schedule": "cosine", "warmup": 0.05}, (600,))}


def train_recipes(args):
    """Every recipe and budget with one seed -> {"objective", "seed", "runs": [recipe, steps, loss,
    seconds]}."""
    runs = []
    for name, (flags, budgets) in RECIPES.items():
        for steps in budgets:
            settings = resolve(objective=args.objective, steps=max(2, round(steps * args.share)),
                               seed=args.seed, **flags)
            with tempfile.TemporaryDirectory() as folder:
                loss = train(settings, Path(folder, "run"), device="cpu", dtype="fp32", threads=1,
                             eval_every=10 ** 6, quiet=True)
                seconds = load_checkpoint(Path(folder, "run"))["seconds"]
            runs.append({"recipe": name, "steps": settings.steps, "loss": loss, "seconds": seconds})
    return {"objective": args.objective, "seed": args.seed, "runs": runs}


def even_out(runs):
    """Give every run the seconds of its steps at the median pace of its optimizer, so that what else the
    machine did meanwhile does not count."""
    for ours in (True, False):
        own = [run for run in runs if (run["recipe"] == DEFAULT) == ours]
        pace = statistics.median(run["seconds"] / run["steps"] for run in own)
        for run in own:
            run["seconds"] = run["steps"] * pace


def sooner(runs, name):
    """How many times sooner ours is below the loss of the recipe `name`; None where no budget is."""
    [other] = [run for run in runs if run["recipe"] == name]
    ours = [run["seconds"] for run in runs if run["recipe"] == DEFAULT and run["loss"] <= other["loss"]]
    return other["seconds"] / min(ours) if ours else None


def compare_recipes(args):
    """Losses of every recipe and seed, seconds at the median pace, and how much sooner ours is."""
    found = [json.loads(Path(file).read_text())["results"] for file in args.files]
    rows, results = [("objective", "recipe", "steps", "loss", "seconds", "ours is there")], []
    for objective in dict.fromkeys(x["objective"] for x in found):
        same = [x for x in found if x["objective"] == objective]
        even_out([run for x in same for run in x["runs"]])
        for k, run in enumerate(same[0]["runs"]):
            losses, seconds = ([x["runs"][k][what] for x in same] for what in ("loss", "seconds"))
            times = [] if run["recipe"] == DEFAULT else [sooner(x["runs"], run["recipe"]) for x in same]
            results.append({"objective": objective, **run, "loss": losses, "seconds": seconds,
                            "times_sooner": times})
            told = ", ".join(f"{x:.1f} x sooner" if x else "not reached" for x in times)
            rows.append((objective, run["recipe"], str(run["steps"]), ", ".join(f"{x:.3f}" for x in losses),
                         f"{seconds[0]:.0f}", told))
    told = (f"Losses of {len(same)} seeds in turn; seconds on one thread, of these steps at the median pace "
            "of Muon or of AdamW.")
    text = [*table(rows), "", told]
    return {"rows": results, "text": text}


def plot_recipes(results, path):
    """Loss against seconds, a panel for each objective, a colour for each recipe, a dot for each seed."""
    rows = results["rows"]
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    pyplot = import_optional("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, len(objectives), figsize=(5.5 * len(objectives), 4), squeeze=False,
                                     layout="constrained")
    for panel, objective in zip(panels[0], objectives):
        for k, name in enumerate(RECIPES):
            own = [row for row in rows if (row["objective"], row["recipe"]) == (objective, name)]
            panel.plot([x for row in own for x in row["seconds"]], [x for row in own for x in row["loss"]],
                       "os^D"[k], color=f"C{k}", label=name)
        panel.set(title=objective, xlabel="seconds at the median pace",
                  ylabel="validation loss (dots: seeds and budgets)")
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def recipe_arguments(argv=None):
    """The arguments of a command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="every recipe with one seed")
    one.add_argument("--objective", default="ar")
    one.add_argument("--seed", type=seed, default=0)
    one.add_argument("--share", type=real, default=1.0, help="of the budgets")
    summary = commands.add_parser("summary", help="what they come to")
    summary.add_argument("files", nargs="+", metavar="FILE", help="what train wrote")
    summary.add_argument("--plot", type=output_file, metavar="FILE", help="the picture, PNG")
    for command, function in ((one, train_recipes), (summary, compare_recipes)):
        command.add_argument("--json", type=output_file, metavar="FILE", help="- for standard output")
        command.set_defaults(function=function)
    return parser.parse_args(argv)


def main(argv=None):
    show_and_write("experiments.recipe", recipe_arguments(argv), plot_recipes)


if __name__ == "__main__":
    command_line(main)
