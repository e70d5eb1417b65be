"""Diff pruning (Guo, Rush & Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021), the structured
one: a difference that learns where to be zero, then is cut to the density, and goes on with its mask fixed.

`hard_concrete.py` beside this file has the first stage. A group is a layer's matrix, as with the authors; biases are
not trained here. They rank the magnitudes of all layers together (``--ranking global``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rigsa.experiments.config import Config, Gates, Look, Tickets, fields_of, require
from rigsa.experiments.methods.lt_sft import LtSft
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY
from rigsa.experiments.run_folder import ADAPTER_FILE

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class DiffPruning(LtSft):
    """Level 0 trains all entries and their factors, level 1 goes on with the largest of them from where they are."""

    def check(self, config: Config) -> None:
        super().check(config)
        expected = f"no for {self.name}, which looks at gradients between backward and update"
        require(config, "step_in_backward", expected, not config.step_in_backward)

    def run(self, experiment: Experiment) -> None:
        from rigsa.experiments.methods.hard_concrete import DiffGates  # here: see `Imp.run`
        from rigsa.experiments.methods.rewinding import start_from

        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(0):
            experiment.run_level(0, [DiffGates(experiment.config)])
        if not experiment.is_finished(1):
            experiment.enter_ticket(1, self.choose)
            start_from(experiment, experiment.folder(0) / ADAPTER_FILE)
            experiment.run_level(1)


DIFF_PRUNING = DiffPruning(
    name="diff-pruning",
    help="a difference that learns where to be zero, then trains its largest entries (Guo et al. 2021)",
    options=(*fields_of(Gates), *fields_of(Tickets), "ranking", "density", "tile", "l0_penalty"),
    look=Look("green", (3, 1, 0), (0, (9, 2, 1, 2))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY, "alpha_learning_rate": 0.1},
    quickstart={"alpha_learning_rate": 0.1},
    whole_because="expected whole layers in every process, to draw their factors; use DDP",
)
