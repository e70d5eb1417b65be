"""Which layers and parameters of a model get an adapter, and for each of the others the reason why not."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from .hooks import has_own_forward
from .linear import is_plain_linear
from .nf4 import is_nf4_linear
from .patched import refuse_unsloth

Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]
BASE_OF_PEFT = "base_layer"
"""What PEFT calls the layer that one of its own is put around; all others below that one are an adapter's."""
READ_BY_THE_PARENT: tuple[tuple[type[nn.Module] | str, tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
    ("MambaMixer", ("x_proj", "dt_proj", "out_proj")),
    ("Mamba2Mixer", ("out_proj",)),
    ("BambaMixer", ("out_proj",)),
    ("WavLMAttention", ("out_proj",)),
)
"""Linear layers whose weight is read by the module around them, a class or the ending of its name, in some way that it
may take."""
READ_BY_THEMSELVES = {nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")}
"""Matrices that are a module's own parameters."""
NAMES_IN_ERRORS = 5
NOT_SELECTED = "not selected"


def select_linears(
    model: nn.Module, include: Selection, exclude: Sequence[str], modules_to_save: Sequence[str] = ()
) -> tuple[dict[str, nn.Linear], list[tuple[str, str]]]:
    """``(to replace, left alone with the reason)`` among the linear layers of `model` that `include` names.

    Raises:
        ValueError: unsloth has replaced passes of `model`.
    """
    refuse_unsloth(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    heads = language_model_heads(model)
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
        elif module in heads:
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


def language_model_heads(model: nn.Module) -> set[nn.Module]:
    """What `model`, and every model of transformers inside it, calls its output embeddings."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        with suppress(NotImplementedError):  # of a model without
            head = get_head() if callable(get_head) else None
            heads |= {head} if isinstance(head, nn.Module) else set()
    return heads


@dataclass(frozen=True)
class Weight:
    """A parameter that gets an adapter where code reads it (`rigsa_kernels.parametrized`).

    Attributes:
        owner: the module that has it.
        name: of the parameter.
        fan_in: inputs of each output.
    """

    owner: nn.Module
    name: str
    fan_in: int

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner.get_parameter(self.name)


def select_weights(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    include: Selection,
    exclude: Sequence[str],
    modules_to_save: Sequence[str] = (),
    by_weight: Selection = (),
) -> tuple[dict[str, Weight], list[tuple[str, str]]]:
    """``(to adapt, left alone with the reason)`` among the parameters that code reads: experts and projections of
    ``nn.MultiheadAttention``, GPT-2's ``Conv1D``, and those of `linears` that are read or that `by_weight` names.

    A weight has the name of its layer, any other parameter its own.
    """
    read = read_by_the_parent(model)
    by_name = {name: linear for name, linear in linears.items() if name in read or matches(name, linear, by_weight)}
    selected = {
        name: Weight(linear, "weight", linear.in_features)
        for name, linear in by_name.items()
        if not is_nf4_linear(linear)
    }
    skipped = [(name, "its weight is read, and it is in four bits") for name in by_name if name not in selected]
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    of_peft, saved = adapters_of_peft(model), _below(model, modules_to_save)
    for module_name, module in model.named_modules():
        for weight in own_matrices(module):
            name = f"{module_name}.{weight.name}".removeprefix(".").removesuffix(".weight")
            if of_peft(name) or module_name in saved:
                continue
            if not matches(name, module, include) or matches(name, module, exclude):
                skipped.append((name, NOT_SELECTED))
            elif uses[id(weight.parameter)] > 1:
                skipped.append((name, "it is tied to another module's"))
            elif not weight.parameter.is_floating_point() or not weight.parameter.numel():
                skipped.append((name, f"{weight.parameter.dtype} {list(weight.parameter.shape)} cannot be adapted"))
            else:
                selected[name] = weight
    return selected, skipped


def adaptable(model: nn.Module, include: Selection = "*", exclude: Sequence[str] = ()) -> dict[str, int]:
    """Name to number of weights of every layer and parameter that `replace_linears` would adapt with these patterns."""
    linears, _ = select_linears(model, include, exclude)
    weights, _ = select_weights(model, linears, include, exclude)
    found = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
    return found | {name: weight.parameter.numel() for name, weight in weights.items()}


def own_matrices(module: nn.Module) -> Iterator[Weight]:
    """The parameters of `module` itself that code is known to multiply by."""
    names = [name for kind, names in READ_BY_THEMSELVES.items() if isinstance(module, kind) for name in names]
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if name in names:
            yield Weight(module, name, parameter.shape[-1])
        elif parameter.dim() == 3 and parameter.shape[0] == getattr(module, "num_experts", None):
            yield Weight(module, name, parameter.shape[1 if getattr(module, "is_transposed", False) else 2])
        elif name == "weight" and type(module).__name__ == "Conv1D" and parameter.dim() == 2:
            yield Weight(module, name, parameter.shape[0])  # transformers' weight is [in, out]


def read_by_the_parent(model: nn.Module) -> set[str]:
    """Names of linear layers that are known to be read by the module around them, and not called."""
    found = set()
    for name, module in model.named_modules():
        for kind, children in READ_BY_THE_PARENT:
            is_kind = type(module).__name__.endswith(kind) if isinstance(kind, str) else isinstance(module, kind)
            found |= {f"{name}.{child}".removeprefix(".") for child in children} if is_kind else set()
    return found


def check_selection(include: Selection, selected: Sequence[str], skipped: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError where nothing is selected, or a pattern of `include` names nothing that could be."""
    names = [*selected, *(name for name, _ in skipped)]
    if not names:
        raise ValueError("model: expected linear layers to adapt; it has no nn.Linear")
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
