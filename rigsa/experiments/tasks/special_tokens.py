"""Special tokens in text that people write: a turn of a chat would begin or end where one stands, so it is refused.

A chat template writes turns as text, and the tokenizer then finds its special tokens in all of it. To encode what is in
a turn apart from the template would change the ids of ordinary text, where a token spans the border.
"""

from __future__ import annotations

import re
from typing import Any

from rigsa.errors import RigsaError


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the texts that `tokenizer` makes one special token of, wherever they stand."""
    named = [str(token) for token in tokenizer.all_special_tokens]
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    texts = sorted({text for text in (*named, *added) if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")  # no text at all matches the latter


def refuse_special_tokens(tokenizer: Any, text: str, what: str) -> None:
    """Raises RigsaError if `text` holds a special token. `what` names the text."""
    if found := special_tokens(tokenizer).search(text):
        raise RigsaError(f"{what} holds {found[0]!r}, which is a special token of the model; expected text without it")


def until_special_token(tokenizer: Any, text: str) -> str:
    """The part of what a model wrote that comes before the first special token it spelled out."""
    found = special_tokens(tokenizer).search(text)
    return text[: found.start()] if found else text
