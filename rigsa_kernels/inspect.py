"""Compile every Triton kernel with no GPU, print what its machine code says, and hold it to bars.

    python -m rigsa_kernels.inspect [--arch 89 ...] [--kernel NAME ...] [--json FILE] [--check]

A `Case` calls a real launcher on tensors without data, so that what is compiled is what would be launched. Nothing is
run.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ImportError as error:
    raise RuntimeError(f"triton: needed to compile kernels and not installed ({error}); pip install triton") from error

from . import (
    triton_adamw,
    triton_add,
    triton_free_entries,
    triton_gather,
    triton_grad,
    triton_linear,
    triton_select,
    triton_tiles,
)
from .offline import Launch, capturing
from .sass import MULTIPROCESSORS, KernelCode, count, histogram, opcodes, read, tensor_instructions, widths
from .tiles import grid_shape


class Shape(NamedTuple):
    """A layer: `m` rows go through a weight ``[n, k]``."""

    m: int
    n: int
    k: int


ROWS = 860
"""Tokens of a training step."""

DENSITY = 0.035
"""Of packed patterns."""

ARCHITECTURES = tuple(sorted(MULTIPROCESSORS))


@dataclass(frozen=True)
class Product:
    """The tile of the matrix product inside a launch: ``[rows, columns]``, over `size` terms a step."""

    rows: int
    columns: int
    size: int
    copied: tuple[tuple[int, int], ...]
    """(rows or columns, bytes an entry) of the operands that lie in memory as a matrix: what is copied each step."""


@dataclass(frozen=True)
class Case:
    """One operation in one variant."""

    kernel: str
    variant: str
    dtype: torch.dtype
    launch: Callable[[Shape], None]
    """Calls the launcher on tensors without data."""
    product: Callable[[Launch], Product | None] = lambda launch: None
    """The product inside one of its launches, where there is one."""
    rows: int = ROWS


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def packed_pattern(shape: Shape) -> list[Tensor]:
    """``[words, word_offsets, row_base]`` of a packed pattern (`rigsa_kernels.format`)."""
    num_words = -(-shape.k // 32)
    sizes = (((num_words, shape.n), torch.int32), ((num_words, shape.n), torch.int16), ((shape.n,), torch.int32))
    return [empty(*size, dtype=dtype) for size, dtype in sizes]


def stored_values(shape: Shape, dtype: torch.dtype, *, packed: bool) -> Tensor:
    """The values of a pattern: free ones only where it is packed, else a matrix."""
    size = (round(DENSITY * shape.n * shape.k),) if packed else (shape.n, shape.k)
    return empty(*size, dtype=dtype)


def nf4_base(shape: Shape) -> list[Tensor]:
    """``[codes, absmax, levels]`` of an NF4 weight (`rigsa_kernels.nf4`)."""
    entries = shape.n * shape.k
    sizes = ((entries // 2, torch.uint8), (entries // 64, torch.float32), (16, torch.float32))
    return [empty(size, dtype=dtype) for size, dtype in sizes]


# Forward and input gradient


def _linear(shape: Shape, dtype: torch.dtype, values_dtype: torch.dtype, *, dx: bool, packed: bool, nf4: bool) -> None:
    base = nf4_base(shape) if nf4 else [empty(shape.n, shape.k, dtype=dtype)]
    values, pattern = stored_values(shape, values_dtype, packed=packed), packed_pattern(shape) if packed else []
    alpha, exact = empty(1, dtype=torch.float32), empty(1, dtype=torch.bool)
    if dx:
        triton_linear.linear_dx(empty(shape.m, shape.n, dtype=dtype), base, values, alpha, pattern, exact)
    else:
        triton_linear.linear_fwd(empty(shape.m, shape.k, dtype=dtype), base, None, values, alpha, pattern, exact)


def _linear_product(
    launch: Launch, *, dtype: torch.dtype, values_dtype: torch.dtype, packed: bool, nf4: bool
) -> Product:
    rows, columns, size = (launch.arguments[f"BLOCK_{axis}"] for axis in "MOC")
    copied = [(rows, dtype.itemsize)]
    if not nf4:
        copied.append((columns, dtype.itemsize))
    if not packed:
        copied.append((columns, values_dtype.itemsize))
    return Product(rows, columns, size, tuple(copied))


def _linear_cases() -> Iterator[Case]:
    """Every dtype and form of the weight in training, values in float32 too, and the tiles for fewer tokens."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    kinds = [(bf16, bf16, False, ROWS), (bf16, bf16, True, ROWS), (bf16, fp32, False, ROWS), (bf16, fp32, True, ROWS)]
    kinds += [(fp16, fp16, False, ROWS), (fp32, fp32, False, ROWS)]
    kinds += [(bf16, bf16, False, 64), (bf16, bf16, False, 16), (bf16, bf16, True, 16)]
    for kernel, dx in (("linear_fwd", False), ("linear_dx", True)):
        for dtype, values_dtype, nf4, rows in kinds:
            for packed in (False, True):
                variant = f"{'nf4 ' if nf4 else ''}{'packed' if packed else 'dense'}"
                variant += "" if values_dtype == dtype else " D32"
                variant += "" if rows == ROWS else f" m={rows}"
                kind: dict[str, Any] = {"dtype": dtype, "values_dtype": values_dtype, "packed": packed, "nf4": nf4}
                launch, product = partial(_linear, dx=dx, **kind), partial(_linear_product, **kind)
                yield Case(kernel, variant, dtype, launch, product, rows)


