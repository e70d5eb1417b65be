"""The operators of `rigsa_kernels.free_entries` in Triton: one launch for the matrices of a whole model.

A program walks ROWS rows of one matrix along the bit mask, WORDS words at a time, or one tile. A table on the device
holds a row of addresses and sizes for each matrix (`rigsa_kernels.triton_tables`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import is_tiled
from .triton_common import free_entries, load_words
from .triton_tables import (
    TYPES,
    Table,
    cell,
    current_stream,
    filled,
    on_device,
    place_in_row,
    pointers,
    read,
)

ROWS, WORDS = 8, 4
"""Rows and words that a program takes at a time: 8 values a thread. The words of 8 rows lie in one 32-byte sector."""
AT_A_TIME = 1024
"""Entries of a tile that a program takes at a time."""
GATHER, SCATTER, COMPOSE = 0, 1, 2


@triton.jit
def _move(table_ptr, row, at, position, alpha, free, MATRIX: tl.constexpr, PACKED: tl.constexpr, VALUE: tl.constexpr,
          TASK: tl.constexpr):  # fmt: skip
    """Do TASK between the entries `at` of a matrix and the places `position` of its packed vector, where `free`."""
    packed_ptr = pointers(table_ptr, row, 1, position, PACKED)
    matrix_ptr = pointers(table_ptr, row, 0, at, MATRIX)
    if TASK == 0:
        tl.store(packed_ptr, tl.load(matrix_ptr, mask=free, other=0.0), mask=free)
    else:
        entry = tl.load(packed_ptr, mask=free, other=0.0)
        if TASK == 2:
            value = tl.load(pointers(table_ptr, row, 2, position, VALUE), mask=free, other=0.0).to(tl.float32)
            entry = entry.to(tl.float32) + alpha * value
        tl.store(matrix_ptr, entry.to(MATRIX), mask=free)


@triton.jit
def _gate(table_ptr, row, ALPHA: tl.constexpr, TASK: tl.constexpr):
    """alpha, float32; 0 for a TASK that takes none."""
    if TASK == 2:
        return tl.load(pointers(table_ptr, row, 3, 0, ALPHA)).to(tl.float32)
    else:
        return 0.0


@triton.jit
def free_entries_kernel(table_ptr, owners_ptr, MATRIX: tl.constexpr, PACKED: tl.constexpr, VALUE: tl.constexpr,
                        ALPHA: tl.constexpr, TASK: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """TASK: 0 reads the free entries into the packed vector, 1 writes it to them, 2 writes packed + alpha * values.

    Columns of the table: matrix, packed, values, alpha, words, word_offsets, row_base, N, K.
    """
    row = tl.load(owners_ptr + tl.program_id(0))
    N, K = cell(table_ptr, row, 7), cell(table_ptr, row, 8)
    n = place_in_row(table_ptr, row) * ROWS + tl.arange(0, ROWS)[:, None, None]
    row_base = tl.load(pointers(table_ptr, row, 6, n, tl.int32), mask=n < N, other=0)
    words_ptr = pointers(table_ptr, row, 4, 0, tl.int32)
    word_offsets_ptr = pointers(table_ptr, row, 5, 0, tl.int16)
    num_words = (K + 31) // 32
    alpha = _gate(table_ptr, row, ALPHA, TASK)
    for word in range(0, num_words, WORDS):
        q = word + tl.arange(0, WORDS)[None, :, None]
        ok = (n < N) & (q < num_words)
        free, position = free_entries(*load_words(words_ptr, word_offsets_ptr, row_base, q * N + n, ok))
        at = n * K + q * 32 + tl.arange(0, 32)[None, None, :]
        _move(table_ptr, row, at, position, alpha, free, MATRIX, PACKED, VALUE, TASK)


@triton.jit
def tile_entries_kernel(table_ptr, owners_ptr, MATRIX: tl.constexpr, PACKED: tl.constexpr, VALUE: tl.constexpr,
                        ALPHA: tl.constexpr, TASK: tl.constexpr, ROWS: tl.constexpr, LINE: tl.constexpr):  # fmt: skip
    """`free_entries_kernel` of a pattern of tiles: a program walks one tile, `LINE` columns of `ROWS` rows at a time.

    Columns of the table: matrix, packed, values, alpha, tiles, places, none, N, K, tiles' number, TILE_N, TILE_K.
    """
    row = tl.load(owners_ptr + tl.program_id(0))
    N, K = cell(table_ptr, row, 7), cell(table_ptr, row, 8)
    TILES, TILE_N, TILE_K = cell(table_ptr, row, 9), cell(table_ptr, row, 10), cell(table_ptr, row, 11)
    number = place_in_row(table_ptr, row)
    tile = tl.load(pointers(table_ptr, row, 4, number, tl.int32)).to(tl.int64)
    first = tl.load(pointers(table_ptr, row, 5, number, tl.int32)).to(tl.int64)
    width = tl.load(pointers(table_ptr, row, 5, TILES + number, tl.int32))
    columns = (K + TILE_K - 1) // TILE_K
    top, left = tile // columns * TILE_N, tile % columns * TILE_K
    height, breadth = min(TILE_N, N - top), min(TILE_K, K - left)
    alpha = _gate(table_ptr, row, ALPHA, TASK)
    for down in range(0, height, ROWS):
        n = down + tl.arange(0, ROWS)[:, None]
        for right in range(0, breadth, LINE):
            k = right + tl.arange(0, LINE)[None, :]
            free = (n < height) & (k < breadth)
            position = first + n * width + k
            at = (top + n) * K + left + k
            _move(table_ptr, row, at, position, alpha, free, MATRIX, PACKED, VALUE, TASK)


def gather_free_(packed: list[Tensor], matrices: list[Tensor], patterns: list[Tensor]) -> None:
    """Launcher of ``rigsa::gather_free_`` (`rigsa_kernels.free_entries`)."""
    _launch(matrices, packed, packed, packed, patterns, GATHER)


def scatter_free_(matrices: list[Tensor], packed: list[Tensor], patterns: list[Tensor]) -> None:
    """Launcher of ``rigsa::scatter_free_``."""
    _launch(matrices, packed, packed, packed, patterns, SCATTER)


def compose_free_(
    matrices: list[Tensor], base_values: list[Tensor], values: list[Tensor], alphas: list[Tensor],
    patterns: list[Tensor],
) -> None:  # fmt: skip
    """Launcher of ``rigsa::compose_free_``."""
    _launch(matrices, base_values, values, alphas, patterns, COMPOSE)


def _launch(
    matrices: list[Tensor],
    packed: list[Tensor],
    values: list[Tensor],
    alphas: list[Tensor],
    patterns: list[Tensor],
    task: int,
) -> None:
    rows = list(zip(matrices, packed, values, alphas, patterns[0::3], patterns[1::3], patterns[2::3], strict=True))
    for row in rows:
        _check(row)
    rows = [row for row in rows if row[1].numel()]
    for tiled in (False, True):
        _launch_rows([row for row in rows if is_tiled(list(row[4:])) == tiled], task, tiled=tiled)


def _launch_rows(rows: list[tuple[Tensor, ...]], task: int, *, tiled: bool) -> None:
    """One launch for matrices whose patterns are all packed or all made of tiles."""
    if not rows:
        return
    matrix = rows[0][0]
    columns = [[tensor.data_ptr() for tensor in column] for column in zip(*rows, strict=True)]
    columns += [[own.shape[at] for own, *_ in rows] for at in (0, 1)]
    if tiled:
        sides = [[row[6].shape[at] for row in rows] for at in (1, 2)]
        columns += [[row[4].numel() for row in rows], *sides]
        line = min(AT_A_TIME, triton.next_power_of_2(max(sides[1])))
        down = min(AT_A_TIME // line, triton.next_power_of_2(max(sides[0])))
    table = _on_device(filled(columns).tobytes(), matrix.device, current_stream(matrix.device), tiled)
    types = [TYPES[rows[0][column].dtype] for column in range(4)]
    with torch.cuda.device_of(matrix):
        if tiled:
            tile_entries_kernel[(table.grid,)](
                table.rows, table.owners, *types, TASK=task, ROWS=down, LINE=line, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        else:
            free_entries_kernel[(table.grid,)](
                table.rows, table.owners, *types, TASK=task, ROWS=ROWS, WORDS=WORDS, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _on_device(content: bytes, device: torch.device, stream: int, tiled: bool) -> Table:
    """The table of `content`: a pure function of it, so it cannot go stale."""
    rows = read(content)
    return on_device(rows, rows[:, 9] if tiled else (rows[:, 7] + ROWS - 1) // ROWS, device, stream)


def _check(row: tuple[Tensor, ...]) -> None:
    """Raises ValueError where the kernel would read or write what a tensor does not have."""
    matrix, packed, values, _, *pattern = row
    words, word_offsets, row_base = pattern
    num_words = (-(-matrix.shape[1] // 32), matrix.shape[0])
    if is_tiled(pattern):
        if word_offsets.shape != (2, words.numel()) or row_base.dim() != 3 or row_base.numel():
            raise ValueError(f"patterns: expected places of {words.numel()} tiles, got {list(word_offsets.shape)}")
    elif tuple(words.shape) != num_words or words.shape != word_offsets.shape or row_base.shape != matrix.shape[:1]:
        raise ValueError(f"patterns: expected those of {list(matrix.shape)}, got words of {list(words.shape)}")
    if packed.shape != values.shape or packed.dim() != 1:
        raise ValueError(f"values: expected as many as base values, {packed.numel()}, got {list(values.shape)}")
    if any(not tensor.is_contiguous() or tensor.device != matrix.device for tensor in row):
        raise ValueError(f"matrices: expected contiguous tensors on {matrix.device} beside each matrix")
