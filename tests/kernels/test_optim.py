import copy
import io

import pytest
import torch
import torch.nn as nn

from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears


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
    reference = torch.optim.AdamW(trainable(model), lr=0.05, weight_decay=1.0, fused=True)
    optimizer = MaskedAdamW([{"params": trainable(other)}])
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


def test_a_gradient_need_not_be_contiguous():
    parameters = [nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16)) for _ in range(2)]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for parameter, grad in zip(parameters, (one.expand(6, 4), one.repeat(6, 4)), strict=True):
        parameter.grad = grad
        MaskedAdamW([{"params": [parameter]}], lr=0.1).step()
    assert torch.equal(*parameters)


def test_bad_params_are_named():
    with pytest.raises(ValueError, match="params: the model has no trainable parameter"):
        MaskedAdamW(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="params: expected a model or a list of groups"):
        MaskedAdamW(list(nn.Linear(2, 2).parameters()))
