"""The control: tickets of the same size, drawn at random (RIGSA, section 4.4)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import CONFIG_FILE, Config, load
from rigsa.experiments.experiment import Experiment, level_folder, load_ticket
from rigsa.experiments.methods.ticket import run_ticket
from rigsa.files import is_done
from rigsa.masks import random_patterns
from rigsa_kernels import SparsePattern, gated_linears


def matched_ticket(config: Config) -> int:
    """The last finished level of the imp run that ``config.match`` names; 1 where a density is given instead.

    Raises:
        RigsaError: there is no such run, or it has no ticket yet.
    """
    if config.density:
        return 1
    run = Path(config.match)
    if not (run / CONFIG_FILE).exists():
        raise RigsaError(
            f"--match {run}: no run folder there, so there is no ticket to match. Run `python -m rigsa.run imp` first "
            "(same preset and seed), name a run with --match, or give --density."
        )
    method = load(run).method
    if method != "imp":
        raise RigsaError(f"--match {run}: expected the folder of an imp run, got one of {method}")
    tickets = [level for level in range(1, load(run).prunings + 1) if is_done(level_folder(run, level))]
    if not tickets:
        raise RigsaError(f"--match {run}: that run has no finished ticket yet; run the same imp command again first")
    return tickets[-1]


def run_random_mask(experiment: Experiment) -> None:
    """One level, from the same initial values as the matched ticket, with as many entries in each layer."""
    level = matched_ticket(experiment.config)
    run_ticket(experiment, partial(draw_ticket, level), level)


def draw_ticket(level: int, experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    config, layers = experiment.config, gated_linears(experiment.model)
    if config.density:
        counts = {name: round(config.density * layer.num_weights) for name, layer in layers.items()}
    else:
        matched = load_ticket(experiment.model, level_folder(Path(config.match), level))
        counts = {name: pattern.nnz for name, pattern in matched.items()}
    shapes = {name: layer.pattern.shape for name, layer in layers.items()}
    try:
        patterns = random_patterns(shapes, counts, seed=config.seed, device=experiment.model.device)
    except ValueError as error:
        raise RigsaError(f"--density {config.density}: {error}") from error
    return patterns, {"kept": sum(counts.values())}
