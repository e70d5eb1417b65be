"""What the Triton kernels share. Imported on a GPU only, when the first of them is launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def popcount(bits):
    """Number of set bits, int32, of each uint32. LLVM turns these shifts and masks into one POPC."""
    bits = bits.to(tl.uint32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits & 0x3F).to(tl.int32)


def architecture() -> int:
    """Compute capability of the GPU that is current for Triton, as 89 for 8.9."""
    return int(triton.runtime.driver.active.get_current_target().arch)
