"""Every method on a model of 70 kB: the masks they choose, what they train, and that runs repeat to the bit."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

from rigsa.adapters import adapter_off
from rigsa.experiments.adapter import load_masks, trained_parameters
from rigsa.experiments.config import Gates, Look, fields_of
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.methods.gradient_masks import GradientMask, examples_at_a_time, mask_batches, score_entries
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.methods.ticket import FROM_ZERO, TicketMethod, highest
from rigsa.experiments.presets import arguments_of, smoke
from rigsa.experiments.tasks.evaluation import target_logits, training_loss
from rigsa.experiments.train import make_optimizer
from rigsa.run import main
from rigsa.scores import GradientScore
from rigsa_kernels import gated_linears
from rigsa_kernels.selection import select_linears
from tests.conftest import make_llama

DENSITY = 0.1
APART = ("imp", "reinit", "qlora")
"""Methods that tests/experiments/test_run.py runs, and one that needs a wider model."""
SMALL_TILE = {"smt": {"tile": "4"}}
"""What a layer of 16 rows has more than one of."""
OPTIONS = {
    "dtype": "float32", "device": "cpu", "test_examples": 20, "epochs": 1, "train_examples": 40, "max_steps": 4,
    "eval_shots": "0", "micro_batch_size": 2,
}  # fmt: skip


def config_of(method: str, model: Path, **options: object):
    own = {"density": DENSITY, "mask_examples": 6, "rank": 3, "reselect_steps": 2, "ranking": "layer"}
    base = smoke(method)
    read = set(METHODS[method].options)
    chosen = {name: value for name, value in own.items() if name in read}
    chosen |= SMALL_TILE.get(method, {})
    return dataclasses.replace(base, model=str(model), **OPTIONS | chosen | options)


def experiment(method: str, model: Path, run: Path, **options: object) -> Experiment:
    prepared = Experiment.prepare(config_of(method, model, **options), run)
    prepared.attach()
    return prepared


def command(config, out: Path) -> list[str]:
    return [config.method.name, "--preset", "smoke", "--out", str(out), *arguments_of(config, "smoke")]


def images_of(prepared: Experiment, size: int) -> DataLoader:
    """The images that choose the mask, found here once more."""
    samples = prepared.task.training()
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(prepared.config.seed))
    chosen = Subset(samples, order[: prepared.config.mask_examples].tolist())
    return DataLoader(chosen, size, collate_fn=samples.collate)


def gradients_of_plain_weights(prepared: Experiment, size: int) -> dict[str, list[torch.Tensor]]:
    """By batch, in float64, on a model that nothing was attached to."""
    plain = make_llama().double()
    layers = select_linears(plain, "*", ())[0]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for batch in images_of(prepared, size):
        plain.zero_grad()
        training_loss(plain, batch).backward()
        for name, layer in layers.items():
            found[name].append(layer.weight.grad.clone())
    return found


def scores_of(prepared: Experiment, score: GradientScore) -> dict[str, torch.Tensor]:
    """As the run makes them."""
    divisor = examples_at_a_time(score, prepared.config)
    return score_entries(prepared.model, score, mask_batches(prepared, score), divisor)


def by_definition(method: str, gradients: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    mean, square = torch.stack(gradients).mean(0), torch.stack(gradients).square().mean(0)
    return {
        "sift": mean.abs(),
        "smt": mean.abs(),
        "spruft": (weight * mean).abs(),
        "fisher": square,
        "rosa": square,
        "child-d": square,
        "sam": mean**2 / (square + square.mean()),
    }[method]


GRADIENT_MASKS = {name: method for name, method in METHODS.items() if isinstance(method, GradientMask)}


@pytest.mark.parametrize("method", [name for name, method in GRADIENT_MASKS.items() if not method.score.at_start])
def test_gradient_scores_are_those_of_their_definition(method, small_model_folder, tmp_path):
    prepared = experiment(method, small_model_folder, tmp_path)
    score = METHODS[method].score
    gradients = gradients_of_plain_weights(prepared, 1 if method in ("fisher", "child-d", "sam") else 2)
    scores = score_entries(
        prepared.model, score, mask_batches(prepared, score), examples_at_a_time(score, prepared.config)
    )
    assert {name.removesuffix(".base_layer") for name in scores} == gradients.keys()
    for name, score in scores.items():
        weight = gated_linears(prepared.model)[name].weight.double()
        want = by_definition(method, gradients[name.removesuffix(".base_layer")], weight)
        torch.testing.assert_close(score.double(), want, rtol=1e-4, atol=1e-5 * want.max().item())
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


def mean_gradient(prepared: Experiment, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the mean loss of the images that choose the mask, in float64, on a plain model with these weights."""
    plain = make_llama().double()
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    batches = list(images_of(prepared, 2))
    (sum(training_loss(plain, batch) for batch in batches) / len(batches)).backward()
    return {name: plain.get_submodule(name).weight.grad for name in weights}


