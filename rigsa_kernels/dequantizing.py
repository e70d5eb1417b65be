"""A model in four bits becomes a plain one: its layers that carry no adapter, and what it notes about itself.

transformers notes on a model and in its configuration that it is quantised. A merged model that kept these notes would
be quantised again when it is loaded, and its adapter would be lost in the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .hooks import carry_hooks
from .linear import GatedSparseLinear
from .nf4 import dequantize, is_nf4_linear, nf4_base
from .replace import check_replaceable, swap_modules

OF_MODEL = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "_hf_peft_config_loaded")
OF_CONFIG = ("quantization_config", "_is_quantized")
"""Where transformers notes that a model is quantised. A model asks its class where it has no note of its own."""
_QUANTISED = ("quant_state", "SCB")
"""What bitsandbytes' parameters have."""
Note = tuple[dict[str, Any], str, Any]
"""The attributes of an object, and a name and value of them."""


@dataclass
class Dequantized:
    """What `dequantize_rest` replaced: layers by name, and notes."""

    layers: dict[str, nn.Module]
    notes: list[Note]


def rest_in_four_bits(model: nn.Module) -> dict[str, nn.Linear]:
    """Name to layer of the NF4 layers of `model` that carry no adapter.

    Raises:
        ValueError: a layer is quantised in another way, or cannot be decoded or replaced.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, GatedSparseLinear) or all(getattr(weight, mark, None) is None for mark in _QUANTISED):
            continue
        if not is_nf4_linear(module):
            raise ValueError(f"model: expected layers in NF4 to dequantise, got {name}, a {type(module).__name__}")
        try:
            nf4_base(module.weight)
        except ValueError as error:
            raise ValueError(f"model: {name} cannot be dequantised: {error}") from error
        found[name] = module
    check_replaceable(found)
    return found


@torch.no_grad()
def dequantize_rest(model: nn.Module, rest: dict[str, nn.Linear]) -> Dequantized:
    """Put a plain layer in the place of each of `rest`, in the dtype it computes in, and take the notes away."""
    for name, linear in rest.items():
        state: Any = linear.weight.quant_state  # type: ignore[attr-defined]
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = dequantize(nf4_base(linear.weight), tuple(state.shape), state.dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        carry_hooks(linear, plain)
        swap_modules(model, {name: plain.train(linear.training)})
    notes = list(_notes(model))
    for attributes, name, _ in notes:
        del attributes[name]
    return Dequantized(dict(rest), notes)


def quantize_rest(model: nn.Module, before: Dequantized) -> None:
    """The inverse of `dequantize_rest`."""
    for name, linear in before.layers.items():
        plain = model.get_submodule(name)
        carry_hooks(plain, linear)
        swap_modules(model, {name: linear.train(plain.training)})
    for attributes, name, value in before.notes:
        attributes[name] = value


def _notes(model: nn.Module) -> Iterator[Note]:
    seen = set[int]()
    for module in model.modules():
        config = module.__dict__.get("config")
        for owner, names in ((module, OF_MODEL), (config, OF_CONFIG)):
            attributes = getattr(owner, "__dict__", {})
            if id(attributes) not in seen:
                seen.add(id(attributes))
                yield from [(attributes, name, attributes[name]) for name in names if name in attributes]
