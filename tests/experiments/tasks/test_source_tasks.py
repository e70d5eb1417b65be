"""Source tasks through lm-eval: the scores are those of lm-eval by hand, and nothing else in the process changes."""

import dataclasses
import gzip
import importlib.util
import json
import os
import random
from pathlib import Path

import lm_eval
import lm_eval.tasks
import numpy as np
import peft
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import make_llama, make_tokenizer
from rigsa.errors import RigsaError
from rigsa.experiments.model import load_model
from rigsa.experiments.presets import quickstart
from rigsa.experiments.tasks import source_tasks
from rigsa.experiments.tasks.evaluation import evaluate, target_logits
from rigsa.experiments.tasks.source_tasks import TASK_FOLDER, TASKS, check, measure
from rigsa.experiments.tasks.textual_mnist import PromptDataset, Prompts, load_splits
from rigsa_kernels import gated_linears, replace_linears

NAMES = list(TASKS)


def piqa_row(number):
    return {"goal": f"The digit {number}", "sol1": "is 7 7", "sol2": f"is {number}", "label": number % 2}


def hellaswag_row(number):
    return {
        "ind": number, "activity_label": "The", "ctx_a": "user is", "ctx_b": "digit", "ctx": "",
        "endings": ["1", "2 2", "is 3", f"is {number}"], "label": str(number % 4),
    }  # fmt: skip


