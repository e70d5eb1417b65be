"""What a compiled kernel is made of, read from its machine code. Nothing here runs it.

`read` takes a kernel apart with ``cuobjdump`` from the triton wheel: registers, stack (that is where spills stand),
shared memory, how many programs fit on a multiprocessor, and every instruction; the *main loop* is the innermost one
with the most tensor-core instructions.

This says what a kernel does, and nothing about how long that takes: only a GPU says that.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that share a multiprocessor share, too."""

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 167_936, 166_912),
    89: Multiprocessor(48, 24, 102_400, 101_376),
    90: Multiprocessor(64, 32, 233_472, 232_448),
    100: Multiprocessor(64, 32, 233_472, 232_448),
    120: Multiprocessor(48, 24, 102_400, 101_376),
}
"""By compute capability, from "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide."""


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: ``@!P0 LDG.E.128 R4, [R2.64]``."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """LDG of ``LDG.E.128``; never LDG of ``LDGSTS`` or ``LDGDEPBAR``."""
        return self.opcode.split(".")[0]

    @property
    def never_executed(self) -> bool:
        """``@!PT LDS RZ, [RZ]``, which the compiler leaves between barriers."""
        return self.predicate in ("@!PT", "@!UPT")

    @property
    def bits(self) -> int:
        """Bits a lane moves, of an instruction that moves data."""
        parts = self.opcode.split(".")
        if self.name == "LDSM":
            return 32 * (int(parts[-1]) if parts[-1].isdigit() else 1)
        widths = [int(part.lstrip("US")) for part in parts if part in _WIDTHS]
        return widths[0] if widths else 32


_WIDTHS = {"8", "U8", "S8", "16", "U16", "S16", "64", "128"}


@dataclass(frozen=True)
class KernelCode:
    """What one compiled kernel is made of."""

    name: str
    arch: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: tuple[Instruction, ...]
    main_loop: tuple[Instruction, ...]
    """Empty where the kernel has no loop."""

    @property
    def local_loads(self) -> int:
        return count(self.instructions, "LDL")

    @property
    def local_stores(self) -> int:
        return count(self.instructions, "STL")

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.local_loads or self.local_stores)

    @property
    def programs_per_sm(self) -> int:
        """How many programs (CTAs) share a multiprocessor: what registers, shared memory and warps leave room for."""
        limits = MULTIPROCESSORS[self.arch]
        warp_registers = _round_up(self.registers * 32, 256)
        warps_by_registers = 65_536 // warp_registers // 4 * 4
        by_shared = limits.shared_bytes // (_round_up(self.shared_bytes, 128) + 1024)  # 1 KiB is the system's
        return min(warps_by_registers // self.warps, by_shared, limits.warps // self.warps, limits.programs)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def count(instructions: Iterable[Instruction], name: str) -> int:
    """How many instructions are called `name`, whatever their modifiers."""
    return sum(instruction.name == name for instruction in instructions)


def histogram(instructions: Iterable[Instruction]) -> Counter[str]:
    """``{name: how often}``."""
    return Counter(instruction.name for instruction in instructions)


def opcodes(instructions: Iterable[Instruction], name: str) -> Counter[str]:
    """``{full opcode: how often}`` of the instructions called `name`: shapes and types of HMMA."""
    return Counter(instruction.opcode for instruction in instructions if instruction.name == name)


def widths(instructions: Iterable[Instruction], name: str) -> Counter[int]:
    """``{bits a lane: how often}`` of the instructions called `name` that are ever executed."""
    return Counter(i.bits for i in instructions if i.name == name and not i.never_executed)


def read(compiled: Any) -> KernelCode:
    """Take a compiled kernel apart: `compiled` is what a launch or ``kernel.warmup`` returns."""
    resources, instructions = _disassembled(compiled.asm["cubin"])
    metadata = compiled.metadata
    return KernelCode(
        name=metadata.name,
        arch=metadata.target.arch,
        warps=metadata.num_warps,
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        shared_bytes=metadata.shared,
        instructions=instructions,
        main_loop=main_loop(instructions),
    )


@functools.cache
def _disassembled(cubin: bytes) -> tuple[dict[str, int], tuple[Instruction, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return resources, parse(text)


# For sm_100 and newer some versions of cuobjdump write how an instruction is scheduled behind it: ?trans5 &req={1}.
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:(@!?U?P\w+) +)?([A-Z][A-Z0-9_.]*) *([^;?&]*?) *(?:[?&][^;]*)?;")


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions in what ``cuobjdump -sass`` prints."""
    return tuple(
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in _LINE.findall(text)
        if opcode != "NOP"
    )


TENSOR_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
"""A warp's (sm_80, sm_89, sm_120), a warp group's (sm_90) and a program's (sm_100)."""


def tensor_instructions(instructions: Iterable[Instruction]) -> int:
    """How many there are for the tensor cores."""
    return sum(instruction.name in TENSOR_INSTRUCTIONS for instruction in instructions)


def main_loop(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The innermost loop with the most tensor-core instructions; without any, the longest innermost loop."""
    loops = _loops(instructions)
    tensor = {loop: tensor_instructions(instructions[loop[0] : loop[1]]) for loop in loops}
    loops = [loop for loop in loops if tensor[loop] or not any(tensor.values())]
    innermost = [loop for loop in loops if not any(_contains(loop, other) for other in loops)]
    start, end = max(innermost, key=lambda loop: (tensor[loop], loop[1] - loop[0]), default=(0, 0))
    return tuple(instructions[start:end])


def _loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Ranges that end in a branch to their first instruction. The last line of a kernel branches to itself: no loop."""
    index = {instruction.address: position for position, instruction in enumerate(instructions)}
    loops = []
    for position, instruction in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands) if instruction.name == "BRA" else None
        start = index.get(int(target[1], 16), position) if target else position
        if start < position:
            loops.append((start, position + 1))
    return loops


def _contains(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]
