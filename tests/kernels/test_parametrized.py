"""Adapters on weights that code reads: experts, Conv1D, attention of PyTorch, and layers whose parent reads them."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.nn.utils.parametrizations import weight_norm

from rigsa_kernels import (
    GatedSparseLinear,
    GatedSparseWeight,
    MaskedAdamW,
    SparsePattern,
    adapter_summary,
    gated_linears,
    layer_key,
    left_out,
    merge_linears,
    replace_linears,
    restore_linears,
    uniform_init,
    unmerge_linears,
    verify_adapted,
)
from rigsa_kernels.selection import adaptable

IDS = torch.arange(1, 20)[None]


def of_family(name: str, **settings: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes | settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def mixtral(**more: object) -> transformers.PreTrainedModel:
    return of_family("Mixtral", intermediate_size=48, num_key_value_heads=2, num_local_experts=4, **more)


def qwen3_moe() -> transformers.PreTrainedModel:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return of_family("Qwen3Moe", intermediate_size=48, num_key_value_heads=2, **more)


def gpt_oss() -> transformers.PreTrainedModel:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2}
    return of_family("GptOss", intermediate_size=24, **more)


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def mamba() -> transformers.PreTrainedModel:
    return of_family("Mamba", state_size=4, intermediate_size=64)


MODELS = {
    "mixtral": (mixtral, {"experts.gate_up_proj", "experts.down_proj"}),
    "mixtral-eager": (lambda: mixtral(experts_implementation="eager"), {"experts.gate_up_proj", "experts.down_proj"}),
    "qwen3-moe": (qwen3_moe, {"experts.gate_up_proj", "experts.down_proj"}),
    "gpt-oss": (gpt_oss, {"experts.gate_up_proj", "experts.down_proj"}),
    "gpt2": (gpt2, {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}),
    "mamba": (mamba, {"mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight"}),
}


@pytest.fixture(params=MODELS)
def family(request):
    make, read = MODELS[request.param]
    return make(), read


def weights(model: nn.Module) -> dict[str, GatedSparseWeight]:
    return {name: layer for name, layer in gated_linears(model).items() if isinstance(layer, GatedSparseWeight)}


def make_tickets(model: nn.Module, density: float) -> None:
    for name, layer in gated_linears(model).items():
        generator = torch.Generator().manual_seed(layer_key(name))
        layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape, generator=generator) < density))


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_closed_gates_leave_the_model_as_it_was_to_the_bit(family):
    model, read = family
    before, keys, names = logits(model), list(model.state_dict()), list(dict(model.named_parameters()))
    replace_linears(model, alpha_init=0.0)
    assert len(weights(model)) == 2 * len(read), "two layers"
    assert all(name.replace("rigsa_", "").endswith(tuple(read)) for name in weights(model))
    assert torch.equal(logits(model), before)
    assert {key for key in model.state_dict() if "rigsa_" not in key} == set(keys)
    assert verify_adapted(model, IDS) == {}
    restore_linears(model)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_output_and_gradients_are_those_of_the_sum_of_the_matrices(family, density):
    """Against the base model with ``W0 + alpha D`` written into its parameters, by PyTorch's own gradients."""
    model, _ = family
    reference = copy.deepcopy(model).requires_grad_(True)
    replace_linears(model, alpha_init=0.5)
    if density < 1:
        make_tickets(model, density)
    for layer in weights(model).values():
        place = next(name for name, module in model.named_modules() if module is layer.place)
        with torch.no_grad():
            layer.rigsa_values.normal_(std=0.1)
            reference.get_parameter(f"{place}.{layer.name}").add_(0.5 * layer.delta().view(layer.weight_shape))
    for name, layer in gated_linears(model).items():
        if not isinstance(layer, GatedSparseWeight):
            with torch.no_grad():
                reference.get_parameter(f"{name}.weight").add_(0.5 * layer.delta())
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    logits(model).square().sum().backward()
    logits(reference).square().sum().backward()
    assert weights(model)
    for layer in weights(model).values():
        place = next(name for name, module in model.named_modules() if module is layer.place)
        grad = reference.get_parameter(f"{place}.{layer.name}").grad.view(layer.pattern.shape)
        scale = grad.abs().max().item()
        at_pattern = layer.pattern.gather(grad)
        torch.testing.assert_close(layer.rigsa_values.grad, 0.5 * at_pattern, rtol=1e-3, atol=1e-4 * scale)
        dalpha = (layer.rigsa_values.detach() * at_pattern).sum()
        torch.testing.assert_close(layer.rigsa_alpha.grad[0], dalpha, rtol=1e-3, atol=1e-2 * scale)


