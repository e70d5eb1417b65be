"""How a level gets its ticket: chosen once, written down, read by every process, and adopted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import MASK_FILE
from rigsa.experiments.config import Config
from rigsa.experiments.distributed import main_first
from rigsa.experiments.experiment import Experiment, level_folder, load_ticket
from rigsa.files import is_done
from rigsa.masks import largest_patterns
from rigsa_kernels import SparsePattern

Choose = Callable[[Experiment], tuple[dict[str, SparsePattern], dict[str, Any]]]
"""A mask strategy: a dense adapter as attached, to the patterns of its layers and what to record of the choice."""


def highest(
    config: Config, scores: Mapping[str, Tensor], by: Literal["score", "magnitude"] = "score", largest: bool = True
) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    """The entries that rank highest, as many as ``config.density`` says: what a `Choose` returns.

    Raises:
        RigsaError: a layer would be left empty, or a score is not finite.
    """
    try:
        patterns = largest_patterns(scores, density=config.density, ranking=config.ranking, by=by, largest=largest)
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}


def enter_ticket(experiment: Experiment, level: int, choose: Choose) -> None:
    """Choose the ticket of `level`, unless that was done already, and put every layer at its start."""
    path = level_folder(experiment.run, level) / MASK_FILE
    with main_first():
        if not path.exists():
            experiment.save_ticket(level, *choose(experiment))
    experiment.adopt(load_ticket(experiment.model, path.parent))


def run_ticket(experiment: Experiment, choose: Choose, level: int = 1) -> None:
    """A method of one level, whose mask is chosen before anything is trained."""
    experiment.measure_base()
    experiment.attach()
    if not is_done(level_folder(experiment.run, level)):
        enter_ticket(experiment, level, choose)
        experiment.run_level(level)
