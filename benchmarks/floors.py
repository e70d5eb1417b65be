"""The least that a step or a generation can cost: its products at the machine's rate, its bytes at its bandwidth.

A training step. Products: forward and the gradient of the input for every weight, and the gradient of what is trained
(at the free entries only, where there are few). Bytes: operands and results of these products once, and what the
optimiser reads and writes. Attention is not modelled but timed. Norms, activations and rotations are left out: no step
reaches 100 %.

A generation: the products of the prompt, and every weight read once for each new token. An adapter adds nothing to
that, as it could be merged.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmarks.machine import Machine
from benchmarks.memory import held_bytes
from benchmarks.providers import Trainee, model_linears
from benchmarks.shapes import Batch


def step_floor(machine: Machine, base: nn.Module, trainee: Trainee, batch: Batch) -> float:
    """Seconds."""
    tokens = batch.prompts * batch.tokens
    linears = model_linears(base).values()
    weights = sum(linear.weight.numel() for linear in linears)
    sides = sum(sum(linear.weight.shape) for linear in linears)
    head = base.get_output_embeddings().weight.numel()
    free = sum(parameter.numel() for parameter in trainee.trained)
    width = base.dtype.itemsize
    # Of a low-rank adapter `free` weights have three products like any others; of entries of a matrix, one.
    products = 3 if _is_low_rank(trainee.model) else 1
    flops = 2 * tokens * (2 * weights + products * free) + 4 * batch.prompts * head
    moved = width * (3 * tokens * sides + 2 * (weights + head)) + optimizer_bytes(trainee)
    return machine.total(flops, moved, base.dtype) + attention_seconds(machine, batch)


def generation_floor(machine: Machine, base: nn.Module, batch: Batch, new_tokens: int) -> float:
    """Seconds."""
    weights = sum(linear.weight.numel() for linear in model_linears(base).values())
    flops = 2 * batch.prompts * batch.tokens * weights
    return machine.total(flops, new_tokens * held_bytes(base.parameters()), base.dtype)


def optimizer_bytes(trainee: Trainee) -> int:
    """Parameters and moments, read and written, and gradients, written and read."""
    tensors = [*trainee.trained, *trainee.trained, *trainee.state]
    return 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_low_rank(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


@lru_cache
def attention_seconds(machine: Machine, batch: Batch) -> float:
    """Scores, softmax and their product with the values, forward and backward, over all blocks."""
    from benchmarks.models import base_model

    base = base_model(batch, machine.device)
    config, layer = base.config, base.model.layers[0].self_attn
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    options = {"dtype": base.dtype, "device": machine.device, "requires_grad": True}
    query, key, value = (
        torch.randn(batch.prompts, count, batch.tokens, layer.head_dim, **options) for count in (heads, groups, groups)
    )
    mask = torch.zeros(batch.tokens, batch.tokens, dtype=base.dtype, device=machine.device)

    def run() -> None:
        out, _ = eager_attention_forward(layer, query, key, value, mask, layer.scaling)
        torch.autograd.grad(out.sum(), (query, key, value))

    return config.num_hidden_layers * machine.best(run)
