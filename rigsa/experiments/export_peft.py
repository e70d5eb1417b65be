"""What a run of one of PEFT's own methods leaves for others: PEFT's folder, or a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rigsa.base import base_name
from rigsa.card import write_plain_card
from rigsa.experiments.adapter import trained_parameters
from rigsa.experiments.kept import kept_parameters
from rigsa.export import save_plain, with_ties
from rigsa.files import write_folder
from rigsa.peft_format import TENSORS_FILE
from rigsa.tensor_files import write_tensors

ADAPTER = "default"
"""What PEFT calls an adapter that is given no name."""


def write_peft(model: Any, folder: Path, **said: Any) -> None:
    """Write the adapter of `model` as `peft.PeftModel.from_pretrained` reads it, with a card, to a new folder.

    Args:
        model: of transformers, which carries an adapter that `inject_adapter_in_model` made.
        folder: must not be there yet; it is there as a whole or not at all.
        said: data, measured and licence, for the card (`rigsa.card.write_plain_card`).

    Raises:
        RigsaError: the folder cannot be written.
    """
    from peft import get_peft_model_state_dict

    beside = with_ties(model, kept_parameters(model))
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors |= {name: parameter.detach() for name, parameter in beside.items()}
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.task_type, config.inference_mode = (
        base_name(model) or None,
        "CAUSAL_LM",
        True,
    )
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in beside}) or None
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())

    def write(temporary: Path) -> None:
        named = {f"base_model.model.{name}": one.to("cpu", copy=True).contiguous() for name, one in tensors.items()}
        write_tensors(temporary / TENSORS_FILE, named, {"format": "pt"})
        config.save_pretrained(temporary)
        kind = f"An adapter of PEFT ({config.peft_type.value}) with {trained:,} trained numbers"
        write_plain_card(temporary, folder.name, kind, "peft", base=base_name(model), **said)

    write_folder(folder, write)


def write_merged_peft(model: Any, folder: Path, tokenizer: Any, **said: Any) -> None:
    """Write the plain model that PEFT's adapter makes of its base, to a new folder. `model` is left merged.

    The difference is added in the dtype of the weights, as PEFT does it. Arguments and errors are those of
    `write_peft`; `tokenizer` is written beside the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_name(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, _base_of(layer))
    del model.peft_config

    def write(temporary: Path) -> None:
        save_plain(model, temporary, None, tokenizer)
        kind = "A model with an adapter of PEFT merged into its weights"
        write_plain_card(temporary, folder.name, kind, "transformers", base=base, **said)

    write_folder(folder, write)


def _base_of(layer: Any) -> nn.Module:
    found: nn.Module = layer.get_base_layer()
    return found
