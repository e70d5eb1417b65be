"""Every operation in plain PyTorch, in any float dtype: the specification, the oracle (in float64) and the CPU path.

A layer computes, with D the ``[N, K]`` difference whose free entries (`values`) stand at a pattern m::

    y       = x W0^T + alpha * x (m . D)^T + b
    dx      = dy W0  + alpha * dy (m . D)
    G       = (dy^T x) at the pattern               one sampled product, which gives both
    dvalues = alpha * G,   dalpha = sum(values * G)

There are two ways to the first two lines. *exact* runs the two products; *composed* first rounds ``W0 + alpha * D`` to
the weight's dtype and runs one. Both are the same function in float64. In bfloat16 W0 already lies on the bf16 grid, so
composing does not blur a small alpha * D, it removes it: see `composed_is_safe`.

`pattern` is what `SparsePattern.tensors` gives: ``[]`` for dense, ``[bits, word_offsets, row_base]`` for packed,
``[tiles, places, size]`` for tiles.
Names: M tokens, N out_features, K in_features. Leading dimensions of x and dy may be any.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import multiplies_tiles
from .format import csr_indices, positions
from .nf4 import dequantize, num_weights
from .tiles import Tile, is_tiled, is_whole_lines, strips_of, touched

_HALF_DENSITY = 0.01 if torch.cpu._is_amx_tile_supported() else 0.04
SAMPLED_PRODUCT_DENSITY = {
    torch.float64: 0.2, torch.float32: 0.2, torch.bfloat16: _HALF_DENSITY, torch.float16: _HALF_DENSITY,
}  # fmt: skip
"""Below this density a product sampled on CSR beats the whole product and a gather: benchmarks/bench_gradient.py on two
Zen 4 cores, which multiply bfloat16 natively but sample it only as float32, from copies of both operands. A CPU with
AMX multiplies bfloat16 three times as fast."""
MOST_PARTS = 4
"""Of the tokens, in a sampled product: the dot products of many parts are short."""


BATCH_NUMBERS = 2**21
"""Numbers in the operands of one batch of tiles' products, which should stay in the cache."""


class NonFiniteGateError(ValueError):
    """A gate is infinite or not a number: the training that moved it has diverged."""


