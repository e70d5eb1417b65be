"""An adapted model under transformers.Trainer: checkpoints are adapters, and a run that was killed loses nothing."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from conftest import WORDS, make_llama
from rigsa import (
    AdapterCheckpoints,
    MaskedAdamW,
    PruningLevels,
    RigsaError,
    gated_linears,
    load_adapter,
    merge_linears,
    prune,
    random_ticket,
    replace_linears,
    restore_linears,
)
from rigsa.state import ticket_of

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


class Sentences(Dataset):
    def __init__(self, count=48):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, len(WORDS), (count, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        return {"input_ids": self.ids[place], "labels": self.ids[place]}


class DieAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def adapted(**options):
    return replace_linears(make_llama(attention_dropout=0.1), **({"alpha_init": 0.1, "density": 0.4} | options))


def make_trainer(model, folder, *callbacks, optimizers=(None, None), **options):
    settings = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.02, "save_steps": 4, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "warmup_steps": 3,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **(settings | options)),
        train_dataset=Sentences(),
        eval_dataset=Sentences(8),
        callbacks=[AdapterCheckpoints(), *callbacks],
        optimizers=optimizers,
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    one, other = (state(model) if isinstance(model, nn.Module) else model for model in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def learning_rates(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


# Checkpoints.


def test_a_checkpoint_is_the_adapter_alone(tmp_path):
    model = adapted()
    make_trainer(model, tmp_path, max_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    tensors = load_file(checkpoint / "model.safetensors")
    assert not any("embed" in name or name.endswith("proj.weight") for name in tensors)
    loaded = make_llama()
    load_adapter(loaded, checkpoint, strict=True)
    assert_equal(model, loaded)


@pytest.mark.parametrize(("masked", "shared_gate", "died_at"), [(False, True, 5), (True, False, 8), (True, True, 11)])
def test_kill_and_resume_end_in_the_same_bits(tmp_path, masked, shared_gate, died_at):
    def start(folder, *callbacks):
        model = adapted(shared_gate=shared_gate)
        random_ticket(model, 0.3, seed=1)
        optimizer = MaskedAdamW(model, lr=0.02) if masked else None
        return model, make_trainer(model, folder, *callbacks, optimizers=(optimizer, None))

    whole, trainer = start(tmp_path / "whole")
    trainer.train()
    _, trainer = start(tmp_path / "killed", DieAt(died_at))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed, trainer = start(tmp_path / "killed")
    trainer.train(resume_from_checkpoint=True)
    assert_equal(whole, resumed)


def test_a_dense_model_resumes_into_the_ticket_of_its_checkpoint(tmp_path):
    model = adapted(density=None)
    prune(model, 0.5)
    make_trainer(model, tmp_path, max_steps=8).train()
    resumed = adapted(density=None, seed=9)
    trainer = make_trainer(resumed, tmp_path, max_steps=8)
    shutil.rmtree(tmp_path / "checkpoint-8")
    trainer.train(resume_from_checkpoint=True)
    assert_equal(model, resumed)
    assert {ticket_of(layer).level for layer in gated_linears(resumed).values()} == {1}


@pytest.mark.parametrize(
    "dies_in",
    ["_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"],
)
def test_a_checkpoint_that_was_not_finished_is_set_aside(tmp_path, dies_in, monkeypatch, caplog):
    def die(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    whole = adapted()
    make_trainer(whole, tmp_path / "whole").train()
    original = getattr(Trainer, dies_in)
    monkeypatch.setattr(Trainer, dies_in, die)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(adapted(), tmp_path / "killed").train()
    monkeypatch.undo()
    (tmp_path / "killed" / "checkpoint-8").mkdir(exist_ok=True)
    resumed = adapted()
    trainer = make_trainer(resumed, tmp_path / "killed")
    assert {path.name for path in (tmp_path / "killed").iterdir()} >= {"checkpoint-4", "unfinished-checkpoint-8"}
    assert "checkpoint-8 is not whole" in caplog.text
    trainer.train(resume_from_checkpoint=True)
    assert_equal(whole, resumed)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, name, damage):
    model = adapted()
    make_trainer(model, tmp_path, max_steps=8).train()
    path = tmp_path / "checkpoint-8" / name
    os.truncate(path, path.stat().st_size // 2) if damage == "cut" else path.unlink()
    make_trainer(adapted(), tmp_path, max_steps=8)
    assert not (tmp_path / "checkpoint-8").exists()
    assert (tmp_path / "checkpoint-4").exists()


def test_the_best_model_comes_back_at_the_end(tmp_path):
    class Worse(TrainerCallback):
        """Makes every evaluation but the one at step 4 look bad."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if state.global_step == 4:
                self.kept = copy.deepcopy(
                    {name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()}
                )

    watch, model = Worse(), adapted()
    trainer = make_trainer(
        model, tmp_path, watch, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="eval_score", greater_is_better=True,
    )  # fmt: skip
    evaluate = trainer.evaluate

    def scored(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        return metrics | {"eval_score": 1.0 if trainer.state.global_step == 4 else 0.0}

    trainer.evaluate = scored
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_equal(watch.kept, model)


def test_another_adapter_in_a_checkpoint_is_refused_by_name(tmp_path):
    make_trainer(adapted(include="*mlp*"), tmp_path, max_steps=4).train()
    with pytest.raises(RigsaError, match=r"q_proj: the adapter has none there"):
        make_trainer(adapted(), tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected gated sparse layers"):
        make_trainer(make_llama(), tmp_path)


# transformers' own saving.


def test_from_pretrained_of_an_adapter_says_what_to_write(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = replace_linears(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    for load in (LlamaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"holds a rigsa adapter") as caught:
            load(tmp_path / "adapter")
    line = str(caught.value).partition("Write: ")[2].replace("FOLDER", repr(str(tmp_path / "adapter")))
    names = {}
    exec(f"import rigsa\nfrom transformers import LlamaForCausalLM\n{line}", names)
    assert_equal(model, names["model"])


def test_the_line_is_shown_where_rigsa_was_never_imported(tmp_path):
    replace_linears(make_llama()).save_pretrained(tmp_path)
    code = f"from transformers import LlamaModel; LlamaModel.from_pretrained({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "rigsa.load_adapter(model, FOLDER)" in found.stderr


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(tmp_path, copy_of):
    model = adapted()
    other = copy_of(model)
    random_ticket(other, 0.1)
    other.save_pretrained(tmp_path)
    loaded = make_llama()
    load_adapter(loaded, tmp_path)
    assert_equal(other, loaded)
    again = adapted()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_equal(other, again)


PARTS = {"decoder": lambda model: model.model, "one decoder layer": lambda model: model.model.layers[0]}


@pytest.mark.parametrize("part", PARTS)
def test_a_model_of_which_a_part_was_adapted_saves_the_adapter(tmp_path, part):
    model, untouched = make_llama(), make_llama()
    replace_linears(PARTS[part](model), density=0.4, alpha_init=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a rigsa adapter"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    load_adapter(untouched, tmp_path, strict=True)
    assert_equal(model, untouched)
    again = make_llama()
    replace_linears(PARTS[part](again), density=0.4)
    with pytest.raises(RigsaError, match=r"adapter of the model around .*write rigsa\.load_adapter\(model, folder\)"):
        again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    again.load_state_dict(model.state_dict())
    assert_equal(model, again)


def test_a_model_inside_a_module_that_was_adapted_saves_the_adapter(tmp_path):
    whole = nn.ModuleDict({"inner": make_llama(), "other": nn.Linear(4, 4)})
    replace_linears(whole, include="inner.*", alpha_init=0.5)
    whole["inner"].save_pretrained(tmp_path)
    untouched = make_llama()
    load_adapter(untouched, tmp_path, strict=True)
    assert_equal(whole["inner"], untouched)


def test_a_trainer_resumes_a_model_of_which_a_part_was_adapted(tmp_path):
    def make():
        model = make_llama()
        replace_linears(model.model, density=0.4, alpha_init=0.1)
        return model

    expected, resumed = make(), make()
    make_trainer(expected, tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(make(), tmp_path / "run", DieAt(6)).train()
    make_trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=True)
    assert_equal(expected, resumed)


@pytest.mark.parametrize("end", [restore_linears, merge_linears])
def test_a_model_without_its_adapter_saves_itself_as_ever(tmp_path, end):
    model = end(adapted())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.eval()(IDS).logits, loaded(IDS).logits)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
    model.load_state_dict(loaded.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(RigsaError, match="push_to_hub"):
        adapted().save_pretrained(tmp_path, push_to_hub=True)


# Levels.


def test_levels_inside_a_trainer_are_those_of_a_loop(tmp_path):
    """Trained, pruned and rewound, with a fresh optimiser and the whole schedule in each level."""
    levels = PruningLevels(prunings=2, keep_fraction=0.7)
    model = adapted(density=None)
    trainer = make_trainer(model, tmp_path, levels, lr_scheduler_type="linear", warmup_steps=3)
    trainer.train()
    assert len(levels.reports) == 2
    rates = learning_rates(trainer)
    assert rates[:4] == rates[4:8] == rates[8:]
    assert rates[0] == 0
    assert rates[1] == 0.02

    tickets = []
    for step in (4, 8, 12):
        tickets.append(make_llama())
        load_adapter(tickets[-1], tmp_path / f"checkpoint-{step}")
    for level in (0, 1):  # the ticket after a level is that level's, pruned
        report = prune(tickets[level], 0.7)
        assert report.layers == levels.reports[level].layers
        for one, other in zip(*(gated_linears(tickets[number]).values() for number in (level, level + 1)), strict=True):
            assert torch.equal(one.rigsa_words, other.rigsa_words)
    assert_equal(model, tickets[2])
    densities = [report.density for report in levels.reports]
    assert densities == sorted(densities, reverse=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("died_at", "rewind"), [(4, "init"), (5, "none"), (9, "random_reinit")])
def test_levels_resume_in_the_same_bits(tmp_path, died_at, rewind):
    def start(folder, *callbacks):
        model = adapted(density=None)
        levels = PruningLevels(prunings=2, keep_fraction=0.7, rewind=rewind)
        return model, make_trainer(model, folder, levels, *callbacks, save_steps=2), levels

    whole, trainer, levels = start(tmp_path / "whole")
    trainer.train()
    assert len(levels.reports) == 2
    _, trainer, _ = start(tmp_path / "killed", DieAt(died_at))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed, trainer, _ = start(tmp_path / "killed")
    trainer.train(resume_from_checkpoint=True)
    assert_equal(whole, resumed)


def test_the_checkpoint_at_the_end_of_a_level_holds_that_level(tmp_path):
    model = adapted(density=None)
    make_trainer(model, tmp_path, PruningLevels(prunings=2, keep_fraction=0.7)).train()
    levels = []
    for step in (4, 8, 12):
        loaded = make_llama()
        load_adapter(loaded, tmp_path / f"checkpoint-{step}")
        levels.append({ticket_of(layer).level for layer in gated_linears(loaded).values()})
    assert levels == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("options", "levels", "match"),
    [
        ({"max_steps": 10}, {"prunings": 2}, "max_steps: expected a multiple of 3 levels, got 10"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, {"prunings": 2}, "lr_scheduler"),
        ({}, {"prunings": 0}, "prunings: expected 1 or more"),
        ({}, {"prunings": 1, "keep_fraction": 2}, "keep_fraction"),
    ],
)
def test_levels_that_cannot_be_are_refused(tmp_path, options, levels, match):
    model = adapted()
    before = state(model)
    with pytest.raises(ValueError, match=match):
        make_trainer(model, tmp_path, PruningLevels(**levels), **options).train()
    assert_equal(before, model)


def test_a_four_bit_base_trains_under_a_trainer(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def start():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
        return replace_linears(base, density=0.3, alpha_init=0.1)

    model = start()
    assert all(layer.is_nf4 for layer in gated_linears(model).values())
    make_trainer(model, tmp_path / "run", max_steps=8).train()
    resumed = start()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    make_trainer(resumed, tmp_path / "run", max_steps=8).train(resume_from_checkpoint=True)
    for one, other in zip(gated_linears(model).values(), gated_linears(resumed).values(), strict=True):
        assert torch.equal(one.rigsa_values, other.rigsa_values)
        assert torch.equal(one.rigsa_alpha, other.rigsa_alpha)
    assert Path(tmp_path / "run" / "checkpoint-8" / "rigsa_config.json").exists()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_trainers_own_optimiser_may_not_decay_gates(tmp_path, decay):
    """Its error has the line to write, and nothing is trained before."""
    trainer = make_trainer(adapted(), tmp_path, weight_decay=decay, max_steps=1)
    before = state(trainer.model)
    if decay:
        with pytest.raises(ValueError, match=r"weight_decay: 0\.1 of group 0 .*rigsa\.parameter_groups\(model\)"):
            trainer.train()
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    else:
        trainer.train()
