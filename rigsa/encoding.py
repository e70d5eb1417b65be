"""A pattern on disk: one bit a weight, or 16 bits a free entry and a row, whichever is smaller.

``dense``    nothing is written: every entry is free, and the values are the matrix
``bits``     ``bits`` uint8 ``[ceil(N * K / 8)]``: bit j of byte b is entry ``8 b + j`` of the matrix, row by row
``columns``  ``columns`` uint16 ``[entries]``, ascending within a row, and ``rows`` uint16 ``[N]``: entries of each row

``tiles BNxBK``  ``bits`` of the grid of tiles, in place of the matrix (`rigsa_kernels.tiles`)

Columns are smaller below a density of about 6 %. Both are read as unsigned, so a matrix may have 65,535 columns.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rigsa_kernels.format import MAX_IN_FEATURES, WORD_BITS, SparsePattern, pack_bits, popcount, to_signed, unpack_bits
from rigsa_kernels.tiles import Tile, grid_shape, mask_to_tiles, tile_size, tiles_to_grid

Encoding = str
"""``dense``, ``bits``, ``columns`` or ``tiles BNxBK``."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_TILES = re.compile("tiles ([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")
_PLACES = tuple(1 << place for place in range(8))


def choose_encoding(pattern: SparsePattern) -> Encoding:
    """The smallest encoding of `pattern`."""
    if pattern.is_dense:
        return "dense"
    if pattern.tile is not None:
        return f"tiles {pattern.tile[0]}x{pattern.tile[1]}"
    sizes = {name: _size(layout(name, pattern.shape, pattern.nnz)) for name in ("bits", "columns")}
    return "columns" if pattern.in_features < MAX_IN_FEATURES and sizes["columns"] < sizes["bits"] else "bits"


def is_encoding(text: str) -> bool:
    """Whether `text` is one of the encodings, written as `choose_encoding` writes it."""
    return text in ("dense", "bits", "columns") or _TILES.fullmatch(text) is not None


def tile_of(encoding: str) -> Tile | None:
    """The tile that an encoding is of, rows and columns; None for entries."""
    found = _TILES.fullmatch(encoding)
    return None if found is None else (int(found[1]), int(found[2]))


def layout(encoding: str, shape: tuple[int, int], entries: int) -> Layout:
    """Name to dtype and shape of the tensors that an encoding consists of."""
    if tile := tile_of(encoding):
        return layout("bits", grid_shape(shape, tile), 0)
    rows, columns = shape
    if encoding == "bits":
        return {"bits": (torch.uint8, (-(-rows * columns // 8),))}
    if encoding == "columns":
        return {"columns": (torch.uint16, (entries,)), "rows": (torch.uint16, (rows,))}
    return {}


def _size(tensors: Layout) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors.values())


def encode(pattern: SparsePattern, encoding: Encoding) -> dict[str, Tensor]:
    """The tensors of `layout`, on the CPU."""
    if pattern.tiles is not None and pattern.tile is not None:
        return encode(SparsePattern.from_mask(tiles_to_grid(pattern.tiles, pattern.shape, pattern.tile)), "bits")
    if pattern.bits is None or encoding == "dense":
        return {}
    words = pattern.bits.cpu()
    if encoding == "bits":
        return {"bits": _bytes_of(words, pattern.in_features)}
    columns = unpack_bits(words, pattern.in_features).nonzero()[:, 1]
    return {"columns": _as_uint16(columns), "rows": _as_uint16(popcount(words).sum(0))}


def decode(encoding: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], entries: int | None) -> SparsePattern:
    """What `encode` was given.

    Args:
        encoding, shape, entries: as they were written beside the tensors; None for any number of entries.
        tensors: with the dtypes and shapes of `layout`.

    Raises:
        ValueError: the tensors do not describe a pattern of `entries` free entries in a matrix of this shape.
    """
    rows, columns = shape
    if encoding == "dense":
        return SparsePattern.dense(rows, columns)
    if tile := tile_of(encoding):
        if tile_size(tile, shape) != tile:
            raise ValueError(f"expected tiles within {rows} x {columns}, found {tile[0]} x {tile[1]}")
        grid = decode("bits", tensors, grid_shape(shape, tile), None)
        tiled = SparsePattern.from_tiles(mask_to_tiles(grid.to_mask(), (1, 1)), shape, tile)
        return _of_entries(tiled, entries)
    words = _words_from_bytes(tensors["bits"], shape) if encoding == "bits" else _words_from_columns(tensors, shape)
    return _of_entries(SparsePattern.from_words(words, columns), entries)


def _of_entries(pattern: SparsePattern, entries: int | None) -> SparsePattern:
    if entries is not None and pattern.nnz != entries:
        raise ValueError(f"expected {entries} free entries, found {pattern.nnz}")
    return pattern


def digest(pattern: SparsePattern) -> str:
    """A hash of the free entries, of the shape and of the tile. It does not depend on the encoding."""
    if pattern.tile is not None:
        kind, index = f"tiles {list(pattern.tile)}", pattern.tiles
    else:
        kind, index = "dense" if pattern.is_dense else "packed", pattern.bits
    found = hashlib.sha256(f"{list(pattern.shape)} {kind}".encode())
    if index is not None:
        found.update(index.cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _bytes_of(words: Tensor, columns: int) -> Tensor:
    if columns % WORD_BITS == 0:
        return words.t().flatten().view(torch.uint8)
    mask = unpack_bits(words, columns).reshape(-1)
    eights = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (eights * torch.tensor(_PLACES, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _words_from_bytes(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    if columns % WORD_BITS == 0:
        return packed.view(torch.int32).view(rows, -1).t().clone(memory_format=torch.contiguous_format)
    bits = (packed.unsqueeze(1) & torch.tensor(_PLACES, dtype=torch.uint8)) != 0
    mask = bits.view(-1)
    if mask[rows * columns :].any():
        raise ValueError(f"a bit beyond the last of {rows * columns} entries is set")
    return pack_bits(mask[: rows * columns].view(rows, columns))


def _words_from_columns(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    places, counts = (_from_uint16(tensors[name]) for name in ("columns", "rows"))
    if int(counts.sum()) != places.numel():
        raise ValueError(f"its rows hold {int(counts.sum())} entries, and {places.numel()} columns are given")
    if places.numel() and int(places.max()) >= columns:
        raise ValueError(f"expected columns below {columns}, found {int(places.max())}")
    row = torch.arange(rows).repeat_interleave(counts)
    if ((row[1:] == row[:-1]) & (places[1:] <= places[:-1])).any():
        raise ValueError("the columns of a row do not ascend")
    words = torch.zeros(-(-columns // WORD_BITS) * rows, dtype=torch.int64)
    words.index_add_(0, (places // WORD_BITS) * rows + row, torch.ones_like(places) << (places % WORD_BITS))
    return to_signed(words, WORD_BITS).to(torch.int32).view(-1, rows)


def _as_uint16(numbers: Tensor) -> Tensor:
    return to_signed(numbers.long(), 16).to(torch.int16).view(torch.uint16)


def _from_uint16(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16).long() & 0xFFFF
