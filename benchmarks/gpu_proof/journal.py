"""What a section has found so far: a JSON file that is whole after every row."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.race import UnavailableError
from rigsa.files import read_json, write_json

RUNNING, DONE, FAILED, SKIPPED, CUT_OFF = "running", "done", "failed", "skipped", "cut off"


class Journal:
    """The file FOLDER/SECTION.json.

    It holds the section's name, its status, its seconds (and those of the CPU, its children's included) and a list of
    rows, each a flat dictionary. Common fields of rows:

    - ``ok``: whether what was checked is right.
    - ``error``: why something could not be measured or is wrong.
    - ``skipped``: why it cannot run here.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self._start = time.monotonic()
        self.record: dict[str, Any] = {"section": name, "status": RUNNING, "seconds": 0.0, "rows": []}
        self._write()

    def row(self, **fields: Any) -> None:
        """Add one row and write the file."""
        self.record["rows"].append(fields)
        self._write()

    def note(self, **fields: Any) -> None:
        """Set fields that belong to the section as a whole, and write the file."""
        self.record |= fields
        self._write()

    @contextmanager
    def guarded(self, **fields: Any) -> Iterator[dict[str, Any]]:
        """One row that fails alone: what is put into the dictionary it gives becomes the row, with `fields` before it.

        An exception becomes the row's ``error``; `UnavailableError`, and too little memory, its ``skipped``.
        """

        found: dict[str, Any] = {}
        try:
            yield found
        except UnavailableError as reason:
            found["skipped"] = str(reason)
        except torch.OutOfMemoryError as reason:
            found["skipped"] = describe_error(reason)
        except Exception as error:
            found |= {"ok": False, "error": describe_error(error)}
        self.row(**fields, **found)

    def close(self, status: str, reason: str = "") -> None:
        self.record |= {"status": status, "cpu_seconds": round(sum(os.times()[:4]), 1)}
        if reason:
            self.record["reason"] = reason
        self._write()

    def _write(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self.path, self.record)


def describe_error(error: BaseException) -> str:
    """Type and message, short enough for a table of rows."""
    return f"{type(error).__name__}: {error}"[:2000]


def read(folder: Path, name: str) -> dict[str, Any]:
    """The record of a section; empty where it has not been started."""
    path = folder / f"{name}.json"
    return read_json(path) if path.exists() else {}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read(folder, name).get("rows", []))


def forget(folder: Path, name: str) -> None:
    """What an earlier command has left."""
    (folder / f"{name}.json").unlink(missing_ok=True)


def end(folder: Path, name: str, status: str, reason: str) -> None:
    """Close the file of a section that cannot do so itself; its rows stay."""
    record = read(folder, name) or {"section": name, "seconds": 0.0, "rows": []}
    write_json(folder / f"{name}.json", record | {"status": status, "reason": reason})
