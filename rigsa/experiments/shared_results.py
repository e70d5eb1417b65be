"""What a run of a sweep takes from another one that has it: the untrained model's results, and an equal level 0.

Level 0 is the longest part of a run with tickets, and runs whose tickets alone differ, in their density for instance,
have the same one to the last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import OPTIONS, Base, Config, Measuring, fields_of
from rigsa.experiments.config_file import load
from rigsa.experiments.records import RESOURCES, read_record
from rigsa.experiments.run_folder import BASE, CHECKPOINTS, LOG_FILE, RESOURCES_FILE, level_folder
from rigsa.experiments.sweep_plan import Job, Plan
from rigsa.files import DONE, first_damage, is_done

BASE_FIELDS = (*fields_of(Base), *fields_of(Measuring))
"""What the untrained model's results depend on, whatever the method."""
EXAMPLE_FIELDS = ("seed", "train_examples")
"""And these where test prompts hold examples, which are drawn from the training images."""

FILES = ("model", "data", "data_dir")
"""Fields that may name files and folders, whose content no configuration tells."""


def share_results(job: Job, plan: Plan) -> None:
    """Copy ``base/`` and ``level_0/`` from runs of the sweep where they are done and are what `job` would make.

    Raises:
        RigsaError: a folder cannot be copied.
    """
    _share(BASE, of_base, job, plan)
    if job.config.method.ticket_fields(job.config):
        _share(level_folder(plan.out, 0).name, of_level_0, job, plan)


def of_base(config: Config) -> dict[str, Any]:
    """What the untrained model's results depend on."""
    names = (*BASE_FIELDS, *EXAMPLE_FIELDS) if any(config.shots) else BASE_FIELDS
    return {name: getattr(config, name) for name in names}


def of_level_0(config: Config) -> dict[str, Any]:
    """What level 0 and its results depend on."""
    method, apart = config.method, config.method.ticket_fields(config)
    names = [name for name in OPTIONS if method.reads(name) and name not in apart]
    return {"method": method.name} | {name: getattr(config, name) for name in names}


def _share(name: str, depends_on: Callable[[Config], dict[str, Any]], job: Job, plan: Plan) -> None:
    mine, wanted = plan.folder(job) / name, depends_on(job.config)
    if is_done(mine):
        return
    for other in plan.jobs:
        run = plan.folder(other)
        if is_done(run / name) and _made_from(run / name, depends_on) == wanted and _is_whole(run / name):
            _copy(run / name, mine)
            return


def _made_from(folder: Path, depends_on: Callable[[Config], dict[str, Any]]) -> dict[str, Any] | None:
    """What the results in ``base/`` or ``level_0/`` depend on; None where it cannot be told, or model or data have
    changed since they were read. A run that is measured again marks its base anew, and leaves a level's log alone."""
    run = folder.parent
    files = [run / BASE / DONE, *folder.glob(LOG_FILE)]
    try:
        config = load(run)
        made = min(file.stat().st_mtime for file in files)  # model and data were read before that
        changed = max(_last_change(Path(named)) for name in FILES if (named := getattr(config, name)))
    except (RigsaError, OSError):
        return None
    return depends_on(config) if changed <= made else None


def _last_change(path: Path) -> float:
    """When a file or a file in a folder was last written; 0 where there is none, as that is a name on the hub."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _is_whole(folder: Path) -> bool:
    """Whether all that a report reads is there and undamaged. The marker says nothing of the resources of a level."""
    try:
        if folder.name != BASE:
            read_record(folder / RESOURCES_FILE, RESOURCES)
    except RigsaError:
        return False
    return first_damage(folder) is None


def _copy(theirs: Path, mine: Path) -> None:
    """All but the checkpoints, which the run that has just finished the level may be about to delete."""
    partial = mine.with_name(f".{mine.name}.part")
    try:
        for folder in (partial, mine):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(theirs, partial, ignore=shutil.ignore_patterns(CHECKPOINTS, ".*.part"))
        partial.rename(mine)
    except OSError as error:
        raise RigsaError(f"cannot copy {theirs} to {mine}: {error}") from error
