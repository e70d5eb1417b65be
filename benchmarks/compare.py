"""Two runs, by ratios to the floor: seconds differ between machines and hours, ratios within one run hardly do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

THRESHOLD = 1.15
"""A ratio that grew by more than this factor is a regression, if its middle half also lies above the old one's."""


def regressions(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each benchmark of both runs that became slower beside its floor.

    Args:
        before, now: benchmarks as pytest-benchmark stores them.

    Raises:
        ValueError: the runs have no benchmark in common, so nothing was compared.
    """
    old = {bench["fullname"]: bench["extra_info"] for bench in before if "ratio" in bench["extra_info"]}
    pairs = [(bench["fullname"], old[bench["fullname"]], bench["extra_info"]) for bench in now if _has(bench, old)]
    if not pairs:
        raise ValueError("compare: expected a run of the same benchmarks, got none in common")
    worse = [(name, was["ratio"], own["ratio"]) for name, was, own in pairs if _worse(was, own)]
    return [f"{name}: {now:.3f} of the floor, was {then:.3f}" for name, then, now in worse]


def _has(bench: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return "ratio" in bench["extra_info"] and bench["fullname"] in old


def _worse(was: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    apart = own["ratio_quartiles"][0] > was["ratio_quartiles"][1]
    return own["ratio"] > THRESHOLD * was["ratio"] and apart
