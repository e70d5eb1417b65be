"""Which runs a sweep consists of: every method with every seed and setting, each configuration checked beforehand."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.config import OPTIONS, Config, flag
from rigsa.experiments.methods.registry import METHODS
from rigsa.experiments.presets import configured
from rigsa.experiments.tasks.registry import recognise

VARIABLE = {name: field for name, field in OPTIONS.items() if name not in ("seed", "match")}


@dataclass(frozen=True)
class Job:
    """One run: its folder's name, its configuration, what sets it apart from its method's other runs of this seed."""

    name: str
    config: Config
    varied: dict[str, Any]
    depends_on: str | None = None
    """The run whose ticket it is matched to."""


@dataclass(frozen=True)
class Plan:
    """A whole sweep, in the order of its runs: seed by seed, so that each seed is a comparison of its own."""

    out: Path
    preset: str
    methods: list[str]
    seeds: list[int]
    vary: dict[str, dict[str, list[Any]]]
    """Method to field to values."""
    options: dict[str, Any]
    jobs: list[Job]

    def folder(self, job: Job) -> Path:
        return self.out / job.name

    def record(self) -> dict[str, Any]:
        """What sweep.json says."""
        runs = [
            {
                "name": job.name,
                "method": job.config.method.name,
                "seed": job.config.seed,
                "varied": job.varied,
                "depends_on": job.depends_on,
            }
            for job in self.jobs
        ]
        names = ("preset", "methods", "seeds", "vary", "options")
        return {name: getattr(self, name) for name in names} | {"runs": runs}


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"``. Raises RigsaError for anything that is not i/n with 1 <= i <= n."""
        found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        shard = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= shard.index <= shard.count:
            raise RigsaError(f"--shard: expected i/n with i from 1 to n, such as 1/4, got {text!r}")
        return shard

    def of(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this shard, in their order.

        A job goes where the one goes that it depends on. Those that depend on none are dealt out in turn, method by
        method, so that every shard gets its share of the long ones.
        """
        heads = sorted((job for job in jobs if job.depends_on is None), key=lambda job: job.config.method.name)
        mine = {job.name for job in heads[self.index - 1 :: self.count]}
        return [job for job in jobs if (job.depends_on or job.name) in mine]


WHOLE = Shard()


def plan_sweep(
    methods: str, seeds: str, vary: Sequence[str], *, preset: str, options: dict[str, Any], out: Path
) -> Plan:
    """Every run of a sweep, its configuration checked. Nothing is written.

    Args:
        methods: comma-separated names of `METHODS`.
        seeds: comma-separated numbers.
        vary: each ``FIELD=VALUE,...`` for all methods that read the field, or ``METHOD:FIELD=VALUE,...``.
        preset: where all other values come from.
        options: fields of `Config` that apply to all runs whose method reads them.
        out: the sweep folder.

    Raises:
        RigsaError: an unknown method or field, a field that no run reads, a value that does not fit or stands twice,
            or a random mask that no imp run of the sweep has a ticket for.
    """
    names, numbers = method_names(methods), _seeds(seeds)
    varied = _varied(vary, names)
    _check_options(options, varied)
    jobs: list[Job] = []
    # A method that is matched to another's ticket comes last.
    for seed, method in itertools.product(numbers, sorted(names, key=lambda name: bool(METHODS[name].matches))):
        for values in itertools.product(*varied[method].values()):
            settings = dict(zip(varied[method], values, strict=True))
            given = {name: value for name, value in options.items() if METHODS[method].reads(name)} | settings
            config = recognise(configured(preset, method, given | {"seed": seed}))
            if config.method.matches and not config.density:
                jobs += _controls(config, settings, jobs, out)
            else:
                jobs.append(Job(_name(method, settings, seed), config, settings))
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise RigsaError(
                f"--vary: {count} runs would have the folder {out / name}; run them in sweeps of their own"
            )
    return Plan(out, preset, names, numbers, varied, options, jobs)


def _controls(config: Config, settings: dict[str, Any], jobs: list[Job], out: Path) -> list[Job]:
    """A run for each run of this seed that it can be matched to: with the same value in every field that both vary."""
    matched = [
        job
        for job in jobs
        if job.config.method.name == config.method.matches
        and job.config.seed == config.seed
        and job.config.prunings >= max(config.match_level, 1)
        and all(job.varied.get(name, value) == value for name, value in settings.items())
    ]
    if not matched:
        where = "".join(f", {flag(name)} {value}" for name, value in settings.items())
        raise RigsaError(
            f"--methods {config.method}: no {config.method.matches} run of seed {config.seed}{where} with "
            f"{f'a ticket {config.match_level}' if config.match_level else 'a ticket'} is in this sweep to be matched "
            f"to; add {config.method.matches} to --methods, with the same values"
            + (", or give --density" if config.method.reads("density") else "")
        )
    controls = []
    for job in matched:
        apart = job.varied | settings
        # The ticket has the density that its own run asks for.
        own = {name: value for name, value in apart.items() if config.method.reads(name) and name != "density"}
        own["match"] = str(out / job.name)
        name = _name(config.method.name, apart, config.seed)
        controls.append(Job(name, dataclasses.replace(config, **own), apart, job.name))
    return controls


def _name(method: str, settings: dict[str, Any], seed: int) -> str:
    return "-".join([method, *(_label(name, value) for name, value in settings.items()), f"seed{seed}"])


def _label(name: str, value: Any) -> str:
    """``rank8``, ``criterion-large_final``, ``no-checkpointing``."""
    if isinstance(value, bool):
        return flag(name) if value else f"no-{flag(name)}"
    if isinstance(value, str):
        return f"{flag(name)}-{re.sub(r'[^A-Za-z0-9._+-]', '_', value)}"
    return f"{flag(name)}{value}"


def method_names(text: str) -> list[str]:
    """Comma-separated names of methods. Raises RigsaError for another, and for one that stands twice."""
    names = _list("methods", text)
    for name in names:
        if name not in METHODS:
            raise RigsaError(f"--methods: expected some of {', '.join(METHODS)}, comma-separated, got {name!r}")
    return names


def _seeds(text: str) -> list[int]:
    numbers = _list("seeds", text)
    for number in numbers:
        if not (re.fullmatch("[0-9]{1,19}", number) and int(number) < 2**63):
            raise RigsaError(f"--seeds: expected numbers from 0 to 2**63 - 1, comma-separated, got {number!r}")
    return _distinct("seeds", [int(number) for number in numbers])


def _varied(texts: Sequence[str], methods: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Method to field to values, an entry for every method."""
    varied: dict[str, dict[str, list[Any]]] = {method: {} for method in methods}
    for text in texts:
        found = re.fullmatch(r"(?:([^:=]*):)?([^:=]+)=(.*)", text)
        if not found:
            raise RigsaError(f"--vary: expected FIELD=VALUE,... or METHOD:FIELD=VALUE,..., got {text!r}")
        method, name, values = found[1], found[2].strip().replace("-", "_"), found[3]
        if method is not None and method not in methods:
            raise RigsaError(
                f"--vary {text}: expected one of the sweep's methods, {', '.join(methods)}, got {method!r}"
            )
        field = VARIABLE.get(name)
        if field is None:
            raise RigsaError(
                f"--vary {text}: expected a configuration option (see `python -m rigsa.run imp --help`) other than "
                f"seed (--seeds) and match (set by the sweep), got {found[2]!r}"
            )
        readers = [reader for reader in ([method] if method else methods) if METHODS[reader].reads(name)]
        if not readers:
            able = [other.name for other in METHODS.values() if other.reads(name)]
            raise RigsaError(
                f"--vary {text}: {method or ', '.join(methods)} {_has(not method and len(methods) > 1)} no option "
                f"--{flag(name)}; only {', '.join(able)} {_has(len(able) > 1)} it"
            )
        option = f"vary {text[: text.index('=')]}"
        converted = _distinct(option, [_convert(option, field, value) for value in _list(option, values)])
        for reader in readers:
            if name in varied[reader]:
                raise RigsaError(f"--{option}: {flag(name)} of {reader} is varied twice; give one list of values")
            varied[reader][name] = converted
    return varied


def _has(several: bool) -> str:
    return "have" if several else "has"


def _check_options(options: dict[str, Any], varied: dict[str, dict[str, list[Any]]]) -> None:
    for name in options:
        if not any(METHODS[method].reads(name) and name not in fields for method, fields in varied.items()):
            raise RigsaError(
                f"--{flag(name)}: no run of this sweep would use it; expected an option that one of "
                f"{', '.join(varied)} reads and that --vary does not set"
            )


def _list(option: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise RigsaError(f"--{option}: expected values separated by commas, got {text!r}")
    return _distinct(option, values)


def _distinct(option: str, values: list[Any]) -> list[Any]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise RigsaError(f"--{option}: expected every value once, got {value} twice")
    return values


def _convert(option: str, field: dataclasses.Field[Any], text: str) -> Any:
    kind: Any = type(field.default)
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "whole numbers", float: "numbers"}[kind]
        raise RigsaError(f"--{option}: expected {expected}, got {text!r}") from None
