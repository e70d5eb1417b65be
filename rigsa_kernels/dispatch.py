"""Which of two ways a layer's products take: the written rule, and how to override it.

*fused*: one kernel puts the weight tile together and multiplies it; nothing of the size of the matrix is kept.
*gemm*: a matrix is kept over the step (``W0 + alpha * D`` when composed, D when exact), and the library multiplies it.

| device | operand dtype | layer | path | why |
|---|---|---|---|---|
| CPU | any | matrix | gemm | there is no kernel; the matrix is made once a step instead of once a micro-batch |
| any | any | NF4 | fused | a 16-bit copy is what four bits are there to avoid (on a CPU: dequantised in each call) |
| CUDA | float64, float32 | matrix | gemm | no tensor cores at full precision, so nothing hides the decoding |
| CUDA | 16-bit | N or K not a multiple of 16 | gemm | asynchronous copies of 128 bits need aligned rows |
| CUDA | 16-bit | up to 16 tokens a call | gemm | generation reads each weight once: 2 bytes of a kept matrix, not 4 |
| CUDA | 16-bit | any other | fused | no copy, for up to 4 % of a product's time (a dense float32 D: 23 %) |

The density decides nothing: a packed tile costs the same instructions at any density, because loads of entries that are
not free are switched off, not skipped. The numbers are predictions from the compiled kernels
(``python -m rigsa_kernels.inspect``); the rule was not measured on a GPU.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Path = Literal["fused", "gemm"]
GENERATION_TOKENS = 16
ALIGNED_ENTRIES = 16


def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    *,
    nf4: bool = False,
    force: Path | None = None,
) -> Path:
    """The path of one call.

    Args:
        device, dtype: of the operands.
        shape: (N, K) of the layer.
        tokens: M, the rows of x.
        nf4: whether W0 is in four bits.
        force: take this path instead of the rule's.

    Raises:
        ValueError: `force` is unknown, or that path cannot run here.
    """
    if force is None:
        return _rule(device, dtype, shape, tokens, nf4)
    if force not in get_args(Path):
        raise ValueError(f"force: expected one of {', '.join(get_args(Path))} or None, got {force!r}")
    if force == "gemm" and nf4:
        raise ValueError("force: 'gemm' keeps a matrix, which a 4-bit layer has none of; use 'fused' or None")
    if force == "fused" and device.type != "cuda" and not nf4:
        raise ValueError(
            f"force: 'fused' runs a Triton kernel on CUDA, and the layer is on {device}; use 'gemm' or None"
        )
    if force == "fused" and dtype == torch.float64:
        raise ValueError("force: 'fused' takes bfloat16, float16 or float32, got float64; use 'gemm' or None")
    return force


def _rule(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int, nf4: bool) -> Path:
    if nf4:
        return "fused"
    if device.type != "cuda" or tokens <= GENERATION_TOKENS or dtype not in (torch.bfloat16, torch.float16):
        return "gemm"
    return "fused" if all(size % ALIGNED_ENTRIES == 0 for size in shape) else "gemm"
