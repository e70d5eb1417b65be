"""What decides a ticket: the criterion that ranks trained entries, and the treatment of the values they start from.

The names and definitions are those of Zhou et al., "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask"
(NeurIPS 2019), beside the paper's own (RIGSA, section 4.4): the criterion ``rigsa`` and the treatment ``init``.
Everything is a function of one layer's numbers; `rigsa.masks` makes patterns of them.

Zhou et al. keep a fixed share of the entries that are still free. An entry that a criterion excludes scores 0, not
minus infinity, so where more are excluded than the share removes, the rest of them survive. With 44 % of the signs
changed and a share of 80 %, ``large_final_same_sign`` keeps all 56 % that kept their sign and 24 % that changed it;
``rigsa`` keeps 0.8 * 56 %, none of them with a changed sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rigsa_kernels.format import SparsePattern
from rigsa_kernels.init import CHUNK, check_stream, initial_values, random_words

Score = Callable[[Tensor, Tensor], Tensor]
PERMUTATION_STREAM = 2
"""The Philox stream whose words shuffle. Stream 0 makes initial values, stream 1 random masks."""


@dataclass(frozen=True)
class Criterion:
    """How entries are ranked.

    Attributes:
        help: what is kept, in one line.
        scores: functions of the final and the initial values, float32 of one shape, to float32 scores of that shape;
            the highest are kept, and where there are two, the entries that are high in both (`high_in_all`). None for
            ``rigsa``, which ranks the values themselves, and ``random``, which ranks Philox words.
    """

    help: str
    scores: tuple[Score, ...] = ()


def large_final(final: Tensor, initial: Tensor) -> Tensor:
    return final.abs()


def small_final(final: Tensor, initial: Tensor) -> Tensor:
    return -final.abs()


def large_init(final: Tensor, initial: Tensor) -> Tensor:
    return initial.abs()


def small_init(final: Tensor, initial: Tensor) -> Tensor:
    return -initial.abs()


def magnitude_increase(final: Tensor, initial: Tensor) -> Tensor:
    return final.abs() - initial.abs()


def movement(final: Tensor, initial: Tensor) -> Tensor:
    return (final - initial).abs()


def where_same_sign(score: Score) -> Score:
    """`score`, but 0 where the sign changed. Zero is a sign of its own, as in Zhou et al."""
    return lambda final, initial: score(final, initial).where(final.sign() == initial.sign(), 0.0)


def where_diff_sign(score: Score) -> Score:
    """`score`, but 0 where the sign stayed."""
    return lambda final, initial: score(final, initial).where(final.sign() != initial.sign(), 0.0)


CRITERIA: dict[str, Criterion] = {
    "rigsa": Criterion("the share is of the entries that kept their sign: the largest final magnitudes (the paper's)"),
    "large_final": Criterion("largest final magnitudes", (large_final,)),
    "small_final": Criterion("smallest final magnitudes", (small_final,)),
    "large_init": Criterion("largest initial magnitudes", (large_init,)),
    "small_init": Criterion("smallest initial magnitudes", (small_init,)),
    "large_init_large_final": Criterion("magnitudes large both at first and at last", (large_init, large_final)),
    "small_init_small_final": Criterion("magnitudes small both at first and at last", (small_init, small_final)),
    "magnitude_increase": Criterion("magnitudes that grew most", (magnitude_increase,)),
    "movement": Criterion("values that moved farthest", (movement,)),
    "large_final_same_sign": Criterion(
        "largest final magnitudes; those with a changed sign count as 0", (where_same_sign(large_final),)
    ),
    "large_final_diff_sign": Criterion(
        "largest final magnitudes; those with an unchanged sign count as 0", (where_diff_sign(large_final),)
    ),
    "magnitude_increase_same_sign": Criterion(
        "magnitudes that grew most; those with a changed sign count as 0", (where_same_sign(magnitude_increase),)
    ),
    "magnitude_increase_diff_sign": Criterion(
        "magnitudes that grew most; those with an unchanged sign count as 0", (where_diff_sign(magnitude_increase),)
    ),
    "random": Criterion("drawn at random"),
}
"""The first is the paper's; the others are those of Zhou et al. 2019, which keep a fixed share of the free entries."""


def high_in_all(scores: list[Tensor], count: int) -> Tensor:
    """The entries that stand among the first d by each of several scores, for the smallest d that leaves `count`.

    One more step of d adds at most one entry for each score, so with two scores `count` or one more are kept, and no
    other d comes closer. Sorts each score once: about 40 bytes an entry while it works.

    Args:
        scores: float32 ``[n]`` each, finite.
        count: 0 to n.

    Returns:
        Boolean ``[n]``. Among equal scores the first in storage order stands higher.

    Source: the common percentile of Zhou et al. 2019, ``large_init_large_final``.
    """
    worst = places(scores[0])
    for score in scores[1:]:
        worst = torch.maximum(worst, places(score))
    reached = torch.bincount(worst, minlength=len(worst)).cumsum(0)  # kept by d = 1, 2, ...
    return worst < int((reached < count).sum()) + (count > 0)


