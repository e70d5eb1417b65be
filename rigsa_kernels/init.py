"""Initial values, regenerated from a seed and never stored.

Random word i of layer key L comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with key = seed and counter = (i // 4 modulo 2**32, L, i // 2**34, stream), lane i % 4. Stream 0 makes initial
values, stream 1 random masks (`rigsa_kernels.select`), stream 2 permutations (in `rigsa.criteria`).

The 24 high bits r of a word become ``(r - 8388607.5) * 2**-23 * bound``: every step before the last multiplication is
exact in float32, so the bits do not depend on the device, and no float32 value is ever zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ._ops import ops as operators
from .format import SparsePattern, unpack_bits
from .library import define

_LOW_32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
LANES = 4
"""Words that one counter gives."""
CHUNK = 1 << 20
"""Entries worked on at a time on the PyTorch path: bounds its working memory to about 100 MB whatever the layer."""


def layer_key(name: str) -> int:
    """A 32-bit key from a module's qualified name: it does not change when other layers join or leave the adapter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors that hold uint32 counters in, four that hold uint32 random words out.

    int64 products wrap modulo 2**64, which leaves the low and the high 32-bit word right. What the second and the
    fourth word have above their low 32 bits is masked before it would reach a product.
    """
    c0, c1, c2, c3 = (word.clone() for word in counter)  # and in place from here, so that the rounds stay in the cache
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(_ROUNDS):
        product0, product1 = c0.mul_(_MULTIPLIER[0]), c2.mul_(_MULTIPLIER[1])
        c0 = c1.bitwise_xor_(product1 >> 32).bitwise_xor_(k0).bitwise_and_(_LOW_32)
        c2 = c3.bitwise_xor_(product0 >> 32).bitwise_xor_(k1).bitwise_and_(_LOW_32)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEP[0]) & _LOW_32, (k1 + _KEY_STEP[1]) & _LOW_32
    return c0, c1 & _LOW_32, c2, c3 & _LOW_32


def _words_of_counters(seed: int, key: int, stream: int, group: Tensor) -> Tensor:
    """int64 ``[len(group), 4]`` holding uint32: the four words of each of these counters of layer `key`'s stream."""
    counter = (group & _LOW_32, torch.full_like(group, key), group >> 32, torch.full_like(group, stream))
    return torch.stack(philox(seed, counter), dim=1)


def random_words(seed: int, key: int, stream: int, start: int, count: int, device: torch.device) -> Tensor:
    """int64 ``[count]`` holding uint32: words `start` to `start + count` of layer `key`'s stream."""
    group = torch.arange(start // LANES, -(-(start + count) // LANES), device=device)
    return _words_of_counters(seed, key, stream, group).view(-1)[start % LANES :][:count]


def random_words_at(seed: int, key: int, stream: int, numbers: Tensor) -> Tensor:
    """int64, holding uint32: the words with these numbers, int64 of one dimension. Each takes a counter of its own."""
    words = _words_of_counters(seed, key, stream, numbers // LANES)
    return words.gather(1, (numbers % LANES)[:, None])[:, 0]


def uniform(words: Tensor, bound: float) -> Tensor:
    """float32 values in (-bound, bound) from uint32 words."""
    scale = torch.tensor(bound, dtype=torch.float32, device=words.device)
    return ((words >> 8).to(torch.float32) - 8388607.5) * 2.0**-23 * scale


def row_chunks(pattern: list[Tensor], shape: tuple[int, int]) -> Iterator[tuple[slice, Tensor, slice]]:
    """Walk a matrix in chunks of about `CHUNK` entries: rows, boolean ``[rows, K]`` free entries, where values lie.

    `pattern` is ``SparsePattern.tensors``; values lie in the flat stored values.
    """
    out_features, in_features = shape
    step = max(CHUNK // max(in_features, 1), 1)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        if pattern:
            words, _, row_base = pattern
            free = unpack_bits(words[:, rows], in_features)
            begin = int(row_base[first])
            yield rows, free, slice(begin, begin + int(free.sum()))
        else:
            free = torch.ones(rows.stop - first, in_features, dtype=torch.bool)
            yield rows, free, slice(first * in_features, rows.stop * in_features)


def _initial_values_(
    out: Tensor, pattern: list[Tensor], in_features: int, bound: float, seed: int, key: int, start: int
) -> None:
    flat = out.view(-1)
    if pattern:
        for rows, free, stored in row_chunks(pattern, (pattern[0].shape[1], in_features)):
            begin, chosen = start + rows.start * in_features, free.reshape(-1)
            if LANES * (stored.stop - stored.start) < free.numel():
                words = random_words_at(seed, key, 0, begin + chosen.nonzero().view(-1))
            else:
                words = random_words(seed, key, 0, begin, free.numel(), out.device)[chosen]
            flat[stored] = uniform(words, bound).to(out.dtype)
    else:
        for begin in range(0, flat.numel(), CHUNK):
            count = min(CHUNK, flat.numel() - begin)
            words = random_words(seed, key, 0, start + begin, count, out.device)
            flat[begin : begin + count] = uniform(words, bound).to(out.dtype)


define(
    "initial_values_(Tensor(a!) out, Tensor[] pattern, int in_features, float bound, int seed, int key, int start)"
    " -> ()",
    _initial_values_,
    "triton_select.initial_values_",
    lambda out, pattern, in_features, bound, seed, key, start: None,
)


def initial_values(
    pattern: SparsePattern,
    bound: float,
    *,
    seed: int,
    key: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The initial values of a layer's free entries; the ``[N, K]`` matrix is not made for a packed pattern.

    Args:
        pattern: which entries; its index tensors are on `device`.
        bound, seed, key, dtype, device: as in `uniform_init`.

    Returns:
        ``pattern.values_shape``, equal to ``pattern.gather(uniform_init(pattern.shape, ...))``.

    Raises:
        ValueError: `seed`, `key` or `bound` out of range.

    Source: RIGSA, section 4.4 (rewinding).
    """
    check_stream(seed, key)
    if not 0 <= bound < float("inf"):
        raise ValueError(f"bound: expected a finite number, 0 or more, got {bound}")
    if bound == 0:
        return torch.zeros(pattern.values_shape, dtype=dtype, device=device)
    values = torch.empty(pattern.values_shape, dtype=dtype, device=device)
    operators.initial_values_(values, pattern.packed().tensors, pattern.in_features, bound, as_int64(seed), key, 0)
    return values


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
        bound: half the width of the interval; 0 gives zeros.
        seed: 0 to 2**64 - 1.
        key: 0 to 2**32 - 1, one for each layer (`layer_key`).
        dtype: float32, bfloat16, float16 or float64; the float32 value is rounded to it.

    Raises:
        ValueError: `seed`, `key` or `bound` out of range.
    """
    column = SparsePattern.dense(torch.Size(shape).numel(), 1)  # entries are numbered in row-major order, so any shape
    return initial_values(column, bound, seed=seed, key=key, dtype=dtype, device=device).view(shape)


def check_stream(seed: int, key: int) -> None:
    """Raises ValueError where `seed` or `key` is out of range."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if not 0 <= key < 2**32:
        raise ValueError(f"key: expected 0 to 2**32 - 1, got {key}")


def as_int64(seed: int) -> int:
    """The signed number with the same 64 bits: an operator's schema has no unsigned one."""
    return seed - 2**64 if seed >= 2**63 else seed
