"""Families of models: adapted, trained for three steps, saved, loaded onto a bare base, and compared."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rigsa import MaskedAdamW, gated_linears, load_adapter, prune, replace_linears, save_adapter

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 30, 11, 6]])
TEXT = {"input_ids": IDS, "labels": IDS}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 2}, TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, TEXT),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, TEXT),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}, TEXT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, TEXT),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL, TEXT),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        SMALL | {"image_size": 16, "patch_size": 8, "num_labels": 3},
        IMAGE,
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        TEXT,
    ),
}  # fmt: skip


def make(family):
    model_class, config_class, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()


def train(model, inputs, steps=3):
    optimizer = MaskedAdamW(model, lr=0.01)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_saved_loaded_and_compared(tmp_path, family):
    inputs = FAMILIES[family][3]
    model = replace_linears(make(family), alpha_init=0.1)
    with torch.no_grad():
        untouched = make(family)(**inputs)
    assert len(gated_linears(model)) > 4
    train(model, inputs)
    prune(model, 0.6)
    train(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    by_hand, by_state = make(family), replace_linears(make(family))
    load_adapter(by_hand, tmp_path / "adapter", strict=True)
    by_state.load_state_dict(load_file(tmp_path / "checkpoint" / "model.safetensors"))
    with torch.no_grad():
        expected = model(**inputs)
        for loaded in (by_hand, by_state):
            found = loaded(**inputs)
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.logits, expected.logits)
    assert not torch.equal(expected.logits, untouched.logits)
    saved, loaded = model.state_dict(), by_hand.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
