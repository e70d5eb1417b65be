"""Files that are whole or absent: written to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError

DONE = "done"
"""The empty file that marks a folder's step as finished; always written last."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)``, then rename to `path`. Nothing is left behind, and nothing old lost, on failure.

    Raises:
        RigsaError: the file could not be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RigsaError(
            f"cannot write {path}: {error.strerror or error}. What was saved before is untouched."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # or it would hide the error that is known already
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises RigsaError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RigsaError(f"{path} is missing, so this is not a complete run folder") from error
    except ValueError as error:
        raise RigsaError(f"{path} is damaged (not JSON: {error}); delete it and run again") from error


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def mark_done(folder: Path) -> None:
    write_text(folder / DONE, "")
