"""AdamW over the free entries of gated sparse layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn


class MaskedAdamW(torch.optim.AdamW):
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over a gated sparse adapter, in one fused pass.

    A pruned entry has no storage: neither decay, nor a stale moment, nor clipping can move it, and the optimiser's
    state is as large as the free entries. Gates are not decayed unless asked, as decay would pull them to the closed
    position they started from.

    Args:
        params: a model with gated sparse layers (its trainable parameters are sorted into groups by
            `parameter_groups`), or a list of groups as in any ``torch.optim`` class, each with its own options.
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of the values; the paper's 1.0 (section 4.4) by default.
        alpha_lr: step size of the gates; `lr` by default.
        alpha_weight_decay: of the gates.

    Raises:
        ValueError: an option out of range, or nothing to train.
    """

    def __init__(
        self,
        params: nn.Module | list[dict[str, Any]],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1.0,
        *,
        alpha_lr: float | None = None,
        alpha_weight_decay: float = 0.0,
    ) -> None:
        if isinstance(params, nn.Module):
            params = parameter_groups(params, lr if alpha_lr is None else alpha_lr, alpha_weight_decay)
        elif not all(isinstance(group, dict) for group in params):
            raise ValueError(
                "params: expected a model or a list of groups, got bare parameters, among which gates cannot be told "
                "from values; pass the model"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def parameter_groups(model: nn.Module, alpha_lr: float, alpha_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters of `model`: all but the gates, and the gates with their own options.

    Raises:
        ValueError: `model` has no trainable parameter.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("params: the model has no trainable parameter; call replace_linears(model) first")
    gates = [item for item in trainable if item[0].rpartition(".")[2] == "rigsa_alpha"]
    values = [item for item in trainable if item[0].rpartition(".")[2] != "rigsa_alpha"]
    return [
        {"params": values},
        {"params": gates, "lr": alpha_lr, "weight_decay": alpha_weight_decay},
    ]
