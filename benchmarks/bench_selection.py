"""Which entries are kept, of one matrix: our selection and pruning beside ``torch.topk`` and a sort."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.arena import Arena, Outcome
from benchmarks.memory import extra_bytes
from benchmarks.race import Contestant
from benchmarks.shapes import SELECTED
from rigsa.masks import TrainedLayer, prune, random_patterns
from rigsa_kernels import SparsePattern
from rigsa_kernels.init import initial_values
from rigsa_kernels.select import ranked, top_k

COLUMNS = 2048
KEPT = 0.2
BOUND, SEED, KEY = 0.02, 0, 1


def questions(level: str) -> list[int]:
    return SELECTED[level]


def make_layer(entries: int, device: torch.device) -> TrainedLayer:
    """Values that have moved away from their initial ones, in bfloat16."""
    columns = min(COLUMNS, entries)
    pattern = SparsePattern.dense(entries // columns, columns)
    values = initial_values(pattern, BOUND, seed=SEED, key=KEY, dtype=torch.bfloat16, device=device)
    values += (torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * BOUND).to(device, torch.bfloat16)
    return TrainedLayer(values, pattern, BOUND, SEED, KEY)


def with_topk(layer: TrainedLayer, count: int) -> Tensor:
    kept = torch.zeros(layer.values.numel(), dtype=torch.bool, device=layer.values.device)
    kept[layer.values.flatten().abs().topk(count, sorted=False).indices] = True
    return kept.view_as(layer.values)


def with_sort(layer: TrainedLayer, count: int) -> Tensor:
    kept = torch.zeros(layer.values.numel(), dtype=torch.bool, device=layer.values.device)
    kept[layer.values.flatten().abs().argsort(descending=True, stable=True)[:count]] = True
    return kept.view_as(layer.values)


def with_ours(layer: TrainedLayer, count: int) -> SparsePattern:
    return top_k({"": ranked(layer.values, layer.pattern, by="magnitude")}, count)[""]


def with_prune(layer: TrainedLayer, count: int) -> SparsePattern:
    patterns, _ = prune({"": layer}, keep_fraction=KEPT, ranking="layer")
    return patterns[""]


def with_random(layer: TrainedLayer, count: int) -> SparsePattern:
    return random_patterns({"": layer.pattern.shape}, {"": count}, seed=SEED, device=layer.values.device)[""]


FLOOR = "torch.topk"
WAYS: dict[str, Callable[[TrainedLayer, int], Tensor | SparsePattern]] = {
    FLOOR: with_topk,
    "a stable sort": with_sort,
    "ours, largest": with_ours,
    "ours, sign test and largest": with_prune,
    "ours, random": with_random,
}


def check_selection(name: str, kept: Tensor, layer: TrainedLayer, count: int) -> None:
    """Exact counts, and nothing kept is smaller than anything that was not and could have been."""
    if name == "ours, random":
        assert kept.sum() == count
        return
    eligible = torch.ones_like(kept)
    if name == "ours, sign test and largest":
        initial = initial_values(layer.pattern, BOUND, seed=SEED, key=KEY, dtype=torch.bfloat16, device=kept.device)
        eligible = layer.values.sign() * initial.sign() > 0
        count = round(KEPT * int(eligible.sum()))
    size = layer.values.abs()
    dropped = size.masked_fill(kept | ~eligible, 0)
    assert kept.sum() == count
    assert not (kept & ~eligible).any()
    assert size[kept].min() >= dropped.max()


def contestant(arena: Arena, entries: int, name: str) -> Contestant:
    layer = make_layer(entries, arena.device)
    count = round(KEPT * entries)
    run = partial(WAYS[name], layer, count)

    def check() -> None:
        kept = run()
        kept = kept.to_mask().to(arena.device) if isinstance(kept, SparsePattern) else kept
        check_selection(name, kept, layer, count)

    moved = layer.values.numel() * layer.values.element_size()
    least = moved / arena.machine.bandwidth()  # every value is read once
    return Contestant(run, check, least=least, bytes=moved, info={"extra_bytes": extra_bytes(run, arena.device)})


@pytest.fixture(scope="module")
def selections(arena: Arena, question: int) -> Outcome:
    group = f"selection of {KEPT:.0%} of {question:,} entries"
    return arena.race(group, FLOOR, {name: partial(contestant, arena, question, name) for name in WAYS})


@pytest.mark.parametrize("provider", WAYS)
def test_selection(arena, selections, provider, benchmark):
    arena.record(selections, provider, benchmark)
