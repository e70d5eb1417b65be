"""An adapted model that transformers would save so that it cannot be loaded says so.

transformers writes the whole state, and `from_pretrained` of that folder gives the base without its adapter. Whoever
knows how to save an adapter registers that with `rigsa_kernels.replace.after_replacing`; the package `rigsa` does so
when it is imported. Until then ``model.save_pretrained``, and so a Trainer's checkpoint, is refused.

The model that is saved need not be the one that `replace_linears` was given: a decoder may have been adapted inside
the model with the head, or a model inside a module of the user's own. So the method of transformers' base class asks,
too, once a model was adapted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch.nn as nn

from .replace import after_replacing, gated_linears, hooks_after_replacing
from .selection import adapters_of_peft

BASE_CLASS = "transformers.modeling_utils"


def guard_saving(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` ask whether there is a way to save an adapter, and that of the models around it.

    A model without it stays, and one whose own was replaced already.
    """
    transformers = sys.modules.get(BASE_CLASS)  # where it was never imported, no model of its own is there
    if transformers is not None and not hasattr(transformers.PreTrainedModel.save_pretrained, "of_transformers"):
        transformers.PreTrainedModel.save_pretrained = _guarded(transformers.PreTrainedModel.save_pretrained)
    if callable(getattr(type(model), "save_pretrained", None)) and "save_pretrained" not in model.__dict__:
        model.save_pretrained = partial(save_pretrained, model)  # type: ignore[assignment]  # copied with the model


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of transformers' base class, which asks first on a model that has no method of its own for it."""

    @wraps(method)
    def asking(self: Any, *arguments: Any, **options: Any) -> Any:
        if "save_pretrained" in self.__dict__ or not _is_adapted(self):
            return method(self, *arguments, **options)
        return save_pretrained(self, *arguments, **options)

    asking.of_transformers = method  # type: ignore[attr-defined]
    return asking


def _is_adapted(model: nn.Module) -> bool:
    """Whether `model` carries an adapter that PEFT does not save."""
    of_peft = adapters_of_peft(model)
    return not all(of_peft(name) for name in gated_linears(model))


def save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
    """In place of the model's own method.

    Raises:
        RuntimeError: the model carries an adapter, and nothing that can save it was imported.
    """
    if not gated_linears(self):
        return type(self).save_pretrained(self, *arguments, **options)
    for hook in hooks_after_replacing():  # if `rigsa` was imported since, it replaces this method
        hook(self)
    if getattr(self.save_pretrained, "func", None) is save_pretrained:
        raise RuntimeError(
            "save_pretrained: the adapter of this model would be lost, as from_pretrained knows plain layers only; "
            "import rigsa, which saves the adapter of a model of transformers, or write "
            "rigsa.save_adapter(model, folder)"
        )
    return self.save_pretrained(*arguments, **options)


after_replacing(guard_saving)
