"""What a compiled kernel costs, read from its machine code, and what it would take on a GPU. Nothing here runs it.

`read` takes a kernel apart with ``cuobjdump`` from the triton wheel: registers, stack (that is where spills stand),
shared memory, how many programs fit on a multiprocessor (SM), and every instruction; the *main loop* is the innermost
one with the most tensor-core instructions.

`bounds` and `predict` are a static model, a roofline over the instructions. An SM has four partitions, and the warps of
a program are spread over them evenly. Of one iteration of the main loop `bounds` says how many cycles each of these
would be busy if it were the only limit:

- tensor: FLOP over the tensor cores' peak
- issue:  one instruction a cycle and partition
- alu, fma, special: instructions over the throughput of their pipe (integer and logic; float32 and integer multiply;
  POPC, MUFU and conversions)
- lsu:    memory instructions at 32 lanes a cycle and SM
- l1:     bytes through the SM's L1 and shared memory at 128 a cycle
- l2:     bytes of the asynchronous copies that bypass L1 (all 128-bit ones do) over the SM's share of L2 bandwidth.
          What else a main loop loads are scales, bit words and packed values, which neighbours find in L1.

`predict` adds the programs up. Each SM gets an equal share of them, as many at a time as fit. Programs that share an SM
hide each other's latency, so that their cycles add up per pipe and the busiest pipe decides; one alone waits for its
own decoding, and pays for issue on top of the tensor cores. What stands outside the main loop is executed once, filling
and draining the pipeline costs 1500 cycles, and no kernel is faster than its tensors pass through DRAM once.

Constants: throughput per instruction is that of the CUDA C++ Programming Guide ("Throughput of Native Arithmetic
Instructions"), occupancy limits of its "Technical Specifications per Compute Capability", peaks and clocks those of
NVIDIA's A100, H100 and Ada whitepapers. Tensor peaks are dense bfloat16 with float32 accumulation, half of the one with
float16 on GeForce. L2 bandwidth is an assumption.

Predicted, not measured: an upper bound on speed. Latency is not modelled. Published runs of cuBLAS on Ada reach about
0.90 of it (0.88 to 0.97), Triton on an A100 about 0.8. Ratios between two kernels of one model are worth more than
either number. The warp-group instructions of sm_90 (HGMMA) are not modelled, and `predict` answers None for them.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Gpu:
    """One GPU of an architecture. Limits are per SM unless said otherwise."""

    name: str
    sms: int
    clock: float
    tensor_flops: float
    dram_bandwidth: float
    l2_bandwidth: float
    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int
    float32_cycles: int
    """Cycles one float32 instruction of a warp keeps its partition's pipe busy."""

    @property
    def partition_flops(self) -> float:
        """Tensor-core FLOP a cycle and partition."""
        return self.tensor_flops / (4 * self.sms * self.clock)


GPUS = {
    80: Gpu("A100 40GB", 108, 1.41e9, 312e12, 1555e9, 5.0e12, 64, 32, 167_936, 166_912, 2),
    89: Gpu("RTX 4090", 128, 2.52e9, 165.2e12, 1008e9, 5.0e12, 48, 24, 102_400, 101_376, 1),
    90: Gpu("H100 SXM", 132, 1.83e9, 989.4e12, 3352e9, 5.5e12, 64, 32, 233_472, 232_448, 1),
}
FILL_AND_DRAIN = 1500  # cycles


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

    @property
    def tensor_flop(self) -> int:
        """FLOP of ``HMMA.16816`` (16 x 8 times 8 x 16, twice for multiply and add); 0 where there is no such shape."""
        shape = re.match(r"HMMA\.(16)(8)(\d+)", self.opcode)
        return 2 * math.prod(int(size) for size in shape.groups()) if shape else 0


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
    def outside(self) -> tuple[Instruction, ...]:
        """What is not in the main loop."""
        inside = {instruction.address for instruction in self.main_loop}
        return tuple(instruction for instruction in self.instructions if instruction.address not in inside)

    @property
    def uses_warp_groups(self) -> bool:
        return count(self.instructions, "HGMMA") > 0

    @property
    def programs_per_sm(self) -> int:
        """How many programs (CTAs) share an SM: what registers, shared memory and warps leave room for."""
        gpu = GPUS[self.arch]
        warp_registers = _round_up(self.registers * 32, 256)
        warps_by_registers = 65_536 // warp_registers // 4 * 4
        by_shared = gpu.shared_bytes // (_round_up(self.shared_bytes, 128) + 1024)  # 1 KiB is the system's
        return min(warps_by_registers // self.warps, by_shared, gpu.warps // self.warps, gpu.programs)


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


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:(@!?U?P\w+) +)?([A-Z][A-Z0-9_.]*) *([^;]*?) *;")


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions in what ``cuobjdump -sass`` prints."""
    return tuple(
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in _LINE.findall(text)
        if opcode != "NOP"
    )


def main_loop(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The innermost loop with the most tensor-core instructions; without any, the longest innermost loop."""
    loops = _loops(instructions)
    tensor = {loop: sum(i.name in ("HMMA", "HGMMA") for i in instructions[loop[0] : loop[1]]) for loop in loops}
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


