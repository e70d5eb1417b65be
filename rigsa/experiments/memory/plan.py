"""Plans the memory of a run before it trains: the peak of every level, by simulation, and the options that would fit.

A plan counts tensors. It leaves a reserve for what it does not count: the CUDA context (about 0.5 GB), cuBLAS's
workspace, memory that operators take and give back inside, and holes that the allocator leaves between tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PretrainedConfig

from rigsa.errors import RigsaError
from rigsa.experiments.config import QUANTIZATIONS, Config
from rigsa.experiments.memory.live_memory import Growth
from rigsa.experiments.memory.simulate import SimulatedModel, nf4_holds
from rigsa.experiments.methods.gradient_masks import GradientMask
from rigsa.experiments.tasks.task import Size
from rigsa_kernels.optim import StateDtype

GIB = 2**30
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)
"""From the widest to the narrowest."""
RESERVE = 0.1
"""Share of the memory that a plan leaves alone."""
SAME_SIGN_SHARE = 0.539
"""Share of a level's entries that a pruning may keep. Four prunings at this share give the paper's 3.46 %."""


@dataclass(frozen=True)
class LevelPlan:
    """The peak of one level's training, in bytes by part (`rigsa.experiments.memory.live_memory.PARTS`)."""

    level: int
    density: float
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, eq=False)
class Choice:
    """Options that trade time or precision for memory, and how each level's need grows with the micro-batch.

    Attributes:
        checkpointing, state_dtype, quantize: as in `Config`.
        growth: of each level's training.
    """

    checkpointing: bool
    state_dtype: StateDtype
    quantize: str
    growth: dict[int, Growth]


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        shape: the base model's configuration (`rigsa.experiments.model.model_shape`).
        config: of the run.
        device: where it trains.
        size: of the largest row of a training batch.
    """

    shape: PretrainedConfig
    config: Config
    device: torch.device
    size: Size

    def model(self, density: float, **options: object) -> SimulatedModel:
        """The simulated model at one density, with some fields of the configuration replaced."""
        return SimulatedModel(self.shape, dataclasses.replace(self.config, **options), self.device, density)  # type: ignore[arg-type]


def usable(memory: float) -> float:
    """Bytes of a device with `memory` bytes that a plan may fill."""
    return (1 - RESERVE) * memory


def expected_densities(
    shape: PretrainedConfig, config: Config, same_sign_share: float = SAME_SIGN_SHARE
) -> dict[int, float]:
    """Level to density, as the method expects it if that share keeps its sign (`Method.densities`).

    The density of an adapter of PEFT is the numbers that it trains as a share of its layers' weights.

    Raises:
        RigsaError: the share is out of range.
    """
    if not 0 < same_sign_share <= 1:
        raise RigsaError(f"--same-sign-share: expected more than 0 and at most 1, got {same_sign_share}")
    if not config.method.gated:
        return {0: SimulatedModel(shape, config, torch.device("cpu"), 1.0).trained_share()}
    return config.method.densities(config, same_sign_share)


def plan_levels(target: Target, densities: Mapping[int, float]) -> list[LevelPlan]:
    """The plan of every level under the options that the configuration has."""
    micro_batch, accumulates = target.config.micro_batch_size, target.config.accumulation_steps > 1
    plans = []
    for level, density in densities.items():
        usage = target.model(density).training_step(target.size, micro_batch, accumulates=accumulates)
        plans.append(LevelPlan(level, density, usage.by_part))
    return plans


def plan_test(target: Target, density: float) -> int:
    """Bytes of the largest test batch, prompts with all their examples, through an adapter of that density."""
    shown = 0 if target.config.is_text else max(target.config.shots)
    size = dataclasses.replace(target.size, tokens=target.size.tokens * (1 + shown))
    return target.model(density).test_pass(size, target.config.eval_batch_size).peak


def plan_choosing(target: Target) -> int:
    """The peak in bytes while a mask is chosen from the gradients of all entries; 0 for methods that do not do that."""
    method = target.config.method
    return target.model(1.0).scoring_pass(method.score, target.size).peak if isinstance(method, GradientMask) else 0


def choices(target: Target, densities: Mapping[int, float]) -> Iterator[Choice]:
    """Every combination of options, the least intrusive first; NF4 where the method and every layer take it.

    The step is one of several micro-batches, unless the configuration steps in backward.
    """
    for quantize, checkpointing in itertools.product(_bases(target), (False, True)):
        growth: dict[int, Growth] = {}
        moments: dict[int, dict[StateDtype, int]] = {}
        for level, density in densities.items():
            model = target.model(density, quantize=quantize, checkpointing=checkpointing)
            growth[level] = _growth(model, target.size)
            moments[level] = {state_dtype: model.moment_bytes(state_dtype) for state_dtype in STATE_DTYPES}
        for state_dtype in STATE_DTYPES:
            held = {level: growth[level].holding("optimiser", moments[level][state_dtype]) for level in densities}
            yield Choice(checkpointing, state_dtype, quantize, held)


def _bases(target: Target) -> list[str]:
    """The formats in which the frozen weights can be kept, the wider first."""
    holds = nf4_holds(target.shape, target.config)
    return [base for base in target.config.method.quantizations if base != "nf4" or holds]


def _growth(model: SimulatedModel, size: Size) -> Growth:
    accumulates = not model.config.step_in_backward
    return Growth.between(*(model.training_step(size, prompts, accumulates=accumulates) for prompts in (2, 3)))


def require_fit(target: Target, densities: Mapping[int, float], memory: float) -> list[LevelPlan]:
    """The plan of every level.

    Args:
        memory: bytes of the device, reserve included.

    Raises:
        RigsaError: a level does not fit. The message names the options with which it would.
    """
    plans = plan_levels(target, densities)
    worst = max(plans, key=lambda plan: plan.peak)
    if worst.peak > usable(memory):
        way_out = f"{what_fits(target, worst, usable(memory))}. `python -m rigsa.run plan` shows every choice."
        raise RigsaError(f"level {worst.level} {_too_much(worst.peak, memory)}. {way_out}")
    choosing = plan_choosing(target)
    if choosing > usable(memory):
        raise RigsaError(
            f"choosing the mask {_too_much(choosing, memory)}. {what_fits_choosing(target, usable(memory))}."
        )
    return plans


def _too_much(peak: int, memory: float) -> str:
    limit = f"{usable(memory) / GIB:.1f} ({1 - RESERVE:.0%} of {memory / GIB:.1f} GiB)"
    return f"is planned to need {peak / GIB:.1f} GiB; expected at most {limit}"


def what_fits(target: Target, plan: LevelPlan, limit: float) -> str:
    """The least intrusive options with which that level needs at most `limit` bytes, as a sentence."""
    config = dataclasses.replace(target.config, step_in_backward=False)
    whole = [size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0]
    for choice in choices(dataclasses.replace(target, config=config), {plan.level: plan.density}):
        growth = choice.growth[plan.level]
        sizes = [size for size in whole if size <= growth.largest(limit)]
        if sizes and _asks_no_less_than(config, choice):
            peak = growth.at(sizes[-1]).peak / GIB
            return f"It would fit in {peak:.1f} GiB with {_options(target.config, choice, sizes[-1])}"
    return "Nothing that a run can choose makes it fit"


def what_fits_choosing(target: Target, limit: float) -> str:
    """The least intrusive options with which choosing the mask needs at most `limit` bytes, as a sentence."""
    config = target.config
    sizes = sorted({config.micro_batch_size, 1}, reverse=True)
    for quantize, checkpointing, size in itertools.product(_bases(target), (False, True), sizes):
        choice = Choice(checkpointing, config.state_dtype, quantize, {})
        other = dataclasses.replace(config, quantize=quantize, checkpointing=checkpointing, micro_batch_size=size)
        peak = plan_choosing(dataclasses.replace(target, config=other))
        if peak <= limit and _asks_no_less_than(config, choice):
            return f"It would fit in {peak / GIB:.1f} GiB with {_options(config, choice, size)}"
    return "Nothing that a run can choose makes it fit; methods without a mask from gradients need less"


def _asks_no_less_than(config: Config, choice: Choice) -> bool:
    """Whether the choice saves at least what the configuration saves already."""
    return (
        choice.checkpointing >= config.checkpointing
        and STATE_DTYPES.index(choice.state_dtype) >= STATE_DTYPES.index(config.state_dtype)
        and QUANTIZATIONS.index(choice.quantize) >= QUANTIZATIONS.index(config.quantize)
    )


def _options(config: Config, choice: Choice, micro_batch: int) -> str:
    """The options to add to the command line."""
    options = [f"--micro-batch-size {micro_batch}"]
    if choice.checkpointing and not config.checkpointing:
        options.append("--checkpointing")
    if choice.state_dtype != config.state_dtype:
        options.append(f"--state-dtype {choice.state_dtype}")
    if choice.quantize != config.quantize:
        options.append(f"--quantize {choice.quantize}")
    if config.step_in_backward:
        options.append("--no-step-in-backward")
    return " ".join(options)
