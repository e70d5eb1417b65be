"""Families of models: adapted, trained for three steps, saved, loaded onto a bare base, merged, and compared."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rigsa import (
    MaskedAdamW,
    gated_linears,
    load_adapter,
    merge_linears,
    prune,
    replace_linears,
    save_adapter,
    unmerge_linears,
)

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 30, 11, 6]])
TEXT = {"input_ids": IDS, "labels": IDS}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40), "labels": IDS}
MOE = SMALL | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 2}, TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, TEXT),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        MOE | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
        TEXT,
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE | {"num_local_experts": 4}, TEXT),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, TEXT),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}, TEXT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, TEXT),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}, TEXT),
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
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
         "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 1},
        SOUND,
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        TEXT,
    ),
}  # fmt: skip
NEW_HEADS = {"ViT": ["classifier"]}


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
def test_trained_saved_loaded_merged_and_compared(tmp_path, family):
    inputs = FAMILIES[family][3]
    heads = NEW_HEADS.get(family, ())
    model = replace_linears(make(family), alpha_init=0.1, modules_to_save=heads)
    with torch.no_grad():
        untouched = make(family)(**inputs)
    assert len(gated_linears(model)) > 4
    train(model, inputs)
    prune(model, 0.6)
    train(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    by_hand, by_state = make(family), replace_linears(make(family), modules_to_save=heads)
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

    merge_linears(by_hand, keep_adapter=True)
    assert by_hand.state_dict().keys() == make(family).state_dict().keys()
    by_hand.save_pretrained(tmp_path / "merged")
    plain = type(by_hand).from_pretrained(tmp_path / "merged").eval()
    merged, loaded = by_hand.state_dict(), plain.state_dict()
    assert all(torch.equal(merged[name], loaded[name]) for name in merged)
    with torch.no_grad():
        assert torch.equal(by_hand(**inputs).logits, expected.logits)
        torch.testing.assert_close(plain(**inputs).logits, expected.logits)  # Mamba's sums follow where tensors lie
    restored = unmerge_linears(by_hand).state_dict()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
