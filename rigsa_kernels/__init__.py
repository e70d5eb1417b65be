"""Gated sparse adapters: the storage format, the operators, the layer and its optimiser. Needs PyTorch only."""

from rigsa_kernels import saving_guard  # noqa: F401 (models that are adapted from now on do not lose it when saved)
from rigsa_kernels.exactness import composed_is_safe
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.init import layer_key, uniform_init
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.merging import merge_linears, rounding_losses, unmerge_linears
from rigsa_kernels.ops import gated_linear
from rigsa_kernels.optim import MaskedAdamW, parameter_groups, stepping_in_backward
from rigsa_kernels.parametrized import GatedSparseWeight
from rigsa_kernels.replace import (
    adapter_summary,
    gated_linears,
    left_out,
    replace_linears,
    restore_linears,
    restore_weights,
)
from rigsa_kernels.verify import verify_adapted

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
