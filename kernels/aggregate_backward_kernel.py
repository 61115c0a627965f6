"""Gradient of pre: the products of the gradient of u with every stream."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def aggregate_backward_kernel(
    x_ptr,
    du_ptr,
    dpre_ptr,
    tokens,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dpre[t, i] = sum_c du[t, c] x[t, i, c]; x [T, N, C], du [T, C], dpre [T, N] float32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    last = tl.zeros_like(rows) + tokens - 1
    rows = tl.minimum(rows, last)
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    for c in range(0, C, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
        mask = inside[None, :]
        at = rows[:, None] * C + channel[None, :]
        du = tl.load(du_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * (N * C) + channel[None, :]
        updated = ()
        for j in tl.static_range(N):
            stream = tl.load(x_ptr + at + j * C, mask=mask, other=0.0).to(tl.float32)
            updated = updated + (sums[j] + du * stream,)
        sums = updated
    for j in tl.static_range(N):
        tl.store(dpre_ptr + rows * N + j, tl.sum(sums[j], 1), mask=valid)
