"""Run folders as data: what a report compares, and whether it may. No model is loaded."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import OPTIONS, Config, flag
from rigsa.experiments.config_file import load
from rigsa.experiments.measures import Measure, Metrics, accuracies, test_loss, test_perplexity
from rigsa.experiments.presets import PRESETS, arguments_of
from rigsa.experiments.records import FAILURE, RESOURCES, metrics_of, read_record
from rigsa.experiments.report import paper_numbers
from rigsa.experiments.report.statistics import Estimate, estimate, group
from rigsa.experiments.run_folder import (
    BASE,
    CONFIG_FILE,
    FAILED_FILE,
    METRICS_FILE,
    RESOURCES_FILE,
    finished_levels,
    level_folder,
)

TASKS = {"piqa": "PIQA", "hellaswag": "HellaSwag", "gsm8k": "GSM8k"}
SAME = (
    "model",
    "data",
    "format",
    "validation_share",
    "max_length",
    "score",
    "test_examples",
    "eval_shots",
    "system_prompt",
)
"""Fields in which the runs of one report agree; those that measured source tasks agree in `SAME_TASKS` too, those
that measured drift in the number of its prompts, those that scored answers in how long these may be."""
SAME_TASKS = ("limit", "data_dir")


@dataclass(frozen=True)
class Run:
    """What a run folder holds: its configuration, the untrained model's metrics and those of the finished levels."""

    path: Path
    config: Config
    base: Metrics
    levels: list[Metrics]
    ticket: Config | None = None
    """The configuration of the run that it is matched to; None for none, and where that run is not to be found."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises RigsaError where `path` is no run folder or is damaged. `levels` may be empty."""
        config = load(path)
        levels = [_level(path, number, config) for number in finished_levels(path)]
        base = read_record(path / BASE / METRICS_FILE, metrics_of(config, base=True)) if levels else {}
        return cls(path, config, base, levels, _ticket_of(path, config))

    def level(self, number: int) -> Metrics | None:
        return next((metrics for metrics in self.levels if metrics["level"] == number), None)

    @property
    def base_name(self) -> str:
        return "untrained" if self.config.quantize == "none" else "untrained, 4 bits"


def _ticket_of(run: Path, config: Config) -> Config | None:
    """The configuration of the run that this one is matched to, at its path or, if that was moved, beside this one."""
    if not config.match:
        return None
    for folder in (Path(config.match), run.parent / Path(config.match).name):
        with contextlib.suppress(RigsaError, OSError):
            found = load(folder)
            if found.method.name == config.method.matches:
                return found
    return None


def _level(run: Path, number: int, config: Config) -> Metrics:
    """Metrics and resources of a finished level."""
    folder = level_folder(run, number)
    metrics = read_record(folder / METRICS_FILE, metrics_of(config))
    if metrics["level"] != number:
        raise RigsaError(
            f"{folder / METRICS_FILE} is damaged (level: expected {number}, got {metrics['level']}); delete its folder "
            "and run again"
        )
    return metrics | read_record(folder / RESOURCES_FILE, RESOURCES)


