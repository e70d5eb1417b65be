"""Loss and accuracy of a model on the samples of a task (`rigsa.experiments.tasks.task`), whatever the task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rigsa.experiments.tasks.task import IGNORED, Batch, Samples, num_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_LOGITS = 2**27
"""In one pass of a test: 512 MiB in float32, and as much again for the cross-entropy."""


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """float32 ``[B, K, vocabulary]``: what the model says of the targets. The head sees no position before them."""
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    kept = batch["targets"].shape[1]
    logits: Tensor = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return logits[:, -kept:].float()


def training_loss(model: nn.Module, batch: Batch, num_learned: Tensor | int | None = None) -> Tensor:
    """Sum of the cross-entropy over the targets of a micro-batch, divided by the number of targets of the whole step.

    Added up over the micro-batches of a step it is the mean over all of the step's targets, so it does not depend on
    how the step was divided.

    Args:
        model: in training mode.
        batch: of `rigsa.experiments.tasks.task.collate`.
        num_learned: targets in all micro-batches of the step; this batch's own by default.
    """
    logits = target_logits(model, batch)
    total = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum", ignore_index=IGNORED)
    return total / (num_targets(batch) if num_learned is None else num_learned)


@torch.inference_mode()
def evaluate(model: PreTrainedModel, samples: Samples, batch_size: int, label: str) -> dict[str, Any]:
    """``{"accuracy": ..., "loss": ..., "perplexity": ..., "tokens": ..., "examples": ...}`` on the samples.

    Accuracy is the percentage of targets that are the likeliest token, loss their mean cross-entropy, perplexity its
    exponential, tokens their number, and examples the number of samples.

    Args:
        model: in evaluation mode.
        samples: of one split.
        batch_size: samples a pass; fewer where they have more than `MOST_LOGITS` logits, as long answers do.
        label: of the progress bar.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for batch in tqdm(
        DataLoader(samples, batch_size, collate_fn=samples.collate), desc=label, unit="batch", leave=False
    ):
        for part in in_passes({name: tensor.to(device) for name, tensor in batch.items()}, vocabulary):
            logits, targets = target_logits(model, part).flatten(0, 1), part["targets"].flatten()
            correct += (logits.argmax(-1) == targets).sum()
            loss += F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED).double()
            count += num_targets(part)
    mean = loss.item() / count.item()
    return {
        "accuracy": 100 * correct.item() / count.item(),
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "tokens": int(count.item()),
        "examples": len(samples),
    }


def in_passes(batch: Batch, vocabulary: int) -> Iterator[Batch]:
    """The rows of a batch, in parts of at most `MOST_LOGITS` logits, or of one row."""
    rows, targets = batch["targets"].shape
    size = max(1, MOST_LOGITS // (targets * vocabulary))
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}
