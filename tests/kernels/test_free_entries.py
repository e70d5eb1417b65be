"""Reading and writing the free entries of many matrices at once: PyTorch's way and the kernel's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rigsa_kernels import SparsePattern, free_entries, reference, triton_free_entries
from rigsa_kernels.testing import GuardError, interpreting
from rigsa_kernels.tiles import grid_shape, tile_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


TILES = [None, None, "rows", "columns", 16, "5x3"]


def _pattern(shape: tuple[int, int], density: float, tile: object, generator: torch.Generator) -> SparsePattern:
    """Entries, or tiles, drawn one by one."""
    if tile is None:
        return SparsePattern.from_mask(torch.rand(shape, generator=generator) < density)
    size = tile_size(tile, shape)  # type: ignore[arg-type]
    free = torch.rand(grid_shape(shape, size), generator=generator) < density
    return SparsePattern.from_tiles(free.view(-1).nonzero().view(-1).to(torch.int32), shape, size)


def make(shapes: list[tuple[int, int]], density: float, dtype: torch.dtype, seed: int = 0):  # type: ignore[no-untyped-def]
    """Matrices, patterns, base values, values and gates."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    patterns = [_pattern(shape, density, TILES[(seed + at) % len(TILES)], generator) for at, shape in enumerate(shapes)]
    base = [pattern.gather(matrix) for pattern, matrix in zip(patterns, matrices, strict=True)]
    values = [torch.randn(pattern.nnz, generator=generator) for pattern in patterns]
    alphas = [torch.rand(1, generator=generator) for _ in shapes]
    return matrices, patterns, base, values, alphas


def flat(patterns: list[SparsePattern]) -> list[Tensor]:
    return [tensor for pattern in patterns for tensor in pattern.tensors]


def on_both(task: str, written: list[Tensor], *lists: list[Tensor], also: list[Tensor]) -> list[list[Tensor]]:
    """What `task` leaves in `written`, from PyTorch and from the kernel."""
    results = []
    for run in (getattr(free_entries, task), getattr(triton_free_entries, task)):
        own = [tensor.clone() for tensor in written]
        everything = [*own, *(tensor for tensors in lists for tensor in tensors), *also]
        with interpreting(also=everything):
            run(own, *lists)
        results.append(own)
    return results


def assert_same(results: list[list[Tensor]]) -> None:
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 150)), min_size=1, max_size=3)


@given(shapes, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.sampled_from(DTYPES), st.integers(0, 99))
@settings(max_examples=25)
def test_the_kernel_reads_and_writes_as_pytorch_does(sizes, density, dtype, seed):
    matrices, patterns, base, values, _ = make(sizes, density, dtype, seed)
    tensors = flat(patterns)
    empty = [torch.full_like(entries, float("nan")) for entries in base]
    gathered = on_both("gather_free_", empty, matrices, tensors, also=[])
    assert_same(gathered)
    assert_same([gathered[0], base])
    cast = [value.to(dtype) for value in values]
    scattered = on_both("scatter_free_", matrices, cast, tensors, also=[])
    assert_same(scattered)
    for matrix, before, pattern, entries in zip(scattered[0], matrices, patterns, cast, strict=True):
        assert torch.equal(pattern.gather(matrix), entries)
        assert torch.equal(matrix[~pattern.to_mask()], before[~pattern.to_mask()])


@given(shapes, st.sampled_from([0.05, 0.5, 1.0]), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
@settings(max_examples=25)
def test_composing_rounds_the_sum_once(sizes, density, dtype, half_values, seed):
    matrices, patterns, base, values, alphas = make(sizes, density, dtype, seed)
    values = [value.bfloat16() for value in values] if half_values else values
    results = on_both("compose_free_", matrices, base, values, alphas, flat(patterns), also=[])
    for row in zip(*results, matrices, patterns, base, values, alphas, strict=True):
        pytorch, kernel, before, pattern, entries, value, alpha = row
        want = pattern.scatter(entries.double() + alpha.double() * value.double())[pattern.to_mask()]
        for got in (pytorch, kernel):
            assert torch.equal(got[~pattern.to_mask()], before[~pattern.to_mask()])
            error = (got[pattern.to_mask()].double() - want).abs()
            # One rounding to the matrix's dtype, after sums and products in float32.
            assert (error <= torch.finfo(dtype).eps / 2 * want.abs() + 4e-7 * (1 + want.abs())).all()


def test_a_composed_matrix_comes_back_bit_for_bit():
    """Negative zeros and denormal numbers, too, and whatever the values were."""
    matrices, patterns, base, values, alphas = make([(30, 70)], 0.5, torch.bfloat16)
    matrices[0][::3] = -0.0
    matrices[0][1::3] = 1e-40
    base = [patterns[0].gather(matrices[0])]
    before, values[0][:5] = matrices[0].clone(), float("inf")
    free_entries.compose_free_(matrices, base, values, alphas, flat(patterns))
    assert not torch.equal(matrices[0], before)
    free_entries.scatter_free_(matrices, base, flat(patterns))
    assert torch.equal(matrices[0].view(torch.int16), before.view(torch.int16))


def test_a_gate_that_is_not_finite_is_refused():
    matrices, patterns, base, values, alphas = make([(30, 70)], 0.5, torch.bfloat16)
    with pytest.raises(reference.NonFiniteGateError):
        free_entries.compose_free_(matrices, base, values, [alphas[0] * float("nan")], flat(patterns))


def test_the_kernel_refuses_what_it_would_read_past():
    matrices, patterns, base, values, alphas = make([(30, 70)], 0.5, torch.bfloat16)
    for broken in (
        (matrices, [base[0][:-1]], values, alphas, flat(patterns)),
        ([matrices[0][:-1]], base, values, alphas, flat(patterns)),
        ([matrices[0].t().contiguous().t()], base, values, alphas, flat(patterns)),
    ):
        with pytest.raises(ValueError, match="expected"), interpreting():
            triton_free_entries.compose_free_(*broken)


def test_the_guard_sees_a_vector_that_is_too_short():
    """The check of lengths aside, so that the guard itself is known to look."""
    matrices, patterns, base, values, alphas = make([(30, 70)], 0.5, torch.bfloat16)
    short, short_values = [base[0][:-1].clone()], [values[0][:-1].clone()]
    everything = [*matrices, *short, *short_values, *alphas, *flat(patterns)]
    with pytest.raises(GuardError), interpreting(also=everything):
        triton_free_entries.compose_free_(matrices, short, short_values, alphas, flat(patterns))
