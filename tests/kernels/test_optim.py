import contextlib
import copy
import gc
import io
import itertools
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from conftest import WORDS, make_llama
from rigsa_kernels import (
    MaskedAdamW,
    SparsePattern,
    gated_linears,
    launches,
    optim,
    parameter_groups,
    replace_linears,
    restore_linears,
)


def make_model(density: float = 0.3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = replace_linears(nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8)), alpha_init=0.1, **options)
    for index, layer in enumerate(gated_linears(model).values()):
        mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(index)) < density
        layer.set_pattern(SparsePattern.from_mask(mask))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, micro_batches: int = 1) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x, target = torch.randn(16, 40, generator=generator), torch.randn(16, 8, generator=generator)
        for part in range(micro_batches):
            rows = slice(part, None, micro_batches)
            loss = (model(x[rows]) - target[rows]).pow(2).mean() / micro_batches
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_pruned_entries_and_their_moments_stay_bitwise_zero():
    """With the paper's decay of 1.0; masking gradients alone would move them."""
    model = make_model()
    masks = {name: layer.pattern.to_mask() for name, layer in gated_linears(model).items()}
    optimizer = MaskedAdamW(model, lr=0.1, weight_decay=1.0)
    train(model, optimizer, 25)
    for name, layer in gated_linears(model).items():
        state = optimizer.state[layer.rigsa_values]
        for dense in (layer.delta(), *(layer.pattern.scatter(state[key]) for key in ("exp_avg", "exp_avg_sq"))):
            assert (dense[~masks[name]].view(torch.int32) == 0).all()
            assert dense[masks[name]].count_nonzero() > 0


def test_frozen_parameters_keep_their_bits():
    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters() if "rigsa" not in name}
    train(model, MaskedAdamW(model, lr=0.1), 5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_equals_adamw_on_the_free_entries(values_dtype):
    """Twenty steps against torch.optim.AdamW's plain loop, state included."""
    ours, theirs = make_model(values_dtype=values_dtype), make_model(values_dtype=values_dtype)
    optimizer = MaskedAdamW(ours, lr=0.01, weight_decay=1.0)
    groups = [
        {"params": [layer.rigsa_values for layer in gated_linears(theirs).values()], "weight_decay": 1.0},
        {"params": [layer.rigsa_alpha for layer in gated_linears(theirs).values()], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, fused=False, foreach=False)
    train(ours, optimizer, 20)
    train(theirs, reference, 20)
    tolerance = {"rtol": 0.05, "atol": 0.02} if values_dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for mine, other in zip(gated_linears(ours).values(), gated_linears(theirs).values(), strict=True):
        for name in ("rigsa_values", "rigsa_alpha"):
            a, b = getattr(mine, name), getattr(other, name)
            torch.testing.assert_close(a, b, **tolerance)
            for key in ("exp_avg", "exp_avg_sq"):  # ours are float32, whatever the values are
                ours_now, theirs_now = optimizer.state[a][key], reference.state[b][key].float()
                torch.testing.assert_close(ours_now, theirs_now, **tolerance)


def test_state_and_gradient_are_as_large_as_the_free_entries():
    model = make_model(0.0346)
    optimizer = MaskedAdamW(model)
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(4, 40, generator=generator)).sum().backward()
    nnz = sum(layer.rigsa_values.numel() for layer in gated_linears(model).values())
    gates = len(gated_linears(model))
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert grads == 4 * (nnz + gates)
    assert moments == 8 * (nnz + gates)


def test_gates_have_their_own_options():
    model = make_model()
    values, gates = MaskedAdamW(model, lr=0.1, weight_decay=1.0, alpha_lr=0.5).param_groups
    assert (values["lr"], values["weight_decay"]) == (0.1, 1.0)
    assert (gates["lr"], gates["weight_decay"]) == (0.5, 0.0)
    assert [p.shape for p in gates["params"]] == [(1,), (1,)]
    assert MaskedAdamW(model, lr=0.3, alpha_weight_decay=0.7).param_groups[1]["lr"] == 0.3
    own = [{"params": values["params"], "lr": 0.2, "weight_decay": 0.4}]
    assert MaskedAdamW(own).param_groups[0]["weight_decay"] == 0.4


def test_micro_batches_equal_one_batch():
    results = []
    for micro_batches in (1, 16):
        model = make_model().double()
        train_double(model, micro_batches)
        results.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-11)


