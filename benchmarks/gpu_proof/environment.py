"""Card, driver and versions, and the two ceilings that everything is held against."""

from __future__ import annotations

import platform

import torch

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting, ask_driver, cores
from benchmarks.machine import Machine
from rigsa.experiments.hardware import hardware


def run(setting: Setting, journal: Journal) -> None:
    side, copied = (128, 2**16) if setting.dry else (8192, 2**31)
    machine = Machine(setting.device, side, copied)
    journal.note(
        hardware=hardware(), python=platform.python_version(), cores=cores(), dry=setting.dry, **machine.info()
    )
    if not setting.dry:
        card = torch.cuda.get_device_properties(setting.device)
        journal.note(
            driver=ask_driver("driver_version"), cuda=torch.version.cuda, compute_capability=[card.major, card.minor],
            memory_gib=card.total_memory / 2**30, multiprocessors=card.multi_processor_count,
        )  # fmt: skip
    journal.row(ceiling="copy, read and written", unit="GB/s", measured=machine.bandwidth() / 1e9)
    journal.row(ceiling="bf16 product", unit="TFLOP/s", measured=machine.flops(torch.bfloat16) / 1e12)