# Gradient at the pattern


def _grad(shape: Shape, dtype: torch.dtype, *, packed: bool) -> None:
    dy, x = empty(shape.m, shape.n, dtype=dtype), empty(shape.m, shape.k, dtype=dtype)
    values, pattern = stored_values(shape, dtype, packed=packed), packed_pattern(shape) if packed else []
    triton_grad.linear_dvalues(dy, x, values, empty(1, dtype=torch.float32), pattern)


def _grad_product(launch: Launch, *, dtype: torch.dtype) -> Product:
    rows, columns, size = (launch.arguments[f"BLOCK_{axis}"] for axis in "NKM")
    return Product(rows, columns, size, ((rows, dtype.itemsize), (columns, dtype.itemsize)))


def _grad_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for packed in (False, True):
            launch = partial(_grad, dtype=dtype, packed=packed)
            variant = "packed" if packed else "dense"
            yield Case("linear_dvalues", variant, dtype, launch, partial(_grad_product, dtype=dtype))


def tile_pattern(shape: Shape, tile: tuple[int, int]) -> list[Tensor]:
    """``[tiles, places, size]`` of a pattern of `DENSITY` (`rigsa_kernels.tiles`)."""
    rows, columns = grid_shape((shape.n, shape.k), tile)
    tiles = round(DENSITY * rows * columns)
    return [empty(tiles, dtype=torch.int32), empty(2, tiles, dtype=torch.int32), empty(0, *tile, dtype=torch.int8)]


def _tiles(shape: Shape, dtype: torch.dtype, *, tile: tuple[int, int]) -> None:
    dy, x = empty(shape.m, shape.n, dtype=dtype), empty(shape.m, shape.k, dtype=dtype)
    pattern = tile_pattern(shape, tile)
    values = empty(pattern[0].numel() * tile[0] * tile[1], dtype=dtype)
    triton_tiles.tile_grad(dy, x, values, empty(1, dtype=torch.float32), pattern)


def _tile_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for side in (16, 32, 64, 128):
            launch = partial(_tiles, dtype=dtype, tile=(side, side))
            yield Case("tile_grad", f"{side}x{side}", dtype, launch, partial(_grad_product, dtype=dtype))


def _gather(shape: Shape, dtype: torch.dtype, *, packed: bool) -> None:
    values, pattern = stored_values(shape, dtype, packed=packed), packed_pattern(shape) if packed else []
    whole = empty(shape.n, shape.k, dtype=dtype)
    triton_gather.gather_grad(whole, values, empty(1, dtype=torch.float32), pattern)


