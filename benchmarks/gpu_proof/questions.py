"""The steps and generations that are measured, and who takes part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.gpu_proof.setting import Setting
from benchmarks.models import make_model
from benchmarks.providers import (
    COLUMNS,
    FROZEN,
    FULL,
    LEVEL_0,
    LEVEL_0_HALF,
    LORA_16,
    ROWS,
    SHIRA,
    TICKET,
    TICKET_NAME,
    TILES_32,
    TRAINEES,
    Trainee,
    tune_gated,
)
from benchmarks.shapes import Batch

BLOCKS = {"135M": 30, "1.7B": 24}
PROMPTS = {"135M": (16, 93), "1.7B": (4, 860)}
"""Prompts a step and tokens a prompt: digits of 8x8 pixels, and of 28x28."""
DRY_VOCABULARY = 1024
NEW_TOKENS = {"135M": 32, "1.7B": 24}

STEPPED = (FULL, TICKET_NAME, FROZEN, LORA_16, ROWS, TILES_32, SHIRA, COLUMNS, LEVEL_0_HALF, LEVEL_0)

Build = Callable[[nn.Module], Trainee]
STEPPING: dict[str, Build] = {
    **{name: TRAINEES[name] for name in STEPPED},
    "ours, 3.46 %, auto": partial(tune_gated, density=TICKET, numerics="auto"),
    "ours, 3.46 %, exact": TRAINEES["ours, 3.46 %, exact"],
    "ours, 3.46 %, fused kernels": partial(tune_gated, density=TICKET, numerics="composed", force="fused"),
    "ours, level 0, bf16 values, fused kernels": partial(
        tune_gated, numerics="composed", force="fused", values_dtype=torch.bfloat16
    ),
}
"""The most telling first: a section may be cut off."""
PLANNED = {TICKET_NAME: TICKET, LEVEL_0_HALF: 1.0}
"""Density of those that `rigsa plan` knows."""


def step_batch(setting: Setting, size: str) -> Batch:
    if setting.dry:
        return Batch("135M", 1, 2, 16, "bfloat16")
    return Batch(size, BLOCKS[size], *PROMPTS[size], "bfloat16")


def model_of(setting: Setting, batch: Batch) -> nn.Module:
    """A new one; in a dry run with a small vocabulary."""
    changes = {"vocab_size": DRY_VOCABULARY} if setting.dry else {}
    return make_model(batch, setting.device, "sdpa", **changes)


def generation_batch(setting: Setting, size: str) -> Batch:
    return Batch("135M", 2, 1, 16, "bfloat16") if setting.dry else Batch(size, BLOCKS[size], 1, 89, "bfloat16")
