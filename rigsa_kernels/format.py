"""Where a layer's difference may be non-zero: the pattern, apart from the values it holds.

A pattern is *dense* (every entry of the ``[N, K]`` matrix is free; no index is stored, and the values are the matrix
itself), *packed* (one bit per weight, and the free values row by row in one vector) or made of *tiles*: whole tiles
``bn x bk`` are free, one integer each, and the values lie as in a packed pattern (`rigsa_kernels.tiles`). All answer
the same questions (`nnz`, `gather`, `scatter`, ...), so little above this file asks which one it has.

A packed pattern of a 3x4 matrix (K = 4, so one 32-bit word covers a row)::

    mask   1 0 1 0      words         [[0b0101, 0b0000, 0b1110]]   bit j of words[q, n] is mask[n, 32 q + j]
           0 0 0 0      word_offsets  [[0, 0, 0]]                  free entries of row n before word q
           0 1 1 1      row_base      [0, 2, 2]                    free entries before row n
                        values        [v00, v02, v21, v22, v23]    row-major, so values == matrix[mask]

The value at ``(n, k)`` is found without a search: with ``q, j = divmod(k, 32)`` it is number ``row_base[n] +
word_offsets[q, n] + popcount(words[q, n] & (2**j - 1))``. Words are stored q first: a warp walks along n.
Bit mask, offsets and base cost 0.19 byte a weight; a bf16 matrix costs 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .tiles import (
    Tile,
    check_tiles,
    is_tiled,
    mask_to_tiles,
    places_of,
    tile_positions,
    tile_size,
    tiles_to_mask,
)

WORD_BITS = 32
MAX_IN_FEATURES = 65_536
"""Offsets within a row are 16-bit and unsigned."""


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """The free entries of an ``[out_features, in_features]`` matrix.

    Make one with `dense`, `from_mask` or `from_tiles`.

    A packed pattern is its bit mask: `word_offsets` and `row_base` follow from it, so files hold the mask alone and
    whoever reads one counts them again (`from_words`). So `places` follows from `tiles`. A pattern is never changed in
    place.

    Raises:
        ValueError: `in_features` exceeds `MAX_IN_FEATURES`.

    Attributes:
        out_features, in_features: N and K.
        nnz: number of free entries.
        bits: int32 ``[ceil(K / 32), N]``, the bit mask (bit patterns, so possibly negative); None unless packed.
        word_offsets: int16 ``[ceil(K / 32), N]``, read as unsigned; None unless packed.
        row_base: int32 ``[N]``; None unless packed.
        tiles: int32 ``[tiles]``, ascending numbers in the grid; None unless made of tiles.
        places: int32 ``[2, tiles]`` (`rigsa_kernels.tiles`); None unless made of tiles.
        size: ``[0, bn, bk]``, a shape without entries; None unless made of tiles.
    """

    out_features: int
    in_features: int
    nnz: int
    bits: Tensor | None = None
    word_offsets: Tensor | None = None
    row_base: Tensor | None = None
    tiles: Tensor | None = None
    places: Tensor | None = None
    size: Tensor | None = None

    def __post_init__(self) -> None:
        if self.in_features > MAX_IN_FEATURES:
            raise ValueError(f"in_features: expected at most {MAX_IN_FEATURES} columns, got {self.in_features}")

    @classmethod
    def dense(cls, out_features: int, in_features: int) -> SparsePattern:
        """Every entry free: level 0."""
        return cls(out_features, in_features, out_features * in_features)

    @classmethod
    def from_mask(cls, mask: Tensor, tile: str | int | Tile | None = None) -> SparsePattern:
        """Pack a boolean ``[N, K]`` mask, True where an entry is free.

        Args:
            mask: boolean ``[N, K]``.
            tile: which tiles the mask is made of (`rigsa_kernels.tiles.tile_size`); None for a packed pattern.

        Raises:
            ValueError: `mask` is not boolean, not 2-D, too wide for 16-bit offsets, has 2**31 entries or more, or has
                a tile that is free in part.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask: expected a boolean [N, K] tensor, got {mask.dtype} {list(mask.shape)}")
        if mask.shape[1] > MAX_IN_FEATURES:
            raise ValueError(f"mask: expected at most {MAX_IN_FEATURES} columns, got {mask.shape[1]}")
        if tile is not None:
            shape = (mask.shape[0], mask.shape[1])
            size = tile_size(tile, shape)
            return cls.from_tiles(mask_to_tiles(mask, size), shape, size)
        return cls.from_words(pack_bits(mask), mask.shape[1])

    @classmethod
    def from_tiles(cls, tiles: Tensor, shape: tuple[int, int], tile: str | int | Tile) -> SparsePattern:
        """A pattern whose free entries are whole tiles.

        Args:
            tiles: int32 ``[tiles]``, ascending numbers ``i * ceil(K / bk) + j`` in the grid; copied.
            shape: (N, K).
            tile: a tile's rows and columns, as `rigsa_kernels.tiles.tile_size` takes them.

        Raises:
            ValueError: `tile` is no tile, `tiles` are not ascending numbers of the grid, K exceeds `MAX_IN_FEATURES`,
                or there are 2**31 free entries or more.
        """
        size = tile_size(tile, shape)
        check_tiles(tiles, shape, size)
        places, nnz = places_of(tiles, shape, size)
        if nnz >= 2**31:
            raise ValueError(f"tiles: expected fewer than 2**31 free entries a layer, got {nnz}")
        shape_of_tile = torch.empty((0, *size), dtype=torch.int8, device=tiles.device)
        return cls(*shape, nnz, tiles=tiles.clone(), places=places.to(torch.int32), size=shape_of_tile)

    @classmethod
    def from_words(cls, words: Tensor, in_features: int) -> SparsePattern:
        """A packed pattern from its bit mask alone, which is copied; offsets and bases are counted again.

        Args:
            words: int32 ``[ceil(K / 32), N]``; who holds it may write to it afterwards.
            in_features: K.

        Raises:
            ValueError: K exceeds `MAX_IN_FEATURES`, the shape of `words` does not fit it, a bit beyond
                the last column is set, or there are 2**31 free entries or more.
        """
        if not 0 <= in_features <= MAX_IN_FEATURES:
            raise ValueError(f"in_features: expected at most {MAX_IN_FEATURES} columns, got {in_features}")
        num_words = -(-in_features // WORD_BITS)
        if words.dtype != torch.int32 or words.dim() != 2 or words.shape[0] != num_words:
            raise ValueError(
                f"words: expected int32 [{num_words}, N] for {in_features} columns, "
                f"got {words.dtype} {list(words.shape)}"
            )
        beyond = num_words * WORD_BITS - in_features
        if beyond and (words[-1] >> (WORD_BITS - beyond) != 0).any():
            raise ValueError(f"words: a bit beyond column {in_features - 1} is set, so the mask is damaged")
        words = words.clone(memory_format=torch.contiguous_format)
        counts = popcount(words)
        per_row = counts.sum(0)
        nnz = int(per_row.sum())
        if nnz >= 2**31:
            raise ValueError(f"mask: expected fewer than 2**31 free entries a layer, got {nnz}")
        word_offsets = to_signed(counts.cumsum(0) - counts, 16).to(torch.int16)
        row_base = (per_row.cumsum(0) - per_row).to(torch.int32)
        return cls(words.shape[1], in_features, nnz, words, word_offsets, row_base)

    @property
    def is_dense(self) -> bool:
        return self.bits is None and self.tiles is None

    @property
    def tile(self) -> Tile | None:
        """Rows and columns of a tile, ``(bn, bk)``; None where entries are free one by one."""
        return None if self.size is None else (self.size.shape[1], self.size.shape[2])

    @property
    def words(self) -> Tensor | None:
        """The bit mask, int32 ``[ceil(K / 32), N]``; None when dense. That of tiles is made anew each time."""
        return self.bits if self.tiles is None else pack_bits(self.to_mask())

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def density(self) -> float:
        """Free share of the matrix, 0 to 1."""
        return self.nnz / max(self.out_features * self.in_features, 1)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values: ``(N, K)`` when dense, else ``(nnz,)``."""
        return self.shape if self.is_dense else (self.nnz,)

    @property
    def tensors(self) -> list[Tensor]:
        """How operators receive a pattern: ``[]`` when dense, ``[bits, word_offsets, row_base]`` when packed,
        ``[tiles, places, size]`` when made of tiles."""
        named = (self.bits, self.word_offsets, self.row_base, self.tiles, self.places, self.size)
        return [tensor for tensor in named if tensor is not None]

    @property
    def device(self) -> torch.device | None:
        """Of the index tensors; None when dense."""
        return None if self.is_dense else self.tensors[0].device

    def to(self, device: torch.device | str) -> SparsePattern:
        """The same pattern with its index tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> SparsePattern:
        """The same pattern with `function` of each index tensor in its place: what moves or copies it as a whole."""
        tensors = list(map(function, self.tensors))
        if self.tiles is None:
            return SparsePattern(*self.shape, self.nnz, *tensors)
        return SparsePattern(*self.shape, self.nnz, None, None, None, *tensors)

    def packed(self) -> SparsePattern:
        """The same entries and the same order of values as one bit per weight; dense and packed patterns are that."""
        return self if self.tiles is None else SparsePattern.from_mask(self.to_mask())

    def equals(self, other: SparsePattern) -> bool:
        """Whether `other` frees the same entries of the same shape in the same storage; waits for the device."""
        one, two = self.tiles if self.bits is None else self.bits, other.tiles if other.bits is None else other.bits
        if self.shape != other.shape or self.tile != other.tile or one is None or two is None:
            return self.shape == other.shape and self.is_dense and other.is_dense
        return torch.equal(one.cpu(), two.cpu())

    def to_mask(self) -> Tensor:
        """Boolean ``[N, K]``, True where an entry is free."""
        if self.tiles is not None and self.tile is not None:
            return tiles_to_mask(self.tiles, self.shape, self.tile)
        if self.bits is None:
            return torch.ones(self.shape, dtype=torch.bool)
        return unpack_bits(self.bits, self.in_features)

    def gather(self, matrix: Tensor) -> Tensor:
        """The free entries of an ``[N, K]`` matrix, shaped `values_shape`. Copies."""
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"matrix: expected {list(self.shape)}, got {list(matrix.shape)}")
        if self.is_dense:
            return matrix.clone()
        return matrix.take(positions(self.tensors, self.shape))

    def places_in(self, before: SparsePattern) -> Tensor:
        """int64 ``[nnz]``: the place of each free entry among the values of `before`, -1 where it was not free there.

        No index list outlives the call, unlike those of `gather`.

        Raises:
            ValueError: a pattern is dense, or their shapes differ.
        """
        if self.is_dense or before.is_dense or self.shape != before.shape:
            raise ValueError(f"before: expected two packed patterns of one shape, got {before.shape} and {self.shape}")
        numbers = torch.arange(before.nnz, dtype=torch.int32, device=before.device)
        places = torch.full(self.shape, -1, dtype=torch.int32, device=before.device)
        places[before.to_mask()] = numbers
        return places[self.to_mask()].long()

    def scatter(self, values: Tensor) -> Tensor:
        """The ``[N, K]`` matrix that holds `values` at the free entries and zeros elsewhere. Copies."""
        self.check_values(values)
        if self.is_dense:
            return values.clone()
        matrix = values.new_zeros(self.out_features * self.in_features)
        matrix.index_put_((positions(self.tensors, self.shape),), values)
        return matrix.view(self.shape)

    def check_values(self, values: Tensor) -> None:
        """Raises ValueError where `values` does not have `values_shape`."""
        if tuple(values.shape) != self.values_shape:
            raise ValueError(f"values: expected {list(self.values_shape)}, got {list(values.shape)}")


