"""One question put to many providers: build them, check them, race them, and record what came out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
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
    """A device, its measured peaks, and how long a race may take."""

    def __init__(self, device: torch.device, level: str, replay: Replay, rows: list[dict[str, Any]]) -> None:
        self.device, self.level = device, level
        self.machine = Machine(device)
        self.replay, self.rows = replay, rows

    def race(self, group: str, floor: str, builders: Mapping[str, Builder]) -> Outcome:
        """Build and check every provider, then let those that can run take turns. The first is the floor."""
        outcome, contestants = Outcome(group, floor), {}
        for name, build in builders.items():
            try:
                contestants[name] = build()
                contestants[name].check()
            except Exception as failure:  # belongs to the test of this provider, not to its neighbours
                contestants.pop(name, None)
                outcome.failures[name] = failure
        outcome.seconds = run_rounds(contestants, self.machine.stopwatch, BUDGET[self.level], ROUNDS[self.level])
        for name, contestant in contestants.items():
            outcome.info[name] = describe(contestant, outcome.seconds[name], outcome.seconds.get(floor))
        return outcome

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
        fields["roofline_share"] = contestant.least / median
    return fields
