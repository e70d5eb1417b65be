"""What a gated layer's state dict holds and takes, and what becomes of its pattern in other people's hands."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from conftest import make_llama
from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears


def ticket(density: float = 0.3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = replace_linears(nn.Sequential(nn.Linear(96, 64)), alpha_init=0.5)
    model[0].set_pattern(SparsePattern.from_mask(torch.rand(64, 96) < density))
    return model


def four_bits(seed: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    linear = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": bool(seed % 2)}
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 128) * (1 + seed), module=linear, **options)
    return replace_linears(nn.Sequential(linear.to("cpu")))


@pytest.mark.parametrize("derived", ["rigsa_row_base", "rigsa_word_offsets"])
def test_what_follows_from_the_mask_is_neither_saved_nor_read(derived):
    model, other, x = ticket(), ticket(0.3, seed=1), torch.randn(40, 96)
    state = model.state_dict()
    assert not [name for name in state if name.endswith(derived)]
    state[f"0.{derived}"] = torch.full((64,), 2**30, dtype=torch.int32)
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    other(x).sum().backward()


def test_a_state_dict_and_the_layer_share_no_mask():
    model, other = ticket(), ticket(1.0)
    want = model[0].pattern.to_mask()
    state = model.state_dict()
    other.load_state_dict(state)
    state["0.rigsa_words"].zero_()
    assert torch.equal(model[0].pattern.to_mask(), want)
    assert torch.equal(other[0].pattern.to_mask(), want)


def test_no_tensor_of_a_state_dict_shares_memory_with_another(tmp_path):
    """Neither a shared gate nor a pattern that two layers were given: safetensors takes no tensor twice."""
    model = replace_linears(make_llama(), "*.mlp.up_proj", shared_gate=True)
    pattern = SparsePattern.from_mask(torch.rand(48, 32) < 0.3)
    for layer in gated_linears(model).values():
        layer.set_pattern(pattern)
    save_file(model.state_dict(), tmp_path / "state.safetensors")


def test_a_shared_gate_is_one_parameter_after_loading_too():
    model, other = (replace_linears(make_llama(), shared_gate=True, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        next(iter(gated_linears(model).values())).rigsa_alpha.fill_(0.25)
    other.load_state_dict(model.state_dict())
    assert {id(layer.rigsa_alpha) for layer in gated_linears(other).values()} == {
        id(next(iter(gated_linears(other).values())).rigsa_alpha)
    }
    assert all(layer.rigsa_alpha.item() == 0.25 for layer in gated_linears(other).values())


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "moving"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_averaged_model_keeps_the_mask_to_the_bit(average, use_buffers):
    model = ticket(0.4)
    optimizer = MaskedAdamW(model, lr=0.1)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    for _ in range(3):
        model(torch.randn(8, 96)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    for one, other in zip(averaged.module[0].pattern.tensors, model[0].pattern.tensors, strict=True):
        assert torch.equal(one, other)
    assert averaged(torch.randn(2, 96)).isfinite().all()


def test_ddp_takes_a_ticket():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, x = ticket(), torch.randn(8, 96)
        parallel = DistributedDataParallel(model)
        assert torch.equal(parallel(x), model(x))
        parallel(x).sum().backward()
        assert model[0].rigsa_values.grad is not None
    finally:
        dist.destroy_process_group()


def test_a_pattern_moves_with_its_layer():
    model = ticket()
    meta = copy.deepcopy(model).to("meta")
    assert {tensor.device.type for tensor in meta[0].pattern.tensors} == {"meta"}
    assert model[0].pattern.device == torch.device("cpu")


@pytest.mark.parametrize("seed", [3, 4])
def test_a_layer_in_four_bits_saves_its_scales(seed):
    one, other, x = four_bits(0), four_bits(seed), torch.randn(4, 128)
    assert "0.weight.absmax" in one.state_dict()
    assert not torch.allclose(one(x), other(x))
    assert str(other.load_state_dict(one.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(one(x), other(x))
    assert torch.equal(one[0].frozen_matrix(), other[0].frozen_matrix())


def test_codes_without_scales_do_not_load():
    one, other = four_bits(0), four_bits(3)
    state = {name: tensor for name, tensor in one.state_dict().items() if "weight." not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight\.absmax"):
        other.load_state_dict(state)
    adapter = {name: tensor for name, tensor in state.items() if "rigsa_" in name}
    missing, unexpected = other.load_state_dict(adapter, strict=False)
    assert missing == ["0.weight"]
    assert not unexpected
