"""Masks from gradients before training: SIFT, FISH masks, SAM, RoSA, SNIP and GraSP.

`rigsa.scores` has the scores. Here a batch is what `mask_batches` draws: one example where a score is made for
examples, else a micro-batch, as training makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Gates, Look, LowRank, Tickets, Training, fields_of
from rigsa.experiments.methods.baselines import OWN_DTYPE
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY, TicketMethod, highest
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.scores import SCORES, GradientScore, gradient_scores
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMask(TicketMethod):
    """Trains the entries that its score ranks highest."""

    score: GradientScore

    def check(self, config: Config) -> None:
        super().check(config)
        if self.score.at_start and (config.init_scale == 0 or config.alpha_init == 0):
            option = "init-scale" if config.init_scale == 0 else "alpha-init"
            raise RigsaError(
                f"--{option} 0: every score of {self.name} would be 0, as it is a product with the initial values "
                "behind their gate; expected another number"
            )

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        config = experiment.config
        batches = tqdm(mask_batches(experiment, self.score), desc="gradients for the mask", unit="batch", leave=False)
        patterns, record = highest(
            config, score_entries(experiment.model, self.score, batches, examples_at_a_time(self.score, config))
        )
        return patterns, record | {"examples": config.mask_examples}


def examples_at_a_time(score: GradientScore, config: Training) -> int:
    """How many examples share a gradient."""
    return 1 if score.by_example else config.micro_batch_size


def mask_batches(experiment: Experiment, score: GradientScore) -> DataLoader[Any]:
    """The training examples that choose the mask, drawn from the run's seed, as many at a time as the score takes."""
    config, samples = experiment.config, experiment.task.training()
    draw = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed))
    chosen = Subset(samples, draw[: config.mask_examples].tolist())
    return DataLoader(chosen, examples_at_a_time(score, config), collate_fn=samples.collate)


def score_entries(
    model: nn.Module, score: GradientScore, batches: Iterable[dict[str, Tensor]], divisor: int
) -> dict[str, Tensor]:
    """Score every entry of the gated layers by its gradients.

    Args:
        model: with a dense adapter as it starts: zero for scores of the pretrained model.
        score: what is made of the gradients.
        batches: of training examples, as many in each as `examples_at_a_time` says.
        divisor: of the summed loss of each batch. It is one number for all of them, so that every token counts as much
            as every other, however tokens are spread over batches.

    Returns:
        Layer name to ``[N, K]``, float32.
    """
    device = next(model.parameters()).device

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return training_loss(model, {name: tensor.to(device) for name, tensor in batch.items()}, divisor)

    values = {name: layer.rigsa_values for name, layer in gated_linears(model).items()}
    return gradient_scores(model.train(), values, loss_of, batches, score)


GRADIENT_OPTIONS = (*fields_of(Gates), *fields_of(Tickets), "ranking", "density", "tile", "mask_examples")
_USUAL = {**FROM_ZERO, "density": PAPER_DENSITY}

SIFT = GradientMask(
    name="sift",
    help="train the entries with the largest gradient in the first batch (Song et al. 2024)",
    options=GRADIENT_OPTIONS,
    look=Look("purple", "v", (0, (5, 1, 1, 1))),
    usual={**_USUAL, "mask_examples": 16},  # the first batch
    score=SCORES["sift"],
)
FISHER = GradientMask(
    name="fisher",
    help="train the entries with the largest empirical Fisher information (FISH mask, Sung et al. 2021)",
    options=GRADIENT_OPTIONS,
    look=Look("orange", "D", (0, (3, 1, 1, 1, 1, 1))),
    usual=_USUAL,
    score=SCORES["fisher"],
)
SAM = GradientMask(
    name="sam",
    help="train the entries that a second-order approximation of the loss picks (Fu et al. 2023)",
    options=GRADIENT_OPTIONS,
    look=Look("sky", "P", (0, (8, 2))),
    usual=_USUAL,
    score=SCORES["sam"],
)
ROSA = GradientMask(
    name="rosa",
    help="a low-rank and a sparse difference side by side, the mask from gradients (Nikdan et al. 2024)",
    options=(*GRADIENT_OPTIONS, *fields_of(LowRank)),
    look=Look("red", "*", (0, (8, 2, 1, 2))),
    usual=_USUAL,
    peft="lora",
    whole_because=OWN_DTYPE,
    score=SCORES["rosa"],
)
SNIP = GradientMask(
    name="snip",
    help="train the random entries without which the loss would change most (SNIP; SparseAdapter, He et al. 2022)",
    options=GRADIENT_OPTIONS,
    look=Look("green", "8", (0, (4, 1, 1, 1, 1, 1))),
    usual={"density": PAPER_DENSITY},
    score=SCORES["snip"],
)
GRASP = GradientMask(
    name="grasp",
    help="train the random entries that carry the gradient's flow (GraSP; SparseAdapter, He et al. 2022)",
    options=GRADIENT_OPTIONS,
    look=Look("orange", "H", (0, (6, 1, 2, 1))),
    usual={"density": PAPER_DENSITY},
    score=SCORES["grasp"],
)
