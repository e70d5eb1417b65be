"""``RigsaConfig(init="gradient", batches=...)``: the entries where the loss of some batches is steepest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from rigsa.peft_tuner.config import RigsaConfig
from rigsa.tickets import gradient_ticket


def take_gradient_ticket(model: nn.Module, config: RigsaConfig) -> None:
    """Give the active adapter of `model` the ticket that `config` asks for, and let its batches go.

    Raises:
        ValueError: the batches are gone, as another adapter was made with `config`, or as `rigsa.gradient_ticket`.
    """
    batches, config.batches = config.batches, None
    if batches is None:
        raise ValueError("batches: they went with the first adapter of this RigsaConfig; make another RigsaConfig")
    device = next(model.parameters()).device

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        placed = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}
        found: Tensor = model(**placed).loss
        return found

    assert config.density is not None
    gradient_ticket(model, loss, batches, config.density, tile=config.tile)
