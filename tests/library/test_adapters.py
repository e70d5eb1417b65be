"""Several adapters on one base: each is itself again in its turn, and combinations are what they are said to be."""

import contextlib
import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_llama
from rigsa import (
    Adapters,
    MaskedAdamW,
    RigsaError,
    SparsePattern,
    adapter_off,
    describe,
    gated_linears,
    intersection,
    load_adapter,
    overlap,
    plot_densities,
    random_ticket,
    replace_linears,
    save_adapter,
    set_ticket,
    snapshot,
    union,
)
from rigsa.adapters import _elected_mean, _trimmed

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])
UP = "model.layers.0.mlp.up_proj"


def adapted(seed=0, density=0.2, **options):
    model = replace_linears(make_llama(), seed=seed, density=density, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.copy_(torch.randn(layer.rigsa_values.shape, generator=generator))
            layer.rigsa_alpha.fill_(0.1 + seed)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def differences(model):
    """``alpha * D`` of every layer."""
    return {name: layer.delta() * layer.rigsa_alpha.detach() for name, layer in gated_linears(model).items()}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folders(tmp_path):
    """Three adapters: other seeds, densities (one is dense) and gates."""
    for seed, density in ((0, 0.2), (1, 0.5), (2, None)):
        save_adapter(adapted(seed, density), tmp_path / str(seed))
    return [tmp_path / str(seed) for seed in range(3)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_every_adapter_is_itself_when_its_turn_comes(folders, order):
    adapters = Adapters(make_llama())
    for number in order:
        adapters.add(str(number), folders[number])
    for number in (*order, *order):
        adapters.use(str(number))
        alone = make_llama()
        load_adapter(alone, folders[number])
        assert torch.equal(logits(adapters.model), logits(alone))
        assert_equal(state(adapters.model), state(alone))
        assert {layer.seed for layer in gated_linears(adapters.model).values()} == {number}
    assert sorted(adapters.names) == ["0", "1", "2"]
    assert adapters.names[0] == adapters.active == str(order[-1])


def test_what_was_trained_while_active_is_kept(folders):
    model = adapted()
    adapters = Adapters(model, "first")
    adapters.add("second", folders[1])
    optimizer = MaskedAdamW(model, lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = state(model)
    adapters.use("second")
    adapters.use("first")
    assert_equal(trained, state(model))


def test_a_waiting_adapter_is_a_copy(folders):
    model = adapted()
    adapters = Adapters(model)
    adapters.add("copy", snapshot(model))
    before = state(model)
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_values.zero_()
    adapters.use("copy")
    assert_equal(before, state(model))
    adapters.delete("default")
    assert adapters.names == ["copy"]


def test_off_is_the_base_bit_for_bit(folders):
    model = adapted()
    base, on = logits(make_llama()), logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
        with Adapters(model).off():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)


def test_a_weighted_sum(folders):
    adapters = Adapters(make_llama())
    models = []
    for number, folder in enumerate(folders):
        adapters.add(str(number), folder)
        models.append(make_llama())
        load_adapter(models[-1], folder)
    adapters.combine("both", {"0": 0.5, "1": -2.0})
    adapters.use("both")
    expected = [differences(model) for model in models]
    for name, layer in gated_linears(adapters.model).items():
        torch.testing.assert_close(layer.delta(), 0.5 * expected[0][name] - 2 * expected[1][name])
        free = [gated_linears(model)[name].pattern.to_mask() for model in models[:2]]
        assert torch.equal(layer.pattern.to_mask(), free[0] | free[1])
        assert layer.rigsa_alpha.item() == 1
    adapters.combine("all", {"0": 1, "2": 1})
    adapters.use("all")
    assert all(layer.pattern.is_dense for layer in gated_linears(adapters.model).values())


def test_one_adapter_combined_with_itself_is_itself(folders):
    adapters = Adapters(make_llama())
    adapters.add("a", folders[0])
    expected = differences(adapters.model)
    for rule in ("sum", "ties"):
        adapters.combine(rule, {"a": 1.0}, rule=rule)
        adapters.use(rule)
        for name, layer in gated_linears(adapters.model).items():
            torch.testing.assert_close(layer.delta(), expected[name])


def test_ties_by_hand():
    """Column by column: agreement, a sign outvoted, a draw, one alone, and entries too small to be kept."""
    one = torch.tensor([[3.0, -4.0, 2.0, 0.0, 0.1]])
    two = torch.tensor([[1.0, 1.0, -2.0, 5.0, 0.2]])
    kept = [_trimmed(one, 3), _trimmed(two, 4)]
    assert kept[0].tolist() == [[3.0, -4.0, 2.0, 0.0, 0.0]]
    assert kept[1].tolist() == [[1.0, 1.0, -2.0, 5.0, 0.0]]
    assert _elected_mean(kept, [1.0, 1.0]).tolist() == [[2.0, -4.0, 0.0, 5.0, 0.0]]
    assert _elected_mean(kept, [1.0, 3.0]).tolist() == [[1.5, -4.0, -2.0, 5.0, 0.0]]


def test_ties_keeps_the_share_that_was_asked_for(folders):
    adapters = Adapters(make_llama())
    adapters.add("a", folders[0])
    free = {name: layer.pattern.nnz for name, layer in gated_linears(adapters.model).items()}
    adapters.combine("half", {"a": 1.0}, rule="ties", density=0.5)
    adapters.use("half")
    assert {name: layer.pattern.nnz for name, layer in gated_linears(adapters.model).items()} == {
        name: round(0.5 * count) for name, count in free.items()
    }


REFUSED = {
    "a name that is taken": (lambda a, f: a.add("0", f[1]), "expected one other than 0, 1"),
    "an unknown name": (lambda a, f: a.use("9"), "expected one of 0, 1, got '9'"),
    "the active one": (lambda a, f: a.delete("0"), "is the active adapter"),
    "an unknown one": (lambda a, f: a.delete("9"), "expected one of 0, 1"),
    "a method": (lambda a, f: a.combine("x", {"0": 1}, rule="dare"), "rule: expected one of sum, ties"),
    "no weights": (lambda a, f: a.combine("x", {}), "weights: expected at least one"),
    "a weight": (lambda a, f: a.combine("x", {"0": float("nan")}), "weights: expected a finite number"),
    "a weight below 0": (lambda a, f: a.combine("x", {"0": -1.0}, "ties"), "above 0 for 'ties'"),
    "a density": (lambda a, f: a.combine("x", {"0": 1.0}, "ties", density=0), "density: expected more than 0"),
    "a density of a sum": (lambda a, f: a.combine("x", {"0": 1.0}, density=0.5), "1 for 'sum'"),
    "a combination's name": (lambda a, f: a.combine("1", {"0": 1.0}), "expected one other than"),
    "a combination of nobody": (lambda a, f: a.combine("x", {"9": 1.0}), "expected one of 0, 1"),
    "nothing left": (lambda a, f: a.combine("x", {"0": 1.0}, "ties", density=1e-9), "leaves model.layers.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(folders, name):
    call, match = REFUSED[name]
    adapters = Adapters(make_llama())
    for number in (0, 1):
        adapters.add(str(number), folders[number])
    before = state(adapters.model)
    with pytest.raises(ValueError, match=match):
        call(adapters, folders)
    assert adapters.names == ["0", "1"]
    assert_equal(before, state(adapters.model))


def test_a_name_among_no_adapters_is_refused():
    with pytest.raises(ValueError, match=r"^name: expected an adapter that was added, and none was, got '9'$"):
        Adapters(make_llama()).use("9")


def test_an_adapter_on_other_layers_is_refused(folders, tmp_path):
    save_adapter(replace_linears(make_llama(), "*mlp*"), tmp_path / "mlp")
    adapters = Adapters(adapted())
    with pytest.raises(RigsaError, match="q_proj: the adapter has none there"):
        adapters.add("mlp", tmp_path / "mlp")
    assert str(adapters) == "* default: 3,070 entries, 19.99%"


# Tickets side by side.


@given(seeds=st.tuples(st.integers(0, 5), st.integers(0, 5)), density=st.floats(0.01, 1))
def test_overlap_union_and_intersection_are_those_of_the_masks(seeds, density):
    masks = [
        {"a": torch.rand(9, 40, generator=generator) < density, "b": torch.ones(3, 64, dtype=torch.bool)}
        for generator in (torch.Generator().manual_seed(seed) for seed in seeds)
    ]
    one, other = ({name: SparsePattern.from_mask(mask) for name, mask in mask.items()} for mask in masks)
    found = overlap(one, other)
    for name in ("a", "b"):
        both, either = (masks[0][name] & masks[1][name]), (masks[0][name] | masks[1][name])
        assert torch.equal(intersection(one, other)[name].to_mask(), both)
        assert torch.equal(union(one, other)[name].to_mask(), either)
        counts = found.layers[name]
        assert (counts.both, counts.either) == (both.sum(), either.sum())
        assert (counts.first, counts.second) == (masks[0][name].sum(), masks[1][name].sum())
    assert found.share == pytest.approx(found.total.both / found.total.either)


def test_tickets_of_models_and_folders(folders, tmp_path):
    model = adapted(1, 0.5)
    assert overlap(model, folders[1]).share == 1
    both = overlap(folders[0], folders[2])
    assert both.total.both == both.total.first
    set_ticket(model, union(folders[0], folders[1]))
    joined = overlap(model, folders[0]).total
    assert joined.both == joined.second
    text = describe({"one": folders[0], "two": model, "dense": folders[2]})
    assert len(text.splitlines()) == 1 + 14 + 1 + 3
    assert "one and dense share 19.99% of their entries" in text
    assert len(str(both).splitlines()) == 16
    plot_densities({"one $": folders[0], "two": model}, tmp_path / "densities.png")
    assert (tmp_path / "densities.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"13 .* are missing"):
        overlap(model, {UP: SparsePattern.dense(48, 32)})
    with pytest.raises(ValueError, match=f"{UP} is"):
        overlap(model, intersection(model) | {UP: SparsePattern.dense(2, 2)})


@pytest.mark.parametrize("layers", [1, 87, 88, 400])
def test_a_figure_of_many_layers_fits_a_page(layers, tmp_path):
    ticket = {f"layers.{number}.mlp.up_proj": SparsePattern.dense(2, 2) for number in range(layers)}
    plot_densities({"one": ticket}, tmp_path / "densities.png")
    width = int.from_bytes((tmp_path / "densities.png").read_bytes()[16:20], "big")
    assert 600 <= width <= 1400  # pixels, a hundred an inch


def test_random_tickets_share_what_chance_gives():
    one, other = adapted(0, 0.3), adapted(0, 0.3)
    random_ticket(one, 0.3, seed=1)
    random_ticket(other, 0.3, seed=2)
    assert overlap(one, other).share == pytest.approx(0.09 / 0.51, abs=0.02)


# Several in one batch.

NAMES = ["0", None, "1", "0", "dense", "1"]
ROWS = torch.randint(0, 20, (len(NAMES), 7), generator=torch.Generator().manual_seed(3))


def outputs(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def with_three(folders, dtype=torch.float32, **options):
    """A model with a dense adapter, which is active, and two tickets that wait."""
    model = replace_linears(make_llama().to(dtype), **({"alpha_init": 0.3, "seed": 8} | options))
    adapters = Adapters(model, "dense")
    for number in (0, 1):
        adapters.add(str(number), folders[number])
    return adapters


def alone(adapters, name):
    """The model with the adapter `name`, or with none, for every row."""
    if name is None:
        return adapters.off()
    adapters.use(name)
    return contextlib.nullcontext()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numerics", ["auto", "exact"])
def test_each_row_of_a_batch_has_its_own_adapter(folders, dtype, numerics):
    """An adapted layer gives the bits of a batch of its adapter's rows alone.

    The rest of the model sees the whole batch, and a product's last bits may depend on how many rows it has.
    """
    adapters = with_three(folders, dtype, numerics=numerics)
    layer, x = gated_linears(adapters.model)[UP], torch.randn(len(NAMES), 7, 32).to(dtype)
    before = state(adapters.model)
    with adapters.rows(NAMES), torch.no_grad():
        found, layers = outputs(adapters.model, ROWS), layer(x)
        assert torch.equal(found, outputs(adapters.model, ROWS))
    assert_equal(before, state(adapters.model))
    for name in dict.fromkeys(NAMES):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        with alone(adapters, name), torch.no_grad():
            assert torch.equal(layers[rows], layer(x[rows])), name
            torch.testing.assert_close(found[rows], outputs(adapters.model, ROWS[rows]))
    assert len({tuple(row.flatten().tolist()) for row in found}) == len(NAMES)


def test_rows_generate_as_alone(folders):
    adapters = with_three(folders)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with adapters.rows(NAMES):
        found = adapters.model.generate(ROWS, **options)
    for name in ("0", "1", "dense"):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        adapters.use(name)
        assert torch.equal(found[rows], adapters.model.generate(ROWS[rows], **options))


def test_after_the_block_the_model_is_what_it_was_and_errors_name_what_is_wrong(folders):
    adapters = with_three(folders)
    model, before = adapters.model, outputs(adapters.model, ROWS)
    match = r"x: expected a batch of 6 rows, one for each name, got \[2, 7, 32\]"
    with pytest.raises(ValueError, match=match), adapters.rows(NAMES):
        outputs(model, ROWS[:2])
    assert torch.equal(outputs(model, ROWS), before)
    for names, match in (
        ([], "names: expected one for each row"),
        (["0", "nobody"], "expected one of dense, 0, 1, got 'nobody'"),
    ):
        with pytest.raises(ValueError, match=match), adapters.rows(names):
            pass
    with pytest.raises(ValueError, match="expected one for each row of a batch and an adapter"):
        Adapters(make_llama()).rows([None])
    layer = next(iter(gated_linears(model).values()))
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="q_proj has a forward of its own"), adapters.rows(NAMES):
        pass
    del layer.forward
    assert torch.equal(outputs(model, ROWS), before)
    read = replace_linears(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)))
    with pytest.raises(ValueError, match="is a weight that code reads"), Adapters(read).rows(["default"]):
        pass
