"""Which entries are kept: the k largest of one layer or of all layers together, exactly, without a sort.

Every entry has a 32-bit unsigned *key* that orders entries as they are ranked:

    magnitude   the bits of |value| as float32, which sort like the number
    score       the bits of the value as float32, turned so that negative numbers come below positive ones
    random      Philox words of stream 1 (`rigsa_kernels.init`): a draw without replacement; no value is stored

The k-th largest key is found digit by digit from the top, eight bits at a time (radix select; Alabi et al., "Fast
k-selection algorithms for graphics processing units", JEA 2012): count the candidates by their next digit, find on the
host the digit at which k is reached, go on among the keys that share it. Four passes, and after each one small read for
all layers. Then the k-th key is known, and how many keys equal to it are to be taken: the first in storage order
(row-major, layers in order). Counts are integers, so nothing depends on the order in which they are added up.

Keys are computed again in every pass and never stored. What a selection holds beside the values is bits: one a weight
for the candidates, one for the result. The result is the bit mask of a packed pattern over the full matrix, so that a
packed ticket prunes to a sub-pattern.

On a GPU the passes are the kernels of `rigsa_kernels.triton_select`; here they stand in plain PyTorch, in chunks, which
is the specification and the CPU path. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._ops import ops as operators
from .format import WORD_BITS, SparsePattern, pack_bits, popcount, unpack_bits
from .init import as_int64, check_stream, random_words, row_chunks, uniform
from .library import define
from .tiles import Tile, grid_of

Order = Literal["magnitude", "score", "random"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
KEY_BITS = 32
RANDOM_STREAM = 1
_SIGN = -(2**31)
"""An int32 with the sign bit alone."""
_INFINITY = 0x7F800000
"""The bits of float32's infinity. What is not a number has more."""


