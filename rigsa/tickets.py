"""Choose which entries of an adapted model are free, and change them: one call each, whatever trains the model.

A level loop around any training function is five lines::

    for level in range(5):
        train(model, MaskedAdamW(model))  # a new optimiser for each level: its parameters are new ones
        save_adapter(model, f"levels/{level}")
        if level < 4:
            print(prune(model, keep_fraction=0.8))

Every function refuses what it can know to be wrong before anything changes, and returns what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
import torch.nn as nn
from torch import Tensor

from rigsa.criteria import CRITERIA, TREATMENTS, treated_values
from rigsa.masks import (
    Ranking,
    TrainedLayer,
    check_ranking,
    erk_counts,
    largest_patterns,
    prune_by_layer,
    random_patterns,
)
from rigsa.scores import SCORES, gradient_scores
from rigsa.state import (
    Snapshot,
    Ticket,
    adapted_layers,
    adopt,
    carried,
    check_names,
    note_ticket,
    restore_snapshot,
    snapshot,
    ticket_of,
    unwrap,
)
from rigsa_kernels.format import SparsePattern
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.tiles import Tile, grid_of

Batch = TypeVar("Batch")
TileSize = str | int | Tile | None
"""As `rigsa_kernels.tiles.tile_size` takes it; None for single entries."""
Densities = Literal["equal", "erk"]
"""How a random ticket's entries are shared out among the layers."""
_NEEDS_NO_START = ("large_final", "small_final", "random")
"""Criteria that do not ask what the values started from."""


@dataclass(frozen=True)
class LayerCounts:
    """One layer: its weights, and how many of them were free before, could be kept, and are free now."""

    weights: int
    before: int
    eligible: int
    kept: int


@dataclass(frozen=True, repr=False)
class TicketReport:
    """What choosing a ticket did. Printed, it is a table with a line for each layer.

    Attributes:
        what: the call.
        layers: layer name to its counts, in the model's order.
    """

    what: str
    layers: dict[str, LayerCounts]

    @property
    def kept(self) -> dict[str, int]:
        """Layer name to its number of free entries, as `random_ticket` takes it for a control of the same size."""
        return {name: counts.kept for name, counts in self.layers.items()}

    @property
    def density(self) -> float:
        """Free share of all weights of the gated layers, 0 to 1."""
        total = self.total
        return total.kept / max(total.weights, 1)

    @property
    def total(self) -> LayerCounts:
        """The sums over the layers."""
        parts = self.layers.values()
        return LayerCounts(*(sum(getattr(part, name) for part in parts) for name in LayerCounts.__annotations__))

    def __repr__(self) -> str:
        total = self.total
        return f"<{self.what}: {total.kept:,} of {total.weights:,} weights free ({self.density:.2%})>"

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.layers, "all layers"))
        lines = [self.what, f"{'layer':{width}}  {'weights':>14}  {'before':>14}  {'kept':>14}  density"]
        for name, counts in (*self.layers.items(), ("all layers", self.total)):
            share = counts.kept / max(counts.weights, 1)
            lines.append(f"{name:{width}}  {counts.weights:14,}  {counts.before:14,}  {counts.kept:14,}  {share:7.2%}")
        return "\n".join(lines)


