"""The kernels one by one on a GPU, each beside cuBLAS's plain product of the same shape.

A ratio of 1 means that the adapter costs nothing, 2 is what two products cost at best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.arena import Arena, Outcome
from benchmarks.checks import Problem, assert_within, make_problem
from benchmarks.providers import ALPHA, ticket_mask
from benchmarks.race import Contestant
from benchmarks.shapes import TICKET, linear_shapes
from rigsa_kernels import SparsePattern

PLAIN = "cuBLAS"
OPERATIONS = ("forward", "dx", "gradient")
PROVIDERS = (PLAIN, "composed", "exact")


@dataclass(frozen=True)
class Question:
    """One operation of one layer."""

    operation: str
    shape: tuple[int, int]
    tokens: int
    density: float

    def __str__(self) -> str:
        return f"{self.operation}-{self.shape[0]}x{self.shape[1]}-{self.tokens}-{self.density:g}"


def questions(level: str) -> list[Question]:
    tokens = (860,) if level == "smoke" else (32, 860, 4096)
    shapes = linear_shapes("1.7B")[-1:] if level == "smoke" else linear_shapes("1.7B")
    return [
        Question(operation, shape, count, density)
        for operation in OPERATIONS for shape in shapes for count in tokens for density in (1.0, TICKET)
    ]  # fmt: skip


Result = Callable[[], Tensor]


def product(problem: Problem, pattern: SparsePattern, operation: str, provider: str) -> tuple[Result, Tensor, Tensor]:
    """``(what is timed, the truth, the yardstick)``: ours through the operator, or the plain product."""
    x, dy, weight = problem.x, problem.dy, problem.weight
    values = pattern.gather(torch.full_like(weight, 1 / weight.shape[1]))
    alpha = torch.full((1,), ALPHA, device=x.device)
    exact = torch.full((1,), provider == "exact", device=x.device)
    ours, tail = torch.ops.rigsa, (values, alpha, pattern.tensors)
    if operation == "gradient":
        scale = 1.0 if provider == PLAIN else ALPHA
        want, eager = (scale * grad for grad in (problem.grad, problem.eager_grad))
        if provider == PLAIN:
            return lambda: dy.T @ x, want, eager
        return lambda: ours.linear_dvalues(dy, x, *tail)[0], pattern.gather(want), pattern.gather(eager)
    total = weight.double()
    if provider != PLAIN:
        total = total + ALPHA * pattern.scatter(values).double()
    if operation == "forward":
        run = (lambda: x @ weight.T) if provider == PLAIN else lambda: ours.linear_fwd(x, [weight], None, *tail, exact)
        return run, x.double() @ total.T, x @ total.to(x.dtype).T
    run = (lambda: dy @ weight) if provider == PLAIN else lambda: ours.linear_dx(dy, [weight], *tail, exact)
    return run, dy.double() @ total, dy @ total.to(dy.dtype)


def contestant(arena: Arena, question: Question, provider: str) -> Contestant:
    problem = make_problem(question.tokens, question.shape, torch.bfloat16, arena.device)
    pattern = SparsePattern.dense(*question.shape)
    if question.density < 1:
        pattern = SparsePattern.from_mask(ticket_mask(question.shape, question.density, arena.device))
    run, want, eager = product(problem, pattern, question.operation, provider)

    def check() -> None:
        assert_within(provider, run(), want, eager, want.abs().max(), torch.bfloat16)

    (n, k), m = question.shape, question.tokens
    moved = 2 * (m * n + m * k + n * k)
    least = arena.machine.roofline(2 * m * n * k, moved, torch.bfloat16)
    return Contestant(run, check, least=least, bytes=moved, tokens=m)


@pytest.fixture(scope="module")
def products(arena: Arena, question: Question) -> Outcome:
    n, k = question.shape
    group = f"{question.operation} of a {n} x {k} layer, kernel alone, {question.tokens} tokens, {question.density:.2%}"
    return arena.race(group, PLAIN, {name: partial(contestant, arena, question, name) for name in PROVIDERS})


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
def test_product(arena, products, provider, benchmark):
    arena.record(products, provider, benchmark)
