"""What has to be the same on a GPU: bits where they are promised, elsewhere results within a bound."""

import pytest
import torch

from rigsa.masks import prune
from rigsa_kernels import SparsePattern, gated_linear, uniform_init

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_values_have_the_same_bits(dtype):
    options = {"seed": 3, "key": 5, "dtype": dtype}
    assert torch.equal(
        uniform_init((300, 70), 0.1, device="cuda", **options).cpu(), uniform_init((300, 70), 0.1, **options)
    )


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_masks_have_the_same_bits(ranking):
    generator = torch.Generator().manual_seed(0)
    initial = {name: torch.rand(5000, generator=generator) - 0.5 for name in "ab"}
    final = {
        name: ((values + torch.randn(5000, generator=generator)) * 8).round() / 8 for name, values in initial.items()
    }
    on_gpu = [{name: values.cuda() for name, values in layers.items()} for layers in (final, initial)]
    want, counts = prune(final, initial, keep_fraction=0.8, ranking=ranking)
    got, gpu_counts = prune(*on_gpu, keep_fraction=0.8, ranking=ranking)
    assert counts == gpu_counts
    assert all(torch.equal(got[name].cpu(), want[name]) for name in want)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("density", [0.02, 0.4, None])
def test_layer_and_gradients_match_float64_on_the_cpu(density, exact):
    generator = torch.Generator().manual_seed(0)
    mask = None if density is None else torch.rand(48, 70, generator=generator) < density
    pattern = SparsePattern.dense(48, 70) if mask is None else SparsePattern.from_mask(mask)
    x, weight, delta, dy = (
        torch.randn(*shape, generator=generator) for shape in ((9, 70), (48, 70), (48, 70), (9, 48))
    )
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaves = [tensor.to(device, dtype) for tensor in (x, pattern.gather(delta), torch.tensor([0.1]))]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = gated_linear(leaves[0], weight.to(device, dtype), None, *leaves[1:], pattern.to(device), exact=exact)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(device, dtype))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)