def prune(
    model: nn.Module,
    keep_fraction: float,
    criterion: str = "rigsa",
    ranking: Ranking = "layer",
    rewind: str | Snapshot = "init",
    *,
    tile: TileSize = None,
    draw_seed: int = 0,
) -> TicketReport:
    """Keep a share of each layer's free entries, and put them where the next level starts.

    Args:
        model: with gated sparse layers, trained.
        keep_fraction: share of the eligible entries that is kept, in (0, 1].
        criterion: what ranks entries (`rigsa.criteria.CRITERIA`). Under ``rigsa`` the entries that kept their sign are
            eligible and the largest are kept; under the others, those of Zhou et al. 2019, all free ones are.
        ranking: ``layer`` compares entries within each layer, ``global`` over the whole model.
        rewind: what the kept entries start from. ``init``: their initial values, behind a closed gate (the paper's).
            ``none``: the values and gates that they have ("prune and go on"). Another name in
            `rigsa.criteria.TREATMENTS`: that treatment of the initial values, behind a closed gate. A `snapshot`: the
            values and gates of then (Frankle et al. 2020).
        tile: keep whole tiles: ``32`` for squares, ``"16x64"``, ``"rows"`` or ``"columns"`` (`rigsa_kernels.tiles`). A
            tile's score is the norm of its entries' scores, or under ``rigsa`` the share of them that kept their sign
            (`rigsa.masks`). None: single entries, or the tiles that a layer has already.
        draw_seed: of the treatments that draw; the same for all levels.

    Returns:
        The counts. `rigsa_values` of every layer is a new parameter afterwards, so make a new optimiser.

    Raises:
        ValueError: no gated layer, a name or a number that is not allowed, values that are not finite, or a layer that
            would be left empty (named); `model` is unchanged.

    float64 values are ranked as float32. Source: RIGSA, section 4.4.
    """
    layers = adapted_layers(model)
    _check_rewind(layers, rewind)
    trained = {
        name: TrainedLayer(
            _rankable(layer.rigsa_values), layer.pattern, layer.bound, layer.seed, layer.key,
            _start(name, layer, criterion, rewind),
        )
        for name, layer in layers.items()
    }  # fmt: skip
    patterns, eligible = prune_by_layer(
        trained, keep_fraction=keep_fraction, ranking=ranking, criterion=criterion, tile=tile
    )
    _check_inside(patterns, rewind)
    what = f"prune(keep_fraction={keep_fraction}, criterion={criterion!r}, ranking={ranking!r}, rewind={_name(rewind)}"
    what += _and_tile(tile)
    report = _report(what, layers, patterns, eligible)
    for name, layer in layers.items():
        before = ticket_of(layer)
        start = (before.start, before.draw_seed) if rewind == "none" else (_name(rewind), draw_seed)
        _enter(name, layer, patterns.pop(name), rewind, draw_seed)
        note_ticket(layer, Ticket("prune", criterion, before.level + 1, *start))
    return report


def set_ticket(
    model: nn.Module, patterns: Mapping[str, SparsePattern], rewind: str | Snapshot = "init"
) -> TicketReport:
    """Give every layer a pattern of your own: an intersection of two tickets, a structure, what another tool chose.

    Args:
        model: with gated sparse layers.
        patterns: layer name to pattern, of all gated layers.
        rewind: as in `prune`; under ``none`` entries that were not free start at 0.

    Returns:
        The counts.

    Raises:
        ValueError: no gated layer, other layers or shapes, an empty pattern, or a `rewind` that is not allowed; `model`
            is unchanged.
    """
    layers = adapted_layers(model)
    check_names("patterns", patterns, layers)
    _check_rewind(layers, rewind)
    for name, layer in layers.items():
        if patterns[name].shape != layer.pattern.shape:
            raise ValueError(f"patterns: expected {list(layer.pattern.shape)} for {name}, got {patterns[name].shape}")
        if patterns[name].nnz == 0:
            raise ValueError(f"patterns: {name} would be left without a free entry")
    _check_inside(patterns, rewind)
    return _take("given", "", layers, dict(patterns), f"set_ticket(rewind={_name(rewind)})", rewind)


def random_ticket(
    model: nn.Module,
    density: float | Mapping[str, int],
    *,
    tile: TileSize = None,
    seed: int = 0,
    layer_densities: Densities = "equal",
) -> TicketReport:
    """Free entries that are drawn at random, each layer by itself, and rewind to the initial values.

    Args:
        model: with gated sparse layers.
        density: share of each layer's entries, in (0, 1]; or, by layer, the number of entries. A control of another
            ticket takes its `TicketReport.kept`.
        tile: draw whole tiles, as in `prune`: `density` is then the share of a layer's tiles, and a number of entries
            is rounded to tiles.
        seed: of the draw, 0 to 2**64 - 1. Seeds and layers draw independently of each other and of the initial values.
        layer_densities: ``equal`` keeps that share of every layer. ``erk`` keeps it of all layers together, and makes
            narrow ones denser (`rigsa.masks.erk_counts`, the Erdős-Rényi rule).

    Returns:
        The counts.

    Raises:
        ValueError: no gated layer, an argument out of range, ``erk`` beside numbers of entries, or a layer that would
            be left empty (named); `model` is unchanged.
    """
    layers = adapted_layers(model)
    counts = _drawn_counts(layers, density, layer_densities, tile)
    patterns: dict[str, SparsePattern] = {}
    for name, layer in layers.items():
        shapes, kept, device = {name: layer.pattern.shape}, {name: counts[name]}, layer.rigsa_values.device
        patterns |= random_patterns(shapes, kept, seed=seed, device=device, tile=tile)
    share = density if isinstance(density, (int, float)) else "by layer"
    apart = "" if layer_densities == "equal" else f", layer_densities={layer_densities!r}"
    what = f"random_ticket(density={share}, seed={seed}{apart}{_and_tile(tile)}"
    return _take("random", "random", layers, patterns, what)


