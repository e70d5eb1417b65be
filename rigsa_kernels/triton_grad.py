"""The gradient at the pattern, written compactly, and the gate's gradient from the same accumulators.

    G[n, k]  = sum_m dy[m, n] * x[m, k]
    dvalues  = alpha * G  at the free entries            dalpha = sum over the free entries of values * G

One program owns one tile of G, so every entry has one writer and the sum over tokens one order: no atomics, the same
bits each time. Where the tile ends, its accumulators are written 32 columns after 32 columns, because the addresses of
a whole tile at once do not fit the registers (undivided, a 128x64 tile spilled 360 bytes a thread on sm_89). A
program's share of dalpha leaves it as one number; the shares are added afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    MAX_REGISTERS,
    as_rows,
    check_product,
    clamped,
    free_entries,
    grouped_program,
    load_words,
)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store(grad, at, ok, values_ptr, dvalues_ptr, alpha):
    """``dvalues = alpha * grad`` at `at`; returns the terms of dalpha, elementwise."""
    values = tl.load(values_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dvalues_ptr + at, (alpha * grad).to(dvalues_ptr.dtype.element_ty), mask=ok)
    return values * grad


@triton.jit
def store_packed(grad, words, first, values_ptr, dvalues_ptr, alpha, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """A tile of a packed pattern, its words ``[ROWS, COLUMNS / 32]`` halved along with it until a column is left."""
    if COLUMNS > 32:
        Q: tl.constexpr = COLUMNS // 32
        left, right = _halves(grad, ROWS, COLUMNS)
        words_left, words_right = _halves(words, ROWS, Q)
        first_left, first_right = _halves(first, ROWS, Q)
        terms = store_packed(left, words_left, first_left, values_ptr, dvalues_ptr, alpha, ROWS, COLUMNS // 2)
        return terms + store_packed(right, words_right, first_right, values_ptr, dvalues_ptr, alpha, ROWS,
                                     COLUMNS // 2)  # fmt: skip
    else:
        free, position = free_entries(words[:, :, None], first[:, :, None])
        grad = tl.reshape(grad, (ROWS, 1, 32))
        return _store(grad, position, free, values_ptr, dvalues_ptr, alpha)


@triton.jit
def store_dense(grad, start_n, start_k, values_ptr, dvalues_ptr, alpha, N, K, stride, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """A tile of a matrix ``[N, K]`` whose rows begin `stride` values apart, halved until 32 columns are left."""
    if COLUMNS > 32:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = _halves(grad, ROWS, COLUMNS)
        terms = store_dense(left, start_n, start_k, values_ptr, dvalues_ptr, alpha, N, K, stride, ROWS, HALF)
        return terms + store_dense(right, start_n, start_k + HALF, values_ptr, dvalues_ptr, alpha, N, K, stride,
                                    ROWS, HALF)  # fmt: skip
    else:
        rel_n, rel_k = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        at = tl.cast(start_n, tl.int64) * stride + start_k + (rel_n * stride + rel_k)
        ok = (rel_n < N - start_n) & (rel_k < K - start_k)
        return _store(grad, at, ok, values_ptr, dvalues_ptr, alpha)


@triton.jit
def sum_over_tokens(dy_ptr, x_ptr, rows, columns, M, stride_dym, stride_xm, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """``sum_m dy[m, n] * x[m, k]`` in float32 ``[BLOCK_N, BLOCK_K]``, for n in `rows` and k in `columns`.

    Both count from the pointers. EVEN: M is a multiple of BLOCK_M.
    """
    rel_m = tl.arange(0, BLOCK_M)
    # dy is transposed by its addresses: tl.trans of what was loaded would lose the asynchronous copy.
    dy_at = rows[:, None] + rel_m[None, :] * stride_dym
    x_at = rel_m[:, None] * stride_xm + columns[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        if EVEN:
            dy, x = tl.load(dy_ptr + dy_at), tl.load(x_ptr + x_at)
        else:
            ok = rel_m < M - start
            dy = tl.load(dy_ptr + dy_at, mask=ok[None, :], other=0.0)
            x = tl.load(x_ptr + x_at, mask=ok[:, None], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision="ieee")
        dy_ptr += BLOCK_M * stride_dym
        x_ptr += BLOCK_M * stride_xm
    return acc


@triton.jit
def grad_kernel(dy_ptr, x_ptr, values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, alpha_ptr, dvalues_ptr,
                shares_ptr, M, N, K, stride_dym, stride_xm, PACKED: tl.constexpr,
                EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_N, BLOCK_K]`` of G from dy ``[M, N]`` and x ``[M, K]``, and its share of dalpha.

    EVEN: M is a multiple of BLOCK_M.
    """
    pid_n, pid_k = grouped_program(tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    start_n, start_k = pid_n * BLOCK_N, pid_k * BLOCK_K
    acc = sum_over_tokens(dy_ptr + start_n, x_ptr + start_k, clamped(N - start_n, BLOCK_N),
                          clamped(K - start_k, BLOCK_K), M, stride_dym, stride_xm, EVEN, BLOCK_N, BLOCK_K,
                          BLOCK_M)  # fmt: skip
    alpha = tl.load(alpha_ptr).to(tl.float32)
    if PACKED:
        # The tile's words are loaded at once: loaded group by group, every entry loaded its own copy.
        rel_n, rel_q = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K // 32)[None, :]
        ok_n = rel_n < N - start_n
        row_base = tl.load(row_base_ptr + start_n + rel_n, mask=ok_n, other=0)
        at = tl.cast(start_k // 32, tl.int64) * N + start_n + (rel_q * N + rel_n)
        words, first = load_words(words_ptr, word_offsets_ptr, row_base, at, ok_n & (start_k + rel_q * 32 < K))
        terms = store_packed(acc, words, first, values_ptr, dvalues_ptr, alpha, BLOCK_N, BLOCK_K)
    else:
        terms = store_dense(acc, start_n, start_k, values_ptr, dvalues_ptr, alpha, N, K, K, BLOCK_N, BLOCK_K)
    tl.store(shares_ptr + tl.program_id(0), tl.sum(terms))


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work: rows and columns of G, tokens a step; warps and pipeline stages."""

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype) -> Tile:
    """Two programs a multiprocessor without a spill. float32 is multiplied by ordinary cores: fewer entries each."""
    return Tile(32, 64, 32, 4, 2) if dtype == torch.float32 else Tile(64, 128, 32, 4, 2)


def linear_dvalues(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Launcher of ``rigsa::linear_dvalues`` (`rigsa_kernels.ops`)."""
    dvalues = torch.empty_like(values)
    return dvalues, _launch(dy, x, values, alpha, pattern, dvalues)


def _launch(dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor], dvalues: Tensor) -> Tensor:
    """One launch; returns dalpha, shape ``(1,)``."""
    dy, x = as_rows(dy), as_rows(x)
    m, n, k = *dy.shape, x.shape[1]
    check_product(x, (n, k), values, alpha, pattern, dvalues=dvalues)
    if dy.dtype != x.dtype or dy.device != x.device or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"dy: expected {x.dtype} on {x.device} for {x.shape[0]} tokens, got {dy.dtype} on {dy.device} for {m}"
        )
    tile = choose_tile(x.dtype)
    words, word_offsets, row_base = pattern or (values, values, values)
    grid = (triton.cdiv(n, tile.block_n) * triton.cdiv(k, tile.block_k),)
    shares = torch.empty(grid, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        grad_kernel[grid](
            dy, x, values, words, word_offsets, row_base, alpha, dvalues, shares, m, n, k, dy.stride(0), x.stride(0),
            PACKED=bool(pattern), EVEN=m % tile.block_m == 0, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BLOCK_M=tile.block_m, GROUP=8, num_warps=tile.num_warps, num_stages=tile.num_stages,
            maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
    return shares.sum().view(1)
