"""Complete configurations of every method: the paper's, one for two CPU cores, one that only shows that all runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
        warmup_steps=30,
        beta2=0.95,
        eval_shots="0",
        eval_batch_size=32,
        source_tasks="",
        checkpoint_steps=100,
        scale_rates=METHODS[method].reads("scale_rates"),
        **{"alpha_learning_rate": 2e-2, **METHODS[method].quickstart},
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


def configured(preset: str, method: str, given: Mapping[str, Any], device: str = "auto") -> Config:
    """The preset's configuration with the fields that were given; ``auto`` stands for `device`.

    `keep_fraction` and `density` are two ways to say how much prunings keep: of the two, the one that was given takes
    the place of the other in the preset. No prunings at all take that of a density.
    """
    named = given.get("device", "auto")
    usual = PRESETS[preset](method, device if named == "auto" else named)
    yielding: dict[str, Any] = {}
    if METHODS[method].reads("keep_fraction"):
        if given.get("prunings") == 0:
            yielding["density"] = 0.0
        elif "density" in given:
            yielding["keep_fraction"] = 0.0 if given["density"] else OPTIONS["keep_fraction"].default
        elif given.get("keep_fraction"):
            yielding["density"] = 0.0
    return dataclasses.replace(usual, **{**yielding, **given})


def arguments_of(config: Config, preset: str) -> list[str]:
    """The options that make `preset`'s configuration of this method into `config`, as the command line takes them."""
    usual = PRESETS[preset](config.method.name, config.device)
    values = {name: getattr(config, name) for name in OPTIONS if config.method.reads(name)}
    given = {name: value for name, value in values.items() if value != getattr(usual, name)}
    found = configured(preset, config.method.name, given, config.device)  # to which a density may have yielded
    return [_option(name, value) for name, value in values.items() if name in given or value != getattr(found, name)]


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{flag(name)}" if value else f"--no-{flag(name)}"
    return f"--{flag(name)}={value}"  # one word, so that -1e-06 is not taken for an option
