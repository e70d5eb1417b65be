"""Super-Tuning: train where the pretrained weight is largest in magnitude, or smallest."""

from __future__ import annotations

from typing import Any

from rigsa.experiments.experiment import Experiment
from rigsa.experiments.methods.ticket import highest, run_ticket
from rigsa_kernels import SparsePattern, gated_linears


def run_super(experiment: Experiment) -> None:
    """One level."""
    run_ticket(experiment, choose_by_pretrained_magnitude)


def choose_by_pretrained_magnitude(experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    magnitudes = {name: layer.frozen_matrix().abs() for name, layer in gated_linears(experiment.model).items()}
    return highest(experiment.config, magnitudes, largest=experiment.config.super_rank == "largest")
