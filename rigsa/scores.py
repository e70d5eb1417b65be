"""Scores of entries from gradients before training: SIFT, FISH masks, SAM, RoSA, Taylor, SNIP and GraSP.

The first five are taken at the pretrained model. A layer that is dense, with zeros for a difference and a gate of 1, is
the pretrained layer, and the gradient of its difference is that of the weight. The last two are taken where an adapter
with random initial values d starts, as SparseAdapter prunes adapters (He et al., "SparseAdapter: An Easy Approach for
Improving the Parameter-Efficiency of Adapters", 2022). With g_i the gradient of batch i, and H_i that batch's Hessian:

======  ========================  =====================================================================================
sift    |mean g_i|                Song et al., "Sparse is Enough in Fine-tuning", 2024
fisher  mean g_i^2                with batches of one example the empirical Fisher information (Sung et al., "Training
                                  Neural Networks with Fixed Sparse Masks", 2021)
sam     (mean g_i)^2/(h+mean h)   the gain of a second-order model of the loss (Fu et al., "On the Effectiveness of
                                  Parameter-Efficient Fine-Tuning", 2023, who leave the curvature h open); h is mean
                                  g_i^2 here, damped by its mean over the layer
rosa    mean g_i^2                of batches as training makes them (Nikdan et al., "RoSA", 2024)
taylor  |w mean g_i|              the change of the loss without the weight w, to first order (Molchanov et al.,
                                  "Importance Estimation for Neural Network Pruning", 2019, who square it)
snip    |d mean g_i|              the change of the loss without the entry (Lee et al., "SNIP", 2019)
grasp   d (mean H_i) (mean g_i)   the fall of the squared gradient norm without the entry, to first order: what training
                                  would lose (Wang et al., "Picking Winning Tickets Before Training by Preserving
                                  Gradient Flow", 2020, whose score has the other sign, and who prune the highest)
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from rigsa_kernels import GatedSparseLinear, gated_linears
from rigsa_kernels.parametrized import GatedSparseWeight

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class GradientScore:
    """Means over gradients, and what is made of them.

    Attributes:
        by_example: meant for batches of one example, each with a gradient of its own.
        functions: elementwise; for each the mean of ``function(gradient)`` is taken, in float32.
        combine: the values of one layer and these means, each ``[N, K]``, to its scores. It may overwrite the means.
        of_weights: `combine` takes the pretrained weights in place of the values.
        at_start: taken where the adapter starts, at its initial values. Otherwise at the pretrained model.
        curved: the Hessian times the mean gradient takes the means' place.
    """

    by_example: bool
    functions: tuple[Callable[[Tensor], Tensor], ...]
    combine: Callable[..., Tensor]
    of_weights: bool = False
    at_start: bool = False
    curved: bool = False


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _mean(values: Tensor, mean: Tensor) -> Tensor:
    return mean


def _magnitude(values: Tensor, mean: Tensor) -> Tensor:
    return mean.abs_()


def _times_values(values: Tensor, mean: Tensor) -> Tensor:
    return mean.mul_(values)


def _sensitivity(values: Tensor, mean: Tensor) -> Tensor:
    return mean.mul_(values).abs_()


def _gain(values: Tensor, mean: Tensor, curvature: Tensor) -> Tensor:
    damping = curvature.mean()
    return mean.square_().div_(curvature.add_(damping))


SCORES = {
    "sift": GradientScore(by_example=False, functions=(_same,), combine=_magnitude),
    "fisher": GradientScore(by_example=True, functions=(torch.square,), combine=_mean),
    "sam": GradientScore(by_example=True, functions=(_same, torch.square), combine=_gain),
    "rosa": GradientScore(by_example=False, functions=(torch.square,), combine=_mean),
    "taylor": GradientScore(by_example=False, functions=(_same,), combine=_sensitivity, of_weights=True),
    "snip": GradientScore(by_example=False, functions=(_same,), combine=_sensitivity, at_start=True),
    "grasp": GradientScore(by_example=False, functions=(), combine=_times_values, at_start=True, curved=True),
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
    a layer for each of the score's functions. A `curved` score goes over the batches twice, the second time with all
    that a backward pass of a backward pass needs: the gradients of all layers, and the activations of both passes.

    Args:
        model: whose loss it is.
        values: name to a parameter of `model`, ``[N, K]``: all those of its gated layers. Nothing else gathers
            gradients meanwhile.
        loss_fn: ``(model, batch)`` to a scalar. For a `curved` score it is differentiated twice.
        batches: at least one; a `curved` score keeps them.
        score: what is made of the gradients.

    Returns:
        Name to ``[N, K]``, float32.

    Raises:
        ValueError: there is no batch, a loss is no scalar, or a parameter has no part in it.
    """
    if score.curved:
        kept = list(batches)
        gradients = {name: mean for name, [mean] in _gradient_means(model, values, loss_fn, kept, (_same,)).items()}
        means = {name: [mean] for name, mean in _hessian_times(model, values, loss_fn, kept, gradients).items()}
    else:
        means = _gradient_means(model, values, loss_fn, batches, score.functions)
    layers = gated_linears(model) if score.of_weights else {}
    return {
        name: score.combine(layers[name].frozen_matrix() if layers else value.detach(), *means.pop(name))
        for name, value in values.items()
    }


