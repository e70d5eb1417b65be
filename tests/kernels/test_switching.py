"""In training on a GPU the optimiser tells 16-bit layers when one product is enough; here on tensors of a CPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn as nn

from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears
from rigsa_kernels.switching import Switch, measure


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
        assert measure(layers).tolist() == [not layer.is_safe(torch.bfloat16).item() for layer in layers]
    open_gate(layers[0], 1.0)
    assert measure(layers).tolist() == [False, True]


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
