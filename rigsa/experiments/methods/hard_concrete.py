"""The first stage of diff pruning (Guo et al. 2021): a difference ``z * w`` whose random factors z learn to be zero.

Each entry has a factor of its own and, with all of its layer, one in common; their product is z. A factor is hard
concrete (Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018): with u uniform in (0, 1),

    s = sigmoid(logit(u) + a),    factor = s * (RIGHT - LEFT) + LEFT, cut to [0, 1]

so that it is often exactly 0 or 1, and its parameter a has a gradient where it is between. To the loss is added
``l0_penalty`` for each entry that is expected not to be zero: the product of both probabilities
``sigmoid(a - log(-LEFT / RIGHT))``.

Between steps a layer's values are w. For the length of a step they are ``z * w``, drawn once from (seed, step), so the
gradient that arrives is that of the difference; the chain rule is done by hand before the update. Clipping therefore
sees the gradient of the difference, where the authors clip those of w and a apart. Trained, the values become w times
the factors without chance: ``sigmoid(a)`` in the place of s (Louizos et al., section 2.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from rigsa.experiments.config import Config
from rigsa.experiments.methods.thin_gradients import step_generator
from rigsa.experiments.train import AddsParameters
from rigsa_kernels import GatedSparseLinear, gated_linears

LEFT, RIGHT = -1.5, 1.5
"""Where the concrete distribution is stretched to before it is cut (the authors')."""
START = 5.0
"""Of every parameter a (the authors'): nearly all factors are 1."""
OF_ENTRIES, OF_LAYER = "factors_of_entries", "factor_of_layer"


class HardConcrete(nn.Module):
    """Factors of one shape. Backward does not reach their parameter: its gradient is set by hand, alike in every
    process, and the optimiser treats it as a gate (`rigsa.experiments.train.make_optimizer`)."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.rigsa_logits = nn.Parameter(torch.full(shape, START, device=device))
        self.rigsa_logits.is_set_by_hand = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors, and their derivatives by the parameter."""
        uniform = torch.empty_like(self.rigsa_logits).uniform_(generator=generator)
        soft = uniform.logit_().add_(self.rigsa_logits).sigmoid_()
        stretched = soft * (RIGHT - LEFT) + LEFT
        inside = (stretched > 0) & (stretched < 1)
        return stretched.clamp_(0, 1), (soft * (1 - soft)).mul_(RIGHT - LEFT).mul_(inside)

    @torch.no_grad()
    def without_chance(self) -> Tensor:
        return (self.rigsa_logits.sigmoid() * (RIGHT - LEFT) + LEFT).clamp_(0, 1)

    @torch.no_grad()
    def presence(self) -> Tensor:
        """The probability that a factor is not 0."""
        return (self.rigsa_logits - math.log(-LEFT / RIGHT)).sigmoid_()


class DiffGates(AddsParameters):
    """Draws the factors of a step, and hands gradients on to w and to the factors' parameters."""

    def __init__(self, config: Config) -> None:
        self.seed, self.penalty = config.seed, config.l0_penalty
        self.held: dict[str, Tensor] = {}

    def put_on(self, model: nn.Module) -> None:
        for layer in gated_linears(model).values():
            device = layer.rigsa_values.device
            layer.add_module(OF_ENTRIES, HardConcrete(layer.pattern.values_shape, device))
            layer.add_module(OF_LAYER, HardConcrete((1,), device))

    @torch.no_grad()
    def take_off(self, model: nn.Module) -> None:
        for layer in gated_linears(model).values():
            entries, common = factors_of(layer)
            layer.rigsa_values.mul_(entries.without_chance() * common.without_chance())
            delattr(layer, OF_ENTRIES)
            delattr(layer, OF_LAYER)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.draw(kwargs["model"], state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hand_on(kwargs["model"], state.global_step)

    @torch.no_grad()
    def draw(self, model: nn.Module, step: int) -> None:
        """Put the difference of that step in the place of w."""
        layers = gated_linears(model)
        generator = self._generator(layers, step)
        for name, layer in layers.items():
            entries, common = factors_of(layer)
            self.held[name] = layer.rigsa_values.detach().clone()
            layer.rigsa_values.mul_(entries.draw(generator)[0] * common.draw(generator)[0])

    @torch.no_grad()
    def hand_on(self, model: nn.Module, step: int) -> None:
        """Bring w back, and make its gradient and those of the factors' parameters from that of the difference."""
        layers = gated_linears(model)
        generator = self._generator(layers, step)  # the factors of this step once more
        for name, layer in layers.items():
            layer.rigsa_values.copy_(self.held.pop(name))
            chain(layer, generator, self.penalty)

    def _generator(self, layers: dict[str, GatedSparseLinear], step: int) -> torch.Generator:
        device = next(iter(layers.values())).rigsa_values.device
        return step_generator(device, self.seed, step)


def factors_of(layer: GatedSparseLinear) -> tuple[HardConcrete, HardConcrete]:
    return layer.get_submodule(OF_ENTRIES), layer.get_submodule(OF_LAYER)  # type: ignore[return-value]


@torch.no_grad()
def chain(layer: GatedSparseLinear, generator: torch.Generator, penalty: float) -> None:
    """From the gradient of the difference, which the values carry, to those of w and of both parameters a.

    Args:
        layer: whose values are w.
        generator: as it was when the factors of this step were drawn.
        penalty: for each entry that is not zero.
    """
    entries, common = factors_of(layer)
    (factor, slope), (shared, shared_slope) = entries.draw(generator), common.draw(generator)
    gradient = layer.rigsa_values.grad
    assert gradient is not None
    by_factor = gradient.float() * layer.rigsa_values
    gradient.mul_(factor * shared)
    present, all_present = entries.presence(), common.presence()
    common.rigsa_logits.grad = (by_factor * factor).sum() * shared_slope + penalty * (
        present.sum() * all_present * (1 - all_present)
    )
    lost = present.mul_(1 - present).mul_(penalty * all_present)
    entries.rigsa_logits.grad = by_factor.mul_(slope.mul_(shared)).add_(lost)
