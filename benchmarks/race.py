"""Providers take turns at one question, so that a noisy neighbour hits all of them alike.

A round runs every provider once, forwards and backwards in turn. The ratio to the floor is taken within a round, and
its median over the rounds is what to read: it moves much less than the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], object]


class UnavailableError(Exception):
    """A provider cannot run here; says why."""


@dataclass
class Contestant:
    """One provider, built and ready.

    Attributes:
        run: what is timed.
        check: raises AssertionError where the result is wrong; runs before anything is timed. (A builder may also do
            so itself, where the state that it checks is gone once it is ready.)
        prepare: runs before each `run`, untimed.
        least: seconds that the machine would need at its measured peaks.
        bytes: that `run` has to move.
        tokens: that `run` takes or makes.
        info: further fields of the record.
    """

    run: Run
    check: Run = lambda: None
    prepare: Run = lambda: None
    least: float | None = None
    bytes: int | None = None
    tokens: int | None = None
    info: dict[str, Any] = field(default_factory=dict)


class Stopwatch:
    """Seconds of one call: CUDA events after a flush of the L2 cache on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, run: Run) -> float:
        if self._flushed is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def run_rounds(
    contestants: Mapping[str, Contestant], stopwatch: Stopwatch, budget: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds of each contestant, one a round; as many rounds as `budget` seconds hold, within the limits `rounds`."""

    def once(name: str) -> float:
        contestants[name].prepare()
        return stopwatch(contestants[name].run)

    names = list(contestants)
    for name in names:  # warms up
        once(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    done = spent = 0.0
    while done < rounds[0] or (done < rounds[1] and spent < budget):
        for name in names:
            seconds[name].append(once(name))
            spent += seconds[name][-1]
        names.reverse()
        done += 1
    return seconds


def ratios(seconds: list[float], floor: list[float]) -> list[float]:
    """To the floor, round by round."""
    return [own / other for own, other in zip(seconds, floor, strict=True)]


class Replay:
    """The clock of pytest-benchmark here: it moves by what a race measured, and not otherwise.

    pytest-benchmark times one test after the other; a race has timed all of its providers when the first of their tests
    begins. This hands the times over through its public interface, for its statistics and its JSON.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def into(self, benchmark: Any, seconds: list[float]) -> None:
        left = iter(seconds)

        def advance() -> None:
            self._now += next(left)

        benchmark.pedantic(advance, rounds=len(seconds))
