"""Which way a layer's products and gradients take: the written rule, and how to override it.

*fused*: one kernel puts the weight tile together and multiplies it; nothing of the size of the matrix is kept.
*gemm*: the library multiplies a plain matrix. A packed ticket that composes takes its own weight, which holds
``W0 + alpha * D`` while passes need it (`rigsa_kernels.in_place`). Everything else keeps a matrix over the step: the
sum of a dense difference, or D alone where two products are asked for.

| device | operand dtype | layer | path | why |
|---|---|---|---|---|
| CPU | any | matrix | gemm | there is no kernel; the matrix is made once a step instead of once a micro-batch |
| any | any | NF4 | fused | a 16-bit copy is what four bits are there to avoid (on a CPU: dequantised in each call) |
| CUDA 9.0 and newer | any | matrix | gemm | on an H200 fused takes 3 to 7 times cuBLAS's time, packed 10 to 51 |
| CUDA | any | packed, composed | gemm | nothing is kept, and no kernel is faster than the library's plain product |
| CUDA | float64, float32 | matrix | gemm | no tensor cores at full precision, so nothing hides the decoding |
| CUDA | 16-bit | N or K not a multiple of 16 | gemm | asynchronous copies of 128 bits need aligned rows |
| CUDA | 16-bit | up to 16 tokens a call | gemm | generation reads each weight once: 2 bytes of a kept matrix, not 4 |
| CUDA 8.x | 16-bit | any other | fused | no copy; not measured on a GPU of this kind |

The gradient at the pattern is one kernel on CUDA 8.x in 16 bits. Elsewhere on CUDA the library makes the whole product
and a kernel reads the entries from it: on an H200 the one kernel takes 2 to 5 times as long. Tiles are multiplied
alone, by one kernel on CUDA, and whole rows or columns as one product of fewer rows or columns everywhere.

docs/benchmarks/gpu has the measurements.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch

Path = Literal["fused", "gemm"]
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes in which composing can lose the adapter."""
GENERATION_TOKENS = 16
ALIGNED_ENTRIES = 16
MOST_COLUMNS_KEPT = 8
"""One in so many columns of x, at most, is saved apart from x."""
SMALLEST_SIDE = 16
"""Side of a tile (the harmonic mean of its two) from which a CPU multiplies tile by tile."""
SIDE_OF_ALL = 200
"""Side from which it does so at any density; at lower densities shorter sides will do, in proportion."""
HOPPER = 90
"""Compute capability from which the library's products win everywhere."""
REFERENCE_ARCHITECTURE = 89
"""Compute capability that is planned for where there is no GPU to ask: an RTX 4090's."""


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    *,
    nf4: bool = False,
    in_place: bool = False,
    force: Path | None = None,
) -> Path:
    """The path of one call.

    Args:
        device, dtype: of the operands.
        shape: (N, K) of the layer.
        tokens: M, the rows of x.
        nf4: whether W0 is in four bits.
        in_place: whether the layer can multiply by its own weight, composed.
        force: take this path instead of the rule's.

    Raises:
        ValueError: `force` is unknown, or that path cannot run here.
    """
    if force is None:
        return _rule(device, dtype, shape, tokens, nf4, in_place)
    if force not in get_args(Path):
        raise ValueError(f"force: expected one of {', '.join(get_args(Path))} or None, got {force!r}")
    if force == "gemm" and nf4:
        raise ValueError("force: 'gemm' keeps a matrix, which a 4-bit layer has none of; use 'fused' or None")
    if force == "fused" and device.type != "cuda" and not nf4:
        raise ValueError(
            f"force: 'fused' runs a Triton kernel on CUDA, and the layer is on {device}; use 'gemm' or None"
        )
    if force == "fused" and dtype == torch.float64:
        raise ValueError("force: 'fused' takes bfloat16, float16 or float32, got float64; use 'gemm' or None")
    return force


def _rule(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int, nf4: bool, in_place: bool
) -> Path:
    if nf4:
        return "fused"
    if in_place or tokens <= GENERATION_TOKENS or not kernels_win(device, dtype):
        return "gemm"
    return "fused" if all(size % ALIGNED_ENTRIES == 0 for size in shape) else "gemm"


def keeps_columns(touched: int, in_features: int) -> bool:
    """Whether a layer saves the `touched` columns of x for backward in place of all of x.

    Up to three layers read one x (queries, keys and values) and share it where they save it whole, and none shares a
    copy of its own columns. So a copy is worth its memory up to an eighth of the columns.
    """
    return 0 < touched * MOST_COLUMNS_KEPT <= in_features


def multiplies_tiles(entries: int, tile: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether a CPU multiplies tile by tile, where the gradient at tiles is not one smaller product.

    A small product takes as long as copying its operands, so a tile costs in proportion to its sides and saves in
    proportion to its entries (docs/benchmarks.md, "Tiles"). At 3.46 % in bfloat16, tiles of 16 x 16 take 0.46 of the
    whole product's time and tiles of 32 x 32 0.15; at 16 % they take 1.48 and 0.55.

    Args:
        entries: that are free.
        tile: rows and columns.
        shape: (N, K) of the matrix.
    """
    side = 2 * tile[0] * tile[1] / (tile[0] + tile[1])
    return side >= SMALLEST_SIDE and entries * SIDE_OF_ALL <= side * shape[0] * shape[1]


def kernels_win(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our own products and gradients are taken on `device` where nothing else speaks against them."""
    return device.type == "cuda" and dtype in HALF_DTYPES and architecture(device.index) < HOPPER


@functools.cache  # asking the driver takes longer than a launch
def architecture(index: int | None) -> int:
    """Compute capability of a GPU, as 89 for 8.9; `REFERENCE_ARCHITECTURE` where there is none."""
    if not torch.cuda.is_available():
        return REFERENCE_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
