"""Tickets of whole tiles: which are kept, by definition; and that they are saved, loaded and compared as others are."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import make_llama
from rigsa import (
    MaskedAdamW,
    SparsePattern,
    gated_linears,
    gradient_ticket,
    intersection,
    load_adapter,
    magnitude_ticket,
    overlap,
    prune,
    random_ticket,
    replace_linears,
    save_adapter,
    snapshot,
    union,
)
from rigsa.encoding import choose_encoding, decode, digest, encode, is_encoding, layout
from rigsa.inspection import describe, patterns_of
from rigsa.masks import TrainedLayer, largest_patterns, norms_of_tiles
from rigsa.masks import prune as prune_layers
from rigsa.state import restore_snapshot
from rigsa_kernels.init import initial_values
from rigsa_kernels.tiles import grid_of, tile_size

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
TILES = [4, "rows", "columns", "3x7", (8, 2)]


def tiles_of(matrix: Tensor, tile: tuple[int, int]) -> list[Tensor]:
    """The parts of a matrix, in the order of the grid."""
    return [part for rows in matrix.split(tile[0], 0) for part in rows.split(tile[1], 1)]


def highest(scores: list[float], count: int) -> set[int]:
    """Among equals the first."""
    return set(sorted(range(len(scores)), key=lambda at: -scores[at])[:count])


def trained_layer(shape: tuple[int, int], seed: int, key: int = 0) -> TrainedLayer:
    pattern = SparsePattern.dense(*shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return TrainedLayer(initial_values(pattern, 0.5, seed=3, key=key) + noise, pattern, 0.5, 3, key)


shapes = st.tuples(st.integers(3, 30), st.integers(3, 30))


@given(shapes, st.sampled_from(TILES), st.integers(0, 99), st.sampled_from([0.3, 0.8, 1.0]))
@settings(max_examples=40)
def test_rigsa_keeps_the_tiles_with_the_most_entries_that_kept_their_sign(shape, tile, seed, keep_fraction):
    layer, size = trained_layer(shape, seed), tile_size(tile, shape)
    same = (layer.values * layer.start() > 0).float()
    shares = [part.mean().item() for part in tiles_of(same, size)]
    count = round(keep_fraction * same.mean().item() * len(shares))
    if count == 0:
        with pytest.raises(ValueError, match="empty"):
            prune_layers({"a": layer}, keep_fraction=keep_fraction, ranking="layer", tile=tile)
        return
    kept, counts = prune_layers({"a": layer}, keep_fraction=keep_fraction, ranking="layer", tile=tile)
    assert set(kept["a"].tiles.tolist()) == highest(shares, count)
    assert counts.eligible == same.sum()
    assert counts.kept == kept["a"].nnz == kept["a"].to_mask().sum()


@given(shapes, st.sampled_from(TILES), st.integers(0, 99), st.sampled_from(["large_final", "small_final", "movement"]))
@settings(max_examples=40)
def test_other_criteria_rank_the_norm_of_a_tiles_scores(shape, tile, seed, criterion):
    layer, size = trained_layer(shape, seed), tile_size(tile, shape)
    moved = layer.values - layer.start() if criterion == "movement" else layer.values
    sign = -1 if criterion == "small_final" else 1
    norms = [sign * part.double().norm().item() for part in tiles_of(moved, size)]
    count = round(0.5 * len(norms))
    if count == 0:
        return
    kept, _ = prune_layers({"a": layer}, keep_fraction=0.5, ranking="layer", criterion=criterion, tile=tile)
    assert set(kept["a"].tiles.tolist()) == highest(norms, count)


def test_scores_below_zero_count_against_a_tile():
    scores = torch.tensor([[3.0, -4.0], [-6.0, 8.0]])
    assert norms_of_tiles(scores, (2, 1)).tolist() == [[-3.0, 4.0]]
    assert norms_of_tiles(scores, (2, 2)).item() == pytest.approx(math.sqrt(73) - math.sqrt(52))


@pytest.mark.parametrize("criterion", ["rigsa", "large_final", "large_init_large_final", "random"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_tickets_nest_level_by_level_and_keep_their_tiles(criterion, ranking):
    layers = {str(key): trained_layer((24, 40), key, key) for key in range(2)}
    for _ in range(3):
        tile = 4 if layers["0"].pattern.is_dense else None  # from then on the ticket's own
        kept, _ = prune_layers(layers, keep_fraction=0.8, ranking=ranking, criterion=criterion, tile=tile)
        for name, pattern in kept.items():
            assert pattern.tile == (4, 4)
            assert not (pattern.to_mask() & ~layers[name].pattern.to_mask()).any()
        layers = {
            name: TrainedLayer(kept[name].gather(before.pattern.scatter(before.values)), kept[name], 0.5, 3, before.key)
            for name, before in layers.items()
        }


def test_what_cannot_be_kept_in_tiles_is_named():
    layer = trained_layer((8, 8), 0)
    packed = SparsePattern.from_mask(torch.eye(8) > 0)
    single = TrainedLayer(torch.ones(8), packed, 0.5, 3, 0)
    other = SparsePattern.from_tiles(torch.tensor([0], dtype=torch.int32), (8, 8), 2)
    for one, message in ((single, "one of single entries"), (TrainedLayer(torch.ones(4), other, 0.5, 3, 0), "2 x 2")):
        with pytest.raises(ValueError, match=message):
            prune_layers({"a": one}, keep_fraction=0.5, ranking="layer", tile=4)
    layer.values[0, 0] = float("nan")
    for criterion in ("rigsa", "large_final"):
        with pytest.raises(ValueError, match="expected finite numbers to rank, got 1 in a"):
            prune_layers({"a": layer}, keep_fraction=0.5, ranking="layer", criterion=criterion, tile=4)
    with pytest.raises(ValueError, match=r"leaves a empty \(64 weights in 1 tiles\)"):
        largest_patterns({"a": torch.ones(8, 8)}, density=0.1, ranking="layer", tile=8)


def adapted(**options):  # type: ignore[no-untyped-def]
    model = replace_linears(make_llama(), seed=0, alpha_init=0.3, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.add_(torch.randn(layer.rigsa_values.shape, generator=generator) * layer.bound)
    return model


def train_a_step(model) -> None:  # type: ignore[no-untyped-def]
    optimizer = MaskedAdamW(model, lr=1e-2)
    model(IDS).logits.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("tile", [4, "rows", "columns"])
def test_calls_of_the_library_make_tickets_of_tiles(tile):
    def loss(model, batch):  # type: ignore[no-untyped-def]
        return model(batch).logits.square().mean()

    model = adapted()
    for make in (
        lambda: random_ticket(model, 0.3, tile=tile, seed=2),
        lambda: magnitude_ticket(model, 0.3, tile=tile),
        lambda: gradient_ticket(model, loss, [IDS], 0.3, tile=tile),
    ):
        report = make()
        assert f"tile={tile!r}" in report.what
        for name, layer in gated_linears(model).items():
            shape = layer.pattern.shape
            assert layer.pattern.tile == tile_size(tile, shape)
            assert len(layer.pattern.tiles) == round(0.3 * math.prod(grid_of(shape, tile)))
            assert report.kept[name] == layer.rigsa_values.numel() == layer.pattern.nnz
        train_a_step(model)
    before = {name: layer.pattern.to_mask() for name, layer in gated_linears(model).items()}
    prune(model, 0.8, "large_final")
    for name, layer in gated_linears(model).items():
        assert layer.pattern.tile is not None
        assert not (layer.pattern.to_mask() & ~before[name]).any()


def test_a_control_has_as_many_entries_and_other_tiles_of_another_seed():
    model = adapted()
    kept = random_ticket(model, 0.25, tile=4, seed=1).kept
    first = {name: layer.pattern for name, layer in gated_linears(model).items()}
    assert random_ticket(model, kept, tile=4, seed=1).kept == kept
    assert all(layer.pattern.equals(first[name]) for name, layer in gated_linears(model).items())
    assert random_ticket(model, kept, tile=4, seed=2).kept == kept
    assert not all(layer.pattern.equals(first[name]) for name, layer in gated_linears(model).items())
    same = replace_linears(make_llama(), seed=1, density=0.25, tile=4)
    assert all(layer.pattern.equals(first[name]) for name, layer in gated_linears(same).items())


@pytest.mark.parametrize("tile", [4, "rows", "columns", "5x3"])
def test_a_saved_adapter_comes_back_with_its_tiles(tile, tmp_path):
    model = adapted(density=0.3, tile=tile)
    train_a_step(model)
    save_adapter(model, tmp_path)
    for other in (make_llama(), adapted()):
        load_adapter(other, tmp_path, replace=True)
        for one, two in zip(gated_linears(model).values(), gated_linears(other).values(), strict=True):
            assert one.pattern.equals(two.pattern)
            assert torch.equal(one.rigsa_values, two.rigsa_values)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, other(IDS).logits)
    taken = snapshot(model)
    random_ticket(model, 0.2)
    restore_snapshot(model, taken)
    assert all(one.pattern.equals(taken[name].pattern) for name, one in gated_linears(model).items())


@given(shapes, st.sampled_from(TILES), st.integers(0, 2**31))
@settings(max_examples=40)
def test_what_is_encoded_is_decoded_and_small(shape, tile, seed):
    size, grid = tile_size(tile, shape), grid_of(shape, tile)
    chosen = torch.rand(math.prod(grid), generator=torch.Generator().manual_seed(seed)) < 0.3
    pattern = SparsePattern.from_tiles(chosen.nonzero().view(-1).to(torch.int32), shape, size)
    encoding = choose_encoding(pattern)
    assert encoding == f"tiles {size[0]}x{size[1]}"
    assert is_encoding(encoding)
    tensors = encode(pattern, encoding)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout(encoding, shape, pattern.nnz)
    assert sum(tensor.nbytes for tensor in tensors.values()) == -(-math.prod(grid) // 8)
    again = decode(encoding, tensors, shape, pattern.nnz)
    assert again.equals(pattern)
    assert digest(again) == digest(pattern) != digest(pattern.packed())
    with pytest.raises(ValueError, match=r"free entries, found"):
        decode(encoding, tensors, shape, pattern.nnz + 1)


def test_encodings_that_nobody_writes_are_refused():
    for text in ("tiles", "tiles 0x3", "tiles 3", "tiles 3x3 ", "Tiles 3x3", "tiles 3x99999999999"):
        assert not is_encoding(text)
    with pytest.raises(ValueError, match="within 4 x 4"):
        decode("tiles 8x8", {"bits": torch.ones(1, dtype=torch.uint8)}, (4, 4), 16)


def test_tickets_of_one_tile_are_joined_in_tiles():
    first, second = adapted(density=0.3, tile=4), copy.deepcopy(adapted(density=0.3, tile=4))
    random_ticket(second, 0.3, tile=4, seed=5)
    both = overlap(first, second)
    for name, pattern in union(first, second).items():
        assert pattern.tile == (4, 4)
        assert pattern.nnz == both.layers[name].either
    assert all(pattern.tile == (4, 4) for pattern in intersection(first, first).values())
    random_ticket(second, 0.3, seed=5)
    assert all(pattern.tile is None for pattern in union(first, second).values())


def test_a_table_of_tickets_names_their_units():
    tickets = {}
    for tile in (None, "rows", "columns", 8, "8x40"):
        model = replace_linears(make_llama())
        random_ticket(model, density=0.5, tile=tile)
        tickets[str(tile)] = patterns_of(model)
    (line,) = [line for line in describe(tickets).splitlines() if line.startswith("unit")]
    assert line.split() == ["unit", "entries", "rows", "columns", "8x8", "8x40"]
    assert "unit" not in describe({"one": tickets["None"]})
