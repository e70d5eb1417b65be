"""Every name that a new configuration gives is a name in the model.

PEFT raises an error only where none of the names is there. One misspelt name among several would leave layers out of
the training, or let in what was to be excluded, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn as nn

from rigsa.peft_tuner.config import RigsaConfig

HEADS = ("classifier", "score", "qa_outputs")
"""Names that PEFT adds to `modules_to_save` itself, whether the model has them or not."""


def check_names(config: RigsaConfig, model: nn.Module, parameters: Iterable[str], adapted: Iterable[str]) -> None:
    """Raises ValueError where a name or a number in `config` fits nothing.

    Args:
        config: of an adapter that has just been put onto `model`.
        model: the base model.
        parameters: names of the parameters that the adapter has taken.
        adapted: names of the layers that the adapter has taken.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    kept = [name for name in config.modules_to_save or () if name not in HEADS]
    _expect("target_modules", config.target_modules, modules, "module")
    _expect("exclude_modules", config.exclude_modules, modules, "module")
    _expect("target_parameters", config.target_parameters, parameters, "parameter")
    _expect("modules_to_save", kept, modules, "module")
    numbers = config.layers_to_transform
    numbers = [numbers] if isinstance(numbers, int) else numbers or []
    for number in numbers:
        if not any(f".{number}." in name for name in adapted):
            raise ValueError(f"layers_to_transform: no layer numbered {number} has a module of target_modules")


def _expect(option: str, wanted: str | Iterable[str] | None, names: Iterable[str], kind: str) -> None:
    if wanted is None or isinstance(wanted, str):  # a pattern is one name, and PEFT says when it fits nothing
        return
    known = list(names)
    for one in sorted(wanted):
        if not any(f".{name}".endswith(f".{one}") for name in known):
            raise ValueError(f"{option}: the model has no {kind} {one!r}; every name must be, or end, the name of one")
