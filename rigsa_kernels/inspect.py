"""Compile every Triton kernel with no GPU and print what its machine code says.

    python -m rigsa_kernels.inspect [--arch 89 ...] [--kernel NAME ...] [--json FILE]

A `Case` calls a real launcher on tensors without data, so that what is compiled is what would be launched. Times are
predictions of the model in `rigsa_kernels.sass`, and stand beside those of a plain matrix product in the same tile
through the same model. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RuntimeError(f"triton: needed to compile kernels and not installed ({error}); pip install triton") from error

from rigsa_kernels import triton_adamw, triton_grad, triton_linear, triton_select
from rigsa_kernels.offline import Launch, capturing
from rigsa_kernels.sass import GPUS, Estimate, KernelCode, bounds, histogram, predict, read, widths
from rigsa_kernels.triton_common import clamped, grouped_program


class Shape(NamedTuple):
    """A layer: `m` rows go through a weight ``[n, k]``."""

    m: int
    n: int
    k: int


WEIGHTS = ((2048, 2048), (8192, 2048), (2048, 8192))
"""``[n, k]`` of the linear layers of SmolLM2-1.7B."""

ROWS = 860
"""Tokens of a training step."""

DENSITY = 0.035
"""Of packed patterns."""


@dataclass(frozen=True)
class Product:
    """The matrix product inside a launch: ``out [rows, columns]`` over `size` terms each, in the launch's own tile."""

    form: str
    """``x @ W.T``, ``dy @ W`` or ``dy.T @ x``."""
    rows: int
    columns: int
    size: int
    block_rows: int
    block_columns: int
    block_size: int

    @property
    def steps(self) -> int:
        """Iterations of one program's main loop."""
        return -(-self.size // self.block_size)

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.columns * self.size


@dataclass(frozen=True)
class Work:
    """What one launch has to do."""

    dram_bytes: int
    """What it reads and writes, each once."""
    steps: int = 0
    """Iterations of one program's main loop."""
    product: Product | None = None


@dataclass(frozen=True)
class Case:
    """One operation in one variant."""

    kernel: str
    variant: str
    dtype: torch.dtype
    launch: Callable[[Shape], None]
    """Calls the launcher on tensors without data."""
    work: Callable[[Launch, Shape], Work]
    """Says what one of its launches has to do."""
    rows: int = ROWS


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def arguments_bytes(launch: Launch) -> int:
    """Size of the tensors that a launch was given."""
    return num_bytes(*{id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}.values())


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


def _linear_work(launch: Launch, shape: Shape) -> Work:
    given = launch.arguments
    form, columns, size = ("dy @ W", shape.k, shape.n) if given["DX"] else ("x @ W.T", shape.n, shape.k)
    product = Product(form, shape.m, columns, size, given["BLOCK_M"], given["BLOCK_O"], given["BLOCK_C"])
    return Work(arguments_bytes(launch), product.steps, product)


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
                launch = partial(_linear, dtype=dtype, values_dtype=values_dtype, dx=dx, packed=packed, nf4=nf4)
                yield Case(kernel, variant, dtype, launch, _linear_work, rows)


# Gradient at the pattern


def _grad(shape: Shape, dtype: torch.dtype, *, packed: bool, add: bool) -> None:
    dy, x = empty(shape.m, shape.n, dtype=dtype), empty(shape.m, shape.k, dtype=dtype)
    values, pattern = stored_values(shape, dtype, packed=packed), packed_pattern(shape) if packed else []
    alpha = empty(1, dtype=torch.float32)
    if add:
        sums = torch.empty_like(values), torch.empty_like(alpha)
        triton_grad.linear_dvalues_(dy, x, values, alpha, pattern, *sums)
    else:
        triton_grad.linear_dvalues(dy, x, values, alpha, pattern)


def _grad_work(launch: Launch, shape: Shape) -> Work:
    given = launch.arguments
    blocks = given["BLOCK_N"], given["BLOCK_K"], given["BLOCK_M"]
    product = Product("dy.T @ x", shape.n, shape.k, shape.m, *blocks)
    read_first = num_bytes(given["dvalues_ptr"]) if given["ADD"] else 0
    return Work(arguments_bytes(launch) + read_first, product.steps, product)


def _grad_cases() -> Iterator[Case]:
    kinds = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False), (torch.float32, False)]
    for dtype, add in kinds:
        for packed in (False, True):
            variant = f"{'packed' if packed else 'dense'}{' add' if add else ''}"
            launch = partial(_grad, dtype=dtype, packed=packed, add=add)
            yield Case("linear_dvalues", variant, dtype, launch, _grad_work)


