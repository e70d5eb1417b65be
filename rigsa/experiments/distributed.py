"""One run on several processes: who writes, who waits, and which options do not go together.

accelerate does the work. It reads what ``torchrun`` and ``accelerate launch`` set.

Only the main process, rank 0, writes a run folder. A step is done ``with main_first()``: the main process does it and
marks it as done, then the others enter, find it done and read it. That is the way an interrupted run goes on, too.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from rigsa.errors import RigsaError
from rigsa.experiments.config import Config, Training

LONGEST_STEP = timedelta(days=1)
"""Nobody waits longer for another process: for the main process, while it measures on the test images. A process that
fails is not waited for: the launcher stops the others."""


def join(on_cpu: bool) -> None:
    """Meet the other processes, if a launcher started any, and take the GPU with this process's local rank."""
    PartialState(cpu=on_cpu, timeout=LONGEST_STEP)


def leave() -> None:
    """Part from the other processes. Call it at the end of a run that went well."""
    PartialState().destroy_process_group()


def is_main() -> bool:
    return PartialState().is_main_process


def num_processes() -> int:
    return PartialState().num_processes


def wait_for_all() -> None:
    PartialState().wait_for_everyone()


def main_first() -> AbstractContextManager[None]:
    """The block runs in the main process, and after it in the others."""
    return PartialState().main_process_first()


def accumulation_steps(config: Training) -> int:
    """Micro-batches of each process in one optimiser step.

    Raises:
        RigsaError: the processes cannot share a batch evenly.
    """
    together = num_processes() * config.micro_batch_size
    if config.batch_size % together:
        raise RigsaError(
            f"--batch-size {config.batch_size} and --micro-batch-size {config.micro_batch_size} on {num_processes()} "
            f"processes: expected a batch size that {together} divides (processes times micro-batch size)"
        )
    return config.batch_size // together


def check(config: Config) -> None:
    """Raises RigsaError where `config` does not go together with the processes of this run."""
    if config.step_in_backward and num_processes() > 1:
        raise RigsaError(
            f"--step-in-backward on {num_processes()} processes: expected one process, as a gradient that is freed at "
            "once cannot be averaged over several"
        )
    accumulation_steps(config)
    if is_sharding():
        _check_sharding(config)


def is_sharding() -> bool:
    """Whether ``accelerate launch --use_fsdp`` asks for shards instead of a copy in every process."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def on_gpus() -> bool:
    """Whether there are several processes with a GPU each: elsewhere accelerate would copy without a word."""
    return PartialState().distributed_type not in (DistributedType.MULTI_CPU, DistributedType.NO)


def _check_sharding(config: Config) -> None:
    if config.method.whole_because:
        raise RigsaError(f"{config.method} under FSDP: {config.method.whole_because}")
    if not on_gpus():
        raise RigsaError("FSDP: expected several processes with a GPU each, got a CPU or one process")
    efficient = str(parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")).lower()
    for name, got, expected, reason in (
        ("--fsdp_version", os.environ.get("FSDP_VERSION", "1"), "2", "version 1 flattens parameters"),
        ("--fsdp_cpu_ram_efficient_loading", efficient, "false", "every process makes its own initial values"),
        ("--values-dtype", config.values_dtype, "float32", "what is sharded together has one dtype, the gates'"),
        ("--gate", config.gate, "layer", "each decoder layer is sharded by itself"),
        ("--quantize", config.quantize, "none", "accelerate does not shard 4-bit weights"),
        ("--keep-trainable", config.keep_trainable or "''", "''", "only the adapter's parameters were tried in shards"),
        ("--rewind-step", str(config.rewind_step), "0", "it writes the adapter down while it is in shards"),
        ("--early-bird-steps", str(config.early_bird_steps), "0", "it ranks values while they are in shards"),
    ):
        if got != expected:
            raise RigsaError(f"{name} {got}: expected {expected} under FSDP, as {reason}")
