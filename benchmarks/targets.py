"""What the project set out to reach, as ratios between two providers of one question, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import (
    FROZEN,
    FULL,
    GRADIENTS,
    LEVEL_0,
    LORA_16,
    LORA_DEFAULT,
    MERGED,
    ROWS,
    SHIRA,
    TICKET,
    TICKET_NAME,
    TILES_32,
)

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
    Target("training step", ROWS, FULL, 0.77),
    Target("training step", ROWS, LORA_16, 0.88),
    Target("training step", SHIRA, ROWS, 1.55, at_least=True),
    Target("training step", ROWS, FROZEN, 1.06),
    Target("training step", TILES_32, FULL, 0.85),
    Target("generation", TICKET_NAME, BASE, 1.03),
    Target("generation", MERGED, BASE, 1.03),
)


@dataclass(frozen=True)
class GpuTarget(Target):
    """A target of `benchmarks.gpu_proof`; `question` is the name of a section.

    Attributes:
        words: the question for a reader.
        field: of a row, in which less is better.
        where: fields that a row has to have.
        density: of the numerator, where it was measured at several.
    """

    words: str = ""
    field: str = ""
    where: tuple[tuple[str, object], ...] = ()
    density: float | None = None

    def matches(self, row: Mapping[str, Any]) -> bool:
        return all(row.get(name) == value for name, value in self.where)


LIBRARY, OURS = "library", "ours, composed"


def _product(what: str, bound: float) -> GpuTarget:
    words = {"y": "Forward", "dx": "Gradient of the input", "gradient": "Gradient at the free entries"}[what]
    return GpuTarget("kernels", OURS, LIBRARY, bound, False, f"{words}, 3.46 %", "us", (("what", what),), TICKET)


def _step(size: str, numerator: str, denominator: str, bound: float, field: str = "step_ms") -> GpuTarget:
    words = f"{'Step' if field == 'step_ms' else 'Peak memory of a step'} of SmolLM2-{size}"
    return GpuTarget(f"steps_{size}", numerator, denominator, bound, False, words, field)


def _decode(size: str, numerator: str) -> GpuTarget:
    words = f"Decoding, SmolLM2-{size}"
    return GpuTarget("decode", numerator, BASE, 1.03, False, words, "ms_per_token", (("size", size),))


def _tiles(tile: str | int) -> GpuTarget:
    words = f"Gradient at the free entries, 3.46 % in {tile if isinstance(tile, str) else f'tiles of {tile}'}"
    where = (("what", "gradient"),)
    return GpuTarget("kernels", f"{OURS}, {tile}", LIBRARY, 1.0, False, words, "us", where, TICKET)


SIZES = ("135M", "1.7B")
GPU_TARGETS = (
    *(_product(what, bound) for what, bound in (("y", 1.05), ("dx", 1.05), ("gradient", 1.2))),
    *(_tiles(tile) for tile in ("rows", "columns", 64)),
    *(_step(size, TICKET_NAME, FULL, 0.9) for size in SIZES),
    *(_step(size, TICKET_NAME, FROZEN, 1.1, "peak_gib") for size in SIZES),
    *(_decode(size, name) for size in SIZES for name in (TICKET_NAME, MERGED)),
)


def target_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: each target of the questions that were asked, beside what was measured; empty where none was asked.

    *measured* is a ratio of two ratios to the floor, each a median over rounds. The floors (`benchmarks.floors`) tell
    whether a target can be reached: *of floor* is the share of its least time that a provider runs at, *floors* the
    ratio of the two least times, and *ours at its floor* what would be measured if ours alone took its least time. Two
    columns say the same of what was measured: if ours took no longer than the model's own passes, as if it had no
    adapter, and if it took those and the gradients of whole matrices in the library's products.
    """
    measured = {(row["group"], row["extra_info"]["provider"]): row["extra_info"] for row in rows}
    lines = []
    for group in dict.fromkeys(group for group, _ in measured):
        for target in TARGETS:
            own, other = (measured.get((group, name), {}) for name in (target.numerator, target.denominator))
            if group.startswith(target.question):
                bounds = [_bound(target, measured.get((group, name), {}), own, other) for name in (FROZEN, GRADIENTS)]
                cells = [group, f"{target.numerator} / {target.denominator}", *_cells(target, own, other), *bounds]
                lines.append(f"| {' | '.join(cells)} |")
    head = (
        f"| question | ratio | target | measured | | of floor | floors | ours at its floor | {FROZEN} | {GRADIENTS} |\n"
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|\n"
    )
    return head + "\n".join(lines) if lines else ""


def _bound(target: Target, least: Mapping[str, Any], own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What would be measured if ours took as long as `least`."""
    fixed = own if target.at_least else other
    if not ("ratio" in least and "ratio" in fixed):
        return ""
    ratio = least["ratio"] / fixed["ratio"]
    return f"{1 / ratio if target.at_least else ratio:.2f}"


def _cells(target: Target, own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
    if not ("ratio" in own and "ratio" in other):
        return [bound, "", "not measured", "", "", ""]
    ratio = own["ratio"] / other["ratio"]
    met = ratio >= target.bound if target.at_least else ratio <= target.bound
    cells = [bound, f"{ratio:.2f}", "met" if met else "not met"]
    if not ("least_seconds" in own and "least_seconds" in other):
        return [*cells, "", "", ""]
    shares = own["roofline_share"], other["roofline_share"]
    best = ratio / shares[1] if target.at_least else ratio * shares[0]
    floors = own["least_seconds"] / other["least_seconds"]
    return [*cells, " / ".join(f"{share:.0%}" for share in shares), f"{floors:.2f}", f"{best:.2f}"]
