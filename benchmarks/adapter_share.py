"""How much of the adapter term reaches y when alpha * D is small: ``python benchmarks/adapter_share.py``.

W0 ~ N(0, 0.02) and D ~ U(+-1/sqrt(K)), N = 256, K = 2048, 256 tokens. Products are taken in float64, so only the
rounding of the operands shows, as with a float32 accumulator. Beside the two paths of the package stand two that would
cost less than *exact*: composing in float16, and the adapter's product in float8 (e4m3, operands scaled to its range),
with activations as drawn and with one column in a hundred 50 times as large, as language models have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rigsa_kernels import reference

M, N, K = 256, 256, 2048
WEIGHT_STD = 0.02
Term = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def exact(dtype: torch.dtype) -> Term:
    """The adapter's own product."""
    return lambda x, weight, delta, alpha: alpha * (x @ reference.delta_matrix(delta, (N, K), [], dtype).double().T)


def composed(dtype: torch.dtype) -> Term:
    """What the rounded sum adds to the rounded weight."""

    def term(x: Tensor, weight: Tensor, delta: Tensor, alpha: float) -> Tensor:
        total = reference.compose(weight.to(dtype), delta, torch.tensor([alpha]), [])
        return x @ (total.double() - weight.double()).T

    return term


def float8(x: Tensor, weight: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """*exact* with both operands in e4m3, each scaled so that its largest entry is the largest number."""
    return alpha * (_to_float8(x) @ _to_float8(delta.double()).T)


def _to_float8(tensor: Tensor) -> Tensor:
    scale = torch.finfo(torch.float8_e4m3fn).max / tensor.abs().max()
    return (tensor * scale).to(torch.float8_e4m3fn).double() / scale


def adapter_share(
    alpha: float, path: Term, dtype: torch.dtype = torch.bfloat16, outliers: bool = False
) -> tuple[float, float]:
    """``(share, noise)``: the regression of what reached y on the true term, and the error relative to that term.

    `dtype` is that of x and W0; `outliers` makes every hundredth column of x 50 times as large.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    x[:, ::100] *= 50 if outliers else 1
    x = x.to(dtype).double()
    weight = (torch.randn(N, K, generator=generator) * WEIGHT_STD).to(dtype)
    delta = (torch.rand(N, K, generator=generator) * 2 - 1) / math.sqrt(K)
    term = alpha * (x @ delta.double().T)
    got = path(x, weight, delta, alpha)
    share = (got * term).sum() / (term * term).sum()
    return share.item(), ((got - term).norm() / term.norm()).item()


def threshold(dtype: torch.dtype) -> float:
    """The alpha from which `rigsa_kernels.composed_is_safe` holds for these matrices."""
    return torch.finfo(dtype).eps * WEIGHT_STD * math.sqrt(3 * K)


def main() -> None:
    columns: dict[str, tuple[Term, bool]] = {
        "composed bf16": (composed(torch.bfloat16), False),
        "composed fp16": (composed(torch.float16), False),
        "composed fp32": (composed(torch.float32), False),
        "exact bf16": (exact(torch.bfloat16), False),
        "exact fp8": (float8, False),
        "exact fp8, outliers": (float8, True),
    }
    print("| alpha | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for alpha in (1e-6, 1e-4, 1e-3, threshold(torch.float16), threshold(torch.bfloat16), 1e-1):
        cells = (
            "{:.2f} ({:.1%})".format(*adapter_share(alpha, path, outliers=outliers))
            for path, outliers in columns.values()
        )
        print(f"| {alpha:.2g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
