"""The gradient at a pattern of tiles: one launch that multiplies the active tiles alone.

    G[n, k]  = sum_m dy[m, n] * x[m, k]   in the active tiles
    dvalues  = alpha * G                  dalpha = sum over the active tiles of values * G

A program owns one piece of one tile, so every entry has one writer and the sum over tokens one order, and the cost is
the tiles', not the matrix's. It reads from `tiles` and `places` where its piece lies (`rigsa_kernels.tiles`), and
stores it as the kernel of the whole gradient stores a dense tile (`rigsa_kernels.triton_grad`).

Where the tiles make up whole rows and columns (``--tile rows``), the gradient is one product of fewer rows or columns,
which the kernels of a dense difference make.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_gather, triton_grad
from .dispatch import kernels_win
from .tiles import touched
from .triton_common import MAX_REGISTERS, as_rows, check_product, clamped
from .triton_grad import store_dense, sum_over_tokens


@triton.jit
def tile_grad_kernel(dy_ptr, x_ptr, values_ptr, tiles_ptr, places_ptr, alpha_ptr, dvalues_ptr, shares_ptr, M, N, K,
                     tiles, TILE_N, TILE_K, stride_dym, stride_xm, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """A piece ``[BLOCK_N, BLOCK_K]`` of one tile ``[TILE_N, TILE_K]`` of G, and its share of dalpha.

    EVEN: M is a multiple of BLOCK_M.
    """
    pieces_k = tl.cdiv(TILE_K, BLOCK_K)
    pieces = tl.cdiv(TILE_N, BLOCK_N) * pieces_k
    number, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    tile = tl.load(tiles_ptr + number)
    first, width = tl.load(places_ptr + number), tl.load(places_ptr + tiles + number)
    columns = tl.cdiv(K, TILE_K)
    top, left = tile // columns * TILE_N, tile % columns * TILE_K
    height, breadth = min(TILE_N, N - top), min(TILE_K, K - left)
    down, right = piece // pieces_k * BLOCK_N, piece % pieces_k * BLOCK_K
    # A piece beyond the edge of a smaller tile loads from the tile's beginning, and stores nothing. (The smaller of two
    # numbers, in place of a choice, would lose the alignment, and with it asynchronous copies.)
    start_n, start_k = top + tl.where(down < height, down, 0), left + tl.where(right < breadth, right, 0)
    acc = sum_over_tokens(dy_ptr + start_n, x_ptr + start_k, clamped(height - down, BLOCK_N),
                          clamped(breadth - right, BLOCK_K), M, stride_dym, stride_xm, EVEN, BLOCK_N, BLOCK_K,
                          BLOCK_M)  # fmt: skip
    alpha = tl.load(alpha_ptr).to(tl.float32)
    terms = store_dense(acc, down, right, values_ptr + first, dvalues_ptr + first, alpha, height, breadth, width,
                        BLOCK_N, BLOCK_K)  # fmt: skip
    tl.store(shares_ptr + tl.program_id(0), tl.sum(terms))


@dataclass(frozen=True)
class Piece:
    """Sizes of one program's work: rows and columns of G, tokens a step; warps and pipeline stages."""

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int


def choose_piece(dtype: torch.dtype, tile: tuple[int, int]) -> Piece:
    """As much of a tile as a program takes: tensor cores multiply 16 rows at least.

    Small pieces have few entries to hide a load behind, so they take more tokens at a time. float32 is multiplied by
    ordinary cores: fewer entries each.
    """
    most = (32, 64) if dtype == torch.float32 else (64, 128)
    block_n, block_k = (max(16, min(most[at], triton.next_power_of_2(tile[at]))) for at in (0, 1))
    if dtype == torch.float32 or block_n * block_k > 64 * 64:
        return Piece(block_n, block_k, 32, 4, 2)
    if block_n * block_k > 32 * 32:
        return Piece(block_n, block_k, 64, 4, 3)
    return Piece(block_n, block_k, 64, 2 if block_n * block_k == 32 * 32 else 1, 4)


def linear_dvalues(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Launcher of ``rigsa::linear_dvalues`` for tiles (`rigsa_kernels.ops`)."""
    dy, x = as_rows(dy), as_rows(x)
    part = touched(pattern, (dy.shape[1], x.shape[1]))
    if part.pattern or not values.numel():
        return tile_grad(dy, x, values, alpha, pattern)
    dy, x = part.of_rows(dy), part.of_columns(x)
    matrix = values.view(dy.shape[1], x.shape[1])
    whole = triton_grad if kernels_win(x.device, x.dtype) else triton_gather
    dvalues, dalpha = whole.linear_dvalues(dy, x, matrix, alpha, [])
    return dvalues.view(-1), dalpha


def tile_grad(dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``(dvalues, dalpha)`` in one launch over the tiles, from dy ``[M, N]`` and x ``[M, K]``."""
    tiles, places, size = pattern
    (m, n), k = dy.shape, x.shape[1]
    check_product(x, (n, k), values, alpha, pattern)
    if dy.dtype != x.dtype or dy.device != x.device or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"dy: expected {x.dtype} on {x.device} for {x.shape[0]} tokens, got {dy.dtype} on {dy.device} for {m}"
        )
    tile = (size.shape[1], size.shape[2])
    piece = choose_piece(x.dtype, tile)
    grid = (tiles.numel() * triton.cdiv(tile[0], piece.block_n) * triton.cdiv(tile[1], piece.block_k),)
    dvalues = torch.empty_like(values)
    shares = torch.empty(grid, dtype=torch.float32, device=x.device)
    if tiles.numel():
        with torch.cuda.device_of(x):
            tile_grad_kernel[grid](
                dy, x, values, tiles, places, alpha, dvalues, shares, m, n, k, tiles.numel(), *tile, dy.stride(0),
                x.stride(0), EVEN=m % piece.block_m == 0, BLOCK_N=piece.block_n, BLOCK_K=piece.block_k,
                BLOCK_M=piece.block_m, num_warps=piece.num_warps, num_stages=piece.num_stages,
                maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip
    return dvalues, shares.sum().view(1)
