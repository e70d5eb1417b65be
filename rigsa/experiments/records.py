"""What the JSON files of a run folder hold: a schema for each, and one error that names file and field."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config
from rigsa.experiments.measures import tests_of
from rigsa.files import parse_json, read_json, read_text


@dataclass(frozen=True)
class Kind:
    """A single value: what is expected, in words, and whether one fits."""

    expected: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Fields:
    """An object with these fields; those in `optional` may be missing, and others are not looked at."""

    required: dict[str, Schema]
    optional: dict[str, Schema]


@dataclass(frozen=True)
class MapOf:
    """An object, all of whose values are alike."""

    values: Schema


@dataclass(frozen=True)
class ListOf:
    """A list of values that are alike, `least` of them or more."""

    values: Schema
    least: int = 0


Schema: TypeAlias = "Kind | Fields | MapOf | ListOf"


def _is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


TEXT = Kind("text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number, 0 or more", _is_int)
NUMBER = Kind("a number", _is_number)
"""Also NaN and infinity: so a loss may be."""
AMOUNT = Kind("a number, 0 or more", lambda value: _is_number(value) and 0 <= value < math.inf)
PERCENT = Kind("a number from 0 to 100", lambda value: _is_number(value) and 0 <= value <= 100)


def or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.fits(value))


PRUNING = Fields(
    {"kept": COUNT, "mask": or_none(TEXT)},
    {"same_sign_share": AMOUNT, "free": COUNT, "eligible": COUNT, "examples": COUNT, "rounds": COUNT,
     "exchanged": COUNT},
)  # fmt: skip
"""``pruning.json``. `mask` is the hash that the mask's file carries, null where the mask moves as the level trains."""
EARLY_BIRD = Fields(
    {"ended_at": or_none(COUNT), "steps_saved": COUNT, "distances": MapOf(or_none(AMOUNT))}, {}
)  # fmt: skip
RESOURCES = Fields(
    {"steps": COUNT, "train_seconds": AMOUNT, "peak_memory_bytes": COUNT}, {"hardware": TEXT, "versions": TEXT}
)
LOG_LINE = Fields(
    {"step": COUNT, "epoch": NUMBER, "loss": NUMBER, "learning_rate": NUMBER, "grad_norm": or_none(NUMBER)}, {}
)
REPLIES = ListOf(Fields({"prompt": TEXT, "prompt_ids": ListOf(COUNT, 1), "reply_ids": ListOf(COUNT, 1)}, {}), 2)
FAILURE = Fields({"message": TEXT}, {"exit_code": NUMBER})

_TESTED = Fields({"accuracy": PERCENT, "loss": NUMBER, "tokens": COUNT, "examples": COUNT, "perplexity": NUMBER}, {})
_ANSWERED = Fields({"accuracy": PERCENT, "stderr": AMOUNT, "examples": COUNT}, {})
_SCORE = Fields(
    {"score": NUMBER, "stderr": NUMBER},
    {"metric": TEXT, "documents": COUNT, "shots": COUNT, "others": MapOf(Fields({"score": NUMBER}, {}))},
)


def metrics_of(config: Config, base: bool = False) -> Fields:
    """``metrics.json`` of a level, or of the untrained model."""
    answered: dict[str, Schema] = {config.score: _ANSWERED} if config.is_text and config.score != "none" else {}
    tested: dict[str, Schema] = {"test": Fields({name: _TESTED for name in tests_of(config)} | answered, {})}
    measured: dict[str, Schema] = {"validation": _TESTED, "source": MapOf(_SCORE)}
    if base:
        return Fields(tested, measured | {"tokenizer": TEXT})
    sizes: dict[str, Schema] = {"level": COUNT, "density": AMOUNT, "free": COUNT}
    drift = Fields({"kl": NUMBER, "stderr": NUMBER}, {"tokens": COUNT, "prompts": COUNT})
    early = Fields({"ended_at": or_none(COUNT), "steps_saved": COUNT}, {})
    pruning = Fields({}, PRUNING.required | PRUNING.optional)
    return Fields(
        tested | sizes | {"pruning": pruning},
        measured
        | {"trainable": COUNT, "weights": COUNT, "layer_density": MapOf(AMOUNT), "mean_abs_alpha": NUMBER}
        | {"steps": COUNT, "train_loss": NUMBER, "drift": drift, "early_bird": early},
    )


def read_record(path: Path, schema: Schema) -> Any:
    """Raises RigsaError where the file is missing or not what `schema` says; the field is named."""
    return require(read_json(path), schema, str(path))


def read_lines(path: Path, schema: Schema) -> list[Any]:
    """The lines of a ``.jsonl`` file, each checked. Raises RigsaError as `read_record`, also where there is none."""
    lines = read_text(path).splitlines()
    if not lines:
        raise RigsaError(f"{path} is damaged (expected a line or more, got none); delete its folder and run again")
    places = [f"{path}, line {number}," for number in range(1, len(lines) + 1)]
    return [require(parse_json(line, place), schema, place) for line, place in zip(lines, places, strict=True)]


def require(value: Any, schema: Schema, place: str) -> Any:
    """`value`. Raises RigsaError where it does not fit."""
    if wrong := problem(value, schema):
        raise RigsaError(f"{place} is damaged ({wrong}); delete its folder and run again")
    return value


def problem(value: Any, schema: Schema, field: str = "") -> str | None:
    """The first field that does not fit, what was expected there and what is; None where all does."""
    if isinstance(schema, Kind):
        return None if schema.fits(value) else _mismatch(field, schema.expected, value)
    if isinstance(schema, ListOf):
        if not isinstance(value, list) or len(value) < schema.least:
            return _mismatch(field, f"a list of {schema.least} or more", value)
        parts = [(str(index), part, schema.values) for index, part in enumerate(value)]
    elif not isinstance(value, dict):
        return _mismatch(field, "an object", value)
    elif isinstance(schema, MapOf):
        parts = [(name, part, schema.values) for name, part in value.items()]
    else:
        missing = [name for name in schema.required if name not in value]
        if missing:
            return f"{_joined(field, missing[0])} is missing"
        known = schema.required | schema.optional
        parts = [(name, part, known[name]) for name, part in value.items() if name in known]
    found = (problem(part, kind, _joined(field, name)) for name, part, kind in parts)
    return next((wrong for wrong in found if wrong), None)


def _joined(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _mismatch(field: str, expected: str, value: Any) -> str:
    return f"{field + ': ' if field else ''}expected {expected}, got {reprlib.repr(value)}"
