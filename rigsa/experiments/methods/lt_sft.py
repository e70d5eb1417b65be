"""Lottery-ticket sparse fine-tuning (Ansell et al. 2022): train everything from zero, keep what moved most, train that.

The change of a weight is its difference, which started at zero, so the largest changes are the largest magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.experiments.config import Config, Gates, Look, Tickets, fields_of
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY, TicketMethod, highest
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class LtSft(TicketMethod):
    """Level 0 trains all entries, level 1 from zero again those that level 0 changed most."""

    def levels(self, config: Config) -> tuple[int, ...]:
        return (0, 1)

    def summary(self, config: Config) -> str:
        return f"level 0 (dense) and one ticket of {config.density:.2%}"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        return {0: 1.0, 1: config.density}

    def ticket_fields(self, config: Config) -> frozenset[str]:
        return frozenset((*fields_of(Tickets), "ranking", "density", "tile"))

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        experiment.restore(0)
        changes = {name: layer.rigsa_values.detach() for name, layer in gated_linears(experiment.model).items()}
        return highest(experiment.config, changes, by="magnitude")

    def run(self, experiment: Experiment) -> None:
        experiment.measure_base()
        experiment.attach()
        for level in self.levels(experiment.config):
            if experiment.is_finished(level):
                continue
            if level == 1:
                experiment.enter_ticket(level, self.choose)
            experiment.run_level(level)


LT_SFT = LtSft(
    name="lt-sft",
    help="train all entries from zero, keep those that changed most, train these again (Ansell et al. 2022)",
    options=(*fields_of(Gates), *fields_of(Tickets), "ranking", "density", "tile"),
    look=Look("green", "^", (0, (1, 1))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY},
)
