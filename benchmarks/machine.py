"""What this machine can do, measured: products a second, bytes a second. Rooflines are drawn at these."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

import torch

from benchmarks.race import Stopwatch

SIDE = 2048
COPIED = 2**28
REPEATS = 5
PACKAGES = ("torch", "transformers", "triton", "peft", "bitsandbytes", "pytest-benchmark")


class Machine:
    """Peaks of one device, each measured when it is first asked for: the best of a few runs.

    Args:
        device: what is measured.
        side: of the square matrices that are multiplied.
        copied: bytes that are copied.
    """

    def __init__(self, device: torch.device, side: int = SIDE, copied: int = COPIED) -> None:
        self.device, self.side, self.copied = device, side, copied
        self.stopwatch = Stopwatch(device)
        self.flops = cache(self._flops)
        self.bandwidth = cache(self._bandwidth)

    def roofline(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Least seconds of one operation: its products and its bytes overlap."""
        return max(flops / self.flops(dtype), moved / self.bandwidth())

    def total(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Least seconds of a whole step: its products and its bytes are in different operations."""
        return flops / self.flops(dtype) + moved / self.bandwidth()

    def info(self) -> dict[str, Any]:
        """What a reader of the numbers has to know."""
        versions = {name: _version(name) for name in PACKAGES}
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        return {"device": gpu or "cpu", "threads": torch.get_num_threads(), "versions": versions}

    def _flops(self, dtype: torch.dtype) -> float:
        a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
        return 2 * self.side**3 / self.best(lambda: a @ b)

    def _bandwidth(self) -> float:
        noise = torch.randint(-128, 128, (2**16,), dtype=torch.int8, device=self.device)  # zeros can be faster
        source = noise.repeat(-(-self.copied // 2**16))[: self.copied]
        target = torch.zeros_like(source)
        return 2 * self.copied / self.best(lambda: target.copy_(source))

    def best(self, run: Any) -> float:
        run()
        return min(self.stopwatch(run) for _ in range(REPEATS))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
