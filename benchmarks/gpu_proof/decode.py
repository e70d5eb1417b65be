"""Greedy generation: milliseconds a token of the base model, a ticket, the merged ticket and LoRA."""

from __future__ import annotations

import gc
import time

import torch

from benchmarks.bench_generate import BUILDERS
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.questions import NEW_TOKENS, generation_batch, model_of
from benchmarks.gpu_proof.setting import Setting
from benchmarks.models import prompts
from benchmarks.providers import LORA_16, MERGED, TICKET_NAME
from benchmarks.targets import BASE

CONTESTANTS = (BASE, TICKET_NAME, MERGED, LORA_16, "ours, 3.46 %, exact", BASE)
"""The base model comes first and last: what differs between its two rows is noise."""
REPEATS = 2


def run(setting: Setting, journal: Journal) -> None:
    for size in ("135M",) if setting.dry else ("135M", "1.7B"):
        for name in CONTESTANTS:
            with journal.guarded(size=size, provider=name) as row:
                row |= _generate(setting, size, name)
            gc.collect()


def _generate(setting: Setting, size: str, name: str) -> dict[str, float]:
    """The fastest of a few generations, as a neighbour on the host only ever adds."""
    batch, count = generation_batch(setting, size), 4 if setting.dry else NEW_TOKENS[size]
    ids = prompts(batch, setting.device)
    model = BUILDERS[name](model_of(setting, batch)).model
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

    def generate() -> float:
        setting.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        setting.synchronize()
        return time.perf_counter() - start

    generate()
    seconds = [generate() for _ in range(1 if setting.dry else REPEATS)]
    return {"ms_per_token": min(seconds) / count * 1e3}
