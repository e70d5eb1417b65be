"""A gated sparse difference on a parameter that code reads, where there is no layer that it calls.

`GatedSparseLinear` takes the place of a layer and computes its output. Some weights have no such place: experts are one
parameter of three dimensions, ``torch.nn.MultiheadAttention`` reads the weight of its `out_proj` and never calls it,
and GPT-2's ``Conv1D`` is no ``nn.Linear``. There the *attribute* is replaced: whoever reads ``module.weight`` gets ``W0
+ alpha * (m . D)``, rounded to W0's dtype, and its gradient goes to the values and the gate::

    dvalues = alpha * (dW at the pattern),   dalpha = sum(values * (dW at the pattern))

A parameter of more than two dimensions is the matrix of its last dimension's rows: ``[E, N, K]`` is ``[E * N, K]``,
with one pattern and one gate. The gradient dW of the whole parameter exists for the moment in which it is gathered.

The module stays what it was, of a class derived from its own that has the attribute as a property. Its parameter moves
into a child, ``rigsa_<name>``, that also holds values, gate and pattern; in a state dict it keeps its name and shape.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._ops import ops as operators
from .in_place import optimizer_steps
from .linear import NO_CAPTURE, GatedSparseLinear
from .snapshot import Snapshot

PREFIX = "rigsa_"
"""Of the child's name, before the parameter's."""


class _ComposedWeight(torch.autograd.Function):
    """The composed matrix, which the caller keeps, as a function of the values and the gate."""

    @staticmethod
    def forward(ctx, values, alpha, composed, pattern):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, alpha)
        ctx.pattern = pattern
        return composed.view_as(composed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, alpha = ctx.saved_tensors
        at_pattern = grad
        if not ctx.pattern.is_dense:
            at_pattern = grad.new_empty(values.numel())
            operators.gather_free_([at_pattern], [grad.contiguous()], ctx.pattern.tensors)
        at_pattern = at_pattern.to(alpha.dtype, copy=at_pattern is grad)
        dalpha = torch.dot(values.to(alpha.dtype).view(-1), at_pattern.view(-1)).view(1)
        return at_pattern.mul_(alpha).to(values.dtype), dalpha, None, None


class GatedSparseWeight(GatedSparseLinear):
    """The difference on one parameter of `owner`: see the head of this file. Make one with `attach`.

    It is a `GatedSparseLinear` in all that concerns values, gate, pattern and frozen weight. Its `forward` takes
    nothing and returns the composed parameter.

    Args:
        owner: the module whose parameter is adapted.
        name: of the parameter, floating-point, of two dimensions or more.
        fan_in: the number of inputs of each output, which bounds the initial values; the last dimension by default.
        options: as in `GatedSparseLinear`. `numerics` is ``"auto"`` or ``"composed"``, which are the same here: one
            weight is read, so there is one product. `force` does not apply.

    Raises:
        ValueError: the parameter or an option does not fit.
    """

    _made: tuple[int, Snapshot, Tensor] | None
    """The steps counted when it was composed, what it was composed of, and the composed matrix."""

    def __init__(self, owner: nn.Module, name: str, *, fan_in: int | None = None, **options: Any) -> None:
        weight = owner._parameters.get(name)
        if weight is None or weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(f"name: expected a floating-point parameter of two dimensions or more, got {name!r}")
        if options.get("numerics", "auto") == "exact":
            raise ValueError("numerics: 'exact' takes two products, and code that reads a weight takes one; use 'auto'")
        if options.pop("force", None) is not None:
            raise ValueError("force: there is no path to choose where code reads a weight; use None")
        columns = weight.shape[-1]
        fan_in = columns if fan_in is None else fan_in
        linear = nn.Linear(columns, weight.numel() // columns, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().reshape(-1, columns), requires_grad=False)
        scale = options.pop("init_scale", 1.0) * math.sqrt(columns / fan_in)
        super().__init__(
            linear, init_scale=scale, **options | {"numerics": "composed", "force": "gemm", "in_place": False}
        )
        self.name, self.weight_shape, self.order = name, weight.shape, [name]
        self._owner = (owner, weight)  # in a tuple, or they would be a submodule and a parameter

    @property
    def place(self) -> nn.Module:
        """The module whose parameter is adapted."""
        return self._owner[0]

    def forward(self) -> Tensor:  # type: ignore[override]
        """``W0 + alpha * (m . D)`` in the parameter's shape and dtype; W0 where the adapter is switched off."""
        if not self.enabled:
            return self.weight.view(self.weight_shape)
        composed = _ComposedWeight.apply(self.rigsa_values, self.rigsa_alpha, self._composed_now(), self.pattern)
        return cast(Tensor, composed).view(self.weight_shape)

    def _composed_now(self) -> Tensor:
        values, alpha = self.rigsa_values.detach(), self.rigsa_alpha.detach()
        if torch.compiler.is_compiling():
            return cast(Tensor, operators.compose(self.weight, values, alpha, self.pattern.tensors))
        made = self._made
        is_stale = made is None or made[0] != optimizer_steps() or not made[1].is_of(*self._trio())
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._check_capture(is_stale)
        if made is None or is_stale:
            self._made = None  # or it would be kept beside the new one
            with torch.inference_mode(False), torch.no_grad():
                made = optimizer_steps(), Snapshot(*self._trio()), self._composed(self.weight.detach())
            self._made = made
        return made[2]

    def _check_capture(self, is_stale: bool) -> None:
        """Raises RuntimeError where a replay would read an old matrix, or where nobody would have made it."""
        if self.training:
            raise RuntimeError(NO_CAPTURE)
        if is_stale:
            self._refuse_preparing()

    def _start(self) -> None:
        super()._start()
        self._made = None

    def kept_tensors(self) -> list[Tensor]:
        return [] if self._made is None else [self._made[2]]

    def adopt(self, parameter: nn.Parameter) -> None:
        """Take another parameter of the same shape for the frozen one, whose storage is shared from here on."""
        self._owner = (self.place, parameter)
        self.weight = nn.Parameter(parameter.detach().view(-1, self.in_features), requires_grad=False)
        self.restored()  # the layer behind lets go of the one before
        self.to(parameter.device)  # and this one of what it has made from that

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(f"{prefix}weight")
        destination[f"{prefix.removesuffix(f'{PREFIX}{self.name}.')}{self.name}"] = weight.view(self.weight_shape)

    def extra_repr(self) -> str:
        return f"shape={list(self.weight_shape)}, density={self.pattern.density:.4f}"


