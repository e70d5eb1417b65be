"""Host time of a layer's forward and backward on a GPU that is not there: ``python -m benchmarks.layer_host``.

The device's part is taken away as in `benchmarks.optimizer_host`: kernels are launched up to the driver, and products
are so small that a CPU makes them in no time. Beside ``nn.Linear`` and the gated layers stand two floors, functions of
autograd written in Python that do nothing else. The first multiplies as ``nn.Linear`` does, so what it takes more is
Python's way into autograd and back. The second calls what the gradient of a ticket takes, too: a product and a kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from benchmarks.optimizer_host import without_device
from rigsa_kernels import GatedSparseLinear, SparsePattern, gated_linears, ops, replace_linears, triton_gather

SIDE = 32
PLAIN, FUNCTION, GATHERING = (
    "nn.Linear, trained",
    "floor: its products in a Function",
    "floor: and the gathering kernel",
)
LEVEL_0, TICKET = "gated, level 0", "gated, ticket"


class _Products(torch.autograd.Function):
    """What ``nn.Linear`` computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.t() @ x


class _Gathering(torch.autograd.Function):
    """The same with the gradients of values and gate in place of the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, alpha: Tensor, *pattern: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, values, alpha, *pattern)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, values, alpha, *pattern = ctx.saved_tensors
        dvalues, dalpha = ops._dvalues(dy, x, values, alpha, pattern)
        return dy @ weight, None, dvalues, dalpha, *(None for _ in pattern)


def gated(density: float) -> GatedSparseLinear:
    """One layer, which composes."""
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False))
    replace_linears(model, numerics="composed", alpha_init=0.5)
    if density < 1:
        mask = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < density
        gated_linears(model)["0"].set_pattern(SparsePattern.from_mask(mask))
    return next(iter(gated_linears(model).values()))


def floors(plain: nn.Linear, ticket: GatedSparseLinear) -> dict[str, Callable[[Tensor], Tensor]]:
    """The two functions, with the tensors of layers of one size, dtype and device."""
    weight, pattern = ticket.frozen_matrix(), ticket.pattern.tensors
    values, alpha = ticket.rigsa_values, ticket.rigsa_alpha
    return {
        FUNCTION: lambda x: _Products.apply(x, plain.weight),
        GATHERING: lambda x: _Gathering.apply(x, weight, values, alpha, *pattern),
    }


def providers() -> dict[str, Callable[[Tensor], Tensor]]:
    ticket, plain = gated(0.05), nn.Linear(SIDE, SIDE, bias=False)
    return {PLAIN: plain, **floors(plain, ticket), LEVEL_0: gated(1.0), TICKET: ticket}


def measure(number: int = 200, repeats: int = 15) -> dict[str, float]:
    """Microseconds of CPU time of a forward and backward pass, the least of `repeats`, taken in turns."""
    with without_device(), mock.patch.object(ops, "_dvalues", triton_gather.checked_dvalues):
        passes = {name: _pass(call) for name, call in providers().items()}
        least = dict.fromkeys(passes, float("inf"))
        for _ in range(repeats):
            for name, once in passes.items():
                once()
                start = time.process_time()
                for _ in range(number):
                    once()
                least[name] = min(least[name], (time.process_time() - start) / number)
    return {name: 1e6 * seconds for name, seconds in least.items()}


def _pass(call: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    x = torch.randn(SIDE, SIDE, requires_grad=True)
    dy = torch.randn(SIDE, SIDE)

    def once() -> None:
        call(x).backward(dy)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=200, help="passes that are timed together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.number)
    print(f"torch {torch.__version__}, triton {triton.__version__}, one CPU thread, {SIDE} x {SIDE}, kernels not run")
    for name, value in found.items():
        print(f"{name:36s} {value:7.1f} us {value / found[PLAIN]:5.2f} x nn.Linear")


if __name__ == "__main__":
    main()
