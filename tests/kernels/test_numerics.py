"""What the choice between the exact and the composed path rests on (`rigsa_kernels.exactness.composed_is_safe`)."""

import math

import pytest
import torch
from torch import nn

from benchmarks.adapter_share import WEIGHT_STD, K, N, adapter_share, composed, exact, float8, threshold
from rigsa_kernels import GatedSparseLinear, SparsePattern, composed_is_safe
from rigsa_kernels.exactness import rms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e-1])
def test_exact_path_carries_the_whole_term_at_any_gate(alpha, dtype):
    share, noise = adapter_share(alpha, exact(dtype), dtype)
    assert share == pytest.approx(1, abs=0.01)
    assert noise < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_composed_path_is_whole_at_the_threshold_and_loses_the_term_below(dtype):
    at = [adapter_share(threshold(dtype) * factor, composed(dtype), dtype) for factor in (1, 0.1, 0.01)]
    assert at[0][0] == pytest.approx(1, abs=0.05)
    assert at[0][1] < 0.3
    assert at[1][0] < 0.6
    assert at[2][0] < 0.15


def test_float32_composes_at_any_gate_that_training_leaves():
    share, noise = adapter_share(1e-3, composed(torch.float32), torch.float32)
    assert share == pytest.approx(1, abs=0.01)
    assert noise < 0.01


@pytest.mark.parametrize("outliers", [False, True])
def test_a_float8_adapter_product_would_carry_the_term_with_noise(outliers):
    """What docs/kernels.md says of the alternative that was not taken."""
    share, noise = adapter_share(1e-6, float8, outliers=outliers)
    assert share == pytest.approx(1, abs=0.01)
    assert 0.02 < noise < 0.05


def test_rule_switches_at_the_threshold():
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * WEIGHT_STD
    delta = (torch.rand(N, K, generator=torch.Generator().manual_seed(1)) * 2 - 1) / math.sqrt(K)
    for factor, safe in ((0.9, False), (1.1, True)):
        for sign in (1, -1):
            alpha = torch.tensor([sign * factor * threshold(torch.bfloat16)])
            assert bool(composed_is_safe(alpha, delta, rms(weight).item(), torch.bfloat16)) is safe


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("free", ["largest", "smallest", "random", "all"])
def test_the_rule_looks_at_the_weights_that_the_difference_is_added_to(free, in_place):
    """Of heavy-tailed weights the largest have a rounding step many times that of all, the smallest one far below."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False).bfloat16()
    linear.weight.data = (torch.distributions.StudentT(3.0).sample((64, 128)) * 0.02).bfloat16()
    weights = linear.weight.detach().float()
    order = {"largest": -weights.abs(), "smallest": weights.abs(), "random": torch.rand(64, 128)}
    mask = torch.ones(64, 128, dtype=torch.bool)
    if free != "all":
        mask = order[free] < order[free].flatten().kthvalue(400).values
    layer = GatedSparseLinear(linear, seed=0, key=1, pattern=SparsePattern.from_mask(mask), in_place=in_place)
    edge = torch.finfo(torch.bfloat16).eps * weights[mask].square().mean().sqrt() / rms(layer.rigsa_values)
    for factor in (0.9, 1.1, 0.9):
        with torch.no_grad():
            layer.rigsa_alpha.fill_((factor * edge).item())
        layer(torch.randn(2, 128).bfloat16())  # in place, the weight holds the sum from here on
        assert bool(layer.is_safe(torch.bfloat16)) == (factor > 1)
        assert layer.merging_loses() == (factor < 1)
