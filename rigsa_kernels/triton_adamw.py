"""AdamW over many tensors in one launch; `rigsa_kernels.adamw` says what it computes and why it is stored so.

The pass is bound by memory, so the kernel is built around its traffic: every value, gradient and moment is read once
and every value and moment written once, 128 bits at a time. 168 layers are one launch: a table on the device holds a
row of addresses and sizes for each tensor, and a list says which tensor a chunk of values belongs to. Both depend on
nothing but the addresses and sizes they hold, so they are remembered by those (and by the stream that sent them) and
cannot go stale; a new one travels from pinned memory without a synchronisation.

An address in a table carries no alignment that the compiler knows, so it is promised (`multiple_of`) where the host
saw it; tensors that are not aligned to 16 bytes go into a launch of their own without the promise. A mask on an unknown
length would split the vectors too, so whole chunks run without one and the last chunk of a tensor with one.

Division and root are the rounded ones and products are not fused with sums: the stored bits are those of the PyTorch
implementation. That costs instructions, which a pass bound by memory has to spare: at most 45 a value in float32, 78 in
bfloat16 and 174 with 8-bit moments (SASS for sm_89), where an RTX 4090 can issue 1150, 570 and 410 while it moves the
bytes. With 8-bit moments an A100 (125) and an H100 (92) cannot. Predicted, not run on a GPU.

The weight that a layer multiplies by can be refreshed in the same pass: flat where the values are dense, tile by tile
along the bit mask where they are packed. Blocks of 8-bit moments do not follow tiles, and a tile with few free entries
is mostly idle lanes; there the flat pass is followed by one that composes. The bits are the same.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rigsa_kernels import adamw
from rigsa_kernels.triton_common import free_entries, load_words

COLUMNS = 16
"""int64 in a row of the table, one cache line: param, grad, exp_avg, exp_avg_sq, scales, numel, number, first chunk,
composed, base_values, alpha, words, word_offsets, row_base, N, K."""
ALIGNMENT = 16
CHUNK = 2048
"""Values of a program of the flat kernel: 16 a thread, so that 8-bit codes fill 128 bits."""
ROWS, WORDS = 8, 4
"""Of a step of the packed kernel, which walks ROWS rows of the matrix WORDS words at a time: 8 values a thread; the
words of 8 rows lie in one 32-byte sector."""
ONE_PASS_DENSITY = 0.1
"""Below it a packed pattern is composed in a second launch. Every entry of a tile takes the instructions of an update,
free or not: 132 in bfloat16 against 34 to compose alone (SASS for sm_89), which at a tenth free is what an RTX 4090
issues while it moves the data. Predicted, not run on a GPU."""
NUM_WARPS = 4

_COLUMNS = tl.constexpr(COLUMNS)
_MIX0 = tl.constexpr(adamw.MIX_MULTIPLIERS[0])
_MIX1 = tl.constexpr(adamw.MIX_MULTIPLIERS[1])
_SECOND_WORD = tl.constexpr(adamw.SECOND_WORD)
_SMALLEST_SCALE = tl.constexpr(adamw.SMALLEST_SCALE)


@triton.jit
def _mix(words):
    """`adamw.mix` of uint32."""
    words = (words ^ (words >> 16)) * _MIX0
    words = (words ^ (words >> 15)) * _MIX1
    return words ^ (words >> 16)


@triton.jit
def _random_words(key0, key1, number, index):
    """A uint32 for each value."""
    stream = _mix(number.to(tl.uint32) ^ key0.to(tl.uint32, bitcast=True))
    return _mix(_mix(index.to(tl.uint32) ^ stream) ^ key1.to(tl.uint32, bitcast=True))


@triton.jit
def _narrowed(x, bits, TYPE: tl.constexpr):
    """float32 in the dtype it is stored in: as it is, or stochastically rounded to bfloat16."""
    if x.dtype == TYPE:
        return x
    else:
        rounded = (x.to(tl.uint32, bitcast=True) + bits) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # a carry could turn a NaN into a zero
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _pointers(table_ptr, tensor, COLUMN: tl.constexpr, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the entries `at` of what a tensor's row of the table holds in `COLUMN`."""
    pointer = tl.load(table_ptr + tensor * _COLUMNS + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + at


@triton.jit
def _load(pointers, ok, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=ok, other=0).to(tl.float32)


@triton.jit
def _store(pointers, x, ok, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=ok)


@triton.jit
def _step(value, grad, exp_avg, exp_avg_sq, hyper):
    """The arithmetic of AdamW, float32: new value, moments, and the root of the second."""
    decay, step_size, beta1, rest1, beta2, rest2, inverse_root, eps = hyper
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (grad * grad)
    root = tl.sqrt_rn(exp_avg_sq)
    value = decay * value - step_size * tl.div_rn(exp_avg, root * inverse_root + eps)
    return value, exp_avg, exp_avg_sq, root


@triton.jit
def _inverse(scale):
    return tl.div_rn(1.0, tl.maximum(scale, _SMALLEST_SCALE))


@triton.jit
def _encoded_exp_avg(exp_avg, scale, bits):
    ratio = tl.abs(exp_avg) * _inverse(scale)[:, None]
    code = tl.floor(tl.minimum(tl.sqrt_rn(ratio) * 127.0, 126.0))
    above = ratio * 16129.0 - code * code
    code = tl.where(bits.to(tl.float32) * 0.0000152587890625 * (code + code + 1.0) < above, code + 1.0, code)
    return tl.where(exp_avg < 0, -code, code).to(tl.int8)


@triton.jit
def _encoded_exp_avg_sq(exp_avg_sq, root, scale, bits):
    inverse = _inverse(scale)[:, None]
    ratio = exp_avg_sq * inverse
    code = tl.floor(tl.minimum(tl.sqrt_rn(root * tl.sqrt_rn(inverse)) * 255.0, 254.0))
    square = code * code
    gap = (code + code + 1.0) * (square + square + code + code + 1.0)
    above = ratio * 4228250625.0 - square * square
    code = tl.where(bits.to(tl.float32) * 0.0000152587890625 * gap < above, code + 1.0, code)
    return tl.where(exp_avg_sq > 0, tl.maximum(code, 1.0), code).to(tl.uint8)


@triton.jit
def _flat_chunk(table_ptr, tensor, start, left, hyper, key0, key1,
                PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
                WEIGHT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """The values ``start + [0, CHUNK)``, of which the first `left` exist, as rows of one quantisation block."""
    block = tl.arange(0, CHUNK // 256)
    offs = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    ok = offs < left
    at = start + offs
    param_ptr = _pointers(table_ptr, tensor, 0, at, PARAM, ALIGNED)
    grad_ptr = _pointers(table_ptr, tensor, 1, at, GRAD, ALIGNED)
    exp_avg_ptr = _pointers(table_ptr, tensor, 2, at, EXP_AVG, ALIGNED)
    exp_avg_sq_ptr = _pointers(table_ptr, tensor, 3, at, EXP_AVG_SQ, ALIGNED)
    value, grad = _load(param_ptr, ok, FULL), _load(grad_ptr, ok, FULL)
    exp_avg, exp_avg_sq = _load(exp_avg_ptr, ok, FULL), _load(exp_avg_sq_ptr, ok, FULL)
    if exp_avg_ptr.dtype.element_ty == tl.int8:
        numel = tl.load(table_ptr + tensor * _COLUMNS + 5)
        scale_ptr = _pointers(table_ptr, tensor, 4, start // 256 + block, tl.float32, False)
        scale_sq_ptr = scale_ptr + (numel + 255) // 256
        block_ok = block * 256 < left
        exp_avg *= 1.0 / 127.0
        exp_avg = exp_avg * tl.abs(exp_avg) * _load(scale_ptr, block_ok, FULL)[:, None]
        exp_avg_sq *= 1.0 / 255.0
        exp_avg_sq *= exp_avg_sq
        exp_avg_sq = exp_avg_sq * exp_avg_sq * _load(scale_sq_ptr, block_ok, FULL)[:, None]
    value, exp_avg, exp_avg_sq, root = _step(value, grad, exp_avg, exp_avg_sq, hyper)
    bits = _random_words(key0, key1, tl.load(table_ptr + tensor * _COLUMNS + 6), at)
    value = _narrowed(value, bits & 0xFFFF, PARAM)
    _store(param_ptr, value, ok, FULL)
    if exp_avg_ptr.dtype.element_ty == tl.int8:
        scale = tl.max(tl.abs(exp_avg), 1)
        scale_sq = tl.max(exp_avg_sq, 1)
        _store(scale_ptr, scale, block_ok, FULL)
        _store(scale_sq_ptr, scale_sq, block_ok, FULL)
        _store(exp_avg_sq_ptr, _encoded_exp_avg_sq(exp_avg_sq, root, scale_sq, bits >> 16), ok, FULL)
        _store(exp_avg_ptr, _encoded_exp_avg(exp_avg, scale, _mix(bits + _SECOND_WORD) & 0xFFFF), ok, FULL)
    else:
        _store(exp_avg_ptr, _narrowed(exp_avg, _mix(bits + _SECOND_WORD) & 0xFFFF, EXP_AVG), ok, FULL)
        _store(exp_avg_sq_ptr, _narrowed(exp_avg_sq, bits >> 16, EXP_AVG_SQ), ok, FULL)
    if WEIGHT is not None:
        base = _load(_pointers(table_ptr, tensor, 9, at, WEIGHT, ALIGNED), ok, FULL)
        alpha = tl.load(_pointers(table_ptr, tensor, 10, 0, tl.float32, False))
        composed_ptr = _pointers(table_ptr, tensor, 8, at, WEIGHT, ALIGNED)
        _store(composed_ptr, (base + alpha * value.to(tl.float32)).to(WEIGHT), ok, FULL)


@triton.jit(do_not_specialize=["key0", "key1"])
def adamw_flat_kernel(table_ptr, chunks_ptr, hyper, key0, key1,
                      PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
                      WEIGHT: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """One chunk of one tensor. WEIGHT: dtype of the composed weights, None to leave them."""
    pid = tl.program_id(0)
    tensor = tl.load(chunks_ptr + pid)
    numel = tl.load(table_ptr + tensor * _COLUMNS + 5)
    first = tl.load(table_ptr + tensor * _COLUMNS + 7)
    start = (pid - first) * CHUNK
    left = numel - start
    if left >= CHUNK:
        _flat_chunk(table_ptr, tensor, start, left, hyper, key0, key1,
                    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, CHUNK, ALIGNED, True)  # fmt: skip
    else:  # block after block: under a mask every value has an address of its own, too many for the registers at once
        for done in range(0, left, 256):
            _flat_chunk(table_ptr, tensor, start + done, left - done, hyper, key0, key1,
                        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, 256, ALIGNED, False)  # fmt: skip


@triton.jit(do_not_specialize=["key0", "key1"])
def adamw_packed_kernel(table_ptr, chunks_ptr, hyper, key0, key1,
                        PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
                        WEIGHT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
                        UPDATE: tl.constexpr):  # fmt: skip
    """ROWS rows of one matrix, WORDS words of their bit mask at a time. UPDATE: False to compose alone."""
    pid = tl.program_id(0)
    tensor = tl.load(chunks_ptr + pid)
    row_ptr = table_ptr + tensor * _COLUMNS
    number, first = tl.load(row_ptr + 6), tl.load(row_ptr + 7)
    N, K = tl.load(row_ptr + 14), tl.load(row_ptr + 15)
    words_ptr = _pointers(table_ptr, tensor, 11, 0, tl.int32, False)
    word_offsets_ptr = _pointers(table_ptr, tensor, 12, 0, tl.int16, False)
    n = (pid - first) * ROWS + tl.arange(0, ROWS)[:, None, None]
    row_base = tl.load(_pointers(table_ptr, tensor, 13, n, tl.int32, False), mask=n < N, other=0)
    alpha = tl.load(_pointers(table_ptr, tensor, 10, 0, tl.float32, False))
    num_words = (K + 31) // 32
    for word in range(0, num_words, WORDS):
        q = word + tl.arange(0, WORDS)[None, :, None]
        ok = (n < N) & (q < num_words)
        free, position = free_entries(*load_words(words_ptr, word_offsets_ptr, row_base, q * N + n, ok))
        param_ptr = _pointers(table_ptr, tensor, 0, position, PARAM, False)
        value = _load(param_ptr, free, False)
        if UPDATE:
            exp_avg_ptr = _pointers(table_ptr, tensor, 2, position, EXP_AVG, False)
            exp_avg_sq_ptr = _pointers(table_ptr, tensor, 3, position, EXP_AVG_SQ, False)
            grad = _load(_pointers(table_ptr, tensor, 1, position, GRAD, False), free, False)
            exp_avg, exp_avg_sq = _load(exp_avg_ptr, free, False), _load(exp_avg_sq_ptr, free, False)
            value, exp_avg, exp_avg_sq, _ = _step(value, grad, exp_avg, exp_avg_sq, hyper)
            bits = _random_words(key0, key1, number, position)
            value = _narrowed(value, bits & 0xFFFF, PARAM)
            tl.store(param_ptr, value, mask=free)
            tl.store(exp_avg_ptr, _narrowed(exp_avg, _mix(bits + _SECOND_WORD) & 0xFFFF, EXP_AVG), mask=free)
            tl.store(exp_avg_sq_ptr, _narrowed(exp_avg_sq, bits >> 16, EXP_AVG_SQ), mask=free)
        base = _load(_pointers(table_ptr, tensor, 9, position, WEIGHT, False), free, False)
        composed_ptr = _pointers(table_ptr, tensor, 8, n * K + q * 32 + tl.arange(0, 32)[None, None, :], WEIGHT, False)
        tl.store(composed_ptr, (base + alpha * value.to(tl.float32)).to(WEIGHT), mask=free)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    numbers: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """`rigsa_kernels.adamw.adamw_` in Triton, in at most two launches."""
    adamw.check(params, grads, exp_avgs, exp_avg_sqs, scales, numbers, lr, beta1, beta2, eps, weight_decay, step)
    hyper = adamw.hyper_parameters(lr, beta1, beta2, eps, weight_decay, step)
    columns = [params, grads, exp_avgs, exp_avg_sqs, scales]
    _launch_flat(columns, [], numbers, hyper, adamw.random_key(seed, step))


def adamw_compose_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    composed: list[Tensor],
    base_values: list[Tensor],
    alphas: list[Tensor],
    patterns: list[Tensor],
    numbers: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """`rigsa_kernels.adamw.adamw_compose_` in Triton."""
    adamw.check(params, grads, exp_avgs, exp_avg_sqs, scales, numbers, lr, beta1, beta2, eps, weight_decay, step)
    adamw.check_composed(params, composed, base_values, alphas, patterns)
    hyper = adamw.hyper_parameters(lr, beta1, beta2, eps, weight_decay, step)
    key = adamw.random_key(seed, step)
    columns = [params, grads, exp_avgs, exp_avg_sqs, scales]
    weights = [composed, base_values, alphas]
    if not patterns:
        _launch_flat(columns, weights, numbers, hyper, key)
        return
    free = sum(param.numel() for param in params) / max(sum(matrix.numel() for matrix in composed), 1)
    one_pass = not scales and free >= ONE_PASS_DENSITY
    if not one_pass:
        _launch_flat(columns, [], numbers, hyper, key)
    weights += [patterns[part::3] for part in range(3)]
    _launch_packed(columns, weights, numbers, hyper, key, update=one_pass)


def update_(
    columns: list[list[Tensor]],
    addresses: list[list[int]],
    numbers: list[int],
    hyper: adamw.Hyper,
    key: tuple[int, int],
    held: dict[str, Any],
) -> None:
    """`adamw_` of tensors that have been checked, and whose addresses are known: `rigsa_kernels.launches`.

    Args:
        columns: params, grads, exp_avgs, exp_avg_sqs and scales, which may be empty.
        addresses: of the same tensors.
        numbers: as in `adamw_`.
        hyper: `adamw.hyper_parameters`.
        key: `adamw.random_key`.
        held: what the call before left, with the same tensors but for the gradients; empty at first.
    """
    device = columns[0][0].device
    stream = _stream(device)
    if not held:
        held["rows"] = _rows(columns, [], numbers, addresses)
    if held.get("for") != (addresses[1], stream):
        held["rows"][1::COLUMNS] = array("q", addresses[1])
        held["tables"] = _on_device(held["rows"].tobytes(), device, stream, True)
        held["for"] = (addresses[1], stream)
    _run_flat(held["tables"], columns, [], hyper, key)


def _launch_flat(
    columns: list[list[Tensor]],
    weights: list[list[Tensor]],
    numbers: list[int],
    hyper: adamw.Hyper,
    key: tuple[int, int],
) -> None:
    _run_flat(_tables(columns, weights, numbers, flat=True), columns, weights, hyper, key)


def _run_flat(
    tables: list[_Table],
    columns: list[list[Tensor]],
    weights: list[list[Tensor]],
    hyper: adamw.Hyper,
    key: tuple[int, int],
) -> None:
    for table, owners, grid, aligned in tables:
        with torch.cuda.device_of(table):
            adamw_flat_kernel[(grid,)](
                table, owners, hyper, *key,
                *(_TYPES[column[0].dtype] for column in columns[:4]),
                WEIGHT=_TYPES[weights[0][0].dtype] if weights else None, CHUNK=CHUNK, ALIGNED=aligned,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def _launch_packed(
    columns: list[list[Tensor]],
    weights: list[list[Tensor]],
    numbers: list[int],
    hyper: adamw.Hyper,
    key: tuple[int, int],
    *,
    update: bool,
) -> None:
    for table, owners, grid, _ in _tables(columns, weights, numbers, flat=False):
        with torch.cuda.device_of(table):
            adamw_packed_kernel[(grid,)](
                table, owners, hyper, *key,
                *(_TYPES[column[0].dtype] for column in columns[:4]),
                WEIGHT=_TYPES[weights[0][0].dtype], ROWS=ROWS, WORDS=WORDS, UPDATE=update,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
_Table = tuple[Tensor, Tensor, int, bool]
"""The rows of one launch, the number of the row that each program works on, how many programs there are, and whether
the addresses of vectors, columns 0 to 3, 8 and 9, are aligned (told of the flat kernel alone)."""


def _tables(
    columns: list[list[Tensor]], weights: list[list[Tensor]], numbers: list[int], *, flat: bool
) -> list[_Table]:
    """What each launch reads its tensors' addresses and sizes from."""
    if not numbers:
        return []
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    device = columns[0][0].device
    return _on_device(_rows(columns, weights, numbers, addresses).tobytes(), device, _stream(device), flat)


def _rows(
    columns: list[list[Tensor]], weights: list[list[Tensor]], numbers: list[int], addresses: list[list[int]]
) -> array[int]:
    """int64: a row for each tensor, the first chunk left out."""
    rows = array("q", bytes(8 * COLUMNS * len(numbers)))
    filled = dict(enumerate(addresses)) | {5: [param.numel() for param in columns[0]], 6: numbers}
    filled |= dict(enumerate(([tensor.data_ptr() for tensor in column] for column in weights), 8))
    if weights:
        filled |= {14 + at: [matrix.shape[at] for matrix in weights[0]] for at in (0, 1)}
    for at, column in filled.items():
        if column:
            rows[at::COLUMNS] = array("q", column)
    return rows


def _stream(device: torch.device) -> int:
    """A table that one stream has sent may not have arrived when another stream reads it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=64)
def _on_device(content: bytes, device: torch.device, stream: int, flat: bool) -> list[_Table]:
    """The tables of `content`, rows without the first chunk: a pure function of it, so it cannot go stale."""
    rows = torch.frombuffer(bytearray(content), dtype=torch.int64).view(-1, COLUMNS)
    counts = (rows[:, 5] + CHUNK - 1) // CHUNK if flat else (rows[:, 14] + ROWS - 1) // ROWS
    exists = rows[:, 5] > 0
    odd = (rows[:, :4] % ALIGNMENT).any(1) | (rows[:, 8:10] % ALIGNMENT).any(1) if flat else ~exists
    tables = []
    for alignment, chosen in ((True, exists & ~odd), (False, exists & odd)):
        if chosen.any():
            table, chunks = rows[chosen], counts[chosen]
            table[:, 7] = chunks.cumsum(0) - chunks
            owners = _owners(tuple(chunks.tolist()), device, stream)
            tables.append((_sent(table, device), owners, owners.numel(), alignment))
    return tables


@functools.lru_cache(maxsize=64)
def _owners(chunks: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int32: row of the table for each program."""
    del stream  # part of the key
    rows = torch.arange(len(chunks), dtype=torch.int32, device="cpu")
    return _sent(rows.repeat_interleave(torch.tensor(chunks, device="cpu")), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting: PyTorch keeps pinned memory from reuse until the copy is done."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
