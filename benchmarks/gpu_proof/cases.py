"""What the section `correct` asks, the most important first: it may be cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.providers import TICKET

Sizes = list[tuple[int, int, int]]
DENSITIES = ("sparse", "dense", "packed")
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]
"""Of the products and of the values."""
SIZES = [
    (1488, 1536, 576), (1488, 576, 1536), (1488, 576, 576), (1488, 192, 576), (860, 8192, 2048), (860, 2048, 8192),
    (860, 2048, 2048), (1, 2048, 2048), (33, 2049, 130), (17, 100, 70), (1000, 4096, 14336), (1000, 14336, 4096),
]  # fmt: skip
"""Tokens, out_features, in_features: SmolLM2's layers, odd ones, and a model's of 8 billion weights."""
DRY_SIZES = [(33, 50, 70), (17, 64, 96)]
WIDE, DRY_WIDE = (64, 48, 40_000), (2, 3, 33_000)
"""With every entry free, offsets within a row pass 32,767."""
LAYOUTS = ("unaligned", "strided")


@dataclass(frozen=True)
class KernelCase:
    """One layer and batch, given to `gated_linear` without a kept matrix: on CUDA the fused kernels.

    Attributes:
        density: a name of the tests' oracle: dense, packed (40 % are free), sparse (2 %), full (packed, 100 %) or one
            of `TILES`.
        layout: ``plain``; ``unaligned``: every tensor begins one entry past an aligned address; ``strided``: x and dy
            are columns of wider matrices.
    """

    m: int
    n: int
    k: int
    density: str
    dtype: torch.dtype
    values_dtype: torch.dtype
    nf4: bool = False
    layout: str = "plain"


@dataclass(frozen=True)
class LayerCase:
    """One layer on the path that the dispatch rule takes, or that `force` names."""

    m: int
    n: int
    k: int
    share: float
    dtype: torch.dtype
    numerics: str
    force: str | None = None
    tile: str | int | None = None


TILES = ("rows", "columns", "16x8", "32", "5x3")
"""Names of the tests' oracle: tiles that are free in part of the grid, and 20 to 40 % of the entries with them."""
LAYER_TILES = (32, "rows", "columns", 16, 64, 128)


def cases(dry: bool) -> list[KernelCase | LayerCase]:
    sizes = DRY_SIZES if dry else SIZES
    main = [KernelCase(*size, density, *DTYPES[0]) for density, size in product(DENSITIES, sizes)]
    return [*main, *_layers(dry), *_tiles(dry), *_unusual(dry, sizes), *_other_dtypes(sizes)]


def _tiles(dry: bool) -> Iterator[KernelCase | LayerCase]:
    """Layers on their own path at a ticket's density, and the gradient's kernel at any tile, edges and dtypes."""
    sizes = DRY_SIZES if dry else [SIZES[0], SIZES[3], SIZES[4], SIZES[5], SIZES[8]]
    for tile, size in product(LAYER_TILES, sizes):
        yield LayerCase(*size, TICKET, torch.bfloat16, "composed", tile=tile)
    some = DRY_SIZES if dry else [SIZES[0], SIZES[4], SIZES[8], SIZES[9]]
    for tile, size, dtypes in product(TILES, some, DTYPES):
        yield KernelCase(*size, tile, *dtypes)
    for tile, layout in product(TILES[2:4], LAYOUTS):
        yield KernelCase(*some[0], tile, *DTYPES[0], layout=layout)


def _unusual(dry: bool, sizes: Sizes) -> Iterator[KernelCase]:
    """Columns beyond 32,767, layouts, and bases in four bits."""
    first, densities = DTYPES[0], DENSITIES[:2]
    yield KernelCase(*(DRY_WIDE if dry else WIDE), "full", *first)
    some = sizes[:1] if dry else [sizes[0], sizes[6], sizes[8]]
    for size, layout, density in product(some, LAYOUTS, densities):
        yield KernelCase(*size, density, *first, layout=layout)
    for size, density in product([size for size in sizes[:7] if size[2] % 32 == 0], densities):
        yield KernelCase(*size, density, *first, nf4=True)


def _other_dtypes(sizes: Sizes) -> Iterator[KernelCase]:
    for dtypes, density, size in product(DTYPES[1:], DENSITIES, sizes):
        yield KernelCase(*size, density, *dtypes)


def _layers(dry: bool) -> Iterator[LayerCase]:
    sizes = DRY_SIZES if dry else [SIZES[0], SIZES[3], SIZES[4], SIZES[7], SIZES[8]]
    forces = [None, "gemm"] if dry else [None, "gemm", "fused"]
    for dtype, force, numerics in product((torch.bfloat16, torch.float16), forces, ("composed", "exact")):
        yield from (LayerCase(*size, share, dtype, numerics, force) for share in (TICKET, 1.0) for size in sizes)
