"""Training steps of tickets in rows, columns and tiles beside what they compete with, on a CPU that others use.

    python -m benchmarks.tile_steps --dtype bfloat16 --blocks 3 --rounds 10

Processor time of one thread, which waits for nobody: contestants take turns, and of each the least time counts beside
the least of full fine-tuning, with the median over the rounds of the ratio within a round. Memory is that of the same
steps: what a forward pass saves for backward, and the peak. A page fault is memory that a step asks of the system anew:
what forward saves cannot be used again before backward.

Two contestants say where the time of rows goes that the frozen model does not take: rows of which nothing is trained
pass through our layers and no more, and rows without an update make their gradients as well. What is left is the
update, and bringing W0 back and composing anew after it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.checks import Problem, make_problem
from benchmarks.memory import extra_bytes, held_bytes, saved_bytes, tensors_of
from benchmarks.models import base_model, check_model, prompts
from benchmarks.providers import (
    COLUMNS,
    FROZEN,
    FULL,
    LORA_16,
    ROWS,
    SHIRA,
    TICKET,
    TICKET_NAME,
    TILES_32,
    TRAINEES,
    Layer,
    NoUpdate,
    Trainee,
    build_lora,
    build_ours,
    share,
    tune_gated,
)
from benchmarks.shapes import Batch, block_shapes
from rigsa.experiments.tasks.evaluation import training_loss

CPU = torch.device("cpu")
TILES_64 = "ours, 3.46 % in tiles of 64"
CONTESTANTS = {name: TRAINEES[name] for name in (FULL, FROZEN, ROWS, LORA_16, TICKET_NAME, TILES_32, COLUMNS, SHIRA)}
CONTESTANTS[TILES_64] = partial(tune_gated, density=TICKET, tile=64, numerics="composed")


def rows_in_part(model: nn.Module, trains: bool) -> Trainee:
    """Rows whose values get a gradient, or none, and which nobody updates."""
    rows = CONTESTANTS[ROWS](model)
    for parameter in rows.trained:
        parameter.requires_grad_(trains)
    if not trains:  # gradients pass through all layers, as they do in the frozen model
        model.enable_input_require_grads()
    return Trainee(model, NoUpdate([]), rows.deltas)


CONTESTANTS["rows, nothing trained"] = partial(rows_in_part, trains=False)
CONTESTANTS["rows, no update"] = partial(rows_in_part, trains=True)

ADAPTED = {
    LORA_16: partial(build_lora, autocast_adapter_dtype=False),
    **{f"ours, {tile}": partial(build_ours, tile=tile, numerics="composed") for tile in ("rows", "columns", 32)},
}


class Contest:
    """One trained model and the prompts of a step."""

    def __init__(self, trainee: Trainee, ids: torch.Tensor) -> None:
        self.trainee, self.ids = trainee, ids

    def forward(self) -> torch.Tensor:
        return training_loss(self.trainee.model, {"input_ids": self.ids, "targets": self.ids[:, :1]})

    def step(self) -> None:
        self.forward().backward()
        self.trainee.optimizer.step()
        self.trainee.model.zero_grad()

    def memory(self) -> tuple[int, int]:
        """Bytes that forward saves for backward, and the peak of a step."""
        model = self.trainee.model
        held = held_bytes([*tensors_of(model), *self.trainee.state])
        return saved_bytes(self.forward, model), held + extra_bytes(self.step, CPU)


def saved_by_layers(build: Callable[[Problem, float], Layer], dtype: torch.dtype) -> int:
    """Bytes that the seven adapted layers of one block save for backward, each by itself, of 1,424 tokens."""
    total = 0
    for shape in block_shapes("135M"):
        problem = make_problem(1424, shape, dtype, CPU)
        module, x = build(problem, TICKET).module, problem.x.clone().requires_grad_()
        module(x)  # makes what is kept from pass to pass
        total += saved_bytes(partial(module, x), module)
    return total


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def page_faults(run: Callable[[], None]) -> int:
    """The median over three steps."""
    counts = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(counts)[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--blocks", type=int, default=3, help="of SmolLM2-135M; default: 3 of its 30")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = Batch("135M", options.blocks, 16, 89, options.dtype)
    base, ids = base_model(batch, CPU), prompts(batch, CPU)
    contests = {}
    for name, build in CONTESTANTS.items():
        contests[name] = Contest(build(share(base)), ids)
        check_model(contests[name].trainee, base, ids)
        contests[name].step()  # makes the optimiser's state
    memory = {name: contest.memory() for name, contest in contests.items()}
    rounds = [{name: seconds(contest.step) for name, contest in contests.items()} for _ in range(options.rounds)]
    faults = {name: page_faults(contest.step) for name, contest in contests.items()}
    least = {name: min(times[name] for times in rounds) for name in contests}
    print("| provider | least | / full | / full, median | / frozen | saved for backward | peak | page faults |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in contests:
        ratio = statistics.median(times[name] / times[FULL] for times in rounds)
        cells = [f"{least[name]:.3f} s", f"{least[name] / least[FULL]:.2f}", f"{ratio:.2f}"]
        cells += [f"{least[name] / least[FROZEN]:.2f}", *(f"{size / 2**20:.0f} MiB" for size in memory[name])]
        cells.append(f"{faults[name]:,}")
        print(f"| {name} | {' | '.join(cells)} |")
    saved = {name: saved_by_layers(build, getattr(torch, options.dtype)) for name, build in ADAPTED.items()}
    print(", ".join(f"{name}: {size / 2**20:.2f} MiB" for name, size in saved.items()), "saved by a block's layers")


if __name__ == "__main__":
    main()
