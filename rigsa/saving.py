"""Adapters on disk: a folder with ``rigsa_config.json`` and one safetensors file.

The safetensors file is the adapter. It holds, for a layer called NAME, ``NAME.values`` and the tensors of its pattern's
encoding (``NAME.bits``, or ``NAME.columns`` and ``NAME.rows``: `rigsa.encoding`), all gates in ``rigsa_gates``, what is
trained beside the layers, such as a new head, as ``rigsa_parameter:NAME``, and in ``rigsa_config`` the record of what
they are, as JSON (`rigsa.record`). ``rigsa_config.json`` repeats that record for people and tools, and adds the file's
name, size and hash. The file is named by its hash, so the folder changes from one adapter to the next in the moment in
which the JSON file is renamed, and is whole at any other.

What is read is not trusted. The record is checked field by field and against the model before a tensor is read, so no
number in a file decides how much memory is taken; then the file's size, header and hash; then every tensor, one at a
time; and only then is the model touched.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rigsa import peft_format
from rigsa.base import base_differences, base_name, fingerprint
from rigsa.encoding import Layout, choose_encoding, decode, digest, encode, layout
from rigsa.errors import RigsaError
from rigsa.files import content_hash, write_json
from rigsa.placing import Place, build_layers, parameters_by_name, places_of, trained_beside
from rigsa.processes import is_main, is_sharded, wait_for_all, whole
from rigsa.record import (
    GATES,
    MOST_BYTES,
    PARAMETER,
    RECORD,
    LayerRecord,
    ParameterRecord,
    Record,
    expect_fields,
    from_json,
    parse_record,
    record_from,
    to_bytes,
)
from rigsa.state import LayerState, adapted_layers, layers_by_name, put_state, ticket_of, unwrap
from rigsa.tensor_files import differing, open_regular, read_header, write_tensors
from rigsa_kernels import __version__
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.replace import gated_linears

CONFIG_FILE = "rigsa_config.json"
_ADAPTER_FILE = re.compile(r"rigsa_adapter-[0-9a-f]{16}\.safetensors")
MODEL_FILE = "model.safetensors"
"""What transformers calls a file of weights; a Trainer's checkpoint has its adapter there (`rigsa.checkpoints`)."""
Read = Callable[[str], Tensor]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into `folder`: its gated layers, and what else of the model is trained.

    An adapter that was there before is replaced. A process that is killed leaves the one or the other, whole.

    Args:
        model: with gated sparse layers; what is wrapped in DistributedDataParallel or ``torch.compile`` is looked into.
            Of several processes one has to call this, the main one. Where the layers are in shards (FSDP2), all of them
            have to, and the main one writes.
        folder: made where it is missing.

    Raises:
        RigsaError: a value or a gate is not finite, or the folder cannot be written.
        ValueError: `model` has no gated layer.
    """
    if not is_sharded(model):
        _replace_adapter(model, Path(folder))
        return
    with whole(unwrap(model)):
        if is_main():
            _replace_adapter(model, Path(folder))
    wait_for_all()


def _replace_adapter(model: nn.Module, folder: Path) -> None:
    write_adapter(model, folder, None)
    wanted = json.loads((folder / CONFIG_FILE).read_text())["file"]
    for path in folder.iterdir():
        if _ADAPTER_FILE.fullmatch(path.name) and path.name != wanted:
            path.unlink()


def write_adapter(model: nn.Module, folder: Path, name: str | None) -> None:
    """`save_adapter`, into a file called `name`; None names it by its hash."""
    layers = adapted_layers(model)
    beside = trained_beside(unwrap(model))
    _check_finite(layers, beside)
    gates = list({id(layer.rigsa_alpha): layer.rigsa_alpha for layer in layers.values()}.values())
    record = _record_of(unwrap(model), layers, [id(gate) for gate in gates], beside)
    tensors = {GATES: torch.cat([gate.detach().double().cpu() for gate in gates]), RECORD: to_bytes(record)}
    for layer_name, layer in layers.items():
        tensors[f"{layer_name}.values"] = layer.rigsa_values.detach().cpu().contiguous()
        for part, tensor in encode(layer.pattern, record.layers[layer_name].encoding).items():
            tensors[f"{layer_name}.{part}"] = tensor
    for parameter_name, parameter in beside.items():
        tensors[PARAMETER + parameter_name] = parameter.detach().cpu().contiguous()
    path = folder / (name or ".rigsa_adapter.new")
    write_tensors(path, tensors, {"format": "pt"})
    size, hashed = path.stat().st_size, content_hash(path)
    if name is None:  # the name is known once the bytes are
        name = f"rigsa_adapter-{hashed[:16]}.safetensors"
        os.replace(path, folder / name)
    write_json(folder / CONFIG_FILE, record.to_json() | {"file": name, "bytes": size, "sha256": hashed})


def _check_finite(layers: Mapping[str, GatedSparseLinear], beside: Mapping[str, Tensor]) -> None:
    tensors = {f"values of {name}": layer.rigsa_values for name, layer in layers.items()}
    tensors |= {f"a gate of {name}": layer.rigsa_alpha for name, layer in layers.items()}
    for what, tensor in (*tensors.items(), *beside.items()):
        if not bool(tensor.isfinite().all()):
            raise RigsaError(f"model: expected finite numbers to save, got {what} that are not")


def _record_of(
    model: nn.Module, layers: Mapping[str, GatedSparseLinear], gates: list[int], beside: Mapping[str, Tensor]
) -> Record:
    return Record(
        base=base_name(model),
        model_class=type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__,  # type: ignore[operator]
        made_with={"rigsa": __version__, "torch": torch.__version__},
        gates=len(gates),
        layers={
            name: LayerRecord(
                shape=layer.pattern.shape,
                entries=layer.pattern.nnz,
                encoding=choose_encoding(layer.pattern),
                pattern=digest(layer.pattern),
                values_dtype=str(layer.rigsa_values.dtype).removeprefix("torch."),
                gate=gates.index(id(layer.rigsa_alpha)),
                seed=layer.seed,
                key=layer.key,
                bound=layer.bound,
                alpha_init=layer.alpha_init,
                numerics=layer.numerics,
                base=fingerprint(layer),
                ticket=ticket_of(layer),
            )
            for name, layer in layers.items()
        },
        parameters={
            name: ParameterRecord(tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
            for name, parameter in beside.items()
        },
    )


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, strict: bool = False, replace: bool = False
) -> None:
    """Put the adapter that `save_adapter` wrote onto `model`, in place.

    On a bare base model the layers are built and everything else is frozen. On a model that carries an adapter with the
    same free entries and initial values, values and gates are read. An adapter with others takes its place if asked to:
    patterns, values, gates and seeds, in place where shapes allow. An optimiser stays valid then, and what was frozen
    stays frozen.

    Args:
        model: the base model, in any dtype or with layers in NF4, bare or adapted.
        folder: what `save_adapter` wrote, or a checkpoint of a Trainer (`rigsa.checkpoints`).
        strict: refuse a base model that is not the one the adapter was trained on, instead of warning. It is told by
            its name and by a sample of the weights that carry the adapter (`rigsa.base`).
        replace: whether the saved adapter may take the place of one with other free entries or another seed.

    Raises:
        RigsaError: a file is missing, damaged or not what the record says; `model` does not have the adapter's layers,
            or carries an adapter on others, or, without `replace`, one with other entries or another seed (a layer is
            named); under `strict`, another base. The model is unchanged.
    """
    folder = Path(folder)
    with naming(folder):
        record, path = _read_folder(folder, unwrap(model))
        with safe_open(path, framework="pt", device="cpu") as file:
            if bytes(file.get_tensor(RECORD).numpy()) != bytes(to_bytes(record).numpy()):
                raise ValueError(f"{CONFIG_FILE} does not describe this {path.name}")
            _load(unwrap(model), record, file.get_tensor, strict, replace)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """`load_adapter` with ``replace=True``, from the tensors of an adapter's file.

    Raises:
        RigsaError: as in `load_adapter`.
    """
    with naming("the adapter in this state"):
        if RECORD not in tensors or tensors[RECORD].dtype != torch.uint8:
            raise ValueError(f"it has no {RECORD}, which says what the tensors are")
        record = parse_record(bytes(tensors[RECORD].contiguous().cpu().numpy()))
        places_of(record, unwrap(model))
        expected = record.layout()
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != RECORD}
        _compare_layouts(expected, found)
        _load(unwrap(model), record, lambda name: tensors[name].cpu(), strict, replace=True)


def read_record(folder: str | os.PathLike[str]) -> Record:
    """What a saved adapter is, from its ``rigsa_config.json`` alone.

    Raises:
        RigsaError: the file is missing or damaged.
    """
    with naming(folder):
        return _read_config(Path(folder))[0]


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises RigsaError where the files of a saved adapter are missing, or have changed since they were saved."""
    with naming(folder):
        _read_folder(Path(folder), None)


