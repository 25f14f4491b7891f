"""The form of the code: few files at the root, imports that point one way, short files, functions and lines,
one owner for each name."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("support", "theory", "text", "images", "engine", "downstream", "experiments")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Who may import whom: only what stands in an earlier row, or beside it in its own row.
ROWS = (
    ("masks",),
    ("support",),
    ("model", "beyond", "text", "images"),
    ("objectives", "data"),
    ("engine", "theory"),
    ("downstream",),
    ("spectral", "evaluate"),
    ("train",),
    ("experiments", "bench", "reproduce"),
)
SHARED = {"main", "picture"}  # names that a file each may have


def module_of(path):
    """experiments/tables.py -> experiments.tables"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def row_of(module):
    """The number of its row: that of itself, or of its folder."""
    return next(i for name in (module, module.partition(".")[0]) for i, row in enumerate(ROWS) if name in row)


def imports_of(tree):
    """The modules of this project that a file imports, also inside functions."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in MODULES)


def test_the_root_holds_ten_files_at_most():
    assert len(list(ROOT.glob("*.py"))) <= 10
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= {*FOLDERS, "tests"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    names = set(imports_of(MODULES[module]))
    against = [name for name in names if row_of(name) > row_of(module) or name == module]
    assert not against, f"{module} imports {against}, which stand to its right"


def test_there_is_no_circle():
    left = {module: set(imports_of(tree)) for module, tree in MODULES.items()}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(MODULES[module_of(path)])
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert not {name: size for name, size in sizes.items() if size > 60}


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=module_of)
def test_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 110]


def test_every_name_has_one_owner():
    owners = {}
    for module, tree in MODULES.items():
        for name in top_level_names(tree) - SHARED:
            owners.setdefault(name, []).append(module)
    twice = {name: modules for name, modules in owners.items() if len(modules) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in sorted(twice.items()))


def top_level_names(tree):
    """What a file defines: functions, classes and constants."""
    kinds, found = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), set()
    for node in tree.body:
        if isinstance(node, kinds):
            found.add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else ():
            found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def test_files_say_what_they_are_for():
    for module, tree in MODULES.items():
        assert (ast.get_docstring(tree) or "").strip(), f"{module} has no docstring"
        assert ast.get_docstring(tree).strip(". ") != module, f"{module} has a docstring that says nothing"


def test_optional_packages_are_imported_where_they_are_used():
    needed, own = {"torch", "numpy", "tqdm"}, {name.partition(".")[0] for name in MODULES}
    for module, tree in MODULES.items():
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - needed
        assert foreign <= own, f"{module} imports {foreign - own} at the top"


def commands():
    """(module, function) of every command: main of a file of the root, and NAME_command."""
    for module, tree in MODULES.items():
        for node in tree.body:
            name = getattr(node, "name", "")
            if name == "main" and "." not in module or (
                    name.endswith("_command") and not name.startswith(("add_", "read_"))):
                yield module, node


@pytest.mark.parametrize("module, node", commands(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_commands_say_what_they_take_return_and_refuse(module, node):
    text = ast.get_docstring(node) or ""
    assert "BadInput" in text
    assert any(word in text for word in ("Returns", "->", "writes", "the object"))
    used = {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name)
            and x.value.id == "args"}
    assert node.name == "main" or not [name for name in used - {"json"} if name not in text]
