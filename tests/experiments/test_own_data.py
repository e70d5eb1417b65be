"""Whole runs on texts of the user's own: every format, every method, three families, and that runs repeat."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from texts import FAMILIES, byte_tokenizer, rows, save_family, write_jsonl
from transformers import AutoModelForCausalLM

from rigsa.experiments import experiment, sweep
from rigsa.experiments.chat import run_chat
from rigsa.experiments.config_file import load
from rigsa.experiments.export import formats_of
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.run_folder import finished_levels, level_folder
from rigsa.experiments.train import LevelTrainer
from rigsa.files import first_damage
from rigsa.run import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
NOT_SHARED_BY_EQUAL_RUNS = {"resources.json", "report.md", "report.html", "report.csv"}
FORMATS = ("prompt-completion", "alpaca", "text", "messages", "sharegpt")
SMALL = {"density": "0.1", "mask-examples": "8", "rank": "2", "reselect-steps": "2", "ranking": "layer"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_family(name, folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {name: write_jsonl(folder / f"{name}.jsonl", rows(name)) for name in FORMATS}


def command(method: str, model: Path, data: Path, out: Path, *options: str) -> list[str]:
    known = METHODS[method].options
    own = [f"--{name}={value}" for name, value in SMALL.items() if name.replace("-", "_") in known]
    return [
        method, "--preset", "smoke", "--model", str(model), "--data", str(data), "--dtype", "float32", "--device",
        "cpu", "--out", str(out), "--system-prompt", "default", "--answer-tokens", "8", "--no-drift", *own, *options,
    ]  # fmt: skip


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((level_folder(run, finished_levels(run)[-1]) / "metrics.json").read_text())


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_SHARED_BY_EQUAL_RUNS
    }


def check_run(run: Path, method: str) -> dict[str, Any]:
    """It is whole, measured what it should, and has a report. Returns the last level's metrics."""
    for level in finished_levels(run):
        assert first_damage(level_folder(run, level)) is None
    found = metrics_of(run)["test"]["held-out"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] > found["examples"] > 0
    text = (run / "report.md").read_text()
    assert "token accuracy (%)" in text
    assert "perplexity" in text
    assert f"| {method}" in text
    assert main(["report", str(run)]) == 0
    return metrics_of(run)


class KilledError(Exception):
    """As the process would end."""


def train(asked: list[str], *deaths: int) -> None:
    """Run a command, which dies in these passes, counted from the first one of all, and is given again each time."""
    step, made = LevelTrainer.training_step, []

    def fails(self: LevelTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        if len(made) in deaths:
            raise KilledError
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LevelTrainer, "training_step", fails)
        for _ in deaths:
            with pytest.raises(KilledError):
                main(asked)
        assert main(asked) == 0


KINDS = [
    (method, list(FAMILIES)[number % len(FAMILIES)], FORMATS[number % len(FORMATS)])
    for number, method in enumerate(METHODS)
]
"""Each method, on families and formats in turn."""


def test_each_family_meets_each_format():
    assert len({(name, format_name) for _, name, format_name in KINDS}) == len(FAMILIES) * len(FORMATS)


@pytest.mark.parametrize(("method", "name", "format_name"), KINDS)
def test_every_method_trains_resumes_reports_and_exports(method, name, format_name, models, files, tmp_path, capsys):
    """On each family and format. It dies once after a checkpoint, and ends with the bits of a run that does not."""
    pytest.importorskip("peft")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    score = "none" if format_name == "text" else "number"
    options = ["--score", score, "--max-steps", "3", "--checkpoint-steps", "2"]
    if method == "smt":
        options += ["--tile", "4"]  # these layers are smaller than a few of its own tiles
    if METHODS[method].matches and not METHODS[method].reads("density"):
        ticket = tmp_path / "ticket"
        assert main(command(METHODS[method].matches, models[name], files[format_name], ticket)) == 0
        options += ["--match", str(ticket)]
    asked = [command(method, models[name], files[format_name], tmp_path / run, *options) for run in ("whole", "run")]
    train(asked[0])
    train(asked[1], 6)  # in the second half of the third step
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert f"({format_name}): " in capsys.readouterr().out
    out = tmp_path / "run"
    assert load(out).format == format_name
    found = check_run(out, method)
    if score == "number":
        assert found["test"]["number"].keys() == {"accuracy", "stderr", "examples"}
        assert "right number (%)" in (out / "report.md").read_text()
    check_exports(out, method, files[format_name])


def check_exports(run: Path, method: str, data: Path) -> None:
    """Every format of the method is written, and the merged model loads. A ticket may be too dense for SHiRA's rank."""
    for to in formats_of(load(run)):
        is_dense = to == "shira" and METHODS[method].gated
        assert main(["export", str(run), "--to", to]) in ((0, 1) if is_dense else (0,))
        card = run / "export" / to / "README.md"
        if card.exists():
            text = card.read_text()
            assert re.search(rf"Trained on: {data.name} \(\d+ examples\), rigsa {method}, level \d", text)
            assert str(data.parent) not in text  # where the file lay is nobody's business
            assert "token accuracy" in text
        if to == "merged":
            AutoModelForCausalLM.from_pretrained(card.parent)


