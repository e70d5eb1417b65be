"""Initial values, selection and optimiser: on the GPU the bits of PyTorch's code on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.gpu_proof.journal import Journal
from benchmarks.gpu_proof.setting import Setting
from rigsa_kernels import MaskedAdamW, SparsePattern
from rigsa_kernels.init import initial_values
from rigsa_kernels.select import Entries, drawn, ranked, same_sign, top_k

STREAM = {"seed": 2**63 + 3, "key": 2**32 - 5}
BOUND = 0.1
STEPS = 4
CPU = torch.device("cpu")


def run(setting: Setting, journal: Journal) -> None:
    """The quick checks first: a budget that ends cuts off selections, each of which compiles kernels of its own."""
    for values, moments in product((torch.float32, torch.bfloat16), ("float32", "bfloat16", "int8")):
        with journal.guarded(what="AdamW", values=str(values), moments=moments) as row:
            row["ok"] = _same_updates(values, moments, setting)
    shapes = [(40, 70)] if setting.dry else [(576, 1536), (300, 70), (513, 1027), (2048, 2048)]
    for shape in shapes:
        with journal.guarded(what="a draw without replacement", shape=shape) as row:
            sides = [_mask(drawn(shape, seed=5, key=9, device=device), 700) for device in (CPU, setting.device)]
            row["ok"] = torch.equal(*sides)
    for shape, density, dtype in product(shapes, (1.0, 0.3), (torch.float32, torch.bfloat16, torch.float16)):
        with journal.guarded(
            what="initial values and selection", shape=shape, density=density, dtype=str(dtype)
        ) as row:
            row["differ"] = _where_they_differ(shape, density, dtype, setting.device)
            row["ok"] = not row["differ"]


def _where_they_differ(shape: tuple[int, int], density: float, dtype: torch.dtype, device: torch.device) -> list[str]:
    pattern = SparsePattern.dense(*shape)
    if density < 1:
        pattern = SparsePattern.from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density)
    trained = _with_ties(initial_values(pattern, BOUND, dtype=dtype, **STREAM))
    sides = [dict(_selections(pattern.to(where), trained.to(where))) for where in (CPU, device)]
    return [name for name in sides[0] if not torch.equal(sides[0][name], sides[1][name])]


def _with_ties(values: Tensor) -> Tensor:
    """Trained values as a selection meets them: rounded, so that many are equal, and half of their signs turned."""
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    return ((values.float() * 80).round() / 80 + torch.where(noise < 0.5, 0.05, -0.05)).to(values.dtype)


def _selections(pattern: SparsePattern, trained: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every selection of values trained on `pattern`, on the CPU."""
    where = trained.device
    yield "initial values", initial_values(pattern, BOUND, dtype=trained.dtype, device=where, **STREAM).cpu()
    yield "same sign", same_sign(trained, pattern, bound=BOUND, **STREAM).cpu()
    for by in ("magnitude", "score"):
        yield by, _mask(ranked(trained, pattern, by=by), pattern.nnz // 3)


def _mask(ranking: Entries, count: int) -> Tensor:
    return top_k({"a": ranking}, count)["a"].to_mask().cpu()


def _same_updates(dtype: torch.dtype, moments: str, setting: Setting) -> bool:
    """float32 with moments in float32 goes through PyTorch's own code on a CPU, which rounds otherwise."""
    on_cpu, there = (_updated(dtype, moments, device, setting.dry) for device in (CPU, setting.device))
    if (dtype, moments) == (torch.float32, "float32"):
        return all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(on_cpu, there, strict=True))
    return all(torch.equal(one, other) for one, other in zip(on_cpu, there, strict=True))


def _updated(dtype: torch.dtype, moments: str, device: torch.device, dry: bool) -> list[Tensor]:
    """Parameters of many sizes, one of them not aligned, after a few steps with gradients of every magnitude."""
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 256, 3001) if dry else (5, 256, 4096, 100_003)
    tensors = [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]
    tensors.append(torch.randn(sizes[-1] + 1, generator=generator).to(dtype).to(device)[1:])
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = MaskedAdamW([{"params": parameters}], lr=1e-2, state_dtype=moments)  # type: ignore[arg-type]
    for _ in range(STEPS):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 10.0 ** torch.randint(-12, 3, parameter.shape, generator=generator)
            parameter.grad = (noise * scale).to(dtype).to(device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters]