def read_patterns(folder: str | os.PathLike[str]) -> dict[str, SparsePattern]:
    """Layer name to the pattern of a saved adapter.

    Raises:
        RigsaError: a file is missing, damaged or not what the record says.
    """
    with naming(folder):
        record, path = _read_folder(Path(folder), None)
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: _read_pattern(name, layer, file.get_tensor) for name, layer in record.layers.items()}


def read_states(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, strict: bool = False
) -> dict[str, LayerState]:
    """A saved adapter as a snapshot, on the CPU (`rigsa.snapshot`).

    Args:
        folder: what `save_adapter` wrote.
        model: where it is to be put; checked as `load_adapter` does, and not changed.
        strict: as in `load_adapter`.

    Raises:
        RigsaError: a file is missing, damaged or not what the record says, or it does not fit `model`.
    """
    with naming(folder):
        record, path = _read_folder(Path(folder), None if model is None else unwrap(model))
        if model is not None:
            _check_base(unwrap(model), record, places_of(record, unwrap(model)), strict)
        with safe_open(path, framework="pt", device="cpu") as file:
            gates = _read_finite(GATES, file.get_tensor)
            shared = [gates[number : number + 1] for number in range(len(gates))]
            return {
                name: _layer_state(name, layer, _read_pattern(name, layer, file.get_tensor), shared, file.get_tensor)
                for name, layer in record.layers.items()
            }


