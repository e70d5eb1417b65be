"""A memory plan as a text to read and as a record for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rigsa.experiments.memory.live_memory import PARTS, Growth
from rigsa.experiments.memory.plan import (
    GIB,
    RESERVE,
    Choice,
    LevelPlan,
    Target,
    choices,
    plan_choosing,
    plan_levels,
    plan_test,
    usable,
)


def memory_report(target: Target, densities: Mapping[int, float], memory: float) -> tuple[str, dict[str, Any]]:
    """What every level needs, and the largest micro-batch of the densest and of the sparsest under every choice.

    Args:
        target: what is planned for.
        densities: of the levels, by their numbers.
        memory: bytes of the device, reserve included.

    Returns:
        The text and the record.
    """
    limit = usable(memory)
    levels = plan_levels(target, densities)
    test_peak = plan_test(target, max(densities.values()))
    choosing_peak = plan_choosing(target)
    ends = {level: densities[level] for level in sorted({min(densities), max(densities)})}
    found = list(choices(target, ends))
    record = {
        "model": target.config.model,
        "device": target.device.type,
        "tokens": target.size.tokens,
        "memory_bytes": round(memory),
        "usable_bytes": round(limit),
        "levels": [_level_record(target, plan, limit) for plan in levels],
        "test_peak_bytes": test_peak,
        "choosing_peak_bytes": choosing_peak,
        "largest_micro_batch": [
            _choice_record(choice, level, growth, limit) for choice in found for level, growth in choice.growth.items()
        ],
    }
    lines = [
        *_assumptions(target, memory),
        "",
        f"Training as configured; GiB at each level's peak, and whether it fits in {_gib(limit)}:",
        *_table([_LEVEL_COLUMNS, *(_level_row(target, plan, limit) for plan in levels)]),
        *(
            [f"Choosing the mask: {_gib(choosing_peak)} GiB; fits: {_yes(choosing_peak <= limit)}"]
            if choosing_peak
            else []
        ),
        _test_line(target, test_peak, limit),
        "",
        f"Largest micro-batch that fits, and the GiB it takes ({target.size.tokens} tokens a prompt):",
        *_table([_choice_columns(ends), *(_choice_row(choice, limit) for choice in found)]),
    ]
    return "\n".join(lines), record


def _assumptions(target: Target, memory: float) -> list[str]:
    config, on_gpu = target.config, target.device.type == "cuda"
    how = "a GPU (planned, not measured on one)" if on_gpu else "a CPU (planned)"
    beyond = "the CUDA context (about 0.5 GB), cuBLAS's workspace" if on_gpu else "the program itself"
    step = "updates in the backward pass" if config.step_in_backward else f"{config.batch_size} prompts a step"
    numbers = f"{config.dtype}, values in {config.values_dtype}, {config.attention} attention"
    return [
        f"{config.model} on {how}: {numbers}, {step}",
        f"{_gib(memory)} GiB, of which {RESERVE:.0%} stay free for what a plan does not count: {beyond}, fragmentation",
    ]


_LEVEL_COLUMNS = ["level", "density", "micro-batch", "checkpointing", "moments", "base", *PARTS, "peak", "fits"]


def _level_row(target: Target, plan: LevelPlan, limit: float) -> list[str]:
    config = target.config
    options = [str(config.micro_batch_size), _yes(config.checkpointing), config.state_dtype, _base(config.quantize)]
    sizes = [_gib(size) for size in (*plan.parts.values(), plan.peak)]
    return [str(plan.level), f"{plan.density:.2%}", *options, *sizes, _yes(plan.peak <= limit)]


def _level_record(target: Target, plan: LevelPlan, limit: float) -> dict[str, Any]:
    options = ("micro_batch_size", "checkpointing", "state_dtype", "quantize", "step_in_backward")
    return {
        "level": plan.level,
        "density": plan.density,
        **{name: getattr(target.config, name) for name in options},
        "bytes": plan.parts,
        "peak_bytes": plan.peak,
        "fits": plan.peak <= limit,
    }


def _test_line(target: Target, peak: int, limit: float) -> str:
    config = target.config
    shown = 0 if config.is_text else max(config.shots)
    prompts = f"{config.eval_batch_size} prompts of about {target.size.tokens * (1 + shown):,} tokens"
    return f"Testing, {prompts} at a time: {_gib(peak)} GiB; fits: {_yes(peak <= limit)}"


def _choice_columns(densities: Mapping[int, float]) -> list[str]:
    levels = [f"level {level} ({density:.2%})" for level, density in densities.items()]
    return ["checkpointing", "moments", "base", *levels]


def _choice_row(choice: Choice, limit: float) -> list[str]:
    options = [_yes(choice.checkpointing), choice.state_dtype, _base(choice.quantize)]
    return [*options, *(_largest(growth, limit) for growth in choice.growth.values())]


def _largest(growth: Growth, limit: float) -> str:
    size = growth.largest(limit)
    return f"{size} ({_gib(growth.at(size).peak)})" if size else f"none (1 takes {_gib(growth.at(1).peak)})"


def _choice_record(choice: Choice, level: int, growth: Growth, limit: float) -> dict[str, Any]:
    size = growth.largest(limit)
    return {
        "level": level,
        "checkpointing": choice.checkpointing,
        "state_dtype": choice.state_dtype,
        "quantize": choice.quantize,
        "micro_batch_size": size,
        "peak_bytes": growth.at(size).peak if size else None,
    }


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _base(quantize: str) -> str:
    return "NF4" if quantize == "nf4" else "as it is"
