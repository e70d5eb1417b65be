"""Put gated sparse differences into a model, take them out again, and say which weights they reach."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from .dispatch import Path
from .format import MAX_IN_FEATURES, SparsePattern
from .hooks import carry_hooks, has_own_forward
from .in_place import Peers, restore
from .init import check_stream, layer_key
from .linear import ALPHA_INIT, HALF_DTYPES, GatedSparseLinear, Numerics
from .parametrized import GatedSparseWeight, attach, detach
from .select import drawn_units, of_units, top_k
from .selection import (
    Selection,
    Weight,
    adapters_of_peft,
    check_modules_to_save,
    check_selection,
    matches,
    select_linears,
    select_weights,
)
from .tiles import Tile, grid_of

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
ChoosePattern = Callable[[str, tuple[int, int]], SparsePattern]
"""The name and the shape ``(N, K)`` of a layer to where it may be non-zero."""

_after_replacing: list[Callable[[nn.Module], object]] = []


def after_replacing(hook: Callable[[nn.Module], object]) -> None:
    """Have ``hook(model)`` called at the end of every `replace_linears`."""
    _after_replacing.append(hook)


def hooks_after_replacing() -> tuple[Callable[[nn.Module], object], ...]:
    """What is called at the end of every `replace_linears`, in this order."""
    return tuple(_after_replacing)


VALUES_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES_IN_SUMMARY = 8


def replace_linears(
    model: M,
    include: Selection = "*",
    *,
    exclude: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    by_weight: Selection = (),
    seed: int = 0,
    shared_gate: bool = False,
    density: float | None = None,
    tile: str | int | Tile | None = None,
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
    paper (section 4.4). So are layers whose weight is computed from other parameters (weight_norm), layers with a
    `forward` of the instance's own, and the adapters that PEFT has put into the model, which stay trainable. Hooks go
    with the layer. What was replaced is logged at INFO, and `adapter_summary` says it at any time.

    Weights that code reads where there is no layer that it calls get their difference there (`GatedSparseWeight`):
    experts that are one parameter of three dimensions, GPT-2's ``Conv1D``, ``nn.MultiheadAttention``, and layers that
    are known to be read by the module around them. `verify_adapted` finds any other.

    A second call adds layers: what is trainable in a model that has gated layers already stays so.

    Args:
        model: a `transformers` model, or any module with ``nn.Linear`` children.
        include: which layers: glob patterns over qualified names (``"model.layers.*.mlp.*"``; matched whole, so
            ``"lin1"`` is not ``"lin10"``), or a predicate ``(name, module) -> bool``.
        exclude: glob patterns to leave out.
        modules_to_save: glob patterns of modules that are trained as they are, such as a new classifier.
        by_weight: which of the selected linear layers are read, not called.
        shared_gate: one gate for all layers of this call instead of one each.
        density: share of each layer's entries that is free, drawn at random from the seed and the layer's name, in
            (0, 1]; the matrix of a layer is never made then. All entries are free by default.
        tile: draw whole tiles in place of entries: ``32`` (squares), ``"16x64"``, ``"rows"`` or ``"columns"``
            (`rigsa_kernels.tiles`); ``round(density * tiles)`` of each layer.
        pattern: name and shape ``(N, K)`` to the layer's pattern, in place of `density`.
        seed, alpha_init, init_scale, values_dtype, numerics, force, in_place: see `GatedSparseLinear`. A layer's
            initial values depend on the seed and on its own name only.

    Returns:
        `model`.

    Raises:
        ValueError: an option is out of range; nothing to replace, or a pattern that names nothing; `model` is itself a
            linear layer, or carries adapters of this method under PEFT; a `density` that leaves a layer without a free
            entry; a layer that is too wide for a pattern, a 4-bit layer of a shape that cannot be decoded, or two
            layers that would draw the same initial values. `model` is unchanged.
    """
    modules_to_save = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    _check_options(seed, init_scale, values_dtype)
    if isinstance(model, nn.Linear | GatedSparseLinear):
        raise ValueError(
            f"model: expected a module that holds linear layers, got a {type(model).__name__}, which cannot be "
            "replaced inside itself; pass nn.Sequential(model)"
        )
    check_modules_to_save(model, modules_to_save)
    refuse_adapters_of_peft(model)
    linears, skipped = select_linears(model, include, exclude, modules_to_save)
    weights, others = select_weights(model, linears, include, exclude, modules_to_save, by_weight)
    linears = {name: linear for name, linear in linears.items() if name not in {*weights, *(one for one, _ in others)}}
    skipped += others
    before = gated_linears(model)
    check_selection(include, [*linears, *weights], [*skipped, *((name, "it is adapted already") for name in before)])
    keys = _stream_keys([*linears, *weights], before)
    _check_weights(linears, weights, shared_gate)
    options: dict[str, Any] = {"seed": seed, "alpha_init": alpha_init, "init_scale": init_scale}
    options |= {"values_dtype": values_dtype, "numerics": numerics, "force": force}
    if density is not None:
        pattern = _random_patterns(_shapes(linears, weights), density, tile, pattern, seed)
    elif tile is not None:
        raise ValueError(f"tile: expected none without a density to draw with, got {tile!r}")
    gated = _build(model, linears, weights, keys, shared_gate, pattern, options | {"in_place": in_place})
    peers = Peers()
    for layer in gated.values():
        layer.join(peers)
    if not before:
        _freeze(model)
    for name, linear in linears.items():
        carry_hooks(linear, gated[name])
        gated[name].train(linear.training)
    swap_modules(model, {name: gated[name] for name in linears})
    for name, weight in weights.items():
        attach(cast(GatedSparseWeight, gated[name].train(weight.owner.training)))
    _train(model, modules_to_save)
    logger.info("%s", adapter_summary(model))
    if init_scale:
        _warn_of_the_dead_zone([layer for layer in gated.values() if layer.numerics == "composed"], alpha_init)
    for name, reason in skipped:
        logger.info("left alone: %s (%s)", name, reason)
    for hook in _after_replacing:
        hook(model)
    return model


