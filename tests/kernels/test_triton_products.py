"""The kernels of forward, input gradient and gradient at the pattern: interpreted, under guard, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALPHAS, DENSITIES, TILES, assert_close, eager_results, flag, make_inputs, quantize_nf4, truth
from torch import Tensor

from rigsa_kernels import SparsePattern, testing, triton_add, triton_gather, triton_grad, triton_linear, triton_tiles
from rigsa_kernels.testing import GuardError, interpreting
from rigsa_kernels.tiles import grid_shape, tile_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Problem:
    """One layer and one batch; `base` is what the kernels take for `weight`."""

    x: Tensor
    base: list[Tensor]
    bias: Tensor | None
    values: Tensor
    alpha: Tensor
    pattern: SparsePattern
    dy: Tensor
    exact: bool

    @property
    def arguments(self) -> tuple[object, ...]:
        weight = self.base if len(self.base) > 1 else self.base[0]
        return self.x, weight, self.bias, self.values, self.alpha, self.pattern, self.dy

    def launch(self) -> list[Tensor]:
        """``[y, dx, dvalues, dalpha]`` from the kernels, on the tensors' device."""
        tail = self.values, self.alpha, self.pattern.tensors
        exact = flag(self.exact).to(self.x.device)
        y = triton_linear.linear_fwd(self.x, self.base, self.bias, *tail, exact)
        dx = triton_linear.linear_dx(self.dy, self.base, *tail, exact)
        gradient = triton_grad if self.pattern.tile is None else triton_tiles
        return [y, dx, *gradient.linear_dvalues(self.dy, self.x, *tail)]

    def run(self, order: int = 0) -> list[Tensor]:
        """`launch`, interpreted."""
        with interpreting(order=order):
            return self.launch()

    def on(self, device: str) -> Problem:
        """The same problem on another device."""
        moved = [tensor if tensor is None else tensor.to(device) for tensor in (self.x, self.bias, self.values)]
        base = [tensor.to(device) for tensor in self.base]
        x, bias, values = moved
        alpha, pattern, dy = self.alpha.to(device), self.pattern.to(device), self.dy.to(device)
        return Problem(x, base, bias, values, alpha, pattern, dy, self.exact)

    def check(self, order: int = 0) -> None:
        self.compare(self.run(order))

    def compare(self, results: list[Tensor]) -> None:
        """`results`, from any device, against float64."""
        want, sizes = truth(*self.arguments)
        eager = eager_results(*self.arguments, self.exact)
        check_all([result.cpu() for result in results], want, sizes, eager, self.x.dtype)


def check_all(results: list[Tensor], *others) -> None:  # type: ignore[no-untyped-def]
    *columns, dtype = others
    for outcome in zip(results, *columns, strict=True):
        assert_close(*outcome, dtype)


def make(m=40, n=70, k=96, density="packed", alpha=0.1, dtype=torch.bfloat16, exact=False, bias=True, nf4=False,
         values_dtype=None) -> Problem:  # type: ignore[no-untyped-def]  # fmt: skip
    x, weight, b, values, gate, pattern, dy = make_inputs(m, n, k, density, alpha, dtype, bias)
    base = quantize_nf4(weight) if nf4 else [weight]
    return Problem(x, base, b, values.to(values_dtype or values.dtype), gate, pattern, dy, exact)


sizes = st.one_of(st.integers(1, 40), st.integers(1, 150))
densities = st.sampled_from(["dense", "packed", "sparse", "empty", "full", *TILES])


