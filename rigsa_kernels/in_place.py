"""A frozen weight that holds ``W0 + alpha * D`` at the free entries while passes need it, and W0 otherwise.

A layer whose pattern is packed can then multiply by one plain matrix, as fast as the layer that it adapts. No second
matrix is kept: W0 at the free entries, 2 bytes each in 16 bits, brings the weight back bit for bit.

The first pass after a change writes the sum into the weights of all layers of a model, in one launch. The end of an
optimiser's step writes W0 back the same way. So whoever reads a parameter between two steps (a checkpoint, an average
of models, a norm) sees the frozen weight; between a pass and the step, or in evaluation, `restore_weights` shows it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import free_entries  # noqa: F401 (defines the operators)
from ._ops import ops as operators
from .exactness import need_two_products
from .format import SparsePattern
from .snapshot import Snapshot


class InPlaceWeight:
    """One layer's weight.

    Args:
        weight: frozen ``[N, K]``, contiguous, holding W0.
        pattern: packed, on the weight's device.
    """

    def __init__(self, weight: Tensor, pattern: SparsePattern) -> None:
        self.weight, self.pattern = weight, pattern
        self.is_composed = False
        self.base_values = weight.new_empty(pattern.nnz)
        self._made_from: Snapshot | None = None
        with _writing():
            operators.gather_free_([self.base_values], [weight.detach()], pattern.tensors)
        self._left_as: Snapshot | None = Snapshot(weight)

    def holds(self, values: Tensor, alpha: Tensor) -> bool:
        """Whether the weight is composed of these, as they are now."""
        return self.is_composed and self._made_from is not None and self._made_from.is_of(self.weight, values, alpha)

    def check_untouched(self) -> bool:
        """Whether the weight is as this object left it.

        Raises:
            RuntimeError: somebody wrote into it while it held the sum, so W0 cannot be told any more.
        """
        if self._left_as is None:
            return True  # a write of our own was interrupted, which the next one mends
        untouched = self._left_as.is_of(self.weight)
        if not untouched and self.is_composed and self._left_as.same_address(self.weight):
            raise RuntimeError(
                "weight: it was written to while it held W0 + alpha * D; call rigsa.restore_weights(model) before "
                "writing to a frozen weight, or replace_linears(..., in_place=False)"
            )
        return untouched

    def frozen(self) -> Tensor:
        """W0 as a matrix of its own."""
        matrix = self.weight.detach().clone()
        if self.is_composed and self.check_untouched():
            with _writing():
                operators.scatter_free_([matrix], [self.base_values], self.pattern.tensors)
        return matrix

    def _begin_writing(self) -> None:
        """From here until `_mark_written`, the free entries hold nothing in particular, and base_values are W0."""
        self.is_composed, self._left_as, self._made_from = True, None, None

    def _mark_written(self, made_from: Snapshot | None) -> None:
        self._left_as, self._made_from = Snapshot(self.weight), made_from
        self.is_composed = made_from is not None


@contextmanager
def _writing() -> Iterator[None]:
    """Version counters count inside, whatever mode a pass is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def compose(weights: list[InPlaceWeight], values: list[Tensor], alphas: list[Tensor]) -> None:
    """Write ``W0 + alpha * D`` into `weights`, one launch for each combination of device and dtypes."""
    groups: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, (weight, value) in enumerate(zip(weights, values, strict=True)):
        groups[weight.weight.device, weight.weight.dtype, value.dtype].append(index)
    for numbers in groups.values():
        chosen = [weights[number] for number in numbers]
        own_values, own_alphas = ([tensors[number].detach() for number in numbers] for tensors in (values, alphas))
        for weight in chosen:
            weight._begin_writing()
        try:
            with _writing():
                operators.compose_free_(
                    [weight.weight.detach() for weight in chosen], [weight.base_values for weight in chosen],
                    own_values, own_alphas, _patterns(chosen),
                )  # fmt: skip
                torch.autograd.graph.increment_version([weight.weight for weight in chosen])
        except BaseException:
            restore(chosen)
            raise
        for weight, number in zip(chosen, numbers, strict=True):
            weight._mark_written(Snapshot(weight.weight, values[number], alphas[number]))


