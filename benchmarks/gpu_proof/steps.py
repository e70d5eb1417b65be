"""A whole training step of SmolLM2 by every method: its wall clock, the host's share of it, and peak memory.

Each contestant has a model of its own, made anew: a ticket may hold its difference inside the base's weights. Models
are random; attention is PyTorch's own (sdpa); the loss is that of one answer token.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.questions import STEPPING, Build, model_of, step_batch
from benchmarks.gpu_proof.setting import Setting
from benchmarks.models import check_model, prompts
from benchmarks.providers import FULL, TICKET_NAME, Trainee
from benchmarks.shapes import Batch
from rigsa.experiments.tasks.evaluation import training_loss

GIB = 2**30
REPEATS = 8
WITH_PROFILE = 15.0
"""Seconds that a profile needs."""
CHECKED = ("135M",)
"""Sizes whose loss is held against float32 before they are timed; of the others the gradients alone are looked at."""


def run(setting: Setting, journal: Journal, size: str) -> None:
    race(setting, journal, size, STEPPING)
    for name in (TICKET_NAME, FULL):
        if setting.left > WITH_PROFILE and not setting.dry:
            with journal.guarded(size=size, provider=name, profiled=True):
                _profile(setting, size, name)


def race(setting: Setting, journal: Journal, size: str, builders: dict[str, Build], **fields: Any) -> None:
    """One after the other, a row for each."""
    batch = step_batch(setting, size)
    journal.note(tokens=batch.prompts * batch.tokens, size=size)
    for name, build in builders.items():
        with journal.guarded(size=size, provider=name, **fields) as row:
            row |= measure(setting, batch, build)
        gc.collect()  # modules, hooks and optimisers refer to each other in circles


def measure(setting: Setting, batch: Batch, build: Build) -> dict[str, float]:
    """Milliseconds of a step, of the host alone, of the first step, which compiles; GiB at the peak."""
    before = 0
    if not setting.dry:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()  # PEFT's SHiRA leaves memory behind, which is not the next one's
    ids = prompts(batch, setting.device)
    trainee = build(model_of(setting, batch))
    if batch.size in CHECKED:
        check_model(trainee, model_of(setting, batch), ids)
    step = stepper(trainee, ids)
    first = _timed(step, setting)[0]
    step()
    if not setting.dry:
        torch.cuda.reset_peak_memory_stats()
    walls, hosts = zip(*(_timed(step, setting) for _ in range(1 if setting.dry else REPEATS)), strict=True)
    peak = {} if setting.dry else {"peak_gib": (torch.cuda.max_memory_allocated() - before) / GIB}
    _check_finite(trainee.trained)
    seconds = {"step_ms": statistics.median(walls), "host_ms": statistics.median(hosts), "first_step_ms": first}
    return {name: value * 1e3 for name, value in seconds.items()} | peak


def stepper(trainee: Trainee, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        training_loss(trainee.model, {"input_ids": ids, "targets": ids[:, :1]}, len(ids)).backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], setting: Setting) -> tuple[float, float]:
    """Seconds until the device has finished, and until the host has."""
    setting.synchronize()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    setting.synchronize()
    return time.perf_counter() - start, host


def _check_finite(parameters: Iterable[torch.Tensor]) -> None:
    broken = sum(not bool(parameter.isfinite().all()) for parameter in parameters)
    if broken:
        raise ArithmeticError(f"{broken} trained parameters are not finite after these steps")


def _profile(setting: Setting, size: str, name: str) -> None:
    """Where the device's time goes, by kernel, into FOLDER/profile_SIZE_NAME.txt."""
    from torch.profiler import ProfilerActivity, profile

    batch = step_batch(setting, size)
    step = stepper(STEPPING[name](model_of(setting, batch)), prompts(batch, setting.device))
    step()
    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step()
        setting.synchronize()
    table = recorded.key_averages().table(sort_by="self_device_time_total", row_limit=40)
    (setting.out / f"profile_{size}_{name.split(',')[0].replace(' ', '_')}.txt").write_text(table)
