"""The sections, in their order, with what each may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PART_LIMIT, WHOLE_LIMIT = 258.0, 470.0
"""Seconds of one part, and of both in one command."""
DRY_PATIENCE = 6
"""Times as long in a dry run: two cores that others use are slow."""
LEAST = 5.0
"""Seconds with which starting a section still makes sense."""


@dataclass(frozen=True)
class Section:
    """Attributes:
    name: of its file of results.
    budget: seconds after which its process is killed.
    module: that has its function `run`.
    options: further arguments of it.
    """

    name: str
    budget: float
    module: str
    options: dict[str, Any] = field(default_factory=dict)


def _section(name: str, budget: float, file: str | None = None, **options: Any) -> Section:
    return Section(name, budget, f"benchmarks.gpu_proof.{file or name}", options)


Stage = list[Section]
"""Sections that run side by side: more than one where they only check, one where it measures time."""

PARTS: dict[int, list[Stage]] = {
    1: [
        [_section("environment", 25)],
        [
            _section("correct", 120),
            _section("bits", 120),
            _section("behaviour", 90),
            _section("sanitizer", 120),
            _section("gpu_tests", 120),
            _section("peft", 90, "peft_models"),
            _section("planned", 90),
        ],
        [_section("host", 20)],
        [_section("kernels", 45)],
        [_section("steps_135M", 50, "steps", size="135M")],
    ],
    2: [
        [_section("environment_2", 25, "environment")],
        [_section("steps_1.7B", 75, "steps", size="1.7B")],
        [_section("decode", 70)],
        [_section("liger", 40)],
        [_section("unsloth", 40, "unsloth_lora")],
        [_section("quickstart", 120, "training", kind="quickstart")],
        [_section("mnist", PART_LIMIT, "training", kind="mnist")],
    ],
}


def stages(part: int | None, names: list[str] | None) -> list[Stage]:
    """Those of one part or of both, without the sections that are not among `names`.

    Raises:
        ValueError: a name is no section's.
    """
    chosen = [stage for number, stages in PARTS.items() if part in (None, number) for stage in stages]
    known = [section.name for stage in chosen for section in stage]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"--sections: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    kept = [[section for section in stage if names is None or section.name in names] for stage in chosen]
    return [stage for stage in kept if stage]


def all_names() -> list[str]:
    return [section.name for stages in PARTS.values() for stage in stages for section in stage]
