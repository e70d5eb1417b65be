"""Put the adapters of a model into its weights, take them out again to the bit, and say what rounding took away."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from ._ops import ops as operators
from .dequantizing import dequantize_rest, quantize_rest, rest_in_four_bits
from .hooks import TABLES, carry_hooks
from .linear import GatedSparseLinear
from .parametrized import GatedSparseWeight, attach, detach
from .reference import add_scaled
from .replace import (
    check_replaceable,
    gated_linears,
    refuse_adapters_of_peft,
    restore_weights,
    swap_modules,
)
from .selection import BASE_OF_PEFT, NAMES_IN_ERRORS

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Rounding:
    """What rounding ``W0 + alpha * D`` to the weight's dtype does to one layer's update.

    Attributes:
        updates: free entries at which ``alpha * D`` is not zero.
        lost: those of them whose weight stays what it was.
        error: root mean square of what was rounded away over that of the update; 0 where there is no update.
    """

    updates: int
    lost: int
    error: float


@dataclass
class _Kept:
    """What a merged layer remembers so that the adapter can be taken out again.

    Attributes:
        layer: the module that stood in the model. Its frozen weight is gone if `entries` is not None.
        gated: the gated layer in it, or itself.
        entries: the weight's values at the free entries before the merge.
        merged: and after it.
    """

    layer: nn.Module
    gated: GatedSparseLinear
    entries: Tensor | None = None
    merged: Tensor | None = None


@dataclass(frozen=True)
class _Job:
    """A layer to merge: the module that is replaced, the gated layer in it, and PEFT's difference beside."""

    place: str
    outer: nn.Module
    gated: GatedSparseLinear

    def low_rank(self) -> Tensor | None:
        """``[N, K]``, what PEFT's adapter adds to the weight; None without one, or where it is merged or off."""
        if self.outer is self.gated:
            return None
        peft: Any = self.outer
        if peft.disable_adapters:
            return None
        names = [name for name in peft.active_adapters if name in peft.lora_A and name not in peft.merged_adapters]
        return cast(Tensor, sum(peft.get_delta_weight(name).float() for name in names)) if names else None


def merge_linears(model: M, *, keep_adapter: bool = False, dequantize: bool = False) -> M:
    """Put the adapter into the weights: every layer becomes an ``nn.Linear`` with ``W0 + alpha * D`` rounded to W0's
    dtype. For generation, at the base model's speed, and for ``model.save_pretrained``.

    A layer that composes (`GatedSparseLinear`) gives the same bits as before. W0 is not written to: whoever else holds
    it keeps it, and the merged model does not. Parameters stay frozen; hooks go with the layer. A LoRA of PEFT around a
    gated layer (RoSA) is merged with it, in one rounding. `rounding_losses` says beforehand what rounding takes away.

    Args:
        model: with gated layers; it is changed in place.
        keep_adapter: remember what `unmerge_linears` needs: values, patterns and the weights at the free entries. A
            dense pattern, and a layer with a LoRA or in four bits, remembers its whole weight.
        dequantize: merge layers in four bits into a weight in the dtype that they compute in, 16 or 32 bits. Layers in
            four bits that carry no adapter become plain ones, too, and the model's configuration forgets that it was
            quantised: it saves and loads as any other.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no gated layer or is one itself; a layer is in four bits, without `dequantize`, or in 16
            bits and takes two products because rounding the sum would lose its adapter; under `dequantize`, a layer
            is quantised in another way than NF4; a gate or a value is not finite, or the sum exceeds the dtype; a layer
            has a `forward` of the instance's own or an adapter of PEFT that is not a plain LoRA. `model` is unchanged.
    """
    refuse_adapters_of_peft(model)
    jobs = list(_jobs(model))
    if not jobs:
        raise ValueError(f"model: expected gated sparse layers to merge, found none in {type(model).__name__}")
    check_replaceable({job.place: job.outer for job in jobs} | gated_linears(model))
    gated = {job.place: job.gated for job in jobs}
    quantised = [name for name, layer in gated.items() if layer.is_nf4]
    if quantised and not dequantize:
        raise ValueError(
            f"model: {_names(quantised, gated)} in four bits, which have no room for a difference; pass "
            "dequantize=True, or load the base in 16 or 32 bits and the adapter onto it"
        )
    losing = [name for name, layer in gated.items() if _is_finite(layer) and layer.merging_loses()]
    if losing:
        raise ValueError(
            f"model: {_names(losing, gated)} in 16 bits, and rounding W0 + alpha * D would take most of an adapter "
            "away; merge model.float()"
        )
    rest = rest_in_four_bits(model) if dequantize else {}
    _check_finite(jobs)
    restore_weights(model)
    del gated
    while jobs:  # one by one, so that a layer's frozen weight can go before the next layer's merged one comes
        job = jobs.pop()
        if isinstance(job.gated, GatedSparseWeight):
            _merge_weight(job.gated, _weight(job), keep_adapter)
        else:
            swap_modules(model, {job.place: _merged(job, keep_adapter)})
    if quantised or rest:
        before = dequantize_rest(model, rest)
        if keep_adapter:
            model.__dict__["_rigsa_dequantized"] = before
    return model


