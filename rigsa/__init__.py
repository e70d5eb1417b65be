"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from rigsa.callbacks import AdapterCheckpoints, PruningLevels

_NEED_TRANSFORMERS = {"AdapterCheckpoints": "rigsa.callbacks", "PruningLevels": "rigsa.callbacks"}

after_replacing(keep_adapter_in_checkpoints)


def __getattr__(name: str) -> Any:
    """The names whose modules import transformers, when they are first asked for."""
    import importlib

    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NEED_TRANSFORMERS[name]), name)


__all__ = [
    "AdapterCheckpoints",
    "GatedSparseLinear",
    "MaskedAdamW",
    "PruningLevels",
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
