"""The record of an adapter: what its tensors are, as JSON, checked field by field when it is read.

No number in a record is used before it is known to be in its range, so a record that somebody made to do harm is one
error, and takes no memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from rigsa.base import SAMPLES, Fingerprint
from rigsa.encoding import Encoding, Layout, is_encoding, layout
from rigsa.state import Ticket
from rigsa_kernels.format import MAX_IN_FEATURES
from rigsa_kernels.linear import Numerics

FORMAT, VERSION = "rigsa adapter", 1
RECORD, GATES = "rigsa_config", "rigsa_gates"
"""Names of the tensors that belong to no layer."""
PARAMETER = "rigsa_parameter:"
"""Before the name of a parameter that is trained beside the layers."""
MOST_BYTES = 1 << 26
"""Of a record: some 100,000 layers."""
_VALUE_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class LayerRecord:
    """What the record says of one layer.

    Attributes:
        shape: N and K.
        entries: number of free entries.
        encoding, pattern: how the pattern is written (`rigsa.encoding`), and its `digest`.
        values_dtype: of the values.
        gate: the layer's place among the gates. Layers that share a gate have the same.
        seed, key, bound: of the initial values (`rigsa_kernels.init`); the bound is init_scale / sqrt(K).
        alpha_init, numerics: as in `GatedSparseLinear`.
        base: of the frozen weight.
        ticket: how the pattern came about.
    """

    shape: tuple[int, int]
    entries: int
    encoding: Encoding
    pattern: str
    values_dtype: str
    gate: int
    seed: int
    key: int
    bound: float
    alpha_init: float
    numerics: Numerics
    base: Fingerprint
    ticket: Ticket

    @property
    def values_shape(self) -> tuple[int, ...]:
        return self.shape if self.encoding == "dense" else (self.entries,)


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter that is trained as it is, beside the gated layers."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Record:
    """What an adapter is.

    Attributes:
        base, model_class: name and class of the base model.
        made_with: the versions that wrote it.
        gates: how many there are.
        layers: layer name to its record.
        parameters: name of each parameter that is trained beside them to its record.
    """

    base: str
    model_class: str
    made_with: dict[str, str]
    gates: int
    layers: dict[str, LayerRecord]
    parameters: dict[str, ParameterRecord]

    @property
    def density(self) -> float:
        """Free entries over weights, of all layers together."""
        weights = sum(math.prod(layer.shape) for layer in self.layers.values())
        return sum(layer.entries for layer in self.layers.values()) / max(weights, 1)

    def to_json(self) -> dict[str, Any]:
        head = {"format": FORMAT, "version": VERSION, "density": self.density}
        return json.loads(json.dumps(head | asdict(self)))

    def layout(self) -> Layout:
        """Name to dtype and shape of every tensor but the record itself."""
        tensors: Layout = {GATES: (torch.float64, (self.gates,))}
        for name, layer in self.layers.items():
            tensors[f"{name}.values"] = getattr(torch, layer.values_dtype), layer.values_shape
            for part, what in layout(layer.encoding, layer.shape, layer.entries).items():
                tensors[f"{name}.{part}"] = what
        for name, parameter in self.parameters.items():
            tensors[f"{PARAMETER}{name}"] = getattr(torch, parameter.dtype), parameter.shape
        return tensors


def to_bytes(record: Record) -> Tensor:
    text = json.dumps(record.to_json(), separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def parse_record(text: bytes) -> Record:
    if len(text) > MOST_BYTES:
        raise ValueError(f"{RECORD}: expected at most {MOST_BYTES} bytes, got {len(text)}")
    return record_from(from_json(text))


def from_json(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"expected finite numbers, got {constant}")

    try:
        value = json.loads(text.decode("utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def expect_fields(what: str, given: Any, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises ValueError where `given` is not a JSON object with just these fields, of these types."""
    if not isinstance(given, dict):
        raise ValueError(f"{what}: expected an object, got {type(given).__name__}")
    if given.keys() != types.keys():
        odd = sorted(given.keys() ^ types.keys())
        raise ValueError(f"{what}: expected the fields {', '.join(types)}; missing or not known: {', '.join(odd)}")
    for name, kind in types.items():
        if not isinstance(given[name], kind) or isinstance(given[name], bool) != (kind is bool):
            raise ValueError(f"{what}: {name} has the wrong type, {type(given[name]).__name__}")


