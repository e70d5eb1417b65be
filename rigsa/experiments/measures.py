"""What the metrics of a run hold, by its configuration alone: the names, places and units of the numbers on its task.

Reports, sweeps and the schema of ``metrics.json`` read this; neither data nor a model are loaded for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rigsa.experiments.config import Base, Config, Measuring

Metrics = dict[str, Any]
HELD_OUT = "held-out"
"""The test split of a data set of the user's, in the metrics of a run."""


class Interval(Protocol):
    """A mean, and half of the interval around it if there is one."""

    @property
    def mean(self) -> float: ...

    @property
    def half(self) -> float | None: ...


@dataclass(frozen=True)
class Measure:
    """A number that every level may have: where it stands in the metrics, and how it is written.

    Attributes:
        name: in tables and figures.
        keys: the way to it in the metrics.
        unit: ``%`` for a share.
        decimals: that are shown.
        less_is_better: a loss is, an accuracy is not.
    """

    name: str
    keys: tuple[str, ...]
    unit: str
    decimals: int
    less_is_better: bool = False

    def before(self, base: Metrics) -> float | None:
        """The untrained model's number. Its drift is 0, since drift is measured from it."""
        return 0.0 if self.keys[0] == "drift" else self.of(base)

    def text(self, value: Interval | None) -> str:
        """``93.33 ± 1.20``, or the mean alone where there is no interval."""
        if value is None:
            return ""
        half = "" if value.half is None else f" ± {value.half:.{self.decimals}f}"
        return f"{value.mean:.{self.decimals}f}{half}"

    def of(self, metrics: Metrics | None) -> float | None:
        """The number in `metrics`, or None if it was not measured."""
        value: Any = metrics
        for key in self.keys:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return float(value)


def tests_of(config: Config) -> tuple[str, ...]:
    """The names of the test sets of a run's task, the headline first."""
    return (HELD_OUT,) if config.is_text else tuple(f"{number}-shot" for number in config.shots)


def accuracies(config: Config) -> list[Measure]:
    """The task's accuracies in per cent, its headline first: a score of generated answers if the run has one."""
    if not config.is_text:
        return [Measure(name, ("test", name, "accuracy"), "%", 2) for name in tests_of(config)]
    tokens = Measure("token accuracy", ("test", HELD_OUT, "accuracy"), "%", 2)
    return [tokens] if config.score == "none" else [score_of(config), tokens]


def score_of(config: Measuring) -> Measure:
    """The score of generated answers."""
    return Measure(score_name(config.score), ("test", config.score, "accuracy"), "%", 2)


def score_name(score: str) -> str:
    names = {"exact": "exact match", "choice": "right choice", "number": "right number"}
    return names.get(score, score.removeprefix("lm-eval:"))


def test_loss(config: Config) -> Measure:
    return Measure("test loss", ("test", tests_of(config)[0], "loss"), "nats", 3, less_is_better=True)


def test_perplexity(config: Config) -> Measure | None:
    """That of texts, the exponential of the test loss. The answer to an image is one token, which has none."""
    if not config.is_text:
        return None
    return Measure("perplexity", ("test", HELD_OUT, "perplexity"), "", 3, less_is_better=True)


def title(config: Base) -> str:
    """The task in a few words."""
    return Path(config.data).name if config.is_text else "Textual MNIST"


def unit(config: Base) -> str:
    return "examples" if config.is_text else "images"
