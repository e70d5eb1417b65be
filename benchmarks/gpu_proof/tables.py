"""The rows of the sections that measure, as Markdown: for summary.md, below the promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.journal import rows

MEASURING = (
    "steps_135M",
    "steps_1.7B",
    "liger",
    "unsloth",
    "decode",
    "host",
    "planned",
    "kernels",
    "quickstart",
    "mnist",
)


def all_tables(folder: Path) -> str:
    """A table for each of these sections that has rows."""
    found = {name: rows(folder, name) for name in MEASURING}
    return "\n\n".join(f"## {name}\n\n{table(entries)}" for name, entries in found.items() if entries)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Every field that any row has is a column."""
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    lines = [columns, ["---"] * len(columns), *([_cell(entry.get(name)) for name in columns] for entry in entries)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")[:200]
