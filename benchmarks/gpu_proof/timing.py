"""How long the device takes for something, and how long the host takes to ask for it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.gpu_proof.setting import Setting
from benchmarks.race import Run

CYCLES_PER_SECOND = 2e9
"""More than any GPU of today makes, so that a pause is not too short for the host."""
SHORTEST_PAUSE = 5e-4


@dataclass(frozen=True)
class Times:
    """Seconds: medians over the repeats."""

    device: float
    host: float


class Clock:
    """Times single operations.

    On a GPU the L2 cache is emptied before each, and the queue is held until the host has launched everything, so that
    the device's time holds no waiting for the host. On a CPU both times are the wall clock's.
    """

    def __init__(self, setting: Setting) -> None:
        self._flushed = None
        if setting.device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(setting.device).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.int8, device=setting.device)

    def __call__(self, run: Run, repeats: int = 15) -> Times:
        if self._flushed is None:
            seconds = self._wall(run)
            return Times(seconds, seconds)
        run()
        torch.cuda.synchronize()
        pause = max(SHORTEST_PAUSE, 2 * self._wall(run))
        measured = [self._once(run, pause) for _ in range(repeats)]
        return Times(*(statistics.median(column) for column in zip(*measured, strict=True)))

    @staticmethod
    def _wall(run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _once(self, run: Run, pause: float) -> tuple[float, float]:
        assert self._flushed is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flushed.zero_()
        torch.cuda._sleep(int(pause * CYCLES_PER_SECOND))
        begin.record()
        host = self._wall(run)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host


def wall_of_many(run: Run, setting: Setting, count: int, repeats: int = 5) -> float:
    """Seconds of one of `count` calls in a row: of the host, where that takes longer than the device."""
    run()
    setting.synchronize()
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            run()
        rounds.append((time.perf_counter() - start) / count)
        setting.synchronize()
    return statistics.median(rounds)
