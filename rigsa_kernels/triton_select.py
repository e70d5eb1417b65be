"""Initial values, the sign test and exact top-k selection: the kernels of `rigsa_kernels.init` and `.select`.

Every kernel walks a layer in tiles of ROWS rows and WORDS 32-bit words of the bit mask, ``[ROWS, WORDS, 32]`` entries:
words are read along the rows, which is how they are stored, a dense matrix along the columns. Random words are made
where they are needed, four entries a call of Philox where a row's length is a multiple of four. Arithmetic on keys is
integer arithmetic, so results do not depend on the order of programs.

Selection reads the values six times (four digits, ties, result). Ties need the number of equal keys before them in
storage order: they are counted for every row of a tile, summed up (`torch.cumsum` over one number for every 128
entries), and counted again inside the row.

Run in the interpreter and on an H200, compiled for sm_80, sm_89 and sm_90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import free_entries, load_words

ROWS = 16
WORDS = 4
NUM_WARPS = 4
"""16 entries a lane. With a tile of twice as many rows, counting a packed layer took 226 registers instead of 72 on
sm_89, and where a row's length is no multiple of four it spilled on sm_90."""
PROGRAMS = 1024
"""Of a counting pass: each adds its 256 counts to the total once, so few programs mean few atomics."""
COUNTING_REGISTERS = 128
"""Of a thread in a counting pass at most, for four programs a multiprocessor. Unless it is told a limit, the assembler
of Triton 3.7 aims at six and spills 8 bytes to get there."""


