"""Tiles: the unit of a pattern that is free or frozen as a whole, so that its gradient is a product of its own.

A matrix ``[N, K]`` is cut into a grid of tiles ``bn x bk``; those at the right and the lower edge may be smaller. The
tile in row i and column j of the grid has the number ``i * ceil(K / bk) + j``. Whole rows (``1 x K``) and whole columns
(``N x 1``) are the limits.

The values of a tile pattern lie row by row over the matrix, as in a packed pattern of the same mask, so whatever is
stored, saved or drawn for one is right for the other. The tiles of one row of the grid therefore lie side by side in a
block ``[bn, width]``, where width adds up their columns::

    mask  1 1 0 0 1 1     tile    2 x 2, grid 2 x 3
          1 1 0 0 1 1     tiles   [0, 2, 4]
          0 0 1 1 0 0     places  [[0, 2, 8], [4, 4, 2]]   first value of each tile, values from one row to the next
          0 0 1 1 0 0

Operators receive ``[tiles, places, size]``, where `size` has no entries and the shape ``[0, bn, bk]``: operators take
tensors, and a shape needs no read from a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Tile = tuple[int, int]
"""Rows and columns, ``(bn, bk)``."""


def tile_size(tile: str | int | Tile, shape: tuple[int, int]) -> Tile:
    """``(bn, bk)`` of a tile for a matrix ``[N, K]``, not larger than the matrix.

    Args:
        tile: ``32`` or ``"32"`` for squares, ``"16x64"`` or ``(16, 64)`` for bn rows and bk columns, ``"rows"`` or
            ``"columns"`` for whole ones.
        shape: (N, K).

    Raises:
        ValueError: `tile` is none of these.
    """
    n, k = shape
    if tile in ("rows", "columns"):
        return (1, max(k, 1)) if tile == "rows" else (max(n, 1), 1)
    sides = list(tile) if isinstance(tile, tuple | list) else str(tile).split("x")
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(str(side).isdecimal() and 0 < int(side) < 2**31 for side in sides):
        raise ValueError(f"tile: expected a number from 1, ROWSxCOLUMNS, 'rows' or 'columns', got {tile!r}")
    return min(int(sides[0]), max(n, 1)), min(int(sides[1]), max(k, 1))


def grid_shape(shape: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """Tiles from top to bottom and from left to right."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def grid_of(shape: tuple[int, int], tile: str | int | Tile | None) -> tuple[int, int]:
    """The grid of a tile as `tile_size` takes it; without one every entry is a unit, and the matrix its own grid."""
    return shape if tile is None else grid_shape(shape, tile_size(tile, shape))


def check_tiles(tiles: Tensor, shape: tuple[int, int], tile: Tile) -> None:
    """Raises ValueError where `tiles` are not ascending numbers of the grid."""
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile: expected rows and columns from 1, got {tile}")
    rows, columns = grid_shape(shape, tile)
    if tiles.dtype != torch.int32 or tiles.dim() != 1:
        raise ValueError(f"tiles: expected int32 [tiles], got {tiles.dtype} {list(tiles.shape)}")
    if tiles.numel() and (int(tiles[0]) < 0 or int(tiles[-1]) >= rows * columns or bool((tiles.diff() <= 0).any())):
        raise ValueError(f"tiles: expected ascending numbers from 0 to {rows * columns - 1} without repetition")


def places_of(tiles: Tensor, shape: tuple[int, int], tile: Tile) -> tuple[Tensor, int]:
    """int64 ``[2, tiles]``: each tile's first value and the values from one of its rows to the next; and all values."""
    i, _, heights, widths = _sides(tiles, shape, tile)
    rows, _ = grid_shape(shape, tile)
    strip_widths = widths.new_zeros(rows).index_add_(0, i, widths)
    strip_heights = (shape[0] - torch.arange(rows, device=tiles.device) * tile[0]).clamp(max=tile[0])
    sizes = strip_widths * strip_heights
    before = widths.cumsum(0) - widths - (strip_widths.cumsum(0) - strip_widths)[i]
    return torch.stack([(sizes.cumsum(0) - sizes)[i] + before, strip_widths[i]]), int((heights * widths).sum())


