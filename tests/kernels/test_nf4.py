"""A sparse adapter on a 4-bit base, against what bitsandbytes itself computes."""

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from oracle import quantize_nf4
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import make_llama
from rigsa_kernels import SparsePattern, gated_linears, merge_linears, replace_linears, restore_linears, unmerge_linears
from rigsa_kernels.nf4 import dequantize, is_nf4_linear, load_scales, nf4_base, num_weights, scales_of

bnb = pytest.importorskip("bitsandbytes")


def quantized(n: int = 48, k: int = 64, double: bool = False, bias: bool = True, quant_type: str = "nf4") -> nn.Linear:
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(
        k, n, bias=bias, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type=quant_type
    )
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k) * 0.05)
    return linear.to(torch.bfloat16).to("cpu")  # bitsandbytes quantises when a layer moves


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_decoding_equals_bitsandbytes(double):
    linear = quantized(96, 128, double)
    want = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
    assert torch.equal(dequantize(nf4_base(linear.weight), (96, 128), torch.bfloat16), want)


def test_our_test_quantiser_is_theirs():
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, absmax, levels = quantize_nf4(weight)
    theirs, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(codes, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    torch.testing.assert_close(levels, state.code, rtol=0, atol=1e-7)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_layer_equals_dequantised_base_plus_adapter(double, packed):
    model = nn.Sequential(quantized(double=double))
    weight = bnb.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state).float()
    bias = model[0].bias.float()
    layer = replace_linears(model, alpha_init=0.5)[0]
    if packed:
        layer.set_pattern(SparsePattern.from_mask(torch.rand(48, 64, generator=torch.Generator().manual_seed(1)) < 0.3))
    x = torch.randn(7, 64).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    total = weight + 0.5 * layer.delta()
    torch.testing.assert_close(y.float(), x.float() @ total.T + bias, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.grad.float(), total.sum(0).expand(7, 64), rtol=0.02, atol=0.05)
    assert layer.rigsa_values.grad.shape == layer.rigsa_values.shape
    assert layer.rigsa_alpha.grad.isfinite().all()


def test_restoring_gives_the_layer_back():
    linear = quantized()
    x = torch.randn(7, 64).bfloat16()
    want = linear(x)
    model = replace_linears(nn.Sequential(linear))
    assert model[0].num_weights == 48 * 64
    assert restore_linears(model)[0] is linear
    assert torch.equal(model(x), want)


def test_merging_into_four_bits_is_refused():
    model = replace_linears(nn.Sequential(quantized(), nn.Linear(48, 8, dtype=torch.bfloat16)), numerics="composed")
    with pytest.raises(ValueError, match=r"model: 1 of 2 gated layers \(0\) are in four bits"):
        merge_linears(model)
    assert len(gated_linears(model)) == 2
    with pytest.raises(ValueError, match="merged: W0 is in four bits"):
        model[0].merged()


@pytest.mark.parametrize("packed", [False, True])
def test_a_dequantised_merge_is_a_plain_layer_in_the_dtype_of_the_products(packed):
    model = replace_linears(nn.Sequential(quantized()), numerics="composed", alpha_init=0.5)
    if packed:
        model[0].set_pattern(SparsePattern.from_mask(torch.rand(48, 64) < 0.3))
    gated, x = model[0], torch.randn(7, 64).bfloat16()
    want, total = model(x), gated.frozen_matrix().float() + 0.5 * gated.delta()
    merge_linears(model, dequantize=True, keep_adapter=True)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model[0].weight.float(), total, rtol=2**-8, atol=0)
    torch.testing.assert_close(model(x), want)
    assert unmerge_linears(model)[0] is gated
    assert torch.equal(model(x), want)


NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")


def in_four_bits(folder, **options):
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, **options)


@pytest.mark.parametrize("include", ["*", "*q_proj"])
def test_a_dequantised_model_saves_and_loads_as_any_other(include, tmp_path):
    """Also where some of its layers in four bits carry no adapter."""
    model, ids = in_four_bits(tmp_path / "base").eval(), torch.arange(20)[None]
    replace_linears(model, include, density=0.3, alpha_init=0.5)
    with torch.no_grad():
        merge_linears(model, dequantize=True)
        want = model(ids).logits
    assert not [name for name in NOTES if getattr(model, name, None)]
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(type(layer) is nn.Linear for layer in loaded.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, want)


def test_a_dequantised_merge_is_taken_out_again(tmp_path):
    model, ids = in_four_bits(tmp_path / "base").eval(), torch.arange(20)[None]
    replace_linears(model, "*q_proj", density=0.3, alpha_init=0.5)
    with torch.no_grad():
        want, types = model(ids).logits, [type(module) for module in model.modules()]
        merge_linears(model, dequantize=True, keep_adapter=True)
        unmerge_linears(model)
        assert torch.equal(model(ids).logits, want)
    assert [type(module) for module in model.modules()] == types
    assert all(getattr(model, name) for name in NOTES)
    assert model.config.quantization_config.load_in_4bit


def test_what_is_quantised_otherwise_is_not_dequantised():
    model = replace_linears(nn.Sequential(quantized(), quantized(48, 48, quant_type="fp4")), alpha_init=0.5)
    with pytest.raises(ValueError, match="expected layers in NF4 to dequantise, got 1, a Linear4bit"):
        merge_linears(model, dequantize=True)
    assert len(gated_linears(model)) == 1


