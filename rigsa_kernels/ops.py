"""The operators ``torch.ops.rigsa.*`` and their gradients.

Each operator is a `torch.library` schema, a fake (shapes without data, for tracing) and an implementation per device.
`rigsa_kernels.reference` implements the CPU, the Triton kernels CUDA. Autograd stays outside, in one
`torch.autograd.Function`: half the host time of `register_autograd` for a call this small.

A frozen weight crosses this border as a list of tensors, its base: ``[weight]``, or ``[codes, absmax, levels]`` for
NF4. So does a pattern: ``[]`` for dense, ``[bits, word_offsets, row_base]`` for packed,
``[tiles, places, size]`` for tiles. `exact` is a boolean tensor of shape
``(1,)`` that the kernels read on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import free_entries, reference  # noqa: F401 (free_entries defines operators)
from ._ops import ops as operators
from .dispatch import keeps_columns, kernels_win
from .format import SparsePattern
from .library import define, on_first_use
from .nf4 import num_weights
from .tiles import is_tiled, narrowed_columns


def _last_dim_becomes(like: Tensor, size: int) -> Tensor:
    return like.new_empty((*like.shape[:-1], size))


def _on_cuda(reference: Callable[..., Any], launcher: str) -> Callable[..., Any]:
    """The Triton kernel; PyTorch for float64, on every device: Triton has no float64 product."""
    kernel = on_first_use(launcher)
    return lambda operand, *others: (reference if operand.dtype == torch.float64 else kernel)(operand, *others)


_FUSED_DVALUES = on_first_use("triton_grad.linear_dvalues")
_GATHERED_DVALUES = on_first_use("triton_gather.linear_dvalues")
_TILED_DVALUES = on_first_use("triton_tiles.linear_dvalues")
_CHECKED_DVALUES = on_first_use("triton_gather.checked_dvalues")


def _dvalues_on_cuda(
    dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The fused kernel where it wins (`rigsa_kernels.dispatch`), else the library's product and a gathering kernel.

    Tiles have a kernel of their own everywhere: it does their share of the whole product's work.
    """
    if x.dtype == torch.float64:
        return reference.linear_dvalues(dy, x, values, alpha, pattern)
    if is_tiled(pattern):
        return _TILED_DVALUES(dy, x, values, alpha, pattern)
    fused = kernels_win(x.device, x.dtype)
    return (_FUSED_DVALUES if fused else _GATHERED_DVALUES)(dy, x, values, alpha, pattern)


