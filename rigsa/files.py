"""Files that are whole or absent: written to a temporary name in the same folder, then renamed. And how to read one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError

DONE = "done"
"""The file that marks a folder's step as finished; always written last. It names files of the folder by their hash."""
LARGEST_JSON = 2**26
"""Bytes. Nothing that rigsa writes as JSON comes near it."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)``, then rename to `path`. Nothing is left behind, and nothing old lost, on failure.

    A symbolic link stays one: the file that it points to is replaced.

    Raises:
        RigsaError: the file could not be written (no space, no permission), or `path` is there and no regular file. A
            device or a pipe is never replaced.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise RigsaError(f"cannot write {path}: expected a regular file or none there, got {kind_of(target)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(temporary_name())
        write(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise RigsaError(f"cannot write {path}: {reason_of(error)}. What was saved before is untouched.") from error
    finally:
        if temporary is not None:
            _remove_quietly(temporary)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_folder)``, then rename to `path`. Nothing is left behind on failure.

    Raises:
        RigsaError: `path` is there already, or something could not be written.
    """
    temporary = path.with_name(temporary_name())
    try:
        if path.exists() or path.is_symlink():
            raise RigsaError(f"cannot write {path}: expected nothing there, got a file or folder")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this number and was killed
        temporary.mkdir(parents=True)
        write(temporary)
        os.rename(temporary, path)
    except OSError as error:
        raise RigsaError(f"cannot write {path}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name() -> str:
    """Its length does not depend on the file's, and two processes that write one file do not share it."""
    return f".{os.getpid()}.part"


def is_temporary(name: str) -> bool:
    """Whether a process that was killed may have left a file of that name."""
    return name.startswith(".") and name.endswith(".part")


def remove_temporaries(folder: Path) -> None:
    """What processes that were killed have left in `folder` and below. None may be writing there."""
    for path in folder.rglob(".*.part"):
        if path.is_file():
            _remove_quietly(path)


def _remove_quietly(path: Path) -> None:
    """The error that matters is on its way; this one would hide it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def reason_of(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def kind_of(path: Path) -> str:
    """``a folder``, ``a device``, ... in words."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def require_regular(path: Path) -> None:
    """Raises RigsaError where `path` is missing or no regular file: to open a pipe would wait for ever."""
    try:
        if not path.exists():
            raise RigsaError(f"{path} is missing")
        if not path.is_file():
            raise RigsaError(f"{path}: expected a regular file, got {kind_of(path)}")
    except (OSError, ValueError) as error:
        raise RigsaError(f"{path} cannot be read ({error})") from error


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """A RigsaError that is raised inside begins with the option that named the file."""
    try:
        yield
    except RigsaError as error:
        raise RigsaError(f"{option}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """UTF-8. What that cannot hold, as half a character from a file's name, is written as an escape."""
    data = text.encode("utf-8", errors="backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """Raises RigsaError where the file is missing, no regular file, larger than `largest` bytes, or not UTF-8."""
    require_regular(path)
    try:
        if path.stat().st_size > largest:
            raise RigsaError(f"{path} is damaged (expected at most {largest} bytes, got {path.stat().st_size})")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RigsaError(f"{path} cannot be read ({error})") from error


def parse_json(text: str, place: str) -> Any:
    """Raises RigsaError where `text` is not JSON, naming `place`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RigsaError(f"{place} is damaged (not JSON: {error}); delete it and run again") from error


def read_json(path: Path) -> Any:
    """Raises RigsaError where the file is missing or not JSON."""
    if not path.exists():
        raise RigsaError(f"{path} is missing, so this is not a complete run folder")
    return parse_json(read_text(path), str(path))


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def mark_done(folder: Path, names: Iterable[str] = ()) -> None:
    """Write the marker of a finished folder. It holds the hash of each file of it that `names` lists and is there."""
    hashes = {name: content_hash(folder / name) for name in sorted(names) if (folder / name).is_file()}
    write_json(folder / DONE, hashes)


def marked_hashes(folder: Path) -> dict[str, str]:
    """What `mark_done` wrote: name to hash. Raises RigsaError where the marker is missing or not that."""
    hashes = read_json(folder / DONE)
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise RigsaError(f"{folder / DONE} is damaged (expected names and hashes); delete {folder} and run again")
    return hashes


def first_damage(folder: Path) -> str | None:
    """Why a marked folder is not as it was when it was marked, in words; None where it is."""
    try:
        hashes = marked_hashes(folder)
        for name, expected in hashes.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if content_hash(folder / name) != expected:
                return f"{name} has changed since it was written"
    except (RigsaError, OSError, ValueError) as error:
        return str(error)
    return None
