"""Compile Triton kernels for a GPU that is not there.

A stand-in driver names the target, so the compiler runs as it would on that GPU; `capturing` compiles exactly what a
launcher would launch, with the same specialisation on divisibility and on 1, from tensors without data
(``device="meta"``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class StandInDriver:
    """What Triton asks of a driver up to the point where a kernel would be loaded."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device of its own per target keeps Triton's kernel caches apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def active_driver(arch: int) -> Iterator[None]:
    """Inside, Triton believes in a GPU of compute capability `arch` (89 for 8.9)."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(StandInDriver(arch))
    try:
        yield
    finally:
        config._active = before


@dataclass
class Launch:
    """One launch that was compiled instead of run."""

    name: str
    grid: tuple[int, ...]
    compiled: Any = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)


@contextlib.contextmanager
def capturing(arch: int) -> Iterator[list[Launch]]:
    """Compile every Triton launch inside the block for `arch`; the list fills with what was launched.

    Give launchers ``device="meta"`` tensors. Their addresses count as aligned, as those of fresh CUDA tensors are.
    """
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        stand_ins = [_aligned(value) for value in args]
        compiled = original(self, *stand_ins, grid=grid, warmup=True, **options)
        named = dict(zip(self.arg_names, args, strict=False)) | options
        launches.append(Launch(self.fn.__name__, tuple(grid), compiled, named))
        return compiled

    with active_driver(arch):
        JITFunction.run = run
        try:
            yield launches
        finally:
            JITFunction.run = original


def _aligned(value: Any) -> Any:
    return triton.runtime.jit.MockTensor(value.dtype, list(value.shape)) if isinstance(value, Tensor) else value
