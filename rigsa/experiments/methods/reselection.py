"""The rounds of SpIEL: entries of a sparse difference are dropped and grown while it trains (Ansell et al., "Scaling
Sparse Fine-Tuning to Large Language Models", 2024), in the variant with accumulated gradients, SpIEL-AG.

The difference starts at zero on a random mask. Every ``reselect_steps`` optimiser steps each layer drops the entries
whose difference is smallest, and grows as many of the others, where the gradient of the weight is largest. The share
that moves is ``reselect_share`` times the share of the level's steps still to come.

Growing goes by one batch of training images more, drawn from (seed, step). As in SpIEL-AG the gradient of the first
micro-batch names the candidates, as many as a layer has free entries, and only for these it is added up over the rest,
so that one layer's dense gradient is in memory at a time. It differs from the authors' implementation in that

- that implementation accumulates over several training steps (five unless told otherwise), at weights that move
  meanwhile; here it is one batch, at the weights of the moment, a forward and backward pass more;
- there candidates are chosen among all entries, here among those that are not free, so as many are grown as asked;
- there an entry that has just been dropped may come straight back, with its value; here it may not;
- there the first round replaces the whole random mask; here it is a round like the others;
- there the moments of a new entry are set from the gradients that were accumulated, with a step count of its own; here
  they are zero, and bias is corrected by the step count of the layer. Under a constant gradient the first steps of a
  new entry are therefore up to 6.6 times as long as Adam's at betas 0.9 and 0.999 (1.1 times at 0.9 and 0.95).

On several processes each one computes the same batch, and all take the mask of the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.experiments.tasks.task import Samples
from rigsa.experiments.train import PatternMover, first_non_finite_parameter, steps_per_level
from rigsa.masks import drop_and_grow
from rigsa.scores import training_only
from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern, gated_linears


def planned_exchanges(experiment: Experiment, patterns: dict[str, SparsePattern]) -> dict[str, int]:
    """``rounds``, and ``exchanged``: the number of entries that all rounds will move in all layers, which is exact."""
    config, steps = experiment.config, steps_per_level(experiment.config, experiment.task.num_training)
    rounds = [
        sum(entries_to_move(config, step, steps, pattern) for pattern in patterns.values())
        for step in range(config.reselect_steps, steps, config.reselect_steps)
    ]
    return {"rounds": sum(number > 0 for number in rounds), "exchanged": sum(rounds)}


def entries_to_move(config: Config, step: int, steps: int, pattern: SparsePattern) -> int:
    """How many entries of a layer are dropped and grown after that many of the level's optimiser steps."""
    share = config.reselect_share * (1 - step / steps)
    return min(round(share * pattern.nnz), _num_not_free(pattern))


def _num_not_free(pattern: SparsePattern) -> int:
    return pattern.out_features * pattern.in_features - pattern.nnz


