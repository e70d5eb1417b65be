"""An adapter on disk: ``mask.safetensors`` (one bit a weight) and ``adapter.safetensors`` (what was trained).

The mask alone gives a ticket at its start, as initial values come from the seed. Nothing is read from pickle.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rigsa.errors import RigsaError
from rigsa.experiments.records import PRUNING, read_record
from rigsa.experiments.run_folder import MASK_FILE, PRUNING_FILE
from rigsa.files import parse_json, require_regular, write_atomically
from rigsa_kernels import SparsePattern, gated_linears, restore_weights
from rigsa_kernels.format import WORD_BITS

FORMAT_VERSION = 3
TILES = "tiles"
"""In a mask file's head: layer name to the size of its tiles, where a layer has some."""
Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name to shape and dtype of the tensors of a file."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter; a gate that layers share stands under each of its names."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def base_fingerprint(model: nn.Module) -> str:
    """A short hash of the frozen parameters: names, shapes and every 97th row."""
    digest = hashlib.sha256()
    restore_weights(model)  # of tickets, which compose into their weights
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith("rigsa_alpha"):
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            rows = parameter.detach()[::97].clone(memory_format=torch.contiguous_format)
            digest.update(rows.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_masks(patterns: dict[str, SparsePattern], path: Path, base: str) -> None:
    """Write the patterns of layers, one bit an entry, and in the file's head the tiles that they are made of.

    `base` is the `base_fingerprint` of the model they belong to.
    """
    tiles = {name: f"{pattern.tile[0]}x{pattern.tile[1]}" for name, pattern in patterns.items() if pattern.tile}
    _save(_words(patterns), path, base, {TILES: tiles} if tiles else {})


def masks_hash(patterns: dict[str, SparsePattern]) -> str:
    """The hash that a file with these masks carries."""
    return tensors_hash(_words(patterns))


def _words(patterns: dict[str, SparsePattern]) -> dict[str, Tensor]:
    return {name: pattern.words.cpu() for name, pattern in patterns.items() if pattern.words is not None}


def load_masks(model: nn.Module, path: Path, content: str | None = None) -> dict[str, SparsePattern]:
    """Read what `save_masks` wrote: layer names to patterns.

    Args:
        model: with gated layers.
        path: of the file.
        content: the hash that a record beside the file names (`masks_hash`); None where there is none.

    Raises:
        RigsaError: the file is missing, damaged, not the one that is recorded, or made for other layers or another
            base model.
    """
    layers = gated_linears(model)
    expected = {name: ((-(-layer.in_features // WORD_BITS), layer.out_features), torch.int32)
                for name, layer in layers.items()}  # fmt: skip
    words = _load(path, base_fingerprint(model), expected, content)
    tiles = _head(path).get(TILES, {})
    try:
        if not isinstance(tiles, dict) or not all(isinstance(tile, str) for tile in tiles.values()):
            raise ValueError("tiles: expected the size of each layer's")
        patterns = {
            name: _in_tiles(SparsePattern.from_words(words[name], layer.in_features), tiles.get(name))
            for name, layer in layers.items()
        }
    except ValueError as error:
        raise RigsaError(f"{path} is damaged: {error}") from error
    for name, pattern in patterns.items():
        if pattern.nnz == 0:
            raise RigsaError(f"{path} is damaged: no entry of {name} is free; expected at least one in every layer")
    return patterns


def _in_tiles(pattern: SparsePattern, tile: str | None) -> SparsePattern:
    return pattern if tile is None else SparsePattern.from_mask(pattern.to_mask(), tile)


def load_ticket(model: nn.Module, level: Path) -> dict[str, SparsePattern]:
    """The masks in a level's folder, for `model`'s layers.

    Raises:
        RigsaError: as `load_masks`, or they are not those that the record of their choice names.
    """
    record = read_record(level / PRUNING_FILE, PRUNING)
    patterns = load_masks(model, level / MASK_FILE, record["mask"])
    kept = sum(pattern.nnz for pattern in patterns.values())
    if kept != record["kept"]:
        raise RigsaError(
            f"{level / MASK_FILE} has {kept} free entries, but {PRUNING_FILE} beside it says {record['kept']}; delete "
            f"{level} and run again"
        )
    return patterns


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
    wanted = trained_parameters(model)
    saved = read_adapter(model, path, {name: tuple(parameter.shape) for name, parameter in wanted.items()})
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def read_adapter(model: nn.Module, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read what `save_adapter` wrote, as it is: parameters with the names and dtypes of `model`'s, and these shapes.

    Raises:
        RigsaError: the file is missing, damaged, of another base model or does not fit, or a number in it is not
            finite.
    """
    dtypes = {name: parameter.dtype for name, parameter in trained_parameters(model).items()}
    expected = {name: (shape, dtypes[name]) for name, shape in shapes.items()}
    tensors = _load(path, base_fingerprint(model), expected)
    for name, tensor in tensors.items():
        if not_finite := int((~tensor.isfinite()).sum()):
            raise RigsaError(f"{path} is damaged: {not_finite} of {tensor.numel()} numbers in {name} are not finite")
    return tensors


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, base: str, more: Mapping[str, object] | None = None) -> None:
    # One entry, as safetensors orders several at random, and equal runs write equal files.
    entry = {"version": FORMAT_VERSION, "base": base, "content": tensors_hash(tensors), **(more or {})}
    metadata = {"rigsa": json.dumps(entry)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error

    write_atomically(path, write)


def _load(path: Path, base: str, expected: Expected, content: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, once all of it fits: version, base, names, shapes, dtypes, hash."""
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            entry = _entry(file.metadata(), path)
            _check_base(entry, base, path)
            _check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, expected, path)  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise RigsaError(f"{path} is damaged ({error}); delete its folder and run again") from error
    for name, (_, dtype) in expected.items():
        if tensors[name].dtype != dtype:
            raise RigsaError(f"{path} does not fit: {name} is {tensors[name].dtype} there, the model expects {dtype}")
    found = tensors_hash(tensors)
    if found != entry.get("content"):
        raise RigsaError(f"{path} is damaged (its content does not have the hash that it names); delete its folder "
                         "and run again")  # fmt: skip
    if content is not None and found != content:
        raise RigsaError(f"{path} is not the file that the record beside it names; delete their folder and run again")
    return tensors


def _head(path: Path) -> dict[str, Any]:
    """What a file that `_load` has read says of itself."""
    with safe_open(path, framework="pt") as file:
        return _entry(file.metadata(), path)


def _entry(metadata: dict[str, str] | None, path: Path) -> dict[str, Any]:
    text = (metadata or {}).get("rigsa")
    entry = parse_json(text, f"{path}, its metadata,") if text is not None else None
    if not isinstance(entry, dict) or entry.get("version") != FORMAT_VERSION:
        raise RigsaError(f"{path}: expected a rigsa file of version {FORMAT_VERSION}, got {entry or 'another file'}")
    return entry


def _check_base(entry: dict[str, Any], base: str, path: Path) -> None:
    if entry.get("base") != base:
        raise RigsaError(f"{path} belongs to another base model (its weights differ from this model's)")


def _check_shapes(found: Mapping[str, tuple[int, ...]], expected: Expected, path: Path) -> None:
    for name in {**found, **expected}:
        there = found.get(name, "nothing")
        here = expected[name][0] if name in expected else "nothing"
        if there != here:
            raise RigsaError(f"{path} does not fit: {name} is {there} there, the model expects {here}")


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
