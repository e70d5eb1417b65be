"""AdamW over many tensors in one pass: the operator, and what it computes, in plain PyTorch.

For every value p with gradient g, at step t, in float32 and in this order of operations::

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    p = (1 - lr * weight_decay) * p - lr / (1 - beta1**t) * (m / (sqrt(v) / sqrt(1 - beta2**t) + eps))

(Loshchilov & Hutter 2019; the factors without a tensor are computed in float64 and rounded once.) What is stored is
narrower than what is computed, and rounding to nearest would lose the small steps: at beta2 = 0.999 a second moment
moves by at most 0.1 % a step towards a smaller one, half a bfloat16 ulp is 0.2 to 0.4 %, so it would never fall. So:

- bfloat16 parameters and moments are rounded stochastically: 16 random bits are added below the ones that stay.
- 8-bit moments are codes with one float32 scale for every 256 values, the largest magnitude among them (block-wise:
  Dettmers et al. 2022): of a first moment an int8 ``127 * sign * sqrt(|m| / scale)``, of a second one a uint8
  ``255 * (v / scale)**(1/4)``. Both are rounded stochastically such that the *decoded* value is right on average, and a
  second moment never to zero while it is positive: it divides. To nearest, a first moment below 0.6 % of its scale
  would stay where it is when its gradient ends, the second moment would fall, and the value run away.

Random bits are a hash of (seed, step, the tensor's number, the value's index), so a run repeats to the bit, however
the tensors are cut into launches. Two rounds of a 32-bit finaliser take 15 instructions a value (SASS for sm_89);
Philox, which the initial values come from, takes 50.

Every operation is a correctly rounded one, applied in the order written here, so the Triton kernels store these bits
too (`rigsa_kernels.triton_adamw`; checked in the interpreter and on an H200).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .format import carry
from .library import define

QUANT_BLOCK = 256
"""Values that share a scale in 8-bit moments."""
EXP_AVG_CODE_MAX = 127
EXP_AVG_SQ_CODE_MAX = 255
SMALLEST_SCALE = 2.0**-126
"""A block's scale is divided by; below the smallest normal number its inverse would overflow."""
MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Of the 32-bit finaliser ``lowbias32`` (Wellons, "Prospecting for hash functions", 2018)."""
SECOND_WORD = 0x9E3779B9
"""Added to a value's random word to make another one from it."""
_CHUNK = 1 << 16
"""Values updated at a time, which stay in the cache between operations: a power of two, QUANT_BLOCK to 2**16."""

Hyper = tuple[float, float, float, float, float, float, float, float]