@triton.jit
def _tile(tile, N, K, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Rows ``[ROWS, 1, 1]`` and words ``[1, WORDS, 1]`` of a tile, int64, and which of them exist."""
    num_words = tl.cdiv(K, 32)
    tiles_per_row = tl.cdiv(num_words, WORDS)
    n = (tile // tiles_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    q = (tile % tiles_per_row).to(tl.int64) * WORDS + tl.arange(0, WORDS)[None, :, None]
    return n, q, (n < N) & (q < num_words)


@triton.jit
def _entries(words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K, PACKED: tl.constexpr):
    """Which entries of a tile are free, and where their values stand, ``[ROWS, WORDS, 32]``."""
    if PACKED:
        row_base = tl.load(row_base_ptr + n, mask=n < N, other=0)
        words, first = load_words(words_ptr, word_offsets_ptr, row_base, q * N + n, ok)
        return free_entries(words, first)
    else:
        k = q * 32 + tl.arange(0, 32)[None, None, :]
        return ok & (k < K), n * K + k


@triton.jit
def _random_words(seed, key, STREAM: tl.constexpr, first, ALIGNED: tl.constexpr):
    """uint32 ``[R, Q, 32]``: word `first`, int64 ``[R, Q, 1]``, and the 31 after it. ALIGNED: it is a multiple of 4."""
    if ALIGNED:
        group = (first >> 2) + tl.arange(0, 8)[None, None, :]
        a, b, c, d = tl.philox(seed, group.to(tl.uint32), key, (group >> 32).to(tl.uint32), STREAM)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (first.shape[0], first.shape[1], 32))
    else:
        index = first + tl.arange(0, 32)[None, None, :]
        group, lane = index >> 2, index & 3
        a, b, c, d = tl.philox(seed, group.to(tl.uint32), key, (group >> 32).to(tl.uint32), STREAM)
        return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def _uniform(random, bound):
    """float32 in (-bound, bound): exact up to the last product."""
    return ((random >> 8).to(tl.float32) - 8388607.5) * 1.1920928955078125e-07 * bound


@triton.jit
def _as_words(bits):
    """Boolean ``[R, Q, 32]`` to int32 ``[R, Q, 1]``."""
    places = tl.arange(0, 32)[None, None, :].to(tl.uint32)
    return tl.sum(bits.to(tl.uint32) << places, axis=2, keep_dims=True).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["start", "seed", "key"])
def initial_values_kernel(out_ptr, words_ptr, word_offsets_ptr, row_base_ptr, N, K, size, start, bound, seed, key,
                          PACKED: tl.constexpr, ALIGNED: tl.constexpr,
                          ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """One tile of initial values into `out`, at the free entries' places; a dense `out` has `size` entries."""
    n, q, ok = _tile(tl.program_id(0), N, K, ROWS, WORDS)
    free, position = _entries(words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K, PACKED)
    if not PACKED:
        free = free & (position < size)
    random = _random_words(seed, key, 0, start + n * K + q * 32, ALIGNED)
    tl.store(out_ptr + position, _uniform(random, bound).to(out_ptr.dtype.element_ty), mask=free)


@triton.jit(do_not_specialize=["seed", "key"])
def same_sign_kernel(values_ptr, words_ptr, word_offsets_ptr, row_base_ptr, out_ptr, N, K, bound, seed, key,
                     PACKED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """One tile of the bit mask ``out [ceil(K / 32), N]``: the signs of a value and of its initial value are equal."""
    n, q, ok = _tile(tl.program_id(0), N, K, ROWS, WORDS)
    free, position = _entries(words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K, PACKED)
    value = tl.load(values_ptr + position, mask=free, other=0.0).to(tl.float32)
    random = _random_words(seed, key, 0, n * K + q * 32, ALIGNED)
    initial = _uniform(random, bound).to(values_ptr.dtype.element_ty).to(tl.float32)
    same = ((value > 0) & (initial > 0)) | ((value < 0) & (initial < 0))
    tl.store(out_ptr + q * N + n, _as_words(same), mask=ok)


@triton.jit
def _keys(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K, seed, key,
          BY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Keys of a tile (uint32), which of its entries are candidates, and which values are not finite."""
    free, position = _entries(words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K, PACKED)
    if BY == "random":
        keys = _random_words(seed, key, 1, n * K + q * 32, ALIGNED)
        not_finite = free & False
    else:
        value = tl.load(values_ptr + position, mask=free, other=0.0).to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        not_finite = magnitude >= 0x7F800000
        if BY == "magnitude":
            keys = magnitude
        else:  # -0 becomes +0, so that equal numbers have equal keys
            keys = tl.where((bits >> 31 != 0) & (magnitude != 0), ~bits, magnitude | 0x80000000)
    words = tl.load(candidates_ptr + q * N + n, mask=ok, other=0)
    chosen = free & (((words >> tl.arange(0, 32)[None, None, :]) & 1) != 0)
    return keys, chosen, not_finite


@triton.jit(do_not_specialize=["seed", "key", "prefix", "shift"])
def digit_counts_kernel(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, counts_ptr, N, K,
                        seed, key, prefix, shift, BY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
                        ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Adds to ``counts [257]`` the candidates that share `prefix` by their next digit, and the values not finite."""
    prefix = prefix.to(tl.uint32, bitcast=True)
    counts = tl.zeros((256,), tl.int32)
    not_finite = tl.zeros((ROWS, WORDS), tl.int32)
    tiles = tl.cdiv(N, ROWS) * tl.cdiv(tl.cdiv(K, 32), WORDS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n, q, ok = _tile(tile, N, K, ROWS, WORDS)
        keys, chosen, bad = _keys(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K,
                                  seed, key, BY, PACKED, ALIGNED)  # fmt: skip
        digits = (keys ^ prefix) >> shift.to(tl.uint32)
        chosen = chosen & (digits < 256)
        counts += tl.histogram(tl.ravel(digits.to(tl.int32)), 256, tl.ravel(chosen))
        not_finite += tl.sum(bad.to(tl.int32), axis=2)
    digit = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + digit, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 256, tl.sum(tl.ravel(not_finite)).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["seed", "key", "threshold"])
def ties_kernel(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, ties_ptr, N, K, seed, key,
                threshold, BY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
                ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """``ties [N, tiles of a row]``: candidates whose key is `threshold` in every row of every tile."""
    n, q, ok = _tile(tl.program_id(0), N, K, ROWS, WORDS)
    keys, chosen, _ = _keys(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K,
                            seed, key, BY, PACKED, ALIGNED)  # fmt: skip
    ties = chosen & (keys == threshold.to(tl.uint32, bitcast=True))
    count = tl.sum(tl.reshape(ties.to(tl.int32), (ROWS, WORDS * 32)), axis=1)
    tl.store(_tie_counts(ties_ptr, K, ROWS, WORDS), count, mask=_rows(K, ROWS, WORDS) < N)


@triton.jit
def _rows(K, ROWS: tl.constexpr, WORDS: tl.constexpr):
    tiles_per_row = tl.cdiv(tl.cdiv(K, 32), WORDS)
    return (tl.program_id(0) // tiles_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def _tie_counts(ties_ptr, K, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Where the counts of this program's tile stand, one for each row."""
    tiles_per_row = tl.cdiv(tl.cdiv(K, 32), WORDS)
    return ties_ptr + _rows(K, ROWS, WORDS) * tiles_per_row + tl.program_id(0) % tiles_per_row


@triton.jit(do_not_specialize=["seed", "key", "threshold", "take"])
def keep_largest_kernel(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, before_ptr, out_ptr,
                        N, K, seed, key, threshold, take, BY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
                        ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """One tile of the bit mask ``out [ceil(K / 32), N]``: keys above `threshold`, and the first `take` equal to it."""
    n, q, ok = _tile(tl.program_id(0), N, K, ROWS, WORDS)
    keys, chosen, _ = _keys(values_ptr, candidates_ptr, words_ptr, word_offsets_ptr, row_base_ptr, n, q, ok, N, K,
                            seed, key, BY, PACKED, ALIGNED)  # fmt: skip
    threshold = threshold.to(tl.uint32, bitcast=True)
    ties = chosen & (keys == threshold)
    row = tl.reshape(ties.to(tl.int32), (ROWS, WORDS * 32))
    before = tl.load(_tie_counts(before_ptr, K, ROWS, WORDS), mask=_rows(K, ROWS, WORDS) < N, other=0)
    number = before[:, None] + tl.cumsum(row, axis=1)
    taken = ties & (tl.reshape(number, (ROWS, WORDS, 32)) <= take)
    tl.store(out_ptr + q * N + n, _as_words((chosen & (keys > threshold)) | taken), mask=ok)


def initial_values_(
    out: Tensor, pattern: list[Tensor], in_features: int, bound: float, seed: int, key: int, start: int
) -> None:
    """Fills `out`; see `rigsa_kernels.init`."""
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    if pattern:
        shape = pattern[0].shape[1], in_features
        _check_pattern(pattern, shape)
    else:  # entries are numbered row by row, so a matrix without a pattern may be cut into rows of one tile
        shape = triton.cdiv(out.numel(), 32 * WORDS), 32 * WORDS
    if out.numel() == 0:
        return
    aligned = shape[1] % 4 == 0 and start % 4 == 0
    with torch.cuda.device_of(out):
        initial_values_kernel[(_num_tiles(shape),)](
            out, *_pointers(pattern, out), *shape, out.numel(), start, bound, seed, _as_int32(key),
            PACKED=bool(pattern), ALIGNED=aligned, ROWS=ROWS, WORDS=WORDS, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def same_sign(values: Tensor, pattern: list[Tensor], shape: list[int], bound: float, seed: int, key: int) -> Tensor:
    """See `rigsa_kernels.select`."""
    _check_values(values, pattern, shape)
    out = torch.empty(triton.cdiv(shape[1], 32), shape[0], dtype=torch.int32, device=values.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(values):
        same_sign_kernel[(_num_tiles(shape),)](
            values, *_pointers(pattern, values), out, *shape, bound, seed, _as_int32(key),
            PACKED=bool(pattern), ALIGNED=shape[1] % 4 == 0, ROWS=ROWS, WORDS=WORDS,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def digit_counts(
    values: Tensor | None, candidates: Tensor, pattern: list[Tensor], in_features: int, by: str, seed: int, key: int,
    prefix: int, shift: int,
) -> Tensor:  # fmt: skip
    """See `rigsa_kernels.select`."""
    shape = candidates.shape[1], in_features
    _check_ranked(values, candidates, pattern, shape)
    counts = torch.zeros(257, dtype=torch.int64, device=candidates.device)
    if candidates.numel() == 0:
        return counts
    with torch.cuda.device_of(candidates):
        digit_counts_kernel[(min(_num_tiles(shape), PROGRAMS),)](
            *_ranked(values, candidates, pattern), counts, *shape, seed, _as_int32(key), _as_int32(prefix), shift,
            maxnreg=COUNTING_REGISTERS, **_options(by, pattern, shape),
        )  # fmt: skip
    return counts


def keep_largest(
    values: Tensor | None, candidates: Tensor, pattern: list[Tensor], in_features: int, by: str, seed: int, key: int,
    threshold: int, take: int,
) -> Tensor:  # fmt: skip
    """See `rigsa_kernels.select`."""
    shape = candidates.shape[1], in_features
    _check_ranked(values, candidates, pattern, shape)
    out = torch.empty_like(candidates)
    if out.numel() == 0:
        return out
    ties = torch.empty(shape[0], triton.cdiv(out.shape[0], WORDS), dtype=torch.int32, device=out.device)
    ranked, stream, options = _ranked(values, candidates, pattern), (seed, _as_int32(key)), _options(by, pattern, shape)
    with torch.cuda.device_of(candidates):
        ties_kernel[(_num_tiles(shape),)](*ranked, ties, *shape, *stream, _as_int32(threshold), **options)
        before = ties.view(-1).cumsum(0).view(ties.shape) - ties
        keep_largest_kernel[(_num_tiles(shape),)](
            *ranked, before, out, *shape, *stream, _as_int32(threshold), take, **options
        )
    return out


def _num_tiles(shape) -> int:
    return triton.cdiv(shape[0], ROWS) * triton.cdiv(triton.cdiv(shape[1], 32), WORDS)


def _as_int32(word: int) -> int:
    """The signed number with the same 32 bits: one compiled kernel for all, whatever the number."""
    return word - 2**32 if word >= 2**31 else word


def _pointers(pattern: list[Tensor], unused: Tensor) -> list[Tensor]:
    return pattern or [unused] * 3


def _ranked(values, candidates, pattern) -> list[Tensor]:
    return [candidates if values is None else values, candidates, *_pointers(pattern, candidates)]


def _options(by, pattern, shape):
    return {
        "BY": by, "PACKED": bool(pattern), "ALIGNED": shape[1] % 4 == 0, "ROWS": ROWS, "WORDS": WORDS,
        "num_warps": NUM_WARPS, "enable_fp_fusion": False,
    }  # fmt: skip


def _check_ranked(values, candidates, pattern, shape) -> None:
    _check_words("candidates", candidates, shape)
    if values is None:
        _check_pattern(pattern, shape)
    else:
        _check_values(values, pattern, shape)
        if values.device != candidates.device:
            raise ValueError(f"candidates: expected the device of values, {values.device}, got {candidates.device}")


def _check_values(values, pattern, shape) -> None:
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"values: expected float32, bfloat16 or float16, got {values.dtype}")
    if not values.is_contiguous():
        raise ValueError(f"values: expected a contiguous tensor, got strides {list(values.stride())}")
    if not pattern and values.numel() != shape[0] * shape[1]:
        raise ValueError(f"values: expected {shape[0] * shape[1]} for a dense pattern, got {values.numel()}")
    _check_pattern(pattern, shape)
    if pattern and values.device != pattern[0].device:
        raise ValueError(f"pattern: expected the device of values, {values.device}, got {pattern[0].device}")


def _check_pattern(pattern, shape) -> None:
    if not pattern:
        return
    words, word_offsets, row_base = pattern
    _check_words("words", words, shape)
    if word_offsets.dtype != torch.int16 or word_offsets.shape != words.shape or not word_offsets.is_contiguous():
        given = f"{word_offsets.dtype} {list(word_offsets.shape)}"
        raise ValueError(f"word_offsets: expected contiguous int16 {list(words.shape)}, got {given}")
    if row_base.dtype != torch.int32 or tuple(row_base.shape) != (shape[0],):
        raise ValueError(f"row_base: expected int32 [{shape[0]}], got {row_base.dtype} {list(row_base.shape)}")


def _check_words(name, words, shape) -> None:
    expected = (triton.cdiv(shape[1], 32), shape[0])
    if words.dtype != torch.int32 or tuple(words.shape) != expected or not words.is_contiguous():
        raise ValueError(f"{name}: expected contiguous int32 {list(expected)}, got {words.dtype} {list(words.shape)}")
