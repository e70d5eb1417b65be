"""A frozen weight in four bits: NF4 as bitsandbytes stores it (QLoRA, Dettmers et al. 2023, section 3).

The ``[N, K]`` matrix is cut into blocks of 64 consecutive weights; each weight is the index of one of 16 levels, times
the block's largest magnitude. Two indices share a byte, the first in its high half. With double quantisation the
blocks' magnitudes are themselves 8-bit; they are widened to float32 once, when a layer is adapted, which costs 3/8 bit
a weight, and saves the kernels a second look-up.

A frozen weight crosses the border to the operators as a list of tensors, its *base*: ``[weight]`` for a matrix,
``[codes, absmax, levels]`` for NF4 (uint8 ``[N * K / 2]``, float32 ``[N * K / block]``, float32 ``[16]``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

RUN = 32
"""Columns that a kernel decodes at a time: all of them must lie in one block and in one row."""


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
    return [weight.data.view(torch.uint8).view(-1), _absmax(state), state.code.float()]


def _absmax(state: Any) -> Tensor:
    if not state.nested:
        return state.absmax.float()
    outer = state.state2
    scales = outer.absmax.float().repeat_interleave(outer.blocksize)[: state.absmax.numel()]
    return outer.code.float()[state.absmax.int()] * scales + state.offset


def dequantize(base: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The ``[N, K]`` matrix in `dtype`. A base that is a matrix already comes back as it is."""
    if len(base) == 1:
        return base[0].to(dtype)
    codes, absmax, levels = base
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).view(absmax.numel(), -1)
    return (levels[pairs.int()] * absmax[:, None]).to(dtype).view(shape)
