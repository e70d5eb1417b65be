"""How far an adapter has moved a model from its base, without a data set.

The measure is KL(base || adapted) in nats a token, along the base model's own greedy replies to a fixed set of prompts
(`drift_prompts.txt`, written for this project). The base is the same model with its adapter switched off, so neither a
second model nor its logits are kept. In bfloat16 rounding alone makes some 4e-4 nats (SmolLM2-135M, a gate of 1e-6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from rigsa.adapters import adapter_off
from rigsa.experiments.tasks.conversation import Conversation
from rigsa.experiments.tasks.task import positions

PROMPTS_FILE = "drift_prompts.txt"
PROMPTS_A_PASS = 8
"""In `replies`: a constant, as padding changes rounding, which may decide between two tokens that are nearly tied."""

Reply = dict[str, Any]
"""``{"prompt": text, "prompt_ids": token ids, "reply_ids": token ids}``, which is JSON as it stands."""


def drift_prompts() -> list[str]:
    """The prompts, one a line of the packaged file."""
    return resources.files("rigsa.experiments.tasks").joinpath(PROMPTS_FILE).read_text(encoding="utf-8").splitlines()


def replies(
    model: PreTrainedModel, conversation: Conversation, max_new_tokens: int = 48, *, count: int | None = None
) -> list[Reply]:
    """Greedy replies to `drift_prompts` of `model` as it is, which should be the base.

    Args:
        model: in evaluation mode.
        conversation: of the run.
        max_new_tokens: where a reply is cut. One that ended before holds its end token.
        count: only to so many of the prompts.
    """
    encoded = {text: conversation.ids([{"role": "user", "content": text}]) for text in drift_prompts()[:count]}
    found: list[Reply] = []
    for start in range(0, len(encoded), PROMPTS_A_PASS):
        asked = dict(list(encoded.items())[start : start + PROMPTS_A_PASS])
        answers = greedy(model, conversation, list(asked.values()), max_new_tokens)
        found += [
            {"prompt": text, "prompt_ids": ids, "reply_ids": answer}
            for (text, ids), answer in zip(asked.items(), answers, strict=True)
        ]
    return found


def greedy(
    model: PreTrainedModel,
    conversation: Conversation,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The likeliest continuations of token ids, each with its end token where it came to one."""
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in (*ends, conversation.tokenizer.eos_token_id) if end is not None})
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=conversation.pad_id)
    ids, mask = pad_left(encoded, conversation.pad_id, model.device)
    generate: Any = model.generate  # which the class of all models does not declare
    # It fills what the settings leave open from the model's own, such as a penalty on repetition.
    model.generation_config = settings
    try:
        output = generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
    finally:
        model.generation_config = own
    return [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def pad_left(rows: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 ``[B, T]``: all rows end at the last position."""
    ids = [torch.tensor(row, device=device) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left"), mask


@torch.no_grad()
def drift(
    model: nn.Module,
    replies: Sequence[Reply],
    batch_size: int = PROMPTS_A_PASS,
    as_base: Callable[[], AbstractContextManager[None]] | None = None,
) -> dict[str, Any]:
    """Mean KL(base || adapted) over the reply tokens, each given the prompt and the base's reply before it.

    Args:
        model: with its adapter, in evaluation mode.
        replies: of the base (`replies`), two or more.
        batch_size: replies a pass; logits of no more are held. In 16 bits the result depends on it by a few per cent.
        as_base: makes a context in which `model` is its base; `adapter_off` by default.

    Returns:
        ``{"kl": nats a token, "stderr": of it, "tokens": their number, "prompts": number of replies}``. Tokens of one
        reply are not independent, so a reply is the unit: with S_i the sum of KL over its n_i tokens, kl is the ratio
        sum(S_i) / sum(n_i), and stderr^2 = m / (m - 1) * sum((S_i - kl n_i)^2) / sum(n_i)^2, the linearised variance of
        a ratio of m clusters (Cochran, Sampling Techniques, 1977, section 6.4).

    Raises:
        ValueError: fewer than two replies.
    """
    if len(replies) < 2:
        raise ValueError(f"replies: expected two or more, got {len(replies)}")
    sums: list[float] = []
    for start in range(0, len(replies), batch_size):
        sums += _kl_sums(model, replies[start : start + batch_size], as_base or partial(adapter_off, model))
    lengths = [len(reply["reply_ids"]) for reply in replies]
    tokens, count = sum(lengths), len(replies)
    kl = math.fsum(sums) / tokens
    spread = math.fsum((total - kl * length) ** 2 for total, length in zip(sums, lengths, strict=True))
    stderr = math.sqrt(count / (count - 1) * spread) / tokens
    return {"kl": kl, "stderr": stderr, "tokens": tokens, "prompts": count}


def _kl_sums(
    model: nn.Module, replies: Sequence[Reply], as_base: Callable[[], AbstractContextManager[None]]
) -> list[float]:
    """KL summed over the tokens of each reply; in float64, as float32 would lose a KL of 1e-7."""
    adapted = _reply_logits(model, replies)
    with as_base():
        base = _reply_logits(model, replies)
    return [
        F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="sum", log_target=True).item()
        for p, q in zip(base, adapted, strict=True)
    ]


def _reply_logits(model: nn.Module, replies: Sequence[Reply]) -> list[Tensor]:
    """``[n_i, vocabulary]`` for each reply: what the model says of its tokens. The head sees few other positions."""
    device = next(model.parameters()).device
    lengths = [len(reply["reply_ids"]) for reply in replies]
    # The last token of a reply is predicted and predicts nothing.
    ids, mask = pad_left([reply["prompt_ids"] + reply["reply_ids"][:-1] for reply in replies], 0, device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        logits_to_keep=max(lengths),
        use_cache=False,
    ).logits
    return [row[-length:] for row, length in zip(logits, lengths, strict=True)]
