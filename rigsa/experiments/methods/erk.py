"""Erdős-Rényi densities: places drawn at random, more of them in narrow layers, as SparseAdapter prunes adapters before
training (He et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Gates, Look, fields_of
from rigsa.experiments.methods.ticket import PAPER_DENSITY, TICKET_RATES, TicketMethod
from rigsa.masks import erk_counts, random_patterns
from rigsa_kernels import SparsePattern, gated_linears

if TYPE_CHECKING:
    from rigsa.experiments.experiment import Experiment


class Erk(TicketMethod):
    """Trains a random mask that keeps ``density`` of all weights, by `rigsa.masks.erk_counts` of each layer."""

    def most_kept(self, config: Config, weights: int) -> int:
        return weights

    def choose(self, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
        config = experiment.config
        shapes = {name: layer.pattern.shape for name, layer in gated_linears(experiment.model).items()}
        try:
            counts = erk_counts(shapes, config.density)
        except ValueError as error:
            raise RigsaError(f"--{error}") from error
        patterns = random_patterns(shapes, counts, seed=config.seed, device=experiment.model.device)
        return patterns, {"kept": sum(counts.values())}


ERK = Erk(
    name="erk",
    help="a random mask whose narrow layers are denser (Erdős-Rényi; SparseAdapter, He et al. 2022)",
    options=(*fields_of(Gates), "density"),
    look=Look("sky", (4, 1, 0), (0, (1, 1, 4, 1))),
    usual={"density": PAPER_DENSITY},
    quickstart=TICKET_RATES,
)
