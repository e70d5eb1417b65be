"""What the Triton kernels share. Imported on a GPU only, when the first of them is launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(bits):
    """Number of set bits, int32, of each uint32. LLVM turns these shifts and masks into one POPC."""
    bits = bits.to(tl.uint32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits & 0x3F).to(tl.int32)


@triton.jit
def free_entries(words_ptr, word_offsets_ptr, row_base, at, ok):
    """Which entries of a tile are free, and where their values stand (the format's rule, `rigsa_kernels.format`).

    Args:
        row_base: int32 ``[R, 1, 1]``, values before the tile's rows.
        at: ``[R, Q, 1]`` places of the tile's words; word (r, q) covers 32 columns.
        ok: boolean, broadcastable to ``[R, Q, 1]``; a word that is not ok counts as empty and is not read.

    Returns:
        ``(free, position)``, both ``[R, Q, 32]``: boolean, and int32 index into the values.
    """
    words = tl.load(words_ptr + at, mask=ok, other=0).to(tl.uint32, bitcast=True)
    offsets = tl.load(word_offsets_ptr + at, mask=ok, other=0).to(tl.uint16, bitcast=True).to(tl.int32)
    bit = tl.arange(0, 32)[None, None, :]
    free = ((words >> bit.to(tl.uint32)) & 1) != 0
    before = words & ((1 << bit) - 1).to(tl.uint32)
    return free, row_base + offsets + popcount(before)


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
    """Compute capability of the GPU that is current for Triton, as 89 for 8.9."""
    return int(triton.runtime.driver.active.get_current_target().arch)
