"""A frozen weight in four bits: NF4 as bitsandbytes stores it (QLoRA, Dettmers et al. 2023, section 3).

The ``[N, K]`` matrix is cut into blocks of 64 consecutive weights; each weight is the index of one of 16 levels, times
the block's largest magnitude. Two indices share a byte, the first in its high half. With double quantisation the
blocks' magnitudes are themselves 8-bit; they are widened to float32 once, when a layer is adapted, which costs 3/8 bit
a weight, and saves the kernels a second look-up.

A frozen weight crosses the border to the operators as a list of tensors, its *base*: ``[weight]`` for a matrix,
``[codes, absmax, levels]`` for NF4 (uint8 ``[N * K / 2]``, float32 ``[N * K / block]``, float32 ``[16]``). The block is
always a divisor of N * K: where the last of bitsandbytes' blocks is a partial one, the base has smaller blocks, which
share its magnitudes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

RUN = 32
"""Columns that a kernel decodes at a time: all of them must lie in one block and in one row."""
CPU_ROWS = 32
"""Rows that bitsandbytes interleaves where it reorders a layer for a CPU."""
SCALES = "weight."
"""Prefix of the names under which bitsandbytes saves a weight's scales beside its codes."""

BASE_NAMES = ("weight", "absmax", "levels")


def num_weights(base: list[Tensor]) -> int:
    """N * K: NF4 holds two weights a byte."""
    return base[0].numel() * (1 if len(base) == 1 else 2)


def is_nf4_linear(module: nn.Module) -> bool:
    """A bitsandbytes ``Linear4bit`` that is already quantised, to NF4."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return isinstance(module, nn.Linear) and getattr(state, "quant_type", None) == "nf4"


def nf4_base(weight: Tensor) -> list[Tensor]:
    """``[codes, absmax, levels]`` of a quantised layer's weight; the codes are shared, not copied.

    A weight that bitsandbytes reordered for its own products on a CPU is put back in order first (`restore_order`).

    Raises:
        ValueError: its shape or block size is one that the kernels cannot decode.
    """
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    _, in_features = state.shape
    if in_features % RUN or state.blocksize % RUN:
        raise ValueError(
            f"weight: expected an NF4 weight whose in_features and block size are multiples of {RUN}, "
            f"got {in_features} and {state.blocksize}"
        )
    restore_order(weight)
    numbers = math.prod(state.shape)
    block = math.gcd(numbers, state.blocksize)
    absmax = _absmax(state)
    if block < state.blocksize:
        absmax = absmax.repeat_interleave(state.blocksize // block)[: numbers // block]
    return [weight.data.view(torch.uint8).view(-1), absmax, state.code.float()]


def _absmax(state: Any) -> Tensor:
    if not state.nested:
        return state.absmax.float()
    outer = state.state2
    scales = outer.absmax.float().repeat_interleave(outer.blocksize)[: state.absmax.numel()]
    return outer.code.float()[state.absmax.int()] * scales + state.offset


@torch.no_grad()
def restore_order(weight: Tensor) -> None:
    """Put the codes and scales of a reordered NF4 weight back in the order of the matrix, in place.

    On a CPU that multiplies bfloat16, bitsandbytes reorders a layer at its first pass outside training: 32 rows are
    interleaved, and the scales are rounded to bfloat16 and transposed, which its `quant_state` notes as
    ``packing_format_for_cpu``. The rounding cannot be undone; it is part of what the base model computes from then on.
    bitsandbytes reorders the layer again when it needs to. Nothing happens to a weight that is in order.
    """
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    if not getattr(state, "packing_format_for_cpu", False):
        return
    out_features, in_features = state.shape
    bytes_of_a_column = weight.data.view(out_features // CPU_ROWS, in_features // 2, CPU_ROWS)
    # A byte's two codes stand CPU_ROWS apart in a line of 64, in which the two of one matrix row are neighbours.
    interleaved = torch.cat([bytes_of_a_column & 15, bytes_of_a_column >> 4], dim=-1)
    pairs = interleaved.view(out_features // CPU_ROWS, in_features // 2, CPU_ROWS, 2).transpose(1, 2)
    codes = (pairs[..., 0] << 4) | pairs[..., 1]
    storage = getattr(state, "original_storage_type", torch.uint8)
    weight.data = codes.contiguous().view(-1).view(storage).view(-1, 1)
    state.absmax = state.absmax.t().reshape(-1).float()
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False


def scales_of(weight: Tensor) -> dict[str, Tensor]:
    """What a state dict holds of an NF4 weight beside its codes, by the names that bitsandbytes gives (`SCALES`)."""
    restore_order(weight)
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    # Copies: layers may share their levels, and safetensors takes no tensor twice.
    return {f"{SCALES}{name}": tensor.detach().clone() for name, tensor in state.as_dict(packed=True).items()}


def load_scales(weight: Tensor, scales: dict[str, Tensor]) -> None:
    """Give an NF4 weight the scales that `scales_of` returned of another one; the codes are loaded apart.

    Args:
        weight: is put in order first.
        scales: name to tensor; they are copied.

    Raises:
        ValueError: a scale is missing, or they are of a weight of another shape, block size, dtype or kind, or not
                finite. `weight` is unchanged then.
    """
    restore_order(weight)
    state: Any = weight.quant_state  # type: ignore[attr-defined]
    given = {name.removeprefix(SCALES): tensor.clone() for name, tensor in scales.items()}
    try:
        loaded = type(state).from_dict(given, weight.device)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weight: expected the scales of an NF4 weight, got {', '.join(scales)}: {error!r}") from error
    wanted, got = ((one.quant_type, tuple(one.shape), one.blocksize, one.dtype) for one in (state, loaded))
    blocks = -(-math.prod(state.shape) // state.blocksize)
    if wanted != got or loaded.absmax.numel() != blocks or loaded.code.numel() != state.code.numel():
        raise ValueError(
            f"weight: expected scales of kind, shape, block size and dtype {wanted} with {blocks} blocks, "
            f"got {got} with {loaded.absmax.numel()}"
        )
    if not _absmax(loaded).isfinite().all() or not loaded.code.isfinite().all():
        raise ValueError("weight: expected finite scales of an NF4 weight")
    weight.quant_state = loaded  # type: ignore[attr-defined]


def dequantize(base: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The ``[N, K]`` matrix in `dtype`. A base that is a matrix already comes back as it is."""
    if len(base) == 1:
        return base[0].to(dtype)
    codes, absmax, levels = base
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).view(absmax.numel(), -1)
    return (levels[pairs.int()] * absmax[:, None]).to(dtype).view(shape)
