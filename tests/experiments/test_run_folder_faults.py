"""Damage to a run folder: a resumed run ends with the bits of one that was never touched, or says what is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rigsa.experiments import checkpoints
from rigsa.experiments.adapter import FORMAT_VERSION, base_fingerprint, tensors_hash
from rigsa.experiments.checkpoints import latest_checkpoint, mark_checkpoint, remove_old
from rigsa.files import mark_done, write_json
from rigsa.run import main
from tests.experiments.test_run import contents, failure

COUNTS = {"tokens": 300, "examples": 300, "perplexity": 1.5}


@pytest.fixture(scope="module")
def options(small_model_folder: Path) -> list[str]:
    return [
        "imp", "--model", str(small_model_folder), "--preset", "smoke", "--dtype", "float32", "--device", "cpu",
        "--max-steps", "6", "--prunings", "1", "--test-examples", "20", "--checkpoint-steps", "2", "--epochs", "1",
        "--train-examples", "40", "--alpha-learning-rate", "0.1", "--eval-shots", "0",
    ]  # fmt: skip


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in the product may catch it."""


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*options, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def interrupted(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in level 1, right after its checkpoint of step 4."""
    out = tmp_path_factory.mktemp("cut") / "run"

    def die(folder: Path, step: int) -> None:
        mark_checkpoint(folder, step)
        if step == 4 and "level_1" in str(folder):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rigsa.experiments.train.mark_checkpoint", die)
        with pytest.raises(Killed):
            main([*options, "--out", str(out)])
    names = sorted(path.name for path in (out / "level_1" / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4"]
    return out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
        ("optimizer.pt", cut, "optimizer.pt has changed since it was written"),
        ("trainer_state.json", empty, "trainer_state.json has changed since it was written"),
        ("done", empty, "done is damaged"),
        ("done", lambda path: path.write_text("{}"), "its marker does not name"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, damage, said, interrupted, tmp_path, capsys):
    folder = shutil.copytree(interrupted / "level_1" / "checkpoints", tmp_path / "checkpoints")
    damage(folder / "checkpoint-4" / name)
    (folder / "checkpoint-abc").mkdir()
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    error = capsys.readouterr().err
    assert re.search(f"{folder}/checkpoint-4 is damaged .*{said}", error)
    assert error.endswith("is deleted; the level goes on from step 2\n")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-abc"]


@pytest.mark.parametrize("steps", [(4,), (2, 4)])
def test_a_run_with_damaged_checkpoints_ends_with_the_same_bits(
    steps, interrupted, finished, options, tmp_path, capsys
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    for step in steps:
        (run / "level_1" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert main([*options, "--out", str(run)]) == 0
    start = "step 2" if steps == (4,) else "its first step"
    error = capsys.readouterr().err
    assert error.count(f"optimizer.pt is missing) and is deleted; the level goes on from {start}") == len(steps)
    assert contents(run) == contents(finished)


def test_checkpoints_go_by_their_step_whatever_the_clock_says(tmp_path):
    for step, age in ((2, 0), (4, 1000), (10, 2000)):  # the clock went back
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"state")
        mark_checkpoint(tmp_path, step)
        os.utime(folder, (time.time() - age,) * 2)
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-²", "early_bird"):
        (tmp_path / name).mkdir()
    assert checkpoints.checkpoints(tmp_path)[-1].name == "checkpoint-10"
    remove_old(tmp_path)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert len(list(tmp_path.iterdir())) == 6


def test_a_clock_that_goes_back_loses_no_checkpoint(options, tmp_path, monkeypatch):
    """The Trainer's own clean-up goes by the time of a folder."""

    def mark(folder: Path, step: int) -> None:
        mark_checkpoint(folder, step)
        os.utime(folder / f"checkpoint-{step}", (1e9 - 1e4 * step,) * 2)
        if step == 6:
            raise Killed

    monkeypatch.setattr("rigsa.experiments.train.mark_checkpoint", mark)
    with pytest.raises(Killed):
        main([*options, "--out", str(tmp_path / "run")])
    assert latest_checkpoint(tmp_path / "run" / "level_0" / "checkpoints").name == "checkpoint-6"


def resave(path: Path, **changes: Any) -> None:
    """A file with other tensors, whole in itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["rigsa"])
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[name.replace("__", ".")] = change(tensors[name.replace("__", ".")])
    save_file(tensors, path, {"rigsa": json.dumps(entry | {"content": tensors_hash(tensors)})})


def raw(path: Path, metadata: dict[str, str]) -> None:
    save_file(load_file(path), path, metadata)


LAYER = "model__layers__0__mlp__down_proj"
MASK_FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("empty mask", lambda path: resave(path, **{LAYER: torch.zeros_like}), "is not the file that the record"),
    ("moved rows", lambda path: resave(path, **{LAYER: lambda words: words.roll(1, 1)}), "is not the file"),
    ("bool", lambda path: resave(path, **{LAYER: lambda words: words != 0}), "is torch.bool there, the model expects"),
    ("int64", lambda path: resave(path, **{LAYER: torch.Tensor.long}), "is torch.int64 there, the model expects"),
    ("shape", lambda path: resave(path, **{LAYER: lambda words: words[:1].clone()}), "does not fit: .*down_proj"),
    ("no hash", lambda path: raw(path, {"rigsa": json.dumps({"version": FORMAT_VERSION})}), "another base model"),
    ("no JSON", lambda path: raw(path, {"rigsa": "{"}), "its metadata, is damaged"),
    ("a list", lambda path: raw(path, {"rigsa": "[1]"}), "expected a rigsa file of version"),
    ("no entry", lambda path: raw(path, {"other": "1"}), "got another file"),
    ("a pipe", lambda path: (path.unlink(), os.mkfifo(path)), "expected a regular file, got a pipe"),  # type: ignore[func-returns-value]
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "message"), [case[1:] for case in MASK_FAULTS], ids=[case[0] for case in MASK_FAULTS]
)
def test_a_ticket_is_the_one_that_was_chosen(fault, message, interrupted, options, tmp_path, capsys):
    run = shutil.copytree(interrupted, tmp_path / "run")
    fault(run / "level_1" / "mask.safetensors")
    before = contents(run) if "pipe" not in message else {}
    assert re.search(message, failure([*options, "--out", str(run)], capsys))
    assert before in ({}, contents(run))


VALUES = "model__layers__0__mlp__down_proj__rigsa_values"
GATE = "model__layers__0__mlp__down_proj__rigsa_alpha"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({VALUES: lambda values: values.double()}, "is torch.float64 there, the model expects torch.float32"),
        ({VALUES: lambda values: values.to(torch.complex64)}, "is torch.complex64 there"),
        ({VALUES: lambda values: values.flatten()}, "does not fit"),
        ({VALUES: lambda values: values.index_fill(0, torch.tensor(0), float("nan"))}, "48 of 1536 numbers in"),
        ({GATE: lambda gate: gate * float("inf")}, "1 of 1 numbers in .*rigsa_alpha are not finite"),
        ({GATE: lambda gate: gate + 1}, "adapter.safetensors has changed since it was written"),
    ],
)  # fmt: skip
def test_an_adapter_is_the_one_that_was_trained(changes, message, finished, tmp_path, capsys):
    """A gate that is not finite is found when a conversation loads it, with or without the marker's word on it."""
    run = shutil.copytree(finished, tmp_path / "run")
    resave(run / "level_0" / "adapter.safetensors", **changes)
    assert "adapter.safetensors has changed since it was written" in failure(["chat", str(run), "--level", "0"], capsys)
    if "has changed" not in message:
        mark_done(run / "level_0", ["adapter.safetensors"])
        assert re.search(message, failure(["chat", str(run), "--level", "0"], capsys))


def test_one_flipped_bit_in_any_byte_of_an_adapter_is_found(finished, tmp_path, small_model_folder):
    from conftest import make_llama
    from rigsa import gated_linears, replace_linears
    from rigsa.errors import RigsaError
    from rigsa.experiments.adapter import load_adapter

    model = replace_linears(make_llama().requires_grad_(False), seed=0, values_dtype=torch.float32)
    path, chance = tmp_path / "adapter.safetensors", random.Random(0)
    data = (finished / "level_0" / "adapter.safetensors").read_bytes()
    path.write_bytes(data)
    assert base_fingerprint(model)
    load_adapter(model, path)
    before = [layer.rigsa_values.clone() for layer in gated_linears(model).values()]
    for _ in range(100):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(RigsaError):
            load_adapter(model, path)
    assert all(map(torch.equal, before, [layer.rigsa_values for layer in gated_linears(model).values()]))


RECORD_FAULTS = [
    ("metrics.json", {"test": {"0-shot": {"accuracy": 101, "loss": 1.0} | COUNTS}}, "test.0-shot.accuracy: exp"),
    ("metrics.json", {"test": {"0-shot": 3}}, "test.0-shot: expected an object, got 3"),
    ("metrics.json", {"density": "dense"}, "density: expected a number, 0 or more, got 'dense'"),
    ("metrics.json", {"level": True}, "level: expected a whole number, 0 or more, got True"),
    ("metrics.json", {"drift": {"kl": [], "stderr": 0}}, r"drift.kl: expected a number, got \[\]"),
    ("resources.json", {"train_seconds": None}, "train_seconds: expected a number, 0 or more, got None"),
    ("resources.json", [1], r"expected an object, got \[1\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), RECORD_FAULTS)
def test_a_damaged_record_is_named_and_the_report_shows_the_other_runs(
    name, change, message, finished, tmp_path, capsys
):
    runs = [shutil.copytree(finished, tmp_path / f"run{number}") for number in range(2)]
    config = json.loads((runs[0] / "config.json").read_text())
    write_json(runs[0] / "config.json", config | {"seed": 5})
    path = runs[1] / "level_1" / name
    record = json.loads(path.read_text())
    write_json(path, record | change if isinstance(change, dict) else change)
    assert re.search(f"{path} is damaged \\({message}", failure(["report", str(runs[1])], capsys))
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert f"{path} is damaged" in shown
    assert "| imp |" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"log.jsonl is damaged \(expected a line or more, got none\)"),
        ("{}\n", r"log.jsonl, line 1, is damaged \(step is missing\)"),
        ("{\n", "log.jsonl, line 1, is damaged .not JSON"),
    ],
)
def test_a_damaged_log_is_named_on_resume(content, message, finished, options, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "level_1" / "done").unlink()
    (run / "level_1" / "log.jsonl").write_text(content)
    assert re.search(message, failure([*options, "--out", str(run)], capsys))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("level_1/pruning.json", "[]", "pruning.json is damaged .expected an object"),
        ("level_1/pruning.json", '{"kept": 3, "mask": null}', "free entries, but pruning.json beside it says 3"),
        ("level_1/resources.json", "{}", "resources.json is damaged .steps is missing"),
        ("base/metrics.json", "{}", "base is damaged .metrics.json has changed since it was written"),
        ("base/replies.json", "[]", "base is damaged .replies.json has changed since it was written"),
        ("config.json", '{"seed": 1', "config.json is damaged"),
    ],
)
def test_a_damaged_record_is_named_on_resume(name, content, message, finished, options, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "level_1" / "done").unlink()
    (run / name).write_text(content)
    assert re.search(message, failure([*options, "--out", str(run)], capsys))
