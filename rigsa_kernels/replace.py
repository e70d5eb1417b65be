"""Put gated sparse differences into a model, take them out again, or merge them into its weights."""

from __future__ import annotations

import fnmatch
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn as nn

from rigsa_kernels.dispatch import Path
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.in_place import Peers, restore
from rigsa_kernels.init import layer_key
from rigsa_kernels.linear import ALPHA_INIT, HALF_DTYPES, GatedSparseLinear, Numerics, is_plain_linear
from rigsa_kernels.nf4 import is_nf4_linear, nf4_base
from rigsa_kernels.select import drawn, top_k

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]
ChoosePattern = Callable[[str, nn.Linear], SparsePattern]
"""Where the layer of this name may be non-zero."""

_after_replacing: list[Callable[[nn.Module], object]] = []


def after_replacing(hook: Callable[[nn.Module], object]) -> None:
    """Have ``hook(model)`` called at the end of every `replace_linears`."""
    _after_replacing.append(hook)


def replace_linears(
    model: M,
    include: Selection = "*",
    *,
    exclude: Sequence[str] = (),
    seed: int = 0,
    shared_gate: bool = False,
    density: float | None = None,
    pattern: ChoosePattern | None = None,
    alpha_init: float = ALPHA_INIT,
    init_scale: float = 1.0,
    values_dtype: torch.dtype | None = None,
    numerics: Numerics = "auto",
    force: Path | None = None,
    in_place: bool = True,
) -> M:
    """Swap the linear layers of `model` for `GatedSparseLinear`, in place, and freeze everything else.

    The language-model head and every weight that another module shares (tied embeddings) are left alone, as in the
    paper (section 4.4). What was replaced is logged at INFO, and `adapter_summary` says it at any time.

    Args:
        model: a `transformers` model, or any module with ``nn.Linear`` children.
        include: which layers: glob patterns over qualified names (``"model.layers.*.mlp.*"``; matched whole, so
            ``"lin1"`` is not ``"lin10"``), or a predicate ``(name, module) -> bool``.
        exclude: glob patterns to leave out.
        shared_gate: one gate for all layers instead of one each.
        density: share of each layer's entries that is free, drawn at random from the seed and the layer's name, in
            (0, 1]; the matrix of a layer is never made then. All entries are free by default.
        pattern: ``(name, linear)`` to the layer's pattern, in place of `density`.
        seed, alpha_init, init_scale, values_dtype, numerics, force, in_place: see `GatedSparseLinear`. A layer's
            initial values depend on the seed and on its own name only.

    Returns:
        `model`.

    Raises:
        ValueError: nothing to replace, a 4-bit layer of a shape that cannot be decoded, two layers that would draw
            the same initial values, or a `density` that is out of range or leaves a layer without a free entry.
            `model` is unchanged.
    """
    selected, skipped = select_linears(model, include, exclude)
    if not selected:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5]) or "the model has no nn.Linear"
        raise ValueError(f"include: {include!r} selects no linear layer that can be replaced ({reasons})")
    keys = {name: layer_key(name) for name in selected}
    if len(set(keys.values())) < len(keys):
        twice = [name for name, key in keys.items() if Counter(keys.values())[key] > 1]
        raise ValueError(f"model: {' and '.join(twice)} have names that hash to one random stream; rename one")
    for linear in selected.values():
        if is_nf4_linear(linear):
            nf4_base(linear.weight)  # refuses a shape that cannot be decoded
    if density is not None:
        pattern = _random_patterns(selected, density, pattern, seed)
    model.requires_grad_(False)
    alpha, peers = None, Peers()
    for name, linear in selected.items():
        gated = GatedSparseLinear(
            linear,
            seed=seed,
            key=keys[name],
            pattern=pattern(name, linear) if pattern else None,
            alpha=alpha,
            alpha_init=alpha_init,
            init_scale=init_scale,
            values_dtype=values_dtype,
            numerics=numerics,
            force=force,
            in_place=in_place,
        )
        gated.join(peers)
        _set_module(model, name, gated.train(linear.training))
        alpha = gated.rigsa_alpha if shared_gate else None
    logger.info("%s", adapter_summary(model))
    if numerics == "composed" and init_scale:
        _warn_of_the_dead_zone(gated_linears(model).values(), alpha_init)
    for name, reason in skipped:
        logger.info("left alone: %s (%s)", name, reason)
    for hook in _after_replacing:
        hook(model)
    return model


def _random_patterns(
    layers: Mapping[str, nn.Linear], density: float, pattern: ChoosePattern | None, seed: int
) -> ChoosePattern:
    """``round(density * N * K)`` entries of each layer, drawn from (`seed`, name) when they are asked for."""
    if pattern is not None:
        raise ValueError("density: expected none beside a pattern, got both")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
    kept = {name: round(density * layer.out_features * layer.in_features) for name, layer in layers.items()}
    if empty := [name for name, number in kept.items() if number == 0]:
        raise ValueError(f"density: {density} leaves {len(empty)} layers empty ({empty[0]}, ...); keep more")

    def draw(name: str, linear: nn.Linear) -> SparsePattern:
        shape = (linear.out_features, linear.in_features)
        entries = drawn(shape, seed=seed, key=layer_key(name), device=linear.weight.device)
        return top_k({name: entries}, {name: kept[name]})[name]

    return draw


