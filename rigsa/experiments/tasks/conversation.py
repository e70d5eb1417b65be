"""Turns of a chat as token ids, for one tokenizer: the same in training, tests, drift, scores and conversation.

What a prompt begins with is said by the chat template alone, and no token is added before it. A tokenizer without a
chat template, that of a base model, gets `PLAIN` as its template, which begins with what this tokenizer puts before any
text. So there is one rule for the token at the beginning (BOS) in all of a run, lm-eval's tasks included.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from rigsa.errors import RigsaError
from rigsa.experiments.tasks.special_tokens import refuse_special_tokens

Turn = dict[str, Any]
"""``{"role": "user", "content": "..."}``, and what else a chat template reads, such as ``tool_calls``."""
PLAIN = (
    "{{ begin }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""A line a turn, and the end token after what the assistant says. `begin` stands for the tokenizer's own beginning."""


def with_template(tokenizer: Any) -> Any:
    """`tokenizer` itself if it has a chat template, else a copy with `PLAIN`. Raises RigsaError for one without EOS."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer
    if tokenizer.eos_token is None:
        raise RigsaError("--model: its tokenizer has neither a chat template nor an end token; expected one of them")
    plain = copy.deepcopy(tokenizer)
    begin = tokenizer.decode(beginning(tokenizer))
    plain.chat_template = PLAIN.replace("{{ begin }}", begin)
    return plain


def beginning(tokenizer: Any) -> list[int]:
    """The ids that `tokenizer` by itself puts before any text: its BOS, or nothing."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return list(whole[:at])


class Conversation:
    """Token ids of chats.

    Args:
        tokenizer: of `transformers`.
        system_prompt: of the chat; ``default`` leaves it to the template.

    Raises:
        RigsaError: the tokenizer has neither a chat template nor an end token, or the system prompt holds a special
            token.
    """

    def __init__(self, tokenizer: Any, system_prompt: str = "default") -> None:
        self.tokenizer = with_template(tokenizer)
        self.is_plain = self.tokenizer is not tokenizer
        refuse_special_tokens(tokenizer, system_prompt, "--system-prompt")
        self.system = [] if system_prompt == "default" else [{"role": "system", "content": system_prompt}]
        if self.is_plain and not system_prompt:
            self.system = []  # a plain prompt would begin with an empty line
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = 0  # what fills a batch up is never seen

    def fingerprint(self) -> str:
        """A short hash of the vocabulary and the chat template: equal for conversations with equal ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps([vocabulary, self.tokenizer.chat_template]).encode()).hexdigest()[:16]

    def render(self, turns: Sequence[Turn], *, asks: bool, tools: Any = None) -> str:
        """The text of a chat, after the system prompt. If it `asks`, the assistant's next turn begins at its end.

        A chat that has a system turn of its own keeps that one.
        """
        system = [] if turns and turns[0]["role"] == "system" else self.system
        options = {"tools": tools} if tools else {}
        rendered: str = self.tokenizer.apply_chat_template(
            [*system, *turns], tokenize=False, add_generation_prompt=asks, **options
        )
        return rendered

    def encode(self, text: str) -> list[int]:
        """Ids of text that the template made, and of nothing else."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def ids(self, turns: Sequence[Turn], prefill: str = "") -> list[int]:
        """Token ids of a chat, up to and with the start of the assistant's next turn and `prefill`.

        Raises:
            RigsaError: a turn holds a special token, which would end it.
        """
        for turn in turns:
            refuse_special_tokens(self.tokenizer, turn["content"], f"what the {turn['role']} says")
        return self.encode(self.render(turns, asks=True) + prefill)
