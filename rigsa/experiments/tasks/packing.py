"""Several texts in one row of a batch, none of which sees another: `Training.packing`.

A packed micro-batch has the texts that it would have had anyway, in rows as wide as the longest of them. So a step
learns the same tokens, and its gradient is the same but for rounding; only positions that were filled up are fewer.
In a row each text's positions begin at 0, from which transformers makes an attention mask of blocks. `check_packing`
tries whether a model goes by that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rigsa.errors import RigsaError
from rigsa.experiments.tasks.task import IGNORED, Batch, Sample


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """The texts of each row, by number: the longest first, each into the first row that has room for it."""
    width = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def pack(samples: Sequence[Sample], pad_id: int) -> Batch:
    """``input_ids``, ``targets`` and ``position_ids``, all ``[R, T]``: R rows of the length T of the longest sample.

    What is left of a row is filled up at its end, as a text of its own that learns nothing.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    rows, width = rows_of(lengths), max(lengths)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "targets": [], "position_ids": []}
    for row in rows:
        left = width - sum(lengths[number] for number in row)
        ids = [list(samples[number]["input_ids"]) for number in row]
        targets = [[IGNORED] * (len(own) - len(samples[number]["targets"])) + list(samples[number]["targets"])
                   for own, number in zip(ids, row, strict=True)]  # fmt: skip
        batch["input_ids"].append([*(token for own in ids for token in own), *[pad_id] * left])
        batch["targets"].append([*(token for own in targets for token in own), *[IGNORED] * left])
        batch["position_ids"].append([*(place for own in ids for place in range(len(own))), *range(left)])
    return {name: torch.tensor(values) for name, values in batch.items()}


@torch.no_grad()
def check_packing(model: nn.Module, attention: str) -> None:
    """Try whether texts in one row are kept apart, on two short ones.

    Args:
        model: of transformers, in evaluation mode.
        attention: its attention implementation, for the message.

    Raises:
        RigsaError: the second text of a row changes with the first one, or is read as if it began in the middle.
    """
    device, numbers = next(model.parameters()).device, torch.arange(12)
    first, other, second = (numbers[:5] + 1)[None], (numbers[:5] + 2)[None], (numbers[5:] + 3)[None]
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    rows = [(torch.cat([before, second], 1), places) for before in (first, other)] + [(second, places[:, 5:])]
    try:
        together, exchanged, alone = (_last_logits(model, ids.to(device), at.to(device)) for ids, at in rows)
    except TypeError as error:  # position ids are none of its arguments
        raise RigsaError(f"--packing: {type(model).__name__} takes no position ids ({error})") from error
    finfo = torch.finfo(next(model.parameters()).dtype)
    close = max(8 * finfo.eps, 1e-4) * alone.abs().max()
    if not torch.equal(together, exchanged) or (together - alone).abs().max() > close:
        raise RigsaError(
            f"--packing: {type(model).__name__} with --attention {attention} lets a text depend on what stands before "
            "it in its row; expected a model and an attention that go by position ids, such as sdpa with Llama"
        )


def _last_logits(model: nn.Module, ids: Tensor, places: Tensor) -> Tensor:
    """float32 ``[1, 7, vocabulary]``: of the text at the end of the row."""
    logits: Tensor = model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=7).logits
    return logits[:, -7:].float()
