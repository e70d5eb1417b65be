"""Forward and input gradient of a gated sparse linear layer, one launch each.

    y[m, n]  = sum_k  x[m, k] * W[n, k] + b[n]          W = W0 + alpha * (m . D)
    dx[m, k] = sum_n dy[m, n] * W[n, k]

Both are one matrix product whose *weight tile* is put together in registers: a tile of W0 (a matrix, or NF4 codes with
their scales) plus alpha times a tile of D (a matrix, or bits and packed values). It is rounded to the operands' dtype
and multiplied with float32 accumulation. W never exists in memory.

*composed* runs over the contraction once. *exact* runs over it twice, into the same accumulator: first with D alone,
then, once the sum has been multiplied by alpha, with W0 alone. So neither is rounded to the other's grid, and alpha is
never rounded to 16 bits (in float16 alpha * D would vanish below 6e-8). Which of the two is read from the device; one
loop serves both, and what a pass does not need is not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .format import packed_form
from .nf4 import BASE_NAMES, num_weights
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
def _base_tile(weight_ptr, absmax_ptr, levels_ptr, n, k, rel_n, rel_k, rel_q, K, ok, ok_q, NF4_BLOCK: tl.constexpr):
    """W0 at rows ``n + rel_n`` ``[R, 1, 1]`` and columns ``k + rel_k`` ``[1, Q, 32]``, float32 ``[R, Q, 32]``.

    `rel_q` ``[1, Q, 1]`` numbers the runs of 32 columns. NF4 holds two codes a byte, the even column's in the high
    half, and a scale for every NF4_BLOCK codes of the flat matrix (QLoRA, Dettmers et al. 2023, section 3); K is a
    multiple of 32 there, so a run has one scale.
    """
    if NF4_BLOCK:
        R: tl.constexpr = rel_n.shape[0]
        Q: tl.constexpr = rel_q.shape[1]
        run = (tl.cast(n, tl.int64) * K + k) // 32 + (rel_n * (K // 32) + rel_q)
        scale = tl.load(absmax_ptr + run // (NF4_BLOCK // 32), mask=ok_q, other=0.0)
        pair = tl.load(weight_ptr + run * 16 + tl.arange(0, 16)[None, None, :], mask=ok_q, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(pair >> 4, pair & 15), (R, Q, 32))
        return tl.load(levels_ptr + codes) * scale
    else:
        at = weight_ptr + tl.cast(n, tl.int64) * K + k + (rel_n * K + rel_k)
        return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _delta_tile(values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, k, rel_n, rel_k, rel_q, N, K, ok, ok_q,
                ok_n, PACKED: tl.constexpr):  # fmt: skip
    """m . D at the same tile, float32."""
    if PACKED:
        row_base = tl.load(row_base_ptr + n + rel_n, mask=ok_n, other=0)
        at = tl.cast(k // 32, tl.int64) * N + n + (rel_q * N + rel_n)
        words, first = load_words(words_ptr, word_offsets_ptr, row_base, at, ok_q)
        free, position = free_entries(words, first)
        return tl.load(values_ptr + position, mask=free, other=0.0).to(tl.float32)
    else:
        at = values_ptr + tl.cast(n, tl.int64) * K + k + (rel_n * K + rel_k)
        return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def linear_kernel(a_ptr, weight_ptr, absmax_ptr, levels_ptr, bias_ptr, values_ptr, words_ptr, word_offsets_ptr,
                  row_base_ptr, alpha_ptr, exact_ptr, out_ptr, M, N, K, stride_am,
                  DX: tl.constexpr, PACKED: tl.constexpr, NF4_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
                  EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    """A tile ``[BLOCK_M, BLOCK_O]`` of ``y [M, N]`` from a = x ``[M, K]``, or of ``dx [M, K]`` from a = dy ``[M, N]``.

    O is the output's width, C the contraction's: N and K forward, K and N for dx. EVEN: C is a multiple of BLOCK_C, and
    nothing has to be masked along it. Along M and O, what lies beyond the edge is clamped, and not stored.
    """
    if DX:
        out_size, sum_size = K, N
    else:
        out_size, sum_size = N, K
    pid_m, pid_o = grouped_program(tl.cdiv(M, BLOCK_M), tl.cdiv(out_size, BLOCK_O), GROUP)
    start_m, start_o = pid_m * BLOCK_M, pid_o * BLOCK_O
    rel_o = clamped(out_size - start_o, BLOCK_O)
    rel_c = tl.arange(0, BLOCK_C)
    a_ptr += start_m.to(tl.int64) * stride_am
    a_at = clamped(M - start_m, BLOCK_M)[:, None] * stride_am + rel_c[None, :]
    if DX:
        ROWS: tl.constexpr = BLOCK_C
        COLUMNS: tl.constexpr = BLOCK_O
        rel_n = rel_c[:, None, None]
        # The columns are built in three dimensions: tl.reshape drops the contiguity hints before Triton 3.8, and the
        # tile would then be loaded 16 bits at a time.
        column = tl.arange(0, BLOCK_O // 32)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        column = tl.where(column < out_size - start_o, column, 0)
        rel_k = tl.max_contiguous(tl.multiple_of(column, [1, 32, 32]), [1, 1, 32])
        rel_q = clamped(tl.cdiv(K - start_o, 32), BLOCK_O // 32)[None, :, None]
    else:
        ROWS: tl.constexpr = BLOCK_O
        COLUMNS: tl.constexpr = BLOCK_C
        rel_n = rel_o[:, None, None]
        rel_k = tl.arange(0, BLOCK_C // 32)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        rel_q = tl.arange(0, BLOCK_C // 32)[None, :, None]
    alpha = tl.load(alpha_ptr).to(tl.float32)
    exact = tl.load(exact_ptr).to(tl.int32)
    delta_scale = tl.where(exact != 0, 1.0, alpha)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for number in range(1 + exact):
        use_delta = number == 0
        use_base = number == exact
        for start in range(0, sum_size, BLOCK_C):
            if EVEN:
                a = tl.load(a_ptr + start + a_at)
                ok, ok_q, ok_n = True, True, True
            else:
                left = sum_size - start
                a = tl.load(a_ptr + start + a_at, mask=(rel_c < left)[None, :], other=0.0)
                if DX:
                    ok = rel_n < left
                    ok_q, ok_n = ok, ok
                else:
                    ok, ok_q, ok_n = rel_k < left, rel_q * 32 < left, True
            n = start if DX else start_o
            k = start_o if DX else start
            base = _base_tile(weight_ptr, absmax_ptr, levels_ptr, n, k, rel_n, rel_k, rel_q, K, ok & use_base,
                              ok_q & use_base, NF4_BLOCK)  # fmt: skip
            delta = _delta_tile(values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, k, rel_n, rel_k, rel_q, N, K,
                                ok & use_delta, ok_q & use_delta, ok_n & use_delta, PACKED)  # fmt: skip
            weight = tl.reshape((base + delta_scale * delta).to(a.dtype), (ROWS, COLUMNS))
            acc = tl.dot(a, weight if DX else tl.trans(weight), acc, input_precision="ieee")
        if number < exact:
            acc *= alpha
    if HAS_BIAS:
        acc += tl.load(bias_ptr + start_o + rel_o).to(tl.float32)[None, :]
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_o = start_o + tl.arange(0, BLOCK_O)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * out_size + offs_o[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_o < out_size)[None, :])


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work: output rows, output columns and contraction steps; warps and pipeline stages."""

    block_m: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int


