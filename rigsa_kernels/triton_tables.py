"""Tables of addresses on the device, with which one launch works on many tensors.

A table has a row of `COLUMNS` int64 for each tensor or matrix, and a list of owners says which row a program works on.
Both depend on nothing but the numbers they hold, so a launcher remembers them by those (and by the stream that sent
them) and they cannot go stale. A new one travels from pinned memory, without a synchronisation.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import architecture

COLUMNS = 16
"""int64 in a row: one cache line. The last one holds the first of the row's programs; the launcher names the others."""
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
_COLUMNS = tl.constexpr(COLUMNS)


class Table(NamedTuple):
    """What one launch reads its tensors' addresses and sizes from."""

    rows: Tensor
    """int64 ``[number of rows, COLUMNS]``."""
    owners: Tensor
    """int32: the row that each program works on."""
    grid: int
    """How many programs there are."""


@triton.jit
def cell(table_ptr, row, COLUMN: tl.constexpr):
    """What a row holds in `COLUMN`, int64."""
    return tl.load(table_ptr + row * _COLUMNS + COLUMN)


@triton.jit
def place_in_row(table_ptr, row):
    """How many programs that work on `row` stand before this one, int64."""
    return tl.program_id(0) - cell(table_ptr, row, _COLUMNS - 1)


@triton.jit
def pointers(table_ptr, row, COLUMN: tl.constexpr, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """Pointers to the entries `at` of the tensor whose address stands in `COLUMN`.

    ALIGNED: a promise to the compiler, which sees no alignment in an address that is loaded: 16 bytes divide it.
    """
    pointer = cell(table_ptr, row, COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + at


def filled(columns: Sequence[Sequence[int]]) -> array[int]:
    """int64, row after row, from the columns that a launcher names; an empty one holds zeros."""
    rows = array("q", bytes(8 * COLUMNS * len(columns[0])))
    for at, column in enumerate(columns):
        if column:
            rows[at::COLUMNS] = array("q", column)
    return rows


def read(content: bytes) -> Tensor:
    """int64 ``[number of rows, COLUMNS]`` on the CPU, from the bytes of `filled`."""
    return torch.frombuffer(bytearray(content), dtype=torch.int64).view(-1, COLUMNS)


def on_device(rows: Tensor, programs: Tensor, device: torch.device, stream: int) -> Table:
    """The table of `rows`, of which each has as many programs, in a line, as `programs` says; both on the CPU.

    The last column of `rows` is written. `stream` is `current_stream`, and part of what a caller remembers a table by.

    Raises:
        RuntimeError: the GPU is too old.
    """
    architecture()
    rows[:, -1] = programs.cumsum(0) - programs
    owners = _owners(tuple(programs.tolist()), device, stream)
    return Table(sent(rows, device), owners, owners.numel())


@functools.lru_cache(maxsize=64)
def _owners(programs: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    del stream  # part of the key
    rows = torch.arange(len(programs), dtype=torch.int32, device="cpu")
    return sent(rows.repeat_interleave(torch.tensor(programs, device="cpu")), device)


def current_stream(device: torch.device) -> int:
    """A table that one stream has sent may not have arrived when another stream reads it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting: PyTorch keeps pinned memory from reuse until the copy is done."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
