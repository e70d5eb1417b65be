"""Several adapters on one base, by name: one is active, the others wait in host memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor

from rigsa.rows import by_row
from rigsa.saving import load_adapter, read_states
from rigsa.state import LayerState, Snapshot, Ticket, adapted_layers, restore_snapshot, snapshot, unwrap
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.replace import gated_linears

Rule = Literal["sum", "ties"]


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base computes, bit for bit. May be nested; nothing trained changes.

    Adapters of PEFT beside the gated layers, or in their place, are switched off, too.

    Raises:
        ValueError: `model` has neither gated layers nor adapters of PEFT.
    """
    tuners = _tuner_layers(model)
    gated = gated_linears(model).values() if tuners else adapted_layers(model).values()
    layers = [layer for layer in gated if layer.enabled]
    tuners = [tuner for tuner in tuners if not tuner.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for tuner in tuners for parameter in tuner.parameters()]
    try:
        for layer in layers:
            layer.enabled = False
        for tuner in tuners:
            tuner.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        for tuner in tuners:
            tuner.enable_adapters(True)
        for parameter, flag in trained:  # PEFT freezes what it disables, and would train all that it enables
            parameter.requires_grad_(flag)


def _tuner_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers. It is asked only where it was imported: elsewhere there are none."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


class Adapters:
    """Adapters of one model by name. All have the same layers; patterns, values, gates and seeds are each one's own.

    What a name stands for is the adapter as it was left: values that are trained while it is active are kept when
    another takes its place. An optimiser belongs to one adapter: make a new one after `use`.

    Args:
        model: bare, or with an adapter, which becomes the active one.
        name: of the adapter that `model` carries.

    Attributes:
        active: the name of the adapter that the model carries; None while it carries none.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.model = unwrap(model)
        self.active: str | None = name if gated_linears(self.model) else None
        self._waiting: dict[str, dict[str, LayerState]] = {}

    @property
    def names(self) -> list[str]:
        """All of them, the active one first."""
        return [*([] if self.active is None else [self.active]), *self._waiting]

    def add(self, name: str, source: str | os.PathLike[str] | Snapshot, *, strict: bool = False) -> None:
        """Take in a saved adapter, or a `rigsa.snapshot`. On a bare model a saved one becomes the active one.

        Args:
            name: one that is not taken.
            source: a folder, or a snapshot.
            strict: of `rigsa.load_adapter`.

        Raises:
            ValueError: the name is taken, or a snapshot is given to a bare model.
            RigsaError: as in `rigsa.load_adapter`.
        """
        if name in self.names:
            raise ValueError(f"name: expected one other than {', '.join(self.names)}, got {name!r}")
        if self.active is None and not isinstance(source, Mapping):
            load_adapter(self.model, source, strict=strict)
            self.active = name
            return
        if isinstance(source, Mapping):
            self._waiting[name] = _to_host(source)
        else:
            self._waiting[name] = read_states(source, self.model, strict=strict)

    def use(self, name: str) -> None:
        """Make an adapter the active one. Raises ValueError where there is none of this name."""
        self._check(name)
        if name != self.active:
            assert self.active is not None
            before = _to_host(snapshot(self.model))
            restore_snapshot(self.model, self._waiting[name])
            del self._waiting[name]
            self._waiting[self.active], self.active = before, name

    def delete(self, name: str) -> None:
        """Forget an adapter. Raises ValueError where there is none of this name, or it is the active one."""
        self._check(name)
        if name == self.active:
            raise ValueError(f"name: {name!r} is the active adapter; use another one first")
        del self._waiting[name]

    def off(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model computes what its base computes (`adapter_off`)."""
        return adapter_off(self.model)

    def rows(self, names: Sequence[str | None]) -> contextlib.AbstractContextManager[None]:
        """Inside, row i of a batch is computed with the adapter ``names[i]``, and with the base where that is None.

        For inference: no adapter is trained there. Each layer keeps what each of these adapters needs, a composed
        matrix in 16 or 32 bits, until the block ends.

        Args:
            names: one for each row; every pass inside takes a batch of as many rows, in the first dimension.

        Raises:
            ValueError: a name is unknown, or there is none; a layer's weight is read by other code
                (`GatedSparseWeight`), or a layer has a `forward` of its own; inside, an input of other rows.
        """
        for name in dict.fromkeys(names):
            if name is not None:
                self._check(name)
        if not names or self.active is None:
            raise ValueError(f"names: expected one for each row of a batch and an adapter, got {list(names)}")
        used = {name: self._state(name) for name in dict.fromkeys(names) if name is not None}
        return by_row(self.model, used, list(names))

    def combine(self, name: str, weights: Mapping[str, float], rule: Rule = "sum", density: float = 1.0) -> None:
        """Make one adapter of several, under a new name. Its gates are 1, and its values those of ``alpha * D``.

        Args:
            name: of the new adapter, which waits.
            weights: names to weights.
            rule: ``sum`` adds them up, weighted. ``ties`` keeps of each adapter the largest entries, elects for every
                entry the sign with the greater weighted sum, and takes the weighted mean of those that have this sign
                (Yadav et al., "TIES-Merging", 2023); weights are above 0 there.
            density: under ``ties``, the share of each adapter's free entries of a layer that is kept, in (0, 1].

        Raises:
            ValueError: a name is taken or unknown, an argument is out of range, or a layer would be left empty (named).
        """
        if name in self.names:
            raise ValueError(f"name: expected one other than {', '.join(self.names)}, got {name!r}")
        if rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
        if not 0 < density <= 1 or (rule == "sum" and density != 1):
            raise ValueError(f"density: expected more than 0 and at most 1, and 1 for 'sum', got {density}")
        for one, weight in weights.items():
            self._check(one)
            if not abs(weight) < float("inf") or (rule == "ties" and weight <= 0):
                raise ValueError(f"weights: expected a finite number (above 0 for 'ties') for {one!r}, got {weight}")
        if not weights:
            raise ValueError("weights: expected at least one adapter")
        parts = [self._state(one) for one in weights]
        numbers = list(weights.values())
        self._waiting[name] = {
            layer: combined_state(layer, [part[layer] for part in parts], numbers, rule, density) for layer in parts[0]
        }

    def _check(self, name: str) -> None:
        if name not in self.names:
            known = f"one of {', '.join(self.names)}" if self.names else "an adapter that was added, and none was"
            raise ValueError(f"name: expected {known}, got {name!r}")

    def _state(self, name: str) -> Mapping[str, LayerState]:
        return _to_host(snapshot(self.model)) if name == self.active else self._waiting[name]

    def __str__(self) -> str:
        lines = []
        for name in self.names:
            holders = adapted_layers(self.model) if name == self.active else self._waiting[name]
            patterns = [holder.pattern for holder in holders.values()]
            free = sum(pattern.nnz for pattern in patterns)
            weights = sum(pattern.shape[0] * pattern.shape[1] for pattern in patterns)
            lines.append(f"{'*' if name == self.active else ' '} {name}: {free:,} entries, {free / weights:.2%}")
        return "\n".join(lines) or "no adapter"


