"""Parameters that are no linear layers under PEFT: experts (target_parameters) and GPT-2's Conv1D."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Qwen

pytest.importorskip("peft", minversion="0.21")

from peft import PeftModel, get_peft_model

from rigsa import (
    MaskedAdamW,
    RigsaConfig,
    RigsaError,
    export_adapter,
    gated_linears,
    load_adapter,
    prune,
    replace_linears,
    save_adapter,
)
from rigsa.state import adapted_layers

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [2, 4, 6, 8, 10, 12]])


NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, **NO_DROPOUT)
    ).eval()


def moe(model, config, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return model(config(**sizes, **heads, **more)).eval()


def mixtral():
    return moe(MixtralForCausalLM, MixtralConfig, num_local_experts=3)


def qwen():
    return moe(Qwen, Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
MODELS = {"gpt2": (gpt2, {}), "mixtral": (mixtral, EXPERTS), "qwen": (qwen, EXPERTS)}
NAMES = ["*q_proj", "*gate_up_proj", "*down_proj", "*c_attn", "*c_fc", "*c_proj"]


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def wrapped(case, **options):
    make, targets = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(make(), RigsaConfig(**{"density": 0.3, "alpha_init": 0.3} | targets | options)).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model, steps=2):
    model.train()
    optimizer = MaskedAdamW(model, lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def native(case):
    model = case[0]()
    names = [name for name in NAMES if ("c_" in name) == (case[0] is gpt2)]
    return replace_linears(model, names, density=0.3, alpha_init=0.3)


def test_the_adapter_is_the_one_that_replace_linears_makes(case):
    model, other = wrapped(case), native(case)
    ours = adapted_layers(model)
    assert ours.keys() == gated_linears(other).keys()
    torch.testing.assert_close(logits(model), logits(other))
    for one in (model, other):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in gated_linears(other).items():
        assert torch.equal(ours[name].rigsa_values, layer.rigsa_values)
        torch.testing.assert_close(ours[name].rigsa_values.grad, layer.rigsa_values.grad)
        torch.testing.assert_close(ours[name].rigsa_alpha.grad, layer.rigsa_alpha.grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(case, tmp_path, low_cpu_mem_usage):
    model = trained(wrapped(case))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case[0](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), logits(loaded))
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


def test_saved_and_loaded_by_transformers(case, tmp_path):
    model = trained(wrapped(case))
    model.save_pretrained(tmp_path)
    loaded = case[0]()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(model), logits(loaded))


def test_merged_unmerged_disabled_and_unloaded(case):
    model = trained(wrapped(case))
    before, base = logits(model), logits(case[0]())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copy.deepcopy(model).unload()), base)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), before)
    assert plain.state_dict().keys() == case[0]().state_dict().keys()


def test_two_adapters_and_their_combination(case, tmp_path):
    model = wrapped(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", RigsaConfig(density=0.1, alpha_init=0.3, seed=5, **case[1]))
    only = {"default": logits(wrapped(case)), "other": logits(wrapped(case, density=0.1, seed=5))}
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model), only[name])
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    model.set_adapter("both")
    assert not any(torch.equal(logits(model), found) for found in only.values())
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model), only["other"])
    with pytest.raises(ValueError, match=r"is a parameter, of which a batch has one"):
        model(input_ids=IDS, adapter_names=["other", "both"])


def test_pruned_and_exchanged_with_a_bare_model(case, tmp_path):
    model = trained(wrapped(case))
    prune(model, 0.5, "large_final", rewind="none")
    save_adapter(model, tmp_path)
    bare = case[0]()
    load_adapter(bare, tmp_path, strict=True)
    torch.testing.assert_close(logits(model), logits(bare))
    with pytest.raises(RigsaError, match="is no linear layer"):
        export_adapter(model, tmp_path / "out", "supertuning")
    export_adapter(model, tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(case[0]().from_pretrained(tmp_path / "merged")), logits(model))


def test_a_model_moves_as_a_whole(case):
    model = wrapped(case)
    torch.testing.assert_close(logits(model.bfloat16()).float(), logits(wrapped(case)), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("target", "message"), [("ln_1.weight", "no floating-point parameter of two"), ("out_proj.weight", "no effect")]
)
def test_a_parameter_that_cannot_be_adapted_is_refused(target, message):
    if "ln" in target:
        model, targets = gpt2(), {"target_modules": []}
    else:
        model, targets = nn.Sequential(nn.MultiheadAttention(8, 2)), {"target_modules": []}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RigsaConfig(target_parameters=[target], **targets))


def test_a_refused_parameter_leaves_the_model_as_it_was():
    model = mixtral()
    kinds = {name: type(module) for name, module in model.named_modules()}
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": [*EXPERTS["target_parameters"], "input_layernorm.weight"],
    }
    with pytest.raises(ValueError, match=r"input_layernorm\.weight is no floating-point parameter"):
        get_peft_model(model, RigsaConfig(density=0.3, **targets))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(mixtral()))


def test_a_layer_whose_weight_is_read_around_it_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"the module around 0\.out_proj reads its weight"):
        get_peft_model(model, RigsaConfig(target_modules=["out_proj"]))
