"""What every method shares: the model, the data, the run folder, and how a level is trained, measured and recorded.

A run folder::

    config.json                 the resolved configuration, written first
    base/metrics.json           the untrained model
    level_K/mask.safetensors    the ticket (no file at level 0, which is dense)
    level_K/pruning.json        how the ticket was chosen
    level_K/adapter.safetensors trained values and gates
    level_K/log.jsonl           training log
    level_K/metrics.json        accuracies, losses, densities
    level_K/resources.json      seconds and peak memory
    level_K/done                written last
    report.md, figure.png       drawn from the above at the end, and by `rigsa report`

Two runs with one configuration on one device share every bit but resources.json and the seconds in report.md, however
often they were interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from rigsa.adapter import ADAPTER_FILE, MASK_FILE, base_fingerprint, load_adapter, load_masks, save_masks
from rigsa.config import Config
from rigsa.distributed import is_sharded, main_first, wait_for_all
from rigsa.evaluate import evaluate
from rigsa.files import is_done, mark_done, read_json, write_json
from rigsa.model import attach_adapter, load_model, resolve_device
from rigsa.textual_mnist import Images, PromptDataset, Prompts, Splits, load_splits
from rigsa.train import read_log, remove_checkpoints, steps_per_level, train_level
from rigsa_kernels import SparsePattern, gated_linears

METRICS_FILE = "metrics.json"
PRUNING_FILE = "pruning.json"
BASE = "base"


def level_folder(run: Path, level: int) -> Path:
    return run / f"level_{level}"


@dataclass
class Experiment:
    """A run in progress."""

    config: Config
    run: Path
    model: PreTrainedModel
    prompts: Prompts
    splits: Splits

    @classmethod
    def prepare(cls, config: Config, run: Path) -> Experiment:
        """Load data and model. Raises RigsaError where one of them does not fit."""
        splits = load_splits(config.data)
        splits = Splits(
            splits.train.first(config.train_images), splits.validation, splits.test.first(config.test_images)
        )
        steps_per_level(config, len(splits.train))
        model, tokenizer = load_model(config, resolve_device(config.device))
        prompts = Prompts(tokenizer, config.system_prompt)
        set_seed(config.seed % 2**32)
        return cls(config, run, model, prompts, splits)

    def attach(self) -> None:
        attach_adapter(self.model, self.config)

    def reload(self, level: int) -> None:
        """A whole model in place of one that training left in shards, with the adapter that training wrote."""
        self.model, _ = load_model(self.config, resolve_device(self.config.device))
        self.attach()
        self.restore(level)

    def adopt(self, patterns: dict[str, SparsePattern]) -> None:
        """Every layer takes its pattern, rewinds and closes its gate."""
        for name, layer in gated_linears(self.model).items():
            layer.set_pattern(patterns[name])

    def restore(self, level: int) -> None:
        """The trained adapter of a finished level."""
        folder = level_folder(self.run, level)
        if (folder / MASK_FILE).exists():
            self.adopt(load_masks(self.model, folder / MASK_FILE))
        load_adapter(self.model, folder / ADAPTER_FILE)

    def save_ticket(self, level: int, patterns: dict[str, SparsePattern], pruning: dict[str, Any]) -> None:
        folder = level_folder(self.run, level)
        write_json(folder / PRUNING_FILE, pruning)
        save_masks(patterns, folder / MASK_FILE, base_fingerprint(self.model))

    def test(self, label: str) -> dict[str, Any]:
        """Accuracy and loss on the test images per number of examples, and on the validation images."""
        self.model.eval()
        results = {
            f"{shots}-shot": self._evaluate(self.splits.test, shots, f"{label}: test, {shots}-shot")
            for shots in self.config.shots
        }
        validation = self._evaluate(self.splits.validation, self.config.shots[0], f"{label}: validation")
        return {"test": results, "validation": validation}

    def _evaluate(self, images: Images, shots: int, label: str) -> dict[str, Any]:
        dataset = PromptDataset(images, self.prompts, self._examples(shots))
        return evaluate(self.model, dataset, self.config.eval_batch_size, label)

    def _examples(self, shots: int) -> Images | None:
        """The same training images before every test image."""
        if shots == 0:
            return None
        return self.splits.train.take(
            np.random.default_rng(self.config.seed).permutation(len(self.splits.train))[:shots]
        )

    def measure_base(self) -> dict[str, Any]:
        """The untrained model's results, once."""
        folder = self.run / BASE
        with main_first():
            if not is_done(folder):
                write_json(folder / METRICS_FILE, self.test("untrained"))
                mark_done(folder)
        return read_json(folder / METRICS_FILE)

    def run_level(self, level: int) -> dict[str, Any]:
        """Train the adapter as it stands, test it, write everything down, the marker last. Returns the metrics."""
        folder, label = level_folder(self.run, level), f"level {level}"
        wait_for_all()  # until every process has seen that this level is not done
        train_level(self.model, PromptDataset(self.splits.train, self.prompts), self.config, folder, label)
        if is_sharded(self.model):
            self.reload(level)
        with main_first():
            if not is_done(folder):
                metrics = {"level": level, **self._adapter_metrics(), "pruning": self._pruning(folder)}
                metrics |= {"train_loss": read_log(folder)[-1]["loss"], **self.test(label)}
                write_json(folder / METRICS_FILE, metrics)
                mark_done(folder)
                remove_checkpoints(folder)
        return read_json(folder / METRICS_FILE)

    def _adapter_metrics(self) -> dict[str, Any]:
        layers = gated_linears(self.model)
        free = sum(layer.rigsa_values.numel() for layer in layers.values())
        total = sum(layer.num_weights for layer in layers.values())
        gates = torch.cat([layer.rigsa_alpha.detach() for layer in layers.values()]).abs()
        return {
            "density": free / total,
            "free": free,
            "weights": total,
            "mean_abs_alpha": gates.mean().item(),
            "layer_density": {name: layer.pattern.density for name, layer in layers.items()},
        }

    @staticmethod
    def _pruning(folder: Path) -> dict[str, Any]:
        return read_json(folder / PRUNING_FILE) if (folder / PRUNING_FILE).exists() else {}
