"""Forward, backward and optimiser step of a whole SmolLM2: every method beside full fine-tuning of the same layers.

The loss is that of one answer token, attention is eager, weights are random, and methods with a density have 3.46 %
unless they say otherwise. PEFT trains through PyTorch's fused AdamW. The share of the roofline is that of
`benchmarks.floors`. Frozen weights stand in memory once; what a method trains is its own.
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.arena import Arena, Outcome
from benchmarks.floors import step_floor
from benchmarks.memory import extra_bytes, held_bytes, saved_bytes, tensors_of
from benchmarks.models import base_model, check_model, prompts
from benchmarks.providers import FULL, TRAINEES, share
from benchmarks.race import Contestant
from benchmarks.shapes import MODELS_AT_ONCE, STEPS, Batch
from rigsa.experiments.tasks.evaluation import training_loss


def questions(level: str) -> list[Batch]:
    return STEPS[level]


def contestant(arena: Arena, batch: Batch, name: str) -> Contestant:
    base, ids = base_model(batch, arena.device), prompts(batch, arena.device)
    trainee = TRAINEES[name](share(base))
    model, optimizer = trainee.model, trainee.optimizer

    def forward():  # type: ignore[no-untyped-def]
        return training_loss(model, {"input_ids": ids, "targets": ids[:, :1]}, len(ids))

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    check_model(trainee, base, ids)
    forward().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainee.trained)
    optimizer.step()  # makes its state
    optimizer.zero_grad()
    held = held_bytes([*tensors_of(model), *trainee.state])
    info = {"saved_bytes": saved_bytes(forward, model), "peak_bytes": held + extra_bytes(step, arena.device)}
    floor = step_floor(arena.machine, base, trainee, batch)
    return Contestant(step, least=floor, tokens=ids.numel(), info=info)


@pytest.fixture(scope="module")
def steps(arena: Arena, question: Batch) -> Outcome:
    group = (
        f"training step, SmolLM2-{question.size} with {question.layers} blocks, "
        f"{question.prompts} x {question.tokens} tokens, {question.dtype}"
    )
    builders = {name: partial(contestant, arena, question, name) for name in TRAINEES}
    return arena.race(group, FULL, builders, MODELS_AT_ONCE)


@pytest.mark.parametrize("provider", TRAINEES)
def test_step(arena, steps, provider, benchmark):
    arena.record(steps, provider, benchmark)
