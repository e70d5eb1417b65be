"""The adapter's product alone, added to what somebody else has computed, and its gradients."""

import pytest
import torch

from rigsa_kernels.beside import add_adapter
from rigsa_kernels.format import SparsePattern


def patterns():
    mask = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    tiles = torch.zeros(12, 20, dtype=torch.bool)
    tiles[4:8, :8] = tiles[:4, 16:] = True
    return {
        "dense": SparsePattern.dense(12, 20),
        "entries": SparsePattern.from_mask(mask),
        "tiles": SparsePattern.from_mask(tiles, (4, 4)),
    }


@pytest.mark.parametrize("kind", ["dense", "entries", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_and_its_gradients_are_those_of_a_matrix(kind, dtype):
    pattern = patterns()[kind]
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(2, 3, 12, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(2, 3, 20, generator=generator).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(pattern.values_shape, generator=generator).to(wide).requires_grad_()
    alpha = torch.full((1,), 0.7, dtype=wide, requires_grad=True)
    inputs = (y, x, values, alpha)
    dy = torch.randn(2, 3, 12, generator=generator).to(dtype)
    found = add_adapter(*inputs, pattern)
    assert found.dtype == dtype
    grads = torch.autograd.grad(found, inputs, dy)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    places = pattern.gather(torch.arange(240.0, dtype=torch.float64).view(12, 20)).long().flatten()
    matrix = torch.zeros(240, dtype=torch.float64).index_copy(0, places, exact[2].flatten()).view(12, 20)
    expected = exact[0] + exact[3] * (exact[1] @ matrix.T)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(grads, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)


def test_an_input_that_needs_no_gradient_has_none():
    pattern = patterns()["entries"]
    values = torch.zeros(pattern.values_shape, requires_grad=True)
    y, x, alpha = torch.zeros(3, 12), torch.randn(3, 20), torch.ones(1)
    add_adapter(y, x, values, alpha, pattern).sum().backward()
    assert values.grad is not None
    assert x.grad is None