def unmerge_linears(model: M) -> M:
    """The inverse of `merge_linears` with ``keep_adapter=True``: gated layers again, over W0 to the bit.

    Raises:
        ValueError: no layer remembers an adapter, or a merged weight has been written to since. `model` is unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if _kept(module)}
    if not layers:
        raise ValueError("model: expected layers that merge_linears(model, keep_adapter=True) made, found none")
    check_replaceable(layers)
    for name, module in layers.items():
        if not all(_is_as_merged(module, kept) for kept in _kept(module)):
            raise ValueError(f"model: the weight of {name} has been written to since it was merged, so W0 is lost")
    for name, module in layers.items():
        for kept in _kept(module):
            _write_back(module, kept)
            if isinstance(kept.gated, GatedSparseWeight):
                attach(kept.gated)
            else:
                carry_hooks(module, kept.layer)
                swap_modules(model, {name: kept.layer.train(module.training)})
        del module.__dict__["_rigsa_kept"]
    if before := model.__dict__.pop("_rigsa_dequantized", None):
        quantize_rest(model, before)
    return model


@torch.no_grad()
def rounding_losses(model: nn.Module) -> dict[str, Rounding]:
    """Name to what a merge of each gated layer would round away. Nothing is changed.

    Raises:
        ValueError: `model` has no gated layer, or a gate is not finite.
    """
    layers = gated_linears(model)
    if not layers:
        raise ValueError(f"model: expected gated sparse layers to merge, found none in {type(model).__name__}")
    return {name: _rounding(layer) for name, layer in layers.items()}


def _rounding(layer: GatedSparseLinear) -> Rounding:
    before = layer.pattern.gather(layer.frozen_matrix())
    after = add_scaled(before, layer.rigsa_values, layer.rigsa_alpha)
    update = (layer.rigsa_values.double() * layer.rigsa_alpha.double()).view(-1)
    moved = (after.double() - before.double()).view(-1)
    wanted = torch.linalg.vector_norm(update).item()
    error = torch.linalg.vector_norm(moved - update).item()
    return Rounding(
        updates=int((update != 0).sum()),
        lost=int(((update != 0) & (moved == 0)).sum()),
        error=error / wanted if wanted else 0.0,
    )


def _jobs(model: nn.Module) -> Iterator[_Job]:
    """What is to be replaced: gated layers, or the LoRA layers of PEFT around them."""
    for name, gated in gated_linears(model).items():
        parent, _, child = name.rpartition(".")
        outer = model.get_submodule(parent) if child == BASE_OF_PEFT else gated
        if outer is not gated and not hasattr(type(outer), "adapter_layer_names"):
            outer = gated
        if outer is not gated:
            _check_low_rank(parent, outer, gated)
        yield _Job(name if outer is gated else parent, outer, gated)


def _check_low_rank(name: str, outer: Any, gated: GatedSparseLinear) -> None:
    """Raises ValueError where PEFT's adapter is not one that adds a matrix to the weight and nothing else."""
    plain = all(hasattr(outer, attribute) for attribute in ("lora_A", "lora_B", "get_delta_weight"))
    variants, biases = getattr(outer, "lora_variant", {}), getattr(outer, "lora_bias", {})
    if not plain or variants or any(biases.values()):
        raise ValueError(
            f"model: expected a plain LoRA around {name}, got {type(outer).__name__} with more than that; "
            "merge that adapter with PEFT first"
        )
    if any(getattr(gated, table) for table in TABLES):
        raise ValueError(f"model: {name}.base_layer has hooks, which a merged layer could not run; remove them first")


def _is_finite(layer: GatedSparseLinear) -> bool:
    return bool(layer.rigsa_alpha.isfinite().all()) and bool(layer.rigsa_values.isfinite().all())


