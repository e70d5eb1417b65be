"""The free entries of many packed matrices at once: read them, write them, or write ``W0 + alpha * D`` there.

A layer whose pattern is packed can multiply by its own weight while that holds ``W0 + alpha * D``
(`rigsa_kernels.in_place`). These operators put it there and take it away again. On CUDA each is one launch for all
layers of a model, which finds entries by population count, without a list of their positions.

`patterns` holds the three tensors of each matrix's pattern in turn (`SparsePattern.tensors`). The tensors of one
list share one dtype and one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ._ops import ops as operators
from .format import positions
from .library import define, on_first_use
from .reference import add_scaled
from .tiles import is_tiled, touched


def gather_free_(packed: list[Tensor], matrices: list[Tensor], patterns: list[Tensor]) -> None:
    """``packed[i] = matrices[i]`` at the free entries, row by row; ``[nnz]`` from ``[N, K]``."""
    for entries, matrix, pattern in zip(packed, matrices, _each(patterns), strict=True):
        entries.copy_(_read(matrix, pattern))


def scatter_free_(matrices: list[Tensor], packed: list[Tensor], patterns: list[Tensor]) -> None:
    """``matrices[i] = packed[i]`` at the free entries; the others stay."""
    for matrix, entries, pattern in zip(matrices, packed, _each(patterns), strict=True):
        _write(matrix, pattern, entries.to(matrix.dtype))


def compose_free_(
    matrices: list[Tensor], base_values: list[Tensor], values: list[Tensor], alphas: list[Tensor],
    patterns: list[Tensor],
) -> None:  # fmt: skip
    """``matrices[i] = base_values[i] + alphas[i] * values[i]`` at the free entries; the others stay.

    Args:
        matrices: ``[N, K]`` each, contiguous; any float dtype.
        base_values: ``[nnz]`` each, W0 at the free entries, in the matrices' dtype.
        values: ``[nnz]`` each, D at the free entries; any float dtype.
        alphas: gates of shape ``(1,)``. The sum is made in their dtype and rounded once.

    Raises:
        NonFiniteGateError: on a CPU; matrices before the gate's are written already.
    """
    rows = zip(matrices, base_values, values, alphas, _each(patterns), strict=True)
    for matrix, base, value, alpha, pattern in rows:
        _write(matrix, pattern, add_scaled(base, value, alpha))


def with_free(matrix: Tensor, packed: Tensor, pattern: list[Tensor]) -> Tensor:
    """A copy of `matrix` whose free entries are `packed`."""
    copy = matrix.clone()
    operators.scatter_free_([copy], [packed], pattern)
    return copy


def _each(patterns: list[Tensor]) -> list[list[Tensor]]:
    """One matrix's three tensors at a time."""
    return [patterns[at : at + 3] for at in range(0, len(patterns), 3)]


def _read(matrix: Tensor, pattern: list[Tensor]) -> Tensor:
    """The free entries, one after another: whole rows and whole columns without a list of positions."""
    lines = _whole_lines(matrix, pattern)
    if lines is None:
        return matrix.take(positions(pattern, (matrix.shape[0], matrix.shape[1])))
    return matrix.index_select(*lines).view(-1)


def _write(matrix: Tensor, pattern: list[Tensor], entries: Tensor) -> None:
    lines = _whole_lines(matrix, pattern)
    if lines is None:
        at = positions(pattern, (matrix.shape[0], matrix.shape[1]))
        matrix.view(-1).index_put_((at,), entries)
    else:
        dim, numbers = lines
        shape = (len(numbers), matrix.shape[1]) if dim == 0 else (matrix.shape[0], len(numbers))
        matrix.index_copy_(dim, numbers, entries.view(shape))


def _whole_lines(matrix: Tensor, pattern: list[Tensor]) -> tuple[int, Tensor] | None:
    """Where tiles make up whole rows (0) or whole columns (1): which ones."""
    if not is_tiled(pattern):
        return None
    part = touched(pattern, (matrix.shape[0], matrix.shape[1]))
    if part.pattern or (part.rows is None) == (part.columns is None):
        return None
    return (0, part.rows) if part.rows is not None else (1, cast(Tensor, part.columns))


def _on_cuda(reference: Callable[..., None], launcher: str) -> Callable[..., None]:
    """The kernel; PyTorch for float64 matrices, as on every device."""
    kernel = on_first_use(launcher)

    def run(*lists: list[Tensor]) -> None:
        wide = lists[0] and lists[0][0].dtype == torch.float64
        (reference if wide else kernel)(*lists)

    return run


for _function, _schema in (
    (gather_free_, "Tensor(a!)[] packed, Tensor[] matrices, Tensor[] patterns"),
    (scatter_free_, "Tensor(a!)[] matrices, Tensor[] packed, Tensor[] patterns"),
    (
        compose_free_,
        "Tensor(a!)[] matrices, Tensor[] base_values, Tensor[] values, Tensor[] alphas, Tensor[] patterns",
    ),
):
    _name = _function.__name__
    define(
        f"{_name}({_schema}) -> ()", _function, _on_cuda(_function, f"triton_free_entries.{_name}"), lambda *lists: None
    )
define(
    "with_free(Tensor matrix, Tensor packed, Tensor[] pattern) -> Tensor",
    with_free,
    with_free,
    lambda matrix, packed, pattern: torch.empty_like(matrix),
)