def choose_tile(m: int, dtype: torch.dtype, *, nf4: bool, packed: bool) -> Tile:
    """The tile of every launch: no spill and at least two programs a multiprocessor (`rigsa_kernels.inspect`).

    float32 is multiplied by ordinary cores, whose operands fill the registers: fewer accumulators, and fewer again
    beside a packed difference. A few tokens (generation) need few rows. Decoding NF4 beside a packed difference fills
    the registers, too, so the tile has half the columns.
    """
    if dtype == torch.float32:
        return Tile(16 if packed else 64, 32, 32, 4, 3)
    if m <= 16:
        return Tile(16, 64, 32, 4, 3)
    if nf4:
        return Tile(128, 32 if packed else 64, 32, 4, 3)
    return Tile(64 if m <= 64 else 128, 64, 32, 4, 2)


def linear_fwd(
    x: Tensor,
    base: list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: list[Tensor],
    exact: Tensor,
) -> Tensor:
    """Launcher of ``rigsa::linear_fwd`` (`rigsa_kernels.ops`)."""
    rows, in_features = as_rows(x), x.shape[-1]
    out_features = num_weights(base) // in_features
    y = x.new_empty(rows.shape[0], out_features)
    _launch(rows, (out_features, in_features), base, bias, values, alpha, pattern, exact, y, dx=False)
    return y.view(*x.shape[:-1], out_features)


def linear_dx(
    dy: Tensor, base: list[Tensor], values: Tensor, alpha: Tensor, pattern: list[Tensor], exact: Tensor
) -> Tensor:
    """Launcher of ``rigsa::linear_dx``."""
    rows, out_features = as_rows(dy), dy.shape[-1]
    in_features = num_weights(base) // out_features
    dx = dy.new_empty(rows.shape[0], in_features)
    _launch(rows, (out_features, in_features), base, None, values, alpha, pattern, exact, dx, dx=True)
    return dx.view(*dy.shape[:-1], in_features)


def _launch(
    a: Tensor,
    shape: tuple[int, int],
    base: list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: list[Tensor],
    exact: Tensor,
    out: Tensor,
    *,
    dx: bool,
) -> None:
    pattern = packed_form(pattern, shape)
    check_product(a, shape, values, alpha, pattern, bias=bias, exact=exact, **dict(zip(BASE_NAMES, base, strict=False)))
    if len(base) == 1 and base[0].dtype != a.dtype:
        raise ValueError(f"weight: expected the operand's dtype {a.dtype}, got {base[0].dtype}")
    (m, _), (n, k) = a.shape, shape
    if m == 0:
        return
    nf4, packed = len(base) > 1, bool(pattern)
    tile = choose_tile(m, a.dtype, nf4=nf4, packed=packed)
    weight, absmax, levels = base if nf4 else (base[0], alpha, alpha)  # alpha stands where nothing is read
    words, word_offsets, row_base = pattern or (alpha, alpha, alpha)
    out_size, sum_size = (k, n) if dx else (n, k)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(out_size, tile.block_o),)
    with torch.cuda.device_of(a):
        linear_kernel[grid](
            a, weight, absmax, levels, alpha if bias is None else bias, values, words, word_offsets, row_base, alpha,
            exact, out, m, n, k, a.stride(0),
            DX=dx, PACKED=packed, NF4_BLOCK=num_weights(base) // absmax.numel() if nf4 else 0,
            HAS_BIAS=bias is not None, EVEN=sum_size % tile.block_c == 0, BLOCK_M=tile.block_m, BLOCK_O=tile.block_o,
            BLOCK_C=tile.block_c, GROUP=8, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )  # fmt: skip
