"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The names above, once one is asked for: so the command line can answer Ctrl-C while PyTorch is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import rigsa_kernels

    return getattr(rigsa_kernels, name)
