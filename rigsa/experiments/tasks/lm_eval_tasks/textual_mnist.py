"""The data of the lm-eval task: rigsa's images as text."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from rigsa.experiments.tasks.textual_mnist import Images, image_text, load_splits

MOST_EXAMPLES = 100


def load(data: str, seed: int, **_: object) -> dict[str, Dataset]:
    """``test``, and ``examples``: training images in the order in which rigsa takes them for a seed.

    Args:
        data: ``digits``, ``mnist`` or a folder of IDX files (`rigsa.experiments.tasks.textual_mnist.load_splits`).
        seed: of the order.
    """
    splits = load_splits(data)
    order = np.random.default_rng(seed).permutation(len(splits.train))
    return {"test": _as_text(splits.test), "examples": _as_text(splits.train.take(order[:MOST_EXAMPLES]))}


def _as_text(images: Images) -> Dataset:
    return Dataset.from_dict(
        {"image": [image_text(levels) for levels in images.levels], "digit": [str(label) for label in images.labels]}
    )
