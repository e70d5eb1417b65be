"""Super-Tuning: train where the pretrained weight is largest in magnitude, or smallest."""

from __future__ import annotations

from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiment import Experiment
from rigsa.masks import largest_patterns
from rigsa.ticket import run_ticket
from rigsa_kernels import SparsePattern, gated_linears


def run_super(experiment: Experiment) -> None:
    """One level."""
    run_ticket(experiment, choose_by_pretrained_magnitude)


def choose_by_pretrained_magnitude(experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    config = experiment.config
    magnitudes = {name: layer.frozen_matrix().abs() for name, layer in gated_linears(experiment.model).items()}
    try:
        patterns = largest_patterns(
            magnitudes, density=config.density, ranking=config.ranking, by="score",
            largest=config.super_rank == "largest",
        )  # fmt: skip
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(pattern.nnz for pattern in patterns.values())}
