"""Methods without a mask of ours: full fine-tuning, and adapters of PEFT. One level, number 0."""

from __future__ import annotations

from rigsa.experiments.experiment import Experiment, level_folder
from rigsa.files import is_done


def run_baseline(experiment: Experiment) -> None:
    """Train what `Experiment.attach` attached."""
    experiment.measure_base()
    experiment.attach()
    if not is_done(level_folder(experiment.run, 0)):
        experiment.run_level(0)
