"""Ways to train all weights of the linear layers on one device beside level 0: peak, time and loss of the same steps.

    python -m benchmarks.all_weights --blocks 1 --steps 16

Everybody trains the same layers of the same bfloat16 model, SmolLM2-135M with few blocks and random weights, on the
same prompts, which are learned by heart. A contestant is run once with each learning rate, and its best last loss
counts. Memory is that of making the optimiser and of two steps: the model with what is trained, gradients, moments and
activations, each storage once. Time is processor time of one thread, of whole steps and of the optimiser's part.

*Arrives* says what rounding leaves of small updates: under a gradient that never changes, every weight should move by
the learning rate in each step, 1e-6, which is a hundredth of what two neighbouring bfloat16 numbers of a weight's size
differ by. An optimiser that rounds to the nearest moves nothing (0 %), one that rounds stochastically all (100 %).

What is not installed is named in the table: ``pip install --no-deps torchao galore_torch apollo_torch``.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import extra_bytes, held_bytes, tensors_of
from benchmarks.models import make_model
from benchmarks.providers import adamw_8bit, fused_adamw, model_linears, own_weights, share
from benchmarks.race import UnavailableError
from benchmarks.shapes import Batch
from rigsa.experiments.tasks.evaluation import training_loss
from rigsa_kernels import MaskedAdamW, replace_linears

CPU = torch.device("cpu")
RATES = (3e-4, 1e-3)
LOW_RANK_RATES = (3e-3, 1e-2)
"""A subspace takes a part of the gradient, so these are higher, as they are in the papers."""
SMALL_RATE, SMALL_STEPS = 1e-6, 30
LOW_RANK = {"galore": "rank=64, update_proj_gap=50, scale=0.25", "apollo": "rank=64, update_proj_gap=50, scale=1.0"}
"""What transformers hands to GaLore and APOLLO. A subspace is kept for fewer steps than usual, as there are few."""

Build = Callable[[nn.Module, float], torch.optim.Optimizer]


def level_0(model: nn.Module, rate: float, *, values: torch.dtype, moments: str) -> torch.optim.Optimizer:
    replace_linears(model, alpha_init=1.0, init_scale=0.0, numerics="composed", values_dtype=values)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("rigsa_values"))  # a gate that stays at 1, as in `full`
    return MaskedAdamW(model, lr=rate, weight_decay=0.0, state_dtype=moments)


def masked_adamw(model: nn.Module, rate: float, *, moments: str) -> torch.optim.Optimizer:
    """Our optimiser on the weights themselves: what torchao's would be dropped or taken for."""
    return MaskedAdamW([{"params": own_weights(model)}], lr=rate, weight_decay=0.0, state_dtype=moments)


