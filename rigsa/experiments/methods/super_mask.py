"""Super-Tuning: train where the pretrained weight is largest in magnitude, or smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.experiments.config import Gates, Look, Tickets, fields_of
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY, TicketMethod, highest
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class SuperMask(TicketMethod):
    """Trains the entries whose pretrained weights rank highest, or lowest, in magnitude."""

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        magnitudes = {name: layer.frozen_matrix().abs() for name, layer in gated_linears(experiment.model).items()}
        return highest(experiment.config, magnitudes, largest=experiment.config.super_rank == "largest")


SUPER = SuperMask(
    name="super",
    help="train the entries whose pretrained weight is largest, or smallest (Super-Tuning)",
    options=(*fields_of(Gates), *fields_of(Tickets), "ranking", "density", "tile", "super_rank"),
    look=Look("black", "X", (0, (1, 3))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY},
)
