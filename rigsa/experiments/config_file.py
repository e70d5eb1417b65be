"""``config.json``: a run folder's configuration, written, read, and compared with the one that a command asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import OPTIONS, Config, flag
from rigsa.experiments.lock import LOCK_FILE
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.run_folder import CONFIG_FILE
from rigsa.files import is_temporary, read_json, write_json

DEFAULTS = {name: field.default for name, field in OPTIONS.items()}
"""What a run of an earlier version, which did not have a field yet, has for it."""


def check_folder(config: Config, folder: Path) -> None:
    """Accept a folder that is new, empty, or holds a run with this very configuration.

    Raises:
        RigsaError: it holds another configuration (the differences are shown), or files but no configuration.
    """
    if not folder.exists() or (folder.is_dir() and not any(_counts(path.name) for path in folder.iterdir())):
        return
    path = folder / CONFIG_FILE
    if not path.exists():
        raise RigsaError(f"{folder} is not a run folder and not empty; choose another one with --out")
    saved, wanted = DEFAULTS | _read(path), config.record()
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        lines = [f"  --{flag(name)}: {saved.get(name)!r} there, {wanted.get(name)!r} now" for name in names]
        raise RigsaError(
            f"{folder} holds a run with another configuration; choose another folder with --out, or ask for the same:\n"
            + "\n".join(lines)
        )


def _counts(name: str) -> bool:
    """Whether a file of that name is neither the lock of the process that asks nor what a killed one left of a file."""
    return name != LOCK_FILE and not is_temporary(name)


def save(config: Config, folder: Path) -> None:
    """Write the configuration, unless the folder has it already (`check_folder`)."""
    if not (folder / CONFIG_FILE).exists():
        write_json(folder / CONFIG_FILE, config.record())


def load(folder: Path) -> Config:
    """The configuration of a run folder. Raises RigsaError where there is none or it does not fit this version."""
    if not folder.is_dir():
        raise RigsaError(f"{folder}: no such run folder")
    path = folder / CONFIG_FILE
    values = _read(path)
    if "method" not in values:
        raise RigsaError(f"{path} is not the configuration of a run: it names no method")
    name = values.pop("method")
    if not isinstance(name, str) or name not in METHODS:
        known = ", ".join(METHODS)
        raise RigsaError(f"{path} does not fit this version of rigsa: method: expected one of {known}, got {name!r}")
    try:
        return Config(method=METHODS[name], **values)
    except TypeError as error:
        raise RigsaError(f"{path} does not fit this version of rigsa: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise RigsaError(f"{path} is damaged (expected a JSON object, got {values!r}); delete its folder and run again")
    if values.get("method") == "imp" and values.get("density"):
        values["keep_fraction"] = 0.0  # earlier versions wrote one there, too, which they did not read
    return values