def _to_host(states: Snapshot) -> dict[str, LayerState]:
    """Copies in host memory. Layers that share a gate share its copy."""
    gates: dict[int, Tensor] = {}
    return {
        name: replace(
            state,
            pattern=state.pattern.to("cpu"),
            values=state.values.detach().to("cpu", copy=True),
            gate=gates.setdefault(id(state.gate), state.gate.detach().to("cpu", copy=True)),
        )
        for name, state in states.items()
    }


def combined_state(name: str, states: list[LayerState], weights: list[float], rule: Rule, density: float) -> LayerState:
    """One layer of what `Adapters.combine` makes of several states, which are in host memory."""
    first = states[0]
    wide = torch.float64 if first.values.dtype == torch.float64 else torch.float32
    differences = [_difference(state, wide) for state in states]
    if rule == "sum":
        matrix = torch.zeros(first.pattern.shape, dtype=wide)
        for difference, weight in zip(differences, weights, strict=True):
            matrix += weight * difference
        free = torch.zeros(first.pattern.shape, dtype=torch.bool)
        for state in states:
            free |= state.pattern.to_mask()
    else:
        trimmed = [
            _trimmed(difference, round(density * state.pattern.nnz))
            for difference, state in zip(differences, states, strict=True)
        ]
        matrix = _elected_mean(trimmed, weights)
        free = matrix != 0
    if not bool(free.any()):
        raise ValueError(f"weights: the combination leaves {name} without an entry")
    pattern = SparsePattern.dense(*free.shape) if bool(free.all()) else SparsePattern.from_mask(free)
    values = (matrix if pattern.is_dense else matrix[free]).to(first.values.dtype)
    return replace(
        first, pattern=pattern, values=values, gate=torch.ones_like(first.gate), ticket=Ticket("combined", rule)
    )


def _difference(state: LayerState, dtype: torch.dtype) -> Tensor:
    """``alpha * D`` as an ``[N, K]`` matrix."""
    values = state.values.to(dtype) * state.gate.to(dtype)
    if state.pattern.is_dense:
        return values
    matrix = torch.zeros(state.pattern.shape, dtype=dtype)
    matrix[state.pattern.to_mask()] = values
    return matrix


def _trimmed(matrix: Tensor, count: int) -> Tensor:
    """`matrix` with all but its `count` largest magnitudes set to 0; among equals the first stay."""
    order = matrix.abs().flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(matrix).flatten()
    kept[order[:count]] = matrix.flatten()[order[:count]]
    return kept.view(matrix.shape)


def _elected_mean(matrices: list[Tensor], weights: list[float]) -> Tensor:
    """Entry by entry: the weighted mean of the numbers that have the sign of the weighted sum."""
    total = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total += weight * matrix
    sign, numbers, shares = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for matrix, weight in zip(matrices, weights, strict=True):
        agrees = (matrix.sign() == sign) & (sign != 0)
        numbers += torch.where(agrees, weight * matrix, 0)
        shares += torch.where(agrees, weight, 0.0)
    return numbers / shares.where(shares != 0, 1)