def places(scores: Tensor) -> Tensor:
    """int32 ``[n]``: 0 for the highest score to n - 1 for the lowest, equal ones in storage order."""
    order = scores.sort(descending=True, stable=True).indices
    place = torch.empty_like(order, dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return place


@dataclass(frozen=True, eq=False)
class Start:
    """What a treatment makes its values of: one layer's ticket, and where its random numbers come from."""

    pattern: SparsePattern
    bound: float
    seed: int
    key: int
    device: torch.device
    draw_seed: int

    def kept(self) -> Tensor:
        """float32 ``pattern.values_shape``: the initial values of the free entries."""
        return initial_values(self.pattern, self.bound, seed=self.seed, key=self.key, device=self.device)

    def matrix(self) -> Tensor:
        """float32 ``[N, K]``: the initial values of the whole layer."""
        dense = SparsePattern.dense(*self.pattern.shape)
        return initial_values(dense, self.bound, seed=self.seed, key=self.key, device=self.device)

    def shuffled(self, values: Tensor) -> Tensor:
        order = permutation(values.numel(), seed=self.draw_seed, key=self.key, device=self.device)
        return values.view(-1)[order].view(values.shape)


@dataclass(frozen=True)
class Treatment:
    """What a ticket starts from: `help` in one line, `values` as float32 ``pattern.values_shape``."""

    help: str
    values: Callable[[Start], Tensor]


def reinit(start: Start) -> Tensor:
    return start.pattern.gather(start.shuffled(start.matrix()))


def reshuffle(start: Start) -> Tensor:
    return start.shuffled(start.kept())


def constant(start: Start) -> Tensor:
    """The population's deviation, as numpy's; summed in float64 so that the order of summation cannot be seen."""
    return start.matrix().double().std(correction=0).float()


TREATMENTS: dict[str, Treatment] = {
    "init": Treatment("the initial values (the paper's)", Start.kept),
    "random_reinit": Treatment("all initial values of the layer change places, pruned ones too", reinit),
    "random_reshuffle": Treatment("the initial values of the kept entries change places", reshuffle),
    "signed_reinit": Treatment(
        "random_reinit with the original signs", lambda start: reinit(start).copysign(start.kept())
    ),
    "signed_reshuffle": Treatment(
        "random_reshuffle with the original signs", lambda start: reshuffle(start).copysign(start.kept())
    ),
    "signed_constant": Treatment(
        "the deviation of the layer's initial values with the original signs",
        lambda start: constant(start).copysign(start.kept()),
    ),
    "rand_signed_constant": Treatment(
        "signed_constant with the signs of random_reinit", lambda start: constant(start).copysign(reinit(start))
    ),
}
"""The treatments of Zhou et al. 2019, who call the first ``none``."""


def treated_values(
    treatment: str,
    pattern: SparsePattern,
    *,
    bound: float,
    seed: int,
    key: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    draw_seed: int,
) -> Tensor:
    """The values that a layer's ticket starts from.

    Args:
        treatment: a name in `TREATMENTS`.
        pattern: the ticket; its index tensors are on `device`.
        bound, seed, key: of the initial values (`rigsa_kernels.init.initial_values`).
        dtype: of the result; everything is computed in float32 and rounded once.
        device: where the values are made. They are the same bits on every device.
        draw_seed: of the permutations, 0 to 2**64 - 1. With one `draw_seed` for all levels ``random_reinit`` gives an
            entry that survives the same value at every level, as the initial values do.

    Returns:
        ``pattern.values_shape``; for ``init`` exactly `initial_values`.

    Raises:
        ValueError: `treatment` is unknown, or `bound`, `seed`, `key` or `draw_seed` is out of range.

    Source: Zhou et al. 2019, section 4.
    """
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment: expected one of {', '.join(TREATMENTS)}, got {treatment!r}")
    check_stream(draw_seed, key)
    start = Start(pattern, bound, seed, key, torch.device(device), draw_seed)
    return TREATMENTS[treatment].values(start).to(dtype)


def permutation(count: int, *, seed: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 ``[count]``: 0 to count - 1 in an order drawn from (`seed`, `key`).

    Sorts 63-bit keys of Philox words. `torch.randperm` would be less code, but its order differs between devices and
    may differ between versions of PyTorch; a run should end the same on each.
    """
    keys = torch.empty(count, dtype=torch.int64, device=device)
    for begin in range(0, count, CHUNK):
        size = min(CHUNK, count - begin)
        words = random_words(seed, key, PERMUTATION_STREAM, 2 * begin, 2 * size, keys.device).view(-1, 2)
        keys[begin : begin + size] = (words[:, 0] << 31) | (words[:, 1] >> 1)
    return keys.argsort(stable=True)
