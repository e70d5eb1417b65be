"""What other code attached to a layer works before, during and after an adapter, and merged into the weights."""

import copy
import functools

import pytest
import torch
import torch.nn as nn
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from rigsa_kernels import gated_linears, merge_linears, replace_linears, restore_linears, unmerge_linears


def forward_hook(module: nn.Module) -> object:
    return module.register_forward_hook(lambda _module, _args, output: 2 * output)


def forward_hook_with_kwargs(module: nn.Module) -> object:
    return module.register_forward_hook(lambda _module, _args, _kwargs, output: 3 * output, with_kwargs=True)


def pre_hook(module: nn.Module) -> object:
    return module.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def pre_hook_with_kwargs(module: nn.Module) -> object:
    return module.register_forward_pre_hook(
        lambda _module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True, prepend=True
    )


def backward_hook(module: nn.Module) -> object:
    return module.register_full_backward_hook(lambda _module, grad_input, _grad_output: (5 * grad_input[0],))


def backward_pre_hook(module: nn.Module) -> object:
    return module.register_full_backward_pre_hook(lambda _module, grad_output: (7 * grad_output[0],))


CHANGES = [
    forward_hook, forward_hook_with_kwargs, pre_hook, pre_hook_with_kwargs, backward_hook, backward_pre_hook,
]  # fmt: skip


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype), torch.randn(2, 8, dtype=dtype)


def results(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same(model: nn.Module, x: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    for one, other in zip(results(model, x), want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_from_before_go_all_the_way_and_back(change):
    model, x = make()
    bare = results(model, x)
    handle = change(model[0])
    base = results(model, x)
    assert not all(map(torch.equal, base, bare)), "or this test shows nothing"
    assert_same(replace_linears(model, alpha_init=0.0), x, base)
    assert_same(merge_linears(model, keep_adapter=True), x, base)
    assert_same(unmerge_linears(model), x, base)
    assert_same(copy.deepcopy(model), x, base)
    assert_same(restore_linears(model), x, base)
    assert_same(replace_linears(model, alpha_init=0.0), x, base)
    handle.remove()
    assert_same(model, x, bare)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("then", [lambda model: merge_linears(model), restore_linears], ids=["merged", "restored"])
def test_hooks_on_a_gated_layer_stay_when_it_goes(change, then):
    model, x = make()
    bare = results(model, x)
    handle = change(replace_linears(model, alpha_init=0.0)[0])
    want = results(model, x)
    assert_same(then(model), x, want)
    handle.remove()
    assert_same(model, x, bare)


def test_a_hook_that_is_always_called_still_is():
    model, _ = make()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1), always_call=True)
    for change in (replace_linears, merge_linears):
        with pytest.raises((RuntimeError, ValueError)):
            change(model)(torch.randn(2, 3))
    assert len(calls) == 2


def test_state_dict_hooks_go_too_and_get_the_layer_that_is_there():
    model, _ = make()
    seen: list[tuple[str, nn.Module]] = []
    model[0].register_state_dict_pre_hook(lambda module, *_: seen.append(("save", module)))
    model[0].register_state_dict_post_hook(lambda module, *_: seen.append(("saved", module)))
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(("load", module)))
    model[0].register_load_state_dict_post_hook(lambda module, _: seen.append(("loaded", module)))
    for change in (
        replace_linears, functools.partial(merge_linears, keep_adapter=True), unmerge_linears, restore_linears,
        replace_linears, merge_linears,
    ):  # fmt: skip
        change(model)
        model.load_state_dict(model.state_dict())
        assert seen == [(what, model[0]) for what in ("save", "saved", "load", "loaded")]
        seen.clear()


@pytest.mark.parametrize("others", [True, False])
def test_a_layer_with_a_forward_of_its_own_keeps_it_and_is_left_alone(others):
    model, x = make()
    linear = model[0]
    linear.forward = lambda y: 10 * nn.functional.linear(y, linear.weight, linear.bias)
    before = model(x)
    if others:
        assert list(gated_linears(replace_linears(model, alpha_init=0.0))) == ["1"]
    else:
        with pytest.raises(ValueError, match="0: its forward is set on the instance"):
            replace_linears(model, "0")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("change", [restore_linears, merge_linears])
def test_a_gated_layer_with_a_forward_of_its_own_is_not_exchanged(change):
    model, x = make()
    layer = replace_linears(model)[1]
    forward = layer.forward
    layer.forward = lambda y: 10 * forward(y)
    before = model(x)
    with pytest.raises(ValueError, match="model: 1 has a forward of its own"):
        change(model)
    assert len(gated_linears(model)) == 2
    assert torch.equal(model(x), before)


class Doubles(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        assert module.weight.shape == (8, 8)
        return 2 * output


def test_hooks_of_accelerate_go_with_the_layer():
    """A model that accelerate spread over devices has one around the forward of every layer."""
    model, x = make()
    bare = results(model, x)
    add_hook_to_module(model[0], Doubles())
    base = results(model, x)
    assert_same(replace_linears(model, alpha_init=0.0), x, base)
    assert len(gated_linears(model)) == 2
    assert_same(merge_linears(model, keep_adapter=True), x, base)
    assert_same(unmerge_linears(model), x, base)
    assert_same(restore_linears(model), x, base)
    replace_linears(model, alpha_init=0.0)
    remove_hook_from_module(model[0])
    assert_same(model, x, bare)
    add_hook_to_module(model[1], Doubles())
    doubled = results(model, x)
    assert_same(restore_linears(model), x, doubled)
    remove_hook_from_module(model[1])
    assert_same(model, x, bare)
    assert len(gated_linears(replace_linears(model))) == 2
