"""What a value of an option may be, in words for messages and ``--help``, and as a test."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rigsa.errors import RigsaError


class Bound(Protocol):
    """What a value has to be."""

    @property
    def expected(self) -> str: ...

    def holds(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`. NaN is in none.

    Attributes:
        least, most: the ends.
        above, below: the lower end, the upper end, is not in it.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    @property
    def expected(self) -> str:
        """``1 to 100``, or ``more than 0 and at most 1``."""
        least, most = number_text(self.least), number_text(self.most)
        if not self.above and not self.below:
            return f"{least} to {most}"
        return f"{f'more than {least}' if self.above else f'{least} or more'} and " + (
            f"less than {most}" if self.below else f"at most {most}"
        )

    def holds(self, value: Any) -> bool:
        lower = self.least < value if self.above else self.least <= value
        return bool(lower and (value < self.most if self.below else value <= self.most))


@dataclass(frozen=True)
class Rule:
    """A test and its words."""

    expected: str
    test: Callable[[Any], object]

    def holds(self, value: Any) -> bool:
        return bool(self.test(value))


LARGEST_INT = 2**63 - 1
ANY = Rule("", lambda value: True)
SEED = Range(0, LARGEST_INT)
COUNT = Range(1, 10**9)
COUNT_OR_0 = Range(0, 10**9)
LEVELS = Range(0, 100)
"""More are of no use: at any keep fraction below 0.8 the last of them would be empty."""
RANK = Range(1, 65_536)
RATE = Range(0, 1000, above=True)
RATE_OR_0 = Range(0, 1000)
SIGNED = Range(-1000, 1000)
EPSILON = Range(1e-30, 1)
SCALE = Range(0, 1e6, above=True)
NORM = Range(0, 1e9)
BELOW_1 = Range(0, 1, below=True)
SHARE = Range(0, 1, above=True)
SHARE_OR_0 = Range(0, 1)
PART = Range(0, 1, above=True, below=True)
GIBIBYTES = Range(0, 1e6, above=True)
TOKENS = Range(1, 10**6)


def number_text(number: float) -> str:
    """``1,000,000``, ``2**63 - 1``, ``1e-30``."""
    if number == LARGEST_INT:
        return "2**63 - 1"
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def check(option: str, value: Any, bound: Bound) -> None:
    """Raises RigsaError, which names the option, what is expected of it and what it is, unless `bound` holds."""
    if not bound.holds(value):
        raise RigsaError(f"--{option}: expected {bound.expected}, got {value}")


class Number:
    """What argparse converts the text of a numeric option with.

    Args:
        option: its name on the command line.
        kind: int or float.
        bound: of its values.

    Raises:
        RigsaError: on a call, for text that is no number, and for a number out of range.
    """

    def __init__(self, option: str, kind: type, bound: Bound) -> None:
        self.option, self.kind, self.bound = option, kind, bound

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            number = "a whole number" if self.kind is int else "a number"
            raise RigsaError(
                f"--{self.option}: expected {number}, {self.bound.expected}, got {reprlib.repr(text)}"
            ) from None
        check(self.option, value, self.bound)
        return value


class Choice:
    """What argparse converts the text of an option with that takes one of some words.

    Args:
        option: its name on the command line.
        choices: the words.

    Raises:
        RigsaError: on a call, for another one.
    """

    def __init__(self, option: str, choices: Iterable[str]) -> None:
        self.option, self.choices = option, tuple(choices)

    def __call__(self, text: str) -> str:
        if text not in self.choices:
            raise RigsaError(f"--{self.option}: expected one of {', '.join(self.choices)}, got {text!r}")
        return text
