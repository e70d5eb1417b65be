"""The steps again with Liger's kernels for the rest of the model: norms, rotations and the gated activation.

Liger puts its functions into transformers for the whole process, so this is a section of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.questions import STEPPING, Build
from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.steps import race
from benchmarks.providers import FROZEN, FULL, LORA_16, TICKET_NAME, Trainee
from benchmarks.race import UnavailableError

CONTESTANTS = (FULL, TICKET_NAME, LORA_16, FROZEN)


def run(setting: Setting, journal: Journal) -> None:
    if setting.dry:
        journal.row(provider="Liger", skipped="no GPU")
        raise UnavailableError("Liger: its kernels need a GPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        journal.row(provider="Liger", skipped="not installed")
        raise UnavailableError(f"Liger: {error}; pip install liger-kernel") from error

    def with_liger(build: Build) -> Callable[[nn.Module], Trainee]:
        def built(model: nn.Module) -> Trainee:
            apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
            return build(model)

        return built

    for size in ("135M", "1.7B"):
        race(setting, journal, size, {name: with_liger(STEPPING[name]) for name in CONTESTANTS}, liger=True)
