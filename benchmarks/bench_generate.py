"""Greedy generation with an adapted model, beside the base model."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.arena import Arena, Outcome
from benchmarks.floors import generation_floor
from benchmarks.memory import held_bytes
from benchmarks.models import base_model, check_model, prompts
from benchmarks.providers import (
    LEVEL_0,
    LORA_16,
    LORA_DEFAULT,
    MERGED,
    SHIRA,
    TICKET_NAME,
    TRAINEES,
    NoUpdate,
    Trainee,
    merge_ticket,
    share,
)
from benchmarks.race import Contestant
from benchmarks.shapes import GENERATIONS, MODELS_AT_ONCE, NEW_TOKENS, Batch
from benchmarks.targets import BASE

ADAPTED = (
    TICKET_NAME, MERGED, LEVEL_0, LORA_DEFAULT, LORA_16, SHIRA, "PEFT Super-Tuning, 3.46 %", "ours, 3.46 %, exact",
)  # fmt: skip
BUILDERS = {BASE: lambda model: Trainee(model, NoUpdate([])), **TRAINEES, MERGED: merge_ticket}


def questions(level: str) -> list[Batch]:
    return GENERATIONS[level]


def contestant(arena: Arena, batch: Batch, name: str) -> Contestant:
    base, ids = base_model(batch, arena.device), prompts(batch, arena.device)
    trainee = BUILDERS[name](share(base))
    count = NEW_TOKENS[arena.level]
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return trainee.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def check() -> None:
        check_model(trainee, base, ids)
        assert run().shape == (batch.prompts, batch.tokens + count)

    least = generation_floor(arena.machine, base, batch, count)
    moved = count * held_bytes(base.parameters())
    return Contestant(run, check, least=least, bytes=moved, tokens=batch.prompts * count)


@pytest.fixture(scope="module")
def generations(arena: Arena, question: Batch) -> Outcome:
    group = (
        f"generation of {NEW_TOKENS[arena.level]} tokens, SmolLM2-{question.size} with {question.layers} blocks, "
        f"{question.prompts} x {question.tokens} tokens before, {question.dtype}"
    )
    builders = {name: partial(contestant, arena, question, name) for name in (BASE, *ADAPTED)}
    return arena.race(group, BASE, builders, MODELS_AT_ONCE)


@pytest.mark.parametrize("provider", [BASE, *ADAPTED])
def test_generate(arena, generations, provider, benchmark):
    arena.record(generations, provider, benchmark)
