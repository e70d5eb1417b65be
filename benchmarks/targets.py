"""What the project set out to reach on a CPU, as ratios between two providers of one question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import FULL, LEVEL_0, LORA_16, LORA_DEFAULT, SHIRA, TICKET_NAME

BASE = "base model"


@dataclass(frozen=True)
class Target:
    """`numerator` takes at most (or, where `at_least`, at least) `bound` times as long as `denominator`."""

    question: str
    numerator: str
    denominator: str
    bound: float
    at_least: bool = False


TARGETS = (
    Target("training step", TICKET_NAME, FULL, 0.85),
    Target("training step", TICKET_NAME, LORA_DEFAULT, 0.6),
    Target("training step", TICKET_NAME, LORA_16, 0.95),
    Target("training step", SHIRA, TICKET_NAME, 1.6, at_least=True),
    Target("training step", LEVEL_0, FULL, 1.2),
    Target("generation", TICKET_NAME, BASE, 1.03),
)


def target_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: each target beside what was measured; empty where a run has none of it. Ratios of two ratios to the
    floor, each a median over rounds."""
    measured = {(row["group"], row["extra_info"]["provider"]): row["extra_info"].get("ratio") for row in rows}
    lines = []
    for group in dict.fromkeys(group for group, _ in measured):
        for target in TARGETS:
            own, other = (measured.get((group, name)) for name in (target.numerator, target.denominator))
            if group.startswith(target.question) and own and other:
                lines.append(_line(group, target, own / other))
    head = "| question | ratio | measured | target | |\n|---|---|---:|---:|---|\n"
    return head + "\n".join(lines) if lines else ""


def _line(group: str, target: Target, ratio: float) -> str:
    met = ratio >= target.bound if target.at_least else ratio <= target.bound
    sign = "≥" if target.at_least else "≤"
    names = f"{target.numerator} / {target.denominator}"
    return f"| {group} | {names} | {ratio:.2f} | {sign} {target.bound:g} | {'met' if met else 'missed'} |"
