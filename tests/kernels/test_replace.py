import logging

import peft
import pytest
import torch
import torch.nn as nn
import transformers
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rigsa
import rigsa_kernels
from conftest import make_llama
from rigsa_kernels import (
    GatedSparseLinear,
    adapter_summary,
    gated_linears,
    left_out,
    replace_linears,
    restore_linears,
)


def open_gates(model: nn.Module, alpha: float) -> None:
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(alpha)


def test_both_packages_offer_it():
    assert rigsa.replace_linears is rigsa_kernels.replace_linears


def test_the_head_of_a_model_inside_another_module_is_left_alone():
    model = nn.ModuleDict({"policy": make_llama(), "value": nn.Linear(32, 1)})
    replace_linears(model)
    assert type(model["policy"].lm_head) is nn.Linear
    assert isinstance(model["value"], GatedSparseLinear)


@pytest.mark.parametrize("tied", [False, True])
def test_replaces_all_linears_of_a_decoder_but_the_head(tied):
    model = make_llama(tie_word_embeddings=tied)
    assert replace_linears(model) is model
    assert len(gated_linears(model)) == 14
    assert type(model.lm_head) is nn.Linear
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"rigsa_values", "rigsa_alpha"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numerics", ["auto", "exact", "composed"])
def test_closed_gates_leave_the_logits_alone_bit_for_bit(dtype, numerics):
    model, ids = make_llama().to(dtype), torch.arange(20)[None]
    before = model(ids).logits
    replace_linears(model, numerics=numerics)
    open_gates(model, 0.0)
    assert torch.equal(model(ids).logits, before)
    open_gates(model, 0.5)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX", "OPT", "Gemma2", "Phi3"])
