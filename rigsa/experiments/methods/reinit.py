"""A control of the lottery-ticket hypothesis (Frankle & Carbin 2019): the ticket of a run, from other initial values.

The mask is that run's, the images come in the order of the seed, and only the values that training starts from are
others. With ``--init-seed`` at the run's own seed it trains that ticket again, at other rates for instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.experiments.adapter import load_ticket
from rigsa.experiments.config import Config, Gates, Look, Tickets, fields_of
from rigsa.experiments.methods import matched
from rigsa.experiments.methods.matched import Matched, matched_folder, matched_level
from rigsa_kernels import SparsePattern

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class Reinit(Matched):
    """One level on the matched ticket; `Config.values_seed` has the seed of its initial values."""

    def summary(self, config: Config) -> str:
        return f"one ticket, from the initial values of seed {config.values_seed}"

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        patterns = load_ticket(experiment.model, matched_folder(experiment.config))
        return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}

    def run(self, experiment: Experiment) -> None:
        level = matched_level(experiment.config)
        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(level):
            experiment.enter_ticket(level, self.choose)
            experiment.run_level(level)


REINIT = Reinit(
    name="reinit",
    help="a control: one level on the ticket of an imp run, from other initial values",
    options=(*fields_of(Gates), *fields_of(Tickets), *matched.OPTIONS, "init_seed"),
    look=Look("purple", (5, 0, 180), (0, (7, 2, 1, 2)), by_level=True),
    matches="imp",
)
