"""Seconds of one training step of SmolLM2-135M: ours beside full fine-tuning of the same linear layers.

``pytest benchmarks/bench_step.py``; the number in brackets is the ratio to the fastest of the group. 16 prompts of 89
tokens, loss on the answer token, forward, backward and optimiser step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rigsa.config import quickstart
from rigsa.evaluate import answer_logits
from rigsa.masks import random_mask
from rigsa.model import load_model
from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears
from rigsa_kernels.replace import select_linears

BATCH, TOKENS = 16, 89
ALPHA = 0.1  # an open gate, so that numerics="auto" composes as it does in most of a training run


def full_fine_tuning(model: nn.Module) -> torch.optim.Optimizer:
    linears, _ = select_linears(model, "*", ())
    for linear in linears.values():
        linear.weight.requires_grad_()
    return torch.optim.AdamW([linear.weight for linear in linears.values()], fused=True)


def gated(density: float | None, **options: object) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def prepare(model: nn.Module) -> torch.optim.Optimizer:
        replace_linears(model, alpha_init=ALPHA, **options)
        for name, layer in gated_linears(model).items() if density else ():
            kept = round(density * layer.weight.numel())
            mask = random_mask(layer.pattern.shape, kept, seed=0, name=name)
            layer.set_pattern(SparsePattern.from_mask(mask))
        return MaskedAdamW(model)

    return prepare


PROVIDERS = {
    "full fine-tuning": full_fine_tuning,
    "level 0, bf16 values": gated(None, values_dtype=torch.bfloat16, numerics="composed"),
    "level 0": gated(None, numerics="composed"),
    "level 0, exact": gated(None, numerics="exact"),
    "43 %": gated(0.43, numerics="composed"),
    "3.46 %": gated(0.0346, numerics="composed"),
    "3.46 %, exact": gated(0.0346, numerics="exact"),
}


@pytest.mark.model
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step(benchmark, provider, dtype):
    model, _ = load_model(dataclasses.replace(quickstart(), dtype=dtype), torch.device("cpu"))
    optimizer = PROVIDERS[provider](model)
    ids = torch.randint(1000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    answer = ids[:, 0]

    def step() -> None:
        loss = F.cross_entropy(answer_logits(model, {"input_ids": ids}), answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    benchmark.group = f"training step, {dtype}"
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
