"""Tiny models of three families that read any text, and data files of a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import CHATML

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(*, template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte, and a few for whole words, so that tokens of one text differ in length."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"), ("1", "2")]
    vocabulary = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    end = "</s>" if template is None else "<|im_end|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=end)
    fast.chat_template = template
    return fast


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "vocab_size": 280, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[name]().eval()
    return model


def save_family(name: str, folder: Path, **options: Any) -> Path:
    """What --model takes."""
    family(name).save_pretrained(folder)
    byte_tokenizer(**options).save_pretrained(folder)
    return folder


def pairs(number: int) -> list[tuple[str, str]]:
    """Questions and answers of unequal length."""
    return [(f"What is the half of {2 * n}{' please' * (n % 4)}?", f"It is {n}{'.' * (n % 3)}") for n in range(number)]


def rows(format_name: str, number: int = 40) -> list[dict[str, Any]]:
    """The pairs in one of the formats."""
    make = {
        "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
        "alpaca": lambda q, a: {"instruction": "Answer.", "input": q, "output": a},
        "text": lambda q, a: {"text": f"{q}\n{a}"},
        "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    }[format_name]
    return [make(question, answer) for question, answer in pairs(number)]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
