"""Gated sparse adapters: the storage format, the operators, the layer and its optimiser. Needs PyTorch only."""

from . import layers, saving_guard  # noqa: F401 (models that are adapted from now on do not lose it when saved)
from .exactness import composed_is_safe
from .format import SparsePattern
from .init import layer_key, uniform_init
from .linear import GatedSparseLinear
from .merging import merge_linears, rounding_losses, unmerge_linears
from .ops import gated_linear
from .optim import MaskedAdamW, parameter_groups, stepping_in_backward
from .parametrized import GatedSparseWeight
from .replace import (
    adapter_summary,
    gated_linears,
    left_out,
    replace_linears,
    restore_linears,
    restore_weights,
)
from .verify import verify_adapted

__version__ = "0.1.0"

__all__ = [
    "GatedSparseLinear",
    "GatedSparseWeight",
    "MaskedAdamW",
    "SparsePattern",
    "adapter_summary",
    "composed_is_safe",
    "gated_linear",
    "gated_linears",
    "layer_key",
    "layers",
    "left_out",
    "merge_linears",
    "parameter_groups",
    "replace_linears",
    "restore_linears",
    "restore_weights",
    "rounding_losses",
    "stepping_in_backward",
    "uniform_init",
    "unmerge_linears",
    "verify_adapted",
]
