"""What the choice between the exact and the composed path rests on (`rigsa_kernels.linear.composed_is_safe`)."""

import math

import pytest
import torch

from benchmarks.adapter_share import WEIGHT_STD, K, N, adapter_share, composed, exact, float8, threshold
from rigsa_kernels import composed_is_safe
from rigsa_kernels.linear import rms


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
