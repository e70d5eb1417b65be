"""Measures a finished run again, with other tests: more source tasks, all test examples. Nothing is trained.

The fields of `Measuring` change no trained number, so the folder then is what a run with these tests would have made.
Its levels lose their markers, get their new configuration, and the run goes on as after an interruption: it finds every
level trained and tests it. Interrupted in between it is measured to its end by the same command, or by the run's own.
A marker says whether files are as they were written, so before the first is removed every adapter is loaded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, flag
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment, restore_level
from rigsa.experiments.records import RESOURCES, read_record
from rigsa.experiments.run_folder import (
    BASE,
    CONFIG_FILE,
    FAILED_FILE,
    LOG_FILE,
    OUTPUT_FILE,
    REPLIES_FILE,
    RESOURCES_FILE,
    begun_levels,
    level_folder,
)
from rigsa.experiments.tasks import source_tasks
from rigsa.experiments.tasks.task import Task
from rigsa.experiments.train import read_log
from rigsa.files import DONE, first_damage, is_done, mark_done, remove_temporaries, write_json


def measure_again(run: Path, given: Mapping[str, Any]) -> Task:
    """Test every level of `run` anew, and return its task. The caller has the lock of the folder.

    Args:
        run: folder of a run whose last level has been trained.
        given: fields of `Measuring`; the others stay as they are.

    Raises:
        RigsaError: there is no such run, it is not finished or damaged, nothing is left to measure, what is given
            cannot be measured, or the model or a run that it is matched to is no longer the same. Nothing has changed
            then.
    """
    saved = load(run)
    config = dataclasses.replace(saved, **given)
    folders = [run / BASE, *trained_levels(run, saved)]
    if config == saved and all(is_done(folder) for folder in folders):
        raise RigsaError(f"{run} is measured so already; give what to measure, such as --source-tasks piqa")
    source_tasks.check(config)
    check_adapters(config, run, folders[1:])
    experiment = Experiment.prepare(config, run)
    source_tasks.check_content(config, experiment.task.conversation.tokenizer, experiment.task.asked())
    before = {name: getattr(saved, name) for name in given}
    changes = [f"--{flag(name)} {now!r}, was {before[name]!r}" for name, now in given.items() if now != before[name]]
    print(f"{run} is tested again: {', '.join(changes) or 'what is left of its tests'}", flush=True)
    remove_temporaries(run)
    if config != saved:
        (run / DONE).unlink(missing_ok=True)  # of a sweep, whose own command then goes on after an interruption
        for folder in folders:
            (folder / DONE).unlink(missing_ok=True)
        (run / BASE / REPLIES_FILE).unlink(missing_ok=True)
        write_json(run / CONFIG_FILE, config.record())
    config.method.run(experiment)
    if (run / OUTPUT_FILE).exists():
        (run / FAILED_FILE).unlink(missing_ok=True)
        mark_done(run)
    return experiment.task


def check_adapters(config: Config, run: Path, folders: list[Path]) -> None:
    """Raises RigsaError where the adapter of a level is not one of the model as it is now, or is damaged."""
    experiment = Experiment.prepare(config, run)  # not the one that measures: a method attaches to a plain model
    experiment.attach()
    for folder in folders:
        restore_level(experiment.model, folder)


def trained_levels(run: Path, config: Config) -> list[Path]:
    """The folders of the levels, in ascending order.

    Raises:
        RigsaError: one is damaged or has not been trained to its end, or the run that this one is matched to is gone.
    """
    planned = config.method.known_densities(config) or config.method.levels(config)
    folders = [level_folder(run, number) for number in sorted({*begun_levels(run), *planned})]
    for folder in (run / BASE, *folders):
        if is_done(folder) and (damage := first_damage(folder)):
            raise RigsaError(f"{folder} is damaged ({damage}); delete it and run again")
    if not folders or not all((folder / LOG_FILE).is_file() for folder in folders):
        raise RigsaError(f"{run} is not finished; give its own command again first")
    for folder in folders:
        read_log(folder)
        read_record(folder / RESOURCES_FILE, RESOURCES)  # which no marker names
    return folders
