"""Which layers of a model get an adapter, and for each of the others the reason why not."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn

from rigsa_kernels.hooks import has_own_forward
from rigsa_kernels.linear import is_plain_linear
from rigsa_kernels.nf4 import is_nf4_linear

Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]
BASE_OF_PEFT = "base_layer"
"""What PEFT calls the layer that one of its own is put around; all others below that one are an adapter's."""
NAMES_IN_ERRORS = 5
NOT_SELECTED = "not selected"


def select_linears(
    model: nn.Module, include: Selection, exclude: Sequence[str], modules_to_save: Sequence[str] = ()
) -> tuple[dict[str, nn.Linear], list[tuple[str, str]]]:
    """``(to replace, left alone with the reason)`` among the linear layers of `model` that `include` names."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    of_peft, saved = adapters_of_peft(model), _below(model, modules_to_save)
    selected: dict[str, nn.Linear] = {}
    skipped: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if of_peft(name):
            skipped.append((name, "it is an adapter of PEFT"))
        elif name in saved:
            skipped.append((name, "it is trained as it is (modules_to_save)"))
        elif not matches(name, module, include) or matches(name, module, exclude):
            skipped.append((name, NOT_SELECTED))
        elif module is head:
            skipped.append((name, "the language-model head"))
        elif not _holds_its_weight(module):
            skipped.append((name, "its weight or bias is computed from other parameters (a parametrisation)"))
        elif uses[id(module.weight)] > 1:
            skipped.append((name, "its weight is tied to another module's"))
        elif module.weight.is_meta and "_hf_hook" in module.__dict__:
            skipped.append((name, "its weight is offloaded"))
        elif has_own_forward(module):
            skipped.append((name, "its forward is set on the instance, so what it computes is unknown"))
        elif not is_plain_linear(module) and not is_nf4_linear(module):
            skipped.append((name, f"{type(module).__name__} is neither a plain floating-point nn.Linear nor in NF4"))
        elif not module.in_features or not module.out_features:
            skipped.append((name, "it has no weights"))
        else:
            selected[name] = module
    return selected, skipped


def check_selection(
    model: nn.Module, include: Selection, selected: dict[str, nn.Linear], skipped: list[tuple[str, str]]
) -> None:
    """Raises ValueError where nothing is selected, or a pattern of `include` names no linear layer at all."""
    names = [*selected, *(name for name, _ in skipped)]
    if not names:
        raise ValueError(f"model: expected linear layers to adapt; {type(model).__name__} has no nn.Linear")
    patterns = [] if callable(include) else [include] if isinstance(include, str) else include
    unknown = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if unknown:
        raise ValueError(
            f"include: {unknown[0]!r} selects no linear layer; patterns match whole names ('*{unknown[0].lstrip('*')}' "
            f"would match an ending), and this model's are {_some(names)}"
        )
    if not selected:
        others = [(name, reason) for name, reason in skipped if reason != NOT_SELECTED] or skipped
        reasons = "; ".join(f"{name}: {reason}" for name, reason in others[:NAMES_IN_ERRORS])
        raise ValueError(f"include: {include!r} selects no linear layer that can be replaced ({reasons})")


def check_modules_to_save(model: nn.Module, modules_to_save: Sequence[str]) -> None:
    """Raises ValueError where a pattern names no module."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in modules_to_save:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            children = [name for name, _ in model.named_children()]
            raise ValueError(
                f"modules_to_save: {pattern!r} names no module; patterns match whole names, such as {_some(children)}"
            )


def matches(name: str, module: nn.Module, selection: Selection) -> bool:
    """Whether `selection` names the module."""
    if callable(selection):
        return selection(name, module)
    patterns = [selection] if isinstance(selection, str) else selection
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def adapters_of_peft(model: nn.Module) -> Callable[[str], bool]:
    """A function that says of the name of a module or a parameter whether it belongs to an adapter of PEFT.

    PEFT's layers are told by the attribute that lists their parts, so PEFT need not be installed.
    """
    around = [name for name, module in model.named_modules() if hasattr(type(module), "adapter_layer_names")]

    def belongs(name: str) -> bool:
        inside = [name[len(outer) :].lstrip(".") for outer in around if name.startswith(f"{outer}." if outer else "")]
        return any(rest and rest.split(".")[0] != BASE_OF_PEFT for rest in inside)

    return belongs


def _below(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the modules that `patterns` name and of all below them."""
    roots = [(name, module) for name, module in model.named_modules() if name and matches(name, module, patterns)]
    return {f"{name}.{inner}".rstrip(".") for name, root in roots for inner, _ in root.named_modules()}


def _holds_its_weight(module: nn.Linear) -> bool:
    """Whether weight and bias are the layer's parameters; weight_norm and pruning compute them from others."""
    parameters: dict[str, Any] = module._parameters
    return parameters.get("weight") is not None and "bias" in parameters


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_IN_ERRORS
    return ", ".join(names[:NAMES_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
