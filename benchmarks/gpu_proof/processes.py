"""Processes that start quickly, because they are forked from one that has imported everything.

A process cannot use CUDA if it was forked from one that had touched it; imports of other people's packages sometimes
do. So a first child is asked whether it could; if not, new interpreters are started instead: slower, and right.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.context import BaseContext

import torch


def fork_server(preloaded: Sequence[str]) -> BaseContext:
    """Children of a server that has imported `preloaded` and nothing else."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # PyTorch then asks whether there is a GPU without touching it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    return _if_sound(context)


def forks() -> BaseContext:
    """Children of this process."""
    return _if_sound(multiprocessing.get_context("fork"))


def _if_sound(context: BaseContext) -> BaseContext:
    probe = context.Process(target=_exit_if_cuda_was_touched)  # type: ignore[attr-defined]
    probe.start()
    probe.join()
    return context if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _exit_if_cuda_was_touched() -> None:
    raise SystemExit(int(torch.cuda._is_in_bad_fork()))
