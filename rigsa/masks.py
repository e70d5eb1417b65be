"""Which entries survive: from values to patterns. Nothing here knows a model or a file.

The paper's rule (section 4.4) for one pruning: the free entries whose final sign equals their initial sign are
*eligible*; the `keep_fraction` of the eligible with the largest final magnitude are kept. So the density falls by
keep_fraction times the same-sign share: 0.8 * 0.539 a level, four times, gives the paper's 3.46 %. (The text also calls
80 % a pruning ratio; only the first reading gives 3.46 %.)

This is not Zhou et al.'s ``large_final_same_sign`` (2019), which removes a fixed share of a layer and lets entries
that changed sign survive when that share is small. That rule and its relatives are in `rigsa.criteria`.

The sign test and the choice itself are `rigsa_kernels.select`; another rule is another call of its `top_k`.

Where the unit is a tile (`rigsa_kernels.tiles`), tiles are ranked, counted and kept as entries are elsewhere, as the
entries of their grid (`TiledLayer`). A tile's score is the norm of its entries' scores: of those above zero, less that
of those below. So large final magnitudes become a large norm of final values. Under ``rigsa`` it is the share of the
tile's entries that kept their sign, and ``keep_fraction * that share of the layer`` of the tiles are kept: the density
falls as it does for entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from rigsa.criteria import CRITERIA, Score, high_in_all
from rigsa_kernels.format import SparsePattern, pack_bits
from rigsa_kernels.init import initial_values, layer_key
from rigsa_kernels.select import (
    Entries,
    bit_mask,
    count_bits,
    drawn,
    drawn_units,
    of_units,
    ranked,
    same_sign,
    top_k,
)
from rigsa_kernels.tiles import Tile, grid_of, grid_shape, tile_size, tile_sums, tiles_to_grid

Ranking = Literal["layer", "global"]
Layer = TypeVar("Layer")


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A layer's free values after training, and what they started from.

    Attributes:
        values: ``pattern.values_shape``; float32, bfloat16 or float16.
        pattern: which entries are free. Those that were pruned before are not, so none can come back.
        bound, seed, key: of the initial values (`rigsa_kernels.init`), which are regenerated where `initial` is None.
        initial: where the ticket started from something else (`rigsa.criteria.treated_values`): that, as `values`.
        signs: what `same_sign` gives, where that is known already.
    """

    values: Tensor
    pattern: SparsePattern
    bound: float
    seed: int
    key: int
    initial: Tensor | None = None
    signs: Tensor | None = None

    def start(self) -> Tensor:
        """``pattern.values_shape``: what the values were before training. Raises ValueError where `initial` does not
        fit."""
        if self.initial is not None:
            self.pattern.check_values(self.initial)
            return self.initial
        return initial_values(
            self.pattern, self.bound, seed=self.seed, key=self.key, dtype=self.values.dtype, device=self.values.device
        )

    def same_sign(self) -> Tensor:
        """The bit mask of the entries that kept their sign; initial values that come from a seed are never stored."""
        if self.signs is not None:
            return self.signs
        if self.initial is None:
            return same_sign(self.values, self.pattern, bound=self.bound, seed=self.seed, key=self.key)
        return pack_bits(self.pattern.scatter(self.values.detach().sign() * self.start().sign() > 0))

    def with_signs(self) -> TrainedLayer:
        """The same layer with `signs`, a bit a weight, for whoever asks for them more than once."""
        return replace(self, signs=self.same_sign())

    def score(self, score: Score) -> Tensor:
        """float32 ``pattern.values_shape``."""
        return score(self.values.detach().float(), self.start().float())


