"""The gradient at the pattern from a whole product that the library made.

    dvalues = alpha * G  at the free entries            dalpha = sum over the free entries of values * G

G = dy^T x, ``[N, K]`` in the operands' dtype, lives between the product and this kernel only. The kernel reads it once
and writes both gradients; it stores its entries as the fused kernel does (`rigsa_kernels.triton_grad`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import as_rows, check_product, load_words
from .triton_grad import store_dense, store_packed

BLOCK_N, BLOCK_K = 16, 128


@triton.jit
def gather_grad_kernel(whole_ptr, values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, alpha_ptr, dvalues_ptr,
                       shares_ptr, N, K, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_N, BLOCK_K]`` of the whole product: its free entries times alpha, and its share of dalpha."""
    columns = tl.cdiv(K, BLOCK_K)
    start_n, start_k = tl.program_id(0) // columns * BLOCK_N, tl.program_id(0) % columns * BLOCK_K
    rel_n, rel_k = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    at = tl.cast(start_n, tl.int64) * K + start_k + (rel_n * K + rel_k)
    ok = (rel_n < N - start_n) & (rel_k < K - start_k)
    grad = tl.load(whole_ptr + at, mask=ok, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    if PACKED:
        rel_q = tl.arange(0, BLOCK_K // 32)[None, :]
        ok_n = rel_n < N - start_n
        row_base = tl.load(row_base_ptr + start_n + rel_n, mask=ok_n, other=0)
        word_at = tl.cast(start_k // 32, tl.int64) * N + start_n + (rel_q * N + rel_n)
        words, first = load_words(words_ptr, word_offsets_ptr, row_base, word_at, ok_n & (start_k + rel_q * 32 < K))
        terms = store_packed(grad, words, first, values_ptr, dvalues_ptr, alpha, BLOCK_N, BLOCK_K)
    else:
        terms = store_dense(grad, start_n, start_k, values_ptr, dvalues_ptr, alpha, N, K, K, BLOCK_N, BLOCK_K)
    tl.store(shares_ptr + tl.program_id(0), tl.sum(terms))


def linear_dvalues(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Launcher of ``rigsa::linear_dvalues`` where the library's product is taken (`rigsa_kernels.dispatch`)."""
    dy, x = as_rows(dy), as_rows(x)
    check_product(x, (dy.shape[1], x.shape[1]), values, alpha, pattern)
    return checked_dvalues(dy, x, values, alpha, pattern)


def checked_dvalues(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`linear_dvalues` of arguments that a layer has checked once for many calls."""
    return gather_grad(torch.mm(as_rows(dy).t(), as_rows(x)), values, alpha, pattern)


def gather_grad(whole: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``(dvalues, dalpha)`` from G ``[N, K]``, contiguous."""
    n, k = whole.shape
    words, word_offsets, row_base = pattern or (values, values, values)
    grid = (-(-n // BLOCK_N) * -(-k // BLOCK_K),)  # triton.cdiv takes a fifth of the launch's time
    dvalues = torch.empty_like(values)
    shares = torch.empty(grid, dtype=torch.float32, device=whole.device)
    with torch.cuda.device_of(whole):
        gather_grad_kernel[grid](
            whole, values, words, word_offsets, row_base, alpha, dvalues, shares, n, k,
            PACKED=bool(pattern), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dvalues, shares.sum().view(1)
