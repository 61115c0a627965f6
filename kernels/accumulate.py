"""One term of a weighted sum of streams, the same bits in whichever kernel it is added."""

import triton
import triton.language as tl


@triton.jit
def accumulate(total, weight, tile):
    """total + weight[:, None] * tile in float32, rounded once.

    The fused operation is written out: left to the compiler, which product of a sum it fuses could
    differ between kernels, and a replayed tensor must have the forward pass's bits.
    """
    return tl.fma(weight[:, None], tile.to(tl.float32), total)