def train_double(model: nn.Module, micro_batches: int) -> None:
    optimizer = MaskedAdamW(model, lr=0.01)
    x = torch.randn(16, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for part in x.chunk(micro_batches):
            (model(part).pow(2).mean() / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


STATES = [(torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.float32, "int8"),
          (torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16"), (torch.bfloat16, "int8")]  # fmt: skip
every_state = pytest.mark.parametrize(("values_dtype", "state_dtype"), STATES)


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_it_has_the_bits_of_the_fused_adamw(dtype):
    ours, theirs = make_model().to(dtype), make_model().to(dtype)
    layers = gated_linears(theirs).values()
    groups = [
        {"params": [layer.rigsa_values for layer in layers]},
        {"params": [layer.rigsa_alpha for layer in layers], "lr": 0.3, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, weight_decay=1.0, fused=True)
    optimizer = MaskedAdamW(ours, lr=0.01, weight_decay=1.0, alpha_lr=0.3)
    for grad in torch.randn(20, 10_000, dtype=dtype, generator=torch.Generator().manual_seed(0)):
        for model in (ours, theirs):
            for parameter in trainable(model):
                parameter.grad = grad[: parameter.numel()].view_as(parameter).clone()
        optimizer.step()
        reference.step()
    for a, b in zip(trainable(ours), trainable(theirs), strict=True):
        assert torch.equal(a, b)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], reference.state[b][key])


@every_state
def test_bytes_of_the_state(values_dtype, state_dtype):
    model = make_model(values_dtype=values_dtype)
    optimizer = MaskedAdamW(model, state_dtype=state_dtype)
    train(model, optimizer, 1)
    for layer in gated_linears(model).values():
        count = layer.rigsa_values.numel()
        nbytes = sum(value.nbytes for key, value in optimizer.state[layer.rigsa_values].items() if key != "step")
        blocks = -(-count // 256) if state_dtype == "int8" else 0
        assert nbytes == {"float32": 8, "bfloat16": 4, "int8": 2}[state_dtype] * count + 8 * blocks
        gate = optimizer.state[layer.rigsa_alpha]
        assert (gate["exp_avg"].dtype, gate["exp_avg_sq"].dtype) == (torch.float32, torch.float32)
        assert gate["step"] == 1


@every_state
def test_saved_and_loaded_it_goes_on_with_the_same_bits(values_dtype, state_dtype):
    """Through a file, into an optimiser made with other options; parameters and the whole state."""
    options = {"lr": 0.05, "state_dtype": state_dtype, "seed": 3}
    straight = make_model(values_dtype=values_dtype)
    optimizer = MaskedAdamW(straight, **options)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), straight.state_dict()], file)
    train(straight, optimizer, 4)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    resumed = make_model(values_dtype=values_dtype)
    resumed.load_state_dict(weights)
    loaded = MaskedAdamW(resumed)
    loaded.load_state_dict(state)
    train(resumed, loaded, 4)
    for a, b in zip(trainable(straight), trainable(resumed), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == loaded.state[b].keys()
        assert optimizer.state[a]["step"] == loaded.state[b]["step"] == 8
        for key in optimizer.state[a].keys() - {"step"}:
            one, other = optimizer.state[a][key], loaded.state[b][key]
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_a_state_of_pytorchs_adamw_can_be_loaded():
    model, other = make_model(), make_model()
    reference = torch.optim.AdamW(parameter_groups(model), lr=0.05, weight_decay=1.0, fused=True)
    optimizer = MaskedAdamW(other)
    train(model, reference, 3)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, reference, 3)
    train(other, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(other), strict=True))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_state_trains_as_well(state_dtype):
    """A teacher within the reach of a dense adapter: the loss falls about as far as with float32 moments."""
    losses = {}
    for dtype in ("float32", state_dtype):
        torch.manual_seed(0)
        model = replace_linears(nn.Sequential(nn.Linear(40, 24)), alpha_init=0.1)
        optimizer = MaskedAdamW(model, lr=0.02, weight_decay=0.0, state_dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(24, 40, generator=generator) / 10
        for _ in range(150):
            x = torch.randn(32, 40, generator=generator)
            loss = (model(x) - x @ teacher.T).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[dtype] = loss.item()
    assert losses["float32"] < 0.1
    assert losses[state_dtype] < 1.5 * losses["float32"] + 1e-3


def test_seed_makes_bfloat16_runs_repeat():
    runs = []
    for seed in (1, 1, 2):
        model = make_model(values_dtype=torch.bfloat16)
        train(model, MaskedAdamW(model, lr=0.01, seed=seed), 3)
        runs.append(torch.cat([parameter.detach().view(-1).float() for parameter in trainable(model)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_the_layer_sees_every_step(values_dtype):
    model = make_model(values_dtype=values_dtype)
    optimizer = MaskedAdamW(model, lr=0.1)
    x = torch.ones(1, 40)
    for _ in range(3):
        before = model(x)
        before.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model(x), before)


def test_as_any_optimizer():
    """A scheduler, clipping, a closure, parameters without a gradient, and a group that joins."""
    model = make_model(values_dtype=torch.bfloat16)
    first, second = gated_linears(model).values()
    optimizer = MaskedAdamW([{"params": [first.rigsa_values]}], lr=0.1, state_dtype="int8")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=5)
    optimizer.add_param_group({"params": [second.rigsa_values], "lr": 0.2})
    assert optimizer.param_groups[1]["state_dtype"] == "int8"

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = model(torch.ones(2, 40)).pow(2).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    first.rigsa_values.grad, kept = None, first.rigsa_values.detach().clone()
    optimizer.step()
    assert torch.equal(first.rigsa_values, kept)
    assert [optimizer.state[layer.rigsa_values]["step"] for layer in (first, second)] == [5, 6]


def test_inside_accelerate():
    accelerate = pytest.importorskip("accelerate")
    plain, wrapped = make_model(values_dtype=torch.bfloat16), make_model(values_dtype=torch.bfloat16)
    optimizer = MaskedAdamW(wrapped, lr=0.05, state_dtype="int8")
    train(wrapped, optimizer, 2)
    _, accelerated = accelerate.Accelerator(cpu=True).prepare(wrapped, optimizer)
    train(wrapped, accelerated, 2)
    alone = MaskedAdamW(plain, lr=0.05, state_dtype="int8")
    train(plain, alone, 2)
    train(plain, alone, 2)
    assert all(torch.equal(a, b) for a, b in zip(trainable(plain), trainable(wrapped), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr: expected a number of at least 0"),
        ({"lr": torch.tensor(0.1)}, "lr: expected a number of at least 0"),
        ({"alpha_lr": -0.1}, "lr: expected"),
        ({"betas": (0.9, 1.0)}, "betas: expected at least 0 and below 1, got 1.0 at index 1"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
        ({"eps": -1.0}, "eps: expected"),
        ({"weight_decay": -1.0}, "weight_decay: expected"),
        ({"state_dtype": "int4"}, "state_dtype: expected one of float32, bfloat16, int8, got 'int4'"),
        ({"seed": 2**64}, "seed: expected"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(make_model(), **options)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_bad_gradients_are_named_before_anything_is_changed(state_dtype):
    good, bad = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    wide = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = MaskedAdamW([{"params": [good]}, {"params": [bad, wide]}], lr=0.1, state_dtype=state_dtype)
    good.grad = torch.ones(4, 4)
    bad.grad = torch.eye(4).to_sparse()
    with pytest.raises(ValueError, match=r"params\[0\] of group 1: expected a dense gradient"):
        optimizer.step()
    bad.grad = None
    wide.grad = torch.ones(4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"params\[1\] of group 1: expected a parameter in float32 or bfloat16"):
        optimizer.step()
    wide.grad = None
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr: expected"):
        optimizer.step()
    assert torch.equal(good, torch.ones(4, 4))
    assert len(optimizer.state) == 0


KINDS = [(torch.float32, "float32"), (torch.float64, "float32"), (torch.float32, "int8"), (torch.bfloat16, "bfloat16")]


def one_step(start: torch.Tensor, grad: torch.Tensor, state_dtype: str) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    parameter.grad = grad
    MaskedAdamW([{"params": [parameter]}], lr=0.1, state_dtype=state_dtype).step()
    return parameter.detach()


@given(
    st.sampled_from(KINDS),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from(["whole", "step", "expand", "flip"])] * 3),
)
def test_a_gradient_may_have_any_strides(kind, shape, order, views):
    """It counts by its entries, not by how they lie in memory: transposed, expanded, or every other one of a tensor."""
    dtype, state_dtype = kind
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn([2 * size for size in shape], generator=generator).to(dtype)
    for dim, view in enumerate(views):
        grad = grad[(slice(None),) * dim + ({"step": slice(None, None, 2)}.get(view, slice(shape[dim])),)]
        if view == "expand":
            grad = grad.narrow(dim, 0, 1).expand([-1] * dim + [shape[dim]] + [-1] * (2 - dim))
        elif view == "flip":
            grad = grad.flip(dim)
    grad = grad.permute(order)
    start = torch.randn(grad.shape, generator=generator).to(dtype)
    assert torch.equal(one_step(start, grad, state_dtype), one_step(start, grad.clone().contiguous(), state_dtype))


@pytest.mark.parametrize(("dtype", "state_dtype"), KINDS)
def test_a_gradient_in_memory_that_the_step_writes_counts_as_it_was(dtype, state_dtype):
    """The parameter itself, another parameter, half of one, and a moment."""
    results = []
    for copied in (False, True):
        memory = torch.randn(60, generator=torch.Generator().manual_seed(0)).to(dtype)
        parameters = [nn.Parameter(part) for part in memory.split([20, 20, 20])]
        optimizer = MaskedAdamW([{"params": parameters}], lr=0.1, state_dtype=state_dtype)
        for _ in range(3):
            moment = optimizer.state[parameters[2]].get("exp_avg", parameters[2])
            grads = [parameters[0], memory[30:50], moment if moment.dtype == dtype else parameters[1]]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.detach().clone() if copied else grad.detach()
            optimizer.step()
        results.append(memory)
    assert torch.equal(*results)


def test_parameters_that_share_memory_are_refused():
    memory = torch.ones(30)
    parameters = [nn.Parameter(memory[:20]), nn.Parameter(memory[19:])]
    optimizer = MaskedAdamW([{"params": parameters}])
    fill_gradients(parameters)
    with pytest.raises(ValueError, match=r"params\[0\] of group 0: expected .* of their own, .* overlaps params\[1\]"):
        optimizer.step()
    assert torch.equal(memory, torch.ones(30))
    expanded = nn.Parameter(torch.ones(1).expand(5))
    optimizer = MaskedAdamW([{"params": [expanded]}])
    fill_gradients([expanded])
    with pytest.raises(ValueError, match="expected a contiguous parameter"):
        optimizer.step()


def fill_gradients(parameters) -> None:  # type: ignore[no-untyped-def]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


# A step that fails changes nothing.


def snapshot(optimizer: MaskedAdamW) -> list[object]:
    """Bits of parameters and state, step counts and options."""
    bits = []
    for group in optimizer.param_groups:
        bits.append({name: value for name, value in group.items() if name != "params"})
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            bits.append(parameter.detach().clone())
            bits.append(
                {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
            )
    return bits


def same_snapshot(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.is_meta or torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_snapshot, one, other))  # type: ignore[arg-type]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_snapshot(one[key], other[key]) for key in one)  # type: ignore[attr-defined]
    return one == other


def change_state(name, change, optimizer, parameter):  # type: ignore[no-untyped-def]
    optimizer.state[parameter][name] = change(optimizer.state[parameter][name])


def change_gradient(change, optimizer, parameter):  # type: ignore[no-untyped-def]
    parameter.grad = change(parameter.grad)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


BREAKS = {
    "no second moment": (lambda o, p: o.state[p].pop("exp_avg_sq"), "expected exp_avg and exp_avg_sq in its state"),
    "shape": (
        partial(change_state, "exp_avg", lambda t: t[:1].clone()),
        r"expected exp_avg in its state contiguous \[",
    ),
    "longer": (partial(change_state, "exp_avg_sq", lambda t: t.repeat(2, 1)), "expected exp_avg_sq in its state"),
    "dtype": (partial(change_state, "exp_avg", torch.Tensor.half), "in its state both float32"),
    "device": (partial(change_state, "exp_avg", lambda t: t.to("meta")), "expected exp_avg in its state .* on meta"),
    "strides": (partial(change_state, "exp_avg", transposed), "not contiguous"),
    "no tensor": (partial(change_state, "exp_avg", torch.Tensor.tolist), "to be a tensor, got list"),
    "scales": (partial(change_state, "scales", lambda t: t[:, :0]), "expected scales in its state"),
    "list of scales": (partial(change_state, "scales", torch.Tensor.tolist), "to be a tensor, got list"),
    "no scales": (lambda o, p: o.state[p].pop("scales"), "expected scales in its state beside 8-bit moments"),
    "sparse gradient": (partial(change_gradient, torch.Tensor.to_sparse), "expected a dense gradient"),
    "option": (lambda o, p: o.param_groups[1].update(lr=-1.0), "lr: expected"),
    "freed": (lambda o, p: o.state[p]["exp_avg"].untyped_storage().resize_(0), "got storage that was freed"),
    "shared": (lambda o, p: o.state[p].update(exp_avg=o.param_groups[1]["params"][0].detach()), "own|both float32"),
}


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", BREAKS)
def test_a_step_that_fails_changes_nothing(name, state_dtype):
    """What is wrong with the last parameter of the last group is found before the first one is touched."""
    if state_dtype == "float32" and "scales" in name:
        pytest.skip("float32 moments have no scales")
    groups = [[nn.Parameter(torch.ones(3, 4) * number) for number in range(2)] for _ in range(2)]
    optimizer = MaskedAdamW([{"params": group} for group in groups], lr=0.1, state_dtype=state_dtype)
    everything = list(itertools.chain(*groups))
    fill_gradients(everything)
    optimizer.step()
    whole = copy.deepcopy(optimizer.state_dict())
    damage, message = BREAKS[name]
    damage(optimizer, groups[1][1])
    before = [parameter.detach().clone() for parameter in everything] if name == "freed" else snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    after = [parameter.detach() for parameter in everything] if name == "freed" else snapshot(optimizer)
    assert same_snapshot(before, after)
    optimizer.load_state_dict(whole)  # and it is as good as new
    fill_gradients(everything)
    optimizer.step()
    assert [optimizer.state[parameter]["step"] for parameter in everything] == [2, 2, 2, 2]


def test_out_of_memory_while_moments_are_made_changes_nothing(monkeypatch):
    model = make_model()
    optimizer = MaskedAdamW(model, lr=0.1)
    fill_gradients(trainable(model))
    made, new_state = [], launches.new_state

    def failing(param, state_dtype):  # type: ignore[no-untyped-def]
        made.append(param)
        if len(made) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_state(param, state_dtype)

    monkeypatch.setattr(launches, "new_state", failing)
    before = snapshot(optimizer)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    assert len(optimizer.state) == 0
    monkeypatch.undo()
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_what_was_checked_is_checked_again_when_it_changes(state_dtype):
    """A moment or a parameter's memory exchanged between two steps is what the next step reads and writes."""
    runs = []
    for exchanging in (False, True):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 300).bfloat16()) for _ in range(2)]
        optimizer = MaskedAdamW([{"params": parameters}], lr=0.1, state_dtype=state_dtype)
        for step in range(4):
            if exchanging and step:
                state = optimizer.state[parameters[1]]
                state["exp_avg"], old = state["exp_avg"].clone(), state["exp_avg"]
                old.fill_(7)
                parameters[0].data, old = parameters[0].data.clone(), parameters[0].data
                old.fill_(7)
                if step == 2:
                    optimizer.state[parameters[0]] = copy.deepcopy(optimizer.state[parameters[0]])
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, number - 0.5 + step)
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert same_snapshot(*runs)
    state = optimizer.state[parameters[1]]
    state["exp_avg"] = state["exp_avg"].view(3, 100)  # another object at the same address
    with pytest.raises(ValueError, match=r"params\[1\] of group 0: expected exp_avg .* \[300\] on cpu, got \[3, 100\]"):
        optimizer.step()
    state["exp_avg"] = state["exp_avg"].view(-1)
    optimizer.step()
    parameters[0].data = parameters[0].data[:7]
    parameters[0].grad = torch.ones(7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected exp_avg in its state contiguous \[7\]"):
        optimizer.step()


def test_the_set_of_parameters_with_gradients_may_change():
    """As with experts, of which each step trains some; step counts part and meet."""
    together, alone = ([nn.Parameter(torch.ones(50).bfloat16()) for _ in range(4)] for _ in range(2))
    optimizer = MaskedAdamW([{"params": together}], lr=0.1, seed=5)
    others = [MaskedAdamW([{"params": [alone[at]]}], lr=0.1, seed=5) for at in range(4)]
    for other, number in zip(others, range(4), strict=True):
        other._launches = partial(renumbered, other._launches, number)  # random bits of that place
    for chosen in ((0, 1), (1, 2, 3), (3,), (0, 1, 2, 3), (), (0, 3)):
        for parameters in (together, alone):
            for at, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, at + 1) if at in chosen else None
        for one in (optimizer, *others):
            one.step()
    assert all(map(torch.equal, together, alone))
    assert [optimizer.state[parameter]["step"] for parameter in together] == [3, 3, 2, 4]


