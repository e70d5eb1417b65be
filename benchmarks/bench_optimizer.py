"""One optimiser step over the free entries of one layer, beside PyTorch's fused AdamW over as many float32 values.

Before it is timed, the first step of each is held against AdamW written out in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.arena import Arena, Outcome
from benchmarks.memory import held_bytes
from benchmarks.providers import OPTIMIZERS
from benchmarks.race import Contestant
from benchmarks.shapes import DENSITIES, OPTIMIZED

LR, WEIGHT_DECAY, EPS = 1e-2, 0.1, 1e-8
FLOOR = next(iter(OPTIMIZERS))


@dataclass(frozen=True)
class Question:
    """The free entries of one layer."""

    shape: tuple[int, int]
    density: float

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}-{self.density:g}"

    @property
    def count(self) -> int:
        return round(self.density * self.shape[0] * self.shape[1])


def questions(level: str) -> list[Question]:
    return [Question(shape, density) for shape in OPTIMIZED[level] for density in DENSITIES[level]]


def contestant(arena: Arena, question: Question, name: str) -> Contestant:
    dtype, make = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    parameter, grad = (torch.randn(question.count, generator=generator).to(arena.device, dtype) for _ in range(2))
    parameter = nn.Parameter(parameter)
    before = parameter.detach().double()
    parameter.grad = grad
    optimizer = make([parameter])
    optimizer.param_groups[0] |= {"lr": LR, "weight_decay": WEIGHT_DECAY}
    optimizer.step()
    first = parameter.detach().clone()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    moved = 2 * held_bytes([parameter, *state]) + held_bytes([grad])
    info = {"state_bytes": held_bytes(state)}
    check = partial(check_first_step, before, grad, first)
    return Contestant(optimizer.step, check, least=moved / arena.machine.bandwidth(), bytes=moved, info=info)


def check_first_step(before: Tensor, grad: Tensor, after: Tensor) -> None:
    """The corrected moments of a first step are the gradient and its square, so the update is its sign, nearly.

    Allowed are 1e-4 of the update (correction factors differ by that much in float32) and a rounding to either side.
    """
    update = grad.double() / (grad.double().abs() + EPS)
    want = before * (1 - LR * WEIGHT_DECAY) - LR * update
    bound = 1e-4 * LR + torch.finfo(after.dtype).eps * (before.abs() + LR)
    worst = ((after.double() - want).abs() / bound).max()
    assert worst <= 1, f"first step: off by {worst:.3g} of what is allowed"


@pytest.fixture(scope="module")
def steps(arena: Arena, question: Question) -> Outcome:
    (n, k) = question.shape
    group = f"optimiser step of a {n} x {k} layer, density {question.density:.2%}"
    return arena.race(group, FLOOR, {name: partial(contestant, arena, question, name) for name in OPTIMIZERS})


@pytest.mark.parametrize("provider", OPTIMIZERS)
def test_optimizer_step(arena, steps, provider, benchmark):
    arena.record(steps, provider, benchmark)
