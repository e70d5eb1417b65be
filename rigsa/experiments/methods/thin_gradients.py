"""The gradients of Child-Tuning, task-free: each entry's is kept with a probability, and divided by it, or is 0.

As in the authors' optimiser this comes after clipping, and Adam goes on with its moments where a gradient is 0, so that
an entry moves in other steps, too. What is drawn follows from (seed, step), so it is the same after a resume and in
every process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rigsa.experiments.config import Config
from rigsa_kernels import gated_linears

CHUNK = 1 << 22
"""Gradients that are drawn for at a time, so that a draw takes a few megabytes whatever the layer."""


class ThinGradients(TrainerCallback):
    """Thins out the gradients of all gated layers between clipping and update."""

    def __init__(self, config: Config) -> None:
        self.seed, self.share = config.seed, config.gradient_share

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [layer.rigsa_values.grad for layer in gated_linears(kwargs["model"]).values()]
        thin_out([gradient for gradient in gradients if gradient is not None], self.share, self.seed, state.global_step)


def thin_out(gradients: list[Tensor], share: float, seed: int, step: int) -> None:
    """Multiply each entry by 1/share or by 0, drawn independently, in place.

    Args:
        gradients: contiguous, on one device, where the draw is made.
        share: the probability of the former, in (0, 1].
        seed, step: what is drawn from.
    """
    if not gradients:
        return
    generator = step_generator(gradients[0].device, seed, step)
    for gradient in gradients:
        for part in gradient.view(-1).split(CHUNK):
            part.mul_(torch.empty_like(part).bernoulli_(share, generator=generator).div_(share))


def step_generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    """Of random numbers for one step of one run. Training's own random state stays as it is."""
    [drawn] = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64).tolist()
    return torch.Generator(device).manual_seed(drawn)
