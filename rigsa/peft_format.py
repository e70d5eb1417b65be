"""What a folder of PEFT is: ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing here needs PEFT.

Under the method RIGSA a layer called NAME has ``base_model.model.NAME.rigsa_adapter.rigsa_values`` and
``.rigsa_alpha``, the tensors of its pattern's encoding (``.rigsa_bits``, or ``.rigsa_columns`` and ``.rigsa_rows``:
`rigsa.encoding`), and ``.rigsa_ticket``: how the pattern came about. A pattern of tiles has ``.rigsa_tile`` as well,
their rows and columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor

from rigsa.encoding import Encoding, Layout, choose_encoding, decode, encode, is_encoding, layout, tile_of
from rigsa.record import expect_fields, from_json
from rigsa.state import Ticket
from rigsa_kernels.format import SparsePattern

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "rigsa_"
CONTAINER = "rigsa_adapter"
"""What the layers of PEFT keep their adapters in."""
PARTS = ("bits", "columns", "rows", "tile", "ticket")
"""The tensors of a layer that are neither values nor gate, without the prefix."""
TICKET_BYTES = 160
"""The ticket as JSON, filled up with spaces: a file's tensors have shapes that are known before it is read."""


def layer_layout(encoding: Encoding, shape: tuple[int, int], entries: int) -> Layout:
    """Dtype and shape of those of `PARTS` that a layer has whose pattern is encoded so."""
    tile: Layout = {} if tile_of(encoding) is None else {"tile": (torch.int32, (2,))}
    return layout(encoding, shape, entries) | tile | {"ticket": (torch.uint8, (TICKET_BYTES,))}


def layer_parts(pattern: SparsePattern, ticket: Ticket) -> dict[str, Tensor]:
    """The tensors of `layer_layout`, on the CPU: what `parse_layer` takes."""
    tile = {} if pattern.tile is None else {"tile": torch.tensor(pattern.tile, dtype=torch.int32)}
    return encode(pattern, choose_encoding(pattern)) | tile | {"ticket": ticket_to_bytes(ticket)}


def parse_layer(shape: tuple[int, int], parts: Mapping[str, Tensor], values: Tensor) -> tuple[SparsePattern, Ticket]:
    """The pattern of a layer, and how it came about.

    Args:
        shape: N and K.
        parts: those of `PARTS` that a file has.
        values: the layer's.

    Raises:
        ValueError: the tensors are not those of a pattern of this shape with so many values.
    """
    encoding = _encoding_of(parts)
    expected = layout(encoding, shape, values.numel())
    for name, (dtype, size) in expected.items():
        found = parts.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != size:
            given = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"{PREFIX}{name}: expected {dtype} {list(size)}, got {given}")
    pattern = decode(encoding, {name: parts[name].cpu() for name in expected}, shape, values.numel())
    if tuple(values.shape) != pattern.values_shape:
        raise ValueError(f"{PREFIX}values: expected {list(pattern.values_shape)}, got {list(values.shape)}")
    return pattern, ticket_from(parts["ticket"]) if "ticket" in parts else Ticket(kind="given")


def _encoding_of(parts: Mapping[str, Tensor]) -> Encoding:
    """Raises ValueError where a tile is given that is none."""
    if "tile" not in parts:
        return "columns" if "columns" in parts else "bits" if "bits" in parts else "dense"
    encoding = "tiles " + "x".join(map(str, parts["tile"].tolist()))
    if not is_encoding(encoding):
        raise ValueError(f"{PREFIX}tile: expected rows and columns of a tile, got {parts['tile'].tolist()}")
    return encoding


def ticket_to_bytes(ticket: Ticket) -> Tensor:
    """uint8 ``[TICKET_BYTES]``."""
    text = json.dumps(asdict(ticket), separators=(",", ":")).encode().ljust(TICKET_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def ticket_from(tensor: Tensor) -> Ticket:
    """Raises ValueError where `tensor` is not what `ticket_to_bytes` gives."""
    if tensor.dtype != torch.uint8 or math.prod(tensor.shape) != TICKET_BYTES:
        raise ValueError(f"{PREFIX}ticket: expected {TICKET_BYTES} bytes, got {tensor.dtype} {list(tensor.shape)}")
    given = from_json(bytes(tensor.cpu().numpy()))
    expect_fields(f"{PREFIX}ticket", given, {field.name: type(field.default) for field in fields(Ticket)})
    if not 0 <= given["level"] < 2**31 or not 0 <= given["draw_seed"] < 2**64:
        raise ValueError(f"{PREFIX}ticket: {str(given)[:200]} is out of range")
    return Ticket(**given)
