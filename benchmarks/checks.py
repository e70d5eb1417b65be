"""Nothing is timed before its result was held against float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CHECKED_TOKENS = 64
"""Rows of y and dx that are compared; gradients of parameters are compared whole."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of one linear layer, drawn in `dtype`, so that rounding them is not charged to a provider."""

    x: Tensor
    dy: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @cached_property
    def grad(self) -> Tensor:
        """The gradient of the effective weight, in float64."""
        return self.dy.double().T @ self.x.double()

    @cached_property
    def eager_grad(self) -> Tensor:
        """The same product in the inputs' dtype: the yardstick."""
        return (self.dy.T @ self.x).double()


@lru_cache(maxsize=1)
def make_problem(tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    return Problem(normal(tokens, shape[1]), normal(tokens, shape[0]), normal(*shape) * 0.02)


def assert_within(
    name: str, got: Tensor, want: Tensor, eager: Tensor, size: Tensor, dtype: torch.dtype, products: int = 1
) -> None:
    """Error at most twice that of the same computation in eager at the same dtype, plus one rounding of `size`.

    `eager` is one product; where `products` follow each other, each may add as much.
    """
    bound = 2 * products * ((eager.double() - want).abs().max() + torch.finfo(dtype).eps * size)
    error = (got.double() - want).abs().max()
    assert error <= bound, f"{name}: off by {error:.3g}, and {bound:.3g} is allowed"


def check_layer(layer, problem: Problem) -> None:  # type: ignore[no-untyped-def]
    """y, dx and every parameter's gradient of a `benchmarks.providers.Layer`."""
    dtype = problem.x.dtype
    rows = torch.linspace(0, len(problem.x) - 1, min(CHECKED_TOKENS, len(problem.x))).long().to(problem.x.device)
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.parameters.items()}
    weight = layer.weight(wide)
    x = problem.x.detach().requires_grad_()
    y = layer.module(x)
    dx, *grads = torch.autograd.grad(y, [x, *layer.parameters.values()], problem.dy)
    plain, some_x, some_dy = weight.detach().to(dtype), problem.x[rows], problem.dy[rows]
    products = {
        "y": (y[rows], some_x.double() @ weight.detach().T, F.linear(some_x, plain)),
        "dx": (dx[rows], some_dy.double() @ weight.detach(), some_dy @ plain),
    }
    for name, (got, want, eager) in products.items():
        assert_within(name, got.detach(), want, eager, want.abs().max(), dtype, layer.products)
    wants, eagers = (
        torch.autograd.grad(weight, list(wide.values()), grad, retain_graph=True)
        for grad in (problem.grad, problem.eager_grad)
    )
    for name, got, want, eager in zip(wide, grads, wants, eagers, strict=True):
        size = _terms(layer, wide, name, problem) if got.numel() == 1 else want.abs().max()
        assert_within(f"gradient of {name}", got, want, eager, size, dtype, layer.products)


def _terms(layer, wide: dict[str, Tensor], name: str, problem: Problem) -> Tensor:  # type: ignore[no-untyped-def]
    """Of a gate, in which the weight is linear: the sum of the sizes of what its gradient adds up."""
    with torch.no_grad():
        slope = layer.weight({**wide, name: wide[name] + 1}) - layer.weight(wide)
    return (problem.grad * slope).abs().sum()