def delta_matrix(values: Tensor, shape: tuple[int, int], pattern: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``m . D`` as an ``[N, K]`` matrix of `dtype`. Dense values of that dtype come back as they are, not copied."""
    if not pattern:
        return values.to(dtype)
    matrix = torch.zeros(shape[0] * shape[1], dtype=dtype, device=values.device)
    return matrix.index_put_((positions(pattern, shape),), values.to(dtype)).view(shape)


def compose(weight: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]) -> Tensor:
    """``W0 + alpha * (m . D)``, summed in alpha's dtype and rounded once to the weight's."""
    if not pattern:
        return add_scaled(weight, values, alpha)
    index = positions(pattern, (weight.shape[0], weight.shape[1]))
    free = add_scaled(weight.take(index), values, alpha)
    return weight.reshape(-1).index_put((index,), free).view(weight.shape)


def linear_fwd(
    x: Tensor,
    base: list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: list[Tensor],
    exact: Tensor,
) -> Tensor:
    """``y [..., N]`` from ``x [..., K]``, in the dtype of x."""
    shape = (num_weights(base) // x.shape[-1], x.shape[-1])
    weight = dequantize(base, shape, x.dtype)
    if not exact:
        return F.linear(x, compose(weight, values, alpha, pattern), bias)
    delta = delta_matrix(values, shape, pattern, weight.dtype)
    return add_scaled(F.linear(x, weight, bias), F.linear(x, delta), alpha)


def linear_dx(
    dy: Tensor, base: list[Tensor], values: Tensor, alpha: Tensor, pattern: list[Tensor], exact: Tensor
) -> Tensor:
    """``dx [..., K]`` from ``dy [..., N]``, in the dtype of dy."""
    shape = (dy.shape[-1], num_weights(base) // dy.shape[-1])
    weight = dequantize(base, shape, dy.dtype)
    if not exact:
        return dy @ compose(weight, values, alpha, pattern)
    delta = delta_matrix(values, shape, pattern, weight.dtype)
    return add_scaled(dy @ weight, dy @ delta, alpha)


def add_scaled(base: Tensor, term: Tensor, alpha: Tensor) -> Tensor:
    """``base + alpha * term``: alpha stays in its own dtype until the one rounding at the end.

    Raises:
        NonFiniteGateError: on a CPU; on a GPU asking would stop the host once a layer.
    """
    if alpha.device.type == "cpu" and not math.isfinite(alpha):
        raise NonFiniteGateError(f"alpha: expected a finite gate, got {alpha.item()}")
    return base.to(alpha.dtype, copy=True).addcmul_(term.to(alpha.dtype), alpha).to(base.dtype)


def sampled_grad(dy: Tensor, x: Tensor, pattern: list[Tensor], nnz: int) -> Tensor:
    """``G = (dy^T x)`` at the pattern, not yet scaled by alpha: ``[N, K]`` when dense, else ``[nnz]``."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    shape = (dy.shape[1], x.shape[1])
    if is_tiled(pattern):
        part = touched(pattern, shape)
        if not part.pattern:
            return _whole_product(part.of_rows(dy), part.of_columns(x)).reshape(-1)
        if multiplies_tiles(nnz, (pattern[2].shape[1], pattern[2].shape[2]), shape):
            return _tiled_product(dy, x, pattern)
    if pattern and samples(nnz, shape, x.dtype):
        return _sampled_product(dy, x, pattern)
    grad = _whole_product(dy, x)
    return grad.take(positions(pattern, shape)) if pattern else grad


def _tiled_product(dy: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    """The product tile by tile, in batches; tiles at an edge are filled up with zeros."""
    size, strips = pattern[2], strips_of(pattern, (dy.shape[1], x.shape[1]))
    tile = (size.shape[1], size.shape[2])
    corners = [(strip.row, column) for strip in strips for column in strip.columns]
    step = max(BATCH_NUMBERS // max(len(x) * (tile[0] + tile[1]), 1), 1)
    products: list[Tensor] = []
    for begin in range(0, len(corners), step):
        products += _products(dy, x, corners[begin : begin + step], tile)
    grad, done = dy.new_empty(strips[-1].end), 0
    for strip in strips:
        block = grad[strip.first : strip.end].view(-1, strip.width)
        whole = torch.cat(products[done : done + len(strip.columns)], 1)
        block.copy_(whole[: len(block), : strip.width])
        done += len(strip.columns)
    return grad


def _products(dy: Tensor, x: Tensor, corners: list[tuple[int, int]], tile: Tile) -> tuple[Tensor, ...]:
    """The product at each of these tiles, ``[bn, bk]``, whose first rows and columns are `corners`."""
    rows, columns = tile
    dy_parts = torch.stack([_padded(dy[:, row : row + rows], rows) for row, _ in corners])
    x_parts = torch.stack([_padded(x[:, column : column + columns], columns) for _, column in corners])
    return torch.bmm(dy_parts.transpose(1, 2), x_parts).unbind()


def _padded(part: Tensor, width: int) -> Tensor:
    """``[M, at most width]`` with zeros up to that width."""
    return part if part.shape[1] == width else F.pad(part, (0, width - part.shape[1]))


def samples(nnz: int, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `sampled_grad` takes so many entries of ``[N, K]`` from a sampled product, with operands of `dtype`."""
    return nnz < SAMPLED_PRODUCT_DENSITY[dtype] * shape[0] * shape[1]


def sampled_grad_bytes(tokens: int, shape: tuple[int, int], dtype: torch.dtype, nnz: int | None) -> int:
    """The most that `sampled_grad` holds at one time on a CPU, beside its operands and its result.

    Args:
        tokens: of a micro-batch, over all prompts.
        shape: of the layer's weight, ``[N, K]``.
        dtype: of the operands.
        nnz: free entries; None for dense ones.
    """
    n, k = shape
    if nnz is None or not samples(nnz, shape, dtype):
        copy = tokens * n if dtype.itemsize == 2 and n < k else 0
        return dtype.itemsize * (copy + (0 if nnz is None else n * k))
    wide = torch.promote_types(dtype, torch.float32)
    # Each operand is cast, unless it is wide already, and the cast one gone when the next one comes.
    numbers = n + k if wide == dtype else max(2 * n, n + 2 * k)
    return wide.itemsize * tokens * numbers


def tiled_grad_bytes(
    tokens: int, shape: tuple[int, int], dtype: torch.dtype, nnz: int, tile: Tile, device: torch.device
) -> int:
    """The most that the gradient at tiles holds at one time, beside its operands and its result.

    Args:
        tokens, shape, dtype, nnz: as in `sampled_grad_bytes`.
        tile: rows and columns.
        device: a kernel on CUDA reads the tiles' operands where they are.
    """
    if is_whole_lines(tile, shape):
        lines = nnz // shape[1] if tile[1] >= shape[1] else nnz // shape[0]
        return dtype.itemsize * (tokens * lines + nnz)
    if device.type == "cuda":
        return 0
    if not multiplies_tiles(nnz, tile, shape):
        return sampled_grad_bytes(tokens, shape, dtype, nnz)
    operands = -(-nnz // (tile[0] * tile[1])) * (tile[0] + tile[1]) * tokens
    return dtype.itemsize * (min(operands, max(BATCH_NUMBERS, (tile[0] + tile[1]) * tokens)) + 2 * nnz)


def _whole_product(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x``. A CPU's 16-bit products copy a transposed operand themselves, more slowly than PyTorch does; worth a
    copy beforehand where dy is the narrower one."""
    dy_t = dy.t()
    if dy.device.type == "cpu" and dy.dtype.itemsize == 2 and dy.shape[1] < x.shape[1]:
        dy_t = dy_t.contiguous()
    return dy_t @ x


def _sampled_product(dy: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    """The product at the free entries alone, on CSR, which PyTorch offers in float32 and float64."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    row_pointers, columns = csr_indices(pattern, (dy.shape[1], x.shape[1]))
    zeros = dy.new_zeros(columns.numel(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = torch.sparse_csr_tensor(row_pointers, columns, zeros, (dy.shape[1], x.shape[1]), check_invariants=False)
    # Each entry is a dot product over tokens, so both operands are laid out with the tokens last.
    for dy_t, x_t in zip(_transposed(dy.to(dtype)), _transposed(x.to(dtype)), strict=True):
        csr = torch.sparse.sampled_addmm(csr, dy_t, x_t.t())
    return csr.values()


def _transposed(x: Tensor) -> Tensor:
    """``x.t()``, its columns in equal parts, one after another: ``[M, K]`` to ``[parts, K, M / parts]``.

    On a CPU a part is a pixel, and its transposition a shuffle of the pixel's channels, which goes through vector
    registers and has a thread for each pixel. PyTorch's own copy takes three to six times as long, which was most of a
    sampled product's time.
    """
    rows, columns = x.shape
    if x.device.type != "cpu" or x.numel() == 0:
        return x.t().contiguous().unsqueeze(0)
    parts = math.gcd(rows, min(torch.get_num_threads(), MOST_PARTS))
    pixels = x.reshape(1, parts, 1, -1).permute(0, 3, 1, 2)  # in channels-last order
    shuffled = torch.native_channel_shuffle(pixels, rows // parts)
    return shuffled.permute(0, 2, 3, 1).view(parts, columns, rows // parts)


def linear_dvalues(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """``(dvalues, dalpha)``, in the dtypes of `values` and `alpha`; both from one sampled product."""
    grad = sampled_grad(dy, x, pattern, values.numel()).to(alpha.dtype)
    dalpha = torch.dot(values.to(alpha.dtype).view(-1), grad.view(-1)).view(1)
    return grad.mul_(alpha).to(values.dtype), dalpha
