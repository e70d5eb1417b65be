"""What is trained as it is beside an adapter: chosen by name, not decayed, rewound, saved, resumed and exported."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from texts import family, rows, save_family, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rigsa.errors import RigsaError
from rigsa.experiments import train
from rigsa.experiments.attach import attach
from rigsa.experiments.chat import Chat
from rigsa.experiments.config import Config
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.kept import as_before, check_kept, kept_parameters, put_back, start_of_kept
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import smoke
from rigsa.experiments.run_folder import finished_levels, level_folder
from rigsa.experiments.train import LevelTrainer, make_optimizer
from rigsa.run import main
from rigsa_kernels.selection import adaptable

KEPT = "model.norm,*.input_layernorm,model.embed_tokens"


def config_of(method: str = "imp", **options: Any) -> Config:
    changes = {"dtype": "float32", "keep_trainable": KEPT, **options}
    return dataclasses.replace(smoke(method, "cpu"), **changes)


def adapted(config: Config, name: str = "llama") -> Any:
    model = family(name).requires_grad_(False)
    attach(model, config)
    return model


@pytest.mark.parametrize("method", ["imp", "lora", "rosa", "shira"])
def test_what_is_named_is_trained_beside_the_adapter_and_not_decayed(method):
    pytest.importorskip("peft")
    config = config_of(method, weight_decay=1.0, **({"density": 0.1} if method == "rosa" else {}))
    config = dataclasses.replace(config, rank=2)
    model = adapted(config)
    expected = {"model.norm.weight", "model.embed_tokens.weight"}
    expected |= {f"model.layers.{number}.input_layernorm.weight" for number in range(2)}
    assert kept_parameters(model).keys() == expected
    groups = make_optimizer(model, config).param_groups
    kept = {id(parameter) for parameter in kept_parameters(model).values()}
    for group in groups:
        inside = [id(parameter) in kept for parameter in group["params"]]
        assert all(inside) or not any(inside)
        if all(inside):
            assert (group["weight_decay"], group["lr"]) == (0.0, config.learning_rate)
    trained = [parameter for group in groups for parameter in group["params"]]
    assert kept <= {id(parameter) for parameter in trained}
    assert len(trained) == len({id(parameter) for parameter in trained})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "model.nrm",
            r"--keep-trainable: 'model.nrm' names no parameter and no module; .* model.embed_tokens.weight, ",
        ),
        (
            "model.layers.0",
            r"names model.layers.0.self_attn.q_proj.weight, which belongs to a layer that gets an adapt",
        ),
        ("*.q_proj.weight", r"names model.layers.0.self_attn.q_proj.weight, which belongs to a layer"),
    ],
)
def test_a_pattern_that_names_nothing_or_an_adapted_layer_is_refused(pattern, message):
    model = family("llama")
    with pytest.raises(RigsaError, match=message):
        check_kept(model, config_of(keep_trainable=pattern), adaptable(model, ["*"], []))
    with pytest.raises(RigsaError, match="--keep-trainable: expected patterns separated by commas, got a,,b"):
        config_of(keep_trainable="a,,b")


def test_a_layer_that_is_excluded_may_be_kept_whole():
    config = config_of(keep_trainable="model.layers.0.mlp.*", exclude="model.layers.0.mlp.*")
    model = family("llama")
    check_kept(model, config, adaptable(model, config.included, config.excluded))
    attach(model.requires_grad_(False), config)
    assert len(kept_parameters(model)) == 3


def test_before_and_after_are_told_apart():
    model = adapted(config_of())
    start = start_of_kept(model)
    with torch.no_grad():
        for parameter in kept_parameters(model).values():
            parameter.add_(1)
    with as_before(model, start):
        torch.testing.assert_close(start_of_kept(model), start, rtol=0, atol=0)
    torch.testing.assert_close(start_of_kept(model)["model.norm.weight"], start["model.norm.weight"] + 1)
    put_back(model, start)
    torch.testing.assert_close(start_of_kept(model), start, rtol=0, atol=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is tied to its embeddings, and texts."""
    folder = tmp_path_factory.mktemp("kept")
    save_family("llama", folder / "model")
    settings = LlamaConfig.from_pretrained(folder / "model", tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder / "model")
    write_jsonl(folder / "data.jsonl", rows("messages"))
    return folder


SLOW = ("--ticket-learning-rate", "1e-12", "--ticket-alpha-learning-rate", "1e-12")


