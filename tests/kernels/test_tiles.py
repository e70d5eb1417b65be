"""Patterns made of tiles: the format's promises, held against the packed pattern of the same mask."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern, free_entries, ops, reference, replace_linears
from rigsa_kernels.dispatch import keeps_columns, multiplies_tiles
from rigsa_kernels.format import csr_indices, packed_form, positions
from rigsa_kernels.init import initial_values, uniform_init
from rigsa_kernels.tiles import Strip, grid_shape, narrowed_columns, strips_of, tile_size, tiles_to_mask, touched

TILE_CHOICES = ["rows", "columns", 4, 16, "3x7", (8, 1), (1, 5), (64, 64)]


@st.composite
def tilings(draw: st.DrawFn, most: int = 70) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """A shape, a tile's size and numbers of tiles, from none to all."""
    shape = (draw(st.integers(1, most)), draw(st.integers(1, most)))
    size = tile_size(draw(st.sampled_from(TILE_CHOICES)), shape)
    rows, columns = grid_shape(shape, size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen = torch.rand(rows * columns, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return shape, size, chosen.nonzero().view(-1).to(torch.int32)


def by_definition(shape: tuple[int, int], size: tuple[int, int], tiles: Tensor) -> Tensor:
    """The mask, entry by entry."""
    columns = -(-shape[1] // size[1])
    free = set(tiles.tolist())
    return torch.tensor(
        [[(n // size[0]) * columns + k // size[1] in free for k in range(shape[1])] for n in range(shape[0])]
    )


def test_worked_example_of_the_docstring():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]).bool()
    pattern = SparsePattern.from_mask(mask, tile=2)
    assert pattern.tiles.tolist() == [0, 2, 4]
    assert pattern.places.tolist() == [[0, 2, 8], [4, 4, 2]]
    assert pattern.nnz == 12


@given(tilings(40))
@settings(max_examples=40)
def test_tiles_are_the_mask_they_stand_for(tiling):
    shape, size, tiles = tiling
    pattern, mask = SparsePattern.from_tiles(tiles, shape, size), by_definition(*tiling)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == mask.sum()
    assert pattern.tile == size
    again = SparsePattern.from_mask(mask, tile=size)
    assert again.equals(pattern)
    assert torch.equal(again.places, pattern.places)


@given(tilings(), tilings())
@settings(max_examples=60)
def test_every_question_has_the_packed_patterns_answer(tiling, other):
    shape, size, tiles = tiling
    pattern = SparsePattern.from_tiles(tiles, shape, size)
    packed = SparsePattern.from_mask(pattern.to_mask())
    matrix = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    values = packed.gather(matrix)
    assert pattern.values_shape == packed.values_shape
    assert torch.equal(pattern.words, packed.words)
    assert torch.equal(pattern.gather(matrix), values)
    assert torch.equal(pattern.scatter(values), packed.scatter(values))
    assert torch.equal(positions(pattern.tensors, shape), positions(packed.tensors, shape))
    for one, two in zip(csr_indices(pattern.tensors, shape), csr_indices(packed.tensors, shape), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(packed_form(pattern.tensors, shape), packed.tensors, strict=True):
        assert torch.equal(one, two)
    before = SparsePattern.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(len(tiles))) < 0.5)
    assert torch.equal(pattern.places_in(before), packed.places_in(before))
    copied = pattern.map(torch.clone)
    assert copied.equals(pattern)
    assert copied.tile == pattern.tile
    assert not pattern.equals(packed)
    assert pattern.equals(SparsePattern.from_tiles(*(other[2], other[0], other[1]))) == (
        shape == other[0] and size == other[1] and torch.equal(tiles, other[2])
    )


@given(tilings(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_an_entrys_initial_value_does_not_depend_on_the_tile(tiling, seed, key):
    shape, size, tiles = tiling
    pattern = SparsePattern.from_tiles(tiles, shape, size)
    drawn = initial_values(pattern, 0.3, seed=seed, key=key)
    assert torch.equal(drawn, uniform_init(shape, 0.3, seed=seed, key=key)[pattern.to_mask()])


@given(tilings(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40)
def test_free_entries_are_read_and_written_as_packed_ones_are(tiling, dtype):
    shape, size, tiles = tiling
    generator = torch.Generator().manual_seed(0)
    pattern = SparsePattern.from_tiles(tiles, shape, size)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    values, alpha = torch.randn(pattern.nnz, generator=generator), torch.tensor([0.3])
    results = []
    for own in (pattern, pattern.packed()):
        base, written = matrix.new_empty(pattern.nnz), matrix.clone()
        free_entries.gather_free_([base], [matrix], own.tensors)
        free_entries.compose_free_([written], [base], [values], [alpha], own.tensors)
        composed = written.clone()
        free_entries.scatter_free_([written], [base], own.tensors)
        assert torch.equal(written, matrix)
        results.append((base, composed))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@given(tilings(), st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60)
def test_smaller_problems_have_the_same_gradient(tiling, tokens, dtype):
    """Of the touched columns alone, of the touched rows and columns, and tile by tile."""
    shape, size, tiles = tiling
    pattern = SparsePattern.from_tiles(tiles, shape, size)
    generator = torch.Generator().manual_seed(tokens)
    dy, x = (torch.randn(tokens, side, generator=generator, dtype=dtype) for side in shape)
    want = pattern.gather(dy.double().t() @ x.double())
    results = [reference.sampled_grad(dy, x, pattern.tensors, pattern.nnz)]
    if tiles.numel():
        columns, narrowed = narrowed_columns(pattern.tensors, shape)
        narrow_x = x if columns is None else x[:, columns]
        part = touched(pattern.tensors, shape)
        results.append(reference.sampled_grad(dy, narrow_x, narrowed, pattern.nnz))
        results.append(reference._tiled_product(dy, narrow_x, narrowed))
        if part.pattern:
            results.append(reference._tiled_product(part.of_rows(dy), part.of_columns(x), part.pattern))
        else:
            results.append((part.of_rows(dy).t() @ part.of_columns(x)).view(-1))
    sizes = pattern.gather(dy.double().abs().t() @ x.double().abs())
    for got in results:
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= tokens * torch.finfo(dtype).eps * sizes).all()


def test_batches_of_tiles_are_taken_and_right(monkeypatch):
    shape, tile = (130, 300), (32, 32)
    assert multiplies_tiles(5 * 32 * 32, tile, shape)
    assert not multiplies_tiles(5 * 32 * 32, (8, 8), shape)
    assert not multiplies_tiles(15 * 32 * 32, tile, shape)
    tiles = torch.tensor([3, 9, 12, 29, 48], dtype=torch.int32)  # of 5 x 10; the last row and column are edges
    pattern = SparsePattern.from_tiles(tiles, shape, tile)
    dy, x = torch.randn(40, 130), torch.randn(40, 300)
    for limit in (reference.BATCH_NUMBERS, 2 * 40 * 64, 1):  # one batch, two tiles a batch, one
        monkeypatch.setattr(reference, "BATCH_NUMBERS", limit)
        got = reference.sampled_grad(dy, x, pattern.tensors, pattern.nnz)
        torch.testing.assert_close(got, pattern.gather(dy.t() @ x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tile_size(1.5, (4, 4)), "tile: expected a number from 1, .*, got 1.5"),
        (lambda: tile_size("diagonal", (4, 4)), "tile: expected a number from 1, ROWSxCOLUMNS, 'rows' or 'columns'"),
        (lambda: tile_size(0, (4, 4)), "got 0"),
        (lambda: tile_size("4x4x4", (4, 4)), "got '4x4x4'"),
        (lambda: tile_size((2, -1), (4, 4)), r"got \(2, -1\)"),
        (lambda: SparsePattern.from_tiles(torch.tensor([0, 0], dtype=torch.int32), (4, 4), 2), "without repetition"),
        (lambda: SparsePattern.from_tiles(torch.tensor([4], dtype=torch.int32), (4, 4), 2), "from 0 to 3"),
        (lambda: SparsePattern.from_tiles(torch.tensor([-1], dtype=torch.int32), (4, 4), 2), "from 0 to 3"),
        (lambda: SparsePattern.from_tiles(torch.tensor([0]), (4, 4), 2), "expected int32"),
        (lambda: SparsePattern.from_mask(torch.eye(4) > 0, tile=2), "2 that are free in part"),
    ],
)
def test_what_is_no_tile_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_that_people_write():
    assert tile_size(32, (100, 20)) == (32, 20)
    assert tile_size("16x64", (100, 200)) == (16, 64)
    assert tile_size("rows", (100, 200)) == (1, 200)
    assert tile_size("columns", (100, 200)) == (100, 1)


def layer_of(tile: object, density: float = 0.1, shape: tuple[int, int] = (96, 128), **options: object):  # type: ignore[no-untyped-def]
    """A layer with a tile ticket and its packed twin."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    size = tile_size(tile, shape)  # type: ignore[arg-type]
    grid = grid_shape(shape, size)
    tiles = torch.randperm(grid[0] * grid[1])[: max(round(density * grid[0] * grid[1]), 1)].sort()[0].to(torch.int32)
    pattern = SparsePattern.from_tiles(tiles, shape, size)
    made = [
        GatedSparseLinear(copy.deepcopy(linear), seed=1, key=2, pattern=one, alpha_init=0.1, **options)
        for one in (pattern, pattern.packed())
    ]
    return made[0], made[1]


def train(layer: GatedSparseLinear, steps: int = 3) -> Tensor:
    model = nn.Sequential(layer)
    optimizer = MaskedAdamW(model, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(20, layer.in_features, generator=generator).to(layer.dtype).requires_grad_()
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer(x).detach()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("tile", ["rows", "columns", 16, "5x3", 32])
def test_training_in_tiles_is_training_at_their_entries(tile, in_place):
    ours, packed = layer_of(tile, in_place=in_place)
    assert torch.equal(ours.rigsa_values, packed.rigsa_values)
    torch.testing.assert_close(train(ours), train(packed))
    torch.testing.assert_close(ours.rigsa_values, packed.rigsa_values)
    torch.testing.assert_close(ours.rigsa_alpha, packed.rigsa_alpha)
    assert torch.equal(ours.frozen_matrix(), packed.frozen_matrix())
    torch.testing.assert_close(ours.merged().weight, packed.merged().weight)


@pytest.mark.parametrize("tile", ["rows", "columns", 16, "5x3"])
def test_a_state_brings_its_tiles_along(tile):
    ours, packed = layer_of(tile)
    train(ours)
    state = ours.state_dict()
    assert {name for name in state if name.startswith("rigsa_")} == {
        "rigsa_alpha", "rigsa_values", "rigsa_tiles", "rigsa_tile",
    }  # fmt: skip
    for other in (packed, GatedSparseLinear(nn.Linear(128, 96), seed=9, key=9)):
        other.load_state_dict(state)
        assert other.pattern.equals(ours.pattern)
        assert torch.equal(other.rigsa_values, ours.rigsa_values)
    copied = copy.deepcopy(ours)
    assert copied.pattern.equals(ours.pattern)
    assert "tile=" in repr(copied)
    values = ours.rigsa_values
    ours.load_state_dict(state)
    assert ours.rigsa_values is values  # the same pattern: an optimiser stays valid
    with pytest.raises(ValueError, match="tiles: expected"):
        ours.load_state_dict(state | {"rigsa_tiles": state["rigsa_tiles"].flip(0) + 10**6})


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What one pass saves for backward beside parameters and what layers keep."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(saved.values())


def test_whole_columns_save_their_own_columns_of_x_alone():
    """3.46 % of the columns keep 3.46 % of x, where an nn.Linear and an unstructured ticket keep all of it."""
    x = torch.randn(200, 512, requires_grad=True)
    columns, packed = layer_of("columns", 0.0346, (64, 512))
    kept = round(0.0346 * 512)
    assert saved_bytes(columns, x) == 200 * kept * 4
    assert saved_bytes(packed, x) >= x.nbytes
    assert saved_bytes(columns, x) < 0.05 * x.nbytes
    rows, _ = layer_of("rows", 0.0346, (64, 512))
    assert x.nbytes <= saved_bytes(rows, x) < 1.01 * x.nbytes


def test_tiles_in_few_columns_save_those_and_tiles_everywhere_save_x():
    x = torch.randn(50, 256, requires_grad=True)
    linear = nn.Linear(256, 64)
    few, many = (
        GatedSparseLinear(linear, seed=1, key=2, pattern=SparsePattern.from_tiles(tiles, (64, 256), 16))
        for tiles in (torch.tensor([0, 3, 19], dtype=torch.int32), torch.arange(0, 64, 3, dtype=torch.int32))
    )
    assert keeps_columns(32, 256)
    assert not keeps_columns(33, 256)
    assert 50 * 32 * 4 <= saved_bytes(few, x) < 50 * 32 * 4 + 200
    assert saved_bytes(many, x) >= x.nbytes


@pytest.mark.parametrize("numerics", ["exact", "composed", "auto"])
@pytest.mark.parametrize("tile", ["rows", "columns", 16])
def test_16_bits_train_on_either_path(tile, numerics):
    ours, packed = layer_of(tile, numerics=numerics, values_dtype=torch.float32)
    for layer in (ours, packed):
        layer.to(torch.bfloat16)
    torch.testing.assert_close(train(ours), train(packed), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("tile", ["rows", "columns", 16])
def test_a_base_in_four_bits_trains_the_same_entries(tile):
    """A fused product there decodes the bit mask of the tiles. Four bits have no room to compose in place."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trained = []
    for one in layer_of(tile, 0.2, (64, 64)):
        torch.manual_seed(0)
        linear = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), quant_type="nf4", requires_grad=False)
        linear.weight = weight
        layer = GatedSparseLinear(linear.to("cpu"), seed=1, key=2, pattern=one.pattern, alpha_init=0.1)
        assert layer.is_nf4
        codes = layer.weight.clone()
        train(layer)
        assert layer.in_place_weight is None
        assert torch.equal(layer.weight, codes)
        trained.append(layer.rigsa_values.detach())
    torch.testing.assert_close(*trained)


def test_a_compiled_layer_equals_the_eager_one():
    for tile in ("rows", "columns", 16):
        ours, _ = layer_of(tile)
        x = torch.randn(7, 128)
        want = torch.autograd.grad(ours(x).square().sum(), [ours.rigsa_values, ours.rigsa_alpha])
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x).square().sum(), [ours.rigsa_values, ours.rigsa_alpha])
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two)


