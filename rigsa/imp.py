"""Iterative magnitude pruning (RIGSA, sections 3.2 and 4.4): train, prune, rewind, level by level."""

from __future__ import annotations

from dataclasses import asdict

from rigsa.adapter import MASK_FILE, load_masks
from rigsa.distributed import main_first
from rigsa.errors import RigsaError
from rigsa.experiment import Experiment, level_folder
from rigsa.files import is_done
from rigsa.masks import TrainedLayer, prune
from rigsa_kernels import gated_linears


def run_imp(experiment: Experiment) -> None:
    """Levels 0 to ``config.prunings``. A finished step is never done again, a started one goes on where it stopped."""
    experiment.measure_base()
    experiment.attach()
    for level in range(experiment.config.prunings + 1):
        if is_done(level_folder(experiment.run, level)):
            continue
        if level > 0:
            enter_ticket(experiment, level)
        experiment.run_level(level)


def enter_ticket(experiment: Experiment, level: int) -> None:
    """Prune the level before, unless that was done already, and put every layer at the start of `level`."""
    path = level_folder(experiment.run, level) / MASK_FILE
    with main_first():
        if not path.exists():
            experiment.restore(level - 1)
            choose_ticket(experiment, level)
    experiment.adopt(load_masks(experiment.model, path))


def choose_ticket(experiment: Experiment, level: int) -> None:
    """Rank the trained values and write the ticket of `level`. Raises RigsaError where a layer would be empty."""
    config, layers = experiment.config, gated_linears(experiment.model)
    trained = {
        name: TrainedLayer(layer.rigsa_values, layer.pattern, layer.bound, layer.seed, layer.key)
        for name, layer in layers.items()
    }
    try:
        patterns, counts = prune(trained, keep_fraction=config.keep_fraction, ranking=config.ranking)
    except ValueError as error:
        raise RigsaError(f"level {level} cannot be pruned: {error}") from error
    share = counts.eligible / counts.free
    experiment.save_ticket(level, patterns, {"same_sign_share": share, **asdict(counts)})
