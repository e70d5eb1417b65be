"""Tables of addresses on the device, with which one launch works on many tensors.

A table has a row of `COLUMNS` int64 for each tensor or matrix; a list of owners says which row a program works on. Both
depend on nothing but the numbers they hold, so they are remembered by those and cannot go stale. A new one travels from
pinned memory, without a synchronisation.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 16
"""int64 in a row: one cache line."""
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def pointers(table_ptr, row, COLUMN: tl.constexpr, at, TYPE: tl.constexpr):
    """Pointers to the entries `at` of the tensor whose address stands in `COLUMN`."""
    return tl.load(table_ptr + row * _COLUMNS + COLUMN).to(tl.pointer_type(TYPE)) + at


@functools.lru_cache(maxsize=64)
def table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 ``[len(rows), COLUMNS]`` on `device`; rows are filled up with zeros."""
    return sent(torch.tensor([(*row, *[0] * (COLUMNS - len(row))) for row in rows], dtype=torch.int64), device)


@functools.lru_cache(maxsize=64)
def owners(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, for each program the row that it works on; row i has ``programs[i]`` programs in a line."""
    rows = torch.arange(len(programs), dtype=torch.int32)
    return sent(torch.repeat_interleave(rows, torch.tensor(programs)), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting: PyTorch keeps pinned memory from reuse until the copy is done."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
