"""One process at a time on a folder: a lock that dies with the process that holds it.

The lock is ``flock`` on an open file, so the system lets go of it however the process ends. Across machines it holds
where the file system passes such locks on: NFS from version 3 with its lock daemon, Lustre mounted with ``flock``,
CephFS and GPFS do. A file system without locks is an error, one that keeps them to each machine cannot be told apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rigsa.errors import RigsaError
from rigsa.files import kind_of, reason_of

LOCK_FILE = ".lock"


class InUseError(RigsaError):
    """Another process has the folder."""


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[BinaryIO | None]:
    """`path` open to append, for this process and those it starts alone; None where another has it and `wait` is off.

    Folders on the way are made.

    Raises:
        RigsaError: the file cannot be written, or the file system has no locks.
    """
    file = _open_locked(path, wait)
    if file is None:
        yield None
        return
    with file:
        yield file


def _open_locked(path: Path, wait: bool) -> BinaryIO | None:
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise RigsaError(
                f"{path} cannot be locked ({reason_of(error)}); choose an --out on a file system with locks"
            ) from error
        if _is_still(path, file):
            return file
        file.close()  # who had it before has removed it, and another process may have a new one


def _open(path: Path, attempts: int = 100) -> BinaryIO:
    """To append. Another process may remove the folder between two steps of this: then they are tried again."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab")
        except OSError as error:
            attempts -= 1
            if attempts == 0 or not isinstance(error, (FileExistsError, FileNotFoundError)):
                raise RigsaError(f"cannot write {path}: {reason_of(error)}") from error


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Inside, no other process that asks for it has `folder`. Leaves nothing behind: no lock, no folder that is empty.

    Raises:
        RigsaError: another process has it (which one is named), or the folder cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise RigsaError(f"{folder}: expected a folder, got {kind_of(folder)}; choose another --out")
    except OSError as error:
        raise RigsaError(f"cannot write {folder}: {reason_of(error)}") from error
    made, path = first_missing(folder), folder / LOCK_FILE
    with locked(path) as file:
        if file is None:
            raise InUseError(
                f"{folder} is in use by {_holder(path)}; wait until that has ended, or choose another --out"
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode(errors="replace"))
            file.flush()
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held, so that nobody else's is removed
                _remove_empty(folder, made)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def first_missing(folder: Path) -> Path | None:
    """The topmost folder that would have to be made for `folder`; None where that is there."""
    missing = None
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            break
        missing = path
    return missing


def _remove_empty(folder: Path, made: Path | None) -> None:
    """`folder` and those above it up to `made`, as long as they are empty."""
    if made is None:
        return
    for path in (folder, *folder.parents):
        path.rmdir()  # refuses a folder that holds something
        if path == made:
            return
