"""In training on a GPU the optimiser tells 16-bit layers when one product is enough; here on tensors of a CPU."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, parameter_groups, replace_linears
from rigsa_kernels.exactness import need_two_products
from rigsa_kernels.switching import Switch


def make_model(density: float | None = 0.3, **options: object) -> nn.Sequential:
    """Layers that go by the rule of a GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 48)).bfloat16()
    replace_linears(model, **options)
    for layer in gated_linears(model).values():
        layer.rule_device = torch.device("cuda")
        if density is not None:
            layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < density))
    return model


def open_gate(layer: nn.Module, alpha: float) -> None:
    with torch.no_grad():
        layer.rigsa_alpha.fill_(alpha)


@pytest.mark.parametrize("density", [None, 0.3])
def test_all_layers_are_measured_as_each_would_be(density):
    model = make_model(density)
    layers = list(gated_linears(model).values())
    for alpha in (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1.0):
        open_gate(layers[0], alpha)
        assert need_two_products(layers).tolist() == [not layer.is_safe(torch.bfloat16).item() for layer in layers]
    open_gate(layers[0], 1.0)
    assert need_two_products(layers).tolist() == [False, True]


def test_a_decision_is_measured_before_one_step_and_adopted_before_the_next():
    model = make_model()
    first, second = gated_linears(model).values()
    switch = Switch([first, second])
    open_gate(first, 1.0)
    switch.before_step()
    assert first.exact_in_training
    open_gate(first, 0.0)
    switch.before_step()
    assert (first.exact_in_training, second.exact_in_training) == (False, True)
    switch.before_step()
    assert first.exact_in_training


def run(model: nn.Module, optimizer: MaskedAdamW, steps: int) -> list[bool]:
    made = []
    for step in range(steps):
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().pow(2).mean().backward()
        made.append(all(layer.exact_in_training for layer in gated_linears(model).values()))
        optimizer.step()
        optimizer.zero_grad()
    return made


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_decides_as_one_that_was_not_interrupted(stop):
    options = {"lr": 1e-3, "alpha_lr": 1e-2}
    whole = make_model()
    exact = run(whole, MaskedAdamW(whole, **options), 6)
    assert exact[0]
    assert not exact[-1], "the gates have to open within the steps, or nothing is tested"
    begun = make_model()
    optimizer = MaskedAdamW(begun, **options)
    run(begun, optimizer, stop)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = make_model()
    resumed.load_state_dict(begun.state_dict())
    again = MaskedAdamW(resumed, **options)
    again.load_state_dict(state)
    decisions = []
    for step in range(stop, 6):
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(step)).bfloat16()
        resumed(x).float().pow(2).mean().backward()
        decisions.append(all(layer.exact_in_training for layer in gated_linears(resumed).values()))
        again.step()
        again.zero_grad()
    assert decisions == exact[stop:]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_decisions_of_another_model_are_refused():
    model = make_model()
    optimizer = MaskedAdamW(model)
    state = optimizer.state_dict()
    assert len(state["numerics"]["exact"]) == 2
    state["numerics"]["exact"] = [True]
    with pytest.raises(ValueError, match="expected decisions of 2 layers, got 1"):
        optimizer.load_state_dict(state)


def test_there_is_nothing_to_decide_in_float32_or_where_numerics_are_given(caplog):
    for model in (make_model().float(), make_model(numerics="exact")):
        with caplog.at_level(logging.INFO):
            assert "numerics" not in MaskedAdamW(model).state_dict()


def test_where_nothing_is_decided_a_step_asks_no_layer():
    """Counted, as time is noise: a small model waits for the host."""
    pytest.importorskip("triton")
    from benchmarks.optimizer_host import calls

    counts = []
    for layers in (2, 40):
        model = replace_linears(nn.Sequential(*(nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(layers))))
        switch = Switch(gated_linears(model).values())
        switch.before_step()
        counts.append(calls(switch.before_step))
    assert counts[0] == counts[1] < 30


def test_a_model_that_comes_to_a_device_later_is_decided_for():
    model = replace_linears(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)))
    switch = Switch(gated_linears(model).values())
    switch.before_step()
    assert switch.state() is None
    model[0].rule_device = torch.device("cuda")
    model.to(torch.float64).to(torch.bfloat16)
    switch.before_step()
    assert switch.state() is not None


# Flags of the device, by which a fused kernel decides.


