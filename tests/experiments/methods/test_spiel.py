"""SpIEL: what is dropped, grown and carried along, by hand; and that a run which was killed ends with the same bits."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from conftest import make_llama, make_tokenizer
from rigsa import files
from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.distributed import join
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.methods.reselection import Reselection, accumulated_gradients, entries_to_move
from rigsa.experiments.presets import smoke
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa.experiments.tasks.textual_mnist import PromptDataset, Prompts, load_splits
from rigsa.masks import random_patterns
from rigsa.run import main
from rigsa_kernels import GatedSparseLinear, MaskedAdamW, SparsePattern, gated_linears, replace_linears
from rigsa_kernels.adamw import decode_exp_avg, decode_exp_avg_sq

CONFIG = dataclasses.replace(
    smoke("spiel"), seed=3, batch_size=4, micro_batch_size=2, reselect_steps=3, reselect_share=0.5
)


@pytest.fixture(scope="module")
def dataset() -> PromptDataset:
    return PromptDataset(load_splits("digits").train.first(20), Prompts(make_tokenizer()))


def make_model(density: float = 0.25, values_dtype: torch.dtype = torch.float32) -> nn.Module:
    """As the method attaches it, with values that are not zero any more."""
    model = replace_linears(make_llama(), alpha_init=1.0, init_scale=0.0, values_dtype=values_dtype).train()
    layers = gated_linears(model)
    shapes = {name: layer.pattern.shape for name, layer in layers.items()}
    patterns = random_patterns(shapes, {name: round(density * n * k) for name, (n, k) in shapes.items()}, seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        layer.rigsa_alpha.requires_grad_(False)
        layer.set_pattern(patterns[name])
        with torch.no_grad():
            layer.rigsa_values.copy_(torch.randn(layer.pattern.nnz, generator=generator) / 50)
    return model


def dense_gradients(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Of the weights W0 + D in an ordinary model, for each batch."""
    names = [f"{name}.weight" for name in gated_linears(model)]
    plain = make_llama().train()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, layer in gated_linears(model).items():
            weights[f"{name}.weight"] += layer.delta().float()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in gated_linears(model)}
    for batch in batches:
        grads = torch.autograd.grad(training_loss(plain, batch), [weights[name] for name in names])
        for name, grad in zip(found, grads, strict=True):
            found[name].append(grad)
    return found


def no_divergence(what: str, layer: str) -> RigsaError:
    raise AssertionError(f"{what} in {layer}")


def trained(model: nn.Module, dataset: PromptDataset, **options: object) -> MaskedAdamW:
    """An optimiser that has made three steps."""
    optimizer = MaskedAdamW(model, lr=1e-3, **options)
    for step in range(3):
        for batch in Reselection(CONFIG, dataset).batches(100 + step):
            training_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def numbers(model: nn.Module, step: int = 3, steps: int = 12) -> dict[str, int]:
    return {name: entries_to_move(CONFIG, step, steps, layer.pattern) for name, layer in gated_linears(model).items()}


