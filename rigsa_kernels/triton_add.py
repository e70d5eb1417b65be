"""``base + alpha * term`` in one pass, where two products make an exact layer's output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def add_scaled_kernel(base_ptr, term_ptr, alpha_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """The sum in float32, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    base = tl.load(base_ptr + at, mask=ok, other=0.0).to(tl.float32)
    term = tl.load(term_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (base + tl.load(alpha_ptr) * term).to(out_ptr.dtype.element_ty), mask=ok)


def add_scaled(base: Tensor, term: Tensor, alpha: Tensor) -> Tensor:
    """Launcher of ``rigsa::add_scaled``.

    Raises:
        ValueError: shapes or devices that do not fit, or a gate that is not float32 of one entry.
    """
    if base.shape != term.shape or not base.device == term.device == alpha.device:
        raise ValueError(f"term: expected {list(base.shape)} on {base.device}, got {list(term.shape)} on {term.device}")
    if alpha.dtype != torch.float32 or alpha.numel() != 1:
        raise ValueError(f"alpha: expected float32 of one entry, got {alpha.dtype} {list(alpha.shape)}")
    base, term = base.contiguous(), term.contiguous()
    out = torch.empty_like(base)
    if out.numel():
        with torch.cuda.device_of(base):
            add_scaled_kernel[(-(-out.numel() // BLOCK),)](
                base, term, alpha, out, out.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
            )
    return out