def _gradient_means(
    model: nn.Module,
    values: Mapping[str, nn.Parameter],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    functions: tuple[Callable[[Tensor], Tensor], ...],
) -> dict[str, list[Tensor]]:
    """For each parameter the mean over the batches of each function of its gradient. Raises as `gradient_scores`."""
    sums = {name: [torch.zeros_like(value, dtype=torch.float32) for _ in functions] for name, value in values.items()}
    reached: set[str] = set()

    def take(name: str, value: Tensor) -> None:
        assert value.grad is not None
        for function, total in zip(functions, sums[name], strict=True):
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
    return {name: [total.div_(count) for total in totals] for name, totals in sums.items()}


def _hessian_times(
    model: nn.Module,
    values: Mapping[str, nn.Parameter],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batches: list[Batch],
    vector: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The Hessian of the mean loss times `vector`, float32: the gradient of ``sum(gradient * vector)``, exactly.

    Attention is computed step by step, as the backward passes of fused attention have no derivative.
    """
    parameters, totals = list(values.values()), [torch.zeros_like(part) for part in vector.values()]
    with training_only(parameters, model), torch.enable_grad(), _plain_products(model), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradients = torch.autograd.grad(_scalar(loss_fn(model, batch)), parameters, create_graph=True)
            directed = [(g.float() * vector[name]).sum() for g, name in zip(gradients, values, strict=True)]
            for total, product in zip(totals, torch.autograd.grad(sum(directed), parameters), strict=True):  # type: ignore[arg-type]
                total += product.float()
    return {name: total.div_(len(batches)) for name, total in zip(values, totals, strict=True)}


@contextlib.contextmanager
def _plain_products(model: nn.Module) -> Iterator[None]:
    """Inside, gated layers that are dense compute in plain PyTorch, which can be differentiated any number of times.

    The sum ``W0 + alpha * D`` is rounded to the weight's dtype. Its derivatives are those of the sum, so rounding takes
    nothing away from them.
    """
    layers = gated_linears(model).values()
    for layer in layers:
        is_read = isinstance(layer, GatedSparseWeight)
        layer.forward = partial(_plain_weight if is_read else _plain_linear, layer)  # type: ignore
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain_linear(layer: GatedSparseLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to(layer.dtype), _plain_sum(layer), layer.bias)


def _plain_weight(layer: GatedSparseWeight) -> Tensor:
    return _plain_sum(layer).view(layer.weight_shape)


def _plain_sum(layer: GatedSparseLinear) -> Tensor:
    return layer.frozen_matrix() + (layer.rigsa_alpha * layer.rigsa_values).to(layer.dtype)


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
