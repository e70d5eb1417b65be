"""An adapter in memory: what each gated layer of a model holds, taken out and put back.

Putting back is in place where shapes allow, so that an optimiser made before stays valid, and what was frozen stays
frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
from torch import Tensor

from rigsa_kernels.format import SparsePattern
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.replace import gated_linears


@dataclass(frozen=True)
class Ticket:
    """How a layer came by its pattern, and what its values started from.

    Attributes:
        kind: ``dense``, ``prune``, ``random``, ``gradient``, ``magnitude``, ``given`` or ``combined``.
        criterion: what ranked the entries (`rigsa.criteria.CRITERIA`, `rigsa.scores.SCORES`); empty where nothing did.
        level: how often the layer was pruned.
        start: ``init``, another name in `rigsa.criteria.TREATMENTS`, or ``snapshot``.
        draw_seed: of the treatments that draw.
    """

    kind: str = "dense"
    criterion: str = ""
    level: int = 0
    start: str = "init"
    draw_seed: int = 0


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer of an adapter.

    Attributes:
        pattern: which entries are free.
        values: ``pattern.values_shape``.
        gate: shape ``(1,)``; layers that share one have the same tensor.
        seed, key, bound: of the initial values (`rigsa_kernels.init`).
        alpha_init: the gate's initial value.
        ticket: how it came about.
    """

    pattern: SparsePattern
    values: Tensor
    gate: Tensor
    seed: int
    key: int
    bound: float
    alpha_init: float
    ticket: Ticket = field(default_factory=Ticket)


Snapshot = Mapping[str, LayerState]
"""Layer name to its state, in the model's order."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


PEFT_MODEL = "base_model.model."
"""Before the names in a model that PEFT is put around."""


def layers_by_name(model: nn.Module) -> dict[str, GatedSparseLinear]:
    """The gated layers by their names in the base model; under PEFT those of the active adapter."""
    return {getattr(layer, "name_in_base", name): layer for name, layer in gated_linears(model).items()}


def adapted_layers(model: nn.Module) -> dict[str, GatedSparseLinear]:
    """The gated layers of `model` by their names in the base model.

    Raises:
        ValueError: there are none, or they are in shards.
    """
    layers = layers_by_name(unwrap(model))
    if not layers:
        raise ValueError(
            f"model: expected gated sparse layers, found none in {type(model).__name__}; "
            "call replace_linears(model) or load_adapter(model, folder) first"
        )
    for name, layer in layers.items():
        if hasattr(layer.rigsa_values, "to_local"):
            raise ValueError(f"model: {name} is in shards (FSDP2), and only whole layers can be read or changed")
    return layers


def ticket_of(layer: GatedSparseLinear) -> Ticket:
    """What was written down when the layer took its pattern; of another pattern, adopted since, nothing is known."""
    if isinstance(layer.pattern_note, Ticket):
        return layer.pattern_note
    return Ticket() if layer.pattern.is_dense else Ticket(kind="given")


def note_ticket(layer: GatedSparseLinear, ticket: Ticket) -> None:
    """Write `ticket` down. It counts until the layer takes another pattern."""
    layer.pattern_note = ticket


def state_of(layer: GatedSparseLinear) -> LayerState:
    """The layer's own tensors, not copies."""
    return LayerState(
        layer.pattern,
        layer.rigsa_values.detach(),
        layer.rigsa_alpha.detach(),
        layer.seed,
        layer.key,
        layer.bound,
        layer.alpha_init,
        ticket_of(layer),
    )


def snapshot(model: nn.Module) -> dict[str, LayerState]:
    """A copy of the adapter: patterns, values and gates as they are now.

    For `rigsa.prune`, which can rewind to it, and for `rigsa.restore_snapshot`.

    Raises:
        ValueError: `model` has no gated layer.
    """
    gates: dict[int, Tensor] = {}
    taken = {}
    for name, layer in adapted_layers(model).items():
        gate = gates.setdefault(id(layer.rigsa_alpha), layer.rigsa_alpha.detach().clone())
        taken[name] = replace(state_of(layer), values=layer.rigsa_values.detach().clone(), gate=gate)
    return taken


def restore_snapshot(model: nn.Module, taken: Snapshot) -> None:
    """Put a `snapshot` back.

    Raises:
        ValueError: it has other layers than `model`, or other shapes; the model is unchanged.
    """
    layers = adapted_layers(model)
    check_names("snapshot", taken, layers)
    for name, layer in layers.items():
        if taken[name].pattern.shape != layer.pattern.shape:
            raise ValueError(
                f"snapshot: expected {list(layer.pattern.shape)} for {name}, got {list(taken[name].pattern.shape)}"
            )
    for name, layer in layers.items():
        put_state(layer, taken[name])


def check_names(argument: str, given: Iterable[str], layers: Iterable[str]) -> None:
    """Raises ValueError where `given` does not name exactly the layers of the model."""
    missing, unknown = [n for n in layers if n not in set(given)], [n for n in given if n not in set(layers)]
    if missing or unknown:
        raise ValueError(
            f"{argument}: expected the model's gated layers; {_some(missing)} missing from it, {_some(unknown)} "
            "not in the model"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) are" if names else "none is"


def same_pattern(one: SparsePattern, other: SparsePattern) -> bool:
    """Whether two patterns of one shape free the same entries in the same storage."""
    return one.equals(other)


@torch.no_grad()
def put_state(layer: GatedSparseLinear, state: LayerState) -> None:
    """Give `layer` the pattern, values and gate of `state`, and what its initial values come from."""
    adopt(layer, state.pattern, state.values)
    layer.rigsa_alpha.copy_(state.gate)
    layer.seed, layer.key, layer.bound, layer.alpha_init = state.seed, state.key, state.bound, state.alpha_init
    note_ticket(layer, state.ticket)


@torch.no_grad()
def adopt(layer: GatedSparseLinear, pattern: SparsePattern, values: Tensor | None) -> None:
    """Give `layer` another pattern, with `values`, or with its initial values where `values` is None.

    `rigsa_values` stays the same parameter where its shape allows. The gate stays as it is.
    """
    before, pattern = layer.pattern, pattern.to(layer.rigsa_values.device)
    packed = not (before.is_dense or pattern.is_dense)
    if values is not None and same_pattern(before, pattern):
        pass
    elif values is not None and packed and before.nnz == pattern.nnz:
        layer.move_pattern(pattern)
    else:
        trainable, gate, bound = layer.rigsa_values.requires_grad, layer.rigsa_alpha.detach().clone(), layer.bound
        layer.bound = bound if values is None else 0.0  # values that are given need not be drawn first
        layer.set_pattern(pattern)
        layer.bound = bound
        layer.rigsa_values.requires_grad_(trainable)
        layer.rigsa_alpha.copy_(gate)
    if values is not None:
        layer.rigsa_values.copy_(values)


def carried(values: Tensor, before: SparsePattern, after: SparsePattern) -> Tensor:
    """``after.values_shape``: of the values of `before` those that `after` keeps, and 0 where it frees more.

    No index list outlives the call, unlike those of `SparsePattern.gather`.
    """
    matrix = values
    if not before.is_dense:
        matrix = values.new_zeros(before.shape)
        matrix[before.to_mask()] = values
    return matrix.clone() if after.is_dense else matrix[after.to_mask()]