def renumbered(make, number, *arguments):  # type: ignore[no-untyped-def]
    found = make(*arguments)
    for launch in found:
        launch.numbers = [number]
    return found


# Loading.

BAD_STATES = {
    "another shape": ({"exp_avg": torch.zeros(5)}, r"exp_avg in its state .*\[3, 4\].*got \[5\]"),
    "flat": ({"exp_avg": torch.zeros(12)}, r"got \[12\]"),
    "half": ({"exp_avg": torch.zeros(3, 4).half(), "exp_avg_sq": torch.zeros(3, 4).half()}, "both float32"),
    "two dtypes": ({"exp_avg_sq": torch.zeros(3, 4).bfloat16()}, "both float32"),
    "float64": ({"exp_avg": torch.zeros(3, 4).double(), "exp_avg_sq": torch.zeros(3, 4).double()}, "both float32"),
    "codes without scales": (
        {"exp_avg": torch.zeros(3, 4, dtype=torch.int8), "exp_avg_sq": torch.zeros(3, 4, dtype=torch.uint8)}, "scales"),
    "scales without codes": ({"scales": torch.zeros(2, 1)}, "expected scales in its state beside 8-bit"),
    "amsgrad": ({"max_exp_avg_sq": torch.zeros(3, 4)}, "expected step, exp_avg, .* got .*max_exp_avg_sq"),
    "step 0": ({"step": 0}, "expected a step count from 1, got 0"),
    "half a step": ({"step": torch.tensor(1.5)}, "expected a step count"),
    "nan steps": ({"step": float("nan")}, "expected a step count"),
    "steps": ({"step": torch.ones(2)}, "expected a step count"),
    "no tensor": ({"exp_avg": 3.0}, "to be a tensor, got float"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changed(name):
    change, message = BAD_STATES[name]
    parameters = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = MaskedAdamW([{"params": parameters}], lr=0.1)
    fill_gradients(parameters)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] |= change
    saved["state"][0]["exp_avg"] += 1
    saved["param_groups"][0]["lr"] = 0.3
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"state of params\[1\] of group 0: .*" + message):
        optimizer.load_state_dict(saved)
    assert same_snapshot(before, snapshot(optimizer))
    for entry in ("exp_avg", "exp_avg_sq", "step"):
        incomplete = copy.deepcopy(optimizer.state_dict())
        del incomplete["state"][1][entry]
        with pytest.raises(ValueError, match="expected step, exp_avg, exp_avg_sq"):
            optimizer.load_state_dict(incomplete)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"maximize": True}, "maximize: expected False"),
        ({"amsgrad": True}, "amsgrad: expected False"),
        ({"state_dtype": "int4"}, "state_dtype: expected one of"),
        ({"params": [0]}, "doesn't match the size"),
    ],
)
def test_options_that_do_not_fit_are_refused_when_loaded(options, message):
    parameters = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = MaskedAdamW([{"params": parameters}], lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= options
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same_snapshot(before, snapshot(optimizer))


def test_the_state_of_another_ticket_is_refused():
    """Level k's onto level k + 1's: PyTorch's kernel would read and write beyond the moments."""
    sparse, dense = make_model(0.1), make_model(0.9)
    optimizers = [MaskedAdamW(model) for model in (sparse, dense)]
    train(sparse, optimizers[0], 1)
    with pytest.raises(ValueError, match=r"state of params\[0\] of group 0 \(0.rigsa_values\): expected exp_avg"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_what_is_loaded_is_a_copy():
    one, other = make_model(), make_model()
    source, loaded = MaskedAdamW(one), MaskedAdamW(other)
    train(one, source, 1)
    loaded.load_state_dict(source.state_dict())
    before = snapshot(source)
    train(other, loaded, 1)
    assert same_snapshot(before, snapshot(source))


def test_a_hook_may_change_what_is_loaded():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([{"params": [parameter]}])
    fill_gradients([parameter])
    optimizer.step()
    saved = optimizer.state_dict()

    def doubled(_, state):  # type: ignore[no-untyped-def]
        return state | {"state": {0: state["state"][0] | {"exp_avg": 2 * state["state"][0]["exp_avg"]}}}

    optimizer.register_load_state_dict_pre_hook(doubled)
    before = optimizer.state[parameter]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], 2 * before)