def test_scores_of_the_start_are_those_of_their_definition(small_model_folder, tmp_path):
    """The Hessian's product with the gradient is found here as a difference of gradients."""
    gate, step = 0.5, 1e-4
    prepared = experiment("snip", small_model_folder, tmp_path, alpha_init=gate)
    start = {name: layer.delta().double() for name, layer in gated_linears(prepared.model).items()}
    frozen = {name: prepared.model.get_submodule(name).weight.double() for name in start}

    def gradient(direction: dict[str, torch.Tensor], size: float) -> dict[str, torch.Tensor]:
        """Of the differences, `size` along a direction away from where they start."""
        moved = {name: frozen[name] + gate * (start[name] + size * direction[name]) for name in start}
        return {name: gate * found for name, found in mean_gradient(prepared, moved).items()}

    here = gradient(start, 0)
    ahead, behind = gradient(here, step), gradient(here, -step)
    wanted = {
        "snip": {name: (start[name] * here[name]).abs() for name in start},
        "grasp": {name: start[name] * (ahead[name] - behind[name]) / (2 * step) for name in start},
    }
    for method, expected in wanted.items():
        score = METHODS[method].score
        scores = score_entries(
            prepared.model, score, mask_batches(prepared, score), examples_at_a_time(score, prepared.config)
        )
        for name, found in scores.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(found.double(), expected[name], rtol=1e-3, atol=1e-3 * scale)
    assert all("forward" not in vars(layer) for layer in gated_linears(prepared.model).values())
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


