"""What the columns of a user's data mean: from a row to an `Example`, checked.

================== ================================================= ==================================================
format             columns                                           what is learned
================== ================================================= ==================================================
messages           ``messages`` (role, content, tool_calls), and     the assistant's turns
                   ``tools`` where there are any
sharegpt           ``conversations`` (from, value)                   the assistant's turns
alpaca             ``instruction``, ``output``, perhaps ``input``    the output, after a user's turn
prompt-completion  ``prompt`` and ``completion``, or ``question``    the completion, after a user's turn
                   and ``answer``; texts, or lists of messages
text               ``text``                                          every token
================== ================================================= ==================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.tasks.conversation import Turn
from rigsa.experiments.tasks.rows import Row

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""The roles of chats, by the names that data sets have for them."""
AFTER = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Which roles may follow which: '' is the beginning, `call` a turn of the assistant that calls tools."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with what the assistant says, or a plain text.

    Attributes:
        place: of its row, for messages.
        turns: of the conversation; none for a plain text.
        text: the plain text.
        tools: that the assistant may call, as chat templates take them.
    """

    place: str
    turns: tuple[Turn, ...] = ()
    text: str = ""
    tools: Any = None

    @property
    def answer(self) -> str:
        """What the assistant is to say last."""
        return str(self.turns[-1]["content"] or "")

    def share(self) -> float:
        """A number in [0, 1) that depends on all before the last answer alone: it decides on the split."""
        shown = [self.turns[:-1], self.tools] if self.turns else self.text
        digest = hashlib.sha256(json.dumps(shown, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest()[:8], "big") / 2**64


def recognise_format(rows: Sequence[Row], source: str) -> str:
    """The format whose columns the first row has. Raises RigsaError if that is none or several."""
    if not rows:
        raise RigsaError(f"--data {source}: expected rows, got none")
    place, row = rows[0]
    found = [name for name in FORMATS if _fits(row, name)]
    if len(found) != 1:
        fits = f"its columns fit {' and '.join(found)}; say which with --format" if found else "no format has them"
        known = "; ".join(f"{name} ({_needed(name)})" for name in FORMATS)
        raise RigsaError(f"--data: {place}: expected the columns of one format: {known}; got {_columns(row)}: {fits}")
    return found[0]


def read_examples(rows: Sequence[Row], format_name: str) -> list[Example]:
    """Every row as an example. Raises RigsaError for the first that is none; its place is named."""
    convert, _ = FORMATS[format_name]
    examples = []
    for place, row in rows:
        if not _fits(row, format_name):
            raise RigsaError(
                f"--data: {place}: expected the columns of the format {format_name} ({_needed(format_name)}), "
                f"got {_columns(row)}"
            )
        example = convert(row, place)
        _check(example)
        examples.append(example)
    return examples


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items()) or "none"


def _messages(row: dict[str, Any], place: str) -> Example:
    turns = tuple(_turn(one, place, "messages", "role", "content") for one in _list(row["messages"], place, "messages"))
    return Example(place, turns, tools=_tools(row, place))


def _sharegpt(row: dict[str, Any], place: str) -> Example:
    found = _list(row["conversations"], place, "conversations")
    keys = ("from", "value") if isinstance(found[0], dict) and "from" in found[0] else ("role", "content")
    return Example(place, tuple(_turn(one, place, "conversations", *keys) for one in found), tools=_tools(row, place))


def _alpaca(row: dict[str, Any], place: str) -> Example:
    asked = [_text(row, "instruction", place), _text(row, "input", place) if row.get("input") else ""]
    system = [{"role": "system", "content": _text(row, "system", place)}] if row.get("system") else []
    user = {"role": "user", "content": "\n\n".join(filter(None, asked))}
    return Example(place, (*system, user, {"role": "assistant", "content": _text(row, "output", place)}))


def _prompt_completion(row: dict[str, Any], place: str) -> Example:
    names = ("prompt", "completion") if "prompt" in row else ("question", "answer")
    turns: list[Turn] = []
    for name, role in zip(names, ("user", "assistant"), strict=True):
        if isinstance(row[name], list):
            turns += [_turn(one, place, name, "role", "content") for one in _list(row[name], place, name)]
        else:
            turns.append({"role": role, "content": _text(row, name, place)})
    return Example(place, tuple(turns), tools=_tools(row, place))


def _plain(row: dict[str, Any], place: str) -> Example:
    return Example(place, text=_text(row, "text", place))


def _fits(row: dict[str, Any], format_name: str) -> bool:
    _, choices = FORMATS[format_name]
    return any(all(row.get(column) is not None for column in columns) for columns in choices)


def _needed(format_name: str) -> str:
    _, choices = FORMATS[format_name]
    return " or ".join(" and ".join(columns) for columns in choices)


FORMATS: dict[str, tuple[Callable[[dict[str, Any], str], Example], tuple[tuple[str, ...], ...]]] = {
    "messages": (_messages, (("messages",),)),
    "sharegpt": (_sharegpt, (("conversations",),)),
    "alpaca": (_alpaca, (("instruction", "output"),)),
    "prompt-completion": (_prompt_completion, (("prompt", "completion"), ("question", "answer"))),
    "text": (_plain, (("text",),)),
}
"""Name to how a row is read, and the sets of columns of which it has to have one."""


def _text(row: dict[str, Any], column: str, place: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RigsaError(f"--data: {place}, column {column}: expected text, got {value!r:.60}")
    return value


def _list(value: Any, place: str, column: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RigsaError(f"--data: {place}, column {column}: expected a list of turns, got {value!r:.60}")
    return value


def _tools(row: dict[str, Any], place: str) -> Any:
    """The functions that may be called. Some data sets hold them as text in JSON."""
    value = row.get("tools")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RigsaError(f"--data: {place}, column tools: not JSON ({error})") from error
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise RigsaError(f"--data: {place}, column tools: expected a list of functions, got {value!r:.60}")
    return value or None


def _turn(value: Any, place: str, column: str, role_key: str, content_key: str) -> Turn:
    if not isinstance(value, dict) or role_key not in value:
        raise RigsaError(
            f"--data: {place}, column {column}: expected turns with {role_key} and {content_key}, got {value!r:.60}"
        )
    role = ROLES.get(value[role_key]) if isinstance(value[role_key], str) else None
    if role is None:
        raise RigsaError(
            f"--data: {place}, column {column}: expected a role among {', '.join(ROLES)}, got {value[role_key]!r:.60}"
        )
    content = _joined(value.get(content_key))
    if not isinstance(content, str):
        raise RigsaError(f"--data: {place}, column {column}: expected text in {content_key}, got {content!r:.60}")
    more = {name: value[name] for name in ("tool_calls", "tool_call_id", "name") if value.get(name)}
    return {"role": role, "content": content, **more}


def _joined(content: Any) -> Any:
    """Text that stands in parts, ``[{"type": "text", "text": "..."}]``, as one; nothing as empty text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def _check(example: Example) -> None:
    """The order of the roles, and that there is something to learn."""
    place = f"--data: {example.place}"
    for text in (example.text, *(turn["content"] for turn in example.turns)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RigsaError(f"{place}: expected text, got half a character (an escape of JSON without its other half)")
    if not example.turns:
        if not example.text.strip():
            raise RigsaError(f"{place}: the text is empty")
        return
    before = ""
    for turn in example.turns:
        if turn["role"] not in AFTER[before]:
            expected = " or ".join(AFTER[before])
            where = (
                f"after {'the assistant calls a tool' if before == 'call' else before}"
                if before
                else "at the beginning"
            )
            raise RigsaError(f"{place}: roles out of order; expected {expected} {where}, got {turn['role']}")
        before = "call" if turn.get("tool_calls") else turn["role"]
    if example.turns[-1]["role"] != "assistant":
        raise RigsaError(f"{place}: expected the assistant's turn at the end, got {example.turns[-1]['role']}")
    empty = next((turn for turn in example.turns if not turn["content"].strip() and not turn.get("tool_calls")
                  and turn["role"] in ("user", "assistant")), None)  # fmt: skip
    if empty:
        raise RigsaError(f"{place}: {'the answer' if empty['role'] == 'assistant' else 'what the user says'} is empty")
