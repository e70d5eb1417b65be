"""What ``rigsa plan`` predicts for the steps that the section `steps` measures."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.questions import PLANNED, step_batch
from benchmarks.gpu_proof.setting import Setting
from benchmarks.providers import TICKET
from rigsa.experiments.config import Config
from rigsa.experiments.memory.plan import GIB, Target, plan_levels
from rigsa.experiments.model import model_shape
from rigsa.experiments.presets import PRESETS
from rigsa.experiments.tasks.task import Size


def run(setting: Setting, journal: Journal) -> None:
    for size in ("135M",) if setting.dry else ("135M", "1.7B"):
        for provider, density in PLANNED.items():
            with journal.guarded(size=size, provider=provider) as row:
                row["peak_gib"] = planned_peak(setting, size, density) / GIB


def planned_peak(setting: Setting, size: str, density: float) -> int:
    """Bytes; at level 0 values and moments in bfloat16, of a ticket in float32."""
    batch = step_batch(setting, size)
    shape = model_shape(f"HuggingFaceTB/SmolLM2-{size}")
    shape.num_hidden_layers = batch.layers
    target = Target(shape, _config(batch.prompts, density), torch.device("cuda"), Size(batch.tokens))
    plan = plan_levels(target, {0: density})
    return plan[0].peak


def _config(prompts: int, density: float) -> Config:
    dtype = "float32" if density == TICKET else "bfloat16"
    return dataclasses.replace(
        PRESETS["paper"]("imp", "cuda"), dtype="bfloat16", micro_batch_size=prompts, batch_size=prompts,
        attention="sdpa", numerics="composed", max_grad_norm=0.0, checkpointing=False,
        values_dtype=dtype, state_dtype=dtype,
    )  # fmt: skip
