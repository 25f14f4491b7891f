"""Files are few at the root, import only what stands before them, and leave optional packages for later."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["util", "masks", "plots", "model", "beyond", "experiments.spectrum", "experiments.check",
         "objectives", "experiments.generation_bound", "images", "data", "experiments.toy", "spectral",
         "run", "tasks.glue", "tasks.hub", "tasks.probe", "tasks.finetune", "tasks.generate",
         "tasks.connectivity", "tasks.export", "evaluate", "train", "bench", "experiments.bridge",
         "experiments.verdicts", "experiments.measures", "experiments.tables", "experiments.pages",
         "reproduce"]


def imports_of(nodes):
    """What the statements import, those inside functions included where `nodes` are a walk."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_imports_point_one_way():
    files = [path for folder in (".", "tasks", "experiments") for path in ROOT.glob(f"{folder}/*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    assert sorted(modules) == sorted(ORDER), "give a new file its place in ORDER, behind all that it imports"
    assert sum("." not in name for name in modules) <= 14
    allowed = {"torch", "numpy", "tqdm", "tasks", "experiments", *sys.stdlib_module_names, *ORDER}
    for place, name in enumerate(ORDER):
        tree = ast.parse(modules[name].read_text(encoding="utf-8"))
        later = set(imports_of(ast.walk(tree))) & set(ORDER[place:])
        assert not later, f"{name} imports {later}"
        at_the_top = {package.partition(".")[0] for package in imports_of(tree.body)}
        assert at_the_top <= allowed, f"{name} imports {at_the_top - allowed} at its top"
