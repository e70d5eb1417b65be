"""Shared by the methods that train a ticket of a given density.

`highest` makes patterns of the entries that rank highest; `TicketMethod` is the one level of the methods that choose
their mask before anything is trained.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Method, require
from rigsa.masks import largest_patterns
from rigsa_kernels import SparsePattern

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment

PAPER_DENSITY = 0.0346
"""The density of the paper's last level."""
FROM_ZERO: Mapping[str, Any] = {
    "init_scale": 0.0, "gate": "none", "alpha_init": 1.0, "weight_decay": 0.0, "learning_rate": 2e-4,
}  # fmt: skip
"""Values of a difference that starts at zero and needs no gate."""


def highest(
    config: Config, scores: Mapping[str, Tensor], by: Literal["score", "magnitude"] = "score", largest: bool = True
) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    """The entries that rank highest, as many as ``config.density`` says, and what to record of the choice.

    Raises:
        RigsaError: a layer would be left empty, or a score is not finite.
    """
    try:
        patterns = largest_patterns(
            scores, density=config.density, ranking=config.ranking, by=by, largest=largest, tile=config.tile or None
        )
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}


@dataclass(frozen=True, eq=False, kw_only=True)
class TicketMethod(Method):
    """A method of one level, number 1, whose mask is chosen before anything is trained."""

    @abc.abstractmethod
    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        """The patterns of the layers, and what to record of the choice. The model carries the dense adapter."""

    def check(self, config: Config) -> None:
        super().check(config)
        require(config, "density", f"more than 0 for {self.name}", config.density > 0)

    def levels(self, config: Config) -> tuple[int, ...]:
        return (1,)

    def most_kept(self, config: Config, weights: int) -> int:
        return round(config.density * weights)

    def summary(self, config: Config) -> str:
        return f"one ticket of {config.density:.2%}"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        return {1: config.density}

    def run(self, experiment: Experiment) -> None:
        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(1):
            experiment.enter_ticket(1, self.choose)
            experiment.run_level(1)