# Parameters that left the model.


def take_ticket(model: nn.Module) -> None:
    model[2].set_pattern(SparsePattern.from_mask(torch.ones(8, 24) > 0))  # type: ignore[index]


def load_ticket(model: nn.Module) -> None:
    other = make_model(0.5)
    del other[0]
    model[2].load_state_dict(other[1].state_dict())  # type: ignore[index]


def exchange(model: nn.Module) -> None:
    model[2].rigsa_values = nn.Parameter(model[2].rigsa_values.detach())  # type: ignore[index]


def replace_again(model: nn.Module) -> None:
    restore_linears(model)
    gc.collect()
    replace_linears(model, include="2")


@pytest.mark.parametrize("leave", [take_ticket, load_ticket, exchange, replace_again])
def test_parameters_that_left_the_model_are_named_and_nothing_is_changed(leave):
    model = make_model()
    optimizer = MaskedAdamW(model, lr=0.1)
    train(model, optimizer, 2)
    leave(model)
    fill_gradients(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"params: . of 4 parameters are no longer those of the model \(.*rigsa_values"
    ):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    optimizer = MaskedAdamW(model, lr=0.1)
    train(model, optimizer, 1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("leave", [take_ticket, load_ticket])
def test_an_optimiser_of_another_kind_does_not_step_what_has_left_the_model(leave, kind):
    model = make_model()
    optimizer = kind(trainable(model), lr=0.1)
    train(model, optimizer, 2)
    leave(model)
    fill_gradients(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"params: . of 4 parameters are no longer those of the model \(of a .* layer"):
        optimizer.step()
    assert same_snapshot(before, snapshot(optimizer))
    train(model, kind(trainable(model), lr=0.1), 1)


def test_parameters_stay_those_of_the_model():
    """Moved, saved and loaded in place, frozen, its pattern moved; and of a model that nobody holds, none is missed."""
    model = make_model(0.5)
    optimizer = MaskedAdamW(model, lr=0.1)
    train(model, optimizer, 1)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.double()
    model.float()
    layer = model[0]
    mask = layer.pattern.to_mask()
    layer.move_pattern(SparsePattern.from_mask(mask.flip(0)))
    model[2].requires_grad_(False)
    train(model, optimizer, 1)
    parameters = trainable(model)
    del model, layer
    gc.collect()
    fill_gradients(parameters)
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_steps_on_its_own(copied):
    model = make_model()
    optimizer = MaskedAdamW(model, lr=0.1)
    train(model, optimizer, 2)
    other = copied(optimizer)
    for one in (optimizer, other):
        fill_gradients(itertools.chain(*(group["params"] for group in one.param_groups)))
        one.step()
    assert same_snapshot(snapshot(optimizer), snapshot(other))


# Groups: a model, named parameters, under the Trainer.


def by_role(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, set[tuple[float, float]]]:
    """Rate and decay of values and of gates."""
    found: dict[str, set[tuple[float, float]]] = {}
    options = {param: group for group in optimizer.param_groups for param in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = options.pop(parameter)
            found.setdefault(name.rpartition(".")[2], set()).add((group["lr"], group["weight_decay"]))
    assert not options
    return found


def test_gates_among_named_parameters_get_a_group_of_their_own():
    model = make_model()
    wanted = {"rigsa_values": {(0.1, 0.7)}, "rigsa_alpha": {(0.5, 0.0)}}
    options = {"lr": 0.1, "weight_decay": 0.7, "alpha_lr": 0.5}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for params in (
        model,
        model.named_parameters(),
        [{"params": named}],
        [{"params": named[:2]}, {"params": named[2:]}],
        [{"params": trainable(model)}],
        [{"params": (parameter for parameter in trainable(model))}],
    ):
        optimizer = MaskedAdamW(params, **options)
        assert by_role(optimizer, model) == wanted
        train(model, optimizer, 1)
    groups = parameter_groups(model, alpha_lr=0.5)
    assert by_role(torch.optim.AdamW(groups, lr=0.1, weight_decay=0.7), model) == wanted
    apart = [{"params": [item for item in named if ("alpha" in item[0]) == gates]} for gates in (False, True)]
    apart[1]["weight_decay"] = 0.3  # type: ignore[assignment]
    assert by_role(MaskedAdamW(apart, lr=0.1), model)["rigsa_alpha"] == {(0.1, 0.3)}  # as it was arranged


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), nn.Module.double])
def test_gates_are_told_without_names_wherever_the_model_came_from(copied):
    model = copied(make_model())
    optimizer = MaskedAdamW([{"params": trainable(model)}], lr=0.1, alpha_lr=0.5)
    assert by_role(optimizer, model) == {"rigsa_values": {(0.1, 1.0)}, "rigsa_alpha": {(0.5, 0.0)}}
    model[0].set_pattern(SparsePattern.from_mask(torch.arange(40 * 24).view(24, 40) % 7 == 0))
    fill_gradients(trainable(model))
    with pytest.raises(ValueError, match=r"1 of 4 parameters are no longer those .* \(a 24 x 40 layer\.rigsa_values\)"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"alpha_lr": 0.1}, {"alpha_weight_decay": 0.1}])
