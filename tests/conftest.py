"""What many tests need: a language model of 70 kB with a ChatML tokenizer, and where real data lies."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub by mistake fails at once; read at import


import hypothesis
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "\n",
    " ",
    *"0123456789",
    "system",
    "user",
    "assistant",
    "The",
    "digit",
    "is",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per digit, word, space and newline."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|\w+\|>|[A-Za-z]+|\d|\n| "), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def make_llama(**options: object) -> LlamaForCausalLM:
    """Two layers of width 32, untied head unless asked otherwise, always the same weights."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | options))).eval()


@pytest.fixture(scope="session")
def small_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --model takes: a saved model and tokenizer."""
    folder = tmp_path_factory.mktemp("small_model")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside a development checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data sets are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def talking_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model whose replies differ, as its weights are large."""
    from rigsa.run import main

    folder = tmp_path_factory.mktemp("chat")
    make_llama(initializer_range=0.4).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        assert main([
            "imp", "--preset", "smoke", "--model", str(folder / "model"), "--dtype", "float32", "--device", "cpu",
            "--test-examples", "20", "--train-examples", "40", "--alpha-learning-rate", "0.5", "--no-drift",
            "--out", str(folder / "run"),
        ]) == 0  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def talking_experiment(talking_run: Path) -> Any:
    from rigsa import gated_linears
    from rigsa.experiments.config_file import load
    from rigsa.experiments.experiment import Experiment

    experiment = Experiment.prepare(load(talking_run), talking_run)
    experiment.attach()
    experiment.restore(1)
    with torch.no_grad():
        for layer in gated_linears(experiment.model).values():
            layer.rigsa_alpha.fill_(0.5)
    experiment.model.eval()
    return experiment


@pytest.fixture(scope="module", autouse=True)
def collections_pass_over_what_is_there() -> Iterator[None]:
    """accelerate collects garbage before each level, which takes a second or more where much has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def figures_are_blank(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run draws its report at its end, which takes longer than to train a tiny model. `report/` tests the figures.
    A module whose `DRAWS_FIGURES` is true has them."""
    folder = request.path.parent
    with pytest.MonkeyPatch.context() as patch:
        wanted = folder.name == "report" or getattr(request.module, "DRAWS_FIGURES", False)
        if "experiments" in folder.parts and not wanted:
            draw_nothing(patch)
        yield


DRAWN: dict[str, Any] = {}
"""What `draw_nothing` takes away."""


@pytest.fixture
def figures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that looks at the figures of a run."""
    from rigsa.experiments.report.figures import Drawing

    for name, function in DRAWN.items():
        monkeypatch.setattr(Drawing, name, function)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    from rigsa.experiments.report.figures import Drawing

    for name in ("svg", "save_png"):
        DRAWN.setdefault(name, getattr(Drawing, name))
    patch.setattr(Drawing, "svg", lambda self: "<svg></svg>")
    patch.setattr(Drawing, "save_png", lambda self, path: path.write_bytes(b"\x89PNG\r\n\x1a\n"))


@pytest.fixture(scope="module", autouse=True)
def plans_are_made_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run that is begun again has the same memory plan. `memory/` makes every plan anew."""
    folder = request.path.parent
    with pytest.MonkeyPatch.context() as patch:
        if "experiments" in folder.parts and folder.name != "memory":
            from rigsa.experiments.memory import plan

            make, made = plan.plan_levels, dict[Any, Any]()

            def plan_levels(target: Any, densities: Any) -> Any:
                key = (target.shape.to_json_string(), target.config, target.device, target.size, *densities.items())
                if key not in made:
                    made[key] = make(target, densities)
                return made[key]

            patch.setattr(plan, "plan_levels", plan_levels)
        yield
