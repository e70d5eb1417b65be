"""Every operator against float64, its gradients against finite differences, and the promises of tracing."""

import math

import oracle
import pytest
import torch
from oracle import ALPHAS, DENSITIES, assert_close, eager_results, flag, make_inputs, truth
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rigsa_kernels import SparsePattern, gated_linear, reference
from rigsa_kernels.reference import SAMPLED_PRODUCT_DENSITY

NUMERICS = pytest.mark.parametrize("exact", [True, False], ids=["exact", "composed"])
PATTERNS = pytest.mark.parametrize("density", oracle.PATTERNS)


@NUMERICS
@PATTERNS
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7, 33), (1, 1, 1), (64, 48, 64), (3, 130, 70)], ids=str)
def test_forward_and_gradients_match_float64(shape, dtype, alpha, density, exact):
    x, weight, bias, values, alpha, pattern, dy = inputs = make_inputs(*shape, density, alpha, dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, values, alpha)]
    y = gated_linear(x, weight, bias, values, alpha, pattern, exact=exact)
    y.backward(dy)
    want, sizes = truth(*(tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in inputs))
    eager = eager_results(*inputs, exact)
    for results in zip((y.detach(), *(leaf.grad for leaf in leaves)), want, sizes, eager, strict=True):
        assert_close(*results, dtype)


@NUMERICS
@PATTERNS
def test_gradients_match_finite_differences(density, exact):
    x, weight, bias, values, alpha, pattern, _ = make_inputs(3, 4, 35, density, 0.1, torch.float64)
    for tensor in (x, bias, values, alpha):
        tensor.requires_grad_()

    def run(x: Tensor, bias: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
        return gated_linear(x, weight, bias, values, alpha, pattern, exact=exact)

    assert torch.autograd.gradcheck(run, (x, bias, values, alpha))


@NUMERICS
@PATTERNS
def test_kept_operand_changes_nothing(density, exact):
    x, weight, bias, values, alpha, pattern, dy = make_inputs(6, 9, 40, density, 0.1, torch.float32)
    kept = pattern.scatter(values) if exact else torch.ops.rigsa.compose(weight, values, alpha, pattern.tensors)
    results = []
    for operand in (None, kept):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, values, alpha)]
        y = gated_linear(leaves[0], weight, bias, *leaves[1:], pattern, exact=exact, operand=operand)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_both_ways_to_the_sampled_product_are_tested():
    """The densities above stand on both sides of the switch, which lies below them in 16 bits on a CPU with AMX."""
    for dtype in (torch.float32, torch.float64):
        assert DENSITIES["sparse"] < SAMPLED_PRODUCT_DENSITY[dtype] < DENSITIES["packed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("density", ["sparse", "packed", "full"])
def test_both_ways_to_the_sampled_product_are_right(dtype, density):
    x, _, _, _, _, pattern, dy = make_inputs(93, 20, 50, density, 0.1, dtype)
    exact = (dy.double().t() @ x.double())[pattern.to_mask()]
    sizes = (dy.double().t().abs() @ x.double().abs())[pattern.to_mask()]
    sampled = reference._sampled_product(dy, x, pattern.tensors)
    whole = reference._whole_product(dy, x)[pattern.to_mask()]
    sums = 93 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((sampled - exact).abs() <= sums * sizes).all()
    assert ((whole - exact).abs() <= sums * sizes + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (93, 130), (32, 10), (0, 5)], ids=str)
