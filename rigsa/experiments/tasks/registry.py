"""From a configuration to its task."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from rigsa.experiments.config import OPTIONS, Config, require
from rigsa.experiments.tasks.task import Task
from rigsa.experiments.tasks.text import TextTask, format_of
from rigsa.experiments.tasks.textual_mnist import TextualMnist

OF_TEXTS = ("validation_share", "max_length", "group_by_length", "packing", "score")
"""Fields that images of digits have no use for."""


def load_task(config: Config) -> Task:
    """Read and check the data of a run. Raises RigsaError where they are missing or not what they should be."""
    if config.is_text:
        return TextTask(config)
    for name in OF_TEXTS:
        usual = OPTIONS[name].default
        require(config, name, f"{usual} for images of digits, as only texts have it", getattr(config, name) == usual)
    return TextualMnist(config)


@functools.cache
def _format_of(source: str) -> str:
    """Read once for all runs of a sweep."""
    return format_of(source)


def recognise(config: Config) -> Config:
    """`config` with the format of its data named, so that a run folder says it without them.

    Raises:
        RigsaError: the data are not there, or their format is none that is known.
    """
    if config.format != "auto":
        return config
    if not config.is_text and not Path(config.data).is_dir():
        return config  # the name says it, or there is nothing
    return dataclasses.replace(config, format=_format_of(config.data) if config.is_text else "images")
