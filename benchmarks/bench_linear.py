"""Forward and backward of one linear layer: every way to adapt it beside the plain layer.

Forward is the first of an optimiser step: what a step composes once is in it (except in *later micro-batch*). Backward
gives the gradients of x and of all trainable parameters; the floor's are those of x and of the whole weight. The
roofline is that of the plain layer: its products, and its operands and results moved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from benchmarks.arena import Arena, Builder, Outcome
from benchmarks.checks import Problem, check_layer, make_problem
from benchmarks.memory import extra_bytes, saved_bytes
from benchmarks.providers import FLOOR, LATER, LAYERS, Layer
from benchmarks.race import Contestant
from benchmarks.shapes import DENSITIES, DTYPES, LINEARS, TOKENS


@dataclass(frozen=True)
class Question:
    """One layer, one batch."""

    shape: tuple[int, int]
    tokens: int
    density: float
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}-{self.tokens}-{self.density:g}-{self.dtype}"

    def problem(self, device: torch.device) -> Problem:
        return make_problem(self.tokens, self.shape, getattr(torch, self.dtype), device)

    def group(self, operation: str) -> str:
        n, k = self.shape
        return f"{operation} of a {n} x {k} layer, {self.tokens} tokens, density {self.density:.2%}, {self.dtype}"


def questions(level: str) -> list[Question]:
    return [
        Question(shape, tokens, density, dtype)
        for dtype in DTYPES[level]
        for shape in LINEARS[level]
        for tokens in TOKENS[level]
        for density in DENSITIES[level]
    ]


def forward_contestant(arena: Arena, question: Question, name: str) -> Contestant:
    problem, layer = _build(arena, question, name)
    x = problem.x.detach().requires_grad_()
    run = partial(layer.module, x)
    return _contestant(arena, problem, layer, run, layer.refresh, products=1)


def backward_contestant(arena: Arena, question: Question, name: str) -> Contestant:
    problem, layer = _build(arena, question, name)
    x, parameters = problem.x.detach().requires_grad_(), list(layer.parameters.values())
    outputs: list[torch.Tensor] = []

    def prepare() -> None:
        outputs[:] = [layer.module(x)]

    def run() -> None:
        torch.autograd.grad(outputs.pop(), [x, *parameters], problem.dy)

    prepared = _contestant(arena, problem, layer, run, prepare, products=2)
    prepared.info["saved_bytes"] = saved_bytes(prepare, layer.module)
    return prepared


def training_contestant(arena: Arena, question: Question, name: str) -> Contestant:
    """Both in one, as the first micro-batch of a step."""
    problem, layer = _build(arena, question, name)
    x, parameters = problem.x.detach().requires_grad_(), list(layer.parameters.values())

    def run() -> None:
        torch.autograd.grad(layer.module(x), [x, *parameters], problem.dy)

    return _contestant(arena, problem, layer, run, layer.refresh, products=3)


def _build(arena: Arena, question: Question, name: str) -> tuple[Problem, Layer]:
    problem = question.problem(arena.device)
    return problem, (LAYERS | LATER)[name](problem, question.density)


def _contestant(arena, problem, layer, run, prepare, products) -> Contestant:  # type: ignore[no-untyped-def]
    (n, k), m, width = problem.weight.shape, len(problem.x), problem.weight.element_size()
    moved = products * width * (m * n + m * k + n * k)
    least = arena.machine.roofline(products * 2 * m * n * k, moved, problem.weight.dtype)
    check = partial(check_layer, layer, problem)
    prepare()
    info = {"extra_bytes": extra_bytes(run, arena.device)}
    return Contestant(run, check, prepare, least, moved, m, info)


def builders(names, contestant, arena: Arena, question: Question) -> dict[str, Builder]:  # type: ignore[no-untyped-def]
    return {name: partial(contestant, arena, question, name) for name in names}


@pytest.fixture(scope="module")
def forward(arena: Arena, question: Question) -> Outcome:
    entries = builders(LAYERS | LATER, forward_contestant, arena, question)
    return arena.race(question.group("forward"), FLOOR, entries)


@pytest.fixture(scope="module")
def backward(arena: Arena, question: Question) -> Outcome:
    return arena.race(question.group("backward"), FLOOR, builders(LAYERS, backward_contestant, arena, question))


@pytest.mark.parametrize("provider", LAYERS | LATER)
def test_forward(arena, forward, provider, benchmark):
    arena.record(forward, provider, benchmark)


@pytest.mark.parametrize("provider", LAYERS)
def test_backward(arena, backward, provider, benchmark):
    arena.record(backward, provider, benchmark)