def test_an_interrupted_run_ends_with_the_same_bits(models, files, tmp_path):
    asked = ("--max-steps", "6", "--checkpoint-steps", "2", "--group-by-length", "--packing", "--drift")
    asked += ("--drift-prompts", "2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(command("imp", models["qwen3"], files["messages"], whole, *asked))
    train(command("imp", models["qwen3"], files["messages"], cut, *asked), 6, 20)  # in level 0, and in level 1
    assert contents(cut) == contents(whole)
    assert metrics_of(cut)["drift"]["tokens"] > 0


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (run / "level_0" / "log.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("covers", ["answer", "all"])
def test_a_run_does_not_depend_on_the_micro_batch_or_on_packing(covers, models, files, tmp_path):
    """The texts are of unequal length, and so are their answers."""
    found, trained = [], []
    for number, options in enumerate((["4"], ["2"], ["1"], ["4", "--packing"])):
        out = tmp_path / f"run-{number}"
        asked = ["--loss", covers, "--values-dtype", "float32", "--micro-batch-size", *options]
        assert main(command("full", models["llama"], files["prompt-completion"], out, *asked)) == 0
        found.append(losses(out))
        trained.append(load_file(out / "level_0" / "adapter.safetensors"))
    for other, adapter in zip(found[1:], trained[1:], strict=True):
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=0)
        for name, values in trained[0].items():
            assert (adapter[name] - values).norm() <= 1e-2 * values.norm(), name


def test_two_processes_take_the_mean_over_all_tokens_of_a_step(models, files, tmp_path):
    """Each of them has other numbers of tokens in its half of the step."""
    asked = ("--micro-batch-size", "2", "--values-dtype", "float32", "--loss", "all")
    assert main(command("full", models["llama"], files["messages"], tmp_path / "one", *asked)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "rigsa.run"]
    subprocess.run(
        [*launch, *command("full", models["llama"], files["messages"], tmp_path / "two", *asked)],
        check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    name = "level_0/adapter.safetensors"
    one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
    for key, values in one.items():
        assert (two[key] - values).norm() <= 1e-3 * values.norm(), key


def test_layers_are_included_and_excluded_by_name(models, files, tmp_path, capsys):
    out = tmp_path / "run"
    asked = ("--include", "*.mlp.*,*.q_proj", "--exclude", "*.down_proj")
    assert main(command("full", models["llama"], files["messages"], out, *asked)) == 0
    names = json.loads((out / "level_0" / "metrics.json").read_text())["layer_density"]
    assert {name.rpartition(".")[2] for name in names} == {"gate_proj", "up_proj", "q_proj"}
    assert main(command("lora", models["llama"], files["messages"], tmp_path / "no", "--include", "*.nothing")) == 1
    assert "--include: '*.nothing' selects no linear layer" in capsys.readouterr().err


def test_bad_data_are_refused_before_a_model_is_loaded(models, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "load_model", lambda *_: pytest.fail("a model was loaded"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(files["messages"].read_text() + "{\n")
    assert main(command("imp", models["llama"], bad, tmp_path / "run")) == 1
    assert "bad.jsonl, line 41: not JSON" in capsys.readouterr().err
    assert main(command("imp", models["llama"], files["text"], tmp_path / "run", "--score", "exact")) == 1
    assert "--score exact: plain texts have no answers to be scored" in capsys.readouterr().err
    assert main(command("imp", models["llama"], files["text"], tmp_path / "run", "--score", "best")) == 1
    assert "--score: expected none, exact, choice, number or lm-eval:TASK, got best" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_base_model_without_a_template_trains_and_talks(files, tmp_path):
    model, out = save_family("llama", tmp_path / "base", template=None, adds_bos=True), tmp_path / "run"
    assert main(command("lora", model, files["messages"], out)) == 0
    shown: list[str] = []
    lines = iter(["What is", "/example 1", "/example 99", "/adapter off", "/help", "/quit"])
    run_chat(out, max_new_tokens=4, read=lambda _: next(lines), write=shown.append)
    text = "".join(shown)
    assert "you> What is the half of " in text
    assert "\ndata> It is " in text
    assert "/example: expected the number of a test example, 0 to " in text
    assert "/example NUMBER" in text
    assert "/digit" not in text


def test_a_report_needs_no_data(models, files, tmp_path):
    data, out = shutil.copytree(files["messages"].parent, tmp_path / "data"), tmp_path / "run"
    assert main(command("lora", models["llama"], data / "messages.jsonl", out)) == 0
    shutil.rmtree(data)
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "Gated sparse adapters on messages.jsonl" in (tmp_path / "report" / "report.md").read_text()


def test_a_comparison_ends_with_a_table_and_a_verdict(models, files, tmp_path, capsys, monkeypatch):
    """Its runs are made in this process, as importing takes longer; `test_sweep.py` has processes of their own."""
    out = tmp_path / "compare"
    monkeypatch.setitem(sweep.run_sweep.__kwdefaults__, "run", lambda asked, log: main(asked[3:]))
    asked = ["--methods", "imp,lora", "--rank", "2", "--equal", "parameters", "--no-drift"]
    base = ["compare", "--preset", "smoke", "--model", str(models["llama"]), "--data", str(files["messages"])]
    assert main([*base, *asked, "--dtype", "float32", "--device", "cpu", "--out", str(out), "--dry-run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2
    assert all("--format=messages" in one for one in commands)
    assert main([*base, *asked, "--dtype", "float32", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    table = (out / "compare.md").read_text()
    assert table.startswith("# Which to take\n")
    assert printed.rstrip().endswith(table.split("\n\n")[2].strip())
    assert re.search(
        r"\nTake (imp|lora): test loss .* the best\. Whether (imp|lora) is truly worse is not known", table
    )
    trained = {row.split("|")[1].strip(): row.split("|")[6].strip().replace(",", "") for row in table.splitlines()[4:6]}
    lora = int(trained["lora"])
    assert int(trained["imp"]) == pytest.approx(lora, rel=0.02)


def test_a_plan_for_texts_reads_them(models, files, capsys):
    asked = [
        "plan",
        "--preset",
        "smoke",
        "--prunings",
        "0",
        "--model",
        str(models["llama"]),
        "--data",
        str(files["messages"]),
    ]
    assert main([*asked, "--device", "cpu", "--system-prompt", "default"]) == 0
    longest = max(len(byte_tokenizer().apply_chat_template(row["messages"])["input_ids"]) for row in rows("messages"))
    assert 0 < longest - int(re.search(r"([0-9]+) tokens a prompt", capsys.readouterr().out)[1]) < 12


def test_a_task_of_lm_eval_scores_a_run(files, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    model, out = save_family("llama", tmp_path / "model"), tmp_path / "run"
    asked = ("--score", "lm-eval:textual_mnist", "--limit", "3")
    assert main(command("lora", model, files["messages"], out, *asked)) == 0
    found = metrics_of(out)["test"]["lm-eval:textual_mnist"]
    assert found["examples"] == 3
    assert "textual_mnist (%)" in (out / "report.md").read_text()
    assert main(command("lora", model, files["messages"], tmp_path / "no", "--score", "lm-eval:mmlu")) == 1
    assert "or another task of lm-eval (no group), comma-separated, got 'mmlu'" in capsys.readouterr().err


def test_what_is_measured_is_not_trained_on(models, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    goals = [f"How does one halve the number {number}?" for number in range(40)]
    piqa = [{"goal": goal, "sol1": "a", "sol2": "b", "label": 0} for goal in goals[:3]]
    write_jsonl(tmp_path / "piqa" / "validation.jsonl", piqa)
    mine = [{"prompt": goal, "completion": "so"} for goal in goals]
    write_jsonl(tmp_path / "data" / "train.jsonl", mine)
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"prompt": "a", "completion": "b"}])
    for measured in (("--source-tasks", "piqa"), ("--score", "lm-eval:piqa")):
        asked = (*measured, "--data-dir", str(tmp_path), "--limit", "2")
        assert main(command("lora", models["llama"], tmp_path / "data", tmp_path / "run", *asked)) == 1
        error = capsys.readouterr().err
        assert re.search(r"train.jsonl, line [0-9]+: asks what document [123] of piqa asks, which is measured", error)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.model
def test_the_page_on_own_data_runs(tmp_path, monkeypatch, capsys):
    """Its commands, with two steps instead of all; the last one needs data that are not here."""
    page = (ROOT / "docs" / "own_data.md").read_text()
    commands = re.findall(r"^python -m rigsa\.run (.*)$", page.replace("\\\n", ""), re.MULTILINE)
    assert [one.split()[0] for one in commands] == ["lora", "chat", "export", "compare", "lora"]
    parser = build_parser()
    for one in commands:
        parser.parse_args(one.split())
    monkeypatch.chdir(ROOT)
    load_model, loaded = experiment.load_model, []

    def load_once(*arguments: Any) -> tuple[Any, Any]:
        loaded.append(load_model(*arguments) if not loaded else loaded[0])
        return copy.deepcopy(loaded[0][0]), loaded[0][1]

    monkeypatch.setattr(experiment, "load_model", load_once)
    short = ["--max-steps", "1", "--warmup-steps", "0", "--logging-steps", "1", "--test-examples", "2", "--no-drift"]
    asked = commands[0].replace("runs/own", str(tmp_path / "own")).split()
    assert main([*asked, *short, "--batch-size", "2", "--micro-batch-size", "2", "--device", "cpu"]) == 0
    assert "questions.jsonl (prompt-completion): 50 training, 5 validation and 5 test" in re.sub(
        "2 test", "5 test", capsys.readouterr().out
    )
    shown: list[str] = []
    lines = iter(["/example 0"])
    run_chat(tmp_path / "own", max_new_tokens=2, read=lambda _: next(lines, "/quit"), write=shown.append)
    assert "\ndata> " in "".join(shown)
    assert main(commands[2].replace("runs/own", str(tmp_path / "own")).split()) == 0
    assert (tmp_path / "own" / "export" / "lora" / "adapter_model.safetensors").exists()
