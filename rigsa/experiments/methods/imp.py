"""Iterative magnitude pruning (RIGSA, sections 3.2 and 4.4): train, prune, rewind, level by level.

Variants: other criteria and starting values (`rigsa.criteria`), rewinding to an early step (`rewinding.py` beside this
file), levels that end once their mask has settled (`early_bird.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import TrainerCallback

from rigsa.errors import RigsaError
from rigsa.experiments.experiment import Experiment, level_folder
from rigsa.experiments.methods.early_bird import EarlyBird
from rigsa.experiments.methods.rewinding import SaveEarly, rewind, start_of
from rigsa.experiments.methods.ticket import enter_ticket
from rigsa.files import is_done
from rigsa.masks import PruneCounts, TrainedLayer, prune
from rigsa_kernels import SparsePattern, gated_linears


def run_imp(experiment: Experiment) -> None:
    """Levels 0 to ``config.prunings``. A finished step is never done again, a started one goes on where it stopped."""
    experiment.measure_base()
    experiment.attach()
    for level in range(experiment.config.prunings + 1):
        if is_done(level_folder(experiment.run, level)):
            continue
        if level > 0:
            enter_ticket(experiment, level, partial(prune_level, level - 1))
            rewind(experiment)
        first_step = experiment.config.rewind_step if level > 0 else 0
        experiment.run_level(level, list(watchers(experiment, level)), first_step)


def watchers(experiment: Experiment, level: int) -> Iterator[TrainerCallback]:
    """What looks on while a level trains."""
    config = experiment.config
    if config.rewind_step and level == 0:
        yield SaveEarly(experiment, config.rewind_step)
    if config.early_bird_steps and level < config.prunings:  # the last level is never pruned
        yield EarlyBird(
            experiment.model, config, level_folder(experiment.run, level), lambda: choose(experiment, level)[0]
        )


def prune_level(level: int, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    """The ticket that follows `level`, which is trained. Raises RigsaError where a layer would be empty."""
    experiment.restore(level)
    patterns, counts = choose(experiment, level)
    record: dict[str, Any] = asdict(counts)
    if experiment.config.criterion == "rigsa":
        record = {"same_sign_share": counts.eligible / counts.free, **record}
    return patterns, record


def choose(experiment: Experiment, level: int) -> tuple[dict[str, SparsePattern], PruneCounts]:
    """Rank the values that the layers carry now, in `level`. Raises RigsaError where a layer would be empty."""
    config, start = experiment.config, start_of(experiment, level)
    trained = {
        name: TrainedLayer(
            layer.rigsa_values, layer.pattern, layer.bound, layer.seed, layer.key, start[name] if start else None
        )
        for name, layer in gated_linears(experiment.model).items()
    }
    try:
        return prune(trained, keep_fraction=config.keep_fraction, ranking=config.ranking, criterion=config.criterion)
    except ValueError as error:
        raise RigsaError(f"level {level + 1} cannot be chosen: {error}") from error
