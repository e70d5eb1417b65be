"""The products beside cuBLAS on a CUDA device: ``python benchmarks/kernels_on_gpu.py [--json FILE]``.

Median milliseconds by CUDA events, with the L2 cache flushed before every call (``triton.testing.do_bench``), for the
linear layers of SmolLM2-1.7B in bfloat16. The ratio is cuBLAS's time for one plain product of the same shape over ours:
1 means that the adapter costs nothing, 0.5 is what two products can reach at best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rigsa_kernels import SparsePattern

SHAPES = [(2048, 2048), (8192, 2048), (2048, 8192)]
TOKENS = [32, 860, 4096]
DENSITIES = {"dense": None, "3.46 %": 0.0346}
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operation: str
    tokens: int
    out_features: int
    in_features: int
    density: str
    milliseconds: float
    cublas_milliseconds: float

    @property
    def ratio(self) -> float:
        return self.cublas_milliseconds / self.milliseconds


def calls(m: int, n: int, k: int, density: float | None, device: str) -> Iterator[tuple[str, Call, Call]]:
    """``(name, ours, cuBLAS's plain product)`` for each operation on one layer."""
    bf16 = {"device": device, "dtype": torch.bfloat16}
    x, dy, weight = torch.randn(m, k, **bf16), torch.randn(m, n, **bf16), torch.randn(n, k, **bf16)
    pattern = SparsePattern.dense(n, k)
    if density is not None:
        pattern = SparsePattern.from_mask(torch.rand(n, k, device=device) < density)
    values, alpha = torch.randn(pattern.values_shape, **bf16), torch.full((1,), 0.1, device=device)
    ops, tensors = torch.ops.rigsa, pattern.tensors
    for name in ("composed", "exact"):
        flag = torch.full((1,), name == "exact", device=device)
        yield (
            f"forward, {name}",
            _bind(ops.linear_fwd, x, [weight], None, values, alpha, tensors, flag),
            _product(x, weight.T),
        )
        yield f"dx, {name}", _bind(ops.linear_dx, dy, [weight], values, alpha, tensors, flag), _product(dy, weight)
    yield "gradient", _bind(ops.linear_dvalues, dy, x, values, alpha, tensors), _product(dy.T, x)


def _bind(function: Callable[..., object], *args: object) -> Call:
    return lambda: function(*args)


def _product(a: Tensor, b: Tensor) -> Call:
    return lambda: a @ b


def measure() -> Iterator[Row]:
    from triton.testing import do_bench

    for n, k in SHAPES:
        for m in TOKENS:
            for label, density in DENSITIES.items():
                for name, ours, plain in calls(m, n, k, density, "cuda"):
                    times = [do_bench(call, return_mode="median") for call in (ours, plain)]
                    yield Row(name, m, n, k, label, *times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels_on_gpu: needs a CUDA device; `python -m rigsa_kernels.inspect` predicts without one")
    rows = list(measure())
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    print("| operation | tokens | layer | density | ms | cuBLAS ms | ratio |\n|---|---:|---|---|---:|---:|---:|")
    for row in rows:
        layer = f"{row.out_features} x {row.in_features}"
        times = f"{row.milliseconds:.3f} | {row.cublas_milliseconds:.3f} | {row.ratio:.2f}"
        print(f"| {row.operation} | {row.tokens} | {layer} | {row.density} | {times} |")
    if args.json:
        device = torch.cuda.get_device_name()
        args.json.write_text(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