def test_options_of_gates_that_are_not_there_are_refused(options):
    groups = [{"params": [layer.rigsa_values for layer in gated_linears(make_model()).values()], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match="alpha_lr, alpha_weight_decay: expected none beside groups"):
        MaskedAdamW(groups, **options)


def trained_by(make, tmp_path, **arguments):  # type: ignore[no-untyped-def]
    """Two steps of a Trainer whose optimiser `make` gives: the model, its gates before, and the optimiser."""
    transformers = pytest.importorskip("transformers")
    model = make_llama()
    replace_linears(model, alpha_init=0.1)
    for layer in gated_linears(model).values():
        layer.set_pattern(SparsePattern.from_mask(torch.arange(layer.weight.numel()).view(layer.weight.shape) % 5 == 0))
    before = [layer.rigsa_alpha.item() for layer in gated_linears(model).values()]
    ids = torch.arange(12) % len(WORDS)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", lr_scheduler_type="constant", **arguments,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 4,
        **make(model),
    )  # fmt: skip
    trainer.train()
    return model, before, trainer.optimizer.optimizer


RATES = {"lr": 0.01, "alpha_lr": 0.02, "weight_decay": 1.0}
UNDER_TRAINER = {
    "optimizers": lambda model: {"optimizers": (MaskedAdamW(model, **RATES), None)},
    "class": lambda model: {"optimizer_cls_and_kwargs": (MaskedAdamW, {"model": model, **RATES})},
    "torch": lambda model: {
        "optimizer_cls_and_kwargs": (
            torch.optim.AdamW,
            {"params": parameter_groups(model, alpha_lr=0.02), "lr": 0.01, "weight_decay": 1.0},
        )
    },
    "nameless": lambda model: {"optimizer_cls_and_kwargs": (MaskedAdamW, {"lr": 0.01, "alpha_lr": 0.02})},
}


