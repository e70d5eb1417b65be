"""Gated sparse adapters: the storage format, the operators, the layer and its optimiser. Needs PyTorch only."""

from rigsa_kernels.format import SparsePattern
from rigsa_kernels.init import layer_key, uniform_init
from rigsa_kernels.linear import GatedSparseLinear, composed_is_safe
from rigsa_kernels.ops import gated_linear
from rigsa_kernels.optim import MaskedAdamW, parameter_groups, stepping_in_backward
from rigsa_kernels.replace import adapter_summary, gated_linears, merge_linears, replace_linears, restore_linears

__version__ = "0.1.0"

__all__ = [
    "GatedSparseLinear",
    "MaskedAdamW",
    "SparsePattern",
    "adapter_summary",
    "composed_is_safe",
    "gated_linear",
    "gated_linears",
    "layer_key",
    "merge_linears",
    "parameter_groups",
    "replace_linears",
    "restore_linears",
    "stepping_in_backward",
    "uniform_init",
]