class Counting(TorchDispatchMode):
    """Counts what is run but for the products: on a GPU each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(function)
        self.launches += not name.startswith(VIEWS)
        return function(*args, **(kwargs or {}))


VIEWS = ("rigsa.linear_fwd", "aten.detach", "aten.view", "aten.unbind", "aten.slice", "aten.unsqueeze", "aten.alias")


def fused_model(num_layers: int, **options: object) -> nn.Sequential:
    """Level 0 by the rule of a card with fused kernels, as `dispatch` has it where there is no GPU to ask."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(num_layers))).bfloat16()
    replace_linears(model, **options)
    for layer in gated_linears(model).values():
        layer.rule_device = torch.device("cuda")
    return model


def flags(model: nn.Module, x: torch.Tensor) -> list[bool]:
    model(x)
    ways = [layer._way for layer in gated_linears(model).values()]
    assert all(way.operand is None and isinstance(way.exact, torch.Tensor) for way in ways), "not fused"
    return [way.exact.item() for way in ways]


def right(model: nn.Module) -> list[bool]:
    return [not layer.is_safe(torch.bfloat16).item() for layer in gated_linears(model).values()]


X = torch.ones(64, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_flags_of_all_layers_are_found_in_a_handful_of_launches_a_step(density):
    counts = []
    for num_layers in (3, 12):
        model = fused_model(num_layers, in_place=False)
        if density < 1:
            for layer in gated_linears(model).values():
                layer.force = "fused"
                layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < density))
        model(X)
        for layer in gated_linears(model).values():
            open_gate(layer, 0.3)
        with Counting() as found:
            model(X)
        with Counting() as again:
            model(X)
        counts.append((found.launches, again.launches))
    assert counts[0] == counts[1], "more launches for more layers"
    assert 0 < counts[0][0] <= 10
    assert counts[0][1] == 0


@pytest.mark.parametrize("make", [MaskedAdamW, partial(torch.optim.AdamW, fused=True), torch.optim.SGD])
def test_flags_follow_every_change_of_the_parameters(make):
    """Whoever makes it: this optimiser, PyTorch's (whose fused ones raise no version counter), or a write."""
    model = fused_model(4)
    layers = list(gated_linears(model).values())
    assert flags(model, X) == right(model) == [True] * 4
    open_gate(layers[2], 1.0)
    assert flags(model, X) == right(model) == [True, True, False, True]
    groups = parameter_groups(model, alpha_lr=0.5)
    optimizer = make(groups, lr=1e-3)
    seen = set()
    for step in range(3):
        for layer in layers:
            layer.rigsa_values.grad = torch.zeros_like(layer.rigsa_values)
            direction = 1.0 if layer is layers[2] and not step else -1.0
            layer.rigsa_alpha.grad = torch.full((1,), 2 * direction)
        optimizer.step()
        assert flags(model, X) == right(model)
        seen |= set(right(model))
    assert seen == {False} or len(seen) == 2


def test_a_step_of_some_layers_leaves_the_flags_of_others():
    model = fused_model(4)
    model(X)
    model(X)
    kept = [layer._flag[2] for layer in gated_linears(model).values()]
    first = gated_linears(model)["0"]
    first.rigsa_values.grad, first.rigsa_alpha.grad = torch.zeros_like(first.rigsa_values), torch.full((1,), -1e9)
    optimizer = MaskedAdamW(model, alpha_lr=1.0)
    optimizer.step_early([[0], [0]])
    assert flags(model, X) == right(model) == [False, True, True, True]
    assert [layer._flag[2] is flag for layer, flag in zip(gated_linears(model).values(), kept, strict=True)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_flags_lie_where_a_kernel_is_compiled_for():
    model = fused_model(5)
    model(X)
    for layer in gated_linears(model).values():
        open_gate(layer, 0.1)
    model(X)
    addresses = {layer._way.exact.data_ptr() for layer in gated_linears(model).values()}
    assert len(addresses) == 5
    assert all(address % 16 == 0 for address in addresses)


def test_a_copy_has_flags_of_its_own():
    model = fused_model(2)
    model(X)
    copied = copy.deepcopy(model)
    for layer in gated_linears(copied).values():
        layer.rule_device = torch.device("cuda")
        open_gate(layer, 1.0)
    assert flags(copied, X) == [False, False]
    assert flags(model, X) == [True, True]
