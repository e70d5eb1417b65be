"""Adapters of PEFT as gated ones: what SHiRA and Super-Tuning have trained, and what RIGSA has trained under PEFT.

A difference of PEFT's is one with a gate of 1 and initial values of 0. Training, pruning and merging go on from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor

from rigsa import saving
from rigsa.peft_format import CONFIG_FILE, CONTAINER, PARTS, PREFIX, TENSORS_FILE, parse_layer
from rigsa.record import MOST_BYTES, from_json
from rigsa.saving import naming
from rigsa.state import PEFT_MODEL, Ticket, adopt, note_ticket
from rigsa.tensor_files import open_regular
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.replace import gated_linears, replace_linears
from rigsa_kernels.selection import select_linears


@dataclass(frozen=True)
class _Difference:
    """One layer: which entries are free, their values, the gate, and how the pattern came about."""

    pattern: SparsePattern
    values: Tensor
    gate: Tensor
    ticket: Ticket


def import_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put an adapter that PEFT saved onto `model`, in place, as gated sparse layers; everything else is frozen.

    Args:
        model: a bare base model.
        folder: of SHiRA, of Super-Tuning without a low-rank part, or of RIGSA.

    Raises:
        RigsaError: a file is missing, damaged or a pickle, the method is another one, or the adapter does not fit
            `model`, which is unchanged.
        ValueError: `model` carries an adapter already.
    """
    if gated_linears(model):
        raise ValueError("model: expected a bare base model, got one with gated sparse layers; restore_linears(model)")
    folder = Path(folder)
    with naming(folder):
        config = _read_config(folder)
        tensors = _read_tensors(folder)
        differences, beside = _differences(model, config, tensors)
        modules = _check_beside(model, config, beside)
        first = config if config["peft_type"] == "RIGSA" else {}
        replace_linears(
            model,
            lambda name, _: name in differences,
            modules_to_save=modules,
            pattern=lambda name, _: differences[name].pattern,
            seed=first.get("seed", 0),
            alpha_init=first.get("alpha_init", 1.0),
            init_scale=0.0,
            values_dtype=next(iter(differences.values())).values.dtype,
        )
    scale = first.get("init_scale", 0.0)
    for name, layer in gated_linears(model).items():
        layer.bound = scale / layer.in_features**0.5
        adopt(layer, layer.pattern, differences[name].values)
        note_ticket(layer, differences[name].ticket)
        with torch.no_grad():
            layer.rigsa_alpha.copy_(differences[name].gate)
    with torch.no_grad():
        for name, tensor in beside.items():
            model.get_parameter(name).copy_(tensor)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        if not folder.exists():
            raise ValueError("there is no such folder")
        if (folder / saving.CONFIG_FILE).exists():
            raise ValueError(f"save_adapter wrote it ({saving.CONFIG_FILE}); write rigsa.load_adapter(model, folder)")
        raise ValueError(f"it has no {CONFIG_FILE}, which PEFT's save_pretrained writes")
    with open_regular(path, MOST_BYTES) as file:
        config = from_json(file.read())
    if config.get("peft_type") not in ("SHIRA", "SUPERTUNING", "RIGSA"):
        raise ValueError(f"peft_type: expected SHIRA, SUPERTUNING or RIGSA, got {str(config.get('peft_type'))[:50]!r}")
    if config["peft_type"] == "SUPERTUNING" and config.get("r") is not None:
        raise ValueError("r: it has a low-rank part, which is no sparse difference; merge it with PEFT")
    for name in ("seed", "alpha_init", "init_scale"):
        number = config.get(name, 0)
        if type(number) not in ((int,) if name == "seed" else (int, float)) or not abs(number) < 2**64:
            raise ValueError(f"{name}: expected a number, got {str(number)[:50]!r}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise ValueError(
            "its tensors are in a pickle, which is never read; have PEFT save them as safetensors"
            if pickled
            else f"{TENSORS_FILE} is missing"
        )
    open_regular(path).close()
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name.removeprefix(PEFT_MODEL): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _differences(
    model: nn.Module, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, _Difference], dict[str, Tensor]]:
    """By layer, and the tensors that belong to no layer."""
    found: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    ends = {"SHIRA": "shira_", "SUPERTUNING": "supertuning_", "RIGSA": PREFIX}[config["peft_type"]]
    for key, tensor in tensors.items():
        owner, _, part = key.rpartition(".")
        if part.startswith(ends):
            found.setdefault(owner.removesuffix(f".{CONTAINER}"), {})[part.removeprefix(ends)] = tensor
        else:
            beside[key] = tensor
    if not found:
        raise ValueError(f"{TENSORS_FILE} has no tensor of the method")
    linears, skipped = select_linears(model, lambda name, _: name in found, ())
    for name in found:
        if name not in linears:
            reason = dict(skipped).get(name, "it has no linear layer of this name")
            raise ValueError(f"{type(model).__name__} cannot carry it on {name}: {reason}")
    read = _from_rigsa if config["peft_type"] == "RIGSA" else _from_places
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return {name: read(name, shapes[name], parts) for name, parts in found.items()}, beside


def _from_rigsa(name: str, shape: tuple[int, int], parts: dict[str, Tensor]) -> _Difference:
    if "values" not in parts or "alpha" not in parts or tuple(parts["alpha"].shape) != (1,):
        raise ValueError(f"{name}: expected values and a gate, got {', '.join(parts)}")
    values = _finite(name, parts["values"])
    try:
        pattern, ticket = parse_layer(shape, {part: parts[part] for part in PARTS if part in parts}, values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return _Difference(pattern, values, _finite(name, parts["alpha"]), ticket)


def _from_places(name: str, shape: tuple[int, int], parts: dict[str, Tensor]) -> _Difference:
    """Of SHiRA, whose places are rows and columns, or of Super-Tuning, whose places are numbered."""
    indices, values = parts.get("indices"), parts.get("weight", parts.get("values"))
    if indices is None or values is None:
        raise ValueError(f"{name}: its file has no indices; have PEFT save it with them (save_precomputed_indices)")
    values = _finite(name, values).float()
    if values.dim() != 1 or indices.dim() not in (1, 2) or indices.shape != (*[2] * (indices.dim() - 1), len(values)):
        raise ValueError(f"{name}: expected a place for each value, got {list(indices.shape)}, {list(values.shape)}")
    rows, columns = shape
    places = indices.long()
    if indices.dim() == 2:
        inside = (places >= 0).all() and (places[0] < rows).all() and (places[1] < columns).all()
        places = places[0] * columns + places[1]
    else:
        inside = (places >= 0).all() and (places < rows * columns).all()
    if not bool(inside):
        raise ValueError(f"{name}: a place is outside of {list(shape)}")
    matrix = torch.zeros(rows * columns).index_add_(0, places, values)  # PEFT adds up what has one place
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[places] = True
    if not bool(mask.any()):
        raise ValueError(f"{name}: it has no entry")
    pattern = SparsePattern.from_mask(mask.view(shape))
    return _Difference(pattern, matrix[mask], torch.ones(1), Ticket(kind="given"))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
    return tensor


def _check_beside(model: nn.Module, config: Mapping[str, Any], beside: Mapping[str, Tensor]) -> list[str]:
    """The modules that are trained as they are. Raises ValueError where one of their tensors does not fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in beside.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"{name}: {type(model).__name__} has no parameter {list(tensor.shape)} of this name")
        _finite(name, tensor)
    return sorted({name.rpartition(".")[0] for name in beside})