def restore(weights: Iterable[InPlaceWeight]) -> None:
    """Write W0 back into those of `weights` that are composed.

    Raises:
        RuntimeError: somebody wrote into one of them meanwhile.
    """
    groups: defaultdict[tuple[object, ...], list[InPlaceWeight]] = defaultdict(list)
    for weight in weights:
        if weight.is_composed:
            if weight.check_untouched():
                groups[weight.weight.device, weight.weight.dtype].append(weight)
            else:  # its `.data` was exchanged, and holds another W0 already
                weight.is_composed = False
    for chosen in groups.values():
        for weight in chosen:
            weight._begin_writing()
        with _writing():
            operators.scatter_free_(
                [weight.weight.detach() for weight in chosen], [weight.base_values for weight in chosen],
                _patterns(chosen),
            )  # fmt: skip
            torch.autograd.graph.increment_version([weight.weight for weight in chosen])
        for weight in chosen:
            weight._mark_written(None)


FLAG_BYTES = 16


class Peers:
    """Layers of one model, which are composed, restored and measured together. It keeps none of them alive.

    A copy of it is empty: copied layers join one by one (`GatedSparseLinear.__setstate__`).
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._derived: weakref.WeakSet[Any] = weakref.WeakSet()
        _all_peers.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Peers, ()

    def join(self, layer: Any) -> None:
        self._layers.add(layer)

    def compose(self, layer: Any) -> None:
        """Compose `layer`, and with it all that were composed before and have fallen back to W0 or gone stale."""
        chosen = [layer, *(other for other in self._layers if other is not layer and other.awaits_composing())]
        self._derived.update(chosen)
        compose(
            [other.in_place_weight for other in chosen],
            [other.rigsa_values for other in chosen],
            [other.rigsa_alpha for other in chosen],
        )

    def find_flags(self, layer: Any, dtype: torch.dtype) -> None:
        """Give `layer` its flag for a fused kernel, and with it all whose own is no longer true, in a few launches."""
        device = layer.rigsa_values.device
        chosen = [
            layer,
            *(
                other
                for other in self._layers
                if other is not layer and other.rigsa_values.device == device and other.awaits_flag(dtype)
            ),
        ]
        self._derived.update(chosen)
        # A kernel is compiled for flags at multiples of 16 bytes, and once more for others.
        rows = need_two_products(chosen, dtype)[:, None].repeat(1, FLAG_BYTES)
        for other, row in zip(chosen, rows[:, :1].unbind(), strict=True):
            other.keep_flag(dtype, row)

    def has_derived(self) -> bool:
        """Whether there is a weight or a flag that was made of parameters which no optimiser has changed since."""
        return len(self._derived) > 0

    def after_step(self, stepped: set[int]) -> None:
        """Restore the weights, and drop the flags, of the layers among whose parameters are `stepped`, by identity.

        An optimiser that steps in backward asks many times a step, so layers that are done are not looked at again.
        """
        done = [layer for layer in self._derived if layer.trains_any_of(stepped)]
        restore(own for layer in done if (own := layer.in_place_weight) is not None)
        for layer in done:
            layer.forget_flag()
        self._derived.difference_update(done)


_all_peers: weakref.WeakSet[Peers] = weakref.WeakSet()


def living_layers() -> Iterator[Any]:
    """Every gated layer that there is, in whatever model."""
    for peers in tuple(_all_peers):
        yield from tuple(peers._layers)


_optimizer_steps = 0


def optimizer_steps() -> int:
    """How many steps any optimiser has made. PyTorch's fused ones change values without raising version counters."""
    return _optimizer_steps


def after_step(stepped: Iterable[Tensor]) -> None:
    """Count a step. Of the layers whose parameters it has changed, restore the weights and drop the flags."""
    global _optimizer_steps
    _optimizer_steps += 1
    concerned = [peers for peers in _all_peers if peers.has_derived()]
    if concerned:
        numbers = {id(parameter) for parameter in stepped}
        for peers in concerned:
            peers.after_step(numbers)


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # A parameter without a gradient was not changed. Its layer may be in the midst of a pass, as others are updated
    # as soon as their gradients are complete.
    after_step(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


register_optimizer_step_post_hook(_after_step)


def _patterns(weights: list[InPlaceWeight]) -> list[Tensor]:
    return [tensor for weight in weights for tensor in weight.pattern.tensors]