def refuse_adapters_of_peft(model: nn.Module) -> None:
    """Raises ValueError where the gated layers of `model` are adapters that PEFT holds, beside the layers."""
    of_peft = adapters_of_peft(model)
    name = next((name for name in gated_linears(model) if of_peft(name)), None)
    if name is not None:
        raise ValueError(
            f"model: its adapters are PEFT's ({name}, ...), which adds, merges and takes them out itself: "
            "model.add_adapter, model.merge_adapter, model.merge_and_unload(), model.unload()"
        )


def _check_options(seed: int, init_scale: float, values_dtype: torch.dtype | None) -> None:
    check_stream(seed, 0)
    if not 0 <= init_scale < math.inf:
        raise ValueError(f"init_scale: expected a finite number, 0 or more, got {init_scale}")
    if values_dtype not in VALUES_DTYPES:
        expected = ", ".join(str(dtype) for dtype in VALUES_DTYPES)
        raise ValueError(f"values_dtype: expected one of {expected}, got {values_dtype}")


def _stream_keys(names: Sequence[str], before: Mapping[str, GatedSparseLinear]) -> dict[str, int]:
    """Each layer's number in the random stream, checked against those of the layers that were adapted before."""
    keys = {name: layer_key(name) for name in names}
    every = keys | {name: layer.key for name, layer in before.items()}
    uses = Counter(every.values())
    twice = [name for name, key in every.items() if uses[key] > 1 and key in keys.values()]
    if twice:
        raise ValueError(f"model: {' and '.join(twice)} have names that hash to one random stream; rename one")
    return keys


def _check_weights(linears: Mapping[str, nn.Linear], weights: Mapping[str, Weight], shared_gate: bool) -> None:
    columns = {name: linear.in_features for name, linear in linears.items()}
    columns |= {name: weight.parameter.shape[-1] for name, weight in weights.items()}
    for name, number in columns.items():
        if number > MAX_IN_FEATURES:
            raise ValueError(
                f"model: expected layers of at most {MAX_IN_FEATURES} columns, as offsets within a row have 16 bits, "
                f"got {name} with {number}; exclude it"
            )
    devices = {linear.weight.device for linear in linears.values()}
    devices |= {weight.parameter.device for weight in weights.values()}
    if shared_gate and len(devices) > 1:
        raise ValueError(f"shared_gate: expected all layers on one device, got {', '.join(sorted(map(str, devices)))}")


