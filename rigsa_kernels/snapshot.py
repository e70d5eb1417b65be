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

    __slots__ = ("_addresses", "_aliases", "_are_plain", "_tensors", "_versions")

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._aliases = tuple(tensor.detach() for tensor in tensors)
        marks = [_mark(tensor) for tensor in tensors]
        self._addresses, self._versions = (tuple(mark[part] for mark in marks) for part in (0, 1))
        self._are_plain = None not in self._addresses and None not in self._versions

    def same_address(self, tensor: Tensor) -> bool:
        """Whether the first tensor still lies where it lay."""
        return _mark(tensor)[0] == self._addresses[0]

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether these are the same tensors, and nobody has written to them since."""
        known = zip(tensors, self._tensors, self._addresses, self._versions, strict=True)
        return all(tensor is seen and _mark(tensor) == (at, version) for tensor, seen, at, version in known)

    def is_of_three(self, one: Tensor, two: Tensor, three: Tensor) -> bool:
        """`is_of` three tensors. Every layer asks it in every pass, so it is written out, in a quarter of the time."""
        if not self._are_plain:
            return self.is_of(one, two, three)
        first, second, third = self._tensors
        if one is not first or two is not second or three is not third:
            return False
        version, version_two, version_three = self._versions
        if one._version != version or two._version != version_two or three._version != version_three:
            return False
        address, address_two, address_three = self._addresses
        return one.data_ptr() == address and two.data_ptr() == address_two and three.data_ptr() == address_three


def _mark(tensor: Tensor) -> tuple[int | None, int | None]:
    """``(address, version)``; None for what a fake tensor or one made in inference mode does not have."""
    address = None if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    return address, None if tensor.is_inference() else tensor._version
