"""Adapters put into the weights, taken out again, and what rounding makes of them."""

import gc
import weakref

import peft
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_llama
from rigsa_kernels import (
    GatedSparseLinear,
    SparsePattern,
    gated_linears,
    merge_linears,
    replace_linears,
    restore_linears,
    rounding_losses,
    unmerge_linears,
)


def open_gates(model: nn.Module, alpha: float) -> None:
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(alpha)


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
    for call in (merge_linears, rounding_losses, restore_linears):
        with pytest.raises(ValueError, match=r"expected gated sparse layers to .*, found none in LlamaForCausalLM"):
            call(model)


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


def make(density: float, dtype: torch.dtype = torch.float32, alpha: float = 0.5) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)).to(dtype)
    replace_linears(model, alpha_init=alpha, numerics="composed")
    for layer in gated_linears(model).values():
        if density < 1:
            layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < density))
    return model, torch.randn(3, 40, dtype=dtype)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from([1.0, 0.3, 0.0]),
       st.floats(-3, 3, width=16))  # fmt: skip
def test_merged_and_taken_out_again_is_the_same_model_to_the_bit(dtype, density, alpha):
    model, x = make(density, dtype, alpha)
    before, output, layers = bits(model), model(x), list(model)
    for _ in range(3):
        merged = merge_linears(model, keep_adapter=True)
        assert torch.equal(merged(x), output)
        unmerge_linears(model)
        assert list(model) == layers
    after = bits(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(x), output)


def test_a_thousand_times_is_still_the_identity():
    model, _ = make(0.3, torch.bfloat16, 1.7)
    before = bits(model)
    for _ in range(1000):
        unmerge_linears(merge_linears(model, keep_adapter=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def test_an_adapter_goes_on_training_after_it_was_merged():
    """The same parameters come back, so an optimiser made before still holds them."""
    model, x = make(0.3)
    values = model[0].rigsa_values
    unmerge_linears(merge_linears(model, keep_adapter=True))
    assert model[0].rigsa_values is values
    model(x).sum().backward()
    before = model(x)
    with torch.no_grad():
        values.add_(values.grad)
    assert not torch.equal(model(x), before)
    assert torch.allclose(model[0].frozen_matrix() + 0.5 * model[0].delta(), merge_linears(model)[0].weight)


def test_the_frozen_weight_is_not_kept_beside_the_merged_one():
    model, _ = make(0.3)
    frozen = weakref.ref(model[0].weight)
    merge_linears(model, keep_adapter=True)
    gc.collect()
    assert frozen() is None


def test_moved_while_merged():
    model, x = make(0.3)
    merge_linears(model, keep_adapter=True).double()
    want = model(x.double())
    unmerge_linears(model)
    torch.testing.assert_close(model(x.double()), want, rtol=1e-5, atol=1e-6)


def test_what_was_not_kept_or_was_written_to_is_not_taken_out():
    model, _ = make(0.3)
    with pytest.raises(ValueError, match="expected layers that merge_linears"):
        unmerge_linears(model)
    merge_linears(model, keep_adapter=True)
    layers = list(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(ValueError, match="the weight of 1 has been written to"):
        unmerge_linears(model)
    assert list(model) == layers


POISON = [
    ("rigsa_alpha", float("nan"), torch.float32, "expected finite gates and values, got others in 1"),
    ("rigsa_alpha", float("inf"), torch.bfloat16, "expected finite gates and values, got others in 1"),
    ("rigsa_values", float("nan"), torch.float32, "expected finite gates and values, got others in 1"),
    ("rigsa_values", float("-inf"), torch.bfloat16, "expected finite gates and values, got others in 1"),
    ("rigsa_values", 1e6, torch.float16, "exceeds torch.float16 or W0 is not finite in 1"),
    ("weight", float("nan"), torch.float32, "W0 is not finite in 1"),
]


@pytest.mark.parametrize(("name", "value", "dtype", "message"), POISON)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_merge_that_fails_changes_nothing(name, value, dtype, message, density):
    model, _ = make(density, dtype)
    with torch.no_grad():
        getattr(model[1], name).view(-1)[3 if name != "rigsa_alpha" else 0] = value
    before, layers = bits(model), list(model)
    with pytest.raises(ValueError, match=message):
        merge_linears(model)
    assert list(model) == layers
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in bits(model).items())


def test_a_gated_layer_itself_is_not_merged():
    with pytest.raises(ValueError, match="got a gated layer itself"):
        merge_linears(make(1.0)[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_what_rounding_takes_is_counted(dtype, density):
    for alpha, lost, error in ((1e-7, 1.0, 1.0), (0.0, 0.0, 0.0), (100.0, 0.0, 0.01)):
        model, _ = make(density, torch.bfloat16, alpha)
        found = rounding_losses(model)
        assert list(found) == ["0", "1"]
        for name, layer in gated_linears(model).items():
            updates = layer.rigsa_values.numel() if alpha else 0
            assert found[name].updates == updates
            assert found[name].lost == pytest.approx(lost * updates, abs=0.01 * updates)
            assert found[name].error == pytest.approx(error, abs=0.01)


def test_what_rounding_takes_is_what_the_merge_does():
    model, _ = make(0.5, torch.bfloat16, 0.02)
    found, base = rounding_losses(model), [layer.weight.clone() for layer in model]
    masks = [layer.pattern.to_mask() for layer in model]
    wanted = [0.02 * layer.delta().double() for layer in model]
    merge_linears(model)
    for index in range(2):
        moved = model[index].weight.double() - base[index].double()
        assert 0 < found[str(index)].lost < found[str(index)].updates
        assert found[str(index)].lost == int((moved[masks[index]] == 0).sum())
        error = (moved - wanted[index]).norm() / wanted[index].norm()
        assert found[str(index)].error == pytest.approx(error.item(), rel=1e-5)


@pytest.fixture(params=["both", "some", "off", "merged"])
def rosa(request):
    """A low-rank half beside the sparse one, as RoSA has them; also switched off, or merged by PEFT."""
    model = make_llama()
    names = ["q_proj", "up_proj"] if request.param == "some" else "all-linear"
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names), model).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    replace_linears(model, alpha_init=0.5)
    for layer in gated_linears(model).values():
        layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < 0.3))
    for module in model.modules():
        if request.param == "off" and hasattr(module, "get_delta_weight"):
            module.enable_adapters(False)
        if request.param == "merged" and hasattr(module, "get_delta_weight"):
            module.merge()
    return model


