"""One question put to many providers: build them, check them, race them, and record what came out.

Whole models are raced in heats: a few at a time beside the floor, freed before the next heat is built.
"""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.machine import Machine
from benchmarks.race import Contestant, Replay, UnavailableError, ratios, run_rounds
from benchmarks.shapes import BUDGET, ROUNDS

Builder = Callable[[], Contestant]


@dataclass
class Outcome:
    """What one race measured, by provider: seconds a round and further fields, or why there are none."""

    group: str
    floor: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


class Arena:
    """A device, its measured peaks, how long a race may take, and who is asked for (None: every provider)."""

    asked: Container[str] | None = None

    def __init__(self, device: torch.device, level: str, replay: Replay, rows: list[dict[str, Any]]) -> None:
        self.device, self.level = device, level
        self.machine = Machine(device)
        self.replay, self.rows = replay, rows

    def race(self, group: str, floor: str, builders: Mapping[str, Builder], at_once: int | None = None) -> Outcome:
        """Build and check every provider that is asked for, then let those that can run take turns.

        Args:
            group: the question, in words.
            floor: the provider among `builders` that the others stand beside; it always runs.
            builders: by provider.
            at_once: of the others, so many are held at a time; the floor is built and timed anew with each such heat,
                and ratios are taken within a heat. None: all of them.
        """
        outcome = Outcome(group, floor)
        others = [name for name in builders if name != floor and (self.asked is None or name in self.asked)]
        for names in heats(others, at_once):
            self._run_heat(outcome, {name: builders[name] for name in (floor, *names)})
            gc.collect()  # modules, hooks and optimisers refer to each other in circles
        return outcome

    def _run_heat(self, outcome: Outcome, builders: Mapping[str, Builder]) -> None:
        contestants: dict[str, Contestant] = {}
        for name, build in builders.items():
            try:
                contestants[name] = build()
                contestants[name].check()
            except Exception as failure:  # belongs to the test of this provider, not to its neighbours
                contestants.pop(name, None)
                outcome.failures[name] = forget_locals(failure)
        seconds = run_rounds(contestants, self.machine.stopwatch, BUDGET[self.level], ROUNDS[self.level])
        for name, contestant in contestants.items():
            outcome.seconds[name] = outcome.seconds.get(name, []) + seconds[name]
            beside = outcome.seconds[name] if name == outcome.floor else seconds.get(outcome.floor)
            outcome.info[name] = describe(contestant, outcome.seconds[name], beside)

    def record(self, outcome: Outcome, provider: str, benchmark: Any) -> None:
        """Give one provider's times to pytest-benchmark; skip, or fail, where there are none."""
        failure = outcome.failures.get(provider)
        if isinstance(failure, UnavailableError):
            pytest.skip(str(failure))
        if failure is not None:
            raise failure
        benchmark.group = outcome.group
        benchmark.extra_info |= {"provider": provider, "floor": outcome.floor, **outcome.info[provider]}
        self.replay.into(benchmark, outcome.seconds[provider])
        if benchmark.enabled:
            self.rows.append(benchmark.stats.as_dict(include_data=False))


def heats(contenders: Sequence[str], at_once: int | None) -> list[Sequence[str]]:
    """`contenders` in their order, at most `at_once` in each part; one empty part where there are none."""
    size = at_once or max(len(contenders), 1)
    return [contenders[start : start + size] for start in range(0, max(len(contenders), 1), size)]


def forget_locals(failure: Exception) -> Exception:
    """The same with its traceback, whose frames would keep a whole model alive until the failure is reported."""
    link: BaseException | None = failure
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return failure


def describe(contestant: Contestant, seconds: list[float], floor: list[float] | None) -> dict[str, Any]:
    """The fields that stand in ``extra_info`` beside pytest-benchmark's own statistics."""
    median = statistics.median(seconds)
    fields = dict(contestant.info)
    if floor is not None:
        to_floor = ratios(seconds, floor)
        q1, fields["ratio"], q3 = statistics.quantiles(to_floor, n=4)
        fields["ratio_quartiles"] = [q1, q3]
    if contestant.tokens is not None:
        fields["tokens_per_second"] = contestant.tokens / median
    if contestant.bytes is not None:
        fields["gb_per_second"] = contestant.bytes / median / 1e9
    if contestant.least is not None:
        fields["least_seconds"] = contestant.least
        fields["roofline_share"] = contestant.least / median
    return fields
