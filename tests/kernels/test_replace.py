import logging

import pytest
import torch
import torch.nn as nn
import transformers

import rigsa
import rigsa_kernels
from conftest import make_llama
from rigsa_kernels import (
    GatedSparseLinear,
    SparsePattern,
    adapter_summary,
    gated_linears,
    merge_linears,
    replace_linears,
    restore_linears,
)


def open_gates(model: nn.Module, alpha: float) -> None:
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(alpha)


def test_both_packages_offer_it():
    assert rigsa.replace_linears is rigsa_kernels.replace_linears


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("density", [1.0, 0.1, 0.0])
def test_merging_gives_plain_layers_with_the_bits_of_composing(dtype, density):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 16, bias=False)).to(dtype),
        torch.randn(3, 48, dtype=dtype),
    )
    frozen = [linear.weight for linear in model]
    base = [weight.clone() for weight in frozen]
    replace_linears(model, alpha_init=0.3, numerics="composed").eval()
    for layer in gated_linears(model).values():
        layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < density))
    open_gates(model, -0.3)
    layers, before = list(model), model(x)
    merged = merge_linears(model)
    assert merged is model
    assert all(type(linear) is nn.Linear and not linear.training for linear in model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(x), before)
    for linear, layer, weight in zip(model, layers, base, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * (weight.double().abs() + 0.3 * layer.delta().double().abs())
        error = (linear.weight.double() - (weight.double() - 0.3 * layer.delta().double())).abs()
        assert (error <= rounding + 2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps).all()
    assert all(map(torch.equal, frozen, base))


@pytest.mark.parametrize("numerics", ["auto", "exact"])
def test_a_merge_that_would_lose_the_adapter_is_refused_and_possible_in_float32(numerics):
    model, ids = replace_linears(make_llama().bfloat16(), numerics=numerics), torch.arange(20)[None]
    open_gates(model, 0.5)
    layer = gated_linears(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.rigsa_alpha.fill_(1e-4)
    with pytest.raises(ValueError, match=r"model: 1 of 14 gated layers \(model.layers.1.mlp.up_proj\) are in 16 bits"):
        merge_linears(model)
    assert len(gated_linears(model)) == 14
    before = model.float()(ids).logits
    torch.testing.assert_close(merge_linears(model)(ids).logits, before)
    assert not gated_linears(model)
    with pytest.raises(ValueError, match="found none in LlamaForCausalLM"):
        merge_linears(model)


def test_closed_gates_merge_into_the_base_model():
    model, ids = make_llama().bfloat16(), torch.arange(20)[None]
    before = model(ids).logits
    replace_linears(model)
    open_gates(model, 0.0)
    assert torch.equal(merge_linears(model)(ids).logits, before)


def test_a_merged_model_saves_as_any_other(tmp_path):
    model, ids = make_llama(tie_word_embeddings=True), torch.arange(20)[None]
    replace_linears(model, alpha_init=0.3)
    before = model(ids).logits
    merge_linears(model).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, before)


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
    assert adapter_summary(model) == "8 gated sparse layers: 6,144 of 6,144 weights free (100.00%)"
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
    with pytest.raises(ValueError, match=r"include: 'query' selects no linear layer .*not selected"):
        replace_linears(make_llama(), "query")
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear"):
        replace_linears(nn.ReLU())


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
