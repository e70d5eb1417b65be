"""Accuracy and loss on Textual MNIST: one generated token, the whole vocabulary to choose from."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rigsa.experiments.tasks.textual_mnist import PromptDataset, collate, positions

IGNORED = -100


def answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """float32 ``[B, vocabulary]``: the logits of the token after each prompt. The head sees no other position."""
    inputs: dict[str, Tensor] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    if "attention_mask" in batch:
        inputs["position_ids"] = positions(batch["attention_mask"])
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()


def training_loss(model: nn.Module, batch: dict[str, Tensor], covers: str) -> Tensor:
    """Mean over prompts of the cross-entropy of the answer token, or of its mean over all tokens from the second on.

    Every prompt counts as much as every other, however long it is, so the mean over micro-batches of one size is that
    of the whole batch.

    Args:
        model: in training mode.
        batch: of `rigsa.experiments.tasks.textual_mnist.collate`.
        covers: ``answer`` or ``all``.
    """
    if covers == "answer":
        return F.cross_entropy(answer_logits(model, batch), batch["answer"])
    ids = torch.cat([batch["input_ids"], batch["answer"][:, None]], dim=1)
    present = F.pad(batch.get("attention_mask", torch.ones_like(batch["input_ids"])), (0, 1), value=1)
    predicted = present * F.pad(present, (1, 0))[:, :-1]  # a first token has nothing before it to be predicted from
    places = {"position_ids": positions(present)} if "attention_mask" in batch else {}
    logits = model(input_ids=ids, attention_mask=present, use_cache=False, **places).logits.float()
    labels = F.pad(ids.masked_fill(predicted == 0, IGNORED)[:, 1:], (0, 1), value=IGNORED)  # of the token after each
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return (losses.view(ids.shape).sum(1) / predicted.sum(1)).mean()


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: PromptDataset, batch_size: int, label: str) -> dict[str, Any]:
    """``{"accuracy": percent, "loss": mean cross-entropy, "images": count}`` of greedy one-token answers.

    Args:
        model: in evaluation mode.
        dataset: prompts and answers.
        batch_size: prompts a pass.
        label: of the progress bar.
    """
    device = next(model.parameters()).device
    batches = DataLoader(dataset, batch_size, collate_fn=partial(collate, pad_id=dataset.prompts.pad_id))
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch in tqdm(batches, desc=label, unit="batch", leave=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = answer_logits(model, batch)
        correct += (logits.argmax(-1) == batch["answer"]).sum()
        loss += F.cross_entropy(logits, batch["answer"], reduction="sum").double()
    count = len(dataset)
    return {"accuracy": 100 * correct.item() / count, "loss": loss.item() / count, "images": count}