def test_a_chosen_pattern_reaches_replace_linears():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))

    def rows(name: str, shape: tuple[int, int]) -> SparsePattern:
        return SparsePattern.from_tiles(torch.tensor([0, 5], dtype=torch.int32), shape, "rows")

    replace_linears(model, pattern=rows)
    assert [layer.rigsa_values.numel() for layer in model] == [80, 60]
    assert all(layer.pattern.tile == (1, layer.in_features) for layer in model)


class TestTheChecksCanFail:
    """Faults put in on purpose turn the checks above red."""

    def test_tiles_of_a_strip_in_the_wrong_order(self, monkeypatch):
        def turned(*arguments: object) -> list[Strip]:
            return [replace(strip, columns=strip.columns[::-1]) for strip in strips_of(*arguments)]

        monkeypatch.setattr(reference, "strips_of", turned)
        with pytest.raises(AssertionError):
            test_batches_of_tiles_are_taken_and_right(monkeypatch)

    def test_a_column_beside_the_right_one(self, monkeypatch):
        def beside(*arguments: object) -> ops.Columns | None:
            right = kept_columns(*arguments)
            return right and replace(right, numbers=(right.numbers + 1) % 128)

        kept_columns = ops.kept_columns
        monkeypatch.setattr(ops, "kept_columns", beside)
        with pytest.raises(AssertionError):
            test_training_in_tiles_is_training_at_their_entries("columns", True)

    def test_all_of_x_saved(self, monkeypatch):
        monkeypatch.setattr(ops, "keeps_columns", lambda *_: False)
        with pytest.raises(AssertionError):
            test_whole_columns_save_their_own_columns_of_x_alone()

    def test_a_mask_that_forgets_the_edge(self):
        tiles = torch.tensor([1], dtype=torch.int32)
        assert tiles_to_mask(tiles, (4, 6), (4, 4)).sum() == 8  # not 16: the last tile has two columns
        assert SparsePattern.from_tiles(tiles, (4, 6), 4).nnz == 8
