"""Says in a few lines what a run is about to do and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

from rigsa.experiments.config import Config
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.hardware import has_bfloat16_products
from rigsa.experiments.memory.plan import GIB, LevelPlan
from rigsa.experiments.train import steps_per_level
from rigsa_kernels.selection import adaptable


def describe(experiment: Experiment, plans: Sequence[LevelPlan]) -> str:
    """Model, data, adapter, schedule and memory (that of the level that needs most), one line each."""
    config, unit = experiment.config, "examples" if experiment.config.is_text else "prompts"
    adapted = len(adaptable(experiment.model, config.included, config.excluded))
    steps = steps_per_level(config, experiment.task.num_training)
    lines = {
        "model": f"{config.model}, {config.dtype} on {experiment.model.device}{_slow(experiment)}",
        "data": experiment.task.describe(),
        "method": f"{config.method}: {config.method.help}",
        "adapter": f"{adapted} linear layers with {experiment.num_weights:,} weights",
        "levels": f"{config.method.summary(config)}{_tiles(experiment)}; "
        f"{steps:,} steps of {config.batch_size} {unit} each ({config.accumulation_steps} x {config.micro_batch_size})",
        "rates": _rates(config),
        "memory": _memory(plans),
        "folder": str(experiment.run),
    }
    return "\n".join(f"{name:>8}  {text}" for name, text in lines.items() if text)


def _slow(experiment: Experiment) -> str:
    if experiment.config.dtype == "float32" or has_bfloat16_products(experiment.model.device.type):
        return ""
    return ", which has no fast products of bfloat16: --dtype float32 is several times as fast"


def _tiles(experiment: Experiment) -> str:
    tile = experiment.config.tile
    if not tile or not experiment.config.method.reads("tile"):
        return ""
    return f", in whole {tile}" if tile in ("rows", "columns") else f", in tiles of {tile}"


def _rates(config: Config) -> str:
    """The peaks of the learning rates, and what tickets have in place of them."""
    gates = config.method.gated and config.gate != "none"
    text = f"{config.learning_rate:g} for values" + (f", {config.alpha_learning_rate:g} for gates" if gates else "")
    if config.scale_rates:
        text += "; a ticket's are divided by the square root of its density"
    if config.method.reads("ticket_learning_rate"):
        own = {"values": config.ticket_learning_rate, "gates": config.ticket_alpha_learning_rate}
        given = [f"{rate:g} for {what}" for what, rate in own.items() if rate]
        text += f"; given for tickets: {', '.join(given)}" if given else ""
    return text


def _memory(plans: Sequence[LevelPlan]) -> str:
    if not plans:
        return ""
    plan = max(plans, key=lambda plan: plan.peak)
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan.parts.items())
    return f"{plan.peak / GIB:.2f} GiB planned for training level {plan.level} ({parts})"
