"""One pruning of a whole model: sign test, then the largest among all layers. Seconds, and memory beyond the values.

The values are random, in bfloat16. It runs once: at the largest size that is minutes on a CPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.arena import Arena, Outcome
from benchmarks.memory import extra_bytes
from benchmarks.shapes import PRUNED, Blocks, block_shapes
from rigsa.masks import TrainedLayer, prune
from rigsa_kernels import SparsePattern
from rigsa_kernels.select import count_bits, same_sign

KEEP_FRACTION, BOUND, SEED = 0.8, 0.02, 0
PROVIDER = "ours"


def questions(level: str) -> list[Blocks]:
    return PRUNED[level]


def make_layers(blocks: Blocks, device: torch.device) -> dict[str, TrainedLayer]:
    torch.manual_seed(0)
    layers = {}
    for block in range(blocks.count):
        for number, shape in enumerate(block_shapes(blocks.size)):
            values = torch.randn(shape, dtype=torch.bfloat16, device=device)
            key = 7 * block + number
            layers[f"{block}.{number}"] = TrainedLayer(values, SparsePattern.dense(*shape), BOUND, SEED, key)
    return layers


def check_pruned(layers: dict[str, TrainedLayer], kept: dict[str, SparsePattern]) -> None:
    """Exact counts; only eligible entries; and no entry that was dropped is larger than one that was kept."""
    eligible_count, smallest, largest = 0, torch.inf, 0.0
    for name, layer in layers.items():
        words = same_sign(layer.values, layer.pattern, bound=BOUND, seed=SEED, key=layer.key)
        eligible_count += int(count_bits(words))
        eligible = SparsePattern.from_words(words, layer.pattern.in_features).to_mask()
        mask, sizes = kept[name].to_mask(), layer.values.abs()
        assert not (mask & ~eligible).any()
        smallest = min(smallest, sizes[mask].min().item())
        largest = max(largest, sizes.masked_fill(mask | ~eligible, 0).max().item())
    assert sum(pattern.nnz for pattern in kept.values()) == round(KEEP_FRACTION * eligible_count)
    assert smallest >= largest


@pytest.fixture(scope="module")
def pruning(arena: Arena, question: Blocks) -> Outcome:
    layers = make_layers(question, arena.device)
    entries = sum(layer.values.numel() for layer in layers.values())
    seconds, results = [], []

    def run() -> None:
        results.append(prune(layers, keep_fraction=KEEP_FRACTION, ranking="global")[0])

    extra = extra_bytes(lambda: seconds.append(arena.machine.stopwatch(run)), arena.device)
    check_pruned(layers, results[0])
    moved = 2 * entries
    info = {"extra_bytes": extra, "gb_per_second": moved / seconds[0] / 1e9, "entries": entries}
    group = (
        f"pruning of SmolLM2-{question.size} with {question.count} blocks: {entries:,} entries, {moved / 2**30:.2f} GiB"
    )
    return Outcome(group, PROVIDER, {PROVIDER: seconds}, {PROVIDER: info})


def test_prune_a_model(arena, pruning, benchmark):
    arena.record(pruning, PROVIDER, benchmark)
