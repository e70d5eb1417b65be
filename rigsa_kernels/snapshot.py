"""Which tensors something was made from, and whether they still are what they were."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Snapshot:
    """Remembers tensors by identity, address and version counter.

    It holds the tensors and an alias of their memory. So neither an object nor an address that it compares with can be
    used again for something else while the snapshot lives. A write through ``.data``, or to a tensor that was made in
    inference mode, moves nothing that it looks at; an exchange of ``.data`` moves the address.
    """

    __slots__ = ("_aliases", "_are_plain", "_marks", "_tensors")

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._aliases = tuple(tensor.detach() for tensor in tensors)
        self._marks = tuple(_mark(tensor) for tensor in tensors)
        self._are_plain = not any(None in mark for mark in self._marks)

    def same_address(self, tensor: Tensor) -> bool:
        """Whether the first tensor still lies where it lay."""
        return _mark(tensor)[0] == self._marks[0][0]

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, and nobody has written to them since."""
        if not self._are_plain:
            marks = zip(tensors, self._tensors, self._marks, strict=True)
            return all(tensor is seen and _mark(tensor) == mark for tensor, seen, mark in marks)
        for tensor, seen, (address, version) in zip(tensors, self._tensors, self._marks, strict=True):
            if tensor is not seen or tensor._version != version or tensor.data_ptr() != address:  # in every pass
                return False
        return True


def _mark(tensor: Tensor) -> tuple[int | None, int | None]:
    """``(address, version)``; None for what a fake tensor or one made in inference mode does not have."""
    address = None if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    return address, None if tensor.is_inference() else tensor._version
