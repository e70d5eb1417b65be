"""Puts what a method trains on a base model: a gated sparse difference, an adapter of PEFT, or one beside the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Training
from rigsa.experiments.kept import keep, names_to_keep
from rigsa_kernels import gated_linears, replace_linears
from rigsa_kernels.selection import select_linears


def attach(model: PreTrainedModel, config: Config) -> None:
    """Put what ``config.method`` trains on every linear layer but the head, in place. RoSA trains both kinds.

    What the configuration keeps trainable is trained beside it (`rigsa.experiments.kept`).
    """
    names = names_to_keep(model, config)
    if config.method.peft:
        attach_peft(model, config)
    if config.method.gated:
        attach_adapter(model, config)
    keep(model, names)
    checkpoint_activations(model, config)


def checkpoint_activations(model: PreTrainedModel, config: Training) -> None:
    """Recompute each decoder layer in the backward pass, if `Training.checkpointing` asks for it."""
    if config.checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # its name in older versions of transformers
            model.gradient_checkpointing_enable({"use_reentrant": False})


def attach_adapter(model: PreTrainedModel, config: Config, **others: Any) -> None:
    """Put a dense difference on every frozen linear layer but the head, as level 0 has it.

    Parameters of `model` that are trained already, those of a low-rank difference beside this one, stay trained.
    `others` are options of `replace_linears` that take the place of the configuration's.
    """
    options: dict[str, Any] = {
        "include": config.included,
        "exclude": config.excluded,
        "seed": config.values_seed,
        "shared_gate": config.gate == "model",
        "alpha_init": config.alpha_init,
        "init_scale": config.init_scale,
        "values_dtype": getattr(torch, config.values_dtype),
        "numerics": config.numerics,
    }
    with _without_warnings():
        replace_linears(model, **(options | others))
    if config.gate == "none":
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.requires_grad_(False)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The kernels warn that `composed` rounds away what closed gates let through. Configurations mean to have both."""

    def is_no_warning(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    logger = logging.getLogger("rigsa_kernels.replace")
    logger.addFilter(is_no_warning)
    try:
        yield
    finally:
        logger.removeFilter(is_no_warning)


def attach_peft(model: PreTrainedModel, config: Config) -> None:
    """Inject the adapter of ``config.method``, LoRA (also RoSA's) or SHiRA. Only its own parameters are trained.

    The base is what `rigsa.experiments.model.load_model` made of it: LoRA on one in 4 bits is QLoRA. SHiRA draws its
    mask from the run's seed, the same for all layers of one shape: that is how PEFT does it.

    Raises:
        RigsaError: peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftConfig, ShiraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RigsaError(f"{config.method}: needs peft ({error}); pip install peft") from error
    layers = select_linears(model, config.included, config.excluded)[0]
    adapter: PeftConfig
    if config.method.peft == "shira":
        adapter = ShiraConfig(r=config.rank, random_seed=config.seed, target_modules=list(layers))
    else:
        adapter = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by r, whatever its type
            lora_dropout=config.lora_dropout,
            target_modules=list(layers),
        )
    set_seed(config.seed % 2**32)
    model.requires_grad_(False)
    inject_adapter_in_model(adapter, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, config.values_dtype))