def gsm8k_row(number):
    return {"question": f"is {number} The digit", "answer": f"The digit is {number}\n#### {number}"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The layout of --data-dir, in words that the small tokenizer knows."""
    folder = tmp_path_factory.mktemp("data")
    for path, make in {
        "piqa/validation.jsonl": piqa_row, "hellaswag/validation.jsonl.gz": hellaswag_row,
        "gsm8k/test.jsonl": gsm8k_row, "gsm8k/train.jsonl": gsm8k_row,
    }.items():  # fmt: skip
        write_rows(folder / path, [make(number) for number in range(12)])
    return folder


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def run(model, tokenizer, folder, names=NAMES, system_prompt="default", limit=8):
    return measure(
        model, tokenizer, names, data_dir=str(folder), limit=limit, batch_size=4, system_prompt=system_prompt, label="x"
    )


@pytest.fixture
def samples(monkeypatch):
    """Fills with lm-eval's own record of what `measure` asked and the model replied, by task."""
    kept, ours = {}, lm_eval.evaluate

    def recording(*args, **options):
        results = ours(*args, **options | {"log_samples": True})
        kept.update(results["samples"])
        return results

    monkeypatch.setattr(lm_eval, "evaluate", recording)
    return kept


def by_hand(model, tokenizer, name, folder, tmp_path, monkeypatch, limit=8, system_instruction=None):
    """What a user of lm-eval does to have local data: a YAML file that includes the task's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    original = Path(lm_eval.tasks.__file__).parent / name / f"{name}.yaml"
    files = {split: str(next(Path(folder).glob(f"{path}*"))) for split, path in TASKS[name].files.items()}
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    changes |= {} if "train" in files else {"training_split": None}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(json.dumps({"include": str(original), "task": name, **changes}))
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[name], limit=limit, apply_chat_template=True, system_instruction=system_instruction,
        task_manager=TaskManager(include_path=tmp_path / "tasks", include_defaults=False),
    )  # fmt: skip


def assert_same(scores, samples, name, expected):
    results = expected["results"][name]
    for key in TASKS[name].metrics:
        metric, kind = key.split(",")
        found = scores[name] if key == TASKS[name].metrics[0] else scores[name]["others"][key.removesuffix(",none")]
        assert found["score"] == 100 * results[key]
        assert found["stderr"] == 100 * results[f"{metric}_stderr,{kind}"]
    for ours, theirs in zip(samples[name], expected["samples"][name], strict=True):
        assert ours["arguments"] == theirs["arguments"]
        assert ours["resps"] == theirs["resps"]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_lm_eval_by_hand(name, data, samples, tmp_path, monkeypatch):
    model, tokenizer = make_llama(max_position_embeddings=2048), make_tokenizer()
    scores = run(model, tokenizer, data, [name])
    assert_same(scores, samples, name, by_hand(model, tokenizer, name, data, tmp_path, monkeypatch))
    assert scores[name]["documents"] == 8
    assert scores[name]["shots"] == samples[name][0]["arguments"][0][0].count("<|im_end|>\n<|im_start|>assistant") - 1


def test_system_prompt_is_lm_evals_system_instruction(data, samples, tmp_path, monkeypatch):
    model, tokenizer = make_llama(), make_tokenizer()
    scores = run(model, tokenizer, data, ["piqa"], "The user")
    expected = by_hand(model, tokenizer, "piqa", data, tmp_path, monkeypatch, system_instruction="The user")
    assert_same(scores, samples, "piqa", expected)


def test_an_empty_system_prompt_is_a_turn_of_its_own(data, samples):
    run(make_llama(), make_tokenizer(), data, ["piqa"], "")
    assert samples["piqa"][0]["arguments"][0][0].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nQuest")


def test_nothing_else_changes(data, tmp_path, monkeypatch, capfd):
    model, tokenizer = make_llama(), make_tokenizer()
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    parameters = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    configs = model.config.to_dict(), model.generation_config.to_dict()
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    run(model, tokenizer, data)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(value) for name, value in model.named_parameters()} == {n: i for n, (i, _) in parameters.items()}
    assert all(torch.equal(value, parameters[name][1]) for name, value in model.named_parameters())
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    assert (random.getstate(), str(np.random.get_state())) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert tokenizer.pad_token is None
    assert list(tmp_path.iterdir()) == []
    shown = capfd.readouterr()
    assert shown.out == ""
    assert {part.split(":")[1].strip() for part in shown.err.split("\r") if part.strip()} == set(NAMES)


def test_random_states_are_given_back_whatever_lm_eval_does(data, monkeypatch):
    """It seeds them all in some of its ways in; and a failure is no excuse."""

    def seeding(*args, **options):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        raise RuntimeError("no results")

    monkeypatch.setattr(lm_eval, "evaluate", seeding)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no results"):
        run(make_llama(), make_tokenizer(), data, ["piqa"])
    assert (random.getstate(), str(np.random.get_state())) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("alpha", [0.0, 1e-12])
def test_a_closed_gate_scores_as_the_base_and_an_open_one_does_not(alpha, data, samples):
    tokenizer = make_tokenizer()
    model = make_llama()
    base, before = run(model, tokenizer, data), dict(samples)
    replace_linears(model, alpha_init=alpha)
    assert run(model, tokenizer, data) == base
    assert [s["filtered_resps"] for s in samples["gsm8k"]] == [s["filtered_resps"] for s in before["gsm8k"]]
    with torch.no_grad():
        for layer in gated_linears(model).values():
            layer.rigsa_alpha.fill_(1.0)
    run(model, tokenizer, data, ["piqa"])
    assert [s["resps"] for s in samples["piqa"]] != [s["resps"] for s in before["piqa"]]


def test_an_adapter_of_peft_is_measured(data, samples):
    model, tokenizer = make_llama(), make_tokenizer()
    base = run(model, tokenizer, data, ["piqa"])
    before = [s["resps"] for s in samples["piqa"]]
    adapter = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    peft.inject_adapter_in_model(adapter, model)
    model.train()
    assert run(model, tokenizer, data, ["piqa"]) == base
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    run(model, tokenizer, data, ["piqa"])
    first = [s["resps"] for s in samples["piqa"]]
    run(model, tokenizer, data, ["piqa"])
    assert first == [s["resps"] for s in samples["piqa"]] != before


def test_a_changed_file_is_read_again(data, tmp_path, samples):
    """Even with the old size and time, which is all that a cache would look at."""
    path = tmp_path / "piqa" / "validation.jsonl"
    for goal in ("The digit", "The digi7"):
        write_rows(path, [{"goal": goal, "sol1": "1", "sol2": "2", "label": 0}] * 2)
        os.utime(path, (1, 1))
        run(make_llama(), make_tokenizer(), tmp_path, ["piqa"])
        assert f"Question: {goal}\n" in samples["piqa"][0]["arguments"][0][0]


def asks(folder, tasks="piqa", **changes):
    return dataclasses.replace(quickstart(), source_tasks=tasks, data_dir=str(folder), **changes)


def test_good_data_pass(data):
    check(asks(data, ",".join(NAMES)))
    check(asks("nowhere", ""))


def test_real_data_pass(shared_data):
    check(asks(shared_data, ",".join(NAMES)))


def test_without_a_folder_the_data_are_the_hubs(data, monkeypatch):
    asked = []

    def hub(path, name=None, **_):
        asked.append((path, name))
        splits = source_tasks._read_splits(path.partition("/")[2], data)
        return {"train": next(iter(splits.values()))} | splits

    model, tokenizer = make_llama(), make_tokenizer()
    local = run(model, tokenizer, data)
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert run(model, tokenizer, "") == local
    assert asked == [("baber/piqa", None), ("Rowan/hellaswag", None), ("openai/gsm8k", "main")]


def test_bad_settings_are_named(data, monkeypatch, tmp_path):
    with pytest.raises(RigsaError, match=r"--data-dir: files are read for piqa, hellaswag, gsm8k only; .* for arc"):
        check(asks(data, "piqa,arc"))
    with pytest.raises(RigsaError, match=r"--limit: expected 0 \(all\) or at least 2"):
        check(asks(data, limit=1))
    with pytest.raises(RigsaError, match=r"--data-dir .*nowhere: not a folder; '' takes"):
        check(asks(tmp_path / "nowhere"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(RigsaError, match=r"--source-tasks gsm8k: .*neither cached.*gsm8k/test.jsonl and gsm8k/train"):
        check(asks("", "gsm8k"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RigsaError, match="--source-tasks: needs lm-eval; pip install 'lm-eval"):
        check(asks(data))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"piqa needs piqa/validation.jsonl, with or without .gz"),
        ([], r"validation.jsonl has 0 rows; expected at least 2"),
        ([piqa_row(0), {"goal": ""}], r"row 2: no column sol1; expected goal, sol1, sol2, label"),
        ([["goal"]], r"row 1: no column goal"),
        ([piqa_row(0) | {"sol2": 3}], r"row 1, column sol2: expected text, got 3"),
        ([piqa_row(0) | {"label": -1}], r"row 1, column label: expected 0 or 1, got -1"),
        ([piqa_row(0) | {"label": True}], r"row 1, column label: expected 0 or 1, got True"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    if rows is not None:
        write_rows(tmp_path / "piqa" / "validation.jsonl", rows)
    with pytest.raises(RigsaError, match=rf"--data-dir.*{message}"):
        check(asks(tmp_path))


def test_other_tasks_rows_are_named(tmp_path):
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", [hellaswag_row(0) | {"endings": ["1"]}])
    with pytest.raises(RigsaError, match=r"row 1, column endings: expected a list of 4 texts, got \['1'\]"):
        check(asks(tmp_path, "hellaswag"))
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", [hellaswag_row(0) | {"label": ""}])
    with pytest.raises(RigsaError, match=r"row 1, column label: expected text, '0' to '3', got ''"):
        check(asks(tmp_path, "hellaswag"))
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [gsm8k_row(0)] * 2)
    write_rows(tmp_path / "gsm8k" / "train.jsonl", [gsm8k_row(0)] * 4)
    with pytest.raises(RigsaError, match=r"train.jsonl has 4 rows; expected at least 5"):
        check(asks(tmp_path, "gsm8k"))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "piqa" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text("{\n")
    with pytest.raises(RigsaError, match=r"validation.jsonl, row 1: not JSON"):
        check(asks(tmp_path))
    path.write_bytes(b"\xff\n")
    with pytest.raises(RigsaError, match=r"cannot read .*validation.jsonl"):
        check(asks(tmp_path))
    path.unlink()
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(json.dumps(piqa_row(0)).encode())[:-9])
    with pytest.raises(RigsaError, match=r"cannot read .*validation.jsonl.gz"):
        check(asks(tmp_path))


@pytest.fixture(scope="module")
def smollm2():
    return load_model(quickstart(), torch.device("cpu"))


@pytest.mark.model
@pytest.mark.parametrize("name", ["piqa", "hellaswag"])  # GSM8k's prompts would take a minute
def test_smollm2_agrees_with_lm_eval_by_hand(name, smollm2, shared_data, samples, tmp_path, monkeypatch):
    (path,) = shared_data.glob(f"{name}/validation.jsonl*")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        write_rows(tmp_path / name / path.name, [json.loads(next(lines)) for _ in range(3)])
    scores = run(*smollm2, tmp_path, [name])
    assert_same(scores, samples, name, by_hand(*smollm2, name, tmp_path, tmp_path, monkeypatch))


def textual_mnist(model, tokenizer, task, limit, template=None, **metadata):
    chat = {"chat_template": template} if template else None
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, chat_template_args=chat),
        tasks=[task], limit=limit, apply_chat_template=True,
        task_manager=TaskManager(include_path=TASK_FOLDER, include_defaults=False, metadata=metadata),
    )  # fmt: skip
    return 100 * results["results"][task]["exact_match,none"], results["samples"][task]


def ours(model, tokenizer, shots, limit, seed=0, system_prompt="default"):
    """The accuracy that a run reports, and its dataset."""
    splits = load_splits("digits")
    examples = splits.train.take(np.random.default_rng(seed).permutation(len(splits.train))[:shots]) if shots else None
    dataset = PromptDataset(splits.test.first(limit), Prompts(tokenizer, system_prompt), examples)
    return evaluate(model, dataset, 8, "x")["accuracy"], dataset


def assert_same_prompts(tokenizer, records, dataset):
    for index, record in enumerate(records):
        prompt = tokenizer(record["arguments"][0][0], add_special_tokens=False)["input_ids"]
        assert prompt == dataset[index]["input_ids"]
        assert tokenizer.convert_tokens_to_ids(record["target"]) == dataset[index]["targets"][0]


@pytest.mark.parametrize(
    ("task", "shots", "seed"), [("textual_mnist", 0, 0), ("textual_mnist_5shot", 5, 0), ("textual_mnist_5shot", 5, 3)]
)
def test_textual_mnist_in_lm_eval(task, shots, seed):
    model, tokenizer = make_llama(max_position_embeddings=2048), make_tokenizer()
    digits = Prompts(tokenizer).digit_ids
    others = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, digits, False)
    model.lm_head.weight.data[others] = 0  # it has learnt nothing, but that digits are asked for
    accuracy, records = textual_mnist(model, tokenizer, task, 40, seed=seed)
    expected, dataset = ours(model, tokenizer, shots, 40, seed)
    assert accuracy == expected > 0
    assert_same_prompts(tokenizer, records[:5], dataset)
    logits = target_logits(model, dataset.collate([dataset[index] for index in range(40)]))[:, 0]
    assert [record["resps"][0][0] for record in records] == tokenizer.convert_ids_to_tokens(logits.argmax(-1))


def test_the_tasks_advice_on_an_empty_system_prompt():
    """The template in its comment."""
    (line,) = [line for line in (TASK_FOLDER / "textual_mnist.yaml").read_text().splitlines() if '"<|im' in line]
    template = json.loads(line.removeprefix("#"))
    model, tokenizer = make_llama(), make_tokenizer()
    _, records = textual_mnist(model, tokenizer, "textual_mnist_5shot", 2, template)
    assert records[0]["arguments"][0][0].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n0")
    assert_same_prompts(tokenizer, records, ours(model, tokenizer, 5, 2, system_prompt="")[1])


def test_textual_mnist_of_a_folder(shared_data):
    _, records = textual_mnist(make_llama(), make_tokenizer(), "textual_mnist", 2, data=str(shared_data / "mnist"))
    test = load_splits(str(shared_data / "mnist")).test
    assert [record["target"] for record in records] == [str(label) for label in test.labels[:2]]


@pytest.mark.model
@pytest.mark.parametrize(("task", "shots", "limit"), [("textual_mnist", 0, 8), ("textual_mnist_5shot", 5, 2)])
def test_textual_mnist_of_smollm2(task, shots, limit, smollm2):
    accuracy, records = textual_mnist(*smollm2, task, limit)
    expected, dataset = ours(*smollm2, shots, limit)
    assert accuracy == expected
    assert_same_prompts(smollm2[1], records, dataset)


def test_every_prompt_of_a_run_begins_as_its_chat_template_says(tmp_path):
    """With a tokenizer that puts a token before all that it encodes, and a template that has none."""
    words = ["<unk>", "<s>", "</s>", "\n", " ", *"0123456789", "user", "assistant", "The", "digit", "is"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|\d|\n| "), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}assistant "
    model, seen = make_llama(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "is", "sol1": "The", "sol2": "digit", "label": label} for label in (0, 1)]
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source_tasks.measure(
        model, tokenizer, ["piqa"], data_dir=str(tmp_path), limit=2, batch_size=1, system_prompt="default", label=""
    )
    prompts = Prompts(tokenizer)
    begins = [seen[0][0, :2].tolist(), prompts.image_ids(np.zeros((2, 2), int))[:2]]
    begins.append(prompts.ids([{"role": "user", "content": "is"}])[:2])
    assert begins == [[words.index("user"), words.index(" ")]] * 3
