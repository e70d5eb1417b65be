"""Cases handed to several processes, one at a time, so that Triton compiles for many of them at once.

The processes share Triton's cache on disk. One that crashes, or whose CUDA context is lost, takes its case along and is
replaced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.gpu_proof.journal import Journal, describe_error
from benchmarks.gpu_proof.processes import forks

Check = Callable[[Any], dict[str, Any]]
_BROKEN = "lost"


def spread(check: Check, cases: Iterable[Any], count: int, journal: Journal) -> None:
    """Write a row for each case (a dataclass): its fields, and what `check` found; `count` processes take turns.

    They are forked where this process has not touched CUDA.
    """
    context = forks()
    waiting, busy = deque(cases), dict[Connection, tuple[BaseProcess, Any]]()
    while waiting or busy:
        while waiting and len(busy) < count:
            connection, process = _start(context, check)
            _hand(connection, process, waiting.popleft(), busy)
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            process, case = busy.pop(ready)
            found = _answer(ready, process)
            lost = found.pop(_BROKEN, False)
            journal.row(**{name: str(value) for name, value in asdict(case).items()}, **found)
            if not lost and waiting:
                _hand(ready, process, waiting.popleft(), busy)
            else:
                _stop(ready, process, lost)


def _start(context: BaseContext, check: Check) -> tuple[Connection, BaseProcess]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(check, theirs))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return ours, process


def _hand(
    connection: Connection, process: BaseProcess, case: Any, busy: dict[Connection, tuple[BaseProcess, Any]]
) -> None:
    connection.send(case)
    busy[connection] = process, case


def _stop(connection: Connection, process: BaseProcess, lost: bool) -> None:
    if not lost:
        connection.send(None)
    process.join()
    connection.close()


def _answer(connection: Connection, process: BaseProcess) -> dict[str, Any]:
    try:
        return dict(connection.recv())
    except EOFError:
        process.join()
        return {"ok": False, "error": f"the process ended with code {process.exitcode}", _BROKEN: True}


def _work(check: Check, connection: Connection) -> None:
    for case in iter(connection.recv, None):
        try:
            found = check(case)
        except torch.OutOfMemoryError as error:
            found = {"skipped": describe_error(error), _BROKEN: True}
        except Exception as error:
            found = {"ok": False, "error": describe_error(error), _BROKEN: "CUDA" in str(error)}
        connection.send(found)
        if found.get(_BROKEN):
            return
