"""``rigsa merge``: an adapter put into the weights of its base, as the folder of a plain model that anything loads."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from rigsa.errors import RigsaError
from rigsa.experiments.attach import attach
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import restore_level
from rigsa.experiments.model import load_model, quantize_linears
from rigsa.experiments.run_folder import finished_level, level_folder
from rigsa.export import refuse_to_overwrite, write_merged
from rigsa.saving import CONFIG_FILE as ADAPTER_CONFIG
from rigsa.saving import load_adapter, read_record
from rigsa_kernels import gated_linears, rounding_losses
from rigsa_kernels.linear import HALF_DTYPES
from rigsa_kernels.nf4 import is_nf4_linear

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the command line says of a merge.

    Attributes:
        level: of a run; None for its last finished one.
        base: the base model of an adapter's folder, by hub id or folder; None for the one that the folder names.
        dtype: of the merged weights; None for that of the base.
        dequantize: whether a base in four bits may become one in the dtype that it computes in.
    """

    level: int | None = None
    base: str | None = None
    dtype: torch.dtype | None = None
    dequantize: bool = False


def run_merge(source: Path, out: Path, wishes: Wishes) -> str:
    """Write the merged model of a run or of an adapter to the new folder `out`. Returns what was done, in words.

    Args:
        source: a run folder, or what `rigsa.save_adapter` or a Trainer's checkpoint wrote.
        out: must not be there yet. It is there as a whole or not at all.
        wishes: see there.

    Raises:
        RigsaError: `out` is there, `source` is neither or is damaged, its base cannot be had or is in four bits without
            `Wishes.dequantize`, or rounding would take the adapter away.
    """
    refuse_to_overwrite(out)
    is_adapter = (source / ADAPTER_CONFIG).exists()
    model, tokenizer = _of_adapter(source, wishes) if is_adapter else _of_run(source, wishes)
    if wishes.dtype is not None:
        nn.Module.to(model, wishes.dtype)
    done = _in_words(model)
    try:
        write_merged(model, out, tokenizer=tokenizer, keep_adapter=False, dequantize=wishes.dequantize)
    except RigsaError as error:
        raise RigsaError(f"{source}: {str(error).replace('merge model.float()', 'give --dtype float32')}") from error
    return f"{done}: {out}" + ("" if tokenizer is not None else " (without a tokenizer: the base has none)")


def _of_run(run: Path, wishes: Wishes) -> tuple[PreTrainedModel, Any]:
    config, level = load(run), finished_level(run, wishes.level)
    if wishes.base is not None:
        raise RigsaError(f"--base: expected none for {run}, a run folder, which says what its base is")
    if not config.method.gated:
        raise RigsaError(
            f"{run}: expected a run of gated layers, got one of {config.method}, whose adapter is PEFT's; rigsa export "
            f"{run} --to {config.method.peft} or merged writes that"
        )
    _require_consent(run, config.quantize != "none", wishes)
    model, tokenizer = load_model(config, CPU)
    attach(model, dataclasses.replace(config, checkpointing=False))
    restore_level(model, level_folder(run, level))
    return model.eval(), tokenizer


def _of_adapter(folder: Path, wishes: Wishes) -> tuple[PreTrainedModel, Any]:
    if wishes.level is not None:
        raise RigsaError(f"--level: expected none for {folder}, which holds one adapter and no levels")
    record = read_record(folder)
    name = wishes.base or record.base
    if not name:
        raise RigsaError(f"{folder} does not name its base model; give it with --base")
    kind = getattr(transformers, record.model_class, None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise RigsaError(f"{folder}: its base is a {record.model_class}, which transformers does not have")
    in_four_bits = any(layer.base.nf4 for layer in record.layers.values())
    _require_consent(folder, in_four_bits, wishes)
    try:
        model: Any = kind.from_pretrained(name, dtype="auto")
    except Exception as error:  # a damaged file makes transformers and the hub's client raise dozens of unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(f"--base {name}: cannot be loaded ({reason})") from error
    is_quantized = any(is_nf4_linear(module) for module in model.modules())
    _require_consent(folder, is_quantized, wishes)
    if in_four_bits and not is_quantized:
        quantize_linears(model, CPU)  # the adapter was trained over weights that were rounded so
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        load_adapter(model, folder, strict=wishes.base is None)
    return model.eval(), _tokenizer(name)


def _require_consent(source: Path, in_four_bits: bool, wishes: Wishes) -> None:
    if in_four_bits and not wishes.dequantize:
        raise RigsaError(
            f"{source}: its base is in four bits, which have no room for a difference; give --dequantize for a model "
            "in the dtype that it computes in"
        )


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):  # what transformers raises where a folder has none
        return None


def _in_words(model: PreTrainedModel) -> str:
    layers = gated_linears(model)
    free = sum(layer.rigsa_values.numel() for layer in layers.values())
    done = f"{free:,} entries of {len(layers)} layers are merged"
    if any(layer.dtype in HALF_DTYPES for layer in layers.values()):
        losses = rounding_losses(model).values()
        lost, updates = sum(loss.lost for loss in losses), sum(loss.updates for loss in losses)
        done += f", {lost / max(updates, 1):.2%} of them lost to rounding in 16 bits"
    return done