def carry(values: Tensor, places: Tensor) -> Tensor:
    """``[nnz]``: the values that stood at `places` (`SparsePattern.places_in`), 0 for -1."""
    return values.view(-1)[places.clamp(min=0)].masked_fill_(places < 0, 0)


def to_signed(unsigned: Tensor, bits: int) -> Tensor:
    """The signed number with the same low `bits` bits as a non-negative int64."""
    return torch.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned)


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean ``[N, K]`` to int32 ``[ceil(K / 32), N]``; columns are padded with zero bits."""
    out_features, in_features = mask.shape
    num_words = -(-in_features // WORD_BITS)
    bits = torch.nn.functional.pad(mask, (0, num_words * WORD_BITS - in_features))
    bits = bits.view(out_features, num_words, WORD_BITS)
    words = torch.zeros(out_features, num_words, dtype=torch.int32, device=mask.device)
    for place in range(WORD_BITS):  # a product with all places at once would take 8 bytes an entry
        words |= bits[..., place].to(torch.int32) << place
    return words.t().contiguous()


def popcount(words: Tensor) -> Tensor:
    """Number of set bits, 0 to 32, of each int32, as int32. The masks undo what arithmetic shifts drag in."""
    counts = words - ((words >> 1) & 0x55555555)
    counts = (counts & 0x33333333) + ((counts >> 2) & 0x33333333)
    counts = (counts + (counts >> 4)) & 0x0F0F0F0F
    counts = counts + (counts >> 8)
    return (counts + (counts >> 16)) & 0x3F


def unpack_bits(words: Tensor, in_features: int) -> Tensor:
    """int32 ``[ceil(K / 32), N]`` to boolean ``[N, K]``."""
    bits = (words.t().unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)) & 1
    return bits.bool().reshape(words.shape[1], -1)[:, :in_features]


# A pattern never changes in place (pruning makes a new one), so its index lists may be remembered for as long as its
# bit mask lives. Only the PyTorch path needs them: a kernel finds positions by population count.
_flat_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_csr_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_packed_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def flat_indices(words: Tensor, in_features: int) -> Tensor:
    """int64 ``[nnz]``: positions ``n * K + k`` of the free entries, ascending. Remembered per `words`."""
    if words not in _flat_indices:
        _flat_indices[words] = unpack_bits(words, in_features).reshape(-1).nonzero().view(-1)
    return _flat_indices[words]


def positions(pattern: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """int64 ``[nnz]``: positions ``n * K + k`` of the free entries, ascending, of a pattern that is not dense."""
    return tile_positions(pattern, shape) if is_tiled(pattern) else flat_indices(pattern[0], shape[1])


def packed_form(pattern: list[Tensor], shape: tuple[int, int]) -> list[Tensor]:
    """``[]`` or ``[bits, word_offsets, row_base]`` of any pattern, for kernels that decode bits. Remembered."""
    if not is_tiled(pattern):
        return pattern
    tiles, _, size = pattern
    if tiles not in _packed_forms:
        mask = tiles_to_mask(tiles, shape, (size.shape[1], size.shape[2]))
        _packed_forms[tiles] = SparsePattern.from_mask(mask).tensors
    return _packed_forms[tiles]


def csr_indices(pattern: list[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int32 ``[N + 1]`` row pointers and int32 ``[nnz]`` columns. Remembered with the pattern."""
    if pattern[0] not in _csr_indices:
        places = positions(pattern, shape)
        starts = torch.arange(shape[0] + 1, device=places.device) * shape[1]
        rows = torch.searchsorted(places, starts).to(torch.int32)
        _csr_indices[pattern[0]] = rows, (places % max(shape[1], 1)).to(torch.int32)
    return _csr_indices[pattern[0]]
