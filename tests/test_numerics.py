"""What the choice between the exact and the composed path rests on (`rigsa_kernels.linear.composed_is_safe`)."""

import math

import pytest
import torch

from rigsa_kernels import composed_is_safe, reference
from rigsa_kernels.linear import rms

M, N, K = 256, 256, 2048


def adapter_share(alpha: float, dtype: torch.dtype, exact: bool) -> tuple[float, float]:
    """``(share, noise)`` of the adapter term in y: its regression on the true term, and the error relative to it.

    Products are taken in float64, so only the rounding of the operands shows, as with a float32 accumulator.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype).double()
    weight = (torch.randn(N, K, generator=generator) * 0.02).to(dtype)
    delta = (torch.rand(N, K, generator=generator) * 2 - 1) / math.sqrt(K)
    gate = torch.tensor([alpha])
    term = alpha * (x @ delta.double().T)
    if exact:
        got = alpha * (x @ reference.delta_matrix(delta, (N, K), [], dtype).double().T)
    else:
        got = x @ (reference.compose(weight, delta, gate, []).double() - weight.double()).T
    share = (got * term).sum() / (term * term).sum()
    return share.item(), ((got - term).norm() / term.norm()).item()


def threshold(dtype: torch.dtype) -> float:
    """The alpha at which composing becomes safe for the matrices above."""
    return torch.finfo(dtype).eps * 0.02 / (1 / math.sqrt(3 * K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e-1])
def test_exact_path_carries_the_whole_term_at_any_gate(alpha, dtype):
    share, noise = adapter_share(alpha, dtype, exact=True)
    assert share == pytest.approx(1, abs=0.01)
    assert noise < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_composed_path_is_whole_at_the_threshold_and_loses_the_term_below(dtype):
    at = [adapter_share(threshold(dtype) * factor, dtype, exact=False) for factor in (1, 0.1, 0.01)]
    assert at[0][0] == pytest.approx(1, abs=0.05)
    assert at[0][1] < 0.3
    assert at[1][0] < 0.6
    assert at[2][0] < 0.15


def test_float32_composes_at_any_gate_that_training_leaves():
    share, noise = adapter_share(1e-3, torch.float32, exact=False)
    assert share == pytest.approx(1, abs=0.01)
    assert noise < 0.01


def test_rule_switches_at_the_threshold():
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    delta = (torch.rand(N, K, generator=torch.Generator().manual_seed(1)) * 2 - 1) / math.sqrt(K)
    for factor, safe in ((0.9, False), (1.1, True)):
        for sign in (1, -1):
            alpha = torch.tensor([sign * factor * threshold(torch.bfloat16)])
            assert bool(composed_is_safe(alpha, delta, rms(weight).item(), torch.bfloat16)) is safe