def _warn_of_the_dead_zone(layers: Iterable[GatedSparseLinear], alpha_init: float) -> None:
    thresholds = [layer.composed_threshold() for layer in layers if layer.dtype in HALF_DTYPES]
    lost = [threshold for threshold in thresholds if abs(alpha_init) < threshold]
    if lost:
        logger.warning(
            "numerics='composed': %d of %d layers start with gates at %.0e, and 16-bit rounding takes most of an "
            "adapter away until its gate reaches about %.0e (the median layer); 'auto' switches there by itself",
            len(lost), len(thresholds), alpha_init, statistics.median(lost),
        )  # fmt: skip


def restore_linears(model: M) -> M:
    """The inverse: every layer becomes the ``nn.Linear`` it was, with its own weight. The adapter is dropped.

    Parameters stay frozen, as `replace_linears` left them.
    """
    for name, gated in gated_linears(model).items():
        _set_module(model, name, gated.restored())
    return model


def restore_weights(model: M) -> M:
    """Bring W0 back into every gated layer's `weight`, bit for bit, until the next pass composes it again.

    Call it before reading or writing the frozen weights of a model with packed patterns between a pass and the
    optimiser's step, or in evaluation: there they hold ``W0 + alpha * D`` (`GatedSparseLinear`). State dicts, copies
    and `GatedSparseLinear.frozen_matrix` show W0 without it.

    Returns:
        `model`.
    """
    layers = gated_linears(model).values()
    restore(layer.in_place_weight for layer in layers if layer.in_place_weight is not None)
    return model


def merge_linears(model: M) -> M:
    """Put the adapter into the weights: every layer becomes an ``nn.Linear`` with ``W0 + alpha * D`` rounded to W0's
    dtype. For generation, at the base model's speed, and for ``model.save_pretrained``.

    A layer that composes (`GatedSparseLinear`) gives the same bits as before. W0 is not written to: whoever else holds
    it keeps it, and the merged model does not. Parameters stay frozen.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no gated layer, one in four bits, or one in 16 bits that takes two products because
            rounding the sum would lose its adapter. `model` is unchanged.
    """
    layers = gated_linears(model)
    if not layers:
        raise ValueError(f"model: expected gated sparse layers to merge, found none in {type(model).__name__}")
    quantised = [name for name, layer in layers.items() if layer.is_nf4]
    if quantised:
        raise ValueError(
            f"model: {_names(quantised, layers)} in four bits, which have no room for a difference; "
            "load the base in 16 or 32 bits and the adapter onto it"
        )
    losing = [name for name, layer in layers.items() if layer.merging_loses()]
    if losing:
        raise ValueError(
            f"model: {_names(losing, layers)} in 16 bits, and rounding W0 + alpha * D would take most of an adapter "
            "away; merge model.float()"
        )
    restore_weights(model)
    for name, layer in layers.items():
        _set_module(model, name, layer.merged())
    return model


def _names(some: Sequence[str], layers: Mapping[str, object]) -> str:
    return f"{len(some)} of {len(layers)} gated layers ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''}) are"


def gated_linears(model: nn.Module) -> dict[str, GatedSparseLinear]:
    """Qualified name to layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedSparseLinear)}


def adapter_summary(model: nn.Module) -> str:
    """One line: how many layers carry a difference, how many weights they have and how many of them are free."""
    layers = gated_linears(model).values()
    weights = sum(layer.num_weights for layer in layers)
    free = sum(layer.rigsa_values.numel() for layer in layers)
    return f"{len(layers)} gated sparse layers: {free:,} of {weights:,} weights free ({free / max(weights, 1):.2%})"


def select_linears(
    model: nn.Module, include: Selection, exclude: Sequence[str]
) -> tuple[dict[str, nn.Linear], list[tuple[str, str]]]:
    """``(to replace, left alone with the reason)`` among the linear layers of `model` that `include` names."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    selected: dict[str, nn.Linear] = {}
    skipped: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if not _matches(name, module, include) or _matches(name, module, exclude):
            skipped.append((name, "not selected"))
        elif module is head:
            skipped.append((name, "the language-model head"))
        elif uses[id(module.weight)] > 1:
            skipped.append((name, "its weight is tied to another module's"))
        elif not is_plain_linear(module) and not is_nf4_linear(module):
            skipped.append((name, f"{type(module).__name__} is neither a plain floating-point nn.Linear nor in NF4"))
        else:
            selected[name] = module
    return selected, skipped


def _matches(name: str, module: nn.Module, selection: Selection) -> bool:
    if callable(selection):
        return selection(name, module)
    patterns = [selection] if isinstance(selection, str) else selection
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
