"""The rule by which `auto` goes from two products to one, for one layer or for all layers of a model at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rms(tensor: Tensor) -> Tensor:
    """Root mean square in float32 (float64 of float64); 0 for an empty tensor."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=dtype) / math.sqrt(max(tensor.numel(), 1))


def composed_is_safe(alpha: Tensor, values: Tensor, weight_rms: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rounding ``W0 + alpha * D`` to `dtype` keeps the adapter: a boolean tensor, shape ``(1,)``.

    The rule is ``|alpha| * rms(D) >= eps * rms(W0)`` with the dtype's eps. `weight_rms` is that of W0 at the free
    entries, where the sum is rounded. tests/kernels/test_numerics.py holds what the rule rests on: in bfloat16, the
    whole adapter term reaches y at the threshold, with about 20 % noise, a third of it at a tenth of the threshold and
    next to nothing at a hundredth. In float32 and float64 composing is always safe.
    """
    return alpha.abs() * rms(values) >= torch.finfo(dtype).eps * weight_rms


def need_two_products(layers: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Whether composing is not safe: boolean ``[len(layers)]`` from a handful of launches, however many layers.

    Args:
        layers: `rigsa_kernels.linear.GatedSparseLinear`, all on one device.
        dtype: of the products; that of each layer's weight by default.
    """
    values = [layer.rigsa_values.detach() for layer in layers]
    gates = torch.cat([layer.rigsa_alpha.detach() for layer in layers]).abs()
    norms = torch.stack(torch._foreach_norm([value.reshape(-1) for value in values], 2, torch.float32))
    thresholds = torch.stack([layer.composing_norm(dtype or layer.dtype) for layer in layers])
    return ~(gates * norms >= thresholds)
