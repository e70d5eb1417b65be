"""unsloth's LoRA, where it is installed: the same steps through its own model class."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from benchmarks.gpu_proof.from_tests import load
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.steps import race
from benchmarks.providers import LORA, Trainee, fused_adamw, model_linears
from benchmarks.race import UnavailableError

NAME = "unsloth LoRA"


def run(setting: Setting, journal: Journal) -> None:
    try:
        import unsloth  # noqa: F401  # changes transformers
    except ImportError as error:
        journal.row(provider=NAME, skipped="not installed")
        raise UnavailableError(f"unsloth: {error}; pip install unsloth") from error
    for size in ("135M",) if setting.dry else ("135M", "1.7B"):
        race(setting, journal, size, {NAME: _tune})


def _tune(model: nn.Module) -> Trainee:
    """The same weights, by way of a folder: unsloth adapts only what it has loaded itself."""
    from unsloth import FastLanguageModel

    targets = sorted({name.rpartition(".")[2] for name in model_linears(model)})
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)  # type: ignore[operator]
        load("conftest").make_tokenizer().save_pretrained(Path(name))
        loaded, _ = FastLanguageModel.from_pretrained(name, dtype=model.dtype, load_in_4bit=False)
    adapted = FastLanguageModel.get_peft_model(
        loaded, target_modules=targets, lora_dropout=0, bias="none", use_gradient_checkpointing=False, **LORA
    )
    return Trainee(adapted, fused_adamw([parameter for parameter in adapted.parameters() if parameter.requires_grad]))
