"""Run the Triton kernels on a CPU, exactly as their launchers launch them, under a memory guard. For tests only.

Inside `interpreting` every ``kernel[grid](...)`` goes to Triton's interpreter instead of a GPU, on CPU tensors. Three
things are put right or added on the way:

- bfloat16. The stock interpreter multiplies, compares and rounds bit patterns (tests/kernels/test_interpreter.py keeps
  a canary); here products of bfloat16 are those of their float32 values and casts round to nearest even. Other bfloat16
  arithmetic is not defined here, which suits the kernels: they widen to float32 right after a load.
- Memory. A load or store outside every tensor the launch was given, an address written twice by one store, an address
  that one program writes and another reads or writes, and a floating-point atomic are errors. (Addresses are compared
  as they are: an element seen at one through two widths is two.)
- Order. Programs run in shuffled order, and what ``torch.empty`` returns is filled with NaN.

All this leans on private names of triton 3.5 to 3.9; the canary test says when they change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from .offline import active_driver


class GuardError(AssertionError):
    """A kernel touched memory it must not touch."""


@contextlib.contextmanager
def interpreting(*, arch: int = 89, order: int = 0, also: Sequence[Tensor] = ()) -> Iterator[None]:
    """Run every Triton launch inside the block on the CPU.

    Args:
        arch: compute capability that launchers believe they run on; it selects their tile sizes.
        order: seed of the order in which the programs of a launch run.
        also: tensors that kernels reach through addresses in a table, not through an argument.

    Raises:
        GuardError: a kernel breaks one of the rules above.
    """

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [value for value in (*args, *options.values(), *also) if isinstance(value, Tensor)]
        _interpret(self, grid, args, options, Guard(tensors, order))

    def call(self: JITFunction, *args: Any, **options: Any) -> Any:
        return _interpreted(self.fn)(*args, **options)

    language = [tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base, tl.dtype, tl.condition]
    before = [(namespace, dict(vars(namespace))) for namespace in language]
    original = JITFunction.run, JITFunction.__dict__.get("__call__")
    with active_driver(arch), triton.knobs.runtime.scope(), _poisoned_memory():
        triton.knobs.runtime.interpret = True
        JITFunction.run, JITFunction.__call__ = run, call
        try:
            yield
        finally:
            JITFunction.run = original[0]
            if original[1] is None:
                del JITFunction.__call__
            else:
                JITFunction.__call__ = original[1]
            interpreter.interpreter_builder.__class__ = interpreter.InterpreterBuilder
            # Calls between kernels patch triton.language and leave it so, and a later compilation would fail.
            for namespace, names in before:
                _restore(namespace, names)


def _restore(namespace: Any, names: dict[str, Any]) -> None:
    for name in [name for name in vars(namespace) if name not in names]:
        delattr(namespace, name)
    for name, value in names.items():
        if vars(namespace).get(name) is not value:
            setattr(namespace, name, value)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@functools.cache
def _interpreted(function: Any) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function)


def _interpret(kernel: JITFunction, grid: Any, args: tuple[Any, ...], options: dict[str, Any], guard: Guard) -> None:
    for name in ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"):
        options.pop(name, None)
    builder = interpreter.interpreter_builder
    builder.__class__, builder.guard = GuardedBuilder, guard
    try:
        _interpreted(kernel.fn)[grid](*args, **options)
    except interpreter.InterpreterError as error:
        cause: BaseException = error
        while isinstance(cause, interpreter.InterpreterError) and cause.__cause__:  # one for each nested function
            cause = cause.__cause__
        raise cause from None
    guard.check_races()


class Guard:
    """What one launch may touch, and what its programs did."""

    def __init__(self, tensors: Sequence[Tensor], order: int) -> None:
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self.ends = np.array([end for _, end in spans], dtype=np.uint64)
        self.order = order
        self.seen: dict[str, list[tuple[np.ndarray, int]]] = {"load": [], "store": [], "atomic": []}

    @functools.cached_property
    def shuffled(self) -> np.ndarray:
        nx, ny, nz = interpreter.interpreter_builder.grid_dim
        return np.random.default_rng(self.order).permutation(nx * ny * nz)

    def check(self, what: str, pointers: Any, mask: np.ndarray) -> None:
        """The lanes that are on must lie inside a tensor and be aligned; `what` they did is remembered."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        lanes = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask, shape)]
        addresses = np.unique(lanes)
        if addresses.size == 0:
            return
        program = interpreter.interpreter_builder.grid_idx
        size = np.uint64(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
        tensor = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (tensor < 0) | (addresses + size > self.ends[np.maximum(tensor, 0)])
        if outside.any():
            raise GuardError(
                f"{what}: {outside.sum()} of {addresses.size} addresses out of bounds in program {program}"
            )
        if (addresses % size).any():
            raise GuardError(f"{what}: misaligned address in program {program}")
        if what == "store" and addresses.size != lanes.size:
            raise GuardError(f"store: two lanes of one store hit one address in program {program}")
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        self.seen[what].append((addresses, (program[0] * ny + program[1]) * nz + program[2]))

    def check_races(self) -> None:
        """No program may read or write what another one writes; atomics may meet each other, and nothing else."""
        self._check_race("store", "store")
        self._check_race("load", "store")
        self._check_race("load", "atomic")
        self._check_race("store", "atomic")

    def _check_race(self, what: str, other: str) -> None:
        touched, program = self._accesses(what)
        addresses, others = self._accesses(other)
        if touched.size == 0 or addresses.size == 0:
            return
        first = np.minimum(np.searchsorted(addresses, touched, side="left"), addresses.size - 1)
        last = np.maximum(np.searchsorted(addresses, touched, side="right") - 1, 0)
        for at in (first, last):  # the least and the greatest program there
            race = (addresses[at] == touched) & (others[at] != program)
            if race.any():
                one = int(np.argmax(race))
                pair = f"{program[one]} ({what}) and {others[at][one]} ({other})"
                raise GuardError(f"{what}: programs {pair} meet at one address")

    def _accesses(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and programs, in that order of sorting."""
        if not self.seen[what]:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        addresses = np.concatenate([addresses for addresses, _ in self.seen[what]])
        programs = np.concatenate([np.full(addresses.size, program) for addresses, program in self.seen[what]])
        order = np.lexsort((programs, addresses))
        return addresses[order], programs[order]


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


class GuardedBuilder(interpreter.InterpreterBuilder):
    """The stock interpreter with right bfloat16 casts and products, and a guard on memory."""

    guard: Guard

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            values = _widen(src.data)
            if target == tl.float32:
                return interpreter.TensorHandle(values, target)
            return super().cast_impl(interpreter.TensorHandle(values, tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bfloat16(src.data.astype(np.float32)), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        if a.dtype.scalar != tl.bfloat16:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(_widen(a.data), _widen(b.data), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):  # type: ignore[no-untyped-def]
        _no_bfloat16(lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):  # type: ignore[no-untyped-def]
        _no_bfloat16(arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]
        _no_bfloat16(x, y, z)
        return super().create_fma(x, y, z)

    def get_all_ones_value(self, type):  # type: ignore[no-untyped-def]
        kind = interpreter._get_np_dtype(type)
        if not np.issubdtype(kind, np.unsignedinteger):
            return super().get_all_ones_value(type)
        return interpreter.TensorHandle(np.full(1, np.iinfo(kind).max, kind), type.scalar)  # the stock one overflows

    # What follows the mask differs between versions: one cache policy, or a modifier and an eviction policy.

    def create_masked_load(self, ptrs, mask, other, *policy):  # type: ignore[no-untyped-def]
        mask = _as_bits(mask)
        self.guard.check("load", ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, other, *policy)

    def create_masked_store(self, ptrs, value, mask, *policy):  # type: ignore[no-untyped-def]
        mask = _as_bits(mask)
        self.guard.check("store", ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):  # type: ignore[no-untyped-def]
        if not val.dtype.scalar.is_int():
            raise GuardError("atomic: floating-point atomics make results depend on the order of programs")
        self.guard.check("atomic", ptr, _as_bits(mask).data)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):  # type: ignore[no-untyped-def]
        self.guard.check("atomic", ptr, np.ones(ptr.data.shape, np.bool_))
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def set_grid_idx(self, x, y, z):  # type: ignore[no-untyped-def]
        _, ny, nz = self.grid_dim
        number = int(self.guard.shuffled[(x * ny + y) * nz + z])
        super().set_grid_idx(number // (ny * nz), number // nz % ny, number % nz)


def _as_bits(mask: Any) -> Any:
    """A mask combined with a Python bool is an integer for NumPy, which the stock loads and stores refuse."""
    return interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)


def _no_bfloat16(*operands: Any) -> None:
    if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
        raise GuardError("bfloat16 arithmetic: the interpreter has none; widen to float32 after the load")
