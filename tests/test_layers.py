"""The house has one direction: a file imports only files that stand above it in its package's list."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = {
    "rigsa_kernels": [
        "format", "nf4", "library", "init", "select", "reference", "adamw", "dispatch", "triton_common",
        "triton_linear", "triton_grad", "triton_adamw", "triton_select", "ops", "linear", "hooks", "selection",
        "replace", "merging", "optim", "offline", "sass", "inspect", "testing",
    ],
    "rigsa": [
        "errors", "files", "memory", "hardware", "live_memory", "criteria", "masks", "config", "distributed",
        "textual_mnist", "model", "attach", "adapter", "source_tasks", "drift", "evaluate", "train", "experiment",
        "ticket", "rewinding", "early_bird", "imp", "random_mask", "lt_sft", "gradient_masks", "super_mask", "spiel",
        "baselines", "methods", "simulate", "memory_plan", "memory_report", "plan", "statistics", "paper_numbers",
        "report", "tables", "figures", "html_report", "sweep_plan", "sweep", "chat", "run",
    ],
}  # fmt: skip


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("package", ORDER)
def test_every_file_has_its_place(package):
    files = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert files == set(ORDER[package])


@pytest.mark.parametrize(("package", "stem"), [(package, stem) for package, stems in ORDER.items() for stem in stems])
def test_arrows_go_one_way(package, stem):
    above = ORDER[package][: ORDER[package].index(stem)]
    for module in imports(ROOT / package / f"{stem}.py"):
        if module.startswith(f"{package}."):
            assert module.split(".")[1] in above, f"{package}/{stem}.py imports {module}"
        if package == "rigsa_kernels":
            assert module.split(".")[0] != "rigsa", f"{package}/{stem}.py imports {module}"


TOOLS = {"offline", "sass", "inspect", "testing"}
"""Need triton, and numpy for the interpreter; nothing that a user's program imports imports them."""


def test_kernels_need_torch_and_the_standard_library_only():
    """Triton beside it for the files that hold kernels, which are imported when the first one is launched."""
    for path in (ROOT / "rigsa_kernels").glob("*.py"):
        outside = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
        needs_triton = path.stem.startswith("triton_") or path.stem in TOOLS
        allowed = {"torch", "rigsa_kernels"} | ({"triton"} if needs_triton else set())
        assert outside <= allowed | ({"numpy"} if path.stem == "testing" else set()), path
