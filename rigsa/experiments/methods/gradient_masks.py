"""Masks from gradients at the pretrained model: SIFT, FISH masks, SAM and RoSA.

A layer attached dense, with zeros for a difference and a gate of 1, is the pretrained layer, and the gradient of its
difference is that of the weight. With g_i the gradient of image i and b_j that of batch j:

======  ==============================  ===========================================================================
sift    |mean g_i|                      of the first images (Song et al., "Sparse is Enough in Fine-tuning", 2024)
fisher  mean g_i^2                      the empirical Fisher information (Sung et al., "Training Neural Networks
                                        with Fixed Sparse Masks", 2021)
sam     (mean g_i)^2 / (h + mean h)     the gain of a second-order model of the loss (Fu et al., "On the
                                        Effectiveness of Parameter-Efficient Fine-Tuning", 2023, who leave the
                                        curvature h open); h is the empirical Fisher information here, damped by
                                        its mean over the layer
rosa    mean b_j^2                      of batches as training makes them (Nikdan et al., "RoSA", 2024)
======  ==============================  ===========================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from rigsa.experiments.config import Gates, Look, LowRank, Training, fields_of
from rigsa.experiments.methods.baselines import OWN_DTYPE
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY, TicketMethod, highest
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.experiments.tasks.textual_mnist import PromptDataset, collate
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


@dataclass(frozen=True)
class Score:
    """A score of entries: means over gradients, and what is made of them.

    Attributes:
        by_image: every image has a gradient of its own; else those of a micro-batch share one, the mean of theirs.
        functions: elementwise; for each the mean of ``function(gradient)`` is taken, in float32.
        combine: these means of one layer, each ``[N, K]``, to its scores. It may overwrite them.
    """

    by_image: bool
    functions: tuple[Callable[[Tensor], Tensor], ...]
    combine: Callable[..., Tensor]

    def images_at_a_time(self, config: Training) -> int:
        return 1 if self.by_image else config.micro_batch_size


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _gain(mean: Tensor, curvature: Tensor) -> Tensor:
    damping = curvature.mean()
    return mean.square_().div_(curvature.add_(damping))


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMask(TicketMethod):
    """Trains the entries that its score ranks highest."""

    score: Score

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        config = experiment.config
        batches = tqdm(mask_batches(experiment, self.score), desc="gradients for the mask", unit="batch", leave=False)
        patterns, record = highest(config, score_entries(experiment.model, self.score, batches, config.loss))
        return patterns, record | {"images": config.mask_images}


def mask_batches(experiment: Experiment, score: Score) -> DataLoader[Any]:
    """The training images that choose the mask, drawn from the run's seed, as many at a time as the score takes."""
    config, dataset = experiment.config, PromptDataset(experiment.splits.train, experiment.prompts)
    draw = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = Subset(dataset, draw[: config.mask_images].tolist())
    collated = partial(collate, pad_id=experiment.prompts.pad_id)
    return DataLoader(chosen, score.images_at_a_time(config), collate_fn=collated)


def score_entries(model: nn.Module, score: Score, batches: Iterable[dict[str, Tensor]], loss: str) -> dict[str, Tensor]:
    """Every entry's score.

    A layer's gradient is used and freed as soon as it is complete, so memory holds that of one layer, beside one
    float32 matrix a layer for each of the score's functions.

    Args:
        model: with a dense adapter that is zero.
        score: what is made of the gradients.
        batches: of training images, as many in each as `Score.images_at_a_time` says.
        loss: as `training_loss`.

    Returns:
        Layer name to ``[N, K]``, float32.
    """
    model.train()
    values = {name: layer.rigsa_values for name, layer in gated_linears(model).items()}
    sums = {
        name: [torch.zeros_like(value, dtype=torch.float32) for _ in score.functions] for name, value in values.items()
    }

    def take(name: str, value: Tensor) -> None:
        assert value.grad is not None
        for function, total in zip(score.functions, sums[name], strict=True):
            total += function(value.grad.float())
        value.grad = None

    hooks = [value.register_post_accumulate_grad_hook(partial(take, name)) for name, value in values.items()]
    count, device = 0, next(model.parameters()).device
    with training_only(list(values.values()), model):
        for batch in batches:
            count += 1
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            training_loss(model, on_device, loss).backward()
    for hook in hooks:
        hook.remove()
    return {name: score.combine(*(total.div_(count) for total in sums.pop(name))) for name in values}


@contextlib.contextmanager
def training_only(parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Inside, nothing else of `model` gathers gradients: not the low-rank difference beside a sparse one."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


_OPTIONS = (*fields_of(Gates), "ranking", "density", "mask_images")
_USUAL = {**FROM_ZERO, "density": PAPER_DENSITY}

SIFT = GradientMask(
    name="sift",
    help="train the entries with the largest gradient in the first batch (Song et al. 2024)",
    options=_OPTIONS,
    look=Look("purple", "v", (0, (5, 1, 1, 1))),
    usual={**_USUAL, "mask_images": 16},  # the first batch
    score=Score(by_image=False, functions=(_same,), combine=torch.abs_),
)
FISHER = GradientMask(
    name="fisher",
    help="train the entries with the largest empirical Fisher information (FISH mask, Sung et al. 2021)",
    options=_OPTIONS,
    look=Look("orange", "D", (0, (3, 1, 1, 1, 1, 1))),
    usual=_USUAL,
    score=Score(by_image=True, functions=(torch.square,), combine=_same),
)
SAM = GradientMask(
    name="sam",
    help="train the entries that a second-order approximation of the loss picks (Fu et al. 2023)",
    options=_OPTIONS,
    look=Look("sky", "P", (0, (8, 2))),
    usual=_USUAL,
    score=Score(by_image=True, functions=(_same, torch.square), combine=_gain),
)
ROSA = GradientMask(
    name="rosa",
    help="a low-rank and a sparse difference side by side, the mask from gradients (Nikdan et al. 2024)",
    options=(*_OPTIONS, *fields_of(LowRank)),
    look=Look("red", "*", (0, (8, 2, 1, 2))),
    usual=_USUAL,
    peft="lora",
    whole_because=OWN_DTYPE,
    score=Score(by_image=False, functions=(torch.square,), combine=_same),
)
