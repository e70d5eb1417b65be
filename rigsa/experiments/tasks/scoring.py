"""Scores of generated answers: greedy, from a cache, in batches, with the adapter as it was trained."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.drift import greedy

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_CHOICE = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z]|\d{1,2})(?![A-Za-z0-9])")


def normalised(answer: str) -> str:
    """An answer without space at its ends, and with one blank for each run of space."""
    return " ".join(answer.split())


def number_of(answer: str) -> Decimal | None:
    """The number after the last ``####``, or else the last one in the text; None if there is none."""
    _, mark, after = answer.rpartition("####")
    found = _NUMBER.findall(after if mark else answer)
    if not found:
        return None
    try:
        return Decimal(found[0 if mark else -1].replace(",", ""))
    except InvalidOperation:
        return None


def choice_of(answer: str) -> str | None:
    """The first letter or number that stands alone, as in ``(B) because`` or ``B``; None if there is none."""
    found = _CHOICE.search(answer)
    return found[1] if found else None


READINGS: dict[str, Callable[[str], Any]] = {"exact": normalised, "choice": choice_of, "number": number_of}
"""Score to what of an answer has to be equal; an answer of which there is nothing to compare is wrong."""


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    conversation: Conversation,
    prompts: Sequence[list[int]],
    answers: Sequence[str],
    score: str,
    *,
    max_new_tokens: int,
    longest: int | None,
    batch_size: int,
    label: str,
) -> dict[str, Any]:
    """``{"accuracy": percent, "stderr": of it in points, "examples": their number}``.

    Args:
        model: in evaluation mode.
        conversation: of the run.
        prompts: token ids.
        answers: what is right, a text for each prompt.
        score: a name in `READINGS`.
        max_new_tokens: where an answer is cut.
        longest: the most tokens that the model takes, prompt and answer together; None: any number.
        batch_size: prompts a pass. Prompts of like length share one.
        label: of the progress bar.
    """
    read = READINGS[score]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    right = 0
    for start in tqdm(range(0, len(order), batch_size), desc=label, unit="batch", leave=False):
        chosen = order[start : start + batch_size]
        room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(prompts[chosen[-1]]))
        said = greedy(model, conversation, [prompts[index] for index in chosen], max(room, 1))
        for index, ids in zip(chosen, said, strict=True):
            wanted, got = read(answers[index]), read(conversation.tokenizer.decode(ids, skip_special_tokens=True))
            right += wanted is not None and wanted == got
    share, count = right / len(prompts), len(prompts)
    return {
        "accuracy": 100 * share,
        "stderr": 100 * math.sqrt(share * (1 - share) / max(count - 1, 1)),
        "examples": count,
    }
