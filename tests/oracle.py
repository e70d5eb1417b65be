"""What operators and kernels are held against: inputs, the truth in float64, and a bound that is not tuned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rigsa_kernels import SparsePattern
from rigsa_kernels.nf4 import dequantize
from rigsa_kernels.tiles import grid_shape, tile_size

DENSITIES = {"dense": None, "packed": 0.4, "sparse": 0.02, "empty": 0.0, "full": 1.0}
TILES = {
    "rows": ("rows", 0.2),
    "columns": ("columns", 0.2),
    "16x8": ("16x8", 0.3),
    "32": (32, 0.2),
    "5x3": ("5x3", 0.4),
}
"""Name to a tile and to the share of the tiles that are free."""
PATTERNS = [*DENSITIES, *TILES]
ALPHAS = [0.0, 1e-6, 1e-3, 0.1, -0.1]


def flag(exact: bool) -> Tensor:
    return torch.tensor([exact])


def make_pattern(n: int, k: int, density: str, device: str = "cpu") -> SparsePattern:
    generator = torch.Generator(device).manual_seed(1)
    if density in TILES:
        tile, share = TILES[density]
        size = tile_size(tile, (n, k))
        grid = torch.rand(grid_shape((n, k), size), generator=generator, device=device) < share
        return SparsePattern.from_tiles(grid.view(-1).nonzero().view(-1).to(torch.int32), (n, k), size)
    share = DENSITIES[density]
    if share is None:
        return SparsePattern.dense(n, k)
    return SparsePattern.from_mask(torch.rand(n, k, generator=generator, device=device) < share)


def make_inputs(m, n, k, density, alpha, dtype, bias=True, device="cpu"):  # type: ignore[no-untyped-def]
    """Drawn in `dtype`, so that rounding the inputs is not charged to the operator; W0 and D on their usual scales."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    pattern = make_pattern(n, k, density, device)
    master = torch.promote_types(dtype, torch.float32)
    uniform = torch.rand(n, k, generator=generator, dtype=master, device=device)
    values = pattern.gather((uniform * 2 - 1) / k**0.5)
    x, weight, dy = normal(m, k), normal(n, k) * 0.1, normal(m, n)
    gate = torch.tensor([alpha], dtype=master, device=device)
    return x, weight, normal(n) if bias else None, values, gate, pattern, dy


def quantize_nf4(weight: Tensor, block: int = 64) -> list[Tensor]:
    """``[codes, absmax, levels]``: nearest level of each weight over its block's largest magnitude.

    The levels are the published ones (QLoRA, appendix E).
    """
    levels = torch.tensor(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        device=weight.device,
    )  # fmt: skip
    blocks = weight.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None]).unsqueeze(-1) - levels).abs().argmin(-1).to(torch.uint8).view(-1, 2)
    return [(codes[:, 0] << 4) | codes[:, 1], absmax, levels]


def truth(x, weight, bias, values, alpha, pattern, dy):  # type: ignore[no-untyped-def]
    """``(y, dx, dvalues, dalpha)`` written out in float64 on whole matrices, without any of our arithmetic.

    `weight` is a matrix or an NF4 base. Each result comes with the size that rounding is proportional to: its largest
    magnitude, times what accumulators add. A sum of n terms that is rounded after each of them, in whatever order, is
    off by some sqrt(n) * eps / 2 of it (Higham & Mary, "A new approach to probabilistic rounding error analysis",
    2019), which counts where accumulators are no wider than the products.
    """
    mask = pattern.to_mask()
    delta = torch.zeros(pattern.shape, dtype=torch.float64, device=values.device)
    delta[mask] = values.double().flatten()
    weight = dequantize(weight, pattern.shape, torch.float64) if isinstance(weight, list) else weight.double()
    narrow, wide = (torch.finfo(dtype).eps for dtype in (x.dtype, torch.promote_types(x.dtype, torch.float32)))
    x, dy, alpha = x.double(), dy.double(), alpha.double()
    total = weight + alpha * delta
    grad = dy.T @ x
    y = x @ total.T + (0 if bias is None else bias.double())
    dx, dvalues, dalpha = dy @ total, alpha * (grad if pattern.is_dense else grad[mask]), (grad * delta).sum().view(1)
    sizes = [result.abs().max() if result.numel() else 0 for result in (y, dx, dvalues)]
    sizes = [
        size * (1 + math.sqrt(terms) / 2 * wide / narrow)
        for size, terms in zip(sizes, (x.shape[1], dy.shape[1], x.shape[0]), strict=True)
    ]
    return (y, dx, dvalues, dalpha), (*sizes, (grad * delta).abs().sum())


def eager_results(x, weight, bias, values, alpha, pattern, dy, exact):  # type: ignore[no-untyped-def]
    """The textbook computation at the same dtype, by autograd: the yardstick of the error bound."""
    if isinstance(weight, list):
        weight = dequantize(weight, pattern.shape, x.dtype)
    delta = torch.zeros(pattern.shape, dtype=values.dtype, device=values.device)
    mask = pattern.to_mask()
    x, values, alpha = (tensor.detach().requires_grad_() for tensor in (x, values, alpha))
    delta = delta.index_put(tuple(mask.nonzero().T), values.flatten())
    if exact:
        y = torch.nn.functional.linear(x, weight, bias)
        y = (y + alpha * torch.nn.functional.linear(x, delta.to(x.dtype))).to(x.dtype)
    else:
        y = torch.nn.functional.linear(x, (weight + alpha * delta).to(x.dtype), bias)
    return y.detach(), *torch.autograd.grad(y, (x, values, alpha), dy)


def share_of_bound(got: Tensor, want: Tensor, size: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """The largest error as a share of what is allowed: at most 1 is right, NaN and infinity are not.

    Allowed is twice what the same computation costs in plain eager at the same dtype, plus one rounding. `dtype` is the
    products', which may be lower than the result's.
    """
    if not want.numel():
        return 0.0
    error = (got.double() - want).abs().max().item()
    eager_error = (eager.double() - want).abs().max()
    bound = float(2 * (eager_error + torch.finfo(dtype).eps * size))
    return error / bound if bound else (math.inf if error else 0.0)


def assert_close(got: Tensor, want: Tensor, size: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """`share_of_bound` is at most 1."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert share_of_bound(got, want, size, eager, dtype) <= 1