def test_the_low_rank_half_is_merged_with_the_sparse_one(rosa, tmp_path):
    ids = torch.arange(20)[None]
    want = rosa(ids).logits
    merge_linears(rosa)
    assert not [name for name, _ in rosa.named_parameters() if "lora" in name or "base_layer" in name]
    assert all(type(layer.mlp.up_proj) is nn.Linear for layer in rosa.model.layers)
    torch.testing.assert_close(rosa(ids).logits, want, rtol=1e-4, atol=1e-5)
    rosa.save_pretrained(tmp_path)
    torch.testing.assert_close(type(rosa).from_pretrained(tmp_path)(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_both_halves_are_taken_out_again(rosa):
    before, names = bits(rosa), list(rosa.state_dict())
    unmerge_linears(merge_linears(rosa, keep_adapter=True))
    assert list(rosa.state_dict()) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(rosa).items())


def test_an_adapter_of_peft_that_is_more_than_a_matrix_is_refused():
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), make_llama())
    replace_linears(model)
    with pytest.raises(ValueError, match=r"expected a plain LoRA around model\.layers\.0\.self_attn\.q_proj"):
        merge_linears(model)
    assert len(gated_linears(model)) == 14


def test_merged_layers_are_of_the_kind_that_was_adapted():
    model, _ = make(0.5)
    model.eval()
    merge_linears(model)
    assert all(type(layer) is nn.Linear and not layer.training for layer in model)
    assert not any(isinstance(module, GatedSparseLinear) for module in model.modules())