@pytest.mark.parametrize("way", UNDER_TRAINER)
def test_under_a_trainer_gates_have_their_rate_and_no_decay(way, tmp_path):
    """Without a subclass of it. The first steps of AdamW are as long as the rate, so the gates tell theirs."""
    decay = 1.0 if way == "nameless" else 0.0  # the groups that the Trainer makes carry its own
    model, before, optimizer = trained_by(UNDER_TRAINER[way], tmp_path, weight_decay=decay)
    assert by_role(optimizer, model) == {"rigsa_values": {(0.01, 1.0)}, "rigsa_alpha": {(0.02, 0.0)}}
    assert {int(optimizer.state[layer.rigsa_values]["step"]) for layer in gated_linears(model).values()} == {2}
    moved = [
        abs(layer.rigsa_alpha.item() - was) for layer, was in zip(gated_linears(model).values(), before, strict=True)
    ]
    assert max(moved) == pytest.approx(0.04, rel=0.05)


def test_the_trainers_own_groups_decay_packed_values(tmp_path):
    """Values are not taken for biases because they have one dimension, nor for norms by their names."""
    model, _, optimizer = trained_by(lambda model: {}, tmp_path, weight_decay=0.3, learning_rate=0.01)
    assert {layer.rigsa_values.dim() for layer in gated_linears(model).values()} == {1}
    assert by_role(optimizer, model)["rigsa_values"] == {(0.01, 0.3)}


