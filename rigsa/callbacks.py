"""Callbacks for ``transformers.Trainer``: checkpoints that are whole, and levels inside one training run.

An adapted model saves its adapter alone and loads it again, patterns included, under any Trainer (`rigsa.checkpoints`).
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rigsa import peft_format
from rigsa.checkpoints import keep_adapter_in_checkpoints
from rigsa.errors import RigsaError
from rigsa.masks import Ranking
from rigsa.processes import check_same_patterns, ddp_around, renew_ddp
from rigsa.saving import check_folder
from rigsa.state import adapted_layers, ticket_of
from rigsa.tickets import TicketReport, prune
from rigsa_kernels.roles import decayed_gates, how_to_spare_gates

logger = logging.getLogger(__name__)
_STATE_FILE = "trainer_state.json"
"""What the Trainer writes last."""
_TRAINING_FILES = ("optimizer.pt", "scheduler.pt")


class AdapterCheckpoints(TrainerCallback):
    """Has a Trainer resume from its last whole checkpoint.

    A process that is killed while it writes a checkpoint leaves a part of one, which
    ``trainer.train(resume_from_checkpoint=True)`` would take. When a Trainer is made with this callback, every
    checkpoint in its output folder that is newer than the last whole one is renamed to ``unfinished-checkpoint-...``,
    and a warning says so. A run that goes on then ends with the bits of one that was never interrupted.

    It also sees to it that the model that the Trainer saves is the one that carries the adapter, and that the optimiser
    does not decay gates among other parameters. The Trainer's own does not (`rigsa.trainer_groups`).
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any = None, **kwargs: Any
    ) -> None:
        """Raises ValueError where `model` carries no adapter."""
        adapted_layers(model)
        if not hasattr(model, "peft_config"):  # PEFT and transformers save the adapter of such a model by themselves
            keep_adapter_in_checkpoints(model)
        if args.should_save and args.output_dir is not None:
            set_unfinished_aside(Path(args.output_dir), with_optimizer=not args.save_only_model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError where groups of parameters that the Trainer was given would decay gates."""
        for found in decayed_gates(optimizer.param_groups if optimizer is not None else ()):
            raise ValueError(how_to_spare_gates(found))


def set_unfinished_aside(folder: Path, with_optimizer: bool = True) -> None:
    """Rename the checkpoints in `folder` that are newer than the last whole one."""
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    for _, path in sorted(found.items(), reverse=True):
        why = _what_is_missing(path, with_optimizer)
        if not why:
            return
        aside = path.with_name(f"unfinished-{path.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"unfinished-{number}-{path.name}")
        path.rename(aside)
        logger.warning("%s is not whole (%s); it is called %s from here on", path, why, aside.name)


def _what_is_missing(checkpoint: Path, with_optimizer: bool) -> str:
    """Why a checkpoint cannot be resumed from; empty where it can."""
    try:
        json.loads((checkpoint / _STATE_FILE).read_text())
        if (checkpoint / peft_format.CONFIG_FILE).exists():
            json.loads((checkpoint / peft_format.CONFIG_FILE).read_text())
            with safe_open(checkpoint / peft_format.TENSORS_FILE, framework="pt"):  # which refuses a file that is cut
                pass
        else:
            check_folder(checkpoint)
    except (OSError, ValueError, RigsaError, SafetensorError) as error:
        return str(error)
    for name in _TRAINING_FILES if with_optimizer else ():
        if not zipfile.is_zipfile(checkpoint / name):  # what torch.save writes, whose end a cut file lacks
            return f"{name} is missing or cut"
    return ""


class PruningLevels(TrainerCallback):
    """Trains level after level inside one ``trainer.train()``: train, prune, rewind, train.

    The run's steps are shared evenly by `prunings` + 1 levels. At the first step of a level the model is pruned, the
    optimiser takes the new parameters and forgets its moments, and the learning rate goes through its whole schedule,
    warm-up included, once more. What is saved or evaluated at the last step of a level is that level, trained. A
    resumed run goes on in the level where it stopped.

    Args:
        prunings: how often the model is pruned, 1 or more.
        keep_fraction, criterion, ranking, rewind, draw_seed: of `rigsa.prune`.

    Attributes:
        reports: what each pruning did.

    Raises:
        ValueError: an argument is out of range; when training begins, the steps cannot be shared evenly, the scheduler
            is no ``LambdaLR``, or several processes train in another way than DistributedDataParallel.

    Several processes prune to the same patterns, as they hold the same values; that is checked at each pruning.
    """

    def __init__(
        self,
        prunings: int,
        keep_fraction: float = 0.8,
        criterion: str = "rigsa",
        ranking: Ranking = "layer",
        rewind: str = "init",
        draw_seed: int = 0,
    ) -> None:
        if prunings < 1:
            raise ValueError(f"prunings: expected 1 or more, got {prunings}")
        if not 0 < keep_fraction <= 1:
            raise ValueError(f"keep_fraction: expected more than 0 and at most 1, got {keep_fraction}")
        self.prunings, self.keep_fraction, self.criterion = prunings, keep_fraction, criterion
        self.ranking, self.rewind, self.draw_seed = ranking, rewind, draw_seed
        self.reports: list[TicketReport] = []
        self._steps = 0
        self._first_level = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        levels = self.prunings + 1
        if args.world_size > 1 and not ddp_around(model):
            raise ValueError(
                f"PruningLevels: expected one process, or several under DistributedDataParallel, got {args.world_size} "
                "that share the model in another way; give each level a Trainer"
            )
        if state.max_steps % levels:
            raise ValueError(f"max_steps: expected a multiple of {levels} levels, got {state.max_steps}")
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler: expected a LambdaLR, which can start anew, got {type(lr_scheduler).__name__}"
            )
        self._steps = state.max_steps // levels
        # A checkpoint at the last step of a level holds that level: it is pruned when the next step begins.
        self._first_level = self._level(model) - max(state.global_step - 1, 0) // self._steps
        lr_scheduler.lr_lambdas = [_restarting(factor, self._steps, levels) for factor in lr_scheduler.lr_lambdas]

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._level(model) >= self._first_level + state.global_step // self._steps:
            return
        before = dict(model.named_parameters(remove_duplicate=False))
        report = prune(model, self.keep_fraction, self.criterion, self.ranking, self.rewind, draw_seed=self.draw_seed)
        exchange_parameters(optimizer, before, dict(model.named_parameters(remove_duplicate=False)))
        check_same_patterns({name: layer.pattern for name, layer in adapted_layers(model).items()})
        renew_ddp(model)
        self.reports.append(report)
        logger.info("step %d: %r", state.global_step, report)

    @staticmethod
    def _level(model: nn.Module) -> int:
        return max(ticket_of(layer).level for layer in adapted_layers(model).values())


def _restarting(factor: Callable[[int], float], steps: int, levels: int) -> Callable[[int], float]:
    """A schedule's factor, gone through once in each level: a level's step s is step s * levels of the whole.

    It is a function, because a scheduler saves the attributes of any other callable, and a schedule has none to save.
    """

    def restarted(step: int) -> float:
        return factor(step % steps * levels)

    return restarted


def exchange_parameters(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Have `optimizer` train the parameters that the model has now, and forget what it knew of those it had.

    Args:
        optimizer: of any kind, or what accelerate made of one.
        before, after: the model's parameters by name. An optimiser that never had a parameter does not get it now.
    """
    now = {id(parameter): after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            optimizer.state.pop(parameter, None)
            group["params"][place] = now.get(id(parameter), parameter)
