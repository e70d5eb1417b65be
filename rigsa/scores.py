"""Scores of entries from gradients at the pretrained model: SIFT, FISH masks, SAM and RoSA.

A layer that is dense, with zeros for a difference and a gate of 1, is the pretrained layer, and the gradient of its
difference is that of the weight. With g_i the gradient of batch i:

======  ========================  =====================================================================================
sift    |mean g_i|                Song et al., "Sparse is Enough in Fine-tuning", 2024
fisher  mean g_i^2                with batches of one example the empirical Fisher information (Sung et al., "Training
                                  Neural Networks with Fixed Sparse Masks", 2021)
sam     (mean g_i)^2/(h+mean h)   the gain of a second-order model of the loss (Fu et al., "On the Effectiveness of
                                  Parameter-Efficient Fine-Tuning", 2023, who leave the curvature h open); h is mean
                                  g_i^2 here, damped by its mean over the layer
rosa    mean g_i^2                of batches as training makes them (Nikdan et al., "RoSA", 2024)
======  ========================  =====================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class GradientScore:
    """Means over gradients, and what is made of them.

    Attributes:
        by_example: meant for batches of one example, each with a gradient of its own.
        functions: elementwise; for each the mean of ``function(gradient)`` is taken, in float32.
        combine: these means of one layer, each ``[N, K]``, to its scores. It may overwrite them.
    """

    by_example: bool
    functions: tuple[Callable[[Tensor], Tensor], ...]
    combine: Callable[..., Tensor]


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _gain(mean: Tensor, curvature: Tensor) -> Tensor:
    damping = curvature.mean()
    return mean.square_().div_(curvature.add_(damping))


SCORES = {
    "sift": GradientScore(by_example=False, functions=(_same,), combine=torch.abs_),
    "fisher": GradientScore(by_example=True, functions=(torch.square,), combine=_same),
    "sam": GradientScore(by_example=True, functions=(_same, torch.square), combine=_gain),
    "rosa": GradientScore(by_example=False, functions=(torch.square,), combine=_same),
}


def gradient_scores(
    model: nn.Module,
    values: Mapping[str, nn.Parameter],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    score: GradientScore,
) -> dict[str, Tensor]:
    """Every entry's score.

    A gradient is used and freed as soon as it is complete, so memory holds that of one layer, beside one float32 matrix
    a layer for each of the score's functions.

    Args:
        model: whose loss it is.
        values: name to a parameter of `model`, ``[N, K]``. Nothing else gathers gradients meanwhile.
        loss_fn: ``(model, batch)`` to a scalar.
        batches: at least one.
        score: what is made of the gradients.

    Returns:
        Name to ``[N, K]``, float32.

    Raises:
        ValueError: there is no batch, a loss is no scalar, or a parameter has no part in it.
    """
    sums = {
        name: [torch.zeros_like(value, dtype=torch.float32) for _ in score.functions] for name, value in values.items()
    }
    reached: set[str] = set()

    def take(name: str, value: Tensor) -> None:
        assert value.grad is not None
        for function, total in zip(score.functions, sums[name], strict=True):
            total += function(value.grad.float())
        value.grad = None
        reached.add(name)

    count = 0
    with training_only(list(values.values()), model), torch.enable_grad():
        hooks = [value.register_post_accumulate_grad_hook(partial(take, name)) for name, value in values.items()]
        try:
            for batch in batches:
                _scalar(loss_fn(model, batch)).backward()
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if count == 0:
        raise ValueError("batches: expected at least one, got none")
    if idle := [name for name in values if name not in reached]:
        raise ValueError(f"loss_fn: {len(idle)} layers have no part in the loss ({idle[0]}, ...)")
    return {name: score.combine(*(total.div_(count) for total in sums.pop(name))) for name in values}


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected a scalar that depends on the model, got {given}")
    return loss


@contextlib.contextmanager
def training_only(parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Inside, these parameters gather gradients, and nothing else of `model` does."""
    chosen = {id(parameter) for parameter in parameters}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(flag)
