"""Models whose passes another library has replaced: which of them an adapter has a part in.

Liger's kernels take the place of norms, rotary embeddings and the product between the two projections of an MLP, and
call linear layers as before. The one exception is its fused loss, which reads the weight of the head. unsloth reads
the weights of linear layers itself while it generates, and knows LoRA's layers only.
"""

from __future__ import annotations

import torch.nn as nn


def refuse_unsloth(model: nn.Module) -> None:
    """Raises ValueError where unsloth has replaced a pass of `model`."""
    for name, module in model.named_modules():
        if home_of_forward(module).startswith("unsloth"):
            raise ValueError(
                f"model: expected passes of transformers, got one of unsloth in {name or type(model).__name__}, which "
                "reads the weights of linear layers past an adapter when it generates; load the model with "
                "transformers, in a process that has not imported unsloth"
            )


def heads_that_liger_reads(model: nn.Module) -> set[str]:
    """Names of heads whose weight Liger's fused loss reads, so that an adapter there would have no part in the loss."""
    return {
        f"{name}.lm_head".removeprefix(".")
        for name, module in model.named_modules()
        if home_of_forward(module).startswith("liger_kernel")
        and isinstance(getattr(module, "lm_head", None), nn.Module)
    }


def home_of_forward(module: nn.Module) -> str:
    """The name of the Python module that defines the module's ``forward``."""
    forward = module.__dict__.get("forward", type(module).forward)
    return getattr(getattr(forward, "__func__", forward), "__module__", None) or ""
