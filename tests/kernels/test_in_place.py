"""A packed layer multiplies by its own weight, composed; W0 is there again for everybody who looks for it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from rigsa_kernels import (
    GatedSparseLinear,
    MaskedAdamW,
    SparsePattern,
    free_entries,
    gated_linears,
    merge_linears,
    replace_linears,
    restore_linears,
    restore_weights,
)
from rigsa_kernels.format import positions
from rigsa_kernels.reference import NonFiniteGateError

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make_model(dtype: torch.dtype = torch.float32, density: float = 0.3, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40)).to(dtype)
    replace_linears(model, **({"alpha_init": 0.5, "numerics": "composed"} | options))
    for layer in gated_linears(model).values():
        layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < density))
    return model


def make_x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in gated_linears(model).values()]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_the_composed_one_after_a_pass_and_w0_after_the_step(dtype):
    model, x = make_model(dtype), make_x(dtype)
    frozen, first = weights(model), model[0]
    for _ in range(3):
        model(x)
        assert torch.equal(first.weight, first.merged().weight)
        assert not torch.equal(first.weight, frozen[0])
        assert torch.equal(first.frozen_matrix(), frozen[0])
        train_step(model, MaskedAdamW(model), x)
        assert same_bits(weights(model), frozen)


def test_no_second_matrix_is_kept():
    model, x = make_model(), make_x()
    model(x)
    first = model[0]
    assert first._way.operand is first.weight
    assert first.in_place_weight.base_values.numel() == first.rigsa_values.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numerics", ["auto", "composed", "exact"])
def test_training_has_the_bits_of_a_matrix_of_its_own(dtype, numerics):
    """In place or not, the same sums are multiplied."""
    results = []
    for in_place in (True, False):
        model, x = make_model(dtype, numerics=numerics, in_place=in_place), make_x(dtype)
        optimizer = MaskedAdamW(model, lr=1e-2)
        for _ in range(3):
            for _ in range(2):
                model(x).float().pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters() if p.requires_grad] + [model(x).detach()])
    assert same_bits(*results)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    ],
    ids=["sgd", "adamw-fused", "adamw-foreach"],
)
def test_any_optimiser_leaves_w0_behind_and_the_next_pass_is_fresh(make_optimizer):
    model, x = make_model(), make_x()
    frozen = weights(model)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        train_step(model, optimizer, x)
        assert same_bits(weights(model), frozen)
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_an_optimiser_of_another_model_changes_nothing_in_the_midst_of_a_pass():
    model, other, x = make_model(), make_model(), make_x()
    loss = model(x).pow(2).sum()
    train_step(other, MaskedAdamW(other), x)
    composed = weights(model)
    loss.backward()
    assert same_bits(weights(model), composed)


def test_a_step_between_a_pass_and_its_backward_is_an_error_as_for_any_layer():
    model, x = make_model(), make_x().requires_grad_()
    optimizer = MaskedAdamW(model)
    model(x).sum().backward(retain_graph=True)
    loss = model(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_copies_pickles_and_averages_show_w0():
    model, x = make_model(), make_x()
    frozen = weights(model)
    want = model(x)
    state = model.state_dict()
    assert torch.equal(state["0.weight"], frozen[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(weights(twin), frozen)
        assert torch.equal(twin(x), want)
        assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
    model(x)
    assert torch.equal(state["0.weight"], frozen[0]), "a state does not change when passes go on"


def test_an_average_of_models_averages_w0():
    model, x = make_model(), make_x()
    averaged, optimizer = AveragedModel(model), MaskedAdamW(model, lr=1e-2)
    frozen = weights(model)
    for _ in range(3):
        train_step(model, optimizer, x)
        averaged.update_parameters(model)
        model(x)  # a look between two steps
        restore_weights(model)
    for got, want in zip(weights(averaged.module), frozen, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_switching_off_and_on_keeps_every_bit(dtype):
    model, x = make_model(dtype), make_x(dtype)
    frozen, want = weights(model), model(x)
    base = copy.deepcopy(restore_linears(copy.deepcopy(model)))
    for _ in range(3):
        for layer in gated_linears(model).values():
            layer.enabled = False
        assert torch.equal(model(x), base(x))
        assert same_bits(weights(model), frozen)
        for layer in gated_linears(model).values():
            layer.enabled = True
        assert torch.equal(model(x), want)


def test_new_patterns_loads_moves_merges_and_restoring_start_from_w0():
    x = make_x()
    frozen = weights(make_model())
    for change in (
        lambda model: model[0].set_pattern(SparsePattern.from_mask(torch.rand(24, 40) < 0.1)),
        lambda model: model.load_state_dict(make_model().state_dict()),
        lambda model: model.double(),
        lambda model: model.to("cpu"),
        restore_linears,
        restore_weights,
    ):
        model = make_model()
        model(x)
        change(model)
        assert torch.equal(model[0].weight.float(), frozen[0])
    model = make_model()
    want = model(x)
    assert torch.equal(merge_linears(model)(x), want)


def test_a_weight_that_is_written_to_while_composed_is_an_error():
    for look in (
        lambda model: model(make_x()),
        lambda model: model[0].frozen_matrix(),
        lambda model: model.state_dict(),
        restore_weights,
        copy.deepcopy,
    ):
        model = make_model()
        model(make_x())
        with torch.no_grad():
            model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"weight: it was written to while it held W0 \+ alpha \* D"):
            look(model)


def test_a_weight_that_is_written_to_or_exchanged_is_the_new_w0():
    for composed in (False, True):
        model, x = make_model(), make_x()
        new = torch.randn(24, 40)
        model(x)
        if not composed:
            restore_weights(model)
            with torch.no_grad():
                model[0].weight.copy_(new)
        else:
            model[0].weight.data = new.clone()
        assert torch.equal(model[0].frozen_matrix(), new)
        assert torch.equal(model.state_dict()["0.weight"], new)
        model(x)
        assert torch.equal(model[0].frozen_matrix(), new)
        want = new + 0.5 * model[0].delta()
        torch.testing.assert_close(model[0].weight, want)


def test_values_and_gates_that_are_exchanged_are_seen():
    model, x = make_model(), make_x()
    model(x)
    model[0].rigsa_values.data = torch.randn_like(model[0].rigsa_values)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    model[2].rigsa_alpha.data = torch.tensor([2.0])
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_tensors_in_place_of_the_parameters_are_not_written_to():
    layer, x = make_model()[0], make_x()
    for seed in range(20):  # addresses of freed tensors are used again
        torch.manual_seed(seed)
        given = {"rigsa_values": torch.randn_like(layer.rigsa_values), "weight": torch.randn(24, 40)}
        before = given["weight"].clone()
        want = nn.functional.linear(x, before + 0.5 * layer.pattern.scatter(given["rigsa_values"]), layer.bias)
        torch.testing.assert_close(functional_call(layer, given, (x,)), want)
        assert torch.equal(given["weight"], before)


def test_two_layers_on_one_weight_do_not_write_into_it():
    linear, x = nn.Linear(40, 24), make_x()
    frozen = linear.weight.detach().clone()
    layers = [
        GatedSparseLinear(
            linear, seed=seed, key=5, alpha_init=0.5, pattern=SparsePattern.from_mask(torch.rand(24, 40) < 0.3)
        )
        for seed in (1, 2)
    ]
    for _ in range(2):
        for layer in layers:
            want = nn.functional.linear(x, frozen + 0.5 * layer.delta(), linear.bias)
            torch.testing.assert_close(layer(x), want)
    assert torch.equal(linear.weight, frozen)


def test_out_of_place_the_weight_never_changes():
    model, x = make_model(in_place=False), make_x()
    frozen = weights(model)
    model(x)
    assert same_bits(weights(model), frozen)


def test_an_error_in_the_midst_of_composing_leaves_w0():
    model, x = make_model(), make_x()
    frozen, optimizer = weights(model), torch.optim.SGD(model.parameters(), 0.1)
    train_step(model, optimizer, x)
    with torch.no_grad():
        model[2].rigsa_alpha.fill_(float("nan"))
    with pytest.raises(NonFiniteGateError):
        model(x)
    assert same_bits(weights(model), frozen)
    with torch.no_grad():
        model[2].rigsa_alpha.fill_(0.5)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("during", ["compose", "restore"])
def test_an_interrupt_between_two_writes_is_mended_by_the_next(during, monkeypatch):
    """Ctrl-C, say: the first of two layers is written, the second is not."""
    model, x = make_model(), make_x()
    frozen = weights(model)

    def interrupted(matrix, pattern, entries):  # type: ignore[no-untyped-def]
        matrix.view(-1)[positions(pattern, matrix.shape)[:1]] = 7.0
        raise KeyboardInterrupt

    model(x)
    if during == "compose":
        train_step(model, torch.optim.SGD(model.parameters(), 0.1), x)
    monkeypatch.setattr(free_entries, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(x) if during == "compose" else restore_weights(model)
    monkeypatch.undo()
    assert same_bits([layer.frozen_matrix() for layer in gated_linears(model).values()], frozen)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    restore_weights(model)
    assert same_bits(weights(model), frozen)


def test_a_replica_is_made_of_w0():
    layer, x = make_model()[0], make_x()
    layer(x)
    with pytest.raises(RuntimeError, match="restore_weights"):
        layer._replicate_for_data_parallel()
    layer.restore_weight()
    want = layer(x)
    layer.restore_weight()
    replica = layer._replicate_for_data_parallel()
    vars(replica).update({name: p.detach().clone() for name, p in layer.named_parameters()})
    assert torch.equal(replica(x), want)


def test_compiled_graphs_start_from_w0():
    model, x = make_model(), make_x()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want = model(x)
    torch.testing.assert_close(compiled(x), want)
    restore_weights(model)
    torch.testing.assert_close(compiled(x), want)


def test_layers_are_not_kept_alive():
    model = make_model()
    model(make_x())
    layer = weakref.ref(model[0])
    del model
    gc.collect()
    assert layer() is None


@settings(max_examples=30)
@given(
    st.lists(
        st.sampled_from(["pass", "no_grad", "step", "off", "on", "restore", "state", "copy", "values"]), max_size=12
    )
)
def test_whatever_happens_the_frozen_weight_is_there(events):
    model, x = make_model(torch.bfloat16), make_x(torch.bfloat16)
    frozen, optimizer = weights(model), MaskedAdamW(model, lr=1e-2)
    layers = gated_linears(model).values()
    for event in events:
        if event == "pass":
            loss = model(x.requires_grad_()).float().pow(2).mean()
            loss.backward()
        elif event == "no_grad":
            with torch.inference_mode():
                model(x.detach())
        elif event == "step":
            optimizer.step()
            optimizer.zero_grad()
        elif event in ("off", "on"):
            for layer in layers:
                layer.enabled = event == "on"
        elif event == "restore":
            restore_weights(model)
        elif event == "state":
            assert torch.equal(model.state_dict()["0.weight"], frozen[0])
        elif event == "copy":
            assert same_bits(weights(copy.deepcopy(model)), frozen)
        else:
            with torch.no_grad():
                model[0].rigsa_values.mul_(0.5)
        assert same_bits([layer.frozen_matrix() for layer in layers], frozen)
        with torch.no_grad():
            assert torch.equal(model(x), copy.deepcopy(model)(x))
