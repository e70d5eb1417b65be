"""Iterative magnitude pruning (RIGSA, sections 3.2 and 4.4): train, prune, rewind, level by level.

Variants: other criteria and starting values (`rigsa.criteria`), rewinding to an early step (`rewinding.py` beside this
file), levels that end once their mask has settled (`early_bird.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Gates, Look, Method, Pruning, Tickets, fields_of, require
from rigsa.experiments.methods.ticket import PAPER_DENSITY
from rigsa.masks import PruneCounts, TrainedLayer, prune
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.select import count_bits

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from rigsa.experiments.experiment import Experiment


TICKET_FIELDS = frozenset((*fields_of(Pruning), *fields_of(Tickets), "ranking", "density", "tile")) - {
    "rewind_step", "early_bird_steps", "early_bird_distance",
}  # fmt: skip
"""What only tickets read. Level 0 writes down the step that they are rewound to, and may end early."""


class Imp(Method):
    """Levels 0 to ``config.prunings``. A finished step is never done again, a started one goes on where it stopped."""

    def check(self, config: Config) -> None:
        super().check(config)
        reachable = config.prunings > 0 or not config.density
        require(config, "density", "0 with --prunings 0, as only a pruning leads to a density", reachable)
        if config.keep_fraction and config.density:
            raise RigsaError(
                f"--keep-fraction {config.keep_fraction} and --density {config.density}: both say how much prunings "
                "keep; give one of them"
            )
        if config.prunings and not config.density:
            require(config, "keep_fraction", "more than 0, or a --density", config.keep_fraction > 0)
        if config.init_scale == 0 and (config.criterion == "rigsa" or config.rewind != "init"):
            raise RigsaError(
                "--init-scale 0: initial values have no signs to compare and nothing to rearrange; expected another "
                "--criterion than rigsa, and --rewind init"
            )

    def levels(self, config: Config) -> tuple[int, ...]:
        return tuple(range(config.prunings + 1))

    def most_kept(self, config: Config, weights: int) -> int:
        """As many as if all of them were eligible in each pruning."""
        if config.density:
            return round(config.density * weights)
        for _ in range(config.prunings):
            weights = round(config.keep_fraction * weights)
        return weights

    def summary(self, config: Config) -> str:
        return f"level 0 (dense) and {config.prunings} ticket{'' if config.prunings == 1 else 's'}"

    def densities(self, config: Config, same_sign_share: float) -> dict[int, float]:
        return ticket_densities(config, same_sign_share, config.prunings)

    def ticket_fields(self, config: Config) -> frozenset[str]:
        """An early bird ends level 0 by the mask that would be drawn."""
        return frozenset(fields_of(Tickets)) if config.early_bird_steps else TICKET_FIELDS

    def run(self, experiment: Experiment) -> None:
        from rigsa.experiments.methods.rewinding import rewind  # here: reports import this file, and no transformers

        config = experiment.config
        experiment.measure_base()
        experiment.attach()
        for level in self.levels(config):
            if experiment.is_finished(level):
                continue
            if level > 0:
                experiment.enter_ticket(level, partial(prune_level, level - 1))
                rewind(experiment)
            first_step = config.rewind_step if level > 0 else 0
            experiment.run_level(level, list(watchers(experiment, level)), first_step)


def ticket_densities(config: Config, same_sign_share: float, last: int) -> dict[int, float]:
    """Levels 0 to `last` to their density, as pruning will make it if that share of the entries keeps its sign."""
    return {level: asked_density(config, level) or (config.keep_fraction * same_sign_share) ** level
            for level in range(last + 1)}  # fmt: skip


def asked_density(config: Config, level: int) -> float:
    """Of a level on the way to ``config.density``, by the same factor in each pruning; 0 where none is asked for."""
    return config.density ** (level / config.prunings) if config.density and config.prunings else 0.0


def watchers(experiment: Experiment, level: int) -> Iterator[TrainerCallback]:
    """The callbacks of a level's training."""
    from rigsa.experiments.methods.early_bird import EarlyBird
    from rigsa.experiments.methods.rewinding import SaveEarly

    config = experiment.config
    if config.rewind_step and level == 0:
        yield SaveEarly(experiment, config.rewind_step)
    if config.early_bird_steps and level < config.prunings:  # the last level is never pruned
        yield EarlyBird(experiment.model, config, experiment.folder(level), lambda: choose(experiment, level)[0])


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
    from rigsa.experiments.methods.rewinding import start_of

    config, start = experiment.config, start_of(experiment, level)
    trained = {
        name: TrainedLayer(
            layer.rigsa_values, layer.pattern, layer.bound, layer.seed, layer.key, start[name] if start else None
        )
        for name, layer in gated_linears(experiment.model).items()
    }
    if config.criterion == "rigsa":
        trained = {name: layer.with_signs() for name, layer in trained.items()}  # `keep_fraction` and `prune` ask
    try:
        return prune(
            trained, keep_fraction=keep_fraction(config, trained, level + 1), ranking=config.ranking,
            criterion=config.criterion, tile=config.tile or None,
        )  # fmt: skip
    except ValueError as error:
        raise RigsaError(f"level {level + 1} cannot be chosen: {error}") from error


def keep_fraction(config: Config, layers: dict[str, TrainedLayer], level: int) -> float:
    """The share of the eligible entries that leads to the ticket of `level`.

    Raises:
        ValueError: fewer entries are eligible than the density asks for.
    """
    if not config.density:
        return config.keep_fraction
    rigsa = config.criterion == "rigsa"
    eligible = sum(int(count_bits(layer.same_sign())) if rigsa else layer.pattern.nnz for layer in layers.values())
    weights = sum(layer.pattern.out_features * layer.pattern.in_features for layer in layers.values())
    wanted = asked_density(config, level) * weights
    if wanted > eligible:
        raise ValueError(
            f"--density: {config.density} asks for {wanted / weights:.2%} of the weights, but only "
            f"{eligible / weights:.2%} may be kept; expected a lower one, or fewer prunings"
        )
    return wanted / eligible


IMP = Imp(
    name="imp",
    help="iterative magnitude pruning: train the dense adapter, prune it to tickets, train each (RIGSA)",
    options=(*fields_of(Gates), *fields_of(Pruning), *fields_of(Tickets), "ranking", "density", "tile"),
    look=Look("blue", "o", "solid", by_level=True),
    quickstart={"density": PAPER_DENSITY, "keep_fraction": 0.0},
    is_reference=True,
)