DRIFT = Measure("drift", ("drift", "kl"), "nats per token", 4, less_is_better=True)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed, in the order of their seeds."""

    label: str
    runs: list[Run]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def levels(self) -> list[int]:
        return sorted({metrics["level"] for run in self.runs for metrics in run.levels})

    @property
    def final(self) -> int:
        """The last level that any of its runs has finished; runs that have not do not count towards final numbers."""
        return self.levels[-1]

    def at(self, level: int) -> dict[int, Metrics]:
        """Seed to metrics."""
        return {run.config.seed: found for run in self.runs if (found := run.level(level)) is not None}

    def values(self, measure: Measure, level: int) -> dict[int, float]:
        """Seed to value."""
        found = {seed: measure.of(metrics) for seed, metrics in self.at(level).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, measure: Measure, level: int) -> Estimate | None:
        values = list(self.values(measure, level).values())
        return estimate(values) if values else None

    def change(self, measure: Measure, level: int) -> Estimate | None:
        """The change from the untrained model of the same run."""
        before = {run.config.seed: measure.before(run.base) for run in self.runs}
        changes = [value - start for seed, value in self.values(measure, level).items()
                   if (start := before[seed]) is not None]  # fmt: skip
        return estimate(changes) if changes else None


def trainable(metrics: Metrics) -> int:
    """Trained numbers. Runs of earlier versions recorded the free entries alone, without the gates."""
    return metrics["trainable"] if "trainable" in metrics else metrics["free"]


@dataclass(frozen=True)
class Report:
    """Comparable runs, grouped; `notes` says what is missing from them, `failed` names folders and their messages."""

    runs: list[Run]
    settings: list[Setting]
    notes: list[str]
    failed: list[tuple[Path, str]]

    @property
    def config(self) -> Config:
        """The first run's configuration; it speaks for all in the fields in which they agree."""
        return self.runs[0].config

    @property
    def accuracies(self) -> list[Measure]:
        """Accuracies on the target task; the first is the headline."""
        return accuracies(self.config)

    @property
    def loss(self) -> Measure:
        return test_loss(self.config)

    @property
    def losses(self) -> list[Measure]:
        """The loss on the test examples and, of texts, its exponential."""
        perplexity = test_perplexity(self.config)
        return [self.loss] if perplexity is None else [self.loss, perplexity]

    @property
    def sources(self) -> list[Measure]:
        """Those source tasks that any run has measured."""
        others = dict.fromkeys(task for run in self.runs for task in run.config.tasks if task not in TASKS)
        names = TASKS | {task: task for task in others}
        measures = [Measure(name, ("source", task, "score"), "%", 2) for task, name in names.items()]
        return [measure for measure in measures if self._measured(measure)]

    @property
    def drifts(self) -> list[Measure]:
        """Drift, or nothing where no run has measured it."""
        return [DRIFT] if self._measured(DRIFT) else []

    def _measured(self, measure: Measure) -> bool:
        return any(measure.of(metrics) is not None for run in self.runs for metrics in (run.base, *run.levels))

    @property
    def reference(self) -> Setting | None:
        """What the others are compared with: of the reference method's settings the one closest to a preset."""
        found = [setting for setting in self.settings if setting.config.method.is_reference]
        return min(found, key=lambda setting: len(nearest_preset(setting.config)[1]), default=None)

    @property
    def has_paper(self) -> bool:
        return self.config.model == paper_numbers.MODEL

    def bases(self) -> dict[str, dict[int, Run]]:
        """Name of an untrained model to seed to a run that measured it."""
        found: dict[str, dict[int, Run]] = {}
        for run in self.runs:
            found.setdefault(run.base_name, {}).setdefault(run.config.seed, run)
        return dict(sorted(found.items()))

    def before(self, measure: Measure, base: str) -> Estimate | None:
        """The untrained model's value: one where all seeds agree, else the mean over seeds."""
        runs = [run for run in self.runs if run.base_name == base and measure.before(run.base) is not None]
        values = {run.config.seed: measure.before(run.base) for run in runs}
        known = [value for value in values.values() if value is not None]
        if not known:
            return None
        return estimate(known[:1] if len(set(known)) == 1 else known)


def read_report(paths: Sequence[Path]) -> Report:
    """Read run folders, and folders of them.

    Raises:
        RigsaError: a path is not there or holds no run, no run that can be read has a finished level, or the runs
            cannot stand in one report. A damaged run beside others is left out, and `Report.notes` says so.
    """
    folders = list({folder.resolve(): folder for path in paths for folder in run_folders(path)}.values())
    failed = [(folder, _failure(folder / FAILED_FILE)) for folder in folders if (folder / FAILED_FILE).exists()]
    rest, notes = _read_all([folder for folder in folders if not (folder / FAILED_FILE).exists()])
    runs = [run for run in rest if run.levels]
    notes += [f"{run.path} has no finished level yet; run its command again to go on" for run in rest if not run.levels]
    if not runs:
        raise RigsaError("; ".join(notes + [f"{folder} failed: {message}" for folder, message in failed]))
    check_comparable(runs)
    groups = group([run.config for run in runs], tickets=[run.ticket for run in runs])
    settings = [Setting(one.label, [runs[index] for index in one.members]) for one in groups]
    check_distinct(settings)
    return Report(runs, settings, notes + [note for setting in settings for note in _unfinished(setting)], failed)


