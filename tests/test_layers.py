"""The house has one direction: a file imports from its own floor or from one below, and never in a circle."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RIG = "rigsa/experiments"
FLOORS = {
    "kernels": ["rigsa_kernels/*"],
    "library": ["rigsa/*"],
    "peft": ["rigsa/registration", "rigsa/peft_tuner/*", "rigsa/__init__"],
    "settings": [
        f"{RIG}/{name}"
        for name in (
            "bounds",
            "config",
            "measures",
            "run_folder",
            "records",
            "lock",
            "hardware",
            "peak_memory",
            "distributed",
        )
    ],
    "model": [f"{RIG}/{name}" for name in ("model", "attach", "kept", "adapter")],
    "tasks": [f"{RIG}/tasks/*", f"{RIG}/tasks/lm_eval_tasks/*"],
    "training": [f"{RIG}/{name}" for name in ("checkpoints", "layer_checks", "train", "experiment")],
    "methods": [f"{RIG}/methods/*"],
    "recipes": [f"{RIG}/{name}" for name in ("presets", "config_file")],
    "memory": [f"{RIG}/memory/*"],
    "report": [f"{RIG}/report/*"],
    "commands": [f"{RIG}/*", "rigsa/run"],
    "kernel tools": [f"rigsa_kernels/{name}" for name in ("offline", "sass", "inspect", "testing")],
}
"""From the lowest floor to the highest. A file that is named belongs where it is named, any other where its folder is.

Nothing but tests and benchmarks stands on the kernel tools.
"""


def floor_of(path: str) -> str | None:
    """The floor of a file or folder without suffix, relative to the root; None where the table has none."""
    for wanted in (path, f"{path.rpartition('/')[0]}/*"):
        for floor, patterns in FLOORS.items():
            if wanted in patterns:
                return floor
    return None


FILES = {
    str(path.relative_to(ROOT).with_suffix("")): path
    for package in ("rigsa_kernels", "rigsa")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def modules(path: Path) -> list[str]:
    """What a file imports, anywhere in it: a name that a package gives may be a module of that package, too.

    Inside `rigsa_kernels` imports of itself are relative, as it is loaded under other names from the kernels hub.
    Elsewhere none is.
    """
    is_kernels = path.parent.name == "rigsa_kernels"
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == (0 if not is_kernels or node.level == 0 else 1), f"{path} has a relative import"
            parts = ["rigsa_kernels"] * (node.level == 1) + [node.module] * (node.module is not None)
            module = ".".join(parts)
            is_own = module.partition(".")[0] == "rigsa_kernels"
            assert not (is_kernels and is_own and node.level == 0), f"{path} imports {module} by its full name"
            found.extend([module, *(f"{module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not (is_kernels and any(name.partition(".")[0] == "rigsa_kernels" for name in names)), path
            found.extend(names)
    return found


def own_imports(file: str) -> set[str]:
    """The files of the two packages that a file imports. A package's own name is its `__init__` file."""
    found = set()
    for module in modules(FILES[file]):
        path = module.replace(".", "/")
        found |= {path, f"{path}/__init__"} & FILES.keys()
    return found - {f"{file.rpartition('/')[0]}/__init__"} - {file}


def test_every_file_has_a_floor_and_the_table_names_no_other():
    assert [file for file in FILES if floor_of(file) is None] == []
    named = {pattern for patterns in FLOORS.values() for pattern in patterns}
    folders = {f"{file.rpartition('/')[0]}/*" for file in FILES}
    assert named - folders - FILES.keys() == set()


@pytest.mark.parametrize("file", FILES)
def test_imports_come_from_below(file):
    height = list(FLOORS).index(floor_of(file))
    for imported in own_imports(file):
        floor = floor_of(imported)
        assert list(FLOORS).index(floor) <= height, f"{file}.py ({floor_of(file)}) imports {imported}.py ({floor})"
        assert (floor == "kernel tools") <= (floor_of(file) == "kernel tools"), f"{file}.py imports {imported}.py"
        assert file.startswith("rigsa/") or imported.startswith("rigsa_kernels/"), f"{file}.py imports {imported}.py"


def test_no_import_goes_in_a_circle():
    graphlib.TopologicalSorter({file: own_imports(file) for file in FILES}).prepare()


def asks_for_a_method(node: ast.AST) -> bool:
    """Whether it compares ``method`` or ``method.name`` with text."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
    return any(re.search(r"(^|\.)method(\.name)?$", side) for side in sides) and any("'" in side for side in sides)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("rigsa/experiments/")])
def test_what_a_method_does_is_asked_of_its_object(file):
    """So that a new method is one file, and a line in the registry."""
    found = [ast.unparse(node) for node in ast.walk(ast.parse(FILES[file].read_text())) if asks_for_a_method(node)]
    assert found == []


def test_kernels_need_torch_and_the_standard_library_only():
    """Triton beside it for the files that hold kernels, which are imported when the first one is launched."""
    for path in (ROOT / "rigsa_kernels").glob("*.py"):
        outside = {module.split(".")[0] for module in modules(path)} - set(sys.stdlib_module_names)
        needs_triton = path.stem.startswith("triton_") or f"rigsa_kernels/{path.stem}" in FLOORS["kernel tools"]
        allowed = {"torch", "rigsa_kernels"} | ({"triton"} if needs_triton else set())
        assert outside <= allowed | ({"numpy"} if path.stem == "testing" else set()), path
