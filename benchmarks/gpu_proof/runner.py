"""A process for each section: started together within a stage, killed at its budget, and none takes the next along.

Sections fork from a server that has imported PyTorch and transformers once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from benchmarks.gpu_proof import journal
from benchmarks.gpu_proof.child import run_section
from benchmarks.gpu_proof.processes import fork_server
from benchmarks.gpu_proof.schedule import DRY_PATIENCE, LEAST, Section, Stage
from benchmarks.gpu_proof.setting import Setting

PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "benchmarks.gpu_proof.child"]
POLL = 0.05


def run_stages(stages: Iterable[Stage], setting: Setting, say: Callable[[str], object] = print) -> None:
    """Run every stage until `setting.deadline`; a section for which no time is left is skipped with that reason."""
    context = fork_server(PRELOADED)
    for stage in stages:
        _run_stage(context, stage, setting)
        for section in stage:
            say(_line(setting, section))


def _run_stage(context: BaseContext, stage: Stage, setting: Setting) -> None:
    running: list[_Running] = []
    try:
        for section in stage:
            journal.forget(setting.out, section.name)
            if setting.left < LEAST:
                journal.end(setting.out, section.name, journal.SKIPPED, "no time was left for it")
            else:
                running.append(_start(context, section, setting))
        while running:
            time.sleep(POLL)
            for entry in [entry for entry in running if entry.is_over]:
                running.remove(entry)
                _finish(entry, setting)
    finally:
        for entry in running:  # somebody has interrupted the command
            _finish(entry, setting)


@dataclass(frozen=True)
class _Running:
    section: Section
    process: BaseProcess
    allowed: float
    deadline: float

    @property
    def is_over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() > self.deadline


def _start(context: BaseContext, section: Section, setting: Setting) -> _Running:
    allowed = min(budget(section, setting), setting.left)
    deadline = time.monotonic() + allowed
    process = context.Process(target=run_section, args=(section, replace(setting, deadline=deadline)))  # type: ignore[attr-defined]
    process.start()
    return _Running(section, process, allowed, deadline)


def budget(section: Section, setting: Setting) -> float:
    return section.budget * (DRY_PATIENCE if setting.dry else 1)


def _finish(entry: _Running, setting: Setting) -> None:
    """End the process with everything that it has started, and its file, if it could not do so itself."""
    name, process, cut_off = entry.section.name, entry.process, entry.process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    if journal.read(setting.out, name).get("status", journal.RUNNING) != journal.RUNNING:
        return
    if cut_off:
        journal.end(setting.out, name, journal.CUT_OFF, f"killed after {entry.allowed:.0f} s")
    else:
        journal.end(setting.out, name, journal.FAILED, f"the process ended with code {process.exitcode}")


def _line(setting: Setting, section: Section) -> str:
    record = journal.read(setting.out, section.name)
    wrong = sum(row.get("ok") is False for row in record["rows"])
    reason = f": {record['reason'].strip().splitlines()[-1]}" if "reason" in record else ""
    rows = f"{len(record['rows'])} rows" + (f", {wrong} of them wrong" if wrong else "")
    return f"{section.name}: {record['status']} after {record['seconds']:g} s, {rows}{reason}"