@pytest.mark.parametrize("alone", [False, True])
def test_gates_in_groups_without_names_take_the_options_given_for_them(alone):
    """Whether they stand among other parameters or in a group of their own, as a Trainer makes them."""
    model = make_model()
    layers = gated_linears(model).values()
    values, gates = [layer.rigsa_values for layer in layers], [layer.rigsa_alpha for layer in layers]
    groups = [{"params": values}, {"params": gates, "weight_decay": 0.3}] if alone else [{"params": values + gates}]
    kept = MaskedAdamW([dict(group) for group in groups], lr=0.01, weight_decay=1.0)
    assert by_role(kept, model)["rigsa_alpha"] == {(0.01, 0.3 if alone else 0.0)}
    given = MaskedAdamW([dict(group) for group in groups], lr=0.01, alpha_lr=0.5, alpha_weight_decay=0.1)
    assert by_role(given, model)["rigsa_alpha"] == {(0.5, 0.1)}


@pytest.mark.parametrize(
    ("groups", "warned"),
    [
        (lambda model: trainable(model), True),
        (lambda model: [{"params": trainable(model), "weight_decay": 0.0}], False),
        (lambda model: parameter_groups(model), False),
        (lambda model: [{"params": [layer.rigsa_alpha for layer in gated_linears(model).values()]}], False),
        (lambda model: [nn.Parameter(torch.ones(3, requires_grad=True)) for _ in range(2)], False),
    ],
)
def test_an_optimiser_of_another_kind_says_once_that_it_decays_gates(groups, warned):
    model = make_model()
    optimizer = torch.optim.AdamW(groups(model))
    for again in (False, True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            optimizer.step()
        assert len([one for one in seen if "would pull the gates" in str(one.message)]) == (warned and not again)


def test_a_new_head_does_not_decay_as_values_do():
    model = nn.Sequential(*make_model(), nn.Linear(8, 4))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    wanted = {"rigsa_values": {(0.1, 1.0)}, "rigsa_alpha": {(0.1, 0.0)}}
    for params in (model, named):
        assert by_role(MaskedAdamW(params, lr=0.1), model) == wanted | {"weight": {(0.1, 0.0)}, "bias": {(0.1, 0.0)}}
        for decay in (0.2, 1.0, None):
            optimizer = MaskedAdamW(params, lr=0.1, other_weight_decay=decay)
            assert by_role(optimizer, model)["weight"] == {(0.1, 1.0 if decay is None else decay)}
    groups = parameter_groups(model, other_weight_decay=0.3)
    assert by_role(torch.optim.AdamW(groups, lr=0.1, weight_decay=0.7), model)["bias"] == {(0.1, 0.3)}


def test_a_model_without_an_adapter_is_not_trained_whole():
    plain = nn.Linear(3, 3)
    frozen_adapter = nn.Sequential(*make_model().requires_grad_(False), nn.Linear(8, 4))
    for model in (plain, frozen_adapter):
        for params in (model, model.named_parameters()):
            with pytest.raises(
                ValueError, match=r"gated sparse layers, got 2 others \(.*weight, \.\.\.\); call replace_lin"
            ):
                MaskedAdamW(params)
    with pytest.raises(ValueError, match="gated sparse layers, got none that is trainable"):
        MaskedAdamW(nn.Linear(3, 3).requires_grad_(False).named_parameters())
    asked = MaskedAdamW([{"params": plain.named_parameters()}], lr=0.1)
    assert by_role(asked, plain) == {"weight": {(0.1, 1.0)}, "bias": {(0.1, 1.0)}}


# Launches.


def test_capture_into_a_graph_is_refused(monkeypatch):
    model = make_model()
    optimizer = MaskedAdamW(model)
    fill_gradients(trainable(model))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = snapshot(optimizer)
    for step in (optimizer.step, partial(optimizer.step_early, [[0, 1], []])):
        with pytest.raises(RuntimeError, match="expected no CUDA graph capture"):
            step()
    assert same_snapshot(before, snapshot(optimizer))


@every_state
@pytest.mark.parametrize("pending", ["each", "some", "all"])
def test_stepping_in_backward_has_the_bits_of_a_step(values_dtype, state_dtype, pending, monkeypatch):
    """After each gradient, after some, and with all of them left to the step."""
    everything = sum(parameter.nbytes for parameter in trainable(make_model(values_dtype=values_dtype)))
    monkeypatch.setattr(optim, "PENDING_BYTES", {"each": 0, "some": 300, "all": everything + 1}[pending])
    monkeypatch.setattr(optim, "MOST_UPDATES", everything + 1)
    runs, early = [], []
    for in_backward in (False, True):
        model = make_model(values_dtype=values_dtype)
        optimizer = MaskedAdamW(model, lr=0.05, state_dtype=state_dtype)
        monkeypatch.setattr(optimizer, "step_early", lambda *args, made=optimizer.step_early: early.append(made(*args)))
        with optim.stepping_in_backward(optimizer) if in_backward else contextlib.nullcontext():
            for step in range(1, 4):
                train(model, optimizer, 1)
                assert in_backward or not early
                assert len(early) % step == 0  # as many in each backward
        runs.append(snapshot(optimizer))
    assert same_snapshot(*runs)
    assert {"each": len(early) == 12, "some": 0 < len(early) < 12, "all": not early}[pending]
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainable(model))


