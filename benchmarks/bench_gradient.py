"""Seconds of the weight gradients of one block of SmolLM2-135M: the whole product and a gather, or sampled on CSR.

``pytest benchmarks/bench_gradient.py``; what `rigsa_kernels.reference.SAMPLED_PRODUCT_DENSITY` rests on. 1,424 tokens.
"""

from __future__ import annotations

import pytest
import torch

from rigsa.masks import random_mask
from rigsa_kernels import SparsePattern, reference
from rigsa_kernels.format import flat_indices

TOKENS = 1424
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def whole(dy: torch.Tensor, x: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    return (dy.t() @ x).view(-1).index_select(0, flat_indices(pattern.words, pattern.in_features))


def sampled(dy: torch.Tensor, x: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    return reference._sampled_product(dy, x, pattern.tensors)


@pytest.mark.parametrize("way", [whole, sampled], ids=lambda way: way.__name__)
@pytest.mark.parametrize("density", [0.01, 0.0346, 0.2], ids="{:.2%}".format)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient(benchmark, dtype, density, way):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number, (n, k) in enumerate(SHAPES):
        dy, x = (torch.randn(TOKENS, size, generator=generator).to(getattr(torch, dtype)) for size in (n, k))
        mask = random_mask((n, k), round(density * n * k), seed=0, name=str(number))
        layers.append((dy, x, SparsePattern.from_mask(mask)))
    for dy, x, pattern in layers:
        torch.testing.assert_close(sampled(dy, x, pattern), whole(dy, x, pattern).float(), rtol=0.02, atol=0.5)
    benchmark.group = f"weight gradients of a block, {dtype}, {density:.2%}"
    benchmark.pedantic(lambda: [way(*layer) for layer in layers], rounds=15, warmup_rounds=3)
