"""Files of tensors (safetensors): written whole, and looked into before memory is taken for what they hold.

Adapters of the library (`rigsa.saving`) and of run folders (`rigsa.experiments.adapter`) are written and read here.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rigsa.encoding import Layout
from rigsa.files import write_atomically
from rigsa.record import expect_fields, from_json

_DTYPES = {
    "float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "uint8": "U8", "uint16": "U16",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
"""PyTorch's names and those of safetensors."""
_METADATA_BYTES = 1024
"""At most, in a header."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file `path`, whole or not at all.

    Raises:
        RigsaError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error

    write_atomically(path, write)


def open_regular(path: Path, most: int | None = None) -> Any:
    """The file, opened for reading. Raises ValueError where it is not a plain file, or longer than `most` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for somebody to write
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name} is not a file")
    if most is not None and found.st_size > most:
        os.close(descriptor)
        raise ValueError(f"{path.name} has {found.st_size} bytes, more than any of its kind")
    return os.fdopen(descriptor, "rb")


def read_header(path: Path, expected: Layout) -> tuple[dict[str, Any], Layout]:
    """The metadata, and names, dtypes and shapes of the tensors in a file, whose size is what they need.

    Args:
        path: of the file.
        expected: what `differing` compares the result with. It bounds the memory that is taken here.

    Raises:
        ValueError: it is not a plain file, or not a file of tensors of that kind.
    """
    most = _METADATA_BYTES + sum(256 + 6 * len(name) for name in expected)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(most, size - 8):
            raise ValueError(f"expected a header of at most {most} bytes, got one of {length} in a file of {size}")
        text = file.read(length)
    try:
        header = from_json(text)
    except ValueError as error:
        raise ValueError(f"its header, {length} bytes in a file of {size}, cannot be read: {error}") from error
    metadata = header.pop("__metadata__", None)
    dtypes = {tag: getattr(torch, name) for name, tag in _DTYPES.items()}
    found: Layout = {}
    for name, entry in header.items():
        expect_fields(name, entry, {"dtype": str, "shape": list, "data_offsets": list})
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{name}: expected one of {', '.join(dtypes)}, got {entry['dtype']!r}")
        if not all(type(part) is int and part >= 0 for part in entry["shape"]):
            raise ValueError(f"{name}: expected a shape, got {str(entry['shape'])[:100]}")
        found[name] = dtypes[entry["dtype"]], tuple(entry["shape"])
    data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in found.values())
    if size != 8 + length + data:
        raise ValueError(f"expected {data} bytes of tensors, got a file of {size} with a header of {length}")
    return metadata if isinstance(metadata, dict) else {}, found


def differing(expected: Layout, found: Layout) -> str | None:
    """The first tensor that is not the same in both, or is missing from one; None where there is none."""
    return next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
