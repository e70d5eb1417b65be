"""Find adapted layers that a model does not use as it should: the adapter would be without effect, or untrained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils import _pytree as pytree

from .dispatch import HALF_DTYPES
from .exactness import rms
from .linear import GatedSparseLinear
from .replace import gated_linears

NEVER_CALLED = "its forward was never called, so something reads its weight, which is W0, or does not use it at all"
NO_GRADIENT = "its values get no gradient"
ROUNDED_AWAY = (
    "its difference is added to a weight in 16 bits, and rounding takes most of it away until its gate opens further "
    "(rounding_losses says how much): start with a larger alpha_init, or use a model in float32"
)


def verify_adapted(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, str]:
    """Run `model` on the inputs and name the adapted layers that this does not reach, or whose adapter it rounds away.

    Code that reads ``child.weight`` in place of calling ``child`` goes past the difference. Many such places are known
    and adapted otherwise (`GatedSparseWeight`); adapt another one with ``replace_linears(..., by_weight="*name")``.

    The model runs twice in evaluation mode, once with gradients and once without, as some modules take another way
    then. Modes, gradients and the state of random numbers are afterwards what they were.

    Args:
        model: with gated layers.
        inputs, keywords: of one call of `model`. They should reach every layer.

    Returns:
        Name to what is wrong with the layer; empty where all is well.

    Raises:
        ValueError: the model has no gated layer, or gives no output that depends on anything trained.
    """
    layers = gated_linears(model)
    if not layers:
        raise ValueError(f"model: expected gated sparse layers to verify, found none in {type(model).__name__}")
    with _in_evaluation(model), torch.random.fork_rng():
        with torch.no_grad(), _called(layers) as called_without:
            model(*inputs, **keywords)
        with torch.enable_grad(), _called(layers) as called_with:
            outputs = pytree.tree_leaves(model(*inputs, **keywords))
            loss = _sum([output for output in outputs if isinstance(output, Tensor) and output.requires_grad])
            values = [layer.rigsa_values for layer in layers.values()]
            trained = [number for number, value in enumerate(values) if value.requires_grad]
            grads = torch.autograd.grad(loss, [values[number] for number in trained], allow_unused=True)
    without_gradient = {number for number, grad in zip(trained, grads, strict=True) if grad is None}
    wrong = {}
    for number, name in enumerate(layers):
        if name not in called_with or name not in called_without:
            wrong[name] = NEVER_CALLED
        elif number in without_gradient:
            wrong[name] = NO_GRADIENT
        elif rounds_away(layers[name]):
            wrong[name] = ROUNDED_AWAY
    return wrong


@torch.no_grad()
def rounds_away(layer: GatedSparseLinear) -> bool:
    """Whether a layer adds its difference to a 16-bit weight that loses most of it. A closed gate has none to lose."""
    if layer.numerics != "composed" or layer.dtype not in HALF_DTYPES:
        return False
    return bool(layer.rigsa_alpha * rms(layer.rigsa_values)) and not layer.is_safe(layer.dtype).item()


def _sum(outputs: list[Tensor]) -> Tensor:
    if not outputs:
        raise ValueError("model: expected an output that depends on something trained, got none")
    return torch.stack([output.real.double().sum().cpu() for output in outputs]).sum()


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _called(layers: dict[str, Any]) -> Iterator[set[str]]:
    """The names of the layers whose `forward` runs in the block."""
    called = set[str]()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
