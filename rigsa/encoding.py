"""A pattern on disk: one bit a weight, or 16 bits a free entry and a row, whichever is smaller.

``dense``    nothing is written: every entry is free, and the values are the matrix
``bits``     ``bits`` uint8 ``[ceil(N * K / 8)]``: bit j of byte b is entry ``8 b + j`` of the matrix, row by row
``columns``  ``columns`` uint16 ``[entries]``, ascending within a row, and ``rows`` uint16 ``[N]``: entries of each row

Columns are smaller below a density of about 6 %. Both are read as unsigned, so a matrix may have 65,535 columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rigsa_kernels.format import MAX_IN_FEATURES, WORD_BITS, SparsePattern, pack_bits, popcount, to_signed, unpack_bits

Encoding = Literal["dense", "bits", "columns"]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_PLACES = tuple(1 << place for place in range(8))


def choose_encoding(pattern: SparsePattern) -> Encoding:
    """The smallest encoding of `pattern`."""
    if pattern.is_dense:
        return "dense"
    sizes = {name: _size(layout(name, pattern.shape, pattern.nnz)) for name in ("bits", "columns")}
    return "columns" if pattern.in_features < MAX_IN_FEATURES and sizes["columns"] < sizes["bits"] else "bits"


def layout(encoding: str, shape: tuple[int, int], entries: int) -> Layout:
    """Name to dtype and shape of the tensors that an encoding consists of."""
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
    if pattern.words is None or encoding == "dense":
        return {}
    words = pattern.words.cpu()
    if encoding == "bits":
        return {"bits": _bytes_of(words, pattern.in_features)}
    columns = unpack_bits(words, pattern.in_features).nonzero()[:, 1]
    return {"columns": _as_uint16(columns), "rows": _as_uint16(popcount(words).sum(0))}


def decode(encoding: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], entries: int) -> SparsePattern:
    """What `encode` was given.

    Args:
        encoding, shape, entries: as they were written beside the tensors.
        tensors: with the dtypes and shapes of `layout`.

    Raises:
        ValueError: the tensors do not describe a pattern of `entries` free entries in a matrix of this shape.
    """
    rows, columns = shape
    if encoding == "dense":
        return SparsePattern.dense(rows, columns)
    words = _words_from_bytes(tensors["bits"], shape) if encoding == "bits" else _words_from_columns(tensors, shape)
    pattern = SparsePattern.from_words(words, columns)
    if pattern.nnz != entries:
        raise ValueError(f"expected {entries} free entries, found {pattern.nnz}")
    return pattern


def digest(pattern: SparsePattern) -> str:
    """A hash of the free entries and of the shape. It does not depend on the encoding."""
    found = hashlib.sha256(f"{list(pattern.shape)} {'dense' if pattern.is_dense else 'packed'}".encode())
    if pattern.words is not None:
        found.update(pattern.words.cpu().flatten().view(torch.uint8).numpy().data)
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
