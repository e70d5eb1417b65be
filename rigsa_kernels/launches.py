"""What one optimiser step runs: its launches, checked as a whole before the first of them changes anything.

A launch updates parameters of one group that agree in device, dtypes and step count. A model has hundreds of tensors,
and a small model waits for the host, so the checks are made column by column: one list of an attribute over all
tensors. Tensors are looked at one by one only where a column does not fit, to name the first that does not.

Parameters and moments that passed in the step before are not checked again. They count as the same where the objects
are the same, which `Checked` holds so that no other object can take their place, and lie at the same addresses.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from .adamw import num_blocks

T = TypeVar("T")
StateDtype = Literal["float32", "bfloat16", "int8"]
Remembered = dict[tuple[int, int, int], "Checked"]
_MOST_REMEMBERED = 1024
"""Sets of members that are remembered. A step has a few and repeats them; beyond this number all are forgotten."""
_NARROW = {torch.float32, torch.bfloat16}
_BEYOND = 2**63 - 1
"""No memory has this address."""


@dataclass
class Launch:
    """Parameters of one group that are updated together. Every list has one entry for each; `scales` may be empty.

    Attributes:
        options: of the group.
        step: the number of this step, from 1.
        owned: the parameters as they stand in the group; a DTensor is whole here.
        states: what the optimiser holds for them; for their first step it is new and not yet in the optimiser.
        numbers: of the parameters in the random stream.
        params, grads, exp_avgs, exp_avg_sqs, scales: what this process holds of them, contiguous.
        addresses: of these five lists; None where tensors have no memory (fake ones, those on "meta").
        held: what the device's code keeps from step to step while all but the gradients is as it was.
    """

    options: dict[str, Any]
    step: int
    owned: list[Tensor]
    states: list[dict[str, Any]]
    numbers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scales: list[Tensor]
    addresses: list[list[int]] | None
    held: dict[str, Any]


class Members:
    """Parameters of one group that have a gradient.

    Args:
        index, group: which group.
        first_number: of its parameters in the random stream.
        positions: which parameters; all that have a gradient by default.
    """

    def __init__(
        self, index: int, group: dict[str, Any], first_number: int, positions: Sequence[int] | None = None
    ) -> None:
        owned = group["params"]
        if positions is not None:
            owned = [owned[position] for position in positions]
        grads = [param.grad for param in owned]
        having = [at for at, grad in enumerate(grads) if grad is not None]
        self.positions = having if positions is None else [positions[at] for at in having]
        self.index, self.group, self.first_number = index, group, first_number
        self.owned: list[Tensor] = pick(owned, having)
        self.params = _local(self.owned)
        self.grads = _local(pick(grads, having))

    def name(self, at: int) -> str:
        """How an error calls the member `at`."""
        position, names = self.positions[at], self.group.get("param_names")
        return f"params[{position}] of group {self.index}" + (f" ({names[position]})" if names else "")

    def numbers(self) -> list[int]:
        numbers = [self.first_number + position for position in self.positions]
        if self.params is self.owned:
            return numbers
        return [number + (shard(param)[0] << 24) for number, param in zip(numbers, self.owned, strict=True)]


class Checked:
    """Members whose parameters and moments have passed, and what was found.

    Attributes:
        numbers: as in `Launch`.
        shapes: of the parameters.
        numels, devices: of the parameters; a device by its number, -1 for the CPU.
        kinds: (device, dtype, dtype of the first moment): members of one launch agree.
        same_kind: whether all do.
        starts, ends: of each piece of memory that an update writes, in order; empty where there is no memory.
        held: as in `Launch`, where one launch takes all members.
    """

    def __init__(
        self,
        members: Members,
        objects: list[list[Any]],
        columns: list[list[Any]],
        addresses: list[list[int]] | None,
    ) -> None:
        params, exp_avgs, exp_avg_sqs, scales = columns
        for at, param in enumerate(params):
            check_parameter(members.name(at), param)
            check_state(members.name(at), param, exp_avgs[at], exp_avg_sqs[at], scales[at] if scales else None)
        self.objects, self.addresses, self.numbers = objects, addresses, members.numbers()
        self.shapes, self.devices = [param.shape for param in params], [param.get_device() for param in params]
        self.kinds = [(param.device, param.dtype, moment.dtype) for param, moment in zip(params, exp_avgs, strict=True)]
        self.same_kind = len(set(self.kinds)) == 1
        self.starts, self.ends = self._written(members, columns, addresses)
        self.numels = [param.numel() for param in params]
        if addresses is not None:  # fake tensors have none, and in their mode no tensor holds numbers
            # Behind the last piece stands one that nothing reaches.
            begin, end = ([*numbers, _BEYOND] for numbers in (self.starts, self.ends))
            self._begin, self._end, self._sizes = map(_int64, (begin, end, self.numels))
        self._apart: list[int] | None = None
        self.held: dict[str, Any] = {}
        self.are_plain = addresses is not None and members.params is members.owned
        self._states: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None

    def states(self, members: Members, state: dict[Tensor, dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Of these members, as the step before found them; None where the optimiser's `state` holds others now.

        To look a tensor up takes Python's hash of it, which is most of the time of asking for hundreds.
        """
        if self._states is None:
            return None
        found, every = self._states
        return found if _same(members.owned, self.objects[0]) and _same(list(state.values()), every) else None

    def note_states(self, found: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Have `states` return `found` as long as the optimiser's `state` holds what it holds now."""
        self._states = (found, list(state.values()))

    def covers(
        self, known: bool, objects: list[list[Any]], params: list[Tensor], addresses: list[list[int]] | None
    ) -> bool:
        """Whether these are the objects that have passed (`known` says that it was found so), where they were and as
        large."""
        return (
            addresses is not None
            and addresses == self.addresses
            and list(map(Tensor.numel, params)) == self.numels
            and (known or all(map(_same, objects, self.objects)))
        )

    def _written(
        self, members: Members, columns: list[list[Any]], addresses: list[list[int]] | None
    ) -> tuple[list[int], list[int]]:
        pieces = sorted(
            (start, start + tensor.nbytes, at)
            for column, row in zip(columns, addresses or [], strict=False)
            for at, (tensor, start) in enumerate(zip(column, row, strict=True))
            if tensor is not None and tensor.numel()
        )
        if pieces and pieces[0][0] == 0:
            name = members.name(pieces[0][2])
            raise ValueError(f"{name}: expected it and its state in memory, got storage that was freed")
        for (_, end, at), (following, _, other) in itertools.pairwise(pieces):
            if following < end:
                raise ValueError(
                    f"{members.name(at)}: expected it and its state in memory of their own, "
                    f"got some that overlaps {members.name(other)} or its state"
                )
        return [start for start, _, _ in pieces], [end for _, end, _ in pieces]

    def overlapping(self, starts: list[int], dtypes: list[torch.dtype]) -> list[int]:
        """Which of the gradients that begin at `starts` lie in memory that the update writes to."""
        if starts == self._apart or not self.ends:
            return []
        begins, kinds = _int64(starts), set(dtypes)
        bytes_each = kinds.pop().itemsize if len(kinds) == 1 else _int64([dtype.itemsize for dtype in dtypes])
        # The first piece that ends beyond the gradient's start is the only one to look at: pieces do not overlap.
        piece = torch.searchsorted(self._end, begins, right=True)
        overlaps = self._begin[piece] < begins + self._sizes * bytes_each
        found = overlaps.nonzero().flatten().tolist() if overlaps.any() else []
        self._apart = None if found else starts
        return cast(list[int], found)


def launches_of(members: Members, state: dict[Tensor, dict[str, Any]], remembered: Remembered) -> list[Launch]:
    """What updates `members`. Nothing is changed, but for `remembered`.

    Args:
        members: of one group.
        state: of the optimiser.
        remembered: what was checked before, by group, first position and number of members.

    Raises:
        ValueError: a parameter, gradient or state that does not fit.
    """
    if not members.owned:
        return []
    key = (members.index, members.positions[0], len(members.positions))
    checked = remembered.get(key)
    known_states = checked.states(members, state) if checked is not None else None
    states = _states(members, state) if known_states is None else known_states
    objects = [
        members.owned,
        [one["exp_avg"] for one in states],
        [one["exp_avg_sq"] for one in states],
        [one.get("scales") for one in states],
    ]
    known = checked is not None and checked.are_plain and all(map(_same, objects, checked.objects))
    moments = objects[1:3] if known else map(_local, objects[1:3])
    columns = [members.params, *moments, _local_scales(members, objects[3])]
    addresses = [_addresses(column) for column in columns] if known or _are_in_memory(columns) else None
    if checked is None or not checked.covers(known, objects, members.params, addresses):
        checked = Checked(members, objects, columns, addresses)
        if len(remembered) >= _MOST_REMEMBERED:
            remembered.clear()
        remembered[key], known_states = checked, None
    if known_states is None:
        checked.note_states(states, state)
    grads, dtypes, grad_addresses = _gradients(members, checked, in_memory=addresses is not None)
    params, exp_avgs, exp_avg_sqs, scales = columns
    steps = [one.get("step", 0) + 1 for one in states]
    launches = []
    for part in _parts(checked, steps, dtypes):
        first = part[0]
        has_scales = bool(scales) and scales[first] is not None  # all of a part, or none
        where = None
        if addresses is not None:
            rows = [addresses[0], grad_addresses, *addresses[1:3], addresses[3] if has_scales else []]
            where = [pick(row, part) for row in rows]
        launches.append(
            Launch(
                options=members.group,
                step=steps[first],
                owned=pick(members.owned, part),
                states=pick(states, part),
                numbers=pick(checked.numbers, part),
                params=pick(params, part),
                grads=pick(grads, part),
                exp_avgs=pick(exp_avgs, part),
                exp_avg_sqs=pick(exp_avg_sqs, part),
                scales=pick(scales, part) if has_scales else [],
                addresses=where,
                held=checked.held if len(part) == len(steps) else {},
            )
        )
    return launches


def _parts(checked: Checked, steps: list[int], dtypes: list[torch.dtype]) -> list[Sequence[int]]:
    """Members that one launch takes, by their place among all of them."""
    if checked.same_kind and len(set(steps)) == 1 and len(set(dtypes)) == 1:
        return [range(len(steps))]
    parts: dict[Any, list[int]] = {}
    for at, key in enumerate(zip(checked.kinds, steps, dtypes, strict=True)):
        parts.setdefault(key, []).append(at)
    return list(parts.values())


def _states(members: Members, state: dict[Tensor, dict[str, Any]]) -> list[dict[str, Any]]:
    """The state of each member, made where it has none."""
    states = [state.get(param) for param in members.owned]
    for at, one in enumerate(states):
        if not one:
            check_parameter(members.name(at), members.params[at])
            states[at] = new_state(members.owned[at], members.group["state_dtype"])
        elif "exp_avg" not in one or "exp_avg_sq" not in one:
            raise ValueError(f"{members.name(at)}: expected exp_avg and exp_avg_sq in its state, got {list(one)}")
    return cast(list[dict[str, Any]], states)


def _gradients(
    members: Members, checked: Checked, *, in_memory: bool
) -> tuple[list[Tensor], list[torch.dtype], list[int]]:
    """Contiguous gradients that no update writes to, their dtypes, and where they lie."""
    grads = members.grads
    dtypes = [grad.dtype for grad in grads]
    if (
        not _NARROW.issuperset(dtypes)
        or [grad.shape for grad in grads] != checked.shapes
        or list(map(Tensor.get_device, grads)) != checked.devices
        or {grad.layout for grad in grads} != {torch.strided}
    ):
        for at, grad in enumerate(grads):
            check_gradient(members.name(at), members.params[at], grad)
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [grad.contiguous() for grad in grads]
    if not in_memory:
        return grads, dtypes, []
    addresses = _addresses(grads)
    overlapping = checked.overlapping(addresses, dtypes)
    if overlapping:
        grads = list(grads)
        for at in overlapping:
            grads[at] = grads[at].clone()
        addresses = _addresses(grads)
    return grads, dtypes, addresses


def _int64(numbers: list[int]) -> Tensor:
    """On the CPU. An array is read at once, where ``torch.tensor`` looks at every number."""
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _same(now: list[Any], then: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def new_state(param: Any, state_dtype: StateDtype) -> dict[str, Any]:
    """Moments of a parameter that has made no step, as `MaskedAdamW` documents them; the step count comes with it."""
    state: dict[str, Any] = {}
    if state_dtype == "int8":
        first, second = torch.int8, torch.uint8
        state["scales"] = _new_scales(param)
    else:
        wide = state_dtype == "float32" and param.dtype == torch.float64
        first = second = torch.float64 if wide else getattr(torch, state_dtype)
    state["exp_avg"] = torch.zeros_like(param, dtype=first, memory_format=torch.contiguous_format)
    state["exp_avg_sq"] = torch.zeros_like(param, dtype=second, memory_format=torch.contiguous_format)
    return state


def _new_scales(param: Any) -> Tensor:
    """Two rows with a scale for each block of 8-bit moments.

    Blocks of a DTensor are cut within shards. Its scales are a DTensor with one row for each shard, as long as the
    first and largest shard needs, so they are saved and loaded as moments are, by as many processes.
    """
    if not hasattr(param, "to_local"):
        return torch.zeros(2, num_blocks(param.numel()), device=param.device)
    largest = -(-param.shape[0] // shard(param)[1]) * param.shape[1:].numel()
    row = torch.zeros(1, 2 * num_blocks(largest), device=param.device)
    return cast(Tensor, type(param).from_local(row, param.device_mesh, param.placements, run_check=False))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor (told by its method: its module takes a second to import), else `tensor`."""
    return cast(Tensor, tensor.to_local().detach()) if hasattr(tensor, "to_local") else tensor


def shard(param: Any) -> tuple[int, int]:
    """``(number, count)`` of the shard that this process holds, which replicas share; (0, 1) of a plain tensor."""
    number, count = 0, 1
    if hasattr(param, "to_local"):
        mesh = param.device_mesh
        for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), param.placements, strict=True):
            if placement.is_shard():
                number, count = number * size + place, count * size
    return number, count


def check_parameter(name: str, param: Tensor) -> None:
    """Raises ValueError where `param` is of a dtype or layout that no update takes."""
    _check_dtype(name, "parameter", param, param)
    if not param.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous parameter, got strides {list(param.stride())}")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises ValueError where `grad` is not a dense one of `param`; it need not be contiguous."""
    _check_dtype(name, "gradient", param, grad)
    if grad.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense gradient, got {grad.layout}")
    if grad.shape != param.shape or grad.device != param.device:
        expected = f"{list(param.shape)} on {param.device}"
        raise ValueError(f"{name}: expected a gradient {expected}, got {list(grad.shape)} on {grad.device}")


def check_state(name: str, param: Tensor, exp_avg: Any, exp_avg_sq: Any, scales: Any) -> None:
    """Raises ValueError where moments are not those of `param`: names, shapes, dtypes, device, layout."""
    wide = {torch.float64} if param.dtype == torch.float64 and param.device.type == "cpu" else set()
    for what, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("scales", scales)):
        if not isinstance(tensor, Tensor) and not (tensor is None and what == "scales"):
            raise ValueError(f"{name}: expected {what} in its state to be a tensor, got {type(tensor).__name__}")
    for what, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != param.shape or moment.device != param.device or not _is_dense(moment):
            expected = f"contiguous {list(param.shape)} on {param.device}"
            got = f"{list(moment.shape)} on {moment.device}" + ("" if _is_dense(moment) else ", not contiguous")
            raise ValueError(f"{name}: expected {what} in its state {expected}, got {got}")
    dtypes = exp_avg.dtype, exp_avg_sq.dtype
    if dtypes != (torch.int8, torch.uint8) and not (dtypes[0] == dtypes[1] and dtypes[0] in _NARROW | wide):
        raise ValueError(
            f"{name}: expected exp_avg and exp_avg_sq in its state both float32, both bfloat16, or int8 and uint8, "
            f"got {dtypes[0]} and {dtypes[1]}"
        )
    if (scales is not None) != (exp_avg.dtype == torch.int8):
        raise ValueError(
            f"{name}: expected scales in its state beside 8-bit moments and no others, "
            f"got {'none' if scales is None else 'some'} beside {exp_avg.dtype}"
        )
    if scales is not None and not hasattr(scales, "to_local"):
        wanted = (torch.float32, (2, num_blocks(param.numel())), param.device)
        got_scales = (scales.dtype, tuple(scales.shape), scales.device)
        if got_scales != wanted or not _is_dense(scales):
            raise ValueError(f"{name}: expected scales in its state {wanted}, contiguous, got {got_scales}")


def _check_dtype(name: str, what: str, param: Tensor, tensor: Tensor) -> None:
    if tensor.dtype not in _NARROW and not (tensor.dtype == torch.float64 and param.device.type == "cpu"):
        expected = "float32 or bfloat16 (float64 on a CPU)"
        raise ValueError(f"{name}: expected a {what} in {expected}, got {tensor.dtype} on {tensor.device}")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()


def _are_plain(column: list[Any]) -> bool:
    """Whether these are all PyTorch's own kind of tensor, no DTensor and no fake one, or none at all."""
    return set(map(type, column)) <= {Tensor, torch.nn.Parameter, type(None)}


def _are_in_memory(columns: list[list[Any]]) -> bool:
    """Whether tensors have addresses: fake tensors and those on "meta" have none."""
    return all(map(_are_plain, columns)) and not columns[0][0].is_meta


def pick(column: list[T], at: Sequence[int]) -> list[T]:
    """The entries `at` of `column`, which is returned itself where these are all: places rise and none is twice."""
    return column if len(at) == len(column) or not column else [column[place] for place in at]


def _local(column: list[Tensor]) -> list[Tensor]:
    """`local_part` of each; `column` itself where there is no DTensor."""
    if _are_plain(column) or not any(hasattr(tensor, "to_local") for tensor in column):
        return column
    return list(map(local_part, column))


def _local_scales(members: Members, scales: list[Any]) -> list[Any]:
    """The scales of the part of moments that this process holds; empty where no member has any."""
    if set(map(type, scales)) == {type(None)}:
        return []
    if members.params is members.owned:
        return scales
    return [
        one if one is None else local_part(one).view(-1)[: 2 * num_blocks(param.numel())].view(2, -1)
        for one, param in zip(scales, members.params, strict=True)
    ]


def _addresses(column: list[Any]) -> list[int]:
    """Of each tensor; 0 where there is none, as scales beside some moments only."""
    if type(None) in set(map(type, column)):
        return [0 if tensor is None else tensor.data_ptr() for tensor in column]
    return list(map(Tensor.data_ptr, column))