@dataclass(frozen=True, eq=False)
class TiledLayer:
    """A trained layer whose tiles are the entries of `pattern`, a pattern of the grid.

    Attributes:
        layer: whose pattern is dense, or made of such tiles.
        tile: rows and columns.
        pattern: of the tiles that are free.
    """

    layer: TrainedLayer
    tile: Tile
    pattern: SparsePattern

    @classmethod
    def of(cls, layer: TrainedLayer, tile: Tile) -> TiledLayer:
        """Raises ValueError where the layer's pattern is of other units."""
        own, shape = layer.pattern, layer.pattern.shape
        if own.is_dense:
            return cls(layer, tile, SparsePattern.dense(*grid_shape(shape, tile)))
        if own.tiles is None or own.tile != tile:
            has = "single entries" if own.tile is None else f"tiles of {own.tile[0]} x {own.tile[1]}"
            raise ValueError(f"tile: expected a dense layer or one of tiles of {tile[0]} x {tile[1]}, got one of {has}")
        return cls(layer, tile, SparsePattern.from_mask(tiles_to_grid(own.tiles, shape, tile)))

    @property
    def values(self) -> Tensor:
        return self.layer.values

    @property
    def seed(self) -> int:
        return self.layer.seed

    @property
    def key(self) -> int:
        return self.layer.key

    def score(self, score: Score) -> Tensor:
        """float32 ``pattern.values_shape``: each tile's norm of the scores of its entries."""
        return self.pattern.gather(norms_of_tiles(self.layer.pattern.scatter(self.layer.score(score)), self.tile))

    def same_sign_shares(self) -> Tensor:
        """float32 ``pattern.values_shape``: the share of each tile's entries that kept their sign."""
        shape = self.layer.pattern.shape
        kept = SparsePattern.from_words(self.layer.same_sign(), shape[1]).to_mask().float()
        return self.pattern.gather(tile_sums(kept, self.tile) / tile_sums(torch.ones_like(kept), self.tile))


def norms_of_tiles(scores: Tensor, tile: Tile) -> Tensor:
    """float32, an entry for each tile of the grid: the norm of its scores above zero, less that of those below."""
    scores = scores.float()
    above, below = (tile_sums(part.clamp(min=0).square(), tile).sqrt() for part in (scores, -scores))
    return above - below


@dataclass(frozen=True)
class PruneCounts:
    """What one pruning saw and did, summed over the layers. All free entries are eligible but under ``rigsa``."""

    free: int
    eligible: int
    kept: int


def prune(
    layers: Mapping[str, TrainedLayer],
    *,
    keep_fraction: float,
    ranking: Ranking,
    criterion: str = "rigsa",
    tile: str | int | Tile | None = None,
) -> tuple[dict[str, SparsePattern], PruneCounts]:
    """Choose the entries of every layer that survive.

    Args:
        layers: name to values, all on one device.
        keep_fraction: share of the eligible entries that is kept, in (0, 1].
        ranking: entries are compared within each layer, or over the whole model. Under ``rigsa`` and ``random`` no
            score is ever in memory; otherwise those of one layer at a time are, or, over the whole model, all.
        criterion: a name in `rigsa.criteria.CRITERIA`. Under ``rigsa`` the entries that kept their sign are eligible,
            under all others every free entry is. ``random`` is the draw of `random_patterns`, level after level, so an
            entry that it keeps was kept at every level before.
        tile: keep whole tiles of this size (`rigsa_kernels.tiles.tile_size`); a ticket of tiles keeps its own where
            None is given.

    Returns:
        Name to pattern, a part of the one before, and the counts. ``round(keep_fraction * eligible)`` entries
        are kept, exactly (a layer's own count, or the model's; one more at most where a criterion has two scores).
        Among equals the first in storage order are kept, also among the many that score 0 under the sign criteria,
        where Zhou et al. draw at random.

    Raises:
        ValueError: `keep_fraction` out of range, `criterion` or `ranking` unknown, a value is not finite, or a layer
            would be left empty (named).
    """
    kept, counts = prune_by_layer(layers, keep_fraction=keep_fraction, ranking=ranking, criterion=criterion, tile=tile)
    free = sum(layer.pattern.nnz for layer in layers.values())
    return kept, PruneCounts(free, sum(counts.values()), sum(pattern.nnz for pattern in kept.values()))


def prune_by_layer(
    layers: Mapping[str, TrainedLayer],
    *,
    keep_fraction: float,
    ranking: Ranking,
    criterion: str = "rigsa",
    tile: str | int | Tile | None = None,
) -> tuple[dict[str, SparsePattern], dict[str, int]]:
    """`prune`, with the number of eligible entries of each layer instead of the sums."""
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction: expected more than 0 and at most 1, got {keep_fraction}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    check_ranking(ranking)
    units = {name: _in_units(layer, tile) for name, layer in layers.items()}
    if criterion == "rigsa":
        chosen, counts = _share_of_same_sign(units, keep_fraction, ranking)
    else:
        chosen, counts = _share_of_free(units, keep_fraction, ranking, criterion)
    kept = {name: _of_units(pattern, units[name]) for name, pattern in chosen.items()}
    for name, pattern in kept.items():
        if pattern.nnz == 0:
            raise ValueError(
                f"keep_fraction: {keep_fraction} leaves {name} empty "
                f"({counts[name]} eligible entries of {layers[name].pattern.nnz}); prune less, or fewer levels"
            )
    return kept, counts


Units = TrainedLayer | TiledLayer