def _build(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    weights: Mapping[str, Weight],
    keys: Mapping[str, int],
    shared_gate: bool,
    pattern: ChoosePattern | None,
    options: dict[str, Any],
) -> dict[str, GatedSparseLinear]:
    """The gated layers of all names, not yet in the model, whose parameters are as they were where one is refused."""
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gated, alpha = dict[str, GatedSparseLinear](), None
    name = ""
    try:
        for name, linear in linears.items():
            own = pattern(name, (linear.out_features, linear.in_features)) if pattern else None
            gated[name] = GatedSparseLinear(linear, key=keys[name], alpha=alpha, pattern=own, **options)
            alpha = gated[name].rigsa_alpha if shared_gate else None
        for name, weight in weights.items():
            gated[name] = GatedSparseWeight(
                weight.owner,
                weight.name,
                fan_in=weight.fan_in,
                key=keys[name],
                alpha=alpha,
                pattern=pattern(name, _matrix_shape(weight.parameter)) if pattern else None,
                **options,
            )
            alpha = gated[name].rigsa_alpha if shared_gate else None
    except Exception as error:
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if isinstance(error, ValueError):
            raise ValueError(f"{error} (in {name})") from error
        raise
    return gated


def _shapes(linears: Mapping[str, nn.Linear], weights: Mapping[str, Weight]) -> dict[str, tuple[int, int]]:
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return shapes | {name: _matrix_shape(weight.parameter) for name, weight in weights.items()}


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """``(N, K)`` of a parameter whose last dimension is a row."""
    return parameter.numel() // parameter.shape[-1], parameter.shape[-1]


def _random_patterns(
    shapes: Mapping[str, tuple[int, int]],
    density: float,
    tile: str | int | Tile | None,
    pattern: ChoosePattern | None,
    seed: int,
) -> ChoosePattern:
    """``round(density * N * K)`` entries of each layer, or of its tiles, drawn from (`seed`, name) when asked for."""
    if pattern is not None:
        raise ValueError("density: expected none beside a pattern, got both")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
    units = {name: grid_of(shape, tile) for name, shape in shapes.items()}
    kept = {name: round(density * rows * columns) for name, (rows, columns) in units.items()}
    if empty := [name for name, number in kept.items() if number == 0]:
        raise ValueError(f"density: {density} leaves {len(empty)} layers empty ({empty[0]}, ...); keep more")

    def draw(name: str, shape: tuple[int, int]) -> SparsePattern:
        entries = drawn_units(shape, tile, seed=seed, key=layer_key(name))
        return of_units(top_k({name: entries}, {name: kept[name]})[name], shape, tile)

    return draw


def _freeze(model: nn.Module) -> None:
    """All parameters but those of PEFT's adapters."""
    of_peft = adapters_of_peft(model)
    for name, parameter in model.named_parameters():
        if not of_peft(name):
            parameter.requires_grad_(False)


def _train(model: nn.Module, modules: Sequence[str]) -> None:
    for name, module in model.named_modules():
        if name and matches(name, module, modules):
            module.requires_grad_(True)


def _warn_of_the_dead_zone(layers: Iterable[GatedSparseLinear], alpha_init: float) -> None:
    thresholds = [layer.composed_threshold() for layer in layers if layer.dtype in HALF_DTYPES]
    lost = [threshold for threshold in thresholds if abs(alpha_init) < threshold]
    if lost:
        logger.warning(
            "composed: %d of %d layers start with gates at %.0e, and 16-bit rounding takes most of an adapter away "
            "until its gate reaches about %.0e (the median layer); numerics='auto' switches there by itself, but for "
            "weights that code reads; alpha_init opens gates further",
            len(lost), len(thresholds), alpha_init, statistics.median(lost),
        )  # fmt: skip


