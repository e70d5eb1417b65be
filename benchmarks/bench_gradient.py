"""The gradient at the pattern: the whole product and a gather, dy copied first or not, sampled on CSR, or by tiles.

What `rigsa_kernels.reference` rests on: SAMPLED_PRODUCT_DENSITY, `_whole_product`, and `multiplies_tiles` in
`rigsa_kernels.dispatch`. The floor is the product alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product as product_of

import pytest
import torch
from torch import Tensor

from benchmarks.arena import Arena, Outcome
from benchmarks.checks import Problem, assert_within, make_problem
from benchmarks.providers import ticket_mask, ticket_tiles
from benchmarks.race import Contestant, UnavailableError
from rigsa_kernels import SparsePattern, reference
from rigsa_kernels.format import positions

TOKENS = {"smoke": 89, "core": 1424, "full": 1424}
LEVEL_DENSITIES = {"smoke": (0.0346,), "core": (0.01, 0.0346, 0.2), "full": (0.01, 0.02, 0.03, 0.0346, 0.05, 0.1, 0.2)}
TILED = [(density, dtype) for dtype in ("bfloat16", "float32") for density in (0.0346, 0.16)]
LEVEL_TILES = {"smoke": (32,), "core": (16, 32, 64), "full": (16, 32, 64, 128)}
SHAPE, SHAPE_OUT = (1536, 576), (576, 1536)
"""Of the layers into SmolLM2-135M's MLP, and of the one out of it."""


@dataclass(frozen=True)
class Question:
    """One layer, one batch."""

    tokens: int
    density: float
    dtype: str
    shape: tuple[int, int] = SHAPE
    tile: int | None = None

    def __str__(self) -> str:
        n, k = self.shape
        return f"{n}x{k}-{self.tokens}-{self.density:g}-{self.dtype}" + (f"-{self.tile}" if self.tile else "")


def questions(level: str) -> list[Question]:
    densities, dtypes = LEVEL_DENSITIES[level], ("bfloat16", "float32")
    into = [Question(TOKENS[level], density, dtype) for dtype in dtypes for density in densities]
    out = [Question(TOKENS[level], 0.0346, dtype, SHAPE_OUT) for dtype in dtypes]
    tiles = LEVEL_TILES[level]
    return [*into, *out, *(Question(TOKENS[level], *one, tile=tile) for one, tile in product_of(TILED, tiles))]


def product(problem: Problem, pattern: SparsePattern) -> Tensor:
    return problem.dy.t() @ problem.x


def whole(problem: Problem, pattern: SparsePattern) -> Tensor:
    return product(problem, pattern).take(positions(pattern.tensors, pattern.shape))


def whole_from_a_copy(problem: Problem, pattern: SparsePattern) -> Tensor:
    return (problem.dy.t().contiguous() @ problem.x).take(positions(pattern.tensors, pattern.shape))


def sampled(problem: Problem, pattern: SparsePattern) -> Tensor:
    if problem.x.device.type == "cuda":
        raise UnavailableError("sampled on CSR: a path of the CPU")
    return reference._sampled_product(problem.dy, problem.x, pattern.tensors)


def tile_by_tile(problem: Problem, pattern: SparsePattern) -> Tensor:
    if problem.x.device.type == "cuda" or pattern.tile is None:
        raise UnavailableError("tile by tile: a path of the CPU, for patterns of tiles")
    return reference._tiled_product(problem.dy, problem.x, pattern.tensors)


WAYS = {
    "the product alone": product,
    "whole product, gathered": whole,
    "whole product of a copy, gathered": whole_from_a_copy,
    "sampled on CSR": sampled,
    "tile by tile": tile_by_tile,
}
FLOOR = next(iter(WAYS))


def contestant(arena: Arena, question: Question, name: str) -> Contestant:
    problem = make_problem(question.tokens, question.shape, getattr(torch, question.dtype), arena.device)
    if question.tile is None:
        pattern = SparsePattern.from_mask(ticket_mask(question.shape, question.density, arena.device))
    else:
        pattern = ticket_tiles(question.shape, question.density, question.tile, arena.device)
    mask = pattern.to_mask()
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
    group += f", tiles of {question.tile}" if question.tile else ""
    return arena.race(group, FLOOR, {name: partial(contestant, arena, question, name) for name in WAYS})


@pytest.mark.parametrize("provider", WAYS)
def test_gradient(arena, gradients, provider, benchmark):
    arena.record(gradients, provider, benchmark)
