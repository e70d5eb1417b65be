"""Examples as token ids, with the tokens that are learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import TemplateError

from rigsa.errors import RigsaError
from rigsa.experiments.tasks.conversation import Conversation, beginning
from rigsa.experiments.tasks.formats import Example
from rigsa.experiments.tasks.special_tokens import special_tokens
from rigsa.experiments.tasks.task import IGNORED, Sample


@dataclass(frozen=True)
class Encoded:
    """An example as a sample, or None where nothing that is learned was left of it.

    Attributes:
        sample: of `rigsa.experiments.tasks.task`.
        cut: tokens that were cut off its end.
        last_turn_only: earlier turns of the assistant are not learned, as the template writes them in another way
            once a turn follows.
    """

    sample: Sample | None
    cut: int = 0
    last_turn_only: bool = False


class Encoder:
    """Makes token ids of examples.

    Args:
        conversation: of the run.
        covers: ``answer``, the assistant's turns, or ``all``. A plain text is learned whole.
        longest: the most tokens of an example; None: any number.

    Raises:
        RigsaError: the tokenizer cannot say which text its tokens stand for.
    """

    def __init__(self, conversation: Conversation, covers: str, longest: int | None) -> None:
        self.conversation, self.covers, self.longest = conversation, covers, longest
        self.tokenizer = conversation.tokenizer
        self.special = special_tokens(self.tokenizer)
        self.special_ids = {self.tokenizer.convert_tokens_to_ids(str(token)) for token in self._special_texts()}
        self.beginning = beginning(self.tokenizer)
        if not self.tokenizer.is_fast:
            raise RigsaError("--model: its tokenizer does not say which text a token stands for; expected a fast one")

    def _special_texts(self) -> set[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return {*map(str, self.tokenizer.all_special_tokens), *(str(token) for token in added if token.special)}

    def encode(self, example: Example) -> Encoded:
        """Raises RigsaError, which names the example, for text with a special token, or that the template refuses."""
        if not example.turns:
            ids = [*self.beginning, *self.conversation.encode(example.text)]
            return self._cut(*self._ended(ids, [1] * len(ids)))
        self._check(example)
        try:
            text = self.conversation.render(example.turns, asks=False, tools=example.tools)
            spans, last_only = self._answers(example, text)
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # what a template's own checks raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RigsaError(f"--data: {example.place}: the chat template refuses it ({reason})") from error
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in found["offset_mapping"]]
        learned = [int(any(first <= start < end for first, end in spans)) for start in starts]
        encoded = self._cut(*self._ended(found["input_ids"], learned))
        return Encoded(encoded.sample, encoded.cut, last_only)

    def prompt(self, example: Example) -> list[int]:
        """Ids of all before the last answer, which begins at their end."""
        return self.conversation.encode(self.conversation.render(example.turns[:-1], asks=True, tools=example.tools))

    def _check(self, example: Example) -> None:
        for turn in example.turns:
            if found := self.special.search(turn["content"]):
                raise RigsaError(
                    f"--data: {example.place}: what the {turn['role']} says holds {found[0]!r}, which is a special "
                    "token of the model; expected text without it"
                )
        calls = any(turn.get("tool_calls") or turn["role"] == "tool" for turn in example.turns)
        if (calls or example.tools) and "tool" not in str(self.tokenizer.chat_template):
            raise RigsaError(f"--data: {example.place}: calls tools, which the model's chat template does not know")

    def _answers(self, example: Example, text: str) -> tuple[list[tuple[int, int]], bool]:
        """Where in `text` the assistant's turns begin and end, their end token included."""
        spans, last_only = [], False
        for index, turn in enumerate(example.turns):
            if turn["role"] != "assistant":
                continue
            before = self.conversation.render(example.turns[:index], asks=True, tools=example.tools)
            until = self.conversation.render(example.turns[: index + 1], asks=False, tools=example.tools)
            if text.startswith(until) and until.startswith(before):
                spans.append((len(before), self._end(until, len(before))))
            elif index < len(example.turns) - 1:
                last_only = True
            else:
                raise RigsaError(
                    f"--data: {example.place}: the model's chat template does not begin an answer as it asks for one, "
                    "so what is to be learned cannot be told; expected another template"
                )
        return spans, last_only

    def _end(self, text: str, begin: int) -> int:
        """The end of a turn without the space between turns, which no one generates after an end token."""
        stripped = text.rstrip()
        ends = [match.end() for match in self.special.finditer(stripped, begin)]
        return len(stripped) if ends and ends[-1] == len(stripped) else len(text)

    def _ended(self, ids: list[int], learned: list[int]) -> tuple[list[int], list[int]]:
        """All up to the last token that is learned, which is an end token: one is added where the template has none."""
        last = max((at for at, flag in enumerate(learned) if flag), default=-1)
        ids, learned = list(ids[: last + 1]), learned[: last + 1]
        end = self.tokenizer.eos_token_id
        if ids and ids[-1] not in self.special_ids and end is not None:
            ids, learned = [*ids, end], [*learned, 1]
        return ids, learned

    def _cut(self, ids: list[int], learned: list[int]) -> Encoded:
        longest = len(ids) if self.longest is None else self.longest
        cut = max(len(ids) - longest, 0)
        ids, learned = ids[:longest], learned[:longest]
        if self.covers == "all":
            learned = [1] * len(ids)
        first = next((at for at, flag in enumerate(learned) if flag and at), None)  # nothing is before a first token
        if first is None:
            return Encoded(None, cut)
        following = zip(ids[first:], learned[first:], strict=True)
        targets = [token if flag else IGNORED for token, flag in following]
        return Encoded({"input_ids": ids[:-1], "targets": targets}, cut)


def learned_from(encoded: list[Encoded], examples: list[Example]) -> Iterator[tuple[Example, Sample]]:
    """The examples of which something is learned, each with its sample."""
    for one, example in zip(encoded, examples, strict=True):
        if one.sample is not None:
            yield example, one.sample
