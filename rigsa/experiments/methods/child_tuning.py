"""Child-Tuning: full fine-tuning by a part of the gradients (Xu et al., "Raise a Child in Large Language Model", 2021).

Task-free, `child-f`, draws a new part at every step: ``gradient_share`` of the entries (`thin_gradients.py` beside this
file). Task-driven, `child-d`, takes one part for the whole run: the largest Fisher information over all layers. An
entry that never has a gradient stays at zero, so this is a ticket: that of `fisher`, with the authors' ranking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rigsa.experiments.config import Config, Gates, Look, fields_of, require
from rigsa.experiments.methods.baselines import Baseline
from rigsa.experiments.methods.gradient_masks import GRADIENT_OPTIONS, GradientMask
from rigsa.experiments.methods.ticket import FROM_ZERO, PAPER_DENSITY
from rigsa.scores import SCORES

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class ChildFree(Baseline):
    """One dense level, number 0."""

    def check(self, config: Config) -> None:
        super().check(config)
        expected = f"no for {self.name}, which looks at gradients between backward and update"
        require(config, "step_in_backward", expected, not config.step_in_backward)

    def run(self, experiment: Experiment) -> None:
        from rigsa.experiments.methods.thin_gradients import ThinGradients  # here: see `Imp.run`

        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(0):
            experiment.run_level(0, [ThinGradients(experiment.config)])


CHILD_F = ChildFree(
    name="child-f",
    help="full fine-tuning by a new random part of the gradients at each step (Child-Tuning, Xu et al. 2021)",
    options=(*fields_of(Gates), "gradient_share"),
    look=Look("sky", (6, 1, 0), (0, (3, 2, 1, 2))),
    usual=FROM_ZERO,
    quantizations=("none",),
    whole_because="expected whole layers in every process, to draw for their gradients; use DDP",
)
CHILD_D = GradientMask(
    name="child-d",
    help="train the entries with the largest Fisher information of all layers (Child-Tuning, Xu et al. 2021)",
    options=GRADIENT_OPTIONS,
    look=Look("red", (5, 1, 0), (0, (2, 1, 1, 1, 1, 1))),
    usual={**FROM_ZERO, "density": PAPER_DENSITY, "ranking": "global"},
    score=SCORES["fisher"],
)
