"""How a level gets its ticket: chosen once, written down, read by every process, and adopted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rigsa.adapter import MASK_FILE, load_masks
from rigsa.distributed import main_first
from rigsa.experiment import Experiment, level_folder
from rigsa.files import is_done
from rigsa_kernels import SparsePattern

Choose = Callable[[Experiment], tuple[dict[str, SparsePattern], dict[str, Any]]]
"""A mask strategy: a dense adapter as attached, to the patterns of its layers and what to record of the choice."""


def enter_ticket(experiment: Experiment, level: int, choose: Choose) -> None:
    """Choose the ticket of `level`, unless that was done already, and put every layer at its start."""
    path = level_folder(experiment.run, level) / MASK_FILE
    with main_first():
        if not path.exists():
            experiment.save_ticket(level, *choose(experiment))
    experiment.adopt(load_masks(experiment.model, path))


def run_ticket(experiment: Experiment, choose: Choose, level: int = 1) -> None:
    """A method of one level, whose mask is chosen before anything is trained."""
    experiment.measure_base()
    experiment.attach()
    if not is_done(level_folder(experiment.run, level)):
        enter_ticket(experiment, level, choose)
        experiment.run_level(level)
