"""AdamW over many tensors in one launch; `rigsa_kernels.adamw` says what it computes and why it is stored so.

The pass is bound by memory, so the kernel is built around its traffic: every value, gradient and moment is read once
and every value and moment written once, 128 bits at a time. 168 layers are one launch: a table on the device holds a
row of addresses and sizes for each tensor, and a list says which tensor a chunk of values belongs to
(`rigsa_kernels.triton_tables`).

An address in a table carries no alignment that the compiler knows, so it is promised (`multiple_of`) where the host
saw it; tensors that are not aligned to 16 bytes go into a launch of their own without the promise. A mask on an unknown
length would split the vectors too, so whole chunks run without one and the last chunk of a tensor with one.

Division and root are the rounded ones and products are not fused with sums: the stored bits are those of the PyTorch
implementation. That costs instructions, which a pass bound by memory has to spare: at most 45 a value in float32, 78 in
bfloat16 and 174 with 8-bit moments (SASS for sm_89), where an RTX 4090 can issue 1150, 570 and 410 while it moves the
bytes. With 8-bit moments an A100 (125) and an H100 (92) cannot. Measured on an H200: 0.96 of the rate of a copy in
float32, 0.32 with 8-bit moments.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adamw, triton_tables
from .triton_tables import (
    COLUMNS,
    TYPES,
    Table,
    cell,
    current_stream,
    filled,
    on_device,
    place_in_row,
    pointers,
    read,
)

ALIGNMENT = 16
CHUNK = 2048
"""Values of a program: 16 a thread, so that 8-bit codes fill 128 bits."""
NUM_WARPS = 4

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
def _chunk(table_ptr, tensor, start, left, hyper, key0, key1,
           PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
           CHUNK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """The values ``start + [0, CHUNK)``, of which the first `left` exist, as rows of one quantisation block."""
    block = tl.arange(0, CHUNK // 256)
    offs = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    ok = offs < left
    at = start + offs
    param_ptr = pointers(table_ptr, tensor, 0, at, PARAM, ALIGNED)
    grad_ptr = pointers(table_ptr, tensor, 1, at, GRAD, ALIGNED)
    exp_avg_ptr = pointers(table_ptr, tensor, 2, at, EXP_AVG, ALIGNED)
    exp_avg_sq_ptr = pointers(table_ptr, tensor, 3, at, EXP_AVG_SQ, ALIGNED)
    value, grad = _load(param_ptr, ok, FULL), _load(grad_ptr, ok, FULL)
    exp_avg, exp_avg_sq = _load(exp_avg_ptr, ok, FULL), _load(exp_avg_sq_ptr, ok, FULL)
    if exp_avg_ptr.dtype.element_ty == tl.int8:
        numel = cell(table_ptr, tensor, 5)
        scale_ptr = pointers(table_ptr, tensor, 4, start // 256 + block, tl.float32)
        scale_sq_ptr = scale_ptr + (numel + 255) // 256
        block_ok = block * 256 < left
        exp_avg *= 1.0 / 127.0
        exp_avg = exp_avg * tl.abs(exp_avg) * _load(scale_ptr, block_ok, FULL)[:, None]
        exp_avg_sq *= 1.0 / 255.0
        exp_avg_sq *= exp_avg_sq
        exp_avg_sq = exp_avg_sq * exp_avg_sq * _load(scale_sq_ptr, block_ok, FULL)[:, None]
    value, exp_avg, exp_avg_sq, root = _step(value, grad, exp_avg, exp_avg_sq, hyper)
    bits = _random_words(key0, key1, cell(table_ptr, tensor, 6), at)
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


@triton.jit(do_not_specialize=["key0", "key1"])
def adamw_kernel(table_ptr, owners_ptr, hyper, key0, key1,
                 PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
                 CHUNK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """One chunk of one tensor.

    Columns of the table: param, grad, exp_avg, exp_avg_sq, scales, numel, number in the random stream.
    """
    tensor = tl.load(owners_ptr + tl.program_id(0))
    start = place_in_row(table_ptr, tensor) * CHUNK
    left = cell(table_ptr, tensor, 5) - start
    if left >= CHUNK:
        _chunk(table_ptr, tensor, start, left, hyper, key0, key1,
               PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, CHUNK, ALIGNED, True)  # fmt: skip
    else:  # block after block: under a mask every value has an address of its own, too many for the registers at once
        for done in range(0, left, 256):
            _chunk(table_ptr, tensor, start + done, left - done, hyper, key0, key1,
                   PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, 256, ALIGNED, False)  # fmt: skip


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
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    update_(columns, addresses, numbers, hyper, adamw.random_key(seed, step), {})


MOST_KNOWN = 8
"""Tables of one set of tensors that are kept: an allocator gives gradients a few places and comes back to them."""


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
    if not numbers:
        return
    device = columns[0][0].device
    stream = current_stream(device)
    if not held:
        held["rows"] = filled([*addresses, [param.numel() for param in columns[0]], numbers])
    if held.get("for") != (addresses[1], stream):
        held["tables"] = _tables(held, addresses[1], device, stream)
        held["for"] = (addresses[1], stream)
    for table, aligned in held["tables"]:
        with torch.cuda.device_of(table.rows):
            adamw_kernel[(table.grid,)](
                table.rows, table.owners, hyper, *key,
                *(TYPES[column[0].dtype] for column in columns[:4]), CHUNK=CHUNK, ALIGNED=aligned,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def _tables(held: dict[str, Any], grads: list[int], device: torch.device, stream: int) -> list[tuple[Table, bool]]:
    """`_on_device` with other gradients. A step of a small model waits for this, so what is known is not made again."""
    key = (tuple(grads), stream)
    known = held.setdefault("known", {})
    if key in known:
        return known[key]
    if len(known) >= MOST_KNOWN:
        known.clear()
    held["rows"][1::COLUMNS] = array("q", grads)
    usual = held.get("usual", {}).get(stream)
    places = torch.frombuffer(held["rows"], dtype=torch.int64).view(-1, COLUMNS)[:, 1]
    if usual is not None and not (places % ALIGNMENT).any():
        rows = usual.rows.clone()
        rows[:, 1] = places
        known[key] = [(usual._replace(rows=triton_tables.sent(rows, device)), True)]
    else:
        content = held["rows"].tobytes()
        known[key] = tables = _on_device(content, device, stream)
        if len(tables) == 1 and tables[0][1] and tables[0][0].rows.shape[0] == len(grads):  # all aligned, none empty
            rows = read(content)
            programs = (rows[:, 5] + CHUNK - 1) // CHUNK
            rows[:, -1] = programs.cumsum(0) - programs
            held.setdefault("usual", {})[stream] = tables[0][0]._replace(rows=rows)
    return known[key]


@functools.lru_cache(maxsize=64)
def _on_device(content: bytes, device: torch.device, stream: int) -> list[tuple[Table, bool]]:
    """A table for each launch, and whether the addresses in its columns 0 to 3 are aligned.

    They are a pure function of `content`, so they cannot go stale.
    """
    rows = read(content)
    exists = rows[:, 5] > 0
    odd = (rows[:, :4] % ALIGNMENT).any(1)
    tables = []
    for aligned, chosen in ((True, exists & ~odd), (False, exists & odd)):
        if chosen.any():
            some = rows[chosen]
            tables.append((on_device(some, (some[:, 5] + CHUNK - 1) // CHUNK, device, stream), aligned))
    return tables