@pytest.mark.parametrize(("num_layers", "most"), [(60, 8), (60, 24), (3, 24)])
def test_updates_in_backward_are_few_and_hold_few_gradients(num_layers, most, monkeypatch):
    """Few beside the layers, however many there are, and each is one launch: the gates wait for the step."""
    pytest.importorskip("triton")
    from benchmarks import optimizer_host as host

    monkeypatch.setattr(optim, "PENDING_BYTES", 0)
    monkeypatch.setattr(optim, "MOST_UPDATES", most)
    model = host.make_model(num_layers)
    parameters, held = trainable(model), []
    sizes = [parameter.nbytes for parameter in parameters]
    with host.without_device() as counts, optim.stepping_in_backward(optimizer := MaskedAdamW(model)):
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
            )
            for parameter in parameters
        ]
        host.backward_like(parameters)
        updates = counts["launches"]
        optimizer.step()
        gates_and_rest = counts["launches"] - updates
        for hook in hooks:
            hook.remove()
    assert 0 < updates <= min(most, num_layers)
    assert gates_and_rest <= 2
    assert max(held) < sum(sizes) / most + max(sizes)
    assert [optimizer.state[parameter]["step"] for parameter in parameters] == [1] * len(parameters)


@every_state
def test_the_kernels_get_what_the_checked_tensors_are(values_dtype, state_dtype, monkeypatch):
    """On a GPU a step goes past the operator, straight to the launch: here through the interpreter, with its guard."""
    pytest.importorskip("triton")
    import rigsa_kernels.triton_adamw  # noqa: F401  (first read inside, its kernels would stay interpreted)
    from rigsa_kernels.testing import interpreting

    monkeypatch.setattr(optim, "_is_for_pytorch", lambda columns: False)
    runs, left = [], []
    for through in (False, True):
        monkeypatch.setattr(optim, "_has_kernels", lambda device, through=through: through)
        model = make_model(values_dtype=values_dtype)
        optimizer = MaskedAdamW(model, lr=0.05, state_dtype=state_dtype)
        generator = torch.Generator().manual_seed(3)
        for step in range(4):
            for parameter in trainable(model):
                grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if step == 2:
                    parameter.grad.copy_(grad)  # in place: the table stays
                else:
                    parameter.grad = grad
                if step == 3:  # and here it must not
                    parameter.data, old = parameter.data.clone(), parameter.data
                    moment = optimizer.state[parameter]["exp_avg_sq"]
                    moment.data, older = moment.data.clone(), moment.data
                    left += [old.zero_(), older.zero_()]
            held = [*trainable(model), *(parameter.grad for parameter in trainable(model))]
            if through:
                found = optimizer._launches()
                held += [tensor for one in found for tensor in (*one.exp_avgs, *one.exp_avg_sqs, *one.scales)]
                with interpreting(order=step, also=held):
                    for launch in found:
                        optimizer._run(launch)
            else:
                optimizer.step()
        runs.append(snapshot(optimizer))
    assert same_snapshot(*runs)


def test_the_host_does_little_for_each_parameter():
    """Counted, as time is noise: two launches, a table each where gradients have moved, and calls for each tensor."""
    pytest.importorskip("triton")
    from benchmarks import optimizer_host as host

    found = {}
    for num_layers in (20, 120):
        model = host.make_model(num_layers)
        parameters = trainable(model)
        with host.without_device() as counts:
            optimizer = MaskedAdamW(model)
            host.fill_gradients(parameters)
            optimizer.step()
            counts.clear()
            in_place = host.calls(optimizer.step)
            assert counts == {"launches": 2}
            counts.clear()
            kept = [parameter.grad for parameter in parameters]
            host.drop_gradients(parameters)
            host.fill_gradients(parameters)
            moved = host.calls(optimizer.step)
            assert counts == {"launches": 2, "tables": 2}
            del kept
            host.drop_gradients(parameters)
            with optim.stepping_in_backward(optimizer):
                counts.clear()
                in_backward = host.calls(lambda: (host.backward_like(parameters), optimizer.step()))  # noqa: B023
                assert counts["launches"] == 2
        found[num_layers] = in_place, moved, in_backward
    for few, many, most in zip(*found.values(), (18, 20, 28), strict=True):
        assert (many - few) / 200 <= most, found


def test_bad_params_are_named():
    with pytest.raises(ValueError, match="params: the model has no trainable parameter"):
        MaskedAdamW(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="params: expected a model or a list of groups"):
        MaskedAdamW(list(nn.Linear(2, 2).parameters()))