def _drawn_counts(
    layers: Mapping[str, GatedSparseLinear],
    density: float | Mapping[str, int],
    layer_densities: Densities,
    tile: TileSize,
) -> dict[str, int]:
    if layer_densities not in get_args(Densities):
        expected = ", ".join(get_args(Densities))
        raise ValueError(f"layer_densities: expected one of {expected}, got {layer_densities!r}")
    if layer_densities == "equal":
        return _counts(layers, density, tile)
    if not isinstance(density, (int, float)):
        raise ValueError("layer_densities: 'erk' shares out a density; expected a number for density, got a mapping")
    return erk_counts({name: grid_of(layer.pattern.shape, tile) for name, layer in layers.items()}, density)


def magnitude_ticket(
    model: nn.Module, density: float, *, ranking: Ranking = "layer", largest: bool = True, tile: TileSize = None
) -> TicketReport:
    """Free the entries whose pretrained weights are largest, and rewind to the initial values.

    The largest *trained* values are ``prune(model, density, criterion="large_final")``.

    Args:
        model: with gated sparse layers.
        density: share of the entries, in (0, 1].
        ranking: ``layer`` compares weights within each layer, ``global`` over the whole model.
        largest: False frees the smallest.
        tile: free whole tiles, as in `prune`, by the norm of their weights; `density` is then the share of the tiles.

    Returns:
        The counts.

    Raises:
        ValueError: no gated layer, an argument out of range, weights that are not finite, or a layer that would be left
            empty (named); `model` is unchanged.

    Source: the mask of PEFT's Super-Tuning.
    """
    layers = adapted_layers(model)
    groups = [{name: layer} for name, layer in layers.items()] if ranking == "layer" else [layers]
    patterns: dict[str, SparsePattern] = {}
    for group in groups:  # a matrix that has to be decoded is not kept
        matrices = {name: _rankable(layer.frozen_matrix()) for name, layer in group.items()}
        patterns |= largest_patterns(
            matrices, density=density, ranking=ranking, by="magnitude", largest=largest, tile=tile
        )
    what = f"magnitude_ticket(density={density}, ranking={ranking!r}, largest={largest}{_and_tile(tile)}"
    return _take("magnitude", "largest" if largest else "smallest", layers, patterns, what)


