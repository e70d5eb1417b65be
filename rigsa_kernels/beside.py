"""The adapter's product alone, added to what a layer has computed that multiplies in a way of its own (in 8 bits)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._ops import ops as operators
from .format import SparsePattern
from .ops import _dvalues


def add_adapter(y: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: SparsePattern) -> Tensor:
    """``y + alpha * x (m . D)^T``, differentiable in all but the pattern.

    Args:
        y: ``[..., N]``.
        x: ``[..., K]``, of y's dtype.
        values, alpha, pattern: as in `rigsa_kernels.gated_linear`.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _Beside.apply(y, x, values, alpha, pattern)


class _Beside(torch.autograd.Function):
    """Saves x and pointers. The matrix of D is made for each product and dropped."""

    @staticmethod
    def forward(ctx, y, x, values, alpha, pattern):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, values, alpha)
        ctx.pattern = pattern
        return operators.add_scaled(y, F.linear(x, _matrix(values, x, pattern)), alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, values, alpha = ctx.saved_tensors
        dx = dvalues = dalpha = None
        if ctx.needs_input_grad[1]:
            dx = ((dy @ _matrix(values, dy, ctx.pattern)) * alpha).to(x.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            dvalues, dalpha = _dvalues(dy, x, values, alpha, ctx.pattern.tensors)
        return dy, dx, dvalues, dalpha, None


def _matrix(values: Tensor, like: Tensor, pattern: SparsePattern) -> Tensor:
    return pattern.scatter(values).to(like.dtype)
