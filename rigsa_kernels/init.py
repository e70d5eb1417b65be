"""Initial values, regenerated from a seed and never stored.

Random number i of layer key L comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with key = seed and counter = (i // 4, L, 0, 0), lane i % 4. The 24 high bits r of the 32-bit word become
``(r - 8388607.5) * 2**-23 * bound``: every step before the last multiplication is exact in float32, so the bits do not
depend on the device, and no value is ever zero.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 20
"""Values made at a time: bounds the int64 working memory to about 100 MB whatever the layer's size."""


def layer_key(name: str) -> int:
    """A 32-bit key from a module's qualified name: it does not change when other layers join or leave the adapter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors that hold uint32 counters in, four that hold uint32 random words out.

    int64 products wrap modulo 2**64, which leaves the low and the high 32-bit word right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = ((product1 >> 32) & _LOW_32) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _LOW_32) ^ c3 ^ k1
        c1, c3 = product1 & _LOW_32, product0 & _LOW_32
        k0, k1 = (k0 + _KEY_STEP[0]) & _LOW_32, (k1 + _KEY_STEP[1]) & _LOW_32
    return c0, c1, c2, c3


def random_words(seed: int, key: int, start: int, count: int, device: torch.device) -> Tensor:
    """int64 ``[count]`` holding uint32: words `start` (a multiple of 4) to `start + count` of layer `key`'s stream."""
    index = torch.arange(start // 4, -(-(start + count) // 4), device=device)
    zero = torch.zeros_like(index)
    lanes = torch.stack(philox(seed, (index, torch.full_like(index, key), zero, zero)), dim=1).view(-1)
    return lanes[:count]


def uniform_init(
    shape: tuple[int, ...],
    bound: float,
    *,
    seed: int,
    key: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform values in (-bound, bound), the same bits on every device.

    Args:
        shape: of the result; value i is entry i in row-major order.
        bound: half the width of the interval, positive.
        seed: 0 to 2**64 - 1.
        key: 0 to 2**32 - 1, one for each layer (`layer_key`).
        dtype: float32, bfloat16, float16 or float64; the float32 value is rounded to it.

    Raises:
        ValueError: `seed`, `key` or `bound` out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if not 0 <= key < 2**32:
        raise ValueError(f"key: expected 0 to 2**32 - 1, got {key}")
    if not 0 < bound < float("inf"):
        raise ValueError(f"bound: expected a positive finite number, got {bound}")
    device = torch.device(device)
    values = torch.empty(shape, dtype=dtype, device=device)
    flat = values.view(-1)
    scale = torch.tensor(bound, dtype=torch.float32, device=device)
    for start in range(0, flat.numel(), _CHUNK):
        count = min(_CHUNK, flat.numel() - start)
        words = random_words(seed, key, start, count, device)
        flat[start : start + count] = ((words >> 8).to(torch.float32) - 8388607.5) * 2.0**-23 * scale
    return values
