"""Adapters for those who do not have this package: folders that plain PEFT loads, or a merged model.

``supertuning``  PEFT's Super-Tuning (0.21 and newer): any density
``shira``        PEFT's SHiRA (0.17 and newer): at most as many entries in a layer as its rank allows, r (N + K)
``safetensors``  what `rigsa.save_adapter` writes, from which training goes on here
``merged``       the whole model with the adapter in its weights, which plain transformers loads

Both methods of PEFT have one number for all layers that says how many entries a layer has: a share, or a rank. It is
the least that holds every layer; where a layer has fewer, entries that are not free are filled in, with zeros. The gate
is multiplied into the values. So an export is for use and for training elsewhere; the gate, the seed, and what pruning
knows stay behind.

PEFT adds a difference to the weight in the weight's dtype. A base in 16 bits therefore rounds a small one away
(`rigsa.rounding_losses`), where a layer of this package takes two products.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor

from rigsa.base import base_name
from rigsa.errors import RigsaError
from rigsa.files import write_folder, write_json
from rigsa.peft_format import CONFIG_FILE, TENSORS_FILE
from rigsa.placing import trained_beside
from rigsa.saving import save_adapter
from rigsa.state import adapted_layers, unwrap
from rigsa.tensor_files import write_tensors
from rigsa_kernels.linear import GatedSparseLinear
from rigsa_kernels.merging import merge_linears, unmerge_linears
from rigsa_kernels.parametrized import GatedSparseWeight

Format = Literal["supertuning", "shira", "safetensors", "merged"]
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""The ending of a model's class, and what PEFT calls its task."""


def export_adapter(model: nn.Module, folder: str | os.PathLike[str], to: Format) -> None:
    """Write the adapter of `model` for others; see the head of this file. The model stays as it is.

    Args:
        model: with gated sparse layers, its own or PEFT's.
        folder: made where it is missing; its files of the same names are replaced. That of ``merged`` must not be there
            yet.
        to: the format.

    Raises:
        ValueError: `to` is unknown, or `model` has no gated layer.
        RigsaError: the format has no room for the adapter, a number is not finite, or a file cannot be written; of
            ``merged`` as in `write_merged`.
    """
    if to not in get_args(Format):
        raise ValueError(f"to: expected one of {', '.join(get_args(Format))}, got {to!r}")
    folder, model = Path(folder), unwrap(model)
    layers = adapted_layers(model)
    if to == "safetensors":
        save_adapter(model, folder)
    elif to == "merged":
        write_merged(model, folder)
    else:
        _check_linear(layers)
        make = _supertuning if to == "supertuning" else _shira
        config, tensors = make(layers)
        _write(model, folder, layers, config, tensors)


def _check_linear(layers: Mapping[str, GatedSparseLinear]) -> None:
    for name, layer in layers.items():
        if isinstance(layer, GatedSparseWeight):
            raise RigsaError(f"to: {name} is no linear layer, and PEFT's sparse methods adapt no other; use 'merged'")
        if not bool(layer.rigsa_values.isfinite().all()) or not bool(layer.rigsa_alpha.isfinite().all()):
            raise RigsaError(f"model: expected finite numbers, got others in {name}")


