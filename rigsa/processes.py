"""A model that several processes train: shards made whole (FSDP2), and exchanged parameters made known (DDP)."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from rigsa_kernels.format import SparsePattern

_SETTINGS_OF_DDP = (
    "device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view",
    "static_graph",
)  # fmt: skip
_OF_DDP = ("training", "broadcast_buffers", "forward_sync_buffers", "require_backward_grad_sync")
"""Attributes of a wrapper that its constructor does not take under this name in every version of PyTorch."""


def is_main() -> bool:
    """Whether this is the process with rank 0, or the only one."""
    return not _are_several() or torch.distributed.get_rank() == 0


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wait_for_all() -> None:
    """Until every process has come here."""
    if _are_several():
        torch.distributed.barrier()


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of `model` is in shards: a DTensor (told by its method: its module takes long to import)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, the main process has a sharded model's parameters in full, on the CPU. All processes have to enter."""
    shards = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if hasattr(parameter, "full_tensor")
    ]
    try:
        for module, name, parameter in shards:
            gathered = parameter.full_tensor().detach()
            if is_main():
                setattr(module, name, nn.Parameter(gathered.cpu(), requires_grad=parameter.requires_grad))
        yield
    finally:
        for module, name, parameter in shards:
            setattr(module, name, parameter)


def ddp_around(model: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel whose module is `model`."""
    # Asked of the garbage collector, as neither a model nor a Trainer's callback knows what stands around the model.
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel) and one.module is model]


def renew_ddp(model: nn.Module) -> None:
    """Have every DistributedDataParallel around `model` average the gradients of the parameters that it has now.

    It keeps the parameters that it was made with, so one whose model took other patterns is made again, as the same
    object with the same settings: whoever holds it, such as a Trainer, goes on. Nothing is sent; every process is
    expected to hold the same values already.

    Raises:
        ValueError: one of them has a mixed precision of its own, whose hooks would be doubled.
    """
    found = ddp_around(model)
    for wrapper in found:
        if getattr(wrapper, "mixed_precision", None) is not None:
            raise ValueError(
                "DistributedDataParallel: expected mixed_precision=None where patterns change; use autocast"
            )
    for wrapper in found:
        kept: dict[str, Any] = {name: vars(wrapper)[name] for name in _OF_DDP if name in vars(wrapper)}
        settings = {name: getattr(wrapper, name) for name in _SETTINGS_OF_DDP}
        if not wrapper.bucket_bytes_cap_default:
            settings["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
        hooks = list(wrapper._comm_hooks)
        DistributedDataParallel.__init__(wrapper, model, init_sync=False, **settings)
        vars(wrapper).update(kept)
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)


def check_same_patterns(patterns: Mapping[str, SparsePattern]) -> None:
    """Raises RuntimeError in every process where one of them has other patterns. All processes have to call this."""
    if not _are_several():
        return
    digest = hashlib.sha256()
    for name, pattern in patterns.items():
        digest.update(name.encode())
        if pattern.words is not None:
            digest.update(pattern.words.cpu().flatten().view(torch.uint8).numpy().data)
    own = int.from_bytes(digest.digest()[:7], "little")
    device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    ends = torch.tensor([own, -own], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    largest, smallest = ends[0].item(), -ends[1].item()
    if largest != smallest:
        raise RuntimeError(
            "the processes have pruned to other patterns, so they do not hold the same values; seed all of them alike, "
            "and wrap the model in DistributedDataParallel before training"
        )