def _sides(tiles: Tensor, shape: tuple[int, int], tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64 ``[tiles]`` each: row and column in the grid, height and width."""
    columns = grid_shape(shape, tile)[1]
    i, j = tiles.long() // max(columns, 1), tiles.long() % max(columns, 1)
    return i, j, (shape[0] - i * tile[0]).clamp(max=tile[0]), (shape[1] - j * tile[1]).clamp(max=tile[1])


def tiles_to_mask(tiles: Tensor, shape: tuple[int, int], tile: Tile) -> Tensor:
    """Boolean ``[N, K]``, True in the tiles."""
    wide = tiles_to_grid(tiles, shape, tile).repeat_interleave(tile[1], 1)[:, : shape[1]]
    return wide.repeat_interleave(tile[0], 0)[: shape[0]]


def tiles_to_grid(tiles: Tensor, shape: tuple[int, int], tile: Tile) -> Tensor:
    """Boolean, an entry for each tile of the grid: True for `tiles`."""
    rows, columns = grid_shape(shape, tile)
    grid = torch.zeros(rows * columns, dtype=torch.bool, device=tiles.device)
    grid[tiles.long()] = True
    return grid.view(rows, columns)


def tile_sums(matrix: Tensor, tile: Tile) -> Tensor:
    """The sum over each tile of a matrix ``[N, K]``, an entry for each tile of the grid."""
    rows, columns = grid_shape((matrix.shape[0], matrix.shape[1]), tile)
    below, right = rows * tile[0] - matrix.shape[0], columns * tile[1] - matrix.shape[1]
    padded = torch.nn.functional.pad(matrix, (0, right, 0, below))
    return padded.view(rows, tile[0], columns, tile[1]).sum((1, 3))


def mask_to_tiles(mask: Tensor, tile: Tile) -> Tensor:
    """int32 ``[tiles]``: the tiles that a boolean ``[N, K]`` mask is made of.

    Raises:
        ValueError: a tile is free in part.
    """
    rows, columns = grid_shape((mask.shape[0], mask.shape[1]), tile)
    below, right = rows * tile[0] - mask.shape[0], columns * tile[1] - mask.shape[1]

    def all_of(entries: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(entries, (0, right, 0, below), value=True)
        return padded.view(rows, tile[0], columns, tile[1]).all(3).all(1)

    free = all_of(mask)
    if in_part := int((~(free | all_of(~mask))).sum()):
        raise ValueError(f"mask: expected whole tiles of {tile[0]} x {tile[1]}, got {in_part} that are free in part")
    return free.view(-1).nonzero().view(-1).to(torch.int32)


def is_tiled(pattern: list[Tensor]) -> bool:
    """Whether an operator was given tiles, not a bit mask or nothing."""
    return bool(pattern) and pattern[0].dim() == 1


def tile_positions(pattern: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """int64 ``[nnz]``: positions ``n * K + k`` of the values, ascending. Remembered with the tiles."""
    tiles, places, size = pattern
    if tiles not in _positions:
        tile = (size.shape[1], size.shape[2])
        i, j, heights, widths = (side.view(-1, 1, 1) for side in _sides(tiles, shape, tile))
        row = torch.arange(tile[0], device=tiles.device).view(1, -1, 1)
        column = torch.arange(tile[1], device=tiles.device).view(1, 1, -1)
        inside = (row < heights) & (column < widths)
        first, width = (place.long().view(-1, 1, 1) for place in places)
        at = (first + row * width + column)[inside]
        positions = torch.empty_like(at)
        positions[at] = ((i * tile[0] + row) * shape[1] + j * tile[1] + column)[inside]
        _positions[tiles] = positions
    return _positions[tiles]


@dataclass(frozen=True, eq=False)
class Touched:
    """The rows and columns of a matrix in which a tile pattern has free entries.

    Attributes:
        rows, columns: int64, ascending; None for all of them.
        pattern: of the smaller matrix that these rows and columns make up, as operators take it; ``[]`` where all of
            it is free. It has the same values in the same order.
    """

    rows: Tensor | None
    columns: Tensor | None
    pattern: list[Tensor]

    def of_rows(self, dy: Tensor) -> Tensor:
        """``[..., N]`` at `rows`."""
        return dy if self.rows is None else dy.index_select(-1, self.rows)

    def of_columns(self, x: Tensor) -> Tensor:
        """``[..., K]`` at `columns`."""
        return x if self.columns is None else x.index_select(-1, self.columns)


def touched(pattern: list[Tensor], shape: tuple[int, int]) -> Touched:
    """What `pattern`, of a matrix ``[N, K]``, touches. Remembered with the tiles."""
    tiles, _, size = pattern
    if tiles not in _touched:
        _touched[tiles] = _touch(pattern, shape, (size.shape[1], size.shape[2]))
    return _touched[tiles]


def narrowed_columns(pattern: list[Tensor], shape: tuple[int, int]) -> tuple[Tensor | None, list[Tensor]]:
    """The columns that tiles touch (None for all of them), and the pattern of the matrix ``[N, columns]`` of these."""
    tiles, places, size = pattern
    if tiles not in _narrowed:
        i, j, *_ = _sides(tiles, shape, (size.shape[1], size.shape[2]))
        kept, columns = _lines(j, shape[1], size.shape[2])
        number = torch.searchsorted(kept, j)
        own = [(i * len(kept) + number).to(torch.int32), places, size]
        _narrowed[tiles] = columns, pattern if columns is None else own
    return _narrowed[tiles]


def _touch(pattern: list[Tensor], shape: tuple[int, int], tile: Tile) -> Touched:
    tiles, places, size = pattern
    i, j, heights, widths = _sides(tiles, shape, tile)
    (kept_i, rows), (kept_j, columns) = _lines(i, shape[0], tile[0]), _lines(j, shape[1], tile[1])
    counts = [side if line is None else line.numel() for line, side in zip((rows, columns), shape, strict=True)]
    if int((heights * widths).sum()) == counts[0] * counts[1]:
        return Touched(rows, columns, [])
    numbers = torch.searchsorted(kept_i, i) * len(kept_j) + torch.searchsorted(kept_j, j)
    return Touched(rows, columns, [numbers.to(torch.int32), places, size])


def _lines(numbers: Tensor, length: int, step: int) -> tuple[Tensor, Tensor | None]:
    """Of tiles' rows or columns in the grid: each once, ascending; and the lines of the matrix, None for all."""
    kept = numbers.unique()
    if kept.numel() == -(-length // step):
        return kept, None
    lines = (kept.view(-1, 1) * step + torch.arange(step, device=numbers.device)).view(-1)
    return kept, lines[lines < length]


@dataclass(frozen=True)
class Strip:
    """The tiles of one row of the grid, whose values are one block.

    Attributes:
        row: the first row of the matrix.
        columns: the first column of each tile, ascending.
        first, end: the block's values.
        width: of the block.
    """

    row: int
    columns: list[int]
    first: int
    end: int
    width: int


def strips_of(pattern: list[Tensor], shape: tuple[int, int]) -> list[Strip]:
    """The strips of a tile pattern that has tiles, from the top. Remembered with the tiles."""
    tiles, places, size = pattern
    if tiles not in _strips:
        tile = (size.shape[1], size.shape[2])
        i, j, *_ = _sides(tiles, shape, tile)
        strips: list[Strip] = []
        for row, column, first, width in zip(i.tolist(), j.tolist(), *places.tolist(), strict=True):
            if not strips or strips[-1].row != row * tile[0]:
                height = min(tile[0], shape[0] - row * tile[0])
                strips.append(Strip(row * tile[0], [], first, first + height * width, width))
            strips[-1].columns.append(column * tile[1])
        _strips[tiles] = strips
    return cast(list[Strip], _strips[tiles])


def is_whole_lines(tile: Tile | None, shape: tuple[int, int]) -> bool:
    """Whether tiles of this size are whole rows or columns of a matrix ``[N, K]``, or several of them."""
    return tile is not None and (tile[0] >= shape[0] or tile[1] >= shape[1])


def assume_columns(pattern: list[Tensor], columns: Tensor | None) -> None:
    """Have `narrowed_columns` of a pattern without data say `columns`, for plans."""
    _narrowed[pattern[0]] = columns, pattern


# A pattern never changes in place, so what follows from it is remembered for as long as its tiles live.
_positions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_touched: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_strips: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_narrowed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
