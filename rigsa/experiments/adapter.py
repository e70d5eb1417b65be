"""An adapter on disk: ``mask.safetensors`` (one bit a weight) and ``adapter.safetensors`` (what was trained).

The mask alone gives a ticket at its start, as initial values come from the seed. Nothing is read from pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rigsa.encoding import Layout
from rigsa.errors import RigsaError
from rigsa.experiments.records import AMOUNT, PRUNING, Fields, MapOf, read_record
from rigsa.experiments.run_folder import ADAPTER_FILE, MASK_FILE, METRICS_FILE, PRUNING_FILE
from rigsa.files import parse_json, require_regular
from rigsa.tensor_files import differing, read_header, write_tensors
from rigsa_kernels import SparsePattern, gated_linears, restore_weights
from rigsa_kernels.format import WORD_BITS, popcount
from rigsa_kernels.roles import GATE

FORMAT_VERSION = 3
TILES = "tiles"
"""In a mask file's head: layer name to the size of its tiles, where a layer has some."""
MASK = "mask"
"""In an adapter file's head: the hash of the masks that its values belong to (`masks_hash`)."""
HEAD = {"version", "base", "content", TILES, MASK}
"""What a file's head may name. A damaged name would otherwise pass for one that is not there."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter. A gate that layers share stands under each of its names, any other one under its first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and (name.endswith(GATE) or first[id(parameter)] == name)
    }


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
    expected: Layout = {name: (torch.int32, (-(-layer.in_features // WORD_BITS), layer.out_features))
                for name, layer in layers.items()}  # fmt: skip
    words = _load(path, base_fingerprint(model), expected, content)
    try:
        patterns = _patterns(words, {name: layer.in_features for name, layer in layers.items()}, _head(path))
    except ValueError as error:
        raise RigsaError(f"{path} is damaged: {error}") from error
    for name, pattern in patterns.items():
        if pattern.nnz == 0:
            raise RigsaError(f"{path} is damaged: no entry of {name} is free; expected at least one in every layer")
    return patterns


def _patterns(
    words: Mapping[str, Tensor], columns: Mapping[str, int], head: Mapping[str, Any]
) -> dict[str, SparsePattern]:
    """The patterns of these bit masks, of tiles where the file's head names their size."""
    tiles = head.get(TILES, {})
    if not isinstance(tiles, dict) or not all(isinstance(tile, str) for tile in tiles.values()):
        raise ValueError("tiles: expected the size of each layer's")
    found = {name: SparsePattern.from_words(own, columns[name]) for name, own in words.items()}
    return {
        name: SparsePattern.from_mask(pattern.to_mask(), tiles[name]) if name in tiles else pattern
        for name, pattern in found.items()
    }


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


def level_patterns(level: Path) -> dict[str, SparsePattern]:
    """Layer name to pattern, from a finished level's folder alone.

    A mask does not say how many columns a layer has; they follow from the layer's density in the metrics.

    Raises:
        RigsaError: a file is missing or damaged, or the level has no gated layers.
    """
    densities = read_record(level / METRICS_FILE, Fields({}, {"layer_density": MapOf(AMOUNT)})).get("layer_density")
    if not densities:
        raise RigsaError(f"{level}: expected a level of gated layers, got one of another adapter")
    if not (level / MASK_FILE).exists():
        return _dense_patterns(level / ADAPTER_FILE, densities)
    path, content = level / MASK_FILE, read_record(level / PRUNING_FILE, PRUNING)["mask"]
    words = _load(path, None, _layout_of(path, densities), content)
    try:
        return _patterns(words, {name: _columns(words[name], densities[name]) for name in words}, _head(path))
    except (ValueError, RuntimeError) as error:
        raise RigsaError(f"{path} does not fit {METRICS_FILE} beside it: {error}") from error


def _layout_of(path: Path, names: Iterable[str]) -> Layout:
    """The tensors in a file that are called `names`."""
    require_regular(path)
    try:
        found = read_header(path, {name: (torch.int32, ()) for name in (*names, "rigsa_alpha")})[1]
    except (OSError, ValueError) as error:
        raise RigsaError(f"{path} is damaged ({error}); delete its folder and run again") from error
    missing = [name for name in names if len(found.get(name, ((), ()))[1]) != 2]
    if missing:
        raise RigsaError(f"{path} is damaged (expected a matrix for {missing[0]}); delete its folder and run again")
    return found


