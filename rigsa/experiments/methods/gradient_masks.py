"""Masks from gradients at the pretrained model: SIFT, FISH masks, SAM and RoSA.

`rigsa.scores` has the scores. Here a batch is what `mask_batches` draws: one image where a score is made for examples,
else a micro-batch, as training makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from rigsa.scores import SCORES, GradientScore, gradient_scores
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMask(TicketMethod):
    """Trains the entries that its score ranks highest."""

    score: GradientScore

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        config = experiment.config
        batches = tqdm(mask_batches(experiment, self.score), desc="gradients for the mask", unit="batch", leave=False)
        patterns, record = highest(config, score_entries(experiment.model, self.score, batches, config.loss))
        return patterns, record | {"images": config.mask_images}


def images_at_a_time(score: GradientScore, config: Training) -> int:
    """How many images share a gradient."""
    return 1 if score.by_example else config.micro_batch_size


def mask_batches(experiment: Experiment, score: GradientScore) -> DataLoader[Any]:
    """The training images that choose the mask, drawn from the run's seed, as many at a time as the score takes."""
    config, dataset = experiment.config, PromptDataset(experiment.splits.train, experiment.prompts)
    draw = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = Subset(dataset, draw[: config.mask_images].tolist())
    collated = partial(collate, pad_id=experiment.prompts.pad_id)
    return DataLoader(chosen, images_at_a_time(score, config), collate_fn=collated)


def score_entries(
    model: nn.Module, score: GradientScore, batches: Iterable[dict[str, Tensor]], loss: str
) -> dict[str, Tensor]:
    """Score every entry of the gated layers by its gradients.

    Args:
        model: with a dense adapter that is zero.
        score: what is made of the gradients.
        batches: of training images, as many in each as `images_at_a_time` says.
        loss: as `training_loss`.

    Returns:
        Layer name to ``[N, K]``, float32.
    """
    device = next(model.parameters()).device

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return training_loss(model, {name: tensor.to(device) for name, tensor in batch.items()}, loss)

    values = {name: layer.rigsa_values for name, layer in gated_linears(model).items()}
    return gradient_scores(model.train(), values, loss_of, batches, score)


_OPTIONS = (*fields_of(Gates), "ranking", "density", "tile", "mask_images")
_USUAL = {**FROM_ZERO, "density": PAPER_DENSITY}

SIFT = GradientMask(
    name="sift",
    help="train the entries with the largest gradient in the first batch (Song et al. 2024)",
    options=_OPTIONS,
    look=Look("purple", "v", (0, (5, 1, 1, 1))),
    usual={**_USUAL, "mask_images": 16},  # the first batch
    score=SCORES["sift"],
)
FISHER = GradientMask(
    name="fisher",
    help="train the entries with the largest empirical Fisher information (FISH mask, Sung et al. 2021)",
    options=_OPTIONS,
    look=Look("orange", "D", (0, (3, 1, 1, 1, 1, 1))),
    usual=_USUAL,
    score=SCORES["fisher"],
)
SAM = GradientMask(
    name="sam",
    help="train the entries that a second-order approximation of the loss picks (Fu et al. 2023)",
    options=_OPTIONS,
    look=Look("sky", "P", (0, (8, 2))),
    usual=_USUAL,
    score=SCORES["sam"],
)
ROSA = GradientMask(
    name="rosa",
    help="a low-rank and a sparse difference side by side, the mask from gradients (Nikdan et al. 2024)",
    options=(*_OPTIONS, *fields_of(LowRank)),
    look=Look("red", "*", (0, (8, 2, 1, 2))),
    usual=_USUAL,
    peft="lora",
    whole_because=OWN_DTYPE,
    score=SCORES["rosa"],
)
