"""What a run folder holds, and what its files are called.

::

    config.json                 the resolved configuration, written first
    base/metrics.json           the untrained model
    base/replies.json           its own replies to the prompts that drift is measured on
    level_K/mask.safetensors    the ticket (no file at level 0, which is dense)
    level_K/pruning.json        how the ticket was chosen
    level_K/adapter.safetensors trained values and gates
    level_K/log.jsonl           training log
    level_K/metrics.json        accuracies, losses, densities
    level_K/resources.json      steps, seconds, peak memory, machine and versions
    level_K/done                written last; it names the level's files, but for resources.json, by their hash
    report.html, .md, .csv      and figures as PNG: drawn from the above at the end, and by `rigsa report`

Some runs have more: ``level_0/early.safetensors`` (`--rewind-step`), ``level_K/early_bird.json``
(`--early-bird-steps`), ``level_K/checkpoints/`` while a level trains; in a sweep ``run.log`` and, while the last
attempt failed, ``failed.json``.

Two runs with one configuration on one device share every bit but resources.json and the seconds in reports, however
often they were interrupted.
"""

from __future__ import annotations

import re
from pathlib import Path

from rigsa.errors import RigsaError
from rigsa.files import is_done

CONFIG_FILE = "config.json"
BASE = "base"
REPLIES_FILE = "replies.json"
METRICS_FILE = "metrics.json"
MASK_FILE = "mask.safetensors"
PRUNING_FILE = "pruning.json"
ADAPTER_FILE = "adapter.safetensors"
LOG_FILE = "log.jsonl"
RESOURCES_FILE = "resources.json"
CHECKPOINTS = "checkpoints"
EARLY_FILE = "early.safetensors"
"""In the folder of level 0: its adapter after `rewind_step` steps."""
EARLY_BIRD_FILE = "early_bird.json"
OUTPUT_FILE = "run.log"
"""What a run of a sweep printed, every attempt."""
FAILED_FILE = "failed.json"
"""Left by a sweep whose run failed: ``{"exit_code": number, "message": last lines}``."""


def level_folder(run: Path, level: int) -> Path:
    return run / f"level_{level}"


def begun_levels(run: Path) -> list[int]:
    """The levels that have a folder, in ascending order."""
    found = [re.fullmatch("level_(0|[1-9][0-9]{0,8})", folder.name) for folder in run.glob("level_*")]
    return sorted(int(match[1]) for match in found if match)


def finished_levels(run: Path) -> list[int]:
    """The levels that are done, in ascending order."""
    return [level for level in begun_levels(run) if is_done(level_folder(run, level))]


def finished_level(run: Path, level: int | None) -> int:
    """`level` itself, or for None the last finished one. Raises RigsaError if it is not finished."""
    finished = finished_levels(run)
    if not finished:
        raise RigsaError(f"{run} has no finished level; let the run finish one first")
    if level is None:
        return finished[-1]
    if level not in finished:
        known = ", ".join(map(str, finished))
        raise RigsaError(f"--level: expected a finished level of {run} ({known}), got {level}")
    return level
