"""Measures a finished run again, with other tests: more source tasks, all test examples. Nothing is trained.

The fields of `Measuring` change no trained number, so the folder then is what a run with these tests would have made.
Its levels lose their markers, get their new configuration, and the run goes on as after an interruption: it finds every
level trained and tests it. Interrupted in between it is measured to its end by the same command, or by the run's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.config_file import load
from rigsa.experiments.experiment import Experiment
from rigsa.experiments.run_folder import BASE, CONFIG_FILE, LOG_FILE, REPLIES_FILE, level_folder
from rigsa.experiments.tasks import source_tasks
from rigsa.experiments.tasks.task import Task
from rigsa.files import DONE, first_damage, is_done, write_json


def measure_again(run: Path, given: Mapping[str, Any]) -> Task:
    """Test every level of `run` anew, and return its task. The caller has the lock of the folder.

    Args:
        run: folder of a run whose last level has been trained.
        given: fields of `Measuring`; the others stay as they are.

    Raises:
        RigsaError: there is no such run, it is not finished or damaged, nothing is left to measure, or what is given
            cannot be measured. Nothing has changed then.
    """
    saved = load(run)
    config = dataclasses.replace(saved, **given)
    folders = [run / BASE, *trained_levels(run, saved)]
    if config == saved and all(is_done(folder) for folder in folders):
        raise RigsaError(f"{run} is measured so already; give what to measure, such as --source-tasks piqa")
    source_tasks.check(config)
    experiment = Experiment.prepare(config, run)
    source_tasks.check_content(config, experiment.task.conversation.tokenizer, experiment.task.asked())
    if config != saved:
        for folder in folders:
            (folder / DONE).unlink(missing_ok=True)
        (run / BASE / REPLIES_FILE).unlink(missing_ok=True)
        write_json(run / CONFIG_FILE, config.record())
    config.method.run(experiment)
    return experiment.task


def trained_levels(run: Path, config: Config) -> list[Path]:
    """The folders of the levels. Raises RigsaError where one is damaged or has not been trained to its end."""
    numbers = {int(folder.name[6:]) for folder in run.glob("level_*") if folder.name[6:].isdigit()}
    folders = [level_folder(run, number) for number in sorted(numbers | set(config.method.levels(config)))]
    for folder in (run / BASE, *folders):
        if is_done(folder) and (damage := first_damage(folder)):
            raise RigsaError(f"{folder} is damaged ({damage}); delete it and run again")
    if not folders or not all((folder / LOG_FILE).is_file() for folder in folders):
        raise RigsaError(f"{run} is not finished; give its own command again first")
    return folders