def gradient_ticket(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    density: float,
    score: str = "sift",
    *,
    ranking: Ranking = "layer",
    tile: TileSize = None,
) -> TicketReport:
    """Free the entries that matter most to a loss before training, and rewind to the initial values.

    What the adapter has learned is dropped: gradients are those of the pretrained weights or, for ``snip`` and
    ``grasp``, of the dense adapter at its start, whose initial values have a part in the score. While they are gathered
    every layer is dense: 4 bytes a weight for the difference, and 4 or 8 for the scores. ``grasp`` differentiates twice
    and holds the gradients of all layers and the activations of two backward passes.

    Args:
        model: with gated sparse layers; it stays in training or evaluation mode, as it is.
        loss_fn: ``(model, batch)`` to a scalar loss.
        batches: what it is called with. For ``fisher`` and ``sam`` give batches of one example: they square the
            gradient of each. ``grasp`` keeps them all, for its second round.
        density: share of the entries, in (0, 1].
        score: ``sift``, ``fisher``, ``sam``, ``rosa``, ``taylor``, ``snip`` or ``grasp`` (`rigsa.scores`).
        ranking: ``layer`` compares scores within each layer, ``global`` over the whole model.
        tile: free whole tiles, as in `prune`, by the norm of their scores; `density` is then the share of the tiles.

    Returns:
        The counts.

    Raises:
        ValueError: no gated layer, an argument out of range, no batch, a loss that is no scalar, scores that are not
            finite, or ``snip`` or ``grasp`` where initial values or gates are all zero, and so would be the scores.
            The model has the adapter that it had before, then and whatever else `loss_fn` raises.
    """
    layers = adapted_layers(model)
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    check_ranking(ranking)
    if ranking == "layer" or not 0 < density <= 1:
        _counts(layers, density, tile)
    if SCORES[score].at_start:
        _check_start(layers, score)
    taken = snapshot(model)
    try:
        for layer in layers.values():
            (_be_at_the_start if SCORES[score].at_start else _be_the_pretrained_layer)(layer)
        values = {name: layer.rigsa_values for name, layer in layers.items()}
        scores = gradient_scores(unwrap(model), values, loss_fn, batches, SCORES[score])
        patterns = largest_patterns(scores, density=density, ranking=ranking, tile=tile)
    except BaseException:
        restore_snapshot(model, taken)
        raise
    what = f"gradient_ticket(density={density}, score={score!r}, ranking={ranking!r}{_and_tile(tile)}"
    before = {name: state.pattern.nnz for name, state in taken.items()}
    return _take("gradient", score, layers, patterns, what, before=before)


@torch.no_grad()
def _be_the_pretrained_layer(layer: GatedSparseLinear) -> None:
    """Dense, with zeros for a difference and a gate of 1."""
    dense = SparsePattern.dense(*layer.pattern.shape)
    zeros = torch.zeros(dense.values_shape, dtype=layer.rigsa_values.dtype, device=layer.rigsa_values.device)
    adopt(layer, dense, zeros)
    layer.rigsa_alpha.fill_(1.0)


@torch.no_grad()
def _be_at_the_start(layer: GatedSparseLinear) -> None:
    """Dense, at its initial values, with its gate as it was first."""
    adopt(layer, SparsePattern.dense(*layer.pattern.shape), None)
    layer.rigsa_alpha.fill_(layer.alpha_init)


def _check_start(layers: Mapping[str, GatedSparseLinear], score: str) -> None:
    for name, layer in layers.items():
        if layer.bound == 0 or layer.alpha_init == 0:
            what = "init_scale" if layer.bound == 0 else "alpha_init"
            raise ValueError(
                f"score: {score!r} is a product with the start of {name}, whose {what} is 0; it would be 0"
            )


def _rankable(values: Tensor) -> Tensor:
    """What `rigsa_kernels.select` can rank."""
    values = values.detach()
    return values.float() if values.dtype == torch.float64 else values


def _name(rewind: str | Snapshot) -> str:
    return rewind if isinstance(rewind, str) else "snapshot"


def _check_rewind(layers: Mapping[str, GatedSparseLinear], rewind: str | Snapshot) -> None:
    if isinstance(rewind, str):
        allowed = ["none", *TREATMENTS]
        if rewind not in allowed:
            raise ValueError(f"rewind: expected one of {', '.join(allowed)} or a snapshot, got {rewind!r}")
    else:
        check_names("rewind", rewind, layers)


def _check_inside(patterns: Mapping[str, SparsePattern], rewind: str | Snapshot) -> None:
    """Raises ValueError where a snapshot has no value for an entry."""
    if isinstance(rewind, str):
        return
    for name, pattern in patterns.items():
        there = rewind[name].pattern
        if pattern.shape != there.shape:
            raise ValueError(f"rewind: expected {list(pattern.shape)} for {name}, got {list(there.shape)}")
        if not there.is_dense and bool((pattern.to_mask().cpu() & ~there.to_mask().cpu()).any()):
            raise ValueError(f"rewind: the snapshot has no value for some free entries of {name}; take it earlier")


