"""Parameters of the base model that are trained as they are, beside an adapter: `Training.keep_trainable`.

They are named by glob patterns, as `replace_linears(modules_to_save=...)` of the library names modules; here a pattern
may name a single parameter, too. They keep the dtype of the model, are not decayed, and are written, resumed and merged
with the adapter. Each level starts from their pretrained values.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from rigsa.errors import RigsaError
from rigsa.experiments.config import Training, flag
from rigsa_kernels.parametrized import PREFIX
from rigsa_kernels.selection import adapters_of_peft

SOME = 5
"""Names that an error shows."""


def names_to_keep(model: nn.Module, config: Training) -> set[str]:
    """The names of the parameters that `config` names; a tied parameter has several. `model` has no adapter yet."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names if any(_names(pattern, name) for pattern in config.kept)}


def _names(pattern: str, parameter: str) -> bool:
    """Whether `pattern` names the parameter, or a module that holds it."""
    parts = parameter.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def check_kept(model: nn.Module, config: Training, adapted: Collection[str]) -> None:
    """Check the patterns of `config` against a model that has no adapter yet.

    Args:
        model: the base model.
        config: of the run.
        adapted: names of the layers, and of the weights beside them, that get an adapter.

    Raises:
        RigsaError: a pattern names nothing, or something that gets an adapter.
    """
    option, names = f"--{flag('keep_trainable')}", [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.kept:
        found = [name for name in names if _names(pattern, name)]
        if not found:
            some = ", ".join(names[:SOME])
            raise RigsaError(
                f"{option}: {pattern!r} names no parameter and no module; patterns match whole names, and this model's "
                f"are {some} and {max(len(names) - SOME, 0)} more"
            )
        both = next((name for name in found for layer in adapted if f"{name}.".startswith(f"{layer}.")), None)
        if both:
            raise RigsaError(
                f"{option}: {pattern!r} names {both}, which belongs to a layer that gets an adapter; expected others, "
                "or leave that layer out with --exclude"
            )


def keep(model: nn.Module, names: Collection[str]) -> None:
    """Train the parameters of these names, which the adapter has left alone."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(True)


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter: all that is trained beside the adapter that `model` carries. A tied one has its first name."""
    of_peft = adapters_of_peft(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.rpartition(".")[2].startswith(PREFIX) and not of_peft(name)
    }


def start_of_kept(model: nn.Module) -> dict[str, Tensor]:
    """The kept parameters as they are, copied to the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in kept_parameters(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Put the kept parameters back to what they were."""
    for name, value in start.items():
        model.get_parameter(name).copy_(value)


@contextlib.contextmanager
def as_before(model: nn.Module, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the kept parameters are what they were before training."""
    trained = start_of_kept(model) if start else {}
    put_back(model, start)
    try:
        yield
    finally:
        put_back(model, trained)
