"""What the Triton kernels share. Imported on a GPU only, when the first of them is launched."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import WORD_BITS
from .tiles import is_tiled

MIN_TRITON = (3, 5)
"""Older compilers know no recursion in a kernel, no masked histogram and no tuple of arguments."""
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
    raise RuntimeError(f"triton: expected 3.5 or newer, which PyTorch 2.9 and newer bring, got {triton.__version__}")

MIN_ARCHITECTURE = 80
"""Tensor cores for bfloat16 and asynchronous copies came with compute capability 8.0 (Ampere)."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of operands and values. Triton has no float64 tensor product; float64 runs on PyTorch on every device."""

MAX_REGISTERS = 255
"""A thread of a product may have as many as there are, which leaves room for two programs of four warps on a
multiprocessor. Unless it is told a limit, the assembler aims at one program more and spills a few bytes to get there.
"""


@triton.jit
def popcount(bits):
    """Number of set bits, int32, of each uint32. LLVM turns these shifts, masks and the product into one POPC."""
    bits = bits.to(tl.uint32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_words(words_ptr, word_offsets_ptr, row_base, at, ok):
    """A pattern's words, uint32, and the number of values before each, int32 (`rigsa_kernels.format`).

    Args:
        row_base: int32, values before the tile's rows; broadcastable to `at`.
        at: places of the tile's words.
        ok: boolean, broadcastable to `at`; a word that is not ok counts as empty and is not read.
    """
    words = tl.load(words_ptr + at, mask=ok, other=0).to(tl.uint32, bitcast=True)
    offsets = tl.load(word_offsets_ptr + at, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.int32)
    return words, row_base + offsets


@triton.jit
def free_entries(words, first):
    """Which entries of words ``[R, Q, 1]`` are free, and where their values stand: boolean and int32 ``[R, Q, 32]``."""
    bit = tl.arange(0, 32)[None, None, :]
    free = ((words >> bit.to(tl.uint32)) & 1) != 0
    before = words & ((1 << bit) - 1).to(tl.uint32)
    return free, first + popcount(before)


@triton.jit
def grouped_program(num_rows, num_columns, GROUP: tl.constexpr):
    """``(row, column)`` of this program's tile: `GROUP` rows at a time, so that neighbours share operands in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * num_columns) * GROUP
    rows = min(num_rows - first, GROUP)
    within = pid % (GROUP * num_columns)
    return first + within % rows, within // rows


@triton.jit
def clamped(left, BLOCK: tl.constexpr):
    """``0 .. BLOCK - 1``, and 0 from `left` on: what lies beyond an edge is loaded from inside and never stored.

    The hint is for vectors of at most 16 bytes, which lie whole on one side of the edge where rows start aligned; where
    they do not, none are formed.
    """
    offs = tl.arange(0, BLOCK)
    return tl.max_contiguous(tl.multiple_of(tl.where(offs < left, offs, 0), BLOCK), BLOCK)


def architecture() -> int:
    """Compute capability of the current GPU, as 89 for 8.9.

    Raises:
        RuntimeError: it is older than `MIN_ARCHITECTURE`.
    """
    driver = triton.runtime.driver.active
    return _supported(driver, driver.get_current_device())


@functools.cache  # asking the driver takes longer than a launch
def _supported(driver: Any, device: int) -> int:
    del device  # part of the key: a machine may hold different GPUs
    found = int(driver.get_current_target().arch)
    if found < MIN_ARCHITECTURE:
        raise RuntimeError(
            f"device: expected compute capability 8.0 or newer (Ampere, Ada, Hopper), got {found // 10}.{found % 10}"
        )
    return found


def as_rows(tensor: Tensor) -> Tensor:
    """``[..., C]`` as ``[M, C]`` whose entries of a row are adjacent: a view where one exists, else a copy."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def check_product(
    x: Tensor, shape: tuple[int, int], values: Tensor, alpha: Tensor, pattern: list[Tensor], **others: Tensor | None
) -> None:
    """What a kernel relies on and PyTorch's dispatcher does not see.

    Args:
        x: an operand ``[M, ...]``, which says the device.
        shape: (N, K) of the layer.
        others: further tensors by name; the same device, entries of a row adjacent.

    Raises:
        RuntimeError: the GPU is too old.
        ValueError: an argument that the kernels cannot take; nothing was launched.
    """
    architecture()
    n, k = shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected {_names(DTYPES)} on a GPU, got {x.dtype}")
    if values.dtype not in DTYPES:
        raise ValueError(f"values: expected {_names(DTYPES)} on a GPU, got {values.dtype}")
    if alpha.dtype != torch.float32 or alpha.numel() != 1:
        raise ValueError(f"alpha: expected float32 of one entry, got {alpha.dtype} {list(alpha.shape)}")
    if is_tiled(pattern):
        number, size = pattern[0].numel(), pattern[2].shape
        expected = [[number], [2, number], [0, *size[1:]]]
    else:
        num_words = -(-k // WORD_BITS)
        expected = [[num_words, n], [num_words, n], [n]] if pattern else []
    if [list(index.shape) for index in pattern] != expected or (not pattern and tuple(values.shape) != shape):
        raise ValueError(
            f"pattern: expected one of [{n}, {k}], got index tensors of shape "
            f"{[list(index.shape) for index in pattern]} and values of shape {list(values.shape)}"
        )
    named = {"values": values, "alpha": alpha, **others} | {f"pattern[{i}]": index for i, index in enumerate(pattern)}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