def restore_linears(model: M) -> M:
    """The inverse: every layer becomes the ``nn.Linear`` it was, with its own weight. The adapter is dropped.

    Parameters stay frozen, as `replace_linears` left them. Hooks go with the layer.

    Raises:
        ValueError: `model` has no gated layer, is itself one or carries adapters of this method under PEFT, or a layer
            has a `forward` of the instance's own. `model` is unchanged.
    """
    refuse_adapters_of_peft(model)
    layers = gated_linears(model)
    if not layers:
        raise ValueError(f"model: expected gated sparse layers to restore, found none in {type(model).__name__}")
    check_replaceable(layers)
    linears = {}
    for name, gated in layers.items():
        if isinstance(gated, GatedSparseWeight):
            detach(gated)
        else:
            linears[name] = gated.restored()
            carry_hooks(gated, linears[name])
    swap_modules(model, linears)
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


def check_replaceable(layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where another layer cannot take the place of one of these without a loss."""
    if "" in layers:
        raise ValueError("model: expected a module that holds gated layers, got a gated layer itself")
    own = [name for name, layer in layers.items() if has_own_forward(layer)]
    if own:
        raise ValueError(
            f"model: {own[0]} has a forward of its own, set on the instance, that the layer in its place would not "
            "have; remove it first"
        )


def gated_linears(model: nn.Module) -> dict[str, GatedSparseLinear]:
    """Qualified name to layer, in the model's order. Of several adapters of one weight it is the one in use."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GatedSparseLinear) and not module.waiting
    }


def adapter_summary(model: nn.Module) -> str:
    """One line: how many layers carry a difference, how many weights they have and how many of them are free, which
    share that is of all weights in the model's matrices, which of those are left out, and how many layers round their
    difference away."""
    layers = gated_linears(model).values()
    weights = sum(layer.num_weights for layer in layers)
    free = sum(layer.rigsa_values.numel() for layer in layers)
    summary = f"{len(layers)} gated sparse layers: {free:,} of {weights:,} weights free ({free / max(weights, 1):.2%})"
    others = left_out(model)
    total = weights + sum(others.values())
    summary += f"; they hold {weights / max(total, 1):.2%} of the model's {total:,} weights in matrices"
    summary += f", which leaves out {_by_kind(others)}" if others else ""
    read = [layer for layer in layers if isinstance(layer, GatedSparseWeight) and layer.dtype in HALF_DTYPES]
    if read:
        summary += (
            f"; {len(read)} of the layers are read as weights in 16 bits, which rounds a small difference away "
            "(rounding_losses says how much, verify_adapted names those whose gate is not open enough)"
        )
    return summary


def left_out(model: nn.Module) -> dict[str, int]:
    """Name to number of weights of every parameter that is a matrix, or a stack of them, and carries no difference.

    These are embeddings and the head, kernels of convolutions, experts, and layers that were not selected. What belongs
    to an adapter of PEFT is not counted.
    """
    adapted = {id(layer.weight) for layer in gated_linears(model).values()}
    of_peft = adapters_of_peft(model)
    found = {}
    for name, parameter in model.named_parameters():
        is_ours = name.rpartition(".")[2].startswith("rigsa_")
        if parameter.dim() > 1 and id(parameter) not in adapted and not is_ours and not of_peft(name):
            state = getattr(parameter, "quant_state", None)
            found[name] = parameter.numel() if state is None else math.prod(state.shape)
    return found


def _by_kind(others: Mapping[str, int]) -> str:
    """Names whose numbers alone differ are one kind; the kinds with most weights come first."""
    kinds = defaultdict[str, list[int]](list)
    for name, number in others.items():
        kinds[re.sub(r"(?<![^.])\d+(?![^.])", "*", name.removesuffix(".weight"))].append(number)
    largest = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
    named = [f"{name} ({sum(numbers):,})" for name, numbers in largest[:NAMES_IN_SUMMARY]]
    more = f" and {len(largest) - NAMES_IN_SUMMARY} more" if len(largest) > NAMES_IN_SUMMARY else ""
    return ", ".join(named) + more


def swap_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each module of `new` in the place that its name says, and wherever else the one that stands there is used."""
    by_old = {id(model.get_submodule(name)): module for name, module in new.items()}
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_old:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, by_old[id(module)])