# Optimiser: its launches find their tensors through addresses in a table


class _AdamW(NamedTuple):
    dtype: torch.dtype
    moments: tuple[torch.dtype, torch.dtype]
    packed: bool
    compose: bool

    def tensors(self, shape: Shape) -> dict[str, Tensor]:
        """Of one layer, by the names of the launcher's arguments."""
        values = stored_values(shape, self.dtype, packed=self.packed)
        exp_avg, exp_avg_sq = (torch.empty_like(values, dtype=dtype) for dtype in self.moments)
        named = {"params": values, "grads": values, "exp_avgs": exp_avg, "exp_avg_sqs": exp_avg_sq}
        if self.moments[0] == torch.int8:
            named["scales"] = empty(2, -(-values.numel() // 256), dtype=torch.float32)
        if self.compose:
            named["composed"] = empty(shape.n, shape.k, dtype=self.dtype)
            named["base_values"] = values
            named["alphas"] = empty(1, dtype=torch.float32)
        return named

    def launch(self, shape: Shape) -> None:
        lists = {name: [tensor] for name, tensor in self.tensors(shape).items()}
        options: dict[str, Any] = {"scales": [], "numbers": [0], "step": 1, "seed": 0}
        options |= {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        if self.compose:
            pattern = packed_pattern(shape) if self.packed else []
            triton_adamw.adamw_compose_(**(options | lists), patterns=pattern)
        else:
            triton_adamw.adamw_(**(options | lists))

    def work(self, launch: Launch, shape: Shape) -> Work:
        named = self.tensors(shape)
        composed = [named[name] for name in ("base_values", "composed") if name in named]
        state = [named[name] for name in ("params", "exp_avgs", "exp_avg_sqs", "scales") if name in named]
        update = num_bytes(named["grads"], *state, *state)
        if launch.name == "adamw_flat_kernel":
            return Work(update + (num_bytes(*composed) if launch.arguments["WEIGHT"] is not None else 0))
        sectors = min(32 * named["params"].numel(), num_bytes(named["composed"]))  # a free entry writes 32 bytes
        compose = num_bytes(named["base_values"], *packed_pattern(shape)) + sectors
        steps = -(-shape.k // (32 * launch.arguments["WORDS"]))
        return Work(compose + (update if launch.arguments["UPDATE"] else num_bytes(named["params"])), steps)


def _adamw_cases() -> Iterator[Case]:
    same = [("", dtype, (dtype, dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for moments, dtype, dtypes in (*same, ("8-bit ", torch.bfloat16, (torch.int8, torch.uint8))):
        for packed in (False, True):
            variant = f"{moments}{'packed' if packed else 'dense'}"
            for kernel, compose in (("adamw", False), ("adamw_compose", True)):
                kind = _AdamW(dtype, dtypes, packed, compose)
                yield Case(kernel, variant, dtype, kind.launch, kind.work)


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


def _select_work(launch: Launch, shape: Shape) -> Work:
    tiles = -(-shape.n // triton_select.ROWS) * -(-shape.k // (32 * triton_select.WORDS))
    return Work(arguments_bytes(launch), -(-tiles // launch.grid[0]))


def _select_cases() -> Iterator[Case]:
    ranked = [(kernel, by) for kernel in ("digit_counts", "keep_largest") for by in ("magnitude", "score", "random")]
    for kernel, by in (("initial_values", ""), ("same_sign", ""), *ranked):
        for packed in (False, True):
            variant = f"{'packed' if packed else 'dense'} {by}".rstrip()
            launch = partial(_select, dtype=torch.bfloat16, kernel=kernel, by=by, packed=packed)
            yield Case(kernel, variant, torch.bfloat16, launch, _select_work)


CASES: tuple[Case, ...] = (*_linear_cases(), *_grad_cases(), *_adamw_cases(), *_select_cases())


# The yardstick


@triton.jit
def plain_kernel(a_ptr, b_ptr, out_ptr, rows, columns, size, stride_ar, stride_as, stride_bs,  # type: ignore[no-untyped-def]
                 stride_bc, even: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr, block_s: tl.constexpr,
                 group: tl.constexpr):  # fmt: skip
    """``a [rows, size] @ b [size, columns]``, the yardstick: the product that the other kernels have inside."""
    pid_r, pid_c = grouped_program(tl.cdiv(rows, block_r), tl.cdiv(columns, block_c), group)
    start_r, start_c = pid_r * block_r, pid_c * block_c
    rel_s = tl.arange(0, block_s)
    a_at = clamped(rows - start_r, block_r)[:, None] * stride_ar + rel_s[None, :] * stride_as
    b_at = rel_s[:, None] * stride_bs + clamped(columns - start_c, block_c)[None, :] * stride_bc
    a_ptr += start_r.to(tl.int64) * stride_ar
    b_ptr += start_c.to(tl.int64) * stride_bc
    acc = tl.zeros((block_r, block_c), tl.float32)
    for start in range(0, size, block_s):
        ok = (rel_s < size - start) | even
        a = tl.load(a_ptr + start * stride_as + a_at, mask=ok[None, :], other=0.0)
        b = tl.load(b_ptr + start * stride_bs + b_at, mask=ok[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    offs_r, offs_c = start_r + tl.arange(0, block_r), start_c + tl.arange(0, block_c)
    out = out_ptr + offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :])


def launch_plain(product: Product, a: Tensor, b: Tensor, out: Tensor, *, num_warps: int, num_stages: int) -> None:
    """`a` and `b` as they lie in memory: x and W, dy and W, or dy and x."""
    rows, columns, size = product.rows, product.columns, product.size
    strides = {"x @ W.T": (size, 1, 1, size), "dy @ W": (size, 1, columns, 1), "dy.T @ x": (1, rows, columns, 1)}
    grid = (triton.cdiv(rows, product.block_rows) * triton.cdiv(columns, product.block_columns),)
    plain_kernel[grid](
        a, b, out, rows, columns, size, *strides[product.form],
        even=size % product.block_size == 0,
        block_r=product.block_rows, block_c=product.block_columns, block_s=product.block_size, group=8,
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def compile_plain(product: Product, dtype: torch.dtype, arch: int, num_warps: int, num_stages: int) -> Launch:
    """The yardstick on `arch`."""
    sizes = product.rows * product.size, product.size * product.columns, product.rows * product.columns
    a, b, out = (empty(size, dtype=dtype) for size in sizes)
    with capturing(arch) as launches:
        launch_plain(product, a, b, out, num_warps=num_warps, num_stages=num_stages)
    return launches[0]


@dataclass(frozen=True)
class Prediction:
    """One launch through the model of `rigsa_kernels.sass`; composed, where a layer has two ways."""

    shape: Shape
    estimate: Estimate | None
    """None where the model has no say."""
    plain: Estimate | None = None
    """Of the product alone."""
    of_peak: float | None = None
    """Share of the tensor cores' peak that the product reaches."""

    @property
    def ratio(self) -> float | None:
        """Speed beside the plain product's: 1 is as fast."""
        return self.plain.seconds / self.estimate.seconds if self.plain and self.estimate else None


@dataclass(frozen=True)
class Inspection:
    """One kernel that a case launches, on one architecture."""

    case: Case
    name: str
    """The case's, or the kernel's own where a case launches several."""
    code: KernelCode
    predictions: tuple[Prediction, ...]


def compile_case(case: Case, arch: int, weight: tuple[int, int] = WEIGHTS[0]) -> list[Launch]:
    """What `case` would launch on `arch` for a weight ``[n, k]``."""
    with capturing(arch) as launches:
        case.launch(Shape(case.rows, *weight))
    return launches


def inspect_case(case: Case, arch: int, weights: Sequence[tuple[int, int]] = WEIGHTS) -> list[Inspection]:
    """Compile `case` for `arch`, read its kernels, and predict a launch of each for each of `weights`."""
    inspections = []
    by_weight = [compile_case(case, arch, weight) for weight in weights]
    for launches in zip(*by_weight, strict=True):
        name = case.kernel if len(by_weight[0]) == 1 else launches[0].name.removesuffix("_kernel")
        predictions = [
            _predict(case, arch, Shape(case.rows, *weight), launch)
            for weight, launch in zip(weights, launches, strict=True)
        ]
        inspections.append(Inspection(case, name, read(launches[0].compiled), tuple(predictions)))
    return inspections


def _predict(case: Case, arch: int, shape: Shape, launch: Launch) -> Prediction:
    work = case.work(launch, shape)
    estimate = _estimate(launch, work)
    if estimate is None or work.product is None:
        return Prediction(shape, estimate)
    on_tensor_cores = case.dtype != torch.float32
    of_peak = work.product.flop / estimate.seconds / GPUS[arch].tensor_flops if on_tensor_cores else None
    return Prediction(shape, estimate, _plain_estimate(launch, work.product, case.dtype, arch), of_peak)


def _plain_estimate(like: Launch, product: Product, dtype: torch.dtype, arch: int) -> Estimate | None:
    """The same product with a launch's tile, warps and pipeline stages."""
    plain = compile_plain(product, dtype, arch, like.arguments["num_warps"], like.arguments["num_stages"])
    return _estimate(plain, Work(arguments_bytes(plain), product.steps))


def _estimate(launch: Launch, work: Work) -> Estimate | None:
    return predict(read(launch.compiled), math.prod(launch.grid), work.steps, work.dram_bytes)


def as_row(inspection: Inspection) -> dict[str, Any]:
    """An inspection as JSON."""
    case, code = inspection.case, inspection.code
    cycles = bounds(code.main_loop, code.warps, GPUS[code.arch])
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
        "main_loop": dict(histogram(code.main_loop)),
        "copies": dict(widths(code.main_loop, "LDGSTS")),
        "loads": dict(widths(code.main_loop, "LDG")),
        "main_loop_cycles": None if code.uses_warp_groups else asdict(cycles),
        "predictions": [_as_dict(prediction) for prediction in inspection.predictions],
    }


def _as_dict(prediction: Prediction) -> dict[str, Any]:
    estimate = prediction.estimate
    return {
        **prediction.shape._asdict(),
        "microseconds": estimate and estimate.seconds * 1e6,
        "limit": estimate and estimate.limit,
        "of_peak": prediction.of_peak,
        "ratio_to_plain": prediction.ratio,
    }


NOTE = (
    "Predicted from the machine code by a static model; nothing was run on a GPU. "
    "An upper bound on speed: rigsa_kernels/sass.py describes it."
)
LEGEND = f"""\
{NOTE}
spill: bytes of stack; smem: KiB of shared memory; CTAs: programs that share an SM; tensor: tensor-core instructions of
all in the main loop; copy, load: asynchronous copies and plain loads in it, number x bits; limit: what it waits for, by
the model; us, peak, plain: microseconds, share of tensor peak, speed beside a plain product in the same tile. D32: the
values of D are float32 beside a 16-bit weight; m: rows, 860 unless said otherwise.
"""
_HEADER = ("kernel", "variant", "type", "sm", "regs", "spill", "smem", "CTAs", "tensor", "copy", "load", "limit")
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `as_row` in aligned columns, three for each shape."""
    shapes = [f"{p['n']}x{p['k']}" for p in rows[0]["predictions"]]
    header = [*_HEADER, *("us", "peak", "plain") * len(shapes)]
    columns = [_aligned(column) for column in zip(header, *map(_cells, rows), strict=True)]
    titles = ""
    for number, shape in enumerate(shapes):
        before = sum(len(column[0]) + 1 for column in columns[: len(_HEADER) + 3 * number])
        titles = titles.ljust(before) + shape
    return "\n".join([titles, *(" ".join(line).rstrip() for line in zip(*columns, strict=True))])


def _aligned(column: Sequence[str]) -> list[str]:
    """Words to the left, numbers to the right; the header comes first."""
    size = max(map(len, column))
    words = column[0] in ("kernel", "variant", "type", "limit")
    return [cell.ljust(size) if words else cell.rjust(size) for cell in column]


def _cells(row: dict[str, Any]) -> list[str]:
    loop = row["main_loop"]
    tensor = loop.get("HMMA", 0) + loop.get("HGMMA", 0)
    cells = [row["kernel"], row["variant"], _SHORT[row["dtype"]]]
    cells += [str(row[name]) for name in ("arch", "registers", "stack_bytes")]
    cells += [_number(row["shared_bytes"] / 1024, 1), str(row["programs_per_sm"])]
    cells += [f"{tensor}/{sum(loop.values())}", _counts(row["copies"]), _counts(row["loads"])]
    cells.append(row["predictions"][0]["limit"] or "-")
    for prediction in row["predictions"]:
        cells += [_number(prediction[name], digits) for name, digits in _PREDICTED]
    return cells


def _counts(counts: dict[int, int]) -> str:
    return "+".join(f"{number}x{bits}" for bits, number in sorted(counts.items(), reverse=True)) or "-"


_PREDICTED = (("microseconds", 1), ("of_peak", 2), ("ratio_to_plain", 2))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write_json(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Whole or not at all: under a temporary name first."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps({"note": NOTE, "triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    unfinished.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rigsa_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(GPUS), default=sorted(GPUS), help="default: all")
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: expected a file in a folder that exists, got {options.json}")
    inspections = [
        inspection
        for case in CASES
        if case.kernel in options.kernel
        for arch in options.arch
        for inspection in inspect_case(case, arch)
    ]
    rows = [as_row(inspection) for inspection in inspections]
    print(LEGEND)
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