def _start(name: str, layer: GatedSparseLinear, criterion: str, rewind: str | Snapshot) -> Tensor | None:
    """What the values of a layer started from; None where they are the initial ones, or nobody asks."""
    ticket = ticket_of(layer)
    if ticket.start == "init" or criterion in _NEEDS_NO_START or criterion not in CRITERIA:
        return None
    if ticket.start != "snapshot":
        return treated_values(
            ticket.start, layer.pattern, bound=layer.bound, seed=layer.seed, key=layer.key,
            dtype=_rankable(layer.rigsa_values).dtype, device=layer.rigsa_values.device, draw_seed=ticket.draw_seed,
        )  # fmt: skip
    if isinstance(rewind, str):
        raise ValueError(
            f"rewind: {name} started from a snapshot, to which criterion={criterion!r} compares it; give it again, or "
            f"a criterion that does not compare ({', '.join(_NEEDS_NO_START)})"
        )
    _check_inside({name: layer.pattern}, rewind)
    return carried(rewind[name].values.to(layer.rigsa_values), rewind[name].pattern, layer.pattern)


@torch.no_grad()
def _enter(name: str, layer: GatedSparseLinear, pattern: SparsePattern, rewind: str | Snapshot, draw_seed: int) -> None:
    """Give `layer` a pattern, and the values and gate that `rewind` says."""
    gate, values = torch.full_like(layer.rigsa_alpha, layer.alpha_init), None
    if not isinstance(rewind, str):
        gate, state = rewind[name].gate, rewind[name]
        values = carried(state.values.to(layer.rigsa_values), state.pattern.to(layer.rigsa_values.device), pattern)
    elif rewind == "none":
        gate = layer.rigsa_alpha.clone()
        values = carried(layer.rigsa_values.detach(), layer.pattern, pattern)
    elif rewind != "init":
        values = treated_values(
            rewind, pattern, bound=layer.bound, seed=layer.seed, key=layer.key, dtype=layer.rigsa_values.dtype,
            device=layer.rigsa_values.device, draw_seed=draw_seed,
        )  # fmt: skip
    adopt(layer, pattern, values)
    layer.rigsa_alpha.copy_(gate)


def _and_tile(tile: TileSize) -> str:
    """The end of a call's description."""
    return ")" if tile is None else f", tile={tile!r})"


def _counts(
    layers: Mapping[str, GatedSparseLinear], density: float | Mapping[str, int], tile: TileSize = None
) -> dict[str, int]:
    """The number of free entries, or tiles, of each layer. Raises ValueError where it is out of range."""
    units = {name: math.prod(grid_of(layer.pattern.shape, tile)) for name, layer in layers.items()}
    what = "free entries" if tile is None else "tiles"
    if isinstance(density, (int, float)):
        if not 0 < density <= 1:
            raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
        counts = {name: round(density * number) for name, number in units.items()}
    else:
        check_names("density", density, layers)
        counts = {name: round(density[name] * units[name] / layer.num_weights) for name, layer in layers.items()}
    for name, count in counts.items():
        if not 1 <= count <= units[name]:
            raise ValueError(
                f"density: expected 1 to {units[name]} {what} in {name}, got {count}"
                + (f" (a share of {density})" if isinstance(density, (int, float)) else "")
            )
    return counts


def _report(
    what: str,
    layers: Mapping[str, GatedSparseLinear],
    patterns: Mapping[str, SparsePattern],
    eligible: Mapping[str, int] | None = None,
    before: Mapping[str, int] | None = None,
) -> TicketReport:
    counts = {}
    for name, layer in layers.items():
        was = layer.rigsa_values.numel() if before is None else before[name]
        could = layer.num_weights if eligible is None else eligible[name]
        counts[name] = LayerCounts(layer.num_weights, was, could, patterns[name].nnz)
    return TicketReport(what, counts)


def _take(
    kind: str,
    criterion: str,
    layers: Mapping[str, GatedSparseLinear],
    patterns: dict[str, SparsePattern],
    what: str,
    rewind: str | Snapshot = "init",
    before: Mapping[str, int] | None = None,
) -> TicketReport:
    """Give every layer a pattern that does not come from pruning, and write down where it came from."""
    report = _report(what, layers, patterns, before=before)
    for name, layer in layers.items():
        was = ticket_of(layer)
        start = (was.start, was.draw_seed) if rewind == "none" else (_name(rewind), 0)
        _enter(name, layer, patterns.pop(name), rewind, 0)
        note_ticket(layer, Ticket(kind, criterion, 0, *start))
    return report
