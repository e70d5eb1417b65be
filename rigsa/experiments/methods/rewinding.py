"""What a ticket of `imp` starts from: its initial values, a treatment of them, or the values of an early step.

Rewinding to an early step is that of Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis"
(ICML 2020): level 0 writes down values and gates after `rewind_step` steps; every ticket starts from these and trains
the remaining steps, with the learning rate of the step it starts at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rigsa.criteria import treated_values
from rigsa.experiments.adapter import read_adapter, save_adapter, trained_parameters
from rigsa.experiments.distributed import main_first
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.kept import put_back
from rigsa.experiments.run_folder import EARLY_FILE
from rigsa_kernels import GatedSparseLinear, gated_linears


class SaveEarly(TrainerCallback):
    """Writes the adapter after `step` steps of level 0."""

    def __init__(self, experiment: Experiment, step: int) -> None:
        self.model, self.step = experiment.model, step
        self.path = early_file(experiment)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with main_first():
                if not self.path.exists():
                    save_adapter(self.model, self.path)


def rewind(experiment: Experiment) -> None:
    """Put every layer, which has taken its ticket, at the start that the configuration asks for."""
    config = experiment.config
    if config.rewind_step:
        start_from(experiment, early_file(experiment))
    elif config.rewind != "init":
        with torch.no_grad():
            for layer in gated_linears(experiment.model).values():
                layer.rigsa_values.copy_(treated(layer, config.rewind, config.seed))


def start_of(experiment: Experiment, level: int) -> dict[str, Tensor] | None:
    """The values that the ticket of `level` started from, by layer; None for initial values, made again from a seed.

    The layers carry that ticket.
    """
    config, layers = experiment.config, gated_linears(experiment.model)
    if level == 0 or (config.rewind == "init" and not config.rewind_step):
        return None
    if config.rewind_step:
        early = read_dense(experiment, early_file(experiment))
        return {name: layer.pattern.gather(early[f"{name}.rigsa_values"]) for name, layer in layers.items()}
    return {name: treated(layer, config.rewind, config.seed) for name, layer in layers.items()}


def early_file(experiment: Experiment) -> Path:
    """The adapter of level 0 after `rewind_step` steps."""
    return experiment.folder(0) / EARLY_FILE


def read_dense(experiment: Experiment, path: Path) -> dict[str, Tensor]:
    """An adapter of level 0, which is dense. The layers may carry a ticket by now."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in gated_linears(experiment.model).items():
        shapes |= {f"{name}.rigsa_values": layer.pattern.shape, f"{name}.rigsa_alpha": tuple(layer.rigsa_alpha.shape)}
    shapes |= {name: tuple(value.shape) for name, value in experiment.start.items()}
    trained = trained_parameters(experiment.model)
    shapes = {name: shape for name, shape in shapes.items() if name in trained}  # --gate none trains no gates
    return read_adapter(experiment.model, path, shapes)


def treated(layer: GatedSparseLinear, treatment: str, seed: int) -> Tensor:
    return treated_values(
        treatment, layer.pattern, bound=layer.bound, seed=layer.seed, key=layer.key, dtype=layer.rigsa_values.dtype,
        device=layer.weight.device, draw_seed=seed,
    )  # fmt: skip


@torch.no_grad()
def start_from(experiment: Experiment, path: Path) -> None:
    """Put every layer, which has taken its ticket, at the values and gates that an adapter of level 0 has."""
    early = read_dense(experiment, path)
    for name, layer in gated_linears(experiment.model).items():
        layer.rigsa_values.copy_(layer.pattern.gather(early[f"{name}.rigsa_values"]))
        if f"{name}.rigsa_alpha" in early:
            layer.rigsa_alpha.copy_(early[f"{name}.rigsa_alpha"])
    put_back(experiment.model, {name: early[name] for name in experiment.start})
