"""Tickets side by side: how dense they are, layer by layer, and how much they share.

A ticket is given as an adapted model, as the folder of a saved adapter, or as patterns by layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from rigsa.files import write_atomically
from rigsa.saving import read_patterns
from rigsa.state import adapted_layers, check_names
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.select import bit_mask, count_bits

TicketSource = nn.Module | str | os.PathLike[str] | Mapping[str, SparsePattern]
Patterns = dict[str, SparsePattern]
ENTRIES = "entries"


@dataclass(frozen=True)
class LayerOverlap:
    """Free entries of one layer: in the first ticket, in the second, in both, in either; and its weights."""

    first: int
    second: int
    both: int
    either: int
    weights: int


@dataclass(frozen=True)
class Overlap:
    """What two tickets share. Printed, it is a table with a line for each layer.

    Attributes:
        layers: layer name to its counts.
    """

    layers: dict[str, LayerOverlap]

    @property
    def total(self) -> LayerOverlap:
        """The sums over the layers."""
        parts = self.layers.values()
        return LayerOverlap(*(sum(getattr(part, name) for part in parts) for name in LayerOverlap.__annotations__))

    @property
    def share(self) -> float:
        """Entries in both over entries in either (the Jaccard index), 0 to 1."""
        return self.total.both / max(self.total.either, 1)

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.layers, "all layers"))
        lines = [f"{'layer':{width}}  {'first':>12}  {'second':>12}  {'both':>12}   share"]
        for name, part in (*self.layers.items(), ("all layers", self.total)):
            share = part.both / max(part.either, 1)
            lines.append(f"{name:{width}}  {part.first:12,}  {part.second:12,}  {part.both:12,}  {share:6.2%}")
        return "\n".join(lines)


def patterns_of(source: TicketSource) -> Patterns:
    """Layer name to pattern, on the CPU.

    Raises:
        RigsaError: a folder holds no sound adapter.
        ValueError: a model has no gated layer.
    """
    if isinstance(source, nn.Module):
        return {name: layer.pattern.to("cpu") for name, layer in adapted_layers(source).items()}
    if isinstance(source, Mapping):
        return {name: pattern.to("cpu") for name, pattern in source.items()}
    return read_patterns(source)


def overlap(first: TicketSource, second: TicketSource) -> Overlap:
    """How many free entries two tickets have in common.

    Raises:
        ValueError: they have other layers, or other shapes.
    """
    one, other = _alike(first, second)
    found = {}
    for name, pattern in one.items():
        words, others = bit_mask(pattern), bit_mask(other[name])
        both, either = int(count_bits(words & others)), int(count_bits(words | others))
        found[name] = LayerOverlap(pattern.nnz, other[name].nnz, both, either, pattern.shape[0] * pattern.shape[1])
    return Overlap(found)


def union(*tickets: TicketSource) -> Patterns:
    """The entries that are free in any of these tickets; `rigsa.set_ticket` gives them to a model.

    Raises:
        ValueError: the tickets have other layers, or other shapes.
    """
    return _joined(tickets, lambda one, other: one | other)


def intersection(*tickets: TicketSource) -> Patterns:
    """The entries that are free in all of these tickets. A layer may be left empty.

    Raises:
        ValueError: the tickets have other layers, or other shapes.
    """
    return _joined(tickets, lambda one, other: one & other)


def describe(tickets: Mapping[str, TicketSource]) -> str:
    """A table of densities with a line for each layer and a column for each ticket, and what each two share.

    A line says the unit of each ticket where one is made of tiles.

    Args:
        tickets: label to ticket.

    Raises:
        ValueError: the tickets have other layers, or other shapes.
    """
    found = dict(zip(tickets, _alike(*tickets.values()), strict=True))
    first = next(iter(found.values()))
    width = max(len(name) for name in (*first, "all layers"))
    wide = max(8, *(len(label) for label in found))
    lines = [f"{'density':{width}}" + "".join(f"  {label:>{wide}}" for label in found)]
    for name in first:
        lines.append(f"{name:{width}}" + "".join(f"  {found[label][name].density:{wide}.2%}" for label in found))
    lines.append(f"{'all layers':{width}}" + "".join(f"  {density(found[label]):{wide}.2%}" for label in found))
    units = {label: unit(ticket) for label, ticket in found.items()}
    if set(units.values()) != {ENTRIES}:
        lines.append(f"{'unit':{width}}" + "".join(f"  {units[label]:>{wide}}" for label in found))
    labels = list(found)
    for number, one in enumerate(labels):
        for other in labels[number + 1 :]:
            lines.append(f"{one} and {other} share {overlap(found[one], found[other]).share:.2%} of their entries")
    return "\n".join(lines)


def unit(ticket: Patterns) -> str:
    """What is free or frozen as a whole: ``entries``, ``rows``, ``columns``, or the largest tile, as ``32x32``."""
    sizes = {name: pattern.tile for name, pattern in ticket.items() if pattern.tile is not None}
    if not sizes:
        return ENTRIES
    if all(tile == (1, ticket[name].shape[1]) for name, tile in sizes.items()):
        return "rows"
    if all(tile == (ticket[name].shape[0], 1) for name, tile in sizes.items()):
        return "columns"
    return "{}x{}".format(*max(sizes.values(), key=math.prod))  # narrow layers have smaller ones


def density(ticket: Patterns) -> float:
    """Free entries over weights, of all layers together."""
    weights = sum(pattern.shape[0] * pattern.shape[1] for pattern in ticket.values())
    return sum(pattern.nnz for pattern in ticket.values()) / max(weights, 1)


WIDEST, INCHES_A_LABEL = 14.0, 0.16
"""Of the panel of densities, and of the name of a layer in it."""


def plot_densities(tickets: Mapping[str, TicketSource], path: str | os.PathLike[str]) -> None:
    """Draw the density of every layer, a line for each ticket, into a file of a kind that matplotlib knows.

    Of two tickets or more, a second panel shows the share of the entries that each two have in common. Where the layers
    are too many for a page, every second or third of them has its name below.

    Args:
        tickets: label to ticket.
        path: of the figure; its ending says the kind.

    Raises:
        ValueError: the tickets have other layers, or other shapes, or matplotlib does not know the kind.
    """
    from matplotlib.figure import Figure

    found = dict(zip(tickets, _alike(*tickets.values()), strict=True))
    labels = {name: name.replace("$", r"\$") for name in found}
    layers = list(next(iter(found.values())))
    every = math.ceil(len(layers) * INCHES_A_LABEL / WIDEST)
    wide, square = min(WIDEST, max(6.0, INCHES_A_LABEL * len(layers))), 2.5 + 0.5 * len(found)
    panels = 1 if len(found) == 1 else 2
    size = (wide + (panels - 1) * square, max(4.5, (panels - 1) * square))
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False, width_ratios=[wide, square][:panels])[0]
    for name, ticket in found.items():
        axes[0].plot([100 * pattern.density for pattern in ticket.values()], marker=".", label=labels[name])
    axes[0].set_xticks(range(0, len(layers), every), layers[::every], rotation=90, fontsize=6)
    axes[0].margins(x=0.01)
    axes[0].set_ylabel("density (%)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    if panels == 2:
        _draw_overlaps(axes[1], found, list(labels.values()))
    kind = Path(path).suffix.removeprefix(".") or "png"
    write_atomically(Path(path), lambda temporary: figure.savefig(temporary, format=kind))


def _draw_overlaps(axes: Any, tickets: Mapping[str, Patterns], labels: list[str]) -> None:
    names = list(tickets)
    shares = [[100 * overlap(tickets[one], tickets[other]).share for other in names] for one in names]
    axes.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            color = "white" if share > 60 else "black"
            axes.text(column, row, f"{share:.1f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), labels, fontsize=6)
    axes.set_title("shared entries (%)", fontsize=9)


def _alike(*tickets: TicketSource) -> list[Patterns]:
    """The patterns of tickets that have the same layers. Raises ValueError where they have not."""
    if not tickets:
        raise ValueError("tickets: expected at least one")
    first, *others = [patterns_of(ticket) for ticket in tickets]
    for other in others:
        check_names("tickets", other, first)
        for name, pattern in first.items():
            if other[name].shape != pattern.shape:
                raise ValueError(
                    f"tickets: {name} is {list(pattern.shape)} in one and {list(other[name].shape)} in another"
                )
    return [first, *({name: other[name] for name in first} for other in others)]


def _joined(tickets: tuple[TicketSource, ...], join: Any) -> Patterns:
    first, *others = _alike(*tickets)
    joined = {}
    for name, pattern in first.items():
        words = bit_mask(pattern)
        for other in others:
            words = join(words, bit_mask(other[name]))
        whole = SparsePattern.from_words(words, pattern.in_features)
        alike = pattern.tile is not None and all(other[name].tile == pattern.tile for other in others)
        joined[name] = SparsePattern.from_mask(whole.to_mask(), pattern.tile) if alike else whole
    return joined