class Reselection(PatternMover):
    """Moves the patterns of a model and the moments of its optimiser.

    Args:
        config: of the run.
        samples: of the training split.
    """

    def __init__(self, config: Config, samples: Samples) -> None:
        self.config, self.samples = config, samples

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, steps = state.global_step, state.max_steps
        if step % self.config.reselect_steps:
            return
        layers = gated_linears(kwargs["model"])
        numbers = {name: entries_to_move(self.config, step, steps, layer.pattern) for name, layer in layers.items()}
        if any(numbers.values()):
            optimizer = cast(MaskedAdamW, cast(AcceleratedOptimizer, kwargs["optimizer"]).optimizer)
            self.reselect(kwargs["model"], optimizer, step, numbers)

    def reselect(self, model: nn.Module, optimizer: MaskedAdamW, step: int, numbers: dict[str, int]) -> None:
        """Drop and grow `numbers` entries of each layer: one round.

        Raises:
            RigsaError: a value or a gradient is not finite.
        """
        if diverged := first_non_finite_parameter(model):
            raise _diverged(step, "a trained value", diverged)
        candidates = accumulated_gradients(
            model, self.batches(step), self.config.micro_batch_size, partial(_diverged, step)
        )
        for name, layer in gated_linears(model).items():
            gradient = candidates.pop(name).gradient()
            pattern = drop_and_grow(layer.rigsa_values, layer.pattern, gradient, number=numbers[name])
            places = layer.move_pattern(of_main_process(pattern))
            optimizer.move_state(layer.rigsa_values, places)

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of one batch of images, drawn from (seed, step).

        They are alike in all processes and after a resume, and drawing them leaves the random state of training alone.
        """
        config = self.config
        drawn = np.random.default_rng([config.seed, step]).choice(len(self.samples), config.batch_size, replace=False)
        for part in drawn.reshape(-1, config.micro_batch_size).tolist():
            yield self.samples.collate([self.samples[index] for index in part])


def _diverged(step: int, what: str, layer: str) -> RigsaError:
    return RigsaError(
        f"training diverged at step {step}: {what} is not finite in {layer}, so no entries can be chosen to drop and "
        "grow. What was saved before is kept. Try a lower --learning-rate or --dtype float32 (in another --out folder)."
    )


def of_main_process(pattern: SparsePattern) -> SparsePattern:
    """The pattern that the main process chose. Other processes may round a sum differently and would choose another."""
    assert pattern.words is not None
    return SparsePattern.from_words(cast(Tensor, broadcast(pattern.words)), pattern.in_features)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Entries of an ``[N, K]`` layer that may be grown, in 8 bytes each.

    Attributes:
        shape: N and K.
        index: int32 ``[n]``, places ``n * K + k`` in ascending order.
        total: float32 ``[n]``, gradients added up.
    """

    shape: tuple[int, int]
    index: Tensor
    total: Tensor

    @classmethod
    def choose(cls, free: SparsePattern, gradient: Tensor) -> Candidates:
        """Take the entries that are not free and have the largest magnitudes in `gradient` ``[N, K]``.

        There are as many as free entries, and besides all that equal the smallest of them, because `torch.topk` does
        not say which of equals it takes.
        """
        magnitude = gradient.abs().masked_fill_(free.to_mask(), 0).view(-1)
        least = magnitude.topk(min(free.nnz, _num_not_free(free))).values[-1]
        index = ((magnitude >= least) & (magnitude > 0)).nonzero().view(-1).to(torch.int32)
        return cls(free.shape, index, torch.zeros(len(index), device=index.device))

    def add(self, gradient: Tensor) -> None:
        self.total.add_(gradient.view(-1).index_select(0, self.index))

    def gradient(self) -> Tensor:
        """The sums as a matrix, float32 ``[N, K]``, with 0 for entries that are no candidates."""
        matrix = self.total.new_zeros(self.shape[0] * self.shape[1])
        return matrix.index_copy_(0, self.index.long(), self.total).view(self.shape)


def accumulated_gradients(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    divisor: int,
    diverged: Callable[[str, str], RigsaError],
) -> dict[str, Candidates]:
    """What each layer may grow, by the gradient of its weight added up over `batches`.

    Nothing of the model changes, and no parameter's ``grad`` is written.

    Args:
        model: with packed gated layers, in training mode.
        batches: the first one names the candidates.
        divisor: of the summed loss of each batch, one number for all (as in `score_entries`).
        diverged: makes the error to raise of what is not finite, and of a layer's name.
    """
    layers, found = gated_linears(model), dict[str, Candidates]()
    anchor = torch.zeros(1, device=next(model.parameters()).device, requires_grad=True)

    def take(name: str, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            raise diverged("the gradient", name)
        if name not in found:
            found[name] = Candidates.choose(layers[name].pattern, gradient)
        found[name].add(gradient)

    def watch(name: str, layer: GatedSparseLinear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return cast(Tensor, _WeightGradient.apply(inputs[0], output, anchor, partial(take, name)))

    hooks = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        with training_only([], model):  # nothing but the anchor
            for batch in batches:
                on_device = {name: tensor.to(anchor.device) for name, tensor in batch.items()}
                torch.autograd.grad(training_loss(model, on_device, divisor), anchor, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _WeightGradient(torch.autograd.Function):
    """The identity on a linear layer's output y; its backward hands on the weight's gradient ``G = dy^T x [N, K]``.

    `anchor` makes y need a gradient where nothing before it does. x is saved as any operation saves its input, so
    activation checkpointing applies.
    """

    @staticmethod
    def forward(ctx, x, y, anchor, take):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        ctx.take(dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(dy.dtype))
        return None, dy, None, None
