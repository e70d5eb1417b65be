"""Choosing patterns on a model: the right entries, the right start, and no change where anything is refused."""

import copy
import math

import pytest
import torch
import torch.nn as nn

from conftest import make_llama
from rigsa import (
    MaskedAdamW,
    SparsePattern,
    gated_linears,
    gradient_ticket,
    load_adapter,
    magnitude_ticket,
    prune,
    random_ticket,
    replace_linears,
    save_adapter,
    set_ticket,
    snapshot,
)
from rigsa.criteria import CRITERIA, TREATMENTS, treated_values
from rigsa.masks import TrainedLayer, erk_counts
from rigsa.masks import prune as prune_layers
from rigsa.state import ticket_of
from rigsa_kernels.init import initial_values

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
UP = "model.layers.0.mlp.up_proj"


def trained(seed=0, gate=0.3, base=make_llama, **options):
    """An adapter whose values have moved, about a quarter of them to the other sign."""
    model = replace_linears(base(), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.add_(torch.randn(layer.rigsa_values.shape, generator=generator) * layer.bound * 0.5)
            layer.rigsa_alpha.fill_(gate)
    return model


def masks(model):
    return {name: layer.pattern.to_mask() for name, layer in gated_linears(model).items()}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(before, model):
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def initial(layer):
    return initial_values(layer.pattern, layer.bound, seed=layer.seed, key=layer.key, dtype=layer.rigsa_values.dtype)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_prune_keeps_what_the_rule_says(criterion, ranking):
    model = trained(density=0.5)
    layers = {
        name: TrainedLayer(layer.rigsa_values.clone(), layer.pattern, layer.bound, layer.seed, layer.key)
        for name, layer in gated_linears(model).items()
    }
    expected, counts = prune_layers(layers, keep_fraction=0.6, ranking=ranking, criterion=criterion)
    report = prune(model, 0.6, criterion, ranking)
    total = report.total
    assert (total.before, total.eligible, total.kept) == (counts.free, counts.eligible, counts.kept)
    for name, layer in gated_linears(model).items():
        assert torch.equal(layer.rigsa_words, expected[name].words)
        assert torch.equal(layer.rigsa_values, initial(layer))
        assert layer.rigsa_alpha.item() == pytest.approx(layer.alpha_init)
        assert report.layers[name].kept == layer.pattern.nnz


def test_none_keeps_values_and_gates():
    for density in (None, 0.5):
        model = trained(density=density)
        before = {name: layer.delta() for name, layer in gated_linears(model).items()}
        prune(model, 0.5, rewind="none")
        for name, layer in gated_linears(model).items():
            assert torch.equal(layer.delta(), before[name].where(layer.pattern.to_mask(), 0))
            assert layer.rigsa_alpha.item() == pytest.approx(0.3)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_treatment_is_what_the_next_pruning_compares_with(tmp_path, treatment):
    """Values that did not move kept all their signs, whatever they started from, and after a load, too."""
    model = trained()
    prune(model, 0.5, rewind=treatment, draw_seed=7)
    for layer in gated_linears(model).values():
        wanted = treated_values(
            treatment, layer.pattern, bound=layer.bound, seed=layer.seed, key=layer.key, draw_seed=7
        )
        assert torch.equal(layer.rigsa_values, wanted)
    save_adapter(model, tmp_path)
    loaded = make_llama()
    load_adapter(loaded, tmp_path)
    for one in (loaded, copy.deepcopy(model)):
        total = prune(one, 1.0).total
        assert total.before == total.eligible == total.kept


def test_a_snapshot_is_rewound_to_and_compared_with():
    model = replace_linears(make_llama(), alpha_init=0.1)
    optimizer = MaskedAdamW(model, lr=0.05)

    def step():
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    early = snapshot(model)
    step()
    prune(model, 0.5, rewind=early)
    for name, layer in gated_linears(model).items():
        assert torch.equal(layer.rigsa_values, early[name].values[layer.pattern.to_mask()])
        assert torch.equal(layer.rigsa_alpha, early[name].gate)
    before = state(model)
    with pytest.raises(ValueError, match="started from a snapshot"):
        prune(model, 0.5)
    assert_unchanged(before, model)
    total = prune(model, 1.0, rewind=early).total
    assert total.before == total.kept
    late = snapshot(model)
    with pytest.raises(ValueError, match="take it earlier"):
        set_ticket(model, {name: SparsePattern.dense(*mask.shape) for name, mask in masks(model).items()}, late)


def test_levels_are_counted_and_masks_only_shrink(tmp_path):
    model = trained()
    for level in range(1, 4):
        before = masks(model)
        prune(model, 0.8, rewind="none")
        assert all((mask <= before[name]).all() for name, mask in masks(model).items())
        assert {ticket_of(layer).level for layer in gated_linears(model).values()} == {level}
    save_adapter(model, tmp_path)
    loaded = make_llama()
    load_adapter(loaded, tmp_path)
    assert ticket_of(gated_linears(loaded)[UP]) == ticket_of(gated_linears(model)[UP])
    assert ticket_of(gated_linears(loaded)[UP]).criterion == "rigsa"


def test_a_pattern_set_by_hand_is_not_taken_for_the_ticket():
    model = trained()
    prune(model, 0.5, rewind="random_reinit")
    layer = gated_linears(model)[UP]
    layer.set_pattern(SparsePattern.from_mask(torch.rand(layer.pattern.shape) < 0.4))
    assert ticket_of(layer).start == "init"


def test_shared_gates_and_frozen_values_stay_so():
    model = trained(shared_gate=True)
    gated_linears(model)[UP].rigsa_values.requires_grad_(False)
    for change in (lambda: prune(model, 0.5, rewind="none"), lambda: random_ticket(model, 0.2)):
        change()
        layers = gated_linears(model)
        assert len({id(layer.rigsa_alpha) for layer in layers.values()}) == 1
        assert [name for name, layer in layers.items() if not layer.rigsa_values.requires_grad] == [UP]


def test_values_in_float64_and_bfloat16():
    for base, dtype in ((lambda: make_llama().double(), torch.float64), (make_llama, torch.bfloat16)):
        model = trained(base=base, values_dtype=dtype)
        report = prune(model, 0.5)
        assert 0.2 < report.density < 0.5
        layer = gated_linears(model)[UP]
        assert torch.equal(layer.rigsa_values, initial(layer))


# What is refused, and changes nothing.

DENSE = {name: SparsePattern.dense(*layer.pattern.shape) for name, layer in gated_linears(trained()).items()}
EMPTY = SparsePattern.from_mask(torch.zeros(48, 32, dtype=torch.bool))


def loss(model, batch):
    return model(batch, labels=batch).loss


REFUSED = {
    "a share of 0": (lambda m: prune(m, 0), "keep_fraction: expected more than 0"),
    "a share above 1": (lambda m: prune(m, 1.5), "keep_fraction: expected more than 0 and at most 1, got 1.5"),
    "a share that is NaN": (lambda m: prune(m, math.nan), "keep_fraction"),
    "a share that leaves nothing": (lambda m: prune(m, 1e-5), "keep_fraction: 1e-05 leaves model.layers.0"),
    "a criterion": (lambda m: prune(m, 0.5, "largest"), "criterion: expected one of rigsa, large_final"),
    "a ranking": (lambda m: prune(m, 0.5, ranking="all"), "ranking: expected one of layer, global, got 'all'"),
    "a rewind": (lambda m: prune(m, 0.5, rewind="early"), "rewind: expected one of none, init, .* or a snapshot"),
    "a snapshot of other layers": (lambda m: prune(m, 0.5, rewind={}), "rewind: expected the model's gated layers"),
    "a density of 0": (lambda m: random_ticket(m, 0), "density: expected more than 0"),
    "a density that is NaN": (lambda m: random_ticket(m, math.nan), "density: expected more than 0"),
    "a density that leaves nothing": (lambda m: random_ticket(m, 1e-5), "density: expected 1 to 1024 free entries"),
    "counts too large": (lambda m: random_ticket(m, dict.fromkeys(DENSE, 10**6)), "density: expected 1 to 1024"),
    "counts of other layers": (lambda m: random_ticket(m, {UP: 3}), "density: expected the model's gated layers"),
    "a seed": (lambda m: random_ticket(m, 0.5, seed=-1), "seed: expected 0 to"),
    "magnitude: a density": (lambda m: magnitude_ticket(m, 2), "density: expected more than 0"),
    "magnitude: a ranking": (lambda m: magnitude_ticket(m, 0.5, ranking="x"), "ranking: expected one of"),
    "magnitude: nothing left": (lambda m: magnitude_ticket(m, 1e-5), "density: 1e-05 leaves"),
    "gradient: a score": (lambda m: gradient_ticket(m, loss, [IDS], 0.1, "magic"), "score: expected one of sift"),
    "gradient: a density": (lambda m: gradient_ticket(m, loss, [IDS], 0), "density: expected more than 0"),
    "gradient: a ranking": (lambda m: gradient_ticket(m, loss, [IDS], 0.1, ranking="x"), "ranking"),
    "gradient: no batch": (lambda m: gradient_ticket(m, loss, [], 0.1), "batches: expected at least one"),
    "gradient: no scalar": (lambda m: gradient_ticket(m, lambda m, b: m(b).logits, [IDS], 0.1), "loss_fn: expected"),
    "gradient: no graph": (lambda m: gradient_ticket(m, lambda m, b: torch.ones(()), [IDS], 0.1), "loss_fn: expected"),
    "gradient: not finite": (lambda m: gradient_ticket(m, lambda m, b: loss(m, b) * math.nan, [IDS], 0.1), "finite"),
    "a layer missing": (lambda m: set_ticket(m, {UP: DENSE[UP]}), "patterns: expected the model's gated layers; 13"),
    "a shape": (lambda m: set_ticket(m, DENSE | {UP: SparsePattern.dense(2, 2)}), f"patterns: .* for {UP}"),
    "an empty pattern": (lambda m: set_ticket(m, DENSE | {UP: EMPTY}), f"patterns: {UP} would be left"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name):
    call, message = REFUSED[name]
    model = trained(density=0.5)
    gated_linears(model)[UP].rigsa_values.requires_grad_(False)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert_unchanged(before, model)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("criterion", CRITERIA)
def test_values_that_are_not_finite_are_refused_by_name(criterion):
    model = trained()
    with torch.no_grad():
        gated_linears(model)[UP].rigsa_values[0, 0] = math.nan
    before = {name: tensor for name, tensor in state(model).items() if "rigsa_alpha" in name}
    if criterion == "random":
        pytest.skip("a draw looks at no value")
    with pytest.raises(ValueError, match=UP):
        prune(model, 0.5, criterion)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(layer.pattern.is_dense for layer in gated_linears(model).values())


@pytest.mark.parametrize(
    "call", [lambda m: prune(m, 0.5), lambda m: random_ticket(m, 0.5), lambda m: magnitude_ticket(m, 0.5), snapshot]
)
def test_a_model_without_gated_layers(call):
    with pytest.raises(ValueError, match=r"expected gated sparse layers, found none in LlamaForCausalLM; call replace"):
        call(make_llama())


def test_a_loss_that_fails_leaves_the_adapter_as_it_was():
    model = trained(density=0.5)
    before = state(model)

    def fail(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradient_ticket(model, fail, [IDS], 0.1)
    assert_unchanged(before, model)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


# The other tickets.


def test_random_tickets_are_exact_and_independent():
    model = trained()
    report = random_ticket(model, 0.1, seed=1)
    drawn = masks(model)
    for name, layer in gated_linears(model).items():
        assert layer.pattern.nnz == round(0.1 * layer.num_weights) == report.kept[name]
        assert torch.equal(layer.rigsa_values, initial(layer))
    assert not torch.equal(drawn[UP], drawn[UP.replace("layers.0", "layers.1")])
    random_ticket(model, 0.1, seed=2)
    assert not torch.equal(drawn[UP], masks(model)[UP])


def test_a_control_has_as_many_entries_in_each_layer():
    model, control = trained(), trained()
    report = prune(model, 0.3, ranking="global")
    assert random_ticket(control, report.kept).kept == report.kept
    assert len(set(report.kept.values())) > 3


def test_replace_linears_starts_as_sparse_as_a_random_ticket():
    """No matrix of a layer is made on the way."""
    sparse = replace_linears(make_llama(), seed=3, density=0.1)
    model = replace_linears(make_llama(), seed=3)
    random_ticket(model, 0.1, seed=3)
    assert_unchanged(state(sparse), model)
    for density, match in ((0, "more than 0"), (1e-6, "leaves 14 layers empty"), (math.nan, "more than 0")):
        base = make_llama()
        with pytest.raises(ValueError, match=f"density: .*{match}"):
            replace_linears(base, density=density)
        assert not gated_linears(base)
        assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(ValueError, match="beside a pattern"):
        replace_linears(make_llama(), density=0.1, pattern=lambda name, linear: None)


@pytest.mark.parametrize("largest", [True, False])
def test_magnitude_tickets_take_the_pretrained_weights(largest):
    model = trained(density=0.5)
    magnitude_ticket(model, 0.25, largest=largest)
    for layer in gated_linears(model).values():
        weights, mask = layer.frozen_matrix().abs(), layer.pattern.to_mask()
        assert mask.sum() == layer.num_weights // 4
        inside, outside = weights[mask], weights[~mask]
        assert inside.min() >= outside.max() if largest else inside.max() <= outside.min()


def test_gradient_tickets_take_the_gradients_of_the_pretrained_weights():
    batches = [IDS, IDS.flip(1), IDS[:, :4]]
    base = make_llama()
    gradients = []
    for batch in batches:
        base.zero_grad()
        loss(base, batch).backward()
        gradients.append({name: base.get_submodule(name).weight.grad.clone() for name in gated_linears(trained())})
    means = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    squares = {name: torch.stack([g[name].square() for g in gradients]).mean(0) for name in gradients[0]}
    scores = {
        "sift": {name: mean.abs() for name, mean in means.items()},
        "fisher": squares,
        "rosa": squares,
        "taylor": {name: (base.get_submodule(name).weight * mean).abs() for name, mean in means.items()},
        "sam": {name: means[name] ** 2 / (squares[name] + squares[name].mean()) for name in means},
    }
    for score, expected in scores.items():
        model = trained(density=0.5)
        report = gradient_ticket(model, loss, batches, 0.1, score)
        assert report.layers[UP].before == 768
        for name, layer in gated_linears(model).items():
            count = round(0.1 * layer.num_weights)
            wanted = expected[name].flatten().topk(count).indices
            assert layer.pattern.nnz == count
            assert layer.pattern.to_mask().flatten()[wanted].float().mean() > 0.98  # all but ties of rounding
            assert torch.equal(layer.rigsa_values, initial(layer))
            assert layer.rigsa_alpha.item() == pytest.approx(layer.alpha_init)
            assert layer.rigsa_alpha.grad is None
            assert layer.rigsa_values.grad is None


def test_tickets_of_the_start_by_hand():
    """Of half the squared output for one x, whose gradient is (Wx)x^T and whose Hessian is xx^T in every row."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, bias=False)
    model = replace_linears(nn.Sequential(linear), alpha_init=0.5, seed=3)
    x = torch.randn(1, 16)
    values = initial(model[0])
    output = x @ (model[0].frozen_matrix() + 0.5 * values).t()
    gradient = 0.5 * output.t() @ x
    wanted = {"snip": (values * gradient).abs(), "grasp": values * (0.25 * x.square().sum() * gradient)}
    for score, expected in wanted.items():
        gradient_ticket(model, lambda model, batch: model(batch).square().sum() / 2, iter([x]), 0.25, score)
        kept = model[0].pattern.to_mask()
        assert kept.sum() == 32
        assert expected[kept].min() >= expected[~kept].max()
        assert torch.equal(model[0].rigsa_values, values[kept])
        assert model[0].rigsa_alpha.item() == 0.5


@pytest.mark.parametrize("start", [{"alpha_init": 0.0}, {"init_scale": 0.0}])
@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_a_score_that_would_be_zero_everywhere_is_refused(score, start):
    model = replace_linears(make_llama(), density=0.5, **start)
    before = state(model)
    with pytest.raises(ValueError, match=f"score: '{score}' is a product with the start of {UP[:14]}.*is 0; it would"):
        gradient_ticket(model, loss, [IDS], 0.1, score)
    assert_unchanged(before, model)


def test_tickets_of_a_parameter_that_code_reads():
    """A second derivative through a weight that no layer is called for."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = replace_linears(nn.Sequential(attention), alpha_init=0.5)
    x = torch.randn(2, 3, 8)
    for score in ("snip", "grasp"):
        gradient_ticket(model, lambda model, batch: model[0](batch, batch, batch)[0].square().sum(), [x], 0.25, score)
        assert {layer.pattern.nnz / layer.num_weights for layer in gated_linears(model).values()} == {0.25}


def test_a_random_ticket_by_the_erdos_renyi_rule():
    model, base = trained(), make_llama()
    report = random_ticket(model, 0.1, layer_densities="erk")
    assert report.total.kept == 1536
    shapes = {name: tuple(base.get_submodule(name).weight.shape) for name in report.layers}
    assert report.kept == erk_counts(shapes, 0.1)
    assert "layer_densities='erk'" in report.what
    before = state(model)
    for wrong, match in (("even", "expected one of equal, erk, got 'even'"), ("erk", "expected a number for density")):
        with pytest.raises(ValueError, match=f"layer_densities: .*{match}"):
            random_ticket(model, report.kept, layer_densities=wrong)
    with pytest.raises(ValueError, match=r"density: 0.0001 leaves .* empty"):
        random_ticket(model, 0.0001, layer_densities="erk")
    assert_unchanged(before, model)


def test_gradient_tickets_in_four_bits():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4", module=linear)
    model = replace_linears(nn.Sequential(linear.to("cpu")))
    x = torch.randn(5, 64)
    gradient_ticket(model, lambda model, batch: model(batch).square().mean(), [x], 0.1)
    output = nn.functional.linear(x, model[0].frozen_matrix())
    expected = (output.t() @ x).abs().flatten().topk(round(0.1 * 64 * 32)).indices
    assert model[0].pattern.to_mask().flatten()[expected].float().mean() > 0.98


def test_a_report_is_a_table():
    model = trained(density=0.5)
    report = prune(model, 0.5)
    lines = str(report).splitlines()
    assert lines[0].startswith("prune(keep_fraction=0.5, criterion='rigsa', ranking='layer', rewind=init)")
    assert len(lines) == 2 + 14 + 1
    assert lines[-1].split()[:2] == ["all", "layers"]
    assert f"{report.total.kept:,} of 15,360 weights free" in repr(report)
    assert report.density == pytest.approx(report.total.kept / 15_360)
