"""The control: tickets of the same size, drawn at random (RIGSA, section 4.4)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import load_ticket
from rigsa.experiments.config import Config, Gates, Look, Method, fields_of
from rigsa.experiments.methods.imp import ticket_densities
from rigsa.experiments.records import AMOUNT, TEXT, Fields, read_record
from rigsa.experiments.run_folder import CONFIG_FILE, METRICS_FILE, finished_levels, level_folder
from rigsa.masks import random_patterns
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.tiles import grid_of

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class RandomMask(Method):
    """One level, from the same initial values as the matched ticket, with as many entries in each layer."""

    def levels(self, config: Config) -> tuple[int, ...]:
        return (1,) if config.density else ()

    def has_ticket(self, config: Config) -> bool:
        return True

    def most_kept(self, config: Config, weights: int) -> int:
        return round(config.density * weights) if config.density else weights

    def summary(self, config: Config) -> str:
        return f"one ticket of {config.density:.2%}" if config.density else "one ticket, drawn at random"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        if config.density:
            return {1: config.density}
        return {config.prunings: ticket_densities(config, same_sign_share)[config.prunings]}

    def known_densities(self, config: Config) -> dict[int, float] | None:
        if config.density:
            return None
        level = matched_ticket(config)
        metrics = read_record(level_folder(Path(config.match), level) / METRICS_FILE, Fields({"density": AMOUNT}, {}))
        return {level: metrics["density"]}

    def run(self, experiment: Experiment) -> None:
        level = matched_ticket(experiment.config)
        experiment.measure_base()
        experiment.attach()
        if not experiment.is_finished(level):
            experiment.enter_ticket(level, partial(draw_ticket, level))
            experiment.run_level(level)


def matched_ticket(config: Config) -> int:
    """The last finished level of the imp run that ``config.match`` names; 1 where a density is given instead.

    Raises:
        RigsaError: there is no such run, it is one of another method, or it has no ticket yet.
    """
    if config.density:
        return 1
    run = Path(config.match)
    if not (run / CONFIG_FILE).exists():
        raise RigsaError(
            f"--match {run}: no run folder there, so there is no ticket to match. Run `python -m rigsa.run imp` first "
            "(same preset and seed), name a run with --match, or give --density."
        )
    method = read_record(run / CONFIG_FILE, Fields({"method": TEXT}, {}))["method"]
    if method != config.method.matches:
        raise RigsaError(f"--match {run}: expected the folder of an {config.method.matches} run, got one of {method}")
    tickets = [level for level in finished_levels(run) if level > 0]
    if not tickets:
        raise RigsaError(f"--match {run}: that run has no finished ticket yet; run the same imp command again first")
    return tickets[-1]


def draw_ticket(level: int, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    """Draw as many entries in each layer as the density says, or as the matched ticket of `level` has there. Tiles are
    as many as come closest to that.

    Raises:
        RigsaError: the density leaves a layer empty, or the matched ticket cannot be read.
    """
    config, tile = experiment.config, experiment.config.tile or None
    shapes = {name: layer.pattern.shape for name, layer in gated_linears(experiment.model).items()}
    densities = dict.fromkeys(shapes, config.density)
    if not config.density:
        matched = load_ticket(experiment.model, level_folder(Path(config.match), level))
        densities = {name: pattern.density for name, pattern in matched.items()}
    counts = {name: round(densities[name] * math.prod(grid_of(shape, tile))) for name, shape in shapes.items()}
    try:
        patterns = random_patterns(shapes, counts, seed=config.seed, device=experiment.model.device, tile=tile)
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}


RANDOM_MASK = RandomMask(
    name="random-mask",
    help="the control: one level whose ticket is drawn at random, as dense as an imp run's last one",
    options=(*fields_of(Gates), "match", "density", "tile"),
    look=Look("red", "s", (0, (5, 2)), by_level=True),
    matches="imp",
)
