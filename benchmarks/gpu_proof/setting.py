"""What every section is told: where it runs, how large its questions are, and until when."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""


@dataclass(frozen=True)
class Setting:
    """Attributes:
    out: the folder of results.
    dry: tiny sizes on a CPU, to prove that everything runs.
    deadline: of the section, on `time.monotonic`; its process is killed then.
    data: a folder with MNIST's IDX files; "" for none.
    runs: a folder where the run of the section `mnist` is kept, so that the next command goes on with it; "" for none.
    """

    out: Path
    dry: bool
    deadline: float
    data: str = ""
    runs: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def ask_driver(field: str) -> str | None:
    """A field of nvidia-smi, of the first GPU. It initialises no CUDA in this process, which can be forked after it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None


def cores() -> int:
    return os.cpu_count() or 1
