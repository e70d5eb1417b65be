"""Small shapes through every kernel, for compute-sanitizer: ``python -m benchmarks.gpu_proof.small_kernels WHAT``.

Tiles that are full and not, aligned and not; no result is checked here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import nn

from benchmarks.gpu_proof.correct import ALPHA, launch, unaligned
from benchmarks.gpu_proof.from_tests import load
from rigsa_kernels import MaskedAdamW, SparsePattern
from rigsa_kernels.init import initial_values
from rigsa_kernels.select import drawn, ranked, same_sign, top_k

DENSITIES = ("dense", "packed", "rows", "columns", "32", "5x3")


def products(device: str) -> None:
    oracle = load("oracle")
    for size, density in product(((150, 70, 96), (64, 128, 128), (17, 48, 80), (1, 64, 64)), DENSITIES):
        x, weight, *others = oracle.make_inputs(*size, density, ALPHA, torch.bfloat16, device=device)
        bases = [weight, *([oracle.quantize_nf4(weight)] if size[2] % 64 == 0 else [])]
        for base, exact in product(bases, (False, True)):
            launch(x, base, *others, exact)


def selection(device: str) -> None:
    stream = {"seed": 1, "key": 2}
    for shape, share in product(((50, 100), (48, 96)), (1.0, 0.3)):
        pattern = SparsePattern.dense(*shape)
        if share < 1:
            pattern = SparsePattern.from_mask(torch.rand(shape) < share)
        pattern = pattern.to(device)
        values = initial_values(pattern, 0.1, device=device, **stream)
        same_sign(values, pattern, bound=0.1, **stream)
        top_k({"a": ranked(values, pattern, by="magnitude")}, pattern.nnz // 2)
        top_k({"a": drawn(shape, device=device, **stream)}, 99)


def adamw(device: str) -> None:
    for moments, dtype in product(("float32", "bfloat16", "int8"), (torch.float32, torch.bfloat16)):
        tensors = [torch.randn(size, device=device).to(dtype) for size in (5, 4096, 5000)]
        tensors.append(unaligned(torch.randn(5000, device=device).to(dtype)))
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        MaskedAdamW([{"params": parameters}], state_dtype=moments).step()  # type: ignore[arg-type]


KINDS: dict[str, Callable[[str], None]] = {"products": products, "selection": selection, "adamw": adamw}

if __name__ == "__main__":
    KINDS[sys.argv[1]]("cuda")
    torch.cuda.synchronize()
    print("done")