def _dvalues(dy: Tensor, x: Tensor, values: Tensor, alpha: Tensor, pattern: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``rigsa::linear_dvalues``. Plain CUDA tensors pass PyTorch's dispatcher by, which takes as long as the launch."""
    if type(dy) is Tensor and dy.is_cuda and x.dtype != torch.float64:
        if is_tiled(pattern):
            return _TILED_DVALUES(dy, x, values, alpha, pattern)
        if not kernels_win(x.device, x.dtype):
            return _CHECKED_DVALUES(dy, x, values, alpha, pattern)
    return operators.linear_dvalues.default(dy, x, values, alpha, pattern)


define(
    "compose(Tensor weight, Tensor values, Tensor alpha, Tensor[] pattern) -> Tensor",
    reference.compose,
    reference.compose,
    lambda weight, values, alpha, pattern: torch.empty_like(weight),
)
define(
    "add_scaled(Tensor base, Tensor term, Tensor alpha) -> Tensor",
    reference.add_scaled,
    _on_cuda(reference.add_scaled, "triton_add.add_scaled"),
    lambda base, term, alpha: torch.empty_like(base),
)
define(
    "linear_fwd(Tensor x, Tensor[] base, Tensor? bias, Tensor values, Tensor alpha, Tensor[] pattern, Tensor exact)"
    " -> Tensor",
    reference.linear_fwd,
    _on_cuda(reference.linear_fwd, "triton_linear.linear_fwd"),
    lambda x, base, bias, values, alpha, pattern, exact: _last_dim_becomes(x, num_weights(base) // x.shape[-1]),
)
define(
    "linear_dx(Tensor dy, Tensor[] base, Tensor values, Tensor alpha, Tensor[] pattern, Tensor exact) -> Tensor",
    reference.linear_dx,
    _on_cuda(reference.linear_dx, "triton_linear.linear_dx"),
    lambda dy, base, values, alpha, pattern, exact: _last_dim_becomes(dy, num_weights(base) // dy.shape[-1]),
)
define(
    "linear_dvalues(Tensor dy, Tensor x, Tensor values, Tensor alpha, Tensor[] pattern) -> (Tensor, Tensor)",
    reference.linear_dvalues,
    _dvalues_on_cuda,
    lambda dy, x, values, alpha, pattern: (torch.empty_like(values), torch.empty_like(alpha)),
)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of x that a tile pattern touches, where a layer saves them alone for backward.

    Attributes:
        numbers: int64, ascending.
        pattern: of the matrix ``[N, columns]`` that these columns make up, with the same values.
    """

    numbers: Tensor
    pattern: list[Tensor]


def kept_columns(pattern: list[Tensor], shape: tuple[int, int]) -> Columns | None:
    """What of x a layer of this pattern saves; None for all of it (`rigsa_kernels.dispatch.keeps_columns`)."""
    if not is_tiled(pattern):
        return None
    numbers, narrowed = narrowed_columns(pattern, shape)
    if numbers is None or not keeps_columns(numbers.numel(), shape[1]):
        return None
    return Columns(numbers, narrowed)


class _GatedLinear(torch.autograd.Function):
    """Saves x and pointers, never a dense matrix made for one call.

    `operand` is a matrix that outlives the step and takes the place of the fused products: the composed weight when not
    `exact`, the difference in the weight's dtype when `exact`. Without an operand, `exact` is a flag on the device for
    the fused products, or True: then the difference is made for each product and dropped. The base is empty where
    `operand` holds all that is multiplied by. Autograd takes a microsecond for every argument that is a tensor, so base
    and pattern come as lists. The base is saved nevertheless: a write to it before backward is an error. Where
    `columns` says which columns of x the gradient at the pattern needs, those alone are saved: dx needs no x.
    """

    @staticmethod
    def forward(ctx, x, bias, values, alpha, operand, exact, columns, base, pattern):  # type: ignore[no-untyped-def]
        needed = x if columns is None else x.index_select(-1, columns.numbers)
        ctx.exact, ctx.pattern = exact, pattern
        ctx.pattern_of_x = pattern if columns is None else columns.pattern
        if isinstance(exact, Tensor):
            ctx.save_for_backward(needed, values, alpha, operand, exact, *base)
            return operators.linear_fwd(x, base, bias, values, alpha, pattern, exact)
        ctx.save_for_backward(needed, values, alpha, operand, None, *base)
        if exact:
            operand = _delta(values, base[0], pattern) if operand is None else operand
            return operators.add_scaled(F.linear(x, base[0], bias), F.linear(x, operand), alpha)
        return F.linear(x, operand, bias)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # only where a graph of the gradients is asked for
            return _refusing_a_second_derivative(ctx, dy)
        return _GatedLinear._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
        x, values, alpha, operand, flag, *base = ctx.saved_tensors
        pattern = ctx.pattern
        dx = dbias = dvalues = dalpha = None
        needs_dx, needs_dbias, needs_dvalues, needs_dalpha, *_ = ctx.needs_input_grad
        if needs_dx:
            if flag is not None:
                dx = operators.linear_dx(dy, base, values, alpha, pattern, flag)
            elif ctx.exact:
                operand = _delta(values, base[0], pattern) if operand is None else operand
                dx = operators.add_scaled(dy @ base[0], dy @ operand, alpha)
            else:
                dx = dy @ operand
        if needs_dbias:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        if needs_dvalues or needs_dalpha:
            dvalues, dalpha = _dvalues(dy, x, values, alpha, ctx.pattern_of_x)
        return dx, dbias, dvalues, dalpha, None, None, None, None, None


_refusing_a_second_derivative = once_differentiable(_GatedLinear._gradients)


def _delta(values: Tensor, like: Tensor, pattern: list[Tensor]) -> Tensor:
    """A packed ``m . D`` as a matrix of the frozen weight's shape and dtype."""
    matrix = torch.zeros_like(like)
    operators.scatter_free_([matrix], [values], pattern)
    return matrix


def apply_gated_linear(
    x: Tensor,
    base: list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: list[Tensor],
    exact: bool | Tensor,
    operand: Tensor | None,
    columns: Columns | None = None,
) -> Tensor:
    """`gated_linear` of arguments that a layer has checked once for many calls; `columns` are its `kept_columns`."""
    return _GatedLinear.apply(x, bias, values, alpha, operand, exact, columns, base, pattern)


def gated_linear(
    x: Tensor,
    weight: Tensor | list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: SparsePattern,
    *,
    exact: bool | Tensor,
    operand: Tensor | None = None,
) -> Tensor:
    """``y = x W0^T + alpha * x (m . D)^T + b``, differentiable in x, bias, values and alpha.

    Args:
        x: ``[..., K]``, the weight's dtype.
        weight: frozen ``[N, K]``, any float dtype; or ``[codes, absmax, levels]`` of an NF4 layer
            (`rigsa_kernels.nf4.nf4_base`).
        bias: ``[N]`` or None.
        values: the free entries of D, shaped ``pattern.values_shape``; any float dtype.
        alpha: the gate, shape ``(1,)``; float32 (float64 beside a float64 weight). Its dtype is the one the adapter
            term is combined in. A gate that is not finite is an error on a CPU; on a GPU asking would stop the host.
        pattern: where D may be non-zero.
        exact: True for two products, False to round ``W0 + alpha D`` to the weight's dtype and run one
            (see `rigsa_kernels.reference`). A boolean tensor of shape ``(1,)`` lets the device decide; not with
            `operand`.
        operand: take the library's products with this matrix in place of the fused kernel: ``compose(...)`` when not
            `exact`, ``pattern.scatter(values)`` in the weight's dtype when `exact`. The caller keeps it fresh.

    Returns:
        ``[..., N]`` in the weight's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; raised before anything is computed.
        RuntimeError: on CUDA without `operand`, Triton is missing or the GPU older than compute capability 8.0.

    Source: RIGSA, section 3 (the gate: ReZero, Bachlechner et al. 2020).
    """
    base = weight if isinstance(weight, list) else [weight]
    _check(x, base, bias, values, alpha, pattern, exact, operand)
    if operand is None and not isinstance(exact, Tensor):
        exact = torch.full((1,), exact, dtype=torch.bool, device=x.device)
    columns = None if torch.compiler.is_compiling() else kept_columns(pattern.tensors, pattern.shape)
    return apply_gated_linear(x, base, bias, values, alpha, pattern.tensors, exact, operand, columns)


def _check(
    x: Tensor,
    base: list[Tensor],
    bias: Tensor | None,
    values: Tensor,
    alpha: Tensor,
    pattern: SparsePattern,
    exact: bool | Tensor,
    operand: Tensor | None,
) -> None:
    n, k = pattern.shape
    if len(base) == 1 and tuple(base[0].shape) != (n, k):
        raise ValueError(f"weight: expected the pattern's shape {[n, k]}, got {list(base[0].shape)}")
    if len(base) > 1 and num_weights(base) != n * k:
        raise ValueError(f"weight: expected {n * k} NF4 codes for {[n, k]}, got {num_weights(base)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected [..., {k}], got {list(x.shape)}")
    if len(base) == 1 and x.dtype != base[0].dtype:
        raise ValueError(f"x: expected the weight's dtype {base[0].dtype}, got {x.dtype}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias: expected {[n]}, got {list(bias.shape)}")
    pattern.check_values(values)
    if tuple(alpha.shape) != (1,):
        raise ValueError(f"alpha: expected shape (1,), got {tuple(alpha.shape)}")
    if operand is not None and tuple(operand.shape) != (n, k):
        raise ValueError(f"operand: expected {[n, k]}, got {list(operand.shape)}")
    if operand is not None and (isinstance(exact, Tensor) or len(base) > 1):
        raise ValueError("operand: expected a matrix layer and exact=True or False, got a flag tensor or an NF4 layer")
    named = {"weight": base[0], "bias": bias, "values": values, "alpha": alpha, "operand": operand}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
