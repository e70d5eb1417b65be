"""Which parameters are gates, and which are values, asked by identity: an optimiser may be given them without names.
And which a layer has let go of, so that an optimiser of any kind that still holds one says so at its next step.

A gated layer knows its own parameters at any time, also where FSDP has put shards in their place or a copy of the model
was made. A mark on the parameter would be lost there.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .in_place import living_layers

GATE, VALUES = "rigsa_alpha", "rigsa_values"


def parameters_called(attribute: str) -> set[int]:
    """The identities of the parameters that gated layers hold under this name, `GATE` or `VALUES`."""
    return {id(found) for layer in living_layers() if (found := layer._parameters.get(attribute)) is not None}


def decayed_gates(groups: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Number and weight decay of the groups of an optimiser that decay gates as they decay other parameters.

    A group of gates alone was made for them, so its decay is wanted.
    """
    gates: set[int] | None = None
    found = []
    for number, group in enumerate(groups):
        decay = group.get("weight_decay", 0.0)
        if not isinstance(decay, int | float) or decay == 0:
            continue
        gates = parameters_called(GATE) if gates is None else gates
        among: list[Tensor] = [param for param in group["params"] if id(param) in gates]
        if 0 < len(among) < len(group["params"]):
            found.append((number, float(decay)))
    return found


def how_to_spare_gates(found: tuple[int, float]) -> str:
    """What an error or a warning says of one that `decayed_gates` found."""
    number, decay = found
    return (
        f"weight_decay: {decay} of group {number} would pull the gates in it to the closed position; give the "
        "optimiser rigsa.parameter_groups(model) in place of parameters, under a Trainer as optimizer_cls_and_kwargs="
        f"(torch.optim.AdamW, {{'params': rigsa.parameter_groups(model), 'lr': ..., 'weight_decay': {decay}}})"
    )


_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _warn_of_decayed_gates(optimizer: Optimizer, *_: object) -> None:
    """At the first step of every optimiser."""
    if optimizer not in _seen:
        _seen.add(optimizer)
        for found in decayed_gates(optimizer.param_groups):
            warnings.warn(how_to_spare_gates(found), stacklevel=4)


register_optimizer_step_pre_hook(_warn_of_decayed_gates)


_left = WeakIdKeyDictionary()


def has_left(parameter: Tensor, layer: str) -> None:
    """Note that `layer`, in words, holds another parameter from here on in place of `parameter`."""
    _left[parameter] = layer


def _refuse_what_has_left(optimizer: Optimizer, *_: object) -> None:
    """Before every step of every optimiser but ours, which asks the layers themselves."""
    if not len(_left) or getattr(optimizer, "asks_layers", False):
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    lost = [_left[param] for param in params if param in _left]
    if lost:
        raise ValueError(
            f"params: {len(lost)} of {len(params)} parameters are no longer those of the model (of {lost[0]}"
            f"{', ...' if len(lost) > 1 else ''}), which took another pattern; make a new optimiser"
        )


register_optimizer_step_pre_hook(_refuse_what_has_left)
