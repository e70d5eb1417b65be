"""Masks from gradients at the pretrained model: SIFT, FISH masks, SAM and RoSA.

A layer attached dense, with zeros for a difference and a gate of 1, is the pretrained layer, and the gradient of its
difference is that of the weight. With g_i the gradient of image i and b_j that of batch j:

======  ==============================  ===========================================================================
sift    |mean g_i|                      of the first images (Song et al., "Sparse is Enough in Fine-tuning", 2024)
fisher  mean g_i^2                      the empirical Fisher information (Sung et al., "Training Neural Networks
                                        with Fixed Sparse Masks", 2021)
sam     (mean g_i)^2 / (h + mean h)     the gain of a second-order model of the loss (Fu et al., "On the
                                        Effectiveness of Parameter-Efficient Fine-Tuning", 2023, who leave the
                                        curvature h open); h is the empirical Fisher information here, damped by
                                        its mean over the layer
rosa    mean b_j^2                      of batches as training makes them (Nikdan et al., "RoSA", 2024)
======  ==============================  ===========================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from rigsa.evaluate import training_loss
from rigsa.experiment import Experiment
from rigsa.textual_mnist import PromptDataset, collate
from rigsa.ticket import highest, run_ticket
from rigsa_kernels import SparsePattern, gated_linears

Scores = dict[str, Tensor]
"""Layer name to a dense float32 ``[N, K]`` matrix."""


def run_gradient_mask(experiment: Experiment) -> None:
    """One level, on the entries that the method's score ranks highest."""
    run_ticket(experiment, choose_by_gradient)


def choose_by_gradient(experiment: Experiment) -> tuple[dict[str, SparsePattern], dict[str, Any]]:
    config = experiment.config
    patterns, record = highest(config, SCORES[config.method](experiment))
    return patterns, record | {"images": config.mask_images}


def sift(experiment: Experiment) -> Scores:
    (mean,) = mean_of_gradients(experiment, experiment.config.micro_batch_size, lambda g: g)
    return {name: gradient.abs_() for name, gradient in mean.items()}


def fisher(experiment: Experiment) -> Scores:
    return mean_of_gradients(experiment, 1, torch.square)[0]


def sam(experiment: Experiment) -> Scores:
    mean, curvature = mean_of_gradients(experiment, 1, lambda g: g, torch.square)
    return {name: g.square_() / (curvature[name] + curvature[name].mean()) for name, g in mean.items()}


def rosa(experiment: Experiment) -> Scores:
    return mean_of_gradients(experiment, experiment.config.micro_batch_size, torch.square)[0]


SCORES: dict[str, Callable[[Experiment], Scores]] = {"sift": sift, "fisher": fisher, "sam": sam, "rosa": rosa}


def mean_of_gradients(
    experiment: Experiment, images_at_a_time: int, *functions: Callable[[Tensor], Tensor]
) -> list[Scores]:
    """For each of `functions` the mean of ``function(gradient)`` over ``mask_images`` training images.

    Args:
        experiment: with a dense adapter attached.
        images_at_a_time: that share one gradient, the mean of theirs.
        functions: elementwise.
    """
    model, loss = experiment.model.train(), experiment.config.loss
    layers = gated_linears(model)
    values = {name: layer.rigsa_values for name, layer in layers.items()}
    sums = [{name: torch.zeros_like(value, dtype=torch.float32) for name, value in values.items()} for _ in functions]
    batches = _batches(experiment, images_at_a_time)
    with training_only(list(values.values()), model):
        for batch in tqdm(batches, desc="gradients for the mask", unit="batch", leave=False):
            training_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, loss).backward()
            for name, value in values.items():
                assert value.grad is not None
                for function, total in zip(functions, sums, strict=True):
                    total[name] += function(value.grad.float())
                value.grad = None
    return [{name: value.div_(len(batches)) for name, value in total.items()} for total in sums]


@contextlib.contextmanager
def training_only(parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Inside, nothing else of `model` gathers gradients: not the low-rank difference beside a sparse one."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _batches(experiment: Experiment, size: int) -> DataLoader[Any]:
    config, dataset = experiment.config, PromptDataset(experiment.splits.train, experiment.prompts)
    draw = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = Subset(dataset, draw[: config.mask_images].tolist())
    return DataLoader(chosen, size, collate_fn=partial(collate, pad_id=experiment.prompts.pad_id))
