"""What becomes of an adapted model under transformers' own saving: nothing is lost without a word.

``model.save_pretrained(folder)``, and so every checkpoint of a Trainer, writes the adapter alone: what `save_adapter`
writes, in the file where transformers keeps weights, beside the base model's ``config.json``. It has three readers:

`rigsa.load_adapter(base, folder)` takes it as any saved adapter.

``Trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` give the file's tensors to
``model.load_state_dict``, where a hook knows them by their record and loads the adapter, patterns included.

``from_pretrained(folder)`` would find no weight that it knows and go on with random ones. So ``config.json`` names as
its weights a sentence that says what to write instead, and from_pretrained, which takes file names only, shows it and
stops.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from rigsa.base import base_name
from rigsa.errors import RigsaError
from rigsa.files import write_json
from rigsa.placing import trained_beside
from rigsa.saving import MODEL_FILE, RECORD, load_tensors, write_adapter
from rigsa_kernels.replace import gated_linears


def keep_adapter_in_checkpoints(model: nn.Module) -> None:
    """Have `model`, which carries an adapter, save it and load it in transformers' ways; see the head of this file.

    `replace_linears` and `load_adapter` do this for the model that they are given, and ``save_pretrained`` for a model
    of which a part was adapted. Called again it changes nothing.
    """
    model._rigsa_trained = set(trained_beside(model))  # type: ignore[assignment]  # saved, even if it is frozen later
    if "_rigsa_loads" not in model.__dict__:
        model._rigsa_loads = False  # type: ignore[assignment]
        model.register_load_state_dict_pre_hook(_take_adapter)
        model.register_load_state_dict_post_hook(_nothing_is_missing)
    transformers = sys.modules.get("transformers")  # if it was never imported, the model is not one of its own
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained = partial(save_pretrained, model)  # copied and pickled with the model
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True  # or the Trainer takes it for a bare base


def _take_adapter(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load an adapter's tensors that a state consists of, and take them out of it.

    Raises:
        RigsaError: the adapter cannot be loaded, or is that of another model, of which `model` is a part.
    """
    model._rigsa_loads = f"{prefix}{RECORD}" in state_dict  # type: ignore[assignment]
    if model._rigsa_loads:
        own = [name for name in state_dict if name.startswith(prefix)]
        load_tensors(model, {name.removeprefix(prefix): state_dict.pop(name) for name in own})
    elif layer := next((name for name in gated_linears(model) if f"{prefix}{name}.values" in state_dict), ""):
        raise RigsaError(
            f"{prefix}{layer}: this state is an adapter of the model around this {type(model).__name__}; write "
            "rigsa.load_adapter(model, folder), or give the Trainer rigsa.AdapterCheckpoints()"
        )


def _nothing_is_missing(model: nn.Module, incompatible: Any) -> None:
    """An adapter's state has no base weights, and needs none."""
    if model._rigsa_loads:
        incompatible.missing_keys.clear()
        model._rigsa_loads = False  # type: ignore[assignment]


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **others: Any,
) -> None:
    """In place of transformers' method on an adapted model: the adapter, and the configuration of its base.

    A model that carries no adapter any more (`merge_linears`, `restore_linears`) saves itself as ever.

    Args:
        save_directory: made where it is missing.
        is_main_process: the others write nothing.
        state_dict, others: transformers'. They concern the base's weights, which are not written.
        push_to_hub: expected to be False; upload the folder instead.

    Raises:
        RigsaError: as in `save_adapter`.
    """
    if not gated_linears(self):
        type(self).save_pretrained(
            self, save_directory, is_main_process=is_main_process, state_dict=state_dict, push_to_hub=push_to_hub,
            **others,
        )  # fmt: skip
        return
    if push_to_hub:
        raise RigsaError("push_to_hub: an adapted model saves its adapter to a folder; upload that folder")
    if not is_main_process:
        return
    folder = Path(save_directory)
    config = json.loads(self.config.to_json_string()) | {"architectures": [type(self).__name__]}
    write_json(folder / "config.json", config | {"transformers_weights": what_to_write(self)})
    if self.can_generate():
        self.generation_config.save_pretrained(folder)
    try:
        write_adapter(self, folder, MODEL_FILE)
    except ValueError as error:
        raise RigsaError(f"{folder}: {error}") from error


def what_to_write(model: nn.Module) -> str:
    """The sentence that ``from_pretrained`` shows."""
    base = base_name(model) or "BASE"
    return (
        "this folder holds a rigsa adapter and not the weights of its base model. Write: "
        f"model = {type(model).__name__}.from_pretrained({base!r}); rigsa.load_adapter(model, FOLDER)"
    )
