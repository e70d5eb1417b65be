"""One batch, several adapters: each row is computed with the adapter that it names.

Every layer splits its input by adapter, multiplies each part as that adapter's layer alone would, and puts the rows
back in their order. So an adapted layer gives a row the bits that it has in a batch of its adapter's rows alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from rigsa.state import LayerState, Snapshot, adapted_layers, put_state
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.parametrized import GatedSparseWeight


@contextlib.contextmanager
def by_row(model: nn.Module, adapters: Mapping[str, Snapshot], names: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of a batch is computed with ``adapters[names[i]]``, and with the base alone where that is None.

    Raises:
        ValueError: a layer's weight is read by other code, which has no rows, or it has a `forward` of its own.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, GatedSparseWeight):
            raise ValueError(f"names: {name} is a weight that code reads, which has no rows; use one adapter at a time")
        if "forward" in layer.__dict__:
            raise ValueError(f"names: {name} has a forward of its own, set on the instance; remove it first")
    flags = [layer.enabled for layer in layers.values()]
    try:
        for name, layer in layers.items():
            states = {adapter: snapshot[name] for adapter, snapshot in adapters.items()}
            layer.enabled = False
            layer.forward = _ByRow(layer, states, names)  # type: ignore[method-assign]
        yield
    finally:
        for layer, flag in zip(layers.values(), flags, strict=True):
            layer.__dict__.pop("forward", None)
            layer.enabled = flag


class _ByRow:
    """The forward of one layer: `layer` itself computes the base's rows, and a layer for each adapter the others."""

    def __init__(self, layer: GatedSparseLinear, states: Mapping[str, LayerState], names: Sequence[str | None]) -> None:
        self.layer, self.count = layer, len(names)
        self.parts: list[tuple[GatedSparseLinear | None, list[int]]] = []
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            self.parts.append((None if name is None else _alike(layer, states[name]), rows))
        order = [row for _, rows in self.parts for row in rows]
        self.place = [order.index(row) for row in range(self.count)]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[0] != self.count:
            raise ValueError(f"x: expected a batch of {self.count} rows, one for each name, got {list(x.shape)}")
        found = []
        for other, rows in self.parts:
            part = x[torch.tensor(rows, device=x.device)]
            found.append(type(self.layer).forward(self.layer, part) if other is None else other(part))
        return torch.cat(found)[torch.tensor(self.place, device=x.device)]


def _alike(layer: GatedSparseLinear, state: LayerState) -> GatedSparseLinear:
    """A layer over the same frozen weight, which it never writes to, with the adapter of `state`, frozen."""
    linear = layer.restored()
    other = GatedSparseLinear(
        linear, seed=state.seed, key=state.key, pattern=state.pattern, alpha_init=state.alpha_init, init_scale=0.0,
        values_dtype=state.values.dtype, numerics=layer.numerics, force=layer.force, in_place=False,
    )  # fmt: skip
    put_state(other, state)
    return other.requires_grad_(False).eval()
