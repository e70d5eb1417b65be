"""When `auto` goes from two products to one in training on a GPU, without the host waiting for the device.

The rule is `rigsa_kernels.exactness.composed_is_safe`. Its answer for all layers is measured on the device before each
step of the optimiser and copied to the host meanwhile; the host reads it before the next step, when it has long been
there. So a decision is one or two steps old, which depends on nothing but the steps: a run repeats, and one that is
resumed goes on with the decisions that its optimiser's state holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from .dispatch import HALF_DTYPES
from .exactness import need_two_products
from .linear import GatedSparseLinear, layer_starts


class Switch:
    """Decides for those of `layers` that run in 16 bits, are `auto` and not in four bits.

    Layers are held weakly. A layer on a CPU decides by itself and is left alone.
    """

    def __init__(self, layers: Iterable[GatedSparseLinear]) -> None:
        self._layers = [
            weakref.ref(layer)
            for layer in layers
            if layer.numerics == "auto" and layer.dtype in HALF_DTYPES and not layer.is_nf4
        ]
        self._found: tuple[int, list[weakref.ref[GatedSparseLinear]]] | None = None
        self._measured: Tensor | list[bool] | None = None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Adopt what was measured before the last step, and measure again."""
        layers = self._present()
        if not layers:
            return
        self._adopt(layers, self._resolve())
        exact = need_two_products(layers)
        if exact.is_cuda:
            self._measured = torch.empty(exact.shape, dtype=torch.bool, pin_memory=True)
            self._measured.copy_(exact, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._measured = exact

    def state(self) -> dict[str, list[bool]] | None:
        """What resuming needs; waits for the device. None where there is nothing to decide."""
        layers = self._present()
        if not layers:
            return None
        return {"exact": [layer.exact_in_training for layer in layers], "measured": self._resolve() or []}

    def check(self, state: dict[str, list[bool]] | None) -> None:
        """Raises ValueError where `state` is of another number of layers."""
        layers = self._present()
        if not state or not layers:
            return
        exact, measured = state["exact"], state["measured"]
        if len(exact) != len(layers) or len(measured) not in (0, len(layers)):
            raise ValueError(f"numerics: expected decisions of {len(layers)} layers, got {len(exact)}, {len(measured)}")

    def load(self, state: dict[str, list[bool]] | None) -> None:
        """The inverse of `state`, which has passed `check`."""
        layers = self._present()
        if state and layers:
            self._adopt(layers, list(state["exact"]))
            self._measured, self._copied = list(state["measured"]) or None, None

    def _present(self) -> list[GatedSparseLinear]:
        """Those that are still there and on a device that decides. Who that is changes only where a layer starts anew,
        so a model on a CPU costs nothing here."""
        starts = layer_starts()
        if self._found is None or self._found[0] != starts:
            layers = [layer for reference in self._layers if (layer := reference()) is not None]
            self._found = starts, [weakref.ref(layer) for layer in layers if layer.decides_by_optimizer()]
        return [layer for reference in self._found[1] if (layer := reference()) is not None]

    def _resolve(self) -> list[bool] | None:
        if self._copied is not None:
            self._copied.synchronize()
        return self._measured.tolist() if isinstance(self._measured, Tensor) else self._measured

    def _adopt(self, layers: list[GatedSparseLinear], exact: list[bool] | None) -> None:
        if exact is None or len(exact) != len(layers):
            return
        for layer, flag in zip(layers, exact, strict=True):
            layer.exact_in_training = flag
