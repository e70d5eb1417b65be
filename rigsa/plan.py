"""What a run is about to do and what it will cost, in a few lines."""

from __future__ import annotations

import torch

from rigsa.config import Config
from rigsa.experiment import Experiment
from rigsa.train import steps_per_level
from rigsa_kernels.replace import select_linears


def describe(experiment: Experiment) -> str:
    """Model, data, adapter, schedule and memory, one line each."""
    config, splits = experiment.config, experiment.splits
    layers, _ = select_linears(experiment.model, "*", ())
    weights = sum(layer.weight.numel() for layer in layers.values())
    height, width = splits.train.levels.shape[1:]
    tokens = len(experiment.prompts.encode(splits.train.levels[0]))
    steps = steps_per_level(config, len(splits.train))
    lines = {
        "model": f"{config.model}, {config.dtype} on {experiment.model.device}",
        "data": f"{config.data}: {len(splits.train):,} training, {len(splits.validation):,} validation and "
        f"{len(splits.test):,} test images of {height}x{width}; prompts of {tokens} tokens",
        "adapter": f"{len(layers)} linear layers with {weights:,} weights",
        "levels": f"{_levels(config)}; {steps:,} steps of {config.batch_size} prompts each "
        f"({config.accumulation_steps} x {config.micro_batch_size})",
        "memory": _memory(experiment, weights),
        "folder": str(experiment.run),
    }
    return "\n".join(f"{name:>8}  {text}" for name, text in lines.items())


def _levels(config: Config) -> str:
    if config.method == "random-mask":
        return "one ticket, drawn at random"
    return f"level 0 (dense) and {config.prunings} ticket{'' if config.prunings == 1 else 's'}"


def _memory(experiment: Experiment, weights: int) -> str:
    """The parts that do not depend on the batch, at the densest level; activations come on top."""
    config, model = experiment.config, experiment.model
    free = weights if config.method == "imp" else round((config.density or 1.0) * weights)
    value_bytes = free * torch.finfo(getattr(torch, config.values_dtype)).bits // 8
    parts = {
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "values": value_bytes,
        "gradient": value_bytes,
        "moments": 2 * value_bytes,
        "step matrices": weights * model.dtype.itemsize,
    }
    total = sum(parts.values())
    return (
        f"{total / 2**30:.2f} GiB (" + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in parts.items()) + ") + activations"
    )
