"""Complete configurations of every method: the paper's, one for two CPU cores, one that only shows that all runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rigsa.experiments.config import OPTIONS, Config, flag
from rigsa.experiments.hardware import usual_dtype
from rigsa.experiments.methods.registry import METHODS


def paper(method: str = "imp", device: str = "auto") -> Config:
    """The paper's run, field for field: SmolLM2-1.7B on MNIST, one RTX 4090 (section 4.4; Table 4 for low rank).

    Where the paper does not run a method, its values are those of the method's own publication, at the paper's density.
    No value depends on `device`.
    """
    return Config(method=METHODS[method], **METHODS[method].usual)


def quickstart(method: str = "imp", device: str = "auto") -> Config:
    """A real model and real digits on two CPU cores: SmolLM2-135M, 8x8 digits, level 0 and one ticket.

    The dtype is the faster one on `device` (a value of `Config.device`).
    """
    return dataclasses.replace(
        paper(method),
        model="smollm2-135m",
        data="digits",
        dtype=usual_dtype(device),
        attention="eager",
        system_prompt="",
        values_dtype="float32",
        state_dtype="float32",
        numerics="composed",  # under "auto" most gates here stay exact: a step takes 1.4 times as long
        prunings=1,
        epochs=2,
        max_steps=280,
        batch_size=8,
        micro_batch_size=8,
        learning_rate=METHODS[method].quickstart_learning_rate,
        alpha_learning_rate=METHODS[method].quickstart_alpha_learning_rate,
        warmup_steps=30,
        beta2=0.95,
        eval_shots="0",
        eval_batch_size=32,
        source_tasks="",
        checkpoint_steps=100,
    )


def smoke(method: str = "imp", device: str = "auto") -> Config:
    """The same path in a minute: two steps a level, a few test images. It learns nothing and shows that all runs."""
    return dataclasses.replace(
        quickstart(method, device),
        prunings=1,
        max_steps=2,
        batch_size=4,
        micro_batch_size=2,
        warmup_steps=1,
        test_examples=16,
        drift_prompts=4,
        logging_steps=1,
        checkpoint_steps=2,
    )


PRESETS: dict[str, Callable[[str, str], Config]] = {"paper": paper, "quickstart": quickstart, "smoke": smoke}


def arguments_of(config: Config, preset: str) -> list[str]:
    """The options that make `preset`'s configuration of this method into `config`, as the command line takes them."""
    usual = PRESETS[preset](config.method.name, config.device)
    names = [name for name in OPTIONS if config.method.reads(name)]
    return [_option(name, getattr(config, name)) for name in names if getattr(config, name) != getattr(usual, name)]


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{flag(name)}" if value else f"--no-{flag(name)}"
    return f"--{flag(name)}={value}"  # one word, so that -1e-06 is not taken for an option