def command(place: Path, out: Path, *options: str, method: str = "imp") -> list[str]:
    return [
        method, "--preset", "smoke", "--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--dtype",
        "float32", "--device", "cpu", "--out", str(out), "--system-prompt", "default", "--keep-trainable", KEPT,
        "--max-steps", "4", "--checkpoint-steps", "2", "--learning-rate", "0.01", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Its ticket is trained at next to no rate, so that it stays where it started."""
    assert main(command(place, place / "run", *SLOW, "--drift-prompts", "2")) == 0
    return place / "run"


def base_weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model" / "model.safetensors")


def test_a_level_writes_what_it_kept_and_each_starts_from_the_pretrained_values(place, run):
    base = base_weights(place)
    dense, ticket = (load_file(level_folder(run, level) / "adapter.safetensors") for level in finished_levels(run))
    assert "lm_head.weight" not in dense  # it is the same parameter
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert not torch.equal(dense[name], base[name])
        torch.testing.assert_close(ticket[name], base[name], rtol=0, atol=1e-9)


def test_the_metrics_count_what_is_kept_as_trained_and_not_as_dense(run):
    dense, metrics = (json.loads((level_folder(run, level) / "metrics.json").read_text()) for level in (0, 1))
    assert metrics["trainable"] == metrics["free"] + 14 + 280 * 32 + 3 * 32
    assert metrics["density"] == metrics["free"] / metrics["weights"]
    assert dense["drift"]["kl"] > 10 * metrics["drift"]["kl"]


class KilledError(Exception):
    """As the process would end."""


def test_an_interrupted_run_ends_with_the_same_bits(place, run, tmp_path, monkeypatch):
    step, made = LevelTrainer.training_step, []

    def fails(self: LevelTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        if len(made) in (6, 14):  # in the third step of level 0; in the first of level 1
            raise KilledError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LevelTrainer, "training_step", fails)
    for _ in range(2):
        with pytest.raises(KilledError):
            main(command(place, tmp_path / "cut", *SLOW, "--no-drift"))
    assert main(command(place, tmp_path / "cut", *SLOW, "--no-drift")) == 0
    for level in (0, 1):
        name = f"level_{level}/adapter.safetensors"
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes()


def restored(run: Path) -> Experiment:
    experiment = Experiment.prepare(load(run), run)
    experiment.attach()
    experiment.restore(0)
    experiment.model.eval()
    return experiment


def test_the_base_is_shown_without_what_was_kept(place, run):
    experiment, ids = restored(run), torch.arange(4, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        chat = Chat(experiment, 4, lambda text: None)
        chat.adapter("off")
        assert not torch.equal(experiment.model(ids).logits, base(ids).logits)
        with chat._speaking():
            assert torch.equal(experiment.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("to", ["merged", "supertuning", "safetensors"])
def test_an_export_holds_what_was_kept(to, place, run, tmp_path):
    peft = pytest.importorskip("peft")
    out, ids = tmp_path / to, torch.arange(4, 20)[None]
    assert main(["export", str(run), "--to", to, "--level", "0", "--out", str(out)]) == 0
    if to == "merged":
        other = AutoModelForCausalLM.from_pretrained(out)
    else:
        other = AutoModelForCausalLM.from_pretrained(place / "model")
        if to == "safetensors":
            from rigsa import load_adapter

            load_adapter(other, out)
        else:
            other = peft.PeftModel.from_pretrained(other, str(out))
    with torch.no_grad():
        expected = restored(run).model(ids).logits
        torch.testing.assert_close(other.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    shutil.rmtree(out)


def test_rewinding_to_an_early_step_takes_what_is_kept_along(place, tmp_path):
    assert main(command(place, tmp_path / "run", *SLOW, "--rewind-step", "2", "--no-drift")) == 0
    early = load_file(tmp_path / "run" / "level_0" / "early.safetensors")
    ticket = load_file(tmp_path / "run" / "level_1" / "adapter.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(early[name], base_weights(place)[name])
    torch.testing.assert_close(ticket[name], early[name], rtol=0, atol=1e-9)


def test_what_is_kept_has_the_rate_of_level_0_in_a_ticket_too(place, tmp_path, monkeypatch):
    """A ticket's rate is that of its values, of which there are few."""
    rates = []

    def noting(*given: Any) -> Any:
        optimizer = make_optimizer(*given)
        rates.append([group["lr"] for group in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", noting)
    given = ("--density", "0.04", "--scale-rates", "--learning-rate", "1e-6", "--alpha-learning-rate", "2e-6")
    assert main(command(place, tmp_path / "run", *given, "--no-drift")) == 0
    assert rates == [pytest.approx([1e-6, 2e-6, 1e-6]), pytest.approx([5e-6, 1e-5, 1e-6], rel=1e-2)]


def test_the_option_belongs_to_every_method():
    assert all(method.reads("keep_trainable") for method in METHODS.values())
