"""What a run of a sweep takes from another one that has it: the untrained model's results, and an equal level 0.

Level 0 is the longest part of a run with tickets, and runs whose tickets alone differ, in their density for instance,
have the same one to the last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import OPTIONS, Base, Config, Measuring, fields_of
from rigsa.experiments.config_file import load
from rigsa.experiments.run_folder import BASE, level_folder
from rigsa.experiments.sweep_plan import Job, Plan
from rigsa.files import first_damage, is_done

BASE_FIELDS = (*fields_of(Base), *fields_of(Measuring))
"""What the untrained model's results depend on, whatever the method."""
EXAMPLE_FIELDS = ("seed", "train_examples")
"""And these where test prompts hold examples, which are drawn from the training images."""


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
    mine = plan.folder(job) / name
    if is_done(mine):
        return
    for other in plan.jobs:
        theirs = plan.folder(other) / name
        if not is_done(theirs) or first_damage(theirs):
            continue
        if depends_on(load(plan.folder(other))) == depends_on(job.config):
            partial = plan.folder(job) / f".{name}.part"
            try:
                for folder in (partial, mine):
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(theirs, partial)
                partial.rename(mine)
            except OSError as error:
                raise RigsaError(f"cannot copy {theirs} to {mine}: {error}") from error
            return