@dataclass(frozen=True)
class Bounds:
    """Cycles of one SM that one program's instructions take of each resource, if they are executed once."""

    tensor: float
    issue: float
    alu: float
    fma: float
    special: float
    lsu: float
    l1: float
    l2: float

    @property
    def limit(self) -> str:
        """The resource that is busy longest."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))

    @property
    def shared(self) -> float:
        """Cycles a program adds on an SM that has other programs to run."""
        return float(getattr(self, self.limit))

    @property
    def alone(self) -> float:
        """Cycles on an SM that has no other: tensor cores wait while the next operands are made."""
        return max(self.tensor + max(self.issue, self.alu, self.lsu), self.shared)


_PIPES = {
    ("alu", 2): ["BMSK", "FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R",
                 "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VABSDIFF", "VIADD", "VIMNMX"],
    ("fma", 2): ["HADD2", "HFMA2", "HMUL2", "IDP", "IMAD"],
    ("special", 8): ["BREV", "F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC"],
    ("special", 2): ["F2FP", "F2IP", "I2FP", "I2IP"],
}  # fmt: skip
"""Who uses a pipe, and the cycles an instruction of a warp keeps it busy in its partition: 32 over results a cycle."""
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_FLOAT32 = {"FFMA", "FMUL", "FADD"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "LDL", "STL", "RED", "ATOM", "ATOMG", "ATOMS", "SHFL"}


def bounds(instructions: Iterable[Instruction], warps: int, gpu: Gpu) -> Bounds:
    """Cycles that executing `instructions` once by each of `warps` warps takes of every resource of an SM."""
    busy = dict.fromkeys((field.name for field in fields(Bounds)), 0.0)
    share = warps / 4  # warps of one partition
    for instruction in instructions:
        busy["issue"] += share
        if instruction.name in _FLOAT32:
            busy["fma"] += gpu.float32_cycles * share
        if instruction.name in _PIPE_OF:
            pipe, cycles = _PIPE_OF[instruction.name]
            busy[pipe] += cycles * share
        busy["tensor"] += instruction.tensor_flop / gpu.partition_flops * share
        if instruction.name in _MEMORY and not instruction.never_executed:
            bytes_moved = 32 * instruction.bits // 8 * warps
            busy["lsu"] += 4 * share
            busy["l1"] += max(bytes_moved / 128, warps)
            if "BYPASS" in instruction.opcode:
                busy["l2"] += bytes_moved / (gpu.l2_bandwidth / gpu.sms / gpu.clock)
    return Bounds(**busy)


@dataclass(frozen=True)
class Estimate:
    """What the model says about one launch."""

    seconds: float
    limit: str
    """What it waits for: a field of `Bounds`, or dram."""


def predict(code: KernelCode, programs: int, steps: int, dram_bytes: int) -> Estimate | None:
    """How long one launch takes by the model above; None where it has no say (warp-group instructions).

    Args:
        code: the kernel.
        programs: how many of them are launched.
        steps: how often one runs through its main loop.
        dram_bytes: what the launch reads and writes.
    """
    if code.uses_warp_groups:
        return None
    gpu = GPUS[code.arch]
    loop, rest = (bounds(part, code.warps, gpu) for part in (code.main_loop, code.outside))

    def cycles(together: int) -> float:
        step = loop.shared if together > 1 else loop.alone
        return together * (step * steps + rest.shared) + FILL_AND_DRAIN if together else 0.0

    groups, last = divmod(-(-programs // gpu.sms), code.programs_per_sm)
    on_sms = (groups * cycles(code.programs_per_sm) + cycles(last)) / gpu.clock
    through_dram = dram_bytes / gpu.dram_bandwidth
    limit = "dram" if through_dram > on_sms else loop.limit if code.main_loop else rest.limit
    return Estimate(max(on_sms, through_dram), limit)
