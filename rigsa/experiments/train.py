"""One level: train the adapter that `model` carries, on transformers.Trainer, from the last checkpoint if there is one.

The Trainer's checkpoints hold the adapter alone, and count only once they carry a marker, so a process killed at any
moment resumes to the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler, Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerState

from rigsa.errors import RigsaError
from rigsa.experiments.adapter import (
    base_fingerprint,
    load_adapter,
    load_masks,
    save_adapter,
    save_masks,
    trained_parameters,
)
from rigsa.experiments.checkpoints import checkpoint_step, latest_checkpoint, mark_checkpoint, remove_old
from rigsa.experiments.config import Config, Training
from rigsa.experiments.distributed import (
    accumulation_steps,
    is_main,
    is_sharding,
    main_first,
    num_processes,
    wait_for_all,
)
from rigsa.experiments.hardware import hardware, versions
from rigsa.experiments.kept import kept_parameters
from rigsa.experiments.peak_memory import peak_memory, reset_peak_memory
from rigsa.experiments.records import LOG_LINE, read_lines
from rigsa.experiments.run_folder import ADAPTER_FILE, CHECKPOINTS, LOG_FILE, MASK_FILE, RESOURCES_FILE
from rigsa.experiments.tasks.evaluation import target_logits, training_loss
from rigsa.experiments.tasks.packing import pack
from rigsa.experiments.tasks.task import Batch, Samples, num_targets
from rigsa.experiments.tasks.text import TextSamples
from rigsa.files import read_json, write_json, write_text
from rigsa.processes import is_sharded, whole
from rigsa_kernels import MaskedAdamW, gated_linears, parameter_groups
from rigsa_kernels.launches import local_part
from rigsa_kernels.optim import stepping_in_backward
from rigsa_kernels.reference import NonFiniteGateError

_STATE_FILE = "trainer_state.json"
_LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def steps_per_epoch(config: Training, num_examples: int) -> int:
    """Optimiser steps of one pass over the training examples; a last incomplete batch is dropped.

    Raises:
        RigsaError: there are fewer examples than one batch needs.
    """
    if num_examples < config.batch_size:
        raise RigsaError(f"--batch-size {config.batch_size}: there are only {num_examples} training examples")
    return num_examples // config.batch_size


def steps_per_level(config: Training, num_examples: int) -> int:
    """Optimiser steps of one level. Raises RigsaError as `steps_per_epoch`."""
    steps = config.epochs * steps_per_epoch(config, num_examples)
    return min(steps, config.max_steps) if config.max_steps else steps


class PatternMover(TrainerCallback):
    """A callback that moves patterns while the model trains, so that masks have to be saved with the values.

    It moves them in `on_step_end`, before a checkpoint of that step is written.
    """


class AddsParameters(TrainerCallback):
    """A callback with parameters of its own. Checkpoints hold them beside the adapter's; what is trained does not."""

    def put_on(self, model: nn.Module) -> None:
        """Add them, at their start."""
        raise NotImplementedError

    def take_off(self, model: nn.Module) -> None:
        """Remove them, and leave what they have made of the adapter."""
        raise NotImplementedError


class EndsEarly(TrainerCallback):
    """A callback that may end a level before its last step."""

    def ended_at(self) -> int | None:
        """The step at which it ended the level, or None. It writes that down before any checkpoint of that step."""
        raise NotImplementedError


