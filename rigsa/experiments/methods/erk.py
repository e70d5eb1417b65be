"""Erdős-Rényi densities: places drawn at random, more of them in narrow layers, as SparseAdapter prunes adapters before
training (He et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Gates, Look, Tickets, fields_of
from rigsa.experiments.methods.ticket import PAPER_DENSITY, TicketMethod
from rigsa.masks import erk_counts, random_patterns
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.tiles import grid_of

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class Erk(TicketMethod):
    """Trains a random mask: ``density`` of all entries or tiles, shared out over layers by `rigsa.masks.erk_counts`."""

    def shares_over_layers(self, config: Config) -> bool:
        return True

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        config, tile = experiment.config, experiment.config.tile or None
        shapes = {name: layer.pattern.shape for name, layer in gated_linears(experiment.model).items()}
        try:
            counts = erk_counts({name: grid_of(shape, tile) for name, shape in shapes.items()}, config.density)
        except ValueError as error:
            raise RigsaError(f"--{error}") from error
        patterns = random_patterns(shapes, counts, seed=config.seed, device=experiment.model.device, tile=tile)
        return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}


ERK = Erk(
    name="erk",
    help="a random mask whose narrow layers are denser (Erdős-Rényi; SparseAdapter, He et al. 2022)",
    options=(*fields_of(Gates), *fields_of(Tickets), "density", "tile"),
    look=Look("sky", (4, 1, 0), (0, (1, 1, 4, 1))),
    usual={"density": PAPER_DENSITY},
)
