"""What a section's process does: run it, and close its file whatever happens."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import torch

from benchmarks.gpu_proof.journal import DONE, FAILED, SKIPPED, Journal
from benchmarks.gpu_proof.schedule import Section
from benchmarks.gpu_proof.setting import Setting
from benchmarks.race import UnavailableError

LONGEST_TRACEBACK = 4000


def run_section(section: Section, setting: Setting) -> None:
    """In a process group of its own, so that what it starts ends with it; what it prints goes to FOLDER/SECTION.log."""
    os.setsid()
    _print_to(setting.out / f"{section.name}.log")
    journal = Journal(setting.out, section.name)
    if setting.dry:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of what it starts
    try:
        importlib.import_module(section.module).run(setting, journal, **section.options)
    except UnavailableError as reason:
        journal.close(SKIPPED, str(reason))
    except BaseException:
        journal.close(FAILED, traceback.format_exc()[-LONGEST_TRACEBACK:])
        traceback.print_exc()
    else:
        journal.close(DONE)
    sys.stdout.flush()
    sys.stderr.flush()


def _print_to(path: os.PathLike[str]) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
