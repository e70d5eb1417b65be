"""The checkpoints of a level: which is whole, which is the latest. Their order is that of steps, not of time."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from rigsa.errors import RigsaError
from rigsa.files import DONE, first_damage, is_done, is_temporary, mark_done, marked_hashes, reason_of

NUM_KEPT = 2
"""The latest, and one before it, should that be damaged."""


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """Those in `folder`, finished or not, in the order of their steps. What has another name is no checkpoint."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(found, key=checkpoint_step)


def mark_checkpoint(folder: Path, step: int) -> None:
    """After everything else of it was written: its marker names every file by its hash."""
    checkpoint = folder / f"checkpoint-{step}"
    mark_done(checkpoint, _files(checkpoint))


def _files(checkpoint: Path) -> list[str]:
    """All but the marker, below folders too."""
    found = [path for path in checkpoint.rglob("*") if path.is_file() and not is_temporary(path.name)]
    return [str(path.relative_to(checkpoint)) for path in found if path != checkpoint / DONE]


def remove_old(folder: Path) -> None:
    """All but the last ones."""
    for checkpoint in checkpoints(folder)[:-NUM_KEPT]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The one of the highest step that is whole; None without one.

    Those that are not are deleted. One without a marker was left by a process that was killed. One with a marker whose
    files are not those that it names is damaged: standard error says so, and from where the level goes on.

    Raises:
        RigsaError: a folder cannot be deleted.
    """
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        damage = _damage(checkpoint) if is_done(checkpoint) else None
        if is_done(checkpoint) and damage is None:
            _say(damaged, f"step {checkpoint_step(checkpoint)}")
            return checkpoint
        if damage is not None:
            damaged.append(f"{checkpoint} is damaged ({damage})")
        try:
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
        except OSError as error:
            raise RigsaError(f"cannot delete {checkpoint}, which is not whole: {reason_of(error)}") from error
    _say(damaged, "its first step")
    return None


def _damage(checkpoint: Path) -> str | None:
    """Of a checkpoint with a marker. A file that the marker does not name is one that it has lost."""
    if damage := first_damage(checkpoint):
        return damage
    unnamed = set(_files(checkpoint)) - marked_hashes(checkpoint).keys()
    return f"its marker does not name {min(unnamed)}" if unnamed else None


def _say(damaged: list[str], start: str) -> None:
    for message in damaged:
        print(f"rigsa: {message} and is deleted; the level goes on from {start}", file=sys.stderr)
