"""``rigsa inspect``: how dense the tickets of adapters and runs are, layer by layer, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import level_patterns
from rigsa.experiments.run_folder import CONFIG_FILE, finished_levels, level_folder
from rigsa.inspection import Patterns, describe, plot_densities
from rigsa.saving import CONFIG_FILE as ADAPTER_CONFIG
from rigsa.saving import read_patterns


def run_inspect(sources: Sequence[Path], figure: Path) -> str:
    """Draw the densities and overlaps of tickets into `figure`. Returns the table.

    Args:
        sources: folders of adapters (`rigsa.save_adapter`, a Trainer's checkpoints), run folders, which stand for all
            their finished levels, or folders of levels.
        figure: its ending says the kind.

    Raises:
        RigsaError: a source is none of them or is damaged, the tickets have other layers, or the figure cannot be
            drawn.
    """
    tickets: dict[str, Patterns] = {}
    for source in sources:
        tickets |= _tickets_of(source)
    try:
        table = describe(tickets)
        plot_densities(tickets, figure)
    except ValueError as error:
        raise RigsaError(str(error)) from error
    return table


def _tickets_of(source: Path) -> dict[str, Patterns]:
    if not source.is_dir():
        raise RigsaError(f"{source}: no such folder")
    if (source / ADAPTER_CONFIG).exists():
        return {str(source): read_patterns(source)}
    if not (source / CONFIG_FILE).exists():
        return {str(source): level_patterns(source)}
    levels = finished_levels(source)
    if not levels:
        raise RigsaError(f"{source} has no finished level; let the run finish one first")
    folders = [level_folder(source, level) for level in levels]
    return {str(folder): level_patterns(folder) for folder in folders}
