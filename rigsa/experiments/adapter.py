"""An adapter on disk: ``mask.safetensors`` (one bit a weight) and ``adapter.safetensors`` (what was trained).

The mask alone gives a ticket at its start, as initial values come from the seed. Nothing is read from pickle.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rigsa.errors import RigsaError
from rigsa.files import write_atomically
from rigsa_kernels import SparsePattern, gated_linears

FORMAT_VERSION = 2


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter; a gate that layers share stands under each of its names."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def base_fingerprint(model: nn.Module) -> str:
    """A short hash of the frozen parameters: names, shapes and every 97th row."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith("rigsa_alpha"):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            rows = parameter.detach()[::97].clone(memory_format=torch.contiguous_format)
            digest.update(rows.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_masks(patterns: dict[str, SparsePattern], path: Path, base: str) -> None:
    """Write the patterns of layers, one bit an entry. `base` is the `base_fingerprint` of the model they belong to."""
    tensors = {name: pattern.words.cpu() for name, pattern in patterns.items() if pattern.words is not None}
    _save(tensors, path, base)


def load_masks(model: nn.Module, path: Path) -> dict[str, SparsePattern]:
    """Read what `save_masks` wrote: layer names to packed patterns.

    Raises:
        RigsaError: the file is missing, damaged, or made for other layers or another base model.
    """
    layers, base = gated_linears(model), base_fingerprint(model)
    words = _load(path, base)
    if words.keys() != layers.keys():
        raise RigsaError(f"{path} holds masks for other layers than this model's; use it with the model of its run")
    try:
        return {name: SparsePattern.from_words(words[name], layer.in_features) for name, layer in layers.items()}
    except ValueError as error:
        raise RigsaError(f"{path} is damaged: {error}") from error


def save_adapter(model: nn.Module, path: Path) -> None:
    """Write what is trained in `model`, in its dtypes: free values and gates, or PEFT's parameters."""
    tensors = {name: parameter.detach().cpu() for name, parameter in trained_parameters(model).items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 1:
            tensors[name] = tensor.clone()  # a gate that layers share: safetensors wants storages of their own
    _save(tensors, path, base_fingerprint(model))


def load_adapter(model: nn.Module, path: Path) -> None:
    """Load a file of `save_adapter` into a model that carries the adapter and whose layers have its pattern.

    Raises:
        RigsaError: the file is missing, damaged, of another base model or another pattern. The model is unchanged.
    """
    saved, wanted = read_adapter(model, path), trained_parameters(model)
    for name in {**saved, **wanted}:
        there = tuple(saved[name].shape) if name in saved else "nothing"
        here = tuple(wanted[name].shape) if name in wanted else "nothing"
        if there != here:
            raise RigsaError(f"{path} does not fit: {name} is {there} there, the model expects {here}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def read_adapter(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """What `save_adapter` wrote, as it is. Raises RigsaError where it is missing, damaged or of another base model."""
    return _load(path, base_fingerprint(model))


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


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base model computes, bit for bit. May be nested; nothing trained changes."""
    gated = [layer for layer in gated_linears(model).values() if layer.enabled]
    tuners = [tuner for tuner in _tuner_layers(model) if not tuner.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for tuner in tuners for parameter in tuner.parameters()]
    try:
        for layer in gated:
            layer.enabled = False
        for tuner in tuners:
            tuner.enable_adapters(False)
        yield
    finally:
        for layer in gated:
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
