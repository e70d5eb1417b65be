"""Products and optimisers beside the library's: microseconds, TFLOP/s or GB/s, and the share of the ceiling measured.

A layer is timed as it stands in the second micro-batch of a step: what an optimiser step costs belongs to the rows of
the optimiser and to the section `steps`. dx is timed with frozen values, the gradient with a frozen input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.checks import Problem, make_problem
from benchmarks.gpu_proof import journal as journals
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting
from benchmarks.gpu_proof.timing import Clock
from benchmarks.machine import Machine
from benchmarks.providers import OPTIMIZERS, TICKET, build_ours, ticket_mask
from benchmarks.race import Run

SHAPES = [
    (1488, 576, 576), (1488, 1536, 576), (1488, 576, 1536), (3440, 2048, 2048), (3440, 8192, 2048), (3440, 2048, 8192),
    (860, 2048, 8192), (16384, 2048, 2048), (1, 8192, 2048),
]  # fmt: skip
"""Tokens, out_features, in_features: a step of 135M, a step and a prompt of 1.7B, a large batch, one new token."""
UPDATED = 2**26
LIBRARY, GATHERED = "library", "library's dW + gather"
TILES = ("rows", "columns", 32, 64, 128)
Y, DX, GRADIENT = "y", "dx", "gradient"


@dataclass(frozen=True)
class Contestant:
    """One way to compute a layer: the fields of a row, and the three operations."""

    provider: str
    density: float
    values: str
    operations: dict[str, Run]


def run(setting: Setting, journal: Journal) -> None:
    clock, ceilings = Clock(setting), _ceilings(setting)
    journal.note(ceilings=ceilings)
    for name in OPTIMIZERS:
        with journal.guarded(what="optimizer", provider=name) as row:
            row |= _time_optimizer(name, setting, clock, ceilings)
    for m, n, k in [(64, 96, 64)] if setting.dry else SHAPES:
        problem = make_problem(m, (n, k), torch.bfloat16, setting.device)
        for build in _contestants(problem):
            _time_layer(journal, clock, ceilings, problem, build)


def _ceilings(setting: Setting) -> dict[str, float]:
    """Those of the section `environment`, or measured here where it was not run."""
    names = {"copy, read and written": 1e9, "bf16 product": 1e12}
    rows = [*journals.rows(setting.out, "environment"), *journals.rows(setting.out, "environment_2")]
    known = {row["ceiling"]: row["measured"] * names[row["ceiling"]] for row in rows}
    if len(known) == len(names):
        return known
    machine = Machine(setting.device, *((128, 2**16) if setting.dry else (8192, 2**31)))
    return dict(zip(names, (machine.bandwidth(), machine.flops(torch.bfloat16)), strict=True))


def _contestants(problem: Problem) -> Iterator[Callable[[], Contestant]]:
    """The library first: the others are read beside it."""
    yield partial(_library, problem)
    forces = [None] if problem.x.device.type == "cpu" else [None, "fused", "gemm"]
    for density, numerics, force in product((TICKET, 1.0), ("composed", "exact"), forces):
        yield partial(_ours, problem, density, numerics, force)
    yield partial(_ours, problem, 1.0, "composed", None, torch.bfloat16)
    yield from (partial(_ours, problem, TICKET, "composed", None, tile=tile) for tile in TILES)


def _library(problem: Problem) -> Contestant:
    mask = ticket_mask(problem.shape, TICKET, problem.x.device)
    places = mask.view(-1).nonzero().view(-1)
    x, dy, weight = problem.x, problem.dy, problem.weight
    operations: dict[str, Run] = {
        Y: lambda: F.linear(x, weight),
        DX: lambda: dy @ weight,
        GRADIENT: lambda: dy.T @ x,
        GATHERED: lambda: (dy.T @ x).take(places),
    }
    return Contestant(LIBRARY, 1.0, "", operations)


def _ours(
    problem: Problem,
    density: float,
    numerics: str,
    force: str | None,
    values: torch.dtype = torch.float32,
    tile: str | int | None = None,
) -> Contestant:
    options = {"numerics": numerics, "force": force, "values_dtype": values}
    layer = build_ours(problem, density, fresh=False, tile=tile, **options).module
    name = f"ours, {numerics}" + (f", {force}" if force else "") + (f", {tile}" if tile else "")
    operations = {Y: _forward(layer, problem), DX: _dx(layer, problem), GRADIENT: _gradient(layer, problem)}
    return Contestant(name, density, str(values), operations)


def _forward(layer: nn.Module, problem: Problem) -> Run:
    x = problem.x.detach().requires_grad_()
    return lambda: layer(x)


def _dx(layer: nn.Module, problem: Problem) -> Run:
    x = problem.x.detach().requires_grad_()
    trained = list(layer.parameters())
    wanted = [parameter.requires_grad for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(False)
    y = layer(x)
    for parameter, before in zip(trained, wanted, strict=True):
        parameter.requires_grad_(before)
    return lambda: torch.autograd.grad(y, x, problem.dy, retain_graph=True)


def _gradient(layer: nn.Module, problem: Problem) -> Run:
    y = layer(problem.x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return lambda: torch.autograd.grad(y, trained, problem.dy, retain_graph=True)


def _time_layer(
    journal: Journal, clock: Clock, ceilings: dict[str, float], problem: Problem, build: Callable[[], Contestant]
) -> None:
    (n, k), m = problem.shape, len(problem.x)
    shape = {"m": m, "n": n, "k": k}
    try:
        contestant = build()
    except Exception as error:
        journal.row(**shape, ok=False, error=journals.describe_error(error))
        return
    fields = {"provider": contestant.provider, "density": contestant.density, "values": contestant.values}
    for what, operation in contestant.operations.items():
        with journal.guarded(what=what, **shape, **fields) as row:
            times = clock(operation)
            rate = 2 * m * n * k / times.device
            row |= {"us": times.device * 1e6, "host_us": times.host * 1e6, "tflops": rate / 1e12}
            row["share_of_ceiling"] = rate / ceilings["bf16 product"]


def _time_optimizer(name: str, setting: Setting, clock: Clock, ceilings: dict[str, float]) -> dict[str, float]:
    """Bytes: parameters and moments read and written, gradients read."""
    dtype, make = OPTIMIZERS[name]
    parameter = nn.Parameter(torch.randn(2**12 if setting.dry else UPDATED, device=setting.device).to(dtype))
    parameter.grad = torch.randn_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    states = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in [*[parameter] * 3, *states, *states])
    times = clock(optimizer.step)
    rate = moved / times.device
    return {
        "us": times.device * 1e6, "host_us": times.host * 1e6, "gb_per_second": rate / 1e9,
        "share_of_ceiling": rate / ceilings["copy, read and written"],
    }  # fmt: skip
