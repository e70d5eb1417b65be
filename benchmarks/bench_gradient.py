"""The gradient at the pattern: the whole product and a gather, dy copied first or not, or sampled on CSR.

What `rigsa_kernels.reference` rests on, SAMPLED_PRODUCT_DENSITY and `_whole_product`. The floor is the product alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.arena import Arena, Outcome
from benchmarks.checks import Problem, assert_within, make_problem
from benchmarks.providers import ticket_mask
from benchmarks.race import Contestant, UnavailableError
from rigsa_kernels import SparsePattern, reference
from rigsa_kernels.format import flat_indices

TOKENS = {"smoke": 89, "core": 1424, "full": 1424}
LEVEL_DENSITIES = {"smoke": (0.0346,), "core": (0.01, 0.0346, 0.2), "full": (0.01, 0.02, 0.03, 0.0346, 0.05, 0.1, 0.2)}
SHAPE, SHAPE_OUT = (1536, 576), (576, 1536)
"""Of the layers into SmolLM2-135M's MLP, and of the one out of it."""


@dataclass(frozen=True)
class Question:
    """One layer, one batch."""

    tokens: int
    density: float
    dtype: str
    shape: tuple[int, int] = SHAPE

    def __str__(self) -> str:
        n, k = self.shape
        return f"{n}x{k}-{self.tokens}-{self.density:g}-{self.dtype}"


def questions(level: str) -> list[Question]:
    densities, dtypes = LEVEL_DENSITIES[level], ("bfloat16", "float32")
    into = [Question(TOKENS[level], density, dtype) for dtype in dtypes for density in densities]
    return [*into, *(Question(TOKENS[level], 0.0346, dtype, SHAPE_OUT) for dtype in dtypes)]


def product(problem: Problem, pattern: SparsePattern) -> Tensor:
    return problem.dy.t() @ problem.x


def whole(problem: Problem, pattern: SparsePattern) -> Tensor:
    return product(problem, pattern).take(flat_indices(pattern.words, pattern.in_features))


def whole_from_a_copy(problem: Problem, pattern: SparsePattern) -> Tensor:
    return (problem.dy.t().contiguous() @ problem.x).take(flat_indices(pattern.words, pattern.in_features))


def sampled(problem: Problem, pattern: SparsePattern) -> Tensor:
    if problem.x.device.type == "cuda":
        raise UnavailableError("sampled on CSR: a path of the CPU")
    return reference._sampled_product(problem.dy, problem.x, pattern.tensors)


WAYS = {
    "the product alone": product,
    "whole product, gathered": whole,
    "whole product of a copy, gathered": whole_from_a_copy,
    "sampled on CSR": sampled,
}
FLOOR = next(iter(WAYS))


def contestant(arena: Arena, question: Question, name: str) -> Contestant:
    problem = make_problem(question.tokens, question.shape, getattr(torch, question.dtype), arena.device)
    mask = ticket_mask(question.shape, question.density, arena.device)
    pattern = SparsePattern.from_mask(mask)
    run = partial(WAYS[name], problem, pattern)

    def check() -> None:
        want, eager = problem.grad, problem.eager_grad
        if name != FLOOR:
            want, eager = want[mask], eager[mask]
        assert_within(name, run(), want, eager, want.abs().max(), problem.x.dtype)

    return Contestant(run, check)


@pytest.fixture(scope="module")
def gradients(arena: Arena, question: Question) -> Outcome:
    n, k = question.shape
    group = f"gradient of a {n} x {k} layer, {question.tokens} tokens, {question.density:.2%}, {question.dtype}"
    return arena.race(group, FLOOR, {name: partial(contestant, arena, question, name) for name in WAYS})


@pytest.mark.parametrize("provider", WAYS)
def test_gradient(arena, gradients, provider, benchmark):
    arena.record(gradients, provider, benchmark)
