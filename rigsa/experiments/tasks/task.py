"""What a run trains on and is scored by, as one object: `Task`.

Training, masks from gradients, evaluation, the memory plan and the conversation know a task by this interface alone.
A *sample* is ``{"input_ids": token ids, "targets": token ids}``. Its targets are what follows each of its last
positions, `IGNORED` where nothing is learned, so a model computes no logits that no one asks for.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rigsa.experiments.tasks.conversation import Conversation

IGNORED = -100
Sample = dict[str, Any]
Batch = dict[str, Tensor]


class Samples(Dataset[Sample], abc.ABC):
    """Samples of one split.

    Args:
        pad_id: the token that fills a batch up. No position that holds it is seen or learned.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.pad_id)


@dataclass(frozen=True)
class Size:
    """The largest batch row that training makes, for the memory plan.

    Attributes:
        tokens: positions that the model reads.
        targets: positions at the end whose logits are computed.
        padded: rows of a batch may differ in length, so that it has an attention mask.
        packed: a row may hold several texts, so that the logits of all of its positions are computed, and there is an
            attention mask of blocks.
    """

    tokens: int
    targets: int = 1
    padded: bool = False
    packed: bool = False


class Task(abc.ABC):
    """Examples in three splits, with the tokenizer of the model that reads them.

    It is made in two steps: the constructor reads and checks the data before a model is loaded, and `meet` makes tokens
    of them.
    """

    conversation: Conversation

    @property
    @abc.abstractmethod
    def num_training(self) -> int:
        """How many training examples a level draws from."""

    @abc.abstractmethod
    def meet(self, tokenizer: Any, longest: int | None) -> None:
        """Make tokens of the examples.

        Args:
            tokenizer: of the model.
            longest: the most tokens that the model takes, if it says so.

        Raises:
            RigsaError: the tokenizer does not fit, or an example does not.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """The data in one line or more: where from, how many, how long, what was left out or cut."""

    @abc.abstractmethod
    def training(self) -> Samples: ...

    @abc.abstractmethod
    def validation(self) -> Samples: ...

    @abc.abstractmethod
    def tests(self) -> dict[str, Samples]:
        """Name to the test samples, the headline first."""

    @abc.abstractmethod
    def size(self) -> Size:
        """The largest row of a training batch."""

    def asked(self) -> dict[str, str]:
        """What the training examples ask, to the place of one that asks it; nothing where no one else could ask it."""
        return {}

    def score(self, model: PreTrainedModel, batch_size: int, label: str) -> dict[str, dict[str, Any]]:
        """Scores of what the model generates, by name; most tasks have none.

        Args:
            model: in evaluation mode.
            batch_size: prompts a pass.
            label: of the progress bar.
        """
        return {}


def positions(mask: Tensor) -> Tensor:
    """int64 ``[B, T]``: each token's place in its own prompt, from a mask that is 0 where a row is padded on the left.

    A model with learned positions would else read a prompt as one that begins in the middle.
    """
    return (mask.cumsum(-1) - 1).clamp(min=0)


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """``input_ids [B, T]`` and ``targets [B, K]``, padded on the left, so that all rows end at the last position.

    Rows of one length have no ``attention_mask`` to pay for. K is the most targets that a row of the batch has.
    """
    width = max(len(sample["input_ids"]) for sample in samples)
    kept = max(len(sample["targets"]) for sample in samples)
    padding = [width - len(sample["input_ids"]) for sample in samples]
    batch = {
        "input_ids": _padded_left(samples, "input_ids", width, pad_id),
        "targets": _padded_left(samples, "targets", kept, IGNORED),
    }
    if any(padding):
        mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long()
        batch |= {"attention_mask": mask, "position_ids": positions(mask)}
    return batch


def _padded_left(samples: Sequence[Sample], name: str, width: int, value: int) -> Tensor:
    return torch.tensor([[value] * (width - len(sample[name])) + list(sample[name]) for sample in samples])


def num_targets(batch: Batch) -> Tensor:
    """How many tokens of a batch are learned: an int64 scalar on the batch's device."""
    return (batch["targets"] != IGNORED).sum()
