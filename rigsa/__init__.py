"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method."""

from rigsa_kernels import (
    GatedSparseLinear,
    MaskedAdamW,
    SparsePattern,
    __version__,
    adapter_summary,
    gated_linears,
    merge_linears,
    replace_linears,
    restore_linears,
)

__all__ = [
    "GatedSparseLinear",
    "MaskedAdamW",
    "SparsePattern",
    "__version__",
    "adapter_summary",
    "gated_linears",
    "merge_linears",
    "replace_linears",
    "restore_linears",
]
