"""What a run was made on, for whoever reads its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "rigsa")
_LINUX_CPU = Path("/proc/cpuinfo")


def hardware() -> str:
    """``NVIDIA GeForce RTX 4090`` or ``Intel(R) Xeon(R) Processor, 2 threads``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """``torch 2.13.0, transformers 5.23.0, ...``."""
    return ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _cpu() -> str:
    if _LINUX_CPU.exists():
        for line in _LINUX_CPU.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
