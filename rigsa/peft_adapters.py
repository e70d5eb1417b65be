"""Adapters that PEFT makes, on the layers that a gated sparse difference would take: LoRA (also RoSA's) and SHiRA."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, set_seed

from rigsa.config import Config
from rigsa.errors import RigsaError
from rigsa_kernels.replace import select_linears


def attach_peft(model: PreTrainedModel, config: Config) -> None:
    """Inject the adapter of ``config.method`` into `model`, in place. Only its own parameters are trained.

    The base is what `rigsa.model.load_model` made of it: LoRA on one in 4 bits is QLoRA. SHiRA draws its mask from the
    run's seed, the same for all layers of one shape: that is how PEFT does it.

    Raises:
        RigsaError: peft is not installed, or the rank is too large for a layer.
    """
    try:
        from peft import LoraConfig, PeftConfig, ShiraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RigsaError(f"{config.method}: needs peft ({error}); pip install peft") from error
    layers = select_linears(model, "*", ())[0]
    adapter: PeftConfig
    if config.method == "shira":
        for name, layer in layers.items():
            largest = layer.in_features * layer.out_features // (layer.in_features + layer.out_features)
            if config.rank > largest:
                raise RigsaError(f"--rank: expected at most {largest} (the weights of {name}), got {config.rank}")
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
    if config.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
