"""Records when the storage of each tensor is allocated and freed, on real tensors or on fake ones.

Peaks are computed afterwards, from the whole record. Time is counted in allocations: a *moment* is one allocation. Each
storage is a block, which belongs to a part of `PARTS` and is live from the moment of its birth to that of its death.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PARTS = ("weights", "adapter", "gradients", "optimiser", "activations", "workspace")
ALLOCATION = 512
"""PyTorch's CUDA allocator hands out multiples of this many bytes."""


@dataclass
class _Block:
    """One storage: its bytes, the moments between which it is live, and the part that it counts as."""

    size: int
    born: int
    died: int | None = None
    part: str = "workspace"


class LiveMemory(TorchDispatchMode):
    """A context that records every storage made inside it, and those that it is told to `hold`.

    Memory that an operator takes and gives back before it returns cannot be seen from outside.

    Args:
        temporary: called with each operator and its arguments. It returns the bytes of such memory, which then count
            for one moment.
    """

    def __init__(self, temporary: Callable[[Any, tuple[Any, ...]], int] = lambda operator, arguments: 0) -> None:
        super().__init__()
        self._temporary = temporary
        self._blocks: list[_Block] = []
        self._live: dict[int, _Block] = {}
        self._now = 0

    def hold(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count `tensors`, wherever they come from, as `part`."""
        for tensor in tensors:
            self._block_of(tensor).part = part

    def hold_rest(self, part: str) -> None:
        """Count everything that is live and still nameless as `part`."""
        for block in self._live.values():
            if block.part == "workspace":
                block.part = part

    def usage(self) -> Usage:
        """The live bytes of each part at each moment."""
        curves = np.zeros((len(PARTS), self._now + 1), dtype=np.int64)
        for block in self._blocks:
            row = curves[PARTS.index(block.part)]
            row[block.born] += block.size
            if block.died is not None:
                row[block.died] -= block.size
        return Usage(curves.cumsum(axis=1)[:, :-1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if size := self._temporary(func, args):
            self._blocks.append(_Block(size, self._now, self._now + 1))
            self._now += 1
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._block_of(value)
        return result

    def _block_of(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            block = _Block(-(-storage.nbytes() // ALLOCATION) * ALLOCATION, self._now)
            self._now += 1
            self._blocks.append(block)
            self._live[key] = block
            weakref.finalize(storage, self._free, key).atexit = False
        return self._live[key]

    def _free(self, key: int) -> None:
        self._live.pop(key).died = self._now


@dataclass(frozen=True, eq=False)
class Usage:
    """Live bytes as ``curves[part, moment]``, int64, with the parts in the order of `PARTS`."""

    curves: np.ndarray

    @property
    def peak(self) -> int:
        """The largest number of bytes that are live at one moment."""
        return int(self.curves.sum(axis=0).max())

    @property
    def by_part(self) -> dict[str, int]:
        """The bytes of each part at the moment of the peak."""
        moment = self.curves.sum(axis=0).argmax()
        return {part: int(size) for part, size in zip(PARTS, self.curves[:, moment], strict=True)}


@dataclass(frozen=True, eq=False)
class Growth:
    """Live bytes as a function of the micro-batch: ``fixed + size * each``, both ``[part, moment]``.

    The operators are the same whatever the micro-batch, so two recorded steps tell every other one.
    """

    fixed: np.ndarray
    each: np.ndarray

    @classmethod
    def between(cls, two: Usage, three: Usage) -> Growth:
        """Fitted to recorded steps of two and of three prompts.

        A step of one prompt would not do: its last position is contiguous, so a copy is missing.

        Raises:
            ValueError: the two steps did not make the same number of allocations.
        """
        if two.curves.shape != three.curves.shape:
            raise ValueError(f"three: expected the moments of two, {two.curves.shape}, got {three.curves.shape}")
        each = three.curves - two.curves
        return cls(two.curves - 2 * each, each)

    def holding(self, part: str, size: int) -> Growth:
        """The same step, but with `size` bytes of `part` at every moment."""
        row = PARTS.index(part)
        fixed, each = self.fixed.copy(), self.each.copy()
        fixed[row], each[row] = size, 0
        return Growth(fixed, each)

    def at(self, micro_batch: int) -> Usage:
        """The live bytes of a step of that many prompts."""
        return Usage(self.fixed + micro_batch * self.each)

    def largest(self, limit: float) -> int:
        """The largest micro-batch whose peak is at most `limit` bytes; 0 where not even one prompt fits."""
        fixed, each = self.fixed.sum(axis=0), self.each.sum(axis=0)
        if (fixed + each).max() > limit:
            return 0
        grows = each > 0
        return int(((limit - fixed[grows]) // each[grows]).min())