@pytest.fixture(scope="module")
def finished(small_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method but these `APART`."""
    folder = tmp_path_factory.mktemp("methods")
    runs = {method: folder / method for method in METHODS if method not in APART}
    for method, out in runs.items():
        assert main(command(config_of(method, small_model_folder), out)) == 0
    return runs


def last_level(run: Path) -> Path:
    return max(run.glob("level_*"))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in APART])
def test_sizes_are_what_was_asked_for(method, finished):
    metrics = json.loads((last_level(finished[method]) / "metrics.json").read_text())
    layers = select_linears(make_llama(), "*", ())[0].values()
    low_rank = sum(3 * (layer.in_features + layer.out_features) for layer in layers)
    sparse = sum(round(DENSITY * layer.weight.numel()) for layer in layers)
    gates = len(layers) if METHODS[method].usual.get("gate") != "none" else 0
    want = {
        "full": 15_360,
        "child-f": 15_360,
        "child-d": round(DENSITY * 15_360),
        "lora": low_rank,
        "shira": low_rank,
        "rosa": sparse + low_rank,
        "smt": sum(round(DENSITY * (layer.weight.numel() // 16)) * 16 for layer in layers),  # tiles of 4 x 4
        "spruft": sum(round(DENSITY * layer.out_features) * layer.in_features for layer in layers),
        "erk": round(DENSITY * 15_360) + gates,
    }.get(method, sparse + gates)
    assert metrics["trainable"] == want
    assert metrics["weights"] == 15_360
    assert metrics["steps"] == 4
    assert metrics["drift"]["kl"] > 0


@pytest.mark.parametrize("method", ["sift", "grasp", "erk", "rosa", "lora", "shira"])
def test_same_command_gives_the_same_bits(method, finished, small_model_folder, tmp_path):
    assert main(command(config_of(method, small_model_folder), tmp_path / "again")) == 0
    for name in ("adapter.safetensors", "metrics.json", "log.jsonl"):
        again = last_level(tmp_path / "again") / name
        assert again.read_bytes() == (last_level(finished[method]) / name).read_bytes()


@pytest.mark.parametrize("method", ["lt-sft", "rosa", "lora", "shira"])
def test_saved_adapter_gives_the_trained_model_back(method, finished, small_model_folder):
    level = last_level(finished[method])
    restored = experiment(method, small_model_folder, finished[method])
    restored.restore(int(level.name.rpartition("_")[2]))
    metrics = json.loads((level / "metrics.json").read_text())
    assert restored.test("again")["test"] == metrics["test"]
    assert restored.drift() == metrics["drift"]
    saved = load_file(level / "adapter.safetensors")
    assert saved.keys() == trained_parameters(restored.model).keys()


def test_lottery_ticket_keeps_what_changed_most(finished, small_model_folder):
    prepared = experiment("lt-sft", small_model_folder, finished["lt-sft"])
    masks = load_masks(prepared.model, finished["lt-sft"] / "level_1" / "mask.safetensors")
    changes = load_file(finished["lt-sft"] / "level_0" / "adapter.safetensors")
    for name, pattern in masks.items():
        change, mask = changes[f"{name}.rigsa_values"].abs(), pattern.to_mask()
        assert pattern.nnz == round(DENSITY * change.numel())
        assert change[mask].min() >= change[~mask].max()


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_masks_of_the_start_take_the_highest_scores(method, finished, small_model_folder):
    level = finished[method] / "level_1"
    prepared = experiment(method, small_model_folder, finished[method])
    score = METHODS[method].score
    scores = score_entries(
        prepared.model, score, mask_batches(prepared, score), examples_at_a_time(score, prepared.config)
    )
    for name, pattern in load_masks(prepared.model, level / "mask.safetensors").items():
        mask = pattern.to_mask()
        assert pattern.nnz == round(DENSITY * mask.numel())
        assert scores[name][mask].min() >= scores[name][~mask].max()


def test_erk_masks_are_denser_in_narrow_layers(finished, small_model_folder):
    prepared = experiment("erk", small_model_folder, finished["erk"])
    masks = load_masks(prepared.model, finished["erk"] / "level_1" / "mask.safetensors")
    by_side = {name: pattern.nnz / sum(pattern.shape) for name, pattern in masks.items()}
    assert max(by_side.values()) - min(by_side.values()) <= 2 / 48  # a rounding of a narrow layer's count
    assert len({pattern.density for pattern in masks.values()}) > 2


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_super_mask_follows_the_pretrained_magnitudes(which, finished, small_model_folder, tmp_path):
    run = finished["super"]
    if which == "smallest":
        run = tmp_path / "smallest"
        assert main(command(config_of("super", small_model_folder, super_rank="smallest"), run)) == 0
    prepared = experiment("super", small_model_folder, run)
    for name, pattern in load_masks(prepared.model, run / "level_1" / "mask.safetensors").items():
        magnitude, mask = prepared.model.get_submodule(name).weight.abs(), pattern.to_mask()
        kept, left = magnitude[mask], magnitude[~mask]
        assert kept.min() >= left.max() if which == "largest" else kept.max() <= left.min()


def test_full_fine_tuning_is_adamw_on_the_weights(small_model_folder, tmp_path):
    """Three steps of a dense difference with a gate of 1 beside three of torch's AdamW on the weights themselves."""
    prepared = experiment("full", small_model_folder, tmp_path)
    plain = make_llama()
    layers = select_linears(plain, "*", ())[0]
    plain.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    config = prepared.config
    theirs = torch.optim.AdamW(
        [layer.weight for layer in layers.values()], config.learning_rate, (config.beta1, config.beta2), config.eps, 0.0
    )
    ours = make_optimizer(prepared.model, config)
    for batch in images_of(dataclasses.replace(prepared, config=config_of("sift", small_model_folder)), 2):
        for model, optimizer in ((plain, theirs), (prepared.model, ours)):
            training_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in gated_linears(prepared.model).items():
        moved, wanted = layer.weight + layer.delta(), layers[name].weight
        # AdamW divides by the gradient's size, so an entry whose gradient is all rounding may go its own way
        different = ~torch.isclose(moved, wanted, rtol=1e-5, atol=1e-6)
        assert different.float().mean() < 0.01
        assert (wanted - layer.weight).abs().max() > config.learning_rate


@pytest.mark.parametrize("method", ["full", "sift", "rosa", "lora", "shira"])
def test_what_is_attached_changes_nothing_at_the_start_and_can_be_switched_off(method, small_model_folder, tmp_path):
    prepared = Experiment.prepare(config_of(method, small_model_folder), tmp_path)
    batch = next(iter(images_of(dataclasses.replace(prepared, config=config_of("sift", small_model_folder)), 3)))
    with torch.no_grad():
        wanted = target_logits(prepared.model, batch)
        prepared.attach()
        assert torch.equal(target_logits(prepared.model, batch), wanted)
        for parameter in trained_parameters(prepared.model).values():
            parameter.add_(0.1)
        assert not torch.equal(target_logits(prepared.model, batch), wanted)
        with adapter_off(prepared.model):
            assert torch.equal(target_logits(prepared.model, batch), wanted)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sift", ["--mask-examples", "41"], "--mask-examples: there are only 40 training examples, got 41"),
        ("sift", ["--density", "0.0001"], "--density: 0.0001 leaves"),
        ("erk", ["--density", "0.0001"], "--density: 0.0001 leaves"),
        ("shira", ["--rank", "17"], "--rank: expected at most 16"),
    ],
)
def test_what_does_not_fit_the_model_is_named(method, options, message, small_model_folder, tmp_path, capsys):
    assert main([*command(config_of(method, small_model_folder), tmp_path / "run"), *options]) == 1
    assert message in capsys.readouterr().err


