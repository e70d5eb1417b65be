"""How cost grows with tokens, width, density, layers and entries: one axis at a time, and the exponent of its curve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest

from benchmarks import bench_linear, bench_selection, bench_step
from benchmarks.arena import Arena, Outcome
from benchmarks.providers import FLOOR, FULL, LEVEL_0, TICKET_NAME
from benchmarks.race import Contestant
from benchmarks.shapes import SCALE, TICKET, USUAL, Batch

TOKENS, SHAPE, DTYPE = 512, (1536, 576), USUAL
COMPOSED, EXACT = "ours, composed", "ours, exact"
PROVIDERS = {
    "tokens": (FLOOR, COMPOSED, EXACT),
    "width": (FLOOR, COMPOSED, EXACT),
    "density": (FLOOR, COMPOSED, EXACT),
    "layers": (FULL, LEVEL_0, TICKET_NAME),
    "entries": (bench_selection.FLOOR, "ours, largest", "ours, sign test and largest"),
}


@dataclass(frozen=True)
class Question:
    """One point of one axis."""

    axis: str
    x: float

    def __str__(self) -> str:
        return f"{self.axis}-{self.x:g}"


def questions(level: str) -> list[Question]:
    return [Question(axis, x) for axis, levels in SCALE.items() for x in levels[level]]


def contestant(arena: Arena, question: Question, name: str) -> Contestant:
    made = _contestant(arena, question, name)
    made.info |= {"axis": question.axis, "x": question.x}
    return made


def _contestant(arena: Arena, question: Question, name: str) -> Contestant:
    axis, x = question.axis, question.x
    if axis == "entries":
        return bench_selection.contestant(arena, x, name)
    if axis == "layers":
        return bench_step.contestant(arena, Batch("135M", x, 4, 89, DTYPE), name)
    tokens = x if axis == "tokens" else TOKENS
    shape = (x, x) if axis == "width" else SHAPE
    layer = bench_linear.Question(shape, tokens, x if axis == "density" else TICKET, DTYPE)
    return bench_linear.training_contestant(arena, layer, name)


@pytest.fixture(scope="module")
def points(arena: Arena, question: Question) -> Outcome:
    providers = PROVIDERS[question.axis]
    builders = {name: partial(contestant, arena, question, name) for name in providers}
    return arena.race(f"scale, {question.axis}", providers[0], builders)


@pytest.mark.parametrize("place", range(3))
def test_scale(arena, points, question, place, benchmark):
    arena.record(points, PROVIDERS[question.axis][place], benchmark)