def _columns(words: Tensor, density: float) -> int:
    rows, free = words.shape[1], int(popcount(words).sum())
    return round(free / max(rows * density, 1e-9))


def _dense_patterns(path: Path, densities: Mapping[str, float]) -> dict[str, SparsePattern]:
    names = {f"{name}.rigsa_values": name for name in densities}
    found = _layout_of(path, names)
    return {name: SparsePattern.dense(*found[tensor][1]) for tensor, name in names.items()}


def save_adapter(model: nn.Module, path: Path) -> None:
    """Write what is trained in `model`, in its dtypes: free values and gates, or PEFT's parameters.

    The file's head has the hash of the masks of gated layers, as values alone do not say which entries they are.
    """
    tensors = {name: parameter.detach().cpu() for name, parameter in trained_parameters(model).items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 1:
            tensors[name] = tensor.clone()  # a gate that layers share: safetensors wants storages of their own
    patterns = _patterns_of(model)
    _save(tensors, path, base_fingerprint(model), {MASK: masks_hash(patterns)} if patterns else {})


def _patterns_of(model: nn.Module) -> dict[str, SparsePattern]:
    return {name: layer.pattern for name, layer in gated_linears(model).items()}


def load_adapter(model: nn.Module, path: Path) -> None:
    """Load a file of `save_adapter` into a model that carries the adapter and whose layers have its pattern.

    The file holds no pattern, only its hash: its folder has it in a file of its own, which the caller puts on the model
    first. Files of earlier versions have no hash, and are told by the number of entries alone.

    Raises:
        RigsaError: the file is missing, damaged, of another base model or of another pattern. The model is unchanged.
    """
    wanted = trained_parameters(model)
    saved = read_adapter(model, path, {name: tuple(parameter.shape) for name, parameter in wanted.items()})
    if _head(path).get(MASK) not in (None, masks_hash(_patterns_of(model))):
        raise RigsaError(f"{path} does not fit: its values belong to another mask than the model's layers have")
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
    expected = {name: (dtypes[name], shape) for name, shape in shapes.items()}
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
    write_tensors(path, tensors, {"rigsa": json.dumps(entry)})


def _load(path: Path, base: str | None, expected: Layout, content: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, once all of it fits: version, base (where one is given), names, shapes, dtypes, hash."""
    require_regular(path)
    try:
        metadata, found = read_header(path, expected)
        entry = _entry(metadata, path)
        if base is not None and entry.get("base") != base:
            raise RigsaError(f"{path} belongs to another base model (its weights differ from this model's)")
        if name := differing(expected, found):
            there, here = _difference(found.get(name), expected.get(name))
            raise RigsaError(f"{path} does not fit: {name} is {there} there, the model expects {here}")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, ValueError) as error:
        raise RigsaError(f"{path} is damaged ({error}); delete its folder and run again") from error
    hashed = tensors_hash(tensors)
    if hashed != entry.get("content"):
        raise RigsaError(f"{path} is damaged (its content does not have the hash that it names); delete its folder "
                         "and run again")  # fmt: skip
    if content is not None and hashed != content:
        raise RigsaError(f"{path} is not the file that the record beside it names; delete their folder and run again")
    return tensors


def _head(path: Path) -> dict[str, Any]:
    """What a file that `_load` has read says of itself."""
    with safe_open(path, framework="pt") as file:
        return _entry(file.metadata() or {}, path)


def _difference(*tensors: tuple[torch.dtype, tuple[int, ...]] | None) -> list[object]:
    """In what two tensors differ: their shapes, their dtypes, or that one is not there."""
    shapes = [tensor and tensor[1] for tensor in tensors]
    found = [tensor and tensor[0] for tensor in tensors] if shapes[0] == shapes[1] else shapes
    return ["nothing" if one is None else one for one in found]


def _entry(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    text = metadata.get("rigsa")
    entry = parse_json(text, f"{path}, its metadata,") if isinstance(text, str) else None
    if not isinstance(entry, dict) or entry.get("version") != FORMAT_VERSION:
        raise RigsaError(f"{path}: expected a rigsa file of version {FORMAT_VERSION}, got {entry or 'another file'}")
    if unknown := sorted(set(entry) - HEAD):
        raise RigsaError(f"{path} is damaged (its head names {unknown[0]!r}); delete its folder and run again")
    return entry
