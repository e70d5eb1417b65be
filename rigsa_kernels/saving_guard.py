"""An adapted model that transformers would save so that it cannot be loaded says so.

transformers writes the whole state, and `from_pretrained` of that folder gives the base without its adapter. Whoever
knows how to save an adapter registers that with `rigsa_kernels.replace.after_replacing`; the package `rigsa` does so
when it is imported. Until then ``model.save_pretrained``, and so a Trainer's checkpoint, is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn as nn

from rigsa_kernels.replace import after_replacing, gated_linears, hooks_after_replacing


def guard_saving(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` ask whether there is a way to save an adapter.

    A model without it stays, and one whose own was replaced already.
    """
    if callable(getattr(type(model), "save_pretrained", None)) and "save_pretrained" not in model.__dict__:
        model.save_pretrained = partial(save_pretrained, model)  # type: ignore[assignment]  # copied with the model


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