def _gather_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for packed in (False, True):
            variant = "packed" if packed else "dense"
            yield Case("gather_grad", variant, dtype, partial(_gather, dtype=dtype, packed=packed))


# Composing: by a sum of two outputs, or in the weight itself


def _add_scaled(shape: Shape) -> None:
    base, term = (empty(shape.m, shape.n, dtype=torch.bfloat16) for _ in range(2))
    triton_add.add_scaled(base, term, empty(1, dtype=torch.float32))


def _free_entries(shape: Shape, dtype: torch.dtype, *, task: str, tile: tuple[int, int] | None = None) -> None:
    matrices = [empty(shape.n, shape.k, dtype=dtype)]
    patterns = packed_pattern(shape) if tile is None else tile_pattern(shape, tile)
    packed = [stored_values(shape, dtype, packed=True)]
    if task == "gather":
        triton_free_entries.gather_free_(packed, matrices, patterns)
    elif task == "scatter":
        triton_free_entries.scatter_free_(matrices, packed, patterns)
    else:
        values = [stored_values(shape, torch.float32, packed=True)]
        triton_free_entries.compose_free_(matrices, packed, values, [empty(1, dtype=torch.float32)], patterns)


def _composing_cases() -> Iterator[Case]:
    yield Case("add_scaled", "", torch.bfloat16, _add_scaled)
    for dtype in (torch.bfloat16, torch.float32):
        for task in ("gather", "scatter", "compose"):
            yield Case("free_entries", task, dtype, partial(_free_entries, dtype=dtype, task=task))
    for name, tile in (("32", (32, 32)), ("rows", (1, 2048)), ("columns", (2048, 1))):
        launch = partial(_free_entries, dtype=torch.bfloat16, task="compose", tile=tile)
        yield Case("free_entries", f"compose {name}", torch.bfloat16, launch)


# Optimiser: its launches find their tensors through addresses in a table


