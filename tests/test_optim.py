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
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizer.state[a][key], reference.state[b][key], **tolerance)


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


def test_bad_params_are_named():
    with pytest.raises(ValueError, match="params: the model has no trainable parameter"):
        MaskedAdamW(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="params: expected a model or a list of groups"):
        MaskedAdamW(list(nn.Linear(2, 2).parameters()))