def test_other_decoders(family):
    """Biases, fused projections, tied heads, soft-capped logits."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    sizes |= {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(family, {"intermediate_size": 48})
    sizes |= {"num_key_value_heads": 2, "head_dim": 8} if family in ("Qwen2", "Gemma2", "Phi3") else {}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.arange(1, 20)[None]
    before = model(ids).logits
    replace_linears(model, alpha_init=0.0)
    assert len(gated_linears(model)) >= 8
    assert torch.equal(model(ids).logits, before)
    model(ids).logits.sum().backward()
    assert all(layer.rigsa_alpha.grad is not None for layer in gated_linears(model).values())


def test_inverse_gives_the_model_back():
    model, ids = make_llama(), torch.arange(20)[None]
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    weight = model.model.layers[0].mlp.up_proj.weight
    restore_linears(replace_linears(model, alpha_init=1.0))
    assert model.model.layers[0].mlp.up_proj.weight is weight
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(ids).logits, before)


def test_plain_sequential_with_bias():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))
    replace_linears(model, values_dtype=torch.bfloat16)
    assert isinstance(model[0], GatedSparseLinear)
    assert model[0].rigsa_values.dtype == torch.bfloat16
    assert model(torch.randn(2, 6)).shape == (2, 4)


def test_patterns_match_whole_names_and_predicates_decide():
    def names(*args, **options):  # type: ignore[no-untyped-def]
        model = nn.ModuleDict({"lin1": nn.Linear(3, 3), "lin10": nn.Linear(3, 3), "out": nn.Linear(3, 2)})
        return list(gated_linears(replace_linears(model, *args, **options)))

    assert names("lin1") == ["lin1"]
    assert names(["lin1", "out"]) == ["lin1", "out"]
    assert names("lin*", exclude=["lin10"]) == ["lin1"]
    assert names(lambda name, module: module.out_features == 2) == ["out"]


def test_tied_linears_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    replace_linears(model)
    assert list(gated_linears(model)) == ["2"]


def test_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, "rigsa_kernels"):
        model = replace_linears(make_llama(), exclude=["*.mlp.*"])
    assert adapter_summary(model) == (
        "8 gated sparse layers: 6,144 of 6,144 weights free (100.00%); they hold 36.78% of the model's 16,704 weights "
        "in matrices, which leaves out model.layers.*.mlp.gate_proj (3,072), model.layers.*.mlp.up_proj (3,072), "
        "model.layers.*.mlp.down_proj (3,072), model.embed_tokens (672), lm_head (672)"
    )
    assert adapter_summary(model) in caplog.text
    assert "left alone: lm_head (the language-model head)" in caplog.text
    assert "left alone: model.layers.0.mlp.up_proj (not selected)" in caplog.text


def test_initial_values_depend_on_seed_and_own_name_only():
    whole, part, other = (
        gated_linears(replace_linears(make_llama(), *include, seed=seed))
        for include, seed in (((), 1), (("*.q_proj",), 1), ((), 2))
    )
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(whole[name].rigsa_values, part[name].rigsa_values)
    assert not torch.equal(whole[name].rigsa_values, other[name].rigsa_values)
    assert not torch.equal(whole[name].rigsa_values, whole[name.replace("1", "0")].rigsa_values)


def test_shared_gate_is_one_parameter():
    model = replace_linears(make_llama(), shared_gate=True)
    assert len({id(layer.rigsa_alpha) for layer in gated_linears(model).values()}) == 1
    model(torch.arange(20)[None]).logits.sum().backward()
    alone = replace_linears(make_llama())
    alone(torch.arange(20)[None]).logits.sum().backward()
    total = sum(layer.rigsa_alpha.grad for layer in gated_linears(alone).values())
    torch.testing.assert_close(next(iter(gated_linears(model).values())).rigsa_alpha.grad, total, rtol=1e-3, atol=1e-5)


def test_nothing_to_replace_is_an_error_that_says_why():
    for include in ("q_proj", ["*k_proj", "q_proj"]):
        message = r"include: 'q_proj' selects no .* whole names \('\*q_proj' would .*model.layers.0.self_attn.q_proj, "
        with pytest.raises(ValueError, match=message):
            replace_linears(make_llama(), include)
    with pytest.raises(ValueError, match=r"'lm_head' selects .* can be replaced \(.*lm_head: the language-model head"):
        replace_linears(make_llama(), "lm_head", exclude=["model.*"])
    with pytest.raises(ValueError, match=r"it has no nn\.Linear"):
        replace_linears(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(("numerics", "dtype", "warned"), [
    ("composed", torch.bfloat16, True), ("composed", torch.float32, False), ("auto", torch.bfloat16, False),
])  # fmt: skip
def test_composing_in_the_dead_zone_is_warned_about(caplog, numerics, dtype, warned):
    torch.manual_seed(0)
    replace_linears(nn.Sequential(nn.Linear(64, 64, dtype=dtype)), numerics=numerics)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == warned
    # nn.Linear draws its weight like our difference, so the threshold is bfloat16's eps
    assert not warned or ("1 of 1 layers start with gates at 1e-06" in warnings[0] and "about 8e-03" in warnings[0])


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, flag in flags(model).items() if flag}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numerics": "x"}, "numerics: expected one of auto, exact, composed"),
        ({"force": "x"}, "force: expected one of fused, gemm"),
        ({"alpha_init": float("inf")}, "alpha_init: expected a finite number"),
        ({"init_scale": float("nan")}, "init_scale: expected a finite number, 0 or more, got nan"),
        ({"init_scale": -1.0}, "init_scale: expected a finite number, 0 or more, got -1.0"),
        ({"values_dtype": torch.int8}, "values_dtype: expected one of None, torch.float32"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' names no module"),
        ({"include": "score"}, "include: 'score' selects no linear layer"),
    ],
)
def test_a_bad_option_leaves_the_model_as_it_was(options, message):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    layers, before = list(model), flags(model)
    with pytest.raises(ValueError, match=message):
        replace_linears(model, **options)
    assert list(model) == layers
    assert flags(model) == before


def test_layers_that_a_pattern_cannot_hold_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"wide": nn.Linear(65_568, 2)}))
    with pytest.raises(ValueError, match=r"at most 65536 columns.*got 1\.wide with 65568; exclude it"):
        replace_linears(model)
    assert trained(model) == set(flags(model))
    assert list(gated_linears(replace_linears(model, exclude=["*.wide"]))) == ["0"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 4), lambda: replace_linears(nn.Sequential(nn.Linear(8, 4)))[0]])
def test_a_model_that_is_a_linear_layer_is_refused(make):
    layer = make()
    with pytest.raises(ValueError, match="model: expected a module that holds linear layers, got a"):
        replace_linears(layer)
    assert not list(layer.children())
    if isinstance(layer, GatedSparseLinear):
        with pytest.raises(ValueError, match="model: expected a module that holds gated layers"):
            restore_linears(layer)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
        lambda linear: prune.random_unstructured(linear, "weight", 0.5),
        lambda linear: prune.random_unstructured(linear, "bias", 0.5),
    ],
    ids=["new-weight-norm", "orthogonal", "weight-norm", "spectral-norm", "pruned", "pruned-bias"],
)
def test_a_layer_whose_weight_is_computed_from_others_is_left_alone_by_name(caplog, change):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    change(model[0])
    before = model(x)
    with caplog.at_level(logging.INFO, "rigsa_kernels"):
        replace_linears(model, alpha_init=0.0)
    assert list(gated_linears(model)) == ["1"]
    torch.testing.assert_close(model(x), before)
    assert "left alone: 0 (its weight or bias is computed from other parameters" in caplog.text


def test_a_layer_without_weights_is_left_alone():
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))
    assert list(gated_linears(replace_linears(model))) == ["1"]


def test_a_second_call_adds_layers_and_leaves_the_first_trainable():
    model = make_llama()
    replace_linears(model, "*.q_proj", modules_to_save=["lm_head"])
    first = trained(model)
    values = gated_linears(model)["model.layers.0.self_attn.q_proj"].rigsa_values
    replace_linears(model, "*.mlp.*", shared_gate=True)
    assert first < trained(model)
    assert gated_linears(model)["model.layers.0.self_attn.q_proj"].rigsa_values is values
    assert len(gated_linears(model)) == 8
    assert trained(model) - first == {
        name for name in flags(model) if ".mlp." in name and "rigsa_" in name and "alpha" not in name
    } | {"model.layers.0.mlp.gate_proj.rigsa_alpha"}
    with pytest.raises(ValueError, match="it is adapted already"):
        replace_linears(model, "*.q_proj")


def test_modules_to_save_are_trained_as_they_are():
    settings = transformers.LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(settings)
    replace_linears(model, modules_to_save="score")
    assert type(model.score) is nn.Linear
    assert {name for name in trained(model) if "rigsa_" not in name} == {"score.weight"}
    assert len(gated_linears(model)) == 7


def test_adapters_of_peft_are_neither_adapted_nor_frozen(caplog):
    model = make_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, config)
    before = trained(model)
    with caplog.at_level(logging.INFO, "rigsa_kernels"):
        replace_linears(model, alpha_init=0.0)
    names = set(gated_linears(model))
    assert len(names) == 14
    assert {name.rpartition(".")[2] for name in names} == {
        "base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"
    }  # fmt: skip
    assert {name for name in trained(model) if "rigsa_" not in name} == before
    assert "lora_A.default (it is an adapter of PEFT)" in caplog.text
    assert not any("lora_" in name or "modules_to_save" in name for name in left_out(model))


@pytest.mark.parametrize(
    ("config", "linears", "left"),
    [
        (
            transformers.MixtralConfig(
                vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=4,
            ),
            2 * (2 * 32 * 32 + 2 * 16 * 32),
            {"model.layers.0.mlp.experts.gate_up_proj": 4 * 128 * 32, "model.layers.1.mlp.gate.weight": 4 * 32},
        ),
        (
            transformers.OPTConfig(
                vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
                word_embed_proj_dim=32, max_position_embeddings=30,
            ),
            4 * 32 * 32 + 2 * 32 * 48,
            {"model.decoder.embed_tokens.weight": 64 * 32},
        ),
    ],
    ids=["experts", "tied-head"],
)  # fmt: skip
def test_the_summary_counts_all_matrices_of_the_model(config, linears, left):
    model = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    replace_linears(model, exclude=["*.experts.*"])
    others = left_out(model)
    assert left.items() <= others.items()
    assert linears + sum(others.values()) == total
    assert f"they hold {linears / total:.2%} of the model's {total:,} weights in matrices" in adapter_summary(model)


def test_a_layer_that_stands_in_two_places_is_exchanged_in_both():
    shared = replace_linears(nn.Sequential(nn.Linear(4, 4)))[0]
    model = nn.ModuleDict({"one": shared, "other": shared})
    restore_linears(model)
    assert type(model["one"]) is nn.Linear
    assert model["one"] is model["other"]
