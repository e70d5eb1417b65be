"""The Trainer's own optimiser decays no gates: they are not among the names that it decays, as biases are not.

Their rate is that of the other parameters there. An optimiser that gives gates a rate of their own is `MaskedAdamW`, or
any that is given `rigsa.parameter_groups(model)`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn as nn

from rigsa_kernels.roles import GATE, parameters_called


def spare_gates() -> None:
    """Have `transformers.Trainer.get_decay_parameter_names` leave out the gates of an adapted model."""
    from transformers import Trainer

    named_by_trainer = Trainer.get_decay_parameter_names

    @functools.wraps(named_by_trainer)
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        gates = parameters_called(GATE)
        of_gates = {name for name, parameter in model.named_parameters() if id(parameter) in gates}
        return [name for name in named_by_trainer(self, model) if name not in of_gates]

    Trainer.get_decay_parameter_names = get_decay_parameter_names  # type: ignore[method-assign]