def train_level(
    model: nn.Module,
    samples: Samples,
    config: Config,
    folder: Path,
    label: str,
    callbacks: Sequence[TrainerCallback] = (),
    first_step: int = 0,
    kept_rate: float | None = None,
) -> None:
    """Train, then write the adapter, the resources used and, last, the log. A level with a log is loaded instead.

    On several processes all of them train, and the main one writes. Under FSDP `model` is left in shards.

    Args:
        model: with the adapter at its start.
        samples: of the training split.
        config: of the level (`Config.at_level`).
        folder: of the level.
        label: of the progress bar.
        callbacks: more of them; where there is a `PatternMover`, the level's mask is written before the adapter, and
            where one `AddsParameters`, the model has these while it trains.
        first_step: of the schedule; only the steps from there on are made.
        kept_rate: of `make_optimizer`.

    Raises:
        RigsaError: the loss or a value became non-finite (step and layer are named), or a file cannot be written.
    """
    moving = any(isinstance(callback, PatternMover) for callback in callbacks)
    if (folder / LOG_FILE).exists():
        load_trained(model, folder, moving)
        return
    reset_peak_memory()
    adding = [callback for callback in callbacks if isinstance(callback, AddsParameters)]
    for callback in adding:
        callback.put_on(model)
    with main_first():
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        check_processes(checkpoint)
        load_trained(model, checkpoint, moving)
    steps = steps_per_level(config, len(samples)) - first_step
    watch = ProgressAndTime(label)
    trainer = LevelTrainer(
        config=config,
        moving=moving,
        first_step=first_step,
        kept_rate=kept_rate,
        model=model,
        args=training_arguments(config, steps, folder / CHECKPOINTS),
        train_dataset=samples,
        data_collator=partial(pack, pad_id=samples.pad_id) if config.packing else samples.collate,
        callbacks=[watch, MarkCheckpoint(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    ended = [callback.ended_at() for callback in callbacks if isinstance(callback, EndsEarly)]
    if checkpoint is not None and checkpoint_step(checkpoint) in (steps, *ended):
        trainer.state = TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
        states = read_json(checkpoint / _STATE_FILE)["stateful_callbacks"]
        watch.before = states[ProgressAndTime.__name__]["attributes"]["before"]
    else:
        optimizer = trainer.create_optimizer()
        with stepping_in_backward(optimizer) if config.step_in_backward else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    for callback in adding:
        callback.take_off(model)
    with whole(model), main_first():
        if not (folder / LOG_FILE).exists():
            save_trained(model, folder, moving)
            used = {"train_seconds": watch.seconds, "peak_memory_bytes": peak_memory()}
            made_on = {"hardware": hardware(), "versions": versions("torch", "triton", "transformers")}
            write_json(folder / RESOURCES_FILE, {"steps": trainer.state.global_step, **used, **made_on})
            lines = [{name: entry[name] for name in _LOGGED} for entry in trainer.state.log_history if "loss" in entry]
            write_text(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines))


def save_trained(model: nn.Module, folder: Path, moving: bool) -> None:
    """Write the adapter and, if training was `moving` the masks, those before it."""
    if moving:
        patterns = {name: layer.pattern for name, layer in gated_linears(model).items()}
        save_masks(patterns, folder / MASK_FILE, base_fingerprint(model))
    save_adapter(model, folder / ADAPTER_FILE)


def load_trained(model: nn.Module, folder: Path, moving: bool) -> None:
    """Load what `save_trained` wrote. Raises RigsaError if a file is missing or does not fit."""
    if moving:
        patterns = load_masks(model, folder / MASK_FILE)
        for name, layer in gated_linears(model).items():
            layer.set_pattern(patterns[name])
    load_adapter(model, folder / ADAPTER_FILE)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The training log of a level: step, epoch, loss (mean since the line before), learning_rate, grad_norm."""
    return read_lines(folder / LOG_FILE, LOG_LINE)


def remove_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def is_set_by_hand(parameter: Tensor) -> bool:
    """Whether its gradient comes from a callback, and not from backward."""
    return getattr(parameter, "is_set_by_hand", False)


def make_optimizer(model: nn.Module, config: Config, kept_rate: float | None = None) -> MaskedAdamW:
    """The optimiser of a level. What a callback sets gradients of has the rate and the decay of gates; what is trained
    beside the adapter has a rate of its own (`Config.rate_beside`) and is not decayed.

    Args:
        model: with what is trained.
        config: of the level.
        kept_rate: of what is trained beside the adapter; that of the values where none is given.
    """
    return MaskedAdamW(
        _groups(model, config, config.learning_rate if kept_rate is None else kept_rate),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        state_dtype=config.state_dtype,
        seed=config.seed,
    )


def _groups(model: nn.Module, config: Config, kept_rate: float) -> list[dict[str, Any]]:
    rate, decay = config.alpha_learning_rate, config.alpha_weight_decay
    groups = parameter_groups(model, rate, decay, None)  # low-rank differences beside ours decay as ours do
    kept = set(kept_parameters(model))
    by_hand = _take_out(groups, lambda name, parameter: is_set_by_hand(parameter))
    beside = _take_out(groups, lambda name, parameter: name in kept)
    apart = [
        {"params": beside, "lr": kept_rate, "weight_decay": 0.0},
        {"params": by_hand, "lr": rate, "weight_decay": decay, "state_dtype": "float32"},
    ]
    return [group for group in (*groups, *apart) if group["params"]]


def _take_out(groups: list[dict[str, Any]], belongs: Callable[[str, Tensor], bool]) -> list[tuple[str, Tensor]]:
    """Remove the named parameters that belong elsewhere from their groups, and return them."""
    found = [item for group in groups for item in group["params"] if belongs(*item)]
    for group in groups:
        group["params"] = [item for item in group["params"] if not belongs(*item)]
    return found


def training_arguments(config: Config, steps: int, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(config),
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed % 2**32,
        use_cpu=config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()),
        ddp_find_unused_parameters=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=None,  # `MarkCheckpoint` removes old ones: the Trainer goes by the clock, which may be wrong
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: without this a lone process would split batches over all it sees
    return arguments


def check_processes(checkpoint: Path) -> None:
    """Raises RigsaError where another number of processes made `checkpoint`: sums would be rounded differently."""
    then = len(list(checkpoint.glob("rng_state*.pth")))
    if then != num_processes():
        raise RigsaError(f"{checkpoint} was made by {then} processes; expected as many to go on, got {num_processes()}")


class LevelTrainer(Trainer):
    """A Trainer with our loss and schedule, checkpoints of the adapter alone, and a stop at non-finite numbers."""

    model: nn.Module
    train_dataset: Samples
    loss_is_scaled_for_ga = True  # it is divided by the targets of all micro-batches of the step

    def __init__(
        self, *, config: Config, moving: bool, first_step: int, kept_rate: float | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config, self.moving, self.first_step, self.kept_rate = config, moving, first_step, kept_rate

    def create_optimizer(self, model: nn.Module | None = None) -> MaskedAdamW:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config, self.kept_rate)
        return cast(MaskedAdamW, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The Trainer's linear schedule, which here starts at `first_step`."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # or PyTorch will not start in the middle
            self.lr_scheduler = get_linear_schedule_with_warmup(
                optimizer, self.config.warmup_steps, num_training_steps + self.first_step, self.first_step - 1
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Draw whole batches only. A smaller one would make a smaller step, and processes could not share it evenly."""
        count = steps_per_epoch(self.config, len(self.train_dataset)) * self.config.batch_size
        if self.config.group_by_length and isinstance(self.train_dataset, TextSamples):
            return LikeLengths(self.train_dataset.lengths, self.config.batch_size, self.config.seed)
        return RandomSampler(self.train_dataset, num_samples=count)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        keep_out_of_ddp(model)
        if is_sharding():
            for layer in gated_linears(model).values():
                layer.release_origin()
        return super()._wrap_model(model, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        try:
            loss = training_loss(model, inputs, num_items_in_batch)
        except NonFiniteGateError as error:
            self._stop_at_non_finite(str(error), None)
        # Reading the loss costs nothing on a CPU; on a GPU it would stop every step: there save_model and the log tell.
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            self._stop_at_non_finite(f"the loss is {loss.item()}", inputs)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """What the loss of each micro-batch is divided by: the targets of a step, as a share of them for each process.

        The mean over processes, which DDP and FSDP make of the gradients, then is that over all targets.
        """
        learned = sum((num_targets(batch) for batch in batch_samples), torch.zeros((), dtype=torch.int64)).to(device)
        if num_processes() == 1:
            return learned
        return self.accelerator.gather(learned).sum() / num_processes()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop_at_non_finite(f"the loss is {logs['loss']}", None)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with whole(self.model):
            if first_non_finite_parameter(self.model):
                self._stop_at_non_finite("a trained value is not finite", None)
            if is_main():
                save_trained(self.model, Path(str(output_dir)), self.moving)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # how torch.save reports a full disk
            reason = str(error).strip().splitlines()[0]
            raise RigsaError(f"cannot write a checkpoint ({reason}). What was saved before is untouched.") from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer would save the model's shards, too, most of which are the frozen weights.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if is_main():
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `train_level` has loaded the adapter already, before any tensor was in shards."""

    def _stop_at_non_finite(self, what: str, inputs: dict[str, Tensor] | None) -> NoReturn:
        layer = first_non_finite_parameter(self.model) or (inputs and first_non_finite_output(self.model, inputs))
        raise RigsaError(
            f"training diverged at step {self.state.global_step + 1}: {what}; first in {layer or 'no trained layer'}. "
            "What was saved before is kept. Try a lower --learning-rate or --alpha-learning-rate, or --dtype float32 "
            "(in another --out folder)."
        )


class LikeLengths(Sampler[int]):
    """Draws batches of examples of like length, in another order in each epoch.

    In each epoch the examples are drawn in a random order, those of `CHUNK` batches are sorted by length, and the
    batches that this makes are drawn in a random order again. What is left of the last batch is dropped.

    Args:
        lengths: tokens of each example.
        batch_size: examples per optimiser step.
        seed: of the order.
    """

    CHUNK = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        drawn = generator.permutation(len(self.lengths))[: len(self)].tolist()
        size = self.CHUNK * self.batch_size
        chunks = [sorted(drawn[at : at + size], key=lambda one: self.lengths[one]) for at in range(0, len(drawn), size)]
        ordered = [one for chunk in chunks for one in chunk]
        for batch in generator.permutation(len(self) // self.batch_size).tolist():
            yield from ordered[batch * self.batch_size : (batch + 1) * self.batch_size]


def keep_out_of_ddp(model: nn.Module) -> None:
    """Have DDP send what backward trains only: every process has loaded the frozen parameters and the patterns already,
    and finds gradients that are set by hand from those of the others.

    DDP would broadcast all of them once, buffers before each forward pass, and neither gloo nor NCCL sends int16.
    """
    frozen = [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad or is_set_by_hand(parameter)
    ]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])


def first_non_finite_parameter(model: nn.Module) -> str | None:
    """Name of the first trained parameter that is not all finite, as far as this process holds it."""
    for name, parameter in trained_parameters(model).items():
        if not local_part(parameter).isfinite().all():
            return name
    return None


@torch.no_grad()
def first_non_finite_output(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Name of the first trained layer whose output is not all finite, by one more forward pass."""
    found: list[str] = []
    layers = {name.rpartition(".")[0]: None for name in trained_parameters(model)}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: None if output.isfinite().all() else found.append(name)
        )
        for name in layers
    ]
    target_logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


class MarkCheckpoint(TrainerCallback):
    """Writes the marker of a checkpoint after everything else of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        wait_for_all()  # each process saves its random state
        if is_main():
            mark_checkpoint(Path(str(args.output_dir)), state.global_step)
            remove_old(Path(str(args.output_dir)))


class ProgressAndTime(TrainerCallback, ExportableState):
    """A progress bar with loss and ETA, and the seconds spent, carried over a resume through the checkpoint."""

    def __init__(self, label: str) -> None:
        self.label, self.before, self.start = label, 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def state(self) -> dict[str, Any]:
        return {"args": {"label": self.label}, "attributes": {"before": self.seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", disable=not is_main()
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:
            self.bar.set_postfix_str(f"loss {state.log_history[-1]['loss']:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.bar.close()
