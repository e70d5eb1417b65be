"""How an operation becomes an operator ``torch.ops.rigsa.*``: schema, fake, and an implementation per device.

On a CPU an operator runs on PyTorch, on CUDA on Triton. Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")


def define(schema: str, cpu: Callable[..., Any], cuda: str | Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator: `cpu` on the CPU, `cuda` on CUDA, `fake` (shapes without data) in tracing.

    `cuda` is a Triton launcher, "file.function" of this package, or PyTorch code that runs there as it is.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, on_first_use(cuda) if isinstance(cuda, str) else cuda, "CUDA")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)


def on_first_use(launcher: str) -> Callable[..., Any]:
    """`launcher`, imported when it is called: Triton is needed where a kernel runs, not where this file is read."""

    @functools.cache
    def load() -> Callable[..., Any]:
        module, _, function = launcher.partition(".")
        try:
            return getattr(importlib.import_module(f".{module}", __package__), function)
        except ImportError as error:
            raise RuntimeError(
                f"triton: needed for rigsa's operators on CUDA and not installed ({error}); pip install triton"
            ) from error

    return lambda *args: load()(*args)
