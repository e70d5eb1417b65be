"""The namespace of this package's operators: ``torch.ops.rigsa``.

A build for the kernels hub puts a file of the same name and the same two names here, whose namespace no other build
has, so that one process can load several (``hub/README.md`` in the repository).
"""

from __future__ import annotations

from typing import Any

import torch

ops: Any = torch.ops.rigsa


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"rigsa::{op_name}"
