"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method."""

from rigsa_kernels import (
    GatedSparseLinear,
    MaskedAdamW,
    SparsePattern,
    __version__,
    adapter_summary,
    gated_linears,
    merge_linears,
    parameter_groups,
    replace_linears,
    restore_linears,
    stepping_in_backward,
)

__all__ = [
    "GatedSparseLinear",
    "MaskedAdamW",
    "SparsePattern",
    "__version__",
    "adapter_summary",
    "gated_linears",
    "merge_linears",
    "parameter_groups",
    "replace_linears",
    "restore_linears",
    "stepping_in_backward",
]
