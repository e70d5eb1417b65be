"""How much of the adapter term reaches y when alpha * D is small: ``python benchmarks/adapter_share.py``.

W0 ~ N(0, 0.02) and D ~ U(+-1/sqrt(K)), N = 256, K = 2048, 256 tokens. Products are taken in float64, so only the
rounding of the operands shows, as with a float32 accumulator.
"""

from __future__ import annotations

import math

import torch

from rigsa_kernels import reference

M, N, K = 256, 256, 2048
WEIGHT_STD = 0.02


def adapter_share(alpha: float, dtype: torch.dtype, exact: bool) -> tuple[float, float]:
    """``(share, noise)``: the regression of what reached y on the true term, and the error relative to that term."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype).double()
    weight = (torch.randn(N, K, generator=generator) * WEIGHT_STD).to(dtype)
    delta = (torch.rand(N, K, generator=generator) * 2 - 1) / math.sqrt(K)
    term = alpha * (x @ delta.double().T)
    if exact:
        got = alpha * (x @ reference.delta_matrix(delta, (N, K), [], dtype).double().T)
    else:
        got = x @ (reference.compose(weight, delta, torch.tensor([alpha]), []).double() - weight.double()).T
    share = (got * term).sum() / (term * term).sum()
    return share.item(), ((got - term).norm() / term.norm()).item()


def threshold(dtype: torch.dtype) -> float:
    """The alpha from which `rigsa_kernels.composed_is_safe` holds for these matrices."""
    return torch.finfo(dtype).eps * WEIGHT_STD * math.sqrt(3 * K)


def main() -> None:
    paths = {"composed bf16": (torch.bfloat16, False), "composed fp32": (torch.float32, False)}
    paths["exact bf16"] = (torch.bfloat16, True)
    print("| alpha | " + " | ".join(paths) + " |\n|---|" + "---|" * len(paths))
    for alpha in (1e-6, 1e-4, 1e-3, threshold(torch.bfloat16), 1e-1):
        cells = ("{:.2f} ({:.1%})".format(*adapter_share(alpha, *path)) for path in paths.values())
        print(f"| {alpha:.2g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
