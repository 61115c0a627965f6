"""Gradient of pre, the products of the gradient of u with every stream, and what follows from the
gradients of all mappings.
"""

import triton
import triton.language as tl

from .mapping_backward_kernel import mapping_backward, pre_backward
from .merge_map_kernel import stack


@triton.jit(do_not_specialize=["tokens", "map_programs", "every"])
def aggregate_backward_kernel(
    x_ptr,
    du_ptr,
    m_ptr,
    r_ptr,
    scale_ptr,
    base_ptr,
    dpost_ptr,
    dcomb_ptr,
    merge_post_ptr,
    merge_comb_ptr,
    numbers_ptr,
    planes_ptr,
    pre_partial_ptr,
    partial_ptr,
    tokens,
    map_programs,
    every,
    eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    HEAD: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dpre[t, i] = sum_c du[t, c] x[t, i, c] of x [T, N, C] and du [T, C], and from it and the
    gradients of post and comb what :mod:`.mapping_backward_kernel` says.

    Until there are ``map_programs``, each ``every``-th program computes post's and comb's part for
    BLOCK_M tokens, so that Sinkhorn's latency hides behind the others, which stream BLOCK_T tokens
    of X each and compute pre's part for them.
    """
    pid = tl.program_id(0)
    if pid % every == 0 and pid // every < map_programs:
        mapping_backward(
            m_ptr,
            r_ptr,
            scale_ptr,
            base_ptr,
            dpost_ptr,
            dcomb_ptr,
            merge_post_ptr,
            merge_comb_ptr,
            numbers_ptr,
            planes_ptr,
            partial_ptr,
            pid // every,
            map_programs,
            tokens,
            eps,
            N,
            C,
            ROWS,
            WIDTH,
            MERGE,
            HEAD,
            ITERATIONS,
            BLOCK_M,
        )
        return

    count: tl.constexpr = N if HEAD else (2 + N) * N
    block = pid - tl.minimum(pid // every + 1, map_programs)
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    last = tl.zeros_like(rows) + tokens - 1
    rows = tl.minimum(rows, last)
    # Here, not where they are used: they arrive while the streams do.
    r = tl.load(r_ptr + rows)
    m = tl.load(m_ptr + rows[:, None] * count + tl.arange(0, N)[None, :])
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
    dpre = tl.reshape(tl.sum(stack(sums, N), 1), (BLOCK_T, N))
    pre_backward(
        dpre,
        m,
        r,
        scale_ptr,
        base_ptr,
        numbers_ptr,
        planes_ptr,
        pre_partial_ptr,
        block,
        tl.num_programs(0) - map_programs,
        rows,
        valid,
        eps,
        N,
        C,
        ROWS,
        WIDTH,
    )
