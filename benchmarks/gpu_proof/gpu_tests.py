"""The tests marked gpu; every outcome is written as it comes, with the message of a failure."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import ROOT, Setting, cores
from benchmarks.race import UnavailableError

MARK = "mark.gpu"
LONGEST_MESSAGE = 3000


class Rows:
    """A plugin of pytest: one row for each test that ran."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report)

    def _add(self, report: Any) -> None:
        row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
        if report.skipped:
            row["skipped"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        else:
            row["ok"] = report.passed
        if report.failed:
            row["error"] = str(report.longreprtext)[-LONGEST_MESSAGE:]
        self._journal.row(**row)


def run(setting: Setting, journal: Journal) -> None:
    try:
        import pytest
    except ImportError as error:
        raise UnavailableError(f"pytest: {error}; pip install 'rigsa[test]'") from error
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text())
    os.environ["OMP_NUM_THREADS"] = "1"  # of each worker: the truth in float64 is computed on the CPU
    side_by_side = importlib.util.find_spec("xdist") is not None and not setting.dry
    parallel = ["-n", str(max(2, cores() // 3))] if side_by_side else []
    options = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *parallel]
    code = pytest.main([*options, *files], plugins=[Rows(journal)])
    journal.note(exit_code=int(code))