def hyper_parameters(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Hyper:
    """What the update multiplies by: (decay, step_size, beta1, 1 - beta1, beta2, 1 - beta2, inverse_root, eps)."""
    decay = 1.0 - lr * weight_decay
    step_size = lr / (1.0 - beta1**step)
    inverse_root = 1.0 / math.sqrt(1.0 - beta2**step)
    return decay, step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, inverse_root, eps


def random_key(seed: int, step: int) -> tuple[int, int]:
    """Two 32-bit words, signed as Triton passes them, that differ for every seed and step."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True)


def num_blocks(count: int) -> int:
    """Scales that `count` 8-bit values need."""
    return -(-count // QUANT_BLOCK)


@torch.no_grad()
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
    """One step, in place.

    Args:
        params: float32 or bfloat16, any shapes, contiguous (float64 too on a CPU, computed in float64).
        grads: of the same shapes; float32 or bfloat16.
        exp_avgs, exp_avg_sqs: of the same shapes; both float32, both bfloat16, or int8 and uint8.
        scales: float32 ``[2, ceil(numel / 256)]`` each, first those of exp_avg, where moments are 8-bit; else empty.
        numbers: of the tensors in the random stream.
        step: from 1.
        seed: of the random stream, any integer of 64 bits.

    Each list holds tensors of one dtype on one device.

    Raises:
        ValueError: an argument that does not fit; raised before anything is changed.
    """
    check(params, grads, exp_avgs, exp_avg_sqs, scales, numbers, lr, beta1, beta2, eps, weight_decay, step)
    hyper, key = hyper_parameters(lr, beta1, beta2, eps, weight_decay, step), random_key(seed, step)
    for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        scale = scales[index] if scales else None
        flat = [tensor.view(-1) for tensor in tensors]
        words: Iterable[Tensor] = itertools.repeat(torch.empty(0))  # none, where nothing is rounded
        if any(tensor.dtype in (torch.bfloat16, torch.uint8) for tensor in (flat[0], flat[3])):
            words = random_words(key, numbers[index], flat[0])
        for start, chunk_words in zip(range(0, flat[0].numel(), _CHUNK), words, strict=False):
            _update([tensor[start : start + _CHUNK] for tensor in flat], scale, start, hyper, chunk_words)


def random_words(key: tuple[int, int], number: int, like: Tensor) -> Iterator[Tensor]:
    """int32 holding uint32, chunk by chunk: a random word for every value that `like` holds.

    The word of the value at `index` is ``mix(mix(index ^ mix(number ^ key[0])) ^ key[1])``. An index is the chunk's
    start ^ a place in it, and a mix begins with an xor-shift by 16 bits, which is linear and leaves a place, below
    2**16, as it is: so the start takes it for the whole chunk.
    """
    first, second = key
    stream = int(mix(torch.tensor([_signed(number) ^ first], dtype=torch.int32)))
    places = torch.arange(min(like.numel(), _CHUNK), dtype=torch.int32, device=like.device)
    for start in range(0, like.numel(), _CHUNK):
        shared = _signed(start) ^ stream
        shared ^= (shared >> 16) & 0xFFFF
        yield mix(_mix_on(places[: like.numel() - start] ^ shared).bitwise_xor_(second))


def _signed(word: int) -> int:
    """The int32 with the same low 32 bits."""
    return (word + 2**31) % 2**32 - 2**31


def mix(words: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit in changes about half of those that come out.

    int32 throughout, as PyTorch has no arithmetic of uint32; products wrap.
    """
    return _mix_on(words ^ _shifted(words, 16))


def _mix_on(words: Tensor) -> Tensor:
    """A mix from its first product on; in place."""
    words.mul_(_signed(MIX_MULTIPLIERS[0]))
    words.bitwise_xor_(_shifted(words, 15)).mul_(_signed(MIX_MULTIPLIERS[1]))
    return words.bitwise_xor_(_shifted(words, 16))


def _shifted(words: Tensor, by: int) -> Tensor:
    """``words >> by`` of uint32: a mask undoes what the shift of int32 drags in."""
    return (words >> by).bitwise_and_((1 << (32 - by)) - 1)


def stochastic_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: up in magnitude with the probability that makes the mean right.

    `bits` are int32, 0 to 2**16 - 1, and used up. A NaN is passed by: a carry through its bits could make a zero of it.
    """
    rounded = bits.add_(x.float().view(torch.int32)).bitwise_right_shift_(16)
    if math.isnan(x.amax()):  # the largest is one where any is, and takes an eighth of the time of asking each
        rounded.masked_fill_(x.isnan(), 0x7FC0)
    return rounded.to(torch.int16).view(torch.bfloat16)  # the low 16 bits: PyTorch's integer casts wrap


def rounded_root(x: Tensor) -> Tensor:
    """The correctly rounded root of float32: PyTorch's own on a CPU is off by one ulp for 0.6 % of numbers."""
    return x.to(torch.float64, copy=True).sqrt_().to(x.dtype)


def _update(part: list[Tensor], scale: Tensor | None, start: int, hyper: Hyper, words: Tensor) -> None:
    """The formulas at the top of this file, for the values of one chunk, from `start` on.

    What is stored in the dtype of the arithmetic is updated where it lies. Every call rounds once: ``addcmul_``, or
    ``add_`` with an alpha, contracts two roundings to one on some machines and in some lanes.
    """
    value, grad, exp_avg, exp_avg_sq = part
    dtype = torch.promote_types(value.dtype, torch.float32)
    decay, step_size, beta1, rest1, beta2, rest2, inverse_root, eps = hyper
    blocks = _blocks_from(start, value)
    p, g = value.to(dtype), grad.to(dtype)
    if scale is None:
        m, v = exp_avg.to(dtype), exp_avg_sq.to(dtype)
    else:
        m, v = decode_exp_avg(exp_avg, scale[0, blocks]), decode_exp_avg_sq(exp_avg_sq, scale[1, blocks])
    # Decoded moments are float32; beside float64 parameters they become float64 here.
    m = m.mul_(beta1).to(dtype).add_(rest1 * g)
    v = v.mul_(beta2).to(dtype).add_((g * g).mul_(rest2))
    root = rounded_root(v)
    change = m / (root * inverse_root).add_(eps)
    p.mul_(decay).sub_(change.mul_(step_size))
    _store(value, p, lambda: words & 0xFFFF)
    if scale is None:
        _store(exp_avg, m, lambda: mix(words + _signed(SECOND_WORD)).bitwise_and_(0xFFFF))
        _store(exp_avg_sq, v, lambda: _shifted(words, 16))
    else:
        encode_exp_avg(m, mix(words + _signed(SECOND_WORD)).bitwise_and_(0xFFFF), exp_avg, scale[0, blocks])
        encode_exp_avg_sq(v, root, _shifted(words, 16), exp_avg_sq, scale[1, blocks])


def _store(target: Tensor, x: Tensor, bits: Callable[[], Tensor]) -> None:
    """Bits are made where they are needed; a tensor copied to itself is left alone."""
    target.copy_(stochastic_bfloat16(x, bits()) if target.dtype == torch.bfloat16 else x)


def move_codes(
    exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor, places: Tensor, number: int, step: int, seed: int
) -> None:
    """8-bit moments, flat, of entries that have changed `places` (`format.carry`): decoded and coded anew, in place.

    `number`, `step` and `seed` are those of the step before (`adamw_`), from which random bits are left.
    """
    m = carry(decode_exp_avg(exp_avg, scales[0]), places)
    v = carry(decode_exp_avg_sq(exp_avg_sq, scales[1]), places)
    words = random_words(random_key(seed, step), number, v)
    for start, chunk_words in zip(range(0, v.numel(), _CHUNK), words, strict=True):
        parts = (tensor[start : start + _CHUNK] for tensor in (m, v, exp_avg, exp_avg_sq))
        m_part, v_part, codes, codes_sq = parts
        blocks = _blocks_from(start, m_part)
        third = mix(mix(chunk_words + _signed(SECOND_WORD)) + _signed(SECOND_WORD))
        encode_exp_avg(m_part, third & 0xFFFF, codes, scales[0, blocks])
        encode_exp_avg_sq(v_part, rounded_root(v_part), _shifted(third, 16), codes_sq, scales[1, blocks])


def decode_exp_avg(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 first moments from int8 codes and the scales of their blocks."""
    root = _in_blocks(codes).float().mul_(1.0 / EXP_AVG_CODE_MAX)
    return root.mul_(root.abs()).mul_(scale.unsqueeze(1)).view(-1)[: codes.numel()]


def decode_exp_avg_sq(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 second moments from uint8 codes and the scales of their blocks."""
    root = _in_blocks(codes).float().mul_(1.0 / EXP_AVG_SQ_CODE_MAX)
    square = root.mul_(root)
    return square.mul_(square).mul_(scale.unsqueeze(1)).view(-1)[: codes.numel()]


def encode_exp_avg(exp_avg: Tensor, bits: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Writes codes and scales; up or down with the probability that makes the decoded value right on average."""
    ratio, bits = _in_blocks(exp_avg.abs()), _in_blocks(bits)
    scale.copy_(ratio.amax(1))
    ratio.mul_(_inverse(scale))
    code = rounded_root(ratio).mul_(EXP_AVG_CODE_MAX).clamp_max_(EXP_AVG_CODE_MAX - 1.0).floor_()
    gap = (code + code).add_(1.0)  # (code + 1)**2 - code**2
    above = ratio.mul_(float(EXP_AVG_CODE_MAX**2)).sub_(code * code)
    code.add_(bits.to(gap.dtype).mul_(2.0**-16).mul_(gap).lt_(above))  # in place, a comparison gives 0.0 and 1.0
    codes.copy_(code.view(-1)[: codes.numel()].copysign_(exp_avg))


def encode_exp_avg_sq(exp_avg_sq: Tensor, root: Tensor, bits: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Writes codes and scales; up or down with the probability that makes the decoded value right on average.

    `root` is the root of exp_avg_sq, which the update has at hand.
    """
    exp_avg_sq, root, bits = _in_blocks(exp_avg_sq), _in_blocks(root), _in_blocks(bits)
    scale.copy_(exp_avg_sq.amax(1))
    inverse = _inverse(scale)
    code = rounded_root(root * rounded_root(inverse)).mul_(EXP_AVG_SQ_CODE_MAX)
    code.clamp_max_(EXP_AVG_SQ_CODE_MAX - 1.0).floor_()
    square, odd = code * code, (code + code).add_(1.0)
    gap = (square + square).add_(odd).mul_(odd)  # (code + 1)**4 - code**4
    above = (exp_avg_sq * inverse).mul_(float(EXP_AVG_SQ_CODE_MAX**4)).sub_(square.mul_(square))
    code.add_(bits.to(gap.dtype).mul_(2.0**-16).mul_(gap).lt_(above))  # in place, a comparison gives 0.0 and 1.0
    codes.copy_(code.clamp_min_(exp_avg_sq.sign()).view(-1)[: codes.numel()])


def _in_blocks(x: Tensor) -> Tensor:
    """``[blocks, QUANT_BLOCK]``: `x`, or where its last block is not full a copy, filled up with zeros."""
    missing = -x.numel() % QUANT_BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, QUANT_BLOCK)


def _blocks_from(start: int, part: Tensor) -> slice:
    """The blocks of `part`, which begins at the value `start`."""
    return slice(start // QUANT_BLOCK, num_blocks(start + part.numel()))


def _inverse(scale: Tensor) -> Tensor:
    return 1.0 / scale.clamp_min(SMALLEST_SCALE).unsqueeze(1)


def check_options(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Raises ValueError for an option of AdamW out of range."""
    if isinstance(lr, Tensor) or not 0.0 <= lr < math.inf:
        raise ValueError(f"lr: expected a number of at least 0 (not a tensor), got {lr}")
    for index, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas: expected at least 0 and below 1, got {beta} at index {index}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")


def check(
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
) -> None:
    """Raises ValueError where the arguments of `adamw_` do not fit together."""
    check_options(lr, beta1, beta2, eps, weight_decay)
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "numbers": numbers}
    if exp_avgs and exp_avgs[0].dtype == torch.int8:
        lists["scales"] = scales
    elif scales:
        raise ValueError(f"scales: expected none beside moments of {exp_avgs[0].dtype if exp_avgs else None}")
    for name, values in lists.items():
        if len(values) != len(params):  # type: ignore[arg-type]
            raise ValueError(f"{name}: expected {len(params)} entries, as many as params, got {len(values)}")  # type: ignore[arg-type]
    if not params:
        return
    _check_dtypes(params, grads, exp_avgs, exp_avg_sqs)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_like(name, tensors, params)
    for index, (param, scale) in enumerate(zip(params, scales, strict=False)):
        wanted = (2, num_blocks(param.numel()))
        if tuple(scale.shape) != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
            got = f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"scales[{index}]: expected contiguous float32 {list(wanted)}, got {got}")


def _check_dtypes(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> None:
    dtype = params[0].dtype
    wide = (torch.float64,) if dtype == torch.float64 and params[0].device.type == "cpu" else ()
    if dtype not in (torch.float32, torch.bfloat16, *wide):
        raise ValueError(f"params: expected float32 or bfloat16 (float64 on a CPU), got {dtype} on {params[0].device}")
    if grads[0].dtype not in (torch.float32, torch.bfloat16, *wide):
        raise ValueError(f"grads: expected float32 or bfloat16, got {grads[0].dtype}")
    moments = exp_avgs[0].dtype, exp_avg_sqs[0].dtype
    same = [(kind, kind) for kind in (torch.float32, torch.bfloat16, *wide)]
    if moments not in (*same, (torch.int8, torch.uint8)):
        raise ValueError(
            f"exp_avgs, exp_avg_sqs: expected both float32, both bfloat16, or int8 and uint8, got {moments}"
        )
    for name, tensors in (("params", params), ("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            raise ValueError(f"{name}: expected one dtype, got {sorted({str(tensor.dtype) for tensor in tensors})}")


def _check_like(name: str, tensors: list[Tensor], params: list[Tensor]) -> None:
    device = params[0].device
    for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.layout != torch.strided or not (tensor.is_contiguous() and param.is_contiguous()):
            raise ValueError(f"{name}[{index}]: expected it and its parameter dense and contiguous")
        if tensor.shape != param.shape:
            raise ValueError(f"{name}[{index}]: expected {list(param.shape)}, got {list(tensor.shape)}")
        if tensor.device != device or param.device != device:
            raise ValueError(f"{name}[{index}]: expected {device} for all tensors, got {tensor.device}, {param.device}")


define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] scales, "
    "int[] numbers, float lr, float beta1, float beta2, float eps, float weight_decay, int step, int seed) -> ()",
    adamw_,
    "triton_adamw.adamw_",
    lambda *args: None,
)