def test_gated_methods_are_those_that_train_gated_layers(finished):
    for method, run in finished.items():
        assert ("layer_density" in json.loads((last_level(run) / "metrics.json").read_text())) == METHODS[method].gated


class Leading(TicketMethod):
    """Trains the first entries of every layer: a method that no file of the rig names."""

    def choose(self, experiment):  # type: ignore[no-untyped-def]
        layers = gated_linears(experiment.model).items()
        return highest(
            experiment.config,
            {name: -torch.arange(float(layer.num_weights)).view(layer.pattern.shape) for name, layer in layers},
        )


def test_a_new_method_is_one_object_and_one_line(small_model_folder, tmp_path, monkeypatch, capsys):
    """It runs, resumes, is planned, swept and drawn, and has its options, presets and checks."""
    new = Leading(
        name="leading",
        help="the first entries",
        options=(*fields_of(Gates), "ranking", "density"),
        look=Look("blue", "8", "solid"),
        usual={**FROM_ZERO, "density": DENSITY},
    )
    monkeypatch.setitem(METHODS, new.name, new)
    run = tmp_path / "run"
    asked = command(config_of("leading", small_model_folder), run)
    for _ in range(2):
        assert main(asked) == 0
        assert re.search(r"\| leading \| +1 \| +10\.0\d%", capsys.readouterr().out)
    prepared = experiment("leading", small_model_folder, run)
    for pattern in load_masks(prepared.model, run / "level_1" / "mask.safetensors").values():
        assert pattern.to_mask().flatten()[: pattern.nnz].all()
    assert main(["plan", "--method", "leading", "--preset", "smoke", "--model", str(small_model_folder)]) == 0
    assert re.search(r"\n +1 +10.00%", capsys.readouterr().out)
    sweep = ["sweep", "--preset", "smoke", "--methods", "imp,leading", "--vary", "leading:density=0.1,0.2", "--dry-run"]
    assert main([*sweep, "--out", str(tmp_path / "sweep")]) == 0
    assert capsys.readouterr().out.count("rigsa.run leading") == 2
    assert main(["leading", "--density", "0"]) == 1
    assert "--density: expected more than 0 for leading, got 0.0" in capsys.readouterr().err