def record_from(config: dict[str, Any]) -> Record:
    """The record in a JSON object. Raises ValueError where a field is missing, unknown, or out of its range."""
    if config.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {config.get('format')!r}")
    if config.get("version") != VERSION:
        raise ValueError(f"version: expected {VERSION}, got {config.get('version')!r}; another rigsa wrote it")
    kinds: dict[str, Any] = {"format": str, "version": int, "density": (int, float), "base": str, "model_class": str}
    expect_fields("the record", config, kinds | {"made_with": dict, "gates": int, "layers": dict, "parameters": dict})
    if not all(isinstance(text, str) for text in config["made_with"].values()):
        raise ValueError("made_with: expected names and versions")
    layers = {name: __layer_record(name, layer) for name, layer in config["layers"].items()}
    if not layers:
        raise ValueError("layers: expected at least one")
    used = {layer.gate for layer in layers.values()}
    if used != set(range(config["gates"])) if 0 < config["gates"] <= len(layers) else True:
        raise ValueError(f"gates: expected as many as the layers use, got {config['gates']}")
    parameters = {name: _parameter_record(name, given) for name, given in config["parameters"].items()}
    names = (config["base"], config["model_class"], config["made_with"], config["gates"])
    record = Record(*names, layers, parameters)
    if record.to_json() != config:
        raise ValueError("density: it is not that of the layers")
    return record


def _parameter_record(name: str, given: Any) -> ParameterRecord:
    expect_fields(name, given, {"shape": list, "dtype": str})
    if given["dtype"] not in _VALUE_DTYPES:
        raise ValueError(f"{name}: dtype: expected one of {', '.join(_VALUE_DTYPES)}, got {given['dtype']!r}")
    if len(given["shape"]) > 8 or not all(type(size) is int and 0 <= size < 2**31 for size in given["shape"]):
        raise ValueError(f"{name}: shape: expected sizes, got {str(given['shape'])[:100]}")
    return ParameterRecord(tuple(given["shape"]), given["dtype"])


_LAYER_TYPES: dict[str, Any] = {
    "shape": list, "entries": int, "encoding": str, "pattern": str, "values_dtype": str, "gate": int, "seed": int,
    "key": int, "bound": (int, float), "alpha_init": (int, float), "numerics": str, "base": dict, "ticket": dict,
}  # fmt: skip


def __layer_record(name: str, given: Any) -> LayerRecord:
    expect_fields(name, given, _LAYER_TYPES)
    expect_fields(f"{name}: base", given["base"], {"sample": str, "nf4": bool})
    expect_fields(f"{name}: ticket", given["ticket"], {field.name: type(field.default) for field in fields(Ticket)})
    shape = given["shape"]
    if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"{name}: shape: expected two sizes, got {shape}")
    weights, sample = math.prod(shape), given["base"]["sample"]
    checks = {
        "encoding": is_encoding(given["encoding"]),
        "entries": 0 <= given["entries"] < 2**31
        and (given["encoding"] != "dense" or given["entries"] == weights)
        and given["entries"] <= weights
        and (given["encoding"] == "dense" or (shape[1] <= MAX_IN_FEATURES and weights < 2**31)),
        "pattern": re.fullmatch("[0-9a-f]{64}", given["pattern"]) is not None,
        "values_dtype": given["values_dtype"] in _VALUE_DTYPES,
        "gate": given["gate"] >= 0,
        "seed": 0 <= given["seed"] < 2**64,
        "key": 0 <= given["key"] < 2**32,
        "bound": math.isfinite(given["bound"]) and given["bound"] >= 0,
        "alpha_init": math.isfinite(given["alpha_init"]),
        "numerics": given["numerics"] in get_args(Numerics),
        "base": re.fullmatch(f"[0-9a-f]{{{4 * SAMPLES}}}", sample) is not None,
        "ticket": given["ticket"]["level"] >= 0 and 0 <= given["ticket"]["draw_seed"] < 2**64,
    }
    for field, holds in checks.items():
        if not holds:
            raise ValueError(f"{name}: {field}: {str(given[field])[:100]} is out of range")
    return LayerRecord(
        **given
        | {
            "shape": (shape[0], shape[1]),
            "base": Fingerprint(**given["base"]),
            "ticket": Ticket(**given["ticket"]),
        }
    )
