"""Forward and input gradient of a gated sparse linear layer, one launch each.

    y[m, n]  = sum_k  x[m, k] * W[n, k] + b[n]          W = W0 + alpha * (m . D)
    dx[m, k] = sum_n dy[m, n] * W[n, k]

Both are one matrix product whose *weight tile* is put together in registers: a tile of W0 (a matrix, or NF4 codes with
their scales) plus alpha times a tile of D (a matrix, or bits and packed values). It is rounded to the operands' dtype
and multiplied with float32 accumulation. W never exists in memory.

*composed* runs over the contraction once. *exact* runs over it twice, into the same accumulator: first with W0 alone,
then with alpha * D alone, so that neither is rounded to the other's grid. Which of the two is read from the device
(`exact`); one loop serves both, and what a pass does not need is not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rigsa_kernels.triton_common import architecture, clamped, free_entries, grouped_program


@triton.jit
def _base_tile(weight_ptr, absmax_ptr, code_ptr, n, k, rel_n, rel_k, K, ok_n, ok_k, NF4_BLOCK: tl.constexpr):
    """W0 at rows ``n + rel_n`` ``[R, 1, 1]`` and columns ``k + rel_k`` ``[1, Q, 32]``, float32 ``[R, Q, 32]``.

    NF4 holds two codes a byte, the even column's in the high half, and a scale for every NF4_BLOCK codes of the flat
    matrix (QLoRA, Dettmers et al. 2023, section 3).
    """
    ok = ok_n & ok_k
    if NF4_BLOCK:
        R: tl.constexpr = rel_n.shape[0]
        Q: tl.constexpr = rel_k.shape[1]
        word = (tl.cast(n, tl.int64) * K + k) // 32 + rel_n * (K // 32) + tl.arange(0, Q)[None, :, None]
        scale = tl.load(absmax_ptr + word // (NF4_BLOCK // 32), mask=ok, other=0.0)
        pair = tl.load(weight_ptr + word * 16 + tl.arange(0, 16)[None, None, :], mask=ok, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(pair >> 4, pair & 15), (R, Q, 32))
        return tl.load(code_ptr + codes) * scale
    else:
        at = weight_ptr + tl.cast(n, tl.int64) * K + k + (rel_n * K + rel_k)
        return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _delta_tile(values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, k, rel_n, rel_k, N, K, ok_n, ok_k,
                PACKED: tl.constexpr):  # fmt: skip
    """m . D at the same tile, float32."""
    ok = ok_n & ok_k
    if PACKED:
        Q: tl.constexpr = rel_k.shape[1]
        row_base = tl.load(row_base_ptr + n + rel_n, mask=ok_n, other=0)
        at = tl.cast(k // 32, tl.int64) * N + n + (tl.arange(0, Q)[None, :, None] * N + rel_n)
        free, position = free_entries(words_ptr, word_offsets_ptr, row_base, at, ok)
        return tl.load(values_ptr + position, mask=free, other=0.0).to(tl.float32)
    else:
        at = values_ptr + tl.cast(n, tl.int64) * K + k + (rel_n * K + rel_k)
        return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def linear_kernel(a_ptr, weight_ptr, absmax_ptr, code_ptr, bias_ptr, values_ptr, words_ptr, word_offsets_ptr,
                  row_base_ptr, alpha_ptr, exact_ptr, out_ptr, M, N, K, stride_am,
                  DX: tl.constexpr, PACKED: tl.constexpr, NF4_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
                  EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_O]`` of ``y [M, N]`` from a = x ``[M, K]`` or, if DX, of ``dx [M, K]`` from a = dy ``[M, N]``.

    O is the output's width, C the contraction's: N and K forward, K and N for dx. EVEN: C is a multiple of BLOCK_C.
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
    at = clamped(M - start_m, BLOCK_M)[:, None] * stride_am + rel_c[None, :]
    if DX:
        rel_n = rel_c[:, None, None]
        rel_k = tl.reshape(rel_o, (1, BLOCK_O // 32, 32))
    else:
        rel_n = rel_o[:, None, None]
        rel_k = tl.reshape(rel_c, (1, BLOCK_C // 32, 32))
    alpha = tl.load(alpha_ptr).to(tl.float32)
    passes = 1 + tl.load(exact_ptr).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for number in range(passes):
        use_base = number == 0
        use_delta = number == passes - 1
        for start in range(0, sum_size, BLOCK_C):
            if EVEN:
                a = tl.load(a_ptr + start + at)
                ok = True
            else:
                a = tl.load(a_ptr + start + at, mask=(rel_c < sum_size - start)[None, :], other=0.0)
                ok = (rel_n if DX else rel_k) < sum_size - start
            n = start if DX else start_o
            k = start_o if DX else start
            base = _base_tile(weight_ptr, absmax_ptr, code_ptr, n, k, rel_n, rel_k, K, ok, use_base, NF4_BLOCK)
            delta = _delta_tile(values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, k, rel_n, rel_k, N, K, ok,
                                use_delta, PACKED)  # fmt: skip
            weight = tl.reshape((base + alpha * delta).to(a.dtype), (BLOCK_C if DX else BLOCK_O, BLOCK_O if DX else BLOCK_C))
            acc = tl.dot(a, weight if DX else tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + start_o + rel_o).to(tl.float32)[None, :]
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_o = start_o + tl.arange(0, BLOCK_O)
    out = out_ptr + offs_m.to(tl.int64)[:, None] * out_size + offs_o[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_o < out_size)[None, :])


MAXNREG = None


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work: output rows, output columns and contraction steps; warps and pipeline stages."""

    block_m: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype) -> Tile:
    return Tile(128, 64, 32, 4, 2)


def linear_fwd(x, base, bias, values, alpha, pattern, exact, tile=None):
    x, rows = _as_rows(x), x.shape[:-1]
    N = _rows_of(base, x.shape[1])
    y = x.new_empty(x.shape[0], N)
    _launch(x, base, bias, values, alpha, pattern, exact, y, N, x.shape[1], False, tile)
    return y.view(*rows, N)


def linear_dx(dy, base, values, alpha, pattern, exact, tile=None):
    dy, rows = _as_rows(dy), dy.shape[:-1]
    K = _rows_of(base, dy.shape[1])
    dx = dy.new_empty(dy.shape[0], K)
    _launch(dy, base, None, values, alpha, pattern, exact, dx, dy.shape[1], K, True, tile)
    return dx.view(*rows, K)


def _as_rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _rows_of(base, other):
    return base[0].numel() * (2 if len(base) > 1 else 1) // other


def _launch(a, base, bias, values, alpha, pattern, exact, out, N, K, dx, tile):
    M = a.shape[0]
    tile = tile or choose_tile(a.dtype)
    weight = base[0]
    absmax, code = base[1:] if len(base) > 1 else (alpha, alpha)
    words, word_offsets, row_base = pattern or (values, values, values)
    out_size, sum_size = (K, N) if dx else (N, K)
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(out_size, tile.block_o),)
    with torch.cuda.device_of(a):
        linear_kernel[grid](
            a, weight, absmax, code, bias if bias is not None else alpha, values, words, word_offsets, row_base, alpha, exact, out,
            M, N, K, a.stride(0),
            DX=dx, PACKED=bool(pattern), NF4_BLOCK=(2 * weight.numel() // absmax.numel()) if len(base) > 1 else 0,
            HAS_BIAS=bias is not None, EVEN=sum_size % tile.block_c == 0,
            BLOCK_M=tile.block_m, BLOCK_O=tile.block_o, BLOCK_C=tile.block_c, GROUP=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **({'maxnreg':MAXNREG} if MAXNREG else {}),
        )
