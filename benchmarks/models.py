"""SmolLM2 of any size and depth from its configuration, with random weights: times do not depend on them."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.checks import assert_within
from benchmarks.providers import Trainee, model_linears
from benchmarks.shapes import Batch
from rigsa.experiments.model import model_shape, spare_the_head
from rigsa.experiments.tasks.evaluation import training_loss


def make_model(batch: Batch, device: torch.device, attention: str = "eager", **changes: int) -> nn.Module:
    """Frozen, in evaluation mode; made on its device, as a CPU takes long to draw a billion weights.

    `changes` are fields of the configuration.
    """
    config = model_shape(f"HuggingFaceTB/SmolLM2-{batch.size}")
    config.update(changes)
    config.num_hidden_layers = batch.layers
    config._attn_implementation = attention
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config).to(getattr(torch, batch.dtype))
    spare_the_head(model)
    return model.requires_grad_(False).eval()


@lru_cache(maxsize=1)
def base_model(batch: Batch, device: torch.device) -> nn.Module:
    """`make_model`, once: for contestants that share its frozen weights (`benchmarks.providers.share`)."""
    return make_model(batch, device)


def prompts(batch: Batch, device: torch.device) -> Tensor:
    return torch.randint(1000, (batch.prompts, batch.tokens), generator=torch.Generator().manual_seed(0)).to(device)


def check_model(trainee: Trainee, base: nn.Module, ids: Tensor) -> None:
    """The loss of the next token against the base model in float32 with the adapter merged into its weights."""
    merged = _merged(base, trainee.deltas())
    got, want = _loss(trainee.model, ids), _loss(merged, ids)
    eager = _loss(merged.to(base.dtype), ids)
    assert_within("loss", got, want.double(), eager, want.abs(), base.dtype)


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return training_loss(model, {"input_ids": ids, "targets": ids[:, :1]}, len(ids))


def _merged(base: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    model = deepcopy(base).float()
    for name, linear in model_linears(model).items():
        if name in deltas:
            linear.weight.data += deltas[name].float()
    return model