def test_parts_of_the_tokens_make_up_the_transposed_matrix(shape, threads, dtype, monkeypatch):
    """Also of what is strided already: a slice of columns, and a transposed matrix."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(shape[0], 2 * shape[1] + 1, dtype=dtype)
    for matrix in (x[:, : shape[1]].contiguous(), x[:, 1 : shape[1] + 1], x.t().contiguous().t()):
        parts = reference._transposed(matrix)
        assert parts.is_contiguous()
        assert shape[0] == 0 or len(parts) == math.gcd(shape[0], min(threads, reference.MOST_PARTS))
        assert torch.equal(torch.cat(list(parts), 1), matrix.t())


@PATTERNS
def test_composing_leaves_the_bits_outside_the_pattern(density):
    _, weight, _, values, alpha, pattern, _ = make_inputs(2, 20, 50, density, 0.1, torch.bfloat16)
    composed = torch.ops.rigsa.compose(weight, values, alpha, pattern.tensors)
    assert torch.equal(composed[~pattern.to_mask()], weight[~pattern.to_mask()])
    expected = (weight.float() + 0.1 * pattern.scatter(values)).bfloat16()
    assert torch.equal(composed, expected)


@NUMERICS
@PATTERNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gate_is_the_base_layer_bit_for_bit(dtype, density, exact):
    x, weight, bias, values, alpha, pattern, _ = make_inputs(17, 24, 50, density, 0.0, dtype)
    y = gated_linear(x, weight, bias, values, alpha, pattern, exact=exact)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@NUMERICS
def test_shapes_and_strides_that_callers_have(exact):
    x, weight, bias, values, alpha, pattern, _ = make_inputs(12, 8, 40, "packed", 0.1, torch.float32)
    values.requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = gated_linear(x, weight, bias, values, alpha, pattern, exact=exact)
        return y, torch.autograd.grad(y.sum(), values)[0]  # the gradient of a sum has stride 0

    y, grad = run(x)
    for view in (x.view(3, 4, 40), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :40]):
        torch.testing.assert_close(run(view)[0].reshape(12, 8), y)
        torch.testing.assert_close(run(view)[1], grad)
    empty, no_grad = run(x[:0])
    assert empty.shape == (0, 8)
    assert torch.equal(no_grad, torch.zeros_like(values))
    assert gated_linear(x[0], weight, bias, values, alpha, pattern, exact=exact).shape == (8,)


@NUMERICS
@PATTERNS
def test_opcheck(density, exact):
    x, weight, bias, values, alpha, pattern, dy = make_inputs(4, 6, 40, density, 0.1, torch.float32)
    tensors = pattern.tensors
    for operator, arguments in [
        (torch.ops.rigsa.compose, (weight, values, alpha, tensors)),
        (torch.ops.rigsa.add_scaled, (dy, dy, alpha)),
        (torch.ops.rigsa.linear_fwd, (x, [weight], bias, values, alpha, tensors, flag(exact))),
        (torch.ops.rigsa.linear_dx, (dy, [weight], values, alpha, tensors, flag(exact))),
        (torch.ops.rigsa.linear_dvalues, (dy, x, values, alpha, tensors)),
    ]:
        torch.library.opcheck(operator, arguments)


@NUMERICS
@pytest.mark.parametrize("density", ["dense", "packed"])
def test_compile_fullgraph_equals_eager(density, exact):
    x, weight, bias, values, alpha, pattern, dy = make_inputs(4, 6, 40, density, 0.1, torch.float32)

    def run(x: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
        return torch.tanh(gated_linear(x, weight, bias, values, alpha, pattern, exact=exact))

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, values, alpha)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_tensors_are_the_input_and_pointers():
    """Beyond x, backward keeps only storages that exist anyway: nothing of the size of the matrix."""
    x, weight, _, values, alpha, pattern, _ = make_inputs(16, 64, 64, "sparse", 0.1, torch.float32)
    known = {tensor.untyped_storage().data_ptr() for tensor in (weight, values, alpha, *pattern.tensors)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    values.requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_linear(x, weight, None, values, alpha, pattern, exact=False)
    assert sum(saved.values()) == x.nbytes + 1  # and the flag
    assert values.numel() * 4 < 0.05 * weight.nbytes


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(4, 9), r"x: expected \[\.\.\., 8\], got \[4, 9\]"),
        (
            "x",
            torch.zeros(4, 8, dtype=torch.float16),
            "x: expected the weight's dtype torch.float32, got torch.float16",
        ),
        ("weight", torch.zeros(5, 8), r"weight: expected the pattern's shape \[6, 8\], got \[5, 8\]"),
        ("bias", torch.zeros(5), r"bias: expected \[6\], got \[5\]"),
        ("values", torch.zeros(48), r"values: expected \[6, 8\], got \[48\]"),
        ("alpha", torch.zeros(()), r"alpha: expected shape \(1,\), got \(\)"),
        ("alpha", torch.zeros(1, device="meta"), "alpha: expected the device of x, cpu, got meta"),
    ],
)
def test_bad_arguments_are_named(name, wrong, message):
    arguments = {
        "x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": None, "values": torch.zeros(6, 8),
        "alpha": torch.zeros(1), "pattern": SparsePattern.dense(6, 8),
    } | {name: wrong}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        gated_linear(**arguments, exact=True)


def test_the_bound_can_fail():
    """A gradient that drops one token, or a gate that is off, does not pass."""
    x, weight, bias, values, alpha, pattern, dy = inputs = make_inputs(32, 16, 64, "packed", 1e-3, torch.bfloat16)
    (y, _, dvalues, _), sizes = truth(*inputs)
    eager = eager_results(*inputs, True)
    short = reference.linear_dvalues(dy[1:], x[1:], values, alpha, pattern.tensors)[0]
    with pytest.raises(AssertionError):
        assert_close(short, dvalues, sizes[2], eager[2], torch.bfloat16)
    wrong_gate = reference.linear_fwd(x, [weight], bias, values, alpha + 0.5, pattern.tensors, flag(True))
    with pytest.raises(AssertionError):
        assert_close(wrong_gate, y, sizes[0], eager[0], torch.bfloat16)