def _blocks(
    values: Tensor | None, pattern: list[Tensor], shape: tuple[int, int]
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Chunks of a layer: rows, free entries, and the values as a float32 block, 0 where nothing is free."""
    for rows, free, stored in row_chunks(pattern, shape):
        if values is None:
            yield rows, free, None
            continue
        found = values.view(-1)[stored].float()
        yield rows, free, torch.zeros(free.shape).masked_scatter_(free, found) if pattern else found.view(free.shape)


def _same_sign(
    values: Tensor, pattern: list[Tensor], shape: tuple[int, int], bound: float, seed: int, key: int
) -> Tensor:
    out = _new_words(shape, values.device)
    for rows, free, block in _blocks(values, pattern, shape):
        assert block is not None
        words = random_words(seed, key, 0, rows.start * shape[1], free.numel(), values.device)
        initial = uniform(words, bound).to(values.dtype).float().view(block.shape)
        out[:, rows] = pack_bits(((block > 0) & (initial > 0)) | ((block < 0) & (initial < 0)))
    return out


def _keys(
    values: Tensor | None, candidates: Tensor, pattern: list[Tensor], in_features: int, by: Order, seed: int, key: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Chunks of a layer: rows, keys less 2**31 (int32, which sorts as they do), candidates, and the values."""
    shape = (candidates.shape[1], in_features)
    for rows, free, block in _blocks(values, pattern, shape):
        if block is None:
            words = random_words(seed, key, RANDOM_STREAM, rows.start * in_features, free.numel(), candidates.device)
            keys = words.sub_(2**31).to(torch.int32).view(free.shape)
        elif by == "magnitude":
            keys = block.view(torch.int32) | _SIGN
        else:
            bits = (block + 0.0).view(torch.int32)  # -0 + 0 is +0: equal numbers, equal keys
            keys = bits ^ ((bits >> 31) & ~_SIGN)
        yield rows, keys, free & unpack_bits(candidates[:, rows], in_features), block


def _digit_counts(
    values: Tensor | None,
    candidates: Tensor,
    pattern: list[Tensor],
    in_features: int,
    by: Order,
    seed: int,
    key: int,
    prefix: int,
    shift: int,
) -> Tensor:
    counts = candidates.new_zeros(DIGITS + 2, dtype=torch.int64)
    not_finite = counts.new_zeros(())
    for _, keys, chosen, block in _keys(values, candidates, pattern, in_features, by, seed, key):
        digits = keys.bitwise_xor_(prefix - 2**31).bitwise_right_shift_(shift)
        if shift == KEY_BITS - DIGIT_BITS:
            digits.bitwise_and_(DIGITS - 1)  # the shift copies the sign bit, which is part of this digit alone
        # What has another prefix is below 0, or DIGITS and more, as is what is no candidate: both ends are dropped.
        # To pick the entries that count would take four times as long as counting all.
        digits.bitwise_or_((~chosen).to(torch.int32).mul_(DIGITS)).clamp_(-1, DIGITS).add_(1)
        counts += torch.bincount(digits.view(-1), minlength=DIGITS + 2)
        if block is not None:
            not_finite += (block.view(torch.int32) | _SIGN).ge_(_INFINITY | _SIGN).sum()
    counts[DIGITS + 1] = not_finite
    return counts[1:].clone()


def _keep_largest(
    values: Tensor | None,
    candidates: Tensor,
    pattern: list[Tensor],
    in_features: int,
    by: Order,
    seed: int,
    key: int,
    threshold: int,
    take: int,
) -> Tensor:
    out, threshold = torch.empty_like(candidates), threshold - 2**31
    for rows, keys, chosen, _ in _keys(values, candidates, pattern, in_features, by, seed, key):
        ties = chosen & (keys == threshold)
        if (number := int(ties.count_nonzero())) > take:
            ties &= ties.view(-1).cumsum(0).view(ties.shape) <= take
        take -= min(number, take)
        out[:, rows] = pack_bits((chosen & (keys > threshold)) | ties)
    return out


def _words_shape(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[1] // WORD_BITS), shape[0]


def _new_words(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(_words_shape(shape), dtype=torch.int32, device=device)


define(
    "same_sign(Tensor values, Tensor[] pattern, int[] shape, float bound, int seed, int key) -> Tensor",
    _same_sign,
    "triton_select.same_sign",
    lambda values, pattern, shape, bound, seed, key: _new_words(shape, values.device),
)
_RANKED = "Tensor? values, Tensor candidates, Tensor[] pattern, int in_features, str by, int seed, int key"
define(
    f"digit_counts({_RANKED}, int prefix, int shift) -> Tensor",
    _digit_counts,
    "triton_select.digit_counts",
    lambda values, candidates, *_: candidates.new_empty(DIGITS + 1, dtype=torch.int64),
)
define(
    f"keep_largest({_RANKED}, int threshold, int take) -> Tensor",
    _keep_largest,
    "triton_select.keep_largest",
    lambda values, candidates, *_: torch.empty_like(candidates),
)


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one layer that compete, and what they are ranked by. Make one with `ranked` or `drawn`.

    Attributes:
        pattern: which entries are free.
        by: the key; see the head of this file.
        values: ``pattern.values_shape``; None when random.
        candidates: int32 ``[ceil(K / 32), N]``, the bit mask of the entries that may be kept; others never are.
        seed, key: of the random keys; unused otherwise.
    """

    pattern: SparsePattern
    by: Order
    values: Tensor | None
    candidates: Tensor
    seed: int = 0
    key: int = 0

    def digit_counts(self, prefix: int, shift: int) -> Tensor:
        """int64 ``[257]``: candidates by digit ``(key >> shift) & 255`` among those whose key shares the digits of
        `prefix` above it; last, the free values that are not finite."""
        return operators.digit_counts(*self._arguments, prefix, shift)

    def keep_largest(self, threshold: int, take: int) -> Tensor:
        """The bit mask of the candidates whose key exceeds `threshold` and of the first `take` that equal it."""
        return operators.keep_largest(*self._arguments, threshold, take)

    @property
    def _arguments(self) -> tuple[Tensor | None, Tensor, list[Tensor], int, Order, int, int]:
        pattern = self.pattern
        return (
            self.values, self.candidates, pattern.tensors, pattern.in_features, self.by, as_int64(self.seed), self.key
        )  # fmt: skip


def ranked(
    values: Tensor, pattern: SparsePattern, *, by: Literal["magnitude", "score"], candidates: Tensor | None = None
) -> Entries:
    """Entries ranked by their values: largest magnitude first, or largest number first.

    Args:
        values: ``pattern.values_shape``, float32, bfloat16 or float16.
        pattern: which entries are free; on the values' device.
        candidates: bit mask (`same_sign`, or the `words` of a pattern) of those that may be kept; all by default.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    values = values.detach()
    _check_values(values, pattern)
    if candidates is None:
        candidates = bit_mask(pattern, values.device)
    expected = _words_shape(pattern.shape)
    if candidates.dtype != torch.int32 or tuple(candidates.shape) != expected:
        raise ValueError(
            f"candidates: expected int32 {list(expected)}, got {candidates.dtype} {list(candidates.shape)}"
        )
    return Entries(pattern.packed(), by, values.contiguous(), candidates)


def drawn(shape: tuple[int, int], *, seed: int, key: int, device: torch.device | str = "cpu") -> Entries:
    """All entries of an ``[N, K]`` matrix in an order drawn from (`seed`, `key`), the same on every device.

    Keys have 32 bits. Where two that are equal stand at the edge, the first in storage order is kept.

    Raises:
        ValueError: `seed` or `key` out of range.
    """
    check_stream(seed, key)
    return Entries(SparsePattern.dense(*shape), "random", None, every_entry(shape, torch.device(device)), seed, key)


def drawn_units(
    shape: tuple[int, int], tile: str | int | Tile | None, *, seed: int, key: int, device: torch.device | str = "cpu"
) -> Entries:
    """`drawn`, where whole tiles are to be kept: of the grid's entries. None is `drawn` itself."""
    return drawn(grid_of(shape, tile), seed=seed, key=key, device=device)


def of_units(kept: SparsePattern, shape: tuple[int, int], tile: str | int | Tile | None) -> SparsePattern:
    """The pattern of a matrix ``[N, K]`` whose free tiles are the entries of `kept`, a pattern of the grid; `kept`
    itself where `tile` is None."""
    if tile is None:
        return kept
    return SparsePattern.from_tiles(kept.to_mask().reshape(-1).nonzero().view(-1).to(torch.int32), shape, tile)


def every_entry(shape: tuple[int, int], device: torch.device) -> Tensor:
    """The bit mask of a full ``[N, K]`` matrix."""
    words = _new_words(shape, device).fill_(-1)
    if shape[1] % WORD_BITS:
        words[-1] = (1 << shape[1] % WORD_BITS) - 1
    return words


def bit_mask(pattern: SparsePattern, device: torch.device | str = "cpu") -> Tensor:
    """int32 ``[ceil(K / 32), N]`` of any pattern; on `device` where the pattern is dense, and on none."""
    words = pattern.words
    return every_entry(pattern.shape, torch.device(device)) if words is None else words


def count_bits(words: Tensor) -> Tensor:
    """int64 scalar: number of entries in a bit mask."""
    return popcount(words).sum()


def same_sign(values: Tensor, pattern: SparsePattern, *, bound: float, seed: int, key: int) -> Tensor:
    """The free entries whose value has the sign of its initial value, which is regenerated and never stored.

    Args:
        values: ``pattern.values_shape``, float32, bfloat16 or float16; the initial values are those of this dtype.
        pattern: which entries are free; on the values' device.
        bound, seed, key: of the initial values (`rigsa_kernels.init.initial_values`).

    Returns:
        int32 ``[ceil(K / 32), N]``, a bit mask over the full matrix. A zero has no sign, so it is not in it.

    Raises:
        ValueError: a shape or dtype does not fit, or `seed` or `key` is out of range.

    Source: RIGSA, section 4.4.
    """
    values = values.detach()
    _check_values(values, pattern)
    check_stream(seed, key)
    shape = list(pattern.shape)
    return operators.same_sign(values.contiguous(), pattern.packed().tensors, shape, bound, as_int64(seed), key)


def _check_values(values: Tensor, pattern: SparsePattern) -> None:
    pattern.check_values(values)
    if values.dtype not in DTYPES:
        raise ValueError(f"values: expected float32, bfloat16 or float16, got {values.dtype}")


def top_k(layers: Mapping[str, Entries], k: int | Mapping[str, int]) -> dict[str, SparsePattern]:
    """The `k` largest entries over all layers, or, given a number for each layer, the largest of each.

    Args:
        layers: name to entries, all on one device. Ties go to the first in storage order, layers in this order.
        k: exactly so many are kept.

    Returns:
        Name to packed pattern; empty patterns are possible.

    Raises:
        ValueError: `k` is below 0 or exceeds the candidates, or a free value is not finite (the layer is named).
    """
    names = list(layers)
    if isinstance(k, int):
        group, left = torch.zeros(len(names), dtype=torch.int64), torch.tensor([k])
    else:
        group, left = torch.arange(len(names)), torch.tensor([k[name] for name in names])
    threshold = torch.zeros_like(left)
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        prefixes = threshold[group].tolist()
        counts = [layer.digit_counts(prefix, shift) for layer, prefix in zip(layers.values(), prefixes, strict=True)]
        by_layer = torch.stack(counts).cpu()
        by_group = torch.zeros(len(left), DIGITS, dtype=torch.int64).index_add_(0, group, by_layer[:, :DIGITS])
        if shift == KEY_BITS - DIGIT_BITS:
            _check_finite(names, by_layer[:, DIGITS])
            _check_k(["all layers"] if isinstance(k, int) else names, by_group.sum(1), left)
        at_least = by_group.flip(1).cumsum(1).flip(1)
        digit = (at_least >= left.unsqueeze(1)).sum(1, keepdim=True) - 1
        left -= (at_least - by_group).gather(1, digit).squeeze(1)
        threshold |= digit.squeeze(1) << shift
    ties = by_layer.gather(1, digit[group]).squeeze(1)
    before = ties.cumsum(0) - ties if isinstance(k, int) else torch.zeros_like(ties)
    take = (left[group] - before).clamp(min=0).minimum(ties)
    last = zip(layers.items(), threshold[group].tolist(), take.tolist(), strict=True)
    return {
        name: SparsePattern.from_words(layer.keep_largest(bits, number), layer.pattern.in_features)
        for (name, layer), bits, number in last
    }


def _check_finite(names: list[str], not_finite: Tensor) -> None:
    for name, number in zip(names, not_finite.tolist(), strict=True):
        if number:
            raise ValueError(f"values: expected finite numbers to rank, got {number} in {name} that are not")


def _check_k(names: list[str], candidates: Tensor, k: Tensor) -> None:
    for name, number, wanted in zip(names, candidates.tolist(), k.tolist(), strict=True):
        if not 0 <= wanted <= number:
            raise ValueError(f"k: expected 0 to {number} entries in {name}, got {wanted}")
