"""RIGSA under PEFT in the trainers of transformers and TRL: as with LoRA, whole checkpoints, levels in one run."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

pytest.importorskip("peft", minversion="0.21")

from peft import PeftModel, get_peft_model

from conftest import WORDS, make_llama, make_tokenizer
from rigsa import AdapterCheckpoints, MaskedAdamW, PruningLevels, RigsaConfig, gated_linears, prune
from rigsa.state import ticket_of

IDS = torch.arange(16 * 8).view(16, 8) % len(WORDS)
SENTENCES = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])


def config(**options):
    return RigsaConfig(**{"density": 0.3, "alpha_init": 0.3} | options)


def arguments(folder, **options):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(str(folder), **settings | {"save_steps": 2, "disable_tqdm": True} | options)


def trainer_of(folder, density=0.3, callbacks=(), **options):
    model = get_peft_model(make_llama(), config(density=density))
    return Trainer(
        model, arguments(folder, **options), train_dataset=SENTENCES, eval_dataset=SENTENCES,
        callbacks=[AdapterCheckpoints(), *callbacks],
        optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, "lr": 1e-2}),
    )  # fmt: skip


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".rigsa_" in name}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    whole = trainer_of(tmp_path)
    whole.train()
    again = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(adapter_of(whole.model), adapter_of(again.model))
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "checkpoint-4")
    assert equal(adapter_of(whole.model), adapter_of(loaded))


def test_a_checkpoint_that_was_cut_is_set_aside(tmp_path):
    trainer_of(tmp_path).train()
    path = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    again = trainer_of(tmp_path)
    assert (tmp_path / "unfinished-checkpoint-4").exists()
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4").exists()


def test_the_best_checkpoint_is_loaded(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}
    trainer = trainer_of(tmp_path, **best)
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", True  # the worst, which differs
    trainer.train()
    chosen = PeftModel.from_pretrained(make_llama(), trainer.state.best_model_checkpoint)
    assert equal(adapter_of(trainer.model), adapter_of(chosen))
    last = PeftModel.from_pretrained(make_llama(), tmp_path / "checkpoint-4")
    assert not equal(adapter_of(trainer.model), adapter_of(last))


def test_levels_in_one_run_and_resumed_in_the_midst(tmp_path):
    options = {"density": None, "max_steps": 6, "save_steps": 3}
    whole = trainer_of(tmp_path, callbacks=[PruningLevels(prunings=2, keep_fraction=0.5)], **options)
    whole.train()
    assert {ticket_of(layer).level for layer in gated_linears(whole.model).values()} == {2}
    assert all(layer.pattern.density < 0.3 for layer in gated_linears(whole.model).values())
    saved = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())["layers"]
    layers = dict(zip(saved, sorted(layer.pattern.nnz for layer in gated_linears(whole.model).values()), strict=True))
    assert sorted(entry["entries"] for entry in saved.values()) == list(layers.values())
    again = trainer_of(tmp_path, callbacks=[PruningLevels(prunings=2, keep_fraction=0.5)], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(adapter_of(whole.model), adapter_of(again.model))


try:
    import trl
except ImportError:
    trl = None
needs_trl = pytest.mark.skipif(trl is None, reason="needs pip install trl")
CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"The digit is {n}"},
                {"role": "assistant", "content": str(n)},
            ]
        }
        for n in range(8)
    ]
)
PREFERENCES = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"The digit is {n}"}],
            "chosen": [{"role": "assistant", "content": str(n)}],
            "rejected": [{"role": "assistant", "content": str(9 - n)}],
        }
        for n in range(8)
    ]
)
SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "report_to": [],
    "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "disable_tqdm": True,
}  # fmt: skip


def tokenizer():
    made = make_tokenizer()
    made.pad_token = "<unk>"
    return made


def sft(folder, model=None, **options):
    given = {"peft_config": config()} if model is None else {}
    return trl.SFTTrainer(
        make_llama() if model is None else model, args=trl.SFTConfig(str(folder), **SETTINGS | options),
        train_dataset=CHATS, processing_class=tokenizer(), **given,
    )  # fmt: skip


@needs_trl
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_saves_and_goes_on(tmp_path, checkpointing):
    whole = sft(tmp_path, gradient_checkpointing=checkpointing)
    before = adapter_of(whole.model)
    whole.train()
    assert not equal(before, adapter_of(whole.model))
    assert {name for name, p in whole.model.named_parameters() if p.requires_grad} == before.keys()
    again = sft(tmp_path, gradient_checkpointing=checkpointing)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(adapter_of(whole.model), adapter_of(again.model))
    whole.save_model(str(tmp_path / "final"))
    assert equal(adapter_of(whole.model), adapter_of(PeftModel.from_pretrained(make_llama(), tmp_path / "final")))


@needs_trl
def test_sft_takes_our_optimiser(tmp_path):
    model = get_peft_model(make_llama(), config(density=None))
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(str(tmp_path), **SETTINGS), train_dataset=CHATS, processing_class=tokenizer(),
        callbacks=[PruningLevels(prunings=1, keep_fraction=0.5)],
        optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, "lr": 1e-2}),
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, MaskedAdamW)
    assert all(0 < layer.pattern.density < 0.6 for layer in gated_linears(trainer.model).values())


def dpo(folder, model, **given):
    args = trl.DPOConfig(str(folder), **SETTINGS | {"save_strategy": "no"})
    return trl.DPOTrainer(model, args=args, train_dataset=PREFERENCES, processing_class=tokenizer(), **given)


@needs_trl
@pytest.mark.parametrize(("alpha_init", "most"), [(0.0, 0.0), (1e-6, 1e-5)])
@pytest.mark.parametrize("density", [None, 0.3])
def test_dpo_takes_the_model_without_its_adapter_for_the_reference(tmp_path, alpha_init, most, density):
    """The gate is next to closed in the first step, so the rewards are next to 0; with a closed gate they are 0."""
    trainer = dpo(tmp_path, make_llama(), peft_config=config(density=density, alpha_init=alpha_init))
    trainer.train()
    rewards = [(log["rewards/chosen"], log["rewards/rejected"]) for log in trainer.state.log_history if "loss" in log]
    assert max(map(abs, rewards[0])) <= most
    assert max(map(abs, rewards[-1])) > 1e-5


@needs_trl
def test_dpo_goes_on_with_an_adapter_that_is_its_own_reference(tmp_path):
    """TRL copies the adapter's parameters into a second one, which has to have the same entries."""
    model = get_peft_model(make_llama(), config(density=None))
    prune(model, 0.4, "large_final", rewind="none")
    trainer = dpo(tmp_path, model)
    assert set(model.peft_config) == {"default", "ref"}
    trainer.train()
    rewards = [log["rewards/chosen"] for log in trainer.state.log_history if "loss" in log]
    assert rewards[0] == 0
    assert rewards[-1] != 0
