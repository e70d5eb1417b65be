"""RIGSA: fine-tune language models with gated sparse adapters, pruned by the lottery-ticket method.

Adapt a model
    replace_linears(model)                every nn.Linear but the head; ``density=0.1`` starts sparse
    restore_linears(model)                the inverse
    merge_linears(model)                  plain layers with the adapter in their weights
    unmerge_linears(model)                takes it out again, to the bit
    rounding_losses(model)                what a merge would round away, layer by layer
    restore_weights(model)                W0 in the weights of tickets, which compose into them for a pass
    adapter_summary(model)                how much is adapted, in one line
    left_out(model)                       which weights in matrices are not, and how many
    verify_adapted(model, *inputs)        runs the model, and names the layers that an adapter does not reach
    gated_linears(model)                  the layers by name; each is a GatedSparseLinear
    MaskedAdamW(model, lr=2e-3)           the optimiser; parameter_groups(model) for one of your own
    stepping_in_backward(optimizer)       a context in which no whole gradient is ever in memory

Choose which entries are free; each returns a TicketReport of what it did
    prune(model, keep_fraction=0.8)       keep a share, and rewind: one step of a level loop
    random_ticket(model, density=0.1)     drawn
    magnitude_ticket(model, density=0.1)  where the pretrained weights are largest
    gradient_ticket(model, loss_fn, batches, density=0.1)   where a loss has the largest gradients
    set_ticket(model, patterns)           your own: a SparsePattern for each layer
    snapshot(model), restore_snapshot(model, snapshot)      the adapter as it is now, and back

Keep it
    save_adapter(model, folder)           one folder, without the base
    load_adapter(model, folder)           onto a bare base, or in place of the adapter that the model carries
    export_adapter(model, folder, to="supertuning")         for PEFT without this package; or shira, merged
    write_card(model, folder, to, measured={"loss": Measured(0.2)})   a model card for it: README.md and a figure
    import_adapter(model, folder)         what PEFT's SHiRA or Super-Tuning have trained, behind a gate of 1

Under transformers.Trainer
    AdapterCheckpoints()                  resume from the last whole checkpoint
    PruningLevels(prunings=4)             train, prune, rewind, train in one run

Under PEFT and TRL
    RigsaConfig(density=0.05)             for get_peft_model, SFTTrainer(peft_config=...), ...

Several adapters on one base
    Adapters(model)                       add, use, delete and combine them by name, or one for each row of a batch
    adapter_off(model)                    a context in which the model is its base
    overlap(a, b), union(a, b), intersection(a, b)          of two tickets
    describe(tickets), plot_densities(tickets, path)        densities by layer, in a table and in a figure

Bad arguments raise ValueError, files that cannot be used RigsaError. docs/library.md has examples that run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rigsa.adapters import Adapters, adapter_off
    from rigsa.callbacks import AdapterCheckpoints, PruningLevels
    from rigsa.card import Measured, write_card
    from rigsa.errors import RigsaError
    from rigsa.export import export_adapter
    from rigsa.importing import import_adapter
    from rigsa.inspection import describe, intersection, overlap, plot_densities, union
    from rigsa.peft_tuner import RigsaConfig
    from rigsa.saving import load_adapter, save_adapter
    from rigsa.state import restore_snapshot, snapshot
    from rigsa.tickets import TicketReport, gradient_ticket, magnitude_ticket, prune, random_ticket, set_ticket
    from rigsa_kernels import (
        GatedSparseLinear,
        MaskedAdamW,
        SparsePattern,
        __version__,
        adapter_summary,
        gated_linears,
        left_out,
        merge_linears,
        parameter_groups,
        replace_linears,
        restore_linears,
        restore_weights,
        rounding_losses,
        stepping_in_backward,
        unmerge_linears,
        verify_adapted,
    )

from rigsa.when_imported import when_imported

_MODULES = {
    "rigsa.adapters": ("Adapters", "adapter_off"),
    "rigsa.card": ("Measured", "write_card"),
    "rigsa.callbacks": ("AdapterCheckpoints", "PruningLevels"),  # this one imports transformers
    "rigsa.errors": ("RigsaError",),
    "rigsa.export": ("export_adapter",),
    "rigsa.importing": ("import_adapter",),
    "rigsa.inspection": ("describe", "intersection", "overlap", "plot_densities", "union"),
    "rigsa.peft_tuner": ("RigsaConfig",),  # this one imports PEFT
    "rigsa.saving": ("load_adapter", "save_adapter"),
    "rigsa.state": ("restore_snapshot", "snapshot"),
    "rigsa.tickets": (
        "TicketReport", "gradient_ticket", "magnitude_ticket", "prune", "random_ticket", "set_ticket",
    ),
    "rigsa_kernels": (
        "GatedSparseLinear", "MaskedAdamW", "SparsePattern", "__version__", "adapter_summary", "gated_linears",
        "left_out", "merge_linears", "parameter_groups", "replace_linears", "restore_linears", "restore_weights",
        "rounding_losses", "stepping_in_backward", "unmerge_linears", "verify_adapted",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def _register_with_peft() -> None:
    """Not with a PEFT that is too old, which stays usable without us."""
    import importlib

    if importlib.import_module("rigsa.registration").has_support():
        importlib.import_module("rigsa.peft_tuner")


def _spare_gates() -> None:
    import importlib

    importlib.import_module("rigsa.trainer_groups").spare_gates()


when_imported("peft", _register_with_peft)
when_imported("transformers.trainer", _spare_gates)


def _save_adapted_models() -> None:
    """Have models that are adapted from now on save and load in the ways of `rigsa.checkpoints`."""
    from importlib import import_module

    def keep(model: Any) -> None:
        import_module("rigsa.checkpoints").keep_adapter_in_checkpoints(model)

    import_module("rigsa_kernels.replace").after_replacing(keep)


when_imported("rigsa_kernels.replace", _save_adapted_models)


def __getattr__(name: str) -> Any:
    """A name of the library, from its module, which is imported when the first of its names is asked for.

    So nothing imports PyTorch before the command line can answer Ctrl-C, nor transformers before it is needed.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return globals().setdefault(name, getattr(importlib.import_module(_HOME[name]), name))


__all__ = [
    "AdapterCheckpoints",
    "Adapters",
    "GatedSparseLinear",
    "MaskedAdamW",
    "Measured",
    "PruningLevels",
    "RigsaConfig",
    "RigsaError",
    "SparsePattern",
    "TicketReport",
    "__version__",
    "adapter_off",
    "adapter_summary",
    "describe",
    "export_adapter",
    "gated_linears",
    "gradient_ticket",
    "import_adapter",
    "intersection",
    "left_out",
    "load_adapter",
    "magnitude_ticket",
    "merge_linears",
    "overlap",
    "parameter_groups",
    "plot_densities",
    "prune",
    "random_ticket",
    "replace_linears",
    "restore_linears",
    "restore_snapshot",
    "restore_weights",
    "rounding_losses",
    "save_adapter",
    "set_ticket",
    "snapshot",
    "stepping_in_backward",
    "union",
    "unmerge_linears",
    "verify_adapted",
    "write_card",
]