def test_initial_values_are_those_of_the_parameters_name_and_inputs():
    model = replace_linears(gpt2(), seed=3)
    layer = model.transformer.h[1].mlp.c_proj.rigsa_weight
    assert layer.key == layer_key("transformer.h.1.mlp.c_proj")
    assert torch.equal(layer.rigsa_values, uniform_init((128, 32), 128**-0.5, seed=3, key=layer.key))
    experts = replace_linears(gpt_oss()).model.layers[0].mlp.experts
    for name, fan_in in (("gate_up_proj", 32), ("down_proj", 24)):
        layer = getattr(experts, f"rigsa_{name}")
        assert layer.bound == pytest.approx(fan_in**-0.5)
        assert layer.key == layer_key(f"model.layers.0.mlp.experts.{name}")
    experts = replace_linears(mixtral()).model.layers[0].mlp.experts
    assert experts.rigsa_down_proj.bound == pytest.approx(48**-0.5)
    assert experts.rigsa_down_proj.rigsa_values.shape == (4 * 32, 48)


def test_what_is_trained_saved_and_loaded_is_the_same_model(family, tmp_path):
    model, _ = family
    base = copy.deepcopy(model)
    replace_linears(model, alpha_init=0.1)
    make_tickets(model, 0.2)
    frozen = {name: layer.weight.clone() for name, layer in gated_linears(model).items()}
    optimizer = MaskedAdamW(model, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(logits(model)[0, :-1], IDS[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(layer.frozen_matrix(), frozen[name]) for name, layer in gated_linears(model).items())
    other = replace_linears(base, alpha_init=7.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    for _ in range(2):
        merge_linears(model, keep_adapter=True)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
        unmerge_linears(model)
        assert torch.equal(logits(model), want)
    assert all(torch.equal(layer.frozen_matrix(), frozen[name]) for name, layer in gated_linears(model).items())
    merge_linears(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=1e-5)


def test_a_base_loads_into_an_adapted_model_and_the_other_way_round(family):
    model, _ = family
    state = {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    plain = copy.deepcopy(model)
    plain.load_state_dict(state, strict=False)
    replace_linears(model, alpha_init=0.0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("rigsa_" in name for name in missing if name in dict(model.named_parameters()))
    assert torch.equal(logits(model), logits(plain))
    restore_linears(model)
    assert torch.equal(logits(model), logits(plain))


def test_what_is_moved_and_cast_moves_the_parameter_too():
    model = replace_linears(mixtral(experts_implementation="eager"), alpha_init=0.0)
    want = logits(model)
    model.double()
    torch.testing.assert_close(logits(model), want.double(), rtol=1e-4, atol=1e-5)
    restore_linears(model)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float64
    torch.testing.assert_close(logits(model), want.double(), rtol=1e-4, atol=1e-5)


def test_the_summary_counts_what_is_read():
    model = replace_linears(mixtral())
    assert {name.removesuffix(".weight") for name in left_out(model)} == {
        "model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"
    }  # fmt: skip
    assert "12 gated sparse layers" in adapter_summary(model)


@pytest.mark.parametrize("include", ["*.experts.gate_up_proj", lambda name, _: name.endswith("gate_up_proj")])
def test_parameters_are_selected_by_their_own_names(include):
    model = replace_linears(mixtral(), include)
    assert list(gated_linears(model)) == [f"model.layers.{i}.mlp.experts.rigsa_gate_up_proj" for i in (0, 1)]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{name}.rigsa_{part}" for name in gated_linears(model) for part in ("values", "alpha")
    }
    replace_linears(model, "*.experts.down_proj")
    assert len(gated_linears(model)) == 4


class Reads(nn.Module):
    """Reads a weight that nobody knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.called(x), self.read.weight)


def test_a_layer_that_is_read_or_unused_is_found_and_can_be_adapted_by_its_weight():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(3, 8)
    before = model(x)
    replace_linears(model, alpha_init=0.5)
    model.train()
    assert set(verify_adapted(model, x)) == {"read", "unused"}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    restore_linears(model)
    replace_linears(model, exclude=["unused"], by_weight="read", alpha_init=0.5)
    assert verify_adapted(model, x) == {}
    assert not torch.allclose(model(x), before)
    want = F.linear(model.called(x), model.read.rigsa_weight.weight + 0.5 * model.read.rigsa_weight.delta())
    torch.testing.assert_close(model(x), want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="expected an output that depends on something trained"):
        verify_adapted(model, x)


def test_frozen_values_are_not_said_to_lack_a_gradient():
    model = replace_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[0].requires_grad_(False)
    assert verify_adapted(model, torch.randn(2, 8)) == {}


@pytest.mark.parametrize("nested", [True, False])
def test_an_encoder_of_pytorch_is_the_same_in_training_and_on_its_fast_path(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), torch.randn(3, 5, 16)
    base = encoder(x)
    replace_linears(encoder, alpha_init=1.0)
    assert len(gated_linears(encoder)) == 8
    assert not [name for name in left_out(encoder) if "norm" not in name]
    trained = encoder.train()(x)
    assert not torch.allclose(trained, base, atol=1e-3)
    torch.testing.assert_close(encoder.eval()(x), trained)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), trained, rtol=1e-4, atol=1e-5)
    trained.pow(2).sum().backward()
    assert all(layer.rigsa_values.grad is not None for layer in gated_linears(encoder).values())
    assert verify_adapted(encoder, x) == {}


def test_two_products_cannot_be_taken_where_a_weight_is_read():
    model = gpt2()
    for options in ({"numerics": "exact"}, {"force": "fused"}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: .*\(in transformer\.h\.0\.attn\.c_attn\)"):
            replace_linears(model, **options)
    assert not gated_linears(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "alpha", "warned"), [
    (torch.bfloat16, 1e-6, True), (torch.bfloat16, 1.0, False), (torch.float32, 1e-6, False),
])  # fmt: skip
def test_rounding_an_adapter_away_where_a_weight_is_read_is_warned_about(caplog, dtype, alpha, warned):
    replace_linears(gpt2().to(dtype), alpha_init=alpha)
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == warned
    assert not warned or "8 of 8 layers start with gates at 1e-06" in messages[0]


def test_a_switched_off_adapter_gives_the_base_and_its_weight_no_gradient():
    model = mixtral()
    before = logits(model)
    replace_linears(model, alpha_init=0.5)
    for layer in gated_linears(model).values():
        layer.enabled = False
    assert torch.equal(logits(model), before)


def test_tied_and_parametrised_weights_are_left_alone():
    model = gpt2()
    model.transformer.h[0].mlp.c_fc.weight = model.transformer.h[1].mlp.c_fc.weight
    weight_norm(model.transformer.h[0].mlp.c_proj)
    replace_linears(model)
    assert len(gated_linears(model)) == 5


def test_what_is_said_to_be_adaptable_is_adapted(family):
    model, _ = family
    expected = adaptable(model)
    replace_linears(model)
    numbers = {name.replace(".rigsa_weight", "").replace("rigsa_", ""): layer.num_weights
               for name, layer in gated_linears(model).items()}  # fmt: skip
    assert numbers == expected


def test_a_read_layer_in_a_list_of_all_is_a_gated_layer_like_any_other():
    assert all(isinstance(layer, GatedSparseLinear) for layer in gated_linears(replace_linears(mixtral())).values())


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_where_16_bits_round_a_read_weights_adapter_away_that_is_said(make):
    model = make().bfloat16()
    replace_linears(model, alpha_init=1e-6)
    read = weights(model)
    assert f"{len(read)} of the layers are read as weights in 16 bits" in adapter_summary(model)
    wrong = verify_adapted(model, IDS)
    assert wrong.keys() == read.keys()
    assert all("rounding takes most of it away" in reason for reason in wrong.values())
    base = logits(restore_linears(copy.deepcopy(model)))
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(0.5 if isinstance(layer, GatedSparseWeight) else 0.0)
    assert verify_adapted(model, IDS) == {}
    assert not torch.equal(logits(model), base)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.zero_()  # a closed gate has nothing to lose
    assert verify_adapted(model, IDS) == {}
    wide = replace_linears(make(), alpha_init=1e-6)
    assert "in 16 bits" not in adapter_summary(wide)
    assert verify_adapted(wide, IDS) == {}


@pytest.mark.parametrize("training", [True, False])
def test_a_capture_that_is_refused_prepares_nothing(training, monkeypatch):
    """What runs in a capture is recorded and not done, so a matrix that is made there holds nothing."""
    model = gpt2().train(training)
    replace_linears(model, alpha_init=0.5)
    layer = next(iter(weights(model).values()))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            before = layer._made
            with pytest.raises(RuntimeError, match="cannot be captured" if training else "expected a pass"):
                layer()
            assert layer._made is before
        made = layer()
        torch.testing.assert_close(made, (layer.weight + layer.rigsa_alpha * layer.delta()).view_as(made))
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            if training:  # a replay would read the matrix of the values that an optimiser has replaced since
                with pytest.raises(RuntimeError, match="cannot be captured"):
                    layer()
            else:
                assert torch.equal(layer(), made)
        with torch.no_grad():
            layer.rigsa_values.mul_(2)