def moments(optimizer: MaskedAdamW, layer: GatedSparseLinear) -> list[torch.Tensor]:
    state = optimizer.state[layer.rigsa_values]
    if "scales" not in state:
        return [state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    first, second = state["scales"]
    return [decode_exp_avg(state["exp_avg"], first), decode_exp_avg_sq(state["exp_avg_sq"], second)]


# ---- what a layer and its optimiser carry along


def test_places_are_found_by_the_coordinates():
    before = SparsePattern.from_mask(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool())
    after = SparsePattern.from_mask(torch.tensor([[0, 1, 1], [1, 1, 0]]).bool())
    assert after.places_in(before).tolist() == [-1, 1, -1, 2]
    with pytest.raises(ValueError, match="before: expected two packed patterns of one shape"):
        after.places_in(SparsePattern.dense(2, 3))


def test_a_pattern_moves_under_the_same_parameter():
    layer = GatedSparseLinear(nn.Linear(3, 2), seed=0, key=0, alpha_init=1.0, init_scale=0.0)
    layer.set_pattern(SparsePattern.from_mask(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()))
    parameter = layer.rigsa_values
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.randn(5, 3)
    layer(x).sum().backward()  # whatever is remembered for a step is now there
    layer.move_pattern(SparsePattern.from_mask(torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()))
    assert layer.rigsa_values is parameter
    assert parameter.grad is None
    delta = torch.tensor([[0.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    assert torch.equal(layer.delta(), delta)
    torch.testing.assert_close(layer(x), x @ (layer.frozen_matrix() + delta).T + layer.bias)
    with pytest.raises(ValueError, match="pattern: expected 4 free entries, got 1"):
        layer.move_pattern(SparsePattern.from_mask(torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()))


def test_state_of_a_parameter_without_a_step_stays_empty():
    layer = GatedSparseLinear(nn.Linear(3, 2), seed=0, key=0)
    optimizer = MaskedAdamW(layer)
    optimizer.move_state(layer.rigsa_values, torch.arange(6))
    assert layer.rigsa_values not in optimizer.state


# ---- the gradients that decide


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_weights(dataset, checkpointing):
    """At density 0.25 a third of the entries that are not free are candidates; the first micro-batch names them."""
    model = make_model()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batches = list(Reselection(CONFIG, dataset).batches(3))
    expected = dense_gradients(model, batches)
    found = accumulated_gradients(model, batches, CONFIG.micro_batch_size, no_divergence)
    assert found.keys() == expected.keys()
    for name, layer in gated_linears(model).items():
        first, second = expected[name]
        mask = layer.pattern.to_mask()
        candidates = torch.zeros_like(mask)
        candidates.view(-1)[found[name].index.long()] = True
        assert candidates.sum() == mask.sum()
        assert not (candidates & mask).any()
        smallest = first[candidates].abs().min()
        assert (first[~mask & ~candidates].abs() <= smallest * (1 + 1e-3) + 1e-9).all()
        total = torch.where(candidates, first + second, 0)
        torch.testing.assert_close(found[name].gradient(), total, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.rigsa_values.requires_grad for layer in gated_linears(model).values())
    assert not any(layer._forward_hooks for layer in gated_linears(model).values())


def test_images_are_drawn_from_seed_and_step_and_leave_the_random_state_alone(dataset):
    state = torch.random.get_rng_state()
    draw = {
        (seed, step): torch.cat(
            [batch["input_ids"] for batch in Reselection(dataclasses.replace(CONFIG, seed=seed), dataset).batches(step)]
        )
        for seed, step in ((0, 1), (0, 2), (1, 1))
    }
    again = torch.cat([b["input_ids"] for b in Reselection(dataclasses.replace(CONFIG, seed=0), dataset).batches(1)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(draw[0, 1], again)
    assert len(again) == CONFIG.batch_size
    assert not torch.equal(draw[0, 1], draw[0, 2])
    assert not torch.equal(draw[0, 1], draw[1, 1])


# ---- one round


@pytest.mark.parametrize(
    ("values_dtype", "state_dtype"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float32, "int8")],
)
def test_one_round_equals_a_computation_by_hand(dataset, values_dtype, state_dtype):
    model = make_model(values_dtype=values_dtype)
    optimizer = trained(model, dataset, state_dtype=state_dtype, weight_decay=0.0)
    layers, moved = gated_linears(model), numbers(model)
    before = {name: (layer.rigsa_values, layer.delta(), layer.pattern) for name, layer in layers.items()}
    old = {
        name: [layer.pattern.scatter(moment) for moment in moments(optimizer, layer)] for name, layer in layers.items()
    }
    frozen = {name: p.clone() for name, p in model.named_parameters() if "rigsa_values" not in name}
    reselection = Reselection(CONFIG, dataset)
    batches = list(reselection.batches(7))
    candidates = accumulated_gradients(model, batches, CONFIG.micro_batch_size, no_divergence)
    reselection.reselect(model, optimizer, 7, moved)
    for name, layer in layers.items():
        parameter, delta, pattern = before[name]
        mask, count = pattern.to_mask(), moved[name]
        order = torch.where(mask, delta.float().abs(), -1).view(-1).argsort(descending=True, stable=True)
        gradient = candidates[name].gradient().abs()
        grown = torch.where(mask, -1, gradient).view(-1).argsort(descending=True, stable=True)[:count]
        expected = torch.zeros_like(mask)
        expected.view(-1)[torch.cat([order[: pattern.nnz - count], grown])] = True
        assert count > 0
        assert torch.equal(layer.pattern.to_mask(), expected)
        assert layer.pattern.nnz == pattern.nnz
        assert layer.rigsa_values is parameter
        kept = torch.where(mask & expected, delta, 0)
        assert torch.equal(layer.delta(), kept)
        for moment, now in zip(old[name], moments(optimizer, layer), strict=True):
            carried = torch.where(mask & expected, moment, 0)
            if state_dtype == "int8":  # one code of the root, and of the fourth root
                scale = moment.abs().max()
                torch.testing.assert_close(layer.pattern.scatter(now), carried, rtol=0.05, atol=0.02 * scale.item())
                assert (layer.pattern.scatter(now)[expected & ~mask] == 0).all()
            else:
                assert torch.equal(layer.pattern.scatter(now), carried)
        assert optimizer.state[parameter]["step"] == 3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_only_free_entries_move_afterwards(dataset):
    model = make_model()
    optimizer = trained(model, dataset, weight_decay=1.0)
    Reselection(CONFIG, dataset).reselect(model, optimizer, 3, numbers(model))
    masks = {name: layer.pattern.to_mask() for name, layer in gated_linears(model).items()}
    before = {name: layer.delta() for name, layer in gated_linears(model).items()}
    for batch in Reselection(CONFIG, dataset).batches(50):
        training_loss(model, batch).backward()
    optimizer.step()
    for name, layer in gated_linears(model).items():
        assert (layer.delta()[~masks[name]].view(torch.int32) == 0).all()
        new = masks[name] & (before[name] == 0)
        assert layer.delta()[new].count_nonzero() > 0.5 * new.sum()


def test_the_share_falls_to_nothing_and_never_exceeds_what_there_is():
    pattern = SparsePattern.from_mask(torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.4)
    shares = [entries_to_move(CONFIG, step, 10, pattern) for step in range(11)]
    assert shares == [round(0.5 * (1 - step / 10) * pattern.nnz) for step in range(11)]
    assert shares[-1] == 0
    nearly = SparsePattern.from_mask(torch.arange(2000).view(40, 50) > 5)
    assert entries_to_move(CONFIG, 0, 10, nearly) == 6
    assert entries_to_move(CONFIG, 0, 10, SparsePattern.dense(4, 5)) == 0


@pytest.mark.parametrize("what", ["a trained value", "the gradient"])
def test_what_is_not_finite_is_one_error_and_changes_nothing(dataset, what):
    model = make_model()
    optimizer = trained(model, dataset)
    layer = gated_linears(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        (layer.rigsa_values if what == "a trained value" else model.lm_head.weight).view(-1)[0] = torch.inf
    before = {name: layer.rigsa_words for name, layer in gated_linears(model).items()}
    with pytest.raises(RigsaError, match=rf"training diverged at step 9: {what} is not finite in model.layers.1.mlp"):
        Reselection(CONFIG, dataset).reselect(model, optimizer, 9, numbers(model))
    assert all(layer.rigsa_words is before[name] for name, layer in gated_linears(model).items())
    assert not layer._forward_hooks


# ---- whole runs


@pytest.fixture(scope="module")
def config(small_model_folder: Path) -> Config:
    """Rounds after steps 3 and 6 of 8, points to resume from after 2, 4, 6 and 8."""
    return dataclasses.replace(
        CONFIG, model=str(small_model_folder), dtype="float32", device="cpu", max_steps=8, test_examples=8,
        checkpoint_steps=2, train_examples=40, drift=False, density=0.25,
    )  # fmt: skip


def run(config: Config, out: Path) -> Path:
    """As the command line does it, but for the report."""
    join(on_cpu=True)
    config.method.run(Experiment.prepare(config, out))
    return out


@pytest.fixture(scope="module")
def rounds() -> list[tuple[dict[str, SparsePattern], dict[str, SparsePattern]]]:
    """The patterns before and after each round of the run `finished`."""
    return []


@pytest.fixture(scope="module")
def finished(config, rounds, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    reselect = Reselection.reselect

    def recorded(self, model, *args):  # type: ignore[no-untyped-def]
        before = {name: layer.pattern for name, layer in gated_linears(model).items()}
        reselect(self, model, *args)
        rounds.append((before, {name: layer.pattern for name, layer in gated_linears(model).items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reselection, "reselect", recorded)
        return run(config, tmp_path_factory.mktemp("runs") / "spiel")


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "resources.json"
    }


def test_folder_records_the_last_mask_and_what_was_exchanged(finished, rounds):
    level = {path.name for path in (finished / "level_1").iterdir()}
    assert level == {
        "adapter.safetensors", "done", "log.jsonl", "mask.safetensors", "metrics.json", "pruning.json",
        "resources.json",
    }  # fmt: skip
    exchanged = sum(
        int((after[name].to_mask() & ~before[name].to_mask()).sum()) for before, after in rounds for name in before
    )
    first, last = rounds[0][0], rounds[-1][1]
    assert json.loads((finished / "level_1" / "pruning.json").read_text()) == {
        "kept": sum(pattern.nnz for pattern in first.values()),
        "rounds": len(rounds),
        "exchanged": exchanged,
        "mask": None,
    }
    assert len(rounds) == 2
    saved = load_file(finished / "level_1" / "mask.safetensors")
    assert all(torch.equal(saved[name], pattern.words) for name, pattern in last.items())
    shapes = {name: pattern.shape for name, pattern in first.items()}
    drawn = random_patterns(shapes, {name: pattern.nnz for name, pattern in first.items()}, seed=CONFIG.seed)
    assert all(torch.equal(drawn[name].words, first[name].words) for name in first)
    assert all(last[name].nnz == first[name].nnz == round(0.25 * n * k) for name, (n, k) in shapes.items())


def test_the_trained_model_is_restored_from_its_folder(config, finished):
    experiment = Experiment.prepare(config, finished)
    experiment.attach()
    experiment.restore(1)
    metrics = json.loads((finished / "level_1" / "metrics.json").read_text())
    assert experiment.test("again")["test"] == metrics["test"]
    assert metrics["density"] == 0.25


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in the product may catch it."""


def test_death_at_any_write_and_running_again_gives_the_same_bits(finished, config, tmp_path, monkeypatch):
    """Dies before a rename, then before the fifth after it, ... each time in a run that goes on from the last death."""
    replace, deaths = os.replace, 0
    while True:
        alive = [4]  # writes that succeed before the next death; a checkpoint makes three

        def dying_replace(source, target, alive=alive):  # type: ignore[no-untyped-def]
            if alive[0] == 0:
                raise Killed
            alive[0] -= 1
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", dying_replace)
        try:
            run(config, tmp_path)
            break
        except Killed:
            deaths += 1
            assert deaths < 20
        finally:
            monkeypatch.setattr(files.os, "replace", replace)
    assert deaths > 4
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("call", [5, 20])
def test_death_in_the_midst_of_a_round_and_running_again_gives_the_same_bits(
    call, finished, config, tmp_path, monkeypatch
):
    """While the fifth of 14 layers moves in the first round, the sixth in the second."""
    move, calls = GatedSparseLinear.move_pattern, [0]

    def dying_move(self, pattern):  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return move(self, pattern)

    monkeypatch.setattr(GatedSparseLinear, "move_pattern", dying_move)
    with pytest.raises(Killed):
        run(config, tmp_path)
    monkeypatch.undo()
    assert contents(run(config, tmp_path)) == contents(finished)


def test_updates_within_backward_see_nothing_of_a_round(config, tmp_path):
    plain = dataclasses.replace(config, max_grad_norm=0.0, micro_batch_size=4, max_steps=4)
    one = run(plain, tmp_path / "one")
    other = run(dataclasses.replace(plain, step_in_backward=True), tmp_path / "other")
    saved = [load_file(out / "level_1" / "adapter.safetensors") for out in (one, other)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_command_line(config, tmp_path, capsys):
    options = ["--model", config.model, "--preset", "smoke", "--no-drift", "--reselect-steps", "2", "--max-steps", "4"]
    assert main(["spiel", *options, "--out", str(tmp_path)]) == 0
    assert "| spiel |" in capsys.readouterr().out
    assert json.loads((tmp_path / "level_1" / "pruning.json").read_text())["rounds"] == 1
