"""Early-bird tickets (You et al., "Drawing Early-Bird Tickets", ICLR 2020): end a level once its mask has settled.

Every `early_bird_steps` steps the mask is drawn that pruning would draw now. When the last `WINDOW` of them differ from
each other by less than `early_bird_distance` of the entries that are free (the authors divide by all weights, which is
the same at level 0), the level ends and is pruned. The steps saved stand in the level's metrics.

Looking begins after the warm-up: before it values hardly move, and a mask that nothing happened to has settled, too.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from rigsa.experiments.adapter import base_fingerprint, load_masks, save_masks
from rigsa.experiments.config import Config
from rigsa.experiments.distributed import main_first
from rigsa.experiments.records import EARLY_BIRD, read_record
from rigsa.experiments.run_folder import CHECKPOINTS, EARLY_BIRD_FILE
from rigsa.experiments.train import EndsEarly
from rigsa.files import write_json
from rigsa.masks import hamming_distance
from rigsa_kernels import SparsePattern, gated_linears

WINDOW = 5


class EarlyBird(EndsEarly):
    """Ends training when the mask that `draw` gives has settled.

    Masks are files beside the checkpoints, so a run that was interrupted goes on with those of the steps before.

    Args:
        model: that trains.
        config: of the run.
        folder: of the level.
        draw: the mask of the model as it is.
    """

    def __init__(
        self, model: nn.Module, config: Config, folder: Path, draw: Callable[[], dict[str, SparsePattern]]
    ) -> None:
        self.model, self.config, self.folder, self.draw = model, config, folder, draw

    def ended_at(self) -> int | None:
        path = self.folder / EARLY_BIRD_FILE
        return read_record(path, EARLY_BIRD)["ended_at"] if path.exists() else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, every, warmup = state.global_step, self.config.early_bird_steps, self.config.warmup_steps
        if step % every or step <= warmup:
            return
        with main_first():
            if not self._file(step).exists():
                save_masks(self.draw(), self._file(step), base_fingerprint(self.model))
        distance = self._distance(list(range(step, warmup, -every))[:WINDOW])
        ends = distance is not None and distance < self.config.early_bird_distance
        with main_first():
            self._write(step, distance, state.max_steps, ends)
        control.should_training_stop |= ends

    def _file(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / "early_bird" / f"step_{step}.safetensors"

    def _distance(self, steps: list[int]) -> float | None:
        """The largest between any two of `WINDOW` masks, as a share of the free entries; None for fewer masks."""
        if len(steps) < WINDOW:
            return None
        layers = gated_linears(self.model).values()
        density = sum(layer.rigsa_values.numel() for layer in layers) / sum(layer.num_weights for layer in layers)
        masks = [load_masks(self.model, self._file(step)) for step in steps]
        return max(hamming_distance(one, other) for one, other in combinations(masks, 2)) / density

    def _write(self, step: int, distance: float | None, max_steps: int, ends: bool) -> None:
        path = self.folder / EARLY_BIRD_FILE
        before = read_record(path, EARLY_BIRD)["distances"] if path.exists() else {}
        distances = {at: value for at, value in before.items() if int(at) < step} | {str(step): distance}
        record = {"ended_at": step if ends else None, "steps_saved": max_steps - step if ends else 0}
        write_json(path, record | {"distances": distances})
