"""Lottery-ticket sparse fine-tuning (Ansell et al. 2022): train everything from zero, keep what moved most, train that.

The change of a weight is its difference, which started at zero, so the largest changes are the largest magnitudes.
"""

from __future__ import annotations

from typing import Any

from rigsa.experiments.experiment import Experiment, level_folder
from rigsa.experiments.methods.ticket import enter_ticket, highest
from rigsa.files import is_done
from rigsa_kernels import SparsePattern, gated_linears


def run_lt_sft(experiment: Experiment) -> None:
    """Level 0 trains all entries, level 1 from zero again those that level 0 changed most."""
    experiment.measure_base()
    experiment.attach()
    for level in (0, 1):
        if is_done(level_folder(experiment.run, level)):
            continue
        if level == 1:
            enter_ticket(experiment, level, choose_most_changed)
        experiment.run_level(level)


def choose_most_changed(experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    experiment.restore(0)
    changes = {name: layer.rigsa_values.detach() for name, layer in gated_linears(experiment.model).items()}
    return highest(experiment.config, changes, by="magnitude")