def on_weights(model: nn.Module, rate: float, *, make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return make(own_weights(model), lr=rate, weight_decay=0.0)


def torchao_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    _need("torchao")
    from torchao.optim import AdamW8bit

    return AdamW8bit(own_weights(model), lr=rate, weight_decay=0.0, bf16_stochastic_round=True)


def of_transformers(model: nn.Module, rate: float, *, name: str) -> torch.optim.Optimizer:
    """GaLore or APOLLO, as a Trainer makes it."""
    family = name.partition("_")[0]
    _need(f"{family}_torch")
    if "8bit" in name and not torch.cuda.is_available():
        raise UnavailableError("its step waits for a GPU, and there is none")
    from transformers import Trainer, TrainingArguments

    own_weights(model)
    targets = sorted({path.rpartition(".")[2] for path in model_linears(model)})
    arguments = TrainingArguments(
        "unused", optim=name, optim_target_modules=targets, optim_args=LOW_RANK[family], learning_rate=rate,
        weight_decay=0.0, use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    return Trainer(model, arguments).create_optimizer()


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"needs {package}, which is not installed")


HALF, SINGLE = torch.bfloat16, torch.float32
CONTESTANTS: dict[str, Build] = {
    "torch AdamW (fused), bf16 moments": partial(on_weights, make=fused_adamw),
    "level 0, float32 values and moments": partial(level_0, values=SINGLE, moments="float32"),
    "level 0, bf16 values and moments": partial(level_0, values=HALF, moments="bfloat16"),
    "level 0, bf16 values, 8-bit moments": partial(level_0, values=HALF, moments="int8"),
    "MaskedAdamW on the weights, 8-bit moments": partial(masked_adamw, moments="int8"),
    "torchao AdamW8bit, stochastic rounding": torchao_adamw,
    "bitsandbytes AdamW8bit": partial(on_weights, make=adamw_8bit),
    "GaLore, rank 64": partial(of_transformers, name="galore_adamw"),
    "GaLore, rank 64, 8-bit moments": partial(of_transformers, name="galore_adamw_8bit"),
    "APOLLO, rank 64": partial(of_transformers, name="apollo_adamw"),
}


@dataclass(frozen=True)
class Outcome:
    """Bytes, seconds a step, seconds of its optimiser, the last loss at each rate, the share of small updates made."""

    peak: int
    step: float
    update: float
    losses: dict[float, float]
    arrives: float | None


def batches_of(batch: Batch, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1000, (batch.prompts, batch.tokens), generator=generator) for _ in range(number)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of one token after each prompt, which stands at its beginning."""
    return training_loss(model, {"input_ids": ids, "targets": ids[:, :1]})


def train(build: Build, base: nn.Module, batches: list[Tensor], rate: float, steps: int) -> tuple[float, float, float]:
    """The mean loss of the last round over the batches, and median seconds of a step and of its update."""
    torch.manual_seed(0)
    model = share(base)
    optimizer = build(model, rate)
    losses: list[float] = []
    whole: list[float] = []
    updates: list[float] = []
    for number in range(steps):
        begin = time.process_time()
        loss = loss_of(model, batches[number % len(batches)])
        loss.backward()
        middle = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        end = time.process_time()
        losses.append(loss.item())
        if number:  # the first one makes the optimiser's state, and compiles
            whole.append(end - begin)
            updates.append(end - middle)
    return statistics.fmean(losses[-len(batches) :]), statistics.median(whole), statistics.median(updates)


def peak_bytes(build: Build, base: nn.Module, ids: Tensor) -> int:
    """Of what the model still holds of the base, and of everything made since."""
    model, made = share(base), list[Any]()

    def run() -> None:
        made.append(build(model, 1e-4))
        for _ in range(2):
            loss_of(model, ids).backward()
            made[0].step()
            made[0].zero_grad()

    extra = extra_bytes(run, CPU)
    there = {tensor.untyped_storage()._cdata for tensor in tensors_of(base)}
    return extra + held_bytes(t for t in tensors_of(model) if t.untyped_storage()._cdata in there)


def arriving(build: Build, base: nn.Module) -> float:
    """The mean move of the weights against a constant gradient, as a share of what the learning rate asks for."""
    torch.manual_seed(0)
    model = share(base)
    optimizer = build(model, SMALL_RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    signs = [torch.randint(2, parameter.shape).mul_(2).sub_(1).to(parameter.dtype) for parameter in trained]
    before = [parameter.detach().clone() for parameter in trained]
    for _ in range(SMALL_STEPS):
        for parameter, sign in zip(trained, signs, strict=True):
            parameter.grad = sign * 1e-3
        optimizer.step()
    moved = [-((p.detach().double() - old) * sign).sum() for p, old, sign in zip(trained, before, signs, strict=True)]
    asked = SMALL_RATE * SMALL_STEPS * sum(parameter.numel() for parameter in trained)
    return float(sum(moved)) / asked


def race(build: Build, base: nn.Module, batches: list[Tensor], steps: int, low_rank: bool) -> Outcome:
    train(build, base, batches, RATES[0], 2)  # compiles where anything is compiled
    peak = peak_bytes(build, base, batches[0])
    found = {rate: train(build, base, batches, rate, steps) for rate in (LOW_RANK_RATES if low_rank else RATES)}
    step, update = (min(times[at] for times in found.values()) for at in (1, 2))
    losses = {rate: times[0] for rate, times in found.items()}
    return Outcome(peak, step, update, losses, None if low_rank else arriving(build, base))


def row(name: str, outcome: Outcome, weights: int, bare: int) -> str:
    best = min(outcome.losses, key=lambda rate: outcome.losses[rate])
    cells = [
        f"{outcome.peak / 2**20:.0f} MiB",
        f"{(outcome.peak - bare) / weights:.1f}",
        f"{outcome.step * 1e3:.0f} ms",
    ]
    cells += [f"{outcome.update * 1e3:.0f} ms", f"{outcome.losses[best]:.2f}", f"{best:g}"]
    cells.append("" if outcome.arrives is None else f"{outcome.arrives:.0%}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all_weights", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1, help="of SmolLM2-135M; default: 1 of its 30")
    parser.add_argument("--steps", type=int, default=16, help="with each learning rate; default: 16")
    parser.add_argument("--prompts", type=int, default=8, help="a step; default: 8, of 32 tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = Batch("135M", options.blocks, options.prompts, 32, "bfloat16")
    base, batches = make_model(batch, CPU), batches_of(batch, 4)
    weights = sum(linear.weight.numel() for linear in model_linears(base).values())
    bare = held_bytes(tensors_of(base)) - 2 * weights
    print(f"{weights:,} weights of linear layers, {batch.prompts} prompts of {batch.tokens} tokens, bfloat16")
    print("| | peak | bytes a weight | step | its update | best last loss | at learning rate | arrives |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, build in CONTESTANTS.items():
        try:
            low_rank = "rank" in name  # a gradient of signs has no low rank, so its updates are not the rate's
            print(row(name, race(build, base, batches, options.steps, low_rank), weights, bare), flush=True)
        except UnavailableError as error:
            print(f"| {name} | {error} | | | | | | |")
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
