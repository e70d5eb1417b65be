"""A finished run that is measured again is, to the last bit, a run that had those tests from the start."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_run import contents

from rigsa.experiments.experiment import Experiment
from rigsa.run import main

OTHERS = ["--test-examples", "30", "--eval-shots", "0,1", "--drift-prompts", "3"]


def command(method: str, model: Path, out: Path, *others: str) -> list[str]:
    return [
        method, "--preset", "smoke", "--model", str(model), "--dtype", "float32", "--device", "cpu",
        "--train-examples", "40", "--test-examples", "20", *others, "--out", str(out),
    ]  # fmt: skip


def without_reports(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(run).items() if "/" in name or name == "config.json"}


@pytest.mark.parametrize(
    ("method", "others"),
    [("imp", OTHERS), ("lt-sft", OTHERS), ("spiel", OTHERS), ("diff-pruning", OTHERS), ("lora", ["--no-drift"])],
)
def test_it_is_the_run_that_had_these_tests_from_the_start(
    method, others, small_model_folder, tmp_path, monkeypatch, capsys
):
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(command(method, small_model_folder, run)) == 0
    assert main(command(method, small_model_folder, other, *others)) == 0
    capsys.readouterr()
    test, calls = Experiment.test, []

    def interrupted(self, label):
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return test(self, label)

    monkeypatch.setattr(Experiment, "test", interrupted)
    assert main(["measure", str(run), *others]) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert main(["measure", str(run), *others]) == 0
    assert without_reports(run) == without_reports(other)
    assert "report: " in capsys.readouterr().out
    assert main(["measure", str(run), *others]) == 1
    assert "is measured so already" in capsys.readouterr().err


def other_weights(run: Path) -> None:
    """The model that the configuration names is another one now."""
    config = json.loads((run / "config.json").read_text())
    model = shutil.copytree(config["model"], run.parent / "model")
    weights = {name: weight + 0.01 for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (run / "config.json").write_text(json.dumps(config | {"model": str(model)}))


def as_if_matched(run: Path) -> None:
    """A run like that of a control, whose ticket came from a run that is gone."""
    config = json.loads((run / "config.json").read_text())
    config |= {"method": "reinit", "match": str(run.parent / "gone")}
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda run: (run / "level_1" / "log.jsonl").unlink(), OTHERS, "is damaged (log.jsonl is missing)"),
        (lambda run: shutil.rmtree(run / "level_1"), OTHERS, "is not finished; give its own command again first"),
        (lambda run: (run / "base" / "metrics.json").write_text("{}"), OTHERS, "metrics.json has changed since"),
        (other_weights, OTHERS, "belongs to another base model"),
        (as_if_matched, OTHERS, "gone: no run folder there"),
        (lambda run: (run / "level_0" / "resources.json").unlink(), OTHERS, "resources.json is missing"),
        (lambda run: None, ["--score", "exact"], "--score: "),
        (lambda run: None, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (lambda run: None, ["--limit", "1", "--source-tasks", "piqa"], "--limit: expected 0 (all) or at least 2"),
    ],
)
def test_what_cannot_be_measured_again_is_refused_and_nothing_changes(
    damage, options, message, tmp_path, finished_imp, capsys
):
    run = shutil.copytree(finished_imp, tmp_path / "run")
    damage(run)
    before = contents(run)
    assert main(["measure", str(run), *options]) == 1
    assert message in capsys.readouterr().err
    assert {name: content for name, content in contents(run).items() if name != ".lock"} == before


def test_a_sweep_goes_on_with_a_run_whose_new_tests_were_interrupted(tmp_path, finished_imp, monkeypatch, capsys):
    run = shutil.copytree(finished_imp, tmp_path / "run")
    (run / "run.log").touch()
    (run / "done").write_text("{}\n")
    test = Experiment.test

    def interrupted(self, label):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "test", interrupted)
    assert main(["measure", str(run), *OTHERS]) == 130
    assert not (run / "done").exists()
    monkeypatch.setattr(Experiment, "test", test)
    assert main(["measure", str(run), *OTHERS]) == 0
    assert (run / "done").read_text() == "{}\n"
    assert "drift (nats per token)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished_imp(small_model_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(command("imp", small_model_folder, run)) == 0
    return run


def test_what_is_no_run_is_refused_and_not_made(tmp_path, capsys):
    assert main(["measure", str(tmp_path / "none")]) == 1
    assert "no such run folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