@torch.no_grad()
def _check_finite(jobs: Sequence[_Job]) -> None:
    """Everything is computed once for nothing, layer by layer, as a half-merged model could not be mended."""
    for job in jobs:
        if not _is_finite(job.gated):
            raise ValueError(f"model: expected finite gates and values, got others in {job.place}")
        if not _weight(job).isfinite().all():
            raise ValueError(
                f"model: W0 + alpha * D exceeds {job.gated.dtype} or W0 is not finite in {job.place}; "
                "merge model.float()"
            )


def _weight(job: _Job) -> Tensor:
    """``W0 + alpha * D``, with PEFT's half, rounded once to the layer's dtype."""
    layer, low_rank = job.gated, job.low_rank()
    if low_rank is None and not layer.is_nf4:
        return cast(Tensor, layer.merged().weight.detach())  # the bits of composing
    base = layer.frozen_matrix()
    if low_rank is not None:
        base = base.to(torch.promote_types(base.dtype, torch.float32)) + low_rank
    values, alpha = layer.rigsa_values.detach(), layer.rigsa_alpha.detach()
    return cast(Tensor, operators.compose(base, values, alpha, layer.pattern.tensors)).to(layer.dtype)


@torch.no_grad()
def _merged(job: _Job, keep_adapter: bool) -> nn.Linear:
    layer = job.gated
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")  # draws no weight
    linear.weight = nn.Parameter(_weight(job), requires_grad=False)
    linear.bias = layer.bias  # type: ignore[assignment]  # a frozen parameter, or None
    carry_hooks(job.outer, linear)
    if keep_adapter:
        kept = _Kept(job.outer, layer)
        if job.outer is layer and not layer.is_nf4 and not layer.pattern.is_dense:
            kept = _kept_entries(job.outer, layer, linear.weight)
            layer.weight = cast(nn.Parameter, linear.weight)
            layer.restored()  # the layer that was adapted lets go of W0, too
            layer.to(linear.weight.device)  # and this one of what it has made from W0
        _keep(linear, kept)
    return linear.train(job.outer.training)


@torch.no_grad()
def _merge_weight(layer: GatedSparseWeight, merged: Tensor, keep_adapter: bool) -> None:
    detach(layer, merged)
    if keep_adapter:
        kept = _Kept(layer.place, layer)
        if not layer.pattern.is_dense:
            kept = _kept_entries(layer.place, layer, merged)
            layer.adopt(layer.place.get_parameter(layer.name))
        _keep(layer.place, kept)


def _kept_entries(outer: nn.Module, layer: GatedSparseLinear, merged: Tensor) -> _Kept:
    gather = layer.pattern.gather
    return _Kept(outer, layer, gather(layer.frozen_matrix()), gather(merged.detach()))


def _keep(module: nn.Module, kept: _Kept) -> None:
    module.__dict__["_rigsa_kept"] = (*_kept(module), kept)  # in a tuple, or it would be a submodule


def _kept(module: nn.Module) -> tuple[_Kept, ...]:
    return cast(tuple[_Kept, ...], module.__dict__.get("_rigsa_kept", ()))


def _merged_weight(module: nn.Module, kept: _Kept) -> Tensor:
    name = kept.gated.name if isinstance(kept.gated, GatedSparseWeight) else "weight"
    return module.get_parameter(name).view(kept.gated.pattern.shape)


@torch.no_grad()
def _is_as_merged(module: nn.Module, kept: _Kept) -> bool:
    if kept.merged is None:
        return True  # W0 is kept whole
    weight = _merged_weight(module, kept)
    return torch.equal(kept.gated.pattern.to(weight.device).gather(weight), kept.merged.to(weight))


@torch.no_grad()
def _write_back(module: nn.Module, kept: _Kept) -> None:
    """W0 at the free entries of the merged weight, which is W0 elsewhere."""
    if kept.entries is None:
        return
    weight = _merged_weight(module, kept)
    pattern = kept.gated.pattern.to(weight.device)
    weight.masked_scatter_(pattern.to_mask(), kept.entries.to(weight))
    if isinstance(kept.gated, GatedSparseWeight):
        kept.gated.adopt(module.get_parameter(kept.gated.name))
    else:
        linear = cast(nn.Linear, module)
        kept.gated.weight, kept.gated.bias = linear.weight, linear.bias
    kept.gated.to(weight.device)


def _names(some: Sequence[str], layers: Mapping[str, object]) -> str:
    shown = ", ".join(some[:NAMES_IN_ERRORS])
    return f"{len(some)} of {len(layers)} gated layers ({shown}{', ...' if len(some) > NAMES_IN_ERRORS else ''}) are"
