"""Where in a model the layers of a saved adapter stand: on the layers that it carries, or on those that it could carry.

A gated layer has the name of the linear layer in whose place it stands. One that code reads (`GatedSparseWeight`) is a
child, ``OWNER.rigsa_PARAMETER``, and `replace_linears` selects it as ``OWNER.PARAMETER``, or as ``OWNER`` where the
parameter is called ``weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from rigsa.record import Record
from rigsa.state import PEFT_MODEL, adapted_layers, layers_by_name
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.parametrized import PREFIX
from rigsa_kernels.replace import gated_linears, replace_linears
from rigsa_kernels.selection import select_linears, select_weights

Place = nn.Module | Tensor
"""What holds the frozen weight of a layer: the gated layer, the linear layer, or the parameter that is read."""


def places_of(record: Record, model: nn.Module) -> dict[str, Place]:
    """Layer name to what holds its frozen weight in `model`.

    Raises:
        ValueError: `model` carries an adapter on other layers, cannot carry one on these, or they do not fit.
    """
    adapted = layers_by_name(model)
    if adapted:
        adapted_layers(model)  # refuses shards
        _check_same_layers(record, adapted)
        _check_gates(record, adapted)
        places: dict[str, Place] = dict(adapted)
    else:
        places = _places_to_be(record, model)
    for name, layer in record.layers.items():
        here = _shape(places[name])
        if layer.shape != here:
            raise ValueError(f"{name} is {list(layer.shape)} in the adapter and {list(here)} in the model")
        if name in adapted:
            _check_dtype(name, layer.values_dtype, adapted[name].rigsa_values)
    _check_parameters(record, model)
    return places


def _check_same_layers(record: Record, adapted: Mapping[str, GatedSparseLinear]) -> None:
    for name in {**record.layers, **adapted}:
        if name not in adapted or name not in record.layers:
            side = "the model carries no adapter there" if name in record.layers else "the adapter has none there"
            raise ValueError(
                f"the model carries an adapter on other layers ({name}: {side}); restore_linears(model) takes it off"
            )


def _check_gates(record: Record, adapted: Mapping[str, GatedSparseLinear]) -> None:
    saved: dict[int, str] = {}
    here: dict[int, str] = {}
    for name, layer in record.layers.items():
        first, mine = saved.setdefault(layer.gate, name), here.setdefault(id(adapted[name].rigsa_alpha), name)
        if first != mine:
            raise ValueError(f"{name} shares its gate with other layers in the adapter than in the model")


def _check_dtype(name: str, saved: str, here: Tensor) -> None:
    if torch.promote_types(getattr(torch, saved), here.dtype) != here.dtype:
        raise ValueError(f"{name} is in {saved}, which {here.dtype} in the model would round")


def _check_parameters(record: Record, model: nn.Module) -> None:
    """Of the parameters that are trained beside the layers."""
    here = parameters_by_name(model)
    for name, parameter in record.parameters.items():
        if name not in here:
            raise ValueError(f"{name}, trained beside the adapter, is not in {type(model).__name__}")
        if tuple(here[name].shape) != parameter.shape:
            shapes = f"{list(parameter.shape)} in the adapter and {list(here[name].shape)} in the model"
            raise ValueError(f"{name}, trained beside the adapter, is {shapes}")
        _check_dtype(name, parameter.dtype, here[name])


def _shape(place: Place) -> tuple[int, int]:
    if isinstance(place, Tensor):
        return place.numel() // place.shape[-1], place.shape[-1]
    return int(place.out_features), int(place.in_features)  # type: ignore[arg-type]


def selection_name(name: str) -> str:
    """What `replace_linears` calls a gated layer."""
    owner, _, child = name.rpartition(".")
    if not child.startswith(PREFIX):
        return name
    parameter = child.removeprefix(PREFIX)
    return owner if parameter == "weight" else f"{owner}.{parameter}".removeprefix(".")


def _places_to_be(record: Record, model: nn.Module) -> dict[str, Place]:
    names = {selection_name(name): name for name in record.layers}
    read = {short for short, name in names.items() if short != name}
    linears, skipped = select_linears(model, lambda name, _: name in names, ())
    weights, others = select_weights(model, linears, lambda name, _: name in names, (), by_weight=_named(read))
    places: dict[str, Place] = {}
    for short, name in names.items():
        if short in read and short in weights:
            places[name] = weights[short].parameter
        elif short in linears and short not in read and short not in weights:
            places[name] = linears[short]
        else:
            reason = dict([*skipped, *others]).get(short, "it has no layer of this name that can be adapted so")
            raise ValueError(f"{type(model).__name__} cannot carry it on {short}: {reason}")
    return places


def _named(names: set[str]) -> Any:
    return lambda name, _: name in names


def build_layers(model: nn.Module, record: Record, patterns: Mapping[str, SparsePattern]) -> None:
    """Gated layers as the record says, with zeros for values, and gates shared as they were; all else frozen.

    `places_of` has been asked before.
    """
    alike: dict[tuple[Any, ...], dict[str, str]] = {}
    for name, layer in record.layers.items():
        options = (layer.seed, layer.alpha_init, layer.values_dtype, layer.numerics, selection_name(name) != name)
        alike.setdefault(options, {})[selection_name(name)] = name
    for (seed, alpha_init, values_dtype, numerics, is_read), names in alike.items():
        replace_linears(
            model,
            _named(set(names)),
            by_weight=_named(set(names)) if is_read else (),
            pattern=_pattern_of(names, patterns),
            seed=seed,
            alpha_init=alpha_init,
            init_scale=0.0,  # the values are read, so none need be drawn
            values_dtype=getattr(torch, values_dtype),
            numerics=numerics,
        )
    layers = gated_linears(model)
    gates: dict[int, nn.Parameter] = {}
    for name, layer in record.layers.items():
        gate = gates.setdefault(layer.gate, layers[name].rigsa_alpha)
        layers[name].rigsa_alpha = gate
        for parameter in (gate, layers[name].rigsa_values):
            parameter.requires_grad_(True)
    for name in record.parameters:
        model.get_parameter(name).requires_grad_(True)


def _pattern_of(names: Mapping[str, str], patterns: Mapping[str, SparsePattern]) -> Any:
    return lambda name, _: patterns[names[name]]


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters beside the gated layers that are trained, or were when the model was adapted: a new head."""
    noted: set[str] = getattr(model, "_rigsa_trained", set())
    return {
        name: parameter
        for name, parameter in parameters_by_name(model).items()
        if (parameter.requires_grad or name in noted) and not name.rpartition(".")[2].startswith(PREFIX)
    }


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` by their names in the base model. Of a module that PEFT trains as it is
    (modules_to_save) it is the copy that is trained."""
    found = {}
    for name, parameter in model.named_parameters():
        before, is_copy, after = name.partition(".modules_to_save.")
        if is_copy:
            name = f"{before}.{after.partition('.')[2]}"
        if ".original_module." not in name:
            found[name.removeprefix(PEFT_MODEL)] = parameter
    return found