def attach(gated: GatedSparseWeight) -> None:
    """Have the owner's attribute give the composed parameter."""
    owner, name = gated.place, gated.name
    gated.order = list(owner._parameters)
    del owner._parameters[name]
    owner.add_module(f"{PREFIX}{name}", gated)
    _set_properties(owner)
    handle = owner.register_load_state_dict_pre_hook(_Renamed(name))
    gated._handle = (handle,)


def detach(gated: GatedSparseWeight, weight: Tensor | None = None) -> None:
    """Give the owner its parameter back, frozen: the one it had, with W0 in it, or a new one of `weight`."""
    owner, parameter = gated._owner
    if weight is None:
        parameter.data = gated.frozen_matrix().view(gated.weight_shape)
    else:
        parameter = nn.Parameter(weight.view(gated.weight_shape), requires_grad=False)
    cast(Any, gated._handle)[0].remove()
    delattr(owner, f"{PREFIX}{gated.name}")
    _set_properties(owner)
    owner.register_parameter(gated.name, parameter)
    parameter.requires_grad_(False)
    for name in gated.order:  # to where they stood: optimisers number parameters
        if name in owner._parameters:
            owner._parameters[name] = owner._parameters.pop(name)


class _Renamed:
    """Before a state dict is loaded: the parameter under its old name and shape becomes the child's matrix."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, _module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        weight = state_dict.pop(f"{prefix}{self.name}", None)
        if weight is not None:
            state_dict[f"{prefix}{PREFIX}{self.name}.weight"] = weight.reshape(-1, weight.shape[-1])


def _set_properties(owner: nn.Module) -> None:
    """Give `owner` the class that has a property for each of its adapted parameters, or its own class without any."""
    own = getattr(type(owner), "_rigsa_own_class", type(owner))
    names = [child.name for child in owner.children() if isinstance(child, GatedSparseWeight) and child.place is owner]
    if not names:
        owner.__class__ = own
        return
    # Other code looks classes up by their name, so the derived one has the same.
    attributes: dict[str, Any] = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    attributes |= {"_rigsa_own_class": own} | {name: property(_reader(name)) for name in names}
    owner.__class__ = type(own.__name__, (own,), attributes)


def _reader(name: str) -> Any:
    return lambda owner: owner._modules[f"{PREFIX}{name}"]()
