"""Whether an adapter stands on the base model that it was trained on, whatever the dtype of that base.

The fingerprint of a layer is a sample of its frozen weights in bfloat16, at places that its shape determines. Layers
that carry no adapter have none, so a resized embedding changes nothing. Between float32, bfloat16 and float16 a sampled
weight moves by a rounding. NF4 moves it by up to a tenth of its block's largest weight, so a base in four bits is
compared as a whole: another model's weights are farther away than that by far, those of a light fine-tuning are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.nf4 import dequantize, is_nf4_linear, nf4_base

SAMPLES = 32
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDED = 2.0**-7
"""Relative difference that two roundings to eight bits leave, and no more."""
_QUANTISED = 0.3
"""Relative distance of all samples: NF4 leaves about 0.1, weights that have nothing to do with each other 1.4."""


@dataclass(frozen=True)
class Fingerprint:
    """Of one frozen matrix.

    Attributes:
        sample: some weights in hexadecimal, four digits each.
        nf4: whether it was decoded from four or eight bits.
    """

    sample: str
    nf4: bool


def fingerprint(place: nn.Module | Tensor) -> Fingerprint:
    """Of the frozen weight of a layer, adapted or not, or of a weight."""
    with torch.no_grad():
        matrix, nf4 = _matrix(place)
        if matrix.numel() == 0:
            return Fingerprint("", nf4)
        places = [(number * _GOLDEN % 2**64) * matrix.numel() >> 64 for number in range(SAMPLES)]
        chosen = matrix.reshape(-1)[torch.tensor(places, device=matrix.device)]
        bits = chosen.to(torch.bfloat16).view(torch.int16).tolist()
    return Fingerprint("".join(f"{number & 0xFFFF:04x}" for number in bits), nf4)


def _matrix(module: nn.Module | Tensor) -> tuple[Tensor, bool]:
    if isinstance(module, Tensor):
        return module, False
    if isinstance(module, GatedSparseLinear):
        return module.frozen_matrix(), module.is_nf4 or getattr(module, "is_quantised", False)
    assert isinstance(module, nn.Linear)
    if is_nf4_linear(module):
        state = module.weight.quant_state  # type: ignore[attr-defined]
        return dequantize(nf4_base(module.weight), tuple(state.shape), state.dtype), True
    return module.weight, False


def base_name(model: nn.Module) -> str:
    """What transformers calls the model; empty where it was made without a name, or not by transformers."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def base_differences(
    saved_name: str, saved: Mapping[str, Fingerprint], model: nn.Module, layers: Mapping[str, nn.Module | Tensor]
) -> list[str]:
    """What tells the base model of an adapter from `model`, in words; empty where nothing does.

    Args:
        saved_name, saved: name of the adapter's base, and the fingerprints of its layers.
        model: the model to stand on.
        layers: what holds the frozen weights of these layers in `model`.
    """
    found = []
    here = base_name(model)
    if saved_name and here and _last_part(saved_name) != _last_part(here):
        found.append(f"its base is named {saved_name!r}, this model {here!r}")
    differing = {name: why for name, layer in layers.items() if (why := _difference(saved[name], fingerprint(layer)))}
    if differing:
        name, why = next(iter(differing.items()))
        found.append(f"the frozen weights of {len(differing)} of {len(layers)} layers differ ({name}: {why})")
    return found


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


def _difference(saved: Fingerprint, here: Fingerprint) -> str:
    one, other = _numbers(saved.sample), _numbers(here.sample)
    if saved.nf4 or here.nf4:
        distance = (torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one).clamp(min=1e-30)).item()
        return "" if distance <= _QUANTISED else f"sampled weights are {distance:.2f} of their size apart"
    largest = torch.maximum(one.abs(), other.abs())
    off = int(((one - other).abs() > _ROUNDED * largest + 1e-7).sum())
    return f"{off} of {len(one)} sampled weights" if off else ""


def _numbers(sample: str) -> Tensor:
    """float32 ``[SAMPLES]`` from four hexadecimal digits each."""
    words = [int(sample[begin : begin + 4], 16) for begin in range(0, len(sample), 4)]
    signed = [word - 2**16 if word >= 2**15 else word for word in words]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
