"""Models that other accelerators have patched: Liger's kernels run beside our layers, unsloth's passes are refused."""

import types

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers.models.llama import modeling_llama

from conftest import make_llama
from rigsa import RigsaConfig, gated_linears, replace_linears

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


def native(model, **options):
    return replace_linears(model, density=0.3, alpha_init=0.3, **options)


def under_peft(model, **options):
    return get_peft_model(model, RigsaConfig(density=0.3, alpha_init=0.3, **options))


@pytest.fixture
def liger(monkeypatch):
    """Liger's patch for Llama. It changes names in transformers' file as well, which are put back."""
    patch = pytest.importorskip("liger_kernel.transformers").apply_liger_kernel_to_llama
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    forward = modeling_llama.LlamaForCausalLM.forward
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr("liger_kernel.transformers.swiglu._swiglu_dispatch", lambda gate, up: F.silu(gate) * up)
    return patch


@pytest.mark.parametrize("adapt", [native, under_peft])
@pytest.mark.parametrize("first", ["liger", "adapter"])
def test_liger_runs_beside_an_adapter(liger, adapt, first):
    """The loss and the gradients of the model without Liger. Its kernels need a GPU; its modules call our layers."""
    plain, base = adapt(make_llama()).train(), make_llama()
    expected = plain(input_ids=IDS, labels=IDS).loss
    expected.backward()
    if first == "liger":
        liger(rope=False, rms_norm=False, fused_linear_cross_entropy=False, model=base)
    model = adapt(base)
    if first == "adapter":
        liger(rope=False, rms_norm=False, fused_linear_cross_entropy=False, model=base)
    assert len(gated_linears(model)) == 14
    assert "Liger" in repr(base.model.layers[0].mlp)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gated_linears(model).values(), gated_linears(plain).values(), strict=True):
        torch.testing.assert_close(one.rigsa_values.grad, other.rigsa_values.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one.rigsa_alpha.grad, other.rigsa_alpha.grad, rtol=1e-4, atol=1e-7)


def test_an_adapter_on_a_head_that_liger_reads_is_refused(liger):
    base = make_llama()
    liger(model=base)
    with pytest.raises(ValueError, match="Liger's fused loss reads the weight of lm_head and does not call it"):
        under_peft(base, target_modules=["q_proj", "lm_head"])
    assert not gated_linears(base)
    other = make_llama()
    liger(model=other, fused_linear_cross_entropy=False)
    assert len(gated_linears(under_peft(other, target_modules=["lm_head"]))) == 1


def test_an_adapter_on_a_head_that_liger_comes_to_read_is_refused():
    """A Trainer patches the model when training begins. Liger sets a function of its own on it; here it is ours."""
    base = make_llama()

    def lce_forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model = under_peft(base, target_modules=["q_proj", "lm_head"])
    model(input_ids=IDS, labels=IDS)
    base.forward = types.MethodType(lce_forward, base)
    with pytest.raises(ValueError, match=r"Liger's fused loss reads the weight of lm_head.*in liger_kernel_config"):
        model(input_ids=IDS, labels=IDS)
    model.unload()(input_ids=IDS, labels=IDS)
    assert not base._forward_pre_hooks  # a model that is saved whole would need this package
    others = under_peft(base, target_modules=["q_proj"])
    others(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("adapt", [native, under_peft])
def test_a_model_with_passes_of_unsloth_is_refused(adapt):
    """unsloth sets functions of its own modules on the classes of transformers; here on one instance."""

    def fast_forward(self, *args, **kwargs):
        raise AssertionError

    fast_forward.__module__ = "unsloth.models.llama"
    model = make_llama()
    model.model.layers[1].self_attn.forward = types.MethodType(fast_forward, model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match=r"got one of unsloth in model\.layers\.1\.self_attn"):
        adapt(model)
    assert not gated_linears(model)
