"""What can be known of a run from the shapes of its layers: refused before anything is trained or written."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa_kernels.format import MAX_IN_FEATURES
from rigsa_kernels.tiles import grid_of


def check_layers(config: Config, shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> None:
    """Check that every ticket and every adapter of a run fits its layers.

    Args:
        config: of the run.
        shapes: name to N and K of the linear layers that are adapted.
        sizes: name to the number of weights of all that is adapted: of these, and of experts.

    Raises:
        RigsaError: a layer is too wide for a ticket, the density or keep fraction leaves one empty, or the rank is too
            large. The layer is named.
    """
    if config.method.peft:
        _check_rank(config, shapes)
    if config.method.has_ticket(config):
        _check_width(shapes)
        _check_kept(config, sizes, shapes)


def _check_rank(config: Config, shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, (rows, columns) in shapes.items():
        # SHiRA of rank r trains r * (N + K) of the N * K weights.
        most = rows * columns // (rows + columns) if config.method.peft == "shira" else min(rows, columns)
        if config.rank > most:
            raise RigsaError(f"--rank: expected at most {most} ({name} is {rows} x {columns}), got {config.rank}")


def _check_width(shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, (_, columns) in shapes.items():
        if columns > MAX_IN_FEATURES:
            raise RigsaError(
                f"--model: {name} has {columns:,} columns; expected at most {MAX_IN_FEATURES:,} in a ticket"
            )


def _check_kept(config: Config, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    """A share of all layers together may still leave one empty, which only the choice of the mask can tell."""
    units, what = dict(sizes), "weights"
    if config.method.reads("tile") and config.tile:  # the shapes of experts are not known here
        units, what = {name: math.prod(grid_of(shape, config.tile)) for name, shape in shapes.items()}, "tiles"
    largest = max(units.values(), default=0)
    if config.method.shares_over_layers(config):
        units = {"every layer": sum(units.values())}
    for name, number in units.items():
        if config.method.most_kept(config, number) == 0:
            option = "density" if config.density else "keep-fraction"
            value = config.density or config.keep_fraction
            raise RigsaError(f"--{option}: {value} leaves {name} empty ({number:,} {what}); keep more, or fewer levels")
    share = config.density or (config.keep_fraction if config.method.reads("keep_fraction") else 1.0)
    if what == "tiles" and share < 1 and all(config.method.most_kept(config, n) == n for n in units.values()):
        raise RigsaError(
            f"--tile: {config.tile} prunes nothing, as no layer has more than {largest:,} of such tiles; "
            "take smaller ones"
        )