def test_what_is_not_nf4_is_left_alone():
    other = quantized(quant_type="fp4")
    assert not is_nf4_linear(other)
    unquantised = bnb.nn.Linear4bit(64, 8)
    model = nn.Sequential(other, nn.Linear(48, 8), unquantised)
    assert list(gated_linears(replace_linears(model))) == ["1"]


def test_a_shape_that_kernels_cannot_decode_is_named():
    with pytest.raises(ValueError, match="in_features and block size are multiples of 32, got 40 and 64"):
        nf4_base(quantized(8, 40).weight)
    with pytest.raises(ValueError, match="in_features and block size are multiples of 32"):
        replace_linears(nn.Sequential(quantized(8, 40)))


def test_keeping_a_matrix_is_refused():
    model = replace_linears(nn.Sequential(quantized()), force="gemm")
    with pytest.raises(ValueError, match="force: 'gemm' keeps a matrix, which a 4-bit layer has none of"):
        model(torch.randn(2, 64).bfloat16())


def params(weight: torch.Tensor, block: int, double: bool = False) -> torch.Tensor:
    """A quantised weight of any block size."""
    options = {"quant_type": "nf4", "blocksize": block, "compress_statistics": double, "requires_grad": False}
    return bnb.nn.Params4bit(weight.clone(), **options).to("cpu")


def decoded_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """float64 ``[N, K]`` by the definition, one code after another."""
    state = weight.quant_state
    absmax = state.absmax if not state.nested else bnb.functional.dequantize_blockwise(state.absmax, state.state2)
    absmax = absmax.double() + (state.offset.double() if state.nested else 0)
    numbers = state.shape.numel()
    codes = torch.stack([weight.data.view(-1) >> 4, weight.data.view(-1) & 15], -1).view(-1)[:numbers].long()
    return (state.code.double()[codes] * absmax[torch.arange(numbers) // state.blocksize]).view(state.shape)


@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([64, 128, 256, 1024]), st.booleans())
def test_a_last_block_that_is_not_full_is_decoded_as_any_other(rows, runs, block, double):
    shape = (rows, 32 * runs)
    weight = params(torch.randn(shape, generator=torch.Generator().manual_seed(rows)), block, double)
    base = nf4_base(weight)
    assert num_weights(base) % base[1].numel() == 0, "kernels divide these to find the block"
    assert num_weights(base) // base[1].numel() % 32 == 0, "and decode 32 columns with one scale"
    got = dequantize(base, shape, torch.float64)
    torch.testing.assert_close(got, decoded_by_hand(weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(32, 64), (64, 64), (64, 128), (96, 192)])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_a_layer_that_bitsandbytes_reordered_for_a_cpu_is_put_back_in_order(shape, double):
    """Its scales were rounded to bfloat16, so that is what the layer holds from then on."""
    weight = params(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 64, double)
    codes, absmax, levels = nf4_base(weight)
    codes = codes.clone()
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert not torch.equal(weight.data.view(-1), codes), "or this test shows nothing"
    got = nf4_base(weight)
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], absmax.bfloat16().float())
    assert torch.equal(got[2], levels)
    assert weight.quant_state.dtype == torch.float32
    assert not weight.quant_state.packing_format_for_cpu
    want = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(dequantize(got, shape, torch.float32), want), "bitsandbytes reads it in order, too"


def test_looking_at_the_base_first_changes_nothing():
    linear = quantized(64, 64).eval()
    linear.support_avx512bf16_for_cpu = False
    x = torch.randn(4, 64).bfloat16()
    want = linear(x)
    weight = linear.weight
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    got = replace_linears(nn.Sequential(linear), alpha_init=0.0)(x)
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


def test_scales_come_back_from_what_was_saved():
    for double in (False, True):
        one, other = params(torch.randn(64, 128), 64, double), params(9 * torch.randn(64, 128), 64)
        other.data.copy_(one.data)
        load_scales(other, scales_of(one))
        assert all(map(torch.equal, nf4_base(other), nf4_base(one)))


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    scales = scales_of(params(torch.randn(64, 128), 64)) | {f"weight.{name}": new for name, new in changes.items()}
    return {name: tensor for name, tensor in scales.items() if tensor is not None}


@pytest.mark.parametrize(
    "scales",
    [
        broken(absmax=None),
        broken(absmax=torch.ones(127)),
        broken(absmax=torch.full((128,), torch.nan)),
        broken(quant_map=torch.ones(15)),
        broken(**{"quant_state.bitsandbytes__nf4": None}),
        broken(**{"quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}),
        scales_of(params(torch.randn(64, 128), 128)),
        scales_of(params(torch.randn(128, 64), 64)),
        scales_of(params(torch.randn(64, 128).bfloat16(), 64)),
    ],
    ids=["absent", "few", "nan", "levels", "no-state", "not-json", "block", "shape", "dtype"],
)
def test_scales_of_another_weight_are_refused_and_nothing_changes(scales):
    weight = params(torch.randn(64, 128), 64)
    before = [tensor.clone() for tensor in nf4_base(weight)]
    with pytest.raises(ValueError, match="weight: expected"):
        load_scales(weight, scales)
    assert all(map(torch.equal, nf4_base(weight), before))
