"""Host time of an optimiser step on a GPU that is not there: ``python -m benchmarks.optimizer_host``.

A small model waits for the host, so this is the time of a step there. The device's part is taken away and everything
else stays: Triton's own launch code up to the driver, PyTorch's dispatcher, the tables on CPU tensors in place of CUDA
ones. Beside it stand ``torch.optim.AdamW``'s fused and foreach steps, which compute on this CPU: tensors are small, so
nearly all of their time is the host's, too.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.compiler.compiler import CompiledKernel

from rigsa_kernels import MaskedAdamW, optim, replace_linears, triton_tables
from rigsa_kernels.offline import active_driver

LAYERS = 210
"""Adapted layers of SmolLM2-135M: 30 times 7."""


def _yes(_: object) -> bool:
    """For a stub: a ``Mock`` takes as long as a third of a launch, and three are called in each."""
    return True


def _no(_: object) -> bool:
    return False


@contextlib.contextmanager
def without_device(arch: int = 90) -> Iterator[Counter[str]]:
    """Inside, `MaskedAdamW` launches its kernels on CPU tensors, and they do nothing.

    Yields:
        How many "launches" there were, and how many "tables" were sent to the device.
    """
    counts: Counter[str] = Counter()

    def launch(*args: Any) -> None:
        counts["launches"] += 1

    def sent(tensor: Tensor, device: torch.device) -> Tensor:
        counts["tables"] += 1
        return original(tensor, device)

    original = triton_tables.sent
    with (
        active_driver(arch),
        mock.patch.object(optim, "_has_kernels", _yes),
        mock.patch.object(triton_tables, "sent", sent),
        mock.patch.object(CompiledKernel, "_init_handles", _yes),
        mock.patch.object(CompiledKernel, "run", property(lambda self: launch)),
        mock.patch.object(optim, "_is_for_pytorch", _no),
    ):
        yield counts


def make_model(num_layers: int = LAYERS, features: int = 16) -> nn.Module:
    """Adapted layers with bfloat16 values, small enough that no time goes into their data."""
    linears = [nn.Linear(features, features, bias=False, dtype=torch.bfloat16) for _ in range(num_layers)]
    return replace_linears(nn.Sequential(*linears), values_dtype=torch.bfloat16)


def fill_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def backward_like(parameters: list[Tensor]) -> None:
    """What `backward` does with an optimiser inside it: the layers from the last to the first, and their hooks."""
    for parameter in reversed(parameters):
        parameter.grad = torch.zeros_like(parameter)
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):  # type: ignore[attr-defined]
            hook(parameter)


def calls(function: Callable[[], object]) -> int:
    """Functions, Python's and C's, that `function` calls: the host's work as no other process can disturb it."""
    counted = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        counted[event] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted["call"] + counted["c_call"]


def microseconds(function: Callable[[], object], number: int = 20, repeats: int = 9) -> float:
    """The least CPU time of one call."""
    function()
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(number):
            function()
        least = min(least, (time.process_time() - start) / number)
    return 1e6 * least


def microseconds_after(before: Callable[[], object], function: Callable[[], object], number: int = 100) -> float:
    """CPU time of one call right after another that is not counted, such as one that makes new gradients: the median.

    What the first call left in the processor's caches is what a training step's backward pass leaves there.
    """
    seconds = []
    for _ in range(number):
        before()
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return 1e6 * statistics.median(seconds)


def measure(num_layers: int = LAYERS) -> dict[str, float]:
    """Microseconds of a step by what is stepped."""
    model = make_model(num_layers)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: dict[str, float] = {}

    def renew() -> None:
        drop_gradients(parameters)
        keep = [torch.empty(len(found) + 1)]  # moves what is allocated next
        fill_gradients(parameters)
        keep.clear()

    with without_device():
        filling = microseconds(renew)
        for state_dtype in ("float32", "int8"):
            optimizer = MaskedAdamW(model, state_dtype=state_dtype)  # type: ignore[arg-type]
            fill_gradients(parameters)
            found[f"MaskedAdamW, {state_dtype} moments, gradients in place"] = microseconds(optimizer.step)
            found[f"MaskedAdamW, {state_dtype} moments, new gradients"] = microseconds_after(renew, optimizer.step)
        drop_gradients(parameters)
        for label, pending in (("small layers", optim.PENDING_BYTES), ("large layers", 0)):
            optimizer = MaskedAdamW(model)
            with mock.patch.object(optim, "PENDING_BYTES", pending), optim.stepping_in_backward(optimizer):

                def step(optimizer: MaskedAdamW = optimizer) -> None:
                    backward_like(parameters)
                    optimizer.step()
                    drop_gradients(parameters)

                found[f"in backward, {label}"] = microseconds(step, 3) - filling
    fill_gradients(parameters)
    for kind in ("fused", "foreach"):
        torch_optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, **{kind: True})  # or it warns of the gates
        found[f"torch.optim.AdamW({kind}), computing"] = microseconds(torch_optimizer.step)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="adapted layers, each with values and a gate")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    found = measure(arguments.layers)
    print(f"{arguments.layers} layers, torch {torch.__version__}, triton {triton.__version__}, one CPU thread")
    fused = found["torch.optim.AdamW(fused), computing"]
    for name, value in found.items():
        print(f"{name:58s} {value:9.0f} us {value / fused:6.2f} x fused")


if __name__ == "__main__":
    main()
