"""The control: tickets of the same size, drawn at random (RIGSA, section 4.4).

Matched to a run it is that run's ticket, shuffled: as many entries in each layer, in other places.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import load_ticket
from rigsa.experiments.config import Config, Gates, Look, Tickets, fields_of, flag
from rigsa.experiments.methods import matched
from rigsa.experiments.methods.matched import Matched, matched_folder, matched_level
from rigsa.masks import random_patterns
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.tiles import grid_of

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class RandomMask(Matched):
    """One level, from the same initial values as the matched ticket, with as many entries in each layer."""

    def check(self, config: Config) -> None:
        super().check(config)
        for name in ("match", "match_level"):
            if config.density and getattr(config, name):
                raise RigsaError(f"--{flag(name)} and --density: give one of them")

    def levels(self, config: Config) -> tuple[int, ...]:
        return (1,) if config.density else ()

    def most_kept(self, config: Config, weights: int) -> int:
        return round(config.density * weights) if config.density else weights

    def summary(self, config: Config) -> str:
        return f"one ticket of {config.density:.2%}" if config.density else "one ticket, drawn at random"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        return {1: config.density} if config.density else super().densities(config, same_sign_share)

    def known_densities(self, config: Config) -> dict[int, float] | None:
        return None if config.density else super().known_densities(config)

    def run(self, experiment: Experiment) -> None:
        level = 1 if experiment.config.density else matched_level(experiment.config)
        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(level):
            experiment.enter_ticket(level, draw_ticket)
            experiment.run_level(level)


def draw_ticket(experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    """Draw as many entries in each layer as the density says, or as the matched ticket has there. Tiles are as many as
    come closest to that.

    Raises:
        RigsaError: the density leaves a layer empty, or the matched ticket cannot be read.
    """
    config, tile = experiment.config, experiment.config.tile or None
    shapes = {name: layer.pattern.shape for name, layer in gated_linears(experiment.model).items()}
    densities = dict.fromkeys(shapes, config.density)
    if not config.density:
        ticket = load_ticket(experiment.model, matched_folder(config))
        densities = {name: pattern.density for name, pattern in ticket.items()}
    counts = {name: round(densities[name] * math.prod(grid_of(shape, tile))) for name, shape in shapes.items()}
    try:
        patterns = random_patterns(shapes, counts, seed=config.seed, device=experiment.model.device, tile=tile)
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}


RANDOM_MASK = RandomMask(
    name="random-mask",
    help="the control: one level whose ticket is drawn at random, as dense as an imp run's last one",
    options=(*fields_of(Gates), *fields_of(Tickets), *matched.OPTIONS, "density", "tile"),
    look=Look("red", "s", (0, (5, 2)), by_level=True),
    matches="imp",
)
