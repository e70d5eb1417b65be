"""A sparse adapter on a 4-bit base, against what bitsandbytes itself computes."""

import pytest
import torch
import torch.nn as nn
from oracle import quantize_nf4

from rigsa_kernels import SparsePattern, gated_linears, merge_linears, replace_linears, restore_linears
from rigsa_kernels.nf4 import dequantize, is_nf4_linear, nf4_base

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
