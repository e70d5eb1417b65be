"""Lottery-ticket sparse fine-tuning (Ansell et al. 2022): train everything from zero, keep what moved most, train that.

The change of a weight is its difference, which started at zero, so the largest changes are the largest magnitudes.
"""

from __future__ import annotations

from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiment import Experiment, level_folder
from rigsa.files import is_done
from rigsa.masks import largest_patterns
from rigsa.ticket import enter_ticket
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
    config = experiment.config
    experiment.restore(0)
    changes = {name: layer.rigsa_values.detach() for name, layer in gated_linears(experiment.model).items()}
    try:
        patterns = largest_patterns(changes, density=config.density, ranking=config.ranking, by="magnitude")
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}
