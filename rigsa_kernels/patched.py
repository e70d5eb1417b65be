"""Models whose passes another library has replaced: which of them an adapter has a part in.

Liger's kernels take the place of norms, rotary embeddings and the product between the two projections of an MLP, and
call linear layers as before, so it makes no difference whether they come before an adapter or, as under a Trainer with
``use_liger_kernel=True``, after it. The one exception is its fused loss, which reads the weight of the head. unsloth
reads the weights of linear layers itself while it generates, and knows LoRA's layers only.
"""

from __future__ import annotations

import torch.nn as nn

from .linear import GatedSparseLinear

HEAD = "lm_head"
"""The attribute whose weight Liger's fused loss reads."""
LIGER_READS_THE_HEAD = (
    "Liger's fused loss reads the weight of {} and does not call it, so an adapter there would not be trained; leave "
    "it out, or have Liger take fused_linear_cross_entropy=False (under a Trainer in liger_kernel_config)"
)


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
        f"{name}.{HEAD}".removeprefix(".")
        for name, module in model.named_modules()
        if home_of_forward(module).startswith("liger_kernel") and isinstance(getattr(module, HEAD, None), nn.Module)
    }


def refuse_liger_later(owner: nn.Module, adapted: bool) -> None:
    """Have each pass of `owner` see whether Liger has been patched in since, if its head is `adapted`; else no more."""
    for number, hook in list(owner._forward_pre_hooks.items()):
        if hook is _refuse_liger:
            del owner._forward_pre_hooks[number]
    if adapted:
        owner.register_forward_pre_hook(_refuse_liger)


def _refuse_liger(owner: nn.Module, _inputs: object) -> None:
    if home_of_forward(owner).startswith("liger_kernel"):
        head = owner.get_submodule(HEAD)
        if any(isinstance(module, GatedSparseLinear) for module in head.modules()):
            raise ValueError(f"model: {LIGER_READS_THE_HEAD.format(HEAD)}")


def home_of_forward(module: nn.Module) -> str:
    """The name of the Python module that defines the module's ``forward``."""
    forward = module.__dict__.get("forward", type(module).forward)
    return getattr(getattr(forward, "__func__", forward), "__module__", None) or ""
