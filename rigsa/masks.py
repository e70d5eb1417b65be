"""Which entries survive: pure functions from values to masks. Nothing here knows a model, a file or a device policy.

The paper's rule (section 4.4) for one pruning: the free entries whose final sign equals their initial sign are
*eligible*; the `keep_fraction` of the eligible with the largest final magnitude are kept. So the density falls by
keep_fraction times the same-sign share: 0.8 * 0.539 a level, four times, gives the paper's 3.46 %. (The text also calls
80 % a pruning ratio; only the first reading gives 3.46 %.)

This is not Zhou et al.'s ``large_final_same_sign`` (2019), which removes a fixed share of a layer and lets entries
that changed sign survive when that share is small.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Ranking = Literal["layer", "global"]
_DIGIT_BITS = 16


@dataclass(frozen=True)
class PruneCounts:
    """What one pruning saw and did, summed over the layers."""

    free: int
    eligible: int
    kept: int


def same_sign(final: Tensor, initial: Tensor) -> Tensor:
    """Boolean: entries whose final sign equals the initial one. A zero has no sign, so it is never eligible."""
    return final.sign() * initial.sign() > 0


def prune(
    final: dict[str, Tensor], initial: dict[str, Tensor], *, keep_fraction: float, ranking: Ranking
) -> tuple[dict[str, Tensor], PruneCounts]:
    """Choose the entries of every layer that survive.

    Args:
        final, initial: layer name to its free values, any shape, after training and before; float32, bfloat16 or
            float16. Entries that were pruned before are not among them, so none can come back.
        keep_fraction: share of the eligible entries that is kept, in (0, 1].
        ranking: magnitudes are compared within each layer, or over the whole model.

    Returns:
        Layer name to boolean mask over its free values, and the counts. ``round(keep_fraction * eligible)`` entries are
        kept, exactly (a layer's own count, or the model's); among equal magnitudes the first in storage order.

    Raises:
        ValueError: `keep_fraction` out of range, a value is not finite, or a layer would be left empty (named).
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction: expected more than 0 and at most 1, got {keep_fraction}")
    for name, values in final.items():
        if not values.isfinite().all():
            raise ValueError(f"final: the values of {name} are not all finite, so they cannot be ranked")
    eligible = {name: same_sign(final[name], initial[name]) for name in final}
    counts = {name: int(mask.sum()) for name, mask in eligible.items()}
    scores = {name: magnitude_bits(final[name]).masked_fill_(~mask, -1) for name, mask in eligible.items()}
    if ranking == "layer":
        kept = {name: top_k([scores[name]], round(keep_fraction * counts[name]))[0] for name in final}
    else:
        kept = dict(zip(final, top_k(list(scores.values()), round(keep_fraction * sum(counts.values()))), strict=True))
    empty = [name for name, mask in kept.items() if not mask.any()]
    if empty:
        raise ValueError(
            f"keep_fraction: {keep_fraction} leaves {empty[0]} empty "
            f"({counts[empty[0]]} eligible entries of {final[empty[0]].numel()}); prune less, or fewer levels"
        )
    free = sum(values.numel() for values in final.values())
    return kept, PruneCounts(free, sum(counts.values()), sum(int(mask.sum()) for mask in kept.values()))


def magnitude_bits(values: Tensor) -> Tensor:
    """int32 keys in the order of ``|values|``: the bits of a non-negative float32 sort like the number."""
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"values: expected float32, bfloat16 or float16, got {values.dtype}")
    return values.detach().float().abs().view(torch.int32)


def top_k(keys: list[Tensor], k: int) -> list[Tensor]:
    """Boolean masks of exactly the `k` largest non-negative int32 keys over all tensors; ties go to the first.

    The k-th largest key is found by two histograms of 16 bits each, so there is no sort and no concatenation.
    """
    if k == 0:
        return [torch.zeros_like(key, dtype=torch.bool) for key in keys]
    threshold, remaining = 0, k
    for shift in (_DIGIT_BITS, 0):
        histogram = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for key in keys:
            candidates = key[key >= 0] if shift else key[(key >= 0) & (key >> _DIGIT_BITS == threshold)]
            digits = (candidates >> shift) & ((1 << _DIGIT_BITS) - 1)
            histogram += torch.bincount(digits, minlength=1 << _DIGIT_BITS).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= remaining).nonzero()[-1])
        remaining -= int(at_least[digit] - histogram[digit])
        threshold = (threshold << _DIGIT_BITS) | digit
    masks = []
    for key in keys:
        ties = key == threshold
        taken = ties & (ties.view(-1).cumsum(0).view(ties.shape) <= remaining)
        remaining -= int(taken.sum())
        masks.append((key > threshold) | taken)
    return masks


def random_mask(shape: tuple[int, int], kept: int, *, seed: int, name: str) -> Tensor:
    """Boolean ``[N, K]`` with exactly `kept` True entries, drawn uniformly; layers and seeds draw independently.

    Raises:
        ValueError: `kept` is not between 1 and N * K.
    """
    size = shape[0] * shape[1]
    if not 1 <= kept <= size:
        raise ValueError(f"kept: expected 1 to {size} entries in {name}, got {kept}")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:kept]] = True
    return mask.view(shape)
