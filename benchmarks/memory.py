"""Bytes: what a forward pass keeps for backward, what tensors hold, and what a call allocates at its worst moment."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.race import Run
from rigsa_kernels import gated_linears


def saved_bytes(run: Run, module: nn.Module) -> int:
    """Storages that autograd saves during `run` and that are not of `module`: parameters, buffers, patterns."""
    own = {_key(tensor) for tensor in tensors_of(module)}
    saved: dict[int, int] = {}
    # Alive until counted, or a storage's number could be used twice. Storages here, and detached tensors in the graph:
    # an output saved with its graph by the operation that made it would be a circle that no collector sees.
    kept: list[torch.UntypedStorage] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and _key(tensor) not in own:
            kept.append(tensor.untyped_storage())
            saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and the index tensors of gated layers' patterns."""
    patterns = [tensor for layer in gated_linears(module).values() for tensor in layer.pattern.tensors]
    return [*module.parameters(), *module.buffers(), *patterns]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind `tensors`, each once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def extra_bytes(run: Run, device: torch.device) -> int:
    """The most that `run` has allocated at once beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