def _adamw(shape: Shape, dtype: torch.dtype, *, moments: tuple[torch.dtype, torch.dtype], packed: bool) -> None:
    values = stored_values(shape, dtype, packed=packed)
    exp_avg, exp_avg_sq = (torch.empty_like(values, dtype=moment) for moment in moments)
    scales = [empty(2, -(-values.numel() // 256), dtype=torch.float32)] if moments[0] == torch.int8 else []
    options: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    triton_adamw.adamw_([values], [values], [exp_avg], [exp_avg_sq], scales, [0], **options, step=1, seed=0)


def _adamw_cases() -> Iterator[Case]:
    same = [("", dtype, (dtype, dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for name, dtype, moments in (*same, ("8-bit ", torch.bfloat16, (torch.int8, torch.uint8))):
        for packed in (False, True):
            variant = f"{name}{'packed' if packed else 'dense'}"
            yield Case("adamw", variant, dtype, partial(_adamw, dtype=dtype, moments=moments, packed=packed))


# Initial values and selection


def _select(shape: Shape, dtype: torch.dtype, *, kernel: str, by: str, packed: bool) -> None:
    values, pattern = stored_values(shape, dtype, packed=packed), packed_pattern(shape) if packed else []
    ranked = None if by == "random" else values
    candidates = empty(-(-shape.k // 32), shape.n, dtype=torch.int32)
    stream: dict[str, Any] = {"seed": 0, "key": 1}
    if kernel == "initial_values":
        triton_select.initial_values_(values, pattern, shape.k, bound=0.1, start=0, **stream)
    elif kernel == "same_sign":
        triton_select.same_sign(values, pattern, [shape.n, shape.k], bound=0.1, **stream)
    elif kernel == "digit_counts":
        triton_select.digit_counts(ranked, candidates, pattern, shape.k, by, **stream, prefix=0, shift=24)
    else:
        triton_select.keep_largest(ranked, candidates, pattern, shape.k, by, **stream, threshold=5, take=7)


def _select_cases() -> Iterator[Case]:
    ranked = [(kernel, by) for kernel in ("digit_counts", "keep_largest") for by in ("magnitude", "score", "random")]
    for kernel, by in (("initial_values", ""), ("same_sign", ""), *ranked):
        for packed in (False, True):
            variant = f"{'packed' if packed else 'dense'} {by}".rstrip()
            launch = partial(_select, dtype=torch.bfloat16, kernel=kernel, by=by, packed=packed)
            yield Case(kernel, variant, torch.bfloat16, launch)


CASES: tuple[Case, ...] = (
    *_linear_cases(),
    *_grad_cases(),
    *_tile_cases(),
    *_gather_cases(),
    *_composing_cases(),
    *_adamw_cases(),
    *_select_cases(),
)


@dataclass(frozen=True)
class Inspection:
    """One kernel that a case launches, on one architecture."""

    case: Case
    name: str
    """The case's, or the kernel's own where a case launches several."""
    code: KernelCode
    product: Product | None


def compile_case(case: Case, arch: int, weight: tuple[int, int] = (2048, 2048)) -> list[Launch]:
    """What `case` would launch on `arch` for a weight ``[n, k]``."""
    with capturing(arch) as launches:
        case.launch(Shape(case.rows, *weight))
    return launches


def inspect_case(case: Case, arch: int) -> list[Inspection]:
    """Compile `case` for `arch` and read its kernels."""
    launches = compile_case(case, arch)
    names = [case.kernel] if len(launches) == 1 else [launch.name.removesuffix("_kernel") for launch in launches]
    return [
        Inspection(case, name, read(launch.compiled), case.product(launch))
        for name, launch in zip(names, launches, strict=True)
    ]


# The bars


def breaches(inspection: Inspection) -> list[str]:
    """The bars that a kernel misses, each in words; none where it is as it should be."""
    found = [*_resource_breaches(inspection.code), *_copy_breaches(inspection), *_tensor_breaches(inspection)]
    packed = inspection.product is not None and "packed" in inspection.case.variant
    if packed and not count(inspection.code.instructions, "POPC"):
        found.append("bits are counted without POPC")
    return found


def _resource_breaches(code: KernelCode) -> Iterator[str]:
    if code.spills:
        moved = f"{code.local_loads} loads and {code.local_stores} stores of local memory"
        yield f"spills: {code.stack_bytes} bytes of stack, {moved}"
    limit = MULTIPROCESSORS[code.arch].shared_bytes_per_program
    if code.shared_bytes > limit:
        yield f"shared memory: {code.shared_bytes} bytes, at most {limit} are there"
    elif code.programs_per_sm < 2:
        yield f"{code.programs_per_sm} program on a multiprocessor, expected two at least"


def _copy_breaches(inspection: Inspection) -> Iterator[str]:
    """Operands that lie in memory as matrices are copied asynchronously, and as wide as the tile allows."""
    loop, product = inspection.code.main_loop, inspection.product
    if product is None:
        return
    want: Counter[int] = Counter()
    for entries, size in product.copied:
        bits = entries * product.size * size * 8 // (32 * inspection.code.warps)  # of one lane
        want[min(bits, 128)] += max(bits // 128, 1)
    got = widths(loop, "LDGSTS")
    if got[128] != want[128] or not got >= want:
        yield f"asynchronous copies: {_counts(got)}, expected {_counts(want)}"
    if len(product.copied) == _NUM_OPERANDS[inspection.case.kernel] and count(loop, "LDG"):
        yield f"plain loads of matrices: {_counts(widths(loop, 'LDG'))}"


_NUM_OPERANDS = {"linear_fwd": 3, "linear_dx": 3, "linear_dvalues": 2, "tile_grad": 2}


def _tensor_breaches(inspection: Inspection) -> Iterator[str]:
    """Tensor cores do what the product needs and no more; counted where an instruction is a warp's m16n8k16."""
    code, product = inspection.code, inspection.product
    if product is None or inspection.case.dtype == torch.float32 or code.arch not in _WARP_PRODUCTS:
        return
    want = product.rows * product.columns * product.size // (16 * 8 * 16) // code.warps
    got = opcodes(code.main_loop, "HMMA")
    if got.total() != want or not all(opcode.startswith("HMMA.16816.F32") for opcode in got):
        yield f"tensor-core instructions: {dict(got)}, expected {want} of HMMA.16816.F32"


_WARP_PRODUCTS = (80, 89, 120)


# The table


def as_row(inspection: Inspection) -> dict[str, Any]:
    """An inspection as JSON."""
    case, code = inspection.case, inspection.code
    return {
        "kernel": inspection.name,
        "variant": case.variant,
        "dtype": str(case.dtype).removeprefix("torch."),
        "arch": code.arch,
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "local_loads": code.local_loads,
        "local_stores": code.local_stores,
        "shared_bytes": code.shared_bytes,
        "warps": code.warps,
        "programs_per_sm": code.programs_per_sm,
        "tensor_instructions": tensor_instructions(code.main_loop),
        "main_loop": dict(histogram(code.main_loop)),
        "copies": dict(widths(code.main_loop, "LDGSTS")),
        "loads": dict(widths(code.main_loop, "LDG")),
        "breaches": breaches(inspection),
    }


LEGEND = """\
Read from the machine code; nothing was run on a GPU.
spill: bytes of stack; smem: KiB of shared memory; CTAs: programs that share a multiprocessor; tensor: tensor-core
instructions of all in the main loop; copy, load: asynchronous copies and plain loads in it, number x bits. D32: the
values of D are float32 beside a 16-bit weight; m: rows, 860 unless said otherwise.
"""
_HEADER = ("kernel", "variant", "type", "sm", "regs", "spill", "smem", "CTAs", "tensor", "copy", "load")
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `as_row` in aligned columns."""
    columns = [_aligned(column) for column in zip(_HEADER, *map(_cells, rows), strict=True)]
    return "\n".join(" ".join(line).rstrip() for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    """Words to the left, numbers to the right; the header comes first."""
    size = max(map(len, column))
    words = column[0] in ("kernel", "variant", "type")
    return [cell.ljust(size) if words else cell.rjust(size) for cell in column]


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["kernel"], row["variant"], _SHORT[row["dtype"]]]
    cells += [str(row[name]) for name in ("arch", "registers", "stack_bytes")]
    cells += [f"{row['shared_bytes'] / 1024:.1f}", str(row["programs_per_sm"])]
    cells += [f"{row['tensor_instructions']}/{sum(row['main_loop'].values())}"]
    return [*cells, _counts(row["copies"]), _counts(row["loads"])]


def _counts(counts: Mapping[int, int]) -> str:
    return "+".join(f"{number}x{bits}" for bits, number in sorted(counts.items(), reverse=True)) or "-"


def write_json(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all: under a temporary name first."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    unfinished.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rigsa_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all"
    )
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--check", action="store_true", help="print the bars that are missed alone, and fail for one")
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: expected a file in a folder that exists, got {options.json}")
    chosen = [(case, arch) for case in CASES if case.kernel in options.kernel for arch in options.arch]
    rows = [as_row(inspection) for case, arch in chosen for inspection in inspect_case(case, arch)]
    if options.json:
        write_json(options.json, rows)
    if options.check:
        _check(rows)
    else:
        print(LEGEND)
        print(table(rows))


def _check(rows: Sequence[dict[str, Any]]) -> None:
    missed = [row for row in rows if row["breaches"]]
    for row in missed:
        name = f"{row['kernel']} {row['variant']} {row['dtype']} sm_{row['arch']}"
        print(*(f"{name}: {breach}" for breach in row["breaches"]), sep="\n")
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled, {len(missed)} miss a bar")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