def _in_units(layer: TrainedLayer, tile: str | int | Tile | None) -> Units:
    """The layer by its entries, or by tiles of the given size or of its own."""
    size = layer.pattern.tile if tile is None else tile_size(tile, layer.pattern.shape)
    return layer if size is None else TiledLayer.of(layer, size)


def _of_units(kept: SparsePattern, units: Units) -> SparsePattern:
    if isinstance(units, TiledLayer):
        return of_units(kept, units.layer.pattern.shape, units.tile)
    return kept


def check_ranking(ranking: str) -> None:
    """Raises ValueError where it is no `Ranking`."""
    if ranking not in get_args(Ranking):
        raise ValueError(f"ranking: expected one of {', '.join(get_args(Ranking))}, got {ranking!r}")


def _share_of_same_sign(
    layers: Mapping[str, Units], keep_fraction: float, ranking: Ranking
) -> tuple[dict[str, SparsePattern], dict[str, int]]:
    """RIGSA's rule: the patterns of the units, and the number of eligible entries of each layer."""
    _check_finite({name: layer for name, layer in layers.items() if isinstance(layer, TiledLayer)})
    eligible = {name: _entries_of(layer).same_sign() for name, layer in layers.items()}
    counts = dict(zip(layers, torch.stack([count_bits(words) for words in eligible.values()]).tolist(), strict=True))
    units = {name: _in_tiles(counts[name], layer) for name, layer in layers.items()}
    entries = {name: _ranked_by_sign(layer, eligible[name]) for name, layer in layers.items()}
    if ranking == "layer":
        return top_k(entries, {name: round(keep_fraction * number) for name, number in units.items()}), counts
    return top_k(entries, round(keep_fraction * sum(units.values()))), counts


def _check_finite(layers: Mapping[str, Units]) -> None:
    """Raises ValueError where a value is not, which a score or a share may hide."""
    for name, layer in layers.items():
        if not_finite := int((~layer.values.isfinite()).sum()):
            raise ValueError(f"values: expected finite numbers to rank, got {not_finite} in {name} that are not")


def _entries_of(layer: Units) -> TrainedLayer:
    return layer.layer if isinstance(layer, TiledLayer) else layer


def _in_tiles(count: int, layer: Units) -> float:
    """So many of a layer's free entries, counted in its units."""
    if isinstance(layer, TiledLayer):
        return count / max(layer.layer.pattern.nnz, 1) * layer.pattern.nnz
    return count


def _ranked_by_sign(layer: Units, eligible: Tensor) -> Entries:
    if isinstance(layer, TiledLayer):
        return ranked(layer.same_sign_shares(), layer.pattern, by="score")
    return ranked(layer.values, layer.pattern, by="magnitude", candidates=eligible)


def _share_of_free(
    layers: Mapping[str, Units], keep_fraction: float, ranking: Ranking, criterion: str
) -> tuple[dict[str, SparsePattern], dict[str, int]]:
    """The rules of Zhou et al. 2019: a fixed share of what is still free."""
    _check_finite(layers)
    kept: dict[str, SparsePattern] = {}
    for group in _compared(layers, ranking):
        units = sum(layer.pattern.nnz for layer in group.values())
        kept |= _highest(group, CRITERIA[criterion].scores, round(keep_fraction * units))
    return kept, {name: _entries_of(layer).pattern.nnz for name, layer in layers.items()}


def _compared(layers: Mapping[str, Layer], ranking: Ranking) -> list[dict[str, Layer]]:
    """The groups of layers whose entries are compared with each other."""
    return [{name: layer} for name, layer in layers.items()] if ranking == "layer" else [dict(layers)]


def _highest(layers: dict[str, Units], scores: tuple[Score, ...], count: int) -> dict[str, SparsePattern]:
    """`count` entries of all these layers together: high in every score, or, without a score, drawn."""
    if len(scores) > 1:
        return _highest_in_all(layers, scores, count)
    if not scores:
        return top_k({name: _drawn_among_free(layer) for name, layer in layers.items()}, count)
    [score] = scores
    return top_k({name: ranked(layer.score(score), layer.pattern, by="score") for name, layer in layers.items()}, count)


def _highest_in_all(layers: dict[str, Units], scores: tuple[Score, ...], count: int) -> dict[str, SparsePattern]:
    joined = [torch.cat([layer.score(score).view(-1) for layer in layers.values()]) for score in scores]
    parts = high_in_all(joined, count).split([layer.pattern.nnz for layer in layers.values()])
    return {
        name: _part(layer.pattern, part.view(layer.pattern.values_shape))
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }


