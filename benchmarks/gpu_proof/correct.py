"""Every product kernel against float64, at real shapes, and the layers on every path; outputs start as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import check_layer, make_problem
from benchmarks.gpu_proof.cases import KernelCase, LayerCase, cases
from benchmarks.gpu_proof.from_tests import load
from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting, ask_driver, cores
from benchmarks.gpu_proof.workers import spread
from benchmarks.providers import build_ours
from rigsa_kernels import gated_linear

RESULTS = ("y", "dx", "dvalues", "dalpha")
ALPHA = 0.1
MIB_A_WORKER = 6_000
"""Of the device's memory: the largest case in float64."""


def run(setting: Setting, journal: Journal) -> None:
    load("oracle")  # before the fork
    torch.set_num_threads(1)
    asked = cases(setting.dry)
    journal.note(cases=len(asked))
    spread(partial(check, device=str(setting.device)), asked, workers(setting), journal)


def workers(setting: Setting) -> int:
    if setting.dry:
        return 1
    memory = int(ask_driver("memory.total") or 24_000)
    return max(1, min(cores() // 2, memory // MIB_A_WORKER))


def check(case: KernelCase | LayerCase, device: str) -> dict[str, Any]:
    found = check_path(case, device) if isinstance(case, LayerCase) else check_kernels(case, device)
    if device == "cuda":
        torch.cuda.empty_cache()  # the others need it
    return found


def check_path(case: LayerCase, device: str) -> dict[str, Any]:
    """`check_layer` raises where a result is off."""
    problem = make_problem(case.m, (case.n, case.k), case.dtype, torch.device(device))
    layer = build_ours(problem, case.share, numerics=case.numerics, force=case.force, tile=case.tile)
    with poisoned():
        check_layer(layer, problem)
    return {"ok": True}


def check_kernels(case: KernelCase, device: str) -> dict[str, Any]:
    """The largest error of each result as a share of what is allowed, the worse of both numerics."""
    oracle = load("oracle")
    *operands, values, alpha, pattern, dy = oracle.make_inputs(
        case.m, case.n, case.k, case.density, ALPHA, case.dtype, device=device
    )
    x, weight, bias = operands
    values = values.to(case.values_dtype)
    base = oracle.quantize_nf4(weight) if case.nf4 else weight
    if case.layout == "unaligned":
        x, base, bias, values, dy = (unaligned(tensor) for tensor in (x, base, bias, values, dy))
    elif case.layout == "strided":
        x, dy = (torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in (x, dy))
    arguments = x, base, bias, values, alpha, pattern, dy
    want, sizes = oracle.truth(*arguments)
    worst, repeats = dict.fromkeys(RESULTS, 0.0), True
    for exact in (True, False):
        eager = oracle.eager_results(*arguments, exact)
        got, again = launch(*arguments, exact), launch(*arguments, exact)
        repeats &= all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
        for name, *columns in zip(RESULTS, got, want, sizes, eager, strict=True):
            share = oracle.share_of_bound(*columns, case.dtype)
            worst[name] = share if not share <= worst[name] else worst[name]  # NaN is the worst
    return {"ok": repeats and all(share <= 1 for share in worst.values()), "repeats": repeats, **worst}


def launch(x, base, bias, values, alpha, pattern, dy, exact) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """``[y, dx, dvalues, dalpha]`` by the public function."""
    x, values, alpha = (tensor.detach().requires_grad_() for tensor in (x, values, alpha))
    with poisoned():
        y = gated_linear(x, base, bias, values, alpha, pattern, exact=exact)
        return [y.detach(), *torch.autograd.grad(y, (x, values, alpha), dy)]


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that begins one entry past an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new tensors are full of NaN until they are written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
