"""What a run is made on: for whoever reads its numbers, and for what depends on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rigsa_kernels

_LINUX_CPU = Path("/proc/cpuinfo")


def hardware() -> str:
    """``NVIDIA GeForce RTX 4090`` or ``Intel(R) Xeon(R) Processor, 2 threads``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def has_bfloat16_products(device: str) -> bool:
    """Whether products of bfloat16 matrices are fast.

    They are on every GPU that the kernels run on, and on a CPU for which oneDNN has them (x86 with AVX-512, ARM with
    BF16). On others they take 6 to 100 times as long as those of float32 (docs/benchmarks.md).

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if PyTorch sees one.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def usual_dtype(device: str) -> str:
    """The faster dtype of a model on `device`: bfloat16, or float32 if its products of bfloat16 are slow."""
    return "bfloat16" if has_bfloat16_products(device) else "float32"


def versions(*names: str) -> str:
    """``torch 2.13.0, transformers 5.23.0, ..., rigsa 0.1.0``.

    Args:
        names: of packages beside our own, which counts as it was imported, installed or not.
    """
    return ", ".join([*(f"{name} {_installed(name)}" for name in names), f"rigsa {rigsa_kernels.__version__}"])


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    if _LINUX_CPU.exists():
        for line in _LINUX_CPU.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
