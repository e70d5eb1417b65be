"""Bytes of a saved adapter beside what its encoding needs, and beside other methods of PEFT of the same size.

``python -m benchmarks.adapter_size`` prints the table in docs/peft.md: SmolLM2-135M's layers, random weights. Files do
not depend on the machine.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rigsa import RigsaConfig
from rigsa.encoding import choose_encoding, layout
from rigsa.state import adapted_layers

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSITIES = (0.0346, 0.2)


def base(layers: int) -> LlamaForCausalLM:
    """A model with the layers of SmolLM2-135M, and a small vocabulary, which no adapter here touches."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3,
        )
    )  # fmt: skip


def saved_bytes(model: Any) -> int:
    """Of the file of tensors that PEFT writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def needed_bytes(model: Any) -> int:
    """What values and patterns take, without a header, gates or tickets."""
    total = 0
    for layer in adapted_layers(model).values():
        pattern = layer.pattern
        total += layer.rigsa_values.nbytes
        for dtype, shape in layout(choose_encoding(pattern), pattern.shape, pattern.nnz).values():
            total += dtype.itemsize * torch.Size(shape).numel()
    return total


def rows(layers: int, densities: tuple[float, ...] = DENSITIES) -> list[tuple[float, str, int, int, int | None]]:
    """Density, method, trained numbers, bytes of the file, bytes that are needed (of ours)."""
    found: list[tuple[float, str, int, int, int | None]] = []
    for density in densities:
        for dtype in ("float32", "bfloat16"):
            model = get_peft_model(base(layers), RigsaConfig(density=density, values_dtype=dtype))
            trained = model.get_nb_trainable_parameters()[0]
            found.append((density, f"RIGSA, {dtype} values", trained, saved_bytes(model), needed_bytes(model)))
        sizes = [layer.pattern.shape for layer in adapted_layers(model).values()]
        rank = round(density * sum(n * k for n, k in sizes) / sum(n + k for n, k in sizes))
        for name, config in {
            "LoRA": LoraConfig(r=rank, target_modules=NAMES),
            "Super-Tuning": SupertuningConfig(sparsity=1 - density, target_modules=NAMES),
            "SHiRA": ShiraConfig(r=rank, random_seed=0, target_modules=NAMES),
        }.items():
            other = get_peft_model(base(layers), config)
            found.append((density, name, other.get_nb_trainable_parameters()[0], saved_bytes(other), None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="of the model; default: 30")
    layers = parser.parse_args().layers
    logging.disable(logging.WARNING)
    print("| density | method | trained numbers | file (MB) | bytes a trained number | above what is needed |")
    print("|---:|---|---:|---:|---:|---:|")
    for density, method, trained, size, needed in rows(layers):
        above = "" if needed is None else f"{size / needed - 1:.2%}"
        print(f"| {density:.2%} | {method} | {trained:,} | {size / 1e6:.1f} | {size / trained:.2f} | {above} |")


if __name__ == "__main__":
    main()
