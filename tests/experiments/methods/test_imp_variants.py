"""Variants of imp on a model of 70 kB: other criteria and starts, an early step, levels that end when masks settle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rigsa import files
from rigsa.run import main
from rigsa_kernels import SparsePattern, layer_key, uniform_init


@pytest.fixture(scope="module")
def options(small_model_folder: Path) -> list[str]:
    return [
        "imp", "--model", str(small_model_folder), "--preset", "smoke", "--dtype", "float32", "--device", "cpu",
        "--max-steps", "6", "--test-examples", "20", "--checkpoint-steps", "2", "--epochs", "2",
        "--train-examples", "40", "--alpha-learning-rate", "0.1", "--no-drift",
        "--keep-fraction", "0.8", "--no-scale-rates",
    ]  # fmt: skip


def pattern_of(words: torch.Tensor, name: str) -> SparsePattern:
    return SparsePattern.from_words(words, 48 if "down_proj" in name else 32)


def metrics(run: Path, level: int) -> dict:
    return json.loads((run / f"level_{level}" / "metrics.json").read_text())


def test_movement_keeps_what_moved_farthest(options, tmp_path):
    assert main([*options, "--criterion", "movement", "--out", str(tmp_path)]) == 0
    trained = load_file(tmp_path / "level_0" / "adapter.safetensors")
    for name, words in load_file(tmp_path / "level_1" / "mask.safetensors").items():
        mask, final = pattern_of(words, name).to_mask(), trained[f"{name}.rigsa_values"]
        moved = (final - uniform_init(final.shape, final.shape[1] ** -0.5, seed=0, key=layer_key(name))).abs()
        assert mask.sum() == round(0.8 * mask.numel())
        assert moved[mask].min() >= moved[~mask].max()
    assert "same_sign_share" not in metrics(tmp_path, 1)["pruning"]


def test_a_treated_ticket_is_pruned_by_its_own_start(options, tmp_path):
    """Under signed_constant every value of a ticket starts with one magnitude, and level 2 compares with that."""
    run = tmp_path / "run"
    rate = ["--learning-rate", "1e-9", "--alpha-learning-rate", "0", "--weight-decay", "0"]  # values stay at the start
    assert main([*options, *rate, "--rewind", "signed_constant", "--prunings", "2", "--out", str(run)]) == 0
    for name, values in load_file(run / "level_1" / "adapter.safetensors").items():
        if name.endswith("values"):
            assert values.abs().unique().numel() < values.numel() / 10
    assert metrics(run, 2)["pruning"]["same_sign_share"] == 1


def test_tickets_start_where_level_0_was_after_that_step(options, tmp_path):
    still = ["--learning-rate", "1e-30", "--alpha-learning-rate", "0", "--weight-decay", "0"]
    run, same = tmp_path / "run", tmp_path / "same"
    assert main([*options, "--rewind-step", "2", "--out", str(run)]) == 0
    assert main([*options, "--max-steps", "6", "--out", str(same)]) == 0
    assert metrics(run, 0) == metrics(same, 0)  # looking on changes nothing
    assert metrics(run, 1)["steps"] == 4
    rates = [json.loads(line)["learning_rate"] for line in (run / "level_1" / "log.jsonl").read_text().splitlines()]
    usual = [json.loads(line)["learning_rate"] for line in (run / "level_0" / "log.jsonl").read_text().splitlines()]
    assert rates == usual[2:]

    # A level that does not train ends where it started.
    (tmp_path / "frozen").mkdir()
    assert main([*options, *still, "--rewind-step", "2", "--out", str(tmp_path / "frozen")]) == 0
    early = load_file(tmp_path / "frozen" / "level_0" / "early.safetensors")
    ticket = load_file(tmp_path / "frozen" / "level_1" / "adapter.safetensors")
    for name, words in load_file(tmp_path / "frozen" / "level_1" / "mask.safetensors").items():
        kept = pattern_of(words, name).gather(early[f"{name}.rigsa_values"])
        assert torch.equal(kept, ticket[f"{name}.rigsa_values"])
        assert torch.equal(early[f"{name}.rigsa_alpha"], ticket[f"{name}.rigsa_alpha"])


class KilledHere(BaseException):
    """What a test raises where a process would have died."""


@pytest.mark.parametrize("extra", [["--rewind-step", "3"], ["--early-bird-steps", "1", "--max-steps", "12"]])
def test_interrupted_variants_end_with_the_same_bits(options, extra, tmp_path, monkeypatch):
    command = [*options, *extra, "--early-bird-distance", "0.9"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    write, count = files.write_atomically, 0

    def dying(*arguments):
        nonlocal count
        count += 1
        if count % 5 == 0:
            raise KilledHere
        write(*arguments)

    for module in ("files", "tensor_files"):
        monkeypatch.setattr(f"rigsa.{module}.write_atomically", dying)
    for _ in range(60):
        try:
            assert main([*command, "--out", str(tmp_path / "killed")]) == 0
            break
        except KilledHere:
            continue
    else:
        pytest.fail("never ended")
    for level in (0, 1):
        for name in ("adapter.safetensors", "metrics.json", "log.jsonl"):
            whole, killed = (tmp_path / run / f"level_{level}" / name for run in ("whole", "killed"))
            assert whole.read_bytes() == killed.read_bytes(), killed


def test_a_level_ends_when_its_mask_has_settled(options, tmp_path):
    """Six looks are possible after the warm-up of one step; with any distance allowed, the fifth one ends the level."""
    run = tmp_path / "run"
    settled = ["--early-bird-steps", "1", "--early-bird-distance", "1", "--max-steps", "12"]
    assert main([*options, *settled, "--out", str(run)]) == 0
    record = metrics(run, 0)["early_bird"]
    assert (record["ended_at"], record["steps_saved"]) == (6, 6)
    assert metrics(run, 0)["steps"] == 6
    assert metrics(run, 1)["steps"] == 12  # the last level is not pruned, so it is trained to the end
    assert not list(run.rglob("step_*.safetensors"))

    shutil.rmtree(run)
    never = ["--early-bird-steps", "1", "--early-bird-distance", "1e-9", "--max-steps", "12", "--learning-rate", "0.1"]
    assert main([*options, *never, "--out", str(run)]) == 0
    record = metrics(run, 0)["early_bird"]
    assert (record["ended_at"], record["steps_saved"], len(record["distances"])) == (None, 0, 11)
    assert all(value > 0 for step, value in record["distances"].items() if int(step) >= 6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rewind-step", "6"], "--rewind-step: expected less than the 6 steps of a level, got 6"),
        (["--rewind-step", "2", "--rewind", "random_reinit"], "a ticket has one start"),
        (["--early-bird-steps", "3", "--logging-steps", "2"], "--early-bird-steps: expected 0 or a multiple of the 2"),
        (["--init-scale", "0", "--alpha-init", "1"], "--init-scale 0: initial values have no signs to compare"),
    ],
)
def test_variants_that_cannot_be_are_refused(options, extra, message, tmp_path, capsys):
    assert main([*options, *extra, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
