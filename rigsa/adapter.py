"""An adapter on disk: ``mask.safetensors`` (one bit a weight) and ``adapter.safetensors`` (free values and gates).

The mask alone gives a ticket at its start, as initial values come from the seed. Nothing is read from pickle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rigsa.errors import RigsaError
from rigsa.files import write_atomically
from rigsa_kernels import SparsePattern, gated_linears

ADAPTER_FILE = "adapter.safetensors"
MASK_FILE = "mask.safetensors"
FORMAT_VERSION = 1


def base_fingerprint(model: nn.Module) -> str:
    """A short hash of the frozen weights under the adapter: names, shapes and every 97th row."""
    digest = hashlib.sha256()
    for name, layer in gated_linears(model).items():
        digest.update(f"{name}{tuple(layer.weight.shape)}{layer.weight.dtype}".encode())
        digest.update(layer.weight[::97].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_masks(patterns: dict[str, SparsePattern], path: Path, base: str) -> None:
    """Layer names to packed patterns. `base` is the `base_fingerprint` of the model they belong to."""
    tensors = {name: pattern.words.cpu() for name, pattern in patterns.items() if pattern.words is not None}
    _save(tensors, path, base)


def load_masks(model: nn.Module, path: Path) -> dict[str, SparsePattern]:
    """Raises RigsaError where the file is missing, damaged, or made for other layers or another base model."""
    layers, base = gated_linears(model), base_fingerprint(model)
    words = _load(path, base)
    if words.keys() != layers.keys():
        raise RigsaError(f"{path} holds masks for other layers than this model's; use it with the model of its run")
    try:
        return {name: SparsePattern.from_words(words[name], layer.in_features) for name, layer in layers.items()}
    except ValueError as error:
        raise RigsaError(f"{path} is damaged: {error}") from error


def save_adapter(model: nn.Module, path: Path) -> None:
    """The free values and gates of `model`, in their dtypes."""
    tensors = {name: parameter.detach().cpu() for name, parameter in _trained(model).items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 1:
            tensors[name] = tensor.clone()  # a gate that layers share: safetensors wants storages of their own
    _save(tensors, path, base_fingerprint(model))


def load_adapter(model: nn.Module, path: Path) -> None:
    """Into layers that already carry the pattern (`GatedSparseLinear.set_pattern`).

    Raises:
        RigsaError: the file is missing, damaged, of another base model or another pattern. The model is unchanged.
    """
    saved, wanted = _load(path, base_fingerprint(model)), _trained(model)
    for name in {**saved, **wanted}:
        there = tuple(saved[name].shape) if name in saved else "nothing"
        here = tuple(wanted[name].shape) if name in wanted else "nothing"
        if there != here:
            raise RigsaError(f"{path} does not fit: {name} is {there} there, the model expects {here}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{parameter_name}": getattr(layer, parameter_name)
        for name, layer in gated_linears(model).items()
        for parameter_name in ("rigsa_values", "rigsa_alpha")
    }


def _save(tensors: dict[str, Tensor], path: Path, base: str) -> None:
    # One entry, as safetensors orders several at random, and equal runs write equal files.
    metadata = {"rigsa": json.dumps({"version": FORMAT_VERSION, "base": base})}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error

    write_atomically(path, write)


def _load(path: Path, base: str) -> dict[str, Tensor]:
    if not path.exists():
        raise RigsaError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("rigsa", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise RigsaError(f"{path} is damaged ({error}); delete its folder and run again") from error
    if metadata.get("version") != FORMAT_VERSION:
        raise RigsaError(f"{path}: expected a rigsa file of version {FORMAT_VERSION}, got {metadata or 'another file'}")
    if metadata.get("base") != base:
        raise RigsaError(f"{path} belongs to another base model (its weights differ from this model's)")
    return tensors
