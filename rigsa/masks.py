"""Which entries survive: from values to patterns. Nothing here knows a model or a file.

The paper's rule (section 4.4) for one pruning: the free entries whose final sign equals their initial sign are
*eligible*; the `keep_fraction` of the eligible with the largest final magnitude are kept. So the density falls by
keep_fraction times the same-sign share: 0.8 * 0.539 a level, four times, gives the paper's 3.46 %. (The text also calls
80 % a pruning ratio; only the first reading gives 3.46 %.)

This is not Zhou et al.'s ``large_final_same_sign`` (2019), which removes a fixed share of a layer and lets entries
that changed sign survive when that share is small.

The sign test and the choice itself are `rigsa_kernels.select`; another rule is another call of its `top_k`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rigsa_kernels.format import SparsePattern
from rigsa_kernels.init import layer_key
from rigsa_kernels.select import count_bits, drawn, ranked, same_sign, top_k

Ranking = Literal["layer", "global"]


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A layer's free values after training, and what regenerates their initial ones (`rigsa_kernels.init`).

    Attributes:
        values: ``pattern.values_shape``; float32, bfloat16 or float16.
        pattern: which entries are free. Those that were pruned before are not, so none can come back.
        bound, seed, key: of the initial values.
    """

    values: Tensor
    pattern: SparsePattern
    bound: float
    seed: int
    key: int


@dataclass(frozen=True)
class PruneCounts:
    """What one pruning saw and did, summed over the layers."""

    free: int
    eligible: int
    kept: int


def prune(
    layers: Mapping[str, TrainedLayer], *, keep_fraction: float, ranking: Ranking
) -> tuple[dict[str, SparsePattern], PruneCounts]:
    """Choose the entries of every layer that survive.

    Args:
        layers: name to values, all on one device.
        keep_fraction: share of the eligible entries that is kept, in (0, 1].
        ranking: magnitudes are compared within each layer, or over the whole model.

    Returns:
        Name to packed pattern, a part of the one before, and the counts. ``round(keep_fraction * eligible)`` entries
        are kept, exactly (a layer's own count, or the model's); among equal magnitudes the first in storage order.

    Raises:
        ValueError: `keep_fraction` out of range, a value is not finite, or a layer would be left empty (named).
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction: expected more than 0 and at most 1, got {keep_fraction}")
    eligible = {
        name: same_sign(layer.values, layer.pattern, bound=layer.bound, seed=layer.seed, key=layer.key)
        for name, layer in layers.items()
    }
    counts = dict(zip(layers, torch.stack([count_bits(words) for words in eligible.values()]).tolist(), strict=True))
    entries = {
        name: ranked(layer.values, layer.pattern, by="magnitude", candidates=eligible[name])
        for name, layer in layers.items()
    }
    if ranking == "layer":
        kept = top_k(entries, {name: round(keep_fraction * count) for name, count in counts.items()})
    else:
        kept = top_k(entries, round(keep_fraction * sum(counts.values())))
    for name, pattern in kept.items():
        if pattern.nnz == 0:
            raise ValueError(
                f"keep_fraction: {keep_fraction} leaves {name} empty "
                f"({counts[name]} eligible entries of {layers[name].pattern.nnz}); prune less, or fewer levels"
            )
    free = sum(layer.pattern.nnz for layer in layers.values())
    return kept, PruneCounts(free, sum(counts.values()), sum(pattern.nnz for pattern in kept.values()))


def random_patterns(
    shapes: Mapping[str, tuple[int, int]], kept: Mapping[str, int], *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, SparsePattern]:
    """For each layer a packed pattern with exactly ``kept[name]`` entries, drawn uniformly from (`seed`, name).

    Layers and seeds draw independently, of each other and of the initial values; the same entries on every device.

    Raises:
        ValueError: a number is not between 1 and N * K (the layer is named).
    """
    for name, (rows, columns) in shapes.items():
        if not 1 <= kept[name] <= rows * columns:
            raise ValueError(f"kept: expected 1 to {rows * columns} entries in {name}, got {kept[name]}")
    return top_k(
        {name: drawn(shape, seed=seed, key=layer_key(name), device=device) for name, shape in shapes.items()}, kept
    )


def random_mask(shape: tuple[int, int], kept: int, *, seed: int, name: str) -> Tensor:
    """`random_patterns` for one layer, as a boolean ``[N, K]`` mask."""
    return random_patterns({name: shape}, {name: kept}, seed=seed)[name].to_mask()
