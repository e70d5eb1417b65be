"""``pytest benchmarks [--level smoke|core|full] [--record FOLDER] [--compare FILE] [-k EXPRESSION]``.

What pytest does not select is not run either: of a race, the providers that are selected and the floor.

The times, their statistics and the JSON are pytest-benchmark's (``--benchmark-*`` options work, and
``--benchmark-verbose`` prints its table too); what is added stands in each benchmark's ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.arena import Arena
from benchmarks.compare import RULE, THRESHOLD, Comparison, RecordError, check_common, compare, read_record
from benchmarks.race import Replay
from benchmarks.report import tables, write_report
from benchmarks.shapes import LEVELS

REPLAY = Replay()
ROWS = pytest.StashKey[list[dict[str, Any]]]()
STORED = pytest.StashKey[list[Mapping[str, Any]]]()
COMPARED = pytest.StashKey[Comparison]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of rigsa")
    group.addoption("--level", choices=LEVELS, default="smoke", help="how much is asked (default: smoke)")
    group.addoption("--record", type=Path, metavar="FOLDER", help="write results.json, tables.md and plots there")
    group.addoption(
        "--compare",
        type=Path,
        metavar="FILE",
        help=f"a results.json: fail where a ratio to the floor is over {THRESHOLD:g} times its ratio, and not by noise",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True
    if config.option.record:
        config.option.record.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = config.option.record / "results.json"
    if config.option.compare:
        try:
            config.stash[STORED] = read_record(config.option.compare)
        except RecordError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's questions at this level; all providers of one are neighbours, so its race runs once."""
    if "question" in metafunc.fixturenames:
        questions = metafunc.module.questions(metafunc.config.option.level)
        metafunc.parametrize("question", questions, ids=str, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "arena" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY.clock))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Nothing in common is said before anything is measured."""
    if STORED in session.config.stash:
        try:
            names = (item.nodeid for item in session.items)
            check_common(session.config.stash[STORED], names, session.config.option.compare)
        except RecordError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Arena:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Arena(device, pytestconfig.option.level, REPLAY, pytestconfig.stash[ROWS])


@pytest.fixture(scope="module", autouse=True)
def _asked(request: pytest.FixtureRequest, arena: Arena) -> None:
    """Which providers of this module pytest has selected; None where its tests do not name them."""
    tests = (item for item in request.session.items if item.path == request.path)
    parameters = [
        test.callspec.params for test in tests if isinstance(test, pytest.Function) and hasattr(test, "callspec")
    ]
    arena.asked = {given["provider"] for given in parameters if "provider" in given} or None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from benchmarks.machine import Machine

    machine_info |= Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")).info()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config, rows = session.config, session.config.stash[ROWS]
    if config.option.record and rows:
        write_report(rows, config.option.record)
    if STORED in config.stash:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config.stash[COMPARED] = compare(config.stash[STORED], rows, device)
        if not config.stash[COMPARED].passed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.ensure_newline()
    terminalreporter.write_line(tables(config.stash[ROWS]))
    if COMPARED in config.stash:
        compared = config.stash[COMPARED]
        terminalreporter.section(f"{compared.summary} against {config.option.compare}")
        terminalreporter.write_line(RULE)
        for line in compared.worse:
            terminalreporter.write_line(line, red=True)
