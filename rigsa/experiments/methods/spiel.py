"""SpIEL: a sparse difference that drops and grows entries while it trains (Ansell et al., "Scaling Sparse Fine-Tuning
to Large Language Models", 2024). How it moves them is in `reselection.py` beside this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.experiments.config import Gates, Look, Tickets, fields_of
from rigsa.experiments.methods.random_mask import draw_ticket
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY, TicketMethod
from rigsa_kernels import SparsePattern

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class Spiel(TicketMethod):
    """One level, which starts on a random mask; its mask is the last one, written with the values."""

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        return draw_ticket(experiment)

    def run(self, experiment: Experiment) -> None:
        from rigsa.experiments.methods.reselection import Reselection, planned_exchanges  # here: see `Imp.run`

        experiment.measure_base()
        experiment.attach()
        if experiment.is_finished(1):
            return
        patterns, record = self.choose(experiment)
        experiment.record_choice(1, record | planned_exchanges(experiment, patterns) | {"mask": None})  # it moves
        experiment.adopt(patterns)
        experiment.run_level(1, [Reselection(experiment.config, experiment.task.training())])


SPIEL = Spiel(
    name="spiel",
    help="drop and grow entries during training (SpIEL, Ansell et al. 2024)",
    options=(*fields_of(Gates), *fields_of(Tickets), "density", "reselect_steps", "reselect_share"),
    look=Look("green", "h", (0, (2, 2))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY},
    whole_because="expected whole layers in every process, to move their entries; use DDP",
)
