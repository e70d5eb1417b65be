"""The most memory that was held at once."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_LINUX_RESET, _LINUX_STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory`, where the system can (a GPU, and Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _LINUX_RESET.write_text("5")


def peak_memory() -> int:
    """Bytes: the most the GPU's allocator held, or on a CPU the process, since `reset_peak_memory`.

    A system other than Linux cannot reset, so there it is the peak since the process began.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if _LINUX_STATUS.exists():
        return next(int(line.split()[1]) for line in _LINUX_STATUS.open() if line.startswith("VmHWM")) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
