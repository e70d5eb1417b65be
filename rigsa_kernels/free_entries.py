"""The free entries of many packed matrices at once: read them, write them, or write ``W0 + alpha * D`` there.

A layer whose pattern is packed can multiply by its own weight while that holds ``W0 + alpha * D``
(`rigsa_kernels.in_place`). These operators put it there and take it away again. On CUDA each is one launch for all
layers of a model, which finds entries by population count, without a list of their positions.

`patterns` holds words, word_offsets and row_base of each matrix in turn (`SparsePattern.tensors`). The tensors of one
list share one dtype and one device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rigsa_kernels.format import flat_indices
from rigsa_kernels.library import define, on_first_use
from rigsa_kernels.reference import add_scaled


def gather_free_(packed: list[Tensor], matrices: list[Tensor], patterns: list[Tensor]) -> None:
    """``packed[i] = matrices[i]`` at the free entries, row by row; ``[nnz]`` from ``[N, K]``."""
    for entries, matrix, index in zip(packed, matrices, _indices(matrices, patterns), strict=True):
        entries.copy_(matrix.take(index))


def scatter_free_(matrices: list[Tensor], packed: list[Tensor], patterns: list[Tensor]) -> None:
    """``matrices[i] = packed[i]`` at the free entries; the others stay."""
    for matrix, entries, index in zip(matrices, packed, _indices(matrices, patterns), strict=True):
        matrix.view(-1).index_put_((index,), entries.to(matrix.dtype))


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
    rows = zip(matrices, base_values, values, alphas, _indices(matrices, patterns), strict=True)
    for matrix, base, value, alpha, index in rows:
        matrix.view(-1).index_put_((index,), add_scaled(base, value, alpha))


def with_free(matrix: Tensor, packed: Tensor, pattern: list[Tensor]) -> Tensor:
    """A copy of `matrix` whose free entries are `packed`."""
    copy = matrix.clone()
    torch.ops.rigsa.scatter_free_([copy], [packed], pattern)
    return copy


def _indices(matrices: list[Tensor], patterns: list[Tensor]) -> list[Tensor]:
    return [flat_indices(words, matrix.shape[1]) for matrix, words in zip(matrices, patterns[::3], strict=True)]


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
