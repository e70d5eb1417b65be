"""Diff pruning: factors and gradients against autograd and by hand, and a run from its first stage to its ticket."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from rigsa.experiments.adapter import load_masks
from rigsa.experiments.config import Config
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.methods.hard_concrete import (
    LEFT,
    RIGHT,
    START,
    DiffGates,
    HardConcrete,
    chain,
    factors_of,
)
from rigsa.experiments.methods.thin_gradients import step_generator
from rigsa.experiments.train import make_optimizer
from rigsa.run import main
from rigsa_kernels import gated_linears, replace_linears
from tests.experiments.methods.test_methods import DENSITY, command, config_of, experiment

CPU = torch.device("cpu")


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape).uniform_(generator=generator)


def by_definition(u: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    soft = torch.sigmoid(u.log() - (1 - u).log() + a)
    return (soft * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def test_factors_are_hard_concrete():
    gates = HardConcrete((4000,), CPU)
    with torch.no_grad():
        gates.rigsa_logits.copy_(torch.linspace(-4, 4, 4000))
    factors, slopes = gates.draw(step_generator(CPU, 1, 2))
    a = gates.rigsa_logits.detach().clone().requires_grad_(True)
    wanted = by_definition(uniform((4000,), step_generator(CPU, 1, 2)), a)
    torch.testing.assert_close(factors, wanted.detach())
    torch.testing.assert_close(slopes, torch.autograd.grad(wanted.sum(), a)[0], rtol=1e-4, atol=1e-5)
    assert all((factors == edge).sum() > 500 for edge in (0, 1))
    # With a = 0 half of the mass of s lies above -LEFT / (RIGHT - LEFT) = 1/2, and all of it is a probability.
    assert HardConcrete((1,), CPU).presence().item() == pytest.approx(1 / (1 + math.exp(-START)))
    seen = torch.stack([gates.draw(step_generator(CPU, 0, step))[0] != 0 for step in range(400)]).float().mean(0)
    assert (seen - gates.presence()).abs().mean() < 0.03
    with torch.no_grad():
        gates.rigsa_logits.fill_(math.log(2))  # sigmoid 2/3, stretched to 1/2
    torch.testing.assert_close(gates.without_chance(), torch.full((4000,), 0.5))


def gates_config() -> Config:
    return dataclasses.replace(config_of("diff-pruning", Path("none")), l0_penalty=0.01, seed=4)


def one_layer() -> tuple[nn.Module, DiffGates]:
    torch.manual_seed(0)
    model = replace_linears(nn.Sequential(nn.Linear(6, 5, bias=False)), alpha_init=1.0, init_scale=0.0)
    gates = DiffGates(gates_config())
    gates.put_on(model)
    with torch.no_grad():
        layer = model[0]
        layer.rigsa_values.normal_()
        for part in factors_of(layer):
            part.rigsa_logits.normal_()
    return model, gates


def test_gradients_are_those_of_the_penalised_loss():
    """By autograd through the definition, with the factors of the same draws."""
    model, _ = one_layer()
    layer = model[0]
    entries, common = factors_of(layer)
    w, a, b = (
        p.detach().clone().requires_grad_(True) for p in (layer.rigsa_values, entries.rigsa_logits, common.rigsa_logits)
    )
    direction = torch.randn(5, 6)
    generator = step_generator(CPU, 4, 9)
    z = by_definition(uniform((5, 6), generator), a) * by_definition(uniform((1,), generator), b)
    shift = math.log(-LEFT / RIGHT)
    expected = (torch.sigmoid(a - shift) * torch.sigmoid(b - shift)).sum()
    ((w * z * direction).sum() + 0.01 * expected).backward()
    assert (z != 0).any()
    layer.rigsa_values.grad = direction.clone()  # of the difference
    chain(layer, step_generator(CPU, 4, 9), 0.01)
    for ours, theirs in ((layer.rigsa_values, w), (entries.rigsa_logits, a), (common.rigsa_logits, b)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_step_goes_by_the_difference_and_gives_w_back():
    model, gates = one_layer()
    layer = model[0]
    before = layer.rigsa_values.detach().clone()
    gates.draw(model, 9)
    generator = step_generator(CPU, 4, 9)
    entries, common = factors_of(layer)
    drawn = entries.draw(generator)[0] * common.draw(generator)[0]
    torch.testing.assert_close(layer.rigsa_values.detach(), before * drawn)
    model(torch.randn(3, 6)).square().sum().backward()
    gates.hand_on(model, 9)
    assert torch.equal(layer.rigsa_values.detach(), before)
    assert not gates.held
    certain = entries.without_chance() * common.without_chance()
    gates.take_off(model)
    torch.testing.assert_close(layer.rigsa_values.detach(), before * certain)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.rigsa_alpha", "0.rigsa_values"]


def test_the_factors_are_trained_as_gates_are():
    model, gates = one_layer()
    config = dataclasses.replace(gates_config(), alpha_learning_rate=0.25, weight_decay=0.5)
    rates = {}
    for group in make_optimizer(model, config).param_groups:
        rates |= {id(parameter): (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    layer = model[0]
    assert rates.pop(id(layer.rigsa_values)) == (config.learning_rate, 0.5)
    assert set(rates.values()) == {(0.25, 0.0)}
    assert {id(part.rigsa_logits) for part in factors_of(layer)} <= rates.keys()
    assert not gates.held


@pytest.fixture(scope="module")
def finished(small_model_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "diff"
    options = {"drift": False, "l0_penalty": 1e-5, "alpha_learning_rate": 5.0}
    assert main(command(config_of("diff-pruning", small_model_folder, **options), run)) == 0
    return run


def test_the_ticket_is_the_largest_difference_and_goes_on_from_it(finished, small_model_folder, monkeypatch):
    prepared = experiment("diff-pruning", small_model_folder, finished)
    masks = load_masks(prepared.model, finished / "level_1" / "mask.safetensors")
    difference = load_file(finished / "level_0" / "adapter.safetensors")
    assert difference.keys() == {f"{name}.rigsa_values" for name in masks}
    assert any((values == 0).any() for values in difference.values())
    for name, pattern in masks.items():
        size, mask = difference[f"{name}.rigsa_values"].abs(), pattern.to_mask()
        assert pattern.nnz == round(DENSITY * size.numel())
        assert size[mask].min() >= size[~mask].max()
    (finished / "level_1" / "done").unlink()
    (finished / "level_1" / "log.jsonl").unlink()
    starts = []
    monkeypatch.setattr(Experiment, "run_level", lambda self, level: starts.append(
        {name: layer.rigsa_values.detach().clone() for name, layer in gated_linears(self.model).items()}))  # fmt: skip
    monkeypatch.setattr(Experiment, "measure_base", lambda self: None)
    again = Experiment.prepare(prepared.config, finished)
    again.config.method.run(again)
    for name, values in starts[0].items():
        assert torch.equal(values, difference[f"{name}.rigsa_values"][masks[name].to_mask()])


def test_the_penalty_closes_entries(small_model_folder, tmp_path):
    zeros = []
    for penalty in (0.0, 1e-2):
        run = tmp_path / str(penalty)
        options = {"drift": False, "l0_penalty": penalty, "alpha_learning_rate": 2.0, "max_steps": 8}
        assert main(command(config_of("diff-pruning", small_model_folder, **options), run)) == 0
        values = load_file(run / "level_0" / "adapter.safetensors").values()
        zeros.append(sum(int((one == 0).sum()) for one in values))
        assert json.loads((run / "level_0" / "metrics.json").read_text())["trainable"] == 15_360
    assert zeros[1] > zeros[0] + 1000
