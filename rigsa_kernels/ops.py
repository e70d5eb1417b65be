"""The operators ``torch.ops.rigsa.*`` and their gradients.

Each operator is a `torch.library` schema, a fake (shapes without data, for tracing) and an implementation per device.
`rigsa_kernels.reference` implements the CPU and, until the Triton kernels take that key over, CUDA. Autograd stays
outside, in one `torch.autograd.Function`: half the host time of `register_autograd` for a call this small.

A pattern crosses this border as a list of tensors: ``[]`` for dense, ``[words, word_offsets, row_base]`` for packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rigsa_kernels import reference
from rigsa_kernels.format import SparsePattern

_library = torch.library.Library("rigsa", "DEF")


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"rigsa::{name}", fake, lib=_library)


def _last_dim_becomes(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty((*like.shape[:-1], size), dtype=dtype)


_define(
    "compose(Tensor weight, Tensor values, Tensor alpha, Tensor[] pattern) -> Tensor",
    reference.compose,
    lambda weight, values, alpha, pattern: torch.empty_like(weight),
)
_define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor values, Tensor alpha, Tensor[] pattern, bool exact)"
    " -> Tensor",
    reference.linear_fwd,
    lambda x, weight, bias, values, alpha, pattern, exact: _last_dim_becomes(x, weight.shape[0], weight.dtype),
)
_define(
    "linear_dx(Tensor dy, Tensor weight, Tensor values, Tensor alpha, Tensor[] pattern, bool exact) -> Tensor",
    reference.linear_dx,
    lambda dy, weight, values, alpha, pattern, exact: _last_dim_becomes(dy, weight.shape[1], weight.dtype),
)
_define(
    "linear_dvalues(Tensor dy, Tensor x, Tensor values, Tensor alpha, Tensor[] pattern) -> (Tensor, Tensor)",
    reference.linear_dvalues,
    lambda dy, x, values, alpha, pattern: (torch.empty_like(values), torch.empty_like(alpha)),
)


class _GatedLinear(torch.autograd.Function):
    """Saves x and pointers, never a dense matrix made for one call.

    `operand` is a matrix that outlives the step and replaces the per-call work of the two dense products: the composed
    weight when not `exact`, the difference in the weight's dtype when `exact`, or None to make it in each call.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, values, alpha, operand, exact, *pattern):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, values, alpha, operand, *pattern)
        ctx.exact = exact
        if operand is None:
            return torch.ops.rigsa.linear_fwd(x, weight, bias, values, alpha, list(pattern), exact)
        if exact:
            return torch.ops.rigsa.linear_fwd(x, weight, bias, operand, alpha, [], True)
        return F.linear(x, operand, bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, values, alpha, operand, *pattern = ctx.saved_tensors
        dx = dbias = dvalues = dalpha = None
        if ctx.needs_input_grad[0]:
            if operand is None:
                dx = torch.ops.rigsa.linear_dx(dy, weight, values, alpha, pattern, ctx.exact)
            elif ctx.exact:
                dx = torch.ops.rigsa.linear_dx(dy, weight, operand, alpha, [], True)
            else:
                dx = dy @ operand
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dvalues, dalpha = torch.ops.rigsa.linear_dvalues(dy, x, values, alpha, pattern)
        return dx, None, dbias, dvalues, dalpha, None, None, *(None for _ in pattern)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: SparsePattern,
    *,
    exact: bool,
    operand: Tensor | None = None,
) -> Tensor:
    """``y = x W0^T + alpha * x (m . D)^T + b``, differentiable in x, bias, values and alpha.

    Args:
        x: ``[..., K]``, the weight's dtype.
        weight: frozen ``[N, K]``, any float dtype.
        bias: ``[N]`` or None.
        values: the free entries of D, shaped ``pattern.values_shape``; any float dtype.
        alpha: the gate, shape ``(1,)``; float32 (float64 beside a float64 weight). Its dtype is the one the adapter
            term is combined in.
        pattern: where D may be non-zero.
        exact: True for two products, False to round ``W0 + alpha D`` to the weight's dtype and run one
            (see `rigsa_kernels.reference`).
        operand: a matrix kept over many calls in place of the one each call would make: ``compose(...)`` when not
            `exact`, ``pattern.scatter(values)`` in the weight's dtype when `exact`. The caller keeps it fresh.

    Returns:
        ``[..., N]`` in the weight's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; raised before anything is computed.

    Source: RIGSA, section 3 (the gate: ReZero, Bachlechner et al. 2020).
    """
    _check(x, weight, bias, values, alpha, pattern, operand)
    return _GatedLinear.apply(x, weight, bias, values, alpha, operand, exact, *pattern.tensors)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: SparsePattern,
    operand: Tensor | None,
) -> None:
    if weight.dim() != 2 or tuple(weight.shape) != pattern.shape:
        raise ValueError(f"weight: expected the pattern's shape {list(pattern.shape)}, got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected [..., {weight.shape[1]}], got {list(x.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x: expected the weight's dtype {weight.dtype}, got {x.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    pattern.check_values(values)
    if tuple(alpha.shape) != (1,):
        raise ValueError(f"alpha: expected shape (1,), got {tuple(alpha.shape)}")
    if operand is not None and operand.shape != weight.shape:
        raise ValueError(f"operand: expected {list(weight.shape)}, got {list(operand.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("values", values), ("alpha", alpha)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