@given(
    sizes, sizes, sizes, densities, st.sampled_from(ALPHAS), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_matches_float64(m, n, k, density, alpha, dtype, exact, bias, half_values, order):
    values_dtype = dtype if half_values else torch.float32
    make(m, n, k, density, alpha, dtype, exact, bias, values_dtype=values_dtype).check(order)


@given(sizes, st.integers(1, 40), st.integers(1, 4), densities, st.sampled_from(ALPHAS), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_nf4_base_matches_float64(m, n, runs, density, alpha, exact, half_values):
    dtype = torch.bfloat16
    make(
        m, 2 * n, 32 * runs, density, alpha, dtype, exact, nf4=True, values_dtype=dtype if half_values else None
    ).check()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("density", ["dense", "packed", "full"])
@pytest.mark.parametrize("nf4", [False, True])
def test_tiles_of_many_tokens(nf4, density, exact):
    """More than one tile each way, edges everywhere."""
    make(150, 70, 96, density, exact=exact, nf4=nf4).check()


def test_columns_beyond_what_16_signed_bits_count():
    """With every entry free, offsets in a row pass 32,767; dx and the gradient reach columns beyond it."""
    make(2, 3, 33_000, "full").check()


def test_a_pattern_with_empty_rows():
    problem = make(20, 40, 64)
    mask = problem.pattern.to_mask()
    mask[::3], mask[-1] = False, False
    delta = problem.pattern.scatter(problem.values)
    problem.pattern = SparsePattern.from_mask(mask)
    problem.values = problem.pattern.gather(delta)
    problem.check()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_closed_gate_is_the_base_product_bit_for_bit(density, dtype, exact, monkeypatch):
    """alpha = 0 on either path gives what a layer without a free entry gives.

    Both take one tile here: on a CPU the order of a sum depends on the size of the matrices that NumPy multiplies.
    """
    tile = triton_linear.Tile(16, 32, 32, 4, 3)
    monkeypatch.setattr(triton_linear, "choose_tile", lambda *args, **options: tile)
    gated, empty = (make(20, 24, 64, d, 0.0, dtype, exact) for d in (density, "empty"))
    for got, want in zip(gated.run()[:2], empty.run()[:2], strict=True):
        assert torch.equal(got, want)


def whole_numbers(density: str, exact: bool) -> Problem:
    """Small whole numbers, a gate of 1/4: float32 sums are exact, so each result is one rounding of the truth."""
    problem = make(40, 70, 96, density, 0.25, torch.bfloat16, exact, bias=False)
    generator = torch.Generator().manual_seed(3)

    def draw(like: Tensor, limit: int) -> Tensor:
        return torch.randint(-limit, limit + 1, like.shape, generator=generator).to(like.dtype)

    problem.x, problem.dy = draw(problem.x, 4), draw(problem.dy, 4)
    problem.base, problem.values = [draw(problem.base[0], 255)], draw(problem.values, 3)
    return problem


def check_whole_numbers(problem: Problem, results: list[Tensor]) -> None:
    x, (weight,), delta, dy = problem.x, problem.base, problem.pattern.scatter(problem.values), problem.dy
    total = weight.double() + 0.25 * delta.double()
    if not problem.exact:
        total = total.bfloat16().double()
    y, dx, dvalues, _ = results
    assert torch.equal(y, (x.double() @ total.T).bfloat16())
    assert torch.equal(dx, (dy.double() @ total).bfloat16())
    assert torch.equal(dvalues, problem.pattern.gather((0.25 * dy.double().T @ x.double()).float()))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_exact_sums_are_rounded_once_to_the_nearest(density, exact):
    """Stricter than any bound: a cast that truncates stays within two roundings of eager, but not here."""
    problem = whole_numbers(density, exact)
    check_whole_numbers(problem, problem.run())


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_the_whole_adapter_term_reaches_y_on_the_exact_path(density, dtype, alpha):
    """Least-squares share of the adapter term in y, with W0 = 0 so that rounding y does not hide it."""
    problem = make(32, 64, 96, density, alpha, dtype, exact=True, bias=False)
    problem.base = [torch.zeros_like(problem.base[0])]
    if dtype == torch.float16:  # 1e-6 times a delta of 1e-2 is below float16's smallest number, so y itself is scaled
        problem.x = problem.x * 256
    term = (problem.x.double() @ problem.pattern.scatter(problem.values).double().T) * alpha
    y = problem.run()[0].double()
    assert (y * term).sum() / (term * term).sum() == pytest.approx(1, abs=0.01)


def test_order_of_programs_does_not_show():
    problem = make(150, 70, 96)
    runs = [problem.run(order) for order in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("density", ["dense", "packed"])
def test_views_that_callers_have(density):
    """Row-strided, transposed, expanded, three-dimensional and empty batches, and a gradient of stride 0."""
    problem = make(12, 24, 64, density, dtype=torch.float32)
    y, _, dvalues, _ = problem.run()
    x, dy = problem.x, problem.dy
    for view in (x.view(3, 4, 64), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :64]):
        problem.x, problem.dy = view, dy.view(*view.shape[:-1], 24)
        got = problem.run()
        assert torch.equal(got[0].reshape(12, 24), y)
        assert torch.equal(got[2], dvalues)
    problem.x, problem.dy = x[:1].expand(12, 64), torch.ones(()).expand(12, 24)
    problem.check()
    problem.x, problem.dy = x[:0], dy[:0]
    y, dx, dvalues, dalpha = problem.run()
    assert y.shape == (0, 24)
    assert dx.shape == (0, 64)
    assert not dvalues.any()
    assert not dalpha.any()


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(0, 40),
    st.sampled_from([(16, 16), (32, 32), (64, 64), (16, 60), (60, 16), (5, 33), (1, 40), (40, 1)]),
    st.sampled_from([0.1, 0.5]), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_the_launch_over_tiles_matches_float64(shape, m, tile, share, dtype, half_values, seed):
    """Whatever the tile, its edges and the tokens; this launch alone, also where one product would do."""
    check_tiles_alone(shape, m, tile, share, dtype, half_values, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_several_pieces(dtype):
    """Larger than a program's work, with edges that leave some pieces nothing to do, and several steps of tokens."""
    check_tiles_alone((150, 300), 140, (128, 250), 0.8, dtype, True, 0)


def check_tiles_alone(shape, m, tile, share, dtype, half_values, seed):  # type: ignore[no-untyped-def]
    tile = tile_size(tile, shape)
    grid = torch.rand(grid_shape(shape, tile), generator=torch.Generator().manual_seed(seed)) < share
    tiles = grid.view(-1).nonzero().view(-1).to(torch.int32)
    problem = make(m, *shape, "dense", 0.1, dtype, values_dtype=dtype if half_values else torch.float32)
    problem.pattern = SparsePattern.from_tiles(tiles, shape, tile)
    problem.values = problem.pattern.gather(problem.values)
    tail = problem.values, problem.alpha, problem.pattern.tensors
    with interpreting(order=seed):
        results = triton_tiles.tile_grad(problem.dy, problem.x, *tail)
    want, sums = truth(*problem.arguments)
    eager = eager_results(*problem.arguments, problem.exact)
    check_all(list(results), want[2:], sums[2:], eager[2:], dtype)


@given(sizes, sizes, sizes, st.sampled_from(list(DENSITIES)), st.sampled_from(ALPHAS), st.sampled_from(DTYPES),
       st.booleans())  # fmt: skip
@settings(max_examples=40)
def test_gradients_from_a_whole_product_match_float64(m, n, k, density, alpha, dtype, half_values):
    """The library makes the product here; the kernel reads the free entries from it and scales them."""
    problem = make(m, n, k, density, alpha, dtype, values_dtype=dtype if half_values else torch.float32)
    with interpreting():
        results = triton_gather.linear_dvalues(
            problem.dy, problem.x, problem.values, problem.alpha, problem.pattern.tensors
        )
    want, sums = truth(*problem.arguments)
    eager = eager_results(*problem.arguments, problem.exact)
    check_all(list(results), want[2:], sums[2:], eager[2:], dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(40, 96, dtype=torch.float64)}, "x: expected bfloat16, float16, float32 on a GPU"),
        ({"x": torch.zeros(40, 96, dtype=torch.float16)}, "weight: expected the operand's dtype torch.float16"),
        ({"alpha": torch.zeros(1, dtype=torch.bfloat16)}, "alpha: expected float32 of one entry"),
        ({"values": torch.zeros(5, dtype=torch.int8)}, "values: expected bfloat16, float16, float32 on a GPU"),
        ({"pattern": SparsePattern.from_mask(torch.ones(9, 9) > 0)}, r"pattern: expected one of \[70, 96\]"),
        ({"pattern": SparsePattern.dense(70, 96)}, r"pattern: expected one of \[70, 96\]"),
        ({"values": torch.zeros(9, device="meta")}, "values: expected the device of x, cpu, got meta"),
        ({"base": [torch.zeros(96, 70, dtype=torch.bfloat16).t()]}, "weight: expected a contiguous tensor"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_a_launch(change, message):
    problem = make()
    for name, value in change.items():
        setattr(problem, name, value)
    with pytest.raises(ValueError, match=message):
        problem.run()


def test_an_old_gpu_is_refused():
    problem = make()
    with interpreting(arch=75), pytest.raises(RuntimeError, match=r"compute capability 8.0 or newer .* got 7\.5"):
        triton_linear.linear_dx(
            problem.dy, problem.base, problem.values, problem.alpha, problem.pattern.tensors, flag(True)
        )


@triton.jit
def _unclamped(left, BLOCK: tl.constexpr):  # noqa: N803
    return tl.arange(0, BLOCK)


class TestTheChecksCanFail:
    """Faults put in on purpose: each turns the check red that is there for it."""

    @pytest.mark.parametrize("module", [triton_linear, triton_grad])
    def test_a_dropped_boundary(self, monkeypatch, module):
        monkeypatch.setattr(module, "clamped", _unclamped)
        with pytest.raises(GuardError, match="out of bounds"):
            make(20, 70, 96).run()

    def test_a_dropped_boundary_of_a_tile(self, monkeypatch):
        monkeypatch.setattr(triton_tiles, "clamped", _unclamped)
        with pytest.raises(GuardError, match="out of bounds"):
            make(20, 70, 96, "16x8").run()

    def test_tiles_that_write_into_one_place(self):
        problem = make(20, 70, 96, "16x8")
        problem.pattern.places[0, 1] = problem.pattern.places[0, 0]
        with pytest.raises(GuardError):
            problem.run()

    def test_a_short_buffer(self):
        problem = make()
        problem.values = problem.values[:-1].clone()
        with pytest.raises(GuardError, match="out of bounds"):
            problem.run()

    def test_a_truncating_cast(self, monkeypatch):
        """Rounding towards zero where composed weights and results are stored."""

        def truncated(values: np.ndarray) -> np.ndarray:
            return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)

        monkeypatch.setattr(testing, "_round_to_bfloat16", truncated)
        problem = whole_numbers("packed", exact=False)
        results = problem.run()
        with pytest.raises(AssertionError):
            check_whole_numbers(problem, results)

    @pytest.mark.parametrize("name", ["values", "alpha", "bias"])
    def test_an_operand_that_is_off(self, name):
        problem = make(exact=True)
        results = problem.run()
        getattr(problem, name)[0] += 1
        with pytest.raises(AssertionError):
            problem.compare(results)


@given(st.integers(0, 5000), st.sampled_from(DTYPES), st.sampled_from(ALPHAS))
@settings(max_examples=20)
def test_a_scaled_term_is_added_with_one_rounding(count, dtype, alpha):
    generator = torch.Generator().manual_seed(count)
    base, term = (torch.randn(count, generator=generator).to(dtype) for _ in range(2))
    with interpreting():
        got = triton_add.add_scaled(base, term, torch.tensor([alpha]))
    want = base.double() + torch.tensor(alpha).double() * term.double()
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps / 2 * want.abs() + 2e-7 * (1 + want.abs())).all()


def test_what_does_not_fit_is_not_added():
    with interpreting():
        with pytest.raises(ValueError, match=r"term: expected \[3\]"):
            triton_add.add_scaled(torch.zeros(3), torch.zeros(4), torch.zeros(1))
        with pytest.raises(ValueError, match="alpha: expected float32"):
            triton_add.add_scaled(torch.zeros(3), torch.zeros(3), torch.zeros(1, dtype=torch.bfloat16))