def _read_all(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and what is wrong with the others."""
    runs, notes = [], []
    for folder in folders:
        try:
            runs.append(Run.read(folder))
        except RigsaError as error:
            notes.append(f"{folder} is left out: {error}")
    return runs, notes


def run_folders(path: Path) -> list[Path]:
    """`path` itself where it is a run folder, else those one and two folders below. Raises RigsaError for none."""
    if not path.is_dir():
        raise RigsaError(f"{path}: no such run folder")
    if _is_run(path):
        return [path]
    found = sorted(folder for pattern in ("*", "*/*") for folder in path.glob(pattern) if _is_run(folder))
    if not found:
        raise RigsaError(f"{path} is no run folder (it has no {CONFIG_FILE}) and holds none")
    return found


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or (folder / FAILED_FILE).is_file()


def _failure(path: Path) -> str:
    try:
        return str(read_record(path, FAILURE)["message"])
    except RigsaError as error:
        return str(error)


def _unfinished(setting: Setting) -> Iterator[str]:
    for run in setting.runs:
        last = run.levels[-1]["level"]
        end = max(run.config.method.levels(run.config), default=last)
        if last < end:
            yield f"{run.path} has finished level {last} of {end}; run its command again to go on"
        if last < setting.final:
            yield f"{run.path} does not count towards the final numbers of {setting.label}, level {setting.final}"


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises RigsaError where the runs differ in the model, its tokenizer, the data or how they were tested."""
    _check_same(runs, SAME)
    _check_same([run for run in runs if run.config.tasks], SAME_TASKS)
    _check_same([run for run in runs if run.config.drift], ("drift_prompts",))
    _check_same([run for run in runs if run.config.score != "none"], ("answer_tokens",))
    known = [run for run in runs if "tokenizer" in run.base]
    for run in known[1:]:
        here, there = known[0].base["tokenizer"], run.base["tokenizer"]
        if here != there:
            raise RigsaError(
                f"{known[0].path} and {run.path} cannot stand in one report: mixed tokenizers between runs "
                f"({here} and {there})"
            )


def _check_same(runs: Sequence[Run], names: Sequence[str]) -> None:
    for name in names:
        for run in runs[1:]:
            here, there = getattr(runs[0].config, name), getattr(run.config, name)
            if here != there:
                paths = f"{runs[0].path} and {run.path}"
                raise RigsaError(f"{paths} cannot stand in one report: --{flag(name)} is {here!r} and {there!r}")


def check_distinct(settings: Sequence[Setting]) -> None:
    """Raises RigsaError where a seed of a setting is there twice: it would count as two."""
    for setting in settings:
        for one, other in zip(setting.runs, setting.runs[1:], strict=False):
            if one.config.seed == other.config.seed:
                raise RigsaError(
                    f"{one.path} and {other.path} are the same run, {setting.label} with seed {one.config.seed}; "
                    "give one of them"
                )


def nearest_preset(config: Config) -> tuple[str, dict[str, Any]]:
    """The preset with the fewest differences, and these as field to value. Quickstart comes first among equals."""
    fields = [name for name in OPTIONS if config.method.reads(name)]
    found = []
    for name in ("quickstart", *PRESETS):
        preset = PRESETS[name](config.method.name, config.device)
        found.append(
            (name, {field: value for field in fields if (value := getattr(config, field)) != getattr(preset, field)})
        )
    return min(found, key=lambda item: len(item[1].keys() - {"seed"}))


def command_of(config: Config) -> str:
    """The command that makes this configuration: a preset and the options that differ from it, quoted for a shell."""
    preset, _ = nearest_preset(config)
    return shlex.join(
        ["python", "-m", "rigsa.run", config.method.name, "--preset", preset, *arguments_of(config, preset)]
    )
