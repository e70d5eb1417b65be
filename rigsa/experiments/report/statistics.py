"""Several seeds: means with t intervals, paired comparisons, and which runs share a setting. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rigsa.experiments.config import OPTIONS, Config, Method
from rigsa.experiments.methods.registry import METHODS

CONFIDENCE = 0.95
MEASURING = ("drift", "drift_prompts", "source_tasks", "data_dir", "limit")
"""Fields that say what is measured: they change no trained number, so they do not part settings."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values and half the width of its 95 % t interval; none from one value."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """The mean difference over `difference.n` common seeds and the two-sided p of the paired t test; none below two."""

    difference: Estimate
    p: float | None


@dataclass(frozen=True)
class Group:
    """Configurations that differ in nothing but the seed: positions in the given list, by seed."""

    label: str
    members: tuple[int, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of Student's t with ``len(values) - 1`` degrees of freedom. Raises ValueError for none."""
    n = len(values)
    if n == 0:
        raise ValueError("values: expected at least one, got none")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * _standard_error(values), n)


def compare(values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """`values` minus `reference`, both seed to value, over the seeds they share; None where they share none."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    difference = estimate(differences)
    if difference.n == 1:
        return Comparison(difference, None)
    error = _standard_error(differences)
    if error == 0:  # the statistic is 0/0 or infinite
        return Comparison(difference, 1.0 if difference.mean == 0 else 0.0)
    return Comparison(difference, float(2 * stats.t.sf(abs(difference.mean) / error, difference.n - 1)))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats: none is at least as high in both numbers and higher in one."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] >= other[0] and one[1] >= other[1]

    return [index for index, point in enumerate(points) if not any(beats(other, point) for other in points)]


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def group(
    configs: Sequence[Config], joined: Collection[str] = (), tickets: Sequence[Config | None] | None = None
) -> list[Group]:
    """Settings in the order of `METHODS`, then of the values they differ in.

    A label is the method and, where it has several settings, what they differ in: ``lora (rank 8)``.

    Args:
        configs: of the runs.
        joined: fields whose values part no settings either, but only whether they have one. Runs that are matched to
            others' tickets are then parted as those others are; where another run is not known, by its folder's name.
        tickets: of each run that is matched to another's ticket, the configuration of that other run; None where it is
            not known, so that the name of its folder has to tell.
    """
    members: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    tickets = [None] * len(configs) if tickets is None else tickets
    for index, (config, ticket, name) in enumerate(zip(configs, tickets, _matched(configs, tickets), strict=True)):
        members.setdefault(tuple(_setting(config, joined, name, ticket).items()), []).append(index)
    found = []
    for key, indices in members.items():
        setting = dict(key)
        alike = [dict(other) for other in members if dict(other)["method"] == setting["method"]]
        differing = {
            name: value for name, value in setting.items() if len({other[name] for other in alike if name in other}) > 1
        }
        order = (list(METHODS).index(setting["method"].name), tuple(differing.values()))
        seeds = tuple(sorted(indices, key=lambda index: configs[index].seed))
        found.append((order, Group(_label(setting["method"], differing), seeds)))
    return [one for _, one in sorted(found, key=lambda item: item[0])]


def _matched(configs: Sequence[Config], tickets: Sequence[Config | None]) -> list[str]:
    """What each run is matched to: one name for all runs that differ in nothing but the seed."""
    names: dict[tuple[tuple[str, Any], ...], str] = {}
    found = []
    for config, ticket in zip(configs, tickets, strict=True):
        name = re.sub(r"[-_.]?seed[-_=]?\d+", "", config.match)
        if ticket is not None:
            name = config.match if name in names.values() else name
            name = names.setdefault(tuple(_setting(ticket, (), "").items()), name)
        found.append(name)
    return found


def _setting(config: Config, joined: Collection[str], matched: str, ticket: Config | None = None) -> dict[str, Any]:
    """The method and the fields that it reads, without the seed, and with `matched` for the run it is matched to.

    Where ``match`` is among the joined fields, the setting of that run, `ticket`, takes the place of its name.
    """
    names = [name for name in OPTIONS if config.method.reads(name) and name not in ("seed", *MEASURING)]
    values = {name: getattr(config, name) for name in names}
    setting = {name: bool(value) if name in joined else value for name, value in values.items()}
    if "match" in setting:
        setting["match"] = matched
    if "match" in joined and ticket is not None:
        its = _setting(ticket, joined, "")
        setting |= {"match": "a ticket"} | {f"matched {name}": value for name, value in its.items() if name != "method"}
    return {"method": config.method} | setting


def _label(method: Method, differing: Mapping[str, Any]) -> str:
    parts = [f"{name.replace('_', ' ')} {_shown(name, value)}" for name, value in differing.items()]
    return f"{method} ({', '.join(parts)})" if parts else method.name


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name or "none" if name == "match" else str(value) or "none"
