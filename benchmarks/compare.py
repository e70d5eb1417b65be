"""Two runs, by ratios to the floor: seconds differ between machines and hours, ratios within one run hardly do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

THRESHOLD = 1.15
"""A ratio that grew by no more than this factor is no regression."""
SHORTEST = 1e-3
"""Seconds. Where a provider or its floor takes less on a CPU, a neighbour who preempts the longer of the two decides
their ratio: such a benchmark is not judged."""

RULE = (
    f"flagged: more than {THRESHOLD:g} times the stored ratio to the floor, and the quartiles of the two ratios do not "
    f"overlap. Each ratio is to the floor of its own run. Not judged on a CPU: where either takes under "
    f"{SHORTEST * 1e3:g} ms"
)


class RecordError(Exception):
    """A file that cannot be compared with."""


@dataclass(frozen=True)
class Comparison:
    """How many benchmarks of both runs were judged, how many were too short, and a line for each that became slower."""

    judged: int
    too_short: int
    worse: list[str]

    @property
    def summary(self) -> str:
        if not self.judged:
            return f"nothing was judged ({self.too_short} benchmarks were too short)"
        return f"{len(self.worse)} regressions among {self.judged} benchmarks ({self.too_short} too short to judge)"

    @property
    def passed(self) -> bool:
        return self.judged > 0 and not self.worse


def read_record(file: Path) -> list[Row]:
    """The benchmarks of a results.json. Raises RecordError where it is none."""
    try:
        return json.loads(file.read_text())["benchmarks"]
    except OSError as error:
        raise RecordError(f"--compare {file}: {error.strerror}; expected a results.json of --record") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"--compare {file}: not a record of pytest-benchmark; expected one of --record") from error


def check_common(stored: Iterable[Row], names: Iterable[str], file: Path) -> None:
    """Raises RecordError where none of the benchmarks about to run, by full name, is in the record."""
    found, wanted = {row["fullname"] for row in stored}, set(names)
    if not found & wanted:
        raise RecordError(
            f"--compare {file}: none of its {len(found)} benchmarks is among the {len(wanted)} to run; expected a "
            "record of the same files and --level"
        )


def compare(before: Iterable[Row], now: Iterable[Row], device: str) -> Comparison:
    """The benchmarks of both runs, the floors aside, by `RULE`.

    Args:
        before, now: benchmarks as pytest-benchmark stores them.
        device: "cpu" or "cuda", of both.
    """
    old = {row["fullname"]: row for row in before if _has_ratio(row)}
    pairs = [(old[row["fullname"]], row) for row in now if _has_ratio(row) and row["fullname"] in old]
    long = [pair for pair in pairs if device != "cpu" or min(map(_shorter, pair)) >= SHORTEST]
    worse = [_line(was["extra_info"], own) for was, own in long if _is_worse(was["extra_info"], own["extra_info"])]
    return Comparison(len(long), len(pairs) - len(long), worse)


def _has_ratio(row: Row) -> bool:
    info = row["extra_info"]
    return "ratio" in info and info["provider"] != info["floor"]


def _shorter(row: Row) -> float:
    """Median seconds of the provider or of its floor."""
    return row["stats"]["median"] / max(row["extra_info"]["ratio"], 1.0)


def _is_worse(was: Row, own: Row) -> bool:
    apart = own["ratio_quartiles"][0] > was["ratio_quartiles"][1]
    return apart and own["ratio"] > THRESHOLD * was["ratio"]


def _line(was: Row, row: Row) -> str:
    return f"{row['fullname']}: {_ratio(row['extra_info'])} of the floor, was {_ratio(was)}"


def _ratio(info: Row) -> str:
    low, high = info["ratio_quartiles"]
    return f"{info['ratio']:.3f} ({low:.3f} to {high:.3f})"
