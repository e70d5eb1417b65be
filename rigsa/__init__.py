"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method."""

from rigsa.checkpoints import keep_adapter_in_checkpoints
from rigsa.errors import RigsaError
from rigsa.saving import load_adapter, save_adapter
from rigsa.state import restore_snapshot, snapshot
from rigsa.tickets import gradient_ticket, magnitude_ticket, prune, random_ticket, set_ticket
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
from rigsa_kernels.replace import after_replacing

after_replacing(keep_adapter_in_checkpoints)

__all__ = [
    "GatedSparseLinear",
    "MaskedAdamW",
    "RigsaError",
    "SparsePattern",
    "__version__",
    "adapter_summary",
    "gated_linears",
    "gradient_ticket",
    "load_adapter",
    "magnitude_ticket",
    "merge_linears",
    "prune",
    "random_ticket",
    "replace_linears",
    "restore_linears",
    "restore_snapshot",
    "save_adapter",
    "set_ticket",
    "snapshot",
]
