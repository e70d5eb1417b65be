"""What every method shares: the model, the data, and how a level is trained, measured and recorded.

`run_folder.py` beside this file says what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from rigsa.adapters import adapter_off
from rigsa.errors import RigsaError
from rigsa.experiments.adapter import (
    base_fingerprint,
    load_adapter,
    load_ticket,
    masks_hash,
    save_masks,
    trained_parameters,
)
from rigsa.experiments.attach import attach
from rigsa.experiments.config import Config
from rigsa.experiments.distributed import main_first, wait_for_all
from rigsa.experiments.kept import as_before, check_kept, kept_parameters, put_back, start_of_kept
from rigsa.experiments.layer_checks import check_layers
from rigsa.experiments.model import load_model, longest_of, resolve_device
from rigsa.experiments.records import EARLY_BIRD, PRUNING, REPLIES, RESOURCES, metrics_of, read_record
from rigsa.experiments.run_folder import (
    ADAPTER_FILE,
    BASE,
    EARLY_BIRD_FILE,
    MASK_FILE,
    METRICS_FILE,
    PRUNING_FILE,
    REPLIES_FILE,
    RESOURCES_FILE,
    level_folder,
)
from rigsa.experiments.tasks import source_tasks
from rigsa.experiments.tasks.drift import drift, replies
from rigsa.experiments.tasks.evaluation import evaluate
from rigsa.experiments.tasks.packing import check_packing
from rigsa.experiments.tasks.registry import load_task
from rigsa.experiments.tasks.task import Task
from rigsa.experiments.train import read_log, remove_checkpoints, steps_per_level, train_level
from rigsa.files import first_damage, is_done, is_temporary, mark_done, write_json
from rigsa.processes import is_sharded
from rigsa_kernels import SparsePattern, gated_linears
from rigsa_kernels.selection import adaptable, check_selection, select_linears

Choose = Callable[["Experiment"], tuple[dict[str, SparsePattern], dict[str, Any]]]
"""A mask strategy: a dense adapter as attached, to the patterns of its layers and what to record of the choice."""


def _check_undamaged(folder: Path) -> None:
    if damage := first_damage(folder):
        raise RigsaError(f"{folder} is damaged ({damage}); delete it and run again")


def _mark_done(folder: Path) -> None:
    """Name all files but the resources, in which equal runs differ."""
    files = [path.name for path in folder.iterdir() if path.is_file() and path.name != RESOURCES_FILE]
    mark_done(folder, [name for name in files if not is_temporary(name)])


def _check_numbers(config: Config, num_training: int) -> None:
    """Raises RigsaError where a level of so many training examples has too few steps for its configuration."""
    steps = steps_per_level(config, num_training)
    if config.rewind_step >= steps:
        raise RigsaError(f"--rewind-step: expected less than the {steps} steps of a level, got {config.rewind_step}")
    if config.method.reads("mask_examples") and config.mask_examples > num_training:
        raise RigsaError(
            f"--mask-examples: there are only {num_training} training examples, got {config.mask_examples}"
        )
    if config.logging_steps > steps - config.rewind_step:
        raise RigsaError(
            f"--logging-steps: expected at most the {steps - config.rewind_step} steps of a level, so that its log "
            f"has a line, got {config.logging_steps}"
        )


def adopt(model: nn.Module, patterns: dict[str, SparsePattern]) -> None:
    """Give every layer its pattern. The layer then is at its initial values, its gate closed."""
    for name, layer in gated_linears(model).items():
        layer.set_pattern(patterns[name])


def restore_level(model: nn.Module, folder: Path) -> None:
    """Put the trained adapter in a level's folder on `model`, which carries one as attached, its ticket first.

    Raises:
        RigsaError: a file is missing, damaged or does not fit.
    """
    if is_done(folder):
        _check_undamaged(folder)
    if (folder / MASK_FILE).exists():
        adopt(model, load_ticket(model, folder))
    load_adapter(model, folder / ADAPTER_FILE)


@dataclass
class Experiment:
    """A run in progress: its configuration, folder, model and data."""

    config: Config
    run: Path
    model: PreTrainedModel
    task: Task
    num_weights: int
    """In the linear layers that are adapted."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """What is trained beside the adapter, as it was before (`rigsa.experiments.kept`)."""

    @classmethod
    def prepare(cls, config: Config, run: Path) -> Experiment:
        """Load data and model. Raises RigsaError if one of them does not fit the configuration."""
        task = load_task(config)
        _check_numbers(config, task.num_training)
        model, tokenizer = load_model(config, resolve_device(config.device))
        task.meet(tokenizer, longest_of(model.config))
        _check_numbers(config, task.num_training)
        if config.packing:
            check_packing(model, config.attention)
        set_seed(config.seed % 2**32)
        linears, skipped = select_linears(model, config.included, config.excluded)
        sizes = adaptable(model, config.included, config.excluded)
        try:
            check_selection(config.included, list(sizes), skipped)
        except ValueError as error:
            raise RigsaError(f"--{error}") from error
        check_kept(model, config, sizes)
        check_layers(config, {name: (one.out_features, one.in_features) for name, one in linears.items()}, sizes)
        return cls(config, run, model, task, sum(sizes.values()))

    def attach(self) -> None:
        """Put what the method trains on the model."""
        attach(self.model, self.config)
        self.start = start_of_kept(self.model)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside, the model computes what its base computes."""
        with adapter_off(self.model), as_before(self.model, self.start):
            yield

    def reload(self, level: int) -> None:
        """Load the model again, whole, after training has left it in shards, with the adapter that training wrote."""
        self.model, _ = load_model(self.config, resolve_device(self.config.device))
        self.attach()
        self.restore(level)

    def adopt(self, patterns: dict[str, SparsePattern]) -> None:
        """Give every layer its pattern (`adopt`)."""
        adopt(self.model, patterns)

    def folder(self, level: int) -> Path:
        return level_folder(self.run, level)

    def is_finished(self, level: int) -> bool:
        return is_done(self.folder(level))

    def restore(self, level: int) -> None:
        """Put the trained adapter of a finished level on the model, its ticket first."""
        restore_level(self.model, self.folder(level))

    def enter_ticket(self, level: int, choose: Choose) -> None:
        """Choose the ticket of `level`, unless that was done already, and put every layer at its start.

        The main process chooses and writes the ticket down; every process reads it.
        """
        folder = self.folder(level)
        with main_first():
            if not (folder / MASK_FILE).exists():
                patterns, record = choose(self)
                write_json(folder / PRUNING_FILE, record | {"mask": masks_hash(patterns)})
                save_masks(patterns, folder / MASK_FILE, base_fingerprint(self.model))
        adopt(self.model, load_ticket(self.model, folder))
        put_back(self.model, self.start)

    def record_choice(self, level: int, record: dict[str, Any]) -> None:
        """Write down how the first mask of `level` was chosen, for a method that moves it while it trains."""
        path = self.folder(level) / PRUNING_FILE
        with main_first():
            if not path.exists():
                write_json(path, record)

    def test(self, label: str) -> dict[str, Any]:
        """Measure what was learned and what was forgotten.

        Accuracy and loss on the test and the validation examples, the task's own scores, and the source tasks that the
        configuration names.
        """
        self.model.eval()
        config, size = self.config, self.config.eval_batch_size
        results: dict[str, Any] = {
            "test": {
                name: evaluate(self.model, samples, size, f"{label}: test, {name}")
                for name, samples in self.task.tests().items()
            },
            "validation": evaluate(self.model, self.task.validation(), size, f"{label}: validation"),
        }
        results["test"] |= self.task.score(self.model, size, label)
        if config.tasks:
            results["source"] = source_tasks.measure(
                self.model,
                self.task.conversation.tokenizer,
                config.tasks,
                data_dir=config.data_dir,
                limit=config.limit,
                batch_size=config.eval_batch_size,
                system_prompt=config.system_prompt,
                label=label,
            )
        return results

    def drift(self) -> dict[str, Any]:
        """Measure how far the adapter has moved the model from its base's own replies."""
        self.model.eval()
        return drift(self.model, read_record(self.run / BASE / REPLIES_FILE, REPLIES), as_base=self.as_base)

    def measure_base(self) -> dict[str, Any]:
        """Measure the untrained model, unless that was done already. Returns its metrics."""
        folder = self.run / BASE
        with main_first():
            if not is_done(folder):
                if self.config.drift:
                    spoken = replies(self.model, self.task.conversation, count=self.config.drift_prompts)
                    write_json(folder / REPLIES_FILE, spoken)
                metrics = {"tokenizer": self.task.conversation.fingerprint(), **self.test("untrained")}
                write_json(folder / METRICS_FILE, metrics)
                _mark_done(folder)
        _check_undamaged(folder)
        return read_record(folder / METRICS_FILE, metrics_of(self.config, base=True))

    def run_level(self, level: int, callbacks: Sequence[TrainerCallback] = (), first_step: int = 0) -> dict[str, Any]:
        """Train the adapter as it stands, test it, and write everything down, the marker last. Returns the metrics.

        `callbacks` and `first_step` are for `train_level`.
        """
        folder, label = self.folder(level), f"level {level}"
        wait_for_all()  # until every process has seen that this level is not done
        config = self.config.at_level(level, self._adapter_metrics()["density"])
        beside = self.config.rate_beside(level)
        train_level(self.model, self.task.training(), config, folder, label, callbacks, first_step, beside)
        if is_sharded(self.model):
            self.reload(level)
        with main_first():
            if not is_done(folder):
                metrics = {"level": level, **self._adapter_metrics(), "pruning": self._pruning(folder)}
                metrics["steps"] = read_record(folder / RESOURCES_FILE, RESOURCES)["steps"]
                if (folder / EARLY_BIRD_FILE).exists():
                    metrics["early_bird"] = read_record(folder / EARLY_BIRD_FILE, EARLY_BIRD)
                metrics |= {"train_loss": read_log(folder)[-1]["loss"], **self.test(label)}
                if self.config.drift:
                    metrics["drift"] = self.drift()
                write_json(folder / METRICS_FILE, metrics)
                _mark_done(folder)
                remove_checkpoints(folder)
        return read_record(folder / METRICS_FILE, metrics_of(self.config))

    def _adapter_metrics(self) -> dict[str, Any]:
        """Sizes of what is trained, in all and, for gated sparse layers, layer by layer."""
        layers = gated_linears(self.model)
        trained = {id(parameter): parameter.numel() for parameter in trained_parameters(self.model).values()}
        free = sum(layer.rigsa_values.numel() for layer in layers.values())
        metrics: dict[str, Any] = {"free": free, "trainable": sum(trained.values()), "weights": self.num_weights}
        kept = sum(parameter.numel() for parameter in kept_parameters(self.model).values())
        metrics["density"] = (free or metrics["trainable"] - kept) / self.num_weights
        if layers:
            metrics["layer_density"] = {name: layer.pattern.density for name, layer in layers.items()}
        if layers and self.config.gate != "none":
            gates = torch.cat([layer.rigsa_alpha.detach() for layer in layers.values()]).abs()
            metrics["mean_abs_alpha"] = gates.mean().item()
        return metrics

    @staticmethod
    def _pruning(folder: Path) -> dict[str, Any]:
        return read_record(folder / PRUNING_FILE, PRUNING) if (folder / PRUNING_FILE).exists() else {}
