"""What a training loop may do beside plain steps: each has to give what the plain steps give, or say that it will not.

Every check trains a small model for a few steps twice and compares losses and trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_proof.journal import Journal, describe_error
from benchmarks.gpu_proof.setting import Setting
from benchmarks.providers import ALPHA, ticket_mask
from benchmarks.race import UnavailableError
from rigsa_kernels import MaskedAdamW, SparsePattern, gated_linears, replace_linears

STEPS = 4
TOKENS = 64
CLOSE = 0.02
"""Relative difference of gradients that may come from other roundings of 16-bit products."""
TICKET_SHARE = 0.1
NUMERICS = {
    "torch.compile": ("composed",),
    "torch.compile with CUDA graphs": ("composed",),
    "autocast": ("composed", "exact"),
}
"""Those that are asked for, where it is not all three: a compilation takes long."""


class Loop:
    """A small model, its optimiser, and one batch."""

    def __init__(self, setting: Setting, share: float, numerics: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.setting, self.share, self.numerics = setting, share, numerics
        width = 64 if setting.dry else 256
        torch.manual_seed(0)
        layers = [nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)]
        self.model = nn.Sequential(*layers).to(setting.device, dtype)
        replace_linears(self.model, alpha_init=ALPHA, numerics=numerics)  # type: ignore[arg-type]
        if share < 1:
            for layer in gated_linears(self.model).values():
                mask = ticket_mask(layer.pattern.shape, share, setting.device)
                layer.set_pattern(SparsePattern.from_mask(mask))
        self.optimizer = MaskedAdamW(self.model, lr=1e-3, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(TOKENS, width, generator=generator).to(setting.device, dtype).requires_grad_()
        self.start = [parameter.detach().clone() for parameter in self.trained]
        self.forward: Callable[[Tensor], Tensor] = self.model

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def backward(self, rows: slice = slice(None), share: float = 1.0) -> Tensor:
        """Of the mean loss over `rows`, times `share`."""
        x = self.x[rows]
        loss = (self.forward(x).float() - x.float()).pow(2).mean()
        (loss * share).backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def updates(self) -> Tensor:
        """What training has changed, as one vector, in float64 on the CPU."""
        pairs = zip(self.trained, self.start, strict=True)
        return torch.cat([(now.detach() - before).double().flatten() for now, before in pairs]).cpu()

    def gradients(self) -> Tensor:
        """As one vector, in float64 on the CPU."""
        found = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        return torch.cat([grad.double().flatten() for grad in found]).cpu()


def run(setting: Setting, journal: Journal) -> None:
    for name, check in CHECKS.items():
        for share, numerics in product((TICKET_SHARE, 1.0), NUMERICS.get(name, ("composed", "auto", "exact"))):
            with journal.guarded(check=name, density=share, numerics=numerics) as row:
                row |= check(Loop(setting, share, numerics), Loop(setting, share, numerics))


def compare(plain: Loop, other: Loop) -> dict[str, object]:
    """After the same steps: the same bits."""
    return _difference(plain.updates(), other.updates(), 0.0)


def compare_gradients(plain: Loop, other: Loop, backward: Callable[[], object]) -> dict[str, object]:
    """Of each of a few steps; both models then take the same one."""
    worst: dict[str, object] = {"difference": -1.0}
    for _ in range(STEPS):
        plain.backward()
        backward()
        found = _difference(plain.gradients(), other.gradients(), CLOSE)
        worst = max(worst, found, key=lambda entry: float(str(entry["difference"])))
        for one, same in zip(plain.trained, other.trained, strict=True):
            assert one.grad is not None
            same.grad = one.grad.clone()
        for loop in (plain, other):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    return worst


def _difference(want: Tensor, got: Tensor, allowed: float) -> dict[str, object]:
    difference = float((got - want).norm() / want.norm())
    return {"ok": difference <= allowed, "difference": difference, "allowed": allowed}


def no_synchronisation(plain: Loop, other: Loop) -> dict[str, object]:
    """PyTorch raises at any wait for the device; the first step may compile, and measure the weights."""
    _needs_cuda(other)
    plain.step()
    other.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        other.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain.step()
    return compare(plain, other)


def side_stream(plain: Loop, other: Loop) -> dict[str, object]:
    _needs_cuda(other)
    for _ in range(STEPS):
        plain.step()
        with _on_a_side_stream():
            other.step()
    return compare(plain, other)


def alternating_streams(plain: Loop, other: Loop) -> dict[str, object]:
    """Every second step on another stream: what a layer keeps must not be tied to the one that made it."""
    _needs_cuda(other)
    for number in range(STEPS):
        plain.step()
        if number % 2:
            with _on_a_side_stream():
                other.step()
        else:
            other.step()
    return compare(plain, other)


def checkpointing(plain: Loop, other: Loop) -> dict[str, object]:
    other.forward = lambda x: checkpoint(other.model, x, use_reentrant=False)
    for _ in range(STEPS):
        plain.step()
        other.step()
    return compare(plain, other)


def compiled(plain: Loop, other: Loop) -> dict[str, object]:
    other.forward = torch.compile(other.model, backend="aot_eager" if other.setting.dry else "inductor")
    return compare_gradients(plain, other, other.backward)


def compiled_with_graphs(plain: Loop, other: Loop) -> dict[str, object]:
    """The mode ``reduce-overhead`` captures what it has compiled, by itself."""
    _needs_cuda(other)
    other.forward = torch.compile(other.model, mode="reduce-overhead")
    try:
        return compare_gradients(plain, other, other.backward)
    except RuntimeError as error:
        return _refused(error)


def graphed_callables(plain: Loop, other: Loop) -> dict[str, object]:
    """PyTorch's helper that captures a model's passes: it replays right, or says that it cannot."""
    _needs_cuda(other)
    try:
        other.forward = torch.cuda.make_graphed_callables(other.model, (other.x.detach().requires_grad_(),))
    except RuntimeError as error:
        return _refused(error)
    return compare_gradients(plain, other, other.backward)


def accumulation(plain: Loop, other: Loop) -> dict[str, object]:
    """Two halves of a batch, each with half of its weight, against the whole batch."""

    def halves() -> None:
        for rows in (slice(0, TOKENS // 2), slice(TOKENS // 2, None)):
            other.backward(rows, 0.5)

    return compare_gradients(plain, other, halves)


def autocast(plain: Loop, other: Loop) -> dict[str, object]:
    """Products in bfloat16 in a float32 model, against that model without autocast."""
    wide, reference = (Loop(loop.setting, loop.share, loop.numerics, torch.float32) for loop in (other, plain))

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(wide.setting.device.type, torch.bfloat16):
            return wide.model(x)

    wide.forward = forward
    return compare_gradients(reference, wide, wide.backward)


def graph_of_passes(plain: Loop, other: Loop) -> dict[str, object]:
    """Forward and backward captured, the update outside."""
    _needs_cuda(other)
    with _on_a_side_stream():
        for _ in range(2):
            other.backward()
            other.optimizer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            other.backward()
    except Exception as error:
        return _refused(error)
    for _ in range(STEPS):
        plain.step()
        other.optimizer.zero_grad(set_to_none=False)
        graph.replay()
        other.optimizer.step()
    return compare(plain, other)


def graph_of_a_step(plain: Loop, other: Loop) -> dict[str, object]:
    """The whole step captured: it replays right, or its capture is refused."""
    _needs_cuda(other)
    with _on_a_side_stream():
        for _ in range(2):
            plain.step()
            other.step()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            other.step()
    except Exception as error:
        return _refused(error)
    for _ in range(STEPS):
        plain.step()
        graph.replay()
    return compare(plain, other)


def _needs_cuda(loop: Loop) -> None:
    if loop.setting.device.type != "cuda":
        raise UnavailableError("needs a CUDA device")


def _refused(error: Exception) -> dict[str, object]:
    """A clear error is right; one that CUDA itself raises in the midst of a capture is not."""
    return {"ok": "CUDA error" not in str(error), "refused": describe_error(error)[:300]}


@contextmanager
def _on_a_side_stream() -> Iterator[None]:
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


Check = Callable[[Loop, Loop], dict[str, object]]
CHECKS: dict[str, Check] = {
    "no host-device synchronisation": no_synchronisation,
    "side stream": side_stream,
    "alternating streams": alternating_streams,
    "activation checkpointing": checkpointing,
    "gradient accumulation": accumulation,
    "autocast": autocast,
    "torch.compile": compiled,
    "torch.compile with CUDA graphs": compiled_with_graphs,
    "graphed callables": graphed_callables,
    "CUDA graph of forward and backward": graph_of_passes,
    "CUDA graph of a step": graph_of_a_step,
}
"""What could leave CUDA in a bad state comes last."""