@contextmanager
def naming(where: object) -> Iterator[None]:
    """What goes wrong while a file is read is one error that begins with its place."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RigsaError(f"{where}: this is not an adapter that can be loaded here: {reason}") from error


def _read_config(folder: Path) -> tuple[Record, dict[str, Any]]:
    """The record, and what ``rigsa_config.json`` says of the other file."""
    path = folder / CONFIG_FILE
    if not path.exists():
        if (folder / peft_format.CONFIG_FILE).exists():
            raise ValueError(f"PEFT saved it ({peft_format.CONFIG_FILE}); write rigsa.import_adapter(model, folder)")
        if not folder.exists():
            raise ValueError("there is no such folder")
        raise ValueError(f"it has no {CONFIG_FILE}, which save_adapter(model, folder) writes")
    with open_regular(path, MOST_BYTES) as file:
        config = from_json(file.read())
    where: dict[str, Any] = {name: config.pop(name) for name in ("file", "bytes", "sha256") if name in config}
    expect_fields(CONFIG_FILE, where, {"file": str, "bytes": int, "sha256": str})
    return record_from(config), where


def _read_folder(folder: Path, model: nn.Module | None) -> tuple[Record, Path]:
    """The record and the safetensors file, whose size, header and hash are as the record says."""
    record, where = _read_config(folder)
    if model is not None:
        places_of(record, model)
    if where["file"] != MODEL_FILE and not _ADAPTER_FILE.fullmatch(where["file"]):
        raise ValueError(f"file: expected a name that save_adapter gives, got {where['file']!r}")
    path = folder / where["file"]
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    expected = record.layout() | {RECORD: (torch.uint8, (to_bytes(record).numel(),))}
    _compare_layouts(expected, read_header(path, expected)[1])
    if path.stat().st_size != where["bytes"] or content_hash(path) != where["sha256"]:
        raise ValueError(f"{path.name} has changed since it was saved (its bytes have another hash)")
    return record, path


def _compare_layouts(expected: Layout, found: Layout) -> None:
    if name := differing(expected, found):
        raise ValueError(f"{name}: expected {expected.get(name, 'no such tensor')}, got {found.get(name, 'none')}")


def _load(model: nn.Module, record: Record, read: Read, strict: bool, replace: bool) -> None:
    """Check every tensor, one at a time, then change `model`."""
    _check_base(model, record, places_of(record, model), strict)
    gates = _read_finite(GATES, read)
    patterns = {name: _read_pattern(name, layer, read) for name, layer in record.layers.items()}
    for name in (*(f"{name}.values" for name in record.layers), *(PARAMETER + name for name in record.parameters)):
        _read_finite(name, read)
    if not gated_linears(model):
        build_layers(model, record, patterns)
    elif not replace:
        _check_same_adapter(record, layers_by_name(model))
    layers = layers_by_name(model)
    shared = [gates[number : number + 1] for number in range(len(gates))]
    for name, layer in record.layers.items():
        put_state(layers[name], _layer_state(name, layer, patterns.pop(name), shared, read))
    here = parameters_by_name(model)
    with torch.no_grad():
        for name in record.parameters:
            here[name].copy_(read(PARAMETER + name))
    model._rigsa_trained = set(record.parameters)  # type: ignore[assignment]


def _check_same_adapter(record: Record, layers: Mapping[str, GatedSparseLinear]) -> None:
    """Raises ValueError where a layer has other free entries or other initial values than the adapter of `record`."""
    for name, layer in layers.items():
        saved = record.layers[name]
        differs = ""
        if digest(layer.pattern) != saved.pattern:
            differs = f"{saved.entries:,} free entries in it, and {layer.pattern.nnz:,} others on the model"
            differs = differs if layer.pattern.nnz != saved.entries else f"other free entries in it ({saved.entries:,})"
        elif (layer.seed, layer.key, layer.bound) != (saved.seed, saved.key, saved.bound):
            differs = (
                f"initial values of seed {saved.seed} within {saved.bound:.3g} in it, and of seed {layer.seed} within "
                f"{layer.bound:.3g} on the model"
            )
        if differs:
            raise ValueError(
                f"the model carries another adapter: {name} has {differs}; load_adapter(model, folder, replace=True) "
                "puts this one in its place"
            )


def _check_base(model: nn.Module, record: Record, places: Mapping[str, Place], strict: bool) -> None:
    prints = {name: layer.base for name, layer in record.layers.items()}
    differences = base_differences(record.base, prints, model, places)
    if differences:
        message = f"the adapter was trained on another base model: {'; '.join(differences)}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)


def _read_finite(name: str, read: Read) -> Tensor:
    tensor = read(name)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
    return tensor


def _read_pattern(name: str, layer: LayerRecord, read: Read) -> SparsePattern:
    parts = {part: read(f"{name}.{part}") for part in layout(layer.encoding, layer.shape, layer.entries)}
    try:
        pattern = decode(layer.encoding, parts, layer.shape, layer.entries)
    except ValueError as error:
        raise ValueError(f"{name}: its pattern is damaged: {error}") from error
    if digest(pattern) != layer.pattern:
        raise ValueError(f"{name}: its pattern is not the one that was saved (it has another hash)")
    return pattern


def _layer_state(name: str, layer: LayerRecord, pattern: SparsePattern, gates: list[Tensor], read: Read) -> LayerState:
    return LayerState(
        pattern=pattern,
        values=_read_finite(f"{name}.values", read),
        gate=gates[layer.gate],
        seed=layer.seed,
        key=layer.key,
        bound=layer.bound,
        alpha_init=layer.alpha_init,
        ticket=layer.ticket,
    )
