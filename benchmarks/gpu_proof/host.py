"""What the host pays for a layer and for an optimiser's step: small models wait for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.timing import wall_of_many
from benchmarks.layer_host import floors
from benchmarks.providers import ALPHA, TICKET, ticket_mask
from rigsa.experiments.train import stepping_in_backward
from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern, gated_linears, replace_linears

SIDE = 64
"""So small that the device is done before the host."""
LAYERS = 210
"""As many as SmolLM2-135M has: 420 tensors, as each has a gate."""
COUNT = 100
PLAIN, LEVEL_0, TICKET_LAYER = "nn.Linear, trained", "gated, level 0", "gated, 3.46 %"
OPTIMIZER_STEP, STEP_IN_BACKWARD = "MaskedAdamW.step, 420 tensors", "step in backward, 420 tensors"


def run(setting: Setting, journal: Journal) -> None:
    torch.set_num_threads(1)
    count, layers = (2, 3) if setting.dry else (COUNT, LAYERS)
    for name, density in ((PLAIN, None), (LEVEL_0, 1.0), (TICKET_LAYER, TICKET)):
        with journal.guarded(what="forward and backward of a layer", provider=name) as row:
            layer = _layers(setting, density, 1)
            row["host_us"] = wall_of_many(_pass(layer, setting), setting, count) * 1e6
    plain, ticket = (_layers(setting, density, 1)[0] for density in (None, TICKET))
    for name, floor in floors(cast(nn.Linear, plain), cast(GatedSparseLinear, ticket)).items():
        with journal.guarded(what="forward and backward of a layer", provider=name) as row:
            row["host_us"] = wall_of_many(_pass(floor, setting), setting, count) * 1e6
    model = _layers(setting, TICKET, layers)
    optimizer = MaskedAdamW(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    with journal.guarded(what=OPTIMIZER_STEP) as row:
        row["host_us"] = wall_of_many(optimizer.step, setting, 5) * 1e6
    with journal.guarded(what=STEP_IN_BACKWARD) as row, stepping_in_backward(optimizer):
        loss = _pass(model, setting)
        row["host_us"] = wall_of_many(loss, setting, 5) * 1e6
    with journal.guarded(what="the same passes without updates") as row:
        row["host_us"] = wall_of_many(_pass(model, setting), setting, 5) * 1e6


def _layers(setting: Setting, density: float | None, count: int) -> nn.Sequential:
    linears = (nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16, device=setting.device) for _ in range(count))
    model = nn.Sequential(*linears)
    if density is None:
        return model
    replace_linears(model, alpha_init=ALPHA, numerics="composed")
    for layer in gated_linears(model).values():
        if density < 1:
            layer.set_pattern(SparsePattern.from_mask(ticket_mask((SIDE, SIDE), density, setting.device)))
    return model


def _pass(model: Callable[[torch.Tensor], torch.Tensor], setting: Setting) -> Callable[[], None]:
    x = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=setting.device, requires_grad=True)
    dy = torch.randn_like(x)

    def once() -> None:
        model(x).backward(dy)

    return once
