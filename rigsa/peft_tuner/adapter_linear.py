"""One adapter of one linear layer under PEFT: a `GatedSparseLinear` beside the layer, not in its place.

PEFT keeps the linear layer as `base_layer`, whatever adapters there are. So weight and bias stay that layer's
parameters, and this module owns the values and the gate alone. Its state holds, beside these, the pattern as files have
it (`rigsa.encoding`), and the ticket: how the pattern came about.

Whoever loads a file needs a place of the right shape for every tensor in it. transformers asks for it before it reads
anything, so `await_saved` makes the room, and the pattern is taken in when it is first asked for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from rigsa.encoding import Encoding
from rigsa.errors import RigsaError
from rigsa.peft_format import PARTS, PREFIX, layer_layout, layer_parts, parse_layer
from rigsa.state import Ticket, note_ticket, same_pattern, ticket_of
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.parametrized import GatedSparseWeight


class AdapterLinear(GatedSparseLinear):
    """As `GatedSparseLinear`, over the weight and bias of `linear`, which keeps them.

    Attributes:
        name_in_base: what the gated layer would be called in the place of the layer that it adapts.
    """

    name_in_base: str
    is_quantised = False
    """Whether the layer is in 8 bits (`rigsa.peft_tuner.eight_bits`)."""
    _awaited: tuple[Encoding, int] | None = None

    def _hold(self, linear: nn.Linear) -> None:
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        self._origin = (linear,)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self._origin[0].weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self._origin[0].bias

    def _trio(self) -> tuple[Tensor, Tensor, Tensor]:
        tensors: Any = self._parameters
        weight: Any = self._origin[0]._parameters["weight"]  # faster than a module's attributes
        return weight, tensors["rigsa_values"], tensors["rigsa_alpha"]

    def _own_bias(self) -> Tensor | None:
        return self.bias

    def _pattern_here(self) -> SparsePattern:
        if self._awaited is not None:
            self._take_saved()
        return self._pattern if self.rigsa_values.is_meta else super()._pattern_here()

    def forward(self, x: Tensor) -> Tensor:
        if self._awaited is not None:
            self._take_saved()
        return super().forward(x)

    def let_go(self) -> None:
        """Bring W0 back into the weight, and keep nothing that was made of it."""
        self.restore_weight()
        self._start()

    def merged_weight(self) -> Tensor:
        """``W0 + alpha * D`` in the weight's dtype, a matrix of its own. What composes gives the same bits."""
        return self._composed(self.frozen_matrix())

    def await_saved(self, encoding: Encoding, entries: int) -> None:
        """Make room for the pattern, the values and the gate of a file. Numbers that it does not bring stay NaN."""
        device = self.weight.device
        for part, (dtype, shape) in layer_layout(encoding, self._pattern.shape, entries).items():
            self.register_buffer(f"{PREFIX}{part}", torch.zeros(shape, dtype=dtype, device=device))
        self._make_values(self._pattern.shape if encoding == "dense" else (entries,), torch.nan)
        with torch.no_grad():
            self.rigsa_alpha.fill_(torch.nan)
        self._awaited = encoding, entries

    def _make_values(self, shape: tuple[int, ...], number: float = 0.0) -> None:
        values = torch.full(shape, number, dtype=self._values_dtype, device=self.weight.device)
        self.rigsa_values = nn.Parameter(values, requires_grad=self.rigsa_values.requires_grad)

    def _take_saved(self) -> None:
        assert self._awaited is not None
        parts = {name: self._buffers[f"{PREFIX}{name}"] for name in PARTS if f"{PREFIX}{name}" in self._buffers}
        ticket_bytes = parts["ticket"]
        if ticket_bytes is None or ticket_bytes.is_meta or not bool(ticket_bytes.any()):
            raise RigsaError(
                "layers: the configuration says that these layers come from a file, and none was loaded; make a new "
                "RigsaConfig for a new adapter"
            )
        for name, tensor in ("values", self.rigsa_values), ("alpha", self.rigsa_alpha):
            if not bool(tensor.isfinite().all()):
                raise RigsaError(
                    f"{self.name_in_base}: {PREFIX}{name}: expected finite numbers; the file has others, or none"
                )
        pattern, ticket = self._parsed(cast(dict[str, Tensor], parts), self.rigsa_values)
        self._await_nothing()
        self._adopt_indices(pattern.to(self.rigsa_values.device))
        note_ticket(self, ticket)

    def _await_nothing(self) -> None:
        self._awaited = None
        for name in PARTS:
            self._buffers.pop(f"{PREFIX}{name}", None)

    def _parsed(self, parts: dict[str, Tensor], values: Tensor) -> tuple[SparsePattern, Ticket]:
        """Raises RigsaError where a file's tensors are not a pattern of this layer."""
        shape = self.out_features, self.in_features
        try:
            return parse_layer(shape, parts, values)
        except ValueError as error:
            raise RigsaError(f"this is not an adapter of a layer {list(shape)} that can be loaded: {error}") from error

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self._awaited is None:
            for part, tensor in layer_parts(self.pattern, ticket_of(self)).items():
                destination[f"{prefix}{PREFIX}{part}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """A state brings its pattern along. Where that has as many entries as before, the parameter stays the same."""
        values, alpha = (state_dict.get(f"{prefix}{PREFIX}{name}") for name in ("values", "alpha"))
        if values is not None:
            for name, tensor in ("values", values), ("alpha", alpha):
                if tensor is not None and not tensor.is_meta and not bool(tensor.isfinite().all()):
                    raise RigsaError(f"{prefix}{PREFIX}{name}: expected finite numbers")
            names = [name for name in PARTS if f"{prefix}{PREFIX}{name}" in state_dict]
            parts = {name: state_dict[f"{prefix}{PREFIX}{name}"] for name in names}
            pattern, ticket = self._parsed(parts, values)
            self._await_nothing()
            self.restore_weight()
            if not same_pattern(self._pattern, pattern):
                self._adopt_indices(pattern.to(self.weight.device))
            self._start()
            if tuple(self.rigsa_values.shape) != pattern.values_shape:
                self._make_values(pattern.values_shape)
            note_ticket(self, ticket)
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        ours = {f"{prefix}{PREFIX}{name}" for name in PARTS}
        unexpected[:] = [name for name in unexpected if name not in ours]


class AdapterWeight(AdapterLinear, GatedSparseWeight):
    """The same on a parameter that code reads; as `GatedSparseWeight`, which does not take the attribute's place here.

    Args:
        owner: the module whose parameter is adapted, and which keeps it.
        name: of the parameter.
        options: as in `GatedSparseWeight`.
    """

    def __init__(self, owner: nn.Module, name: str, **options: Any) -> None:
        self.__dict__.update(_owner=(owner, None), name=name)  # what `weight` asks for while this is made
        super().__init__(owner, name, **options)
        self._origin[0].weight = None  # type: ignore[assignment]  # or it would keep the memory that it was made of

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The matrix of the parameter's rows: the same tensor for as long as the parameter lies where it lay."""
        parameter = cast(nn.Parameter, self.place._parameters[self.name])
        seen = self.__dict__.get("_seen")
        if seen is None or seen[0] is not parameter or seen[1].data_ptr() != parameter.data_ptr():
            matrix = nn.Parameter(parameter.detach().view(-1, parameter.shape[-1]), requires_grad=False)
            seen = self.__dict__["_seen"] = parameter, matrix  # in a tuple, or it would be a parameter
        return cast(nn.Parameter, seen[1])

    def _trio(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.rigsa_values, self.rigsa_alpha

    def forward(self) -> Tensor:  # type: ignore[override]
        """``W0 + alpha * (m . D)`` in the parameter's shape and dtype."""
        if self._awaited is not None:
            self._take_saved()
        return GatedSparseWeight.forward(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_seen"}