def _part(pattern: SparsePattern, chosen: Tensor) -> SparsePattern:
    """The free entries where the boolean `chosen`, in ``pattern.values_shape``, is True."""
    return SparsePattern.from_words(pack_bits(pattern.scatter(chosen)), pattern.in_features)


def _drawn_among_free(layer: Units) -> Entries:
    entries = drawn(layer.pattern.shape, seed=layer.seed, key=layer.key, device=layer.values.device)
    return replace(entries, candidates=bit_mask(layer.pattern, layer.values.device))


def largest_patterns(
    scores: Mapping[str, Tensor],
    *,
    density: float,
    ranking: Ranking,
    by: Literal["score", "magnitude"] = "score",
    largest: bool = True,
    tile: str | int | Tile | None = None,
) -> dict[str, SparsePattern]:
    """One-shot masks: the entries of full matrices with the largest scores.

    Args:
        scores: name to ``[N, K]``, float32, bfloat16 or float16, all on one device.
        density: share that is kept, in (0, 1].
        ranking: ``round(density * N * K)`` entries of each layer, or ``round(density * weights)`` of all together.
        by: the scores are ranked as they are, or by their magnitude.
        largest: False keeps the smallest.
        tile: keep whole tiles of this size, by the norm of their scores (`norms_of_tiles`); `density` is then the share
            of the tiles.

    Returns:
        Name to pattern. Among equals the first in storage order are kept.

    Raises:
        ValueError: `density` out of range, `ranking` unknown, a score is no matrix or not finite, or a layer would be
            left empty (named).
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
    check_ranking(ranking)
    for name, matrix in scores.items():
        if matrix.dim() != 2:
            raise ValueError(f"scores: expected an [N, K] matrix for {name}, got {list(matrix.shape)}")
    kept: dict[str, SparsePattern] = {}
    for group in _compared(scores, ranking):
        entries = {name: _ranked_matrix(matrix, by, largest, tile) for name, matrix in group.items()}
        kept |= top_k(entries, round(density * sum(one.pattern.nnz for one in entries.values())))
    for name, pattern in kept.items():
        if pattern.nnz == 0:
            what = "weights" if tile is None else f"weights in {pattern.out_features * pattern.in_features} tiles"
            raise ValueError(f"density: {density} leaves {name} empty ({scores[name].numel()} {what}); keep more")
    return {name: of_units(kept[name], _shape(matrix), tile) for name, matrix in scores.items()}


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _ranked_matrix(
    matrix: Tensor, by: Literal["score", "magnitude"], largest: bool, tile: str | int | Tile | None
) -> Entries:
    matrix = matrix.detach()
    if tile is not None:
        if not_finite := int((~matrix.isfinite()).sum()):  # a norm would not say how many
            raise ValueError(f"values: expected finite numbers to rank, got {not_finite} that are not")
        scores = matrix.abs() if by == "magnitude" else matrix
        matrix, by = norms_of_tiles(scores, tile_size(tile, _shape(matrix))), "score"
    pattern = SparsePattern.dense(*matrix.shape)
    if largest:
        return ranked(matrix, pattern, by=by)
    return ranked(-(matrix.abs() if by == "magnitude" else matrix), pattern, by="score")


def hamming_distance(a: Mapping[str, SparsePattern], b: Mapping[str, SparsePattern]) -> float:
    """The share of the weights that are free in one ticket and not in the other, 0 to 1.

    The Hamming distance of the two masks over all layers, divided by the number of their entries. Two masks of density
    d differ in at most 2 d of them, so a fixed bound on the distance, such as the 0.1 of early-bird tickets, says
    nothing below a density of 0.05.

    Raises:
        ValueError: the layers or their shapes differ.

    Source: You et al., "Drawing Early-Bird Tickets" (ICLR 2020), there over channels.
    """
    if {name: pattern.shape for name, pattern in a.items()} != {name: pattern.shape for name, pattern in b.items()}:
        raise ValueError("b: expected the layers of a, with the same names and shapes")
    differing, weights = 0, 0
    for name, pattern in a.items():
        device = next((one.device for one in (pattern, b[name]) if one.device is not None), "cpu")
        differing += int(count_bits(bit_mask(pattern, device) ^ bit_mask(b[name], device)))
        weights += pattern.out_features * pattern.in_features
    return differing / max(weights, 1)


def drop_and_grow(values: Tensor, pattern: SparsePattern, gradient: Tensor, *, number: int) -> SparsePattern:
    """Move `number` entries of one layer: the smallest free ones go, and as many with the largest gradient come.

    An entry that goes does not come back in the same call. Among equals the first in storage order stay, and come.

    Args:
        values: ``pattern.values_shape``, float32, bfloat16 or float16.
        pattern: which entries are free; on the values' device.
        gradient: ``[N, K]`` of the whole matrix, one of these dtypes, on that device.
        number: 0 to the number of free entries, and of those that are not.

    Returns:
        A packed pattern with as many free entries as `pattern`.

    Raises:
        ValueError: a shape, a dtype or `number` does not fit, or a number to rank is not finite.

    Source: Evci et al., "Rigging the Lottery" (ICML 2020); Ansell et al., "Scaling Sparse Fine-Tuning to Large Language
    Models" (2024), SpIEL-AG.
    """
    rows, columns = pattern.shape
    most = min(pattern.nnz, rows * columns - pattern.nnz)
    if not 0 <= number <= most:
        raise ValueError(f"number: expected 0 to {most} entries to move ({pattern.nnz} are free), got {number}")
    pattern.check_values(values)
    if tuple(gradient.shape) != pattern.shape:
        raise ValueError(f"values: expected {[rows, columns]}, got {list(gradient.shape)}")
    for name, tensor in (("values", values), ("gradient", gradient)):
        if not_finite := int((~tensor.isfinite()).sum()):
            raise ValueError(f"values: expected finite numbers to rank, got {not_finite} in {name} that are not")
    stay = largest(values.detach().abs().view(-1), pattern.nnz - number)
    mask = pattern.to_mask()
    come = largest(gradient.detach().abs().masked_fill_(mask.to(gradient.device), -1).view(-1), number)
    moved = come.view(pattern.shape)
    moved[mask] = stay
    return SparsePattern.from_mask(moved)


def largest(scores: Tensor, count: int) -> Tensor:
    """Boolean: the `count` largest of ``[n]`` scores; among equals the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count).values[-1]
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def erk_counts(shapes: Mapping[str, tuple[int, int]], density: float) -> dict[str, int]:
    """How many entries each layer keeps under the Erdős-Rényi rule: as many as ``epsilon * (N + K)``, at most all.

    Narrow layers are denser than wide ones. `epsilon` is such that all layers together keep exactly
    ``round(density * weights)``; fractions are rounded so that the largest of them are rounded up.

    Args:
        shapes: name to N and K.
        density: share of all weights that is kept, in (0, 1].

    Raises:
        ValueError: `density` is out of range, or a layer would be left empty (named).

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018);
    layers that would exceed their size are dense, and the others share the rest, as in Evci et al., "Rigging the
    Lottery" (ICML 2020), whose Erdős-Rényi-kernel is the same rule where layers are matrices.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    wanted = round(density * sum(sizes.values()))
    dense: set[str] = set()
    while True:
        left = wanted - sum(sizes[name] for name in dense)
        sides = {name: rows + columns for name, (rows, columns) in shapes.items() if name not in dense}
        total = sum(sides.values())
        full = {name for name, side in sides.items() if left * side >= sizes[name] * total}
        if not full:
            break
        dense |= full
    counts = {name: left * side // total for name, side in sides.items()}
    largest_rest = sorted(sides, key=lambda name: -(left * sides[name] % total))  # a stable sort: ties stay in order
    for name in largest_rest[: left - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"density: {density} leaves {name} empty ({sizes[name]} weights); keep more")
    return {name: sizes[name] if name in dense else counts[name] for name in shapes}


def random_patterns(
    shapes: Mapping[str, tuple[int, int]],
    kept: Mapping[str, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    tile: str | int | Tile | None = None,
) -> dict[str, SparsePattern]:
    """For each layer a pattern with exactly ``kept[name]`` entries, or tiles, drawn uniformly from (`seed`, name).

    Layers and seeds draw independently, of each other and of the initial values; the same entries on every device.

    Raises:
        ValueError: a number is not between 1 and that of the entries or tiles (the layer is named).
    """
    units, what = {name: grid_of(shape, tile) for name, shape in shapes.items()}, "entries" if tile is None else "tiles"
    for name, (rows, columns) in units.items():
        if not 1 <= kept[name] <= rows * columns:
            raise ValueError(f"kept: expected 1 to {rows * columns} {what} in {name}, got {kept[name]}")
    draws = {
        name: drawn_units(shape, tile, seed=seed, key=layer_key(name), device=device) for name, shape in shapes.items()
    }
    return {name: of_units(pattern, shapes[name], tile) for name, pattern in top_k(draws, kept).items()}