def _supertuning(layers: Mapping[str, GatedSparseLinear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sparsity = _sparsity([(layer.pattern.nnz, layer.num_weights) for layer in layers.values()])
    tensors = {}
    for name, layer in layers.items():
        places, values = _entries(layer, int(layer.num_weights * (1 - sparsity)))
        tensors[f"{name}.supertuning_indices"] = places.to(torch.int32)
        tensors[f"{name}.supertuning_values"] = values
    return {
        "peft_type": "SUPERTUNING", "sparsity": sparsity, "select_top": True, "r": None, "lora_alpha": None,
        "lora_dropout": 0.0, "save_precomputed_indices": True,
    }, tensors  # fmt: skip


def _sparsity(counts: list[tuple[int, int]]) -> float:
    """The largest share of zeros that leaves each layer its entries, in PEFT's arithmetic: ``int(n * (1 - s))``."""
    sparsity = 1.0 - max(entries / weights for entries, weights in counts)
    while sparsity > 0 and any(int(weights * (1 - sparsity)) < entries for entries, weights in counts):
        sparsity = max(math.nextafter(sparsity, 0.0) - 1e-12, 0.0)
    return sparsity


def _shira(layers: Mapping[str, GatedSparseLinear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    rank = max(-(-layer.pattern.nnz // sum(layer.pattern.shape)) for layer in layers.values())
    tensors = {}
    for name, layer in layers.items():
        count = rank * sum(layer.pattern.shape)
        if count > layer.num_weights:
            least = min(one.num_weights // sum(one.pattern.shape) for one in layers.values())
            raise RigsaError(
                f"to: SHiRA has one rank for all layers, the densest needs {rank}, and {name} has room for {least} at "
                "most; use 'supertuning'"
            )
        places, values = _entries(layer, count)
        tensors[f"{name}.shira_indices"] = torch.stack([places // layer.in_features, places % layer.in_features]).int()
        tensors[f"{name}.shira_weight"] = values
    return {
        "peft_type": "SHIRA", "r": rank, "mask_type": "rigsa", "random_seed": None, "fan_in_fan_out": False,
    }, tensors  # fmt: skip


@torch.no_grad()
def _entries(layer: GatedSparseLinear, count: int) -> tuple[Tensor, Tensor]:
    """int64 ``[count]`` places in the matrix, ascending, and float32 ``[count]`` values ``alpha * D`` there."""
    difference = (layer.delta().double() * layer.rigsa_alpha.double()).cpu().flatten()
    free = layer.pattern.to_mask().cpu().flatten()
    others = (~free).nonzero().view(-1)[: count - layer.pattern.nnz]
    free[others] = True
    places = free.nonzero().view(-1)
    return places, difference[places].float()


def _write(
    model: nn.Module,
    folder: Path,
    layers: Mapping[str, GatedSparseLinear],
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    beside = with_ties(model, trained_beside(model))
    modules = sorted({name.rpartition(".")[0] for name in beside})
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    for name, parameter in beside.items():
        named[f"base_model.model.{name}"] = parameter.detach().to("cpu", copy=True).contiguous()
    common: dict[str, Any] = {
        "base_model_name_or_path": base_name(base) or None, "target_modules": list(layers), "inference_mode": True,
        "init_weights": True, "modules_to_save": modules or None, "auto_mapping": None, "revision": None,
        "task_type": None,
    }  # fmt: skip
    tasks = [task for ending, task in TASKS.items() if type(base).__name__.endswith(ending)]
    if tasks:
        common["task_type"] = tasks[0]
    else:
        common["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}

    write_tensors(folder / TENSORS_FILE, named, {"format": "pt"})
    write_json(folder / CONFIG_FILE, json.loads(json.dumps(config | common)))


def with_ties(model: nn.Module, beside: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """`beside` with a name for each module that shares the parameter: PEFT trains a copy of a module, which ends a tie,
    so that each of them needs the parameter, an embedding and the head for instance."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        twin: parameter
        for name, parameter in beside.items()
        for twin in (names[id(parameter)] if name in names[id(parameter)] else [name])
    }


def write_merged(
    model: nn.Module, folder: Path, *, tokenizer: Any = None, keep_adapter: bool = True, dequantize: bool = False
) -> None:
    """Write the plain model that an adapter makes of its base to a new folder, which is there as a whole or not at all.

    Args:
        model: of transformers, with gated layers, its own or PEFT's.
        folder: must not be there yet.
        tokenizer: written beside the model.
        keep_adapter: False leaves `model` merged, which takes less memory. PEFT's own layers stay as they are.
        dequantize: as in `rigsa.merge_linears`.

    Raises:
        RigsaError: `folder` is there, `model` is not of transformers, cannot be merged (`rigsa.merge_linears`), or the
            folder cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise RigsaError(f"to: 'merged' writes models of transformers, got a {type(model).__name__}")
    refuse_to_overwrite(folder)
    with _merged(model, keep_adapter, dequantize) as (plain, state):
        write_folder(folder, lambda temporary: save_plain(plain, temporary, state, tokenizer))


def save_plain(model: Any, folder: Path, state: dict[str, Tensor] | None, tokenizer: Any) -> None:
    """transformers' own ``save_pretrained`` of a model without an adapter, and of its tokenizer if there is one."""
    try:
        type(model).save_pretrained(model, folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def refuse_to_overwrite(folder: Path) -> None:
    """Raises RigsaError where something is called `folder`."""
    if folder.exists() or folder.is_symlink():
        raise RigsaError(f"{folder}: expected a folder that is not there yet")


@contextmanager
def _merged(model: Any, keep_adapter: bool, dequantize: bool) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The plain model and its state."""
    of_peft = hasattr(model, "merge_adapter")  # PEFT is around it
    try:
        if of_peft:
            model.merge_adapter()
        else:
            merge_linears(model, keep_adapter=keep_adapter, dequantize=dequantize)
    except ValueError as error:
        raise RigsaError(str(error)) from error
    try:
        plain = model.get_base_model() if of_peft else model
        yield plain, _plain_state(plain) if of_peft else plain.state_dict()
    finally:
        if of_peft:
            model.unmerge_adapter()
        elif keep_adapter:
            unmerge_linears(model)


def _plain_state(base: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it was before PEFT put its layers into it. What PEFT trained as a copy stands for it."""
    state = {}
    for name, tensor in base.state_dict().items():
        before, is_copy, after = name.partition(".modules_to_save.")
        if is_copy:
            name = f"{before}.{after.partition('.')[2]}"
        if ".original_module." not in name and ".rigsa_adapter." not in name:
            state[re.sub(r"(\.base_layer)+\.", ".", name)] = tensor
    return state
